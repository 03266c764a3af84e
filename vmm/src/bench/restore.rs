//! How fast a generation is restored, held against a raw sequential read of as many bytes in the same run, and whether it matters
//! how many generations it stands on.
//!
//! The first generation and the last one of a store are restored in turn, each by a store that has just been opened, so that
//! nothing is remembered; nothing is in the page cache when a restore or a raw read begins. Opening counts. Pages are verified and go to
//! memory that has been touched; the first restore of each is compared with what was stored, byte by byte.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use snapshot::{GenerationId, PAGE_SIZE, PageSink};

use super::BenchError;
use super::store::{Changes, LINEAGE, change, create, median, noise, put, remove, throughput, write_full, write_raw};
use crate::machine::config::ByteSize;

/// Memory is locked in pieces of so many pages.
const PIECE: usize = 256;

/// What was measured at one depth. Throughputs are medians, in bytes a second.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreResult {
    /// Bytes of the generation.
    pub memory: ByteSize,
    /// How many generations it stands on, itself included.
    pub depth: u32,
    /// Which pages changed between them.
    pub changes: Changes,
    /// Reading that many bytes of a file from its beginning to its end.
    pub raw_read: f64,
    /// Restoring the generation.
    pub restore: f64,
    /// The second over the first.
    pub share: f64,
    /// Bytes of pages read for a byte restored.
    pub amplification: f64,
    /// Bytes of pages written for a byte changed, over all generations after the first one.
    pub write_amplification: f64,
    /// Bytes of archive written for a byte changed, both mirrors counted.
    pub archive_amplification: f64,
    /// How much longer it took than at depth 1: the median over rounds, each of which restores both.
    pub slowdown: f64,
}

/// Measures at depth 1 and at `depth` in directories below `directory`, which is left empty.
///
/// # Errors
/// [`BenchError`].
pub fn measure(directory: &Path, memory: ByteSize, depth: u32, runs: usize) -> Result<Vec<RestoreResult>, BenchError> {
    let mut results = Vec::new();
    for changes in [Changes::InTurn, Changes::Scattered] {
        results.extend(measure_changes(directory, memory, depth, runs, changes)?);
    }
    Ok(results)
}

fn measure_changes(
    directory: &Path,
    memory: ByteSize,
    depth: u32,
    runs: usize,
    changes: Changes,
) -> Result<[RestoreResult; 2], BenchError> {
    let mut image = vec![0; usize::try_from(memory.0).unwrap_or(usize::MAX)];
    noise(&mut image, 1);
    let (at, raw) = (directory.join("store"), directory.join("raw"));
    write_raw(&raw, &image)?;
    let store = create(&at)?;
    write_full(&store, &image)?;
    // As many changes in all as there are pages.
    let dirty = ((image.len() / PAGE_SIZE) as u64 / u64::from(depth.max(1))).max(1);
    let (first, mut changed) = (image.clone(), 0);
    for number in 2..=u64::from(depth) {
        let pages = change(&mut image, number, dirty, changes);
        changed += (pages.len() * PAGE_SIZE) as u64;
        put(&store, &image, number, &pages)?;
    }
    let later: Vec<_> = store.generations(LINEAGE).into_iter().skip(1).collect();
    let pages: u64 = later.iter().map(|generation| generation.page_bytes_stored).sum();
    let archive: u64 = later.iter().map(|generation| generation.archive_bytes_stored * 2).sum();
    drop(store);
    let bench = Bench { raw: &raw, directory: &at, memory: Memory::new(image.len()) };
    let (mut shallow, mut deep) = (Samples::default(), Samples::default());
    for _ in 0..runs.max(1) {
        bench.round(1, &first, &mut shallow)?;
        bench.round(depth, &image, &mut deep)?;
    }
    remove(&at)?;
    remove(&raw)?;
    let slowdown = median(shallow.restore.iter().zip(&deep.restore).map(|(shallow, deep)| shallow / deep).collect());
    let row = |depth, samples: Samples, slowdown| {
        let (raw_read, restore) = (median(samples.raw), median(samples.restore));
        RestoreResult {
            memory,
            depth,
            changes,
            raw_read,
            restore,
            share: restore / raw_read,
            amplification: samples.read as f64 / image.len() as f64,
            write_amplification: if depth > 1 { pages as f64 / changed as f64 } else { 1.0 },
            archive_amplification: if depth > 1 { archive as f64 / changed as f64 } else { 0.0 },
            slowdown,
        }
    };
    Ok([row(1, shallow, 1.0), row(depth, deep, slowdown)])
}

#[derive(Default)]
struct Samples {
    raw: Vec<f64>,
    restore: Vec<f64>,
    /// Bytes of pages that a restore read.
    read: u64,
}

struct Bench<'a> {
    raw: &'a Path,
    directory: &'a Path,
    memory: Memory,
}

