//! What a device is to the machine: something on a bus that can be frozen.

use std::time::Instant;

use crate::state::{DeviceState, StateError};
use crate::virtio::Fault;

/// What a read of nothing gives: the data lines of an idle bus float high.
pub const OPEN_BUS: u8 = 0xff;

/// A device as the bus sees it.
///
/// Accesses are decoded: `offset` is in bytes, relative to the device's base, and `data.len()` is 1, 2, 4 or 8.
/// An implementation copes with every offset and every length all the same, since both come from the guest.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`. Every byte of `data` is set.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device whose volatile state can be taken out and put back.
pub trait Freezable {
    /// The whole state as plain data. The vCPUs stand still while this runs.
    fn save(&self) -> DeviceState;

    /// Takes over `state`, which is untrusted.
    ///
    /// No side effects: no interrupt is raised and nothing is written. That is [`Device::thaw`]'s part.
    ///
    /// # Errors
    ///
    /// [`StateError`] if `state` belongs to another device or no run of this one can have led to it. The device is
    /// then as it was before the call.
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError>;
}

/// What the machine's bus holds.
pub trait Device: BusDevice + Freezable {
    /// The name under which the state of this device is filed; unique within a machine.
    fn id(&self) -> &str;

    /// The vCPUs stand: completes what is in flight until `deadline`, or records it. Before [`Freezable::save`]; nothing happens to the
    /// machine through this device from then on, until [`Device::thaw`]. Most devices have nothing in flight.
    ///
    /// # Errors
    /// [`Fault`]: not in time; the machine cannot be frozen now.
    fn quiesce(&mut self, deadline: Instant) -> Result<(), Fault> {
        let _ = deadline;
        Ok(())
    }

    /// The machine is about to run (again): delivers what was under way when it was frozen.
    ///
    /// To be called once after every freeze, aborted or not, and after every restore; when the interrupt controller is
    /// in place and before any vCPU runs. Most devices have nothing under way.
    fn thaw(&mut self) {}
}

/// Splits a read into byte accesses, as the ISA bus does for a device eight bits wide: `register(offset + i)` is byte
/// `i`, in ascending order. Offsets from `size` on are not the device's and read as [`OPEN_BUS`].
pub(crate) fn read_bytewise(offset: u64, size: u8, data: &mut [u8], mut register: impl FnMut(u8) -> u8) {
    for (byte, at) in data.iter_mut().zip(0u64..) {
        *byte = match decode(offset, at, size) {
            Some(index) => register(index),
            None => OPEN_BUS,
        };
    }
}

/// Splits a write into byte accesses, likewise. Bytes from `size` on are ignored.
pub(crate) fn write_bytewise(offset: u64, size: u8, data: &[u8], mut register: impl FnMut(u8, u8)) {
    for (byte, at) in data.iter().zip(0u64..) {
        if let Some(index) = decode(offset, at, size) {
            register(index, *byte);
        }
    }
}

/// `offset + at` as a register's number, if it is below `size`.
fn decode(offset: u64, at: u64, size: u8) -> Option<u8> {
    let index = u8::try_from(offset.checked_add(at)?).ok()?;
    (index < size).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_read_that_leaves_the_device_reads_open_bus_there() {
        let mut data = [0; 4];
        read_bytewise(6, 8, &mut data, |index| index);
        assert_eq!(data, [6, 7, OPEN_BUS, OPEN_BUS]);
    }

    #[test]
    fn an_offset_at_the_end_of_the_address_space_does_not_wrap_into_the_device() {
        let mut data = [0; 8];
        read_bytewise(u64::MAX - 1, 8, &mut data, |index| index);
        assert_eq!(data, [OPEN_BUS; 8]);
        write_bytewise(u64::MAX, 8, &data, |index, _| panic!("register {index} was written"));
    }

    #[test]
    fn a_wide_write_reaches_ascending_registers() {
        let mut seen = Vec::new();
        write_bytewise(6, 8, &[10, 11, 12], |index, byte| seen.push((index, byte)));
        assert_eq!(seen, [(6, 10), (7, 11)]);
    }
}
