//! How a page lies in a data pack: as it is, or compressed.

use crate::frame::Malformed;
use crate::generation::{PAGE_SIZE, Page};

/// Whether and how pages are compressed. Each page says for itself, so that a store may change over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Pages as they are: the quickest to write and restore.
    #[default]
    None,
    /// LZ4 blocks.
    Lz4,
    /// Zstandard frames, level 1.
    Zstd,
}

/// How one stored page is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Codec {
    Raw,
    Lz4,
    Zstd,
}

impl Codec {
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(crate) fn from_number(number: u16) -> Result<Self, Malformed> {
        match number {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            _ => Err(Malformed("its codec is unknown")),
        }
    }
}

/// A page that does not shrink to at most this many bytes is stored raw: less would not save a unit of a pack.
const WORTHWHILE: usize = PAGE_SIZE - 256;

/// Compresses pages; keeps its tables between them.
pub(crate) struct Encoder {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    buffer: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new(compression: Compression) -> Self {
        // Without a context (out of memory) pages are stored raw, which is always right.
        let zstd = match compression {
            Compression::Zstd => zstd::bulk::Compressor::new(1).ok(),
            Compression::None | Compression::Lz4 => None,
        };
        Self { compression, zstd, buffer: vec![0; 2 * PAGE_SIZE] }
    }

    /// The bytes to store for `page`, and how they are encoded.
    pub(crate) fn encode<'a>(&'a mut self, page: &'a [u8]) -> (Codec, &'a [u8]) {
        let packed = match self.compression {
            Compression::None => None,
            Compression::Lz4 => {
                lz4_flex::block::compress_into(page, &mut self.buffer).ok().map(|length| (Codec::Lz4, length))
            }
            Compression::Zstd => self
                .zstd
                .as_mut()
                .and_then(|zstd| zstd.compress_to_buffer(page, &mut self.buffer[..]).ok())
                .map(|length| (Codec::Zstd, length)),
        };
        match packed {
            Some((codec, length)) if length > 0 && length <= WORTHWHILE => (codec, &self.buffer[..length]),
            _ => (Codec::Raw, page),
        }
    }
}

/// Undoes [`Encoder::encode`].
pub(crate) fn decode(codec: Codec, stored: &[u8], page: &mut Page) -> Result<(), Malformed> {
    let length = match codec {
        Codec::Raw => {
            if stored.len() == PAGE_SIZE {
                page.copy_from_slice(stored);
            }
            stored.len()
        }
        Codec::Lz4 => lz4_flex::block::decompress_into(stored, page).map_err(|_| Malformed("its LZ4 block is bad"))?,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(stored, &mut page[..])
            .map_err(|_| Malformed("its Zstandard frame is bad"))?,
    };
    if length == PAGE_SIZE { Ok(()) } else { Err(Malformed("it is not one page long")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(compression: Compression, page: &Page) -> Codec {
        let mut encoder = Encoder::new(compression);
        let (codec, stored) = encoder.encode(page);
        let mut back = [0xAA; PAGE_SIZE];
        decode(codec, stored, &mut back).unwrap();
        assert_eq!(&back, page);
        codec
    }

    #[test]
    fn text_shrinks_and_comes_back() {
        let mut page = [0; PAGE_SIZE];
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = b"perdure "[at % 8];
        }
        assert_eq!(round_trip(Compression::None, &page), Codec::Raw);
        assert_eq!(round_trip(Compression::Lz4, &page), Codec::Lz4);
        assert_eq!(round_trip(Compression::Zstd, &page), Codec::Zstd);
    }

    proptest! {
        #[test]
        fn any_page_comes_back(seed in any::<u64>(), noise in 0usize..=PAGE_SIZE) {
            let mut page = [0; PAGE_SIZE];
            let mut state = seed | 1;
            for byte in &mut page[..noise] {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *byte = (state >> 56) as u8;
            }
            for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
                round_trip(compression, &page);
            }
        }

        #[test]
        fn hostile_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let mut page = [0; PAGE_SIZE];
            for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
                let _ = decode(codec, &bytes, &mut page);
            }
        }
    }
}
