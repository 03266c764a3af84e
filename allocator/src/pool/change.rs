//! Changes of a pool: under the catalog's lock, and each becomes true with one transaction on the catalog.
//!
//! The order is what makes a kill or a cut harmless. Bytes that the new catalog needs are durable *before* it; bytes that
//! only the old catalog needs go *after* it. What is then left over by a crash belongs to no region, and the next change sweeps it,
//! but not before the catalog that says so is durable itself.

use std::io;
use std::path::{Path, PathBuf};

use vfs::{EntryKind, OpenMode, Vfs, VfsFile};

use super::create::{PROBE, create_dir_durably};
use super::{Pool, PoolError, RegionSpec};
use crate::catalog::{Catalog, CatalogError, CatalogLock, Edit, MAX_FILE, RegionInfo, Settings, TEMPORARY};
use crate::header::{Copies, MIN_DATA_OFFSET};
use crate::lease::{Lease, LeaseError};
use crate::medium::{Backing, HUGE_PAGE, MediumKind, PAGE_SIZE, dax};
use crate::name::RegionName;
use crate::region::{self, Kind, Region};
use crate::size::Size;

/// Bytes that are free on the file system of `directory`, or of what it will be made in.
pub(super) fn available(vfs: &dyn Vfs, directory: &Path) -> Result<Option<u64>, PoolError> {
    for ancestor in directory.ancestors() {
        let ancestor = if ancestor.as_os_str().is_empty() { Path::new(".") } else { ancestor };
        match vfs.space(ancestor) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => {
                let space = other.map_err(PoolError::io("ask for the free space of", ancestor))?;
                return Ok(space.map(|space| space.available));
            }
        }
    }
    Ok(None)
}

/// Where data begins: at a huge page where one can map it, else right after the headers.
fn data_offset(kind: Kind, medium: MediumKind) -> u64 {
    match (medium, kind) {
        (MediumKind::Dax, Kind::Ram | Kind::Pmem | Kind::Disk) => HUGE_PAGE,
        _ => MIN_DATA_OFFSET,
    }
}

fn check_size(name: &RegionName, size: u64) -> Result<(), PoolError> {
    let bad = |reason: String| {
        let name = name.clone();
        Err(PoolError::BadSize { name, size, reason })
    };
    let most = MAX_FILE - HUGE_PAGE;
    match size {
        0 => bad(format!("give a multiple of {PAGE_SIZE}")),
        _ if size > most => bad(format!("at most {most} can be")),
        _ if !size.is_multiple_of(PAGE_SIZE) => {
            let below = size / PAGE_SIZE * PAGE_SIZE;
            bad(format!("give a multiple of {PAGE_SIZE}, such as {}", below + PAGE_SIZE))
        }
        _ => Ok(()),
    }
}

/// What a file in a medium's directory is to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stray {
    /// Left by a crash: no region has it, and none will.
    Orphan,
    /// In use once, by a catalog newer than this one. Never swept.
    Unknown,
}

impl Pool {
    /// Allocates a region, or finds it again: the same name, kind and size yield the same region with the same bytes. A new
    /// one reads as zero, and its space is reserved. When this returns, it is there after a power cut too.
    ///
    /// # Errors
    /// [`PoolError::Mismatch`] if there is another one of that name; [`PoolError::BadSize`]; [`PoolError::OverCapacity`] and
    /// [`PoolError::NoSpace`]; [`PoolError::Medium`] if it was to be `dax` and is not; [`PoolError::Catalog`]; [`PoolError::Io`].
    pub fn allocate(&self, name: &RegionName, spec: RegionSpec) -> Result<RegionInfo, PoolError> {
        check_size(name, spec.size)?;
        let durable = self.reload()?;
        if let Some(found) = self.get(name) {
            if !durable {
                // Whoever allocated it may have been killed before it was.
                self.sweep()?;
            }
            return same(found, spec);
        }
        self.change(|catalog, edit| match catalog.find(name) {
            Some(found) => same(found.clone(), spec),
            None => self.allocate_new(catalog, edit, name, spec),
        })
    }

