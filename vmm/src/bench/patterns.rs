//! The order in which a workload touches its pages: lists for the guest `pages`, and for who walks the same list without a guest.
//!
//! | pattern | page |
//! |---|---|
//! | `sequential` | one after the other |
//! | `uniform` | any, with equal probability |
//! | `zipf` | rank k in proportion to `1 / k^0.99`, ranks *scrambled*: hot pages lie anywhere among cold ones |
//! | `zipf-ranked` | the same, rank k being page k: hot pages lie side by side at the beginning |
//! | `hot-cold` | 90 % of accesses to 10 % of the pages, which lie anywhere; within each part any |
//! | `phases` | any of a window of a quarter of the pages, which moves on by its size after as many accesses as there are pages |
//!
//! Zipf's ranks come from the generator of Gray et al. (*Quickly generating billion-record synthetic databases*, SIGMOD 1994), with the
//! theta of YCSB (Cooper et al., SoCC 2010). Its first two ranks are exact, the others follow a continuous approximation: the first
//! 100 of 10,000 pages get 52.9 % where the law gives 51.8. Scrambled is by a permutation, not by a hash as in YCSB, under which
//! some pages would take the accesses of two and others none.
//!
//! The same seed gives the same list.

use std::fmt;

use guests::pages::{Access, List, ListError};
use guests::random::SplitMix64;
use serde::{Deserialize, Serialize};

/// Exponent of Zipf's law.
pub const THETA: f64 = 0.99;
/// Part of the pages that is hot, and that gets the other part's share of accesses, in per cent.
const HOT_PERCENT: u64 = 10;
/// A phase's window is this part of the pages.
const WINDOWS: u64 = 4;

/// The order of accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// One after the other
    Sequential,
    /// Any page
    Uniform,
    /// Rank k in proportion to 1/k^0.99; hot pages lie anywhere
    Zipf,
    /// The same; hot pages lie side by side
    ZipfRanked,
    /// 90 % of accesses to 10 % of the pages
    HotCold,
    /// A window of a quarter of the pages, which moves
    Phases,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Sequential, Self::Uniform, Self::Zipf, Self::ZipfRanked, Self::HotCold, Self::Phases];
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sequential => "sequential",
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::ZipfRanked => "zipf-ranked",
            Self::HotCold => "hot-cold",
            Self::Phases => "phases",
        })
    }
}

/// What decides a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// The order of accesses.
    pub pattern: Pattern,
    /// Pages of the working set; at least 1.
    pub pages: u32,
    /// Accesses before the list begins anew, in working sets: there are `rounds * pages` of them.
    pub rounds: u32,
    /// Per cent of accesses that write.
    pub write_percent: u32,
    /// Of the random numbers.
    pub seed: u64,
}

impl Workload {
    /// Its list.
    ///
    /// # Errors
    /// [`ListError::Length`] if there are no pages or no rounds.
    pub fn list(&self) -> Result<List, ListError> {
        let entries = u64::from(self.pages) * u64::from(self.rounds);
        let entries = usize::try_from(entries).unwrap_or(usize::MAX);
        let mut writes = SplitMix64::new(!self.seed);
        let percent = u64::from(self.write_percent);
        let accesses = Pages::new(self.pattern, self.pages, self.seed).take(entries);
        List::new(accesses.map(|page| Access { page, write: writes.below(100) < percent }), self.pages)
    }
}

/// Pages in the order of a pattern, for ever.
struct Pages {
    pattern: Pattern,
    pages: u64,
    at: u64,
    random: SplitMix64,
    zipf: Zipf,
    /// Which page each rank is; empty where that is the page of the same number.
    places: Vec<u32>,
}

impl Pages {
    fn new(pattern: Pattern, pages: u32, seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        let places = match pattern {
            Pattern::Zipf | Pattern::HotCold => permutation(pages, &mut random),
            Pattern::Sequential | Pattern::Uniform | Pattern::ZipfRanked | Pattern::Phases => Vec::new(),
        };
        let zipf = match pattern {
            Pattern::Zipf | Pattern::ZipfRanked => Zipf::new(pages),
            _ => Zipf::new(1),
        };
        Self { pattern, pages: u64::from(pages), at: 0, random, zipf, places }
    }

