//! The guest's memory as devices reach it.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory with a bitmap of the pages that devices wrote.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// Whoever keeps the guest's memory mapped; implemented by the VMM.
pub trait DeviceMemory: Send + Sync {
    /// The memory. It stays mapped for as long as this lives.
    fn guest_memory(&self) -> &GuestMemory;
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
}

impl Deref for Memory {
    type Target = GuestMemory;

    fn deref(&self) -> &GuestMemory {
        self.0.guest_memory()
    }
}
