//! The reset control register at 0xcf9 (Intel ICH9 datasheet, section 13.7.5, `RST_CNT`).

use std::sync::Arc;

use super::ResetStateV1;
use crate::device::{BusDevice, Device, Freezable, read_bytewise, write_bytewise};
use crate::machine_control::{MachineControl, MachineRequest};
use crate::ports::RESET_CONTROL_SIZE;
use crate::state::{DeviceState, StateError, ensure};

/// `SYS_RST`: what kind of reset `RST_CPU` does, 1 for a hard one.
const SYSTEM_RESET: u8 = 1 << 1;
/// `RST_CPU`: resets when it goes from 0 to 1.
const RESET_CPU: u8 = 1 << 2;
/// `FULL_RST`: with a power cycle.
const FULL_RESET: u8 = 1 << 3;
const WRITABLE: u8 = SYSTEM_RESET | RESET_CPU | FULL_RESET;
const DEVICE: &str = "reset";

/// The reset control register: asks for [`MachineRequest::Reset`] on a rising edge of `RST_CPU`.
///
/// A soft reset (`SYS_RST` clear), which on the chip restarts the CPUs alone, resets the machine as well: software that
/// asks for one goes on in firmware, which there is none of.
pub struct ResetControl {
    machine: Arc<dyn MachineControl>,
    control: u8,
}

impl ResetControl {
    /// A register that asks `machine`.
    pub fn new(machine: Arc<dyn MachineControl>) -> Self {
        Self { machine, control: 0 }
    }
}

impl BusDevice for ResetControl {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, RESET_CONTROL_SIZE as u8, data, |_| self.control);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, RESET_CONTROL_SIZE as u8, data, |_, byte| {
            let rising = byte & !self.control & RESET_CPU != 0;
            self.control = byte & WRITABLE;
            if rising {
                self.machine.request(MachineRequest::Reset);
            }
        });
    }
}

impl Freezable for ResetControl {
    fn save(&self) -> DeviceState {
        let Self { machine: _, control } = self;
        DeviceState::Reset(ResetStateV1 { control: *control })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Reset(state) = state else {
            return Err(StateError::wrong_device(DEVICE, state));
        };
        let ResetStateV1 { control } = *state;
        ensure(control & !WRITABLE == 0, DEVICE, "control", || format!("{control:#04x}, with reserved bits set"))?;
        self.control = control;
        Ok(())
    }
}

impl Device for ResetControl {
    fn id(&self) -> &str {
        DEVICE
    }
}
