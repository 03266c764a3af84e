//! A VM that runs while its memory is still being restored from a generation.
//!
//! ```text
//!   rollback, recovery      a context that says: RAM is generation G, of whose clusters none is in the region yet; clean@N
//!   resume                  a pager over the region: faults bring clusters from G, a prefetcher brings the others
//!   freeze in the middle    the next context says which clusters are in the region (16 KiB at most); the resume after it goes on there
//!   cut in the middle       RAM is not stamped: the newest generation is restored, as after any cut
//!   less RAM than memory    the same with the pager of [`super::paging`], in whose frames and slots the clusters are then: its tables say
//!                           which is where, the context which have come
//!   a generation            its parent is G; what is not in the region yet is as in G, and so is not looked at
//!   all is there            G is let go
//! ```
//!
//! G is protected from being purged for as long as a VM needs it; the context says whether that protection is to be taken away again.
//! Everything that a context says of a restore is taken for hostile, as G is.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use allocator::Region;
use allocator::filler::{self, ClusterSource, FillerError, FillerEvent, FillerEvents, FillerStatus, SourceError};
use allocator::paging::{self, Elsewhere, Geometry, PagingError, PagingEvent, PagingEvents, PagingStatus};
use serde::{Deserialize, Serialize};
use snapshot::{GenerationId, Reader, Store, StoreError};

use super::generations::{self, GenerationsError, REGION_RAM};
use super::paging::PagedV1;
use crate::machine::config::VmConfig;
use crate::machine::dirty::PageSet;
use crate::machine::memory::{HostMemory, PAGE_SIZE};

/// How far RAM is restored, as a context says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoringV1 {
    /// The generation, as in `web@17`: what RAM is where the region does not have it.
    pub generation: String,
    /// Whether the generation was protected for this alone.
    pub unprotect: bool,
    /// Bytes that come at once.
    pub cluster: u64,
    /// Which clusters are in the region: a bit each, the lowest bit of the first byte first.
    #[serde(with = "devices::base64_bytes")]
    pub present: Vec<u8>,
}

