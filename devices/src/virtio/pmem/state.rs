//! Persistent memory, frozen.

use serde::{Deserialize, Serialize};

use super::{DEVICE, PmemPlace};
use crate::state::{StateError, ensure};

/// Version 1. Flushes without an answer are in the ring.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct PmemStateV1 {
    /// Where the guest found it: a guest physical address.
    pub start: u64,
    /// How many bytes the guest found.
    pub size: u64,
}

impl PmemStateV1 {
    /// Whether it is what the guest found.
    pub(super) fn validate(&self, place: PmemPlace) -> Result<(), StateError> {
        let Self { start, size } = self;
        let found = PmemPlace { start: *start, size: *size };
        ensure(found == place, DEVICE, "start", || {
            let PmemPlace { start: here, size: bytes } = place;
            format!("that of {size} bytes at {start:#x}, and this machine has {bytes} bytes at {here:#x}")
        })
    }
}
