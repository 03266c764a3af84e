//! The catalog's file: a page that says what it is, a log, and the memory that the log serves. It is found by its name, and needs no catalog to be
//! read: the regions of `rvm` that are in it are parts of this file, with ids that no region of a pool ever has.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vfs::{OpenMode, Vfs, VfsFile};

use super::layout::{self, NotACatalog};
use super::{Catalog, CatalogDamage, CatalogError, FILE, MAGIC, MAX_LEN, RegionInfo, VERSION, v1};
use crate::frame::{self, FrameError};
use crate::lease::Lease;
use crate::medium::MediumKind;
use crate::name::RegionName;
use crate::region::{Kind, Region, RegionError};
use crate::rvm::{RvmError, Segments, look as look_at};

/// What the first page takes, in bytes.
pub(super) const PAGE: usize = 4096;
/// The log's size in bytes: a change of some twenty regions fits; a larger one is written as a new file.
pub(super) const LOG: usize = 64 << 10;
/// Ids of a pool's regions count from 1.
pub(super) const LOG_ID: u64 = u64::MAX;
const MEMORY_ID: u64 = u64::MAX - 1;

pub(super) fn log_name() -> RegionName {
    RegionName::internal("catalog/log")
}

pub(super) fn memory_name() -> RegionName {
    RegionName::internal("catalog")
}

/// A catalog's file, and where in it log and memory lie.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    pub(super) file: Arc<dyn VfsFile>,
    pub(super) path: PathBuf,
    pub(super) pool: u64,
    log: u64,
    memory: u64,
}

/// The first page of a file with a log and a memory of so many bytes.
pub(super) fn encode_page(pool: u64, log: usize, memory: usize) -> Vec<u8> {
    let body: Vec<u8> = [pool, log as u64, memory as u64].iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut page = frame::encode(MAGIC, VERSION, &body);
    page.resize(PAGE, 0);
    page
}

/// What is in a pool's catalog file.
pub(super) enum Stored {
    V1(Catalog),
    V2(Parts),
}

impl Stored {
    /// Opens the file and reads its first page; of version 1, all of it.
    pub(super) fn open(vfs: &dyn Vfs, pool: &Path, mode: OpenMode) -> Result<Self, CatalogError> {
        let path = pool.join(FILE);
        let read = |source| CatalogError::Read { path: path.clone(), source };
        let damaged = |source| CatalogError::Damaged { path: path.clone(), source };
        let file: Arc<dyn VfsFile> = match vfs.open(&path, mode) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CatalogError::Missing { path: pool.to_owned() });
            }
            other => other.map_err(read)?.into(),
        };
        let length = file.len().map_err(read)?;
        let first = |most: usize| -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; usize::try_from(length).map_or(most, |length| length.min(most))];
            file.read_exact_at(&mut bytes, 0).map(|()| bytes)
        };
        let page = first(PAGE).map_err(read)?;
        let header = frame::decode_header(&page, MAGIC, VERSION, MAX_LEN).map_err(|error| match error {
            FrameError::Newer { version, known } => CatalogError::Newer { path: pool.to_owned(), version, known },
            other => damaged(CatalogDamage::Frame(other)),
        })?;
        if header.version == 1 {
            let all = first(frame::HEADER_LEN + MAX_LEN).map_err(read)?;
            return v1::decode(&all, &path).map(Self::V1);
        }
        let body = frame::decode(&page, MAGIC, VERSION, PAGE).map_err(|error| damaged(CatalogDamage::Frame(error)))?;
        let number =
            |at: usize| body.body.get(at..).and_then(|rest| rest.first_chunk()).map(|b| u64::from_le_bytes(*b));
        let (Some(pool_id), Some(log), Some(memory)) = (number(0), number(8), number(16)) else {
            return Err(CatalogError::Malformed {
                path,
                reason: "its first page does not say how it is laid out".into(),
            });
        };
        let sane = |part: u64| part <= MAX_LEN as u64 && part.is_multiple_of(PAGE as u64);
        if !sane(log) || !sane(memory) {
            return Err(CatalogError::Malformed { path, reason: format!("it has {log} and {memory} bytes") });
        }
        let expected = PAGE as u64 + log + memory;
        if length != expected {
            return Err(damaged(CatalogDamage::Length { found: length, expected }));
        }
        Ok(Self::V2(Parts { file, path, pool: pool_id, log, memory }))
    }
}

impl Parts {
    fn part(&self, name: RegionName, id: u64, kind: Kind, data_offset: u64, size: u64) -> Region {
        // The medium is how it is written: through the file system.
        let info = RegionInfo { id, name, kind, medium: MediumKind::File, size, data_offset };
        let lease = Lease { info, pool: self.pool, path: self.path.clone(), file: Arc::clone(&self.file) };
        Region::part(lease, LOG_ID)
    }

    fn log(&self) -> Region {
        self.part(log_name(), LOG_ID, Kind::Log, PAGE as u64, self.log)
    }

    fn memory(&self) -> Region {
        self.part(memory_name(), MEMORY_ID, Kind::Pmem, PAGE as u64 + self.log, self.memory)
    }

    /// The catalog in `bytes`, which are all of the memory.
    pub(super) fn decode(&self, bytes: &[u8]) -> Result<(Catalog, layout::Entries), CatalogError> {
        layout::decode(self.pool, bytes).map_err(|error| match error {
            NotACatalog::Damaged(source) => CatalogError::Damaged { path: self.path.clone(), source },
            NotACatalog::Malformed(reason) => CatalogError::Malformed { path: self.path.clone(), reason },
        })
    }

    /// What an error of the log means to whoever reads.
    pub(super) fn unreadable(&self, error: RvmError) -> CatalogError {
        let path = self.path.clone();
        match error {
            RvmError::Region(RegionError::Io { source, .. }) => CatalogError::Read { path, source },
            RvmError::LogDamaged { reason, .. } => CatalogError::Damaged { path, source: CatalogDamage::Log(reason) },
            other => CatalogError::Damaged { path, source: CatalogDamage::Log(other.to_string()) },
        }
    }
}

/// Whoever has the pool's lock has both.
impl Segments for Parts {
    fn refresh(&self) -> Result<(), RvmError> {
        Ok(())
    }

    fn open(&self, name: &RegionName) -> Result<Region, RvmError> {
        Ok(if *name == log_name() { self.log() } else { self.memory() })
    }

    fn name_of(&self, id: u64) -> Option<RegionName> {
        (id == MEMORY_ID).then(memory_name)
    }
}

/// Reads the catalog without the lock, and says whether it is durable; `None` if it was changed meanwhile.
pub(super) fn look(vfs: &dyn Vfs, pool: &Path) -> Result<Option<(Catalog, bool)>, CatalogError> {
    match Stored::open(vfs, pool, OpenMode::Read)? {
        Stored::V1(catalog) => Ok(Some((catalog, false))),
        Stored::V2(parts) => {
            let found = look_at(&parts.log(), &parts.memory()).map_err(|error| parts.unreadable(error))?;
            let Some((bytes, durable)) = found else { return Ok(None) };
            let (catalog, _) = parts.decode(&bytes)?;
            Ok(Some((catalog, durable)))
        }
    }
}
