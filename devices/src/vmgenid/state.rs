//! The VM generation ID, frozen.

use serde::{Deserialize, Serialize};

/// Version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct VmGenIdStateV1 {
    /// 16 bytes that no other run of the VM has.
    #[serde(with = "crate::base64_bytes")]
    pub id: Vec<u8>,
    /// The guest has not been told of it yet: it was made when the VM went back in time, or became another one.
    pub changed: bool,
}
