//! Requests as they come from the guest (virtio 1.2, section 5.2.6): taken apart and checked, so that what is left can be done.

use std::ops::Range;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::config::RANGE_MAX;
use super::{ID_LENGTH, SECTOR, SEGMENT_MAX, SEGMENTS_MAX};
use crate::virtio::buffers::Segment;
use crate::virtio::memory::Memory;
use crate::virtio::ring::Chain;

/// Request types.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Bytes of `struct virtio_blk_req` ahead of its data: type, reserved, sector.
const HEADER: u32 = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE: u32 = 16;
/// The one flag of a range: its blocks may be given up.
const UNMAP: u32 = 1;

/// What a driver is told of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What is to be done, and all of it can be: within the image, and within the guest's memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read {
        at: u64,
        segments: Vec<Segment>,
    },
    Write {
        at: u64,
        segments: Vec<Segment>,
    },
    Flush,
    GetId(Vec<Segment>),
    Discard(Range<u64>),
    WriteZeroes {
        range: Range<u64>,
        unmap: bool,
    },
    /// Nothing: its status is known.
    Nothing(Status),
}

/// A request of which the status can be told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    pub(super) work: Work,
}

/// What the image allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
}

impl Request {
    /// Takes `chain` apart. `None` if it has no place for a status, or more pieces than the device said that it takes.
    pub(super) fn parse(chain: Chain, memory: &Memory, limits: Limits) -> Option<Self> {
        let mut pieces = Pieces::of(chain)?;
        let status = pieces.take_status()?;
        if !memory.check_range(status, 1) {
            return None;
        }
        let work = pieces.work(memory, limits).unwrap_or_else(Work::Nothing);
        Some(Self { status, work })
    }
}

/// A chain's buffers, by who may write them.
struct Pieces {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Pieces {
    fn of(chain: Chain) -> Option<Self> {
        // Beside the data there are the header and the status, each in a piece of its own at the most that Linux does.
        let most = usize::from(SEGMENTS_MAX) + 2;
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for (index, descriptor) in chain.enumerate() {
            if index >= most {
                return None;
            }
            let segment = Segment { address: descriptor.addr(), length: descriptor.len() };
            match (segment.length, descriptor.is_write_only()) {
                (0, _) => {}
                (_, false) => readable.push(segment),
                (_, true) => writable.push(segment),
            }
        }
        Some(Self { readable, writable })
    }

    /// The last byte that the device may write.
    fn take_status(&mut self) -> Option<GuestAddress> {
        let last = self.writable.last_mut()?;
        last.length -= 1;
        let status = last.address.checked_add(last.length.into())?;
        if last.length == 0 {
            self.writable.pop();
        }
        Some(status)
    }

    fn work(mut self, memory: &Memory, limits: Limits) -> Result<Work, Status> {
        let header: [u8; HEADER as usize] = self.take_readable(memory)?;
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        if limits.read_only && matches!(kind, kind::OUT | kind::DISCARD | kind::WRITE_ZEROES) {
            return Err(Status::IoError);
        }
        match kind {
            kind::IN => {
                transfer(self.writable, sector, memory, limits).map(|(at, segments)| Work::Read { at, segments })
            }
            kind::OUT => {
                transfer(self.readable, sector, memory, limits).map(|(at, segments)| Work::Write { at, segments })
            }
            kind::FLUSH => Ok(Work::Flush),
            kind::GET_ID => {
                check(&self.writable, memory)?;
                let room: u64 = self.writable.iter().map(|segment| u64::from(segment.length)).sum();
                if room < ID_LENGTH as u64 { Err(Status::IoError) } else { Ok(Work::GetId(self.writable)) }
            }
            kind::DISCARD => match self.range(memory, limits)? {
                // A discard always may (section 5.2.6.2).
                (_, true) => Err(Status::Unsupported),
                (range, false) => Ok(Work::Discard(range)),
            },
            kind::WRITE_ZEROES => self.range(memory, limits).map(|(range, unmap)| Work::WriteZeroes { range, unmap }),
            _ => Err(Status::Unsupported),
        }
    }

    /// The one range of a discard or a write of zeros, in bytes, and its flag.
    fn range(mut self, memory: &Memory, limits: Limits) -> Result<(Range<u64>, bool), Status> {
        let bytes: [u8; RANGE as usize] = self.take_readable(memory)?;
        let [low, high, count, flags] = words(&bytes);
        if flags & !UNMAP != 0 {
            return Err(Status::Unsupported);
        }
        if !self.readable.is_empty() || count > RANGE_MAX {
            return Err(Status::IoError);
        }
        let range = within(u64::from(high) << 32 | u64::from(low), count.into(), limits)?;
        Ok((range, flags & UNMAP != 0))
    }

    /// The first bytes that the device may read, however they are cut into pieces.
    fn take_readable<const N: usize>(&mut self, memory: &Memory) -> Result<[u8; N], Status> {
        let mut bytes = [0; N];
        let (mut rest, mut whole) = (bytes.as_mut_slice(), 0);
        for segment in &mut self.readable {
            let length = rest.len().min(segment.length as usize);
            let (now, later) = rest.split_at_mut(length);
            memory.read_slice(now, segment.address).map_err(|_| Status::IoError)?;
            rest = later;
            // `length` is at most the segment's, which is 32 bits wide.
            segment.length -= length as u32;
            segment.address = segment.address.checked_add(length as u64).ok_or(Status::IoError)?;
            if segment.length != 0 {
                break;
            }
            whole += 1;
        }
        if !rest.is_empty() {
            return Err(Status::IoError);
        }
        self.readable.drain(..whole);
        Ok(bytes)
    }
}

/// Four words, little-endian.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// Where the transfer is in the image, in bytes, if all of it is there and all of its memory, too.
fn transfer(
    segments: Vec<Segment>,
    sector: u64,
    memory: &Memory,
    limits: Limits,
) -> Result<(u64, Vec<Segment>), Status> {
    check(&segments, memory)?;
    let length: u64 = segments.iter().map(|segment| u64::from(segment.length)).sum();
    if !length.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    let range = within(sector, length / SECTOR, limits)?;
    if length == 0 { Err(Status::Ok) } else { Ok((range.start, segments)) }
}

/// Whether all of it is memory, in pieces no larger than the device said that it takes.
fn check(segments: &[Segment], memory: &Memory) -> Result<(), Status> {
    let sound = |segment: &Segment| {
        let inside = segment.address.checked_add(segment.length.into()).is_some();
        segment.length <= SEGMENT_MAX && inside && memory.check_range(segment.address, segment.length as usize)
    };
    if segments.iter().all(sound) { Ok(()) } else { Err(Status::IoError) }
}

/// `count` sectors from `sector` on as a range of bytes, if the image has them.
fn within(sector: u64, count: u64, limits: Limits) -> Result<Range<u64>, Status> {
    let end = sector.checked_add(count).filter(|end| *end <= limits.sectors).ok_or(Status::IoError)?;
    let byte = |sector: u64| sector.checked_mul(SECTOR).ok_or(Status::IoError);
    Ok(byte(sector)?..byte(end)?)
}