impl Bench<'_> {
    /// One raw read and one restore, both cold.
    fn round(&self, number: u32, image: &[u8], samples: &mut Samples) -> Result<(), BenchError> {
        evict(self.raw)?;
        samples.raw.push(read_raw(self.raw)?);
        evict_all(self.directory)?;
        let begun = Instant::now();
        let reader = create(self.directory)?.reader(&GenerationId::new(LINEAGE, u64::from(number)))?;
        let report = reader.restore_region(0, &self.memory, &mut |_, _| ())?;
        samples.restore.push(throughput(image.len(), begun));
        samples.read = report.bytes_read;
        if samples.restore.len() == 1 && !self.memory.holds(image) {
            return Err(BenchError::Guest("what was restored is not what was stored".to_owned()));
        }
        Ok(())
    }
}

/// Reads a file from its beginning to its end. In bytes a second.
pub(super) fn read_raw(path: &Path) -> Result<f64, BenchError> {
    let system = |source| BenchError::System { doing: "read raw", source };
    let mut buffer = vec![0; 1 << 20];
    let mut file = File::open(path).map_err(system)?;
    let (begun, mut bytes) = (Instant::now(), 0);
    loop {
        match file.read(&mut buffer).map_err(system)? {
            0 => return Ok(throughput(bytes, begun)),
            count => bytes += count,
        }
    }
}

/// Drops a file, which is durable, from the page cache.
pub(super) fn evict(path: &Path) -> Result<(), BenchError> {
    let evicted = File::open(path).and_then(|file| Ok(fadvise(&file, 0, None, Advice::DontNeed)?));
    evicted.map_err(|source| BenchError::System { doing: "drop a file from the page cache", source })
}

/// The same, of everything below `directory`.
pub(super) fn evict_all(directory: &Path) -> Result<(), BenchError> {
    let system = |source| BenchError::System { doing: "list the store", source };
    for entry in std::fs::read_dir(directory).map_err(system)? {
        let path = entry.map_err(system)?.path();
        if path.is_dir() { evict_all(&path)? } else { evict(&path)? }
    }
    Ok(())
}

/// Memory that several threads write.
struct Memory(Vec<Mutex<Vec<u8>>>);

impl Memory {
    /// Touched already: a page fault is not the store's.
    fn new(bytes: usize) -> Self {
        let piece = PIECE * PAGE_SIZE;
        let length = |start: usize| piece.min(bytes - start);
        Self((0..bytes).step_by(piece).map(|start| Mutex::new(vec![0xA5; length(start)])).collect())
    }

    fn holds(&self, image: &[u8]) -> bool {
        let mut pieces = image.chunks(PIECE * PAGE_SIZE).zip(&self.0);
        pieces.all(|(image, piece)| image == &**piece.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, first: u64, count: u64, mut bytes: Option<&[u8]>) -> io::Result<()> {
        let beyond = || io::Error::other("a page beyond the region");
        let (mut page, end) = (first as usize, (first + count) as usize);
        while page < end {
            let within = page % PIECE;
            let pages = (PIECE - within).min(end - page);
            let mut piece = self.0.get(page / PIECE).ok_or_else(beyond)?.lock().unwrap_or_else(PoisonError::into_inner);
            let range = within * PAGE_SIZE..(within + pages) * PAGE_SIZE;
            let target = piece.get_mut(range).ok_or_else(beyond)?;
            match bytes.as_mut().map(|bytes| bytes.split_at_checked(target.len()).ok_or_else(beyond)).transpose()? {
                Some((now, later)) => {
                    target.copy_from_slice(now);
                    bytes = Some(later);
                }
                None => target.fill(0),
            }
            page += pages;
        }
        Ok(())
    }
}

impl PageSink for Memory {
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        self.put(first_page, (bytes.len() / PAGE_SIZE) as u64, Some(bytes))
    }

    fn zero(&self, first_page: u64, count: u64) -> io::Result<()> {
        self.put(first_page, count, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_restored_is_compared_and_a_deep_generation_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let results = measure(directory.path(), ByteSize(3 << 20), 12, 1).unwrap();
        assert_eq!(results.iter().map(|result| result.depth).collect::<Vec<_>>(), [1, 12, 1, 12]);
        assert!(
            results.iter().all(|result| result.restore > 0.0 && result.raw_read > 0.0 && result.amplification >= 1.0)
        );
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_memory_takes_runs_across_its_pieces() {
        let memory = Memory::new((PIECE + 3) * PAGE_SIZE);
        let run = vec![7; 5 * PAGE_SIZE];
        memory.zero(0, PIECE as u64 + 3).unwrap();
        memory.write(PIECE as u64 - 2, &run).unwrap();
        let mut image = vec![0; (PIECE + 3) * PAGE_SIZE];
        image[(PIECE - 2) * PAGE_SIZE..].fill(7);
        assert!(memory.holds(&image));
        assert!(memory.write(PIECE as u64 - 1, &run).is_err());
    }
}
