//! What is known of a guest from what it printed and from what its machine stored, and so what its next life may be.

use super::Guest;

/// Judges a guest's lives. Each is told as all that the console holds since its machine was resumed, again and again as that grows.
pub(super) struct Judge<G> {
    pub(super) guest: G,
    /// The last step that is known to be done.
    pub(super) printed: u64,
    /// The first of this life.
    first: u64,
    /// Steps up to here are in a generation.
    floor: u64,
    /// It was frozen, and the next life's first step is this one.
    next: Option<u64>,
    /// The beginning of a line that this life is to end.
    begun: String,
}

impl<G: Guest> Judge<G> {
    pub(super) fn new(guest: G) -> Self {
        Self { guest, printed: 0, first: 1, floor: 0, next: None, begun: String::new() }
    }

    /// The whole lines of this life, and what there is of another one.
    fn lines(&self, console: &[u8]) -> (String, String) {
        let mut whole = self.begun.clone() + &String::from_utf8_lossy(console);
        let rest = whole.split_off(whole.rfind('\n').map_or(0, |end| end + 1));
        (whole, rest)
    }

    pub(super) fn has_shown_enough(&self, console: &[u8]) -> bool {
        self.guest.has_shown_enough(&self.lines(console).0)
    }

    /// A life begins with this console. Its first step.
    pub(super) fn begins(&mut self, console: &[u8], from_generation: bool) -> Result<u64, String> {
        let steps = self.guest.steps(&self.lines(console).0)?;
        let first = *steps.first().ok_or("it does nothing")?;
        if let Some(next) = self.next.take().filter(|next| *next != first) {
            return Err(format!("frozen before step {next}, it went on with {first}"));
        }
        if first <= self.floor {
            return Err(format!("it went on with step {first}; {} were in a generation", self.floor));
        }
        if from_generation {
            self.floor = first - 1;
        }
        (self.first, self.printed) = (first, first - 1);
        self.goes_on(console)?;
        Ok(first)
    }

    /// The life's steps follow each other, and none that was seen before is gone.
    pub(super) fn goes_on(&mut self, console: &[u8]) -> Result<(), String> {
        let mut expected = self.first;
        for step in self.guest.steps(&self.lines(console).0)? {
            if step != expected {
                return Err(format!("step {step} came where {expected} follows"));
            }
            expected += 1;
        }
        if expected <= self.printed {
            return Err(format!("{} steps were there, and now only {}", self.printed, expected - 1));
        }
        self.printed = expected - 1;
        Ok(())
    }

    /// A generation is durable whose moment is after all that was told.
    pub(super) fn is_stored(&mut self) {
        self.floor = self.printed;
    }

    /// It is frozen, and this is all that its life printed.
    pub(super) fn froze(&mut self, console: &[u8]) -> Result<(), String> {
        self.goes_on(console)?;
        self.begun = self.lines(console).1;
        self.next = Some(self.printed + 1);
        Ok(())
    }

    /// It may go on from anywhere that a generation does not rule out.
    pub(super) fn is_cut_off(&mut self) {
        self.begun.clear();
        self.next = None;
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Chain, Sqlite};
    use super::*;

    fn links(steps: std::ops::RangeInclusive<u64>) -> String {
        let mut chain = Chain::new();
        steps.map(|step| format!("chain {step} {} 7\r\n", chain.hash(step))).collect()
    }

    fn rows(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().map(|number| format!("row {number} 1.00 7\r\n")).collect::<String>().into_bytes()
    }

    fn ledger() -> Judge<Sqlite> {
        Judge::new(Sqlite::new(0))
    }

    #[test]
    fn a_life_that_goes_on_where_it_was_frozen_is_right_and_any_other_is_not() {
        for (next, right) in [(4, false), (5, true), (6, false)] {
            let mut judge = Judge::new(Chain::new());
            judge.begins(links(1..=3).as_bytes(), false).unwrap();
            judge.froze(links(1..=4).as_bytes()).unwrap();
            assert_eq!(judge.begins(links(next..=9).as_bytes(), false).is_ok(), right, "{next}");
        }
    }

    #[test]
    fn a_line_that_was_being_printed_ends_in_the_next_life() {
        let all = links(1..=4);
        for torn in all.find("chain 2").unwrap()..all.find("chain 3").unwrap() {
            let frozen = || {
                let mut judge = Judge::new(Chain::new());
                judge.begins(links(1..=1).as_bytes(), false).unwrap();
                judge.froze(&all.as_bytes()[..torn]).unwrap();
                judge
            };
            assert_eq!(frozen().begins(&all.as_bytes()[torn..], false), Ok(2), "{torn}");
            assert!(frozen().begins(links(3..=4).as_bytes(), false).is_err(), "{torn}: a link is lost");
            // Nothing ends it where the next life goes on from a generation.
            let mut judge = frozen();
            judge.is_cut_off();
            assert_eq!(judge.begins(links(2..=4).as_bytes(), true), Ok(2), "{torn}");
        }
    }

    #[test]
    fn a_row_that_is_lost_doubled_or_out_of_order_is_seen() {
        for life in [[1, 2, 4, 5], [1, 2, 2, 3], [1, 3, 2, 4], [2, 3, 4, 1]] {
            assert!(ledger().begins(&rows(&life), false).is_err(), "{life:?}");
        }
        ledger().begins(&rows(&[1, 2, 3, 4]), false).unwrap();
    }

    #[test]
    fn a_row_in_a_generation_may_not_be_lost_and_any_after_it_may_and_comes_again() {
        for (first, right) in [(2, false), (3, false), (4, true), (6, true)] {
            let mut judge = ledger();
            judge.begins(&rows(&[1, 2, 3]), false).unwrap();
            judge.is_stored();
            judge.goes_on(&rows(&[1, 2, 3, 4, 5])).unwrap();
            judge.is_cut_off();
            assert_eq!(judge.begins(&rows(&[first, first + 1]), true).is_ok(), right, "{first}");
        }
    }

    #[test]
    fn rows_that_nobody_was_told_of_are_fine_and_what_a_life_goes_on_from_stays() {
        let mut judge = ledger();
        judge.begins(&rows(&[1, 2]), false).unwrap();
        judge.is_cut_off();
        // It was frozen after ten more, or a generation was taken.
        assert_eq!(judge.begins(&rows(&[13, 14]), true), Ok(13));
        judge.is_cut_off();
        assert!(judge.begins(&rows(&[12, 13]), true).is_err());
        judge.begins(&rows(&[13, 14, 15]), true).unwrap();
        assert!(judge.goes_on(&rows(&[13, 14])).is_err(), "the console forgot a row");
    }
}
