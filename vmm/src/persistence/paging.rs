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
    Ok(Persisted { bytes, paged: Some(PagedV1 { tables }) })
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

/// How paging fares, for [`crate::supervisor::control::Status`]. Counts are of clusters unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PagedStatus {
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Of the guest's memory.
    pub clusters: u64,
    /// In RAM.
    pub resident: u64,
    /// Frames of RAM that may be used.
    pub frames: u64,
    /// In the swap region alone.
    pub swapped: u64,
    /// Still in the generation that memory is restored from.
    #[serde(default)]
    pub elsewhere: u64,
    /// Slots of the swap region.
    pub slots: u64,
    /// Of these in use, by clusters in RAM too.
    pub slots_used: u64,
    /// The memory residence ratio: resident / (resident + swapped + elsewhere) × 100.
    pub residence: f64,
    /// Faults that waited for the swap region.
    pub hard_faults: u64,
    /// Faults on memory that nothing was in yet.
    pub zero_faults: u64,
    /// Faults that found their cluster in RAM.
    pub soft_faults: u64,
    /// Read ahead of demand.
    pub read_ahead: u64,
    /// Left RAM unchanged.
    pub dropped: u64,
    /// Written to the swap region.
    pub written: u64,
    /// Faults that found no free frame.
    pub stalls: u64,
    /// The swap region is full, and the guest waits.
    pub swap_full: bool,
}

impl PagedStatus {
    /// Of a pager.
    #[must_use]
    pub fn new(status: &PagingStatus, swap_full: bool) -> Self {
        let residence = status.residence();
        let PagingStatus { clusters, cluster, resident, frames, swapped, elsewhere, slots_used, slots, .. } = *status;
        let PagingStatus { hard_faults, zero_faults, soft_faults, read_ahead, dropped, written, stalls, .. } = *status;
        Self {
            cluster,
            clusters,
            resident,
            frames,
            swapped,
            elsewhere,
            slots,
            slots_used,
            residence,
            hard_faults,
            zero_faults,
            soft_faults,
            read_ahead,
            dropped,
            written,
            stalls,
            swap_full,
        }
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