    fn allocate_new(
        &self,
        catalog: &mut Catalog,
        edit: &mut Edit<'_>,
        name: &RegionName,
        spec: RegionSpec,
    ) -> Result<RegionInfo, PoolError> {
        let medium = spec.medium.unwrap_or(catalog.settings.default_medium);
        let info = RegionInfo {
            id: catalog.next_id,
            name: name.clone(),
            kind: spec.kind,
            medium,
            size: spec.size,
            data_offset: data_offset(spec.kind, medium),
        };
        let directory = catalog.directory(&self.dir, medium);
        create_dir_durably(&*self.vfs, &directory)?;
        self.check_room(catalog, &info, info.file_length())?;
        let path = catalog.path(&self.dir, &info);
        let made = self.make_file(catalog.pool, &info, &path);
        catalog.regions.push(info.clone());
        catalog.next_id += 1;
        let committed = made.and_then(|()| Ok(edit.commit(catalog)?));
        match committed {
            Ok(()) => Ok(info),
            // The catalog may or may not have it after a cut: its file stays.
            Err(error @ PoolError::Catalog(CatalogError::Uncertain { .. })) => Err(error),
            Err(error @ PoolError::Io { .. }) if is_stray(&error) => Err(error),
            Err(error) => {
                // Best effort: the next change sweeps it.
                drop(self.vfs.remove_file(&path));
                Err(self.explain_full(error, &info, info.file_length(), &directory))
            }
        }
    }

    /// Makes the file of a region and everything in it durable.
    fn make_file(&self, pool: u64, info: &RegionInfo, path: &Path) -> Result<(), PoolError> {
        let io = |what| PoolError::io(what, path);
        let file = self.vfs.open(path, OpenMode::CreateNew).map_err(io(CREATE))?;
        let length = info.file_length();
        file.allocate(0, length).map_err(io("reserve space for"))?;
        if info.medium == MediumKind::Dax {
            check_dax(&*file, path, info)?;
        }
        region::format(&*file, pool, info).map_err(io("write the header of"))?;
        file.sync_all().map_err(io("flush"))?;
        let directory = path.parent().unwrap_or(&self.dir);
        self.vfs.sync_dir(directory).map_err(PoolError::io("flush the directory", directory))
    }

    /// Whether `needed` more bytes for `info` are within the pool's limit and on the file system.
    fn check_room(&self, catalog: &Catalog, info: &RegionInfo, needed: u64) -> Result<(), PoolError> {
        let medium = info.medium;
        if let Some(capacity) = catalog.capacity(medium) {
            let free = capacity.saturating_sub(catalog.allocated(medium));
            if free < needed {
                return Err(PoolError::OverCapacity { name: info.name.clone(), medium, needed, free, capacity });
            }
        }
        let directory = catalog.directory(&self.dir, medium);
        match available(&*self.vfs, &directory)? {
            Some(free) if free < needed => Err(PoolError::NoSpace { name: info.name.clone(), directory, needed, free }),
            _ => Ok(()),
        }
    }

    /// Turns "no space left on device" into how much is needed and how much there is.
    fn explain_full(&self, error: PoolError, info: &RegionInfo, needed: u64, directory: &Path) -> PoolError {
        match error {
            PoolError::Io { what, path, source } if source.kind() == io::ErrorKind::StorageFull => {
                match available(&*self.vfs, directory) {
                    Ok(Some(free)) => {
                        PoolError::NoSpace { name: info.name.clone(), directory: directory.to_owned(), needed, free }
                    }
                    _ => PoolError::Io { what, path, source },
                }
            }
            other => other,
        }
    }

