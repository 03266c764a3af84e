//! A console, frozen.

use serde::{Deserialize, Serialize};

use super::{DEVICE, TRANSMIT_MAX};
use crate::state::{StateError, ensure};

/// Version 1. What was typed and is not yet the guest's is with the VMM's line, and what is to be printed is in the ring.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ConsoleStateV1 {
    /// How many bytes of the next request of the transmit ring were printed before.
    pub sent: u32,
}

impl ConsoleStateV1 {
    /// Whether a run of the device can have led here; how much was printed.
    pub(super) fn validate(&self) -> Result<usize, StateError> {
        let Self { sent } = self;
        let sent = usize::try_from(*sent).unwrap_or(usize::MAX);
        ensure(sent <= TRANSMIT_MAX, DEVICE, "sent", || {
            format!("{sent}, and no request has more than {TRANSMIT_MAX}")
        })?;
        Ok(sent)
    }
}
