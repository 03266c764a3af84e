//! How much fits: what a freeze takes beside the journal, and the pace of the journal itself.
//!
//! ```text
//!   hold-up ├── fixed: stop, read, context, stamps ──┤── journal: bytes / pace ──┤── spare ──┤
//! ```
//!
//! Both are measured on the VM's own medium when it starts, and corrected by each freeze and each probe: at once for the worse, slowly for the better.

use std::time::Duration;

use crate::machine::time::nanoseconds;

/// What perdure itself is taken to need for a freeze until one was seen: stopping vCPUs, reading state, putting it into words.
const OWN: Duration = Duration::from_micros(1500);
/// Of what fits at the measured pace, this part is used.
const SAFETY: u64 = 2;
/// Freezes that are remembered.
const REMEMBERED: usize = 32;
/// Fewer bytes than this say nothing of a pace.
const TELLING: u64 = 256 << 10;
/// A pace is taken to improve by this part of the difference at a time.
const SLOWLY: u64 = 8;

/// What was measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pace {
    /// A durable write of next to nothing, in nanoseconds: the median, and the worst.
    write_ns: u64,
    write_worst_ns: u64,
    bytes_per_second: u64,
    /// Durable writes of a freeze, one after the other.
    writes: u32,
    /// What freezes took beside the journal, the last ones.
    rests: Vec<u64>,
}

impl Pace {
    /// Of writes of next to nothing, and of `bytes` bytes each. A freeze has `writes` of the former, the journal's not among them.
    #[must_use]
    pub fn of(small: &[Duration], large: &[Duration], bytes: u64, writes: u32) -> Self {
        let mut small: Vec<u64> = small.iter().copied().map(nanoseconds).collect();
        small.sort_unstable();
        let write_ns = small.get(small.len() / 2).copied().unwrap_or(0);
        let write_worst_ns = small.last().copied().unwrap_or(0);
        let worst = large.iter().copied().map(nanoseconds).max().unwrap_or(u64::MAX);
        let bytes_per_second = streamed(bytes, worst, write_ns);
        Self { write_ns, write_worst_ns, bytes_per_second, writes, rests: Vec::new() }
    }

    /// What a freeze takes at worst with an empty journal.
    #[must_use]
    pub fn fixed(&self) -> Duration {
        let guess = nanoseconds(OWN).saturating_add(u64::from(self.writes).saturating_mul(self.write_ns));
        let rest = self.rests.iter().copied().max().unwrap_or(guess);
        // One of its writes is the worst; which one does not matter. A rest that was seen has its own.
        Duration::from_nanos(rest.saturating_add(self.write_worst_ns))
    }

    /// Bytes that a medium takes in a second, as the journal writes them.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    /// How many bytes may be dirty when the power-fail signal comes.
    #[must_use]
    pub fn fits(&self, holdup: Duration) -> u64 {
        let left = holdup.saturating_sub(self.fixed());
        let bytes = left.as_nanos().saturating_mul(self.bytes_per_second.into()) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX) / SAFETY
    }

    /// A journal of so many bytes took so long.
    pub fn learn_journal(&mut self, bytes: u64, took: Duration) {
        let took = nanoseconds(took);
        if bytes < TELLING {
            self.write_worst_ns = if took > self.write_worst_ns { took } else { toward(self.write_worst_ns, took) };
            return;
        }
        let seen = streamed(bytes, took, self.write_ns);
        self.bytes_per_second = if seen < self.bytes_per_second { seen } else { toward(self.bytes_per_second, seen) };
    }

    /// A freeze took so long beside its journal.
    pub fn learn_rest(&mut self, rest: Duration) {
        if self.rests.len() >= REMEMBERED {
            self.rests.remove(0);
        }
        self.rests.push(nanoseconds(rest));
    }
}