    /// Gives a region another size. New bytes read as zero; bytes beyond a smaller size are lost.
    ///
    /// # Errors
    /// [`PoolError::Lease`] if it is in use; [`PoolError::Frozen`] if it is stamped clean; [`PoolError::Bound`] if it is to shrink and a log
    /// may hold changes of it; those of [`Pool::allocate`].
    pub fn resize(&self, name: &RegionName, size: u64) -> Result<RegionInfo, PoolError> {
        check_size(name, size)?;
        self.change(|catalog, edit| {
            let missing = || PoolError::NoSuchRegion { name: name.clone() };
            let old = catalog.find(name).cloned().ok_or_else(missing)?;
            let lease = Lease::lock(&*self.vfs, catalog.pool, &old, catalog.path(&self.dir, &old))?;
            let region = Region::open(lease)?;
            if let Some(context) = region.is_clean().or(region.doubtful_stamp()) {
                let name = name.clone();
                return Err(PoolError::Frozen { name, context });
            }
            if let (true, Ok(Some(_)) | Err(Some(_))) = (size < old.size, region.bound_to()) {
                return Err(PoolError::Bound { name: name.clone() });
            }
            let new = RegionInfo { size, ..old.clone() };
            if size > old.size {
                self.grow(catalog, edit, &region, &new)?;
            } else if size < old.size {
                set(catalog, &new);
                edit.commit(catalog)?;
                // Best effort: the next change cuts what is too long.
                drop(region.lease().file.set_len(new.file_length()));
            }
            Ok(new)
        })
    }

    fn grow(
        &self,
        catalog: &mut Catalog,
        edit: &mut Edit<'_>,
        region: &Region,
        new: &RegionInfo,
    ) -> Result<(), PoolError> {
        let (from, to) = (region.info().file_length(), new.file_length());
        self.check_room(catalog, new, to - from)?;
        let (file, path) = (&region.lease().file, region.path());
        let grown = (|| {
            // Whatever lies beyond is not the region's, and its new bytes must be zero.
            file.set_len(from)?;
            file.allocate(from, to - from)?;
            file.sync_all()
        })();
        set(catalog, new);
        let committed = match grown {
            Ok(()) => edit.commit(catalog).map_err(PoolError::from),
            Err(source) => Err(PoolError::io("reserve more space for", path)(source)),
        };
        if let Err(error) = committed {
            if !matches!(error, PoolError::Catalog(CatalogError::Uncertain { .. })) {
                drop(file.set_len(from));
            }
            let directory = path.parent().unwrap_or(&self.dir);
            return Err(self.explain_full(error, new, to - from, directory));
        }
        Ok(())
    }

    /// Renames one region. Its bytes, id and place in the order stay.
    ///
    /// # Errors
    /// [`PoolError::NoSuchRegion`]; [`PoolError::NameTaken`]; [`PoolError::Lease`] if it is in use; [`PoolError::Catalog`].
    pub fn rename(&self, from: &RegionName, to: &RegionName) -> Result<(), PoolError> {
        self.rename_those(from, to, |name| name == from)
    }

    /// Renames `from` and all regions below it, all or none: with `web` to `app`, `web/ram` becomes `app/ram`.
    ///
    /// # Errors
    /// As [`Pool::rename`]; [`PoolError::Name`] if a name would become too long.
    pub fn rename_tree(&self, from: &RegionName, to: &RegionName) -> Result<(), PoolError> {
        self.rename_those(from, to, |name| name.is_within(from))
    }

    fn rename_those(
        &self,
        from: &RegionName,
        to: &RegionName,
        which: impl Fn(&RegionName) -> bool,
    ) -> Result<(), PoolError> {
        self.change(|catalog, edit| {
            let _leases = self.lock_those(catalog, from, &which)?;
            let stay: Vec<RegionName> = catalog.regions.iter().map(|r| r.name.clone()).filter(|n| !which(n)).collect();
            for region in catalog.regions.iter_mut().filter(|region| which(&region.name)) {
                let Some(new) = region.name.moved(from, to) else {
                    continue;
                };
                let new = new?;
                if stay.contains(&new) {
                    return Err(PoolError::NameTaken { from: region.name.clone(), to: new });
                }
                region.name = new;
            }
            Ok(edit.commit(catalog)?)
        })
    }

    /// Frees one region: its bytes are lost.
    ///
    /// # Errors
    /// [`PoolError::NoSuchRegion`]; [`PoolError::Lease`] if it is in use; [`PoolError::Catalog`].
    pub fn free(&self, name: &RegionName) -> Result<(), PoolError> {
        self.free_those(name, |found| found == name)
    }

