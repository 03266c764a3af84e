//! I/O that goes past the [`crate::Vfs`]: by a descriptor of its own, or through a mapping. The kernel tells by folios whether such bytes are on the
//! medium, and a folio may hold some that were flushed beside some that were not. Whoever knows better says so here.

use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::log::Kind;
use super::record::{Recorder, mode_number};
use crate::OpenMode;

/// A file whose I/O is told to the record of this process.
#[derive(Debug, Clone)]
pub struct Trace {
    recorder: Arc<Recorder>,
    handle: u64,
}

impl Trace {
    /// Of the file at `path`, which is there; `None` where this process keeps no record.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        super::recorder().map(|recorder| Self::new(Arc::clone(recorder), path))
    }

    /// The same, in a record of the caller's.
    #[must_use]
    pub fn new(recorder: Arc<Recorder>, path: &Path) -> Self {
        let (handle, mode) = (recorder.number(), mode_number(OpenMode::ReadWrite).unwrap_or_default());
        recorder.note(Kind::Open, [handle, mode, 0], &[path.as_os_str().as_bytes()]);
        Self { recorder, handle }
    }

    /// `bytes` were written at `offset`, and nobody was told of it yet.
    pub fn wrote(&self, bytes: &[u8], offset: u64) {
        self.recorder.note(Kind::Write, [self.handle, offset, 0], &[bytes]);
    }

    /// These bytes were made zeros, and nobody was told of it yet. The file is as long as it was.
    pub fn zeroed(&self, range: &Range<u64>) {
        self.recorder.note(Kind::Zero, [self.handle, range.start, range.end.saturating_sub(range.start)], &[]);
    }

    /// Runs a flush, which covers what was told before it.
    ///
    /// # Errors
    /// Those of `flush`, or of a fault that is simulated.
    pub fn sync(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.recorder.sync(Kind::Sync, self.handle, &[], flush)
    }
}
