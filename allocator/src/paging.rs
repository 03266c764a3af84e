//! A guest with more memory than there is RAM for it: the rest is in a swap region.
//!
//! ```text
//!               guest memory, in clusters of 64 KiB or more
//!   ┌──────────┬──────────┬──────────┬──────────┬──────────┐
//!   │  mapped  │  zero    │ standby  │ swapped  │  mapped  │
//!   └────┬─────┴──────────┴────┬─────┴────┬─────┴────┬─────┘
//!        ▼  frame              ▼ frame    ▼ slot     ▼ frame (and slot: unchanged since it came)
//!   RAM region  ◄── "faults": read a slot, place the frame, wake ──  swap region
//!               ◄── "ahead":  the same for what follows a sequence ──
//!               ── "evict":   withdraw, then write what changed ───►
//! ```
//!
//! **A fault** is heard by the thread `faults`. If the cluster is in a frame (*standby*) it is placed and the guest goes on: a *soft* fault.
//! If not, a free frame is taken and filled from the slot, or with zeros: a *hard* fault. It never waits for a write, since `evict` keeps
//! frames free ahead of demand; only when the swap region is slower than the guest for long is there nothing free (a *stall*).
//!
//! **Recency** cannot be read from page tables here: memory that KVM maps has no accessed bits in them. So clusters are withdrawn from
//! the guest before their time and stay in their frames for a while; one that is asked for meanwhile was in use
//! ([`crate::replacement`]). Nothing of this happens while frames are plentiful.
//!
//! **What did not change** since it came from its slot is dropped without a write. That is decided by 128 bits of BLAKE3 over the cluster, not
//! by write protection: hashing costs the evicting thread some 15 µs a cluster, a protection fault the guest 2 µs a page and more.
//!
//! **A freeze** writes down which cluster is in which frame and slot (tables in the swap region, 8 bytes a cluster; their digest is in the
//! context). After a resume the same clusters are in the same frames, so the guest has the very residence that it had.
//!
//! A cluster that cannot be read back, or whose CRC does not hold, is [`PagingEvent::Lost`], named, and never zeros.

mod beside;
mod evict;
mod faults;
mod frames;
mod read_ahead;
mod slots;
mod store;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::medium::PAGE_SIZE;
use crate::medium::paged::PagedMemory;
use crate::name::RegionName;
use crate::region::{Region, RegionError};
use crate::replacement::Replacement;
use frames::Frames;
use read_ahead::Streams;
use slots::{Layout, SlotTable, SwapFile};
use store::FrameStore;

/// The least that a fault brings: 16 pages cost little more than one.
const CLUSTER_MIN: u64 = 64 << 10;
/// Most frames: each may be a VMA of its own beside a placeholder, and `vm.max_map_count` is 65530.
const FRAMES_MAX: u64 = 1 << 14;
/// Most clusters: the tables that a freeze writes are 8 bytes for each.
const CLUSTERS_MAX: u64 = 1 << 17;
/// Fewest frames: the threads need some at once, beside those of the pages that one instruction touches.
const FRAMES_MIN: u64 = 32;
/// Frames that are only taken while a VM's vCPUs are being stopped: see [`Pager::hurry`].
const SPARE: u32 = 8;

/// How a guest's memory is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    memory: u64,
    cluster: u64,
    frames: u32,
}

impl Geometry {
    /// Of `memory` bytes that the guest sees and `ram` bytes of RAM. `None` if RAM is too little for it, or has no whole pages.
    #[must_use]
    pub fn new(memory: u64, ram: u64) -> Option<Self> {
        let least = ram.div_ceil(FRAMES_MAX).max(memory.div_ceil(CLUSTERS_MAX)).max(CLUSTER_MIN);
        let cluster = least.checked_next_power_of_two()?;
        let frames = u32::try_from(ram / cluster).ok().filter(|frames| u64::from(*frames) >= FRAMES_MIN)?;
        let whole = memory.is_multiple_of(PAGE_SIZE) && memory > 0;
        whole.then_some(Self { memory, cluster, frames })
    }

