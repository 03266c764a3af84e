//! The simulated disk: what the processes see, what is durable, and what hangs between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Component, Path};

use rustix::io::Errno;

use super::choices::{Choices, Fate};
use super::content::{Change, Content, SECTOR, sectors_of};
use crate::EntryKind;

pub(super) type Id = u64;
pub(super) const ROOT: Id = 0;

/// Room that an inode itself takes, so that a full disk cannot hold one more name either.
const INODE_SECTORS: u64 = 1;

#[derive(Debug, Clone, Default)]
pub(super) struct FileInode {
    /// What a process reads now.
    pub(super) live: Content,
    /// What is on the disk for sure.
    durable: Content,
    /// What was done since the last sync, in order.
    pending: Vec<Change>,
    /// The handle that holds the lock.
    pub(super) lock: Option<u64>,
}

type Names = BTreeMap<String, Id>;

#[derive(Debug, Clone, Default)]
struct DirInode {
    live: Names,
    durable: Names,
}

#[derive(Debug, Clone)]
enum Inode {
    File(FileInode),
    Dir(DirInode),
}

/// A place for a name: directory and name within.
type Place = (Id, String);

#[derive(Debug, Clone)]
enum NameChange {
    Link { at: Place, id: Id },
    Unlink { at: Place, id: Id },
    Rename { to: Place, id: Id },
}

#[derive(Debug, Clone)]
struct PendingName {
    change: NameChange,
    /// The directories whose sync is still missing.
    waits_for: BTreeSet<Id>,
}

#[derive(Debug, Clone)]
pub(super) struct Disk {
    inodes: BTreeMap<Id, Inode>,
    names: Vec<PendingName>,
    next: Id,
    /// In sectors.
    pub(super) capacity: u64,
}

impl Disk {
    pub(super) fn empty() -> Self {
        Self {
            inodes: BTreeMap::from([(ROOT, Inode::Dir(DirInode::default()))]),
            names: Vec::new(),
            next: ROOT + 1,
            capacity: u64::MAX / SECTOR,
        }
    }