    /// Frees `root` and all regions below it, all or none.
    ///
    /// # Errors
    /// As [`Pool::free`].
    pub fn free_tree(&self, root: &RegionName) -> Result<(), PoolError> {
        self.free_those(root, |found| found.is_within(root))
    }

    fn free_those(&self, named: &RegionName, which: impl Fn(&RegionName) -> bool) -> Result<(), PoolError> {
        self.change(|catalog, edit| {
            let _leases = self.lock_those(catalog, named, &which)?;
            let gone: Vec<RegionInfo> = catalog.regions.extract_if(.., |region| which(&region.name)).collect();
            edit.commit(catalog)?;
            for region in &gone {
                // Best effort: the next change sweeps what is left.
                drop(self.vfs.remove_file(&catalog.path(&self.dir, region)));
            }
            Ok(())
        })
    }

    /// Leases all of `which`; one whose file is missing has nobody using it.
    fn lock_those(
        &self,
        catalog: &Catalog,
        named: &RegionName,
        which: impl Fn(&RegionName) -> bool,
    ) -> Result<Vec<Lease>, PoolError> {
        let (mut leases, mut found) = (Vec::new(), false);
        for region in catalog.regions.iter().filter(|region| which(&region.name)) {
            found = true;
            match Lease::lock(&*self.vfs, catalog.pool, region, catalog.path(&self.dir, region)) {
                Ok(lease) => leases.push(lease),
                Err(LeaseError::MissingFile { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !found {
            let name = named.clone();
            return Err(PoolError::NoSuchRegion { name });
        }
        Ok(leases)
    }

    /// Changes the settings. A limit below what is allocated is taken: nothing more is allocated then.
    ///
    /// # Errors
    /// [`PoolError::DirectoryInUse`]; [`PoolError::Catalog`].
    pub fn configure(&self, settings: Settings) -> Result<(), PoolError> {
        self.change(|catalog, edit| {
            let was = catalog.clone();
            catalog.settings = settings;
            for medium in MediumKind::ALL {
                let (from, to) = (was.directory(&self.dir, medium), catalog.directory(&self.dir, medium));
                let regions = catalog.regions.iter().filter(|region| region.medium == medium).count();
                if from != to && regions > 0 {
                    return Err(PoolError::DirectoryInUse { medium, from, to, regions });
                }
            }
            Ok(edit.commit(catalog)?)
        })
    }

    /// Sets what VMs may have in memory together; see [`crate::budget::Budget::set_limit`], which asks whether that can be.
    pub(crate) fn set_ram_limit(&self, limit: Option<u64>) -> Result<(), PoolError> {
        self.change(|catalog, edit| {
            catalog.settings.ram_limit = limit;
            Ok(edit.commit(catalog)?)
        })
    }

    /// Removes what crashed operations left behind. Every change does that first; this does nothing else.
    ///
    /// # Errors
    /// [`PoolError::Catalog`].
    pub fn sweep(&self) -> Result<(), PoolError> {
        self.change(|_, _| Ok(()))
    }

    /// Runs a change under the lock, on the catalog as it is on the disk.
    fn change<T>(
        &self,
        make: impl FnOnce(&mut Catalog, &mut Edit<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        let _lock = CatalogLock::take(&*self.vfs, &self.dir)?;
        let (mut edit, mut catalog) = Edit::open(&*self.vfs, &self.dir)?;
        // What the catalog does not need goes now that the catalog is durable, and no cut brings back one that needs it.
        self.sweep_strays(&catalog);
        let made = make(&mut catalog, &mut edit);
        match &made {
            Ok(_) => self.replace(catalog),
            // What is true then is what the disk says.
            Err(_) => drop(self.refresh()),
        }
        made
    }

    /// Best effort: what cannot be swept now is found again.
    fn sweep_strays(&self, catalog: &Catalog) {
        let orphans: Vec<PathBuf> = self.orphans(catalog);
        for path in orphans {
            drop(self.vfs.remove_file(&path));
        }
        for (file, length) in self.too_long(catalog) {
            drop(file.set_len(length));
        }
    }

    fn orphans(&self, catalog: &Catalog) -> Vec<PathBuf> {
        let temporary = [TEMPORARY, PROBE].map(|name| self.dir.join(name)).into_iter();
        let is_there = |path: &PathBuf| matches!(self.vfs.entry_kind(path), Ok(Some(EntryKind::File)));
        let strays = self.strays(catalog).into_iter();
        let orphans = strays.filter(|(_, stray)| *stray == Stray::Orphan).map(|(path, _)| path);
        temporary.filter(is_there).chain(orphans).collect()
    }

    /// Files of this pool in the media's directories that no region has.
    pub(super) fn strays(&self, catalog: &Catalog) -> Vec<(PathBuf, Stray)> {
        let mut strays = Vec::new();
        let prefix = catalog.file_prefix();
        for medium in MediumKind::ALL {
            let directory = catalog.directory(&self.dir, medium);
            // A medium that was never used, or is not mounted.
            let entries = self.vfs.read_dir(&directory).unwrap_or_default();
            for entry in entries {
                let id = entry.name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".region"));
                let Some(id) = id.and_then(|id| u64::from_str_radix(id, 16).ok()) else {
                    continue;
                };
                let has = |region: &RegionInfo| region.id == id && region.medium == medium;
                if entry.kind == EntryKind::File && !catalog.regions.iter().any(has) {
                    let path = directory.join(&entry.name);
                    let stray = self.judge(catalog, id, &path);
                    strays.push((path, stray));
                }
            }
        }
        strays
    }

    /// An id below the next was freed. The next one itself is that of an allocation that crashed, unless it was ever used:
    /// then this catalog is older than the file, perhaps restored from a copy.
    fn judge(&self, catalog: &Catalog, id: u64, path: &Path) -> Stray {
        let never_used = || {
            let file = self.vfs.open(path, OpenMode::Read).ok()?;
            let copies = Copies::read(&*file).ok();
            Some(copies.is_none_or(|copies| copies.newest().is_none_or(|(_, header)| header.sequence <= 1)))
        };
        if id < catalog.next_id || (id == catalog.next_id && never_used() == Some(true)) {
            Stray::Orphan
        } else {
            Stray::Unknown
        }
    }

    /// Files of regions that are longer than the catalog says, and the length they should have.
    fn too_long(&self, catalog: &Catalog) -> Vec<(Box<dyn VfsFile>, u64)> {
        let find = |region: &RegionInfo| {
            let file = self.vfs.open(&catalog.path(&self.dir, region), OpenMode::ReadWrite).ok()?;
            let length = region.file_length();
            (file.len().ok()? > length).then_some((file, length))
        };
        catalog.regions.iter().filter_map(find).collect()
    }
}

const CREATE: &str = "make the region file";

/// A file is where a new region's is to be, and it was not swept.
fn is_stray(error: &PoolError) -> bool {
    matches!(error, PoolError::Io { what, source, .. }
        if *what == CREATE && source.kind() == io::ErrorKind::AlreadyExists)
}

fn check_dax(file: &dyn VfsFile, path: &Path, info: &RegionInfo) -> Result<(), PoolError> {
    let backing = Backing { file, path, offset: info.data_offset, size: info.size };
    dax::check(&backing).map_err(|source| PoolError::Medium { name: info.name.clone(), medium: info.medium, source })
}

/// Replaces a region's entry.
fn set(catalog: &mut Catalog, new: &RegionInfo) {
    for region in catalog.regions.iter_mut().filter(|region| region.id == new.id) {
        region.clone_from(new);
    }
}

/// `found` if it is what `spec` asks for.
fn same(found: RegionInfo, spec: RegionSpec) -> Result<RegionInfo, PoolError> {
    let medium = spec.medium.unwrap_or(found.medium);
    if (found.kind, found.size, found.medium) == (spec.kind, spec.size, medium) {
        return Ok(found);
    }
    let say = |kind, size, medium| format!("kind {kind}, {} ({size} bytes), medium {medium}", Size(size));
    Err(PoolError::Mismatch {
        found: say(found.kind, found.size, found.medium),
        asked: say(spec.kind, spec.size, medium),
        name: found.name,
    })
}
