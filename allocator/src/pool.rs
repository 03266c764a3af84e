//! A pool: a directory that holds regions under names.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;
use vfs::Vfs;

use crate::catalog::{Catalog, CatalogError, RegionInfo, Settings};
use crate::lease::{Holder, Lease, LeaseError};
use crate::medium::{MediumError, MediumKind};
use crate::name::{NameError, RegionName};
use crate::region::{Kind, Region, RegionError};
use crate::size::Size;

mod change;
pub mod check;
mod create;

pub use create::default_pool_dir;

/// What to allocate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// What it is for.
    pub kind: Kind,
    /// Bytes; a multiple of [`crate::PAGE_SIZE`], not 0.
    pub size: u64,
    /// What it lies on; `None` is the pool's default for a new region, and whatever it lies on for one that is there.
    pub medium: Option<MediumKind>,
}

/// How much of a medium is in use, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The medium.
    pub medium: MediumKind,
    /// Where its regions lie.
    pub directory: PathBuf,
    /// The limit set for the pool, if one is.
    pub capacity: Option<u64>,
    /// What regions take there, headers included.
    pub allocated: u64,
    /// What may still be allocated: what the limit leaves and the file system has. `None` if neither says.
    pub free: Option<u64>,
}

/// Why a pool could not be opened or changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The catalog could not be read, written or locked.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A lease stands in the way, or could not be taken.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A region's header stands in the way.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A name that would arise is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is one of that name, and it is another.
    #[error(
        "region {name} exists with {found}, and {asked} was asked for: use another name, `resize` it, or free it first"
    )]
    Mismatch {
        /// The region.
        name: RegionName,
        /// Kind, size and medium that it has.
        found: String,
        /// Those that were asked for.
        asked: String,
    },
    /// A size that no region can have.
    #[error("region {name} cannot have {size} bytes: {reason}")]
    BadSize {
        /// The region.
        name: RegionName,
        /// What was asked for.
        size: u64,
        /// Why not, and which would do.
        reason: String,
    },
    /// No region of that name, or none below it.
    #[error("there is no region {name} in the pool: `perdure pool list` names those that are")]
    NoSuchRegion {
        /// What was asked for.
        name: RegionName,
    },
    /// The new name is taken.
    #[error("cannot rename {from} to {to}: there is a region {to} already; free it first or choose another name")]
    NameTaken {
        /// The region.
        from: RegionName,
        /// Its new name.
        to: RegionName,
    },
    /// The region holds the frozen state of a VM.
    #[error(
        "region {name} holds the frozen memory of context {context} and is not resized: resume the VM, or remove it"
    )]
    Frozen {
        /// The region.
        name: RegionName,
        /// The context.
        context: u64,
    },
    /// A log of recoverable memory may hold changes of the region.
    #[error(
        "region {name} belongs to a log of recoverable memory, which may hold changes of it, and is not made smaller: unmap it first"
    )]
    Bound {
        /// The region.
        name: RegionName,
    },
    /// The pool's limit for a medium.
    #[error(
        "{} are needed for region {name} on {medium}, {} of the pool's limit of {} are free: free regions, or raise the limit",
        Size(*needed), Size(*free), Size(*capacity)
    )]
    OverCapacity {
        /// The region.
        name: RegionName,
        /// Its medium.
        medium: MediumKind,
        /// Bytes that are needed, the header included.
        needed: u64,
        /// Bytes that are left.
        free: u64,
        /// The limit.
        capacity: u64,
    },
    /// The file system is full.
    #[error("{} are needed for region {name} in {}, {} are free on that file system: make room, or \
             choose another medium", Size(*needed), directory.display(), Size(*free))]
    NoSpace {
        /// The region.
        name: RegionName,
        /// The medium's directory.
        directory: PathBuf,
        /// Bytes that are needed, the header included.
        needed: u64,
        /// Bytes that the file system has left.
        free: u64,
    },
    /// A change of settings that would lose regions from sight.
    #[error("the {medium} directory cannot change from {} to {}: {regions} regions lie there; free them first",
            from.display(), to.display())]
    DirectoryInUse {
        /// The medium.
        medium: MediumKind,
        /// Where it is.
        from: PathBuf,
        /// Where it was to be.
        to: PathBuf,
        /// How many regions it has.
        regions: usize,
    },
    /// The medium does not do what it must.
    #[error("could not make region {name} on {medium}")]
    Medium {
        /// The region.
        name: RegionName,
        /// Its medium.
        medium: MediumKind,
        /// Why.
        source: MediumError,
    },
    /// A system call on a file or directory failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No directory for pools is known.
    #[error(
        "there is no place for a pool: neither PERDURE_POOL nor XDG_STATE_HOME nor HOME is set; name one with --pool"
    )]
    NoHome,
}

impl PoolError {
    fn io<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| Self::Io { what, path: path.to_owned(), source }
    }
}

/// A pool that was opened. What is read from it is the catalog as of [`Pool::open`], [`Pool::refresh`] or the last change made through
/// this; a lease and a change always go by the catalog on the disk.
#[derive(Debug)]
pub struct Pool {
    dir: PathBuf,
    vfs: Arc<dyn Vfs>,
    catalog: RwLock<Catalog>,
}

