//! A VM that goes back to a generation, before its memory is restored and after: from the start of the process to the guest's first
//! output, and to all of its memory.
//!
//! Each sample is a process of its own, this very program as a user starts it. Half of the memory is noise, which neither compresses nor
//! repeats; the rest is the guest's and zeros. Nothing of the generation is in the page cache when a sample begins, and the guest
//! prints all the time. A sample's VM is killed in the end, so that each goes back to the same generation.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use snapshot::GenerationId;

use super::resume::{BUSY, freeze, kill, start};
use super::store::noise;
use super::{BenchError, BenchPool, Distribution, Shape};
use crate::machine::time::nanoseconds;
use crate::persistence::regions::VmRegions;
use crate::persistence::rollback::keep;
use crate::persistence::{generations, working_set};
use crate::supervisor::control::{ControlClient, Request, Response};

const NAME: &str = "lazy";
/// Bytes of noise written at a time.
const PIECE: usize = 1 << 20;
/// How long all of the memory may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How memory comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// All of it before the VM runs.
    Eager,
    /// While it runs; nothing is known of what the guest will ask for.
    Lazy,
    /// While it runs; what it asked for the last time is fetched first.
    LazyKnown,
    /// While it runs, and only what the guest asks for.
    OnDemand,
}

impl Way {
    const ALL: [Self; 4] = [Self::Eager, Self::Lazy, Self::LazyKnown, Self::OnDemand];

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Eager => &[],
            Self::Lazy | Self::LazyKnown => &["--lazy"],
            Self::OnDemand => &["--lazy", "--no-prefetch"],
        }
    }
}

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct LazyResult {
    /// The VM.
    pub shape: Shape,
    /// How memory came.
    pub way: Way,
    /// Start of the process to the guest's first byte.
    pub output: Distribution,
    /// Start of the process until all of the memory is there; none where it never is.
    pub whole: Distribution,
    /// Clusters that the guest waited for until then, the median.
    pub faults: u64,
}

/// Measures `runs` resumes of one VM in each way.
///
/// # Errors
/// [`BenchError`].
pub fn measure(pool: &BenchPool, shape: Shape, runs: usize) -> Result<Vec<LazyResult>, BenchError> {
    let generation = prepare(pool, shape)?;
    let results = Way::ALL.into_iter().map(|way| measure_way(pool, shape, way, &generation, runs)).collect();
    pool.pool().free_tree(&NAME.parse().map_err(|_| BenchError::Guest(NAME.to_owned()))?)?;
    let store = generations::store_dir(pool.directory(), NAME);
    std::fs::remove_dir_all(store).map_err(|source| BenchError::System { doing: "remove the store", source })?;
    results
}

/// A VM that is frozen, half of its memory noise; and a generation of that.
fn prepare(pool: &BenchPool, shape: Shape) -> Result<GenerationId, BenchError> {
    drop(pool.vm(NAME, &shape, "counter", BUSY)?);
    let (mut child, _) = start(pool, &["run", NAME])?;
    freeze(&mut child)?;
    let regions = VmRegions::open(pool.pool(), NAME)?;
    let system = |doing| move |source: std::io::Error| BenchError::System { doing, source };
    let region = |error| system("fill memory")(std::io::Error::other(error));
    let mut piece = vec![0; PIECE];
    for (seed, offset) in (1..).zip((shape.memory.0 / 2..shape.memory.0).step_by(PIECE)) {
        noise(&mut piece, seed);
        let length = usize::try_from(shape.memory.0 - offset).unwrap_or(PIECE).min(PIECE);
        regions.ram().write_at(piece.get(..length).unwrap_or_default(), offset).map_err(region)?;
    }
    regions.ram().sync().map_err(region)?;
    let store = generations::open(pool.directory(), NAME, &regions.config().generations)
        .map_err(|error| system("make a store")(std::io::Error::other(error)))?;
    let kept = keep(&store, &regions, "bench").map_err(|error| BenchError::Guest(error.to_string()))?;
    Ok(kept.id)
}

fn measure_way(
    pool: &BenchPool,
    shape: Shape,
    way: Way,
    generation: &GenerationId,
    runs: usize,
) -> Result<LazyResult, BenchError> {
    let (mut output, mut whole, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        if way != Way::LazyKnown {
            let _ = std::fs::remove_file(working_set::path(pool.directory(), NAME));
        }
        evict(&generations::store_dir(pool.directory(), NAME))?;
        let id = generation.number.to_string();
        let arguments = [&["resume", NAME, "--discard", "--generation", &id], way.arguments()].concat();
        let begun = Instant::now();
        let (mut child, took) = start(pool, &arguments)?;
        output.push(took);
        match way {
            Way::Eager => whole.push(took),
            Way::Lazy | Way::LazyKnown => faults.push(wait_until_whole(pool, begun, &mut whole)?),
            Way::OnDemand => {}
        }
        kill(&mut child)?;
        pool.wait_until_free(NAME)?;
    }
    let faults = Distribution::of(faults).p50_ns;
    Ok(LazyResult { shape, way, output: Distribution::of(output), whole: Distribution::of(whole), faults })
}

/// Asks until all is there. Returns how many clusters the guest had waited for when last asked before.
fn wait_until_whole(pool: &BenchPool, begun: Instant, whole: &mut Vec<u64>) -> Result<u64, BenchError> {
    let mut faults = 0;
    while begun.elapsed() < PATIENCE {
        let asked = ControlClient::connect(pool.directory(), NAME).and_then(|client| client.ask(&Request::Status));
        // No answer yet: the socket is made once the guest runs.
        if let Ok(Response::Status(status)) = asked {
            let Some(restoring) = status.restoring else {
                whole.push(nanoseconds(begun.elapsed()));
                return Ok(faults);
            };
            faults = restoring.faults;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err(BenchError::Guest("its memory never became whole".to_owned()))
}

/// Drops the files of a store, which are durable, from the page cache.
pub(super) fn evict(directory: &Path) -> Result<(), BenchError> {
    let system = |source| BenchError::System { doing: "drop the store from the page cache", source };
    for entry in std::fs::read_dir(directory).map_err(system)? {
        let path = entry.map_err(system)?.path();
        if path.is_dir() {
            evict(&path)?;
        } else {
            let file = File::open(path).map_err(system)?;
            fadvise(&file, 0, None, Advice::DontNeed).map_err(|error| system(error.into()))?;
        }
    }
    Ok(())
}
