//! From the power-fail signal until everything is durable.
//!
//! The signal is a real one, sent to this process; the clock stops when the supervisor says "frozen". Then the power comes
//! back, and the guest dirties its memory anew.

use std::time::{Duration, Instant};

use guests::pages::{Access, List};
use serde::Serialize;

use super::{BenchError, BenchPool, Distribution, Shape, power_fail};
use crate::machine::config::{ByteSize, Kernel, SerialTarget, VmConfig};
use crate::machine::time::nanoseconds;
use crate::persistence::freeze::{FreezeReport, FreezeSteps};
use crate::persistence::regions::VmRegions;
use crate::supervisor::Supervisor;
use crate::supervisor::terminal::Keyboard;

/// How long the guest may take to dirty its memory once.
const PATIENCE: Duration = Duration::from_secs(60);

/// How what the guest writes lies in its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Page beside page: `memwalk`, which writes them from the first to the last.
    Dense,
    /// As far from each other as memory lets them be, at equal distances: `pages`, in the same order each time.
    Scattered,
}

/// Of memory, guests leave so much for pages: in parts of [`PARTS`]. The rest is theirs: tables, versions, the list.
const USABLE: u64 = 7;
/// See [`USABLE`].
const PARTS: u64 = 8;

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct FreezeResult {
    /// The VM.
    pub shape: Shape,
    /// How much memory the guest writes between two freezes.
    pub dirty: ByteSize,
    /// Where.
    pub layout: Layout,
    /// Signal to all durable.
    pub total: Distribution,
    /// Of that, what the media took to make bytes durable: regions, context, stamp.
    pub flush: Distribution,
    /// The rest: what perdure itself takes.
    pub own: Distribution,
    /// The median of each step.
    pub steps: FreezeSteps,
    /// The size of a context.
    pub context_bytes: u64,
}

/// Measures `runs` freezes of one VM.
///
/// # Errors
/// [`BenchError`].
pub fn measure(
    pool: &BenchPool,
    shape: Shape,
    dirty: ByteSize,
    layout: Layout,
    runs: usize,
) -> Result<FreezeResult, BenchError> {
    let name = format!("freeze-{}-{}", shape.cpus, shape.memory);
    let pages = dirty.0 / 4096;
    let regions = match layout {
        _ if pages == 0 => pool.vm(&name, &shape, "boot", "")?,
        Layout::Dense => {
            let cmdline = format!("pattern=sequential ws={} write=100 report={pages}", dirty.0);
            pool.vm(&name, &shape, "memwalk", &cmdline)?
        }
        Layout::Scattered => scattered(pool, &name, &shape, pages)?,
    };
    let mut supervisor = Supervisor::boot(pool.pool(), regions, Keyboard::none())?;
    let mut samples = Vec::with_capacity(runs);
    for _ in 0..runs {
        wait_for_dirt(&supervisor, pages > 0)?;
        samples.push(one(&mut supervisor)?);
        supervisor.power_back()?;
    }
    supervisor.close(false);
    pool.pool().free_tree(&name.parse().map_err(|_| BenchError::Guest(name.clone()))?)?;
    Ok(summarise(shape, dirty, layout, &samples))
}

/// A VM that writes so many pages again and again, none beside another.
fn scattered(pool: &BenchPool, name: &str, shape: &Shape, pages: u64) -> Result<VmRegions, BenchError> {
    let usable = shape.memory.0 / 4096 / PARTS * USABLE;
    let stride = usable / pages;
    if stride < 2 {
        return Err(BenchError::Guest(format!("{pages} pages cannot lie scattered in {} of memory", shape.memory)));
    }
    let accesses = (0..pages).filter_map(|index| u32::try_from(index * stride).ok());
    let accesses = accesses.map(|page| Access { page, write: true });
    let list = List::new(accesses, u32::try_from(usable).unwrap_or(u32::MAX));
    let list = list.map_err(|error| BenchError::Guest(error.to_string()))?;
    let path = pool.directory().join(format!("{name}.list"));
    std::fs::write(&path, list.to_bytes())
        .map_err(|source| BenchError::System { doing: "write the list of pages", source })?;
    let config = VmConfig {
        cpus: shape.cpus,
        kernel: Kernel::GuestWith { guest: "pages".to_owned(), initrd: path },
        cmdline: format!("pages={usable} every={pages}"),
        memory: shape.memory,
        ram: shape.ram,
        medium: shape.medium,
        serial: SerialTarget::None,
        ..VmConfig::default()
    };
    Ok(VmRegions::create(pool.pool(), name, &config)?)
}

/// Waits until the guest has written all its pages since the last freeze: twice round, since the first may be half over.
fn wait_for_dirt(supervisor: &Supervisor, any: bool) -> Result<(), BenchError> {
    let start = Instant::now();
    let wanted = supervisor.reports() + if any { 2 } else { u64::from(supervisor.reports() == 0) };
    while supervisor.reports() < wanted {
        if start.elapsed() > PATIENCE {
            return Err(BenchError::Guest(format!("it has not written its memory within {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    // An idle guest is to be asleep, not on its way there.
    std::thread::sleep(Duration::from_millis(2));
    Ok(())
}

fn one(supervisor: &mut Supervisor) -> Result<(u64, FreezeReport), BenchError> {
    let start = Instant::now();
    let report = power_fail(supervisor)?;
    Ok((nanoseconds(start.elapsed()), report))
}

fn summarise(shape: Shape, dirty: ByteSize, layout: Layout, samples: &[(u64, FreezeReport)]) -> FreezeResult {
    let distribution = |of: &dyn Fn(&(u64, FreezeReport)) -> u64| Distribution::of(samples.iter().map(of).collect());
    let step = |of: fn(&FreezeSteps) -> u64| distribution(&|(_, report)| of(&report.steps)).p50_ns;
    FreezeResult {
        shape,
        dirty,
        layout,
        total: distribution(&|(total, _)| *total),
        flush: distribution(&|(_, report)| report.flush_ns),
        own: distribution(&|(total, report)| total.saturating_sub(report.flush_ns)),
        steps: FreezeSteps {
            stop_ns: step(|steps| steps.stop_ns),
            quiesce_ns: step(|steps| steps.quiesce_ns),
            devices_ns: step(|steps| steps.devices_ns),
            cpus_ns: step(|steps| steps.cpus_ns),
            persist_ns: step(|steps| steps.persist_ns),
            encode_ns: step(|steps| steps.encode_ns),
            context_ns: step(|steps| steps.context_ns),
            stamp_ns: step(|steps| steps.stamp_ns),
        },
        context_bytes: samples.first().map_or(0, |(_, report)| report.context_bytes),
    }
}
