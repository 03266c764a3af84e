//! What `counter` prints, and its judge.
//!
//! # Output
//! ```text
//! counter ticks=<n> hz=<n> every=<n> ram=<bytes> verify=<0|1>
//! tick <n> <hash, 16 hexadecimal digits>          each `every`-th tick, n from 1
//! done <n> <hash>                                 after tick `ticks`, then the machine powers off
//! ```
//! or, where the guest finds that something changed behind its back, `chain broken at tick <n> <what> <hash>` and
//! an end with code 1, `what` being `memory` and an address, `register` and its index, or `number` and a count.
//!
//! # Hash
//! `fold(h, x) = (rotate_left(h, 5) ^ x) * 0x517cc1b727220a95` mod 2^64, the step of Firefox's `FxHasher`. It is no
//! cryptographic hash; what counts is that it is one-to-one in `h` and in `x`: a single altered word alters the hash for
//! certain, and a hash that was altered stays so.
//!
//! Tick n folds in, in this order: n; the 53 registers that idled with `h + k * STEP` in them (general ones; CR2, DR0–3,
//! the bases of FS, GS and the other GS, of 47 bits; XMM0–15); the 64 words of the next line of 512 bytes
//! of its window of RAM. Then the line is written anew: word i becomes `h + i * STEP`. Lines follow one another round
//! robin over the pages, then to the next line of each page; before its first turn a line counts as zeros.

use crate::banner::{Banner, BannerError};
use crate::transcript::{Difference, Extent, Transcript};

const SEED: u64 = 0x0070_6572_6475_7265;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER: u64 = 0x517c_c1b7_2722_0a95;
const GENERAL_REGISTERS: u64 = 13;
const ADDRESS_REGISTERS: u64 = 8;
const LIVE_WORDS: u64 = 53;
const ADDRESS_MASK: u64 = 0x7fff_ffff_ffff;
const LINE_WORDS: u64 = 64;
const PAGE_LINES: u64 = 8;

/// Greatest `ram` that is verified: the window lies below 1 GiB.
pub const MAX_RAM: u64 = 1 << 30;
/// Greatest number of ticks that is recomputed, so that a forged first line cannot keep a verifier busy for ever.
pub const MAX_TICKS: u64 = 1 << 28;

/// Folds `word` into `hash`; see the module for its properties.
#[must_use]
pub const fn fold(hash: u64, word: u64) -> u64 {
    (hash.rotate_left(5) ^ word).wrapping_mul(MULTIPLIER)
}

/// What the guest computes, tick by tick.
#[derive(Debug, Clone)]
pub struct Chain {
    tick: u64,
    hash: u64,
    pages: u64,
    lines: Vec<u64>, // word 0 of each line, in the order of their turns
}

impl Chain {
    /// A chain over `ram` bytes of memory, of which whole pages count; `None` beyond [`MAX_RAM`] or below a page.
    #[must_use]
    pub fn new(ram: u64) -> Option<Self> {
        let pages = ram / 4096;
        (pages > 0 && ram <= MAX_RAM).then(|| Self { tick: 0, hash: SEED, pages, lines: Vec::new() })
    }

    /// Number of the last tick done.
    #[must_use]
    pub fn tick(&self) -> u64 {
        self.tick
    }

    /// Hash after that tick.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Does the next tick and gives the hash after it.
    pub fn advance(&mut self) -> u64 {
        let idle = self.hash;
        let mut hash = fold(idle, self.tick + 1);
        for k in 1..=LIVE_WORDS {
            let word = idle.wrapping_add(k.wrapping_mul(STEP));
            let address = k > GENERAL_REGISTERS && k <= GENERAL_REGISTERS + ADDRESS_REGISTERS;
            hash = fold(hash, if address { word & ADDRESS_MASK } else { word });
        }
        let turn = self.tick % (self.pages * PAGE_LINES);
        let line = usize::try_from(turn).ok().and_then(|turn| self.lines.get_mut(turn));
        for i in 0..LINE_WORDS {
            let word = line.as_ref().map_or(0, |first| first.wrapping_add(i.wrapping_mul(STEP)));
            hash = fold(hash, word);
        }
        match line {
            Some(first) => *first = hash,
            None => self.lines.push(hash),
        }
        self.tick += 1;
        self.hash = hash;
        hash
    }
}

/// An output without fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainReport {
    /// The last tick whose line is complete.
    pub ticks: u64,
    /// The hash of that tick.
    pub hash: u64,
    /// Complete lines, the first one of the guest included.
    pub lines: usize,
    /// The output ends within a line, as that of a guest that was stopped may.
    pub partial: bool,
    /// The guest came to its end by itself.
    pub complete: bool,
    /// How often it went back to an earlier point (see [`verify_segments`]).
    pub rewound: usize,
}

