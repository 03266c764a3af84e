//! What is in a simulated file: sparse sectors, a length, and the storage reserved for it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// The unit in which a disk writes: a sector is old or new, never half of each.
pub(super) const SECTOR: u64 = 512;

type Bytes = [u8; SECTOR as usize];

/// A sector as it was at one moment. It never changes; all disks that it may end up on share it.
#[derive(Debug)]
pub(super) struct Sector {
    bytes: Bytes,
    /// Found when first asked for.
    digest: OnceLock<u64>,
}

impl Sector {
    fn new(bytes: Bytes) -> Arc<Self> {
        Arc::new(Self { bytes, digest: OnceLock::new() })
    }

    /// A copy with zeros at `part`.
    fn zeroed(&self, part: Range<usize>) -> Arc<Self> {
        let mut bytes = self.bytes;
        bytes[part].fill(0);
        Self::new(bytes)
    }

    /// A hash of the bytes; 0 if they are all zero.
    fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            hasher.write(&self.bytes);
            if self.bytes == ZERO { 0 } else { hasher.finish() }
        })
    }
}

const ZERO: Bytes = [0; SECTOR as usize];

/// Ranges of sectors, `start → end`, neither overlapping nor touching.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Extents(BTreeMap<u64, u64>);

impl Extents {
    pub(super) fn total(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    fn has(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, end)| *end > number)
    }

    fn insert(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        let touching: Vec<(u64, u64)> =
            self.0.range(..=end).map(|(&s, &e)| (s, e)).filter(|&(_, e)| e >= start).collect();
        for (s, e) in touching {
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.0.insert(start, end);
    }

    fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let cut: Vec<(u64, u64)> = self.0.range(..end).map(|(&s, &e)| (s, e)).filter(|&(_, e)| e > start).collect();
        for (s, e) in cut {
            self.0.remove(&s);
            self.insert(s, start.min(e));
            self.insert(end.max(s), e);
        }
    }

    /// Where `start..end` has to stop so that it takes at most `budget` sectors that are not here yet.
    pub(super) fn fits(&self, start: u64, end: u64, mut budget: u64) -> u64 {
        let mut at = start;
        while at < end {
            if let Some((_, &e)) = self.0.range(..=at).next_back().filter(|&(_, &e)| e > at) {
                at = e.min(end);
                continue;
            }
            let gap_end = self.0.range(at..).next().map_or(end, |(&s, _)| s.min(end));
            let take = budget.min(gap_end - at);
            budget -= take;
            at += take;
            if at < gap_end {
                break;
            }
        }
        at
    }
}

/// The contents of a file at one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pub(super) length: u64,
    /// A missing sector reads as zero.
    sectors: BTreeMap<u64, Arc<Sector>>,
    pub(super) reserved: Extents,
}

/// What one operation left behind in every sector that it touched, and in the metadata if it changed that.
#[derive(Debug, Clone, Default)]
pub(super) struct Change {
    pub(super) sectors: BTreeMap<u64, Option<Arc<Sector>>>,
    pub(super) metadata: Option<(u64, Extents)>,
}

/// The sectors that bytes `offset..offset + length` touch.
pub(super) fn sectors_of(offset: u64, length: u64) -> (u64, u64) {
    (offset / SECTOR, offset.saturating_add(length).div_ceil(SECTOR))
}

/// The part of sector `number` that lies in `start..end` (bytes of the file), as a range within the sector.
fn within(number: u64, start: u64, end: u64) -> Range<usize> {
    let base = number * SECTOR;
    let low = start.max(base) - base;
    let high = end.min(base + SECTOR).saturating_sub(base);
    low as usize..high as usize
}

