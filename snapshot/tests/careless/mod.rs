//! A disk under a store that is careless about it: calls that matter are left out, come too late, or go a block too far. To the
//! disk it looks as if the mistake were in the store's code.
#![allow(clippy::unwrap_used)] // Part of a test.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vfs::crash::CrashVfs;
use vfs::{DirEntry, EntryKind, OpenMode, Space, Vfs, VfsFile};

const BLOCK: u64 = 4096;

/// Whether the name of a file or directory is meant.
type Which = fn(&str) -> bool;

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mistake {
    /// These files are not synced.
    NoSync(Which),
    /// These directories are not synced.
    NoDirSync(Which),
    /// Ledgers are synced only by whoever wrote to them.
    NoSyncOfOthersWrites,
    /// Packs are synced after the commit and not before.
    LateSync,
    /// A file is replaced by writing over it.
    ReplaceInPlace,
    /// The old file is removed before the new one is renamed.
    RemoveThenRename,
    /// These files are not written.
    NoWrite(Which),
    /// The last sector of each write to these is left out.
    ShortWrite(Which),
    /// Holes are not punched.
    NoHole,
    /// Holes are a block too long.
    LongHole,
    /// Files are not removed.
    NoRemove,
    /// Packs are cut a block too short.
    ShortCut,
    /// Packs are not cut.
    NoCut,
}

fn is_data(name: &str) -> bool {
    name.starts_with("data-") && !name.ends_with(".new")
}

fn is_archive(name: &str) -> bool {
    name.starts_with("arc-") && !name.ends_with(".new")
}

fn is_pack(name: &str) -> bool {
    is_data(name) || is_archive(name)
}

fn is_ledger(name: &str) -> bool {
    name == "ledger-a" || name == "ledger-b"
}

/// All of them, by what a reviewer would say.
pub(crate) const MISTAKES: [(&str, Mistake); 24] = [
    ("data packs are not synced", Mistake::NoSync(is_data)),
    ("the first mirror of the archive is not synced", Mistake::NoSync(|name| name.ends_with(".a"))),
    ("the second mirror of the archive is not synced", Mistake::NoSync(|name| name.ends_with(".b"))),
    ("neither mirror of the archive is synced", Mistake::NoSync(is_archive)),
    ("ledger-a is not synced", Mistake::NoSync(|name| name == "ledger-a")),
    ("ledger-b is not synced", Mistake::NoSync(|name| name == "ledger-b")),
    ("no ledger is synced", Mistake::NoSync(is_ledger)),
    (
        "a rewritten ledger is renamed before it is synced",
        Mistake::NoSync(|name| name.starts_with("ledger") && name.ends_with(".new")),
    ),
    (
        "a repaired pack is renamed before it is synced",
        Mistake::NoSync(|name| !name.starts_with("ledger") && name.ends_with(".new")),
    ),
    ("the names of packs are not synced", Mistake::NoDirSync(|name| name == "packs")),
    ("the names of ledgers are not synced", Mistake::NoDirSync(|name| name == "store")),
    ("the name of the store is not synced", Mistake::NoDirSync(|name| name == "pool")),
    ("a sweep begins before the purge is durable", Mistake::NoSyncOfOthersWrites),
    ("packs are synced after the commit", Mistake::LateSync),
    ("files are replaced in place", Mistake::ReplaceInPlace),
    ("the old file goes before the new one comes", Mistake::RemoveThenRename),
    ("the second mirror of the archive is not written", Mistake::NoWrite(|name| name.ends_with(".b"))),
    ("the second ledger is not written", Mistake::NoWrite(|name| name == "ledger-b")),
    ("the last sector of a page is not written", Mistake::ShortWrite(is_data)),
    ("dead pages are not punched out", Mistake::NoHole),
    ("a hole is one block too long", Mistake::LongHole),
    ("dead packs are not removed", Mistake::NoRemove),
    ("a pack is cut one block too short", Mistake::ShortCut),
    ("the tail of a dead writer is not cut", Mistake::NoCut),
];

/// The disk, as a careless store uses it.
#[derive(Debug)]
pub(crate) struct Careless {
    disk: CrashVfs,
    mistake: Mistake,
    late: Arc<Late>,
}

