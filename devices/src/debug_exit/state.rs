//! The debug exit port, frozen.

use serde::{Deserialize, Serialize};

/// Version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DebugExitStateV1 {
    /// The last code written, 0 if none was.
    pub code: u8,
}
