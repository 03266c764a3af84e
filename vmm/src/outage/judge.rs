//! What the guest says of itself after an outage.

use guests::judge::{Judge, Links};

/// Everything that a guest printed since it was booted, judged life by life.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    judged: Judged,
    last_link: Option<u64>,
}

#[derive(Debug)]
enum Judged {
    /// It has not said yet who it is; all that it printed.
    Early(Vec<String>),
    /// It keeps no chain, or its beginning is not known.
    Nothing,
    By(Judge),
    /// What was wrong with it: it stays wrong.
    Fault(String),
}

impl Default for Judged {
    fn default() -> Self {
        Self::Early(Vec::new())
    }
}

/// Who judges these lives, which are the first; `None` as long as that is not clear.
fn judge_of(lives: &[&str]) -> Option<Judged> {
    // That is what a guest begins with: one line, or two.
    let whole = |text: &str| text.bytes().filter(|byte| *byte == b'\n').count() >= 2;
    // One that was brought back to where it had printed nothing has begun anew.
    let first = match lives.iter().rfind(|life| whole(life)) {
        Some(life) if Judge::of(life).is_some_and(|judge| judge.is_ok()) => (*life).to_owned(),
        _ => lives.concat(),
    };
    if !whole(&first) {
        return None;
    }
    let judge = match Judge::of(&first) {
        None => return Some(Judged::Nothing),
        Some(judge) => judge.and_then(|mut judge| lives.iter().try_for_each(|life| judge.follow(life)).map(|()| judge)),
    };
    Some(judge.map_or_else(|why| Judged::Fault(why.to_string()), Judged::By))
}

impl Transcript {
    /// It was booted anew.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// A life of it is over.
    pub(super) fn push(&mut self, segment: &str) {
        if segment.is_empty() {
            return;
        }
        self.last_link = link(segment.split_inclusive('\n').rev()).or(self.last_link);
        match &mut self.judged {
            Judged::Early(lives) => {
                lives.push(segment.to_owned());
                let lives: Vec<&str> = lives.iter().map(String::as_str).collect();
                if let Some(judged) = judge_of(&lives) {
                    self.judged = judged;
                }
            }
            Judged::By(judge) => {
                if let Err(why) = judge.follow(segment) {
                    self.judged = Judged::Fault(why.to_string());
                }
            }
            Judged::Nothing | Judged::Fault(_) => {}
        }
    }

    /// What of it is right, with what its present life has printed so far. `None`: this guest keeps no chain, or has not said yet that it does.
    pub(super) fn judge(&mut self, now: &str) -> Option<Result<Links, String>> {
        match &mut self.judged {
            Judged::Early(lives) => {
                let lives: Vec<&str> =
                    lives.iter().map(String::as_str).chain([now]).filter(|life| !life.is_empty()).collect();
                match judge_of(&lives)? {
                    Judged::By(mut judge) => Some(judge.preview("").map_err(|why| why.to_string())),
                    Judged::Fault(why) => Some(Err(why)),
                    Judged::Early(_) | Judged::Nothing => None,
                }
            }
            Judged::By(judge) => Some(judge.preview(now).map_err(|why| why.to_string())),
            Judged::Nothing => None,
            Judged::Fault(why) => Some(Err(why.clone())),
        }
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
        matches!(words.next()?, "tick" | "turn" | "record").then(|| words.next()?.parse().ok())?
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
    fn a_guest_that_was_cut_off_as_it_said_who_it_is_is_judged_when_that_is_known() {
        let whole = first(5);
        let (a, b) = whole.split_at(9);
        let mut transcript = Transcript::default();
        assert_eq!(transcript.judge(a), None);
        transcript.push(a);
        assert_eq!(transcript.judge(b), Some(Ok(Links { reached: 5, rewound: 0 })));
        // Brought back to where it had printed nothing.
        assert_eq!(transcript.judge(&whole), Some(Ok(Links { reached: 5, rewound: 1 })));
        transcript.push(b);
        assert_eq!(transcript.judge(&lines(6, 7)), Some(Ok(Links { reached: 7, rewound: 0 })));
        assert!(transcript.judge(&lines(7, 8)).unwrap().is_err(), "a tick is missing");
    }

    #[test]
    fn a_guest_without_a_chain_is_not_judged() {
        let mut transcript = Transcript::default();
        transcript.push("boot: here\n");
        assert_eq!(transcript.judge("more"), None);
        transcript.push("more\n");
        // The rest of an output whose beginning nobody has seen.
        transcript.push(&lines(7, 9));
        assert_eq!(transcript.judge("more\n"), None);
    }
}
