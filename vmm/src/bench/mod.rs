//! Measures what the README promises: distributions, never single numbers, with the conditions they were taken under.
//!
//! * [`freeze`]: from the power-fail signal until everything is durable.
//! * [`holdup`]: what a hold-up costs the guest, and whether freezes fit into it.
//! * [`resume`]: from the start of the process to the guest's first output; cold starts; the VMM's own memory.
//! * [`lazy`]: a VM that goes back to a generation, before its memory is restored and after.
//! * [`paging`]: a working set beyond memory, against the kernel's swap.
//! * [`patterns`]: the order in which workloads touch their pages.
//! * [`residence`]: what of memory is in RAM, and page faults, around an outage; [`plot`] draws it.
//! * [`restore`]: a generation into memory, against a raw sequential read.
//! * [`rvm`]: transactions of recoverable memory.
//! * [`store`]: generations onto the disk, against a raw sequential write; opening, deleting, sweeping, scrubbing.
//! * [`alternatives`]: the same generations kept in other ways.
//! * [`snapshot`]: how long a guest stands for a generation.
//!
//! Every bench works in a pool of its own, below the pool that is given, and removes it in the end.

pub mod alternatives;
pub mod freeze;
pub mod holdup;
pub mod lazy;
pub mod paging;
pub mod patterns;
pub mod plot;
pub mod residence;
pub mod restore;
pub mod resume;
pub mod rvm;
pub mod snapshot;
pub mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use allocator::{MediumKind, Pool};
use rustix::process::{Signal, getpid, kill_process};
use serde::Serialize;
use vfs::host::HostVfs;

use crate::machine::config::{ByteSize, Kernel, SerialTarget, VmConfig};
use crate::persistence::freeze::FreezeReport;
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::{Ended, Supervisor, SupervisorError};

/// Why a bench could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The VM.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// Its regions.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// The store of generations.
    #[error(transparent)]
    Store(#[from] ::snapshot::StoreError),
    /// The pool.
    #[error(transparent)]
    Pool(#[from] allocator::PoolError),
    /// Recoverable memory.
    #[error(transparent)]
    Rvm(#[from] allocator::rvm::RvmError),
    /// The guest did something else.
    #[error("the guest did not do its part: {0}")]
    Guest(String),
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

/// What a set of samples looks like, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Distribution {
    /// How many samples.
    pub samples: usize,
    /// The least.
    pub min_ns: u64,
    /// The median.
    pub p50_ns: u64,
    /// 90 % are at most this.
    pub p90_ns: u64,
    /// 99 % are at most this.
    pub p99_ns: u64,
    /// The greatest.
    pub max_ns: u64,
}

impl Distribution {
    /// Of samples in any order; all zero if there are none. Percentiles by the nearest-rank method.
    #[must_use]
    pub fn of(mut samples: Vec<u64>) -> Self {
        samples.sort_unstable();
        let rank = |percent: usize| {
            let index = (samples.len() * percent).div_ceil(100).saturating_sub(1);
            samples.get(index).copied().unwrap_or(0)
        };
        Self {
            samples: samples.len(),
            min_ns: samples.first().copied().unwrap_or(0),
            p50_ns: rank(50),
            p90_ns: rank(90),
            p99_ns: rank(99),
            max_ns: samples.last().copied().unwrap_or(0),
        }
    }
}

/// Under which conditions numbers were taken.
#[derive(Debug, Clone, Serialize)]
pub struct Conditions {
    /// The CPU's own name.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// The kernel.
    pub kernel: String,
    /// Load average over the last minute before the bench.
    pub load: String,
}

impl Conditions {
    /// As they are now.
    #[must_use]
    pub fn now() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let system = rustix::system::uname();
        Self {
            cpu: cpu.map(|(_, name)| name.trim().to_owned()).unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: system.release().to_string_lossy().into_owned(),
            load: load.split(' ').next().unwrap_or_default().to_owned(),
        }
    }
}

/// A pool of a bench's own.
#[derive(Debug)]
pub struct BenchPool {
    directory: PathBuf,
    pool: Pool,
}

impl BenchPool {
    /// Makes it below `parent`.
    ///
    /// # Errors
    /// [`BenchError::Pool`].
    pub fn create(parent: &Path) -> Result<Self, BenchError> {
        let directory = parent.join(format!("bench-{}", std::process::id()));
        let pool = Pool::create_or_open(&directory, Arc::new(HostVfs))?;
        Ok(Self { directory, pool })
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Waits until no process has a VM: one that was killed is gone before the kernel has taken its memory apart.
    ///
    /// # Errors
    /// [`BenchError::Regions`].
    pub fn wait_until_free(&self, name: &str) -> Result<(), BenchError> {
        for _ in 0..500 {
            match VmRegions::open(&self.pool, name) {
                Err(RegionsError::InUse { .. }) => std::thread::sleep(Duration::from_millis(10)),
                other => return other.map(drop).map_err(BenchError::Regions),
            }
        }
        VmRegions::open(&self.pool, name).map(drop).map_err(BenchError::Regions)
    }

    /// A new VM with an embedded guest.
    ///
    /// # Errors
    /// [`BenchError::Regions`].
    pub fn vm(&self, name: &str, shape: &Shape, guest: &str, cmdline: &str) -> Result<VmRegions, BenchError> {
        Ok(VmRegions::create(&self.pool, name, &Self::config(shape, guest, cmdline))?)
    }

    /// What a VM with an embedded guest is made of.
    #[must_use]
    pub fn config(shape: &Shape, guest: &str, cmdline: &str) -> VmConfig {
        VmConfig {
            cpus: shape.cpus,
            memory: shape.memory,
            ram: shape.ram,
            medium: shape.medium,
            kernel: Kernel::Guest(guest.to_owned()),
            cmdline: cmdline.to_owned(),
            serial: SerialTarget::Stdio,
            ..VmConfig::default()
        }
    }
}

impl Drop for BenchPool {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            tracing::warn!("{} is left behind: {error}", self.directory.display());
        }
    }
}

/// The power fails under a VM in this process. It can be let run on when this returns.
fn power_fail(supervisor: &mut Supervisor) -> Result<FreezeReport, BenchError> {
    let signal = |source: rustix::io::Errno| BenchError::System { doing: "send SIGPWR", source: source.into() };
    kill_process(getpid(), Signal::POWER).map_err(signal)?;
    match supervisor.serve()? {
        Ended::Frozen(report) => Ok(report),
        other => Err(BenchError::Guest(format!("{other:?}"))),
    }
}

/// The VM that is measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shape {
    /// Its vCPUs.
    pub cpus: u32,
    /// Its memory.
    pub memory: ByteSize,
    /// RAM, where it is less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<ByteSize>,
    /// What it lies on; the pool's default if not given.
    pub medium: Option<MediumKind>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let distribution = Distribution::of((1..=200).rev().collect());
        assert_eq!((distribution.min_ns, distribution.max_ns), (1, 200));
        assert_eq!((distribution.p50_ns, distribution.p90_ns, distribution.p99_ns), (100, 180, 198));
        assert_eq!(Distribution::of(vec![7]).p99_ns, 7);
        assert_eq!(Distribution::of(Vec::new()).samples, 0);
    }
}
