//! What the device asks of the host: an image that takes many requests at a time.

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::virtio::buffers::Segment;
use crate::virtio::memory::Memory;

/// Names a request between its submission and its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u32);

/// The guest memory that a request is about, in its order. At most [`SEGMENTS_MAX`](super::SEGMENTS_MAX) pieces.
#[derive(Clone, Copy)]
pub struct Buffers<'a> {
    /// What the segments lie in. Whoever goes on using them keeps a clone.
    pub memory: &'a Memory,
    /// The pieces: none is empty, and all of each is there.
    pub segments: &'a [Segment],
}

/// What is to be done with the image. All bytes that it names are in the image; offsets are in bytes, multiples of a sector.
#[derive(Clone)]
pub enum Operation<'a> {
    /// Fills the buffers from the image, from byte `at` on.
    Read {
        /// Where in the image.
        at: u64,
        /// What is filled. The device marks it as written.
        buffers: Buffers<'a>,
    },
    /// Writes the buffers to the image, from byte `at` on.
    Write {
        /// Where in the image.
        at: u64,
        /// What is written.
        buffers: Buffers<'a>,
        /// It completes when it is durable.
        durable: bool,
    },
    /// Makes durable what was completed before it was submitted.
    Flush,
    /// The guest needs these bytes no more.
    Discard(Range<u64>),
    /// Makes these bytes zeros; their blocks may be given up where `unmap` says so.
    WriteZeroes {
        /// Which.
        range: Range<u64>,
        /// Whether the image may get a hole there.
        unmap: bool,
    },
}

impl Operation<'_> {
    /// The bytes of the image that it changes.
    #[must_use]
    pub fn changes(&self) -> Option<Range<u64>> {
        match self {
            Self::Write { at, buffers, durable: _ } => {
                let length: u64 = buffers.segments.iter().map(|segment| u64::from(segment.length)).sum();
                Some(*at..at.saturating_add(length))
            }
            Self::Discard(range) | Self::WriteZeroes { range, unmap: _ } => Some(range.clone()),
            Self::Read { .. } | Self::Flush => None,
        }
    }
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// Which.
    pub token: Token,
    /// [`io::ErrorKind::Unsupported`]: the host has no such operation.
    pub result: io::Result<()>,
}

/// An image; implemented by the VMM.
///
/// Requests are independent of each other and may complete in any order. Once a flush failed, every later one fails: nothing
/// tells what of the image is durable from then on.
pub trait BlockBackend: Send {
    /// Takes a request. What it cannot do is told by its completion. It need not begin before [`BlockBackend::start`].
    fn submit(&mut self, token: Token, operation: Operation<'_>);

    /// All that was submitted is to begin.
    fn start(&mut self);

    /// Appends what completed since the last call, without waiting. For what completes after it the source of the host has an edge; not for
    /// what completed before, at once when it was started, say: whoever starts looks here next.
    fn take_completed(&mut self, completed: &mut Vec<Completion>);

    /// Waits until there is something for [`BlockBackend::take_completed`], or until `deadline`. Whether there is.
    fn wait(&mut self, deadline: Option<Instant>) -> bool;
}
