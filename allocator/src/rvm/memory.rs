//! The memory that a program uses: parts of mapped regions, and where their bytes lie.
//!
//! The only unsafe code of recoverable memory is here. What it leans on: a mapped region is divided into [`Memory`] parts that never
//! overlap, a part cannot be cloned, and bytes are written through `&mut Memory` alone. So Rust's own borrowing is what serialises
//! transactions.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};

use crate::medium::{Dirty, Mapping, MediumKind, dax};
use crate::name::RegionName;
use crate::region::{Region, RegionError};
use crate::rvm::status::Engine;

/// Where the bytes of a mapped region lie.
///
/// # Safety
/// `base` is valid for `len` bytes, for reads and writes, at a multiple of 64, as long as this lives, and nothing but what goes through this writes
/// there.
pub(crate) unsafe trait Working: Send + Sync + fmt::Debug {
    fn base(&self) -> NonNull<u8>;
    fn len(&self) -> usize;
    /// Begins to write the cache lines of `range` back to persistent memory.
    fn write_back(&self, range: Range<usize>);
    /// What was written back is persistent before anything that is stored from here on.
    fn fence(&self);
    /// Saves what is volatile by design (`nvdimm`) to the region's image.
    fn save(&self, region: &Region) -> Result<(), RegionError>;
}

// SAFETY: a mapping is page-aligned memory of its length until it is dropped; the lease on its region keeps other processes out.
unsafe impl Working for Mapping {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.as_ptr()).unwrap_or(NonNull::dangling())
    }

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn write_back(&self, range: Range<usize>) {
        dax::write_back_range(self, range);
    }

    fn fence(&self) {
        match self.medium() {
            MediumKind::Dax => dax::fence(),
            // Saved by this very process, in the order of the program.
            MediumKind::File | MediumKind::Nvdimm => compiler_fence(Ordering::SeqCst),
        }
    }

    fn save(&self, region: &Region) -> Result<(), RegionError> {
        region.persist(self, Dirty::Unknown).map(drop)
    }
}

/// A copy of a region that cannot be mapped (on a simulated disk), as LRVM itself copied segments.
#[derive(Debug)]
pub(crate) struct Copied {
    lines: NonNull<Line>,
    length: usize,
}

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "used through a pointer")] [u8; 64]);

impl Copied {
    /// Reads all of the region.
    pub(crate) fn of(region: &Region) -> Result<Self, RegionError> {
        let length = region.size() as usize;
        let lines: Box<[Line]> = vec![Line([0; 64]); length.div_ceil(64)].into_boxed_slice();
        let lines = NonNull::from(Box::leak(lines)).cast::<Line>();
        let copy = Self { lines, length };
        // SAFETY: the memory was made for at least `length` bytes, and nobody else knows of it yet.
        let bytes = unsafe { std::slice::from_raw_parts_mut(lines.cast::<u8>().as_ptr(), length) };
        region.read_at(bytes, 0)?;
        Ok(copy)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let lines = std::ptr::slice_from_raw_parts_mut(self.lines.as_ptr(), self.length.div_ceil(64));
        // SAFETY: it is the box that `of` leaked, of that very length, and given back once.
        drop(unsafe { Box::from_raw(lines) });
    }
}

// SAFETY: plain memory of the process, given out as a raw pointer alone.
unsafe impl Send for Copied {}
// SAFETY: as above.
unsafe impl Sync for Copied {}

// SAFETY: the memory is a leaked box of `length` bytes or a few more, at a multiple of 64, until `drop`.
unsafe impl Working for Copied {
    fn base(&self) -> NonNull<u8> {
        self.lines.cast()
    }

    fn len(&self) -> usize {
        self.length
    }

    fn write_back(&self, _range: Range<usize>) {}

    fn fence(&self) {}

    fn save(&self, _region: &Region) -> Result<(), RegionError> {
        Ok(())
    }
}

/// How regions come into memory.
pub(crate) trait Mapper: Send + Sync + fmt::Debug {
    fn map(&self, region: &Region, engine: Engine) -> Result<Box<dyn Working>, RegionError>;
}

/// As the medium has it.
#[derive(Debug)]
pub(crate) struct ByMedium;

impl Mapper for ByMedium {
    fn map(&self, region: &Region, engine: Engine) -> Result<Box<dyn Working>, RegionError> {
        match engine {
            // Changes must not reach the file before the log has them, so the mapping is private.
            Engine::Redo if region.descriptor().is_ok() => Ok(Box::new(region.map_private()?)),
            Engine::Redo => Ok(Box::new(Copied::of(region)?)),
            Engine::Undo => Ok(Box::new(region.map()?)),
        }
    }
}

/// By copying, whatever the medium: a file that is cut short meanwhile is then an error, and no signal.
#[derive(Debug)]
pub(crate) struct ByCopy;

impl Mapper for ByCopy {
    fn map(&self, region: &Region, _engine: Engine) -> Result<Box<dyn Working>, RegionError> {
        Ok(Box::new(Copied::of(region)?))
    }
}

