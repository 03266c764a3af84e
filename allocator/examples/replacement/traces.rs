//! Seeded sequences of clusters.

use crate::{ACCESSES, CLUSTERS, FRAMES};

/// Pages of a cluster of 64 KiB.
const CLUSTER_PAGES: u32 = 16;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        (((self.draw() >> 32) * u64::from(n)) >> 32) as u32
    }

    /// A rank below `n`, rank k with probability in proportion to 1/(k + 1): by rejection from a function that is constant on each
    /// octave (Devroye: Non-Uniform Random Variate Generation, 1986, II.3).
    fn zipf(&mut self, n: u32) -> u32 {
        loop {
            let first = 1_u64 << self.below(n.ilog2() + 1);
            let draw = self.draw();
            let rank = first + (draw & (first - 1));
            if rank <= u64::from(n) && (draw >> 32) * rank < first << 32 {
                return (rank - 1) as u32;
            }
        }
    }
}

/// A permutation of the numbers below `n`: its factor is a prime.
fn scatter(rank: u32, n: u32) -> u32 {
    (u64::from(rank) * 2_654_435_761 % u64::from(n)) as u32
}

fn trace(mut cluster: impl FnMut(u32, &mut Random) -> u32) -> Vec<u32> {
    let mut random = Random(7);
    (0..ACCESSES as u32).map(|turn| cluster(turn, &mut random) % CLUSTERS).collect()
}

fn zipf(random: &mut Random) -> u32 {
    scatter(random.zipf(CLUSTERS), CLUSTERS)
}

/// Every trace, by name.
pub(crate) fn all() -> Vec<(&'static str, Vec<u32>)> {
    let pages = CLUSTERS * CLUSTER_PAGES;
    let fits = FRAMES / 10 * 9;
    let mut scan = (0_u32.., 0_u32..);
    let mut edge = 0;
    vec![
        ("uniform", trace(|_, random| random.below(CLUSTERS))),
        ("zipf", trace(|_, random| zipf(random))),
        // Popular pages share their clusters with others.
        ("zipf of pages", trace(|_, random| scatter(random.zipf(pages), pages) / CLUSTER_PAGES)),
        ("loop 1.03×", trace(|turn, _| turn % (FRAMES * 103 / 100))),
        ("loop 1.2×", trace(|turn, _| turn % (FRAMES * 12 / 10))),
        ("loop 4×", trace(|turn, _| turn % CLUSTERS)),
        (
            "90/10",
            trace(|_, random| match random.below(10) {
                0 => random.below(CLUSTERS),
                _ => scatter(random.below(CLUSTERS / 10), CLUSTERS),
            }),
        ),
        // A working set that fits, and is another one every 200,000 accesses.
        ("phases", trace(|turn, random| turn / 200_000 * fits + random.below(fits))),
        ("zipf phases", trace(|turn, random| zipf(random) + turn / 250_000 * 5000)),
        // Three accesses in ten are of a scan.
        (
            "zipf, scan",
            trace(|_, random| match random.below(10) {
                0..3 => scan.0.next().unwrap_or(0),
                _ => zipf(random),
            }),
        ),
        // A hot set that fits, interrupted by scans of more than memory.
        (
            "hot, scans",
            trace(|turn, random| match turn / 10_000 % 5 {
                4 => scan.1.next().unwrap_or(0),
                _ => scatter(random.below(FRAMES / 10 * 8), CLUSTERS),
            }),
        ),
        // The newer, the hotter: made for LRU.
        (
            "moving edge",
            trace(move |turn, random| {
                edge += u32::from(turn % 4 == 0);
                edge + CLUSTERS - random.zipf(2 * FRAMES)
            }),
        ),
    ]
}
