//! The undo engine (Vista): old values go to a log in memory that persists by itself; a store and a fence commit.
//!
//! Each running transaction has a slot of the log to itself, so threads share nothing but the list of free ones:
//!
//! ```text
//!   slot:  sequence number │ record: old bytes of a range │ record │ …
//! ```
//!
//! A record counts if it bears the slot's sequence number and its CRC is right, and it is persistent before the bytes that it saves are
//! changed. A commit makes the new bytes persistent, then stores the next sequence number: with that one word all records are void. To roll
//! back is to copy the old bytes back and to store the next number, too; interrupted anywhere, it is done again and comes to the same.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::RvmError;
use super::fault::seeded;
use super::memory::{Slot, Working};
use super::redo::{Find, Recovery};
use super::status::{RECORDS_AT, Status, damaged};
use crate::region::Region;

/// What a record takes beside the old bytes.
const HEADER: usize = 40;
/// Records begin at multiples of a cache line, so that none is written back twice.
const LINE: usize = 64;
/// The least that a slot has, in bytes.
pub(crate) const LEAST_SLOT: u64 = 512;
/// The most slots that a log has.
pub(crate) const MOST_SLOTS: u32 = 4096;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The slots of a log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots {
    pub(crate) count: u32,
    length: usize,
    key: u64,
}

impl Slots {
    pub(crate) fn of(log: &Region, status: &Status) -> Result<Self, RvmError> {
        let count = status.slots;
        let room = log.size().saturating_sub(RECORDS_AT);
        let length = room.checked_div(u64::from(count)).unwrap_or(0) / LINE as u64 * LINE as u64;
        if count > MOST_SLOTS || length < LEAST_SLOT {
            return Err(damaged(log, format!("{count} slots do not fit it")));
        }
        let length = usize::try_from(length).map_err(|_| damaged(log, "it is too long to be mapped"))?;
        Ok(Self { count, length, key: status.key })
    }

    /// Where slot `number` lies in the region's data.
    fn range(&self, number: u32) -> Range<usize> {
        let start = RECORDS_AT as usize + number as usize * self.length;
        start..start + self.length
    }
}

/// The CRC of a record: over the log's key, the slot, the header behind the CRC, and the old bytes.
fn crc(key: u64, slot: u32, header: &[u8], old: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let mut salt = [0; 12];
    salt[..8].copy_from_slice(&key.to_le_bytes());
    salt[8..].copy_from_slice(&slot.to_le_bytes());
    hasher.update(&salt);
    hasher.update(header);
    hasher.update(old);
    hasher.finalize()
}

fn encode_header(slots: &Slots, slot: u32, sequence: u64, region: u64, offset: u64, old: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&(old.len() as u32).to_le_bytes());
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    header[16..24].copy_from_slice(&region.to_le_bytes());
    header[24..32].copy_from_slice(&offset.to_le_bytes());
    let crc = crc(slots.key, slot, &header[4..], old);
    header[..4].copy_from_slice(&crc.to_le_bytes());
    header
}

/// A record that counts.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    region: u64,
    offset: u64,
    old: &'a [u8],
}

/// The sequence number of a slot, and its records that count, in the order in which they were made. Takes any bytes.
fn decode<'a>(slots: &Slots, slot: u32, bytes: &'a [u8]) -> (u64, Vec<Record<'a>>) {
    let u32_at = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let u64_at = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let sequence = u64_at(bytes, 0).unwrap_or(0);
    let record = |at: usize| {
        let header = bytes.get(at..at.checked_add(HEADER)?)?;
        let length = u32_at(header, 4)? as usize;
        let old = bytes.get(at + HEADER..)?.get(..length)?;
        let counts = u64_at(header, 8)? == sequence;
        let whole = u32_at(header, 0)? == crc(slots.key, slot, header.get(4..)?, old) || seeded("a torn record counts");
        let record = Record { region: u64_at(header, 16)?, offset: u64_at(header, 24)?, old };
        (counts && whole && length > 0).then_some((record, (at + HEADER + length).next_multiple_of(LINE)))
    };
    let mut found = Vec::new();
    let mut at = LINE;
    while let Some((record, next)) = record(at) {
        found.push(record);
        at = next;
    }
    (sequence, found)
}

