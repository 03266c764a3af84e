//! A working set that is greater than memory: pages a second by the kernel's swap, and by others, over the very same list of accesses.
//!
//! Each walk is a process of its own ([`worker`]). A *page* is one access to one, whether it was there or not, so that a pattern
//! with many hits gives many. A walk first goes once through its list, by which all of its pages are there or swapped out, then on for
//! a while, and only then does its time count.
//!
//! | leg | who walks | memory |
//! |---|---|---|
//! | `kernel-swap` | a process | a cgroup with RAM beyond what the process has before its first page; the kernel's swap on the pool's disk |
//! | `process` | a process | no limit: what the walk costs where nothing is swapped |
//! | `guest` | the guest `pages` | no limit: the same, in a VM |
//! | `perdure` | the guest | RAM by `--ram`, the rest in a swap region; a cgroup with that much and an overhead that is told, so that no page cache helps |
//! | `fits` | the guest, over a working set of half the RAM | no limit |
//! | `fits-paged` | the same | RAM by `--ram`: what the pager costs where nothing is swapped ([`overhead`]) |
//!
//! What is not permitted here is told, and is absent in the results; a leg that fails is told to have, and its numbers are none. The others are
//! measured in either case.

mod group;
pub mod guard;
mod native;
pub mod overhead;
mod swap;
pub mod worker;

use std::path::{Path, PathBuf};
use std::time::Duration;

use allocator::MediumKind;
use allocator::paging::PagingStatus;
use guests::pages::{List, ListError};
use serde::Serialize;

use super::patterns::{Pattern, Workload};
use super::{BenchError, BenchPool};
use crate::machine::config::{ByteSize, Kernel, SerialTarget, VmConfig};
use crate::persistence::regions::VmRegions;
use group::MemoryGroup;
use guard::{Guard, Leftovers};
use overhead::Overhead;
pub use worker::Sample;
use worker::{Begin, Part, Spec, Worker};

/// How much more memory than RAM there is.
pub const BEYOND: u64 = 4;
const PAGE: u64 = 4096;
/// Time between two samples of a walk.
const SAMPLE_MS: u64 = 50;
/// A guest's memory that is left over, for the VMM's tables in it.
const SPARE: u64 = 1 << 20;
/// How long a walk may take until its time counts.
const WARM_UP_MOST: Duration = Duration::from_secs(300);
const VM: &str = "paging";

/// What this system, or this user, does not allow, and what is needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Absent(String);

impl Absent {
    fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// Why pages could not be counted.
#[derive(Debug, thiserror::Error)]
pub enum PagingError {
    /// Not here.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// The bench.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// The list.
    #[error(transparent)]
    List(#[from] ListError),
}

/// What is measured.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// RAM that a walk may have; the guest has [`BEYOND`] times as much memory.
    pub ram: ByteSize,
    /// What regions lie on.
    pub medium: Option<MediumKind>,
    /// Per cent of accesses that write.
    pub write_percent: u32,
    /// Accesses before a list begins anew, in working sets.
    pub rounds: u32,
    /// Of the random numbers.
    pub seed: u64,
    /// What a perdure process may have beyond RAM and what it has before its guest begins: KVM's tables, its own, in bytes.
    pub overhead: ByteSize,
    /// How long a walk goes on before its time counts, after once through its list, in milliseconds.
    pub warm_up_ms: u64,
    /// How long its time counts, in milliseconds.
    pub length_ms: u64,
}

impl Plan {
    /// Memory of the guest.
    #[must_use]
    pub fn memory(&self) -> ByteSize {
        ByteSize(self.ram.0.saturating_mul(BEYOND))
    }

