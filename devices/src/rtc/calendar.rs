//! Dates and the bytes that show them.
//!
//! Days to dates and back are Howard Hinnant's `civil_from_days` and `days_from_civil`
//! (<https://howardhinnant.github.io/date_algorithms.html>), for the proleptic Gregorian calendar.

use super::{BINARY, CMOS_SIZE, HOURS_24};

/// Nanoseconds in a second.
pub(super) const NANOSECONDS: i128 = 1_000_000_000;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const CENTURY: u8 = 0x32;

/// The registers that show the time.
pub(super) const TIME_REGISTERS: [u8; 8] = [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY];

const AFTERNOON: u8 = 0x80;
const DAY: i128 = 86_400;

/// Whether `register` shows the time.
pub(super) fn is_time(register: u8) -> bool {
    TIME_REGISTERS.contains(&register)
}

/// How register B wants numbers and hours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    binary: bool,
    hours_24: bool,
}

impl Format {
    pub(super) fn of(register_b: u8) -> Self {
        Self { binary: register_b & BINARY != 0, hours_24: register_b & HOURS_24 != 0 }
    }

    /// `value` is below 100.
    fn number(self, value: i128) -> u8 {
        let value = (value % 100) as u8;
        if self.binary { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn value(self, byte: u8) -> i128 {
        // A nibble above 9 counts for what it is: the chip does not say, and every byte has to mean something.
        i128::from(if self.binary { byte } else { (byte >> 4) * 10 + (byte & 0x0f) })
    }

    /// `hour` is below 24. In 12 hours, midnight is 12 AM and noon 12 PM.
    fn hour(self, hour: i128) -> u8 {
        if self.hours_24 {
            return self.number(hour);
        }
        let shown = self.number((hour + 11) % 12 + 1);
        if hour >= 12 { shown | AFTERNOON } else { shown }
    }

    fn hour_value(self, byte: u8) -> i128 {
        if self.hours_24 {
            return self.value(byte);
        }
        let afternoon = if byte & AFTERNOON != 0 { 12 } else { 0 };
        self.value(byte & !AFTERNOON) % 12 + afternoon
    }
}

/// What `register` shows at `seconds` since 1970, if it shows the time.
pub(super) fn encode(seconds: i128, format: Format, register: u8) -> Option<u8> {
    let days = seconds.div_euclid(DAY);
    let time = seconds.rem_euclid(DAY);
    let (year, month, day) = civil_from_days(days);
    Some(match register {
        SECONDS => format.number(time % 60),
        MINUTES => format.number(time / 60 % 60),
        HOURS => format.hour(time / 3600),
        // 1970-01-01 was a Thursday; Sunday is 1.
        DAY_OF_WEEK => format.number((days + 4).rem_euclid(7) + 1),
        DAY_OF_MONTH => format.number(day),
        MONTH => format.number(month),
        YEAR => format.number(year.rem_euclid(100)),
        CENTURY => format.number(year.div_euclid(100).rem_euclid(100)),
        _ => return None,
    })
}

/// The seconds since 1970 that the registers in `memory` show. Every content means some time.
pub(super) fn decode(memory: &[u8; CMOS_SIZE], format: Format) -> i128 {
    let value = |register: u8| format.value(memory[usize::from(register)]);
    let year = value(CENTURY) * 100 + value(YEAR);
    let first = days_from_civil(year, value(MONTH).clamp(1, 12), 1);
    let days = first + value(DAY_OF_MONTH) - 1;
    let hour = format.hour_value(memory[usize::from(HOURS)]);
    days * DAY + hour * 3600 + value(MINUTES) * 60 + value(SECONDS)
}

/// Days since 1970-01-01 of a date; `month` from 1 to 12.
fn days_from_civil(year: i128, month: i128, day: i128) -> i128 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Year, month (1–12) and day (1–31) of days since 1970-01-01.
fn civil_from_days(days: i128) -> (i128, i128, i128) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i128::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn registers(seconds: i128, format: Format) -> [u8; CMOS_SIZE] {
        let mut memory = [0; CMOS_SIZE];
        for register in TIME_REGISTERS {
            memory[usize::from(register)] = encode(seconds, format, register).unwrap();
        }
        memory
    }

    #[test]
    fn known_dates_are_shown() {
        // date -u -d @951782399, @4107542400, @0
        for (seconds, expected) in [
            (951_782_399, [0x59, 0x59, 0x23, 0x02, 0x28, 0x02, 0x00, 0x20]),
            (4_107_542_400, [0x00, 0x00, 0x00, 0x02, 0x01, 0x03, 0x00, 0x21]),
            (0, [0x00, 0x00, 0x00, 0x05, 0x01, 0x01, 0x70, 0x19]),
        ] {
            let memory = registers(seconds, Format::of(HOURS_24));
            assert_eq!(TIME_REGISTERS.map(|register| memory[usize::from(register)]), expected);
        }
    }

    #[test]
    fn hours_go_by_twelve_with_the_afternoon_in_bit_seven() {
        for (binary, shown) in [(0, [0x12, 0x01, 0x11, 0x92, 0x81, 0x91]), (BINARY, [12, 1, 11, 0x8c, 0x81, 0x8b])] {
            for (hour, byte) in [0, 1, 11, 12, 13, 23].into_iter().zip(shown) {
                assert_eq!(Format::of(binary).hour(hour), byte);
                assert_eq!(Format::of(binary).hour_value(byte), hour);
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back_the_same(seconds in -62_167_219_200i64..253_402_300_800, register_b: u8) {
            // The years 0 to 9999.
            let format = Format::of(register_b);
            prop_assert_eq!(decode(&registers(i128::from(seconds), format), format), i128::from(seconds));
        }

        #[test]
        fn any_content_means_a_time_within_bounds(bytes: [u8; 8], register_b: u8) {
            let mut memory = [0; CMOS_SIZE];
            for (register, byte) in TIME_REGISTERS.into_iter().zip(bytes) {
                memory[usize::from(register)] = byte;
            }
            let seconds = decode(&memory, Format::of(register_b));
            prop_assert!(seconds.unsigned_abs() < 1 << 41, "{seconds}");
        }
    }
}
