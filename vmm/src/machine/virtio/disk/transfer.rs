//! A read or a write that may take several system calls.

use std::io;

use devices::virtio::Memory;
use devices::virtio::block::Buffers;
use vm_memory::GuestMemoryBackend;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the image to memory.
    Read,
    /// From memory to the image.
    Write,
}

/// What is left of a transfer.
pub(super) struct Transfer {
    pub(super) direction: Direction,
    /// Where in the file it goes on.
    pub(super) at: u64,
    /// It is complete when a flush is, that begins after it.
    pub(super) durable: bool,
    pieces: Vec<libc::iovec>,
    /// The first that is not done.
    next: usize,
    /// Keeps what the pieces point to mapped.
    _memory: Memory,
}

// SAFETY: the pieces point into guest memory, which `_memory` keeps mapped wherever this goes; they are handed to the kernel alone.
unsafe impl Send for Transfer {}

impl Transfer {
    /// A transfer of `buffers` to or from byte `at` of the file.
    ///
    /// # Errors
    /// The buffers are not all memory.
    pub(super) fn new(direction: Direction, at: u64, buffers: Buffers<'_>, durable: bool) -> io::Result<Self> {
        let mut pieces = Vec::with_capacity(buffers.segments.len());
        for segment in buffers.segments {
            for slice in buffers.memory.get_slices(segment.address, segment.length as usize) {
                let slice = slice.map_err(io::Error::other)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                pieces.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
        }
        Ok(Self { direction, at, durable, pieces, next: 0, _memory: buffers.memory.clone() })
    }

    /// The pieces that are left.
    pub(super) fn pieces(&self) -> &[libc::iovec] {
        self.pieces.get(self.next..).unwrap_or_default()
    }

    /// The bytes of the pieces that are left, as they are now: the guest may write to them at any time.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.pieces().iter().map(|piece| piece.iov_len).sum());
        for piece in self.pieces() {
            // SAFETY: guest memory, which `_memory` keeps mapped; volatile, since the guest may write to it meanwhile, and no reference is made.
            bytes.extend((0..piece.iov_len).map(|at| unsafe { piece.iov_base.cast::<u8>().add(at).read_volatile() }));
        }
        bytes
    }

    /// `count` bytes more are done. Whether all are.
    ///
    /// # Errors
    /// None were: the file is shorter than the image, or takes no more.
    pub(super) fn advance(&mut self, count: usize) -> io::Result<bool> {
        if count == 0 {
            return Err(match self.direction {
                Direction::Read => io::ErrorKind::UnexpectedEof.into(),
                Direction::Write => io::ErrorKind::WriteZero.into(),
            });
        }
        self.at += count as u64;
        let mut left = count;
        while let Some(piece) = self.pieces.get_mut(self.next) {
            if left < piece.iov_len {
                // Still within the piece, which is guest memory.
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(left).cast();
                piece.iov_len -= left;
                return Ok(false);
            }
            left -= piece.iov_len;
            self.next += 1;
        }
        Ok(true)
    }
}
