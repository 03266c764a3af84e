//! Which region of a generation a page of the machine's memory belongs to: RAM, or a piece of persistent memory behind it.

use std::ops::Range;

use snapshot::{RegionKey, RegionSpec, StoreError, Writer};

use crate::machine::memory::{GuestRam, PAGE_SIZE};
use crate::persistence::generations::{KIND_PMEM, REGION_RAM};

/// The regions that a machine's pages go to, in the order of the pages.
#[derive(Debug)]
pub(super) struct Parts(Vec<(RegionKey, Range<u64>)>);

impl Parts {
    /// Names them to a generation that begins.
    pub(super) fn begin(writer: &mut Writer, ram: &GuestRam) -> Result<Self, StoreError> {
        let size = ram.ram_pages() * PAGE_SIZE;
        let ram_spec = RegionSpec { name: REGION_RAM.to_owned(), kind: "ram".to_owned(), size };
        let pmem = ram.pmem_ranges().map(|(name, range)| RegionSpec {
            name: name.to_owned(),
            kind: KIND_PMEM.to_owned(),
            size: range.length,
        });
        let (mut parts, mut next) = (Vec::new(), 0);
        for spec in std::iter::once(ram_spec).chain(pmem) {
            let pages = next..next + spec.size / PAGE_SIZE;
            next = pages.end;
            parts.push((writer.region(&spec)?, pages));
        }
        Ok(Self(parts))
    }

    /// Puts neighbouring pages, `first` and those behind it.
    pub(super) fn put_run(&self, writer: &mut Writer, first: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let run = first..first + bytes.len() as u64 / PAGE_SIZE;
        self.each(&run, |key, at, pages| {
            let byte = |page: u64| usize::try_from((page - first) * PAGE_SIZE).unwrap_or(usize::MAX);
            let part = bytes.get(byte(pages.start)..byte(pages.end)).unwrap_or_default();
            writer.put_run(key, at, part)
        })
    }

    /// Says that neighbouring pages are zeros.
    pub(super) fn zero_run(&self, writer: &mut Writer, run: &Range<u64>) -> Result<(), StoreError> {
        self.each(run, |key, at, pages| writer.zero_run(key, at, pages.end - pages.start))
    }

    /// Calls `put` for each region that `run` has pages of: its key, the first of its pages, and their numbers in the machine.
    fn each(
        &self,
        run: &Range<u64>,
        mut put: impl FnMut(RegionKey, u64, Range<u64>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for (key, part) in &self.0 {
            let pages = run.start.max(part.start)..run.end.min(part.end);
            if pages.start < pages.end {
                put(*key, pages.start - part.start, pages)?;
            }
        }
        Ok(())
    }
}
