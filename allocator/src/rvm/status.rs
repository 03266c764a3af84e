//! What a log says of itself: whose it is, how it is laid out, and where what counts begins. Two copies, written in turn.

use crate::medium::MediumKind;
use crate::region::{Region, RegionError};
use crate::rvm::RvmError;
use crate::rvm::batch::SECTOR;

/// Bytes that one copy takes: a page, so that the copies never share a sector.
const COPY_LEN: usize = 4096;
/// Where the records begin.
pub(crate) const RECORDS_AT: u64 = 2 * COPY_LEN as u64;
/// Bytes in use in a copy: one sector.
const USED: usize = 512;
const CRC_AT: usize = USED - 4;
const MAGIC: [u8; 8] = *b"PERDRVML";
const VERSION: u32 = 2;
/// No log is written so often or so far: counting on from here cannot overflow.
const MOST: u64 = u64::MAX / 4;

/// How transactions are made atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// New values go to a log on a disk (LRVM).
    Redo,
    /// Old values go to a log in memory that persists by itself (Vista).
    Undo,
}

impl Engine {
    /// The one for regions on `medium`.
    #[must_use]
    pub fn of(medium: MediumKind) -> Self {
        match medium {
            MediumKind::File => Self::Redo,
            MediumKind::Dax | MediumKind::Nvdimm => Self::Undo,
        }
    }
}

/// One copy, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) sequence: u64,
    pub(crate) pool: u64,
    pub(crate) id: u64,
    /// Bytes of the region.
    pub(crate) size: u64,
    /// Random. Records without it are none: neither a stale one of an earlier log in the same place nor data that looks like one.
    pub(crate) key: u64,
    pub(crate) engine: Engine,
    /// A save of the memory (`nvdimm`) began and did not end.
    pub(crate) saving: bool,
    /// Redo: where the oldest batch that counts begins; a multiple of 512 that only grows.
    pub(crate) head: u64,
    /// Redo: grows with each recovery. A batch of an earlier generation that a cut left behind the end does not count.
    pub(crate) generation: u64,
    /// Undo: how many transactions may run at a time.
    pub(crate) slots: u32,
}

enum Decoded {
    Status(Status),
    Newer(u32),
    Damaged,
}

impl Status {
    fn encode(&self) -> [u8; USED] {
        let mut bytes = [0; USED];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &[if self.engine == Engine::Redo { 1 } else { 2 }, u8::from(self.saving)]);
        put(16, &self.sequence.to_le_bytes());
        put(24, &self.pool.to_le_bytes());
        put(32, &self.id.to_le_bytes());
        put(40, &self.size.to_le_bytes());
        put(48, &self.key.to_le_bytes());
        put(56, &self.head.to_le_bytes());
        put(64, &self.generation.to_le_bytes());
        put(72, &self.slots.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; USED]) -> Decoded {
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        if bytes[..8] != MAGIC || u32_at(CRC_AT) != crc32fast::hash(&bytes[..CRC_AT]) {
            return Decoded::Damaged;
        }
        let engine = match (u32_at(8), bytes[12]) {
            (VERSION, 1) => Engine::Redo,
            // The first version had another checksum in the batches of the redo engine, and was never released.
            (1 | VERSION, 2) => Engine::Undo,
            (0 | 1 | VERSION, _) => return Decoded::Damaged,
            (newer, _) => return Decoded::Newer(newer),
        };
        let status = Self {
            sequence: u64_at(16),
            pool: u64_at(24),
            id: u64_at(32),
            size: u64_at(40),
            key: u64_at(48),
            engine,
            saving: bytes[13] != 0,
            head: u64_at(56),
            generation: u64_at(64),
            slots: u32_at(72),
        };
        let aligned = status.head.is_multiple_of(SECTOR);
        let sane = status.sequence < MOST && status.head < MOST && status.generation < MOST && bytes[13] < 2;
        if sane && aligned { Decoded::Status(status) } else { Decoded::Damaged }
    }

    /// Reads and verifies what `log` says of itself. Nothing of it is believed but what fits the region.
    pub(crate) fn load(log: &Region) -> Result<Self, RvmError> {
        let mut newest: Option<Self> = None;
        for copy in 0..2 {
            let mut bytes = [0; USED];
            log.read_at(&mut bytes, copy * COPY_LEN as u64)?;
            match Self::decode(&bytes) {
                Decoded::Newer(version) => return Err(RvmError::LogNewer { name: log.name().clone(), version }),
                Decoded::Status(status) if newest.as_ref().is_none_or(|other| status.sequence > other.sequence) => {
                    newest = Some(status);
                }
                Decoded::Status(_) | Decoded::Damaged => {}
            }
        }
        let status = newest.ok_or_else(|| damaged(log, "neither copy of its status can be read"))?;
        status.fits(log)?;
        Ok(status)
    }

    fn fits(&self, log: &Region) -> Result<(), RvmError> {
        let name = || log.name().clone();
        if (self.pool, self.id) != (log.pool_id(), log.id()) {
            return Err(RvmError::ForeignLog { name: name(), pool: self.pool, id: self.id });
        }
        if self.size != log.size() {
            return Err(RvmError::LogLength { name: name(), says: self.size, has: log.size() });
        }
        if self.engine != Engine::of(log.medium_kind()) {
            return Err(damaged(log, "it is of another engine than its medium asks for"));
        }
        if self.saving {
            return Err(RvmError::SaveCut { name: name() });
        }
        Ok(())
    }

    /// Lays the first copy over the bytes of a log that is being made.
    pub(crate) fn put(&mut self, log: &mut [u8]) {
        self.sequence += 1;
        let at = self.sequence as usize % 2 * COPY_LEN;
        if let Some(copy) = log.get_mut(at..).and_then(|rest| rest.get_mut(..USED)) {
            copy.copy_from_slice(&self.encode());
        }
    }

    /// Overwrites the older copy, and returns once that is durable.
    pub(crate) fn store(&mut self, log: &Region) -> Result<(), RegionError> {
        self.sequence += 1;
        log.write_durable_at(&self.encode(), self.sequence % 2 * COPY_LEN as u64)
    }
}

pub(crate) fn damaged(log: &Region, reason: impl Into<String>) -> RvmError {
    RvmError::LogDamaged { name: log.name().clone(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn status() -> Status {
        Status {
            sequence: 3,
            pool: 4,
            id: 5,
            size: 1 << 20,
            key: 0x1234_5678_9abc_def0,
            engine: Engine::Redo,
            saving: false,
            head: 512 * 7,
            generation: 9,
            slots: 64,
        }
    }

    #[test]
    fn a_status_comes_back_and_a_newer_one_is_not_called_damaged() {
        let mut bytes = status().encode();
        assert!(matches!(Status::decode(&bytes), Decoded::Status(found) if found == status()));
        bytes[8] = 3;
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(Status::decode(&bytes), Decoded::Newer(3)));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_the_sector_shows(at in 0..USED, bit in 0..8) {
            let mut bytes = status().encode();
            bytes[at] ^= 1u8 << bit;
            prop_assert!(matches!(Status::decode(&bytes), Decoded::Damaged));
        }

        #[test]
        fn arbitrary_fields_under_a_valid_crc_do_no_harm(mut bytes in any::<[u8; 32]>(), tail in any::<[u8; 32]>()) {
            let mut sector = [0; USED];
            bytes[..8].copy_from_slice(&MAGIC);
            sector[..32].copy_from_slice(&bytes);
            sector[48..80].copy_from_slice(&tail);
            let crc = crc32fast::hash(&sector[..CRC_AT]);
            sector[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
            let _ = Status::decode(&sector);
        }
    }
}
