//! Fills a region while it is in use: a cluster comes when it is asked for, the others meanwhile.
//!
//! ```text
//!   guest, VMM ──(page fault)──► thread "faults" ─┐              ┌─► read from the source, verified
//!                                                 ├─► fill once ─┼─► write to the region's file
//!   bring_in() ───────────────────────────────────┤              └─► it is present: place it, wake who waits
//!   thread "prefetch" (order given, then all) ────┘
//! ```
//!
//! A cluster is *absent*, being *filled* by one thread, or *present*; from then on it is the guest's and is never written by the filler
//! again. The threads reach the region through its file alone: if they touched the mapping, they would wait for themselves.
//!
//! What a region holds under an absent cluster does not matter, but for one thing: a cluster of zeros is not written. So the region
//! must be zero where clusters are absent, or be left so by an earlier filler.

use std::error::Error;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use thiserror::Error;

use crate::medium::on_demand::OnDemand;
use crate::medium::{Mapping, PAGE_SIZE};
use crate::region::{Region, RegionError};
use crate::threads;

/// Most clusters of a region: each may be a VMA of its own beside an absent one, and `vm.max_map_count` is 65530.
const CLUSTERS_MAX: u64 = 1 << 15;
/// The least that a fault brings: 16 pages cost little more than one.
const CLUSTER_MIN: u64 = 64 << 10;
/// Bytes filled and not flushed at most (a cluster or two more): what a freeze finds to flush on top of what the guest wrote.
const UNFLUSHED_MAX: u64 = 16 << 20;
/// How long the prefetcher lets faults have the disk before it looks again.
const YIELD: Duration = Duration::from_micros(500);
/// Its nice value: the guest's vCPUs go first.
const NICE: i32 = 10;

/// Bytes of a cluster in a region of `size` bytes: a power of two, from 64 KiB.
#[must_use]
pub fn cluster_size(size: u64) -> u64 {
    size.div_ceil(CLUSTERS_MAX).max(1).next_power_of_two().max(CLUSTER_MIN)
}

/// Whether a region of `size` bytes can be filled in clusters of `cluster` bytes.
#[must_use]
pub fn is_cluster_size(cluster: u64, size: u64) -> bool {
    cluster.is_power_of_two() && cluster >= PAGE_SIZE && size.div_ceil(cluster) <= CLUSTERS_MAX
}

/// Why a source cannot give bytes; its text names the page.
pub type SourceError = Box<dyn Error + Send + Sync>;

/// Where a region's bytes come from.
pub trait ClusterSource: Send + Sync + fmt::Debug {
    /// Fills `bytes` with what belongs at `offset` of the region, verified. `false` if that is all zeros.
    ///
    /// # Errors
    /// [`SourceError`]; `bytes` are not used then.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<bool, SourceError>;
}

/// Why a cluster is not there. It stays absent, and is tried again when it is asked for again.
#[derive(Debug, Error)]
pub enum FillerError {
    /// The source.
    #[error("the bytes {offset:#x}..{end:#x} of region {name} cannot be had")]
    Source {
        /// The region.
        name: String,
        /// The cluster's first byte.
        offset: u64,
        /// Its end.
        end: u64,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The region.
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
pub enum FillerEvent {
    /// Somebody waits for memory that cannot be had: whoever accesses it from now on is refused.
    Lost(FillerError),
    /// The prefetcher met a cluster that cannot be had. Nobody has asked for it yet. Told once.
    Missing(FillerError),
    /// All is there, and flushed.
    Complete,
}

/// Is told what a pager tells.
pub type FillerEvents = Arc<dyn Fn(FillerEvent) + Send + Sync>;

/// How far a region is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillerStatus {
    /// Clusters in all.
    pub clusters: u64,
    /// Those that are there.
    pub present: u64,
    /// Those that somebody had to wait for.
    pub faults: u64,
    /// Those that the prefetcher could not have.
    pub missing: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    Absent,
    Filling,
    Present,
}

#[derive(Debug)]
struct State {
    clusters: Vec<Cluster>,
    status: FillerStatus,
    /// Those that somebody waited for, in that order.
    trace: Vec<u32>,
}

struct Shared {
    region: Arc<Region>,
    memory: OnDemand,
    cluster: u64,
    source: Box<dyn ClusterSource>,
    events: FillerEvents,
    state: Mutex<State>,
    changed: Condvar,
    /// Faults being served.
    waiting: AtomicUsize,
    /// The prefetcher rests.
    held: AtomicBool,
    ended: AtomicBool,
    /// Bytes filled since the last flush.
    unflushed: AtomicU64,
}

/// What a pager begins with.
pub struct Plan {
    /// Bytes of a cluster: see [`cluster_size`].
    pub cluster: u64,
    /// Which clusters are there already, the first one first; what is not mentioned is not.
    pub present: Vec<bool>,
    /// Where the others come from.
    pub source: Box<dyn ClusterSource>,
    /// The clusters that the prefetcher fetches first; `None`: it fetches none at all.
    pub prefetch: Option<Vec<u32>>,
    /// Who is told.
    pub events: FillerEvents,
}

/// A region that is being filled. Dropping it ends the threads; an access to an absent cluster would wait for ever then.
pub struct Filler {
    shared: Arc<Shared>,
    bell: Arc<std::os::fd::OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Filler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filler").field("region", self.shared.region.name()).field("status", &self.status()).finish()
    }
}

