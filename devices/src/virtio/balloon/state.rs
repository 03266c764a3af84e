//! A balloon, frozen.

use serde::{Deserialize, Serialize};

/// Version 1. Which pages are in the balloon the driver knows alone.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct BalloonStateV1 {
    /// How large it is to be, in pages of 4 KiB.
    pub target: u32,
    /// How large the driver says that it is.
    pub actual: u32,
}
