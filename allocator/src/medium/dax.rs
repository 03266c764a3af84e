//! A file on a DAX file system: loads and stores go to persistent memory itself.
//!
//! `MAP_SYNC` makes the kernel commit a block's place in the file before a page of it becomes writable, so that a store
//! needs no system call to be found again (`mmap(2)`). What is left to do is to get the stores out of the CPU caches. How much, depends:
//!
//! * caches inside the persistence domain (eADR, said by the region's `persistence_domain` in sysfs as `cpu_cache`): a fence;
//! * else the lines of the pages that the caller names are written back by `CLWB` (keeps the line), `CLFLUSHOPT` (evicts) or `CLFLUSH`
//!   (evicts, and orders itself), whichever CPUID offers first, then `SFENCE`: Intel SDM vol. 2, CLWB; vol. 1, 11.4.4;
//! * if the caller names nothing: `fdatasync`. The kernel write-protects clean pages of a DAX mapping too and keeps a dirty tag for
//!   each that was written; it writes back exactly those, by the same instructions. Its cost is that of what was written since
//!   the last one, in pages or 2 MiB huge pages, never of all RAM. A line-by-line flush of the whole region, the only other choice, would be.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _mm_sfence};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::mm::MapFlags;

use super::{Backing, Dirty, Mapping, MediumError, MediumKind, PAGE_SIZE, runs};

/// How the CPU's caches are written back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteBack {
    /// They are inside the persistence domain, or this is not `dax`.
    NotNeeded,
    /// By this instruction, for lines of so many bytes.
    By(Instruction, usize),
}

/// An instruction that writes a cache line back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// Writes back and may keep the line.
    Clwb,
    /// Writes back and evicts; unordered.
    Clflushopt,
    /// Writes back and evicts; ordered, slow.
    Clflush,
}

impl std::fmt::Display for WriteBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotNeeded => "none needed",
            Self::By(Instruction::Clwb, _) => "clwb",
            Self::By(Instruction::Clflushopt, _) => "clflushopt",
            Self::By(Instruction::Clflush, _) => "clflush",
        })
    }
}

/// Picks from CPUID leaves 1 (EBX, EDX) and 7 (EBX). Every x86-64 has CLFLUSH.
fn choose(leaf1_ebx: u32, leaf7_ebx: u32) -> WriteBack {
    let instruction = if leaf7_ebx & (1 << 24) != 0 {
        Instruction::Clwb
    } else if leaf7_ebx & (1 << 23) != 0 {
        Instruction::Clflushopt
    } else {
        Instruction::Clflush
    };
    // CPUID.1:EBX[15:8] counts 8-byte units. 0 would not end; 64 is right for every CPU that forgets to say.
    let line = match (leaf1_ebx >> 8) & 0xff {
        0 => 64,
        units => units as usize * 8,
    };
    WriteBack::By(instruction, line)
}

impl WriteBack {
    /// What this CPU offers best.
    #[must_use]
    pub fn of_this_cpu() -> Self {
        let highest = __cpuid(0).eax;
        let leaf7 = if highest >= 7 { __cpuid_count(7, 0).ebx } else { 0 };
        choose(__cpuid(1).ebx, leaf7)
    }
}

/// Writes back the lines of `range` of the mapping, without the fence that must follow. Nothing where that is not needed.
pub(crate) fn write_back_range(mapping: &Mapping, range: std::ops::Range<usize>) {
    let inside = range.start <= range.end && range.end <= mapping.length;
    if let (true, WriteBack::By(instruction, line)) = (inside, mapping.write_back) {
        // SAFETY: the range lies in the mapping; the instruction was chosen by CPUID.
        unsafe { write_back(mapping.as_ptr().add(range.start), range.len(), instruction, line) };
    }
}

/// Writes back the lines of `length` bytes at `start`, without the fence that must follow.
///
/// # Safety
/// All of it must be mapped, and the CPU must have the instruction.
unsafe fn write_back(start: *const u8, length: usize, by: Instruction, line: usize) {
    let first = start as usize / line * line;
    for address in (first..start as usize + length).step_by(line) {
        // SAFETY: the line holds a byte of the range, so it lies in a mapped page; the instruction changes no memory that
        // a program can see.
        unsafe {
            match by {
                Instruction::Clwb => asm!("clwb [{}]", in(reg) address, options(nostack, preserves_flags)),
                Instruction::Clflushopt => asm!("clflushopt [{}]", in(reg) address, options(nostack, preserves_flags)),
                Instruction::Clflush => asm!("clflush [{}]", in(reg) address, options(nostack, preserves_flags)),
            }
        }
    }
}

/// Orders what was written back before everything that follows (SFENCE).
pub(crate) fn fence() {
    // SAFETY: every x86-64 has SSE.
    unsafe { _mm_sfence() }
}

/// Whether the file system of the device behind `file` has the CPU caches in its persistence domain.
/// Not knowing means no.
fn caches_persist(file: BorrowedFd<'_>) -> bool {
    let Ok(stat) = rustix::fs::fstat(file) else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let Ok(device) = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else {
        return false;
    };
    domain_above(&device).is_some_and(|domain| domain.trim() == "cpu_cache")
}

