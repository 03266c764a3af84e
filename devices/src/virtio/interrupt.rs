//! A virtio device's interrupt: why, and the line.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::interrupt::InterruptLine;

/// A buffer was used (`InterruptStatus` bit 0).
const USED: u32 = 1;
/// The configuration changed, or the device needs a reset (bit 1).
const CONFIGURATION: u32 = 1 << 1;
/// The bits that there are.
pub(super) const STATUS_BITS: u32 = USED | CONFIGURATION;

/// `InterruptStatus`, `InterruptACK` and the line (virtio 1.2, section 4.2.2).
///
/// Unlike [`InterruptLine`] asks of others, an edge may still be under way when the interrupt controller is saved: the bits stand until
/// the driver acknowledges them, and [`Interrupt::repeat`] raises them anew after a freeze.
pub struct Interrupt {
    status: AtomicU32,
    line: Arc<dyn InterruptLine>,
}

impl Interrupt {
    /// Nothing to tell, on `line`.
    #[must_use]
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    /// A buffer was used.
    pub(super) fn raise_used(&self) {
        self.raise(USED);
    }

    /// The configuration or the device's status changed.
    pub(super) fn raise_configuration(&self) {
        self.raise(CONFIGURATION);
    }

    fn raise(&self, why: u32) {
        self.status.fetch_or(why, Ordering::SeqCst);
        self.trigger();
    }

    fn trigger(&self) {
        if let Err(error) = self.line.trigger() {
            tracing::warn!("a virtio device cannot interrupt the guest: {error}");
        }
    }

    /// Raises again what was not acknowledged.
    pub(super) fn repeat(&self) {
        if self.status() != 0 {
            self.trigger();
        }
    }

    /// `InterruptStatus`.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// `InterruptACK`.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn set(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }
}
