//! The dirty budget: a freeze fits into the hold-up, since never more is dirty than what fits.
//!
//! The idea is Viyojit's (Kateja et al., "Viyojit: Decoupling Battery and DRAM Capacities for Battery-Backed DRAM", ISCA 2017): what must be
//! flushed when the power goes is bounded, by flushing behind the program and, at the bound, by letting it wait.
//!
//! ```text
//!   pace     the VM's medium, measured: how many bytes fit                       (pace)
//!   bound    no more pages than that are dirty: rings or slices, vCPUs wait     (machine::dirty::told)
//!   flusher  brings cold pages home while the guest runs                         (flusher)
//!   journal  what is dirty at the freeze goes out in one sequential stream       (allocator::journal)
//! ```
//!
//! A page that is flushed while the guest writes to it is told anew, since it was watched anew before ([`UnflushedPages`]).
//!
//! The journal is named by the context, and replayed before anybody reads the memory of a frozen VM. The replay is not flushed: while the context
//! counts, the journal is there to be replayed again; when it does not count any more, nobody needs it. What was replayed counts as unflushed in
//! the VM's next life.

mod flusher;
mod pace;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use allocator::journal::{self, Journal, JournalError, JournalV1, PROBE_PAGES};
use allocator::{Kind, Mapping, Pool, Region, RegionError, RegionSpec};
use serde::{Deserialize, Serialize};

use super::freeze::FreezeReport;
use super::regions::{RegionsError, lease, region_name};
use crate::machine::config::VmConfig;
use crate::machine::dirty::{Bound, PageSet, UnflushedPages};
use crate::machine::jail::{self, Role};
use crate::machine::kvm::KvmError;
use crate::machine::memory::{GuestRam, PAGE_SIZE};
use crate::machine::time::nanoseconds;
use crate::machine::virtio::pmem::PersistentMemory;
pub use pace::Pace;

/// A journal is made for what a medium of this many bytes a second takes in the hold-up …
const JOURNAL_PER_SECOND: u128 = 1 << 30;
/// … from this …
const JOURNAL_LEAST: u64 = 8 << 20;
/// … to this.
const JOURNAL_MOST: u64 = 256 << 20;
/// In any case it has room for so many pages of each vCPU: two rings of 1024 entries, the least where the CPU logs by itself.
const RINGS_OF_A_VCPU: u64 = 2048;
/// What is written to measure a pace: as often, next to nothing, since the slowest of them counts; as often, as much as can be.
const SMALL_WRITES: usize = 24;
const LARGE_WRITES: usize = 3;