/// Rolls back every transaction that was running. By the files, and not by a mapping: then all of it is durable when this returns,
/// whatever the medium.
pub(crate) fn recover(log: &Region, status: &Status, find: &Find<'_>) -> Result<Recovery, RvmError> {
    let slots = Slots::of(log, status)?;
    let mut recovery = Recovery::default();
    let mut running = Vec::new();
    for number in 0..slots.count {
        let mut bytes = vec![0; slots.length];
        log.read_at(&mut bytes, slots.range(number).start as u64)?;
        let (sequence, records) = decode(&slots, number, &bytes);
        if !records.is_empty() {
            check(log, &records, find)?;
            running.push((number, sequence, bytes));
        }
        if seeded("a recovery looks at one slot alone") {
            break;
        }
    }
    if seeded("a recovery voids the records before the old bytes are durable") {
        running.iter().try_for_each(|(number, sequence, _)| void(log, &slots, *number, *sequence))?;
        log.sync()?;
    }
    let mut touched: Vec<Arc<Region>> = Vec::new();
    for (number, _, bytes) in &running {
        for record in decode(&slots, *number, bytes).1.iter().rev() {
            let Some(region) = find(record.region)? else {
                recovery.orphans += 1;
                continue;
            };
            region.write_at(record.old, record.offset)?;
            recovery.bytes += record.old.len() as u64;
            if touched.iter().all(|other| other.id() != region.id()) {
                touched.push(region);
            }
        }
        recovery.replayed += 1;
    }
    if !seeded("a recovery does not flush the regions") {
        touched.iter().try_for_each(|region| region.sync())?;
    }
    running.iter().try_for_each(|(number, sequence, _)| void(log, &slots, *number, *sequence))?;
    if !running.is_empty() {
        log.sync()?;
    }
    Ok(recovery)
}

/// Voids the records of a slot.
fn void(log: &Region, slots: &Slots, number: u32, sequence: u64) -> Result<(), RvmError> {
    let next = sequence.wrapping_add(1).to_le_bytes();
    Ok(log.write_at(&next, slots.range(number).start as u64)?)
}

fn check(log: &Region, records: &[Record<'_>], find: &Find<'_>) -> Result<(), RvmError> {
    for record in records {
        let end = record.offset.checked_add(record.old.len() as u64);
        if let Some(region) = find(record.region)?
            && end.is_none_or(|end| end > region.size())
        {
            let (length, offset) = (record.old.len(), record.offset);
            return Err(damaged(log, format!("{length} bytes at {offset} are not all in region {}", region.name())));
        }
    }
    Ok(())
}

#[derive(Debug)]
pub(crate) struct Undo {
    memory: Box<dyn Working>,
    slots: Slots,
    /// The slots that no transaction has.
    free: Mutex<Vec<u32>>,
}

impl Undo {
    /// Over the mapped log, which was recovered.
    pub(crate) fn new(memory: Box<dyn Working>, slots: Slots) -> Self {
        let free = Mutex::new((0..slots.count).rev().collect());
        Self { memory, slots, free }
    }

    /// A slot, and with it the right to change memory.
    pub(crate) fn begin(&self) -> Result<Journal<'_>, RvmError> {
        let slots = self.slots.count;
        let number = lock(&self.free).pop().ok_or(RvmError::TooManyTransactions { slots })?;
        // SAFETY-relevant, and kept by `free`: a number is in one journal at most.
        let slot = slot_of(&*self.memory, self.slots.range(number));
        let sequence =
            slot.bytes(0, 8).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Ok(Journal { undo: self, number, slot, sequence, tail: LINE, records: Vec::new() })
    }

    /// Runs `save` over the log's memory while no transaction runs and none can begin.
    pub(crate) fn quiet<R>(&self, save: impl FnOnce(&dyn Working) -> Result<R, RvmError>) -> Result<R, RvmError> {
        let free = lock(&self.free);
        let running = (self.slots.count as usize).saturating_sub(free.len());
        if running > 0 {
            return Err(RvmError::Running { running });
        }
        save(&*self.memory)
    }

    /// What a transaction's records may take.
    pub(crate) fn most(&self) -> u64 {
        (self.slots.length - LINE) as u64
    }
}

#[allow(unsafe_code)]
fn slot_of(memory: &dyn Working, range: Range<usize>) -> Slot<'_> {
    // SAFETY: a slot's number is taken from the list of free ones by `begin`, and comes back when its journal ends: nobody else
    // uses these bytes meanwhile.
    unsafe { Slot::new(memory, range) }
}

/// A range that was saved: which part of the transaction, where in it, and where in the slot its old bytes are.
#[derive(Debug, Clone, Copy)]
struct Saved {
    part: usize,
    at: usize,
    length: usize,
    old_at: usize,
}

