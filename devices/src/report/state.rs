//! The report register, frozen.

use serde::{Deserialize, Serialize};

/// Version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ReportStateV1 {
    /// Bytes written so far, little-endian, committed or not.
    pub latch: u64,
    /// The last committed value.
    pub value: u64,
    /// How many values were committed.
    pub count: u64,
}