    /// The least RAM that a guest with so much memory can have, in bytes.
    #[must_use]
    pub fn least_ram(memory: u64) -> u64 {
        memory.div_ceil(CLUSTERS_MAX).max(CLUSTER_MIN).next_power_of_two().saturating_mul(FRAMES_MIN)
    }

    /// Bytes that the guest sees.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Frames of RAM.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Clusters of memory.
    #[must_use]
    pub fn clusters(&self) -> u32 {
        u32::try_from(self.memory.div_ceil(self.cluster)).unwrap_or(u32::MAX)
    }

    fn slots(&self, swap: u64) -> u32 {
        u32::try_from(swap.div_ceil(self.cluster)).unwrap_or(u32::MAX).min(self.clusters())
    }

    /// Bytes of a swap region that holds `swap` bytes of memory, and its tables.
    #[must_use]
    pub fn swap_region(&self, swap: u64) -> u64 {
        Layout::new(*self, self.slots(swap)).size()
    }

    /// The guest addresses, as they lie in its memory, of a cluster.
    fn bytes_of(&self, cluster: u32) -> std::ops::Range<u64> {
        let start = u64::from(cluster) * self.cluster;
        start..(start + self.cluster).min(self.memory)
    }
}

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
}

/// Is told what a pager tells.
pub type PagingEvents = Arc<dyn Fn(PagingEvent) + Send + Sync>;

/// Where memory is, and what it took so far. All counts are of clusters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
    /// Slots in use, by clusters in frames too.
    pub slots_used: u64,
    /// Slots that there are.
    pub slots: u64,
    /// Faults that brought a cluster from its slot.
    pub hard_faults: u64,
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
    /// Temporality's memory residence ratio: in memory / (in memory + in swap) × 100. 100 for a guest that has touched nothing.
    #[must_use]
    pub fn residence(&self) -> f64 {
        let all = self.resident + self.swapped;
        if all == 0 { 100.0 } else { self.resident as f64 * 100.0 / all as f64 }
    }
}

/// The guest sees it in its frame.
const MAPPED: u8 = 1;
/// A thread is at it, and nobody else may be.
const BUSY: u8 = 2;
/// Somebody waits for it who was not served.
const AWAITED: u8 = 4;
/// It cannot be had.
const LOST: u8 = 8;
/// Its digest is that of its slot.
const KNOWN: u8 = 16;
/// The RAM region has what its frame holds, or will after a flush; only on a medium whose working memory is apart.
const SAVED: u8 = 32;
/// Its frame's bytes are in the RAM region and not yet in working memory.
const IN_IMAGE: u8 = 64;

type Digest = [u8; 16];

#[derive(Debug)]
struct State {
    flags: Vec<u8>,
    frames: Frames,
    slots: SlotTable,
    policy: Replacement,
    digests: Vec<Digest>,
    streams: Streams,
    /// Clusters that somebody waits for, and that `faults` is to look at again.
    backlog: VecDeque<u32>,
    /// Runs of clusters that `ahead` is to bring: the first one, and how many.
    ahead: VecDeque<(u32, u32)>,
    /// Resident clusters to be placed without being asked for, the last one first.
    to_place: Vec<u32>,
    /// Clusters that are being worked at.
    busy: u32,
    /// `ahead` and `evict` rest.
    held: bool,
    ended: bool,
    /// The thread `faults` ends, too: last, since who withdraws waits for it.
    deaf: bool,
    /// What was told, and does not hold any more when it changes.
    full: bool,
    unwritable: bool,
    status: PagingStatus,
    /// Where the search for a slot that can be spared stood.
    reclaim_at: u32,
}

impl State {
    fn has(&self, cluster: u32, flag: u8) -> bool {
        self.flags.get(cluster as usize).is_some_and(|flags| flags & flag != 0)
    }

