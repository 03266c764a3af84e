//! What a pager costs a guest that fits in its RAM.
//!
//! That is a per cent or so, less than by what a CPU that others use as well differs from second to second. So two guests walk the same list, one
//! with a pager and one without, and take turns of [`SLICE`]: one's process is stopped while the other's goes on. Two slices that follow one
//! another make a pair, whose ratio of pages a second *of processor time* counts; which of them is first alternates. What is told is the
//! median of all pairs, and the quartiles between which half of them lie. As two VMs differ by where their memory happens to lie, too,
//! there are several pairs of VMs.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::worker::{Spec, Worker};
use super::{BenchPool, Leg, LegResult, PagingError, SAMPLE_MS, Sample, VM, Walk, per_cpu_second};
use crate::machine::config::ByteSize;

/// How long one goes on.
pub const SLICE: Duration = Duration::from_millis(300);
/// Of that, so much does not count: what it told before it was stopped is still under way, and the other one has used the caches.
const SETTLE: Duration = Duration::from_millis(60);
/// Pairs of VMs.
const PAIRS_OF_VMS: u32 = 8;
/// Pairs of slices of each, at least.
const PAIRS_LEAST: u128 = 2;

/// What a pager costs where all fits, in per cent of pages a second of processor time; less than nothing: it went quicker with a pager.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overhead {
    /// The median of all pairs of slices.
    pub percent: f64,
    /// A quarter of them is at most the first, a quarter at least the second.
    pub quartiles: [f64; 2],
    /// How many there are.
    pub pairs: usize,
    /// The median of each pair of VMs.
    pub of_vms: Vec<f64>,
    /// Processor time of the pager's own threads, in per cent of that of the VM's process.
    pub threads_percent: f64,
}

impl Overhead {
    /// Of ratios with a pager to without, for each pair of VMs; `None` if there are none.
    fn of(ratios: &[Vec<f64>], with: &Sum) -> Option<Self> {
        let costs = |ratios: &[f64]| ratios.iter().map(|ratio| (1.0 - ratio) * 100.0).collect::<Vec<_>>();
        let all = costs(&ratios.concat());
        let of_vms = ratios.iter().filter_map(|ratios| quantile(costs(ratios), 2)).collect();
        let threads_percent = 100.0 * with.pager_seconds / with.cpu_seconds.max(f64::MIN_POSITIVE);
        let (low, high) = (quantile(all.clone(), 1)?, quantile(all.clone(), 3)?);
        Some(Self {
            percent: quantile(all.clone(), 2)?,
            quartiles: [low, high],
            pairs: all.len(),
            of_vms,
            threads_percent,
        })
    }
}

/// So many quarters of the values are at most this (nearest rank).
fn quantile(mut values: Vec<f64>, quarters: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get((values.len() * quarters).div_ceil(4).saturating_sub(1)).copied()
}

/// What one side did in its slices, all in all.
#[derive(Debug, Clone, Default)]
pub(super) struct Sum {
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
    pub(super) pager_seconds: f64,
    pub(super) accesses: u64,
    pub(super) hard_faults: u64,
    pub(super) soft_faults: u64,
}

impl Sum {
    fn add(&mut self, (first, last): &(Sample, Sample)) {
        self.seconds += Duration::from_nanos(last.at_ns - first.at_ns).as_secs_f64();
        self.cpu_seconds += Duration::from_nanos(last.cpu_ns - first.cpu_ns).as_secs_f64();
        self.pager_seconds += Duration::from_nanos(last.pager_ns.saturating_sub(first.pager_ns)).as_secs_f64();
        self.accesses += last.accesses.saturating_sub(first.accesses);
        if let Some((first, last)) = first.paged.zip(last.paged) {
            self.hard_faults += last.counts.hard_faults.saturating_sub(first.counts.hard_faults);
            self.soft_faults += last.counts.soft_faults.saturating_sub(first.counts.soft_faults);
        }
    }

    fn result(&self, leg: Leg) -> LegResult {
        let per_second = |count: u64| Some(count as f64 / self.seconds);
        let paged = |count| per_second(count).filter(|_| leg == Leg::FitsPaged);
        LegResult {
            pages_per_second: per_second(self.accesses),
            pages_per_cpu_second: Some(self.accesses as f64 / self.cpu_seconds),
            hard_faults_per_second: paged(self.hard_faults),
            soft_faults_per_second: paged(self.soft_faults),
            ..LegResult::none(leg)
        }
    }
}

