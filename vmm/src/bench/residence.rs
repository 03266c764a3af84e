//! What of a guest's memory is in RAM around an outage, and how many page faults a second it takes, at a fixed workload: as Temporality
//! plots them.
//!
//! VMs with [`BEYOND`] times as much memory as RAM walk their lists to a steady state; then the power fails for all of them. Back they
//! come, each way from the same moment:
//!
//! | way | memory |
//! |---|---|
//! | `in-place` | resumed where it lies |
//! | `restored` | from a generation, before the VM runs; the time that takes counts |
//! | `lazily`, `lazily-on-demand` | from a generation while the VM runs, with and without prefetch |
//! | `from-swap` | in the swap region, but for the least of RAM: as after a start that reads nothing ahead |
//! | `cold` | none: the guest boots and builds its working set anew |
//!
//! Time begins where the VM's process can begin to resume, restore or boot it: the start of the process is no part of it, nor is
//! the outage. The *memory residence ratio* is that of clusters in RAM among those in RAM or swap, in per cent. *Faults* are those that waited for
//! the swap region, or for the generation that memory is restored from. A VM is *back* once, in a window of [`WINDOW`], its
//! faults an access are at most a quarter more and its pages a second at least three quarters of what they were on average before, its
//! residence is no more than two points from what it was, and all stay so for the next window. (Faults an access, since a machine that
//! has become quicker meanwhile takes more of them a second.)

use std::path::PathBuf;
use std::time::{Duration, Instant};

use allocator::MediumKind;
use serde::Serialize;
use snapshot::{GenerationId, Store};

use super::paging::worker::{Begin, Part, Spec, Worker};
use super::paging::{PagingError, Plan as PagingPlan, Sample, clean_up_behind, guest_config};
use super::patterns::{Pattern, Workload};
use super::{BenchError, BenchPool, lazy};
use crate::machine::config::ByteSize;
use crate::persistence::regions::VmRegions;
use crate::persistence::rollback::{Pages, keep, roll_back};
use crate::persistence::{generations, working_set};

pub use super::paging::BEYOND;

/// Over how long faults and pages are counted.
pub const WINDOW: Duration = Duration::from_millis(500);
const SAMPLE_MS: u64 = 100;
/// How long it may take to a steady state.
const WARM_UP_MOST: Duration = Duration::from_secs(300);

/// How a VM comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Resumed where it lies
    InPlace,
    /// From a generation, before it runs
    Restored,
    /// From a generation, while it runs, the rest being fetched too
    Lazily,
    /// From a generation, as it asks
    LazilyOnDemand,
    /// All in the swap region
    FromSwap,
    /// Booted
    Cold,
}

impl Way {
    /// All of them; the first one alone uses what the outage left.
    pub const ALL: [Self; 6] =
        [Self::InPlace, Self::Restored, Self::Lazily, Self::LazilyOnDemand, Self::FromSwap, Self::Cold];

    /// In words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InPlace => "resumed in place",
            Self::Restored => "restored, then run",
            Self::Lazily => "restored while it runs",
            Self::LazilyOnDemand => "restored on demand",
            Self::FromSwap => "all in swap",
            Self::Cold => "cold start",
        }
    }

    fn begin(self) -> Begin {
        match self {
            Self::InPlace | Self::Restored | Self::Lazily => Begin::Resume { prefetch: true },
            Self::LazilyOnDemand => Begin::Resume { prefetch: false },
            Self::FromSwap => Begin::ResumeFromSwap,
            Self::Cold => Begin::Boot,
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// RAM of all VMs together; each has [`BEYOND`] times its part as memory.
    pub ram: ByteSize,
    /// How many VMs share it.
    pub vms: u32,
    /// The ways back.
    pub ways: Vec<Way>,
    /// What regions lie on.
    pub medium: Option<MediumKind>,
    /// Per cent of accesses that write.
    pub write_percent: u32,
    /// Of the random numbers.
    pub seed: u64,
    /// How long it is observed before the outage, once it went through its list, in milliseconds.
    pub before_ms: u64,
    /// How long it is observed after it, in milliseconds.
    pub after_ms: u64,
}

/// A moment of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// Since it came back; before the outage less than 0, which is where the outage was.
    pub at_ms: f64,
    /// Memory residence ratio, in per cent.
    pub residence: f64,
    /// Clusters a second that the guest waited for.
    pub faults_per_second: f64,
    /// Clusters a second that were in RAM when the guest asked.
    pub soft_faults_per_second: f64,
    /// Accesses a second.
    pub pages_per_second: f64,
}

