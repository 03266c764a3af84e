//! Simulated persistent memory behind simulated caches.
//!
//! A cache line may be evicted at any time, and a store of 8 aligned bytes is what persists in one piece. So a word that was stored since its
//! line was last written back and fenced may be found with any value that it had since, whatever its neighbours are found with: harsher than any
//! machine, where stores to one line persist in order.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

use vfs::crash::CrashVfs;
use vfs::{OpenMode, Vfs};

use super::{Engine, Mapper, Progress};
use crate::region::{Region, RegionError};
use crate::rvm::memory::{Copied, Working};

const LINE: usize = 64;

/// What is known of one memory.
#[derive(Debug, Clone)]
struct Cells {
    /// Its file, and where its bytes lie there.
    file: (PathBuf, u64),
    base: Base,
    durable: Vec<u64>,
    /// As of the last look.
    seen: Vec<u64>,
    /// Values that words had since they were last known to be durable, in order.
    newer: BTreeMap<usize, Vec<u64>>,
    /// Values that were written back and not fenced.
    pending: BTreeMap<usize, u64>,
}

#[derive(Debug, Clone, Copy)]
struct Base(NonNull<u8>);

// SAFETY: one thread alone runs a script, and looks.
unsafe impl Send for Base {}

impl Cells {
    fn word(&self, index: usize) -> u64 {
        // SAFETY: the memory lives as long as the world is watched, and has `seen.len()` words; no reference to it is alive while the
        // engine or the script calls.
        unsafe { self.base.0.as_ptr().cast::<u64>().add(index).read_volatile() }
    }

    /// Notices what was stored.
    fn look(&mut self) {
        for index in 0..self.seen.len() {
            let now = self.word(index);
            if now != self.seen[index] {
                self.seen[index] = now;
                self.newer.entry(index).or_default().push(now);
            }
        }
    }

    fn write_back(&mut self, range: Range<usize>) {
        let lines = range.start / LINE * LINE..range.end.next_multiple_of(LINE).min(self.seen.len() * 8);
        for index in lines.start / 8..lines.end / 8 {
            if self.newer.contains_key(&index) {
                self.pending.insert(index, self.seen[index]);
            }
        }
    }

    fn fence(&mut self) {
        for (index, value) in std::mem::take(&mut self.pending) {
            self.durable[index] = value;
            if let Some(newer) = self.newer.get_mut(&index) {
                let upto = newer.iter().rposition(|other| *other == value).map_or(0, |at| at + 1);
                newer.drain(..upto);
                if newer.is_empty() {
                    self.newer.remove(&index);
                }
            }
        }
    }
}

/// What may be found after a cut at one moment.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    memories: Vec<Contents>,
}

#[derive(Debug, Clone)]
struct Contents {
    file: (PathBuf, u64),
    durable: Arc<Vec<u64>>,
    newer: Vec<(usize, Vec<u64>)>,
}

#[derive(Debug, Default)]
struct Inner {
    memories: BTreeMap<u64, Cells>,
    watched: bool,
    /// Durable and begun states, as the script said last.
    progress: (usize, usize),
    snapshots: Vec<(Snapshot, usize, usize)>,
}

/// All memory of a machine.
#[derive(Debug, Clone, Default)]
pub(super) struct World(Arc<Mutex<Inner>>);

impl World {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// From now on the memory is kept at each moment.
    pub(super) fn watch(&self) {
        let mut inner = self.lock();
        inner.watched = true;
        inner.progress = (0, 1);
    }

    /// A moment at which the power may go.
    pub(super) fn happens(&self, progress: &Progress) {
        let mut inner = self.lock();
        // What was stored up to now was stored before the script said how far it is.
        inner.moment();
        inner.progress = (progress.durable, progress.states.len());
        inner.moment();
    }

    pub(super) fn snapshots(&self) -> Vec<(Snapshot, usize, usize)> {
        std::mem::take(&mut self.lock().snapshots)
    }
}

