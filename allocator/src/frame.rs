//! Bytes that can be told from rubbish: a header with magic, version, length and CRCs, then a body.
//!
//! ```text
//!  0  magic       8 bytes, chosen by the user of the frame
//!  8  version     u32 little-endian, from 1
//! 12  reserved    u32, 0
//! 16  length      u64, of the body in bytes
//! 24  body CRC    u32, CRC-32 (IEEE 802.3, reflected, as in zlib) of the body
//! 28  header CRC  u32, CRC-32 of bytes 0..28
//! 32  body
//! ```
//!
//! The header has a CRC of its own, so that "made by a newer version" is never said of a damaged version number.

use thiserror::Error;

/// Bytes before the body.
pub const HEADER_LEN: usize = 32;

/// Tells one kind of frame from another.
pub type Magic = [u8; 8];

/// A frame that was found whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The version of the body's format.
    pub version: u32,
    /// The body.
    pub body: &'a [u8],
    /// What lies behind the frame.
    pub rest: &'a [u8],
}

/// A header that was found whole. The body is not yet known to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The version of the body's format.
    pub version: u32,
    /// The body's length in bytes; at most the `max_len` that was asked for.
    pub length: usize,
    body_crc: u32,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Fewer bytes than the header, or than the header says.
    #[error("it ends after {found} bytes, {needed} are needed")]
    Short {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// Something else, or nothing, was written here.
    #[error("it does not begin as expected (found {found:02x?}, expected {expected:02x?})")]
    Magic {
        /// The first bytes.
        found: Magic,
        /// What they should be.
        expected: Magic,
    },
    /// The header's CRC does not match.
    #[error("its header is damaged (CRC {found:08x}, computed {computed:08x})")]
    HeaderDamaged {
        /// As stored.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// From a version of perdure that is newer than this one.
    #[error("its version is {version}, this perdure knows up to {known}: use the newer perdure that made it")]
    Newer {
        /// As stored.
        version: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// Version 0 or a reserved field in use, though the CRC matches.
    #[error("its header is malformed (version {version}, reserved {reserved})")]
    Malformed {
        /// As stored.
        version: u32,
        /// As stored.
        reserved: u32,
    },
    /// Longer than its reader allows.
    #[error("its body has {length} bytes, at most {allowed} are allowed")]
    TooLong {
        /// As stored.
        length: u64,
        /// The most that is allowed.
        allowed: u64,
    },
    /// The body's CRC does not match.
    #[error("its body is damaged (CRC {found:08x}, computed {computed:08x})")]
    BodyDamaged {
        /// As stored.
        found: u32,
        /// As computed.
        computed: u32,
    },
}

/// Frames `body`. `version` counts from 1.
#[must_use]
pub fn encode(magic: Magic, version: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    let header_crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&header_crc.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The `N` bytes at `at`, which must lie in `bytes`; else zeros.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk::<N>());
    found.copied().unwrap_or([0; N])
}

/// Reads the header alone, for a reader that wants to know how much to read. Needs [`HEADER_LEN`] bytes.
///
/// # Errors
/// Every [`FrameError`] but [`FrameError::BodyDamaged`].
pub fn decode_header(bytes: &[u8], magic: Magic, max_version: u32, max_len: usize) -> Result<Header, FrameError> {
    if bytes.len() < HEADER_LEN {
        return Err(FrameError::Short { needed: HEADER_LEN as u64, found: bytes.len() as u64 });
    }
    let found: Magic = field(bytes, 0);
    if found != magic {
        return Err(FrameError::Magic { found, expected: magic });
    }
    let (found, computed) = (u32::from_le_bytes(field(bytes, 28)), crc32fast::hash(&bytes[..28]));
    if found != computed {
        return Err(FrameError::HeaderDamaged { found, computed });
    }
    let version = u32::from_le_bytes(field(bytes, 8));
    let reserved = u32::from_le_bytes(field(bytes, 12));
    if version > max_version {
        return Err(FrameError::Newer { version, known: max_version });
    }
    if version == 0 || reserved != 0 {
        return Err(FrameError::Malformed { version, reserved });
    }
    let stored = u64::from_le_bytes(field(bytes, 16));
    let length = usize::try_from(stored).ok().filter(|&length| length <= max_len);
    let length = length.ok_or(FrameError::TooLong { length: stored, allowed: max_len as u64 })?;
    Ok(Header { version, length, body_crc: u32::from_le_bytes(field(bytes, 24)) })
}

/// Reads the frame at the beginning of `bytes`. Allocates nothing; takes any bytes.
///
/// # Errors
/// [`FrameError`] says what is wrong.
pub fn decode(bytes: &[u8], magic: Magic, max_version: u32, max_len: usize) -> Result<Frame<'_>, FrameError> {
    let header = decode_header(bytes, magic, max_version, max_len)?;
    let behind = &bytes[HEADER_LEN..];
    let (body, rest) = behind.split_at_checked(header.length).ok_or(FrameError::Short {
        needed: (HEADER_LEN as u64).saturating_add(header.length as u64),
        found: bytes.len() as u64,
    })?;
    let computed = crc32fast::hash(body);
    if computed != header.body_crc {
        return Err(FrameError::BodyDamaged { found: header.body_crc, computed });
    }
    let version = header.version;
    Ok(Frame { version, body, rest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAGIC: Magic = *b"TESTTEST";

    #[test]
    fn the_bytes_are_as_written_down() {
        let bytes = encode(MAGIC, 3, b"123456789");
        assert_eq!(bytes[..8], MAGIC);
        assert_eq!(bytes[8..16], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..24], [9, 0, 0, 0, 0, 0, 0, 0]);
        // The check value of CRC-32/ISO-HDLC.
        assert_eq!(bytes[24..28], 0xcbf4_3926u32.to_le_bytes());
        assert_eq!(&bytes[32..], b"123456789");
    }

    #[test]
    fn a_newer_version_is_told_from_a_damaged_one() {
        let newer = encode(MAGIC, 9, b"x");
        assert_eq!(decode(&newer, MAGIC, 2, 10).unwrap_err(), FrameError::Newer { version: 9, known: 2 });
        let mut damaged = encode(MAGIC, 1, b"x");
        damaged[8] = 9;
        assert!(matches!(decode(&damaged, MAGIC, 2, 10), Err(FrameError::HeaderDamaged { .. })));
        assert!(matches!(decode(&encode(MAGIC, 0, b""), MAGIC, 2, 10), Err(FrameError::Malformed { .. })));
        assert!(matches!(decode(&newer, *b"OTHEROTH", 9, 10), Err(FrameError::Magic { .. })));
        assert!(matches!(decode(&newer, MAGIC, 9, 0), Err(FrameError::TooLong { length: 1, allowed: 0 })));
        let header = decode_header(&newer, MAGIC, 9, 10).unwrap();
        assert_eq!((header.version, header.length), (9, 1));
    }

    proptest! {
        #[test]
        fn what_was_framed_comes_back(body in prop::collection::vec(any::<u8>(), 0..300), version in 1u32.., tail in 0usize..9) {
            let mut bytes = encode(MAGIC, version, &body);
            bytes.extend(std::iter::repeat_n(7, tail));
            let frame = decode(&bytes, MAGIC, u32::MAX, 300).unwrap();
            prop_assert_eq!((frame.version, frame.body, frame.rest.len()), (version, &body[..], tail));
        }

        #[test]
        fn any_flipped_bit_shows(body in prop::collection::vec(any::<u8>(), 0..100), at: prop::sample::Index, bit in 0..8) {
            let mut bytes = encode(MAGIC, 1, &body);
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(decode(&bytes, MAGIC, u32::MAX, usize::MAX).is_err());
        }

        #[test]
        fn any_truncation_shows(body in prop::collection::vec(any::<u8>(), 0..100), at: prop::sample::Index) {
            let bytes = encode(MAGIC, 1, &body);
            prop_assert!(decode(&bytes[..at.index(bytes.len())], MAGIC, 1, 100).is_err());
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(decode(&bytes, MAGIC, 1, 100).is_err());
            let mut begun = MAGIC.to_vec();
            begun.extend(&bytes);
            let _ = decode(&begun, MAGIC, u32::MAX, usize::MAX);
        }
    }
}
