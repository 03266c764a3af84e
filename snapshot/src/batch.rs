//! The costly part of taking pages in: finding zeros, hashing, checksumming, compressing. Spread over threads.

use crate::codec::{Codec, Compression, Encoder};
use crate::frame::crc;
use crate::generation::PAGE_SIZE;
use crate::hash::Hash;

/// Fewer pages than this a thread are not worth starting one.
const PAGES_A_THREAD: usize = 32;

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Identity {
    Zero,
    Content(Hash),
}

/// A page, ready to be stored.
#[derive(Debug, Clone)]
pub(crate) struct Encoded {
    pub(crate) codec: Codec,
    pub(crate) crc: u32,
    /// Empty if the page is stored raw: then the page itself is what is stored.
    pub(crate) bytes: Vec<u8>,
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    // Pages that are not zero mostly say so early; the rest goes in steps that the compiler turns into wide loads.
    page.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Cuts `items` into at most `threads` parts and works on them at once.
fn spread<T: Sync, R: Send>(
    items: &[T],
    a_page: usize,
    threads: usize,
    work: impl Fn(&[T]) -> Vec<R> + Sync,
) -> Vec<R> {
    let pages = items.len() / a_page;
    let parts = threads.min(pages / PAGES_A_THREAD).max(1);
    if parts < 2 {
        return work(items);
    }
    let size = pages.div_ceil(parts) * a_page;
    std::thread::scope(|scope| {
        let work = &work;
        let mut chunks = items.chunks(size);
        let own = chunks.next().unwrap_or_default();
        let others: Vec<_> = chunks.map(|chunk| (chunk, scope.spawn(move || work(chunk)))).collect();
        let mut results = work(own);
        for (chunk, thread) in others {
            // A thread that died (it cannot by anything in here) is made up for.
            results.extend(thread.join().unwrap_or_else(|_| work(chunk)));
        }
        results
    })
}

/// What each page of `data` is.
pub(crate) fn identify(data: &[u8], threads: usize) -> Vec<Identity> {
    spread(data, PAGE_SIZE, threads, |pages| {
        let zero: Vec<bool> = pages.chunks_exact(PAGE_SIZE).map(is_zero).collect();
        let content = pages.chunks_exact(PAGE_SIZE).zip(&zero).filter(|(_, zero)| !**zero).map(|(page, _)| page);
        let mut hashes = Hash::of_pages(content).into_iter();
        // There are as many hashes as pages that are not zero.
        zero.into_iter()
            .map(|zero| if zero { Identity::Zero } else { hashes.next().map_or(Identity::Zero, Identity::Content) })
            .collect()
    })
}

/// Encodes `pages`.
pub(crate) fn encode(pages: &[&[u8]], compression: Compression, threads: usize) -> Vec<Encoded> {
    spread(pages, 1, threads, |pages| {
        if compression == Compression::None {
            let raw = |page: &&[u8]| Encoded { codec: Codec::Raw, crc: crc(page), bytes: Vec::new() };
            return pages.iter().map(raw).collect();
        }
        let mut encoder = Encoder::new(compression);
        let one = |page: &&[u8]| {
            let (codec, stored) = encoder.encode(page);
            let bytes = if codec == Codec::Raw { Vec::new() } else { stored.to_vec() };
            Encoded { codec, crc: crc(stored), bytes }
        };
        pages.iter().map(one).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_change_nothing() {
        let mut data = vec![0u8; 300 * PAGE_SIZE];
        for (number, page) in data.chunks_exact_mut(PAGE_SIZE).enumerate().filter(|(number, _)| number % 3 != 0) {
            page[number * 13 % PAGE_SIZE] = number as u8 | 1;
        }
        let alone = identify(&data, 1);
        assert_eq!(identify(&data, 2), alone);
        assert_eq!(identify(&data, 7), alone);
        assert_eq!(alone.iter().filter(|identity| **identity == Identity::Zero).count(), 100);
        let pages: Vec<&[u8]> = data.chunks_exact(PAGE_SIZE).collect();
        let sums = |threads| {
            encode(&pages, Compression::Lz4, threads).into_iter().map(|page| (page.codec, page.crc)).collect::<Vec<_>>()
        };
        assert_eq!(sums(1), sums(3));
    }

    #[test]
    fn one_bit_makes_a_page_not_zero() {
        let mut page = vec![0; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in [0, 1, 255, 256, 4095] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
