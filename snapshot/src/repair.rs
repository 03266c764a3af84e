//! Healing bad copies from good ones. A damaged file is not written to: a whole one is built beside it and renamed over it.

use std::collections::BTreeMap;
use std::io;

use vfs::{OpenMode, VfsFile};

use crate::batch::is_zero;
use crate::codec::Encoder;
use crate::codec::{Codec, Compression};
use crate::error::StoreError;
use crate::frame::crc;
use crate::generation::{PAGE_SIZE, Page};
use crate::impact::Needed;
use crate::ledger::{State, UNFINISHED};
use crate::node::Link;
use crate::pack::{BLOCK, MIRRORS, PackFile, header, sync_dir};
use crate::scrub::{BadNode, BadPage, Damage, Findings, Progress, ScrubReport};
use crate::store::Store;

/// Bytes copied at a time.
const COPY: usize = 1 << 20;

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RepairReport {
    /// What was damaged, and is whole again.
    pub healed: Vec<Damage>,
    /// What is still damaged or lost.
    pub remaining: ScrubReport,
}

/// Good bytes for one file, by offset.
type Patches = BTreeMap<u64, Vec<u8>>;

impl Store {
    /// Verifies everything as [`Store::scrub`] does, heals what has a good copy (the other ledger, the other mirror of the archive,
    /// any other copy of the same page in the store), and verifies again. Holds the store's lock throughout.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Io`]: what was healed by then stays so.
    pub fn repair(&self, progress: &mut dyn FnMut(Progress)) -> Result<RepairReport, StoreError> {
        let _lock = self.lock()?;
        let found = self.inner.ledger.load()?;
        let findings = self.find(&found, progress);
        let before = self.report(&found, &findings);
        // Makes the two ledgers equal if they are not.
        let state = self.current()?;
        if before.damage.is_empty() {
            return Ok(RepairReport { healed: Vec::new(), remaining: before });
        }
        for ((file, pack), patches) in self.patches(&state, &findings) {
            self.rebuild(file, pack, &patches, &state)?;
        }
        let remaining = self.report(&state, &self.find(&state, progress));
        let still = |damage: &Damage| {
            remaining.damage.iter().any(|left| (&left.file, left.offset) == (&damage.file, damage.offset))
        };
        let healed = before.damage.into_iter().filter(|damage| !still(damage)).collect();
        Ok(RepairReport { healed, remaining })
    }

    fn patches(&self, state: &State, findings: &Findings) -> BTreeMap<(PackFile, u32), Patches> {
        let mut all: BTreeMap<(PackFile, u32), Patches> = BTreeMap::new();
        for (file, pack, _) in &findings.headers {
            let good = header(state.store, *file == PackFile::Data, *pack);
            all.entry((*file, *pack)).or_default().insert(0, good);
        }
        for bad in &findings.nodes {
            if let Some(bytes) = self.good_node(bad) {
                all.entry((bad.mirror, bad.node.pack)).or_default().insert(bad.node.offset(), bytes);
            }
        }
        let needed = Needed::of(&self.inner.archive, state, findings);
        for bad in &findings.pages {
            if let Some(bytes) = needed.sources.get(&bad.hash).and_then(|source| self.good_page(bad, source)) {
                all.entry((PackFile::Data, bad.link.pack)).or_default().insert(bad.link.offset(), bytes);
            }
        }
        all
    }

    /// The bytes of a node from the other mirror.
    fn good_node(&self, bad: &BadNode) -> Option<Vec<u8>> {
        let other = MIRRORS.iter().find(|mirror| **mirror != bad.mirror)?;
        self.inner.archive.fetch_from(*other, &bad.node).ok()?;
        let mut bytes = vec![0; bad.node.length as usize];
        self.inner.packs.read(*other, bad.node.pack, bad.node.offset(), &mut bytes).ok()?;
        Some(bytes)
    }

