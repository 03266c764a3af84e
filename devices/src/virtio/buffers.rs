//! The buffers of requests: segments of the guest's memory, as they are passed to the host without a copy.

use std::collections::VecDeque;

use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::MS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::memory::GuestMemory;
use super::ring::Chain;

/// A piece of the guest's memory as the host reaches it. Who writes to it other than by its methods marks its bitmap.
pub type Piece<'a> = VolatileSlice<'a, MS<'a, GuestMemory>>;

/// The most pieces that the host takes in one call (Linux's `UIO_MAXIOV`).
pub const PIECES_MAX: usize = 1024;

/// A descriptor's buffer, or a part of it. Untrusted until it was checked: it may lie anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its bytes.
    pub length: u32,
}

/// The buffers of `chain` that the device reads; those of no length left out.
pub(super) fn readable(chain: Chain) -> impl Iterator<Item = Segment> {
    segments(chain.readable())
}

/// The buffers of `chain` that the device writes; those of no length left out.
pub(super) fn writable(chain: Chain) -> impl Iterator<Item = Segment> {
    segments(chain.writable())
}

fn segments(descriptors: impl Iterator<Item = Descriptor>) -> impl Iterator<Item = Segment> {
    let segments = descriptors.map(|descriptor| Segment { address: descriptor.addr(), length: descriptor.len() });
    segments.filter(|segment| segment.length > 0)
}

/// `segments` as the host reaches them, at most `limit` bytes and [`PIECES_MAX`] pieces; `None` if they are more pieces, or not all in the memory.
pub(super) fn pieces(
    memory: &GuestMemory,
    segments: impl Iterator<Item = Segment>,
    limit: usize,
) -> Option<Vec<Piece<'_>>> {
    let (mut pieces, mut left) = (Vec::with_capacity(segments.size_hint().0.min(PIECES_MAX)), limit);
    for segment in segments {
        let length = left.min(usize::try_from(segment.length).ok()?);
        left -= length;
        for piece in memory.get_slices(segment.address, length) {
            if pieces.len() == PIECES_MAX {
                return None;
            }
            pieces.push(piece.ok()?);
        }
        if left == 0 {
            break;
        }
    }
    Some(pieces)
}

/// Copies `bytes` to `segments`, from byte `offset` of them on; how much of it had room in the memory.
pub(super) fn scatter(
    memory: &GuestMemory,
    segments: impl Iterator<Item = Segment>,
    mut offset: usize,
    bytes: &[u8],
) -> usize {
    let mut written = 0;
    for segment in segments {
        let length = usize::try_from(segment.length).unwrap_or(usize::MAX);
        if offset >= length {
            offset -= length;
            continue;
        }
        let Some(rest) = bytes.get(written..) else { break };
        let part = rest.get(..rest.len().min(length - offset)).unwrap_or_default();
        let Some(address) = segment.address.0.checked_add(offset as u64) else { break };
        if part.is_empty() || memory.write_slice(part, GuestAddress(address)).is_err() {
            break;
        }
        written += part.len();
        offset = 0;
    }
    written
}

/// Buffers that were taken from a ring and are not used yet, in their order.
#[derive(Default)]
pub(super) struct Posted {
    /// Each chain's head, how many segments it has, and how many bytes.
    chains: VecDeque<(u16, usize, usize)>,
    segments: VecDeque<Segment>,
    room: usize,
}

impl Posted {
    /// Adds a chain to the end, given its head and its descriptors that the device writes. Of one with more than `limit` bytes the rest stays unused.
    pub(super) fn push(&mut self, head: u16, descriptors: impl Iterator<Item = Descriptor>, limit: usize) {
        let (mut count, mut bytes) = (0, 0_usize);
        for segment in segments(descriptors) {
            let length = usize::try_from(segment.length).unwrap_or(usize::MAX).min(limit - bytes);
            self.segments.push_back(Segment { length: u32::try_from(length).unwrap_or(u32::MAX), ..segment });
            count += 1;
            bytes += length;
            if bytes == limit {
                break;
            }
        }
        self.chains.push_back((head, count, bytes));
        self.room += bytes;
    }

    /// How many chains there are.
    pub(super) fn len(&self) -> usize {
        self.chains.len()
    }

    /// How many bytes have room in them.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// All of it.
    pub(super) fn segments(&self) -> impl Iterator<Item = Segment> {
        self.segments.iter().copied()
    }

    /// How many bytes have room in the first chain.
    pub(super) fn first_room(&self) -> usize {
        self.chains.front().map_or(0, |(_, _, bytes)| *bytes)
    }

    /// The first chains, as many as `length` bytes need: their heads, and how many bytes go to each.
    pub(super) fn first(&self, mut length: usize) -> Vec<(u16, u32)> {
        let mut first = Vec::new();
        for (head, _, bytes) in &self.chains {
            if length == 0 {
                break;
            }
            let part = length.min(*bytes);
            first.push((*head, u32::try_from(part).unwrap_or(u32::MAX)));
            length -= part;
        }
        first
    }

    /// Takes the first chain out; its head.
    pub(super) fn pop(&mut self) -> Option<u16> {
        let (head, count, bytes) = self.chains.pop_front()?;
        self.segments.drain(..count.min(self.segments.len()));
        self.room -= bytes;
        Some(head)
    }

    /// Forgets all; how many chains that were.
    pub(super) fn clear(&mut self) -> usize {
        let chains = self.chains.len();
        *self = Self::default();
        chains
    }
}
