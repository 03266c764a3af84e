//! A simulated disk that loses, tears and reorders at a cut.
//!
//! # The model
//!
//! A [`CrashVfs`] keeps two views: what processes see (the page cache), and what is durable. Between them hang the
//! operations that no sync has covered. [`CrashVfs::after_cut`] builds *one* disk that the power failing now may
//! leave, chosen by a seed:
//!
//! * **Bytes.** Each write, truncation, reservation and hole since the last successful sync of that file is applied,
//!   dropped, or torn: every 512-byte sector of it for itself. A sector that survives shows the page cache's content of
//!   that moment, so a later write may survive where an earlier one elsewhere did not (reordering), but a sector
//!   never mixes bytes of different moments. That a sector is atomic is the one kindness assumed.
//! * **Length** and reservation are metadata of the same operation: with `torn` they survive or not independently of the
//!   bytes. Bytes past the surviving length are gone; bytes within it that never arrived are zero.
//! * **Names.** Each create, mkdir, remove and rename since [`crate::Vfs::sync_dir`] of its directory survives or
//!   not, independently of all others and of the file's bytes. A rename is atomic; one between two directories is
//!   durable after both were synced. What hangs below a name that is lost is lost.
//!   A sync of a file does not make its name durable, a sync of a directory not its own name in its parent.
//! * **The operation at the cut** ([`CrashVfs::cut_at`]) was in flight: it fails, yet may have happened in part or whole,
//!   except that a sync in flight has made nothing certain.
//!
//! Seeds 0, 1 and 2 are the corners: nothing that was not synced survives, all of it does, all bytes are torn by sectors.
//! Any other seed mixes. The same operations and the same seed give the same disk. Where few operations hang,
//! [`CrashVfs::every_cut`] goes through *all* disks that the cut may leave, and [`CrashVfs::digest`] tells them apart.
//!
//! [`CrashVfs::after_kill`] is the other accident: all processes died, the kernel lives. Everything that had returned is
//! there, and as little of it is durable as before, so that a cut may follow.
//!
//! **Faults**: a sync that fails with `EIO` ([`CrashVfs::fail_sync`]) loses what it was to save, as Linux does: some of it is on
//! the disk, the rest is never written though reads still show it, and the handle is poisoned. A full disk
//! ([`CrashVfs::set_capacity`]) writes or reserves what fits and then says `StorageFull`. Rot: [`CrashVfs::flip`].
//!
//! Not modelled: hard and symbolic links, permissions, mappings ([`crate::VfsFile::descriptor`] is `None`), space
//! held by removed files that are still open, file systems that show stale blocks after a cut.

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::poison::Poison;
use crate::{DirEntry, EntryKind, OpenMode, Space, Vfs, VfsFile};
use choices::{Choices, Turn};
use content::SECTOR;
use disk::{Disk, Id};

mod choices;
mod content;
mod disk;
#[cfg(test)]
mod tests;

/// The error of every operation from the cut on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerCut;

impl std::fmt::Display for PowerCut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the power of the simulated disk is gone")
    }
}

impl std::error::Error for PowerCut {}

/// Whether `error` is that of a simulated cut.
#[must_use]
pub fn is_power_cut(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<PowerCut>())
}

/// How finely [`CrashVfs::every_cut`] takes operations apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// Each operation that no sync has covered happened or did not: every reordering, nothing torn.
    Operation,
    /// Each sector of it, its metadata, and each name for itself: everything that the model allows.
    Sector,
}

/// Every disk that a cut may leave. Some may be equal: see [`CrashVfs::digest`].
#[derive(Debug)]
pub struct EveryCut {
    disk: Disk,
    turn: Option<Turn>,
}

impl Iterator for EveryCut {
    type Item = CrashVfs;

    fn next(&mut self) -> Option<CrashVfs> {
        let mut choices = Choices::Turn(self.turn.take()?);
        let left = self.disk.after_cut(&mut choices);
        if let Choices::Turn(turn) = choices {
            self.turn = turn.next();
        }
        Some(CrashVfs::of(left))
    }
}

/// A simulated disk. Clones share it, as processes share a disk.
#[derive(Debug, Clone)]
pub struct CrashVfs {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    /// The disk just before the operation at which the power went.
    before_cut: Option<Disk>,
    cut_at: Option<u64>,
    ops: Vec<String>,
    syncs: u64,
    fail_sync: Option<u64>,
    handles: u64,
}

impl Default for CrashVfs {
    fn default() -> Self {
        Self::new()
    }
}

impl CrashVfs {
    /// An empty disk without faults.
    #[must_use]
    pub fn new() -> Self {
        Self::of(Disk::empty())
    }

    fn of(disk: Disk) -> Self {
        let shared =
            Shared { disk, before_cut: None, cut_at: None, ops: Vec::new(), syncs: 0, fail_sync: None, handles: 0 };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many mutating operations there were: creates, truncations, writes, reservations, holes, syncs of files
    /// and directories, renames, removes, mkdirs. The first is number 1.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.lock().ops.len() as u64
    }

