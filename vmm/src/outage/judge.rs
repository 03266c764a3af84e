//! What the guest says of itself after an outage.

use guests::judge::{Judge, Links};

/// Everything that a guest printed since it was booted, judged life by life.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    judge: Option<Judge>,
    /// What was wrong with it: it stays wrong.
    fault: Option<String>,
    last_link: Option<u64>,
}

impl Transcript {
    /// It was booted anew.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// A life of it is over.
    pub(super) fn push(&mut self, segment: &str) {
        if segment.is_empty() || self.fault.is_some() {
            return;
        }
        self.last_link = link(segment.split_inclusive('\n').rev()).or(self.last_link);
        let judge = match self.judge.take() {
            Some(judge) => Ok(judge),
            None => match Judge::of(segment) {
                Some(judge) => judge,
                None => return,
            },
        };
        let followed = judge.and_then(|mut judge| judge.follow(segment).map(|()| judge));
        match followed {
            Ok(judge) => self.judge = Some(judge),
            Err(why) => self.fault = Some(why.to_string()),
        }
    }

    /// What of it is right, with what its present life has printed so far. `None`: this guest keeps no chain.
    pub(super) fn judge(&mut self, now: &str) -> Option<Result<Links, String>> {
        if let Some(fault) = &self.fault {
            return Some(Err(fault.clone()));
        }
        let judged = match &mut self.judge {
            Some(judge) => judge.preview(now),
            // Its first life goes on.
            None => Judge::of(now)?.and_then(|mut judge| judge.preview(now)),
        };
        Some(judged.map_err(|why| why.to_string()))
    }

    /// The number of the last link that was printed whole, if any.
    pub(super) fn last_link(&self) -> Option<u64> {
        self.last_link
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
    use guests::chain;

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
        transcript.push(&first(5));
        assert_eq!(transcript.last_link(), Some(5));
        assert_eq!(transcript.judge(&lines(6, 9)), Some(Ok(Links { reached: 9, rewound: 0 })));
        assert_eq!(transcript.judge(&lines(3, 9)), Some(Ok(Links { reached: 9, rewound: 1 })));
        assert!(transcript.judge(&lines(7, 9)).unwrap().is_err(), "a tick is missing");
        assert_eq!(first_link(&lines(6, 9)), Some(7));
        transcript.push(&lines(7, 9));
        assert!(transcript.judge(&lines(10, 11)).unwrap().is_err(), "what was wrong stays wrong");
        transcript.forget();
        assert_eq!(transcript.judge(""), None);
    }

    #[test]
    fn a_guest_without_a_chain_is_not_judged() {
        let mut transcript = Transcript::default();
        transcript.push("boot: here\n");
        assert_eq!(transcript.judge("more"), None);
    }
}
