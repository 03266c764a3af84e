//! The bytes of the table `budget`: a header and entries, each in a sector of its own with a CRC. See `FORMAT.md`.
//!
//! It is not durable, and is never flushed: after an outage nobody of it lives. What cannot be read is left out, and whose it was
//! registers again with its next report.

use std::io;

use vfs::VfsFile;

use super::{Demand, SIZE_MOST, Share};
use crate::name::RegionName;

/// The table's name in the pool's directory.
pub const TABLE_FILE: &str = "budget";
/// The VMs that a table has room for.
pub(super) const ROWS_MOST: usize = 128;
const MAGIC: [u8; 8] = *b"PERDBUDG";
const VERSION: u32 = 1;
const SECTOR: usize = 512;
const CRC_AT: usize = SECTOR - 4;
const NAME_AT: usize = 128;

/// A VM in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its RAM region.
    pub region: RegionName,
    /// Its process.
    pub pid: u32,
    /// When that process began, in clock ticks since the machine did: tells it from a later one with the same id.
    pub(super) started: u64,
    /// What it said, and what it is to have.
    pub demand: Demand,
    /// What it may have in memory now, in bytes.
    pub granted: u64,
    /// When it said so, in milliseconds since the machine began (`CLOCK_BOOTTIME`).
    pub written_at: u64,
}

/// The whole table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// What was divided last; `None`: there was no limit.
    pub(super) limit: Option<u64>,
    /// When it was divided, in milliseconds as [`Row::written_at`].
    pub(super) divided_at: u64,
    /// Until then grants may be in force that the table does not show.
    pub(super) unsettled_until: u64,
    pub(super) rows: Vec<Row>,
    /// Something was there that cannot be read.
    pub(super) damaged: bool,
}

impl Table {
    pub(super) fn read(file: &dyn VfsFile) -> io::Result<Self> {
        let most = SECTOR * (1 + ROWS_MOST);
        let length = usize::try_from(file.len()?).unwrap_or(most).min(most);
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(Self::decode(&bytes))
    }

    /// Takes any bytes.
    fn decode(bytes: &[u8]) -> Self {
        let mut sectors = bytes.chunks(SECTOR);
        let mut table = sectors.next().and_then(decode_header).unwrap_or(Self { damaged: true, ..Self::default() });
        for sector in sectors.filter(|sector| sector.iter().any(|byte| *byte != 0)) {
            match decode_row(sector) {
                Some(row) if table.find(&row.region).is_none() => table.rows.push(row),
                _ => table.damaged = true,
            }
        }
        table
    }

    /// Writes all of it. A crash on the way leaves a table that is partly old, or partly damaged; both are put right by the next reports.
    pub(super) fn write(&self, file: &dyn VfsFile) -> io::Result<()> {
        let bytes = self.encode();
        file.write_all_at(&bytes, 0)?;
        file.set_len(bytes.len() as u64)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = encode_header(self).to_vec();
        self.rows.iter().for_each(|row| bytes.extend_from_slice(&encode_row(row)));
        bytes
    }

    pub(super) fn find(&self, region: &RegionName) -> Option<&Row> {
        self.rows.iter().find(|row| row.region == *region)
    }

    /// In the order of names, whatever the order of coming: so a division does not depend on it.
    pub(super) fn put(&mut self, row: Row) {
        match self.rows.binary_search_by(|other| other.region.cmp(&row.region)) {
            Ok(at) => self.rows[at] = row,
            Err(at) => self.rows.insert(at, row),
        }
    }
}

/// A sector that is being filled from its beginning.
struct Fields {
    bytes: [u8; SECTOR],
    at: usize,
}

impl Fields {
    fn new() -> Self {
        Self { bytes: [0; SECTOR], at: 0 }
    }

    fn put(mut self, field: &[u8]) -> Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    fn u64(self, value: u64) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u16(self, value: u16) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn sealed(mut self) -> [u8; SECTOR] {
        let crc = crc32fast::hash(&self.bytes[..CRC_AT]);
        self.bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        self.bytes
    }
}

/// A sector that is being read from its beginning.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    /// `None` unless it is a sector with a valid CRC.
    fn open(sector: &[u8]) -> Option<Reader<'_>> {
        let (fields, crc) = sector.split_last_chunk::<4>()?;
        (sector.len() == SECTOR && crc32fast::hash(fields) == u32::from_le_bytes(*crc)).then_some(Reader(fields))
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    /// A number of bytes; `None` if no machine has as many.
    fn size(&mut self) -> Option<u64> {
        self.u64().filter(|size| *size <= SIZE_MOST)
    }
}

fn encode_header(table: &Table) -> [u8; SECTOR] {
    let (limit, limited) = (table.limit.unwrap_or(0), u32::from(table.limit.is_some()));
    let fields = Fields::new().put(&MAGIC).u32(VERSION).u32(limited).u64(limit);
    fields.u64(table.divided_at).u64(table.unsettled_until).sealed()
}

