//! Where the generations of a VM lie, and what is in one.
//!
//! ```text
//!   <pool>/generations/<family>/    a store (crate `snapshot`); a family is a VM and its forks
//!       lineage <name of the VM>    its generations, numbered
//!           region "ram"            guest memory, page by page, in the order of the RAM region
//!           region NAME             the disk NAME of the pool, of kind "disk", or persistent memory, of kind "pmem"
//!           blob "context"          the volatile state: a ContextV1 in JSON
//!           blob "config"           what the VM is made of: a VmConfig in JSON
//! ```

use std::path::{Path, PathBuf};

use allocator::{NameError, RegionName};
use snapshot::{Compression, Integrity, Options, RetentionPolicy, Store, StoreError};

use crate::machine::config::VmConfig;
use crate::machine::config::generations::{self as config, GenerationsConfig};

/// The blob with the volatile state: a [`super::context::ContextV1`] in JSON.
pub const BLOB_CONTEXT: &str = "context";
/// The blob with what the VM is made of: a [`VmConfig`] in JSON.
pub const BLOB_CONFIG: &str = "config";
/// The region with guest memory.
pub const REGION_RAM: &str = "ram";
/// The kind of a region with a disk.
pub const KIND_DISK: &str = "disk";
/// The kind of a region with persistent memory.
pub const KIND_PMEM: &str = "pmem";

/// Why a store of generations cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GenerationsError {
    /// The family's name.
    #[error("'{family}' cannot be the name of a family of VMs")]
    Family {
        /// Which.
        family: String,
        /// Why.
        #[source]
        source: NameError,
    },
    /// A family's name with several components.
    #[error("'{0}' cannot be the name of a family of VMs: it must be a single component, without '/'")]
    Nested(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The family of the VM `name`: whose store its generations are in.
#[must_use]
pub fn family<'a>(config: &'a VmConfig, name: &'a str) -> &'a str {
    config.family.as_deref().unwrap_or(name)
}

/// Where the store of a family lies.
#[must_use]
pub fn store_dir(pool: &Path, family: &str) -> PathBuf {
    pool.join("generations").join(family)
}

/// Opens the store of a family, and makes it if there is none.
///
/// # Errors
/// [`GenerationsError`].
pub fn open(pool: &Path, family: &str, config: &GenerationsConfig) -> Result<Store, GenerationsError> {
    check(family)?;
    Ok(Store::open(vfs::cut::host(), &store_dir(pool, family), options(config))?)
}

/// Opens the store of a family; `None` if there is none.
///
/// # Errors
/// [`GenerationsError`].
pub fn open_existing(pool: &Path, family: &str, config: &GenerationsConfig) -> Result<Option<Store>, GenerationsError> {
    check(family)?;
    let directory = store_dir(pool, family);
    if !directory.exists() {
        return Ok(None);
    }
    Ok(Some(Store::open_existing(vfs::cut::host(), &directory, options(config))?))
}

/// A family's name is read from disk, and becomes a part of a path.
fn check(family: &str) -> Result<(), GenerationsError> {
    if family.contains('/') {
        return Err(GenerationsError::Nested(family.to_owned()));
    }
    let parsed = family.parse::<RegionName>();
    parsed.map(drop).map_err(|source| GenerationsError::Family { family: family.to_owned(), source })
}

/// How a store is used under `config`.
#[must_use]
pub fn options(config: &GenerationsConfig) -> Options {
    Options {
        compression: match config.compress {
            config::Compress::None => Compression::None,
            config::Compress::Lz4 => Compression::Lz4,
            config::Compress::Zstd => Compression::Zstd,
        },
        redundancy: config.redundancy,
        bufsize: usize::try_from(config.bufsize.0).unwrap_or(usize::MAX),
        integrity: match config.integrity {
            config::Integrity::Fail => Integrity::Fail,
            config::Integrity::Warn => Integrity::Warn,
        },
        threshold: config.threshold,
        ..Options::default()
    }
}

/// Which generations stay under `config`.
#[must_use]
pub fn retention(config: &GenerationsConfig) -> RetentionPolicy {
    RetentionPolicy {
        max_snapshots: config.max_snapshots,
        min_snapshots: config.min_snapshots,
        expiration_ms: config.expiration_ms,
        include_manual: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_that_would_leave_the_pool_is_refused() {
        let pool = tempfile::tempdir().unwrap();
        let config = GenerationsConfig::default();
        for family in ["..", "../x", "a/b", "", "/etc"] {
            assert!(open(pool.path(), family, &config).is_err(), "{family:?}");
        }
        assert!(open_existing(pool.path(), "web", &config).unwrap().is_none());
        open(pool.path(), "web", &config).unwrap();
        assert!(open_existing(pool.path(), "web", &config).unwrap().is_some());
        assert!(store_dir(pool.path(), "web").is_dir());
    }

    #[test]
    fn a_vm_is_its_own_family_unless_it_is_a_fork() {
        let mut config = VmConfig::default();
        assert_eq!(family(&config, "web"), "web");
        config.family = Some("shop".to_owned());
        assert_eq!(family(&config, "web"), "shop");
    }
}
