//! The clock of a PC: a Motorola MC146818 with 128 bytes of CMOS memory, at ports 0x70 (index, NMI mask) and 0x71 (data).
//!
//! # Time
//!
//! Guest time is the wall clock ([`WallClock`]) plus an offset; a guest that sets the clock sets the offset. What an
//! outage does to it is decided at the resume: [`Rtc::apply_clock_policy`]. The registers show UTC, in BCD or binary and
//! in 12 or 24 hours as register B says, the century at 0x32. While SET (register B) or the divider reset (register A)
//! stops the clock, they hold what is written; they count as a time once it runs again, at once after SET and with half
//! a second to the next update after a divider reset, as in the datasheet. A time that does not exist (30 February)
//! becomes the one so many days on. The day of the week follows from the date and cannot be set apart from it.
//!
//! # Interrupts
//!
//! **IRQ 8 is not wired.** The flags of register C (periodic, alarm, update ended, and IRQF as enabled by register B)
//! are right for those who poll them. Linux reads the time without interrupts (`mc146818_get_time` polls UIP); its
//! `rtc-cmos` driver does without alarms when the ACPI tables give the clock no interrupt, and the tables here do not.
//!
//! # CMOS memory
//!
//! Filled as firmware would: memory sizes ([`GuestMemorySize`]), an FPU, no disks, and the checksum. The guest may
//! write all of it.

mod calendar;
mod cmos;
mod flags;
mod state;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use cmos::GuestMemorySize;
pub use state::RtcStateV1;

use self::calendar::{Format, NANOSECONDS};
use crate::device::{BusDevice, Device, Freezable, OPEN_BUS, read_bytewise, write_bytewise};
use crate::ports::RTC_SIZE;
use crate::state::{DeviceState, StateError};

/// CMOS memory in bytes, clock registers included.
pub const CMOS_SIZE: usize = 128;

const DEVICE: &str = "rtc";
const INDEX_PORT: u8 = 0;
const NMI_MASK: u8 = 0x80;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// Register A: an update is in progress; the divider's control; the rate of the periodic flag.
const UPDATE_IN_PROGRESS: u8 = 0x80;
const DIVIDER_RESET: u8 = 0x60;
const RATE: u8 = 0x0f;
/// Register B: stops the clock; enables the interrupt of an ended update; binary; 24 hours.
const SET: u8 = 0x80;
const UPDATE_INTERRUPT: u8 = 0x10;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
/// Register C: some flag is set whose interrupt is enabled. The flags are bits 4 to 6, each where register B enables it.
const INTERRUPT_REQUEST: u8 = 0x80;
/// Register D: the battery is good.
const VALID: u8 = 0x80;

/// UIP is set this long before an update, so that who sees it clear can read all registers: t_BUC, 244 µs.
const UPDATE_WARNING: i128 = 244_141;
/// The bound on wall-clock times: 2⁴⁰ s, some 34,800 years. It keeps sums of times and offsets far from overflow.
const WALL_LIMIT: u64 = 1 << 40;
/// The bound on offsets, in seconds either way.
const OFFSET_LIMIT: i64 = 1 << 42;

/// Where the time comes from; implemented by the VMM.
pub trait WallClock: Send {
    /// Time since 1970-01-01 00:00 UTC.
    fn now(&self) -> Duration;
}

/// What the clock does about the time that the VM was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockPolicy {
    /// It goes on from where it stood.
    Continue {
        /// What the wall clock showed at the freeze.
        frozen_at: Duration,
    },
    /// It shows what it would without the outage.
    Realtime,
}

/// The clock and CMOS memory.
pub struct Rtc {
    clock: Box<dyn WallClock>,
    index: u8,
    nmi_masked: bool,
    /// As [`RtcStateV1::memory`].
    memory: [u8; CMOS_SIZE],
    /// Guest time minus wall-clock time, in nanoseconds.
    offset: i128,
    /// Up to which guest time, in nanoseconds, the flags in register C are right.
    flags_until: i128,
}

