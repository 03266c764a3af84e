//! A batch: the ranges that one write of the redo log makes durable. All of it counts, or nothing.
//!
//! It begins at a multiple of 512 bytes, so that no write touches a sector in which an earlier batch lies. Layout: `FORMAT.md`.

use thiserror::Error;

use super::ranges::{ALIGN, RANGE_HEADER, Ranges};

/// Batches begin at multiples of this, in bytes: a sector.
pub(crate) const SECTOR: u64 = 512;
/// What a batch takes beside its ranges.
pub(crate) const HEADER: usize = 56;
const MAGIC: [u8; 4] = *b"RVMB";
const CRC_AT: usize = HEADER - 4;

/// What tells a batch that counts from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The log's.
    pub(crate) key: u64,
    /// The log's, as of the last recovery.
    pub(crate) generation: u64,
    /// Where it begins: bytes since the log was made, laps included.
    pub(crate) position: u64,
}

/// The header of a batch, found whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) place: Place,
    /// Bytes, the header included, the padding to the next sector not.
    pub(crate) length: u64,
    body_sum: u64,
    ranges: u32,
}

impl Head {
    /// A batch without ranges, which no commit makes: its writer saw all before it made durable. With it, a batch before it that does not verify is
    /// damage, and no commit that a cut tore; and a log can be gone on with as it is.
    pub(crate) fn is_seal(&self) -> bool {
        self.ranges == 0
    }
}

/// Why bytes are not the rest of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum BodyError {
    /// Torn, rotten, or never written.
    #[error("its checksum does not match")]
    Sum,
    /// The checksum matches and what it covers makes no sense.
    #[error("its ranges do not add up")]
    Malformed,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

/// What tells the ranges of a batch from others: the first 8 bytes of their BLAKE3.
///
/// A CRC would not do. It is linear: bytes that end in their own CRC, as records often do, all leave it in the same state, so that an older record in the
/// sectors that a cut did not write would pass for the new one.
fn sum(body: &[u8]) -> u64 {
    blake3::hash(body).as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Encodes a batch, padded to whole sectors.
pub(crate) fn encode(place: Place, ranges: &Ranges) -> Vec<u8> {
    let length = HEADER + ranges.encoded();
    let mut bytes = Vec::with_capacity(length.next_multiple_of(SECTOR as usize));
    bytes.resize(HEADER, 0);
    for (region, offset, data) in ranges.iter() {
        bytes.extend_from_slice(&region.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    }
    let body_sum = sum(&bytes[HEADER..]);
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &MAGIC);
    put(4, &(ranges.len() as u32).to_le_bytes());
    put(8, &place.key.to_le_bytes());
    put(16, &place.generation.to_le_bytes());
    put(24, &place.position.to_le_bytes());
    put(32, &(length as u64).to_le_bytes());
    put(40, &body_sum.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..CRC_AT]);
    bytes[CRC_AT..HEADER].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
    bytes
}

/// The header at the beginning of `bytes`, if there is one.
pub(crate) fn decode_head(bytes: &[u8]) -> Option<Head> {
    let header = bytes.first_chunk::<HEADER>()?;
    if header[..4] != MAGIC || u32_at(header, CRC_AT)? != crc32fast::hash(&header[..CRC_AT]) {
        return None;
    }
    let place = Place { key: u64_at(header, 8)?, generation: u64_at(header, 16)?, position: u64_at(header, 24)? };
    let length = u64_at(header, 32)?;
    (length >= HEADER as u64).then_some(Head {
        place,
        length,
        body_sum: u64_at(header, 40)?,
        ranges: u32_at(header, 4)?,
    })
}

/// Adds the ranges of `body`, what lies behind the header up to the batch's length, to `ranges`. Nothing is added after an error.
pub(crate) fn decode_body(head: &Head, body: &[u8], ranges: &mut Ranges) -> Result<(), BodyError> {
    if sum(body) != head.body_sum && !super::fault::seeded("the checksum of a batch is not looked at") {
        return Err(BodyError::Sum);
    }
    let found = parse(head.ranges, body).ok_or(BodyError::Malformed)?;
    for (region, offset, data) in found {
        let keep_the_oldest = super::fault::seeded("the oldest value of a byte is kept");
        if !(keep_the_oldest && ranges.iter().any(|(r, o, _)| (r, o) == (region, offset))) {
            ranges.insert(region, offset, data);
        }
    }
    Ok(())
}

