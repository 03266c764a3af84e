//! Reading a generation, page by page.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::decode;
use crate::error::StoreError;
use crate::frame::{Malformed, crc};
use crate::generation::{BlobInfo, Generation, GenerationId, PAGE_SIZE, Page, RegionInfo};
use crate::hash::Hash;
use crate::node::{Entry, Link, Manifest, ManifestRegion};
use crate::pack::PackFile;
use crate::record::Committed;
use crate::store::Store;

/// What a reader had to do beyond reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReaderStats {
    /// Pages handed out that are not zero.
    pub pages: u64,
    /// Pages of which one copy was bad and another good: a scrub with repair is due.
    pub saved_by_redundancy: u64,
}

/// One generation, open for reading. Many may be open, of any generations, while a writer is at work.
///
/// A reader does not hold its generation: if that is purged and swept meanwhile, reads fail with [`StoreError::Damaged`].
#[derive(Debug)]
pub struct Reader {
    pub(crate) store: Store,
    pub(crate) committed: Arc<Committed>,
    pub(crate) manifest: Manifest,
    pub(crate) pages: AtomicU64,
    pub(crate) saved: AtomicU64,
}

impl Store {
    /// Opens a generation for reading.
    ///
    /// # Errors
    /// [`StoreError::NoSuchGeneration`]; [`StoreError::Damaged`] if both copies of its manifest are lost.
    pub fn reader(&self, id: &GenerationId) -> Result<Reader, StoreError> {
        let committed = Arc::clone(self.state().find(id)?);
        let manifest = self.inner.archive.manifest(&committed.manifest)?;
        Ok(Reader { store: self.clone(), committed, manifest, pages: AtomicU64::new(0), saved: AtomicU64::new(0) })
    }

    /// One copy of a page, verified, from its stored bytes.
    pub(crate) fn check_copy(hash: Hash, link: &Link, stored: &[u8], page: &mut Page) -> Result<(), Malformed> {
        if crc(stored) != link.crc {
            return Err(Malformed("its CRC is wrong"));
        }
        decode(link.codec, stored, page)?;
        if Hash::of(page) == hash { Ok(()) } else { Err(Malformed("its hash is wrong")) }
    }

    /// Reads one copy of a page.
    pub(crate) fn read_copy(&self, hash: Hash, link: &Link, page: &mut Page) -> Result<(), Malformed> {
        let mut buffer = [0; PAGE_SIZE];
        let stored = &mut buffer[..usize::from(link.length)];
        let mut attempt = || {
            let packs = &self.inner.packs;
            packs.read(PackFile::Data, link.pack, link.offset(), stored).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Malformed("its pack is missing"),
                io::ErrorKind::UnexpectedEof => Malformed("its pack is too short"),
                _ => Malformed("its pack cannot be read"),
            })?;
            Self::check_copy(hash, link, stored, page)
        };
        attempt().or_else(|_| {
            // The file may have been replaced by a repair since it was opened.
            self.inner.packs.forget(PackFile::Data, link.pack);
            attempt()
        })
    }

    /// Reads a page from the first copy that is good; says which one that was.
    pub(crate) fn read_entry(&self, entry: &Entry, page: &mut Page) -> Result<usize, Malformed> {
        let mut why = Malformed("it has no copy");
        for (number, link) in entry.links().enumerate() {
            match self.read_copy(entry.hash, &link, page) {
                Ok(()) => return Ok(number),
                Err(error) => why = error,
            }
        }
        Err(why)
    }
}

impl Reader {
    /// What the ledger knows of the generation.
    #[must_use]
    pub fn generation(&self) -> &Generation {
        &self.committed.info
    }

    /// Its regions. Their places in this list are what the other functions want as `region`.
    #[must_use]
    pub fn regions(&self) -> Vec<RegionInfo> {
        let info = |region: &ManifestRegion| RegionInfo {
            name: region.name.clone(),
            kind: region.kind.clone(),
            size: region.size,
        };
        self.manifest.regions.iter().map(info).collect()
    }

    /// The place of the region called `name`.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<usize> {
        self.manifest.regions.iter().position(|region| region.name == name)
    }

    /// Its blobs.
    #[must_use]
    pub fn blobs(&self) -> Vec<BlobInfo> {
        self.manifest.blobs.iter().map(|blob| BlobInfo { name: blob.name.clone(), length: blob.length }).collect()
    }

    /// The bytes of the blob called `name`; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if a piece is lost in both copies.
    pub fn blob(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.manifest.blobs.iter().find(|blob| blob.name == name);
        found.map(|blob| self.store.inner.archive.blob(blob)).transpose()
    }

    pub(crate) fn manifest_region(&self, region: usize) -> Result<&ManifestRegion, StoreError> {
        let all = &self.manifest.regions;
        all.get(region)
            .ok_or_else(|| StoreError::invalid(format!("the generation has {} regions, not {}", all.len(), region + 1)))
    }

    /// Fills `page` with page `page_number` of a region, verified by CRC and hash; from another copy if one is bad. `false` if the page
    /// is zero (then `page` is zeroed).
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if no copy is good: `page` must not be used then. [`StoreError::Invalid`] outside the region.
    pub fn read_page(&self, region: usize, page_number: u64, page: &mut Page) -> Result<bool, StoreError> {
        let region = self.manifest_region(region)?;
        if page_number >= crate::generation::pages_of(region.size) {
            return Err(StoreError::invalid(format!("page {page_number} lies outside region {}", region.name)));
        }
        let Some(entry) = self.store.inner.archive.lookup(region, page_number)? else {
            page.fill(0);
            return Ok(false);
        };
        let copy = self.store.read_entry(&entry, page).map_err(|why| self.lost(region, page_number, why))?;
        self.pages.fetch_add(1, Ordering::Relaxed);
        self.saved.fetch_add(u64::from(copy > 0), Ordering::Relaxed);
        Ok(true)
    }

    pub(crate) fn lost(&self, region: &ManifestRegion, page: u64, why: Malformed) -> StoreError {
        StoreError::damaged(format!(
            "page {page} of region {} of generation {} ({why})",
            region.name, self.committed.info.id
        ))
    }

    /// The pages of a region that are not zero, as ranges, in order.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if the archive cannot be read.
    pub fn present(&self, region: usize) -> Result<Vec<std::ops::Range<u64>>, StoreError> {
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        let region = self.manifest_region(region)?;
        self.store.inner.archive.leaves(region, 0, &mut |first, leaf| {
            for (page, _) in (first..).zip(leaf).filter(|(_, entry)| entry.is_some()) {
                match ranges.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => ranges.push(page..page + 1),
                }
            }
            Ok(true)
        })?;
        Ok(ranges)
    }

    /// What this reader had to do so far.
    #[must_use]
    pub fn stats(&self) -> ReaderStats {
        ReaderStats {
            pages: self.pages.load(Ordering::Relaxed),
            saved_by_redundancy: self.saved.load(Ordering::Relaxed),
        }
    }
}
