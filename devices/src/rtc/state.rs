//! The clock, frozen.

use serde::{Deserialize, Serialize};

use super::calendar::NANOSECONDS;
use super::{
    CMOS_SIZE, DEVICE, NMI_MASK, OFFSET_LIMIT, REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D, SET, UPDATE_IN_PROGRESS,
    UPDATE_INTERRUPT, VALID, flags,
};
use crate::state::{StateError, ensure};

/// Version 1.
///
/// There is no time in it, only how far the guest's clock is off the wall clock; so two saves of a machine that stands
/// still are equal. What an outage does to the clock is decided by [`super::Rtc::apply_clock_policy`].
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RtcStateV1 {
    /// The register selected, 0 to 127.
    pub index: u8,
    /// Bit 7 of the index port: NMI masked.
    pub nmi_masked: bool,
    /// The 128 bytes of CMOS memory. Those that the clock shows count only while it is stopped; register C holds the
    /// flags without IRQF.
    #[serde(with = "crate::base64_bytes")]
    pub memory: Vec<u8>,
    /// Guest time minus wall-clock time: whole seconds, rounded down.
    pub offset_seconds: i64,
    /// The rest of it in nanoseconds, below 10⁹.
    pub offset_nanoseconds: u32,
    /// Up to which guest time the flags of register C are right: seconds since 1970, rounded down.
    pub flags_until_seconds: i64,
    /// The rest of it in nanoseconds, below 10⁹.
    pub flags_until_nanoseconds: u32,
}

/// The state once it is known to be sound, in the device's own terms.
pub(super) struct Valid {
    pub(super) index: u8,
    pub(super) nmi_masked: bool,
    pub(super) memory: [u8; CMOS_SIZE],
    pub(super) offset: i128,
    pub(super) flags_until: i128,
}

impl RtcStateV1 {
    /// Whether a run of the device can have led here.
    pub(super) fn validate(&self) -> Result<Valid, StateError> {
        let Self {
            index,
            nmi_masked,
            memory,
            offset_seconds,
            offset_nanoseconds,
            flags_until_seconds,
            flags_until_nanoseconds,
        } = self;
        ensure(index & NMI_MASK == 0, DEVICE, "index", || format!("{index:#04x}, above 0x7f"))?;
        let memory = <[u8; CMOS_SIZE]>::try_from(memory.as_slice()).map_err(|_| StateError::Invalid {
            device: DEVICE,
            field: "memory",
            why: format!("{} bytes long, not {CMOS_SIZE}", memory.len()),
        })?;
        let register = |register: u8| memory[usize::from(register)];
        let sound = register(REGISTER_A) & UPDATE_IN_PROGRESS == 0
            && register(REGISTER_B) & (SET | UPDATE_INTERRUPT) != SET | UPDATE_INTERRUPT
            && register(REGISTER_C) & !flags::ALL == 0
            && register(REGISTER_D) == VALID;
        ensure(sound, DEVICE, "memory", || "one whose registers A to D cannot be".to_owned())?;
        let offset = join("offset_seconds", *offset_seconds, *offset_nanoseconds, OFFSET_LIMIT)?;
        let flags_until =
            join("flags_until_seconds", *flags_until_seconds, *flags_until_nanoseconds, 2 * OFFSET_LIMIT)?;
        Ok(Valid { index: *index, nmi_masked: *nmi_masked, memory, offset, flags_until })
    }
}

/// Nanoseconds as whole seconds, rounded down, and the rest.
///
/// The device's times are far within an `i64` of seconds ([`OFFSET_LIMIT`]).
pub(super) fn split(time: i128) -> (i64, u32) {
    (time.div_euclid(NANOSECONDS) as i64, time.rem_euclid(NANOSECONDS) as u32)
}

/// The reverse of [`split`], for up to `limit` seconds either way.
fn join(field: &'static str, seconds: i64, nanoseconds: u32, limit: i64) -> Result<i128, StateError> {
    let time = i128::from(seconds) * NANOSECONDS + i128::from(nanoseconds);
    ensure(i128::from(nanoseconds) < NANOSECONDS, DEVICE, field, || format!("{nanoseconds} ns off a second"))?;
    ensure(time.abs() <= i128::from(limit) * NANOSECONDS, DEVICE, field, || format!("{seconds} s, beyond ±{limit} s"))?;
    Ok(time)
}
