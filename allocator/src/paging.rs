//! A guest with more memory than there is RAM for it: the rest is in a swap region.
//!
//! ```text
//!               guest memory, in clusters of 4 KiB or more
//!   ┌──────────┬──────────┬──────────┬──────────┬──────────┐
//!   │  mapped  │  zero    │ standby  │ swapped  │  mapped  │
//!   └────┬─────┴──────────┴────┬─────┴────┬─────┴────┬─────┘
//!        ▼  frame              ▼ frame    ▼ slot     ▼ frame (and slot: unchanged since it came)
//!   RAM region  ◄── "faults": read a slot, place the frame, wake ──  swap region
//!               ◄── "ahead":  the same for what follows a sequence ──
//!               ── "evict":   withdraw, then write what changed ───►
//!       ▲                                                              ▲
//!       └────── "fetch": what is still elsewhere, from its source ─────┘
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
//! **Where frames are memory of this process's own** (`nvdimm`), guest memory is one mapping of a memfd and a cluster may be a page
//! ([`crate::medium::paged`]). Elsewhere each cluster is mapped by itself, and is larger, since mappings are few and dear.
//!
//! **Slots** have their clusters' numbers as far as there are such slots, so that what lies side by side in memory does on the disk; and those of a
//! batch that do not are written, or read, at a time.
//!
//! **A freeze** writes down which cluster is in which frame and slot (tables in the swap region, 8 bytes a cluster; their digest is in the
//! context). After a resume the same clusters are in the same frames, so the guest has the very residence that it had.
//!
//! A cluster that cannot be read back, or whose CRC does not hold, is [`PagingEvent::Lost`], named, and never zeros.

mod beside;
mod elsewhere;
mod evict;
mod faults;
mod frames;
mod read_ahead;
mod signal;
mod slots;
mod state;
mod status;
mod store;
#[cfg(test)]
mod tests;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use crate::medium::paged::PagedMemory;
use crate::medium::{MediumKind, PAGE_SIZE};
use crate::region::Region;
use crate::threads;
pub use elsewhere::Elsewhere;
use signal::Signal;
use slots::{Layout, SwapFile};
use state::{AWAITED, BUSY, Digest, ELSEWHERE, IN_IMAGE, KNOWN, LOST, MAPPED, SAVED, State};
pub use status::{PagingError, PagingEvent, PagingEvents, PagingStatus};
use store::{FrameStore, Spot};

/// The least cluster where each is mapped by itself: 4 pages cost little more than one. With 16 (64 KiB) a walk in which hot pages lie scattered
/// (zipf over 4 times its RAM) got on half as fast, and a uniform one two thirds: they bring, and keep, what is not used.
const MAPPED_MIN: u64 = 16 << 10;
/// Most frames there: each may be a VMA of its own beside a placeholder, and `vm.max_map_count` is 65530. So up to 468 MiB of RAM have the least
/// cluster, 1 GiB has 64 KiB.
const MAPPED_MAX: u64 = 30_000;
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

/// Whether guest memory is one mapping, whatever is in frames: see [`crate::medium::paged`].
fn is_one_mapping(medium: Option<MediumKind>) -> bool {
    medium == Some(MediumKind::Nvdimm)
}

fn least_cluster(memory: u64, medium: Option<MediumKind>) -> u64 {
    let least = if is_one_mapping(medium) { PAGE_SIZE } else { MAPPED_MIN };
    memory.div_ceil(CLUSTERS_MAX).max(least)
}

impl Geometry {
    /// Of `memory` bytes that the guest sees and `ram` bytes of RAM on a medium; where that is not told it may be any. `None` if RAM is too little
    /// for it, or has no whole pages.
    #[must_use]
    pub fn new(memory: u64, ram: u64, medium: Option<MediumKind>) -> Option<Self> {
        let mapped = if is_one_mapping(medium) { 0 } else { ram.div_ceil(MAPPED_MAX) };
        let cluster = mapped.max(least_cluster(memory, medium)).checked_next_power_of_two()?;
        let frames = u32::try_from(ram / cluster).ok().filter(|frames| u64::from(*frames) >= FRAMES_MIN)?;
        let whole = memory.is_multiple_of(PAGE_SIZE) && memory > 0;
        whole.then_some(Self { memory, cluster, frames })
    }

