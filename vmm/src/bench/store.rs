//! How fast generations are stored, opened and deleted, held against the raw disk in the same run.
//!
//! The pages are noise: nothing is zero, nothing is equal, nothing can be compressed, so every one of them is written.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use snapshot::{GenerationId, NewGeneration, Options, PAGE_SIZE, RegionSpec, Store, StoreError};
use vfs::host::HostVfs;

use super::alternatives::{self, Alternative, Changing};
use super::restore::{evict, evict_all, read_raw};
use super::{BenchError, Distribution};
use crate::machine::config::ByteSize;
use crate::machine::time::nanoseconds;

/// The lineage of every store here.
pub(super) const LINEAGE: &str = "bench";
/// Pages that change from one small generation to the next.
const DIRTY: u64 = 64;
/// What other ways to keep generations are compared with.
const CHANGING: Changing = Changing { dirty: 1024, generations: 8 };

/// What was measured. Throughputs are medians, in bytes a second.
#[derive(Debug, Clone, Serialize)]
pub struct StoreResult {
    /// Bytes of one full generation.
    pub memory: ByteSize,
    /// Writing that many bytes to a new file in one go, and flushing it.
    pub raw_write: f64,
    /// Storing a full generation, durably.
    pub store: f64,
    /// The second over the first.
    pub share: f64,
    /// CRC32 of pages, one thread, nothing else.
    pub crc: f64,
    /// BLAKE3 of pages, one thread, nothing else.
    pub hash: f64,
    /// A small generation, from its beginning to its commit: 64 pages changed.
    pub small: Distribution,
    /// Generations in the store for what follows.
    pub generations: u32,
    /// Opening it.
    pub open: Distribution,
    /// Deleting one of them.
    pub purge: Distribution,
    /// Giving back the space of those that were deleted, all at once; the archive of all others is walked for it.
    pub sweep_ns: u64,
    /// Reading as much as a generation from a file, from its beginning to its end, cold.
    pub raw_read: f64,
    /// Verifying everything in the store, cold.
    pub scrub: f64,
    /// The second over the first.
    pub scrub_share: f64,
    /// The same memory kept in other ways.
    pub alternatives: Vec<Alternative>,
}

/// Measures in directories below `directory`, which is left empty.
///
/// # Errors
/// [`BenchError`].
pub fn measure(directory: &Path, memory: ByteSize, generations: u32, runs: usize) -> Result<StoreResult, BenchError> {
    let mut image = vec![0; usize::try_from(memory.0).unwrap_or(usize::MAX)];
    noise(&mut image, 1);
    let (mut raw, mut stored) = (Vec::new(), Vec::new());
    let at = directory.join("store");
    for _ in 0..runs.clamp(1, 9) {
        raw.push(write_raw(&directory.join("raw"), &image)?);
        remove(&directory.join("raw"))?;
        remove(&at)?;
        let store = create(&at)?;
        let begun = Instant::now();
        write_full(&store, &image)?;
        stored.push(throughput(image.len(), begun));
    }
    let crc = rate(&image, |page| u64::from(crc32fast::hash(page)));
    let hash = rate(&image, |page| u64::from(blake3::hash(page).as_bytes()[0]));
    let store = create(&at)?;
    let mut small = Vec::new();
    for number in 2..=u64::from(generations) {
        let pages = change(&mut image, number, DIRTY, Changes::Scattered);
        let begun = Instant::now();
        put(&store, &image, number, &pages)?;
        small.push(nanoseconds(begun.elapsed()));
    }
    let mut open = Vec::new();
    for _ in 0..runs {
        let begun = Instant::now();
        let opened = create(&at)?;
        open.push(nanoseconds(begun.elapsed()));
        if opened.generations(LINEAGE).len() != generations as usize {
            return Err(BenchError::Guest("the store has lost generations".to_owned()));
        }
    }
    let purge = purges(&store, generations, runs)?;
    let begun = Instant::now();
    store.sweep(&mut |_| ())?;
    let sweep_ns = nanoseconds(begun.elapsed());
    drop(store);
    let (raw_read, scrub) = scrubs(directory, &image, runs)?;
    remove(&at)?;
    let alternatives = alternatives::measure(directory, memory, CHANGING)?;
    let (raw_write, stored) = (median(raw), median(stored));
    Ok(StoreResult {
        memory,
        raw_write,
        store: stored,
        share: stored / raw_write,
        crc,
        hash,
        small: Distribution::of(small),
        generations,
        open: Distribution::of(open),
        purge: Distribution::of(purge),
        sweep_ns,
        raw_read,
        scrub,
        scrub_share: scrub / raw_read,
        alternatives,
    })
}

