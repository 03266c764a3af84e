//! Media: how a region is mapped, and how what was written becomes durable.
//!
//! | medium | mapping | persist |
//! |---|---|---|
//! | [`dax`] | `MAP_SYNC` of a file on a DAX file system | write back CPU caches |
//! | [`mod@file`] | `MAP_SHARED` of any file | flush dirty pages of the page cache |
//! | [`nvdimm`] | `MAP_PRIVATE` of an image: volatile until saved | write the dirty pages to the image, flush |
//!
//! The only unsafe code of this crate is in this module and where [`crate::rvm`] hands out mapped memory.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vfs::VfsFile;

pub mod dax;
pub mod file;
pub mod nvdimm;
pub mod on_demand;
pub mod paged;
#[cfg(test)]
mod tests;
pub mod write_watch;

/// The unit of mapping and of dirty tracking, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// What a huge page covers, in bytes.
pub const HUGE_PAGE: u64 = 2 << 20;

/// What a region lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MediumKind {
    /// A file on a DAX file system: persistent memory itself.
    Dax,
    /// A file on any file system.
    File,
    /// DRAM and an image file: a simulated NVDIMM-N.
    Nvdimm,
}

impl MediumKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Dax, Self::File, Self::Nvdimm];

    /// As written in the catalog.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dax => "dax",
            Self::File => "file",
            Self::Nvdimm => "nvdimm",
        }
    }

    /// As written in a header.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Dax => 1,
            Self::File => 2,
            Self::Nvdimm => 3,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|medium| medium.code() == code)
    }
}

impl fmt::Display for MediumKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is none of `dax`, `file`, `nvdimm`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no medium: use dax, file or nvdimm")]
pub struct UnknownMedium(pub String);

impl std::str::FromStr for MediumKind {
    type Err = UnknownMedium;

    fn from_str(text: &str) -> Result<Self, UnknownMedium> {
        let found = Self::ALL.into_iter().find(|medium| medium.as_str() == text);
        found.ok_or_else(|| UnknownMedium(text.to_owned()))
    }
}

/// Why mapping or persisting failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MediumError {
    /// The file system has no DAX.
    #[error("{} is not on a DAX file system (MAP_SYNC is refused): put the pool's dax directory on one mounted with \
             `-o dax` on persistent memory, or use the medium file", path.display())]
    NotDax {
        /// The file.
        path: PathBuf,
    },
    /// Not a file of this host.
    #[error("{} is not a file of this host and cannot be mapped", path.display())]
    NotMappable {
        /// The file.
        path: PathBuf,
    },
    /// The mapping does not belong to this region.
    #[error("the mapping ({mapping} bytes, {mapped}) is not one of {} ({region} bytes)", path.display())]
    ForeignMapping {
        /// The region's file.
        path: PathBuf,
        /// Bytes that are mapped.
        mapping: u64,
        /// The mapping's medium.
        mapped: MediumKind,
        /// The region's bytes.
        region: u64,
    },
    /// A system call failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What the caller knows of the pages written since the last successful persist, or since mapping.
///
/// Whatever wrote counts: the guest (KVM's dirty log) *and* the VMM (its own bitmap); neither log has the other's. A page
/// named that was not written costs its flush; a page written that is not named **is lost** at a cut.
#[derive(Debug, Clone, Copy)]
pub enum Dirty<'a> {
    /// Nothing. The kernel is asked: see each medium for what that costs.
    Unknown,
    /// Bit `i` of word `w` stands for page `64 * w + i` of the region; words that are missing are clean, bits past
    /// the region's end are ignored. A guest memory of several slots has its logs put one behind the other, as its slots lie in the region.
    Bitmap(&'a [u64]),
}

/// What a persist did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PersistReport {
    /// Bytes that were written back or saved, whole pages; `None` if only the kernel knows ([`Dirty::Unknown`] on `file` and `dax`).
    pub bytes: Option<u64>,
    /// The same in pages of [`PAGE_SIZE`].
    pub pages: Option<u64>,
    /// How long it took, the device's flush included.
    pub duration: Duration,
}

/// The part of a file that holds a region's data.
pub(crate) struct Backing<'a> {
    pub(crate) file: &'a dyn VfsFile,
    pub(crate) path: &'a Path,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

impl Backing<'_> {
    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> MediumError {
        let path = self.path.to_owned();
        move |source| MediumError::Io { what, path: path.clone(), source }
    }
}

/// A region's data in this process's memory. Unmapped when dropped, which takes 0.1 s a GiB that was touched:
/// a process that is about to exit forgets it ([`std::mem::forget`]).
///
/// It holds the region's file open, and with it the lease.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    length: usize,
    pub(crate) medium: MediumKind,
    /// How CPU caches are written back; on `dax` alone.
    write_back: dax::WriteBack,
}

