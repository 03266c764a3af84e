//! The judge of a guest that is followed through its lives: each piece of its output is held against what is due once, as it comes,
//! however much came before.

use crate::chain::{self, ChainError, classify};
use crate::transcript::{Difference, Extent, Transcript};
use crate::{records, turns};

/// A guest's own account of what it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Links {
    /// Ticks, turns or records that are there, and right.
    pub reached: u64,
    /// How often it went back to an earlier one.
    pub rewound: usize,
}

/// What a guest has printed so far, and must print from here on.
pub struct Judge {
    unit: &'static str,
    reached: Reached,
    transcript: Transcript<Due>,
}

type Due = Box<dyn Iterator<Item = String> + Send>;
type Reached = Box<dyn Fn(&Extent) -> u64 + Send>;

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Judge").field("unit", &self.unit).finish_non_exhaustive()
    }
}

impl Judge {
    /// Of the guest whose output begins with `output`; `None` if that is no guest whose output can be recomputed.
    ///
    /// # Errors
    /// [`ChainError::Banner`]: its first lines cannot be used. [`ChainError::Broken`]: it says there already what is wrong.
    pub fn of(output: &str) -> Option<Result<Self, ChainError>> {
        let judge = |unit, reached: Reached, due: Due| Self { unit, reached, transcript: Transcript::new(due) };
        Some(if output.starts_with("counter ") {
            let lines = chain::Lines::of(output).map_err(ChainError::from);
            lines.map(|lines| judge("tick", Box::new(lines.ticks_of()), Box::new(lines)))
        } else if output.starts_with("smp ") {
            let due = turns::due(output).map_err(ChainError::from);
            due.map(|(_, due)| judge("turn", Box::new(turns::turns_of), Box::new(due)))
        } else if output.starts_with("records ") {
            records::due(output).map(|(due, reached)| judge("record", Box::new(reached), Box::new(due)))
        } else {
            return None;
        })
    }

    fn links(&self, extent: &Extent) -> Links {
        Links { reached: (self.reached)(extent), rewound: extent.rewound }
    }

    /// Judges what it printed in its next life, which is over: the first from the start, each further one from any byte that those before
    /// it had reached.
    ///
    /// # Errors
    /// The first link that was lost, doubled or altered.
    pub fn follow(&mut self, segment: &str) -> Result<(), ChainError> {
        self.transcript.follow(segment).map_err(|difference| self.name(difference, segment))
    }

    /// What the guest itself says is wrong comes before what its output looks like.
    fn name(&self, difference: Difference, segment: &str) -> ChainError {
        match segment.lines().find(|line| line.starts_with("chain broken")) {
            Some(line) => ChainError::Broken { line: line.to_owned() },
            None => classify(self.unit, difference),
        }
    }

    /// Judges all lives that are over, and `segment`, what it has printed so far in one that goes on.
    ///
    /// # Errors
    /// As [`Judge::follow`].
    pub fn preview(&mut self, segment: &str) -> Result<Links, ChainError> {
        let extent = if segment.is_empty() { Ok(self.transcript.extent()) } else { self.transcript.preview(segment) };
        extent.map(|extent| self.links(&extent)).map_err(|difference| self.name(difference, segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const THREE: &str = include_str!("../tests/golden/smp-3.txt");

    fn counter(ticks: u64) -> String {
        let mut chain = chain::Chain::new(8192).unwrap();
        let mut text = "counter ticks=0 hz=100 every=1 ram=8192 verify=1\n".to_owned();
        (1..=ticks).for_each(|tick| text.push_str(&format!("tick {tick} {:016x}\n", chain.advance())));
        text
    }

    proptest! {
        #[test]
        fn a_judge_that_goes_on_says_what_one_of_the_whole_says(
            cuts in proptest::collection::vec((80_usize..1400, 0_usize..60, any::<bool>()), 1..8), altered in any::<bool>()
        ) {
            let text = counter(60);
            // Each life goes on at the end of the one before, or a little earlier.
            let (mut lives, mut end) = (Vec::new(), 0_usize);
            for (to, back, rewinds) in cuts {
                let start = if rewinds { end.saturating_sub(back) } else { end };
                end = (start + to).min(text.len());
                lives.push(text[start..end].to_owned());
            }
            lives.retain(|life| !life.is_empty());
            let last = lives.last_mut().unwrap();
            // A life that went back by a byte at the end of all is a line's end alone.
            if altered && let Some(at) = last.rfind(|c: char| c.is_ascii_hexdigit()) {
                let other = if last.as_bytes()[at] == b'0' { "1" } else { "0" };
                last.replace_range(at..=at, other);
            }
            let whole: Vec<&str> = lives.iter().map(String::as_str).collect();
            let mut judge = Judge::of(&lives[0]).unwrap().unwrap();
            let (last, earlier) = whole.split_last().unwrap();
            earlier.iter().for_each(|life| judge.follow(life).unwrap());
            let expected = chain::verify_segments(&whole).map(|of| Links { reached: of.ticks, rewound: of.rewound });
            prop_assert_eq!(judge.preview(last), expected.clone());
            prop_assert_eq!(judge.preview(last), expected.clone(), "a preview leaves no trace");
            if let Ok(links) = expected {
                judge.follow(last).unwrap();
                prop_assert_eq!(judge.preview(""), Ok(links));
            } else {
                prop_assert!(judge.follow(last).is_err());
            }
        }
    }

    #[test]
    fn what_the_guest_says_is_wrong_is_what_is_wrong_wherever_its_life_began() {
        let (first, rest) = THREE.split_at(THREE.find("turn 20").unwrap());
        let (again, _) = rest.split_at(rest.find("turn 21").unwrap());
        let mut judge = Judge::of(first).unwrap().unwrap();
        judge.follow(first).unwrap();
        let broken = format!("{again}chain broken at turn 21 cpu 2\n");
        assert!(matches!(judge.preview(&broken), Err(ChainError::Broken { .. })));
        assert!(matches!(judge.follow(&broken[3..]), Err(ChainError::Broken { .. })));
    }

    #[test]
    fn turns_are_counted_as_the_judge_of_the_whole_counts_them() {
        let (first, second) = THREE.split_at(THREE.len() / 2);
        let mut judge = Judge::of(first).unwrap().unwrap();
        judge.follow(first).unwrap();
        assert_eq!(judge.preview(second), Ok(Links { reached: 33, rewound: 0 }));
        assert!(judge.preview(&second[1..]).is_err(), "a byte is missing");
    }

    #[test]
    fn a_guest_without_a_chain_has_no_judge() {
        assert!(Judge::of("boot\n").is_none());
        assert!(matches!(Judge::of("counter ti"), Some(Err(ChainError::Banner(_)))));
    }
}
