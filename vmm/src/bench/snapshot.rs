//! How long a guest stands for a generation, and how long until that is durable.
//!
//! The guest writes its working set round and round, and does not stop for us: between two generations each page of it is written
//! at least once, and in the pause all of them are dirty. The first generation looks at all of memory and is told apart.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{BenchError, BenchPool, Distribution, Shape};
use crate::machine::config::ByteSize;
use crate::persistence::capture::{CaptureReport, PauseSteps};
use crate::persistence::generations::store_dir;
use crate::supervisor::Supervisor;
use crate::supervisor::terminal::Keyboard;

/// How long the guest may take to write its memory once.
const PATIENCE: Duration = Duration::from_secs(60);

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotResult {
    /// The VM.
    pub shape: Shape,
    /// How much memory the guest writes between two generations.
    pub dirty: ByteSize,
    /// The first generation, which looks at every page.
    pub first: CaptureReport,
    /// How long the guest stood, with everything in it.
    pub pause: Distribution,
    /// From its end until the generation is durable.
    pub store: Distribution,
    /// The median of each step of the pause.
    pub steps: PauseSteps,
    /// The 99th percentile of each step.
    pub steps_p99: PauseSteps,
    /// The median of pages that were copied in the pause.
    pub pages: u64,
    /// The median of pages that were copied before it.
    pub pages_before: u64,
    /// The median of bytes that the store grew by.
    pub bytes_stored: u64,
}

/// Measures `runs` incremental generations of one VM, after a full one.
///
/// # Errors
/// [`BenchError`].
pub fn measure(pool: &BenchPool, shape: Shape, dirty: ByteSize, runs: usize) -> Result<SnapshotResult, BenchError> {
    let name = format!("snapshot-{}-{}-{dirty}", shape.cpus, shape.memory);
    let pages = (dirty.0 / 4096).max(1);
    let cmdline = format!("pattern=sequential ws={} write=100 report={pages}", pages * 4096);
    let regions = pool.vm(&name, &shape, "memwalk", &cmdline)?;
    let mut supervisor = Supervisor::boot(pool.pool(), regions, Keyboard::none())?;
    wait_for_dirt(&supervisor)?;
    let first = supervisor.snapshot()?;
    let mut samples = Vec::with_capacity(runs);
    for _ in 0..runs {
        wait_for_dirt(&supervisor)?;
        samples.push(supervisor.snapshot()?);
    }
    supervisor.close(false);
    clear(pool, &name)?;
    Ok(summarise(shape, dirty, first, &samples))
}

fn clear(pool: &BenchPool, name: &str) -> Result<(), BenchError> {
    pool.pool().free_tree(&name.parse().map_err(|_| BenchError::Guest(name.to_owned()))?)?;
    let remove = std::fs::remove_dir_all(store_dir(pool.directory(), name));
    remove.map_err(|source| BenchError::System { doing: "remove the store of generations", source })
}

/// What generations in quick succession cost the guest.
#[derive(Debug, Clone, Serialize)]
pub struct Slowdown {
    /// The VM.
    pub shape: Shape,
    /// How much memory the guest walks over.
    pub dirty: ByteSize,
    /// How often one is taken, in milliseconds.
    pub every_ms: u64,
    /// How many were taken.
    pub generations: u64,
    /// Pages that the guest writes in a second, before the first generation.
    pub without: u64,
    /// The same while generations are taken.
    pub with: u64,
    /// What the guest lost, in per cent.
    pub per_cent: f64,
}

/// Measures how quickly a guest walks over its memory without and with generations, each for `length`.
///
/// # Errors
/// [`BenchError`].
pub fn slowdown(
    pool: &BenchPool,
    shape: Shape,
    dirty: ByteSize,
    every: Duration,
    length: Duration,
) -> Result<Slowdown, BenchError> {
    const PAGES_A_REPORT: u64 = 1024;
    let name = format!("slowdown-{}-{}-{dirty}", shape.cpus, shape.memory);
    let cmdline = format!("pattern=uniform ws={} write=100 report={PAGES_A_REPORT}", dirty.0);
    let regions = pool.vm(&name, &shape, "memwalk", &cmdline)?;
    let mut supervisor = Supervisor::boot(pool.pool(), regions, Keyboard::none())?;
    wait_for_dirt(&supervisor)?;
    let mut walk = |every| -> Result<(u64, u64), BenchError> {
        let (before, start) = (supervisor.reports(), Instant::now());
        let taken = supervisor.serve_for(length, every)?;
        let pages = (supervisor.reports() - before) * PAGES_A_REPORT;
        Ok(((pages as f64 / start.elapsed().as_secs_f64()) as u64, taken))
    };
    let (without, _) = walk(None)?;
    let (with, generations) = walk(Some(every))?;
    supervisor.close(false);
    clear(pool, &name)?;
    let per_cent = 100.0 * (1.0 - with as f64 / (without as f64).max(1.0));
    let every_ms = u64::try_from(every.as_millis()).unwrap_or(u64::MAX);
    Ok(Slowdown { shape, dirty, every_ms, generations, without, with, per_cent })
}

/// Waits until the guest has written all its pages since the last generation: twice round, since the first may be half over.
fn wait_for_dirt(supervisor: &Supervisor) -> Result<(), BenchError> {
    let start = Instant::now();
    let wanted = supervisor.reports() + 2;
    while supervisor.reports() < wanted {
        if start.elapsed() > PATIENCE {
            return Err(BenchError::Guest(format!("it has not written its memory within {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn summarise(shape: Shape, dirty: ByteSize, first: CaptureReport, samples: &[CaptureReport]) -> SnapshotResult {
    let distribution = |of: &dyn Fn(&CaptureReport) -> u64| Distribution::of(samples.iter().map(of).collect());
    let median = |of: fn(&CaptureReport) -> u64| distribution(&of).p50_ns;
    let steps = |pick: fn(&Distribution) -> u64| {
        let step = |of: fn(&PauseSteps) -> u64| pick(&distribution(&|report| of(&report.steps)));
        PauseSteps {
            stop_ns: step(|steps| steps.stop_ns),
            quiesce_ns: step(|steps| steps.quiesce_ns),
            devices_ns: step(|steps| steps.devices_ns),
            cpus_ns: step(|steps| steps.cpus_ns),
            dirty_ns: step(|steps| steps.dirty_ns),
            copy_ns: step(|steps| steps.copy_ns),
            run_ns: step(|steps| steps.run_ns),
        }
    };
    SnapshotResult {
        shape,
        dirty,
        first,
        pause: distribution(&|report| report.pause_ns),
        store: distribution(&|report| report.store_ns),
        steps: steps(|distribution| distribution.p50_ns),
        steps_p99: steps(|distribution| distribution.p99_ns),
        pages: median(|report| report.pages),
        pages_before: median(|report| report.pages_before),
        bytes_stored: median(|report| report.bytes_stored),
    }
}
