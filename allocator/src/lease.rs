//! The right to use a region: one holder at a time.
//!
//! A lease is a `flock` on the region's own file. The kernel drops it with the last reference to that open file,
//! that is when the process is gone *and* its mappings with it: a region is never leased anew while an old holder's
//! vCPU could still write to it. The descriptor is close-on-exec. A holder that forks keeps the lease in both
//! processes; the child calls [`Lease::adopt`] to be the one that is named.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use vfs::{OpenMode, Vfs, VfsFile};

use crate::catalog::{Catalog, CatalogError, RegionInfo};
use crate::header::HOLDER_OFFSET;
use crate::name::RegionName;

const MAGIC: [u8; 8] = *b"PERDHOLD";
const BLOCK_LEN: usize = 16;
/// A question whether a region is leased, or a free or rename that is then refused, holds the lock for microseconds. Whoever meets it
/// tries again so often, a millisecond apart, before it says that the region is taken.
const TRIES: u32 = 10;

/// Who holds a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Its process id, if it has written it down and lives.
    pub pid: Option<u32>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("another process (its pid is not known)"),
        }
    }
}

/// Why a region could not be leased.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Another process, or another part of this one, has it.
    #[error("region {name} is in use by {holder}: stop that one first")]
    Held {
        /// The region.
        name: RegionName,
        /// Who has it.
        holder: Holder,
    },
    /// The pool has no region of that name.
    #[error("there is no region {name} in the pool: `perdure pool list` names those that are")]
    NoSuchRegion {
        /// What was asked for.
        name: RegionName,
    },
    /// The catalog has it, the medium has not.
    #[error("the file of region {name} is missing ({}): bring its medium back, or see `perdure pool check`", path.display())]
    MissingFile {
        /// The region.
        name: RegionName,
        /// Where its file should be.
        path: PathBuf,
    },
    /// The catalog could not be read again.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The file could not be opened, locked or written.
    #[error("could not lease region {name} by its file {}", path.display())]
    Io {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The right to use a region, until it is dropped and every mapping made through it is gone.
#[derive(Debug)]
pub struct Lease {
    pub(crate) info: RegionInfo,
    pub(crate) pool: u64,
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<dyn VfsFile>,
}

impl Lease {
    /// The region as the catalog has it. It cannot change while it is leased.
    #[must_use]
    pub fn info(&self) -> &RegionInfo {
        &self.info
    }

    /// Writes this process down as the holder, after a fork.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn adopt(&self) -> Result<(), LeaseError> {
        let mut block = [0; BLOCK_LEN];
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        let crc = crc32fast::hash(&block[..12]);
        block[12..].copy_from_slice(&crc.to_le_bytes());
        // Not flushed: it means nothing after an outage.
        let written = self.file.write_all_at(&block, HOLDER_OFFSET);
        written.map_err(|source| self.io(source))
    }

    fn io(&self, source: io::Error) -> LeaseError {
        LeaseError::Io { name: self.info.name.clone(), path: self.path.clone(), source }
    }

    /// Leases `name`, and writes down this process as the holder. `catalog` may be stale, the lease is not: after the
    /// lock is taken the catalog is read again.
    pub(crate) fn take(vfs: &dyn Vfs, pool: &Path, catalog: &Catalog, name: &RegionName) -> Result<Self, LeaseError> {
        let missing = || LeaseError::NoSuchRegion { name: name.clone() };
        // A process may have allocated it since `catalog` was read.
        let known = match catalog.find(name) {
            Some(region) => region.clone(),
            None => Catalog::load(vfs, pool)?.find(name).cloned().ok_or_else(missing)?,
        };
        let lease = Self::lock(vfs, catalog.pool, &known, catalog.path(pool, &known))?;
        let now = Catalog::load(vfs, pool)?;
        let info = now.find(name).ok_or_else(missing)?;
        if info.id != known.id {
            // Freed and allocated anew meanwhile: another file.
            drop(lease);
            return Self::take(vfs, pool, &now, name);
        }
        let info = info.clone();
        let lease = Self { info, ..lease };
        lease.adopt()?;
        Ok(lease)
    }

    /// Takes the lock alone; for changes of the pool, which hold the catalog's lock.
    pub(crate) fn lock(vfs: &dyn Vfs, pool: u64, info: &RegionInfo, path: PathBuf) -> Result<Self, LeaseError> {
        let name = || info.name.clone();
        let io = |source| LeaseError::Io { name: name(), path: path.clone(), source };
        let file = match vfs.open(&path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LeaseError::MissingFile { name: name(), path });
            }
            other => other.map_err(io)?,
        };
        for attempt in 1.. {
            if file.try_lock().map_err(io)? {
                break;
            }
            if attempt == TRIES {
                let holder = Holder { pid: recorded(&*file) };
                return Err(LeaseError::Held { name: name(), holder });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let info = info.clone();
        Ok(Self { info, pool, path, file: file.into() })
    }
}

/// The pid in the holder block, if its process lives.
fn recorded(file: &dyn VfsFile) -> Option<u32> {
    let mut block = [0; BLOCK_LEN];
    file.read_exact_at(&mut block, HOLDER_OFFSET).ok()?;
    let crc = u32::from_le_bytes(*block.last_chunk()?);
    if block[..8] != MAGIC || crc != crc32fast::hash(&block[..12]) {
        return None;
    }
    let pid = u32::from_le_bytes(*block[8..].first_chunk()?);
    Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
}