    /// The bytes that belong where a bad copy is, made from a good one. They must be the very bytes that were there, since
    /// every generation that leans on them knows their CRC.
    fn good_page(&self, bad: &BadPage, source: &Link) -> Option<Vec<u8>> {
        let mut page: Page = [0; PAGE_SIZE];
        self.read_copy(bad.hash, source, &mut page).ok()?;
        let fits = |bytes: &[u8]| bytes.len() == usize::from(bad.link.length) && crc(bytes) == bad.link.crc;
        let mut stored = vec![0; usize::from(source.length)];
        if source.codec == bad.link.codec {
            self.inner.packs.read(PackFile::Data, source.pack, source.offset(), &mut stored).ok()?;
            if fits(&stored) {
                return Some(stored);
            }
        }
        let compression = match bad.link.codec {
            Codec::Raw => Compression::None,
            Codec::Lz4 => Compression::Lz4,
            Codec::Zstd => Compression::Zstd,
        };
        let mut encoder = Encoder::new(compression);
        let (_, bytes) = encoder.encode(&page);
        fits(bytes).then(|| bytes.to_vec())
    }

    /// Builds a pack file anew: what can be read of the old one, with `patches` over it.
    fn rebuild(&self, file: PackFile, pack: u32, patches: &Patches, state: &State) -> Result<(), StoreError> {
        let Store { inner } = self;
        let path = inner.packs.path(file, pack);
        let unfinished = inner.packs.dir.join(format!("{}{UNFINISHED}", file.name(pack)));
        let new =
            inner.vfs.open(&unfinished, OpenMode::CreateTruncate).map_err(StoreError::io("create", &unfinished))?;
        match inner.vfs.open(&path, OpenMode::Read) {
            Ok(old) => copy(&*old, &*new).map_err(StoreError::io("copy into", &unfinished))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(StoreError::io("open", &path)(error)),
        }
        for (offset, bytes) in patches {
            new.write_all_at(bytes, *offset).map_err(StoreError::io("write", &unfinished))?;
        }
        // Exactly as long as a writer expects it to be, if writers go on in it; whole blocks in any case.
        let end = if file == PackFile::Data { state.ends.data } else { state.ends.archive };
        let length = new.len().map_err(StoreError::io("read the length of", &unfinished))?.next_multiple_of(BLOCK);
        let length = if pack == end.pack { length.max(end.end) } else { length };
        new.set_len(length).map_err(StoreError::io("set the length of", &unfinished))?;
        new.sync_all().map_err(StoreError::io("sync", &unfinished))?;
        inner.vfs.rename(&unfinished, &path).map_err(StoreError::io("rename a new file to", &path))?;
        inner.packs.forget(file, pack);
        sync_dir(&*inner.vfs, &inner.packs.dir)
    }
}

/// Copies what can be read; what cannot, and what is zero, stays a hole.
fn copy(old: &dyn VfsFile, new: &dyn VfsFile) -> io::Result<()> {
    let length = old.len()?;
    let mut buffer = vec![0; COPY];
    let mut at = 0;
    while at < length {
        let count = (length - at).min(COPY as u64) as usize;
        let chunk = &mut buffer[..count];
        if old.read_exact_at(chunk, at).is_err() {
            read_block_by_block(old, chunk, at);
        }
        let blocks: Vec<&[u8]> = chunk.chunks(BLOCK as usize).collect();
        let mut done = 0;
        for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let length: usize = run.iter().map(|block| block.len()).sum();
            if !is_zero(run[0]) {
                new.write_all_at(&chunk[done..done + length], at + done as u64)?;
            }
            done += length;
        }
        at += count as u64;
    }
    if new.len()? < length { new.set_len(length) } else { Ok(()) }
}

fn read_block_by_block(file: &dyn VfsFile, chunk: &mut [u8], at: u64) {
    for (block, bytes) in chunk.chunks_mut(BLOCK as usize).enumerate() {
        if file.read_exact_at(bytes, at + block as u64 * BLOCK).is_err() {
            bytes.fill(0);
        }
    }
}
