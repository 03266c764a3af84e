//! A block device, frozen.

use serde::{Deserialize, Serialize};

/// Version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct BlockStateV1 {
    /// The disk's size in sectors of 512 bytes: a driver does not cope with another one.
    pub sectors: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Flushes that were taken from the rings and are not complete: they are done anew. Everything else was complete.
    pub flushes: Vec<FlushV1>,
}

/// A flush that is under way.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[serde(deny_unknown_fields)]
pub struct FlushV1 {
    /// The queue that it came by.
    pub queue: u16,
    /// The head of its descriptors.
    pub head: u16,
    /// Guest-physical address of its status byte.
    pub status: u64,
}
