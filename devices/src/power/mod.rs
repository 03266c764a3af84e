//! Power off: the sleep registers of hardware-reduced ACPI (ACPI 6.5, sections 4.8.3.7 and 4.8.4).
//!
//! | port | register | bits |
//! |---|---|---|
//! | +0 | sleep control | 2–4 `SLP_TYP`, 5 `SLP_EN` (write-only, reads 0) |
//! | +1 | sleep status | 7 `WAK_STS` (a written 1 clears it) |
//!
//! `SLP_EN` with `SLP_TYP` = [`SLEEP_TYPE_S5`] turns the machine off. No other sleep state is offered in the ACPI
//! tables, so another type is noted in the log and otherwise ignored: the guest goes on awake.
//!
//! The FADT names the ports ([`crate::ports::SLEEP_CONTROL_PORT`], [`crate::ports::SLEEP_STATUS_PORT`]), the DSDT's
//! `_S5` the type.

mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use state::PowerStateV1;

use crate::device::{BusDevice, Device, Freezable, read_bytewise, write_bytewise};
use crate::machine_control::{MachineControl, MachineRequest};
use crate::ports::POWER_SIZE;
use crate::state::{DeviceState, StateError, ensure};

/// `SLP_TYP` of S5, soft off: the first element of the DSDT's `_S5` package.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Where `SLP_TYP` lies in the sleep control register.
pub const SLEEP_TYPE_SHIFT: u8 = 2;
/// The bits of `SLP_TYP` in the sleep control register.
pub const SLEEP_TYPE_MASK: u8 = 0b111 << SLEEP_TYPE_SHIFT;
/// `SLP_EN` in the sleep control register: go to sleep now.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// `WAK_STS` in the sleep status register: woke up from sleep.
pub const WAKE_STATUS: u8 = 1 << 7;

const SIZE: u8 = POWER_SIZE as u8;
const CONTROL: u8 = 0;
const DEVICE: &str = "power";

/// The sleep control and status registers.
pub struct Power {
    control: Arc<dyn MachineControl>,
    /// `SLP_TYP` in place, nothing else.
    sleep_control: u8,
    /// `WAK_STS` or 0.
    sleep_status: u8,
}

impl Power {
    /// Registers that ask `control` for [`MachineRequest::PowerOff`].
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self { control, sleep_control: 0, sleep_status: 0 }
    }

    /// Tells the guest that it was woken: sets `WAK_STS`. Not for a resume after an outage, which the guest slept
    /// through without asking for it.
    pub fn wake(&mut self) {
        self.sleep_status |= WAKE_STATUS;
    }

    fn write_control(&mut self, value: u8) {
        self.sleep_control = value & SLEEP_TYPE_MASK;
        if value & SLEEP_ENABLE == 0 {
            return;
        }
        match self.sleep_control >> SLEEP_TYPE_SHIFT {
            SLEEP_TYPE_S5 => self.control.request(MachineRequest::PowerOff),
            sleep_type => tracing::debug!(sleep_type, "the guest asked for a sleep state that is not offered; ignored"),
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(
            offset,
            SIZE,
            data,
            |index| {
                if index == CONTROL { self.sleep_control } else { self.sleep_status }
            },
        );
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, SIZE, data, |index, byte| {
            if index == CONTROL {
                self.write_control(byte);
            } else {
                self.sleep_status &= !(byte & WAKE_STATUS);
            }
        });
    }
}

impl Freezable for Power {
    fn save(&self) -> DeviceState {
        let Self { control: _, sleep_control, sleep_status } = self;
        DeviceState::Power(PowerStateV1 { sleep_control: *sleep_control, sleep_status: *sleep_status })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Power(state) = state else {
            return Err(StateError::wrong_device(DEVICE, state));
        };
        let PowerStateV1 { sleep_control, sleep_status } = *state;
        ensure(sleep_control & !SLEEP_TYPE_MASK == 0, DEVICE, "sleep_control", || {
            format!("{sleep_control:#04x}, more than SLP_TYP")
        })?;
        ensure(sleep_status & !WAKE_STATUS == 0, DEVICE, "sleep_status", || {
            format!("{sleep_status:#04x}, more than WAK_STS")
        })?;
        self.sleep_control = sleep_control;
        self.sleep_status = sleep_status;
        Ok(())
    }
}

impl Device for Power {
    fn id(&self) -> &str {
        DEVICE
    }
}