impl Rtc {
    /// A clock that shows `clock`'s time, in a machine with `memory` of RAM.
    pub fn new(clock: Box<dyn WallClock>, memory: GuestMemorySize) -> Self {
        let mut memory = cmos::contents(memory);
        memory[usize::from(REGISTER_A)] = 0x26;
        memory[usize::from(REGISTER_B)] = HOURS_24;
        memory[usize::from(REGISTER_D)] = VALID;
        let mut rtc = Self { clock, index: 0, nmi_masked: false, memory, offset: 0, flags_until: 0 };
        rtc.flags_until = rtc.guest_time();
        rtc
    }

    /// Decides what becomes of the time that passed between freeze and resume. To be called once for each resume, after
    /// the restore and before any vCPU runs. A restore alone leaves the clock as [`ClockPolicy::Realtime`] does.
    pub fn apply_clock_policy(&mut self, policy: ClockPolicy) {
        match policy {
            ClockPolicy::Realtime => {}
            ClockPolicy::Continue { frozen_at } => {
                let limit = i128::from(OFFSET_LIMIT) * NANOSECONDS;
                let outage = self.wall_time() - bounded(frozen_at);
                self.offset = (self.offset - outage).clamp(-limit, limit);
            }
        }
    }

    /// Whether the guest has NMIs masked (bit 7 of the index port).
    pub fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    fn wall_time(&self) -> i128 {
        bounded(self.clock.now())
    }

    /// In nanoseconds since 1970. Still meaningful while the clock is stopped: its part below a second is the divider's.
    fn guest_time(&self) -> i128 {
        self.wall_time() + self.offset
    }

    fn register(&self, register: u8) -> u8 {
        self.memory[usize::from(register)]
    }

    fn format(&self) -> Format {
        Format::of(self.register(REGISTER_B))
    }

    fn divider_is_reset(&self) -> bool {
        self.register(REGISTER_A) & DIVIDER_RESET == DIVIDER_RESET
    }

    fn is_stopped(&self) -> bool {
        self.divider_is_reset() || self.register(REGISTER_B) & SET != 0
    }

    fn read_data(&mut self) -> u8 {
        match self.index {
            index if calendar::is_time(index) && !self.is_stopped() => {
                let seconds = self.guest_time().div_euclid(NANOSECONDS);
                calendar::encode(seconds, self.format(), index).unwrap_or(self.register(index))
            }
            REGISTER_A if self.update_is_near() => self.register(REGISTER_A) | UPDATE_IN_PROGRESS,
            REGISTER_C => self.take_flags(),
            index => self.register(index),
        }
    }

    fn update_is_near(&self) -> bool {
        !self.is_stopped() && self.guest_time().rem_euclid(NANOSECONDS) >= NANOSECONDS - UPDATE_WARNING
    }

    /// Register C, which reading clears.
    fn take_flags(&mut self) -> u8 {
        self.refresh_flags();
        let flags = std::mem::take(&mut self.memory[usize::from(REGISTER_C)]);
        let requested = flags & self.register(REGISTER_B) & flags::ALL != 0;
        if requested { flags | INTERRUPT_REQUEST } else { flags }
    }

    /// Brings the flags up to date, before something is changed that they depend on or they are looked at.
    fn refresh_flags(&mut self) {
        let now = self.guest_time();
        let mut raised = 0;
        if !self.divider_is_reset() {
            raised |= flags::periodic(self.flags_until, now, self.register(REGISTER_A) & RATE);
        }
        if !self.is_stopped() {
            let alarm = [self.register(1), self.register(3), self.register(5)];
            raised |= flags::update_and_alarm(self.flags_until, now, alarm, self.format());
        }
        self.memory[usize::from(REGISTER_C)] |= raised;
        self.flags_until = now;
    }