impl Inner {
    fn moment(&mut self) {
        self.memories.values_mut().for_each(Cells::look);
        if self.watched {
            let contents = |cells: &Cells| Contents {
                file: cells.file.clone(),
                durable: Arc::new(cells.durable.clone()),
                newer: cells.newer.clone().into_iter().collect(),
            };
            let memories = self.memories.values().map(contents).collect();
            self.snapshots.push((Snapshot { memories }, self.progress.0, self.progress.1));
        }
    }
}

impl Snapshot {
    /// How many states there are, if they are at most so many; else 0.
    pub(super) fn few(&self, most: u64) -> u64 {
        let options =
            self.memories.iter().flat_map(|contents| &contents.newer).map(|(_, newer)| newer.len() as u64 + 1);
        let all = options.fold(1_u64, u64::saturating_mul);
        if all <= most { all } else { 0 }
    }

    /// Chooses for state `number` of [`Snapshot::few`]: called with the index of the word, and how many values it may have.
    pub(super) fn digit(&self, number: u64, (index, options): (usize, u64)) -> u64 {
        let before = self.memories.iter().flat_map(|contents| &contents.newer).take(index);
        number / before.map(|(_, newer)| newer.len() as u64 + 1).product::<u64>() % options
    }

    /// The disk with that memory in its files, each word as `choose` says.
    pub(super) fn onto(&self, disk: &CrashVfs, choose: &mut dyn FnMut((usize, u64)) -> u64) -> CrashVfs {
        let left = disk.after_kill();
        let mut index = 0;
        for Contents { file: (path, offset), durable, newer } in &self.memories {
            let mut words = (**durable).clone();
            for (word, values) in newer {
                let choice = choose((index, values.len() as u64 + 1));
                index += 1;
                if let Some(value) = choice.checked_sub(1).and_then(|choice| values.get(choice as usize)) {
                    words[*word] = *value;
                }
            }
            let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
            let file = left.open(path, OpenMode::ReadWrite).unwrap();
            file.write_all_at(&bytes, *offset).unwrap();
            file.sync_data().unwrap();
        }
        left
    }
}

/// Chooses by a seed: 0 nothing that was not fenced, 1 the newest of all, 2 any; others lean to the one or the other.
pub(super) fn by_seed(seed: u64) -> impl FnMut((usize, u64)) -> u64 {
    let mut state = seed;
    let mut next = move || {
        // SplitMix64, as in `vfs::crash`.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let rare = if seed > 2 { 1 << (seed % 5) } else { 1 };
    move |(_, options)| match seed {
        0 => 0,
        1 => options - 1,
        2 => next() % options,
        // All but a few of one kind.
        _ if next() % rare != 0 => (seed / 5 % 2) * (options - 1),
        _ => next() % options,
    }
}

/// A region in that memory.
#[derive(Debug)]
struct Simulated {
    world: World,
    id: u64,
    bytes: Copied,
}

impl Mapper for World {
    fn map(&self, region: &Region, _engine: Engine) -> Result<Box<dyn Working>, RegionError> {
        let bytes = Copied::of(region)?;
        let words = bytes.len() / 8;
        let mut cells = Cells {
            file: (region.path().to_owned(), region.data_offset()),
            base: Base(bytes.base()),
            durable: Vec::new(),
            seen: vec![0; words],
            newer: BTreeMap::new(),
            pending: BTreeMap::new(),
        };
        cells.look();
        cells.newer.clear();
        cells.durable.clone_from(&cells.seen);
        self.lock().memories.insert(region.id(), cells);
        Ok(Box::new(Simulated { world: self.clone(), id: region.id(), bytes }))
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        self.world.lock().memories.remove(&self.id);
    }
}

// SAFETY: the memory is that of the copy.
unsafe impl Working for Simulated {
    fn base(&self) -> NonNull<u8> {
        self.bytes.base()
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn write_back(&self, range: Range<usize>) {
        let mut inner = self.world.lock();
        inner.moment();
        if let Some(cells) = inner.memories.get_mut(&self.id) {
            cells.write_back(range);
        }
    }

    fn fence(&self) {
        let mut inner = self.world.lock();
        inner.moment();
        inner.memories.values_mut().for_each(Cells::fence);
    }

    fn save(&self, _region: &Region) -> Result<(), RegionError> {
        Ok(())
    }
}
