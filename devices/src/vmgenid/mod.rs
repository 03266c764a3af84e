//! The VM generation ID: tells a guest that it went back in time, or that it is one of several ("Virtual Machine Generation ID",
//! Microsoft, 2012). Linux draws new random numbers then.
//!
//! It is 16 bytes in the guest's memory, where ACPI says, and an interrupt when they change. They change at a rollback, after a cut that was
//! not announced, and at a fork; not at a resume from a freeze, which loses nothing. Whoever makes a VM go back changes the frozen
//! state ([`VmGenIdStateV1`]); the thaw then writes the bytes and interrupts, before any vCPU runs.

mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

pub use state::VmGenIdStateV1;
use vm_memory::{Bytes, GuestAddress};

use crate::device::{BusDevice, Device, Freezable, OPEN_BUS};
use crate::interrupt::InterruptLine;
use crate::state::{DeviceState, StateError, ensure};
use crate::virtio::Memory;

/// Bytes of an ID.
pub const LENGTH: usize = 16;
const DEVICE: &str = "vmgenid";

/// The ID, and where the guest sees it.
pub struct VmGenId {
    id: [u8; LENGTH],
    changed: bool,
    memory: Memory,
    address: GuestAddress,
    line: Arc<dyn InterruptLine>,
}

impl VmGenId {
    /// `id` is drawn at random. The guest is to see it at `address` of `memory`, and hears of a new one on `line`.
    #[must_use]
    pub fn new(id: [u8; LENGTH], memory: Memory, address: u64, line: Arc<dyn InterruptLine>) -> Self {
        Self { id, changed: false, memory, address: GuestAddress(address), line }
    }

    /// Shows the guest the ID: before it boots.
    ///
    /// # Errors
    /// The memory does not reach that far, or that part of it cannot be had.
    pub fn show(&self) -> io::Result<()> {
        self.memory.bring_in(self.address, LENGTH as u64)?;
        self.memory.write_slice(&self.id, self.address).map_err(io::Error::other)
    }
}

impl BusDevice for VmGenId {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(OPEN_BUS);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

impl Freezable for VmGenId {
    fn save(&self) -> DeviceState {
        let Self { id, changed, memory: _, address: _, line: _ } = self;
        DeviceState::VmGenId(VmGenIdStateV1 { id: id.to_vec(), changed: *changed })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::VmGenId(VmGenIdStateV1 { id, changed }) = state else {
            return Err(StateError::wrong_device(DEVICE, state));
        };
        let bytes = <[u8; LENGTH]>::try_from(id.as_slice());
        ensure(bytes.is_ok(), DEVICE, "id", || format!("{} bytes long, not {LENGTH}", id.len()))?;
        self.id = bytes.unwrap_or(self.id);
        self.changed = *changed;
        Ok(())
    }
}

impl Device for VmGenId {
    fn id(&self) -> &str {
        DEVICE
    }

    fn thaw(&mut self) {
        if !self.changed {
            return;
        }
        let told = self.show().and_then(|()| self.line.trigger());
        match told {
            Ok(()) => self.changed = false,
            Err(error) => tracing::warn!("the guest does not hear of its new VM generation ID yet: {error}"),
        }
    }
}