/// A VM over a while, on average, but for its residence, which is that of the end.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Level {
    /// Memory residence ratio, in per cent.
    pub residence: f64,
    /// Faults a second.
    pub faults_per_second: f64,
    /// Accesses a second.
    pub pages_per_second: f64,
}

/// How a VM came back in one way.
#[derive(Debug, Clone, Serialize)]
pub struct Return {
    /// Which.
    pub way: Way,
    /// Why it cannot; all else is empty then.
    pub absent: Option<String>,
    /// How long a restore took before it ran, in milliseconds.
    pub restore_ms: Option<f64>,
    /// The residence with which it came back, and the first rates.
    pub at_outage: Option<Point>,
    /// Over the second half of what was observed.
    pub after: Option<Level>,
    /// When it was as before, in milliseconds; none if it was not in what was observed.
    pub back_ms: Option<f64>,
    /// All moments.
    pub series: Vec<Point>,
}

/// One VM of one row of results.
#[derive(Debug, Clone, Serialize)]
pub struct VmResult {
    /// Its name.
    pub name: String,
    /// Before the outage.
    pub before: Level,
    /// All moments before the outage.
    pub series_before: Vec<Point>,
    /// How long its freeze took, in milliseconds.
    pub freeze_ms: f64,
    /// Ways back.
    pub returns: Vec<Return>,
}

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct ResidenceResult {
    /// The plan.
    pub plan: Plan,
    /// What each VM walks; each with a seed of its own.
    pub workload: Workload,
    /// The VMs.
    pub vms: Vec<VmResult>,
}

/// Measures one pattern: to a steady state, an outage, and back in each way.
///
/// # Errors
/// [`PagingError`]; never for a way that there is not.
pub fn measure(pool: &BenchPool, plan: &Plan, pattern: Pattern) -> Result<ResidenceResult, PagingError> {
    let _guard = clean_up_behind(pool)?;
    let vms =
        (0..plan.vms.max(1)).map(|index| Vm::create(pool, plan, pattern, index)).collect::<Result<Vec<_>, _>>()?;
    let workload = vms.first().map(|vm| vm.workload).ok_or_else(|| BenchError::Guest("no VM".to_owned()))?;
    let mut results = outage(&vms, plan)?;
    let kept = vms.iter().map(Vm::keep).collect::<Result<Vec<_>, _>>()?;
    for way in Way::ALL.into_iter().filter(|way| plan.ways.contains(way)) {
        come_back(&vms, &kept, plan, way, &mut results)?;
    }
    vms.iter().try_for_each(Vm::remove)?;
    Ok(ResidenceResult { plan: plan.clone(), workload, vms: results })
}

/// One VM of the bench.
struct Vm<'a> {
    pool: &'a BenchPool,
    name: String,
    workload: Workload,
    config: crate::machine::config::VmConfig,
}

impl<'a> Vm<'a> {
    fn create(pool: &'a BenchPool, plan: &Plan, pattern: Pattern, index: u32) -> Result<Self, PagingError> {
        let ram = ByteSize(plan.ram.0 / u64::from(plan.vms.max(1)) / 4096 * 4096);
        let paging = PagingPlan {
            ram,
            medium: plan.medium,
            write_percent: plan.write_percent,
            rounds: 4,
            seed: plan.seed + u64::from(index),
            overhead: ByteSize(0),
            warm_up_ms: 0,
            length_ms: 0,
        };
        let workload = paging.workload(pattern, paging.memory())?;
        let list: PathBuf = pool.directory().join(format!("list-{index}"));
        let system = |source| BenchError::System { doing: "write the list", source };
        std::fs::write(&list, workload.list()?.to_bytes()).map_err(system)?;
        let config = guest_config(paging.memory(), Some(ram), plan.medium, list, workload.pages);
        let vm = Self { pool, name: format!("residence-{index}"), workload, config };
        vm.make()?;
        Ok(vm)
    }

    fn make(&self) -> Result<(), PagingError> {
        drop(VmRegions::create(self.pool.pool(), &self.name, &self.config).map_err(BenchError::from)?);
        Ok(())
    }

    fn worker(&self, begin: Begin) -> Result<Worker, PagingError> {
        let part = Part::Guest { pool: self.pool.directory().to_owned(), name: self.name.clone(), begin };
        Worker::start(&Spec { part, processes: None, sample_ms: SAMPLE_MS })
    }

