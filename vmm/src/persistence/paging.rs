//! The memory of a VM that has more of it than RAM: see [`allocator::paging`].
//!
//! ```text
//!   boot      all of it is zeros, whatever the regions hold
//!   freeze    the pager is held, all is made durable, and the context gets the digest of the tables that say what is where
//!   resume    the tables are read; the same memory is in the same frames
//!   restore   the generation's pages are written through the pager: what does not fit in RAM is in the swap region at its end;
//!             or, lazily, they are elsewhere at first: see [`super::restoring`]
//! ```
//!
//! A generation holds the guest's memory as the guest sees it, in one piece: it can be restored to another amount of RAM.

use std::error::Error;
use std::sync::Arc;

use allocator::journal::JournalV1;
use allocator::paging::{Elsewhere, Pager, PagingError, PagingEvents, PagingStatus, Plan};
use allocator::{Region, RegionError};
use serde::{Deserialize, Serialize};

use crate::machine::config::VmConfig;
use crate::machine::memory::HostMemory;

/// What a context says of memory that is paged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PagedV1 {
    /// The digest of the tables in the swap region.
    pub tables: u32,
}

/// What was made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Persisted {
    /// Bytes of RAM that were not durable before, where that can be told.
    pub bytes: Option<u64>,
    /// For the context.
    pub paged: Option<PagedV1>,
    /// For the context: where they are, if not where they belong.
    pub journal: Option<JournalV1>,
}

/// Begins to page, held; `None` if the VM's memory is all RAM. `elsewhere`: what is still in a generation.
pub(super) fn start(
    config: &VmConfig,
    ram: &Arc<Region>,
    swap: Option<&Arc<Region>>,
    paged: Option<PagedV1>,
    elsewhere: Option<Elsewhere>,
    events: &PagingEvents,
) -> Result<Option<Arc<Pager>>, PagingError> {
    let (Some(geometry), Some(swap)) = (config.geometry(), swap) else { return Ok(None) };
    let plan = Plan {
        geometry,
        ram: Arc::clone(ram),
        swap: Arc::clone(swap),
        swap_bytes: config.swap_bytes(),
        tables: paged.map(|paged| paged.tables),
        elsewhere,
        events: Arc::clone(events),
    };
    Ok(Some(Arc::new(Pager::start(plan)?)))
}

/// Makes all of a held pager's memory durable.
pub(super) fn persist(pager: &Pager) -> Result<Persisted, PagingError> {
    let (tables, bytes) = pager.persist()?;
    Ok(Persisted { bytes, paged: Some(PagedV1 { tables }), journal: None })
}

/// Memory that comes and goes.
#[derive(Debug)]
pub(super) struct PagedMemory(pub(super) Arc<Pager>);

// SAFETY: the pager keeps its addresses, readable and writable, for as long as it lives, and hands out no references. What is not there
// makes who accesses it wait; what cannot be had at all is told by `bring_in`.
unsafe impl HostMemory for PagedMemory {
    fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn is_fixed(&self) -> bool {
        false
    }

    fn bring_in(&self, offset: u64, length: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.bring_in(offset, length)?)
    }

    /// It is never all there; who writes to it waits for each part in turn.
    fn bring_all_in(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    fn hurry(&self, hurry: bool) {
        self.0.hurry(hurry);
    }

    /// Whole clusters of it: they are in no frame and no slot then.
    fn give_up(&self, offset: u64, length: u64) {
        if let Err(error) = self.0.discard(offset, length) {
            tracing::debug!("{length} bytes of paged memory at {offset:#x} are not given back: {error}");
        }
    }

    fn copy_out(&self, offset: u64, into: &mut [u8]) -> Result<bool, Box<dyn Error + Send + Sync>> {
        self.0.read(offset, into)?;
        Ok(true)
    }
}

/// How paging fares, for [`crate::supervisor::control::Status`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PagedStatus {
    /// Where memory is, and what it took so far.
    #[serde(flatten)]
    pub counts: PagingStatus,
    /// The memory residence ratio, in per cent: [`PagingStatus::residence`].
    pub residence: f64,
    /// The swap region is full, and the guest waits.
    pub swap_full: bool,
}

impl PagedStatus {
    /// Of a pager.
    #[must_use]
    pub fn new(counts: PagingStatus, swap_full: bool) -> Self {
        Self { counts, residence: counts.residence(), swap_full }
    }
}

/// Reads from and writes to a VM's memory while nobody runs it.
#[derive(Debug)]
pub(super) enum Memory {
    /// All in the RAM region.
    Ram(Arc<Region>),
    /// Paged.
    Paged(Arc<Pager>),
}

impl Memory {
    pub(super) fn of(pager: Option<Arc<Pager>>, ram: &Arc<Region>) -> Self {
        pager.map_or_else(|| Self::Ram(Arc::clone(ram)), Self::Paged)
    }

    pub(super) fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), MemoryIoError> {
        match self {
            Self::Ram(ram) => Ok(ram.read_at(bytes, offset)?),
            Self::Paged(pager) => Ok(pager.read(offset, bytes)?),
        }
    }

    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), MemoryIoError> {
        match self {
            Self::Ram(ram) => Ok(ram.write_at(bytes, offset)?),
            Self::Paged(pager) => Ok(pager.write(offset, bytes)?),
        }
    }

    /// Makes all of it durable where it is.
    pub(super) fn persist(&self) -> Result<Option<PagedV1>, MemoryIoError> {
        match self {
            Self::Ram(ram) => ram.sync().map(|()| None).map_err(MemoryIoError::from),
            Self::Paged(pager) => {
                pager.hold();
                Ok(persist(pager)?.paged)
            }
        }
    }
}

/// Why memory cannot be read or written while nobody runs the VM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryIoError {
    /// The RAM region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The pager.
    #[error(transparent)]
    Paging(#[from] PagingError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_read_one_flat_object() {
        let counts = PagingStatus { clusters: 8, resident: 3, swapped: 1, elsewhere: 2, ..PagingStatus::default() };
        let status = PagedStatus::new(counts, true);
        let json = serde_json::to_value(status).unwrap();
        for (name, value) in [("clusters", 8.0), ("resident", 3.0), ("swapped", 1.0), ("residence", 50.0)] {
            assert_eq!(json[name].as_f64(), Some(value), "{name}: {json}");
        }
        assert_eq!(serde_json::from_value::<PagedStatus>(json.clone()).unwrap(), status);

        let mut older = json;
        older.as_object_mut().unwrap().remove("elsewhere");
        let counts = PagingStatus { elsewhere: 0, ..counts };
        assert_eq!(serde_json::from_value::<PagedStatus>(older).unwrap(), PagedStatus { counts, ..status });
    }
}
