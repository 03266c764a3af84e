//! The file system of this machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};

use crate::aio::Contexts;
use crate::poison::Poison;
use crate::{Cached, DirEntry, EntryKind, OpenMode, ReadFrom, Space, Vfs, VfsFile};

/// The file system of this machine, through ordinary system calls.
///
/// Every descriptor is close-on-exec: a program that is started later inherits neither a file nor its lock.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostVfs;

/// A file of the [`HostVfs`].
#[derive(Debug)]
struct HostFile {
    file: File,
    /// For messages alone.
    path: PathBuf,
    poison: Poison,
    /// The same file, opened for direct reads when that is first wanted. `None` if it cannot be.
    uncached: OnceLock<Option<File>>,
    contexts: Contexts,
}

/// The number of the system call: the same on every architecture, and not in the C library yet.
const CACHESTAT: libc::c_long = 451;

/// What direct I/O must be aligned to: no device has larger blocks.
const DIRECT_ALIGN: usize = 4096;

impl Vfs for HostVfs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn VfsFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode != OpenMode::Read);
        match mode {
            OpenMode::Read | OpenMode::ReadWrite => {}
            OpenMode::CreateNew => drop(options.create_new(true)),
            OpenMode::OpenOrCreate => drop(options.create(true)),
            OpenMode::CreateTruncate => drop(options.create(true).truncate(true)),
        }
        // What lies in a pool is not trusted: opening a FIFO must not wait for its other end.
        let guard = OFlags::NONBLOCK | OFlags::NOCTTY;
        options.custom_flags(guard.bits().cast_signed()).mode(0o600);
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Box::new(HostFile::new(file, path)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let kind = kind_of(entry.file_type()?);
            entries.push(DirEntry { name, kind });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, rustix::fs::Mode::empty())?;
        Ok(rustix::fs::fsync(directory)?)
    }

    fn entry_kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        match fs::symlink_metadata(path) {
            Ok(metadata) => Ok(Some(kind_of(metadata.file_type()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn space(&self, path: &Path) -> io::Result<Option<Space>> {
        let found = rustix::fs::statvfs(path)?;
        Ok(Some(Space {
            total: found.f_blocks.saturating_mul(found.f_frsize),
            available: found.f_bavail.saturating_mul(found.f_frsize),
        }))
    }
}

fn kind_of(found: fs::FileType) -> EntryKind {
    if found.is_file() {
        EntryKind::File
    } else if found.is_dir() {
        EntryKind::Directory
    } else {
        EntryKind::Other
    }
}

/// Bytes of a request that came to its end.
fn completed(result: i64) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO)))
}

impl HostFile {
    fn new(file: File, path: &Path) -> Self {
        Self {
            file,
            path: path.to_owned(),
            poison: Poison::default(),
            uncached: OnceLock::new(),
            contexts: Contexts::default(),
        }
    }

    /// The same file past the page cache. By its descriptor: what is at its path may be another one by now.
    fn open_direct(&self, write: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(write).custom_flags(OFlags::DIRECT.bits().cast_signed());
        options.open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// The file for direct reads.
    fn uncached(&self) -> Option<&File> {
        self.uncached.get_or_init(|| self.open_direct(false).ok()).as_ref()
    }

    /// Whether the page cache has most of `length` bytes at `offset`, so that a direct read would only be slower; also if that cannot be
    /// told (Linux before 6.5).
    fn is_cached(&self, offset: u64, length: usize) -> bool {
        self.cached(offset, length as u64).is_none_or(|cached| cached.bytes > length as u64 / 2)
    }

    /// Runs a sync; poisons the handle if it fails, whatever the reason.
    fn sync_with(&self, sync: impl FnOnce(&File) -> Result<(), Errno>) -> io::Result<()> {
        self.poison.check(&self.path)?;
        sync(&self.file).map_err(|errno| {
            self.poison.set();
            errno.into()
        })
    }
}

impl VfsFile for HostFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn read_large_at(&self, buffer: &mut [u8], offset: u64, from: ReadFrom) -> io::Result<usize> {
        let aligned = offset.is_multiple_of(DIRECT_ALIGN as u64)
            && buffer.len().is_multiple_of(DIRECT_ALIGN)
            && buffer.as_ptr().addr().is_multiple_of(DIRECT_ALIGN);
        if !aligned || (from == ReadFrom::Nearest && self.is_cached(offset, buffer.len())) {
            return self.read_at(buffer, offset);
        }
        let read = self.uncached().map(|uncached| uncached.read_at(buffer, offset));
        // The file system may say only now that it cannot; and an error may be the device's: an ordinary read tells.
        read.and_then(Result::ok).map_or_else(|| self.read_at(buffer, offset), Ok)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        self.file.write_all_at(bytes, offset)
    }

