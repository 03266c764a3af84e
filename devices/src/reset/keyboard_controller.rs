//! An i8042 keyboard controller with nothing plugged in.
//!
//! Guests have two uses for it: the reset pulse (command 0xfe), and to find out that there is no keyboard. Every command
//! that answers on the chip answers here, so that a driver's probe ends without running into its time limits. Commands as
//! in IBM's PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".
//!
//! Linux asks the auxiliary port by commands 0xd3 and 0xa9 whether it is there, and believes neither answer given here.
//! A byte for the keyboard is answered by 0xfe and the time-out bit, as when the plug is out. No interrupt is wired.

use std::sync::Arc;

use super::KeyboardControllerStateV1;
use crate::device::{BusDevice, Device, Freezable, read_bytewise, write_bytewise};
use crate::machine_control::{MachineControl, MachineRequest};
use crate::ports::KEYBOARD_CONTROLLER_SIZE;
use crate::state::{DeviceState, StateError, ensure};

/// Offsets from port 0x60.
const DATA: u8 = 0;
const STATUS_COMMAND: u8 = 4;

/// Status register. Bit 1, input buffer full, is never set: commands take no time.
const OUTPUT_FULL: u8 = 1 << 0;
const SYSTEM_FLAG: u8 = 1 << 2;
const LAST_WAS_COMMAND: u8 = 1 << 3;
const KEYLOCK_OPEN: u8 = 1 << 4;
const TIME_OUT: u8 = 1 << 6;
const STATUS_BITS: u8 = OUTPUT_FULL | SYSTEM_FLAG | LAST_WAS_COMMAND | KEYLOCK_OPEN | TIME_OUT;

/// Command byte (byte 0 of the memory).
const COMMAND_SYSTEM_FLAG: u8 = 1 << 2;
const KEYBOARD_DISABLED: u8 = 1 << 4;
const AUXILIARY_DISABLED: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

/// Output port P2. Bit 0 is the reset line, active low; bit 1 opens A20, which is always open here.
const RESET_LINE: u8 = 1 << 0;
const OUTPUT_PORT_INITIAL: u8 = 0xcf;

const MEMORY_SIZE: usize = 32;
const SELF_TEST_PASSED: u8 = 0x55;
const NO_PASSWORD: u8 = 0xf1;
const CLOCK_STUCK_LOW: u8 = 0x01;
const INPUT_PORT: u8 = 0x80;
const RESEND: u8 = 0xfe;
const DEVICE: &str = "keyboard-controller";

/// The keyboard controller: asks for [`MachineRequest::Reset`] when its reset line is pulled.
pub struct KeyboardController {
    machine: Arc<dyn MachineControl>,
    status: u8,
    output: u8,
    output_port: u8,
    memory: [u8; MEMORY_SIZE],
    waiting_command: Option<u8>,
}

impl KeyboardController {
    /// A controller as firmware leaves it: tested, both ports disabled.
    pub fn new(machine: Arc<dyn MachineControl>) -> Self {
        let mut memory = [0; MEMORY_SIZE];
        memory[0] = COMMAND_SYSTEM_FLAG | KEYBOARD_DISABLED | AUXILIARY_DISABLED | TRANSLATE;
        Self {
            machine,
            status: SYSTEM_FLAG | KEYLOCK_OPEN,
            output: 0,
            output_port: OUTPUT_PORT_INITIAL,
            memory,
            waiting_command: None,
        }
    }

    fn read_port(&mut self, index: u8) -> u8 {
        match index {
            DATA => {
                self.status &= !(OUTPUT_FULL | TIME_OUT);
                self.output
            }
            STATUS_COMMAND => self.status,
            // Not this controller's: 0x61 is the PIT's, 0x62 and 0x63 nobody's.
            _ => crate::device::OPEN_BUS,
        }
    }

    fn write_port(&mut self, index: u8, byte: u8) {
        match index {
            DATA => {
                self.status &= !LAST_WAS_COMMAND;
                match self.waiting_command.take() {
                    Some(command) => self.finish(command, byte),
                    None => {
                        self.answer(RESEND);
                        self.status |= TIME_OUT;
                    }
                }
            }
            STATUS_COMMAND => {
                self.status |= LAST_WAS_COMMAND;
                self.waiting_command = None;
                self.command(byte);
            }
            _ => {}
        }
    }

