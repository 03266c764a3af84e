//! The catalog: which regions a pool has. One file, replaced whole by a rename.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vfs::cut::point::{Point, pass};
use vfs::{OpenMode, Vfs, VfsFile};

use crate::frame::{self, FrameError, Magic};
use crate::header::MIN_DATA_OFFSET;
use crate::medium::{MediumKind, PAGE_SIZE};
use crate::name::RegionName;
use crate::region::Kind;

pub(crate) const FILE: &str = "catalog";
pub(crate) const TEMPORARY: &str = "catalog.tmp";
const LOCK: &str = "lock";
const MAGIC: Magic = *b"PERDCATL";
/// The version that this code writes.
pub const VERSION: u32 = 1;
/// Far more than a catalog of 65,536 regions needs.
const MAX_LEN: usize = 64 << 20;
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
    /// Its frame does not verify.
    #[error("the pool's catalog {} is damaged; nothing was altered. Restore it from a copy: every region file still \
             carries its name, kind and size in its header", path.display())]
    Damaged {
        /// The catalog.
        path: PathBuf,
        /// What is wrong.
        source: FrameError,
    },
    /// Its frame verifies, its body is not a catalog.
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
    /// The new one is in place, but its directory could not be flushed.
    #[error("could not flush the pool's directory {}: the change is made, but a power cut may undo it. Check the disk", path.display())]
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

    /// Reads and verifies. Four system calls, no write.
    pub(crate) fn load(vfs: &dyn Vfs, pool: &Path) -> Result<Self, CatalogError> {
        let path = pool.join(FILE);
        let read = |source| CatalogError::Read { path: path.clone(), source };
        let file = match vfs.open(&path, OpenMode::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CatalogError::Missing { path: pool.to_owned() });
            }
            other => other.map_err(read)?,
        };
        let length = file.len().map_err(read)?;
        let most = MAX_LEN + frame::HEADER_LEN;
        let wanted = usize::try_from(length).map_or(most, |length| length.min(most));
        let mut bytes = vec![0; wanted];
        file.read_exact_at(&mut bytes, 0).map_err(read)?;
        Self::decode(&bytes).map_err(|error| error.at(pool))
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let frame = frame::decode(bytes, MAGIC, VERSION, MAX_LEN).map_err(DecodeError::Frame)?;
        if !frame.rest.is_empty() {
            return Err(DecodeError::Body(format!("{} bytes follow it", frame.rest.len())));
        }
        let catalog: Self = serde_json::from_slice(frame.body).map_err(|error| DecodeError::Body(error.to_string()))?;
        catalog.validate().map_err(DecodeError::Body)?;
        Ok(catalog)
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

    /// Replaces the catalog on the disk: temporary file, flush, rename, flush of the directory.
    pub(crate) fn commit(&self, vfs: &dyn Vfs, pool: &Path) -> Result<(), CatalogError> {
        pass(Point::CatalogCommit);
        let (path, temporary) = (pool.join(FILE), pool.join(TEMPORARY));
        let write = |source| CatalogError::Write { path: path.clone(), source };
        let body = serde_json::to_vec(self).map_err(|error| write(error.into()))?;
        let replaced = (|| {
            let file = vfs.open(&temporary, OpenMode::CreateTruncate)?;
            file.write_all_at(&frame::encode(MAGIC, VERSION, &body), 0)?;
            file.sync_data()?;
            vfs.rename(&temporary, &path)
        })();
        if let Err(source) = replaced {
            // Best effort: what is left of it is swept by the next change.
            drop(vfs.remove_file(&temporary));
            return Err(write(source));
        }
        vfs.sync_dir(pool).map_err(|source| CatalogError::Uncertain { path: pool.to_owned(), source })?;
        pass(Point::CatalogDone);
        Ok(())
    }
}

enum DecodeError {
    Frame(FrameError),
    Body(String),
}

impl DecodeError {
    fn at(self, pool: &Path) -> CatalogError {
        let path = pool.join(FILE);
        match self {
            Self::Frame(FrameError::Newer { version, known }) => {
                CatalogError::Newer { path: pool.to_owned(), version, known }
            }
            Self::Frame(source) => CatalogError::Damaged { path, source },
            Self::Body(reason) => CatalogError::Malformed { path, reason },
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vfs::CrashVfs;

    fn settings() -> Settings {
        Settings { default_medium: MediumKind::File, media: BTreeMap::new(), ram_limit: None }
    }

    fn region(id: u64, name: &str) -> RegionInfo {
        RegionInfo {
            id,
            name: name.parse().unwrap(),
            kind: Kind::Ram,
            medium: MediumKind::File,
            size: 4096,
            data_offset: MIN_DATA_OFFSET,
        }
    }

    fn catalog() -> Catalog {
        let mut catalog = Catalog::new(5, settings());
        catalog.regions = vec![region(1, "web/ram"), region(3, "a")];
        catalog.next_id = 4;
        catalog
    }

    fn encoded(catalog: &Catalog) -> Vec<u8> {
        frame::encode(MAGIC, VERSION, &serde_json::to_vec(catalog).unwrap())
    }

    #[test]
    fn a_catalog_comes_back_as_it_was_committed() {
        let vfs = CrashVfs::new();
        let pool = Path::new("/pool");
        vfs.create_dir_all(pool).unwrap();
        catalog().commit(&vfs, pool).unwrap();
        assert_eq!(Catalog::load(&vfs, pool).unwrap(), catalog());
        assert_eq!(vfs.entry_kind(&pool.join(TEMPORARY)).unwrap(), None);
    }

    #[test]
    fn a_newer_catalog_and_a_damaged_one_are_told_apart() {
        let body = serde_json::to_vec(&catalog()).unwrap();
        let told = |bytes: &[u8]| Catalog::decode(bytes).err().unwrap().at(Path::new("/pool")).to_string();
        let newer = told(&frame::encode(MAGIC, VERSION + 1, &body));
        assert!(newer.contains("made by a newer perdure"), "{newer}");
        let mut bytes = encoded(&catalog());
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        assert!(told(&bytes).contains("is damaged; nothing was altered"));
        bytes[last] ^= 1;
        bytes.push(0);
        assert!(told(&bytes).contains("1 bytes follow it"));
        assert!(told(&frame::encode(MAGIC, VERSION, b"{}")).contains("makes no sense"));
    }

    #[test]
    fn nonsense_under_a_valid_crc_is_refused() {
        let refused = |change: fn(&mut Catalog)| {
            let mut catalog = catalog();
            change(&mut catalog);
            Catalog::decode(&encoded(&catalog)).is_err()
        };
        assert!(!refused(|_| {}));
        assert!(refused(|c| c.regions[1].name = c.regions[0].name.clone()));
        assert!(refused(|c| c.regions[1].id = 1));
        assert!(refused(|c| c.next_id = 3));
        assert!(refused(|c| c.regions[0].size = 0));
        assert!(refused(|c| c.regions[0].size = 4097));
        assert!(refused(|c| c.regions[0].size = u64::MAX - 4095));
        assert!(refused(|c| c.regions[0].data_offset = 8192));
        assert!(refused(|c| c.regions[0].data_offset = 1 << 63));
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_do_no_harm(body in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Catalog::decode(&frame::encode(MAGIC, VERSION, &body)).is_err());
        }
    }
}
