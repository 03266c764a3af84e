//! Random moments that can be had again: `PERDURE_TEST_SEED` repeats a run, and a test that fails shows its seed.

use std::time::{Duration, SystemTime};

/// Vigna's SplitMix64 ("Fast splittable pseudorandom number generators", OOPSLA 2014).
pub(crate) struct Random(u64);

impl Random {
    /// Seeded by `PERDURE_TEST_SEED`, else by the clock. The seed is printed, which libtest shows of a test that fails.
    pub(crate) fn new() -> Self {
        let given = std::env::var("PERDURE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
        let seed = given.unwrap_or_else(|| u64::from(clock()));
        println!("PERDURE_TEST_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `items`.
    pub(crate) fn choose<T: Copy>(&mut self, items: &[T]) -> T {
        items[usize::try_from(self.next() % items.len() as u64).expect("an index")]
    }

    /// Between nothing and `most`.
    pub(crate) fn time(&mut self, most: Duration) -> Duration {
        Duration::from_nanos(self.next() % u64::try_from(most.as_nanos()).expect("a short time").max(1))
    }

    /// Waits for a time of at most `most`.
    pub(crate) fn pause(&mut self, most: Duration) {
        std::thread::sleep(self.time(most));
    }
}
