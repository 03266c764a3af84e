//! The reset hardware, frozen.

use serde::{Deserialize, Serialize};

/// The keyboard controller, version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct KeyboardControllerStateV1 {
    /// The status register as it reads.
    pub status: u8,
    /// The last byte put into the output buffer.
    pub output: u8,
    /// The output port P2.
    pub output_port: u8,
    /// The controller's 32 bytes of memory; byte 0 is the command byte.
    #[serde(with = "crate::base64_bytes")]
    pub memory: Vec<u8>,
    /// The command that waits for a byte at the data port, if one does.
    pub waiting_command: Option<u8>,
}

/// The reset control register, version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ResetStateV1 {
    /// The register as it reads: bits 1 to 3.
    pub control: u8,
}
