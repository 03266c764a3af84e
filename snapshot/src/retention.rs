//! Which generations stay: a pure function of what there is and what time it is.

use crate::generation::{Generation, Origin};

/// Snapper's rules, by its names.
///
/// Time alone never empties a lineage: `min_snapshots` of them stay however old they are, so that a machine that was off
/// for a month does not wake to find all expired, and the newest one stays whatever the numbers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// How many it keeps at most. `None`: any number. Where it contradicts `min_snapshots`, that wins.
    pub max_snapshots: Option<u32>,
    /// How many it keeps at least, however old.
    pub min_snapshots: u32,
    /// Age in milliseconds from which on one is deleted. `None`: age does not matter.
    pub expiration_ms: Option<u64>,
    /// Whether those that a person asked for or labelled may be deleted too, and count. Protected ones never are.
    pub include_manual: bool,
}

impl Default for RetentionPolicy {
    /// Keeps everything.
    fn default() -> Self {
        Self { max_snapshots: None, min_snapshots: 1, expiration_ms: None, include_manual: false }
    }
}

/// What the policy needs to know of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its number in the lineage; a higher one is newer, whatever the clock said.
    pub number: u64,
    /// When it was, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Protected from deletion.
    pub protected: bool,
    /// Whether a person asked for it or gave it a label.
    pub by_hand: bool,
}

impl From<&Generation> for Candidate {
    fn from(generation: &Generation) -> Self {
        Self {
            number: generation.id.number,
            time_ms: generation.time_ms,
            protected: generation.protected,
            by_hand: generation.origin == Origin::Manual || generation.label.is_some(),
        }
    }
}

/// Why a generation stays or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Stays: it is protected.
    Protected,
    /// Stays: a person made it, and the policy was not asked to touch those.
    ByHand,
    /// Stays: it is among the newest that always stay.
    Minimum,
    /// Stays: neither too many nor too old.
    Current,
    /// Goes: there are `max_snapshots` newer ones.
    TooMany,
    /// Goes: it is older than `expiration_ms`.
    Expired,
}

/// The policy's word on one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Which.
    pub number: u64,
    /// Whether it stays.
    pub keep: bool,
    /// Why.
    pub reason: Reason,
}

impl RetentionPolicy {
    /// Judges generations of one lineage, in any order; the verdicts come the oldest first.
    #[must_use]
    pub fn judge(&self, candidates: &[Candidate], now_ms: u64) -> Vec<Verdict> {
        let mut newest_first = candidates.to_vec();
        newest_first.sort_by_key(|candidate| std::cmp::Reverse(candidate.number));
        let mut newer = 0;
        let mut verdicts: Vec<Verdict> = newest_first
            .iter()
            .map(|candidate| {
                let reason = self.reason(candidate, newer, now_ms);
                newer += u32::from(!matches!(reason, Reason::Protected | Reason::ByHand));
                let keep = !matches!(reason, Reason::TooMany | Reason::Expired);
                Verdict { number: candidate.number, keep, reason }
            })
            .collect();
        verdicts.reverse();
        verdicts
    }

    /// `newer`: how many newer ones the policy may delete as well.
    fn reason(&self, candidate: &Candidate, newer: u32, now_ms: u64) -> Reason {
        // A clock that was set back makes a generation young, never old.
        let age = now_ms.saturating_sub(candidate.time_ms);
        if candidate.protected {
            Reason::Protected
        } else if candidate.by_hand && !self.include_manual {
            Reason::ByHand
        } else if newer < self.min_snapshots.max(1) {
            Reason::Minimum
        } else if self.max_snapshots.is_some_and(|max| newer >= max) {
            Reason::TooMany
        } else if self.expiration_ms.is_some_and(|expiration| age >= expiration) {
            Reason::Expired
        } else {
            Reason::Current
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn automatic(number: u64, time_ms: u64) -> Candidate {
        Candidate { number, time_ms, protected: false, by_hand: false }
    }

    fn kept(verdicts: &[Verdict]) -> Vec<u64> {
        verdicts.iter().filter(|verdict| verdict.keep).map(|verdict| verdict.number).collect()
    }

    #[test]
    fn a_machine_that_was_off_for_a_month_keeps_its_minimum() {
        let all: Vec<_> = (1..=20).map(|number| automatic(number, number * 1000)).collect();
        let policy = RetentionPolicy { min_snapshots: 5, expiration_ms: Some(3_600_000), ..Default::default() };
        let month = 30 * 24 * 3_600_000;
        assert_eq!(kept(&policy.judge(&all, 20_000 + month)), [16, 17, 18, 19, 20]);
        assert_eq!(kept(&policy.judge(&all, 20_000)).len(), 20);
    }

    #[test]
    fn the_count_is_of_those_it_may_delete() {
        let mut all: Vec<_> = (1..=6).map(|number| automatic(number, 0)).collect();
        all[5].by_hand = true;
        all[0].protected = true;
        let policy = RetentionPolicy { max_snapshots: Some(2), ..Default::default() };
        assert_eq!(kept(&policy.judge(&all, 0)), [1, 4, 5, 6]);
        let policy = RetentionPolicy { include_manual: true, ..policy };
        assert_eq!(kept(&policy.judge(&all, 0)), [1, 5, 6]);
    }

    fn any_candidates() -> impl Strategy<Value = Vec<Candidate>> {
        proptest::collection::vec((any::<u16>(), any::<u32>(), any::<bool>(), any::<bool>()), 0..40).prop_map(|all| {
            let mut all: Vec<_> = all
                .into_iter()
                .map(|(number, time, protected, by_hand)| Candidate {
                    number: number.into(),
                    time_ms: time.into(),
                    protected,
                    by_hand,
                })
                .collect();
            all.sort_by_key(|candidate| candidate.number);
            all.dedup_by_key(|candidate| candidate.number);
            all
        })
    }

    proptest! {
        #[test]
        fn it_never_deletes_what_it_must_not_and_never_keeps_more_than_it_may(
            all in any_candidates(), now in any::<u32>(), max in proptest::option::of(0u32..30), min in 0u32..30,
            expiration in proptest::option::of(any::<u32>()), include_manual in any::<bool>(),
        ) {
            let policy = RetentionPolicy {
                max_snapshots: max, min_snapshots: min, expiration_ms: expiration.map(u64::from), include_manual,
            };
            let verdicts = policy.judge(&all, now.into());
            prop_assert_eq!(verdicts.len(), all.len());
            let may = |c: &Candidate| !c.protected && (include_manual || !c.by_hand);
            let deletable = all.iter().filter(|c| may(c)).count();
            let stay = all.iter().zip(&verdicts).filter(|(c, v)| may(c) && v.keep).count();
            for (candidate, verdict) in all.iter().zip(&verdicts) {
                prop_assert_eq!(candidate.number, verdict.number);
                prop_assert!(verdict.keep || may(candidate));
            }
            prop_assert!(stay >= deletable.min(min.max(1) as usize));
            if let Some(max) = max {
                prop_assert!(stay <= max.max(min).max(1) as usize);
            }
            // What is left is left alone the second time.
            let left: Vec<_> = all.iter().zip(&verdicts).filter(|(_, v)| v.keep).map(|(c, _)| *c).collect();
            prop_assert!(policy.judge(&left, now.into()).iter().all(|v| v.keep));
            // The order in which they come does not matter.
            let mut backwards = all.clone();
            backwards.reverse();
            prop_assert_eq!(policy.judge(&backwards, now.into()), verdicts);
        }
    }
}