    fn command(&mut self, command: u8) {
        match command {
            0x20..=0x3f => self.answer(self.memory[usize::from(command & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.waiting_command = Some(command),
            0xa4 => self.answer(NO_PASSWORD),
            0xa7 => self.memory[0] |= AUXILIARY_DISABLED,
            0xa8 => self.memory[0] &= !AUXILIARY_DISABLED,
            0xa9 => self.answer(CLOCK_STUCK_LOW),
            0xaa => {
                self.set_command_byte(COMMAND_SYSTEM_FLAG | KEYBOARD_DISABLED | AUXILIARY_DISABLED | TRANSLATE);
                self.answer(SELF_TEST_PASSED);
            }
            0xab => self.answer(CLOCK_STUCK_LOW),
            0xad => self.memory[0] |= KEYBOARD_DISABLED,
            0xae => self.memory[0] &= !KEYBOARD_DISABLED,
            0xc0 => self.answer(INPUT_PORT),
            0xd0 => self.answer(self.output_port),
            0xe0 => self.answer(0),
            // Bits 0 to 3 of the command are pulsed low where they are 0.
            0xf0..=0xff if command & RESET_LINE == 0 => self.machine.request(MachineRequest::Reset),
            _ => {}
        }
    }

    /// The byte that `command` waited for.
    fn finish(&mut self, command: u8, byte: u8) {
        match command {
            0x60 => self.set_command_byte(byte),
            0x61..=0x7f => self.memory[usize::from(command & 0x1f)] = byte,
            0xd1 => self.set_output_port(byte),
            // To the output buffer as if the keyboard had sent it. So does 0xd3, without the flag that says it came
            // from the auxiliary port: there is none.
            0xd2 | 0xd3 => self.answer(byte),
            // 0xd4: for the auxiliary device, which is not there.
            _ => {
                self.answer(RESEND);
                self.status |= TIME_OUT;
            }
        }
    }

    fn set_command_byte(&mut self, byte: u8) {
        self.memory[0] = byte;
        self.status = (self.status & !SYSTEM_FLAG) | (byte & COMMAND_SYSTEM_FLAG);
    }

    fn set_output_port(&mut self, byte: u8) {
        self.output_port = byte | RESET_LINE;
        if byte & RESET_LINE == 0 {
            self.machine.request(MachineRequest::Reset);
        }
    }

    fn answer(&mut self, byte: u8) {
        self.output = byte;
        self.status = (self.status & !TIME_OUT) | OUTPUT_FULL;
    }
}

impl BusDevice for KeyboardController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, KEYBOARD_CONTROLLER_SIZE as u8, data, |index| self.read_port(index));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, KEYBOARD_CONTROLLER_SIZE as u8, data, |index, byte| self.write_port(index, byte));
    }
}

impl Freezable for KeyboardController {
    fn save(&self) -> DeviceState {
        let Self { machine: _, status, output, output_port, memory, waiting_command } = self;
        DeviceState::KeyboardController(KeyboardControllerStateV1 {
            status: *status,
            output: *output,
            output_port: *output_port,
            memory: memory.to_vec(),
            waiting_command: *waiting_command,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::KeyboardController(state) = state else {
            return Err(StateError::wrong_device(DEVICE, state));
        };
        let KeyboardControllerStateV1 { status, output, output_port, memory, waiting_command } = state;
        let memory = <[u8; MEMORY_SIZE]>::try_from(memory.as_slice()).map_err(|_| StateError::Invalid {
            device: DEVICE,
            field: "memory",
            why: format!("{} bytes long, not {MEMORY_SIZE}", memory.len()),
        })?;
        let flags = *status & (KEYLOCK_OPEN | SYSTEM_FLAG) == KEYLOCK_OPEN | (memory[0] & COMMAND_SYSTEM_FLAG);
        ensure(status & !STATUS_BITS == 0 && flags, DEVICE, "status", || format!("{status:#04x}"))?;
        ensure(output_port & RESET_LINE != 0, DEVICE, "output_port", || {
            format!("{output_port:#04x}, with the reset line pulled")
        })?;
        ensure(matches!(waiting_command, None | Some(0x60..=0x7f | 0xd1..=0xd4)), DEVICE, "waiting_command", || {
            format!("{waiting_command:#04x?}, which waits for nothing")
        })?;
        self.status = *status;
        self.output = *output;
        self.output_port = *output_port;
        self.memory = memory;
        self.waiting_command = *waiting_command;
        Ok(())
    }
}

impl Device for KeyboardController {
    fn id(&self) -> &str {
        DEVICE
    }
}