/// Why a VM cannot be kept within its hold-up.
#[derive(Debug, thiserror::Error)]
pub enum HoldUpError {
    /// The freeze alone takes longer.
    #[error(
        "a hold-up of {holdup:?} is too short for VM {name}: a freeze takes up to {fixed:?} here with nothing to flush \
         (measured on its medium); --holdup {} would do", at_least(*.fixed)
    )]
    TooShort {
        /// Which VM.
        name: String,
        /// As given.
        holdup: Duration,
        /// As measured.
        fixed: Duration,
    },
    /// What may be dirty is less than what its vCPUs can make so unseen.
    #[error(
        "a hold-up of {holdup:?} is too short for VM {name}: a freeze takes up to {fixed:?} here, and in what is left its medium takes {} KiB for sure \
         ({} MB/s, measured); its vCPUs can dirty {} KiB between two looks. A longer hold-up, fewer vCPUs or another medium would do",
        .fits >> 10, .bytes_per_second / 1_000_000, .least >> 10
    )]
    TooLittle {
        /// Which VM.
        name: String,
        /// As given.
        holdup: Duration,
        /// As measured.
        fixed: Duration,
        /// Bytes.
        fits: u64,
        /// Bytes.
        least: u64,
        /// As measured.
        bytes_per_second: u64,
    },
    /// Memory that is still on its way.
    #[error(
        "the memory of VM {0} is still being restored, which no hold-up can bound: `perdure resume {0} --holdup none` goes on without, and once all of it is there a hold-up can be given again"
    )]
    Restoring(String),
    /// The journal.
    #[error("the journal of VM {name}")]
    Journal {
        /// Which VM.
        name: String,
        /// Why.
        #[source]
        source: JournalError,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The flusher.
    #[error("cannot start the thread that flushes behind the guest")]
    Thread(#[source] io::Error),
}

fn at_least(fixed: Duration) -> String {
    format!("{}ms", fixed.as_millis() * 2 + 1)
}

/// Pages of the journal of a VM with that hold-up, whose memory has `pages`, and which has `cpus`.
fn journal_pages(holdup: Duration, pages: u64, cpus: u32) -> u64 {
    let bytes = holdup.as_nanos() * JOURNAL_PER_SECOND / 1_000_000_000;
    let bytes = u64::try_from(bytes).unwrap_or(JOURNAL_MOST).clamp(JOURNAL_LEAST, JOURNAL_MOST);
    // What two rings of each vCPU have, which may be dirty at least.
    let rings = u64::from(cpus) * RINGS_OF_A_VCPU;
    (bytes / PAGE_SIZE).max(rings).min(pages)
}

/// The journal's region, beside a VM's others.
pub(super) fn wanted(vm: &str, config: &VmConfig) -> Result<Option<(allocator::RegionName, RegionSpec)>, RegionsError> {
    let Some(holdup) = config.holdup() else { return Ok(None) };
    let bytes = config.memory.0 + config.pmem.iter().map(|one| one.size.0).sum::<u64>();
    let size = journal::region_size(journal_pages(holdup, bytes / PAGE_SIZE, config.cpus));
    Ok(Some((region_name(vm, "journal")?, RegionSpec { kind: Kind::Journal, size, medium: config.medium })))
}

/// Leases a VM's journal, if there is one.
pub(super) fn lease_journal(pool: &Pool, vm: &str) -> Result<Option<SharedJournal>, RegionsError> {
    let name = region_name(vm, "journal")?;
    if pool.get(&name).is_none() {
        return Ok(None);
    }
    let opened = Journal::open(lease(pool, vm, &name)?);
    let journal = opened.map_err(|source| HoldUpError::Journal { name: vm.to_owned(), source })?;
    Ok(Some(Arc::new(Mutex::new(journal))))
}

/// A journal that its VM's freeze and its flusher share.
pub(super) type SharedJournal = Arc<Mutex<Journal>>;

pub(super) fn lock(journal: &Mutex<Journal>) -> MutexGuard<'_, Journal> {
    journal.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that pages of the machine lie in.
#[derive(Debug)]
pub(super) enum PartMemory {
    Ram(Arc<Region>, Arc<Mapping>),
    Pmem(Arc<PersistentMemory>),
}

/// A region's share of the machine's pages.
#[derive(Debug)]
pub(super) struct Part {
    /// As they are numbered in the machine.
    pub(super) pages: Range<u64>,
    pub(super) memory: PartMemory,
}

impl Part {
    /// Those of `runs` that lie in it, as it numbers them.
    fn of(&self, runs: &[Range<u64>]) -> Vec<Range<u64>> {
        let cut = runs.iter().map(|run| run.start.max(self.pages.start)..run.end.min(self.pages.end));
        cut.filter(|run| run.start < run.end)
            .map(|run| run.start - self.pages.start..run.end - self.pages.start)
            .collect()
    }

    fn write_behind(&self, runs: &[Range<u64>]) -> Result<(), RegionError> {
        match &self.memory {
            PartMemory::Ram(region, mapping) => region.write_behind(mapping, runs),
            PartMemory::Pmem(memory) => memory.write_behind(runs),
        }
    }

    fn sync(&self) -> Result<(), RegionError> {
        match &self.memory {
            PartMemory::Ram(region, _) => region.sync(),
            PartMemory::Pmem(memory) => memory.region().sync(),
        }
    }
}

/// How a VM keeps within its hold-up, for [`crate::supervisor::control::Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldUpStatus {
    /// The hold-up, in nanoseconds.
    pub holdup_ns: u64,
    /// What a freeze takes at worst with nothing to flush, in nanoseconds.
    pub fixed_ns: u64,
    /// Bytes that its medium takes in a second, in one stream.
    pub bytes_per_second: u64,
    /// Bytes that may be dirty.
    pub limit: u64,
    /// Bytes that are.
    pub unflushed: u64,
    /// Bytes that were flushed behind the guest.
    pub flushed: u64,
    /// How long its vCPUs waited for that, one after the other, in nanoseconds.
    pub waited_ns: u64,
    /// Freezes that were done within the hold-up.
    pub met: u64,
    /// Freezes that were not.
    pub missed: u64,
    /// Why the bound does not hold, if it does not.
    pub unbounded: Option<String>,
    /// What keeps the guest from writing to more than it may before somebody looks.
    #[serde(default)]
    pub bound: Option<Bound>,
    /// How often it wrote to more all the same, in a slice of time.
    #[serde(default)]
    pub overrun: u64,
}

