//! A process's file system that keeps a record of what it does.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::log::{Entry, Kind};
use super::point::{Operation, is_lied_to, operation};
use crate::poison::Poison;
use crate::{Cached, DirEntry, EntryKind, HostVfs, OpenMode, ReadFrom, Space, Vfs, VfsFile};

/// Appends to the record.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    /// Numbers of handles and syncs. Those of two processes differ.
    next: AtomicU64,
}

impl Recorder {
    /// Appends to the record at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// As the file system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        Ok(Self { file, next: AtomicU64::new(u64::from(std::process::id()) << 32) })
    }

    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// After the operation: what was killed between the two is found by comparison, and nobody was told that it was done.
    pub(super) fn note(&self, kind: Kind, numbers: [u64; 3], payload: &[&[u8]]) {
        if (&self.file).write_all(&Entry::encode(kind, numbers, payload)).is_err() {
            // What is not in the record would be taken for lost, or for durable.
            std::process::abort();
        }
    }

    /// Runs a sync. It covers what was recorded before it began, and counts from when it returned.
    pub(super) fn sync(
        &self,
        kind: Kind,
        handle: u64,
        path: &[u8],
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let number = self.number();
        operation(Operation::Sync)?;
        if is_lied_to() {
            return Ok(());
        }
        self.note(kind, [handle, number, 0], &[path]);
        sync()?;
        self.note(Kind::Synced, [0, number, 0], &[]);
        Ok(())
    }
}

/// The [`HostVfs`], recorded.
#[derive(Debug)]
pub struct RecordingVfs {
    recorder: Arc<Recorder>,
}

impl RecordingVfs {
    /// What is done through it is appended to the record.
    #[must_use]
    pub fn new(recorder: Arc<Recorder>) -> Self {
        Self { recorder }
    }

    fn change(&self, kind: Kind, path: &Path, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        operation(Operation::Name)?;
        change()?;
        self.recorder.note(kind, [0; 3], &[path.as_os_str().as_bytes()]);
        Ok(())
    }
}

/// As a number of the record; `None` for a mode that alters nothing.
pub(super) fn mode_number(mode: OpenMode) -> Option<u64> {
    match mode {
        OpenMode::Read => None,
        OpenMode::ReadWrite => Some(0),
        OpenMode::CreateNew | OpenMode::OpenOrCreate => Some(1),
        OpenMode::CreateTruncate => Some(2),
    }
}

/// The way back from [`mode_number`]; what had to be new may be there by way of another handle.
pub(super) fn mode_of(number: u64) -> OpenMode {
    match number {
        0 => OpenMode::ReadWrite,
        1 => OpenMode::OpenOrCreate,
        _ => OpenMode::CreateTruncate,
    }
}

impl Vfs for RecordingVfs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn VfsFile>> {
        let Some(number) = mode_number(mode) else { return HostVfs.open(path, mode) };
        if number > 0 {
            operation(Operation::Name)?;
        }
        let file = HostVfs.open(path, mode)?;
        let handle = self.recorder.number();
        self.recorder.note(Kind::Open, [handle, number, 0], &[path.as_os_str().as_bytes()]);
        let (path, recorder) = (path.to_owned(), Arc::clone(&self.recorder));
        Ok(Box::new(RecordingFile { file, handle, path, recorder, poison: Poison::default() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        operation(Operation::Name)?;
        HostVfs.rename(from, to)?;
        let (from, to) = (from.as_os_str().as_bytes(), to.as_os_str().as_bytes());
        self.recorder.note(Kind::Rename, [from.len() as u64, 0, 0], &[from, to]);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change(Kind::RemoveFile, path, || HostVfs.remove_file(path))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.change(Kind::CreateDirAll, path, || HostVfs.create_dir_all(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.change(Kind::RemoveDir, path, || HostVfs.remove_dir(path))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        HostVfs.read_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.recorder.sync(Kind::SyncDir, 0, path.as_os_str().as_bytes(), || HostVfs.sync_dir(path))
    }

    fn entry_kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        HostVfs.entry_kind(path)
    }

    fn space(&self, path: &Path) -> io::Result<Option<Space>> {
        HostVfs.space(path)
    }
}

/// A file of a [`RecordingVfs`].
#[derive(Debug)]
struct RecordingFile {
    file: Box<dyn VfsFile>,
    handle: u64,
    /// For messages alone.
    path: PathBuf,
    recorder: Arc<Recorder>,
    /// Of failures that are only simulated: the file knows of its own.
    poison: Poison,
}

impl RecordingFile {
    /// Lets an operation begin, or fail.
    fn begin(&self) -> io::Result<()> {
        self.poison.check(&self.path)?;
        operation(Operation::Write)
    }

    fn change(
        &self,
        kind: Kind,
        a: u64,
        b: u64,
        change: impl FnOnce(&dyn VfsFile) -> io::Result<()>,
    ) -> io::Result<()> {
        self.begin()?;
        change(&*self.file)?;
        self.recorder.note(kind, [self.handle, a, b], &[]);
        Ok(())
    }

    fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.poison.check(&self.path)?;
        self.recorder.sync(Kind::Sync, self.handle, &[], sync).inspect_err(|_| self.poison.set())
    }
}

impl VfsFile for RecordingFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn read_large_at(&self, buffer: &mut [u8], offset: u64, from: ReadFrom) -> io::Result<usize> {
        self.file.read_large_at(buffer, offset, from)
    }

    fn read_many(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        self.file.read_many(parts)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.begin()?;
        self.file.write_all_at(bytes, offset)?;
        self.recorder.note(Kind::Write, [self.handle, offset, 0], &[bytes]);
        Ok(())
    }

    fn write_durable_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        // It fails as a sync does: nobody knows then what is there.
        operation(Operation::Sync).inspect_err(|_| self.poison.set())?;
        operation(Operation::Write)?;
        if is_lied_to() {
            return self.write_all_at(bytes, offset);
        }
        self.file.write_durable_at(bytes, offset)?;
        self.recorder.note(Kind::WriteDurable, [self.handle, offset, 0], &[bytes]);
        Ok(())
    }

    fn write_many(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        self.begin()?;
        self.file.write_many(parts)?;
        for (offset, bytes) in parts {
            self.recorder.note(Kind::Write, [self.handle, *offset, 0], &[bytes]);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Kind::SetLen, length, 0, |file| file.set_len(length))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Kind::Allocate, offset, length, |file| file.allocate(offset, length))
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Kind::PunchHole, offset, length, |file| file.punch_hole(offset, length))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Kind::Zero, offset, length, |file| file.zero(offset, length))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync(|| self.file.sync_data())
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync(|| self.file.sync_all())
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.file.try_lock()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.descriptor()
    }

    fn cached(&self, offset: u64, length: u64) -> Option<Cached> {
        self.file.cached(offset, length)
    }

    fn direct(&self) -> io::Result<Option<Box<dyn VfsFile>>> {
        let Some(file) = self.file.direct()? else { return Ok(None) };
        let handle = self.recorder.number();
        self.recorder.note(Kind::Again, [handle, self.handle, 0], &[]);
        let (path, recorder) = (self.path.clone(), Arc::clone(&self.recorder));
        Ok(Some(Box::new(Self { file, handle, path, recorder, poison: Poison::default() })))
    }
}
