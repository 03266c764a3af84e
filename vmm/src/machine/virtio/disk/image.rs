//! The bytes of a disk: a part of an open file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::virtio::block::Operation;
use rustix::fs::{FallocateFlags, OFlags, fcntl_getfl, fcntl_setfl};
use vfs::cut::trace::Trace;

use super::moment::Changes;

/// What becomes of blocks that the guest needs no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocks {
    /// They are made zeros and stay the file's: a region has the storage that it was promised, whatever else lies on its medium, so that no
    /// later write of the guest fails for want of it.
    Keep,
    /// They go back to the file system.
    GiveBack,
}

/// An image. Whoever shares it shares its verdict, too.
#[derive(Debug)]
pub struct Image {
    name: String,
    file: File,
    /// The same file, opened anew: errors of its own. `None` of one that is not written.
    flushed: Option<File>,
    /// Where in the file it begins, in bytes.
    offset: u64,
    /// Bytes; a multiple of a sector.
    length: u64,
    blocks: Blocks,
    /// Which pages change, of a disk that generations hold.
    changes: Option<Arc<Changes>>,
    /// Who is told of what is done, where outages are simulated.
    trace: Option<Trace>,
    /// A write is complete when it is durable, whatever the guest asked for.
    write_through: bool,
    /// A flush failed.
    lost: AtomicBool,
}

impl Image {
    /// `length` bytes at `offset` of `file`, which is locked for this VM. `name` is what the guest knows it by.
    ///
    /// # Errors
    /// As the system says: the file cannot be opened again.
    pub fn new(name: String, file: File, part: Range<u64>, blocks: Blocks) -> io::Result<Self> {
        // By the descriptor: what is at its path may be another file by now.
        let flushed = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let (offset, length) = (part.start, part.end.saturating_sub(part.start));
        let (flushed, lost) = (Some(flushed), AtomicBool::new(false));
        let (changes, trace, write_through) = (None, None, false);
        Ok(Self { name, file, flushed, offset, length, blocks, changes, trace, write_through, lost })
    }

    /// The first `length` bytes of `file`, which are not written.
    #[must_use]
    pub fn read_only(name: String, file: File, length: u64) -> Self {
        let (flushed, lost) = (None, AtomicBool::new(false));
        let (blocks, changes, trace, write_through) = (Blocks::Keep, None, None, false);
        Self { name, file, flushed, offset: 0, length, blocks, changes, trace, write_through, lost }
    }

    /// The same, watched for changes from now on: generations hold it.
    #[must_use]
    pub fn watched(self) -> Self {
        Self { changes: Some(Arc::new(Changes::new(self.length))), ..self }
    }

    /// The same, each write of which is durable when it is complete: a freeze finds nothing to flush.
    #[must_use]
    pub fn written_through(self) -> Self {
        Self { write_through: true, ..self }
    }

    /// See [`Image::written_through`].
    pub(super) fn is_written_through(&self) -> bool {
        self.write_through
    }

    /// The same, which tells what is done to its file.
    #[must_use]
    pub fn traced(self, trace: Option<Trace>) -> Self {
        Self { trace, ..self }
    }

    pub(super) fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref()
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        let sync = || rustix::fs::fdatasync(file).map_err(io::Error::from);
        self.trace.as_ref().map_or_else(sync, |trace| trace.sync(sync)).map_err(|error| self.doubt(error))
    }

    pub(super) fn changes(&self) -> Option<&Arc<Changes>> {
        self.changes.as_ref()
    }

    /// The file, and where in it the image begins.
    pub(super) fn file(&self) -> (&File, u64) {
        (&self.file, self.offset)
    }

    /// Before `operation` is begun.
    pub(super) fn before(&self, operation: &Operation<'_>) {
        if let (Some(changes), Some(range)) = (&self.changes, operation.changes()) {
            changes.before_change(&self.file, self.offset, &range);
        }
    }

    /// What the guest knows it by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether it is not written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flushed.is_none()
    }

    /// Makes durable all that was written so far. Of one that is not written, nothing.
    ///
    /// # Errors
    /// As the system says, now or at an earlier flush: nothing is believed any more.
    pub fn flush(&self) -> io::Result<()> {
        let Some(flushed) = &self.flushed else { return Ok(()) };
        self.is_believed()?;
        self.sync(flushed)?;
        self.is_believed()
    }

    /// Whether no flush failed yet.
    ///
    /// # Errors
    /// One that says so.
    pub(super) fn is_believed(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "an earlier flush failed: what it was to make durable may be lost, and no later one can make up for it",
            ));
        }
        Ok(())
    }

    /// A flush failed. Passes its error on.
    pub(super) fn doubt(&self, error: io::Error) -> io::Error {
        if !self.lost.swap(true, Ordering::SeqCst) {
            tracing::error!("disk {}: a flush failed ({error}): none is believed from now on", self.name);
        }
        error
    }

    /// Makes durable, for the guest's flushes. One at a time.
    pub(super) fn flush_for_guest(&self) -> io::Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        self.is_believed()?;
        self.sync(&self.file)?;
        self.is_believed()
    }

    /// Makes the file one whose I/O waits for the device.
    ///
    /// Of a file that was opened not to wait (files of the pool are, lest one be a FIFO) `io_uring` gives up each read and write with EAGAIN, for ever,
    /// where the device below cannot do without waiting, as persistent memory (Linux 6.1, `io_rw_init_file`).
    pub(super) fn wait_for_io(&self) -> io::Result<()> {
        Ok(fcntl_setfl(&self.file, fcntl_getfl(&self.file)? - OFlags::NONBLOCK)?)
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Where byte `at` lies in the file.
    pub(super) fn place(&self, at: u64) -> u64 {
        self.offset + at
    }

    /// How `fallocate` discards.
    pub(super) fn discard_mode(&self) -> FallocateFlags {
        FallocateFlags::KEEP_SIZE
            | match self.blocks {
                Blocks::Keep => FallocateFlags::ZERO_RANGE,
                Blocks::GiveBack => FallocateFlags::PUNCH_HOLE,
            }
    }

    /// How `fallocate` makes zeros.
    pub(super) fn zero_mode(&self, unmap: bool) -> FallocateFlags {
        if unmap { self.discard_mode() } else { FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE }
    }
}