/// How quickly a file is read, and everything in the store verified: medians.
fn scrubs(directory: &Path, image: &[u8], runs: usize) -> Result<(f64, f64), BenchError> {
    let (at, raw) = (directory.join("store"), directory.join("raw"));
    write_raw(&raw, image)?;
    let (mut reads, mut scrubs) = (Vec::new(), Vec::new());
    for _ in 0..runs.clamp(1, 9) {
        evict(&raw)?;
        reads.push(read_raw(&raw)?);
        evict_all(&at)?;
        let begun = Instant::now();
        let report = create(&at)?.scrub(&mut |_| ())?;
        if !report.is_clean() {
            return Err(BenchError::Guest(format!("the store is damaged: {:?}", report.damage)));
        }
        scrubs.push(throughput(usize::try_from(report.verified.bytes).unwrap_or(usize::MAX), begun));
    }
    remove(&raw)?;
    Ok((median(reads), median(scrubs)))
}

/// Deletes generations one by one, from the middle outwards.
fn purges(store: &Store, generations: u32, runs: usize) -> Result<Vec<u64>, StoreError> {
    let first = u64::from(generations / 2).max(1);
    let count = (runs as u64).min(u64::from(generations).saturating_sub(first));
    let purge = |number| {
        let begun = Instant::now();
        store.purge(&[GenerationId::new(LINEAGE, number)])?;
        Ok(nanoseconds(begun.elapsed()))
    };
    (first..first + count).map(purge).collect()
}

/// The store in `directory`; made if there is none.
pub(super) fn create(directory: &Path) -> Result<Store, StoreError> {
    Store::open(Arc::new(HostVfs), directory, Options::default())
}

/// The first generation: all of `image`.
pub(super) fn write_full(store: &Store, image: &[u8]) -> Result<(), StoreError> {
    let mut writer = store.begin(NewGeneration::automatic(LINEAGE, 1))?;
    let region = writer.region(&region(image))?;
    writer.put_run(region, 0, image)?;
    writer.commit().map(drop)
}

/// Where the pages lie that change from one generation to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Changes {
    /// In one run, which goes on where the one before ended.
    InTurn,
    /// Anywhere: in the end the pages of one generation lie all over the store, between others that are old.
    Scattered,
}

/// Changes `dirty` pages of `image` for generation `number`. Returns which, sorted, none twice.
pub(super) fn change(image: &mut [u8], number: u64, dirty: u64, changes: Changes) -> Vec<u64> {
    let pages = (image.len() / PAGE_SIZE) as u64;
    let mut random = Random::new(number);
    let mut changed = Vec::new();
    for index in 0..dirty {
        let page = match changes {
            Changes::InTurn => number.wrapping_mul(dirty).wrapping_add(index),
            Changes::Scattered => random.next(),
        } % pages.max(1);
        let start = page as usize * PAGE_SIZE;
        let Some(bytes) = image.get_mut(start..start + PAGE_SIZE) else { continue };
        noise(bytes, random.next());
        changed.push(page);
    }
    changed.sort_unstable();
    changed.dedup();
    changed
}

/// Stores `pages` of `image` as generation `number`.
pub(super) fn put(store: &Store, image: &[u8], number: u64, pages: &[u64]) -> Result<(), StoreError> {
    let mut writer = store.begin(NewGeneration::automatic(LINEAGE, number))?;
    let region = writer.region(&region(image))?;
    for page in pages {
        let start = *page as usize * PAGE_SIZE;
        let Some(bytes) = image.get(start..start + PAGE_SIZE) else { continue };
        writer.put_run(region, *page, bytes)?;
    }
    writer.commit().map(drop)
}

fn region(image: &[u8]) -> RegionSpec {
    RegionSpec { name: "ram".to_owned(), kind: "ram".to_owned(), size: image.len() as u64 }
}

/// Writes `image` as one file, durably. In bytes a second.
pub(super) fn write_raw(path: &Path, image: &[u8]) -> Result<f64, BenchError> {
    let system = |doing| move |source| BenchError::System { doing, source };
    let begun = Instant::now();
    let mut file = File::create(path).map_err(system("make the file for raw writes"))?;
    for piece in image.chunks(4 << 20) {
        file.write_all(piece).map_err(system("write raw"))?;
    }
    file.sync_all().map_err(system("flush raw"))?;
    Ok(throughput(image.len(), begun))
}

/// Removes a file or directory, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), BenchError> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(BenchError::System { doing: "remove what the bench made", source })
        }
        _ => Ok(()),
    }
}

fn rate(image: &[u8], of: impl Fn(&[u8]) -> u64) -> f64 {
    let begun = Instant::now();
    let sum = image.chunks_exact(PAGE_SIZE).fold(0_u64, |sum, page| sum.wrapping_add(of(page)));
    std::hint::black_box(sum);
    throughput(image.len(), begun)
}

/// Bytes a second since `begun`.
pub(super) fn throughput(bytes: usize, begun: Instant) -> f64 {
    bytes as f64 / begun.elapsed().as_secs_f64().max(1e-9)
}

/// The median; 0 of none.
pub(super) fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}

/// Fills `bytes` with noise, the same for the same seed.
pub(super) fn noise(bytes: &mut [u8], seed: u64) {
    let mut random = Random::new(seed);
    for word in bytes.chunks_mut(8) {
        let noise = random.next().to_le_bytes();
        word.iter_mut().zip(noise).for_each(|(byte, noise)| *byte = noise);
    }
}

/// xorshift64* (Vigna 2016).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}