    /// The least RAM that a guest with so much memory can have, in bytes.
    #[must_use]
    pub fn least_ram(memory: u64, medium: Option<MediumKind>) -> u64 {
        least_cluster(memory, medium).next_power_of_two().saturating_mul(FRAMES_MIN)
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
    changed: Signal,
    /// `evict` may have something to do.
    pressure: Signal,
    /// `ahead` has something to do.
    wish: Signal,
    bell: OwnedFd,
    elsewhere: Option<Elsewhere>,
    /// `fetch` has something to do.
    fetch: Signal,
    /// Faults that were heard of and are yet to be served.
    waiting: AtomicUsize,
}

/// A part of a cluster, and which of the bytes that somebody asked for it is.
struct Piece {
    cluster: u32,
    within: u64,
    bytes: std::ops::Range<usize>,
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
    /// Memory that is yet to come; `None`: what is in no frame and no slot is zeros.
    pub elsewhere: Option<Elsewhere>,
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
        let Plan { geometry, ram, swap, swap_bytes, tables, elsewhere, events } = plan;
        let swap = SwapFile::open(swap, geometry, geometry.slots(swap_bytes))?;
        let store = FrameStore::new(ram, geometry)?;
        let mut state = match tables {
            None => State::fresh(geometry, geometry.slots(swap_bytes)),
            Some(digest) => State::restored(geometry, &swap, digest, store.is_apart())?,
        };
        if elsewhere.as_ref().is_some_and(|elsewhere| !state.mark_elsewhere(&elsewhere.present)) {
            return Err(swap.refuse("they have memory of which the context says that it is yet to come"));
        }
        let memory = store.reserve(geometry)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell =
            bell.map_err(|errno| PagingError::System { doing: "make an event descriptor", source: errno.into() })?;
        let state = Mutex::new(state);
        let [changed, pressure, wish, fetch] = std::array::from_fn(|_| Signal::default());
        let waiting = AtomicUsize::new(0);
        let shared = Shared {
            geometry,
            memory,
            store,
            swap,
            events,
            state,
            changed,
            pressure,
            wish,
            bell,
            elsewhere,
            fetch,
            waiting,
        };
        let shared = Arc::new(shared);
        let mut pager = Self { shared, threads: Vec::new() };
        pager.spawn("faults", Shared::serve_faults)?;
        pager.spawn("evict", Shared::keep_frames_free)?;
        pager.spawn("ahead", Shared::bring_ahead)?;
        if pager.shared.elsewhere.is_some() {
            pager.spawn("fetch", Shared::fetch)?;
        }
        Ok(pager)
    }

    fn spawn(&mut self, name: &str, body: fn(&Shared)) -> Result<(), PagingError> {
        let shared = Arc::clone(&self.shared);
        let spawned = threads::spawn(name, move || body(&shared));
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
        self.shared.pressure.tell();
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
            state = self.shared.changed.wait(state);
        }
    }

    /// See [`Pager::hold`].
    pub fn go_on(&self) {
        self.shared.state().held = false;
        self.shared.fetch.tell();
        self.shared.pressure.tell();
        self.shared.wish.tell();
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
        for condition in [&self.shared.changed, &self.shared.pressure, &self.shared.wish, &self.shared.fetch] {
            condition.tell();
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

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state)
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

    /// What `length` bytes at `offset` are, cluster by cluster.
    fn pieces(&self, offset: u64, length: usize) -> Result<impl Iterator<Item = Piece> + use<>, PagingError> {
        let (size, end) = (self.geometry.cluster, offset.saturating_add(length as u64));
        Ok(self.clusters_of(offset, length as u64)?.map(move |cluster| {
            let first = u64::from(cluster) * size;
            let (from, to) = (first.max(offset), (first + size).min(end));
            Piece { cluster, within: from - first, bytes: (from - offset) as usize..(to - offset) as usize }
        }))
    }

    /// The work at a cluster is done, whatever it led to; who came meanwhile is looked at again.
    fn end_work(&self, state: &mut State, cluster: u32) {
        if state.end_work(cluster) {
            self.ring();
        }
        self.changed.tell();
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
        for Piece { cluster, bytes: part, .. } in self.pieces(offset, bytes.len())? {
            self.ask_for(cluster)?;
            let copied = self.memory.copy_in(offset + part.start as u64, bytes.get(part).unwrap_or_default());
            copied.map_err(|source| PagingError::System { doing: "write guest memory", source })?;
        }
        Ok(())
    }

    fn lost(&self, state: &State, cluster: u32, source: Option<PagingError>) -> PagingError {
        let std::ops::Range { start, end } = self.geometry.bytes_of(cluster);
        if state.has(cluster, ELSEWHERE) {
            return PagingError::Elsewhere { start, end, source: None };
        }
        let slot = state.slots.of(cluster).map_or(0, |slot| slot.number);
        PagingError::Lost { start, end, slot, source: source.map(Box::new) }
    }
}
