//! The debug exit port: a write ends the VMM with the written byte as its exit code.
//!
//! Like QEMU's `isa-debug-exit`, except that the code is not shifted. Any width will do; the lowest byte counts. A read
//! gives the last code written, 0 before that.

mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use state::DebugExitStateV1;

use crate::device::{BusDevice, Device, Freezable, read_bytewise};
use crate::machine_control::{MachineControl, MachineRequest};
use crate::ports::DEBUG_EXIT_SIZE;
use crate::state::{DeviceState, StateError};

/// The debug exit port.
pub struct DebugExit {
    control: Arc<dyn MachineControl>,
    code: u8,
}

impl DebugExit {
    /// A port that asks `control` for [`MachineRequest::DebugExit`].
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self { control, code: 0 }
    }
}

impl BusDevice for DebugExit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, DEBUG_EXIT_SIZE as u8, data, |index| if index == 0 { self.code } else { 0 });
    }

    /// Only at offset 0: that is where the lowest byte of a code is, whatever its width.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(&code)) = (offset, data.first()) {
            self.code = code;
            self.control.request(MachineRequest::DebugExit(code));
        }
    }
}

impl Freezable for DebugExit {
    fn save(&self) -> DeviceState {
        let Self { control: _, code } = self;
        DeviceState::DebugExit(DebugExitStateV1 { code: *code })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::DebugExit(state) = state else {
            return Err(StateError::wrong_device("debug-exit", state));
        };
        let DebugExitStateV1 { code } = state;
        self.code = *code;
        Ok(())
    }
}

impl Device for DebugExit {
    fn id(&self) -> &str {
        "debug-exit"
    }
}
