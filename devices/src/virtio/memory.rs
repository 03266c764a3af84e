//! The guest's memory as devices reach it.

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Guest memory with a bitmap of the pages that devices wrote.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// Whoever keeps the guest's memory mapped; implemented by the VMM.
pub trait DeviceMemory: Send + Sync {
    /// The memory. It stays mapped for as long as this lives.
    fn guest_memory(&self) -> &GuestMemory;

    /// Whether all of it is there, for as long as this lives.
    fn is_whole(&self) -> bool {
        true
    }

    /// Sees to it that the VMM can access `length` bytes from `start` on. Waits for what is not there.
    ///
    /// # Errors
    /// They cannot be had: who accesses them all the same gets no bytes but a signal.
    fn bring_in(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        let _ = (start, length);
        Ok(())
    }
}

impl DeviceMemory for GuestMemory {
    fn guest_memory(&self) -> &GuestMemory {
        self
    }
}

/// A share of the guest's memory, which stays mapped while there is one.
#[derive(Clone)]
pub struct Memory(Arc<dyn DeviceMemory>);

impl Memory {
    /// A share of what `keeper` keeps.
    #[must_use]
    pub fn new(keeper: Arc<dyn DeviceMemory>) -> Self {
        Self(keeper)
    }

    /// As [`DeviceMemory::is_whole`].
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.0.is_whole()
    }

    /// As [`DeviceMemory::bring_in`].
    ///
    /// # Errors
    /// As there.
    pub fn bring_in(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.0.bring_in(start, length)
    }
}

impl Deref for Memory {
    type Target = GuestMemory;

    fn deref(&self) -> &GuestMemory {
        self.0.guest_memory()
    }
}
