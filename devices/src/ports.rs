//! Where the devices are: I/O ports and interrupt lines, as on a PC where a PC has them.
//!
//! Ports are x86 I/O addresses, sizes are in ports (bytes), lines are ISA IRQ numbers (which the MADT maps one to one
//! onto the IOAPIC's pins, but for the timer).

/// First port of the first serial port (COM1).
pub const SERIAL0_BASE: u16 = 0x3f8;
/// Its size in ports.
pub const SERIAL0_SIZE: u16 = 8;
/// Its interrupt line, edge-triggered.
pub const SERIAL0_IRQ: u32 = 4;

/// First port of the clock: index at +0, data at +1.
pub const RTC_BASE: u16 = 0x70;
/// Its size in ports.
pub const RTC_SIZE: u16 = 2;
/// The line that a PC's clock has. Not wired here: see [`crate::rtc`].
pub const RTC_IRQ: u32 = 8;

/// First port of the keyboard controller: data at +0, status and command at +4.
pub const KEYBOARD_CONTROLLER_BASE: u16 = 0x60;
/// Its size in ports. Port 0x61 in between is the PIT's, which the kernel emulates and so takes before the bus does.
pub const KEYBOARD_CONTROLLER_SIZE: u16 = 5;

/// The reset control register.
pub const RESET_CONTROL_BASE: u16 = 0xcf9;
/// Its size in ports.
pub const RESET_CONTROL_SIZE: u16 = 1;

/// First port of the ACPI sleep registers: control at +0, status at +1.
pub const POWER_BASE: u16 = 0x600;
/// Their size in ports.
pub const POWER_SIZE: u16 = 2;
/// The sleep control register, for the FADT's `SLEEP_CONTROL_REG` (system I/O, 8 bits, byte access).
pub const SLEEP_CONTROL_PORT: u16 = POWER_BASE;
/// The sleep status register, for the FADT's `SLEEP_STATUS_REG` (system I/O, 8 bits, byte access).
pub const SLEEP_STATUS_PORT: u16 = POWER_BASE + 1;

/// The debug exit port.
pub const DEBUG_EXIT_BASE: u16 = 0xf4;
/// Its size in ports: a 32-bit access wide.
pub const DEBUG_EXIT_SIZE: u16 = 4;

/// First port of the report register: low half at +0, high half at +4.
pub const REPORT_BASE: u16 = 0x5d0;
/// Its size in ports.
pub const REPORT_SIZE: u16 = 8;