impl Content {
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let count = (buffer.len() as u64).min(self.length.saturating_sub(offset));
        let (first, last) = sectors_of(offset, count);
        let mut done = 0;
        for number in first..last {
            let part = within(number, offset, offset + count);
            let into = &mut buffer[done..done + part.len()];
            done += part.len();
            match self.sectors.get(&number) {
                Some(sector) => into.copy_from_slice(&sector.bytes[part]),
                None => into.fill(0),
            }
        }
        done
    }

    /// Changes bytes of existing or new sectors by `edit(sector number, bytes within, offset in the write)`.
    fn edit(&mut self, offset: u64, length: u64, mut edit: impl FnMut(&mut [u8], usize)) -> Change {
        let mut change = Change::default();
        let (first, last) = sectors_of(offset, length);
        let mut done = 0;
        for number in first..last {
            let part = within(number, offset, offset + length);
            let size = part.len();
            let mut sector = self.sectors.get(&number).map_or(ZERO, |sector| sector.bytes);
            edit(&mut sector[part], done);
            done += size;
            let sector = Sector::new(sector);
            self.sectors.insert(number, Arc::clone(&sector));
            change.sectors.insert(number, Some(sector));
        }
        change
    }

    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> Change {
        let length = bytes.len() as u64;
        let mut change = self.edit(offset, length, |into, at| {
            into.copy_from_slice(&bytes[at..at + into.len()]);
        });
        self.reserve(offset, length, &mut change);
        change
    }

    /// Flips the bits of `mask` in one byte.
    pub(super) fn flip(&mut self, offset: u64, mask: u8) {
        if offset < self.length {
            self.edit(offset, 1, |byte, _| byte[0] ^= mask);
        }
    }

    /// Reserves storage and grows the length to match.
    pub(super) fn reserve(&mut self, offset: u64, length: u64, change: &mut Change) {
        let (first, last) = sectors_of(offset, length);
        let before = self.reserved.clone();
        self.reserved.insert(first, last);
        let grown = self.length.max(offset.saturating_add(length));
        if grown != self.length || before != self.reserved {
            self.length = grown;
            change.metadata = Some((grown, self.reserved.clone()));
        }
    }

    pub(super) fn set_len(&mut self, length: u64) -> Change {
        let mut change = if length < self.length { self.zero(length, self.length - length) } else { Change::default() };
        self.length = length;
        self.reserved.remove(length.div_ceil(SECTOR), u64::MAX);
        change.metadata = Some((length, self.reserved.clone()));
        change
    }

    /// Whole sectors become holes; the bytes at the edges become zero.
    pub(super) fn zero(&mut self, offset: u64, length: u64) -> Change {
        let end = offset.saturating_add(length).min(self.length);
        let mut change = Change::default();
        if offset >= end {
            return change;
        }
        let touched: Vec<u64> = {
            let (first, last) = sectors_of(offset, end - offset);
            self.sectors.range(first..last).map(|(&number, _)| number).collect()
        };
        for number in touched {
            let part = within(number, offset, end);
            if part.len() as u64 == SECTOR || (part.start == 0 && end == self.length) {
                self.sectors.remove(&number);
                change.sectors.insert(number, None);
            } else if let Some(sector) = self.sectors.get_mut(&number) {
                *sector = sector.zeroed(part);
                change.sectors.insert(number, Some(Arc::clone(sector)));
            }
        }
        self.reserved.remove(offset.div_ceil(SECTOR), end / SECTOR);
        change.metadata = Some((self.length, self.reserved.clone()));
        change
    }

    /// Takes over the sectors of `change` that `keep` names, and its metadata if `metadata` says so.
    pub(super) fn apply(&mut self, change: &Change, mut keep: impl FnMut(u64) -> bool, metadata: bool) {
        for (&number, sector) in &change.sectors {
            if !keep(number) {
                continue;
            }
            match sector {
                Some(sector) => drop(self.sectors.insert(number, Arc::clone(sector))),
                None => drop(self.sectors.remove(&number)),
            }
        }
        if let (true, Some((length, reserved))) = (metadata, &change.metadata) {
            self.length = *length;
            self.reserved = reserved.clone();
        }
    }

    /// The sectors that would read differently if `change` were applied, lengths aside.
    pub(super) fn changed_by(&self, change: &Change) -> Vec<u64> {
        fn bytes(sector: Option<&Arc<Sector>>) -> &Bytes {
            sector.map_or(&ZERO, |sector| &sector.bytes)
        }
        let changes = change.sectors.iter();
        let differs = changes.filter(|(number, new)| bytes(self.sectors.get(number)) != bytes(new.as_ref()));
        differs.map(|(number, _)| *number).collect()
    }

    /// Feeds the length and what is not zero to `hasher`.
    pub(super) fn digest(&self, hasher: &mut impl Hasher) {
        hasher.write_u64(self.length);
        let sectors = self.sectors.iter().map(|(number, sector)| (*number, sector.digest()));
        for (number, digest) in sectors.filter(|(_, digest)| *digest != 0) {
            hasher.write_u64(number);
            hasher.write_u64(digest);
        }
    }

    /// Makes metadata and sectors agree again after some of them were lost: nothing past the length is left.
    pub(super) fn settle(&mut self) {
        let end = self.length.div_ceil(SECTOR);
        drop(self.sectors.split_off(&end));
        let tail = (self.length % SECTOR) as usize;
        if let Some(sector) = self.sectors.get_mut(&(self.length / SECTOR)) {
            *sector = sector.zeroed(tail..SECTOR as usize);
        }
        self.reserved.remove(end, u64::MAX);
        for &number in self.sectors.keys() {
            if !self.reserved.has(number) {
                self.reserved.insert(number, number + 1);
            }
        }
    }
}
