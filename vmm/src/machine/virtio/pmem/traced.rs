//! Persistent memory where outages are simulated. Whether a page is on its medium the kernel tells by folios: a byte that was flushed may share one with a byte
//! that was written since, and would count as lost. So before each flush what has changed since the one before is told.

use std::ptr;

use allocator::{Mapping, MediumKind, Region, RegionError};
use vfs::cut::trace::Trace;

/// What is compared at a time.
const PAGE: usize = 4096;

/// What was told of the memory.
#[derive(Debug)]
pub(super) struct Traced {
    trace: Trace,
    /// Where in its file it begins.
    offset: u64,
    /// As it was told.
    known: Vec<u8>,
}

/// Whether memory on this medium has to be told of.
pub(super) fn is_told(medium: MediumKind) -> bool {
    medium != MediumKind::Dax
}

impl Traced {
    /// Of a region of a process that keeps a record, on `file` and `nvdimm`: on `dax` a store counts as durable. On `nvdimm` each flush writes all that is
    /// private to the image anew, past the record: what an earlier one made durable would count as lost with it.
    pub(super) fn begin(region: &Region, mapping: &Mapping) -> Result<Option<Self>, RegionError> {
        if !is_told(mapping.medium()) {
            return Ok(None);
        }
        Trace::of(region.path()).map(|trace| Self::new(trace, region, mapping)).transpose()
    }

    pub(super) fn new(trace: Trace, region: &Region, mapping: &Mapping) -> Result<Self, RegionError> {
        let offset = region.share_file()?.1.start;
        let mut known = vec![0; mapping.len()];
        region.read_at(&mut known, 0)?;
        Ok(Self { trace, offset, known })
    }

    /// Tells what has changed, page by page. What the guest writes meanwhile may or may not be part of it, as it may be of the flush.
    pub(super) fn tell(&mut self, mapping: &Mapping) {
        let mut page = [0_u8; PAGE];
        for (index, known) in self.known.chunks_mut(PAGE).enumerate() {
            let at = index * PAGE;
            // SAFETY: the bytes lie within the mapping, which is as long as `known`; no reference to them is made, since the guest may write to them.
            unsafe { ptr::copy_nonoverlapping(mapping.as_ptr().add(at), page.as_mut_ptr(), known.len()) };
            let Some(now) = page.get(..known.len()).filter(|now| *now != &*known) else { continue };
            known.copy_from_slice(now);
            self.trace.wrote(now, self.offset + at as u64);
        }
    }
}