/// What the freeze, the flusher and who asks share.
struct Shared {
    name: String,
    holdup: Duration,
    ram: Arc<Region>,
    parts: Vec<Part>,
    journal: SharedJournal,
    pages: Mutex<UnflushedPages>,
    pace: Mutex<Pace>,
    limit: AtomicU64,
    is_over: AtomicBool,
    /// A freeze is under way: nothing new is begun.
    is_held: AtomicBool,
    flushed: AtomicU64,
    met: AtomicU64,
    missed: AtomicU64,
    unbounded: Mutex<Option<String>>,
    /// It was told that less fits than what may be dirty at least.
    is_tight: AtomicBool,
    /// How long what devices write may go unseen.
    period: Duration,
}

/// A VM's dirty budget, in force until this is dropped.
pub struct DirtyBudget {
    shared: Arc<Shared>,
    flusher: Option<JoinHandle<()>>,
}

/// What a VM's budget is made of.
pub(super) struct Terms<'a> {
    pub(super) name: &'a str,
    pub(super) config: &'a VmConfig,
    pub(super) ram: &'a Arc<Region>,
    pub(super) parts: Vec<Part>,
    pub(super) journal: &'a SharedJournal,
    /// As it was measured: [`measure`].
    pub(super) pace: Pace,
    pub(super) pages: UnflushedPages,
    /// Those that are not durable.
    pub(super) unflushed: PageSet,
}

