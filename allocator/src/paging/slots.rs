//! The swap region: where clusters lie that are in no frame, and the tables that say so.
//!
//! ```text
//!   │ slot table: a block of 4 KiB for 510 clusters │ frame list, of the last freeze │ slot 0 │ slot 1 │ …
//! ```
//!
//! A slot holds one cluster, under a CRC-32 that is in the table. A cluster keeps its slot while it is in a frame, too, so that it can be
//! dropped without a write if it did not change. The bytes are described in `FORMAT.md`.
//!
//! The tables count only together with the context that names their digest, and with RAM that is clean: nothing here is ever written while
//! a context is in force. So slots and tables are overwritten in place.

use std::ops::Range;
use std::sync::Arc;

use vfs::VfsFile;

use super::{Geometry, PagingError};
use crate::medium::PAGE_SIZE;
use crate::region::Region;

/// Bytes of a block of the slot table.
const BLOCK: usize = 4096;
const BLOCK_MAGIC: u32 = u32::from_le_bytes(*b"PDST");
const LIST_MAGIC: u32 = u32::from_le_bytes(*b"PDFL");
/// Magic, number, CRC-32, zero.
const HEADER: usize = 16;
/// Slot (plus one; 0 is none), CRC-32.
const ENTRY: usize = 8;
const ENTRIES: usize = (BLOCK - HEADER) / ENTRY;
/// What direct I/O wants of addresses in memory and in the file.
const ALIGNMENT: usize = PAGE_SIZE as usize;

/// Memory for direct I/O.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// Room for `length` bytes. What was in it may be gone.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        if self.bytes.len() < length + ALIGNMENT {
            self.bytes = vec![0; length + ALIGNMENT];
            self.start = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        }
        self.length = length;
        self.filled_mut()
    }

    /// What is in it.
    pub(super) fn filled(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.length).unwrap_or_default()
    }

    pub(super) fn filled_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.length).unwrap_or_default()
    }
}

/// Where the parts of a swap region lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    blocks: usize,
    /// Bytes of the frame list, with its header.
    list: u64,
    slots_at: u64,
    slots: u32,
    cluster: u64,
}

impl Layout {
    pub(super) fn new(geometry: Geometry, slots: u32) -> Self {
        let blocks = (geometry.clusters() as usize).div_ceil(ENTRIES);
        let list = (HEADER as u64 + ENTRY as u64 * u64::from(geometry.frames())).next_multiple_of(BLOCK as u64);
        let slots_at = (blocks as u64 * BLOCK as u64 + list).next_multiple_of(geometry.cluster());
        Self { blocks, list, slots_at, slots, cluster: geometry.cluster() }
    }

    /// Bytes of the region.
    pub(super) fn size(&self) -> u64 {
        self.slots_at + u64::from(self.slots) * self.cluster
    }

    pub(super) fn slot_at(&self, slot: u32) -> u64 {
        self.slots_at + u64::from(slot) * self.cluster
    }
}

/// A slot that a cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// Its number.
    pub(super) number: u32,
    /// Of the cluster's bytes.
    pub(super) crc: u32,
}

/// Which clusters have which slots.
#[derive(Debug)]
pub(super) struct SlotTable {
    by_cluster: Vec<Option<Slot>>,
    used: Vec<u64>,
    slots: u32,
    in_use: u32,
    last: u32,
    /// Blocks that differ from what is in the region.
    changed: Vec<bool>,
}

impl SlotTable {
    pub(super) fn new(clusters: u32, slots: u32) -> Self {
        let blocks = (clusters as usize).div_ceil(ENTRIES);
        Self {
            by_cluster: vec![None; clusters as usize],
            used: vec![0; slots.div_ceil(64) as usize],
            slots,
            in_use: 0,
            last: 0,
            changed: vec![true; blocks],
        }
    }

    pub(super) fn of(&self, cluster: u32) -> Option<Slot> {
        self.by_cluster.get(cluster as usize).copied().flatten()
    }

    pub(super) fn in_use(&self) -> u32 {
        self.in_use
    }

    pub(super) fn count(&self) -> u32 {
        self.slots
    }

    /// A slot for a cluster: its own; the one of its number, so that neighbours are neighbours and can be read at once; or a free one behind
    /// the last that was given out. `None` if there is none left.
    pub(super) fn reserve(&mut self, cluster: u32) -> Option<u32> {
        if let Some(own) = self.of(cluster) {
            return Some(own.number);
        }
        if !self.is_used(cluster) {
            self.mark(cluster, true);
            return Some(cluster);
        }
        let free = self.next_free()?;
        self.mark(free, true);
        self.last = free + 1;
        Some(free)
    }