    fn read_many(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        let alone = parts.len() < 2;
        let results = if alone { None } else { self.contexts.read(self.file.as_fd(), parts) };
        let results = results.unwrap_or_else(|| vec![0; parts.len()]);
        for ((offset, buffer), result) in parts.iter_mut().zip(results) {
            let done = completed(result)?;
            // The end of the file, or a part of a request alone: an ordinary read goes on, and tells which.
            if let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
                self.read_exact_at(rest, *offset + done as u64)?;
            }
        }
        Ok(())
    }

    fn write_many(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        self.poison.check(&self.path)?;
        let alone = parts.len() < 2;
        let results = if alone { None } else { self.contexts.write(self.file.as_fd(), parts) };
        let results = results.unwrap_or_else(|| vec![0; parts.len()]);
        for ((offset, bytes), result) in parts.iter().zip(results) {
            let done = completed(result)?;
            if let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
                self.write_all_at(rest, *offset + done as u64)?;
            }
        }
        Ok(())
    }

    fn cached(&self, offset: u64, length: u64) -> Option<Cached> {
        let range = [offset, length];
        let mut stat = [0_u64; 5];
        // SAFETY: cachestat(2) reads two 64-bit numbers, writes five, and keeps neither address.
        let done = unsafe {
            libc::syscall(CACHESTAT, self.file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0 as libc::c_uint)
        };
        let [pages, dirty, writeback, ..] = stat;
        let bytes = |pages: u64| pages.saturating_mul(DIRECT_ALIGN as u64);
        (done == 0).then(|| Cached { bytes: bytes(pages), dirty: bytes(dirty.saturating_add(writeback)) })
    }

    fn direct(&self) -> io::Result<Option<Box<dyn VfsFile>>> {
        match self.open_direct(true) {
            Ok(file) => Ok(Some(Box::new(HostFile::new(file, &self.path)))),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One `pwritev2(RWF_DSYNC)`: flushes the range that it wrote, not whatever else of the file is dirty. On a
    /// large mapped file that is the difference between one page and all of them.
    fn write_durable_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        let mut done = 0;
        while done < bytes.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::InvalidInput)?;
            let rest = [IoSlice::new(&bytes[done..])];
            match rustix::io::pwritev2(&self.file, &rest, at, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                // A file system that does not know the flag.
                Err(Errno::OPNOTSUPP) => {
                    self.file.write_all_at(&bytes[done..], at)?;
                    return self.sync_data();
                }
                // The system call does not say which half of it failed, the write or the flush.
                Err(errno) => {
                    if errno != Errno::NOSPC && errno != Errno::DQUOT {
                        self.poison.set();
                    }
                    return Err(errno.into());
                }
            }
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        self.file.set_len(length)
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        if length == 0 {
            return Ok(());
        }
        let reserve = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, length);
        Ok(retry_on_intr(reserve)?)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        if length == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, length))?)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.poison.check(&self.path)?;
        if length == 0 {
            return Ok(());
        }
        // Keeps the blocks, where giving them back and asking for them anew took 250 ms for 8 GiB on ext4.
        match retry_on_intr(|| rustix::fs::fallocate(&self.file, FallocateFlags::ZERO_RANGE, offset, length)) {
            Ok(()) => Ok(()),
            // tmpfs has none.
            Err(Errno::OPNOTSUPP) => {
                self.punch_hole(offset, length)?;
                self.allocate(offset, length)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync_with(|file| rustix::fs::fdatasync(file))
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_with(|file| rustix::fs::fsync(file))
    }

    fn try_lock(&self) -> io::Result<bool> {
        match retry_on_intr(|| rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive)) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, bytes: &[u8]) -> Box<dyn VfsFile> {
        let file = HostVfs.open(path, OpenMode::CreateNew).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    #[test]
    fn what_was_written_is_read_and_listed() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        HostVfs.create_dir_all(&deep).unwrap();
        HostVfs.create_dir_all(&deep).unwrap();
        let file = write(&deep.join("x"), b"hello");
        file.write_durable_at(b"HE", 0).unwrap();
        file.sync_data().unwrap();
        file.sync_all().unwrap();
        HostVfs.rename(&deep.join("x"), &deep.join("y")).unwrap();
        HostVfs.sync_dir(&deep).unwrap();
        let file = HostVfs.open(&deep.join("y"), OpenMode::Read).unwrap();
        let mut found = [0; 5];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"HEllo");
        let end = file.read_exact_at(&mut found, 1).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        write(&deep.join("b"), b"");
        let names: Vec<_> = HostVfs.read_dir(&deep).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["b", "y"]);
        assert_eq!(HostVfs.entry_kind(&deep).unwrap(), Some(EntryKind::Directory));
        assert_eq!(HostVfs.entry_kind(&deep.join("none")).unwrap(), None);
        assert!(HostVfs.space(&deep).unwrap().unwrap().available > 0);
    }

    #[test]
    fn large_reads_find_what_ordinary_ones_do_aligned_or_not_cached_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..70_000_u32).map(|at| (at % 251) as u8).collect();
        let file = write(&dir.path().join("f"), &bytes);
        let mut buffer = crate::IoBuffer::new(1 << 17).unwrap();
        for evict in [false, true] {
            for from in [ReadFrom::Nearest, ReadFrom::Medium] {
                for (offset, length) in
                    [(0, 8192), (4096, 65_536), (65_536, 8192), (1, 4096), (4096, 5), (131_072, 4096)]
                {
                    if evict {
                        file.sync_data().unwrap();
                        let descriptor = file.descriptor().unwrap();
                        rustix::fs::fadvise(descriptor, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    }
                    buffer.fill(0xEE);
                    let count = file.read_large_at(&mut buffer[..length], offset as u64, from).unwrap();
                    let expected = bytes.get(offset..bytes.len().min(offset + length)).unwrap_or_default();
                    assert_eq!(buffer[..count], *expected, "{offset}+{length}");
                    assert!(buffer[length..].iter().all(|byte| *byte == 0xEE));
                }
            }
        }
    }

    #[test]
    fn many_at_a_time_are_as_one_after_the_other_past_the_page_cache_or_not() {
        const PART: usize = 4096;
        let dir = tempfile::tempdir().unwrap();
        let file = write(&dir.path().join("f"), &vec![0; 512 * PART]);
        let direct = file.direct().unwrap();
        for file in [Some(file), direct].into_iter().flatten() {
            let mut buffer = crate::IoBuffer::new(300 * PART).unwrap();
            buffer.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / PART + at) as u8);
            let place = |index: usize| ((index * 7) % 512 * PART) as u64;
            let parts: Vec<_> = buffer.chunks_exact(PART).enumerate().map(|(i, bytes)| (place(i), bytes)).collect();
            file.write_many(&parts).unwrap();
            file.sync_data().unwrap();
            let mut one = crate::IoBuffer::new(PART).unwrap();
            for (offset, bytes) in &parts {
                file.read_exact_at(&mut one, *offset).unwrap();
                assert_eq!(one[..], **bytes);
            }
            let mut again = crate::IoBuffer::new(300 * PART).unwrap();
            let mut parts: Vec<_> =
                again.chunks_exact_mut(PART).enumerate().map(|(i, bytes)| (place(i), bytes)).collect();
            file.read_many(&mut parts).unwrap();
            assert!(again[..] == buffer[..]);
            let (first, rest) = again.split_at_mut(PART);
            let mut beyond = [(0, first), (511 * PART as u64, &mut rest[..2 * PART])];
            assert_eq!(file.read_many(&mut beyond).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn open_modes_differ_in_what_they_ask_and_keep() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for mode in [OpenMode::Read, OpenMode::ReadWrite] {
            assert_eq!(HostVfs.open(&path, mode).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
        drop(write(&path, b"12345"));
        let again = HostVfs.open(&path, OpenMode::CreateNew).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(HostVfs.open(&path, OpenMode::OpenOrCreate).unwrap().len().unwrap(), 5);
        assert!(HostVfs.open(&path, OpenMode::CreateTruncate).unwrap().is_empty().unwrap());
        let read = HostVfs.open(&path, OpenMode::Read).unwrap();
        assert!(read.write_all_at(b"x", 0).is_err());
    }

    #[test]
    fn reserved_space_reads_as_zero_and_a_hole_does_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = write(&dir.path().join("f"), b"");
        file.allocate(0, 8192).unwrap();
        assert_eq!(file.len().unwrap(), 8192);
        file.write_all_at(&[7; 8192], 0).unwrap();
        file.punch_hole(4096, 4096).unwrap();
        let mut found = [1; 8192];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found[..4096], [7; 4096]);
        assert_eq!(found[4096..], [0; 4096]);
    }

    #[test]
    fn a_lock_excludes_another_handle_and_dies_with_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let first = write(&path, b"");
        let second = HostVfs.open(&path, OpenMode::ReadWrite).unwrap();
        assert!(first.try_lock().unwrap());
        assert!(!second.try_lock().unwrap());
        drop(first);
        assert!(second.try_lock().unwrap());
    }

    #[test]
    fn a_fifo_is_refused_and_does_not_hang() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(HostVfs.open(&path, OpenMode::Read).is_err());
        assert!(HostVfs.open(&path, OpenMode::ReadWrite).is_err());
    }

    #[test]
    fn after_a_failed_sync_nothing_is_believed() {
        // A descriptor without a disk behind it is the one thing on any machine whose fdatasync fails.
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let file = HostFile::new(File::from(reader), Path::new("pipe"));
        let first = file.sync_data().unwrap_err();
        assert!(!crate::is_poisoned(&first), "the first failure is the file system's own");
        assert!(crate::is_poisoned(&file.sync_data().unwrap_err()));
        assert!(crate::is_poisoned(&file.sync_all().unwrap_err()));
        assert!(crate::is_poisoned(&file.write_all_at(b"x", 0).unwrap_err()));
        assert!(crate::is_poisoned(&file.write_durable_at(b"x", 0).unwrap_err()));
        assert!(crate::is_poisoned(&file.set_len(0).unwrap_err()));
    }
}