impl DirtyBudget {
    /// Begins to flush. No vCPU has run yet, and all but `unflushed` is durable. The journal is nobody's any more. `is_strict`: a hold-up that is too short is an error, and not only told.
    pub(super) fn begin(terms: Terms<'_>, is_strict: bool) -> Result<Self, HoldUpError> {
        let Terms { name, config, ram, parts, journal, pace, pages, unflushed } = terms;
        let holdup = config.holdup().unwrap_or_default();
        check(name, holdup, &pace, &pages, is_strict)?;
        let capacity = lock(journal).capacity();
        let limit = (pace.fits(holdup) / PAGE_SIZE).clamp(pages.least_limit(), capacity.max(pages.least_limit()));
        tracing::info!(
            "{name}: hold-up {holdup:?}: a freeze takes {:?} and {} MB/s; {} KiB may be dirty",
            pace.fixed(),
            pace.bytes_per_second() / 1_000_000,
            (limit * PAGE_SIZE) >> 10
        );
        pages.begin(&unflushed, limit)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            holdup,
            ram: Arc::clone(ram),
            parts,
            journal: Arc::clone(journal),
            pages: Mutex::new(pages),
            pace: Mutex::new(pace),
            limit: AtomicU64::new(limit),
            is_over: AtomicBool::new(false),
            is_held: AtomicBool::new(false),
            flushed: AtomicU64::new(0),
            met: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            unbounded: Mutex::new(None),
            is_tight: AtomicBool::new(false),
            period: flusher::period(config, limit),
        });
        let theirs = Arc::clone(&shared);
        let flusher = jail::spawn("flush-behind", Role::Flush, move || flusher::serve(&theirs));
        Ok(Self { shared, flusher: Some(flusher.map_err(HoldUpError::Thread)?) })
    }

    /// A freeze begins: nothing new is flushed beside it until [`DirtyBudget::go_on`].
    pub(super) fn hold(&self) {
        self.shared.is_held.store(true, Ordering::SeqCst);
    }

    /// The machine stands, and is being frozen: what is dirty goes into the journal, durably. `None`: it does not fit, and must be
    /// flushed where it belongs.
    pub(super) fn write_journal(&self, sequence: u64) -> Option<JournalV1> {
        self.hold();
        let shared = &*self.shared;
        let pages = shared.pages();
        let begun = Instant::now();
        let runs = pages.all().map(|all| all.runs().collect::<Vec<_>>());
        let unknown =
            |error: &KvmError| tracing::error!("{}: all its memory is flushed where it lies: {error}", shared.name);
        let runs = runs.inspect_err(unknown).ok()?;
        let written = write(&mut lock(&shared.journal), &shared.ram, sequence, &runs, pages.ram());
        match written {
            Ok(named) => {
                shared.pace().learn_journal(named.pages * PAGE_SIZE, begun.elapsed());
                Some(named)
            }
            Err(error) => {
                tracing::warn!("{}: its memory is flushed where it lies: {error}", shared.name);
                None
            }
        }
    }

    /// A freeze is done: whether it was in time, and what it says of the next.
    pub fn learn(&self, report: &FreezeReport) {
        let shared = &*self.shared;
        let total = Duration::from_nanos(report.total_ns);
        shared.pace().learn_rest(total.saturating_sub(Duration::from_nanos(report.steps.persist_ns)));
        if total <= shared.holdup {
            shared.met.fetch_add(1, Ordering::Relaxed);
        } else {
            shared.missed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("{}: the freeze took {total:?}, its hold-up is {:?}", shared.name, shared.holdup);
        }
        shared.reckon();
    }

    /// It runs on after a freeze.
    pub(super) fn go_on(&self) {
        self.shared.is_held.store(false, Ordering::SeqCst);
        self.shared.pages().wake();
    }

    /// A fresh machine goes on over the same memory. Before it runs.
    pub(super) fn machine_changes(&self, to: UnflushedPages) -> Result<(), KvmError> {
        let mut pages = self.shared.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.machine_changes(&to)?;
        *pages = to;
        Ok(())
    }

    /// How it is.
    #[must_use]
    pub fn status(&self) -> HoldUpStatus {
        let shared = &*self.shared;
        let standing = shared.pages().standing();
        let pace = shared.pace().clone();
        HoldUpStatus {
            holdup_ns: nanoseconds(shared.holdup),
            fixed_ns: nanoseconds(pace.fixed()),
            bytes_per_second: pace.bytes_per_second(),
            limit: shared.limit.load(Ordering::Relaxed) * PAGE_SIZE,
            unflushed: standing.unflushed * PAGE_SIZE,
            flushed: shared.flushed.load(Ordering::Relaxed),
            waited_ns: nanoseconds(standing.waited),
            met: shared.met.load(Ordering::Relaxed),
            missed: shared.missed.load(Ordering::Relaxed),
            unbounded: shared.unbounded.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            bound: shared.pages().bound(),
            overrun: standing.overrun,
        }
    }
}

impl Drop for DirtyBudget {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.shared.pages().wake();
        if let Some(flusher) = self.flusher.take() {
            let _ = flusher.join();
        }
    }
}

impl Shared {
    fn pages(&self) -> UnflushedPages {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit, by what is known of the medium by now.
    fn reckon(&self) {
        if self.unbounded.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return;
        }
        let pages = self.pages();
        let capacity = lock(&self.journal).capacity();
        let fits = self.pace().fits(self.holdup) / PAGE_SIZE;
        let least = pages.least_limit();
        if fits < least && !self.is_tight.swap(fits < least, Ordering::Relaxed) {
            tracing::warn!(
                "{}: {} KiB fit into the hold-up by now, and {} KiB may be dirty at least: a freeze may not be in time",
                self.name,
                (fits * PAGE_SIZE) >> 10,
                (least * PAGE_SIZE) >> 10
            );
        }
        let limit = fits.min(capacity).max(least);
        self.limit.store(limit, Ordering::Relaxed);
        pages.set_limit(limit);
    }

