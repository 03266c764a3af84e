//! A file on any file system, mapped shared.
//!
//! What is written lies in the page cache at once, so it survives the VMM. It survives a power cut after a flush: `fdatasync`
//! of the file. That is right for a mapping since the kernel write-protects clean pages of a shared file mapping: a first write faults
//! and marks the page dirty in the page cache, where `fdatasync` finds it. It is chosen over `msync(MS_SYNC)`, which does
//! the very same to the file, but once for every VMA that the mapping was split into (a pager splits it into thousands).
//! And it goes by the dirty tags of the page cache, so its cost is that of the dirty pages and not of RAM.

use rustix::mm::MapFlags;

use super::{Backing, Dirty, Mapping, MediumError, MediumKind, runs};

pub(super) fn map(backing: &Backing<'_>) -> Result<Mapping, MediumError> {
    Mapping::new(backing, MediumKind::File, MapFlags::SHARED).map_err(backing.io("map"))
}

pub(super) fn persist(backing: &Backing<'_>, dirty: Dirty<'_>) -> Result<Option<u64>, MediumError> {
    backing.file.sync_data().map_err(backing.io("flush"))?;
    Ok(match dirty {
        Dirty::Unknown => None,
        Dirty::Bitmap(bitmap) => {
            let pages = backing.size / super::PAGE_SIZE;
            Some(runs(bitmap, pages).map(|run| run.end - run.start).sum())
        }
    })
}
