//! Which pages of a mapping were written, by anyone: the guest, KVM on its behalf, this process.
//!
//! userfaultfd's asynchronous write protection (Linux 6.7, `Documentation/admin-guide/mm/userfaultfd.rst` and `pagemap.rst`): pages are
//! protected, the kernel lifts that by itself at the first write to each, and `PAGEMAP_SCAN` tells which pages are protected no longer and
//! protects them anew, in one call that misses no write between. It takes memory of every kind. What a first write costs depends on the
//! kind: a page of a shared file goes through the file system each time (`page_mkwrite`), a private or anonymous one does not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use super::nvdimm::{PAGEMAP_SCAN, PageRegion, PmScanArg};
use super::on_demand::{IOCTL_REGISTER, UffdioRange, UffdioRegister, control, open_with};
use super::{Mapping, PAGE_SIZE};

const IOCTL_WRITEPROTECT: libc::Ioctl = 0xc018_aa06u32 as libc::Ioctl;
const MODE_WP: u64 = 1 << 1;
const FEATURE_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURES: u64 = FEATURE_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Runs of pages told at a time.
const RUNS: usize = 1024;

#[repr(C)]
#[derive(Default)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// Watches a stretch of this process's memory. Dropping it ends that.
#[derive(Debug)]
pub struct WriteWatch {
    _uffd: File,
    pagemap: File,
    start: u64,
    end: u64,
}

/// Whether this kernel has it, and lets this process use it.
///
/// # Errors
/// As the system says: `InvalidInput` where the kernel lacks it.
pub fn available() -> io::Result<()> {
    open_with(FEATURES).map(drop)
}

impl WriteWatch {
    /// Begins to watch `length` bytes from address `start` on, which must be mapped, page-aligned, and no mapping of [`super::on_demand`].
    ///
    /// # Errors
    /// As the system says.
    pub fn start(start: *const u8, length: usize) -> io::Result<Self> {
        let uffd = open_with(FEATURES)?;
        let (start, length) = (start as u64, length as u64);
        let range = || UffdioRange { start, length };
        let mut register = UffdioRegister { range: range(), mode: MODE_WP, ioctls: 0 };
        control(uffd.as_fd(), IOCTL_REGISTER, &mut register)?;
        let mut protect = UffdioWriteprotect { range: range(), mode: 1 };
        control(uffd.as_fd(), IOCTL_WRITEPROTECT, &mut protect)?;
        Ok(Self { _uffd: uffd, pagemap: File::open("/proc/self/pagemap")?, start, end: start + length })
    }

    /// Begins to watch a mapping.
    ///
    /// # Errors
    /// As the system says.
    pub fn of(mapping: &Mapping) -> io::Result<Self> {
        Self::start(mapping.as_ptr(), mapping.len())
    }

    /// Tells `each` run of pages that were written since they were last told, and watches them anew. Pages are numbered from the start.
    ///
    /// # Errors
    /// As the system says: what was told so far is told no more, what was not will be.
    pub fn collect(&self, each: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        let mut runs = vec![PageRegion::default(); RUNS];
        let mut start = self.start;
        while start < self.end {
            let mut argument = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start,
                end: self.end,
                vec: runs.as_mut_ptr() as u64,
                vec_len: runs.len() as u64,
                category_mask: PAGE_IS_WRITTEN,
                return_mask: PAGE_IS_WRITTEN,
                ..PmScanArg::default()
            };
            // SAFETY: the argument is of the size it states, and `vec` points to `vec_len` writable runs. Protecting pages changes no
            // memory that a program can see.
            let count = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            if count < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            // `walk_end` may fall short of what was told: see `nvdimm`.
            let mut reached = argument.walk_end;
            for run in runs.iter().take(count.unsigned_abs() as usize) {
                each((run.start - self.start) / PAGE_SIZE..(run.end - self.start) / PAGE_SIZE);
                reached = reached.max(run.end);
            }
            if reached <= start {
                return Err(io::Error::other("PAGEMAP_SCAN does not advance"));
            }
            start = reached;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::{Backing, MediumKind, map};
    use std::collections::BTreeSet;
    use vfs::{HostVfs, OpenMode, Vfs};

    #[test]
    fn every_page_that_was_written_is_told_once_on_every_medium() {
        if available().is_err() {
            eprintln!("no WP_ASYNC here: nothing is tested");
            return;
        }
        for medium in [MediumKind::File, MediumKind::Nvdimm] {
            let directory = tempfile::tempdir().unwrap();
            let size = 5000 * PAGE_SIZE;
            let file = HostVfs.open(&directory.path().join("r"), OpenMode::CreateNew).unwrap();
            file.allocate(0, size).unwrap();
            let backing = Backing { file: &*file, path: directory.path(), offset: 0, size };
            let mapping = map(medium, &backing).unwrap();
            let write = |page: u64| {
                // SAFETY: a byte within the mapping, which nobody else accesses.
                unsafe { mapping.as_ptr().add((page * PAGE_SIZE) as usize).write_volatile(1) };
            };
            (0..100).for_each(&write);
            let watch = WriteWatch::of(&mapping).unwrap();
            for round in 0..4_u64 {
                let written: BTreeSet<u64> = (0..2500).map(|at| (at * 2 + round) % 5000).chain([0, 4999]).collect();
                written.iter().copied().for_each(&write);
                let mut told = Vec::new();
                watch.collect(&mut |run| told.extend(run)).unwrap();
                assert_eq!(told, written.into_iter().collect::<Vec<_>>(), "{medium} round {round}");
            }
            watch.collect(&mut |run| panic!("{run:?} was not written again")).unwrap();
        }
    }
}
