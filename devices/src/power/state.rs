//! The ACPI sleep registers, frozen.

use serde::{Deserialize, Serialize};

/// Version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct PowerStateV1 {
    /// The sleep control register as it reads: `SLP_TYP` in bits 2–4.
    pub sleep_control: u8,
    /// The sleep status register: `WAK_STS` in bit 7.
    pub sleep_status: u8,
}