/// Files whose sync was put off.
#[derive(Default)]
struct Late(Mutex<Vec<PathBuf>>);

impl fmt::Debug for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Late")
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

impl Careless {
    pub(crate) fn new(disk: &CrashVfs, mistake: Mistake) -> Self {
        Self { disk: disk.clone(), mistake, late: Arc::default() }
    }

    fn replace_in_place(&self, from: &Path, to: &Path) -> io::Result<()> {
        let old = self.disk.open(from, OpenMode::Read)?;
        let mut bytes = vec![0; old.len()? as usize];
        old.read_exact_at(&mut bytes, 0)?;
        let new = self.disk.open(to, OpenMode::CreateTruncate)?;
        new.write_all_at(&bytes, 0)?;
        new.sync_all()?;
        self.disk.remove_file(from)
    }
}

impl Vfs for Careless {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn VfsFile>> {
        let name = name_of(path);
        Ok(Box::new(CarelessFile {
            file: self.disk.open(path, mode)?,
            name,
            path: path.to_owned(),
            disk: self.disk.clone(),
            mistake: self.mistake,
            wrote: AtomicBool::new(false),
            late: Arc::clone(&self.late),
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self.mistake {
            Mistake::ReplaceInPlace => return self.replace_in_place(from, to),
            Mistake::RemoveThenRename if self.disk.entry_kind(to)?.is_some() => self.disk.remove_file(to)?,
            _ => {}
        }
        self.disk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        if matches!(self.mistake, Mistake::NoRemove) { Ok(()) } else { self.disk.remove_file(path) }
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk.read_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match self.mistake {
            Mistake::NoDirSync(which) if which(&name_of(path)) => Ok(()),
            _ => self.disk.sync_dir(path),
        }
    }

    fn entry_kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        self.disk.entry_kind(path)
    }

    fn space(&self, path: &Path) -> io::Result<Option<Space>> {
        self.disk.space(path)
    }
}

#[derive(Debug)]
struct CarelessFile {
    file: Box<dyn VfsFile>,
    name: String,
    path: PathBuf,
    disk: CrashVfs,
    mistake: Mistake,
    wrote: AtomicBool,
    late: Arc<Late>,
}

impl CarelessFile {
    fn sync(&self) -> io::Result<()> {
        match self.mistake {
            Mistake::NoSync(which) if which(&self.name) => return Ok(()),
            Mistake::NoSyncOfOthersWrites if is_ledger(&self.name) && !self.wrote.load(Ordering::Relaxed) => {
                return Ok(());
            }
            Mistake::LateSync if is_pack(&self.name) => {
                self.late.0.lock().unwrap().push(self.path.clone());
                return Ok(());
            }
            _ => {}
        }
        self.file.sync_all()?;
        if self.name == "ledger-b" {
            for path in std::mem::take(&mut *self.late.0.lock().unwrap()) {
                self.disk.open(&path, OpenMode::ReadWrite)?.sync_all()?;
            }
        }
        Ok(())
    }
}

impl VfsFile for CarelessFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.wrote.store(true, Ordering::Relaxed);
        match self.mistake {
            Mistake::NoWrite(which) if which(&self.name) => Ok(()),
            Mistake::ShortWrite(which) if which(&self.name) => {
                self.file.write_all_at(&bytes[..bytes.len().saturating_sub(512)], offset)?;
                self.file.set_len(self.file.len()?.max(offset + bytes.len() as u64))
            }
            _ => self.file.write_all_at(bytes, offset),
        }
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match self.mistake {
            Mistake::ShortCut if is_pack(&self.name) => self.file.set_len(length.saturating_sub(BLOCK)),
            Mistake::NoCut if is_pack(&self.name) => Ok(()),
            _ => self.file.set_len(length),
        }
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.allocate(offset, length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.mistake {
            Mistake::NoHole => Ok(()),
            Mistake::LongHole => self.file.punch_hole(offset, length + BLOCK),
            _ => self.file.punch_hole(offset, length),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync()
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.file.try_lock()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
