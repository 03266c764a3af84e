//! What the guest says of itself after an outage.

use guests::{chain, turns};

/// Everything that a guest printed, one text for each of its lives since it was booted.
#[derive(Debug, Clone, Default)]
pub(super) struct Transcript {
    segments: Vec<String>,
}

/// A guest's own account of what it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Links {
    /// Links of its chain of hashes that are there, and right.
    pub(super) reached: u64,
    /// How often it went back to an earlier one.
    pub(super) rewound: usize,
}

impl Transcript {
    /// It was booted anew.
    pub(super) fn forget(&mut self) {
        self.segments.clear();
    }

    /// A life of it is over.
    pub(super) fn push(&mut self, segment: String) {
        if !segment.is_empty() {
            self.segments.push(segment);
        }
    }

    /// Recomputes all of it, and what its present life has printed so far. `None`: this guest keeps no chain.
    pub(super) fn judge(&self, now: &str) -> Option<Result<Links, String>> {
        let segments: Vec<&str> =
            self.segments.iter().map(String::as_str).chain([now]).filter(|segment| !segment.is_empty()).collect();
        let first = segments.first()?;
        if first.starts_with("counter ") {
            let verified = chain::verify_segments(&segments);
            Some(
                verified
                    .map(|report| Links { reached: report.ticks, rewound: report.rewound })
                    .map_err(|e| e.to_string()),
            )
        } else if first.starts_with("smp ") {
            let verified = turns::verify_segments(&segments);
            Some(
                verified
                    .map(|report| Links { reached: report.turns, rewound: report.rewound })
                    .map_err(|e| e.to_string()),
            )
        } else {
            None
        }
    }

    /// The number of the last link that was printed whole, if any.
    pub(super) fn last_link(&self) -> Option<u64> {
        self.segments.iter().rev().find_map(|segment| link(segment.split_inclusive('\n').rev()))
    }
}

/// The number of the first link in a text.
pub(super) fn first_link(text: &str) -> Option<u64> {
    // Its first line may be the rest of one.
    link(text.split_inclusive('\n').skip(1))
}

fn link<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<u64> {
    lines.find_map(|line| {
        let mut words = line.strip_suffix('\n')?.split(' ');
        matches!(words.next()?, "tick" | "turn").then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(from: u64, to: u64) -> String {
        let mut chain = chain::Chain::new(8192).unwrap();
        let all = (1..=to).map(|tick| format!("tick {tick} {:016x}\n", chain.advance()));
        all.skip(from as usize - 1).collect()
    }

    fn first(to: u64) -> String {
        format!("counter ticks=0 hz=100 every=1 ram=8192 verify=1\n{}", lines(1, to))
    }

    #[test]
    fn a_chain_that_goes_on_is_whole_and_one_that_goes_back_is_rewound() {
        let mut transcript = Transcript::default();
        transcript.push(first(5));
        assert_eq!(transcript.last_link(), Some(5));
        assert_eq!(transcript.judge(&lines(6, 9)), Some(Ok(Links { reached: 9, rewound: 0 })));
        assert_eq!(transcript.judge(&lines(3, 9)), Some(Ok(Links { reached: 9, rewound: 1 })));
        assert!(transcript.judge(&lines(7, 9)).unwrap().is_err(), "a tick is missing");
        assert_eq!(first_link(&lines(6, 9)), Some(7));
        transcript.forget();
        assert_eq!(transcript.judge(""), None);
    }

    #[test]
    fn a_guest_without_a_chain_is_not_judged() {
        let mut transcript = Transcript::default();
        transcript.push("boot: here\n".to_owned());
        assert_eq!(transcript.judge("more"), None);
    }
}