/// Why memory cannot be restored while the VM runs.
#[derive(Debug, thiserror::Error)]
pub enum RestoringError {
    /// The context is nonsense.
    #[error("what the context says of the restore that was under way is not possible: {0}")]
    Invalid(String),
    /// The store.
    #[error("cannot go on restoring from generation {generation}")]
    Generation {
        /// Which.
        generation: String,
        /// Why not.
        #[source]
        source: StoreError,
    },
    /// The store cannot be had.
    #[error(transparent)]
    Open(#[from] GenerationsError),
    /// There is no store.
    #[error("the generations of VM {0} are gone, and its memory was still being restored from one")]
    NoStore(String),
    /// Filling RAM.
    #[error(transparent)]
    Filler(#[from] FillerError),
    /// Paging memory.
    #[error(transparent)]
    Paging(#[from] PagingError),
}

impl RestoringV1 {
    /// Nothing of a memory of `size` bytes is there yet; `paged`: how it is divided, if it is.
    #[must_use]
    pub fn nothing_yet(generation: &GenerationId, unprotect: bool, size: u64, paged: Option<Geometry>) -> Self {
        let cluster = paged.map_or_else(|| filler::cluster_size(size), |geometry| geometry.cluster());
        Self {
            generation: generation.to_string(),
            unprotect,
            cluster,
            present: pack(&vec![false; count(size, cluster)]),
        }
    }

    /// The generation, and which clusters of a memory of `size` bytes are there; `paged`: how it is divided, if it is.
    ///
    /// # Errors
    /// [`RestoringError::Invalid`].
    pub fn check(&self, size: u64, paged: Option<Geometry>) -> Result<(GenerationId, Vec<bool>), RestoringError> {
        let invalid = |what: String| RestoringError::Invalid(what);
        let id = self.generation.parse().map_err(|error: StoreError| invalid(error.to_string()))?;
        let possible = match paged {
            Some(geometry) => geometry.cluster() == self.cluster && geometry.memory() == size,
            None => filler::is_cluster_size(self.cluster, size),
        };
        if !possible {
            return Err(invalid(format!("clusters of {} bytes in a region of {size}", self.cluster)));
        }
        let clusters = count(size, self.cluster);
        if self.present.len() != clusters.div_ceil(8) {
            return Err(invalid(format!("{} bytes for {clusters} clusters", self.present.len())));
        }
        let bits = self.present.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        Ok((id, bits.take(clusters).collect()))
    }

    /// How many clusters are there, and how many there are in all; for reports, unchecked.
    #[must_use]
    pub fn progress(&self, size: u64) -> (u64, u64) {
        let present = self.present.iter().map(|byte| u64::from(byte.count_ones())).sum();
        (present, size.div_ceil(self.cluster.max(1)))
    }
}

fn count(size: u64, cluster: u64) -> usize {
    usize::try_from(size.div_ceil(cluster)).unwrap_or(usize::MAX)
}

fn pack(present: &[bool]) -> Vec<u8> {
    let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
    present.chunks(8).map(byte).collect()
}

/// Which pages of a region are in clusters that are there.
pub(super) fn pages_present(present: &[bool], cluster: u64, size: u64) -> PageSet {
    let mut pages = PageSet::new(size.div_ceil(PAGE_SIZE));
    let each = cluster / PAGE_SIZE;
    for (index, _) in (0..).zip(present).filter(|(_, present)| **present) {
        (index * each..(index + 1) * each).for_each(|page| pages.insert(page));
    }
    pages
}

/// A generation as a source of clusters.
#[derive(Debug)]
struct Clusters {
    reader: Reader,
    ram: usize,
}

impl ClusterSource for Clusters {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<bool, SourceError> {
        Ok(self.reader.read_run(self.ram, offset / PAGE_SIZE, bytes)? > 0)
    }
}

/// The store that a VM's generations are in.
pub(super) fn store(pool: &Path, name: &str, config: &VmConfig) -> Result<Store, RestoringError> {
    let family = generations::family(config, name);
    let store = generations::open_existing(pool, family, &config.generations)?;
    store.ok_or_else(|| RestoringError::NoStore(name.to_owned()))
}

/// The restore of a running VM.
#[derive(Debug)]
pub struct Restoring {
    id: GenerationId,
    unprotect: bool,
    /// All is there, and the generation is protected no longer for this.
    done: Arc<AtomicBool>,
    /// What was in the region when this process took it up.
    before: Option<PageSet>,
    pager: AnyPager,
}

/// What brings the clusters.
#[derive(Debug, Clone)]
enum AnyPager {
    /// Memory is all RAM, and this fills its region.
    Ram(Arc<filler::Filler>),
    /// Memory is paged anyway.
    Paged(Arc<paging::Pager>),
}

/// Where the clusters are to come to.
pub(super) enum Destination<'a> {
    /// The RAM region: there is nothing else.
    Ram(Arc<Region>),
    /// Frames and slots.
    Paged {
        /// RAM.
        ram: &'a Arc<Region>,
        /// Swap.
        swap: &'a Arc<Region>,
        /// What the context says of them.
        tables: Option<PagedV1>,
        /// Who is told of paging.
        events: &'a PagingEvents,
    },
}

/// How a restore is to go on.
#[derive(Clone)]
pub struct Paging<'a> {
    /// The pool.
    pub pool: &'a Path,
    /// Whether memory is fetched that nobody has asked for.
    pub prefetch: bool,
    /// Who is told.
    pub events: FillerEvents,
}

impl Restoring {
    /// Goes on with what a context says. Nothing of the memory is altered until something accesses it, but that clusters come.
    ///
    /// # Errors
    /// [`RestoringError`].
    pub(super) fn begin(
        record: &RestoringV1,
        name: &str,
        config: &VmConfig,
        destination: Destination<'_>,
        paging: &Paging<'_>,
    ) -> Result<Self, RestoringError> {
        let size = config.memory.0;
        let (id, present) = record.check(size, config.geometry())?;
        let failed = |source| RestoringError::Generation { generation: id.to_string(), source };
        let store = store(paging.pool, name, config)?;
        if record.unprotect && !store.generation(&id).map_err(failed)?.protected {
            // A cut came between the context and this.
            store.protect(&id, true).map_err(failed)?;
        }
        let reader = store.reader(&id).map_err(failed)?;
        let region = reader.region(REGION_RAM);
        let held = region.and_then(|at| reader.regions().get(at).map(|region| region.size));
        let (Some(at), true) = (region, held == Some(size)) else {
            return Err(RestoringError::Invalid(format!("generation {id} is of another memory")));
        };
        let before = present.contains(&true).then(|| pages_present(&present, record.cluster, size));
        let source = Box::new(Clusters { reader, ram: at });
        let prefetch = paging.prefetch.then(|| super::working_set::read(paging.pool, name, record.cluster));
        let done = Arc::new(AtomicBool::new(false));
        let release = record.unprotect.then(|| Release { store, id: id.clone(), done: Arc::clone(&done) });
        let pager = match destination {
            Destination::Ram(ram) => {
                let is_complete = |event: &FillerEvent| matches!(event, FillerEvent::Complete);
                let events = releasing(release, Arc::clone(&paging.events), is_complete);
                let plan = filler::Plan { cluster: record.cluster, present, source, prefetch, events };
                AnyPager::Ram(Arc::new(filler::Filler::start(ram, plan)?))
            }
            Destination::Paged { ram, swap, tables, events } => {
                if tables.is_none() && record.present.iter().any(|byte| *byte != 0) {
                    return Err(RestoringError::Invalid("some of it has come, and nothing says where to".to_owned()));
                }
                let is_complete = |event: &PagingEvent| matches!(event, PagingEvent::Complete);
                let events = releasing(release, Arc::clone(events), is_complete);
                let elsewhere = Elsewhere { source, present, prefetch };
                let pager = super::paging::start(config, ram, Some(swap), tables, Some(elsewhere), &events)?;
                let pager = pager.ok_or_else(|| RestoringError::Invalid("the VM's memory is not paged".to_owned()))?;
                AnyPager::Paged(pager)
            }
        };
        Ok(Self { id, unprotect: record.unprotect, done, before, pager })
    }

