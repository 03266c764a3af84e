//! What `memwalk` does and prints, and its judge.
//!
//! # Output
//! ```text
//! memwalk pattern=<name> ws=<bytes> …       every parameter in force
//! pages <n>                                 of the working set
//! done <touches> <writes> <hash>            after `count` touches
//! ```
//! or `walk broken at touch <n> page <n> address <hex>` and an end with code 1, when `verify=1` and a page does not hold
//! what was last written to it. Through the report port come the touches done, every `report` touches and at the end.
//!
//! # Touches
//! A touch takes a page from the pattern, then draws whether it writes. The hash folds ([`crate::chain::fold`])
//! `2 * page + write` of every touch. Random numbers are those of [`SplitMix64`].
//!
//! | pattern | page |
//! |---|---|
//! | `sequential` | one after the other, round and round |
//! | `uniform` | any |
//! | `zipf` | rank k with probability in proportion to 1/k (exponent 1), ranks scattered |
//! | `hotcold` | `heat` per cent of touches to `hot` per cent of pages, scattered |
//! | `phases` | any of a window of a quarter of the pages, which moves on by its size every `phase` touches |
//!
//! `zipf` needs no logarithm and no table: an octave `[2^j, 2^(j+1))` is drawn uniformly, then a rank in it, which is
//! accepted with probability `2^j / k`. Accepted ranks follow 1/k exactly, at an expected 1.4 draws: rejection from
//! a dominating function that is constant on each octave (Devroye: *Non-Uniform Random Variate Generation*, 1986, II.3).
//! Ranks are scattered over the pages by the permutation `rank * 2654435761 mod pages`, its factor a prime.
//!
//! # Pages, with `verify=1`
//! A page holds `words` words at equal distances, word i being `first + i * 0x9e3779b97f4a7c15`, where `first` is a hash of the page's
//! number, its version and the seed. A touch compares them all, and a write gives the next version. The first touch of a
//! page writes in any case. At the end every page that has a version is compared once more. Versions are kept in memory
//! of their own, 4 bytes a page.

use crate::banner::{Banner, BannerError};
use crate::chain::fold;
use crate::random::SplitMix64;
use crate::transcript::{Difference, Transcript};

const SEED: u64 = 0x0070_6572_6475_7265;
const SCATTER: u64 = 2_654_435_761;

/// Greatest `count` that is recomputed, so that a forged first line cannot keep a verifier busy for ever.
pub const MAX_TOUCHES: u64 = 1 << 30;
/// Greatest number of pages: memwalk maps 512 GiB.
pub const MAX_PAGES: u64 = 1 << 27;

/// The order of touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One page after the other.
    Sequential,
    /// Any page.
    Uniform,
    /// Rank k in proportion to 1/k.
    Zipf,
    /// `heat` per cent of touches to `hot` per cent of pages.
    HotCold,
    /// A window that moves.
    Phases,
}

impl Pattern {
    /// All patterns, in the order in which the guest numbers them.
    pub const ALL: [Self; 5] = [Self::Sequential, Self::Uniform, Self::Zipf, Self::HotCold, Self::Phases];

    /// Its word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::HotCold => "hotcold",
            Self::Phases => "phases",
        }
    }
}

/// What decides the touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalkParameters {
    /// The order of touches.
    pub pattern: Pattern,
    /// Pages of the working set, at least 1.
    pub pages: u64,
    /// Per cent of touches that write.
    pub write: u64,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Per cent of pages that are hot.
    pub hot: u64,
    /// Per cent of touches that go to hot pages.
    pub heat: u64,
    /// Touches before the window moves.
    pub phase: u64,
}

/// One touch of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Number of the page in the working set, from 0.
    pub page: u64,
    /// Whether it writes.
    pub write: bool,
}

/// The touches that the guest does: an endless iterator, for benches and models as well as for [`verify`].
#[derive(Debug, Clone)]
pub struct Walk {
    parameters: WalkParameters,
    random: SplitMix64,
    cursor: u64,
    hot_pages: u64,
    window: u64,
    phase_start: u64,
    phase_left: u64,
}

impl Walk {
    /// The walk of `parameters`; `None` without a page or beyond [`MAX_PAGES`].
    #[must_use]
    pub fn new(parameters: WalkParameters) -> Option<Self> {
        let pages = parameters.pages;
        if pages == 0 || pages > MAX_PAGES {
            return None;
        }
        let share = u128::from(pages) * u128::from(parameters.hot) / 100;
        let hot_pages = u64::try_from(share).unwrap_or(u64::MAX).min(pages - 1).max(1);
        Some(Self {
            parameters,
            random: SplitMix64::new(parameters.seed),
            cursor: 0,
            hot_pages,
            window: (pages / 4).max(1),
            phase_start: 0,
            phase_left: parameters.phase,
        })
    }

    /// A number below 100, from the upper half of a draw.
    fn per_cent(&mut self) -> u64 {
        ((self.random.draw() >> 32) * 100) >> 32
    }

    fn zipf_rank(&mut self) -> u64 {
        let octaves = u64::from(self.parameters.pages.ilog2() + 1);
        loop {
            let first = 1_u64 << self.random.below(octaves);
            let draw = self.random.draw();
            let rank = first + (draw & (first - 1));
            if rank <= self.parameters.pages && (draw >> 32) * rank < first << 32 {
                return rank - 1;
            }
        }
    }

    fn hot_cold_rank(&mut self) -> u64 {
        let (hot, pages) = (self.hot_pages, self.parameters.pages);
        if self.per_cent() < self.parameters.heat || hot == pages {
            self.random.below(hot)
        } else {
            hot + self.random.below(pages - hot)
        }
    }