/// Each of `count` ranges; together they are all of `body`.
fn parse(count: u32, mut body: &[u8]) -> Option<Vec<(u64, u64, &[u8])>> {
    // By what is there and not by what is said: the count is hostile.
    let mut found = Vec::with_capacity((count as usize).min(body.len() / RANGE_HEADER));
    for _ in 0..count {
        let (region, offset, length) = (u64_at(body, 0)?, u64_at(body, 8)?, u64_at(body, 16)?);
        let rest = body.get(RANGE_HEADER..)?;
        let length = usize::try_from(length).ok().filter(|length| (1..=rest.len()).contains(length))?;
        offset.checked_add(length as u64)?;
        found.push((region, offset, rest.get(..length)?));
        body = rest.get(length.next_multiple_of(ALIGN)..)?;
    }
    body.is_empty().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLACE: Place = Place { key: 77, generation: 3, position: 1024 };

    fn ranges() -> Ranges {
        let mut ranges = Ranges::default();
        ranges.insert(1, 100, &[1; 13]);
        ranges.insert(2, 0, &[2; 600]);
        ranges.insert(1, 113, &[3; 8]);
        ranges
    }

    fn decode(bytes: &[u8]) -> Option<(Head, Result<Ranges, BodyError>)> {
        let head = decode_head(bytes)?;
        let body = bytes.get(HEADER..usize::try_from(head.length).ok()?)?;
        let mut found = Ranges::default();
        let decoded = decode_body(&head, body, &mut found).map(|()| found);
        Some((head, decoded))
    }

    #[test]
    fn a_batch_comes_back_and_fills_whole_sectors() {
        let bytes = encode(PLACE, &ranges());
        assert!(bytes.len().is_multiple_of(SECTOR as usize));
        let (head, found) = decode(&bytes).unwrap();
        assert_eq!(head.place, PLACE);
        assert_eq!(found.unwrap(), ranges());
    }

    /// With a CRC-32 of the body this was taken for a commit, of bytes that a later one had overwritten.
    #[test]
    fn an_older_record_with_a_crc_of_its_own_does_not_pass_for_the_one_that_was_torn() {
        let record = |version: u8| {
            let mut record = vec![7; 1500];
            record[1200] = version;
            record.extend(crc32fast::hash(&record).to_le_bytes());
            record
        };
        let batch = |place, version| {
            let mut ranges = Ranges::default();
            ranges.insert(1, 0, &record(version));
            encode(place, &ranges)
        };
        let (older, newer) = (batch(Place { position: 0, ..PLACE }, 1), batch(PLACE, 2));
        let torn = [&newer[..SECTOR as usize], &older[SECTOR as usize..]].concat();
        assert_eq!(decode(&torn).unwrap().1, Err(BodyError::Sum));
        assert!(decode(&newer).unwrap().1.is_ok());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_shows(at in 0..HEADER + 24 * 3 + 16 + 600 + 8, bit in 0..8) {
            let mut bytes = encode(PLACE, &ranges());
            bytes[at] ^= 1u8 << bit;
            let found = decode(&bytes);
            prop_assert!(!matches!(found, Some((_, Ok(_)))), "{found:?}");
        }

        #[test]
        fn arbitrary_ranges_under_a_valid_checksum_do_no_harm(count in any::<u32>(), body in prop::collection::vec(any::<u8>(), 0..200)) {
            let head = Head { place: PLACE, length: 0, body_sum: sum(&body), ranges: count };
            let mut found = Ranges::default();
            if decode_body(&head, &body, &mut found).is_err() {
                prop_assert!(found.is_empty());
            }
            let small = Head { ranges: count % 4, ..head };
            let _ = decode_body(&small, &body, &mut found);
        }
    }
}