    /// The names below the root that lead to `path`.
    pub(super) fn names_of(path: &Path) -> io::Result<Vec<&str>> {
        let mut names = Vec::new();
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    names.push(name.to_str().ok_or(io::ErrorKind::InvalidInput)?);
                }
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
            }
        }
        Ok(names)
    }

    fn dir(&self, id: Id) -> io::Result<&DirInode> {
        match self.inodes.get(&id) {
            Some(Inode::Dir(dir)) => Ok(dir),
            Some(Inode::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn dir_mut(&mut self, id: Id) -> io::Result<&mut DirInode> {
        match self.inodes.get_mut(&id) {
            Some(Inode::Dir(dir)) => Ok(dir),
            Some(Inode::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// A file by its inode, which stays readable through a handle after its name is gone.
    pub(super) fn file(&mut self, id: Id) -> io::Result<&mut FileInode> {
        match self.inodes.get_mut(&id) {
            Some(Inode::File(file)) => Ok(file),
            Some(Inode::Dir(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn walk(&self, names: &[&str]) -> io::Result<Id> {
        names.iter().try_fold(ROOT, |id, &name| {
            let found = self.dir(id)?.live.get(name).copied();
            found.ok_or_else(|| io::ErrorKind::NotFound.into())
        })
    }

    /// The directory and the last name of `path`.
    fn place(&self, path: &Path) -> io::Result<Place> {
        let names = Self::names_of(path)?;
        let (last, parents) = names.split_last().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = self.walk(parents)?;
        self.dir(parent)?;
        Ok((parent, (*last).to_owned()))
    }

    pub(super) fn lookup(&self, path: &Path) -> io::Result<Id> {
        self.walk(&Self::names_of(path)?)
    }

    pub(super) fn kind(&self, id: Id) -> EntryKind {
        match self.inodes.get(&id) {
            Some(Inode::File(_)) => EntryKind::File,
            Some(Inode::Dir(_)) => EntryKind::Directory,
            None => EntryKind::Other,
        }
    }

    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<(String, EntryKind)>> {
        let dir = self.dir(self.lookup(path)?)?;
        Ok(dir.live.iter().map(|(name, &id)| (name.clone(), self.kind(id))).collect())
    }

    /// Sectors in use by what has a name. (What was removed but is still open is not counted.)
    pub(super) fn used(&self) -> u64 {
        let mut used = 0;
        let mut todo = vec![ROOT];
        while let Some(id) = todo.pop() {
            match self.inodes.get(&id) {
                Some(Inode::File(file)) => used += INODE_SECTORS + file.live.reserved.total(),
                Some(Inode::Dir(dir)) => {
                    used += if id == ROOT { 0 } else { INODE_SECTORS };
                    todo.extend(dir.live.values());
                }
                None => {}
            }
        }
        used
    }

    fn free(&self) -> u64 {
        self.capacity.saturating_sub(self.used())
    }

    fn link(&mut self, at: Place, inode: Inode) -> io::Result<Id> {
        if self.free() < INODE_SECTORS {
            return Err(Errno::NOSPC.into());
        }
        let id = self.next;
        self.dir_mut(at.0)?.live.insert(at.1.clone(), id);
        self.next += 1;
        self.inodes.insert(id, inode);
        let waits_for = BTreeSet::from([at.0]);
        let change = NameChange::Link { at, id };
        self.names.push(PendingName { change, waits_for });
        Ok(id)
    }

    pub(super) fn create(&mut self, path: &Path) -> io::Result<Id> {
        let at = self.place(path)?;
        self.link(at, Inode::File(FileInode::default()))
    }

    pub(super) fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        let at = self.place(path)?;
        self.link(at, Inode::Dir(DirInode::default()))?;
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path, kind: EntryKind) -> io::Result<()> {
        let at = self.place(path)?;
        let id = self.lookup(path)?;
        match self.inodes.get(&id) {
            Some(Inode::File(_)) if kind == EntryKind::Directory => {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            Some(Inode::Dir(_)) if kind == EntryKind::File => {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            Some(Inode::Dir(dir)) if !dir.live.is_empty() => {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            _ => {}
        }
        self.dir_mut(at.0)?.live.remove(&at.1);
        let waits_for = BTreeSet::from([at.0]);
        let change = NameChange::Unlink { at, id };
        self.names.push(PendingName { change, waits_for });
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (source, target) = (self.place(from)?, self.place(to)?);
        let id = self.lookup(from)?;
        if source == target {
            return Ok(());
        }
        if Self::names_of(to)?.starts_with(&Self::names_of(from)?) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if let Some(replaced) = self.dir(target.0)?.live.get(&target.1) {
            match (self.inodes.get(&id), self.inodes.get(replaced)) {
                (Some(Inode::File(_)), Some(Inode::Dir(_))) => {
                    return Err(io::ErrorKind::IsADirectory.into());
                }
                (Some(Inode::Dir(_)), Some(Inode::File(_))) => {
                    return Err(io::ErrorKind::NotADirectory.into());
                }
                (_, Some(Inode::Dir(dir))) if !dir.live.is_empty() => {
                    return Err(io::ErrorKind::DirectoryNotEmpty.into());
                }
                _ => {}
            }
        }
        self.dir_mut(source.0)?.live.remove(&source.1);
        self.dir_mut(target.0)?.live.insert(target.1.clone(), id);
        let waits_for = BTreeSet::from([source.0, target.0]);
        let change = NameChange::Rename { to: target, id };
        self.names.push(PendingName { change, waits_for });
        Ok(())
    }

    /// Writes as much as there is room for; `NOSPC` if that is not all.
    pub(super) fn write(&mut self, id: Id, bytes: &[u8], offset: u64) -> io::Result<()> {
        let fits = self.room(id, offset, bytes.len() as u64)?;
        let part = &bytes[..fits as usize];
        let file = self.file(id)?;
        if !part.is_empty() {
            let change = file.live.write(part, offset);
            file.pending.push(change);
        }
        if part.len() < bytes.len() {
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    /// Writes bytes that are durable at once. Older bytes of these sectors that are pending cannot come after them.
    pub(super) fn arrive(&mut self, id: Id, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write(id, bytes, offset)?;
        let file = self.file(id)?;
        let Some(change) = file.pending.pop() else { return Ok(()) };
        for older in &mut file.pending {
            older.sectors.retain(|number, _| !change.sectors.contains_key(number));
        }
        file.durable.apply(&change, |_| true, true);
        Ok(())
    }

    /// Reserves as much as there is room for, as ext4 does; `NOSPC` if that is not all.
    pub(super) fn allocate(&mut self, id: Id, offset: u64, length: u64) -> io::Result<()> {
        let fits = self.room(id, offset, length)?;
        let file = self.file(id)?;
        let mut change = Change::default();
        if fits > 0 {
            file.live.reserve(offset, fits, &mut change);
            file.pending.push(change);
        }
        if fits < length {
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    /// How many of the bytes at `offset` there is room for.
    fn room(&mut self, id: Id, offset: u64, length: u64) -> io::Result<u64> {
        let end = offset.checked_add(length).filter(|&end| end <= i64::MAX as u64);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        let free = self.free();
        let (first, last) = sectors_of(offset, length);
        let stop = self.file(id)?.live.reserved.fits(first, last, free);
        Ok((stop * SECTOR).min(end).saturating_sub(offset))
    }

    pub(super) fn set_len(&mut self, id: Id, length: u64) -> io::Result<()> {
        let file = self.file(id)?;
        let change = file.live.set_len(length);
        file.pending.push(change);
        Ok(())
    }

    pub(super) fn punch(&mut self, id: Id, offset: u64, length: u64) -> io::Result<()> {
        let file = self.file(id)?;
        let change = file.live.zero(offset, length);
        file.pending.push(change);
        Ok(())
    }

    pub(super) fn sync_file(&mut self, id: Id) -> io::Result<()> {
        let file = self.file(id)?;
        for change in std::mem::take(&mut file.pending) {
            file.durable.apply(&change, |_| true, true);
        }
        file.durable.settle();
        Ok(())
    }

    /// A sync that failed: some of it reached the disk, the rest never will, and the pages are clean.
    pub(super) fn lose_file(&mut self, id: Id, choices: &mut Choices) -> io::Result<()> {
        let file = self.file(id)?;
        file.durable = survivor(&file.durable, &file.pending, choices);
        file.pending.clear();
        Ok(())
    }

    pub(super) fn sync_dir(&mut self, path: &Path) -> io::Result<()> {
        let synced = self.lookup(path)?;
        self.dir(synced)?;
        let mut durable = self.durable_names();
        self.names.retain_mut(|pending| {
            pending.waits_for.remove(&synced);
            if pending.waits_for.is_empty() {
                make_durable(&mut durable, &pending.change);
            }
            !pending.waits_for.is_empty()
        });
        self.set_durable_names(durable);
        Ok(())
    }

    fn durable_names(&self) -> BTreeMap<Id, Names> {
        let dirs = self.inodes.iter().filter_map(|(&id, inode)| match inode {
            Inode::Dir(dir) => Some((id, dir.durable.clone())),
            Inode::File(_) => None,
        });
        dirs.collect()
    }

    fn set_durable_names(&mut self, names: BTreeMap<Id, Names>) {
        for (id, names) in names {
            if let Some(Inode::Dir(dir)) = self.inodes.get_mut(&id) {
                dir.durable = names;
            }
        }
    }

    pub(super) fn flip(&mut self, path: &Path, offset: u64, mask: u8) -> io::Result<()> {
        let id = self.lookup(path)?;
        let file = self.file(id)?;
        file.live.flip(offset, mask);
        file.durable.flip(offset, mask);
        Ok(())
    }

    /// One of the states in which a cut now may leave the disk.
    pub(super) fn after_cut(&self, choices: &mut Choices) -> Self {
        let mut names = self.durable_names();
        for pending in &self.names {
            if choices.coin() {
                make_durable(&mut names, &pending.change);
            }
        }
        let mut survived =
            Self { inodes: BTreeMap::new(), names: Vec::new(), next: self.next, capacity: self.capacity };
        let mut todo = vec![ROOT];
        while let Some(id) = todo.pop() {
            let inode = match self.inodes.get(&id) {
                Some(Inode::File(file)) => {
                    let content = survivor(&file.durable, &file.pending, choices);
                    Inode::File(FileInode { live: content.clone(), durable: content, ..FileInode::default() })
                }
                _ => {
                    let live = names.remove(&id).unwrap_or_default();
                    todo.extend(live.values());
                    let durable = live.clone();
                    Inode::Dir(DirInode { live, durable })
                }
            };
            survived.inodes.insert(id, inode);
        }
        survived
    }

    /// Feeds everything that a process can read, names and bytes, to `hasher`.
    pub(super) fn digest(&self, hasher: &mut impl Hasher) {
        let mut todo = vec![ROOT];
        while let Some(id) = todo.pop() {
            match self.inodes.get(&id) {
                Some(Inode::File(file)) => file.live.digest(hasher),
                Some(Inode::Dir(dir)) => {
                    hasher.write_usize(dir.live.len());
                    dir.live.keys().for_each(|name| name.hash(hasher));
                    todo.extend(dir.live.values());
                }
                None => {}
            }
        }
    }

    /// The disk as the next process finds it when every process was killed: all is there, nothing more is durable.
    pub(super) fn after_kill(&self) -> Self {
        let mut kept = self.clone();
        for inode in kept.inodes.values_mut() {
            if let Inode::File(file) = inode {
                file.lock = None;
            }
        }
        kept
    }
}

fn make_durable(names: &mut BTreeMap<Id, Names>, change: &NameChange) {
    match change {
        NameChange::Link { at, id } => {
            names.entry(at.0).or_default().insert(at.1.clone(), *id);
        }
        NameChange::Unlink { at, id } => {
            let dir = names.entry(at.0).or_default();
            if dir.get(&at.1) == Some(id) {
                dir.remove(&at.1);
            }
        }
        // Atomic: whatever name the file had on the disk goes as the new one comes.
        NameChange::Rename { to, id } => {
            for dir in names.values_mut() {
                dir.retain(|_, found| found != id);
            }
            names.entry(to.0).or_default().insert(to.1.clone(), *id);
        }
    }
}

/// What is left of a file: each change is applied, dropped, or torn by sectors. A sector that is kept shows what
/// the page cache held of it at that moment, earlier changes of that sector included.
fn survivor(durable: &Content, pending: &[Change], choices: &mut Choices) -> Content {
    let mut content = durable.clone();
    for change in pending {
        match choices.fate() {
            Fate::Applied => content.apply(change, |_| true, true),
            Fate::Dropped => {}
            Fate::Torn => {
                let metadata = change.metadata.is_some() && choices.metadata();
                // Where old and new are equal there is nothing to choose.
                let kept: BTreeSet<u64> = content.changed_by(change).into_iter().filter(|_| choices.coin()).collect();
                content.apply(change, |number| kept.contains(&number), metadata);
            }
        }
    }
    content.settle();
    content
}