    fn rank(&mut self) -> u64 {
        let pages = self.pages;
        match self.pattern {
            Pattern::Sequential => self.at % pages,
            Pattern::Uniform => self.random.below(pages),
            Pattern::Zipf | Pattern::ZipfRanked => self.zipf.rank(&mut self.random),
            Pattern::HotCold => {
                let hot = (pages * HOT_PERCENT / 100).max(1);
                if self.random.below(100) >= HOT_PERCENT || hot == pages {
                    self.random.below(hot)
                } else {
                    hot + self.random.below(pages - hot)
                }
            }
            Pattern::Phases => {
                let window = (pages / WINDOWS).max(1);
                (self.at / pages * window + self.random.below(window)) % pages
            }
        }
    }
}

impl Iterator for Pages {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.pages == 0 {
            return None;
        }
        let rank = self.rank();
        self.at += 1;
        let rank = usize::try_from(rank).ok()?;
        self.places.get(rank).copied().or_else(|| u32::try_from(rank).ok())
    }
}

/// Fisher and Yates's shuffle of the numbers below `count`.
fn permutation(count: u32, random: &mut SplitMix64) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..count).collect();
    for last in (1..numbers.len()).rev() {
        let other = usize::try_from(random.below(last as u64 + 1)).unwrap_or(last);
        numbers.swap(last, other);
    }
    numbers
}

/// The generator of Gray et al.
struct Zipf {
    count: f64,
    zeta: f64,
    alpha: f64,
    eta: f64,
}

impl Zipf {
    fn new(count: u32) -> Self {
        let zeta = |count: u32| (1..=count).map(|k| f64::from(k).powf(-THETA)).sum::<f64>();
        let (all, two, count) = (zeta(count), zeta(2), f64::from(count));
        let eta = (1.0 - (2.0 / count).powf(1.0 - THETA)) / (1.0 - two / all);
        Self { count, zeta: all, alpha: 1.0 / (1.0 - THETA), eta }
    }

