//! Numbers of bytes, for people.

use std::fmt;

const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// A number of bytes that shows itself in binary units: `4 KiB`, `1.5 GiB`. What one decimal cannot show is shown rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut units = UNITS.iter();
        let mut unit = units.next().unwrap_or(&"B");
        while value >= 1024.0
            && let Some(next) = units.next()
        {
            value /= 1024.0;
            unit = next;
        }
        if value.fract() == 0.0 { write!(f, "{value} {unit}") } else { write!(f, "{value:.1} {unit}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_the_greatest_unit_that_they_fill() {
        let shown = [0, 1023, 4096, 1536 << 20, (64 << 20) + 1, u64::MAX].map(|bytes| Size(bytes).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "4 KiB", "1.5 GiB", "64.0 MiB", "16777216 TiB"]);
    }
}