/// Measures both legs over one list.
///
/// # Errors
/// [`PagingError`].
pub(super) fn measure(walk: &Walk<'_>) -> Result<([LegResult; 2], Option<Overhead>), PagingError> {
    let (mut without, mut with) = (Sum::default(), Sum::default());
    // A pool for each: a VM may be halted while it has its pool's table of the budget of RAM, which the other would wait for.
    let pool = |name| BenchPool::create(&walk.pool.directory().join(name));
    let pools = [pool("fits")?, pool("fits-paged")?];
    let walks = pools.each_ref().map(|pool| walk.inside(pool));
    let mut ratios = Vec::new();
    for _ in 0..PAIRS_OF_VMS {
        ratios.push(pair_of_vms(&walks, &mut without, &mut with)?);
    }
    Ok(([without.result(Leg::Fits), with.result(Leg::FitsPaged)], Overhead::of(&ratios, &with)))
}

fn pair_of_vms(walks: &[Walk<'_>; 2], without: &mut Sum, with: &mut Sum) -> Result<Vec<f64>, PagingError> {
    let ratios = in_turns(walks, without, with);
    // Both, and the first thing that went wrong is what is told.
    let removed = walks.each_ref().map(|walk| walk.remove_guest(VM));
    let ratios = ratios?;
    removed.into_iter().collect::<Result<Vec<_>, _>>().map(|_| ratios)
}

fn in_turns(walks: &[Walk<'_>; 2], without: &mut Sum, with: &mut Sum) -> Result<Vec<f64>, PagingError> {
    let [plain, paged] = walks;
    let plan = plain.plan;
    let (mut plain, mut paged) = (warmed(plain, None)?, warmed(paged, Some(plan.ram))?);
    let pairs = (u128::from(plan.length_ms) / SLICE.as_millis() / 2).max(PAIRS_LEAST);
    let mut ratios = Vec::new();
    for pair in 0..pairs {
        let (one, other);
        if pair % 2 == 0 {
            one = slice(&mut plain)?;
            other = slice(&mut paged)?;
        } else {
            other = slice(&mut paged)?;
            one = slice(&mut plain)?;
        }
        without.add(&one);
        with.add(&other);
        let rates = per_cpu_second(&other.0, &other.1).zip(per_cpu_second(&one.0, &one.1));
        ratios.extend(rates.map(|(with, without)| with / without));
    }
    Ok(ratios)
}

/// A guest that has gone through its list, and stands still.
fn warmed(walk: &Walk<'_>, ram: Option<ByteSize>) -> Result<Worker, PagingError> {
    let part = walk.make_guest(VM, ram)?;
    let mut worker = Worker::start(&Spec { part, processes: None, sample_ms: SAMPLE_MS })?;
    worker.go()?;
    walk.warm_up(&mut worker)?;
    worker.halt()?;
    Ok(worker)
}

/// Lets one go on for a slice. Returns what counts of it.
fn slice(worker: &mut Worker) -> Result<(Sample, Sample), PagingError> {
    worker.forget();
    worker.go_on()?;
    let began = Instant::now();
    let mut first: Option<Sample> = None;
    loop {
        let sample = worker.sample()?;
        let passed = began.elapsed();
        if passed < SETTLE {
            continue;
        }
        let first = *first.get_or_insert(sample);
        if passed >= SLICE && sample.cpu_ns > first.cpu_ns && sample.accesses > first.accesses {
            worker.halt()?;
            return Ok((first, sample));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_quartiles_are_of_all_pairs() {
        let overhead = Overhead::of(&[vec![1.0, 0.98, 0.97], vec![0.99, 1.01]], &Sum::default()).unwrap();
        let rounded = |percent: f64| percent.round();
        assert_eq!((rounded(overhead.percent), overhead.pairs), (1.0, 5));
        assert_eq!(overhead.quartiles.map(rounded), [0.0, 2.0]);
        assert_eq!(overhead.of_vms.iter().map(|percent| percent.round()).collect::<Vec<_>>(), [2.0, -1.0]);
        assert_eq!(Overhead::of(&[Vec::new()], &Sum::default()), None);
    }

    #[test]
    fn rates_are_of_the_time_that_counts() {
        let sample = |at_ns, cpu_ns, accesses| Sample {
            at_ns,
            accesses,
            major: 0,
            minor: 0,
            cpu_ns,
            pager_ns: cpu_ns / 100,
            paged: None,
            restored: None,
        };
        let mut sum = Sum::default();
        sum.add(&(sample(0, 0, 0), sample(1_000_000_000, 500_000_000, 100)));
        // It stood still in between.
        sum.add(&(sample(7_000_000_000, 500_000_000, 100), sample(8_000_000_000, 1_000_000_000, 400)));
        let result = sum.result(Leg::Fits);
        assert_eq!((result.pages_per_second, result.pages_per_cpu_second), (Some(200.0), Some(400.0)));
        assert_eq!(result.soft_faults_per_second, None);
        let overhead = Overhead::of(&[vec![1.0]], &sum).unwrap();
        assert_eq!((overhead.percent, overhead.threads_percent.round()), (0.0, 1.0));
    }
}