    /// Nothing more can be flushed: the guest is not to wait for ever.
    fn give_up(&self, why: String) {
        tracing::error!("{}: {why}: what is dirty is not bounded from now on", self.name);
        *self.unbounded.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        self.pages().set_limit(u64::MAX / 2);
        self.pages().wake();
    }
}

/// Writes pages of `ram` to the journal.
fn write(
    journal: &mut Journal,
    region: &Region,
    sequence: u64,
    runs: &[Range<u64>],
    ram: &GuestRam,
) -> Result<JournalV1, JournalError> {
    journal.write(region, sequence, runs, &mut |first, into| ram.copy_pages(first, into).map_err(io::Error::other))
}

fn check(
    name: &str,
    holdup: Duration,
    pace: &Pace,
    pages: &UnflushedPages,
    is_strict: bool,
) -> Result<(), HoldUpError> {
    let (fixed, fits, least) = (pace.fixed(), pace.fits(holdup), pages.least_limit() * PAGE_SIZE);
    let name = name.to_owned();
    let refusal = if fixed >= holdup {
        HoldUpError::TooShort { name, holdup, fixed }
    } else if fits < least {
        HoldUpError::TooLittle { name, holdup, fixed, fits, least, bytes_per_second: pace.bytes_per_second() }
    } else {
        return Ok(());
    };
    if is_strict {
        return Err(refusal);
    }
    tracing::warn!("{refusal}; it runs, and its freezes may not be in time");
    Ok(())
}

/// Measures the pace of the medium on which the journal of the VM `name` lies. What is in the journal stays.
pub(super) fn measure(name: &str, config: &VmConfig, journal: &SharedJournal) -> Result<Pace, HoldUpError> {
    let writes = u32::try_from(2 + config.disks.len() + config.pmem.len()).unwrap_or(u32::MAX);
    let pace = measure_on(&mut lock(journal), writes);
    pace.map_err(|source| HoldUpError::Journal { name: name.to_owned(), source })
}

fn measure_on(journal: &mut Journal, writes: u32) -> Result<Pace, JournalError> {
    let mut time = |pages: u64| -> Result<Duration, JournalError> {
        let begun = Instant::now();
        journal.probe(pages)?;
        Ok(begun.elapsed())
    };
    // The first finds nothing warm.
    time(1)?;
    let small = (0..SMALL_WRITES).map(|_| time(1)).collect::<Result<Vec<_>, _>>()?;
    let large = (0..LARGE_WRITES).map(|_| time(PROBE_PAGES)).collect::<Result<Vec<_>, _>>()?;
    Ok(Pace::of(&small, &large, PROBE_PAGES * PAGE_SIZE, writes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_numbers_its_pages_from_its_own_first() {
        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::create_or_open(directory.path(), Arc::new(vfs::host::HostVfs)).unwrap();
        let name = "web/ram".parse().unwrap();
        pool.allocate(&name, RegionSpec { kind: Kind::Ram, size: 10 * PAGE_SIZE, medium: None }).unwrap();
        let region = Arc::new(Region::open(pool.lease(&name).unwrap()).unwrap());
        let mapping = Arc::new(region.map().unwrap());
        let part = Part { pages: 100..110, memory: PartMemory::Ram(region, mapping) };
        assert_eq!(part.of(&[0..3, 98..102, 105..106, 109..200, 300..301]), [0..2, 5..6, 9..10]);
        assert!(part.of(&[0..100, 110..120]).is_empty());
    }

    #[test]
    fn a_journal_has_room_for_what_a_hold_up_allows_and_not_for_more_than_there_is() {
        let pages = |ms, memory: u64| journal_pages(Duration::from_millis(ms), memory / PAGE_SIZE, 1) * PAGE_SIZE;
        assert_eq!(pages(1, 1 << 30), JOURNAL_LEAST);
        assert_eq!(pages(16, 1 << 30) >> 20, 16);
        assert_eq!(pages(60_000, 1 << 30), JOURNAL_MOST);
        assert_eq!(pages(60_000, 4 << 20), 4 << 20);
        assert_eq!(journal_pages(Duration::from_millis(1), 1 << 20, 8), 8 * RINGS_OF_A_VCPU);
    }
}