    fn write_data(&mut self, byte: u8) {
        self.refresh_flags();
        match self.index {
            REGISTER_A => self.reconfigure(REGISTER_A, byte & !UPDATE_IN_PROGRESS),
            // Setting SET clears the enable of the update interrupt.
            REGISTER_B if byte & SET != 0 => self.reconfigure(REGISTER_B, byte & !UPDATE_INTERRUPT),
            REGISTER_B => self.reconfigure(REGISTER_B, byte),
            REGISTER_C | REGISTER_D => {}
            index if calendar::is_time(index) && !self.is_stopped() => {
                self.latch_time();
                self.memory[usize::from(index)] = byte;
                self.adopt_time(self.guest_time().rem_euclid(NANOSECONDS));
            }
            index => self.memory[usize::from(index)] = byte,
        }
    }

    /// Writes register A or B, either of which may stop or start the clock.
    fn reconfigure(&mut self, register: u8, byte: u8) {
        let was_stopped = self.is_stopped();
        let divider_was_reset = self.divider_is_reset();
        if !was_stopped {
            self.latch_time();
        }
        self.memory[usize::from(register)] = byte;
        if was_stopped && !self.is_stopped() {
            let phase = if divider_was_reset { NANOSECONDS / 2 } else { self.guest_time().rem_euclid(NANOSECONDS) };
            self.adopt_time(phase);
        }
    }

    /// Copies the running time into the registers.
    fn latch_time(&mut self) {
        let seconds = self.guest_time().div_euclid(NANOSECONDS);
        let format = self.format();
        for register in calendar::TIME_REGISTERS {
            if let Some(byte) = calendar::encode(seconds, format, register) {
                self.memory[usize::from(register)] = byte;
            }
        }
    }

    /// Makes the time in the registers, and `phase` nanoseconds of the second, the guest's time.
    fn adopt_time(&mut self, phase: i128) {
        let seconds = calendar::decode(&self.memory, self.format());
        self.offset = seconds * NANOSECONDS + phase - self.wall_time();
        self.flags_until = self.guest_time();
    }
}

/// In nanoseconds, at most [`WALL_LIMIT`] seconds.
fn bounded(time: Duration) -> i128 {
    let time = time.min(Duration::from_secs(WALL_LIMIT));
    i128::from(time.as_secs()) * NANOSECONDS + i128::from(time.subsec_nanos())
}

impl BusDevice for Rtc {
    /// The index port is write-only.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(
            offset,
            RTC_SIZE as u8,
            data,
            |port| if port == INDEX_PORT { OPEN_BUS } else { self.read_data() },
        );
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, RTC_SIZE as u8, data, |port, byte| {
            if port == INDEX_PORT {
                self.index = byte & !NMI_MASK;
                self.nmi_masked = byte & NMI_MASK != 0;
            } else {
                self.write_data(byte);
            }
        });
    }
}

impl Freezable for Rtc {
    fn save(&self) -> DeviceState {
        let Self { clock: _, index, nmi_masked, memory, offset, flags_until } = self;
        let (offset_seconds, offset_nanoseconds) = state::split(*offset);
        let (flags_until_seconds, flags_until_nanoseconds) = state::split(*flags_until);
        DeviceState::Rtc(RtcStateV1 {
            index: *index,
            nmi_masked: *nmi_masked,
            memory: memory.to_vec(),
            offset_seconds,
            offset_nanoseconds,
            flags_until_seconds,
            flags_until_nanoseconds,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Rtc(state) = state else {
            return Err(StateError::wrong_device(DEVICE, state));
        };
        let state::Valid { index, nmi_masked, memory, offset, flags_until } = state.validate()?;
        self.index = index;
        self.nmi_masked = nmi_masked;
        self.memory = memory;
        self.offset = offset;
        self.flags_until = flags_until;
        Ok(())
    }
}

impl Device for Rtc {
    fn id(&self) -> &str {
        DEVICE
    }
}
