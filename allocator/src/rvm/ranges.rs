//! Bytes of regions, newest first come: what several transactions leave, each byte once.
//!
//! The inter-transaction optimisation of LRVM (section 5.2): of ranges that a later commit overwrote, only what is left of them is logged.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a range takes in a batch beside its bytes: region, offset, length; its bytes are padded to [`ALIGN`].
pub(crate) const RANGE_HEADER: usize = 24;
/// To which ranges are padded in a batch.
pub(crate) const ALIGN: usize = 8;

/// Disjoint ranges of regions, and their newest bytes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// (region, offset) → bytes; never empty, none overlapping another.
    bytes: BTreeMap<(u64, u64), Vec<u8>>,
    encoded: usize,
}

/// What a range of so many bytes takes in a batch.
pub(crate) fn encoded_len(bytes: usize) -> usize {
    RANGE_HEADER + bytes.next_multiple_of(ALIGN)
}

impl Ranges {
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What all of it takes in a batch, the batch's own header aside.
    pub(crate) fn encoded(&self) -> usize {
        self.encoded
    }

    /// Region, offset, bytes; ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, &[u8])> {
        self.bytes.iter().map(|(&(region, offset), bytes)| (region, offset, bytes.as_slice()))
    }

    /// Overwrites what is there with `new` bytes of `region` at `offset`. `offset + new.len()` must not overflow.
    pub(crate) fn insert(&mut self, region: u64, offset: u64, new: &[u8]) {
        if new.is_empty() {
            return;
        }
        // The common case: the same record again.
        if let Some(old) = self.bytes.get_mut(&(region, offset))
            && old.len() >= new.len()
            && let Some(part) = old.get_mut(..new.len())
        {
            part.copy_from_slice(new);
            return;
        }
        self.clear(region, offset..offset + new.len() as u64);
        self.put(region, offset, new.to_vec());
    }

    fn put(&mut self, region: u64, offset: u64, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.encoded += encoded_len(bytes.len());
            self.bytes.insert((region, offset), bytes);
        }
    }

    fn take(&mut self, key: (u64, u64)) -> Vec<u8> {
        let taken = self.bytes.remove(&key).unwrap_or_default();
        self.encoded -= if taken.is_empty() { 0 } else { encoded_len(taken.len()) };
        taken
    }

    /// Leaves nothing in `gone`, and all beside it.
    fn clear(&mut self, region: u64, gone: Range<u64>) {
        let before = self.bytes.range((region, 0)..(region, gone.start)).next_back();
        let before = before.filter(|((_, at), bytes)| at + bytes.len() as u64 > gone.start).map(|(key, _)| *key);
        let within = self.bytes.range((region, gone.start)..(region, gone.end)).map(|(key, _)| *key);
        let touched: Vec<(u64, u64)> = before.into_iter().chain(within).collect();
        for key in touched {
            let mut bytes = self.take(key);
            let end = key.1 + bytes.len() as u64;
            if end > gone.end {
                let behind = bytes.split_off((gone.end - key.1) as usize);
                self.put(region, gone.end, behind);
            }
            bytes.truncate(gone.start.saturating_sub(key.1) as usize);
            self.put(region, key.1, bytes);
        }
    }
}

/// Ranges of one memory that a transaction has set: ascending, none touching the next.
///
/// The intra-transaction optimisation of LRVM: a byte that was set twice is kept, and logged, once.
#[derive(Debug, Default)]
pub(crate) struct Coverage(Vec<Range<usize>>);

impl Coverage {
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.0.iter().cloned()
    }

    /// What of `wanted` is not in it, ascending.
    pub(crate) fn gaps(&self, wanted: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        let first = self.0.partition_point(|set| set.end <= wanted.start);
        let behind = self.0.get(first..).unwrap_or_default().iter().take_while({
            let end = wanted.end;
            move |set| set.start < end
        });
        let ends = behind.clone().map(|set| set.start).chain([wanted.end]);
        let starts = std::iter::once(wanted.start).chain(behind.map(|set| set.end));
        starts.zip(ends).map(|(start, end)| start..end).filter(|gap| gap.start < gap.end)
    }

    pub(crate) fn add(&mut self, new: Range<usize>) {
        if new.is_empty() {
            return;
        }
        // Those that touch it become one with it.
        let first = self.0.partition_point(|set| set.end < new.start);
        let last = self.0.partition_point(|set| set.start <= new.end);
        let touched = self.0.get(first..last).unwrap_or_default();
        let start = touched.first().map_or(new.start, |set| set.start.min(new.start));
        let end = touched.last().map_or(new.end, |set| set.end.max(new.end));
        self.0.splice(first..last, std::iter::once(start..end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_is_the_newest_and_none_is_there_twice(
            writes in prop::collection::vec((0..2u64, 0..60u64, 1..20usize, any::<u8>()), 1..40),
        ) {
            let mut ranges = Ranges::default();
            let mut expected = BTreeMap::new();
            for (region, offset, length, byte) in writes {
                ranges.insert(region, offset, &vec![byte; length]);
                (0..length as u64).for_each(|at| _ = expected.insert((region, offset + at), byte));
            }
            let mut found = BTreeMap::new();
            for (region, offset, bytes) in ranges.iter() {
                for (at, byte) in bytes.iter().enumerate() {
                    prop_assert!(found.insert((region, offset + at as u64), *byte).is_none());
                }
            }
            prop_assert_eq!(found, expected);
            let encoded: usize = ranges.iter().map(|(_, _, bytes)| encoded_len(bytes.len())).sum();
            prop_assert_eq!(ranges.encoded(), encoded);
        }

        #[test]
        fn coverage_knows_what_was_set_and_what_not(sets in prop::collection::vec((0..60usize, 0..20usize), 1..30)) {
            let mut coverage = Coverage::default();
            let mut bytes = [false; 100];
            for (start, length) in sets {
                let gaps: Vec<usize> = coverage.gaps(start..start + length).flatten().collect();
                let expected: Vec<usize> = (start..start + length).filter(|at| !bytes[*at]).collect();
                prop_assert_eq!(gaps, expected);
                coverage.add(start..start + length);
                bytes[start..start + length].fill(true);
                let ranges: Vec<_> = coverage.iter().collect();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                let set: Vec<usize> = ranges.into_iter().flatten().collect();
                prop_assert_eq!(set, (0..100).filter(|at| bytes[*at]).collect::<Vec<_>>());
            }
        }
    }
}
