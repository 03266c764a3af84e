//! The MMIO transport (virtio 1.2, section 4.2): registers in a page of guest-physical addresses, and an interrupt.
//!
//! Registers are 32 bits wide and aligned; another access to one reads zeros and writes nothing. The device's configuration
//! from [`CONFIG`] on takes any width.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::device::VirtioDevice;
use super::engine::{Engine, Part};
use super::fault::Fault;
use super::interrupt::Interrupt;
use super::memory::Memory;
use crate::device::{BusDevice, Device, Freezable};
use crate::interrupt::InterruptLine;
use crate::state::{DeviceState, StateError};

/// Bytes of guest-physical addresses that a device takes.
pub const SIZE: u64 = 0x1000;
/// `QueueNotify`: what an ioeventfd answers in our stead.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Where the device's configuration begins.
pub const CONFIG: u64 = 0x100;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "PRDR", little-endian: no one looks at it.
const VENDOR: u32 = 0x5244_5250;

/// A virtio device on the bus.
pub struct VirtioMmio {
    id: String,
    engine: Arc<Mutex<Engine>>,
    interrupt: Arc<Interrupt>,
}

impl VirtioMmio {
    /// Puts `device` behind a transport. `id` names its state.
    #[must_use]
    pub fn new(id: String, device: Box<dyn VirtioDevice>, memory: Memory, line: Arc<dyn InterruptLine>) -> Self {
        let interrupt = Arc::new(Interrupt::new(line));
        let engine = Engine::new(device, memory, Arc::clone(&interrupt), id.clone());
        Self { id, engine: Arc::new(Mutex::new(engine)), interrupt }
    }

    /// What the device's thread works on.
    #[must_use]
    pub fn engine(&self) -> Arc<Mutex<Engine>> {
        Arc::clone(&self.engine)
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.lock().kind(),
            0x00c => VENDOR,
            0x010 => self.lock().device_features(),
            0x034 => self.lock().queue_max_size(),
            0x044 => self.lock().queue_ready(),
            // Not under the engine's lock: an interrupt handler need not wait for requests to be served.
            0x060 => self.interrupt.status(),
            0x070 => self.lock().status().into(),
            // SHMLen and SHMBase of a region of shared memory: there is none (section 4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => self.lock().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            0x014 => self.lock().select_device_features(value),
            0x020 => self.lock().set_driver_features(value),
            0x024 => self.lock().select_driver_features(value),
            0x030 => self.lock().select_queue(value),
            0x038 => self.lock().set_queue_size(value),
            0x044 => self.lock().set_queue_ready(value),
            QUEUE_NOTIFY => self.lock().notified(usize::try_from(value).unwrap_or(usize::MAX)),
            0x064 => self.interrupt.acknowledge(value),
            // Bits beyond the eighth are none.
            0x070 => self.lock().set_status((value & 0xff) as u8),
            0x080 => self.lock().set_queue_address(Part::Descriptors, Some(value), None),
            0x084 => self.lock().set_queue_address(Part::Descriptors, None, Some(value)),
            0x090 => self.lock().set_queue_address(Part::Available, Some(value), None),
            0x094 => self.lock().set_queue_address(Part::Available, None, Some(value)),
            0x0a0 => self.lock().set_queue_address(Part::Used, Some(value), None),
            0x0a4 => self.lock().set_queue_address(Part::Used, None, Some(value)),
            _ => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.lock().read_config(offset, data);
        }
        data.fill(0);
        if let Ok(register) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.lock().write_config(offset, data);
        }
        if let Ok(value) = data.try_into()
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}

impl Freezable for VirtioMmio {
    fn save(&self) -> DeviceState {
        let Self { id: _, engine: _, interrupt: _ } = self;
        DeviceState::VirtioMmio(self.lock().save())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::VirtioMmio(state) => self.lock().restore(state),
            other => Err(StateError::wrong_device("virtio-mmio", other)),
        }
    }
}

impl Device for VirtioMmio {
    fn id(&self) -> &str {
        &self.id
    }

    fn quiesce(&mut self, deadline: Instant) -> Result<(), Fault> {
        self.lock().quiesce(deadline)
    }

    fn thaw(&mut self) {
        self.lock().thaw();
    }
}