/// The first fault of an output. `unit` is `tick`, `turn` for [`crate::turns`], or `record` for [`crate::records`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// The first line cannot be used.
    #[error(transparent)]
    Banner(#[from] BannerError),
    /// A number was left out.
    #[error("verifying the chain: lost {unit} {expected}, {unit} {found} stands in its place; the outage dropped it")]
    Lost {
        /// What is counted.
        unit: &'static str,
        /// The number due.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// A number came again.
    #[error("verifying the chain: {unit} {found} came again where {expected} was due; the outage doubled it")]
    Doubled {
        /// What is counted.
        unit: &'static str,
        /// The number due.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// The number is right, the line is not: memory, a register or the line itself was altered.
    #[error("verifying the chain: {unit} {number} is altered: {expected:?} was due, {found:?} was printed")]
    Altered {
        /// What is counted.
        unit: &'static str,
        /// The number of the line due.
        number: u64,
        /// The line due.
        expected: String,
        /// The line found.
        found: String,
    },
    /// The guest itself found a difference and ended.
    #[error("verifying the chain: the guest says {line:?}")]
    Broken {
        /// Its last line.
        line: String,
    },
    /// A line where none was due: behind the end, or more than can be recomputed.
    #[error("verifying the chain: {found:?} was printed where nothing more was due")]
    Beyond {
        /// The line.
        found: String,
    },
}

/// Recomputes what `counter` must have printed and compares every byte of `output`, which must begin with the
/// guest's first line and may end anywhere. Bytes that are no UTF-8 (`String::from_utf8_lossy`) count as altered.
///
/// # Errors
/// The first tick that was lost, doubled or altered; see [`ChainError`].
pub fn verify(output: &str) -> Result<ChainReport, ChainError> {
    verify_segments(&[output])
}

/// As [`verify`], for a VM that was rolled back: each segment after the first may begin at any byte which the guest
/// had already printed, because from there it goes on as it did then.
///
/// # Errors
/// As [`verify`].
pub fn verify_segments(segments: &[&str]) -> Result<ChainReport, ChainError> {
    let mut lines = Lines::of(segments.first().copied().unwrap_or_default())?;
    let extent = Transcript::new(&mut lines).compare(segments).map_err(|difference| classify("tick", difference))?;
    let (ticks, hash) = lines.at(&extent);
    let Extent { lines, partial, complete, rewound } = extent;
    Ok(ChainReport { ticks, hash, lines, partial, complete, rewound })
}

/// The lines that the guest prints, in order.
#[derive(Debug)]
pub(crate) struct Lines {
    header: Option<String>,
    chain: Chain,
    every: u64,
    ticks: u64,
    done: bool,
    printed: Vec<(u64, u64)>, // tick and hash of each line behind the first
}

impl Lines {
    /// Those of the guest whose first line `output` begins with.
    pub(crate) fn of(output: &str) -> Result<Self, BannerError> {
        let banner = Banner::parse("counter", output)?;
        let every = banner.number("every", MAX_TICKS)?;
        let ticks = banner.number("ticks", MAX_TICKS)?;
        let ram = banner.number("ram", MAX_RAM)?;
        let value = banner.word("ram").to_owned();
        let invalid = BannerError::Parameter { guest: "counter", key: "ram", value, limit: MAX_RAM };
        let chain = Chain::new(ram).ok_or(invalid)?;
        let header = format!(
            "counter ticks={ticks} hz={} every={every} ram={ram} verify={}",
            banner.number("hz", u64::MAX)?,
            banner.number("verify", u64::MAX)?
        );
        Ok(Self { header: Some(header), chain, every, ticks, done: false, printed: Vec::new() })
    }

    /// The last tick of an output that goes so far, and its hash.
    fn at(&self, extent: &Extent) -> (u64, u64) {
        extent.lines.checked_sub(2).and_then(|last| self.printed.get(last)).copied().unwrap_or((0, SEED))
    }

    /// What tells the last tick of an output that goes so far.
    pub(crate) fn ticks_of(&self) -> impl Fn(&Extent) -> u64 + use<> {
        let (every, ticks) = (self.every, self.ticks);
        move |extent| match extent.complete {
            true => ticks,
            false => u64::try_from(extent.lines.saturating_sub(1)).unwrap_or(u64::MAX).saturating_mul(every),
        }
    }
}

impl Iterator for Lines {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        if let Some(header) = self.header.take() {
            return Some(header);
        }
        loop {
            let tick = self.chain.tick();
            if self.ticks != 0 && tick == self.ticks {
                if std::mem::replace(&mut self.done, true) {
                    return None;
                }
                self.printed.push((tick, self.chain.hash()));
                return Some(format!("done {tick} {:016x}", self.chain.hash()));
            }
            if tick >= MAX_TICKS || (self.every == 0 && self.ticks == 0) {
                return None;
            }
            let hash = self.chain.advance();
            if self.every != 0 && self.chain.tick().is_multiple_of(self.every) {
                self.printed.push((self.chain.tick(), hash));
                return Some(format!("tick {} {hash:016x}", self.chain.tick()));
            }
        }
    }
}

/// Says what kind of fault a difference is.
pub(crate) fn classify(unit: &'static str, difference: Difference) -> ChainError {
    let Difference { expected, found } = difference;
    if found.starts_with("chain broken") || found.starts_with("exception ") {
        return ChainError::Broken { line: found };
    }
    if expected.is_empty() {
        return ChainError::Beyond { found };
    }
    let number = |line: &str| -> Option<u64> {
        let mut words = line.split(' ');
        let kind = words.next()?;
        if kind != unit && kind != "done" {
            return None;
        }
        words.next()?.parse().ok()
    };
    let due = number(&expected).unwrap_or_default();
    // A number that is altered rather than another one has a line of its own length and the due hash.
    let same_rest = expected.rsplit(' ').next() == found.rsplit(' ').next();
    match number(&found) {
        Some(other) if other > due && !same_rest => ChainError::Lost { unit, expected: due, found: other },
        Some(other) if other < due && !same_rest => ChainError::Doubled { unit, expected: due, found: other },
        _ => ChainError::Altered { unit, number: due, expected, found },
    }
}

#[cfg(test)]
#[path = "chain/tests.rs"]
mod tests;
