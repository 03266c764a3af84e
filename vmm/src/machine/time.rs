//! Time as it is kept and saved: nanoseconds in 64 bits.

use std::time::Duration;

/// `duration` in nanoseconds; the most that 64 bits hold (584 years) if it is longer.
#[must_use]
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
