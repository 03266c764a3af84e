//! The flags of register C, worked out from the time that passed rather than by a timer.

use super::calendar::{self, Format, NANOSECONDS};

/// An update ended.
pub(super) const UPDATE_ENDED: u8 = 0x10;
/// The alarm's time came.
pub(super) const ALARM: u8 = 0x20;
/// The periodic rate's time came.
pub(super) const PERIODIC: u8 = 0x40;
/// All flags; register B enables each at the same bit.
pub(super) const ALL: u8 = UPDATE_ENDED | ALARM | PERIODIC;

/// An alarm byte with both of these set matches any value.
const ANY: u8 = 0xc0;
const SECONDS_A_DAY: i128 = 86_400;
const CRYSTAL_HERTZ: i128 = 32_768;

/// [`PERIODIC`] if a period of `rate` (register A's RS) ended after `from` and up to `to`, in nanoseconds.
///
/// RS 3 to 15 give 2^(RS−1) cycles of the crystal; 1 and 2 are as 8 and 9; 0 is off (datasheet, table 5).
pub(super) fn periodic(from: i128, to: i128, rate: u8) -> u8 {
    let shift = match rate & 0x0f {
        0 => return 0,
        rate @ (1 | 2) => rate + 6,
        rate => rate - 1,
    };
    let periods = |time: i128| (time * CRYSTAL_HERTZ).div_euclid(NANOSECONDS) >> shift;
    if periods(to) > periods(from) { PERIODIC } else { 0 }
}

/// [`UPDATE_ENDED`] if a second began after `from` and up to `to`, in nanoseconds, and [`ALARM`] if one of those seconds
/// is `alarm`'s (seconds, minutes, hours, as shown in `format`).
pub(super) fn update_and_alarm(from: i128, to: i128, alarm: [u8; 3], format: Format) -> u8 {
    let (from, to) = (from.div_euclid(NANOSECONDS), to.div_euclid(NANOSECONDS));
    if to <= from {
        return 0;
    }
    // An alarm that a day does not bring does not come at all.
    let last = to.min(from + SECONDS_A_DAY);
    let rings = (from + 1..=last).any(|second| {
        alarm
            .into_iter()
            .zip([0x00, 0x02, 0x04])
            .all(|(wanted, register)| wanted & ANY == ANY || calendar::encode(second, format, register) == Some(wanted))
    });
    if rings { UPDATE_ENDED | ALARM } else { UPDATE_ENDED }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rtc::HOURS_24;

    const BCD: u8 = HOURS_24;

    fn seconds(seconds: i128) -> i128 {
        seconds * NANOSECONDS
    }

    #[test]
    fn the_periodic_flag_comes_at_its_rate() {
        // RS 6 is 976.5625 µs, RS 15 half a second, RS 1 is 3.90625 ms (as RS 8).
        for (rate, period) in [(6, 976_562), (15, 500_000_000), (1, 3_906_250), (8, 3_906_250), (3, 122_070)] {
            assert_eq!(periodic(0, period - 100, rate), 0, "RS {rate}");
            assert_eq!(periodic(0, period + 100, rate), PERIODIC, "RS {rate}");
        }
        assert_eq!(periodic(0, seconds(1000), 0), 0);
    }

    #[test]
    fn an_alarm_rings_in_its_second_and_a_wildcard_in_any() {
        let format = Format::of(BCD);
        let noon = [0x30, 0x00, 0x12];
        let at = 12 * 3600 + 30;
        assert_eq!(update_and_alarm(seconds(at - 1), seconds(at), noon, format), UPDATE_ENDED | ALARM);
        assert_eq!(update_and_alarm(seconds(at), seconds(at + 1), noon, format), UPDATE_ENDED);
        assert_eq!(update_and_alarm(seconds(at), seconds(at) + 5, noon, format), 0);
        assert_eq!(update_and_alarm(0, seconds(1), [0xff, 0xc0, 0xff], format), UPDATE_ENDED | ALARM);
        assert_eq!(update_and_alarm(0, seconds(59), [0x00, 0xff, 0xff], format), UPDATE_ENDED);
        assert_eq!(update_and_alarm(0, seconds(60), [0x00, 0xff, 0xff], format), UPDATE_ENDED | ALARM);
    }

    #[test]
    fn an_alarm_within_a_long_time_rings_and_an_impossible_one_never() {
        let format = Format::of(BCD);
        let year = 365 * SECONDS_A_DAY;
        assert_eq!(update_and_alarm(0, seconds(year), [0x59, 0x59, 0x23], format), UPDATE_ENDED | ALARM);
        assert_eq!(update_and_alarm(0, seconds(year), [0x60, 0x00, 0x00], format), UPDATE_ENDED);
    }
}
