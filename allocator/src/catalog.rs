//! The catalog: which regions a pool has. One file, which is recoverable memory (`rvm`) with its log.
//!
//! | part | |
//! |---|---|
//! | this module | what a catalog says, and what must hold of it |
//! | `layout` | its bytes in memory |
//! | `file` | the file that has memory and log, found without a catalog; reading it |
//! | `edit` | changing it: a transaction, or all of it anew |
//! | `v1` | catalogs of the first version, which are read for ever |

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vfs::{OpenMode, Vfs, VfsFile};

use crate::frame::{FrameError, Magic};
use crate::header::MIN_DATA_OFFSET;
use crate::medium::{MediumKind, PAGE_SIZE};
use crate::name::RegionName;
use crate::region::Kind;

mod edit;
mod file;
mod layout;
#[cfg(test)]
mod tests;
mod v1;

pub(crate) use edit::Edit;

pub(crate) const FILE: &str = "catalog";
pub(crate) const TEMPORARY: &str = "catalog.tmp";
const LOCK: &str = "lock";
const MAGIC: Magic = *b"PERDCATL";
/// The version that this code writes.
pub const VERSION: u32 = 2;
/// Bytes of a catalog: far more than one of 65,536 regions needs.
const MAX_LEN: usize = 64 << 20;
/// How often a reader looks again at a catalog that was changed while it looked, a millisecond apart; and at one that seemed damaged.
const LOOKS: u32 = 1000;
const LOOKS_AT_DAMAGE: u32 = 4;
/// The most bytes a region may have, headers included: what a file may have.
pub(crate) const MAX_FILE: u64 = i64::MAX as u64;
/// How long a change waits for another process's change. One takes milliseconds; a disk may stall for seconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// A region as the catalog has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Grows with every allocation and is never used again, so its order is that of allocation.
    pub id: u64,
    /// What it is found by.
    pub name: RegionName,
    /// What it is for.
    pub kind: Kind,
    /// What it lies on.
    pub medium: MediumKind,
    /// Bytes of data, a multiple of [`PAGE_SIZE`].
    pub size: u64,
    /// Where the data begins in its file, a multiple of [`PAGE_SIZE`].
    pub data_offset: u64,
}

impl RegionInfo {
    /// The length of its file in bytes: header area and data.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.data_offset.saturating_add(self.size)
    }
}

/// Where a medium's regions lie, and how much of it may be used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediumSettings {
    /// The directory; `None` is `media/<medium>` in the pool. A relative one is taken from the pool's directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The most bytes that regions may take there, headers included; `None` leaves the limit to the file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<u64>,
}

/// Choices that hold for the whole pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The medium of a region that does not name one.
    pub default_medium: MediumKind,
    /// Per medium; one that is missing here has the defaults.
    #[serde(default)]
    pub media: BTreeMap<MediumKind, MediumSettings>,
    /// The most bytes that VMs may have in memory together (see [`crate::budget`]); `None` leaves each what it was started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_limit: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Catalog {
    /// Random; region files carry it, so that two pools may share a medium's directory.
    pub(crate) pool: u64,
    /// The next region's id.
    pub(crate) next_id: u64,
    pub(crate) settings: Settings,
    /// In the order of allocation.
    pub(crate) regions: Vec<RegionInfo>,
}