    /// A slot that was reserved holds the cluster, with this CRC.
    pub(super) fn fill(&mut self, cluster: u32, number: u32, crc: u32) {
        if let Some(entry) = self.by_cluster.get_mut(cluster as usize) {
            *entry = Some(Slot { number, crc });
            self.changed[cluster as usize / ENTRIES] = true;
        }
    }

    /// A slot that was reserved, and not filled, is free again, unless the cluster has it.
    pub(super) fn unreserve(&mut self, cluster: u32, number: u32) {
        if self.of(cluster).map(|slot| slot.number) != Some(number) {
            self.mark(number, false);
        }
    }

    /// A cluster needs its slot no more.
    pub(super) fn free(&mut self, cluster: u32) {
        if let Some(slot) = self.by_cluster.get_mut(cluster as usize).and_then(Option::take) {
            self.mark(slot.number, false);
            self.changed[cluster as usize / ENTRIES] = true;
        }
    }

    fn mark(&mut self, slot: u32, used: bool) {
        let Some(word) = self.used.get_mut(slot as usize / 64) else { return };
        let bit = 1 << (slot % 64);
        match (used, *word & bit != 0) {
            (true, false) => self.in_use += 1,
            (false, true) => self.in_use -= 1,
            _ => return,
        }
        *word ^= bit;
    }

    fn is_used(&self, slot: u32) -> bool {
        slot >= self.slots || self.used.get(slot as usize / 64).is_none_or(|word| word & (1 << (slot % 64)) != 0)
    }

    fn next_free(&self) -> Option<u32> {
        if self.in_use >= self.slots {
            return None;
        }
        let from = self.last.min(self.slots);
        let words = |range: Range<u32>| {
            let mut at = range.start;
            while at < range.end {
                let word = !self.used.get(at as usize / 64)? >> (at % 64);
                if word != 0 {
                    return Some(at + word.trailing_zeros()).filter(|found| *found < range.end);
                }
                at = (at / 64 + 1) * 64;
            }
            None
        };
        words(from..self.slots).or_else(|| words(0..from))
    }

    fn encode(&self, block: usize) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        let first = block * ENTRIES;
        for (index, at) in (first..self.by_cluster.len().min(first + ENTRIES)).zip((HEADER..).step_by(ENTRY)) {
            if let Some(slot) = self.by_cluster[index] {
                put(&mut bytes, at, slot.number + 1);
                put(&mut bytes, at + 4, slot.crc);
            }
        }
        seal(&mut bytes, BLOCK_MAGIC, block as u32);
        bytes
    }

    /// Takes a block up that is not trusted. What is wrong with it, in words.
    fn decode(&mut self, block: usize, bytes: &[u8]) -> Result<(), &'static str> {
        let first = block * ENTRIES;
        let end = self.by_cluster.len().min(first + ENTRIES);
        for (index, at) in (first..end).zip((HEADER..).step_by(ENTRY)) {
            let Some(number) = get(bytes, at).checked_sub(1) else { continue };
            if number >= self.slots {
                return Err("it names a slot that there is not");
            }
            if self.is_used(number) {
                return Err("it names a slot twice");
            }
            self.mark(number, true);
            self.by_cluster[index] = Some(Slot { number, crc: get(bytes, at + 4) });
        }
        Ok(())
    }
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// 0 past the end.
fn get(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Fills in a header; the CRC is over all but itself.
fn seal(bytes: &mut [u8], magic: u32, number: u32) {
    put(bytes, 0, magic);
    put(bytes, 4, number);
    put(bytes, 8, 0);
    let crc = crc32fast::hash(bytes);
    put(bytes, 8, crc);
}

/// Checks what [`seal`] filled in; the CRC.
fn unseal(bytes: &mut [u8], magic: u32, number: Option<u32>) -> Result<u32, &'static str> {
    let crc = get(bytes, 8);
    put(bytes, 8, 0);
    if crc32fast::hash(bytes) != crc {
        return Err("its checksum does not hold");
    }
    put(bytes, 8, crc);
    if get(bytes, 0) != magic || number.is_some_and(|number| get(bytes, 4) != number) {
        return Err("it is another block");
    }
    Ok(crc)
}

/// A swap region in use.
#[derive(Debug)]
pub(super) struct SwapFile {
    region: Arc<Region>,
    direct: Option<Box<dyn VfsFile>>,
    layout: Layout,
}

impl SwapFile {
    pub(super) fn open(region: Arc<Region>, geometry: Geometry, slots: u32) -> Result<Self, PagingError> {
        let layout = Layout::new(geometry, slots);
        if region.size() < layout.size() {
            return Err(PagingError::TooSmall {
                name: region.name().clone(),
                size: region.size(),
                needed: layout.size(),
            });
        }
        let direct = region.direct()?;
        Ok(Self { region, direct, layout })
    }

