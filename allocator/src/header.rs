//! The header of a region's file: what it is, and whether its content is that of a context.
//!
//! Two copies are written in turn, each with a sequence number and a CRC in a sector of its own, so that a cut during a write
//! leaves the other one. Layout: `FORMAT.md`.

use thiserror::Error;
use vfs::VfsFile;

use crate::catalog::RegionInfo;
use crate::medium::MediumKind;
use crate::region::Kind;

/// Bytes that one copy takes: a page, so that the copies never share a sector of a disk.
pub const COPY_LEN: usize = 4096;
/// Where the block with the holder's pid lies.
pub(crate) const HOLDER_OFFSET: u64 = 2 * COPY_LEN as u64;
/// Where data may begin at the earliest.
pub const MIN_DATA_OFFSET: u64 = 4 * COPY_LEN as u64;
const MAGIC: [u8; 8] = *b"PERDREGN";
/// The version that this code writes.
pub const VERSION: u32 = 1;
/// Bytes in use in a copy: one sector.
const USED: usize = 512;
const CRC_AT: usize = USED - 4;
const BOUND_AT: usize = 80;
const NAME_AT: usize = 96;
/// No region is stamped so often: counting on from here cannot overflow.
const MAX_SEQUENCE: u64 = u64::MAX / 2;

/// Why a copy cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// Not a header, or its CRC does not match.
    #[error("damaged")]
    Damaged,
    /// From a newer perdure.
    #[error("of version {0}, newer than this perdure knows")]
    Newer(u32),
}

/// One copy, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Grows with each write; the higher of two valid copies counts.
    pub sequence: u64,
    /// The pool that the region belongs to.
    pub pool: u64,
    /// The region.
    pub id: u64,
    /// As in the catalog; for recovery by hand.
    pub kind: Kind,
    /// As in the catalog; for recovery by hand.
    pub medium: MediumKind,
    /// As of this write; the catalog rules.
    pub size: u64,
    /// Where the data begins in the file.
    pub data_offset: u64,
    /// `clean@N`: the content is exactly that of context N.
    pub clean: Option<u64>,
    /// The log of recoverable memory (its region's id) that may hold changes which are not in the data yet; 0: none.
    pub bound: u64,
    /// As of this write; the catalog rules.
    pub name: String,
}

impl Header {
    pub(crate) fn of(pool: u64, region: &RegionInfo) -> Self {
        Self {
            sequence: 0,
            pool,
            id: region.id,
            kind: region.kind,
            medium: region.medium,
            size: region.size,
            data_offset: region.data_offset,
            clean: None,
            bound: 0,
            name: region.name.to_string(),
        }
    }

    pub(crate) fn encode(&self) -> [u8; COPY_LEN] {
        let mut bytes = [0; COPY_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &self.pool.to_le_bytes());
        put(32, &self.id.to_le_bytes());
        put(40, &[self.kind.code(), self.medium.code(), u8::from(self.clean.is_some())]);
        put(48, &self.size.to_le_bytes());
        put(56, &self.data_offset.to_le_bytes());
        put(64, &self.clean.unwrap_or(0).to_le_bytes());
        put(BOUND_AT, &self.bound.to_le_bytes());
        // A name has at most 255 bytes.
        let name = &self.name.as_bytes()[..self.name.len().min(255)];
        put(72, &[name.len() as u8]);
        put(NAME_AT, name);
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..USED].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Takes any bytes.
    ///
    /// # Errors
    /// [`HeaderError`] says why this is not a header.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let used = bytes.first_chunk::<USED>().ok_or(HeaderError::Damaged)?;
        let u32_at = |at: usize| used[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let u64_at = |at: usize| used[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        if used[..8] != MAGIC || u32_at(CRC_AT) != crc32fast::hash(&used[..CRC_AT]) {
            return Err(HeaderError::Damaged);
        }
        match u32_at(8) {
            VERSION => {}
            0 => return Err(HeaderError::Damaged),
            newer => return Err(HeaderError::Newer(newer)),
        }
        let clean = match used[42] {
            0 => None,
            1 => Some(u64_at(64)),
            _ => return Err(HeaderError::Damaged),
        };
        let sequence = u64_at(16);
        if sequence > MAX_SEQUENCE {
            return Err(HeaderError::Damaged);
        }
        let name = &used[NAME_AT..NAME_AT + usize::from(used[72])];
        Ok(Self {
            sequence,
            pool: u64_at(24),
            id: u64_at(32),
            kind: Kind::from_code(used[40]).ok_or(HeaderError::Damaged)?,
            medium: MediumKind::from_code(used[41]).ok_or(HeaderError::Damaged)?,
            size: u64_at(48),
            data_offset: u64_at(56),
            clean,
            bound: u64_at(BOUND_AT),
            name: String::from_utf8(name.to_vec()).map_err(|_| HeaderError::Damaged)?,
        })
    }

    /// Whether this is the header of `region` of `pool`. Name and size may be those of an earlier time.
    pub(crate) fn belongs_to(&self, pool: u64, region: &RegionInfo) -> bool {
        self.pool == pool
            && self.id == region.id
            && self.kind == region.kind
            && self.medium == region.medium
            && self.data_offset == region.data_offset
    }
}

/// Both copies as they were read.
#[derive(Debug, Clone)]
pub(crate) struct Copies(pub(crate) [Result<Header, HeaderError>; 2]);

impl Copies {
    /// One read of both. Damage is looked at twice: a reader that holds no lease may meet a write half done.
    pub(crate) fn read(file: &dyn VfsFile) -> std::io::Result<Self> {
        let mut copies = Self::read_once(file)?;
        if copies.0.iter().any(Result::is_err) {
            copies = Self::read_once(file)?;
        }
        Ok(copies)
    }