    /// Those operations in words, for the message of a failed test.
    #[must_use]
    pub fn trace(&self) -> Vec<String> {
        self.lock().ops.clone()
    }

    /// How many of them were syncs, of files or directories, failed ones included. The first is number 1.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// Cuts the power during mutating operation `number` (counted from 1 since this disk was made). That operation and all that
    /// follow it, reads too, fail with [`PowerCut`].
    pub fn cut_at(&self, number: u64) {
        self.lock().cut_at = Some(number);
    }

    /// Whether the power is gone.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.lock().before_cut.is_some()
    }

    /// A fresh disk with one of the states that the cut may have left (or would leave, were it now).
    #[must_use]
    pub fn after_cut(&self, seed: u64) -> Self {
        Self::of(self.lock().disk.after_cut(&mut Choices::new(seed)))
    }

    /// All states that the cut may have left (or would leave, were it now), at that grain. They are at most
    /// 2^[`CrashVfs::choices`], so look at that first.
    #[must_use]
    pub fn every_cut(&self, grain: Grain) -> EveryCut {
        EveryCut { disk: self.lock().disk.clone(), turn: Some(Turn::all(grain, false)) }
    }

    /// How many yes-or-no choices decide what the cut leaves.
    #[must_use]
    pub fn choices(&self, grain: Grain) -> u32 {
        let disk = &self.lock().disk;
        let asked = [false, true].map(|answer| {
            let mut choices = Choices::Turn(Turn::all(grain, answer));
            drop(disk.after_cut(&mut choices));
            if let Choices::Turn(turn) = choices { turn.asked() } else { 0 }
        });
        asked.into_iter().max().unwrap_or(0)
    }

    /// Tells disks apart by what can be read on them: a 64-bit hash over names, lengths and bytes, the same in every run.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.lock().disk.digest(&mut hasher);
        hasher.finish()
    }

    /// A fresh disk as it is when all processes were killed just before the operation of the cut (or now).
    #[must_use]
    pub fn after_kill(&self) -> Self {
        let shared = self.lock();
        Self::of(shared.before_cut.as_ref().unwrap_or(&shared.disk).after_kill())
    }

    /// Lets sync `number` (counted from 1, see [`CrashVfs::syncs`]) fail with `EIO`.
    pub fn fail_sync(&self, number: u64) {
        self.lock().fail_sync = Some(number);
    }

    /// Sets the size of the disk in bytes, rounded down to sectors. A name takes one sector beside its file's bytes.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().disk.capacity = bytes / SECTOR;
    }

    /// Bytes in use, see [`CrashVfs::set_capacity`].
    #[must_use]
    pub fn used(&self) -> u64 {
        self.lock().disk.used() * SECTOR
    }

    /// Flips the bits of `mask` in the byte at `offset`, in the page cache and on the disk. Past the end: nothing.
    ///
    /// # Errors
    /// `NotFound`, `IsADirectory`.
    pub fn flip(&self, path: &Path, offset: u64, mask: u8) -> io::Result<()> {
        self.lock().disk.flip(path, offset, mask)
    }

    /// As [`Vfs::open`].
    pub(crate) fn open_file(&self, path: &Path, mode: OpenMode) -> io::Result<CrashFile> {
        let mut shared = self.lock();
        shared.powered()?;
        let id = match (shared.disk.lookup(path), mode) {
            (Ok(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Ok(id), _) => {
                shared.disk.file(id)?;
                if mode == OpenMode::CreateTruncate {
                    shared.op(format!("truncate {}", path.display()), |s| s.disk.set_len(id, 0))?;
                }
                id
            }
            (Err(error), OpenMode::Read | OpenMode::ReadWrite) => return Err(error),
            (Err(error), _) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            (Err(_), _) => {
                shared.op(format!("create {}", path.display()), |s| s.disk.create(path).map(drop))?;
                shared.disk.lookup(path)?
            }
        };
        shared.handles += 1;
        Ok(CrashFile {
            vfs: self.clone(),
            id,
            handle: shared.handles,
            writable: mode != OpenMode::Read,
            path: path.to_owned(),
            poison: Poison::default(),
        })
    }
}

impl Shared {
    fn powered(&self) -> io::Result<()> {
        match self.before_cut {
            Some(_) => Err(io::Error::other(PowerCut)),
            None => Ok(()),
        }
    }

    /// Runs one mutating operation under its number; `happens` does it.
    fn op(&mut self, what: String, happens: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        self.powered()?;
        self.ops.push(what);
        if self.cut_at != Some(self.ops.len() as u64) {
            return happens(self);
        }
        let before = self.disk.clone();
        // In flight: whether it fails for another reason no longer matters.
        drop(happens(self));
        self.before_cut = Some(before);
        Err(io::Error::other(PowerCut))
    }