impl Filler {
    /// Maps `region` and begins to fill it.
    ///
    /// # Errors
    /// [`FillerError::Region`], [`FillerError::System`].
    pub fn start(region: Arc<Region>, plan: Plan) -> Result<Self, FillerError> {
        let Plan { cluster, present, source, prefetch, events } = plan;
        let count = usize::try_from(region.size().div_ceil(cluster)).unwrap_or(usize::MAX);
        let clusters: Vec<Cluster> = (0..count)
            .map(|index| if present.get(index) == Some(&true) { Cluster::Present } else { Cluster::Absent })
            .collect();
        let here = clusters.iter().filter(|cluster| **cluster == Cluster::Present).count();
        let status = FillerStatus { clusters: count as u64, present: here as u64, ..FillerStatus::default() };
        let memory = region.map_on_demand(cluster, present)?;
        let system = |doing| move |source: rustix::io::Errno| FillerError::System { doing, source: source.into() };
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            region,
            memory,
            cluster,
            source,
            events,
            state: Mutex::new(State { clusters, status, trace: Vec::new() }),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            held: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            unflushed: AtomicU64::new(0),
        });
        let bell = Arc::new(bell.map_err(system("make an event descriptor"))?);
        let mut pager = Self { shared, bell, threads: Vec::new() };
        let (shared, bell) = (Arc::clone(&pager.shared), Arc::clone(&pager.bell));
        pager.spawn("faults", move || shared.serve_faults(&bell))?;
        if let Some(order) = prefetch {
            let shared = Arc::clone(&pager.shared);
            pager.spawn("prefetch", move || shared.prefetch(&order))?;
        }
        Ok(pager)
    }

    fn spawn(&mut self, name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<(), FillerError> {
        let spawned = threads::spawn(name, body);
        let failed = |source| FillerError::System { doing: "start a thread that fills memory", source };
        self.threads.push(spawned.map_err(failed)?);
        Ok(())
    }

    /// The region's memory. Absent parts of it make who accesses them wait; this process had better [`Filler::bring_in`] first.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.shared.memory.mapping()
    }

    /// Waits until `length` bytes at `offset` are there.
    ///
    /// # Errors
    /// [`FillerError`]: then they must not be accessed.
    pub fn bring_in(&self, offset: u64, length: u64) -> Result<(), FillerError> {
        if length == 0 || self.is_complete() {
            return Ok(());
        }
        let last = offset.saturating_add(length - 1) / self.shared.cluster;
        let mut buffer = Vec::new();
        (offset / self.shared.cluster..=last).try_for_each(|cluster| self.shared.fill(cluster, &mut buffer, false))
    }

    /// Whether all is there.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let status = self.status();
        status.present == status.clusters
    }

    /// How far it is.
    #[must_use]
    pub fn status(&self) -> FillerStatus {
        self.shared.state().status
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        self.shared.cluster
    }

    /// Which clusters are there: their bytes are in the region's file, though perhaps not flushed.
    #[must_use]
    pub fn present(&self) -> Vec<bool> {
        self.shared.state().clusters.iter().map(|cluster| *cluster == Cluster::Present).collect()
    }

    /// The clusters that somebody had to wait for, in that order.
    #[must_use]
    pub fn trace(&self) -> Vec<u32> {
        self.shared.state().trace.clone()
    }

    /// The prefetcher rests, or goes on. Faults are served in any case.
    pub fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::SeqCst);
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
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

    fn serve_faults(&self, bell: &impl AsFd) {
        let mut buffer = Vec::new();
        while !self.ended.load(Ordering::SeqCst) {
            let events = self.memory.descriptor();
            let mut fds = [
                PollFd::from_borrowed_fd(events, PollFlags::IN),
                PollFd::from_borrowed_fd(bell.as_fd(), PollFlags::IN),
            ];
            // Whatever it returns, what there is to read is read.
            let _ = poll(&mut fds, None);
            let awaited = match self.memory.awaited() {
                Ok(awaited) => awaited,
                Err(source) => {
                    let doing = "hear of page faults";
                    (self.events)(FillerEvent::Lost(FillerError::System { doing, source }));
                    return;
                }
            };
            self.waiting.fetch_add(awaited.len(), Ordering::SeqCst);
            for cluster in awaited {
                self.serve_fault(cluster, &mut buffer);
                self.waiting.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn serve_fault(&self, cluster: u64, buffer: &mut Vec<u8>) {
        if let Err(error) = self.fill(cluster, buffer, true) {
            // First told, then refused: what a vCPU says of the refusal is to come second.
            (self.events)(FillerEvent::Lost(error));
            let _ = self.memory.refuse(cluster);
        }
    }

    /// Makes a cluster present and places it. If another thread is at it, that is waited for. `asked`: somebody waits for it.
    fn fill(&self, cluster: u64, buffer: &mut Vec<u8>, asked: bool) -> Result<(), FillerError> {
        let index = usize::try_from(cluster).unwrap_or(usize::MAX);
        if self.claim(index, asked) {
            let read = self.read_into_region(cluster, buffer);
            let mut state = self.state();
            if let Some(entry) = state.clusters.get_mut(index) {
                *entry = if read.is_ok() { Cluster::Present } else { Cluster::Absent };
            }
            state.status.present += u64::from(read.is_ok());
            drop(state);
            self.changed.notify_all();
            read?;
        }
        // Not before it counts as present: from here on the guest may write to it, and whoever asks then what is present must be told of
        // it. By now it may have been placed by another thread; between its fault and the event, say.
        if cluster.saturating_mul(self.cluster) < self.region.size() {
            self.region.place(&self.memory, cluster)?;
        }
        Ok(())
    }

    /// Whether a cluster is this thread's to fill. If not, it is present, or there is no such cluster.
    fn claim(&self, index: usize, asked: bool) -> bool {
        let mut state = self.state();
        loop {
            match state.clusters.get_mut(index) {
                None | Some(Cluster::Present) => return false,
                Some(Cluster::Filling) => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(absent) => {
                    *absent = Cluster::Filling;
                    if asked {
                        state.status.faults += 1;
                        state.trace.extend(u32::try_from(index).ok());
                    }
                    return true;
                }
            }
        }
    }

    /// The region's file gets what belongs there.
    fn read_into_region(&self, cluster: u64, buffer: &mut Vec<u8>) -> Result<(), FillerError> {
        let offset = cluster * self.cluster;
        let length = self.cluster.min(self.region.size().saturating_sub(offset));
        buffer.resize(usize::try_from(length).unwrap_or(0), 0);
        let read = self.source.read(offset, buffer);
        let failed = |source| {
            let name = self.region.name().to_string();
            FillerError::Source { name, offset, end: offset + length, source }
        };
        if read.map_err(failed)? {
            // All of it, zeros too: an earlier attempt may have failed halfway.
            self.region.write_at(buffer, offset)?;
            self.unflushed.fetch_add(length, Ordering::Relaxed);
        }
        Ok(())
    }

    fn prefetch(&self, order: &[u32]) {
        // On Linux a thread has a nice value of its own. A wish; it does no harm without.
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
        let count = self.state().clusters.len() as u64;
        let mut buffer = Vec::new();
        let mut told = false;
        for cluster in order.iter().map(|cluster| u64::from(*cluster)).chain(0..count) {
            while self.held.load(Ordering::SeqCst) || self.waiting.load(Ordering::SeqCst) > 0 {
                if self.ended.load(Ordering::SeqCst) {
                    return;
                }
                std::thread::sleep(YIELD);
            }
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            if let Err(error) = self.fill(cluster, &mut buffer, false) {
                self.state().status.missing += 1;
                if !std::mem::replace(&mut told, true) {
                    (self.events)(FillerEvent::Missing(error));
                }
            }
            if self.unflushed.load(Ordering::Relaxed) >= UNFLUSHED_MAX && !self.flush() {
                return;
            }
        }
        // What is being filled elsewhere is waited for by `fill`, so all is there unless something was missing.
        let status = self.state().status;
        if status.present == status.clusters && self.flush() {
            (self.events)(FillerEvent::Complete);
        }
    }

    /// Flushes what was filled. Whether that worked: if not, no freeze will either, and says why.
    fn flush(&self) -> bool {
        self.unflushed.store(0, Ordering::Relaxed);
        match self.region.sync() {
            Ok(()) => true,
            Err(error) => {
                (self.events)(FillerEvent::Missing(error.into()));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;