    fn free_regions(&self) -> Result<(), PagingError> {
        self.pool.wait_until_free(&self.name)?;
        let name = self.name.parse().map_err(|_| BenchError::Guest(self.name.clone()))?;
        Ok(self.pool.pool().free_tree(&name).map_err(BenchError::from)?)
    }

    fn remove(&self) -> Result<(), PagingError> {
        self.free_regions()?;
        let system = |source| BenchError::System { doing: "remove the store of generations", source };
        Ok(std::fs::remove_dir_all(generations::store_dir(self.pool.directory(), &self.name)).map_err(system)?)
    }

    fn regions(&self) -> Result<VmRegions, PagingError> {
        self.pool.wait_until_free(&self.name)?;
        Ok(VmRegions::open(self.pool.pool(), &self.name).map_err(BenchError::from)?)
    }

    /// A generation of the moment of the outage.
    fn keep(&self) -> Result<(Store, GenerationId), PagingError> {
        let regions = self.regions()?;
        let other = |error: &dyn std::error::Error| BenchError::Guest(crate::supervisor::Chain(error).to_string());
        let store = generations::open(self.pool.directory(), &self.name, &regions.config().generations);
        let store = store.map_err(|error| other(&error))?;
        let kept = keep(&store, &regions, "bench").map_err(|error| other(&error))?;
        Ok((store, kept.id))
    }

    /// Makes it ready to begin in this way. Returns how long that took of what counts.
    fn prepare(
        &self,
        (store, generation): &(Store, GenerationId),
        way: Way,
    ) -> Result<Result<Duration, String>, PagingError> {
        if way == Way::InPlace {
            return Ok(Ok(Duration::ZERO));
        }
        if way == Way::Cold {
            self.free_regions()?;
            self.make()?;
            return Ok(Ok(Duration::ZERO));
        }
        let mut regions = self.regions()?;
        let _ = std::fs::remove_file(working_set::path(self.pool.directory(), &self.name));
        lazy::evict(&generations::store_dir(self.pool.directory(), &self.name))?;
        let began = Instant::now();
        let mut progress = |_, _| {};
        let mut pages =
            if matches!(way, Way::Lazily | Way::LazilyOnDemand) { Pages::Later } else { Pages::Now(&mut progress) };
        match roll_back(store, &mut regions, generation, true, &mut pages) {
            Ok(_) if way == Way::FromSwap => Ok(Ok(Duration::ZERO)),
            Ok(_) => Ok(Ok(began.elapsed())),
            Err(error) => Ok(Err(crate::supervisor::Chain(&error).to_string())),
        }
    }
}