    fn set(&mut self, cluster: u32, flag: u8) {
        if let Some(flags) = self.flags.get_mut(cluster as usize) {
            *flags |= flag;
        }
    }

    fn clear(&mut self, cluster: u32, flag: u8) {
        if let Some(flags) = self.flags.get_mut(cluster as usize) {
            *flags &= !flag;
        }
    }

    fn begin_work(&mut self, cluster: u32) {
        self.set(cluster, BUSY);
        self.busy += 1;
    }

    /// The work at a cluster is done; who came meanwhile is looked at again. Whether somebody did.
    fn end_work(&mut self, cluster: u32) -> bool {
        self.clear(cluster, BUSY);
        self.busy = self.busy.saturating_sub(1);
        let awaited = self.has(cluster, AWAITED);
        if awaited {
            self.clear(cluster, AWAITED);
            self.backlog.push_back(cluster);
        }
        awaited
    }
}

/// A guest's memory, paged.
pub struct Pager {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    geometry: Geometry,
    memory: PagedMemory,
    store: FrameStore,
    swap: SwapFile,
    events: PagingEvents,
    state: Mutex<State>,
    /// A cluster's work is done, or it is mapped.
    changed: Condvar,
    /// `evict` may have something to do.
    pressure: Condvar,
    /// `ahead` has something to do.
    wish: Condvar,
    bell: OwnedFd,
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager").field("geometry", &self.shared.geometry).field("status", &self.status()).finish()
    }
}

/// What a pager begins with.
pub struct Plan {
    /// Its shape.
    pub geometry: Geometry,
    /// Where frames lie.
    pub ram: Arc<Region>,
    /// Where slots lie.
    pub swap: Arc<Region>,
    /// Bytes of memory that the swap region is to hold, as given to [`Geometry::swap_region`].
    pub swap_bytes: u64,
    /// The digest of the tables of the last freeze; `None`: all of the memory is zeros.
    pub tables: Option<u32>,
    /// Who is told.
    pub events: PagingEvents,
}

