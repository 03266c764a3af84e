//! The disks of one VM: regions of its pool, leased and stamped with it, and files from elsewhere, locked while it runs.
//!
//! A disk goes on by itself: what the guest wrote and did not flush is in the page cache, and its memory has gone on from it. So a freeze
//! makes disks durable, too, and stamps those of the pool with the context that they are of. A VM is resumed in place only with the disks that
//! it was frozen with.
//!
//! Generations hold those of the pool, of the same moment as memory. Those from elsewhere they do not: what brings memory back to a generation
//! would leave it beside a disk from later, which is corruption: see [`check_left_behind`].

mod origin;

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use allocator::{Kind, MediumKind, Pool, Region, RegionName, RegionSpec};
use devices::virtio::block::SECTOR;
use vfs::cut::trace::Trace;

use super::regions::{self, RegionsError};
use crate::machine::config::disks::DiskConfig;
use crate::machine::config::{ByteSize, VmConfig};
use crate::machine::virtio::Attachment;
use crate::machine::virtio::disk::{self, Blocks, Image, Moment};

/// What can go wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be had.
    #[error("cannot {doing} the disk {}", path.display())]
    File {
        /// "open", "lock", …
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else than an image.
    #[error("{} is no disk: give a raw image or a block device", .0.display())]
    NoDisk(PathBuf),
    /// Another VM has it.
    #[error("the disk {} is in use by another process: two that write to it destroy it; stop that one, or give it to both as {},ro", .0.display(), .0.display())]
    InUse(PathBuf),
    /// Its size.
    #[error("the disk {} has {size} bytes, which is not a whole number of sectors of {SECTOR} bytes, or none", path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// What a disk is made from does not fit.
    #[error("{} has {size} bytes, more than the {room} of the disk {disk} that is to be made from it", path.display())]
    TooLarge {
        /// What.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Which disk.
        disk: String,
        /// The disk's size.
        room: ByteSize,
    },
    /// What a disk is made from is not copied.
    #[error("cannot copy {} to the disk {disk}", path.display())]
    Copy {
        /// What.
        path: PathBuf,
        /// Which disk.
        disk: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be joined to the machine.
    #[error("cannot begin the I/O of the disk {name}")]
    Begin {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not durable.
    #[error("cannot make the disk {name} durable")]
    Flush {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Disks that would not go back with memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "generations of VM {vm} hold its memory and its disks in the pool, but not {}: memory from then beside a disk from now is a file \
     system destroyed. `perdure run {vm}` boots it from its disks; --force goes back all the same",
    .disks.join(", ")
)]
pub struct LeftBehind {
    /// Which VM.
    pub vm: String,
    /// As they were given.
    pub disks: Vec<String>,
}

/// Whether bringing VM `vm` back to a generation leaves a disk behind that it may have written since.
///
/// # Errors
/// [`LeftBehind`]: it does.
pub fn check_left_behind(vm: &str, config: &VmConfig) -> Result<(), LeftBehind> {
    let elsewhere = |disk: &&DiskConfig| matches!(disk, DiskConfig::File { read_only: false, .. });
    let disks: Vec<_> = config.disks.iter().filter(elsewhere).map(ToString::to_string).collect();
    if disks.is_empty() { Ok(()) } else { Err(LeftBehind { vm: vm.to_owned(), disks }) }
}

/// The regions that a VM's disks need, beside its others.
pub(super) fn wanted(
    vm: &str,
    config: &VmConfig,
    medium: Option<MediumKind>,
) -> Result<Vec<(RegionName, RegionSpec)>, RegionsError> {
    let region = |disk: &DiskConfig| match disk {
        DiskConfig::Pool { name, size, from: _ } => {
            let spec = RegionSpec { kind: Kind::Disk, size: size.0, medium };
            Some(regions::region_name(vm, name).map(|name| (name, spec)))
        }
        DiskConfig::File { .. } => None,
    };
    config.disks.iter().filter_map(region).collect()
}

/// What new disks begin as, where that is not zeros.
#[derive(Debug)]
pub(super) struct Origins(Vec<origin::Origin>);

impl Origins {
    /// Opens what the disks of `config` are made from, before anything is made.
    pub(super) fn open(config: &VmConfig) -> Result<Self, DiskError> {
        origin::open(config).map(Self)
    }
}

/// The disks of a VM.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// Those of the pool, by the name of the disk.
    leased: Vec<(String, Region)>,
    /// All, in the order of the configuration, once they are in use.
    images: Option<Vec<Arc<Image>>>,
}

impl Disks {
    /// Leases those of the pool.
    pub(super) fn lease(pool: &Pool, vm: &str, config: &VmConfig) -> Result<Self, RegionsError> {
        let mut leased = Vec::new();
        for disk in &config.disks {
            if let DiskConfig::Pool { name, .. } = disk {
                leased.push((name.clone(), regions::lease(pool, vm, &regions::region_name(vm, name)?)?));
            }
        }
        Ok(Self { leased, images: None })
    }

    /// Copies to new ones, durably, what they are made from.
    pub(super) fn fill(&self, origins: &Origins) -> Result<(), RegionsError> {
        for origin in &origins.0 {
            let (file, part) = self.region(&origin.disk)?.share_file()?;
            origin.copy_to(&file, &part)?;
        }
        Ok(())
    }

    fn region(&self, disk: &str) -> Result<&Region, RegionsError> {
        let found = self.leased.iter().find(|(leased, _)| leased == disk);
        found.map(|(_, region)| region).ok_or_else(|| RegionsError::NoDisk(disk.to_owned()))
    }

    /// Opens all, and locks those from elsewhere; nothing if that was done before. Nothing is altered.
    pub(super) fn open(&mut self, config: &VmConfig) -> Result<&[Arc<Image>], RegionsError> {
        if self.images.is_none() {
            // What they would have to flush at a freeze is nothing that a hold-up can bound: scattered blocks, of as much as the page cache takes.
            let through = |image: Image| if config.holdup_us.is_some() { image.written_through() } else { image };
            let open = |disk| self.image(disk).map(through).map(Arc::new);
            let images = config.disks.iter().map(open).collect::<Result<_, _>>()?;
            self.images = Some(images);
        }
        Ok(self.images.as_deref().unwrap_or_default())
    }

    fn image(&self, disk: &DiskConfig) -> Result<Image, RegionsError> {
        let id = disk.id();
        Ok(match disk {
            DiskConfig::Pool { name, .. } => {
                let region = self.region(name)?;
                let (file, part) = region.share_file()?;
                let trace = Trace::of(region.path());
                let image = Image::new(id, file, part, Blocks::Keep);
                image.map(|image| image.watched().traced(trace)).map_err(|source| DiskError::File {
                    doing: "open",
                    path: region.path().to_owned(),
                    source,
                })?
            }
            DiskConfig::File { path, read_only } => external(id, path, *read_only)?,
        })
    }

    /// What a machine of `cpus` CPUs is joined to.
    pub(super) fn attach(&self, cpus: u32) -> Result<Vec<Attachment>, DiskError> {
        let attach = |(number, image): (usize, &Arc<Image>)| {
            disk::attach(number, image, cpus)
                .map_err(|source| DiskError::Begin { name: image.name().to_owned(), source })
        };
        self.images.iter().flatten().enumerate().map(attach).collect()
    }

    /// Those of the pool that are in use, as they are now. Nothing may be under way.
    pub(super) fn moment(&self) -> Vec<Moment> {
        self.images.iter().flatten().filter_map(Moment::begin).collect()
    }

    /// Those of the pool, by their names.
    pub(super) fn leased(&self) -> impl Iterator<Item = (&str, &Region)> {
        self.leased.iter().map(|(name, region)| (name.as_str(), region))
    }

    /// Makes durable what was written.
    pub(super) fn flush(&self) -> Result<(), DiskError> {
        self.images.iter().flatten().try_for_each(|image| {
            image.flush().map_err(|source| DiskError::Flush { name: image.name().to_owned(), source })
        })
    }
}

fn external(id: String, path: &Path, read_only: bool) -> Result<Image, DiskError> {
    let (file, size) = open_raw(path, read_only)?;
    if read_only {
        return Ok(Image::read_only(id, file, size));
    }
    Image::new(id, file, 0..size, Blocks::GiveBack).map_err(|source| DiskError::File {
        doing: "open",
        path: path.to_owned(),
        source,
    })
}

/// A raw image or a block device, locked, and its bytes.
fn open_raw(path: &Path, read_only: bool) -> Result<(File, u64), DiskError> {
    let failed = |doing| move |source| DiskError::File { doing, path: path.to_owned(), source };
    // Not a FIFO, whose other end would be waited for.
    let kind = std::fs::metadata(path).map_err(failed("open"))?.file_type();
    if !(kind.is_file() || kind.is_block_device()) {
        return Err(DiskError::NoDisk(path.to_owned()));
    }
    let mut file = File::options().read(true).write(!read_only).open(path).map_err(failed("open"))?;
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path.to_owned())),
        Err(TryLockError::Error(source)) => return Err(failed("lock")(source)),
    }
    // The length of a block device is where it ends.
    let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(DiskError::Size { path: path.to_owned(), size });
    }
    Ok((file, size))
}