    /// What fills the RAM region, if memory is all RAM.
    pub(super) fn filler(&self) -> Option<&Arc<filler::Filler>> {
        match &self.pager {
            AnyPager::Ram(pager) => Some(pager),
            AnyPager::Paged(_) => None,
        }
    }

    /// What pages the memory, if it is paged.
    pub(super) fn paged(&self) -> Option<&Arc<paging::Pager>> {
        match &self.pager {
            AnyPager::Ram(_) => None,
            AnyPager::Paged(pager) => Some(pager),
        }
    }

    /// Memory that nobody has asked for is not fetched, or is again.
    pub(super) fn hold(&self, held: bool) {
        match &self.pager {
            AnyPager::Ram(pager) => pager.hold(held),
            AnyPager::Paged(pager) => pager.hold_fetch(held),
        }
    }

    /// The clusters that somebody waited for, in that order.
    #[must_use]
    pub fn trace(&self) -> Vec<u32> {
        match &self.pager {
            AnyPager::Ram(pager) => pager.trace(),
            AnyPager::Paged(pager) => pager.trace(),
        }
    }

    /// The generation.
    #[must_use]
    pub fn generation(&self) -> &GenerationId {
        &self.id
    }

    /// The pages that may differ from the generation's since before this process: what a generation that builds on it must look at.
    #[must_use]
    pub fn changed_before(&self) -> Option<&PageSet> {
        self.before.as_ref()
    }

    /// Whether the generation is still protected for this.
    #[must_use]
    pub fn holds_generation(&self) -> bool {
        self.unprotect && !self.done.load(Ordering::SeqCst)
    }

    /// How far it is, for a context. `None`: nothing is left to be done. To be taken before the region is flushed.
    #[must_use]
    pub fn record(&self) -> Option<RestoringV1> {
        // A generation that is still protected is let go by the next process, to which nothing else is left.
        let (present, cluster) = match &self.pager {
            AnyPager::Ram(pager) => (pager.present(), pager.cluster()),
            AnyPager::Paged(pager) => (pager.present(), pager.geometry().cluster()),
        };
        if !present.contains(&false) && !self.holds_generation() {
            return None;
        }
        let generation = self.id.to_string();
        Some(RestoringV1 { generation, unprotect: self.unprotect, cluster, present: pack(&present) })
    }
}

/// What is to be done with the generation when all is there.
struct Release {
    store: Store,
    id: GenerationId,
    done: Arc<AtomicBool>,
}

type Events<E> = Arc<dyn Fn(E) + Send + Sync>;

/// Lets the generation go when all is there, before anyone is told; in the pager's thread, since it waits for the disk.
fn releasing<E: 'static>(generation: Option<Release>, events: Events<E>, is_complete: fn(&E) -> bool) -> Events<E> {
    let Some(Release { store, id, done }) = generation else { return events };
    Arc::new(move |event| {
        if is_complete(&event) {
            match release(&store, &id) {
                Ok(()) => done.store(true, Ordering::SeqCst),
                Err(error) => tracing::warn!("generation {id} stays protected: {error}"),
            }
        }
        events(event);
    })
}

/// The generation is not needed any more: it is protected no longer, if this was why it was. What goes wrong is logged: the generation
/// only stays for longer then.
pub fn let_go(pool: &Path, name: &str, config: &VmConfig, id: &GenerationId) {
    let failed = |source| RestoringError::Generation { generation: id.to_string(), source };
    let released = store(pool, name, config).and_then(|store| release(&store, id).map_err(failed));
    if let Err(error) = released {
        tracing::warn!("{name}: generation {id} stays protected: {error}");
    }
}