    /// The greatest working set that a guest with `memory` has room for, beside its list.
    pub(super) fn workload(&self, pattern: Pattern, memory: ByteSize) -> Result<Workload, PagingError> {
        let (rounds, write_percent, seed) = (self.rounds.max(1), self.write_percent, self.seed);
        let none = List::new([guests::pages::Access { page: 0, write: false }], 1)?;
        let room = memory.0.saturating_sub(none.overhead(memory.0) + SPARE);
        // A page, its version, its entries.
        let pages = u32::try_from(room / (PAGE + 4 + 4 * u64::from(rounds))).unwrap_or(u32::MAX);
        if pages == 0 {
            return Err(BenchError::Guest(format!("{memory} of memory are too little for a walk")).into());
        }
        Ok(Workload { pattern, pages, rounds, write_percent, seed })
    }
}

/// Who walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leg {
    /// A process in a cgroup, with the kernel's swap.
    KernelSwap,
    /// A process without a limit.
    Process,
    /// A guest without a limit.
    Guest,
    /// A guest with less RAM than memory.
    Perdure,
    /// A guest whose working set fits.
    Fits,
    /// The same, with a pager that has nothing to do.
    FitsPaged,
}

impl Leg {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::KernelSwap, Self::Perdure, Self::Process, Self::Guest, Self::Fits, Self::FitsPaged];

    /// In words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::KernelSwap => "kernel swap",
            Self::Process => "process, no limit",
            Self::Guest => "guest, no limit",
            Self::Perdure => "perdure",
            Self::Fits => "guest that fits",
            Self::FitsPaged => "the same, with a pager",
        }
    }
}

/// How one leg went.
#[derive(Debug, Clone, Serialize)]
pub struct LegResult {
    /// Which.
    pub leg: Leg,
    /// What is not permitted, and what is needed; all else is none then.
    pub absent: Option<String>,
    /// What went wrong, for example that the limit was too little for the process; all else is none then.
    pub failed: Option<String>,
    /// Accesses a second.
    pub pages_per_second: Option<f64>,
    /// Accesses a second of processor time, all of the process's threads counted: other processes do not bear on it.
    pub pages_per_cpu_second: Option<f64>,
    /// Faults a second that read from the disk, of the process.
    pub major_faults_per_second: Option<f64>,
    /// Its other faults a second.
    pub minor_faults_per_second: Option<f64>,
    /// Clusters a second that the guest waited for, from the swap region.
    pub hard_faults_per_second: Option<f64>,
    /// Clusters a second that the pager found in RAM when the guest asked.
    pub soft_faults_per_second: Option<f64>,
    /// Clusters a second that were brought before the guest asked.
    pub read_ahead_per_second: Option<f64>,
    /// The limit of its cgroup, in bytes.
    pub limit: Option<u64>,
    /// How long it took until its time counted, in milliseconds.
    pub warm_up_ms: Option<u64>,
}

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct PagingResult {
    /// The plan.
    pub plan: Plan,
    /// What was walked.
    pub workload: Workload,
    /// Settings of this system that bear on it.
    pub system: SystemSettings,
    /// By whom.
    pub legs: Vec<LegResult>,
    /// Pages a second of perdure by those of the kernel's swap.
    pub ratio: Option<f64>,
    /// What the pager costs where all fits.
    pub overhead: Option<Overhead>,
}

/// What bears on the kernel's swap.
#[derive(Debug, Clone, Serialize)]
pub struct SystemSettings {
    /// `/sys/module/zswap/parameters/enabled`.
    pub zswap: String,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub huge_pages: String,
    /// `/proc/sys/vm/page-cluster`: read-ahead of swap, as a power of two.
    pub page_cluster: String,
    /// `/proc/sys/vm/swappiness`.
    pub swappiness: String,
}

impl SystemSettings {
    fn now() -> Self {
        let read = |path| std::fs::read_to_string(path).map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned());
        Self {
            zswap: read("/sys/module/zswap/parameters/enabled"),
            huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
            page_cluster: read("/proc/sys/vm/page-cluster"),
            swappiness: read("/proc/sys/vm/swappiness"),
        }
    }
}

