//! Transactions of recoverable memory: 64 bytes each.

use std::sync::Arc;
use std::time::Instant;

use allocator::rvm::{Commit, LogSpec, Memory, Mode, Options, Rvm, RvmError};
use allocator::{Kind, MediumKind, Pool, RegionName, RegionSpec};
use serde::Serialize;
use vfs::OpenMode;

use super::{BenchError, BenchPool, Distribution};
use crate::machine::time::nanoseconds;

/// Bytes that a transaction sets.
const RANGE: usize = 64;
/// Bytes of memory; in the caches of most CPUs, so that what is measured is the transaction.
const MEMORY: u64 = 1 << 20;
/// Transactions that are timed together where one is too short for the clock.
const TOGETHER: u32 = 1000;

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct RvmResult {
    /// What was done.
    pub what: &'static str,
    /// On what.
    pub medium: MediumKind,
    /// By how many threads.
    pub threads: u32,
    /// How long each took.
    pub each: Distribution,
    /// How many there were in a second, by all threads.
    pub per_second: f64,
}

fn open(pool: &BenchPool, medium: MediumKind) -> Result<(Rvm, Memory), BenchError> {
    let name = |text: &str| format!("rvm/{medium}-{text}").parse::<RegionName>().map_err(allocator::PoolError::from);
    let (log, memory) = (name("log")?, name("memory")?);
    Rvm::create_log(pool.pool(), &log, LogSpec { medium: Some(medium), ..LogSpec::default() })?;
    pool.pool().allocate(&memory, RegionSpec { kind: Kind::Pmem, size: MEMORY, medium: Some(medium) })?;
    let opened = Arc::new(Pool::open(pool.directory(), Arc::clone(pool.pool().vfs()))?);
    let rvm = Rvm::initialize(opened, &log, Options::default())?;
    let memory = rvm.map(&memory)?;
    Ok((rvm, memory))
}

/// Sets 64 bytes and commits.
fn transact(rvm: &Rvm, memory: &mut Memory, number: u64, commit: Commit) -> Result<(), RvmError> {
    // Multiplied by an odd number, so that all places have their turn and no two neighbours follow each other.
    let places = memory.len() / RANGE;
    let at = (number as usize).wrapping_mul(0x9e37_79b1) % places * RANGE;
    let mut transaction = rvm.begin_transaction(Mode::Restore)?;
    let part = transaction.enroll(memory)?;
    transaction.set_range(part, at..at + RANGE)?.fill(number as u8);
    transaction.end_transaction(commit)
}

/// Commits without a flush, one thread; `runs` times a thousand. What is committed is flushed between, untimed.
///
/// # Errors
/// [`BenchError`].
pub fn unflushed(pool: &BenchPool, medium: MediumKind, runs: u32) -> Result<RvmResult, BenchError> {
    let (rvm, mut memory) = open(pool, medium)?;
    let mut each = Vec::new();
    // The first ones touch each page for the first time.
    for run in 0..runs + 20 {
        let begun = Instant::now();
        for number in 0..TOGETHER {
            transact(&rvm, &mut memory, u64::from(run * TOGETHER + number), Commit::NoFlush)?;
        }
        let took = nanoseconds(begun.elapsed()) / u64::from(TOGETHER);
        rvm.flush()?;
        if run >= 20 {
            each.push(took);
        }
    }
    rvm.unmap(memory)?;
    let each = Distribution::of(each);
    let per_second = 1e9 / each.p50_ns.max(1) as f64;
    Ok(RvmResult { what: "64 bytes, no flush", medium, threads: 1, each, per_second })
}

/// Commits with a flush by so many threads at a time, `runs` each.
///
/// # Errors
/// [`BenchError`].
pub fn flushed(pool: &BenchPool, threads: u32, runs: u32) -> Result<RvmResult, BenchError> {
    let (rvm, memory) = open(pool, MediumKind::File)?;
    let (share, mut rest) = (memory.len() / threads as usize, memory);
    let mut parts = Vec::new();
    for _ in 0..threads {
        let (part, behind) = rest.split_at(share);
        parts.push(part);
        rest = behind;
    }
    let begun = Instant::now();
    let took = std::thread::scope(|scope| {
        let rvm = &rvm;
        let commit = |mut part: Memory| {
            scope.spawn(move || -> Result<Vec<u64>, RvmError> {
                (0..runs)
                    .map(|number| {
                        let begun = Instant::now();
                        transact(rvm, &mut part, u64::from(number), Commit::Flush)?;
                        Ok(nanoseconds(begun.elapsed()))
                    })
                    .collect()
            })
        };
        let running: Vec<_> = parts.into_iter().map(commit).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let per_second = f64::from(threads * runs) / begun.elapsed().as_secs_f64();
    let each = Distribution::of(took.into_iter().flatten().collect());
    Ok(RvmResult { what: "64 bytes, flush", medium: MediumKind::File, threads, each, per_second })
}

/// What a commit with a flush cannot do without: one sector written durably to a file that has its blocks.
///
/// # Errors
/// [`BenchError::System`].
pub fn writes(pool: &BenchPool, runs: u32) -> Result<RvmResult, BenchError> {
    let system = |source| BenchError::System { doing: "write a sector durably", source };
    let file = pool.pool().vfs().open(&pool.directory().join("sectors"), OpenMode::OpenOrCreate).map_err(system)?;
    file.write_all_at(&vec![0; 1 << 20], 0).and_then(|()| file.sync_all()).map_err(system)?;
    let mut each = Vec::new();
    for run in 0..u64::from(runs) {
        let begun = Instant::now();
        file.write_durable_at(&[run as u8; 512], run % 2048 * 512).map_err(system)?;
        each.push(nanoseconds(begun.elapsed()));
    }
    let per_second = each.len() as f64 * 1e9 / each.iter().sum::<u64>().max(1) as f64;
    let each = Distribution::of(each);
    Ok(RvmResult { what: "a sector written durably", medium: MediumKind::File, threads: 1, each, per_second })
}
