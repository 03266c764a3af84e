//! What a pager tells: what goes wrong, what happens, how it fares.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::filler::SourceError;
use crate::name::RegionName;
use crate::region::RegionError;

/// What goes wrong with paging.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagingError {
    /// A swap region that is none.
    #[error("swap region {name} has {size} bytes, and {needed} are needed")]
    TooSmall {
        /// The region.
        name: RegionName,
        /// Its bytes.
        size: u64,
        /// What is needed.
        needed: u64,
    },
    /// The tables.
    #[error("the tables in swap region {name} cannot be used: {what}; resume from a generation")]
    Tables {
        /// The region.
        name: RegionName,
        /// What is wrong with them.
        what: String,
    },
    /// A slot cannot be read or written.
    #[error("could not {doing} slot {slot} of swap region {name}")]
    Slot {
        /// The region.
        name: RegionName,
        /// What was being done.
        doing: &'static str,
        /// The slot, or the first of several.
        slot: u32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A cluster that is not there any more.
    #[error("the bytes {start:#x}..{end:#x} of the guest's memory cannot be had from slot {slot} of the swap region")]
    Lost {
        /// The first.
        start: u64,
        /// Behind the last.
        end: u64,
        /// Where they were.
        slot: u32,
        /// Why; `None`: their checksum does not hold.
        #[source]
        source: Option<Box<PagingError>>,
    },
    /// A cluster that has not come yet, and cannot be had where it is.
    #[error("the bytes {start:#x}..{end:#x} of the guest's memory cannot be had from where they are")]
    Elsewhere {
        /// The first.
        start: u64,
        /// Behind the last.
        end: u64,
        /// Why; `None`: it was told before.
        #[source]
        source: Option<SourceError>,
    },
    /// The memory was asked for at a place where it has none.
    #[error("the guest's memory ends before {0:#x}")]
    OutOfBounds(u64),
    /// A region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The system.
    #[error("cannot {doing}")]
    System {
        /// What.
        doing: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// What a pager tells, from any of its threads.
#[derive(Debug)]
pub enum PagingEvent {
    /// Somebody waits for memory that cannot be had: whoever accesses it from now on is refused.
    Lost(PagingError),
    /// The swap region is full, and so is RAM: who asks for more memory waits. Told once until there is room again.
    SwapFull,
    /// There is room again.
    SwapRoom,
    /// Memory cannot be swapped out: it stays in RAM, and is tried again. Told once until it works.
    Unwritable(PagingError),
    /// A cluster that is elsewhere cannot be had. Nobody has asked for it yet. Told once.
    Missing(PagingError),
    /// Nothing is elsewhere any more. Told once, if something was when this pager began or could have been.
    Complete,
}

/// Is told what a pager tells.
pub type PagingEvents = Arc<dyn Fn(PagingEvent) + Send + Sync>;

/// Where memory is, and what it took so far. All counts are of clusters. One that an older pager did not tell is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PagingStatus {
    /// Of the guest's memory.
    pub clusters: u64,
    /// Bytes of a cluster.
    pub cluster: u64,
    /// In frames.
    pub resident: u64,
    /// Frames that may be used.
    pub frames: u64,
    /// In the swap region alone.
    pub swapped: u64,
    /// In the source alone: see [`super::Elsewhere`].
    pub elsewhere: u64,
    /// Slots in use, by clusters in frames too.
    pub slots_used: u64,
    /// Slots that there are.
    pub slots: u64,
    /// Faults that brought a cluster from its slot.
    pub hard_faults: u64,
    /// Faults that brought a cluster from the source.
    pub source_faults: u64,
    /// Clusters brought from the source before anyone asked.
    pub fetched: u64,
    /// Clusters that could not be brought from the source when nobody had asked for them.
    pub missing: u64,
    /// Faults that found nothing to bring: the first access.
    pub zero_faults: u64,
    /// Hard faults on clusters that left RAM of late: a sixteenth more would have saved them.
    pub near_misses: u64,
    /// Faults on clusters that were in their frames.
    pub soft_faults: u64,
    /// Brought before anyone asked.
    pub read_ahead: u64,
    /// Left their frames without a write.
    pub dropped: u64,
    /// Written to a slot.
    pub written: u64,
    /// Faults that found no free frame.
    pub stalls: u64,
}

impl PagingStatus {
    /// Temporality's memory residence ratio: in memory / (in memory + in swap) × 100. 100 for a guest that has touched nothing. What is
    /// elsewhere counts as in swap.
    #[must_use]
    pub fn residence(&self) -> f64 {
        let all = self.resident + self.swapped + self.elsewhere;
        if all == 0 { 100.0 } else { self.resident as f64 * 100.0 / all as f64 }
    }

    /// Faults that waited for storage: for the swap region, or for the source.
    #[must_use]
    pub fn awaited(&self) -> u64 {
        self.hard_faults.saturating_add(self.source_faults)
    }
}
