//! Memory for large reads.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Memory for large reads: zero at first, page-aligned, and of huge pages where the kernel has them.
///
/// A device writes past the page cache into it ([`crate::VfsFile::read_large_at`]). What a read costs a virtual disk then is less a matter of
/// bytes than of descriptors, one for each physically contiguous piece of memory: here one for 2 MiB, in ordinary memory one for 4 KiB
/// (measured on virtio: 2.0 to 2.5 and 0.9 to 1.2 GB/s, whatever is read at once or in flight).
pub struct IoBuffer {
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone, and is reached through its borrows only.
unsafe impl Send for IoBuffer {}
// SAFETY: as above: a shared borrow gives shared bytes only.
unsafe impl Sync for IoBuffer {}

impl IoBuffer {
    /// Memory of `length` bytes; huge pages for each whole 2 MiB of them. Takes memory of the system as it is written to.
    ///
    /// # Errors
    /// `OutOfMemory`, or `InvalidInput` for more than an address space.
    pub fn new(length: usize) -> io::Result<Self> {
        let mapped = length.checked_next_multiple_of(HUGE).and_then(|whole| whole.checked_add(HUGE));
        let mapped = mapped.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new private mapping, at an address that the kernel chooses: nothing else lies there.
        let mapping = unsafe {
            mmap_anonymous(std::ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        let mapping = NonNull::new(mapping.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let skipped = mapping.addr().get().next_multiple_of(HUGE) - mapping.addr().get();
        // SAFETY: less than HUGE is skipped, and that much more than `length` was mapped.
        let start = unsafe { mapping.add(skipped) };
        let huge = length / HUGE * HUGE;
        if huge > 0 {
            // SAFETY: the range lies in the mapping; the advice changes nothing in it. Where the kernel has none to give, pages are small.
            let _ = unsafe { madvise(start.as_ptr().cast(), huge, Advice::LinuxHugepage) };
        }
        Ok(Self { mapping, mapped, start, length })
    }
}

impl Deref for IoBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` bytes from `start` on are mapped, readable and zero or written, for as long as this value lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for IoBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable; the exclusive borrow of this value, which alone owns them, makes the bytes exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for IoBuffer {
    fn drop(&mut self) {
        // SAFETY: made by `new`, whole; no borrow of it outlives this value.
        let _ = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

impl fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuffer").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_zero_aligned_and_keeps_what_is_written() {
        for length in [0, 1, 4096, HUGE - 1, HUGE, HUGE + 1] {
            let mut buffer = IoBuffer::new(length).unwrap();
            assert_eq!((buffer.len(), buffer.as_ptr().addr() % HUGE), (length, 0));
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(7);
            assert!(buffer.iter().all(|byte| *byte == 7));
        }
        assert!(IoBuffer::new(usize::MAX).is_err());
    }
}