/// Measures one pattern, leg after leg, over one list.
///
/// # Errors
/// [`PagingError`]; never for what is not permitted.
pub fn measure(pool: &BenchPool, plan: &Plan, pattern: Pattern) -> Result<PagingResult, PagingError> {
    let _guard = clean_up_behind(pool)?;
    let workload = plan.workload(pattern, plan.memory())?;
    let beyond = Walk::new(pool, plan, workload, "list")?;
    let within = Walk::new(pool, plan, plan.workload(pattern, ByteSize(plan.ram.0 / 2))?, "list-that-fits")?;
    let mut legs = Vec::new();
    for leg in [Leg::KernelSwap, Leg::Perdure, Leg::Process, Leg::Guest] {
        legs.push(beyond.leg(leg)?);
    }
    let (both, overhead) = within.what_fits()?;
    legs.extend(both);
    let rate = |leg| legs.iter().find(|result| result.leg == leg).and_then(|result| result.pages_per_second);
    let ratio = rate(Leg::Perdure).zip(rate(Leg::KernelSwap)).map(|(ours, theirs)| ours / theirs);
    let system = SystemSettings::now();
    Ok(PagingResult { plan: plan.clone(), workload, system, legs, ratio, overhead })
}

/// Removes the pool should the bench not come to its end.
pub(super) fn clean_up_behind(pool: &BenchPool) -> Result<Guard, PagingError> {
    Guard::start(&Leftovers { group: None, swap: None, pool: pool.directory().to_owned() })
}

/// One list, walked by one after the other.
struct Walk<'a> {
    pool: &'a BenchPool,
    plan: &'a Plan,
    workload: Workload,
    file: PathBuf,
}

impl<'a> Walk<'a> {
    fn new(pool: &'a BenchPool, plan: &'a Plan, workload: Workload, name: &str) -> Result<Self, PagingError> {
        let file = pool.directory().join(name);
        let system = |source| BenchError::System { doing: "write the list", source };
        std::fs::write(&file, workload.list()?.to_bytes()).map_err(system)?;
        Ok(Self { pool, plan, workload, file })
    }

    /// The same list, walked in another pool.
    fn inside<'b>(&'b self, pool: &'b BenchPool) -> Walk<'b> {
        Walk { pool, plan: self.plan, workload: self.workload, file: self.file.clone() }
    }

    /// Both legs over a working set that fits, and what lies between them.
    fn what_fits(&self) -> Result<(Vec<LegResult>, Option<Overhead>), PagingError> {
        match overhead::measure(self) {
            Ok((legs, overhead)) => Ok((legs.into(), overhead)),
            Err(error) => {
                let why = LegResult::why_not(error)?;
                Ok(([Leg::Fits, Leg::FitsPaged].map(|leg| LegResult { leg, ..why.clone() }).into(), None))
            }
        }
    }

    fn leg(&self, leg: Leg) -> Result<LegResult, PagingError> {
        let native = Part::Native { list: self.file.clone(), pages: self.workload.pages };
        let result = match leg {
            Leg::KernelSwap => self.swapped(native),
            Leg::Process => self.walked(native, None),
            Leg::Guest | Leg::Fits => self.in_a_guest(None, None),
            Leg::Perdure => self.paged(),
            Leg::FitsPaged => self.in_a_guest(Some(self.plan.ram), None),
        };
        Ok(LegResult { leg, ..result.or_else(LegResult::why_not)? })
    }

    fn swapped(&self, part: Part) -> Result<LegResult, PagingError> {
        let file = self.pool.directory().join("swap");
        let limits = Limits::set_up(self.pool, Some((&file, self.plan.memory().0)), self.plan.ram.0)?;
        self.walked(part, Some(&limits))
    }

    fn paged(&self) -> Result<LegResult, PagingError> {
        let beyond = self.plan.ram.0.saturating_add(self.plan.overhead.0);
        let limits = Limits::set_up(self.pool, None, beyond)?;
        self.in_a_guest(Some(self.plan.ram), Some(&limits))
    }