/// The records of a running transaction. If it is forgotten, its slot stays taken, and recovery rolls it back.
#[derive(Debug)]
pub(crate) struct Journal<'u> {
    undo: &'u Undo,
    number: u32,
    slot: Slot<'u>,
    sequence: u64,
    tail: usize,
    records: Vec<Saved>,
}

impl Journal<'_> {
    /// What a range of so many bytes takes.
    pub(crate) fn cost(bytes: usize) -> u64 {
        (HEADER + bytes).next_multiple_of(LINE) as u64
    }

    /// What the records may still take.
    pub(crate) fn room(&self) -> u64 {
        self.slot.len().saturating_sub(self.tail) as u64
    }

    /// Saves `old`, the bytes at `at` of `part` that lie at `offset` of `region`; persistent when it returns. The caller looked for
    /// [`Journal::room`].
    pub(crate) fn save(&mut self, region: u64, offset: u64, old: &[u8], part: usize, at: usize) {
        let header = encode_header(&self.undo.slots, self.number, self.sequence, region, offset, old);
        let old_at = self.tail + HEADER;
        if !(self.slot.write(self.tail, &header) && self.slot.write(old_at, old)) {
            return;
        }
        self.slot.write_back(self.tail, HEADER + old.len());
        if !seeded("a record is not persistent before its bytes change") {
            self.slot.fence();
        }
        self.records.push(Saved { part, at, length: old.len(), old_at });
        self.tail = (old_at + old.len()).next_multiple_of(LINE);
    }

    /// The bytes that were saved, the newest record first: part, where in it, bytes.
    pub(crate) fn saved(&self) -> impl Iterator<Item = (usize, usize, &[u8])> {
        let bytes = |saved: &Saved| Some((saved.part, saved.at, self.slot.bytes(saved.old_at, saved.length)?));
        self.records.iter().rev().filter_map(bytes)
    }

    /// Fences what was written back, then voids the records: the bytes are what they are from here on.
    pub(crate) fn end(mut self) {
        if !self.records.is_empty() {
            if !seeded("a commit does not fence the new bytes") {
                self.slot.fence();
            }
            self.slot.store(0, self.sequence.wrapping_add(1));
            self.slot.write_back(0, 8);
            if !seeded("a commit's own word is not fenced") {
                self.slot.fence();
            }
        }
        lock(&self.undo.free).push(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLOTS: Slots = Slots { count: 4, length: 1024, key: 99 };

    fn slot(sequence: u64, records: &[(u64, u64, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; SLOTS.length];
        bytes[..8].copy_from_slice(&sequence.to_le_bytes());
        let mut at = LINE;
        for (region, offset, old) in records {
            let header = encode_header(&SLOTS, 2, sequence, *region, *offset, old);
            bytes[at..at + HEADER].copy_from_slice(&header);
            bytes[at + HEADER..at + HEADER + old.len()].copy_from_slice(old);
            at = (at + HEADER + old.len()).next_multiple_of(LINE);
        }
        bytes
    }

    #[test]
    fn records_come_back_in_order_and_a_new_sequence_number_voids_them() {
        let mut bytes = slot(7, &[(1, 100, &[1; 30]), (2, 0, &[2; 200])]);
        let (sequence, found) = decode(&SLOTS, 2, &bytes);
        assert_eq!(sequence, 7);
        let expected =
            [Record { region: 1, offset: 100, old: &[1; 30] }, Record { region: 2, offset: 0, old: &[2; 200] }];
        assert_eq!(found, expected);
        assert!(decode(&SLOTS, 1, &bytes).1.is_empty(), "of another slot");
        assert!(decode(&Slots { key: 98, ..SLOTS }, 2, &bytes).1.is_empty(), "of another log");
        bytes[0] = 8;
        assert!(decode(&SLOTS, 2, &bytes).1.is_empty());
    }

    proptest! {
        #[test]
        fn a_torn_record_ends_them(word in LINE / 8..(LINE + 256) / 8, value in any::<u64>()) {
            let mut bytes = slot(7, &[(1, 100, &[1; 24]), (2, 0, &[2; 152])]);
            let was = bytes.clone();
            bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
            let found = decode(&SLOTS, 2, &bytes).1;
            if bytes == was {
                prop_assert_eq!(found.len(), 2);
            } else {
                prop_assert_eq!(found.len(), usize::from(word * 8 >= 2 * LINE));
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&SLOTS, 0, &bytes);
        }
    }
}