    /// The next rank, from 0.
    fn rank(&self, random: &mut SplitMix64) -> u64 {
        let uniform = random.unit();
        let share = uniform * self.zeta;
        if share < 1.0 {
            return 0;
        }
        if share < 1.0 + 0.5_f64.powf(THETA) {
            return 1;
        }
        let rank = self.count * (self.eta * uniform - self.eta + 1.0).powf(self.alpha);
        // A float becomes the nearest number that there is; rounding alone could reach `count`.
        rank.min(self.count - 1.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u32 = 10_000;

    fn workload(pattern: Pattern, rounds: u32) -> Workload {
        Workload { pattern, pages: PAGES, rounds, write_percent: 30, seed: 7 }
    }

    fn accesses(pattern: Pattern, rounds: u32) -> Vec<Access> {
        let list = workload(pattern, rounds).list().unwrap();
        list.entries().iter().map(|entry| Access::of(*entry)).collect()
    }

    /// How often each page is touched.
    fn counts(pattern: Pattern, rounds: u32) -> Vec<u32> {
        let mut counts = vec![0; PAGES as usize];
        accesses(pattern, rounds).iter().for_each(|access| counts[access.page as usize] += 1);
        counts
    }

    /// The part of all accesses that the most touched `part` of pages gets.
    fn head(mut counts: Vec<u32>, part: f64) -> f64 {
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let head = (counts.len() as f64 * part) as usize;
        f64::from(counts[..head].iter().sum::<u32>()) / f64::from(counts.iter().sum::<u32>())
    }

    #[track_caller]
    fn near(got: f64, expected: f64, margin: f64) {
        assert!((got - expected).abs() <= margin, "{got}, {expected} ± {margin} expected");
    }

    #[test]
    fn sequential_touches_all_in_turn() {
        let pages: Vec<u32> = accesses(Pattern::Sequential, 2).iter().map(|access| access.page).collect();
        assert!(pages.iter().copied().eq((0..PAGES).chain(0..PAGES)));
    }

    #[test]
    fn uniform_counts_spread_as_chance_has_it() {
        // Pearson's chi-square over n cells has mean n - 1 and variance 2 (n - 1): five deviations.
        let (counts, expected, cells) = (counts(Pattern::Uniform, 50), 50.0, f64::from(PAGES));
        let chi: f64 = counts.iter().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
        near(chi, cells - 1.0, 5.0 * (2.0 * cells).sqrt());
    }

    #[test]
    fn zipf_ranks_have_the_probabilities_of_the_law() {
        let counts = counts(Pattern::ZipfRanked, 100);
        let draws = f64::from(PAGES) * 100.0;
        let zeta: f64 = (1..=PAGES).map(|k| f64::from(k).powf(-THETA)).sum();
        for (rank, probability) in [(0_usize, 1.0 / zeta), (1, 0.5_f64.powf(THETA) / zeta)] {
            let expected = draws * probability;
            near(f64::from(counts[rank]), expected, 5.0 * expected.sqrt());
        }
        // The rest is an approximation, whose sums keep within three hundredths of the law's.
        for most in [10_usize, 100, 1000, 5000] {
            let law = (1..=most).map(|k| (k as f64).powf(-THETA)).sum::<f64>() / zeta;
            let got = f64::from(counts[..most].iter().sum::<u32>()) / draws;
            near(got, law, 0.03);
        }
        assert!(counts[PAGES as usize - 10..].iter().any(|count| *count > 0), "the last ranks are drawn from too");
    }

    #[test]
    fn ranked_has_its_hot_pages_side_by_side_and_scrambled_anywhere() {
        let front = |counts: &[u32]| {
            let front: u32 = counts[..PAGES as usize / 10].iter().sum();
            f64::from(front) / f64::from(counts.iter().sum::<u32>())
        };
        let (ranked, scrambled) = (counts(Pattern::ZipfRanked, 20), counts(Pattern::Zipf, 20));
        near(front(&ranked), 0.762, 0.005);
        assert!(front(&scrambled) < 0.4, "{}", front(&scrambled));
        near(head(ranked, 0.1), head(scrambled, 0.1), 0.01);
    }

    #[test]
    fn a_tenth_of_pages_is_hot_and_lies_anywhere() {
        let counts = counts(Pattern::HotCold, 50);
        near(head(counts.clone(), 0.1), 0.9, 0.005);
        let hot: Vec<bool> = counts.iter().map(|count| *count > 200).collect();
        let neighbours = hot.windows(2).filter(|pair| pair[0] && pair[1]).count();
        near(neighbours as f64, 100.0, 50.0);
    }

    #[test]
    fn phases_keep_to_a_quarter_and_move_through_all() {
        let accesses = accesses(Pattern::Phases, 8);
        for (phase, part) in accesses.chunks(PAGES as usize).enumerate() {
            let window = PAGES / 4;
            let first = phase as u32 % 4 * window;
            assert!(part.iter().all(|access| (first..first + window).contains(&access.page)), "phase {phase}");
        }
    }

    #[test]
    fn writes_have_their_share_whatever_the_page() {
        for pattern in Pattern::ALL {
            let accesses = accesses(pattern, 10);
            let writes = accesses.iter().filter(|access| access.write).count();
            near(writes as f64 / accesses.len() as f64, 0.3, 0.01);
            let front: Vec<_> = accesses.iter().filter(|access| access.page < PAGES / 2).collect();
            let written = front.iter().filter(|access| access.write).count();
            near(written as f64 / front.len() as f64, 0.3, 0.02);
        }
    }

    #[test]
    fn a_seed_gives_one_list_and_another_seed_another() {
        for pattern in Pattern::ALL {
            let one = workload(pattern, 1);
            assert_eq!(one.list().unwrap(), one.list().unwrap());
            assert_ne!(one.list().unwrap(), Workload { seed: 8, ..one }.list().unwrap(), "{pattern}");
        }
    }

    #[test]
    fn tiny_working_sets_work_and_none_is_refused() {
        for pattern in Pattern::ALL {
            for pages in [1, 2, 3] {
                let list = Workload { pages, rounds: 100, ..workload(pattern, 1) }.list().unwrap();
                assert!(list.entries().iter().all(|entry| Access::of(*entry).page < pages));
            }
            assert!(Workload { pages: 0, ..workload(pattern, 1) }.list().is_err());
        }
    }
}