    fn scatter(&self, rank: u64) -> u64 {
        rank.wrapping_mul(SCATTER) % self.parameters.pages
    }

    fn phase_page(&mut self) -> u64 {
        if self.phase_left == 0 {
            self.phase_left = self.parameters.phase;
            self.phase_start = (self.phase_start + self.window) % self.parameters.pages;
        }
        self.phase_left = self.phase_left.wrapping_sub(1);
        (self.phase_start + self.random.below(self.window)) % self.parameters.pages
    }

    fn page(&mut self) -> u64 {
        match self.parameters.pattern {
            Pattern::Sequential => {
                let page = self.cursor;
                self.cursor = (page + 1) % self.parameters.pages;
                page
            }
            Pattern::Uniform => self.random.below(self.parameters.pages),
            Pattern::Zipf => {
                let rank = self.zipf_rank();
                self.scatter(rank)
            }
            Pattern::HotCold => {
                let rank = self.hot_cold_rank();
                self.scatter(rank)
            }
            Pattern::Phases => self.phase_page(),
        }
    }
}

impl Iterator for Walk {
    type Item = Touch;

    fn next(&mut self) -> Option<Touch> {
        let page = self.page();
        let write = self.per_cent() < self.parameters.write;
        Some(Touch { page, write })
    }
}

/// An output without fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalkReport {
    /// What decided the touches.
    pub parameters: WalkParameters,
    /// Touches that the guest says it has done; 0 where it is not at its end.
    pub touches: u64,
    /// Of these, writes.
    pub writes: u64,
    /// The guest came to its end.
    pub complete: bool,
}

/// The first fault of an output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// The first line cannot be used.
    #[error(transparent)]
    Banner(#[from] BannerError),
    /// The second line does not give the pages of the working set.
    #[error(
        "verifying the walk: {line:?} does not give the pages of ws={ws}; let the guest run longer, or give it that memory"
    )]
    Pages {
        /// The line.
        line: String,
        /// The working set asked for, in bytes.
        ws: u64,
    },
    /// The guest itself found a page altered, or met an exception, and ended.
    #[error("verifying the walk: the guest says {line:?}")]
    Broken {
        /// Its last line.
        line: String,
    },
    /// The end is not that of these touches.
    #[error("verifying the walk: {expected:?} was due, {found:?} was printed; touches were lost, doubled or altered")]
    Different {
        /// The line due; empty where nothing more was.
        expected: String,
        /// The line found.
        found: String,
    },
}

/// Recomputes the walk and compares every byte of `output`, which may end anywhere.
///
/// # Errors
/// The first line that differs; see [`WalkError`].
pub fn verify(output: &str) -> Result<WalkReport, WalkError> {
    let banner = Banner::parse("memwalk", output)?;
    let count = banner.number("count", MAX_TOUCHES)?;
    let ws = banner.number("ws", u64::MAX)?;
    let parameters = WalkParameters {
        pattern: pattern(&banner)?,
        pages: pages(output, ws)?,
        write: banner.number("write", u64::MAX)?,
        seed: banner.number("seed", u64::MAX)?,
        hot: banner.number("hot", 100)?,
        heat: banner.number("heat", u64::MAX)?,
        phase: banner.number("phase", u64::MAX)?,
    };
    let invalid = || WalkError::Pages { line: format!("pages {}", parameters.pages), ws };
    let walk = Walk::new(parameters).ok_or_else(invalid)?;
    let mut result = (0, 0);
    let known = [banner.line.to_owned(), format!("pages {}", parameters.pages)];
    let end = std::iter::once_with(|| {
        let (writes, hash) =
            walk.take(usize::try_from(count).unwrap_or(usize::MAX)).fold((0, SEED), |(writes, hash), touch| {
                (writes + u64::from(touch.write), fold(hash, 2 * touch.page + u64::from(touch.write)))
            });
        result = (count, writes);
        format!("done {count} {writes} {hash:016x}")
    });
    let due = known.into_iter().chain(end.filter(|_| count != 0));
    let extent = Transcript::new(due).compare(&[output]).map_err(|Difference { expected, found }| {
        if found.starts_with("walk broken") || found.starts_with("exception ") {
            WalkError::Broken { line: found }
        } else {
            WalkError::Different { expected, found }
        }
    })?;
    let (touches, writes) = if extent.complete { result } else { (0, 0) };
    Ok(WalkReport { parameters, touches, writes, complete: extent.complete && count != 0 })
}

fn pattern(banner: &Banner<'_>) -> Result<Pattern, BannerError> {
    let word = banner.word("pattern");
    let known = Pattern::ALL.into_iter().find(|pattern| pattern.name() == word);
    known.ok_or_else(|| BannerError::Parameter {
        guest: "memwalk",
        key: "pattern",
        value: word.chars().take(40).collect(),
        limit: 0,
    })
}

/// The pages that the second line gives, which are those of `ws` unless that is 0.
fn pages(output: &str, ws: u64) -> Result<u64, WalkError> {
    let line = output.lines().nth(1).unwrap_or_default();
    let number = line.strip_prefix("pages ").and_then(|number| number.parse::<u64>().ok());
    match number {
        Some(pages) if ws < 4096 || pages == ws / 4096 => Ok(pages),
        _ => Err(WalkError::Pages { line: line.chars().take(80).collect(), ws }),
    }
}

#[cfg(test)]
#[path = "walk/tests.rs"]
mod tests;
