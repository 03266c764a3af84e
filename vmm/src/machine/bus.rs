//! Decodes the guest's accesses: which device a port or an address belongs to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use devices::Device;

use super::kvm::vcpu::Accesses;

/// A device as the bus holds it.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// Two devices want the same address.
#[derive(Debug, thiserror::Error)]
#[error("addresses {start:#x}–{:#x} are taken already", .start + .length - 1)]
pub struct Overlap {
    start: u64,
    length: u64,
}

#[derive(Clone)]
struct Window {
    start: u64,
    length: u64,
    device: SharedDevice,
    /// Offset of the window's first address within the device, for devices with several windows.
    base: u64,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.length)
    }
}

/// A set of windows, none overlapping another.
#[derive(Debug, Default)]
pub struct Bus {
    windows: Vec<Window>,
}

impl Bus {
    /// Adds `length` addresses from `start` that reach `device` from its offset `base` on.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn insert(&mut self, start: u64, length: u64, device: &SharedDevice, base: u64) -> Result<(), Overlap> {
        let position = self.windows.partition_point(|window| window.start < start);
        let before = position.checked_sub(1).and_then(|index| self.windows.get(index));
        let clear_before = before.is_none_or(|window| window.start + window.length <= start);
        let clear_after = self.windows.get(position).is_none_or(|window| start + length <= window.start);
        if !(clear_before && clear_after) {
            return Err(Overlap { start, length });
        }
        self.windows.insert(position, Window { start, length, device: Arc::clone(device), base });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(&Window, u64)> {
        let index = self.windows.partition_point(|window| window.start <= address).checked_sub(1)?;
        let window = self.windows.get(index)?;
        let offset = address - window.start;
        (offset < window.length).then_some((window, window.base + offset))
    }

    /// Reads from whatever is at `address`; all ones where nothing is, as on a bus that nobody drives.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((window, offset)) = self.find(address) {
            window.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// Writes to whatever is at `address`; into the void where nothing is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((window, offset)) = self.find(address) {
            window.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

/// Both address spaces of a machine, and whether it is to stop.
#[derive(Debug, Default)]
pub struct Buses {
    /// `IN` and `OUT`.
    pub ports: Bus,
    /// Memory-mapped.
    pub mmio: Bus,
    /// Set when the guest asked for its end: vCPUs leave the guest at their next exit.
    pub stopping: Arc<AtomicBool>,
}

impl Accesses for Buses {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port.into(), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port.into(), data);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::{BusDevice, DeviceState, Freezable, StateError};

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    impl Freezable for Echo {
        fn save(&self) -> DeviceState {
            DeviceState::Stateless
        }

        fn restore(&mut self, _: &DeviceState) -> Result<(), StateError> {
            Ok(())
        }
    }

    impl Device for Echo {
        fn id(&self) -> &'static str {
            "echo"
        }
    }

    #[test]
    fn accesses_reach_the_device_whose_window_they_fall_into() {
        let device: SharedDevice = Arc::new(Mutex::new(Echo(Vec::new())));
        let mut bus = Bus::default();
        bus.insert(0x100, 8, &device, 0).unwrap();
        bus.insert(0x200, 1, &device, 8).unwrap();
        let read = |address| {
            let mut data = [0; 1];
            bus.read(address, &mut data);
            data[0]
        };
        assert_eq!((read(0x100), read(0x107), read(0x200)), (0, 7, 8));
        assert_eq!((read(0xff), read(0x108), read(0x201)), (0xff, 0xff, 0xff));
    }

    #[test]
    fn windows_that_overlap_are_refused() {
        let device: SharedDevice = Arc::new(Mutex::new(Echo(Vec::new())));
        let mut bus = Bus::default();
        bus.insert(0x100, 8, &device, 0).unwrap();
        assert!(bus.insert(0x107, 1, &device, 0).is_err());
        assert!(bus.insert(0xff, 2, &device, 0).is_err());
        assert!(bus.insert(0xfe, 2, &device, 0).is_ok());
        assert!(bus.insert(0x108, 1, &device, 0).is_ok());
    }
}