    fn in_a_guest(&self, ram: Option<ByteSize>, limits: Option<&Limits>) -> Result<LegResult, PagingError> {
        let result = self.walked(self.make_guest(VM, ram)?, limits);
        self.remove_guest(VM)?;
        result
    }

    fn make_guest(&self, name: &str, ram: Option<ByteSize>) -> Result<Part, PagingError> {
        let config = guest_config(self.plan.memory(), ram, self.plan.medium, self.file.clone(), self.workload.pages);
        drop(VmRegions::create(self.pool.pool(), name, &config).map_err(BenchError::from)?);
        Ok(Part::Guest { pool: self.pool.directory().to_owned(), name: name.to_owned(), begin: Begin::Boot })
    }

    fn remove_guest(&self, name: &str) -> Result<(), PagingError> {
        self.pool.wait_until_free(name)?;
        let name = name.parse().map_err(|_| BenchError::Guest(name.to_owned()))?;
        Ok(self.pool.pool().free_tree(&name).map_err(BenchError::from)?)
    }

    fn walked(&self, part: Part, limits: Option<&Limits>) -> Result<LegResult, PagingError> {
        let processes = limits.map(|limits| limits.group.processes());
        let mut worker = Worker::start(&Spec { part, processes, sample_ms: SAMPLE_MS })?;
        let limit = limits.map(Limits::impose).transpose()?;
        worker.go()?;
        let (first, last) = self.counted(&mut worker)?;
        let seconds = Duration::from_nanos(last.at_ns - first.at_ns).as_secs_f64();
        let per_second = |first: u64, last: u64| Some(last.saturating_sub(first) as f64 / seconds);
        let rate = |of: fn(&Sample) -> u64| per_second(of(&first), of(&last));
        let paged = |of: fn(&PagingStatus) -> u64| {
            let (first, last) = first.paged.as_ref().zip(last.paged.as_ref())?;
            per_second(of(&first.counts), of(&last.counts))
        };
        Ok(LegResult {
            pages_per_second: rate(|sample| sample.accesses),
            pages_per_cpu_second: per_cpu_second(&first, &last),
            major_faults_per_second: rate(|sample| sample.major),
            minor_faults_per_second: rate(|sample| sample.minor),
            hard_faults_per_second: paged(|counts| counts.hard_faults),
            soft_faults_per_second: paged(|counts| counts.soft_faults),
            read_ahead_per_second: paged(|counts| counts.read_ahead),
            limit,
            warm_up_ms: Some(first.at_ns / 1_000_000),
            ..LegResult::none(Leg::Process)
        })
    }

    /// The samples between which time counts. They are further apart than was asked for where nothing at all was done by then, as on a machine that
    /// is busy with other things.
    fn counted(&self, worker: &mut Worker) -> Result<(Sample, Sample), PagingError> {
        let first = self.warm_up(worker)?;
        loop {
            let sample = worker.sample()?;
            let took = Duration::from_nanos(sample.at_ns - first.at_ns);
            let done = sample.accesses > first.accesses;
            if done && took >= Duration::from_millis(self.plan.length_ms.max(1)) {
                return Ok((first, sample));
            }
            if !done && took > WARM_UP_MOST {
                return Err(BenchError::Guest(format!("no access within {WARM_UP_MOST:?}")).into());
            }
        }
    }

    /// Waits until time counts. Returns the last sample before that.
    fn warm_up(&self, worker: &mut Worker) -> Result<Sample, PagingError> {
        let once = u64::from(self.workload.pages) * u64::from(self.workload.rounds);
        let mut through = None;
        loop {
            let sample = worker.sample()?;
            if sample.accesses >= once && through.is_none() {
                through = Some(sample.at_ns);
            }
            if through.is_some_and(|at| sample.at_ns >= at + self.plan.warm_up_ms * 1_000_000) {
                return Ok(sample);
            }
            if Duration::from_nanos(sample.at_ns) > WARM_UP_MOST {
                let done = sample.accesses;
                return Err(BenchError::Guest(format!("{done} of {once} accesses within {WARM_UP_MOST:?}")).into());
            }
        }
    }
}

