//! A store beside a model of it: a plain list of what every page of every generation must be.
#![allow(dead_code, clippy::unwrap_used)] // Each test file uses its own part of it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use snapshot::{
    Compression, GenerationId, NewGeneration, Options, PAGE_SIZE, Page, PageSink, Parent, RegionKey, RegionSpec, Store,
    StoreError, Writer,
};
use vfs::Vfs;

/// Where the store is.
pub(crate) fn dir() -> PathBuf {
    PathBuf::from("/pool/store")
}

/// Everything in one order, small packs, a store identity that does not change.
pub(crate) fn options() -> Options {
    Options {
        threads: 1,
        bufsize: 64 << 10,
        data_pack_bytes: 256 << 10,
        archive_pack_bytes: 64 << 10,
        lock_wait: std::time::Duration::ZERO,
        store_id: Some([7; 16]),
        ..Options::default()
    }
}

pub(crate) fn open(vfs: &Arc<dyn Vfs>, options: &Options) -> Result<Store, StoreError> {
    Store::open(Arc::clone(vfs), &dir(), options.clone())
}

/// The page made from `seed`: 0 is the zero page, even ones compress, odd ones do not.
pub(crate) fn page(seed: u32) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = u64::from(seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    match seed {
        0 => {}
        _ if seed.is_multiple_of(2) => {
            for (at, byte) in page.iter_mut().enumerate() {
                *byte = (state >> (at % 8 * 8)) as u8;
            }
        }
        _ => {
            for chunk in page.chunks_exact_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                chunk.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
            }
        }
    }
    page
}

/// What one generation must be: by region, the seeds of its pages; and a blob.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Image {
    pub(crate) regions: BTreeMap<String, Vec<u32>>,
    pub(crate) context: Vec<u8>,
}

impl Image {
    pub(crate) fn new(regions: &[(&str, usize)]) -> Self {
        let regions = regions.iter().map(|(name, pages)| ((*name).to_owned(), vec![0; *pages])).collect();
        Self { regions, context: Vec::new() }
    }
}

/// One page to be written.
#[derive(Debug, Clone)]
pub(crate) struct Put {
    pub(crate) region: String,
    pub(crate) page: u64,
    pub(crate) seed: u32,
}

pub(crate) fn put(region: &str, page: u64, seed: u32) -> Put {
    Put { region: region.to_owned(), page, seed }
}

/// Declares the regions of `image` (sizes count, content comes from the parent) and puts `puts`. Returns the image after that.
pub(crate) fn fill(writer: &mut Writer, image: &Image, puts: &[Put]) -> Result<Image, StoreError> {
    let mut keys: BTreeMap<String, RegionKey> = BTreeMap::new();
    for (name, pages) in &image.regions {
        let spec = RegionSpec { name: name.clone(), kind: "ram".into(), size: (pages.len() * PAGE_SIZE) as u64 };
        keys.insert(name.clone(), writer.region(&spec)?);
    }
    let mut image = image.clone();
    for put in puts {
        writer.put(keys[&put.region], put.page, &page(put.seed))?;
        image.regions.get_mut(&put.region).unwrap()[put.page as usize] = put.seed;
    }
    writer.blob("context", &image.context)?;
    Ok(image)
}

/// Commits `puts` on top of `parent`, whose content `image` is.
pub(crate) fn commit(
    store: &Store,
    lineage: &str,
    parent: Parent,
    image: &Image,
    puts: &[Put],
) -> Result<(GenerationId, Image), StoreError> {
    let mut writer = store.begin(NewGeneration { parent, ..NewGeneration::automatic(lineage, 1000) })?;
    let image = fill(&mut writer, image, puts)?;
    Ok((writer.commit()?.id, image))
}

/// Takes restored pages.
pub(crate) struct Memory(Mutex<Vec<u8>>);

impl Memory {
    pub(crate) fn new(pages: usize) -> Self {
        Self(Mutex::new(vec![0xEE; pages * PAGE_SIZE]))
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

impl PageSink for Memory {
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        let at = first_page as usize * PAGE_SIZE;
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, first_page: u64, count: u64) -> io::Result<()> {
        let at = first_page as usize * PAGE_SIZE;
        self.0.lock().unwrap()[at..at + count as usize * PAGE_SIZE].fill(0);
        Ok(())
    }
}

/// Compares a generation with what it must be: each page alone, all at once, and the blob.
pub(crate) fn check(store: &Store, id: &GenerationId, image: &Image) -> Result<(), String> {
    let told = |error: StoreError| format!("{id}: {error}");
    let reader = store.reader(id).map_err(told)?;
    if reader.regions().len() != image.regions.len() {
        return Err(format!("{id} has {} regions", reader.regions().len()));
    }
    for (name, seeds) in &image.regions {
        let region = reader.region(name).ok_or_else(|| format!("{id} has no region {name}"))?;
        let memory = Memory::new(seeds.len());
        reader.restore_region(region, &memory, &mut |_, _| ()).map_err(told)?;
        let mut alone = [1; PAGE_SIZE];
        for (number, (bytes, seed)) in memory.bytes().chunks_exact(PAGE_SIZE).zip(seeds).enumerate() {
            reader.read_page(region, number as u64, &mut alone).map_err(told)?;
            if bytes != page(*seed) || alone != page(*seed) {
                return Err(format!("{id}: page {number} of {name} is not the one of seed {seed}"));
            }
        }
    }
    match reader.blob("context").map_err(told)? {
        Some(context) if context == image.context => Ok(()),
        other => Err(format!("{id}: the context is {other:?}")),
    }
}

/// All files of a directory tree, with their lengths.
pub(crate) fn files(vfs: &dyn Vfs, at: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in vfs.read_dir(at).unwrap_or_default() {
        let path = at.join(&entry.name);
        match entry.kind {
            vfs::EntryKind::Directory => found.extend(files(vfs, &path)),
            _ => {
                let length = vfs.open(&path, vfs::OpenMode::Read).unwrap().len().unwrap();
                found.push((path, length));
            }
        }
    }
    found
}

pub(crate) const CODECS: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd];