    fn read_once(file: &dyn VfsFile) -> std::io::Result<Self> {
        let mut bytes = [0; 2 * COPY_LEN];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(Self([Header::decode(&bytes[..COPY_LEN]), Header::decode(&bytes[COPY_LEN..])]))
    }

    /// The slot (0 or 1) and the header that counts.
    pub(crate) fn newest(&self) -> Option<(usize, &Header)> {
        match &self.0 {
            [Ok(a), Ok(b)] if b.sequence > a.sequence => Some((1, b)),
            [Ok(a), _] => Some((0, a)),
            [Err(_), Ok(b)] => Some((1, b)),
            [Err(_), Err(_)] => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            sequence: 7,
            pool: 0x1122_3344_5566_7788,
            id: 9,
            kind: Kind::Ram,
            medium: MediumKind::Nvdimm,
            size: 1 << 33,
            data_offset: 1 << 21,
            clean: Some(0),
            bound: 12,
            name: "y".repeat(255),
        }
    }

    #[test]
    fn a_header_comes_back_and_fits_a_sector() {
        let bytes = header().encode();
        assert!(bytes[USED..].iter().all(|&b| b == 0));
        assert_eq!(Header::decode(&bytes).unwrap(), header());
        let unclean = Header { clean: None, ..header() };
        assert_eq!(Header::decode(&unclean.encode()).unwrap(), unclean);
    }

    #[test]
    fn a_newer_header_is_not_called_damaged() {
        let mut bytes = header().encode();
        bytes[8] = 2;
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..USED].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Newer(2)));
    }

    #[test]
    fn the_newer_of_two_copies_counts_and_a_damaged_one_does_not() {
        let with = |sequence| Ok(Header { sequence, ..header() });
        assert_eq!(Copies([with(3), with(2)]).newest().unwrap().0, 0);
        assert_eq!(Copies([with(3), with(4)]).newest().unwrap().0, 1);
        assert_eq!(Copies([Err(HeaderError::Damaged), with(4)]).newest().unwrap().0, 1);
        assert_eq!(Copies([with(1), Err(HeaderError::Damaged)]).newest().unwrap().0, 0);
        assert!(Copies([Err(HeaderError::Damaged), Err(HeaderError::Damaged)]).newest().is_none());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_the_sector_shows(at in 0..USED, bit in 0..8) {
            let mut bytes = header().encode();
            bytes[at] ^= 1u8 << bit;
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn arbitrary_fields_under_a_valid_crc_do_no_harm(mut bytes in prop::collection::vec(any::<u8>(), USED)) {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
            let crc = crc32fast::hash(&bytes[..CRC_AT]);
            bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
            let _ = Header::decode(&bytes);
            let _ = Header::decode(&bytes[..100]);
        }
    }
}
