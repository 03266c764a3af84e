//! How large a balloon is to be, and is: shared by the device and whoever sets it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What the driver counts in, whatever the size of its own pages (virtio 1.2, section 5.5.6).
pub const PAGE: u64 = 4096;

#[derive(Debug, Default)]
struct Pages {
    target: AtomicU32,
    actual: AtomicU32,
}

/// Sizes of a balloon, in bytes. The device's source must become ready after a new target is set, or the driver does not hear of it.
#[derive(Clone, Debug, Default)]
pub struct BalloonSize(Arc<Pages>);

impl BalloonSize {
    /// Wishes for a balloon of `bytes`, in whole pages; at most 16 TiB.
    pub fn set_target(&self, bytes: u64) {
        self.set_target_pages(u32::try_from(bytes / PAGE).unwrap_or(u32::MAX));
    }

    /// How large it is to be.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.target_pages()) * PAGE
    }

    /// How large the driver says that it is: as true as the guest.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.actual_pages()) * PAGE
    }

    pub(super) fn target_pages(&self) -> u32 {
        self.0.target.load(Ordering::SeqCst)
    }

    pub(super) fn set_target_pages(&self, pages: u32) {
        self.0.target.store(pages, Ordering::SeqCst);
    }

    pub(super) fn actual_pages(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    pub(super) fn set_actual_pages(&self, pages: u32) {
        self.0.actual.store(pages, Ordering::SeqCst);
    }
}
