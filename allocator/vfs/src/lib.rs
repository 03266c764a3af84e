//! The one door to durability.
//!
//! Everything that perdure wants to find again after an outage goes through [`Vfs`]: catalogs, contexts,
//! region headers, generations. There are two implementations:
//!
//! * [`host::HostVfs`]: the file system of this machine.
//! * [`crash::CrashVfs`]: a simulated disk in memory that, at a cut, applies, drops, tears and reorders whatever
//!   was not flushed, so that a test can ask "and if the power goes *here*?" at every single step.
//!
//! [`cut`] brings the two together: a process on the first, whose writes a simulated cut then takes from its disk by the rules of the second.
//!
//! # What is durable, and when
//!
//! The rules are those of POSIX as file systems keep them, and no kinder:
//!
//! * bytes of a file: after [`VfsFile::sync_data`] (contents and length) or [`VfsFile::sync_all`] returned `Ok`;
//! * a name (create, rename, remove): after [`Vfs::sync_dir`] of its directory returned `Ok`;
//! * before that, each write may survive whole, in part (in units of a 512-byte sector), or not at all, in any order;
//! * a rename is atomic: the name shows the old file or the new one, never neither.
//!
//! After a failed sync nothing is believed: the file is *poisoned* and every later write or sync on that handle
//! fails with [`PoisonedError`], since Linux marks pages clean that it failed to write
//! (<https://wiki.postgresql.org/wiki/Fsync_Errors>).

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

mod aio;
mod buffer;
pub mod crash;
pub mod cut;
pub mod host;
mod poison;

pub use buffer::IoBuffer;
pub use crash::CrashVfs;
pub use host::HostVfs;
pub use poison::{PoisonedError, is_poisoned};

/// How [`Vfs::open`] opens a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Must exist; for reading.
    Read,
    /// Must exist; for reading and writing.
    ReadWrite,
    /// Must not exist; created for reading and writing.
    CreateNew,
    /// Created if missing, else opened as it is; for reading and writing.
    OpenOrCreate,
    /// Created if missing, else truncated to length 0; for reading and writing.
    CreateTruncate,
}

/// Where [`VfsFile::read_large_at`] reads from, if it has the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFrom {
    /// The page cache, if it has most of what is wanted; else the medium.
    Nearest,
    /// The medium.
    Medium,
}

/// What a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// Anything else (a socket, a symbolic link, …).
    Other,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name within the directory. Names that are not UTF-8 are not listed.
    pub name: String,
    /// What it is.
    pub kind: EntryKind,
}

/// The room on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it, in bytes.
    pub total: u64,
    /// What this process may still take, in bytes.
    pub available: u64,
}

/// What the page cache has of a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cached {
    /// Bytes, in whole pages.
    pub bytes: u64,
    /// Of these, not on the medium yet, or on their way.
    pub dirty: u64,
}

/// A file system, seen through what durability needs of it.
pub trait Vfs: Send + Sync + fmt::Debug {
    /// Opens `path`.
    ///
    /// # Errors
    /// As the file system says: `NotFound`, `AlreadyExists`, `PermissionDenied`, `StorageFull`, ….
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn VfsFile>>;

    /// Renames `from` to `to`, replacing `to` atomically. Durable after [`Vfs::sync_dir`] of both directories.
    ///
    /// # Errors
    /// As the file system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// As the file system says.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory and its missing parents. `Ok` if it is there already.
    ///
    /// # Errors
    /// As the file system says.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// As the file system says.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Lists a directory, sorted by name.
    ///
    /// # Errors
    /// As the file system says.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// As the file system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// What is at `path`, or `None` if nothing is.
    ///
    /// # Errors
    /// As the file system says, except `NotFound`.
    fn entry_kind(&self, path: &Path) -> io::Result<Option<EntryKind>>;

    /// The room on the file system that holds `path`, or `None` where that cannot be told.
    ///
    /// # Errors
    /// As the file system says.
    fn space(&self, path: &Path) -> io::Result<Option<Space>> {
        let _ = path;
        Ok(None)
    }
}

