//! The guest `pages` without a guest: the same accesses to the same pages, with the same checks, in a process's own memory.

use guests::chain::fold;
use guests::pages::{Access, List, PAGE_WORDS, word};

/// Of a page that was never touched; see [`guests::pages`].
const NEVER: u32 = u32::MAX;
const SEED: u64 = 0x0070_6572_6475_7265;

/// A page that is not what was written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("damaged page {page} at access {access}: word {word}")]
pub(super) struct Damaged {
    page: u32,
    access: u64,
    word: usize,
}

/// A walk that goes on for ever.
pub(super) struct Walker {
    list: List,
    /// One page after the other. Of words, because zeroed words alone come from the kernel as they are, untouched.
    words: Vec<u64>,
    versions: Vec<u32>,
    next: usize,
    accesses: u64,
    hash: u64,
}

impl Walker {
    /// Nothing is touched yet, but the versions.
    pub(super) fn new(list: List) -> Self {
        let pages = list.pages() as usize;
        Self {
            words: vec![0; pages * PAGE_WORDS],
            versions: vec![NEVER; pages],
            list,
            next: 0,
            accesses: 0,
            hash: SEED,
        }
    }

    /// Accesses done.
    pub(super) fn accesses(&self) -> u64 {
        self.accesses
    }

    /// Does the next `count` accesses.
    ///
    /// # Errors
    /// [`Damaged`].
    pub(super) fn walk(&mut self, count: u64) -> Result<(), Damaged> {
        for _ in 0..count {
            let Some(entry) = self.list.entries().get(self.next).copied() else { return Ok(()) };
            self.next += 1;
            if self.next == self.list.entries().len() {
                self.next = 0;
            }
            self.hash = fold(self.hash, u64::from(entry));
            self.accesses += 1;
            self.access(Access::of(entry))?;
        }
        Ok(())
    }

    fn access(&mut self, Access { page, write }: Access) -> Result<(), Damaged> {
        let index = page as usize;
        let damaged = |word| Damaged { page, access: self.accesses, word };
        // A list names no page beyond its own.
        let (pages, _) = self.words.as_chunks_mut::<PAGE_WORDS>();
        let (Some(words), Some(version)) = (pages.get_mut(index), self.versions.get_mut(index)) else {
            return Err(damaged(0));
        };
        let stamp = word(page, 0);
        let last = PAGE_WORDS - 1;
        if *version == NEVER {
            words.iter_mut().enumerate().for_each(|(at, value)| *value = word(page, at));
            *version = 1;
            (words[1], words[last]) = (1, stamp.wrapping_add(1));
        } else {
            let now = u64::from(*version);
            let other = 2 + (((self.hash >> 48) * 509) >> 16) as usize;
            let due = [(0, stamp), (1, now), (last, stamp.wrapping_add(now)), (other, word(page, other))];
            if let Some((at, _)) = due.into_iter().find(|(at, due)| words.get(*at) != Some(due)) {
                return Err(damaged(at));
            }
        }
        if write {
            *version = if *version >= NEVER - 1 { 1 } else { *version + 1 };
            let now = u64::from(*version);
            (words[1], words[last]) = (now, stamp.wrapping_add(now));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walker() -> Walker {
        let access = |i: u32| Access { page: (i * i) % 50, write: i.is_multiple_of(3) };
        Walker::new(List::new((0..200).map(access), 50).unwrap())
    }

    #[test]
    fn it_walks_round_and_round_and_counts_versions() {
        let mut walker = walker();
        walker.walk(1000).unwrap();
        assert_eq!(walker.accesses(), 1000);
        // Page 0 is written at i = 0, 30, 60, …, 180: seven times in each of five rounds, after its first access.
        assert_eq!((walker.words[1], walker.versions[0]), (1 + 5 * 7, 36));
    }

    #[test]
    fn pages_are_not_there_before_they_are_touched() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        let before = resident();
        let walker = Walker::new(List::new([Access { page: 99_999, write: false }], 100_000).unwrap());
        assert!(resident() < before + 200_000, "of 400,000 KiB");
        assert_eq!(walker.accesses(), 0);
    }

    #[test]
    fn what_is_not_as_it_was_written_last_is_found() {
        for (what, alter) in [
            ("zeros", (|page| page.fill(0)) as fn(&mut [u64; PAGE_WORDS])),
            ("older", |page| page[1] -= 1),
            ("torn", |page| page[511] ^= 1),
            ("one word", |page| page[77] ^= 1 << 63),
        ] {
            let mut walker = walker();
            walker.walk(400).unwrap();
            alter(&mut walker.words.as_chunks_mut::<PAGE_WORDS>().0[25]);
            assert!(matches!(walker.walk(1_000_000), Err(Damaged { page: 25, .. })), "{what}");
        }
    }
}