    /// Fills `bytes`, whole slots, from slot `first` on.
    pub(super) fn read(&self, first: u32, bytes: &mut [u8]) -> Result<(), PagingError> {
        let at = self.layout.slot_at(first);
        match &self.direct {
            Some(file) => {
                let read = file.read_exact_at(bytes, self.place_of(first));
                read.map_err(|source| self.failed("read", first, source))
            }
            None => Ok(self.region.read_at(bytes, at)?),
        }
    }

    /// Writes whole slots from slot `first` on.
    pub(super) fn write(&self, first: u32, bytes: &[u8]) -> Result<(), PagingError> {
        let at = self.layout.slot_at(first);
        match &self.direct {
            Some(file) => {
                let written = file.write_all_at(bytes, self.place_of(first));
                written.map_err(|source| self.failed("write", first, source))
            }
            None => Ok(self.region.write_at(bytes, at)?),
        }
    }

    /// Fills each buffer, whole slots, from the slot that it goes with on; all at a time.
    pub(super) fn read_many(&self, parts: Vec<(u32, &mut [u8])>) -> Result<(), PagingError> {
        let Some(file) = &self.direct else {
            return parts.into_iter().try_for_each(|(first, bytes)| self.read(first, bytes));
        };
        let slot = parts.first().map_or(0, |(first, _)| *first);
        let mut parts: Vec<_> = parts.into_iter().map(|(first, bytes)| (self.place_of(first), bytes)).collect();
        file.read_many(&mut parts).map_err(|source| self.failed("read", slot, source))
    }

    /// Writes whole slots from each of these on, all at a time.
    pub(super) fn write_many(&self, parts: &[(u32, &[u8])]) -> Result<(), PagingError> {
        let Some(file) = &self.direct else {
            return parts.iter().try_for_each(|(first, bytes)| self.write(*first, bytes));
        };
        let slot = parts.first().map_or(0, |(first, _)| *first);
        let parts: Vec<_> = parts.iter().map(|(first, bytes)| (self.place_of(*first), *bytes)).collect();
        file.write_many(&parts).map_err(|source| self.failed("write", slot, source))
    }

    /// Where in the file a slot is.
    fn place_of(&self, slot: u32) -> u64 {
        self.region.data_offset() + self.layout.slot_at(slot)
    }

    /// The tables cannot be used.
    pub(super) fn refuse(&self, what: &str) -> PagingError {
        PagingError::Tables { name: self.region.name().clone(), what: what.to_owned() }
    }

    fn failed(&self, doing: &'static str, slot: u32, source: std::io::Error) -> PagingError {
        PagingError::Slot { name: self.region.name().clone(), doing, slot, source }
    }

    /// Writes the tables as they are now and makes them and all slots durable. Returns the digest that tells this state from any other.
    pub(super) fn persist(&self, table: &mut SlotTable, list: &[(u32, u32)]) -> Result<u32, PagingError> {
        let mut digest = crc32fast::Hasher::new();
        for block in 0..self.layout.blocks {
            let bytes = table.encode(block);
            digest.update(&bytes[8..12]);
            if table.changed[block] {
                self.region.write_at(&bytes, (block * BLOCK) as u64)?;
            }
        }
        let mut bytes = vec![0; usize::try_from(self.layout.list).unwrap_or(0)];
        for ((cluster, frame), at) in list.iter().zip((HEADER..).step_by(ENTRY)) {
            put(&mut bytes, at, *cluster);
            put(&mut bytes, at + 4, *frame);
        }
        seal(&mut bytes, LIST_MAGIC, list.len() as u32);
        digest.update(&bytes[8..12]);
        self.region.write_at(&bytes, (self.layout.blocks * BLOCK) as u64)?;
        if let Some(direct) = &self.direct {
            // It is the same file: one flush brings what both handles wrote, but each handle must hear of its own failure.
            direct.sync_data().map_err(|source| self.failed("flush", 0, source))?;
        }
        self.region.sync()?;
        table.changed.fill(false);
        Ok(digest.finalize())
    }