/// An open file.
pub trait VfsFile: Send + Sync + fmt::Debug {
    /// Reads up to `buffer.len()` bytes at `offset`; fewer at the end of the file, 0 past it.
    ///
    /// # Errors
    /// As the file system says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads as [`VfsFile::read_at`] does, many bytes at once, and where that can be done past the page cache: straight into `buffer`, and
    /// leaving the cache as it is. For that `buffer` must begin at a page ([`IoBuffer`]), offset and length be multiples of 4096,
    /// and the file system have direct I/O; else it is an ordinary read.
    ///
    /// # Errors
    /// As the file system says.
    fn read_large_at(&self, buffer: &mut [u8], offset: u64, from: ReadFrom) -> io::Result<usize> {
        let _ = from;
        self.read_at(buffer, offset)
    }

    /// Writes all of `bytes` at `offset`, growing the file if need be.
    ///
    /// # Errors
    /// As the file system says (`StorageFull`, …), or [`PoisonedError`].
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset` and returns once they are durable, the length too. Says nothing of other
    /// bytes of the file.
    ///
    /// # Errors
    /// As [`VfsFile::write_all_at`] and [`VfsFile::sync_data`].
    fn write_durable_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)?;
        self.sync_data()
    }

    /// Fills each buffer exactly, from its offset, as [`VfsFile::read_exact_at`] would; all at a time where that is possible.
    ///
    /// # Errors
    /// As [`VfsFile::read_exact_at`], of one of them; then nothing is known of what is in any buffer.
    fn read_many(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        parts.iter_mut().try_for_each(|(offset, buffer)| self.read_exact_at(buffer, *offset))
    }

    /// Writes all of each part at its offset, in any order; all at a time where that is possible. No two may overlap.
    ///
    /// # Errors
    /// As [`VfsFile::write_all_at`], of one of them; then nothing is known of what is at any of the offsets.
    fn write_many(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        parts.iter().try_for_each(|(offset, bytes)| self.write_all_at(bytes, *offset))
    }

    /// The length in bytes.
    ///
    /// # Errors
    /// As the file system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is 0.
    ///
    /// # Errors
    /// As [`VfsFile::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends (with zeros, sparse) to `length` bytes.
    ///
    /// # Errors
    /// As the file system says.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Reserves storage for `length` bytes at `offset`, growing the file if need be, so that a later write there
    /// cannot fail for want of space. New bytes are zero.
    ///
    /// # Errors
    /// `StorageFull` when there is no room; as the file system says.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Gives storage back; the bytes read as zero from then on. The length stays.
    ///
    /// # Errors
    /// As the file system says.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes bytes zero within the file, their storage reserved as by [`VfsFile::allocate`], without writing them.
    ///
    /// # Errors
    /// As the file system says.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch_hole(offset, length)?;
        self.allocate(offset, length)
    }

    /// Makes contents and length durable.
    ///
    /// # Errors
    /// As the file system says; the handle is poisoned from then on.
    fn sync_data(&self) -> io::Result<()>;

    /// Makes contents, length and all metadata durable.
    ///
    /// # Errors
    /// As the file system says; the handle is poisoned from then on.
    fn sync_all(&self) -> io::Result<()>;

    /// Takes an exclusive advisory lock that dies with this handle (`flock`). `false` if another holds it.
    ///
    /// # Errors
    /// As the file system says.
    fn try_lock(&self) -> io::Result<bool>;

    /// The descriptor, for what only a real file can do (mapping). `None` on a simulated disk.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// What the page cache has of `length` bytes at `offset`; `None` where that cannot be told (Linux before 6.5).
    fn cached(&self, offset: u64, length: u64) -> Option<Cached> {
        let _ = (offset, length);
        None
    }

    /// Another handle of the same file that goes past the page cache: each read and write moves whole blocks of 4096 bytes, to and from
    /// memory that is aligned so. Durable is what it wrote after a sync of this handle. `None` where the file system has no such thing.
    ///
    /// # Errors
    /// As the file system says.
    fn direct(&self) -> io::Result<Option<Box<dyn VfsFile>>> {
        Ok(None)
    }

    /// Reads exactly `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before; as [`VfsFile::read_at`].
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_at(&mut buffer[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }
}