fn per_cpu_second(first: &Sample, last: &Sample) -> Option<f64> {
    let spent = last.cpu_ns.saturating_sub(first.cpu_ns);
    let seconds = Duration::from_nanos(spent).as_secs_f64();
    (spent > 0).then(|| last.accesses.saturating_sub(first.accesses) as f64 / seconds)
}

impl LegResult {
    /// Of a leg that failed, or is not permitted.
    ///
    /// # Errors
    /// The bench itself cannot go on.
    fn why_not(error: PagingError) -> Result<Self, PagingError> {
        match error {
            PagingError::Absent(why) => Ok(Self { absent: Some(why.to_string()), ..Self::none(Leg::Process) }),
            PagingError::Bench(BenchError::Guest(why)) => Ok(Self { failed: Some(why), ..Self::none(Leg::Process) }),
            error => Err(error),
        }
    }

    fn none(leg: Leg) -> Self {
        Self {
            leg,
            absent: None,
            failed: None,
            pages_per_second: None,
            pages_per_cpu_second: None,
            major_faults_per_second: None,
            minor_faults_per_second: None,
            hard_faults_per_second: None,
            soft_faults_per_second: None,
            read_ahead_per_second: None,
            limit: None,
            warm_up_ms: None,
        }
    }
}

/// The guest `pages` with a list of its own.
pub(super) fn guest_config(
    memory: ByteSize,
    ram: Option<ByteSize>,
    medium: Option<MediumKind>,
    list: PathBuf,
    pages: u32,
) -> VmConfig {
    VmConfig {
        memory,
        ram,
        medium,
        kernel: Kernel::GuestWith { guest: "pages".to_owned(), initrd: list },
        cmdline: format!("pages={pages} every=0"),
        serial: SerialTarget::None,
        ..VmConfig::default()
    }
}

/// A cgroup, and swap where it is asked for; dropped, both go.
struct Limits {
    group: MemoryGroup,
    /// Bytes beyond what a process has in the beginning.
    beyond: u64,
    _guard: Guard,
}

impl Limits {
    fn set_up(pool: &BenchPool, swap: Option<(&Path, u64)>, beyond: u64) -> Result<Self, PagingError> {
        let group = MemoryGroup::create(&format!("perdure-bench-{}", std::process::id()))?;
        let leftovers = Leftovers {
            group: Some(group.directory().to_owned()),
            swap: swap.map(|(path, _)| path.to_owned()),
            pool: pool.directory().to_owned(),
        };
        let limits = Self { group, beyond, _guard: Guard::start(&leftovers)? };
        if let Some((path, bytes)) = swap {
            swap::add(path, bytes)?;
        }
        Ok(limits)
    }

    /// From now on. Returns the limit.
    fn impose(&self) -> Result<u64, PagingError> {
        let bytes = self.beyond.saturating_add(self.group.usage()?);
        self.group.limit(bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ram: u64) -> Plan {
        let (write_percent, rounds, seed) = (30, 4, 1);
        Plan {
            ram: ByteSize(ram),
            medium: None,
            write_percent,
            rounds,
            seed,
            overhead: ByteSize(0),
            warm_up_ms: 1,
            length_ms: 1,
        }
    }

    #[test]
    fn a_working_set_fills_the_memory_beside_its_list_and_no_more() {
        for ram in [1 << 20, 128 << 20, 2 << 30] {
            let plan = plan(ram);
            let memory = plan.memory();
            let workload = plan.workload(Pattern::Uniform, memory).unwrap();
            let list = u64::from(workload.pages) * u64::from(workload.rounds) * 4;
            let all = u64::from(workload.pages) * 4100 + list + (2 << 20) + SPARE;
            assert!(all <= memory.0 && all + (1 << 20) > memory.0, "{ram}: {all} of {memory}");
        }
        assert!(plan(4096).workload(Pattern::Uniform, ByteSize(4 << 12)).is_err());
    }
}
