//! A file on any file system, mapped shared.
//!
//! What is written lies in the page cache at once, so it survives the VMM. It survives a power cut after a flush: `fdatasync`
//! of the file. That is right for a mapping since the kernel write-protects clean pages of a shared file mapping: a first write faults
//! and marks the page dirty in the page cache, where `fdatasync` finds it. It is chosen over `msync(MS_SYNC)`, which does
//! the very same to the file, but once for every VMA that the mapping was split into (a pager splits it into thousands).
//! And it goes by the dirty tags of the page cache, so its cost is that of the dirty pages and not of RAM.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::mm::MapFlags;

use super::{Backing, Dirty, Mapping, MediumError, MediumKind, PAGE_SIZE, runs};

pub(super) fn map(backing: &Backing<'_>) -> Result<Mapping, MediumError> {
    Mapping::new(backing, MediumKind::File, MapFlags::SHARED).map_err(backing.io("map"))
}

/// Pages that are handed to the device before any is waited for.
const AT_ONCE: usize = 32;

/// Brings pages of the data to the device, which may still have them in its cache: `sync_file_range`. It is asked for each page rather than for the
/// file, so that no more is under way than what is named: a flush of the whole file takes whatever else is dirty with it, and was seen to
/// delay a small write beside it by 30 to 60 ms for 64 scattered pages, this by 2 to 4 (ext4, a virtual disk).
pub(super) fn push(backing: &Backing<'_>, found: &[Range<u64>]) -> Result<(), MediumError> {
    let missing = || MediumError::NotMappable { path: backing.path.to_owned() };
    let file = backing.file.descriptor().ok_or_else(missing)?;
    let ask = |run: &Range<u64>, flags| {
        let range = [backing.offset + run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE];
        let [start, length] = range.map(|value| i64::try_from(value).unwrap_or(i64::MAX));
        // SAFETY: the call has numbers alone, and changes no memory.
        match unsafe { libc::sync_file_range(file.as_raw_fd(), start, length, flags) } {
            0 => Ok(()),
            _ => Err(backing.io("write back pages of")(io::Error::last_os_error())),
        }
    };
    for some in found.chunks(AT_ONCE) {
        some.iter().try_for_each(|run| ask(run, libc::SYNC_FILE_RANGE_WRITE))?;
        let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        some.iter().try_for_each(|run| ask(run, all))?;
    }
    Ok(())
}

pub(super) fn persist(backing: &Backing<'_>, dirty: Dirty<'_>) -> Result<Option<u64>, MediumError> {
    backing.file.sync_data().map_err(backing.io("flush"))?;
    Ok(match dirty {
        Dirty::Unknown => None,
        Dirty::Bitmap(bitmap) => {
            let pages = backing.size / PAGE_SIZE;
            Some(runs(bitmap, pages).map(|run| run.end - run.start).sum())
        }
    })
}
