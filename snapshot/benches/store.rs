//! What the store costs, next to what the machine's disk and memory give in the same run.
//!
//! `SNAPSHOT_BENCH_DIR` chooses the file system (default: a directory under the temporary directory), `SNAPSHOT_BENCH_MIB` the size of
//! the memory image (default 1024).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A benchmark.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use snapshot::{
    Compression, Depth, GenerationId, NewGeneration, Options, PAGE_SIZE, PageSink, RegionKey, RegionSpec, Store, Writer,
};
use vfs::host::HostVfs;

fn mebibytes() -> u64 {
    std::env::var("SNAPSHOT_BENCH_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(1024)
}

fn pages() -> u64 {
    mebibytes() << 20 >> 12
}

/// A directory that goes when it is dropped.
fn scratch() -> tempfile::TempDir {
    let base = std::env::var_os("SNAPSHOT_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::Builder::new().prefix("snapshot-bench").tempdir_in(base).unwrap()
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Bytes that do not compress, and no two pages equal.
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

fn image() -> Vec<u8> {
    let mut image = vec![0; (mebibytes() << 20) as usize];
    Random(0x9E37_79B9_7F4A_7C15).fill(&mut image);
    image
}

fn open(dir: &tempfile::TempDir, options: Options) -> Store {
    Store::open(Arc::new(HostVfs), &dir.path().join("store"), options).unwrap()
}

fn begin(store: &Store) -> (Writer, RegionKey) {
    let mut writer = store.begin(NewGeneration::automatic("vm", 1)).unwrap();
    let spec = RegionSpec { name: "ram".into(), kind: "ram".into(), size: mebibytes() << 20 };
    let key = writer.region(&spec).unwrap();
    (writer, key)
}

fn full(store: &Store, image: &[u8]) {
    let (mut writer, region) = begin(store);
    for (number, run) in image.chunks(16 << 20).enumerate() {
        writer.put_run(region, (number * (16 << 20) / PAGE_SIZE) as u64, run).unwrap();
    }
    writer.commit().unwrap();
}

/// 1,024 pages, scattered, new content each time.
fn incremental(store: &Store, random: &mut Random) {
    let (mut writer, region) = begin(store);
    let mut page = [0; PAGE_SIZE];
    for _ in 0..1024 {
        random.fill(&mut page[..64]);
        let number = random.next() % pages();
        writer.put(region, number, &page).unwrap();
    }
    writer.commit().unwrap();
}

/// Memory that a restore writes to, without a lock: one file per thread would distort what is measured.
struct Memory(Vec<std::sync::Mutex<Vec<u8>>>);

const PART: usize = 1 << 20;

impl Memory {
    fn new() -> Self {
        Self((0..mebibytes()).map(|_| std::sync::Mutex::new(vec![0; PART])).collect())
    }
}

impl PageSink for Memory {
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut at, mut rest) = (first_page as usize * PAGE_SIZE, bytes);
        while !rest.is_empty() {
            let mut part = self.0[at / PART].lock().unwrap();
            let count = rest.len().min(PART - at % PART);
            part[at % PART..at % PART + count].copy_from_slice(&rest[..count]);
            (at, rest) = (at + count, &rest[count..]);
        }
        Ok(())
    }

    fn zero(&self, _first_page: u64, _count: u64) -> io::Result<()> {
        Ok(())
    }
}

fn drop_caches() {
    // Only root may; without it the reads below are from the page cache, for the raw file and for the store alike.
    let _ = fs::write("/proc/sys/vm/drop_caches", "1");
}

fn timed(iterations: u64, mut once: impl FnMut() -> Duration) -> Duration {
    (0..iterations).map(|_| once()).sum()
}

fn hashing(c: &mut Criterion) {
    let image = image();
    let part = &image[..64 << 20];
    let mut group = c.benchmark_group("checksums");
    group.throughput(Throughput::Bytes(part.len() as u64));
    group.sample_size(10);
    group.bench_function("crc32 by page, one thread", |b| {
        b.iter(|| part.chunks(PAGE_SIZE).fold(0, |all, page| all ^ crc32fast::hash(page)));
    });
    group.bench_function("blake3 by page, one thread", |b| {
        b.iter(|| {
            part.chunks(PAGE_SIZE).for_each(|page| {
                black_box(blake3::hash(page));
            });
        });
    });
    group.finish();
}

fn store(c: &mut Criterion) {
    let image = image();
    let mut group = c.benchmark_group("store");
    group.throughput(Throughput::Bytes(image.len() as u64));
    group.sample_size(10);
    let dir = scratch();
    group.bench_function("raw sequential write and fsync", |b| {
        b.iter_custom(|iterations| {
            timed(iterations, || {
                let path = dir.path().join("raw");
                let start = Instant::now();
                let mut file = File::create(&path).unwrap();
                image.chunks(4 << 20).for_each(|chunk| file.write_all(chunk).unwrap());
                file.sync_all().unwrap();
                let took = start.elapsed();
                fs::remove_file(&path).unwrap();
                took
            })
        });
    });
    for (name, compression) in [("none", Compression::None), ("lz4", Compression::Lz4)] {
        group.bench_function(format!("first generation, compression {name}"), |b| {
            b.iter_custom(|iterations| {
                timed(iterations, || {
                    let dir = scratch();
                    let store = open(&dir, Options { compression, ..Options::default() });
                    let start = Instant::now();
                    full(&store, &image);
                    start.elapsed()
                })
            });
        });
    }
    group.finish();
}

fn restore(c: &mut Criterion) {
    let image = image();
    let dir = scratch();
    let store = open(&dir, Options::default());
    full(&store, &image);
    fs::write(dir.path().join("raw"), &image).unwrap();
    File::open(dir.path().join("raw")).unwrap().sync_all().unwrap();
    let mut deep = None;
    let mut group = c.benchmark_group("restore");
    group.throughput(Throughput::Bytes(image.len() as u64));
    group.sample_size(10);
    let memory = Memory::new();
    for (cache, cold) in [("cold", true), ("warm", false)] {
        group.bench_function(format!("raw sequential read, {cache}"), |b| {
            b.iter_custom(|iterations| {
                timed(iterations, || {
                    if cold {
                        drop_caches();
                    }
                    let start = Instant::now();
                    let file = File::open(dir.path().join("raw")).unwrap();
                    for (number, part) in memory.0.iter().enumerate() {
                        file.read_exact_at(&mut part.lock().unwrap(), (number * PART) as u64).unwrap();
                    }
                    start.elapsed()
                })
            });
        });
        for depth in [1, 1000] {
            let id = if depth == 1 {
                GenerationId::new("vm", 1)
            } else {
                deep.get_or_insert_with(|| {
                    let mut random = Random(7);
                    for _ in 1..1000 {
                        let (mut writer, region) = begin(&store);
                        let mut page = [0; PAGE_SIZE];
                        for _ in 0..256 {
                            random.fill(&mut page[..64]);
                            writer.put(region, random.next() % pages(), &page).unwrap();
                        }
                        writer.commit().unwrap();
                    }
                    GenerationId::new("vm", 1000)
                })
                .clone()
            };
            group.bench_function(format!("depth {depth}, {cache}"), |b| {
                b.iter_custom(|iterations| {
                    timed(iterations, || {
                        if cold {
                            drop_caches();
                        }
                        let start = Instant::now();
                        let fresh = open(&dir, Options::default());
                        let reader = fresh.reader(&id).unwrap();
                        reader.restore_region(0, &memory, &mut |_, _| ()).unwrap();
                        start.elapsed()
                    })
                });
            });
        }
    }
    group.finish();
    thousand(c, &dir, &store);
}

/// What depends on the number of generations.
fn thousand(c: &mut Criterion, dir: &tempfile::TempDir, store: &Store) {
    let mut group = c.benchmark_group("1,000 generations");
    group.sample_size(20);
    group.bench_function("open", |b| b.iter(|| open(dir, Options::default())));
    group.bench_function("verify the structure of the newest", |b| {
        b.iter(|| open(dir, Options::default()).newest_verified("vm", Depth::Structure).unwrap());
    });
    group.bench_function("diff of neighbours", |b| {
        let (old, new) = (GenerationId::new("vm", 500), GenerationId::new("vm", 501));
        b.iter(|| store.diff(&old, &new).unwrap());
    });
    let mut random = Random(99);
    group.bench_function("commit of 1,024 scattered dirty pages", |b| b.iter(|| incremental(store, &mut random)));
    let mut next = 2;
    group.sample_size(10).measurement_time(Duration::from_secs(1));
    group.bench_function("purge", |b| {
        b.iter(|| {
            store.purge(&[GenerationId::new("vm", next)]).unwrap_or_else(|error| panic!("{error:?}"));
            next += 1;
        });
    });
    group.bench_function("sweep after one purge", |b| {
        b.iter_custom(|iterations| {
            timed(iterations, || {
                store.purge(&[GenerationId::new("vm", next)]).unwrap();
                next += 1;
                let start = Instant::now();
                store.sweep(&mut |_| ()).unwrap();
                start.elapsed()
            })
        });
    });
    group.bench_function("scrub", |b| b.iter(|| assert!(store.scrub(&mut |_| ()).unwrap().is_clean())));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_millis(300)).without_plots();
    targets = hashing, store, restore
}
criterion_main!(benches);