/// A table without rows. One of another version is as good as none: nothing in it outlives the processes that wrote it.
fn decode_header(sector: &[u8]) -> Option<Table> {
    let mut fields = Reader::open(sector)?;
    let known = fields.take()? == MAGIC && fields.u32()? == VERSION;
    let (limited, limit) = (fields.u32()?, fields.u64()?);
    let limit = (limited == 1).then_some(limit);
    let (divided_at, unsettled_until) = (fields.u64()?, fields.u64()?);
    known.then(|| Table { limit, divided_at, unsettled_until, rows: Vec::new(), damaged: false })
}

fn encode_row(row: &Row) -> [u8; SECTOR] {
    let Row { region, pid, started, demand, granted, written_at } = row;
    let Demand { floor, cap, resident, faults, near_misses, share } = *demand;
    let Share { target, rest, patience, given, needed } = share;
    let name = region.as_str().as_bytes();
    let fields = Fields::new().u32(*pid).u32(name.len() as u32).u64(*started).u64(*written_at);
    let fields = fields.u64(floor).u64(cap).u64(resident).u64(target).u64(*granted);
    let fields = fields.u32(faults).u32(near_misses).u16(rest).u16(patience).u32(0).u64(given).u64(needed);
    Fields { at: NAME_AT, ..fields }.put(name).sealed()
}

fn decode_row(sector: &[u8]) -> Option<Row> {
    let mut fields = Reader::open(sector)?;
    let (pid, length) = (fields.u32()?, fields.u32()?);
    let (started, written_at) = (fields.u64()?, fields.u64()?);
    let (floor, cap, resident, target, granted) =
        (fields.size()?, fields.size()?, fields.size()?, fields.size()?, fields.size()?);
    let (faults, near_misses) = (fields.u32()?, fields.u32()?);
    let (rest, patience, _) = (fields.u16()?, fields.u16()?, fields.u32()?);
    let share = Share { target, rest, patience, given: fields.u64()?, needed: fields.u64()? };
    let name = sector.get(NAME_AT..CRC_AT)?.get(..usize::try_from(length).ok()?)?;
    let region = str::from_utf8(name).ok()?.parse().ok()?;
    let demand = Demand { floor, cap, resident, faults, near_misses, share };
    (floor <= cap).then_some(Row { region, pid, started, demand, granted, written_at })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(name: &str, seed: u64) -> Row {
        let share = Share { target: seed + 2, rest: 5, patience: 6, given: seed, needed: 9 };
        let demand = Demand { floor: seed, cap: seed + 7, resident: 3, faults: 11, near_misses: 10, share };
        Row { region: name.parse().unwrap(), pid: 42, started: 77, demand, granted: seed + 1, written_at: 99 }
    }

    fn table() -> Table {
        let mut table = Table { limit: Some(8 << 30), divided_at: 5, unsettled_until: 6, ..Table::default() };
        table.put(row("web/ram", 1 << 30));
        table.put(row(&format!("{0}/{0}/{0}/{1}", "a".repeat(64), "b".repeat(60)), 7));
        table
    }

    #[test]
    fn a_table_comes_back_as_it_was_written_in_the_order_of_names() {
        let table = table();
        assert_eq!(Table::decode(&table.encode()), table);
        assert_eq!(table.rows[1].region.as_str(), "web/ram");
        assert_eq!(table.rows[0].region.as_str().len(), 255);
        assert_eq!(table.encode().len(), 3 * SECTOR);
    }

    #[test]
    fn the_bytes_are_as_written_down() {
        let bytes = table().encode();
        assert_eq!(&bytes[..8], b"PERDBUDG");
        assert_eq!(bytes[8..24], [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        let web = &bytes[2 * SECTOR..];
        assert_eq!(web[..8], [42, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(web[24..32], (1_u64 << 30).to_le_bytes(), "floor");
        assert_eq!(web[56..64], ((1_u64 << 30) + 1).to_le_bytes(), "granted");
        assert_eq!(&web[128..135], b"web/ram");
    }

    #[test]
    fn a_floor_above_its_cap_is_nonsense() {
        let mut table = table();
        table.rows[1].demand.floor = table.rows[1].demand.cap + 1;
        let read = Table::decode(&table.encode());
        assert_eq!((read.rows.len(), read.damaged), (1, true));
    }

    proptest! {
        #[test]
        fn damage_to_one_entry_costs_no_other(at in 0..3 * SECTOR, bit in 0..8) {
            let whole = table();
            let mut bytes = whole.encode();
            bytes[at] ^= 1_u8 << bit;
            let read = Table::decode(&bytes);
            prop_assert!(read.damaged);
            let hit = at / SECTOR;
            for (index, row) in whole.rows.iter().enumerate() {
                prop_assert_eq!(read.find(&row.region).is_some(), index + 1 != hit);
            }
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert!(Table::decode(&bytes).damaged);
        }

        #[test]
        fn nonsense_under_a_valid_crc_is_left_out(fields in prop::collection::vec(any::<u8>(), CRC_AT)) {
            let sector = Fields::new().put(&fields).sealed();
            let mut bytes = table().encode();
            bytes.extend_from_slice(&sector);
            let read = Table::decode(&bytes);
            prop_assert!(read.rows.len() == 2 || read.rows.iter().all(|row| row.demand.floor <= row.demand.cap));
        }
    }
}
