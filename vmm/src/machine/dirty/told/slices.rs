//! How long a vCPU may run before it looks again, where time is the bound.
//!
//! A page costs a guest a fault before it can write to it, and a fault takes time; so in a slice of time it can write to so many pages at most. A
//! slice is as long as there is room for, divided by the vCPUs: far from the limit a guest is hardly disturbed.

use std::time::Duration;

/// The least slice, in pages: what a vCPU needs room for to go on.
pub(super) const LEAST: u64 = 128;
/// The longest. It also says how soon a limit that was lowered counts.
pub(super) const LONGEST: Duration = Duration::from_millis(10);
/// What a fault is taken to cost at least, in nanoseconds. Some 3 µs were measured for a first write under KVM's log (KVM-PVM, whose page tables are
/// shadows); a third of that leaves room for quicker machines, and [`Slices::check`] sees if it does not.
const FAULT_NS: u64 = 1000;
/// It is not taken to cost less than this, whatever was seen: less than the CPU takes to leave the guest and enter it again. And in a slice there must be time
/// to enter it, or it would not come on at all.
const FAULT_NS_LEAST: u64 = 250;

/// What vCPUs may write before they look.
#[derive(Debug)]
pub(super) struct Slices {
    /// Pages that each may write to, by its number.
    granted: Vec<u64>,
    fault_ns: u64,
    overrun: u64,
}

impl Default for Slices {
    fn default() -> Self {
        Self { granted: Vec::new(), fault_ns: FAULT_NS, overrun: 0 }
    }
}

impl Slices {
    /// How often more was written than had been granted.
    pub(super) fn overrun(&self) -> u64 {
        self.overrun
    }

    /// vCPU `index` looks: for how long it may go on where `limit` pages may be dirty and `dirty` are. `None`: there is no room.
    pub(super) fn grant(&mut self, index: u32, dirty: u64, limit: u64) -> Option<Duration> {
        let index = usize::try_from(index).ok()?;
        if self.granted.len() <= index {
            self.granted.resize(index + 1, 0);
        }
        let own = self.granted.get_mut(index)?;
        *own = 0;
        let others: u64 = self.granted.iter().sum();
        let room = limit.saturating_sub(dirty).saturating_sub(others);
        if room < LEAST {
            return None;
        }
        let longest = u64::try_from(LONGEST.as_nanos()).unwrap_or(u64::MAX) / self.fault_ns;
        let pages = (room / self.granted.len() as u64).clamp(LEAST, longest.max(LEAST));
        *self.granted.get_mut(index)? = pages;
        Some(Duration::from_nanos(pages * self.fault_ns))
    }

    /// `new` pages were written since the last look of anybody. If that is more than all had been granted, the machine is quicker than it was taken to be,
    /// or a slice did not end in time: the next are shorter.
    pub(super) fn check(&mut self, new: u64) {
        let granted: u64 = self.granted.iter().sum();
        if new > granted && !self.granted.is_empty() {
            self.overrun += 1;
            self.fault_ns = (self.fault_ns / 2).max(FAULT_NS_LEAST);
        }
    }

    /// No vCPU runs any more; those of another machine will.
    pub(super) fn forget(&mut self) {
        self.granted.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slice_is_as_long_as_there_is_room_and_ten_milliseconds_at_most() {
        let mut slices = Slices::default();
        assert_eq!(slices.grant(0, 0, 1000), Some(Duration::from_millis(1)));
        assert_eq!(slices.grant(0, 744, 1000), Some(Duration::from_micros(256)));
        assert_eq!(slices.grant(0, 1000 - LEAST, 1000), Some(Duration::from_micros(LEAST)));
        assert_eq!(slices.grant(0, 1001 - LEAST, 1000), None);
        assert_eq!(slices.grant(0, 0, 1 << 40), Some(LONGEST));
    }

    #[test]
    fn more_than_was_granted_is_seen_and_makes_slices_shorter() {
        let mut slices = Slices::default();
        slices.check(10);
        assert_eq!(slices.overrun(), 0, "nobody ran by the slice yet");
        slices.grant(0, 0, 500);
        slices.check(500);
        assert_eq!(slices.overrun(), 0);
        slices.check(501);
        assert_eq!((slices.overrun(), slices.grant(0, 0, 1000)), (1, Some(Duration::from_micros(500))));
        (0..20).for_each(|_| slices.check(100_000));
        assert_eq!(slices.grant(0, 0, 1000), Some(Duration::from_micros(250)), "not without end");
    }

    proptest! {
        /// vCPUs look in any order, and write anything up to what they were granted meanwhile: the limit holds.
        #[test]
        fn whatever_they_write_the_limit_holds(limit in 1_u64..5000, looks in proptest::collection::vec((0_u32..4, 0_u64..=100, 0_u64..600), 1..200)) {
            let mut slices = Slices::default();
            // Of each vCPU, what is left of its slice; and all that was written and is not flushed.
            let (mut left, mut written) = ([0_u64; 4], 0_u64);
            for (cpu, part, flushed) in looks {
                for own in &mut left {
                    let wrote = *own * part / 100;
                    (*own, written) = (*own - wrote, written + wrote);
                }
                prop_assert!(written <= limit, "{} are dirty, {} may be", written, limit);
                written -= flushed.min(written);
                left[cpu as usize] = slices.grant(cpu, written, limit).map_or(0, |length| length.as_micros() as u64);
            }
        }
    }
}