/// Why a catalog could not be read, written or locked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// There is none.
    #[error("there is no pool at {}: `perdure run` makes one, or name another with --pool", path.display())]
    Missing {
        /// The pool's directory.
        path: PathBuf,
    },
    /// There is none, though there were regions.
    #[error("the catalog of the pool at {} is missing, but there are region files in {}: restore {}/catalog from a copy, or \
             move those files away", path.display(), files.display(), path.display())]
    Lost {
        /// The pool's directory.
        path: PathBuf,
        /// Where the files are.
        files: PathBuf,
    },
    /// It could not be read.
    #[error("could not read the pool's catalog {}", path.display())]
    Read {
        /// The catalog.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is of a newer version.
    #[error("the pool at {} was made by a newer perdure (catalog version {version}, this one knows up to {known}): \
             use that perdure; nothing was altered", path.display())]
    Newer {
        /// The pool's directory.
        path: PathBuf,
        /// As stored.
        version: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// A checksum does not match.
    #[error("the pool's catalog {} is damaged; nothing was altered. Restore it from a copy: every region file still \
             carries its name, kind and size in its header", path.display())]
    Damaged {
        /// The catalog.
        path: PathBuf,
        /// What is wrong.
        source: CatalogDamage,
    },
    /// What a change that was cut off has left could not be made durable.
    #[error("could not bring the pool's catalog {} up to date after a change that was cut off; nothing was altered", path.display())]
    Recover {
        /// The catalog.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its checksums match, and it is not a catalog.
    #[error("the pool's catalog {} makes no sense: {reason}; nothing was altered. Restore it from a copy", path.display())]
    Malformed {
        /// The catalog.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A new one could not be written. The old one stands.
    #[error("could not write the pool's catalog {}; the pool is as it was", path.display())]
    Write {
        /// The catalog.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The change is in the page cache, but not known to be on the disk.
    #[error("could not flush the pool's catalog in {}: the change is made, but a power cut may undo it. Check the disk", path.display())]
    Uncertain {
        /// The pool's directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The lock file could not be opened or locked.
    #[error("could not lock the pool by {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process holds the lock.
    #[error("another process has been changing the pool at {} for {} seconds: wait for it, or end it (`fuser {}/lock` names it)",
            path.display(), LOCK_PATIENCE.as_secs(), path.display())]
    Busy {
        /// The pool's directory.
        path: PathBuf,
    },
}

/// What is damaged in a catalog.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CatalogDamage {
    /// The frame, which is all of a catalog of version 1, and the first page of a later one.
    #[error(transparent)]
    Frame(FrameError),
    /// The file is longer than it says.
    #[error("it has {found} bytes and says that it has {expected}")]
    Length {
        /// Bytes that are there.
        found: u64,
        /// Bytes that it says.
        expected: u64,
    },
    /// The log of its changes.
    #[error("its log: {0}")]
    Log(String),
    /// Its settings.
    #[error("its settings, at byte {at} of its memory, do not verify")]
    Settings {
        /// Where, in bytes.
        at: usize,
    },
    /// The entry of a region.
    #[error("entry {entry}, at byte {at} of its memory, does not verify{}", named.as_ref().map(|name| format!(" (region {name}, perhaps)")).unwrap_or_default())]
    Entry {
        /// Which, from 0.
        entry: usize,
        /// Where, in bytes.
        at: usize,
        /// The name in it, if that can be read.
        named: Option<RegionName>,
    },
    /// All entries verify, and they are not those that it counted.
    #[error("its entries verify and do not add up: one was lost, or is an older one")]
    Sum,
}

impl Catalog {
    pub(crate) fn new(pool: u64, settings: Settings) -> Self {
        Self { pool, next_id: 1, settings, regions: Vec::new() }
    }

    pub(crate) fn find(&self, name: &RegionName) -> Option<&RegionInfo> {
        self.regions.iter().find(|region| region.name == *name)
    }

    /// Bytes that regions take on `medium`, headers included.
    pub(crate) fn allocated(&self, medium: MediumKind) -> u64 {
        let on_it = self.regions.iter().filter(|region| region.medium == medium);
        on_it.fold(0, |sum, region| sum.saturating_add(region.file_length()))
    }

    pub(crate) fn directory(&self, pool: &Path, medium: MediumKind) -> PathBuf {
        match self.settings.media.get(&medium).and_then(|m| m.directory.as_ref()) {
            Some(directory) => pool.join(directory),
            None => pool.join("media").join(medium.as_str()),
        }
    }

    pub(crate) fn capacity(&self, medium: MediumKind) -> Option<u64> {
        self.settings.media.get(&medium).and_then(|m| m.capacity)
    }

    /// The name of a region's file. Begins with [`Catalog::file_prefix`].
    pub(crate) fn file_name(&self, id: u64) -> String {
        format!("{}{id:08x}.region", self.file_prefix())
    }

    pub(crate) fn file_prefix(&self) -> String {
        format!("{:016x}-", self.pool)
    }

    pub(crate) fn path(&self, pool: &Path, region: &RegionInfo) -> PathBuf {
        self.directory(pool, region.medium).join(self.file_name(region.id))
    }

    /// Reads and verifies, and writes nothing.
    pub(crate) fn load(vfs: &dyn Vfs, pool: &Path) -> Result<Self, CatalogError> {
        Self::load_durable(vfs, pool).map(|(catalog, _)| catalog)
    }

    /// As [`Catalog::load`], and says whether a power cut would leave it so: it may be a change's whose maker was killed before it was flushed.
    pub(crate) fn load_durable(vfs: &dyn Vfs, pool: &Path) -> Result<(Self, bool), CatalogError> {
        let mut damage = 0;
        for _ in 0..LOOKS {
            match file::look(vfs, pool) {
                Ok(Some(found)) => return Ok(found),
                // A change that went on meanwhile may look like damage, for a moment.
                Err(error @ (CatalogError::Damaged { .. } | CatalogError::Malformed { .. })) => {
                    damage += 1;
                    if damage == LOOKS_AT_DAMAGE {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
                Ok(None) => {}
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(CatalogError::Busy { path: pool.to_owned() })
    }

    /// What a catalog must hold however it came to be: later code leans on it.
    fn validate(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        let mut last = 0;
        for region in &self.regions {
            let name = &region.name;
            if region.id <= last || region.id >= self.next_id {
                return Err(format!("region {name} has id {}, out of order", region.id));
            }
            last = region.id;
            if !names.insert(name) {
                return Err(format!("two regions are named {name}"));
            }
            let aligned = |n: u64| n.is_multiple_of(PAGE_SIZE);
            let fits = region.data_offset.checked_add(region.size).is_some_and(|end| end <= MAX_FILE);
            if region.size == 0 || !aligned(region.size) || !aligned(region.data_offset) || !fits {
                return Err(format!("region {name} has size {} at {}", region.size, region.data_offset));
            }
            if region.data_offset < MIN_DATA_OFFSET {
                return Err(format!("region {name} has its data at {}, in its header", region.data_offset));
            }
        }
        Ok(())
    }
}

/// The right to change the pool. Given up when dropped, or when its process dies.
#[derive(Debug)]
pub(crate) struct CatalogLock {
    _file: Box<dyn VfsFile>,
}

impl CatalogLock {
    pub(crate) fn take(vfs: &dyn Vfs, pool: &Path) -> Result<Self, CatalogError> {
        let path = pool.join(LOCK);
        let lock = |source| CatalogError::Lock { path: path.clone(), source };
        let file = vfs.open(&path, OpenMode::OpenOrCreate).map_err(lock)?;
        let begun = Instant::now();
        let mut pause = Duration::from_micros(200);
        while !file.try_lock().map_err(lock)? {
            if begun.elapsed() > LOCK_PATIENCE {
                return Err(CatalogError::Busy { path: pool.to_owned() });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(Self { _file: file })
    }
}
