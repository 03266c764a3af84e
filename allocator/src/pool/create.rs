//! Where a pool is, and how one comes to be.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use vfs::{OpenMode, Vfs};

use super::{Pool, PoolError};
use crate::catalog::{Catalog, CatalogError, CatalogLock, Edit, Settings};
use crate::medium::{Backing, MediumKind, PAGE_SIZE, dax};

/// `$PERDURE_POOL`, else `$XDG_STATE_HOME/perdure`, else `~/.local/state/perdure`.
///
/// # Errors
/// [`PoolError::NoHome`] if none of the variables is set.
pub fn default_pool_dir() -> Result<PathBuf, PoolError> {
    pool_dir_from(|name| std::env::var_os(name)).ok_or(PoolError::NoHome)
}

fn pool_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(pool) = set("PERDURE_POOL") {
        return Some(pool);
    }
    // The XDG Base Directory Specification: a relative path is invalid and to be ignored.
    let state = set("XDG_STATE_HOME").filter(|path| path.is_absolute());
    let state = state.or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("perdure"))
}

impl Pool {
    /// Opens the pool at `dir`, or makes an empty one. Its default medium is then `dax` if `dir` lies on a DAX file
    /// system, else `file`.
    ///
    /// # Errors
    /// As [`Pool::open`]; [`PoolError::Io`] if it could not be made.
    pub fn create_or_open(dir: impl AsRef<Path>, vfs: Arc<dyn Vfs>) -> Result<Self, PoolError> {
        let dir = dir.as_ref();
        match Self::open(dir, Arc::clone(&vfs)) {
            Err(PoolError::Catalog(CatalogError::Missing { .. })) => Self::create(dir, vfs),
            other => other,
        }
    }

    fn create(dir: &Path, vfs: Arc<dyn Vfs>) -> Result<Self, PoolError> {
        create_dir_durably(&*vfs, dir)?;
        let _lock = CatalogLock::take(&*vfs, dir)?;
        let catalog = match Catalog::load(&*vfs, dir) {
            // Another process was quicker.
            Ok(catalog) => catalog,
            Err(CatalogError::Missing { .. }) => {
                refuse_lost(&*vfs, dir)?;
                let settings =
                    Settings { default_medium: detect(&*vfs, dir)?, media: BTreeMap::new(), ram_limit: None };
                let catalog = Catalog::new(random(), settings);
                Edit::new(&*vfs, dir).commit(&catalog)?;
                catalog
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Self { dir: dir.to_owned(), vfs, catalog: RwLock::new(catalog) })
    }
}

/// Where region files are and no catalog, a new catalog would hide them.
pub(super) fn refuse_lost(vfs: &dyn Vfs, dir: &Path) -> Result<(), CatalogError> {
    let media = MediumKind::ALL.map(|medium| dir.join("media").join(medium.as_str()));
    let has_regions = |media: &PathBuf| {
        let entries = vfs.read_dir(media).unwrap_or_default();
        entries.iter().any(|entry| entry.name.ends_with(".region"))
    };
    match media.into_iter().find(has_regions) {
        Some(files) => Err(CatalogError::Lost { path: dir.to_owned(), files }),
        None => Ok(()),
    }
}

/// A number that no other pool has. Not a secret.
fn random() -> u64 {
    // The standard library seeds this from the kernel's generator.
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// Makes a directory and its missing parents, each durable before the next is made. So at most the lowest one that is there already
/// can be one whose maker was killed before it flushed the name: that is done here.
pub(super) fn create_dir_durably(vfs: &dyn Vfs, dir: &Path) -> Result<(), PoolError> {
    let mut new = Vec::new();
    for ancestor in dir.ancestors().filter(|ancestor| !ancestor.as_os_str().is_empty()) {
        let there = vfs.entry_kind(ancestor).map_err(PoolError::io("look at", ancestor))?;
        if there.is_some() {
            match vfs.sync_dir(parent_of(ancestor)) {
                // Above a home directory: whoever may not read it did not make that name either.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                other => other.map_err(PoolError::io("flush the directory", parent_of(ancestor)))?,
            }
            break;
        }
        new.push(ancestor);
    }
    for made in new.into_iter().rev() {
        vfs.create_dir_all(made).map_err(PoolError::io("make the directory", made))?;
        let parent = parent_of(made);
        vfs.sync_dir(parent).map_err(PoolError::io("flush the directory", parent))?;
    }
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// `dax` if a file in `dir` can be mapped with `MAP_SYNC`.
fn detect(vfs: &dyn Vfs, dir: &Path) -> Result<MediumKind, PoolError> {
    let path = dir.join(PROBE);
    let file = vfs.open(&path, OpenMode::CreateTruncate).map_err(PoolError::io("make", &path))?;
    let is_dax = file.descriptor().is_some() && file.set_len(PAGE_SIZE).is_ok() && {
        let backing = Backing { file: &*file, path: &path, offset: 0, size: PAGE_SIZE };
        dax::check(&backing).is_ok()
    };
    vfs.remove_file(&path).map_err(PoolError::io("remove", &path))?;
    Ok(if is_dax { MediumKind::Dax } else { MediumKind::File })
}

/// The file that [`detect`] maps.
pub(super) const PROBE: &str = "probe.tmp";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_directory_follows_the_environment() {
        let of = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|(k, v)| ((*k).to_owned(), v.into())).collect();
            pool_dir_from(|name| set.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        assert_eq!(of(&[("PERDURE_POOL", "p"), ("XDG_STATE_HOME", "/x"), ("HOME", "/h")]), Some("p".into()));
        assert_eq!(of(&[("XDG_STATE_HOME", "/x"), ("HOME", "/h")]), Some("/x/perdure".into()));
        assert_eq!(of(&[("XDG_STATE_HOME", "x"), ("HOME", "/h")]), Some("/h/.local/state/perdure".into()));
        assert_eq!(of(&[("PERDURE_POOL", ""), ("HOME", "/h")]), Some("/h/.local/state/perdure".into()));
        assert_eq!(of(&[]), None);
    }
}
