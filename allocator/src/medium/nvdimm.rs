//! A simulated NVDIMM-N: DRAM that is saved to an image within the hold-up.
//!
//! The working copy is a `MAP_PRIVATE` mapping of the image: it is there at once, nothing is read or copied at a resume. A write makes
//! a page anonymous (copy-on-write), so it is volatile until saved, and the anonymous pages are exactly the dirty ones. A persist writes
//! them to the image in ascending order, runs in one system call each, then flushes the image.
//!
//! Which pages: those that the caller names ([`Dirty::Bitmap`]), else the kernel is asked, by `PAGEMAP_SCAN` (Linux 6.7) or
//! `/proc/self/pagemap`. Asking walks the page tables, so it costs 0.3 ms for a GiB that is resident (`pagemap`: some 10 ms).
//! Every page that was private at the last persist is found again until [`Mapping::forget_private`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::mm::{Advice, MapFlags};

use super::{Backing, Dirty, Mapping, MediumError, MediumKind, PAGE_SIZE, runs};

/// Pages whose entries are read from `pagemap` at a time: half a MiB of entries.
const PAGEMAP_CHUNK: u64 = 64 << 10;
/// Runs that are fetched from `PAGEMAP_SCAN` at a time.
const SCAN_CHUNK: usize = 1024;
/// Below what Linux writes in one call (`MAX_RW_COUNT`, 2 GiB less a page).
const MAX_WRITE: u64 = 1 << 30;

pub(super) fn map(backing: &Backing<'_>) -> Result<Mapping, MediumError> {
    // NORESERVE: the kernel would else set aside as much commit charge as there is RAM in the guest.
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    Mapping::new(backing, MediumKind::Nvdimm, flags).map_err(backing.io("map"))
}

/// Returns how many pages were saved.
pub(super) fn persist(mapping: &Mapping, backing: &Backing<'_>, dirty: Dirty<'_>) -> Result<u64, MediumError> {
    let pages = mapping.len() as u64 / PAGE_SIZE;
    let saved = match dirty {
        Dirty::Bitmap(bitmap) => save(mapping, backing, runs(bitmap, pages)),
        Dirty::Unknown => private_pages(mapping)
            .map_err(backing.io("find the dirty pages of"))
            .and_then(|found| save(mapping, backing, found.into_iter())),
    }?;
    backing.file.sync_data().map_err(backing.io("flush"))?;
    Ok(saved)
}

pub(super) fn save(
    mapping: &Mapping,
    backing: &Backing<'_>,
    found: impl Iterator<Item = Range<u64>>,
) -> Result<u64, MediumError> {
    let Some(image) = backing.file.descriptor() else {
        let path = backing.path.to_owned();
        return Err(MediumError::NotMappable { path });
    };
    let mut saved = 0;
    for run in found {
        saved += run.end - run.start;
        let bytes = run.start * PAGE_SIZE..run.end * PAGE_SIZE;
        write_run(mapping, image, backing.offset, bytes).map_err(backing.io("save dirty pages to"))?;
    }
    Ok(saved)
}

/// Writes the bytes `range` of the mapping to the same place of the image, whose data begins at `data`.
fn write_run(mapping: &Mapping, image: BorrowedFd<'_>, data: u64, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let length = (range.end - at).min(MAX_WRITE) as usize;
        let place = i64::try_from(data + at).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `range` lies in the mapping (runs stop at its last page), so the kernel reads mapped memory. A raw pointer and no
        // slice is handed over, since the memory is a guest's.
        let written =
            unsafe { libc::pwrite(image.as_raw_fd(), mapping.as_ptr().add(at as usize).cast(), length, place) };
        match written {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n if n > 0 => at += n.cast_unsigned() as u64,
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Runs of pages that copy-on-write made private, swapped-out ones included.
fn private_pages(mapping: &Mapping) -> io::Result<Vec<Range<u64>>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    match by_scan(&pagemap, mapping) {
        // ENOTTY: a kernel before 6.7.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => by_pagemap(&pagemap, mapping),
        other => other,
    }
}

/// `struct pm_scan_arg` of `<linux/fs.h>`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct PmScanArg {
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) walk_end: u64,
    pub(super) vec: u64,
    pub(super) vec_len: u64,
    pub(super) max_pages: u64,
    pub(super) category_inverted: u64,
    pub(super) category_mask: u64,
    pub(super) category_anyof_mask: u64,
    pub(super) return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
pub(super) const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610u32 as libc::Ioctl;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

pub(super) fn by_scan(pagemap: &File, mapping: &Mapping) -> io::Result<Vec<Range<u64>>> {
    let base = mapping.as_ptr() as u64;
    let end = base + mapping.len() as u64;
    let mut buffer = vec![PageRegion::default(); SCAN_CHUNK];
    let mut found = Vec::new();
    let mut start = base;
    while start < end {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end,
            vec: buffer.as_mut_ptr() as u64,
            vec_len: buffer.len() as u64,
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_FILE,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // The same for every page found, so that neighbours come as one run.
            return_mask: PAGE_IS_FILE,
            ..PmScanArg::default()
        };
        // SAFETY: the argument is of the size it states, and `vec` points to `vec_len` writable regions.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        if count < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        let count = count.unsigned_abs() as usize;
        // `walk_end` may fall short of what was returned (seen on 6.18 when an inner batch of 512 regions filled up before the
        // last one): going on from there alone would return the same pages twice.
        let mut reached = argument.walk_end;
        for region in buffer.iter().take(count) {
            push(&mut found, (region.start - base) / PAGE_SIZE..(region.end - base) / PAGE_SIZE);
            reached = reached.max(region.end);
        }
        if reached <= start {
            return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
        }
        start = reached;
    }
    Ok(found)
}

/// An entry of `pagemap` (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
/// A page of a file, or shared anonymous.
const ENTRY_FILE: u64 = 1 << 61;

pub(super) fn by_pagemap(pagemap: &File, mapping: &Mapping) -> io::Result<Vec<Range<u64>>> {
    let first = mapping.as_ptr() as u64 / PAGE_SIZE;
    let pages = mapping.len() as u64 / PAGE_SIZE;
    let mut found = Vec::new();
    let mut bytes = vec![0; (PAGEMAP_CHUNK.min(pages) * 8) as usize];
    let mut page = 0;
    while page < pages {
        let count = PAGEMAP_CHUNK.min(pages - page);
        let chunk = &mut bytes[..(count * 8) as usize];
        pagemap.read_exact_at(chunk, (first + page) * 8)?;
        for (index, entry) in chunk.as_chunks::<8>().0.iter().enumerate() {
            let entry = u64::from_ne_bytes(*entry);
            if entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE == 0 {
                let at = page + index as u64;
                push(&mut found, at..at + 1);
            }
        }
        page += count;
    }
    Ok(found)
}

/// Appends a run, or makes the last one longer.
fn push(found: &mut Vec<Range<u64>>, run: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => found.push(run),
    }
}

pub(super) fn forget(mapping: &Mapping, range: Range<usize>) -> io::Result<()> {
    let length = range.len();
    if range.end > mapping.len() || !range.start.is_multiple_of(PAGE_SIZE as usize) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the range lies in the mapping; its private pages go, and it stays mapped and readable. That nobody relies on those
    // pages' content is what `forget_private` and `give_up` ask of their callers.
    let forgotten =
        unsafe { rustix::mm::madvise(mapping.as_ptr().add(range.start).cast(), length, Advice::LinuxDontNeed) };
    Ok(forgotten?)
}
