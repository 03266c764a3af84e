//! The tap, and what is said of its failures.

use std::io::{Error, ErrorKind};

use super::Tap;

/// A tap that may fail again and again, of which one word is enough.
pub(super) struct Link {
    pub(super) tap: Box<dyn Tap>,
    complained: bool,
}

impl Link {
    pub(super) fn new(tap: Box<dyn Tap>) -> Self {
        Self { tap, complained: false }
    }

    /// Whether another attempt to `what` is worth it now, after `error`. If not, the source will become ready.
    pub(super) fn goes_on_after(&mut self, what: &str, error: &Error) -> bool {
        match error.kind() {
            ErrorKind::WouldBlock => false,
            ErrorKind::Interrupted => true,
            _ => {
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::warn!("the tap cannot {what} a frame: {error}; frames are lost. Is it there, and up?");
                }
                false
            }
        }
    }
}