/// Bytes a second of a stream that took `took_ns` with the durable write at its end, which alone takes some `write_ns`. What it is said to take beside the
/// stream is at most half: a write that was quick for once says little of the stream.
fn streamed(bytes: u64, took_ns: u64, write_ns: u64) -> u64 {
    let ns = took_ns.saturating_sub(write_ns).max(took_ns / 2);
    let pace = u128::from(bytes) * 1_000_000_000 / u128::from(ns.max(1));
    u64::try_from(pace).unwrap_or(u64::MAX)
}

fn toward(from: u64, to: u64) -> u64 {
    if to >= from { from + (to - from) / SLOWLY } else { from - (from - to) / SLOWLY }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn pace() -> Pace {
        // 1 ms, once 3 ms; 4 MB in 5 ms: 1 GB/s beside the write.
        Pace::of(&[MS, MS, 3 * MS], &[5 * MS, 4 * MS], 4_000_000, 2)
    }

    #[test]
    fn what_fits_is_half_of_what_the_medium_takes_in_what_is_left() {
        let pace = pace();
        assert_eq!(pace.bytes_per_second(), 1_000_000_000);
        assert_eq!(pace.fixed(), Duration::from_micros(1500 + 2 * 1000 + 3000));
        assert_eq!(pace.fits(Duration::from_micros(16_500)), 5_000_000);
        assert_eq!(pace.fits(Duration::from_micros(6500)), 0);
        assert_eq!(pace.fits(MS), 0);
    }

    #[test]
    fn a_worse_freeze_counts_at_once_and_a_better_one_slowly() {
        let mut pace = pace();
        pace.learn_journal(1 << 20, 11 * MS);
        assert!((100_000_000..110_000_000).contains(&pace.bytes_per_second()), "{pace:?}");
        pace.learn_journal(1 << 20, 2 * MS);
        assert!((200_000_000..240_000_000).contains(&pace.bytes_per_second()), "{pace:?}");
        pace.learn_rest(20 * MS);
        assert_eq!(pace.fixed(), 23 * MS);
        (0..REMEMBERED).for_each(|_| pace.learn_rest(2 * MS));
        assert_eq!(pace.fixed(), 5 * MS);
        pace.learn_journal(4096, 9 * MS);
        assert_eq!(pace.fixed(), 11 * MS);
    }

    #[test]
    fn a_journal_that_was_quicker_than_a_small_write_says_nothing_absurd() {
        let mut pace = pace();
        (0..100).for_each(|_| pace.learn_journal(1 << 20, MS));
        assert!(pace.bytes_per_second() <= 2 * (1000 << 20), "{pace:?}");
        let slow = Pace::of(&[10 * MS], &[MS], 1 << 20, 1);
        assert_eq!(slow.bytes_per_second(), 2 * (1000 << 20));
    }

    proptest! {
        /// What the pace says fits is done in time by a medium that keeps the pace, twice over.
        #[test]
        fn what_fits_fits(small in proptest::collection::vec(1_u64..5_000_000, 1..9), large in 1_u64..100_000_000, holdup in 0_u64..1_000_000_000) {
            let small: Vec<_> = small.into_iter().map(Duration::from_nanos).collect();
            let pace = Pace::of(&small, &[Duration::from_nanos(large)], 4 << 20, 3);
            let holdup = Duration::from_nanos(holdup);
            let bytes = pace.fits(holdup);
            let takes = u128::from(bytes) * 1_000_000_000 / u128::from(pace.bytes_per_second().max(1));
            let fixed = pace.fixed().as_nanos();
            prop_assert!(bytes == 0 || fixed + takes * 2 <= holdup.as_nanos() + 2, "{bytes} bytes of {pace:?}");
        }

        #[test]
        fn nothing_overflows(bytes: u64, took: u64, holdup: u64) {
            let mut pace = Pace::of(&[Duration::from_nanos(took)], &[], bytes, u32::MAX);
            pace.learn_journal(bytes, Duration::from_nanos(took));
            pace.learn_rest(Duration::from_nanos(took));
            prop_assert!(pace.fits(Duration::ZERO) == 0 && pace.fits(Duration::from_nanos(holdup)) <= pace.fits(Duration::MAX));
        }
    }
}
