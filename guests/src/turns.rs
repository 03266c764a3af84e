//! What `smp` prints, and its judge.
//!
//! # Output
//! ```text
//! smp turns=<n> hz=<n> cpus=<n>
//! cpus <n>                           processors that take part; the one that booted is number 0
//! turn <t> cpu <c> <hash>            t from 1, c = (t - 1) mod cpus; printed by round
//! done <t> <hash>                    after `turns`, rounded up to whole rounds
//! ```
//! or `chain broken at turn <t> cpu <c>` and an end with code 1, when an inter-processor interrupt came to a processor whose
//! turn it is not; or `does not start: cpu <c>` and an end with code 2. An interrupt that is lost stops the round.
//!
//! # Hash
//! With [`crate::chain::fold`]. Processor c holds a private hash p. In turn t it folds into p: the six registers that waited
//! with `p + k * STEP` in them, the shared hash, and the 8 words of its own line of memory (zeros in its first turn),
//! which then become `p + i * STEP`. Into the shared hash go t, c and p.

use crate::banner::{Banner, BannerError};
use crate::chain::{ChainError, classify, fold};
use crate::transcript::{Extent, Transcript};

const SEED: u64 = 0x0070_6572_6475_7265;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const REGISTERS: u64 = 6;
const LINE_WORDS: u64 = 8;

/// Greatest number of processors.
pub const MAX_CPUS: u64 = 64;
/// Greatest number of turns that is recomputed.
pub const MAX_TURNS: u64 = 1 << 30;

/// An output without fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnsReport {
    /// Processors that took turns.
    pub cpus: u64,
    /// The last turn whose line is complete.
    pub turns: u64,
    /// The output ends within a line.
    pub partial: bool,
    /// The guest came to its end by itself.
    pub complete: bool,
    /// How often it went back to an earlier point (see [`verify_segments`]).
    pub rewound: usize,
}

/// Recomputes what `smp` must have printed and compares every byte of `output`, which may end anywhere.
///
/// # Errors
/// The first turn that was lost, doubled or altered.
pub fn verify(output: &str) -> Result<TurnsReport, ChainError> {
    verify_segments(&[output])
}

/// As [`verify`], for a VM that was rolled back; see [`crate::chain::verify_segments`].
///
/// # Errors
/// As [`verify`].
pub fn verify_segments(segments: &[&str]) -> Result<TurnsReport, ChainError> {
    let (cpus, due) = due(segments.first().copied().unwrap_or_default())?;
    let extent = Transcript::new(due).compare(segments).map_err(|difference| classify("turn", difference))?;
    let turns = turns_of(&extent);
    Ok(TurnsReport { cpus, turns, partial: extent.partial, complete: extent.complete, rewound: extent.rewound })
}

/// Turns in an output that goes so far.
pub(crate) fn turns_of(extent: &Extent) -> u64 {
    u64::try_from(extent.lines).unwrap_or(u64::MAX).saturating_sub(2 + u64::from(extent.complete))
}

/// How many processors take turns in the guest whose first lines `output` begins with, and the lines that it prints.
pub(crate) fn due(output: &str) -> Result<(u64, impl Iterator<Item = String> + use<>), BannerError> {
    let banner = Banner::parse("smp", output)?;
    let turns = banner.number("turns", MAX_TURNS)?;
    let header =
        format!("smp turns={turns} hz={} cpus={}", banner.number("hz", u64::MAX)?, banner.number("cpus", MAX_CPUS)?);
    let line = output.lines().nth(1).unwrap_or_default();
    let cpus = line.strip_prefix("cpus ").and_then(|cpus| cpus.parse().ok());
    let cpus = cpus.filter(|cpus| (1..=MAX_CPUS).contains(cpus)).ok_or_else(|| BannerError::Parameter {
        guest: "smp",
        key: "cpus",
        value: line.chars().take(40).collect(),
        limit: MAX_CPUS,
    })?;
    let total = (turns != 0).then(|| turns.div_ceil(cpus) * cpus);
    let round = Round { cpus, turn: 0, hash: SEED, private: vec![(SEED, None); usize::try_from(cpus).unwrap_or(0)] };
    Ok((cpus, [header, format!("cpus {cpus}")].into_iter().chain(round.lines(total))))
}