impl Pager {
    /// Begins to page, held: nothing that a context may still be about is touched before [`Pager::go_on`], or before somebody accesses the
    /// memory.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn start(plan: Plan) -> Result<Self, PagingError> {
        let Plan { geometry, ram, swap, swap_bytes, tables, events } = plan;
        let swap = SwapFile::open(swap, geometry, geometry.slots(swap_bytes))?;
        let store = FrameStore::new(ram, geometry)?;
        let state = match tables {
            None => State::fresh(geometry, geometry.slots(swap_bytes)),
            Some(digest) => State::restored(geometry, &swap, digest, store.is_apart())?,
        };
        let system = |doing| move |source: std::io::Error| PagingError::System { doing, source };
        let memory = PagedMemory::reserve(geometry.memory, geometry.cluster);
        let memory = memory.map_err(system("page guest memory (userfaultfd)"))?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from);
        let bell = bell.map_err(system("make an event descriptor"))?;
        let state = Mutex::new(state);
        let (changed, pressure, wish) = (Condvar::new(), Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { geometry, memory, store, swap, events, state, changed, pressure, wish, bell });
        let mut pager = Self { shared, threads: Vec::new() };
        pager.spawn("faults", Shared::serve_faults)?;
        pager.spawn("evict", Shared::keep_frames_free)?;
        pager.spawn("ahead", Shared::bring_ahead)?;
        Ok(pager)
    }

    fn spawn(&mut self, name: &str, body: fn(&Shared)) -> Result<(), PagingError> {
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || body(&shared));
        let failed = |source| PagingError::System { doing: "start a thread that pages memory", source };
        self.threads.push(spawned.map_err(failed)?);
        Ok(())
    }

    /// The first byte of the guest's memory. Who accesses what is not there waits.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.shared.memory.as_ptr()
    }

    /// Bytes of the guest's memory, rounded up to whole pages.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a guest's memory is never empty")]
    pub fn len(&self) -> usize {
        self.shared.memory.len()
    }

    /// How it fares.
    #[must_use]
    pub fn status(&self) -> PagingStatus {
        self.shared.state().status()
    }

    /// Its shape.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    /// Waits until `length` bytes at `offset` are there; they may go again.
    ///
    /// # Errors
    /// [`PagingError::Lost`]: then they must not be accessed.
    pub fn bring_in(&self, offset: u64, length: u64) -> Result<(), PagingError> {
        self.shared.clusters_of(offset, length)?.try_for_each(|cluster| self.shared.ask_for(cluster))
    }

    /// Copies memory out of wherever it is, and leaves it there. What the guest writes meanwhile may be in the copy or not.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PagingError> {
        self.shared.read(offset, into)
    }

    /// Copies bytes into memory, while no guest runs in it.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PagingError> {
        self.shared.write(offset, bytes)
    }

    /// The guest needs these bytes no more: whole clusters of them are zeros from now on, and are in no frame and no slot.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), PagingError> {
        self.shared.discard(offset, length)
    }

    /// So many bytes of RAM may be used from now on, as whole frames: at least the least, at most what the region has.
    pub fn set_ram(&self, bytes: u64) {
        let mut state = self.shared.state();
        let frames = u32::try_from((bytes / self.shared.geometry.cluster).max(FRAMES_MIN)).unwrap_or(u32::MAX);
        state.frames.set_limit(frames);
        let limit = state.frames.limit();
        state.policy.set_frames(limit);
        drop(state);
        self.shared.pressure.notify_all();
        // Who was not served for want of a frame may be now.
        self.shared.ring();
    }

    /// While `hurry` holds, whoever waits for memory is served from frames that are spared for this: a vCPU cannot be stopped in the middle
    /// of an instruction that waits for memory, and when RAM and swap are full nothing else would end its wait.
    pub fn hurry(&self, hurry: bool) {
        self.shared.state().frames.use_spare(hurry);
        self.shared.ring();
    }

    /// Brings what is under way to its end, and nothing is begun before [`Pager::go_on`] but what somebody waits for. For a freeze, whose
    /// vCPUs stand still by then.
    pub fn hold(&self) {
        let mut state = self.shared.state();
        state.held = true;
        while state.busy > 0 && !state.ended {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// See [`Pager::hold`].
    pub fn go_on(&self) {
        self.shared.state().held = false;
        self.shared.pressure.notify_all();
        self.shared.wish.notify_all();
    }

    /// Makes all memory durable where it is, and the tables that say where. Returns the digest of these, for the context, and how many
    /// bytes of RAM that were, where that can be told. The pager must be held, and nobody may write to the memory.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn persist(&self) -> Result<(u32, Option<u64>), PagingError> {
        self.shared.persist()
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        for condition in [&self.shared.changed, &self.shared.pressure, &self.shared.wish] {
            condition.notify_all();
        }
        // The thread `faults` last: it was started first, and others wait for it.
        while let Some(thread) = self.threads.pop() {
            if self.threads.is_empty() {
                self.shared.state().deaf = true;
                self.shared.ring();
            }
            // The last owner may be one of them, through what it tells.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl State {
    fn fresh(geometry: Geometry, slots: u32) -> Self {
        let clusters = geometry.clusters();
        Self::with(
            geometry,
            Frames::new(clusters, geometry.frames, SPARE),
            SlotTable::new(clusters, slots),
            Replacement::new(clusters, geometry.frames),
        )
    }

    fn with(geometry: Geometry, frames: Frames, slots: SlotTable, policy: Replacement) -> Self {
        let clusters = geometry.clusters();
        let status = PagingStatus { clusters: clusters.into(), cluster: geometry.cluster, ..PagingStatus::default() };
        Self {
            flags: vec![0; clusters as usize],
            frames,
            slots,
            policy,
            digests: vec![Digest::default(); clusters as usize],
            streams: Streams::new(geometry.cluster),
            backlog: VecDeque::new(),
            ahead: VecDeque::new(),
            to_place: Vec::new(),
            busy: 0,
            held: true,
            ended: false,
            deaf: false,
            reclaim_at: 0,
            full: false,
            unwritable: false,
            status,
        }
    }

    /// As the tables of a freeze say. `apart`: working memory is not the RAM region itself.
    fn restored(geometry: Geometry, swap: &SwapFile, digest: u32, apart: bool) -> Result<Self, PagingError> {
        let clusters = geometry.clusters();
        let (slots, list) = swap.load(clusters, digest)?;
        let mut frames = Frames::new(clusters, geometry.frames, SPARE);
        for (cluster, frame) in &list {
            if !frames.claim(*cluster, *frame) {
                return Err(
                    swap.refuse("the frame list: it names a cluster or a frame twice, or one that there is not")
                );
            }
        }
        let order = list.iter().map(|(cluster, _)| *cluster);
        let policy = Replacement::restore(clusters, geometry.frames, order.clone());
        let mut state = Self::with(geometry, frames, slots, policy);
        let swapped = |cluster: &u32| state.slots.of(*cluster).is_some() && state.frames.frame_of(*cluster).is_none();
        state.status.swapped = (0..clusters).filter(swapped).count() as u64;
        state.to_place = order.rev().collect();
        if apart {
            list.iter().for_each(|(cluster, _)| state.set(*cluster, SAVED | IN_IMAGE));
        }
        Ok(state)
    }

    fn status(&self) -> PagingStatus {
        PagingStatus {
            resident: self.frames.in_use().into(),
            frames: self.frames.limit().into(),
            slots_used: self.slots.in_use().into(),
            slots: self.slots.count().into(),
            near_misses: self.policy.near_misses(),
            ..self.status
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// `faults` is to look at its backlog.
    fn ring(&self) {
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// The clusters that hold `length` bytes at `offset`.
    fn clusters_of(&self, offset: u64, length: u64) -> Result<std::ops::Range<u32>, PagingError> {
        let end = offset.checked_add(length).filter(|end| *end <= self.memory.len() as u64);
        let end = end.ok_or(PagingError::OutOfBounds(offset.saturating_add(length)))?;
        let index = |at: u64| u32::try_from(at / self.geometry.cluster).unwrap_or(u32::MAX);
        Ok(if length == 0 { 0..0 } else { index(offset)..index(end - 1) + 1 })
    }

    /// Waits until a cluster is mapped.
    fn ask_for(&self, cluster: u32) -> Result<(), PagingError> {
        let mut state = self.state();
        loop {
            if state.has(cluster, LOST) {
                return Err(self.lost(&state, cluster, None));
            }
            if state.has(cluster, MAPPED) || state.ended {
                return Ok(());
            }
            // Each time: it may have come and gone again.
            state.backlog.push_back(cluster);
            self.ring();
            state = self.wait(state);
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PagingError> {
        let size = self.geometry.cluster;
        let (mut at, mut rest) = (offset, bytes);
        self.clusters_of(offset, bytes.len() as u64)?;
        while !rest.is_empty() {
            let here = usize::try_from(size - at % size).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at(here);
            self.ask_for(u32::try_from(at / size).unwrap_or(u32::MAX))?;
            let copied = self.memory.copy_in(at, now);
            copied.map_err(|source| PagingError::System { doing: "write guest memory", source })?;
            (at, rest) = (at + here as u64, later);
        }
        Ok(())
    }

    fn lost(&self, state: &State, cluster: u32, source: Option<PagingError>) -> PagingError {
        let std::ops::Range { start, end } = self.geometry.bytes_of(cluster);
        let slot = state.slots.of(cluster).map_or(0, |slot| slot.number);
        PagingError::Lost { start, end, slot, source: source.map(Box::new) }
    }
}
