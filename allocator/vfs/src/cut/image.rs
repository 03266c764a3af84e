//! What a directory holds for certain, and what a cut leaves of what was done to it since.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::log::{Entry, Kind};
use super::record::mode_of;
use crate::crash::{CrashFile, CrashVfs};
use crate::{EntryKind, HostVfs, OpenMode, Vfs, VfsFile};

/// What is compared and restored at a time.
const PAGE: usize = 4096;
/// What is read at a time.
const CHUNK: usize = 64 * PAGE;

/// A directory as it was when all of it counted as durable, held in memory: as much as its files have data.
#[derive(Debug)]
pub struct Image {
    root: PathBuf,
    disk: CrashVfs,
}

/// What a cut did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loss {
    /// Bytes that were written past the record (through mappings, say) and were on the medium, in whole pages.
    pub past_record_durable: u64,
    /// The same, but only in the page cache.
    pub past_record_cached: u64,
    /// Bytes that are another thing now than they were just before the cut, in whole pages.
    pub lost: u64,
    /// Files and directories that were there just before the cut, and are not now.
    pub lost_names: u64,
}

/// Why a cut could not be simulated.
fn broken(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot simulate a cut: {what} {}: {error}", path.display()))
}

/// Where a file of the host is on the model, if it is in the directory.
fn inside<'a>(root: &Path, path: &'a Path) -> Option<&'a Path> {
    path.strip_prefix(root).ok()
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Fills as much of `buffer` as there is.
fn read_up_to(file: &dyn VfsFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

impl Image {
    /// Reads all files below `root`; sockets and the like are left out. The directory must not change meanwhile, and is taken to be
    /// durable as it is.
    ///
    /// # Errors
    /// As the file system says.
    pub fn take(root: &Path) -> io::Result<Self> {
        let image = Self { root: root.to_owned(), disk: CrashVfs::new() };
        image.take_in(Path::new(""))?;
        Ok(image)
    }

    fn take_in(&self, directory: &Path) -> io::Result<()> {
        for entry in HostVfs.read_dir(&self.root.join(directory))? {
            let path = directory.join(&entry.name);
            match entry.kind {
                EntryKind::Directory => {
                    self.disk.create_dir_all(&path)?;
                    self.take_in(&path)?;
                }
                EntryKind::File => self.take_file(&path).map_err(|error| broken("reading", &path, &error))?,
                EntryKind::Other => {}
            }
        }
        self.disk.sync_dir(directory)
    }

    fn take_file(&self, path: &Path) -> io::Result<()> {
        let file = HostVfs.open(&self.root.join(path), OpenMode::Read)?;
        let model = self.disk.open_file(path, OpenMode::CreateNew)?;
        let length = file.len()?;
        // At once: where each piece reserved its own, that would take the square of their number.
        model.allocate(0, length)?;
        let mut buffer = vec![0; CHUNK];
        for offset in data(&*file, length) {
            let count = read_up_to(&*file, &mut buffer, offset)?;
            for (index, page) in buffer.get(..count).unwrap_or_default().chunks(PAGE).enumerate() {
                if !is_zero(page) {
                    model.write_all_at(page, offset + (index * PAGE) as u64)?;
                }
            }
        }
        model.sync_all()
    }

    /// Cuts the power after the operations of `record` (see [`super::record`]): what the cut takes is taken from the directory, too. No process may
    /// use it. What went past the record is on the medium if the kernel says so, by folios: bytes that were flushed, and had a neighbour
    /// written again, count as not. The same seed takes the same from the same operations; 0 all that was not durable, 1 nothing, others something between.
    ///
    /// # Errors
    /// As the file system says; `Unsupported` if the kernel does not tell what of a file is on its medium (Linux before 6.5).
    pub fn cut(self, record: &[u8], seed: u64) -> io::Result<Loss> {
        let entries = Entry::all(record);
        let synced = entries.iter().filter(|entry| entry.kind == Kind::Synced).map(|entry| entry.numbers[1]).collect();
        let mut replay = Replay { root: &self.root, disk: &self.disk, synced, files: HashMap::new() };
        for entry in &entries {
            replay
                .entry(entry)
                .map_err(|error| broken(&format!("replaying {:?} of", entry.kind), &entry.path(), &error))?;
        }
        let mut loss = Loss::default();
        self.compare(Path::new(""), &mut loss)?;
        let left = Self { root: self.root, disk: self.disk.after_cut(seed) };
        left.put_back(Path::new(""), &mut loss)?;
        Ok(loss)
    }

    /// Takes into the model what the directory holds and the record does not.
    fn compare(&self, directory: &Path, loss: &mut Loss) -> io::Result<()> {
        for entry in self.disk.read_dir(directory)? {
            let path = directory.join(&entry.name);
            // What was on its way as the process ended: the model has it as it was before.
            if HostVfs.entry_kind(&self.root.join(&path))? != Some(entry.kind) {
                continue;
            }
            match entry.kind {
                EntryKind::Directory => self.compare(&path, loss)?,
                _ => self.compare_file(&path, loss).map_err(|error| broken("comparing", &path, &error))?,
            }
        }
        Ok(())
    }

    fn compare_file(&self, path: &Path, loss: &mut Loss) -> io::Result<()> {
        let file = HostVfs.open(&self.root.join(path), OpenMode::Read)?;
        let model = self.disk.open_file(path, OpenMode::ReadWrite)?;
        let length = file.len()?;
        if model.len()? != length {
            model.set_len(length)?;
        }
        let (mut found, mut known) = (vec![0; CHUNK], vec![0; CHUNK]);
        for offset in (0..length).step_by(CHUNK) {
            let count = read_up_to(&*file, &mut found, offset)?;
            known.fill(0);
            read_up_to(&model, &mut known, offset)?;
            let pages = found.get(..count).unwrap_or_default().chunks(PAGE).zip(known.chunks(PAGE)).enumerate();
            for (index, (now, before)) in pages {
                if before.starts_with(now) {
                    continue;
                }
                let at = offset + (index * PAGE) as u64;
                let cached = file.cached(at, PAGE as u64).ok_or(io::ErrorKind::Unsupported)?;
                if cached.dirty > 0 {
                    loss.past_record_cached += PAGE as u64;
                    model.write_all_at(now, at)?;
                } else {
                    loss.past_record_durable += PAGE as u64;
                    model.arrive(now, at)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the directory what the model holds.
    fn put_back(&self, directory: &Path, loss: &mut Loss) -> io::Result<()> {
        let entries = self.disk.read_dir(directory)?;
        let real = self.root.join(directory);
        let kept: BTreeSet<_> =
            entries.iter().map(|entry| (entry.name.clone(), entry.kind == EntryKind::File)).collect();
        for found in HostVfs.read_dir(&real)? {
            let path = real.join(&found.name);
            match found.kind {
                EntryKind::Other => continue,
                kind if kept.contains(&(found.name.clone(), kind == EntryKind::File)) => continue,
                EntryKind::File => fs::remove_file(&path)?,
                EntryKind::Directory => fs::remove_dir_all(&path)?,
            }
            loss.lost_names += 1;
        }
        for entry in entries {
            let path = directory.join(&entry.name);
            if entry.kind == EntryKind::Directory {
                HostVfs.create_dir_all(&self.root.join(&path))?;
                self.put_back(&path, loss)?;
            } else {
                self.put_back_file(&path, loss).map_err(|error| broken("restoring", &path, &error))?;
            }
        }
        Ok(())
    }

    fn put_back_file(&self, path: &Path, loss: &mut Loss) -> io::Result<()> {
        let file = HostVfs.open(&self.root.join(path), OpenMode::OpenOrCreate)?;
        let model = self.disk.open_file(path, OpenMode::Read)?;
        let length = model.len()?;
        let resized = file.len()? != length;
        if resized {
            file.set_len(length)?;
        }
        let before = loss.lost;
        let (mut found, mut left) = (vec![0; CHUNK], vec![0; CHUNK]);
        for offset in (0..length).step_by(CHUNK) {
            let count = read_up_to(&model, &mut left, offset)?;
            found.fill(0);
            read_up_to(&*file, &mut found, offset)?;
            let pages = left.get(..count).unwrap_or_default().chunks(PAGE).zip(found.chunks(PAGE)).enumerate();
            for (index, (page, now)) in pages.filter(|(_, (page, now))| !now.starts_with(page)) {
                debug_assert!(page.len() <= now.len());
                file.write_all_at(page, offset + (index * PAGE) as u64)?;
                loss.lost += PAGE as u64;
            }
        }
        // Else it would be the next life that waits for these bytes.
        if resized || loss.lost > before { file.sync_all() } else { Ok(()) }
    }
}

/// Where chunks begin that may have other bytes than zeros.
fn data(file: &dyn VfsFile, length: u64) -> Vec<u64> {
    let Some(descriptor) = file.descriptor() else { return (0..length).step_by(CHUNK).collect() };
    let mut chunks = Vec::new();
    let mut at = 0;
    // ENXIO: nothing more.
    while let Ok(start) = rustix::fs::seek(descriptor, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(descriptor, rustix::fs::SeekFrom::Hole(start)).unwrap_or(length);
        let first = (start / CHUNK as u64 * CHUNK as u64).max(at);
        chunks.extend((first..end.max(first)).step_by(CHUNK));
        at = chunks.last().map_or(end, |last| last + CHUNK as u64).max(end);
        if at >= length {
            break;
        }
    }
    chunks
}

/// A record that is replayed on a model.
struct Replay<'a> {
    root: &'a Path,
    disk: &'a CrashVfs,
    /// The syncs that came to their end.
    synced: HashSet<u64>,
    /// The files of handles; those outside of the directory are missing.
    files: HashMap<u64, Arc<CrashFile>>,
}

impl Replay<'_> {
    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        match entry.kind {
            Kind::Open | Kind::Again => self.open(entry),
            Kind::Write
            | Kind::WriteDurable
            | Kind::SetLen
            | Kind::Allocate
            | Kind::PunchHole
            | Kind::Zero
            | Kind::Sync => match self.files.get(&entry.numbers[0]) {
                Some(file) => self.change(entry, file),
                None => Ok(()),
            },
            Kind::SyncDir | Kind::CreateDirAll | Kind::RemoveDir | Kind::RemoveFile => {
                let path = entry.path();
                let Some(path) = inside(self.root, &path) else { return Ok(()) };
                match entry.kind {
                    Kind::SyncDir if self.synced.contains(&entry.numbers[1]) => self.disk.sync_dir(path),
                    Kind::CreateDirAll => self.disk.create_dir_all(path),
                    Kind::RemoveDir => self.disk.remove_dir(path),
                    Kind::RemoveFile => self.disk.remove_file(path),
                    _ => Ok(()),
                }
            }
            Kind::Rename => {
                let Some((from, to)) = entry.two_paths() else { return Err(io::ErrorKind::InvalidData.into()) };
                match (inside(self.root, &from), inside(self.root, &to)) {
                    (Some(from), Some(to)) => self.disk.rename(from, to),
                    _ => Ok(()),
                }
            }
            Kind::Synced | Kind::Point => Ok(()),
        }
    }

    fn open(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let [handle, number, _] = entry.numbers;
        let file = if entry.kind == Kind::Again {
            self.files.get(&number).map(Arc::clone)
        } else {
            let path = entry.path();
            let opened = inside(self.root, &path).map(|path| {
                // Directories of what need not last are made past the record.
                path.parent().map_or(Ok(()), |parent| self.disk.create_dir_all(parent))?;
                self.disk.open_file(path, mode_of(number))
            });
            opened.transpose()?.map(Arc::new)
        };
        if let Some(file) = file {
            self.files.insert(handle, file);
        }
        Ok(())
    }

    fn change(&self, entry: &Entry<'_>, file: &CrashFile) -> io::Result<()> {
        let [_, a, b] = entry.numbers;
        match entry.kind {
            Kind::Write => file.write_all_at(entry.payload, a),
            Kind::WriteDurable => file.arrive(entry.payload, a),
            Kind::SetLen => file.set_len(a),
            Kind::Allocate => file.allocate(a, b),
            Kind::PunchHole => file.punch_hole(a, b),
            Kind::Zero => file.zero(a, b),
            // In the place of its begin: what came after that was not covered.
            Kind::Sync if self.synced.contains(&a) => file.sync_all(),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "image/tests.rs"]
mod tests;