// SAFETY: the mapping is memory of the process, not of a thread; `Mapping` itself never reads or writes it except in
// `persist` by system calls and cache instructions, which are safe from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out a raw pointer alone, and using that is the caller's unsafe block.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first byte, aligned to [`PAGE_SIZE`]. Valid for [`Mapping::len`] bytes, reads and writes, while this lives. The guest may
    /// write at any time: no Rust reference may be made of it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes that are mapped: the region's size.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.length
    }

    /// What it lies on.
    #[must_use]
    pub fn medium(&self) -> MediumKind {
        self.medium
    }

    /// How caches are written back at a persist, for reports: `clwb`, `clflushopt`, `clflush`, or `none needed`.
    #[must_use]
    pub fn write_back(&self) -> dax::WriteBack {
        self.write_back
    }

    /// On `nvdimm`, gives the private pages back after a persist that succeeded, so that the next one does not find and save them again
    /// and the memory is free: the same bytes are then read from the image. Nothing on other media.
    ///
    /// What was written since that persist is lost, so no vCPU may have run, and nothing may write meanwhile.
    ///
    /// # Errors
    /// As `madvise`.
    pub fn forget_private(&self) -> io::Result<()> {
        match self.medium {
            MediumKind::Nvdimm => nvdimm::forget(self, 0..self.length),
            MediumKind::Dax | MediumKind::File => Ok(()),
        }
    }

    /// Nobody needs what lies in `length` bytes from `offset` on, whole pages, and nobody accesses them meanwhile: they are what they were,
    /// or what they were before. On `nvdimm` their memory is free then, and no persist saves them. On other media nothing happens: they
    /// lie on the medium already, and their room there stays reserved.
    ///
    /// # Errors
    /// As `madvise`; or it is no range of whole pages of this.
    pub fn give_up(&self, offset: u64, length: u64) -> io::Result<()> {
        let index = |at: Option<u64>| at.and_then(|at| usize::try_from(at).ok()).ok_or(io::ErrorKind::InvalidInput);
        let range = index(Some(offset))?..index(offset.checked_add(length))?;
        match self.medium {
            MediumKind::Nvdimm => nvdimm::forget(self, range),
            MediumKind::Dax | MediumKind::File => Ok(()),
        }
    }

    /// Addresses for a mapping, without the file: accessible, and nobody's.
    fn reserve(backing: &Backing<'_>, medium: MediumKind) -> io::Result<Self> {
        let length = usize::try_from(backing.size).map_err(|_| io::ErrorKind::Unsupported)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a null hint lets the kernel choose free addresses, so no existing mapping is replaced.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, access, flags) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::Unsupported)?;
        Ok(Self { base, length, medium, write_back: dax::WriteBack::NotNeeded })
    }

    fn new(backing: &Backing<'_>, medium: MediumKind, flags: MapFlags) -> io::Result<Self> {
        let unmappable = || io::Error::from(io::ErrorKind::Unsupported);
        let descriptor = backing.file.descriptor().ok_or_else(unmappable)?;
        let length = usize::try_from(backing.size).map_err(|_| unmappable())?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint lets the kernel choose free addresses, so no existing mapping is replaced.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, access, flags, descriptor, backing.offset) }?;
        let base = NonNull::new(base.cast()).ok_or_else(unmappable)?;
        let write_back = dax::WriteBack::NotNeeded;
        Ok(Self { base, length, medium, write_back })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `length` are those of a mapping made in `new` and owned by this alone; who kept
        // the raw pointer promised (see `as_ptr`) not to use it any more. It cannot fail for such a range.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

pub(crate) fn map(medium: MediumKind, backing: &Backing<'_>) -> Result<Mapping, MediumError> {
    if backing.file.descriptor().is_none() {
        return Err(MediumError::NotMappable { path: backing.path.to_owned() });
    }
    match medium {
        MediumKind::Dax => dax::map(backing),
        MediumKind::File => file::map(backing),
        MediumKind::Nvdimm => nvdimm::map(backing),
    }
}

/// Returns how many pages were written back or saved, if that is known.
pub(crate) fn persist(mapping: &Mapping, backing: &Backing<'_>, dirty: Dirty<'_>) -> Result<Option<u64>, MediumError> {
    if mapping.length as u64 != backing.size {
        return Err(MediumError::ForeignMapping {
            path: backing.path.to_owned(),
            mapping: mapping.length as u64,
            mapped: mapping.medium,
            region: backing.size,
        });
    }
    match mapping.medium {
        MediumKind::Dax => dax::persist(mapping, backing, dirty),
        MediumKind::File => file::persist(backing, dirty),
        MediumKind::Nvdimm => nvdimm::persist(mapping, backing, dirty).map(Some),
    }
}

/// See [`crate::Region::write_behind`]. Few pages at a time: whoever flushes something else meanwhile waits behind them.
pub(crate) fn write_behind(mapping: &Mapping, backing: &Backing<'_>, found: &[Range<u64>]) -> Result<(), MediumError> {
    let pages = mapping.length as u64 / PAGE_SIZE;
    if let Some(beyond) = found.iter().find(|run| run.start > run.end || run.end > pages) {
        let source = io::Error::other(format!("pages {beyond:?} of {pages}"));
        return Err(backing.io("find the pages in")(source));
    }
    match mapping.medium {
        MediumKind::Dax => {
            dax::write_back_runs(mapping, found);
            Ok(())
        }
        MediumKind::File => file::push(backing, found),
        MediumKind::Nvdimm => {
            nvdimm::save(mapping, backing, found.iter().cloned())?;
            file::push(backing, found)
        }
    }
}

/// Runs of set bits as ranges of pages, ascending, none touching the next; below `pages`.
pub(crate) fn runs(bitmap: &[u64], pages: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let bits = (bitmap.len() as u64).saturating_mul(64).min(pages);
    // The first bit from `from` on that is `set`, else `bits`.
    let find = move |from: u64, set: bool| {
        let mut at = from;
        while at < bits {
            let word = bitmap[(at / 64) as usize];
            let word = if set { word } else { !word } >> (at % 64);
            if word != 0 {
                return (at + u64::from(word.trailing_zeros())).min(bits);
            }
            at = (at / 64 + 1) * 64;
        }
        bits
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = find(at, true);
        at = find(start, false);
        (start < bits).then_some(start..at)
    })
}