/// A mapped region.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) region: Arc<Region>,
    pub(crate) working: Box<dyn Working>,
    /// Which [`crate::rvm::Rvm`] mapped it.
    pub(crate) owner: u64,
    /// It holds what no transaction committed.
    pub(crate) unrestored: AtomicBool,
}

/// Recoverable memory: a mapped region, or a part of one. It is read as a slice, and written in transactions.
#[derive(Debug)]
pub struct Memory {
    pub(crate) mapped: Arc<Mapped>,
    range: Range<usize>,
    /// A transaction has it; stays so if that one is forgotten.
    enrolled: bool,
}

impl Memory {
    /// All of `mapped`. There must be no other part of it.
    pub(crate) fn whole(mapped: Arc<Mapped>) -> Self {
        let range = 0..mapped.working.len();
        Self { mapped, range, enrolled: false }
    }

    /// The region that it is of.
    #[must_use]
    pub fn region(&self) -> &RegionName {
        self.mapped.region.name()
    }

    /// Where in the region it begins, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.range.start
    }

    /// Divides it in two at byte `at` (or its end, if that comes first), so that two threads can each have transactions on one.
    #[must_use]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let middle = self.range.start + at.min(self.range.len());
        let second = Self { mapped: Arc::clone(&self.mapped), range: middle..self.range.end, enrolled: self.enrolled };
        let first = Self { mapped: Arc::clone(&self.mapped), range: self.range.start..middle, enrolled: self.enrolled };
        (first, second)
    }

    /// Gives it to a transaction. `false` if one that was forgotten has it.
    pub(crate) fn enroll(&mut self) -> bool {
        let free = !self.enrolled && !self.mapped.unrestored.load(Ordering::Acquire);
        self.enrolled |= free;
        free
    }

    /// The transaction is over; `restored` unless it left what nobody committed.
    pub(crate) fn release(&mut self, restored: bool) {
        self.enrolled = !restored;
    }

    /// The bytes at `range` of this part; none if it is not in it.
    pub(crate) fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        if range.start > range.end || range.end > self.range.len() {
            return &mut [];
        }
        let start = self.range.start + range.start;
        // SAFETY: the part lies in the mapping and `range` in the part; no other part has these bytes, and this one is borrowed
        // mutably for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.mapped.working.base().as_ptr().add(start), range.len()) }
    }

    /// Begins to write the lines at `range` of this part back.
    pub(crate) fn write_back(&self, range: &Range<usize>) {
        let start = self.range.start + range.start;
        self.mapped.working.write_back(start..start + range.len());
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the part lies in the mapping; its bytes change through `&mut self` alone, and the borrow of `self` excludes that.
        unsafe {
            std::slice::from_raw_parts(self.mapped.working.base().as_ptr().add(self.range.start), self.range.len())
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.enrolled {
            self.mapped.unrestored.store(true, Ordering::Release);
        }
    }
}

/// Bytes of a log in memory that one thread alone uses.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    working: &'a dyn Working,
    range: Range<usize>,
}

impl<'a> Slot<'a> {
    /// # Safety
    /// Nobody else may use bytes `range` of `working` while this lives.
    pub(crate) unsafe fn new(working: &'a dyn Working, range: Range<usize>) -> Self {
        let end = range.end.min(working.len());
        Self { working, range: range.start.min(end)..end }
    }

    fn pointer(&self, at: usize, length: usize) -> Option<*mut u8> {
        let inside = at.checked_add(length).is_some_and(|end| end <= self.range.len());
        // SAFETY: `range` lies in the mapping (see `new`), and what was asked for in `range`.
        inside.then(|| unsafe { self.working.base().as_ptr().add(self.range.start + at) })
    }

    /// The bytes at `at`; `None` past the end.
    pub(crate) fn bytes(&self, at: usize, length: usize) -> Option<&[u8]> {
        // SAFETY: the pointer is valid for `length` bytes, and who has this slot is its only user.
        self.pointer(at, length).map(|from| unsafe { std::slice::from_raw_parts(from, length) })
    }

    /// Writes at `at`; `false` past the end, and nothing is written.
    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) -> bool {
        let Some(to) = self.pointer(at, bytes.len()) else { return false };
        // SAFETY: the pointer is valid for so many bytes, which are this slot's alone, so `bytes` are elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }

    /// Stores a word, in one piece. `at` must be a multiple of 8.
    pub(crate) fn store(&mut self, at: usize, word: u64) {
        if let Some(to) = self.pointer(at, 8).filter(|to| to.addr().is_multiple_of(8)) {
            // SAFETY: valid for 8 bytes, aligned, and this slot's alone; an aligned store of 8 bytes persists whole or not at all.
            unsafe { to.cast::<u64>().write_volatile(word.to_le()) };
        }
    }

    /// Begins to write the lines of `length` bytes at `at` back.
    pub(crate) fn write_back(&self, at: usize, length: usize) {
        let start = self.range.start + at;
        self.working.write_back(start..start + length);
    }

    pub(crate) fn fence(&self) {
        self.working.fence();
    }

    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }
}