impl Pool {
    /// Opens a pool that is there. Reads one file, writes nothing.
    ///
    /// # Errors
    /// [`PoolError::Catalog`]: missing, of a newer version, damaged.
    pub fn open(dir: impl AsRef<Path>, vfs: Arc<dyn Vfs>) -> Result<Self, PoolError> {
        let dir = dir.as_ref().to_owned();
        match Catalog::load(&*vfs, &dir) {
            Ok(catalog) => Ok(Self { dir, vfs, catalog: RwLock::new(catalog) }),
            Err(error) => {
                if matches!(error, CatalogError::Missing { .. }) {
                    create::refuse_lost(&*vfs, &dir)?;
                }
                Err(error.into())
            }
        }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file system it lies on.
    #[must_use]
    pub fn vfs(&self) -> &Arc<dyn Vfs> {
        &self.vfs
    }

    /// Its settings.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.read(|catalog| catalog.settings.clone())
    }

    fn read<T>(&self, look: impl FnOnce(&Catalog) -> T) -> T {
        look(&self.catalog.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, catalog: Catalog) {
        *self.catalog.write().unwrap_or_else(PoisonError::into_inner) = catalog;
    }

    /// Reads the catalog anew, for changes that other processes made.
    ///
    /// # Errors
    /// As [`Pool::open`].
    pub fn refresh(&self) -> Result<(), PoolError> {
        self.reload().map(drop)
    }

    /// As [`Pool::refresh`], and says whether what was read is durable.
    fn reload(&self) -> Result<bool, PoolError> {
        let (catalog, durable) = Catalog::load_durable(&*self.vfs, &self.dir)?;
        self.replace(catalog);
        Ok(durable)
    }

    /// A region by name.
    #[must_use]
    pub fn get(&self, name: &RegionName) -> Option<RegionInfo> {
        self.read(|catalog| catalog.find(name).cloned())
    }

    /// All regions in the order in which they were allocated. That order is part of the catalog: who lays out regions in guest memory
    /// in the order of this list gets the same layout after every restart.
    #[must_use]
    pub fn list(&self) -> Vec<RegionInfo> {
        self.read(|catalog| catalog.regions.clone())
    }

    /// The file of a region, for messages.
    #[must_use]
    pub fn path_of(&self, region: &RegionInfo) -> PathBuf {
        self.read(|catalog| catalog.path(&self.dir, region))
    }

    /// Bytes of a region that are in the page cache and not on its medium yet; `None` where there is no such thing, or it cannot be told.
    #[must_use]
    pub fn dirty_bytes(&self, region: &RegionInfo) -> Option<u64> {
        if region.medium != MediumKind::File {
            return None;
        }
        let file = self.vfs.open(&self.path_of(region), vfs::OpenMode::Read).ok()?;
        file.cached(region.data_offset, region.size).map(|cached| cached.dirty)
    }

    /// Use of each medium.
    ///
    /// # Errors
    /// [`PoolError::Io`] if a file system does not tell its free space.
    pub fn usage(&self) -> Result<Vec<Usage>, PoolError> {
        let catalog = self.read(Clone::clone);
        let of = |medium| {
            let directory = catalog.directory(&self.dir, medium);
            let allocated = catalog.allocated(medium);
            let capacity = catalog.capacity(medium);
            let within_limit = capacity.map(|capacity| capacity.saturating_sub(allocated));
            let on_disk = change::available(&*self.vfs, &directory)?;
            let free = [within_limit, on_disk].into_iter().flatten().min();
            Ok(Usage { medium, directory, capacity, allocated, free })
        };
        MediumKind::ALL.into_iter().map(of).collect()
    }

    /// Leases a region to this process.
    ///
    /// # Errors
    /// [`LeaseError::Held`] names the holder; [`LeaseError::NoSuchRegion`]; [`LeaseError::MissingFile`];
    /// [`LeaseError::Io`]; [`LeaseError::Catalog`].
    pub fn lease(&self, name: &RegionName) -> Result<Lease, LeaseError> {
        let catalog = self.read(Clone::clone);
        Lease::take(&*self.vfs, &self.dir, &catalog, name)
    }

    /// The log of recoverable memory that may hold changes of a region which are not in it yet (from [`crate::rvm::Rvm::map`] to
    /// [`crate::rvm::Rvm::unmap`]): nobody else is to change it. A log that was freed holds nothing.
    #[must_use]
    pub fn log_of(&self, region: &Region) -> Option<RegionName> {
        let (Ok(id) | Err(id)) = region.bound_to();
        let id = id?;
        self.read(|catalog| Some(catalog.regions.iter().find(|log| log.id == id)?.name.clone()))
    }

    /// Who holds a region now; `None` if nobody.
    ///
    /// # Errors
    /// As [`Pool::lease`], but for `Held`.
    pub fn holder(&self, name: &RegionName) -> Result<Option<Holder>, LeaseError> {
        let (pool, region, path) = self.read(|catalog| {
            let region = catalog.find(name).cloned();
            let path = region.as_ref().map(|region| catalog.path(&self.dir, region));
            (catalog.pool, region, path)
        });
        let (Some(region), Some(path)) = (region, path) else {
            return Err(LeaseError::NoSuchRegion { name: name.clone() });
        };
        match Lease::lock(&*self.vfs, pool, &region, path) {
            Ok(_free_again) => Ok(None),
            Err(LeaseError::Held { holder, .. }) => Ok(Some(holder)),
            Err(error) => Err(error),
        }
    }
}
