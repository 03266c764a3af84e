//! What transactions in recoverable memory cost: `cargo bench -p allocator --bench rvm`.
//!
//! Each is one `set_range` of 64 bytes, begin and end included. Beside them, in the same run, what the directory's disk takes for a write of as much
//! and its flush. `RVM_BENCH_DIR` chooses the file system (default: a directory under the temporary directory); `RVM_BENCH_DAX`, a directory in persistent
//! memory, adds the undo engine there. On `nvdimm` it writes no cache line back: what is seen is the engine itself.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A benchmark.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use allocator::rvm::{Commit, LogSpec, Memory, Mode, Options, Rvm};
use allocator::{Kind, MediumKind, Pool, RegionName, RegionSpec};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vfs::HostVfs;

/// Bytes that a transaction changes: a cache line.
const RANGE: usize = 64;
/// Bytes of the region; each transaction takes the next range.
const REGION: usize = 1 << 20;
/// Who commits at once.
const THREADS: [usize; 3] = [1, 8, 64];

fn base() -> PathBuf {
    std::env::var_os("RVM_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from)
}

/// A log and a region in a pool, which goes when this is dropped.
struct Bench {
    rvm: Rvm,
    memory: Option<Memory>,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn on(medium: MediumKind, base: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("rvm-bench").tempdir_in(base).unwrap();
        let pool = Arc::new(Pool::create_or_open(directory.path().join("pool"), Arc::new(HostVfs)).unwrap());
        let name = |text: &str| -> RegionName { text.parse().unwrap() };
        let (log, region) = (name("bench/log"), name("bench/region"));
        Rvm::create_log(&pool, &log, LogSpec { medium: Some(medium), ..LogSpec::default() }).unwrap();
        let spec = RegionSpec { kind: Kind::Pmem, size: REGION as u64, medium: Some(medium) };
        pool.allocate(&region, spec).unwrap();
        let rvm = Rvm::initialize(pool, &log, Options::default()).unwrap();
        let memory = Some(rvm.map(&region).unwrap());
        Self { rvm, memory, _directory: directory }
    }

    /// The region in `count` parts.
    fn parts(&mut self, count: usize) -> Vec<Memory> {
        let mut rest = self.memory.take().unwrap();
        let mut parts = Vec::new();
        for _ in 1..count {
            let (part, more) = rest.split_at(REGION / count);
            parts.push(part);
            rest = more;
        }
        parts.push(rest);
        parts
    }
}

/// The `number`th transaction on `memory`.
fn change(rvm: &Rvm, memory: &mut Memory, number: usize, commit: Commit) {
    let at = number * RANGE % memory.len();
    let mut transaction = rvm.begin_transaction(Mode::Restore).unwrap();
    let part = transaction.enroll(memory).unwrap();
    transaction.set_range(part, at..at + RANGE).unwrap().fill(number as u8);
    transaction.end_transaction(commit).unwrap();
}

/// The time of `count` transactions by each of the owners of `parts`, all at once.
fn together(rvm: &Rvm, parts: &mut [Memory], count: u64, commit: Commit) -> Duration {
    let start = Barrier::new(parts.len() + 1);
    std::thread::scope(|scope| {
        for memory in parts.iter_mut() {
            scope.spawn(|| {
                start.wait();
                (0..count as usize).for_each(|number| change(rvm, memory, number, commit));
            });
        }
        start.wait();
        Instant::now()
    })
    .elapsed()
}

fn undo(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("undo");
    let dax = std::env::var_os("RVM_BENCH_DAX").map(|directory| (MediumKind::Dax, PathBuf::from(directory)));
    for (medium, base) in [(MediumKind::Nvdimm, base())].into_iter().chain(dax) {
        let mut bench = Bench::on(medium, &base);
        let mut memory = bench.parts(1);
        let mut number = 0;
        group.bench_function(BenchmarkId::new("64 bytes", medium), |bencher| {
            bencher.iter(|| {
                number += 1;
                change(&bench.rvm, &mut memory[0], number, Commit::Flush);
            });
        });
    }
}

fn redo(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("redo");
    let mut bench = Bench::on(MediumKind::File, &base());
    let mut memory = bench.parts(1);
    let mut number = 0;
    // With the flush that a full spool asks for, every so often: that is what no-flush costs in the long run.
    for (name, commit) in [("64 bytes, no-flush", Commit::NoFlush), ("64 bytes, flush", Commit::Flush)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                number += 1;
                change(&bench.rvm, &mut memory[0], number, commit);
            });
        });
    }
    let file = tempfile::tempfile_in(base()).unwrap();
    file.write_all_at(&vec![0; REGION], 0).unwrap();
    file.sync_all().unwrap();
    group.bench_function("the disk: 512 bytes and fdatasync", |bencher| {
        bencher.iter(|| disk_write(&file));
    });
}

fn disk_write(file: &File) {
    file.write_all_at(&[1; 512], 0).unwrap();
    file.sync_data().unwrap();
}

/// Durable commits a second by so many threads: one flush serves all that wait for it.
fn group_commit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("group commit");
    for threads in THREADS {
        let mut bench = Bench::on(MediumKind::File, &base());
        let mut parts = bench.parts(threads);
        group.throughput(Throughput::Elements(threads as u64));
        group.bench_function(BenchmarkId::from_parameter(threads), |bencher| {
            bencher.iter_custom(|count| together(&bench.rvm, &mut parts, count, Commit::Flush));
        });
    }
}

criterion_group!(benches, undo, redo, group_commit);
criterion_main!(benches);