/// The processors between two turns.
struct Round {
    cpus: u64,
    turn: u64,
    hash: u64,
    private: Vec<(u64, Option<u64>)>, // private hash, first word of its line once written
}

impl Round {
    /// Takes the next turn and gives the processor that took it.
    fn advance(&mut self) -> u64 {
        let cpu = self.turn % self.cpus;
        let state = usize::try_from(cpu).ok().and_then(|cpu| self.private.get_mut(cpu));
        self.turn += 1;
        if let Some((private, line)) = state {
            let nth = |first: u64, i: u64| first.wrapping_add(i.wrapping_mul(STEP));
            let idle = *private;
            let mut p = (1..=REGISTERS).fold(idle, |p, k| fold(p, nth(idle, k)));
            p = fold(p, self.hash);
            p = (0..LINE_WORDS).fold(p, |p, i| fold(p, line.map_or(0, |first| nth(first, i))));
            (*private, *line) = (p, Some(p));
            self.hash = fold(fold(fold(self.hash, self.turn), cpu), p);
        }
        cpu
    }

    /// The lines of the turns, up to turn `total` if there is one.
    fn lines(mut self, total: Option<u64>) -> impl Iterator<Item = String> {
        let mut done = false;
        std::iter::from_fn(move || {
            if total == Some(self.turn) {
                let line = format!("done {} {:016x}", self.turn, self.hash);
                return (!std::mem::replace(&mut done, true)).then_some(line);
            }
            let cpu = self.advance();
            Some(format!("turn {} cpu {cpu} {:016x}", self.turn, self.hash))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Captured on KVM with 3 processors.
    const THREE: &str = include_str!("../tests/golden/smp-3.txt");

    fn line(start: &str) -> &'static str {
        THREE.lines().find(|line| line.starts_with(start)).unwrap()
    }

    #[test]
    fn a_real_run_verifies_to_its_end() {
        let report = verify(THREE).unwrap();
        assert_eq!(report, TurnsReport { cpus: 3, turns: 33, partial: false, complete: true, rewound: 0 });
    }

    #[test]
    fn a_lost_turn_is_named() {
        let error = verify(&THREE.replace(&format!("{}\n", line("turn 8 ")), "")).unwrap_err();
        assert_eq!(error, ChainError::Lost { unit: "turn", expected: 8, found: 9 });
    }

    #[test]
    fn a_doubled_turn_is_named() {
        let line = line("turn 8 ");
        let error = verify(&THREE.replace(line, &format!("{line}\n{line}"))).unwrap_err();
        assert_eq!(error, ChainError::Doubled { unit: "turn", expected: 9, found: 8 });
    }

    #[test]
    fn a_roll_back_verifies_in_segments_only() {
        let (cut, back) = (THREE.find("turn 20 ").unwrap() + 9, THREE.find("turn 12 ").unwrap() + 4);
        let (first, second) = (&THREE[..cut], &THREE[back..]);
        assert_eq!(verify_segments(&[first, second]).unwrap().rewound, 1);
        assert!(verify(&format!("{first}{second}")).is_err());
    }

    #[test]
    fn forged_first_lines_are_refused() {
        for text in ["", "smp", "smp turns=1 hz=1 cpus=0\ncpus 0\n", "smp turns=1 hz=1 cpus=0\ncpus 99999999999\n"] {
            assert!(matches!(verify(text), Err(ChainError::Banner(_))), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_altered_byte_is_found(at in "smp turns=31 hz=500 cpus=0\n".len()..THREE.len(), flip in 0_u8..7) {
            let mut bytes = THREE.as_bytes().to_vec();
            bytes[at] ^= 1 << flip;
            prop_assert!(verify(&String::from_utf8(bytes).unwrap()).is_err());
        }
    }
}
