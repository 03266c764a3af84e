//! What it costs a guest that its freezes fit into a hold-up, and whether they do.
//!
//! The same guest, which writes to pages of its working set as fast as it can, runs without a bound on what is dirty, then with each
//! hold-up, then without once more; its speed with a hold-up is a ratio of that without, in the same run. In between the power fails again and
//! again, at moments that the guest does not know, and comes back.

use std::time::{Duration, Instant};

use guests::random::SplitMix64;
use serde::Serialize;

use super::{BenchError, BenchPool, Distribution, Shape, power_fail};
use crate::machine::config::{ByteSize, VmConfig};
use crate::machine::time::nanoseconds;
use crate::persistence::freeze::FreezeSteps;
use crate::persistence::holdup::HoldUpStatus;
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::terminal::Keyboard;
use crate::supervisor::{Supervisor, SupervisorError};

/// Touches of pages between two reports of the guest.
const REPORT: u64 = 256;
/// How long the guest may take to write to each page for the first time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two power failures, at most.
const APART: Duration = Duration::from_millis(60);

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct HoldUpResult {
    /// The VM.
    pub shape: Shape,
    /// What the guest writes to.
    pub working_set: ByteSize,
    /// In which order.
    pub pattern: String,
    /// The hold-up, in nanoseconds; `None`: what is dirty is not bounded.
    pub holdup_ns: Option<u64>,
    /// Why the VM was not started with it.
    pub refused: Option<String>,
    /// Pages that the guest wrote to in a second.
    pub touches_per_second: f64,
    /// The same as a part of that without a hold-up.
    pub speed: Option<f64>,
    /// Bytes that were dirty at the freezes, where that is known: the median, and the most.
    pub unflushed_p50: Option<u64>,
    /// The most.
    pub unflushed_max: Option<u64>,
    /// From the signal until everything is durable.
    pub freeze: Distribution,
    /// What the longest of them spent its time on.
    pub worst: FreezeSteps,
    /// Freezes that were done within the hold-up, in per cent.
    pub met: Option<f64>,
    /// How the budget stood in the end.
    pub budget: Option<HoldUpStatus>,
}

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The VM.
    pub shape: Shape,
    /// What the guest writes to.
    pub working_set: ByteSize,
    /// In which order, as `memwalk` names it.
    pub pattern: String,
    /// The hold-ups.
    pub holdups: Vec<Duration>,
    /// For how long the speed is measured.
    pub length: Duration,
    /// Power failures, for each.
    pub freezes: usize,
}

/// Measures all of a plan.
///
/// # Errors
/// [`BenchError`].
pub fn measure(
    pool: &BenchPool,
    plan: &Plan,
    tell: &dyn Fn(Option<Duration>),
) -> Result<Vec<HoldUpResult>, BenchError> {
    let holdups = plan.holdups.iter().copied().map(Some);
    let mut results = Vec::new();
    for holdup in std::iter::once(None).chain(holdups).chain(std::iter::once(None)) {
        tell(holdup);
        results.push(one(pool, plan, holdup)?);
    }
    let without: Vec<f64> =
        results.iter().filter(|row| row.holdup_ns.is_none()).map(|row| row.touches_per_second).collect();
    let mean = without.iter().sum::<f64>() / without.len() as f64;
    for row in results.iter_mut().filter(|row| row.refused.is_none()) {
        row.speed = Some(row.touches_per_second / mean);
    }
    Ok(results)
}

fn one(pool: &BenchPool, plan: &Plan, holdup: Option<Duration>) -> Result<HoldUpResult, BenchError> {
    let name = "holdup";
    let cmdline = format!("pattern={} ws={} write=100 report={REPORT}", plan.pattern, plan.working_set.0);
    let holdup_us = holdup.map(|holdup| u64::try_from(holdup.as_micros()).unwrap_or(u64::MAX));
    let config = VmConfig { holdup_us, ..BenchPool::config(&plan.shape, "memwalk", &cmdline) };
    let regions = VmRegions::create(pool.pool(), name, &config)?;
    let mut result = HoldUpResult {
        shape: plan.shape,
        working_set: plan.working_set,
        pattern: plan.pattern.clone(),
        holdup_ns: holdup.map(nanoseconds),
        refused: None,
        touches_per_second: 0.0,
        speed: None,
        unflushed_p50: None,
        unflushed_max: None,
        freeze: Distribution::of(Vec::new()),
        worst: FreezeSteps::default(),
        met: None,
        budget: None,
    };
    match Supervisor::boot(pool.pool(), regions, Keyboard::none()) {
        Ok(mut supervisor) => {
            run(&mut supervisor, plan, holdup, &mut result)?;
            supervisor.close(false);
        }
        Err(SupervisorError::Regions(RegionsError::HoldUp(why))) => result.refused = Some(why.to_string()),
        Err(error) => return Err(error.into()),
    }
    pool.pool().free_tree(&name.parse().map_err(|_| BenchError::Guest(name.to_owned()))?)?;
    Ok(result)
}

fn run(
    supervisor: &mut Supervisor,
    plan: &Plan,
    holdup: Option<Duration>,
    result: &mut HoldUpResult,
) -> Result<(), BenchError> {
    // Each page has been touched by then, most likely: the first touch of each costs the host a page.
    let warm = 4 * plan.working_set.0 / 4096 / REPORT;
    let begun = Instant::now();
    while supervisor.reports() < warm {
        serve(supervisor, Duration::from_millis(10))?;
        if begun.elapsed() > PATIENCE {
            break;
        }
    }
    let (from, begun) = (supervisor.reports(), Instant::now());
    serve(supervisor, plan.length)?;
    result.touches_per_second = ((supervisor.reports() - from) * REPORT) as f64 / begun.elapsed().as_secs_f64();

    let (mut random, mut reports) = (SplitMix64::new(plan.working_set.0), Vec::new());
    for _ in 0..plan.freezes {
        let pause = random.below(nanoseconds(APART));
        serve(supervisor, Duration::from_nanos(pause))?;
        reports.push(power_fail(supervisor)?);
        supervisor.power_back()?;
    }
    let mut unflushed: Vec<u64> = reports.iter().filter_map(|report| report.bytes).collect();
    unflushed.sort_unstable();
    result.unflushed_p50 = unflushed.get(unflushed.len() / 2).copied();
    result.unflushed_max = unflushed.last().copied();
    result.freeze = Distribution::of(reports.iter().map(|report| report.total_ns).collect());
    let worst = reports.iter().max_by_key(|report| report.total_ns);
    result.worst = worst.map(|report| report.steps).unwrap_or_default();
    let met = |holdup: Duration| reports.iter().filter(|report| report.total_ns <= nanoseconds(holdup)).count();
    result.met = holdup.map(|holdup| 100.0 * met(holdup) as f64 / reports.len().max(1) as f64);
    result.budget = supervisor.budget();
    Ok(())
}

fn serve(supervisor: &mut Supervisor, length: Duration) -> Result<(), BenchError> {
    match supervisor.serve_a_while(length)? {
        None => Ok(()),
        Some(ended) => Err(BenchError::Guest(format!("it ended: {ended:?}"))),
    }
}