/// Runs the VMs to a steady state and lets the power fail for all of them.
fn outage(vms: &[Vm<'_>], plan: &Plan) -> Result<Vec<VmResult>, PagingError> {
    let mut workers = vms.iter().map(|vm| vm.worker(Begin::Boot)).collect::<Result<Vec<_>, _>>()?;
    workers.iter_mut().try_for_each(Worker::go)?;
    let mut seen = vec![Vec::new(); vms.len()];
    // Until the last of them has gone through its list, and for a while from then on.
    let (mut through, began) = (vec![false; vms.len()], Instant::now());
    let mut steady = None;
    while steady.is_none_or(|since: Instant| since.elapsed() < Duration::from_millis(plan.before_ms)) {
        for (((worker, seen), vm), through) in workers.iter_mut().zip(&mut seen).zip(vms).zip(&mut through) {
            let sample = worker.sample()?;
            *through |= sample.accesses >= u64::from(vm.workload.pages) * u64::from(vm.workload.rounds);
            seen.push(sample);
        }
        if steady.is_none() && through.iter().all(|through| *through) {
            steady = Some(Instant::now());
            seen.iter_mut().for_each(Vec::clear);
        }
        if began.elapsed() > WARM_UP_MOST {
            return Err(BenchError::Guest(format!("no steady state within {WARM_UP_MOST:?}")).into());
        }
    }
    let frozen = workers.into_iter().map(Worker::power_fail).collect::<Result<Vec<_>, _>>()?;
    let result = |((vm, seen), frozen): ((&Vm<'_>, &Vec<Sample>), u64)| {
        let end = seen.last().map_or(0, |sample| sample.at_ns) as f64 / 1e6;
        let series_before = points(seen, -end);
        let before = level(&series_before);
        VmResult { name: vm.name.clone(), before, series_before, freeze_ms: frozen as f64 / 1e6, returns: Vec::new() }
    };
    Ok(vms.iter().zip(&seen).zip(frozen).map(result).collect())
}

/// Brings all VMs back in one way, and observes them.
fn come_back(
    vms: &[Vm<'_>],
    kept: &[(Store, GenerationId)],
    plan: &Plan,
    way: Way,
    results: &mut [VmResult],
) -> Result<(), PagingError> {
    let mut prepared = Vec::new();
    for (vm, kept) in vms.iter().zip(kept) {
        prepared.push(vm.prepare(kept, way)?);
    }
    if let Some(Err(why)) = prepared.iter().find(|prepared| prepared.is_err()) {
        results.iter_mut().for_each(|result| result.returns.push(Return::absent(way, why)));
        return Ok(());
    }
    // One after the other: the last one has waited for all.
    let waited: Duration = prepared.iter().flatten().sum();
    let mut workers = vms.iter().map(|vm| vm.worker(way.begin())).collect::<Result<Vec<_>, _>>()?;
    workers.iter_mut().try_for_each(Worker::go)?;
    let mut seen = vec![Vec::new(); vms.len()];
    let first = |seen: &[Sample]| seen.first().map_or(0, |sample| sample.at_ns);
    let observed = |seen: &[Sample]| seen.last().map_or(0, |sample| sample.at_ns) - first(seen);
    while seen.iter().any(|seen| observed(seen) < plan.after_ms * 1_000_000) {
        for (worker, seen) in workers.iter_mut().zip(&mut seen) {
            seen.push(worker.sample()?);
        }
    }
    drop(workers);
    let waited_ms = waited.as_secs_f64() * 1e3;
    for (result, seen) in results.iter_mut().zip(&seen) {
        let series = points(seen, waited_ms);
        result.returns.push(Return {
            restore_ms: (waited > Duration::ZERO).then_some(waited_ms),
            at_outage: at_outage(seen, &series),
            after: series.get(series.len() / 2..).map(level),
            back_ms: back(&result.before, &series),
            series,
            ..Return::absent(way, "")
        });
    }
    Ok(())
}

/// The residence with which it came, and the first rates.
fn at_outage(samples: &[Sample], series: &[Point]) -> Option<Point> {
    let (sample, point) = (samples.first()?, series.first()?);
    Some(Point { residence: residence(sample), ..*point })
}

impl Return {
    fn absent(way: Way, why: &str) -> Self {
        let absent = (!why.is_empty()).then(|| why.to_owned());
        Self { way, absent, restore_ms: None, at_outage: None, after: None, back_ms: None, series: Vec::new() }
    }
}

/// The residence that a sample tells.
fn residence(sample: &Sample) -> f64 {
    match (sample.paged, sample.restored) {
        (Some(paged), _) => paged.residence,
        (None, Some((present, clusters))) => present as f64 * 100.0 / (clusters as f64).max(1.0),
        (None, None) => 100.0,
    }
}

/// Moments from samples, each with the rates of the window that ends with it, or of what there is of one. Times begin at `offset_ms`.
fn points(samples: &[Sample], offset_ms: f64) -> Vec<Point> {
    let window = u64::try_from(WINDOW.as_nanos()).unwrap_or(u64::MAX);
    let point = |(index, now): (usize, &Sample)| {
        let mut earlier = samples.iter().take(index);
        let from = earlier.find(|then| then.at_ns + window >= now.at_ns)?;
        let seconds = (now.at_ns - from.at_ns) as f64 / 1e9;
        let rate = |of: fn(&Sample) -> u64| of(now).saturating_sub(of(from)) as f64 / seconds.max(1e-9);
        Some(Point {
            at_ms: now.at_ns as f64 / 1e6 + offset_ms,
            residence: residence(now),
            faults_per_second: rate(|sample| sample.paged.map_or(sample.major, |paged| paged.counts.awaited())),
            soft_faults_per_second: rate(|sample| sample.paged.map_or(0, |paged| paged.counts.soft_faults)),
            pages_per_second: rate(|sample| sample.accesses),
        })
    };
    samples.iter().enumerate().filter_map(point).collect()
}

/// On average, but for the residence.
fn level(series: &[Point]) -> Level {
    let count = (series.len() as f64).max(1.0);
    let mean = |of: fn(&Point) -> f64| series.iter().map(of).sum::<f64>() / count;
    Level {
        residence: series.last().map_or(0.0, |point| point.residence),
        faults_per_second: mean(|point| point.faults_per_second),
        pages_per_second: mean(|point| point.pages_per_second),
    }
}

/// When a VM is as it was; see the module.
fn back(before: &Level, series: &[Point]) -> Option<f64> {
    let as_before = |point: &Point| {
        // Multiplied out, as either may be 0.
        point.faults_per_second * before.pages_per_second <= before.faults_per_second * point.pages_per_second * 1.25
            && point.pages_per_second >= before.pages_per_second * 0.75
            && (point.residence - before.residence).abs() <= 2.0
    };
    let window = WINDOW.as_secs_f64() * 1e3;
    let stays = |(index, point): (usize, &Point)| {
        let rest = series.get(index..)?;
        let seen = rest.last().is_some_and(|last| last.at_ms >= point.at_ms + window);
        let next = rest.iter().take_while(|next| next.at_ms <= point.at_ms + window);
        (seen && next.into_iter().all(as_before)).then_some(point.at_ms)
    };
    series.iter().enumerate().find_map(stays)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: u64, accesses: u64, major: u64) -> Sample {
        Sample {
            at_ns: at_ms * 1_000_000,
            accesses,
            major,
            minor: 0,
            cpu_ns: 0,
            pager_ns: 0,
            paged: None,
            restored: Some((at_ms, 1000)),
        }
    }

    fn point(at_ms: f64, residence: f64, faults: f64, pages: f64) -> Point {
        Point { at_ms, residence, faults_per_second: faults, soft_faults_per_second: 0.0, pages_per_second: pages }
    }

    #[test]
    fn rates_are_those_of_the_window_before_a_sample() {
        let samples: Vec<_> = (1..=20).map(|i| sample(i * 100, i * i * 10, i * 3)).collect();
        let points = points(&samples, 50.0);
        assert_eq!(points.len(), 19, "the first sample has none before it");
        let last = points.last().unwrap();
        assert_eq!((last.at_ms, last.residence), (2050.0, 200.0));
        assert!((last.pages_per_second - f64::from(20 * 20 * 10 - 15 * 15 * 10) / 0.5).abs() < 1e-6);
        assert!((last.faults_per_second - 30.0).abs() < 1e-6);
    }

    #[test]
    fn a_vm_is_back_when_all_is_as_before_and_stays_so() {
        let before = Level { residence: 25.0, faults_per_second: 100.0, pages_per_second: 1000.0 };
        let at = |i: u32| f64::from(i) * 100.0;
        let good = |i| point(at(i), 25.0, 110.0, 900.0);
        let all: Vec<_> = (0..20).map(good).collect();
        assert_eq!(back(&before, &all), Some(0.0));
        let quicker: Vec<_> = (0..20).map(|i| point(at(i), 25.0, 300.0, 3000.0)).collect();
        assert_eq!(back(&before, &quicker), Some(0.0));
        for bad in
            [point(at(9), 22.0, 110.0, 900.0), point(at(9), 25.0, 130.0, 900.0), point(at(9), 25.0, 110.0, 700.0)]
        {
            let mut series = all.clone();
            series[9] = bad;
            assert_eq!(back(&before, &series), Some(0.0), "what was as before for a window counts");
            series[3] = Point { at_ms: at(3), ..bad };
            assert_eq!(back(&before, &series[..20]), Some(at(10)));
            assert_eq!(back(&before, &series[..15]), None, "too little is seen of what follows");
        }
        assert_eq!(back(&before, &[]), None);
    }

    #[test]
    fn the_residence_at_the_outage_is_that_of_the_first_sample() {
        let samples = [sample(5, 0, 0), sample(105, 100, 7)];
        let at = at_outage(&samples, &points(&samples, 0.0)).unwrap();
        assert_eq!((at.residence, at.faults_per_second.round()), (0.5, 70.0));
        assert_eq!(at_outage(&[], &[]), None);
    }

    #[test]
    fn levels_are_means_and_the_last_residence() {
        let level = level(&[point(0.0, 10.0, 1.0, 5.0), point(1.0, 20.0, 3.0, 7.0)]);
        assert_eq!(level, Level { residence: 20.0, faults_per_second: 2.0, pages_per_second: 6.0 });
    }
}
