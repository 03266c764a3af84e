//! Giving back the space of what no generation needs.

use std::collections::BTreeMap;
use std::io;
use std::sync::PoisonError;

use vfs::OpenMode;
use vfs::cut::point::{Point, pass};

use crate::error::StoreError;
use crate::fault::seeded;
use crate::ledger::{State, UNFINISHED};
use crate::mark::{Blocks, Marks};
use crate::node::NodeRef;
use crate::pack::{BLOCK, PackFile, sync_dir};
use crate::record::PackEnd;
use crate::store::Store;

/// What a sweep did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SweepReport {
    /// Files removed: packs of which nothing is alive, and what writers left that did not finish.
    pub files_removed: u64,
    /// Bytes of dead pages and nodes punched out of packs that live on.
    pub bytes_punched: u64,
    /// Bytes that are dead and stay, because the file system cannot punch holes.
    pub bytes_not_punched: u64,
    /// Archive nodes that no mirror has. While there are any, nobody knows what they kept alive, and nothing is given back but what
    /// unfinished writers left: repair, or purge the generations that they belong to.
    pub blocked_by: Vec<String>,
}

/// What a sweep knew, so that the next one need not do it again.
#[derive(Debug, Default)]
pub(crate) struct Swept {
    marks: Marks,
    lengths: BTreeMap<(PackFile, u32), u64>,
}

impl Store {
    /// Gives back the space of everything that no generation reaches: zombies of purges and of writers that died.
    ///
    /// Walks the archives of all generations, each shared subtree once. A crash at any point loses nothing, and the next sweep does
    /// the rest. `progress` hears the number of archive nodes walked so far.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Io`].
    pub fn sweep(&self, progress: &mut dyn FnMut(u64)) -> Result<SweepReport, StoreError> {
        let _lock = self.lock()?;
        pass(Point::PurgeSweep);
        let mut state = self.current()?;
        // A purge by a process that was killed may not be durable yet. What it freed must not go before it is.
        self.inner.ledger.sync().inspect_err(|_| self.poison())?;
        let mut report = SweepReport::default();
        self.remove_unfinished(&mut report)?;
        let roots: Vec<NodeRef> = state.newest_first().iter().map(|committed| committed.manifest).collect();
        let (marks, unreadable) = Marks::of(&self.inner.archive, roots, progress);
        report.blocked_by = unreadable.into_iter().map(|unreadable| unreadable.why).collect();
        let mut lengths = BTreeMap::new();
        for (file, pack) in self.inner.packs.list()?.packs {
            let (alive, end) = match file {
                PackFile::Data => (marks.data.get(&pack), state.ends.data),
                PackFile::ArchiveA | PackFile::ArchiveB => (marks.archive.get(&pack), state.ends.archive),
            };
            if let Some(length) = self.sweep_pack(file, pack, alive, end, &mut report)? {
                lengths.insert((file, pack), length);
            }
        }
        if report.files_removed > 0 {
            sync_dir(&*self.inner.vfs, &self.inner.packs.dir)?;
        }
        if report.blocked_by.is_empty() {
            *self.inner.swept.lock().unwrap_or_else(PoisonError::into_inner) = Swept { marks, lengths };
            self.close_the_books(&mut state)?;
        }
        Ok(report)
    }

    /// Rewrites the ledger without what is purged, now that nothing of it is left.
    fn close_the_books(&self, state: &mut State) -> Result<(), StoreError> {
        if state.unswept > 0 || state.is_wasteful() {
            state.unswept = 0;
            self.inner.ledger.rewrite(state).inspect_err(|_| self.poison())?;
            self.set_state(state.clone());
        }
        Ok(())
    }

    /// Removes files that were being built when their builder died. The lock is held, so nobody is building now.
    fn remove_unfinished(&self, report: &mut SweepReport) -> Result<(), StoreError> {
        for dir in [&self.inner.dir, &self.inner.packs.dir] {
            let entries = self.inner.vfs.read_dir(dir).map_err(StoreError::io("list", dir))?;
            let unfinished: Vec<_> = entries.into_iter().filter(|entry| entry.name.ends_with(UNFINISHED)).collect();
            for entry in &unfinished {
                let path = dir.join(&entry.name);
                self.inner.vfs.remove_file(&path).map_err(StoreError::io("remove", &path))?;
                report.files_removed += 1;
            }
            if !unfinished.is_empty() {
                sync_dir(&*self.inner.vfs, dir)?;
            }
        }
        Ok(())
    }