/// As [`let_go`], of a store that is open.
pub(super) fn release(store: &Store, id: &GenerationId) -> Result<(), StoreError> {
    store.refresh()?;
    match store.generation(id) {
        Ok(generation) if generation.protected => store.protect(id, false),
        // It is gone, or unprotected: somebody wanted it so.
        _ => Ok(()),
    }
}

/// RAM that is being filled: what the VMM itself reads of it is brought in first, so that it never waits for a page that cannot be had.
#[derive(Debug)]
pub(super) struct PagedMemory(pub(super) Arc<filler::Filler>);

// SAFETY: the filler keeps its mapping, at a fixed address; pieces of it are replaced by the file they stand for, mapped readable and
// writable, and no references are handed out. A piece that was refused is told by `bring_in`.
unsafe impl HostMemory for PagedMemory {
    fn as_ptr(&self) -> *mut u8 {
        self.0.mapping().as_ptr()
    }

    fn len(&self) -> usize {
        self.0.mapping().len()
    }

    fn is_fixed(&self) -> bool {
        false
    }

    fn bring_in(&self, offset: u64, length: u64) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.bring_in(offset, length)?)
    }
}

/// How a restore fares, for [`crate::supervisor::control::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoringStatus {
    /// From which generation.
    pub generation: String,
    /// Bytes that come at once.
    pub cluster: u64,
    /// Clusters that are there.
    pub present: u64,
    /// Clusters in all.
    pub clusters: u64,
    /// Clusters that the guest had to wait for.
    pub faults: u64,
    /// Clusters that could not be had when they were fetched ahead: each stops the VM if its guest asks for it.
    pub missing: u64,
}

impl Restoring {
    /// How it fares.
    #[must_use]
    pub fn status(&self) -> RestoringStatus {
        let generation = self.id.to_string();
        match &self.pager {
            AnyPager::Ram(pager) => {
                let FillerStatus { clusters, present, faults, missing } = pager.status();
                RestoringStatus { generation, cluster: pager.cluster(), present, clusters, faults, missing }
            }
            AnyPager::Paged(pager) => {
                let PagingStatus { clusters, cluster, elsewhere, source_faults, missing, .. } = pager.status();
                let present = clusters.saturating_sub(elsewhere);
                RestoringStatus { generation, cluster, present, clusters, faults: source_faults, missing }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(cluster: u64, present: Vec<u8>) -> RestoringV1 {
        RestoringV1 { generation: "web@3".to_owned(), unprotect: true, cluster, present }
    }

    #[test]
    fn nonsense_about_a_restore_is_refused() {
        let size = 10 * (64 << 10);
        assert!(record(64 << 10, vec![0, 0]).check(size, None).is_ok());
        for (cluster, bytes) in [(0, 2), (1, 2), (3 << 16, 1), (64 << 10, 1), (64 << 10, 3), (u64::MAX, 2), (4096, 2)] {
            assert!(record(cluster, vec![0xFF; bytes]).check(size, None).is_err(), "{cluster} {bytes}");
        }
        assert!(record(4096, vec![0; 1 << 17]).check(1 << 32, None).is_err(), "more clusters than can be mapped");
        let paged = Geometry::new(size, Geometry::least_ram(size, None), None);
        assert!(record(16 << 10, vec![0; 5]).check(size, paged).is_ok());
        for (cluster, bytes, size) in
            [(4096, 20, size), (32 << 10, 3, size), (16 << 10, 6, size), (16 << 10, 5, size + 4096)]
        {
            assert!(record(cluster, vec![0xFF; bytes]).check(size, paged).is_err(), "{cluster} {bytes} {size}");
        }
        let nobody = RestoringV1 { generation: "nobody".to_owned(), ..record(64 << 10, vec![0, 0]) };
        assert!(nobody.check(size, None).is_err());
    }

    proptest! {
        #[test]
        fn which_clusters_are_there_survives_a_context(present in proptest::collection::vec(any::<bool>(), 1..100)) {
            let size = present.len() as u64 * (64 << 10) - 4096;
            let written = record(64 << 10, pack(&present));
            let json = serde_json::to_string(&written).unwrap();
            let read: RestoringV1 = serde_json::from_str(&json).unwrap();
            let (id, found) = read.check(size, None).unwrap();
            prop_assert_eq!(id, GenerationId::new("web", 3));
            prop_assert_eq!(&found, &present);
            let there = present.iter().filter(|present| **present).count() as u64;
            prop_assert_eq!(read.progress(size), (there, present.len() as u64));
            let pages = pages_present(&present, 64 << 10, size);
            for page in 0..size / 4096 {
                prop_assert_eq!(pages.contains(page), present[(page / 16) as usize]);
            }
        }
    }
}