    /// Runs a sync under its number; `lose` is what happens if it is to fail, `keep` if not.
    fn sync(
        &mut self,
        what: String,
        keep: impl FnOnce(&mut Disk) -> io::Result<()>,
        lose: impl FnOnce(&mut Disk, &mut Choices) -> io::Result<()>,
    ) -> io::Result<()> {
        self.powered()?;
        let cut = self.cut_at == Some(self.ops.len() as u64 + 1);
        self.op(what, |shared| {
            shared.syncs += 1;
            if cut {
                return Ok(());
            }
            if shared.fail_sync == Some(shared.syncs) {
                lose(&mut shared.disk, &mut Choices::new(shared.ops.len() as u64))?;
                return Err(Errno::IO.into());
            }
            keep(&mut shared.disk)
        })
    }
}

impl Vfs for CrashVfs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn VfsFile>> {
        Ok(Box::new(self.open_file(path, mode)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let what = format!("rename {} to {}", from.display(), to.display());
        self.lock().op(what, |s| s.disk.rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let what = format!("remove {}", path.display());
        self.lock().op(what, |s| s.disk.remove(path, EntryKind::File))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut shared = self.lock();
        shared.powered()?;
        let mut so_far = PathBuf::new();
        for name in Disk::names_of(path)? {
            so_far.push(name);
            match shared.disk.lookup(&so_far) {
                Ok(id) if shared.disk.kind(id) == EntryKind::Directory => {}
                Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
                Err(_) => shared.op(format!("mkdir {}", so_far.display()), |s| s.disk.create_dir(&so_far))?,
            }
        }
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let what = format!("rmdir {}", path.display());
        self.lock().op(what, |s| s.disk.remove(path, EntryKind::Directory))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let shared = self.lock();
        shared.powered()?;
        let found = shared.disk.list(path)?.into_iter();
        Ok(found.map(|(name, kind)| DirEntry { name, kind }).collect())
    }

    /// A failed one leaves the names as uncertain as they were.
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let what = format!("sync directory {}", path.display());
        self.lock().sync(what, |disk| disk.sync_dir(path), |_, _| Ok(()))
    }

    fn entry_kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        let shared = self.lock();
        shared.powered()?;
        match shared.disk.lookup(path) {
            Ok(id) => Ok(Some(shared.disk.kind(id))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn space(&self, _path: &Path) -> io::Result<Option<Space>> {
        let shared = self.lock();
        shared.powered()?;
        let total = shared.disk.capacity;
        let available = total.saturating_sub(shared.disk.used());
        Ok(Some(Space { total: total * SECTOR, available: available * SECTOR }))
    }
}

/// A handle on a file of a [`CrashVfs`].
#[derive(Debug)]
pub(crate) struct CrashFile {
    vfs: CrashVfs,
    id: Id,
    handle: u64,
    writable: bool,
    path: PathBuf,
    poison: Poison,
}

impl CrashFile {
    fn change(&self, what: &str, happens: impl FnOnce(&mut Disk) -> io::Result<()>) -> io::Result<()> {
        self.poison.check(&self.path)?;
        if !self.writable {
            return Err(Errno::BADF.into());
        }
        let what = format!("{what} {}", self.path.display());
        self.vfs.lock().op(what, |s| happens(&mut s.disk))
    }

    /// Writes bytes that are on the medium at once, whatever else of the file is not.
    pub(crate) fn arrive(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let what = format!("write durably {} bytes at {offset} of", bytes.len());
        self.change(&what, |disk| disk.arrive(self.id, bytes, offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.poison.check(&self.path)?;
        let what = format!("sync {}", self.path.display());
        let id = self.id;
        let synced = self.vfs.lock().sync(what, |disk| disk.sync_file(id), |disk, by| disk.lose_file(id, by));
        if synced.is_err() {
            self.poison.set();
        }
        synced
    }
}

impl VfsFile for CrashFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut shared = self.vfs.lock();
        shared.powered()?;
        Ok(shared.disk.file(self.id)?.live.read(buffer, offset))
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let what = format!("write {} bytes at {offset} of", bytes.len());
        self.change(&what, |disk| disk.write(self.id, bytes, offset))
    }

    fn len(&self) -> io::Result<u64> {
        let mut shared = self.vfs.lock();
        shared.powered()?;
        Ok(shared.disk.file(self.id)?.live.length)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(&format!("set length {length} of"), |disk| disk.set_len(self.id, length))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let what = format!("reserve {length} bytes at {offset} of");
        self.change(&what, |disk| disk.allocate(self.id, offset, length))
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let what = format!("punch {length} bytes at {offset} of");
        self.change(&what, |disk| disk.punch(self.id, offset, length))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync()
    }

    fn try_lock(&self) -> io::Result<bool> {
        let mut shared = self.vfs.lock();
        shared.powered()?;
        let file = shared.disk.file(self.id)?;
        let owner = *file.lock.get_or_insert(self.handle);
        Ok(owner == self.handle)
    }

    fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

impl Drop for CrashFile {
    fn drop(&mut self) {
        if let Ok(file) = self.vfs.lock().disk.file(self.id)
            && file.lock == Some(self.handle)
        {
            file.lock = None;
        }
    }
}