    /// Sweeps one file. Returns its length if it stays.
    fn sweep_pack(
        &self,
        file: PackFile,
        pack: u32,
        alive: Option<&Blocks>,
        end: PackEnd,
        report: &mut SweepReport,
    ) -> Result<Option<u64>, StoreError> {
        let path = self.inner.packs.path(file, pack);
        let blocked = !report.blocked_by.is_empty();
        // No record ever spoke of a pack beyond the last one, whatever else is unknown.
        let beyond = pack > end.pack || (pack == end.pack && seeded("a sweep takes the last pack for a dead writer's"));
        if beyond || (alive.is_none() && !blocked) {
            self.inner.packs.forget(file, pack);
            self.inner.vfs.remove_file(&path).map_err(StoreError::io("remove", &path))?;
            report.files_removed += 1;
            return Ok(None);
        }
        let handle = self.inner.vfs.open(&path, OpenMode::ReadWrite).map_err(StoreError::io("open", &path))?;
        let mut length = handle.len().map_err(StoreError::io("read the length of", &path))?;
        if pack == end.pack && length > end.end {
            // The tail of a writer that died. Without it the next one can go on in this pack.
            handle.set_len(end.end).map_err(StoreError::io("cut the tail of", &path))?;
            length = end.end;
        }
        if blocked {
            return Ok(None);
        }
        if let Some(alive) = alive
            && pack != end.pack
            && length > alive.end()
        {
            // Nobody goes on in this pack, so what is dead at its end needs no hole.
            handle.set_len(alive.end()).map_err(StoreError::io("cut the tail of", &path))?;
            report.bytes_punched += length - alive.end();
            length = alive.end();
        }
        let swept = self.inner.swept.lock().unwrap_or_else(PoisonError::into_inner);
        let before = swept.before(file, pack);
        let dead = Blocks::runs(length / BLOCK, |block| {
            let known_dead = before.is_some_and(|(was, until)| block * BLOCK < until && !was.has(block));
            !alive.is_some_and(|alive| alive.has(block)) && !known_dead
        });
        for (start, stop) in dead {
            match handle.punch_hole(start, stop - start) {
                Ok(()) => report.bytes_punched += stop - start,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => report.bytes_not_punched += stop - start,
                Err(error) => return Err(StoreError::io("punch a hole into", &path)(error)),
            }
        }
        Ok(Some(length))
    }
}

impl Swept {
    /// What was alive of a file, and its length then; everything else in it is a hole since.
    fn before(&self, file: PackFile, pack: u32) -> Option<(&Blocks, u64)> {
        let blocks = match file {
            PackFile::Data => self.marks.data.get(&pack),
            PackFile::ArchiveA | PackFile::ArchiveB => self.marks.archive.get(&pack),
        };
        Some((blocks?, *self.lengths.get(&(file, pack))?))
    }
}

/// Bytes that no generation needs and that are not holes, found by looking: what a test calls zombies.
impl Store {
    /// Counts files that nothing needs, and blocks of 4 KiB that nothing needs and that are not zero. After a [`Store::sweep`]
    /// without errors it is 0. Reads all dead blocks: for tests and for `scrub`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if an archive cannot be read, [`StoreError::Io`].
    pub fn zombies(&self) -> Result<u64, StoreError> {
        let state = self.state();
        let roots: Vec<NodeRef> = state.newest_first().iter().map(|committed| committed.manifest).collect();
        let (marks, unreadable) = Marks::of(&self.inner.archive, roots, &mut |_| ());
        if let Some(first) = unreadable.first() {
            return Err(crate::mark::blocked(first));
        }
        let listing = self.inner.packs.list()?;
        let dir = &self.inner.dir;
        let beside = self.inner.vfs.read_dir(dir).map_err(StoreError::io("list", dir))?;
        let unfinished = beside.iter().filter(|entry| entry.name.ends_with(UNFINISHED)).count();
        let mut zombies = (listing.strays.len() + unfinished) as u64;
        let mut block_bytes = vec![0; BLOCK as usize];
        for (file, pack) in listing.packs {
            let alive = match file {
                PackFile::Data => marks.data.get(&pack),
                PackFile::ArchiveA | PackFile::ArchiveB => marks.archive.get(&pack),
            };
            let Some(alive) = alive else {
                zombies += 1;
                continue;
            };
            let path = self.inner.packs.path(file, pack);
            let length = self.inner.packs.length(file, pack).map_err(StoreError::io("read the length of", &path))?;
            for block in (0..length.div_ceil(BLOCK)).filter(|block| !alive.has(*block)) {
                let read = self.inner.packs.read_some(file, pack, block * BLOCK, &mut block_bytes);
                read.map_err(StoreError::io("read", &path))?;
                zombies += u64::from(!crate::batch::is_zero(&block_bytes));
            }
        }
        Ok(zombies)
    }
}