    /// The tables that `digest` belongs to: the slots, and which cluster is in which frame, the hottest first. Nothing of it is trusted.
    pub(super) fn load(&self, clusters: u32, digest: u32) -> Result<(SlotTable, Vec<(u32, u32)>), PagingError> {
        let damaged = |what: String| self.refuse(&what);
        let mut table = SlotTable::new(clusters, self.layout.slots);
        let mut found = crc32fast::Hasher::new();
        let mut bytes = vec![0; self.layout.blocks * BLOCK];
        self.region.read_at(&mut bytes, 0)?;
        for (block, bytes) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            let crc = unseal(bytes, BLOCK_MAGIC, Some(block as u32));
            let crc = crc.map_err(|what| damaged(format!("block {block} of the slot table: {what}")))?;
            found.update(&crc.to_le_bytes());
            table.decode(block, bytes).map_err(|what| damaged(format!("block {block} of the slot table: {what}")))?;
        }
        let mut bytes = vec![0; usize::try_from(self.layout.list).unwrap_or(0)];
        self.region.read_at(&mut bytes, (self.layout.blocks * BLOCK) as u64)?;
        let crc = unseal(&mut bytes, LIST_MAGIC, None).map_err(|what| damaged(format!("the frame list: {what}")))?;
        found.update(&crc.to_le_bytes());
        if found.finalize() != digest {
            return Err(damaged("they are not those of the context".to_owned()));
        }
        let count = get(&bytes, 4) as usize;
        let entries = bytes.get(HEADER..HEADER.saturating_add(count.saturating_mul(ENTRY)));
        let entries = entries.ok_or_else(|| damaged("the frame list: it is longer than it can be".to_owned()))?;
        let list = entries.chunks_exact(ENTRY).map(|entry| (get(entry, 0), get(entry, 4))).collect();
        table.changed.fill(false);
        Ok((table, list))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Clone)]
    enum Step {
        Store(u32, u32),
        GiveUp(u32),
        Free(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (0..700_u32, any::<u32>()).prop_map(|(cluster, crc)| Step::Store(cluster, crc)),
            1 => (0..700_u32).prop_map(Step::GiveUp),
            3 => (0..700_u32).prop_map(Step::Free),
        ]
    }

    fn apply(steps: &[Step], table: &mut SlotTable, model: &mut BTreeMap<u32, Slot>) {
        for step in steps {
            match *step {
                Step::Store(cluster, crc) => {
                    let reserved = table.reserve(cluster);
                    let room = model.contains_key(&cluster) || model.len() < table.count() as usize;
                    assert_eq!(reserved.is_some(), room);
                    if let Some(number) = reserved {
                        assert!(model.iter().all(|(other, slot)| *other == cluster || slot.number != number));
                        table.fill(cluster, number, crc);
                        model.insert(cluster, Slot { number, crc });
                    }
                }
                Step::GiveUp(cluster) => {
                    if let Some(number) = table.reserve(cluster) {
                        table.unreserve(cluster, number);
                    }
                }
                Step::Free(cluster) => {
                    table.free(cluster);
                    model.remove(&cluster);
                }
            }
            assert_eq!(table.in_use() as usize, model.len());
        }
    }

    proptest! {
        #[test]
        fn no_slot_holds_two_clusters_and_tables_survive_their_bytes(
            slots in 1..600_u32, steps in proptest::collection::vec(step(), 1..300), flip in any::<(u16, u8)>()
        ) {
            let mut table = SlotTable::new(700, slots);
            let mut model = BTreeMap::new();
            apply(&steps, &mut table, &mut model);
            let mut read = SlotTable::new(700, slots);
            for block in 0..2 {
                let mut bytes = table.encode(block);
                prop_assert!(unseal(&mut bytes, BLOCK_MAGIC, Some(block as u32)).is_ok());
                prop_assert!(unseal(&mut bytes, BLOCK_MAGIC, Some(7)).is_err());
                read.decode(block, &bytes).unwrap();
                let (at, by) = (flip.0 as usize % BLOCK, flip.1 | 1);
                bytes[at] ^= by;
                prop_assert!(unseal(&mut bytes, BLOCK_MAGIC, Some(block as u32)).is_err(), "byte {} changed", at);
            }
            prop_assert!((0..800).all(|cluster| read.of(cluster) == model.get(&cluster).copied()));
            prop_assert_eq!(read.in_use(), table.in_use());
        }

        #[test]
        fn a_hostile_block_is_refused_or_harmless(bytes in proptest::collection::vec(any::<u8>(), BLOCK)) {
            let mut table = SlotTable::new(600, 1 << 20);
            let _ = table.decode(0, &bytes);
            let _ = table.decode(1, &bytes);
            prop_assert!(table.in_use() <= 600);
        }
    }

    #[test]
    fn neighbours_get_neighbouring_slots_whenever_they_come_and_others_those_that_are_left_in_turn() {
        let mut table = SlotTable::new(200, 100);
        assert!([7, 99, 8, 6].into_iter().all(|cluster| table.reserve(cluster) == Some(cluster)));
        let given: Vec<_> = (100..150).map(|cluster| table.reserve(cluster).unwrap()).collect();
        assert_eq!(given[..8], [0, 1, 2, 3, 4, 5, 9, 10]);
        assert!(given[8..].windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert_eq!(table.reserve(20), Some(53), "its own is taken");
    }
}
