//! Changing the catalog: a transaction of recoverable memory that ends with a flush. What does not fit log or memory, a pool's first
//! catalog, and one of an earlier version are written as a new file, which takes the place of the old one with a rename.

use std::io;
use std::path::Path;

use vfs::cut::point::{Point, pass};
use vfs::{OpenMode, Vfs};

use super::file::{LOG, LOG_ID, PAGE, Parts, Stored, encode_page, log_name, memory_name};
use super::layout::{self, ENTRIES_AT, Entries, SECTOR};
use super::{Catalog, CatalogError, FILE, MAX_LEN, TEMPORARY};
use crate::region::RegionError;
use crate::rvm::{Commit, Mode, NewLog, Resumed, RvmError};

/// The fewest entries that a file has.
const LEAST_ENTRIES: usize = 32;

/// A catalog that is changed. Whoever has it holds the pool's lock.
pub(crate) struct Edit<'a> {
    vfs: &'a dyn Vfs,
    pool: &'a Path,
    /// `None`: what is there is to be replaced whole.
    memory: Option<InMemory>,
}

struct InMemory {
    parts: Parts,
    log: Resumed,
    entries: Entries,
}

enum Written {
    Done,
    NoRoom,
}

impl<'a> Edit<'a> {
    /// Of a pool that has none yet.
    pub(crate) fn new(vfs: &'a dyn Vfs, pool: &'a Path) -> Self {
        Self { vfs, pool, memory: None }
    }

    /// The catalog as it is, durable: what a process that was killed has left half durable is so when this returns.
    pub(crate) fn open(vfs: &'a dyn Vfs, pool: &'a Path) -> Result<(Self, Catalog), CatalogError> {
        let path = pool.join(FILE);
        let recover = |source| CatalogError::Recover { path: path.clone(), source };
        let parts = match Stored::open(vfs, pool, OpenMode::ReadWrite)? {
            Stored::V1(catalog) => {
                vfs.sync_dir(pool).map_err(recover)?;
                return Ok((Self::new(vfs, pool), catalog));
            }
            Stored::V2(parts) => parts,
        };
        let failed = |error| match parts.unreadable(error) {
            CatalogError::Read { source, .. } => recover(source),
            other => other,
        };
        let log = crate::rvm::Rvm::resume(Box::new(parts.clone()), &log_name(), &memory_name()).map_err(failed)?;
        let (catalog, entries) = parts.decode(&log.memory)?;
        if !log.was_sealed {
            // The file may be a new one whose name is not durable.
            vfs.sync_dir(pool).map_err(recover)?;
        }
        if !log.is_sealed {
            log.rvm.seal().map_err(failed)?;
        }
        Ok((Self { vfs, pool, memory: Some(InMemory { parts, log, entries }) }, catalog))
    }

    /// Makes `catalog` the pool's, durably.
    pub(crate) fn commit(&mut self, catalog: &Catalog) -> Result<(), CatalogError> {
        pass(Point::CatalogCommit);
        let written = match &mut self.memory {
            Some(memory) => memory.write(catalog, self.pool)?,
            None => Written::NoRoom,
        };
        if matches!(written, Written::NoRoom) {
            self.replace(catalog)?;
        }
        pass(Point::CatalogDone);
        Ok(())
    }

    /// Temporary file, flush, rename, flush of the directory; a seal says that all of this was done.
    fn replace(&mut self, catalog: &Catalog) -> Result<(), CatalogError> {
        let (path, temporary) = (self.pool.join(FILE), self.pool.join(TEMPORARY));
        let write = |source| CatalogError::Write { path: path.clone(), source };
        let (bytes, log) = encode(catalog).map_err(write)?;
        let replaced = (|| {
            let file = self.vfs.open(&temporary, OpenMode::CreateTruncate)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_data()?;
            self.vfs.rename(&temporary, &path)?;
            Ok(file)
        })();
        self.memory = None;
        let file = replaced.map_err(|source| {
            // Best effort: what is left of it is swept by the next change.
            drop(self.vfs.remove_file(&temporary));
            write(source)
        })?;
        let uncertain = |source| CatalogError::Uncertain { path: self.pool.to_owned(), source };
        self.vfs.sync_dir(self.pool).map_err(uncertain)?;
        file.write_all_at(&log.seal, PAGE as u64 + log.seal_at).map_err(uncertain)
    }
}

/// All bytes of a file with `catalog` and room for twice as many regions.
fn encode(catalog: &Catalog) -> io::Result<(Vec<u8>, NewLog)> {
    let entries = (catalog.regions.len() * 2).clamp(LEAST_ENTRIES, layout::capacity(MAX_LEN));
    let length = (ENTRIES_AT + entries * SECTOR).next_multiple_of(PAGE);
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let placed = layout::place(catalog, &Entries::new(), length);
    let placed = placed.ok_or_else(|| invalid("its regions have no room".to_owned()))?;
    let memory = layout::encode(catalog, &placed, length).map_err(invalid)?;
    let log = NewLog::of(catalog.pool, LOG_ID, LOG)?;
    let mut bytes = encode_page(catalog.pool, LOG, length);
    bytes.extend_from_slice(&log.bytes);
    bytes.extend_from_slice(&memory);
    Ok((bytes, log))
}

impl InMemory {
    /// Sets the sectors that are to change, and commits.
    fn write(&mut self, catalog: &Catalog, pool: &Path) -> Result<Written, CatalogError> {
        let (length, path) = (self.log.memory.len(), self.parts.path.clone());
        let refuse = |error: RvmError| CatalogError::Write { path: path.clone(), source: as_io(error) };
        let Some(entries) = layout::place(catalog, &self.entries, length) else { return Ok(Written::NoRoom) };
        let invalid = |reason| io::Error::new(io::ErrorKind::InvalidInput, reason);
        let new = layout::encode(catalog, &entries, length)
            .map_err(|reason| CatalogError::Write { path: path.clone(), source: invalid(reason) })?;
        let Resumed { rvm, memory, .. } = &mut self.log;
        let mut change = rvm.begin_transaction(Mode::Restore).map_err(refuse)?;
        let part = change.enroll(memory).map_err(refuse)?;
        for (number, sector) in new.chunks(SECTOR).enumerate() {
            let range = number * SECTOR..number * SECTOR + sector.len();
            if change.bytes(part).map_err(refuse)?.get(range.clone()) == Some(sector) {
                continue;
            }
            match change.set_range(part, range) {
                Ok(bytes) => bytes.copy_from_slice(sector),
                Err(RvmError::TooLarge { .. }) => return Ok(Written::NoRoom),
                Err(error) => return Err(refuse(error)),
            }
        }
        let uncertain = |error| CatalogError::Uncertain { path: pool.to_owned(), source: as_io(error) };
        change.end_transaction(Commit::Flush).map_err(uncertain)?;
        rvm.seal().map_err(uncertain)?;
        self.entries = entries;
        Ok(Written::Done)
    }
}

/// The error of the disk, if it is one.
fn as_io(error: RvmError) -> io::Error {
    match error {
        RvmError::Region(RegionError::Io { source, .. }) => source,
        other => io::Error::other(other),
    }
}