/// The namespace of a pmem device lies in the directory of its region, and that has the attribute
/// (Documentation/ABI/removed or testing/sysfs-bus-nvdimm, `persistence_domain`).
fn domain_above(device: &Path) -> Option<String> {
    let mut above = device.ancestors().map(|dir| dir.join("persistence_domain"));
    above.find_map(|path| std::fs::read_to_string(path).ok())
}

/// The flags of a mapping whose stores the file system never has to be told of.
pub(super) const SYNC: MapFlags = MapFlags::SHARED_VALIDATE.union(MapFlags::SYNC);

pub(super) fn map(backing: &Backing<'_>) -> Result<Mapping, MediumError> {
    let mut mapping = Mapping::new(backing, MediumKind::Dax, SYNC).map_err(|source| refused(backing, source))?;
    mapping.write_back = write_back_of(backing);
    Ok(mapping)
}

/// What is to be done for stores to the file to persist.
pub(super) fn write_back_of(backing: &Backing<'_>) -> WriteBack {
    match backing.file.descriptor().is_some_and(caches_persist) {
        true => WriteBack::NotNeeded,
        false => WriteBack::of_this_cpu(),
    }
}

fn refused(backing: &Backing<'_>, source: io::Error) -> MediumError {
    // EINVAL: a kernel before 4.15 does not know MAP_SHARED_VALIDATE.
    let no_dax = [Errno::OPNOTSUPP, Errno::INVAL].iter().any(|no| source.raw_os_error() == Some(no.raw_os_error()));
    if no_dax {
        let path = backing.path.to_owned();
        return MediumError::NotDax { path };
    }
    backing.io("map")(source)
}

/// Whether `MAP_SYNC` of this file is taken. It must have at least one page.
pub(crate) fn check(backing: &Backing<'_>) -> Result<(), MediumError> {
    if backing.file.descriptor().is_none() {
        return Ok(());
    }
    let page = Backing { size: PAGE_SIZE, ..*backing };
    map(&page).map(drop)
}

/// For `Dirty::Bitmap`, see the module; O(pages named).
pub(super) fn persist(mapping: &Mapping, backing: &Backing<'_>, dirty: Dirty<'_>) -> Result<Option<u64>, MediumError> {
    let bitmap = match dirty {
        Dirty::Bitmap(bitmap) => bitmap,
        Dirty::Unknown => {
            backing.file.sync_data().map_err(backing.io("flush"))?;
            return Ok(None);
        }
    };
    let mut pages = 0;
    for run in runs(bitmap, mapping.length as u64 / PAGE_SIZE) {
        let count = run.end - run.start;
        pages += count;
        if let WriteBack::By(instruction, line) = mapping.write_back {
            // SAFETY: `runs` stays below the mapping's pages, so both the start and the length lie in it; the
            // instruction was chosen by CPUID.
            unsafe {
                let start = mapping.as_ptr().add((run.start * PAGE_SIZE) as usize);
                write_back(start, (count * PAGE_SIZE) as usize, instruction, line);
            }
        }
    }
    fence();
    Ok(Some(pages))
}

/// The lines of these pages of the mapping, which must lie in it; they are durable when this returns.
pub(super) fn write_back_runs(mapping: &Mapping, found: &[std::ops::Range<u64>]) {
    for run in found {
        let (start, end) = (run.start * PAGE_SIZE, run.end * PAGE_SIZE);
        write_back_range(mapping, start as usize..end as usize);
    }
    fence();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_best_instruction_that_cpuid_offers_is_chosen() {
        let line = 8 << 8;
        assert_eq!(choose(line, 1 << 24 | 1 << 23), WriteBack::By(Instruction::Clwb, 64));
        assert_eq!(choose(line, 1 << 23), WriteBack::By(Instruction::Clflushopt, 64));
        assert_eq!(choose(line, 0), WriteBack::By(Instruction::Clflush, 64));
        assert_eq!(choose(16 << 8, 0), WriteBack::By(Instruction::Clflush, 128));
        assert_eq!(choose(0, 0), WriteBack::By(Instruction::Clflush, 64));
    }

    #[test]
    fn every_instruction_of_this_cpu_runs_and_leaves_the_bytes() {
        let WriteBack::By(best, line) = WriteBack::of_this_cpu() else {
            panic!("a CPU always has one");
        };
        let bytes: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        for by in [Instruction::Clflush, best] {
            // SAFETY: the range is that of a live vector; CLFLUSH is on every x86-64 and `best` was found by CPUID.
            unsafe { write_back(bytes[3..].as_ptr(), 9_000, by, line) };
            fence();
        }
        assert!(bytes.iter().enumerate().all(|(i, &b)| b == i as u8));
    }

    #[test]
    fn the_persistence_domain_is_found_above_the_device() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("region0/namespace0.0/block/pmem0");
        fs::create_dir_all(&device).unwrap();
        assert_eq!(domain_above(&device), None);
        fs::write(dir.path().join("region0/persistence_domain"), "cpu_cache\n").unwrap();
        assert_eq!(domain_above(&device).unwrap().trim(), "cpu_cache");
    }
}
