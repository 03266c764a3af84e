//! Where content already lies: an index of bounded size, derived from the archive, never stored.
//!
//! A lookup that finds something is a hint. The writer compares the bytes before it leans on it, so that an entry that has
//! gone stale (a sweep, another process), a damaged copy or two contents with one hash cost a comparison and no more.

use crate::hash::Hash;
use crate::node::Link;

/// Entries of one bucket: the oldest makes room.
const WAYS: usize = 4;

/// A fixed number of (content, place) pairs.
#[derive(Debug, Default)]
pub(crate) struct DedupIndex {
    buckets: Vec<[Option<(u64, Link)>; WAYS]>,
    limit: usize,
    filled: usize,
    /// Whether it has been filled from the archive since it was emptied.
    pub(crate) primed: bool,
}

impl DedupIndex {
    /// For up to about `limit` pages; 0 switches it off.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled >= self.limit
    }

    fn bucket(&self, key: u64) -> usize {
        // The key is part of a hash: any of its bits are as good as others.
        (key % self.buckets.len().max(1) as u64) as usize
    }

    pub(crate) fn get(&self, hash: Hash) -> Option<Link> {
        let key = hash.prefix();
        let bucket = self.buckets.get(self.bucket(key))?;
        bucket.iter().flatten().find(|(found, _)| *found == key).map(|(_, link)| *link)
    }

    pub(crate) fn insert(&mut self, hash: Hash, link: Link) {
        if self.limit == 0 {
            return;
        }
        if self.filled >= self.buckets.len() * WAYS / 2 && self.buckets.len() * WAYS < self.limit {
            self.grow();
        }
        self.place(hash.prefix(), link);
    }

    fn place(&mut self, key: u64, link: Link) {
        let at = self.bucket(key);
        let Some(bucket) = self.buckets.get_mut(at) else { return };
        let known = bucket.iter().position(|entry| entry.is_some_and(|(found, _)| found == key));
        let slot = known.or_else(|| bucket.iter().position(Option::is_none));
        if known.is_none() && slot.is_some() {
            self.filled += 1;
        }
        match slot {
            Some(slot) => bucket[slot] = Some((key, link)),
            None => {
                bucket.rotate_left(1);
                bucket[WAYS - 1] = Some((key, link));
            }
        }
    }

    fn grow(&mut self) {
        let count = (self.buckets.len() * 2).clamp(256, self.limit.div_ceil(WAYS).max(1));
        let old = std::mem::replace(&mut self.buckets, vec![[None; WAYS]; count]);
        self.filled = 0;
        old.into_iter().flatten().flatten().for_each(|(key, link)| self.place(key, link));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;

    fn link(unit: u32) -> Link {
        Link { pack: 1, unit, length: 4096, codec: Codec::Raw, born: 0, crc: 0 }
    }

    #[test]
    fn it_finds_what_it_was_given_and_never_grows_beyond_its_limit() {
        let mut index = DedupIndex::new(10_000);
        for n in 0..5_000u32 {
            index.insert(Hash::of(&n.to_le_bytes()), link(n));
        }
        let found = (0..5_000u32).filter(|n| index.get(Hash::of(&n.to_le_bytes())) == Some(link(*n))).count();
        assert!(found > 4_500, "{found} of 5000");
        for n in 0..100_000u32 {
            index.insert(Hash::of(&n.to_le_bytes()), link(n));
        }
        assert!(index.buckets.len() * WAYS <= 10_000 + WAYS);
        assert_eq!(index.get(Hash::of(&99_999u32.to_le_bytes())), Some(link(99_999)));
    }

    #[test]
    fn a_limit_of_nothing_remembers_nothing() {
        let mut index = DedupIndex::new(0);
        index.insert(Hash::of(b"x"), link(1));
        assert_eq!(index.get(Hash::of(b"x")), None);
    }
}
