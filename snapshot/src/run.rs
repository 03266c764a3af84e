//! Reading some consecutive pages of a generation: what a page fault brings.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::codec::Codec;
use crate::error::StoreError;
use crate::generation::{PAGE_SIZE, Page, pages_of};
use crate::hash::Hash;
use crate::node::{Entry, ManifestRegion};
use crate::pack::PackFile;
use crate::reader::Reader;

impl Reader {
    /// Fills `bytes`, a whole number of pages, with the pages from `first` on, each verified by its hash; from another copy if one is bad.
    /// Pages that lie side by side in a pack are read at once. Returns how many of them are not zero.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] names the first page of which no copy is good; `bytes` must not be used then. [`StoreError::Invalid`]
    /// outside the region.
    pub fn read_run(&self, region: usize, first: u64, bytes: &mut [u8]) -> Result<u64, StoreError> {
        let region = self.manifest_region(region)?;
        let count = (bytes.len() / PAGE_SIZE) as u64;
        let end = first.checked_add(count).filter(|end| *end <= pages_of(region.size));
        let Some(end) = end.filter(|_| bytes.len().is_multiple_of(PAGE_SIZE)) else {
            return Err(StoreError::invalid(format!(
                "{count} pages from {first} on are not in region {}",
                region.name
            )));
        };
        let entries = self.entries(region, first..end)?;
        bytes.fill(0);
        for side_by_side in entries.chunk_by(|(page, entry), (next, after)| {
            *next == page + 1
                && entry.first.codec == Codec::Raw
                && after.first.codec == Codec::Raw
                && entry.first.pack == after.first.pack
                && entry.first.end() == after.first.offset()
        }) {
            let start = side_by_side.first().map_or(0, |(page, _)| ((page - first) as usize) * PAGE_SIZE);
            let target = bytes.get_mut(start..start + side_by_side.len() * PAGE_SIZE).unwrap_or_default();
            self.read_side_by_side(region, side_by_side, target)?;
        }
        self.pages.fetch_add(entries.len() as u64, Ordering::Relaxed);
        Ok(entries.len() as u64)
    }

    /// The pages of a range that are not zero, in order.
    fn entries(&self, region: &ManifestRegion, pages: Range<u64>) -> Result<Vec<(u64, Entry)>, StoreError> {
        let mut entries = Vec::new();
        self.store.inner.archive.leaves(region, pages.start, &mut |first, leaf| {
            let found = (first..).zip(leaf).filter(|(page, _)| pages.contains(page));
            entries.extend(found.filter_map(|(page, entry)| Some((page, (*entry)?))));
            Ok(first + (leaf.len() as u64) < pages.end)
        })?;
        Ok(entries)
    }

    fn read_side_by_side(
        &self,
        region: &ManifestRegion,
        entries: &[(u64, Entry)],
        target: &mut [u8],
    ) -> Result<(), StoreError> {
        let Some((_, Entry { first: link, .. })) = entries.first() else { return Ok(()) };
        // What cannot be read so fails its hash, or is read on its own at once.
        let packs = &self.store.inner.packs;
        let at_once = link.codec == Codec::Raw && packs.read(PackFile::Data, link.pack, link.offset(), target).is_ok();
        let hashes = if at_once { Hash::of_pages(target.chunks_exact(PAGE_SIZE)) } else { Vec::new() };
        for (index, ((page, entry), bytes)) in entries.iter().zip(target.as_chunks_mut::<PAGE_SIZE>().0).enumerate() {
            if hashes.get(index) != Some(&entry.hash) {
                self.read_alone(region, *page, entry, bytes)?;
            }
        }
        Ok(())
    }

    fn read_alone(
        &self,
        region: &ManifestRegion,
        number: u64,
        entry: &Entry,
        page: &mut Page,
    ) -> Result<(), StoreError> {
        let copy = self.store.read_entry(entry, page).map_err(|why| self.lost(region, number, why))?;
        self.saved.fetch_add(u64::from(copy > 0), Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use vfs::{CrashVfs, OpenMode, Vfs};

    use super::*;
    use crate::codec::Compression;
    use crate::generation::{GenerationId, NewGeneration, RegionSpec};
    use crate::store::{Options, Store};

    const PAGES: u64 = 150;

    /// Zero, compressible, equal to others, or like no other.
    fn page(number: u64, version: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let seed = match number % 7 {
            0 => return page,
            1 => number % 3,
            _ => (number << 8 | version).wrapping_mul(0x9E37_79B9_7F4A_7C15),
        };
        let step = if number.is_multiple_of(5) { 0 } else { 0xD134_2543_DE82_EF95_u64 };
        for (at, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = seed.wrapping_add((at as u64 + 1).wrapping_mul(step)).to_le_bytes();
        }
        page
    }

    fn version(number: u64) -> u64 {
        u64::from(number.is_multiple_of(4))
    }

    fn store(vfs: &Arc<CrashVfs>, compression: Compression) -> Store {
        let options = Options { compression, ..Options::default() };
        let store = Store::open(Arc::clone(vfs) as Arc<dyn Vfs>, Path::new("/s"), options).unwrap();
        for generation in 0..2 {
            let mut writer = store.begin(NewGeneration::automatic("web", generation)).unwrap();
            let size = PAGES * PAGE_SIZE as u64 - 100;
            let ram = writer.region(&RegionSpec { name: "ram".into(), kind: "ram".into(), size }).unwrap();
            for number in (0..PAGES).filter(|number| generation == 0 || version(*number) == 1) {
                writer.put(ram, number, &page(number, generation)).unwrap();
            }
            writer.commit().unwrap();
        }
        store
    }

    #[test]
    fn every_run_is_what_its_pages_are_one_by_one() {
        for compression in [Compression::None, Compression::Lz4] {
            let store = store(&Arc::new(CrashVfs::new()), compression);
            let reader = store.reader(&GenerationId::new("web", 2)).unwrap();
            for (first, count) in [(0, PAGES), (0, 0), (PAGES, 0), (31, 2), (63, 66), (149, 1), (7, 1)] {
                let mut bytes = vec![0xA5; count as usize * PAGE_SIZE];
                let found = reader.read_run(0, first, &mut bytes).unwrap();
                let mut filled = 0;
                for (number, bytes) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
                    assert_eq!(*bytes, page(number, version(number)), "page {number} of {first}+{count}");
                    filled += u64::from(*bytes != [0; PAGE_SIZE]);
                }
                assert_eq!(found, filled);
            }
        }
    }

    #[test]
    fn what_is_outside_or_no_page_is_refused() {
        let store = store(&Arc::new(CrashVfs::new()), Compression::None);
        let reader = store.reader(&GenerationId::new("web", 2)).unwrap();
        for (first, length) in [(PAGES, PAGE_SIZE), (u64::MAX, PAGE_SIZE), (0, 100), (PAGES - 1, 2 * PAGE_SIZE)] {
            assert!(matches!(reader.read_run(0, first, &mut vec![0; length]), Err(StoreError::Invalid { .. })));
        }
        assert!(reader.read_run(1, 0, &mut []).is_err());
    }

    #[test]
    fn a_page_without_a_good_copy_is_named_and_its_neighbours_are_to_be_had() {
        let vfs = Arc::new(CrashVfs::new());
        let store = store(&vfs, Compression::None);
        let reader = store.reader(&GenerationId::new("web", 1)).unwrap();
        let region = reader.manifest_region(0).unwrap();
        let (_, entry) = reader.entries(region, 9..10).unwrap()[0];
        let path = store.inner.packs.path(PackFile::Data, entry.first.pack);
        vfs.open(&path, OpenMode::ReadWrite).unwrap().write_all_at(&[0xFF; 8], entry.first.offset() + 16).unwrap();
        let mut bytes = vec![0; 16 * PAGE_SIZE];
        let error = reader.read_run(0, 0, &mut bytes).unwrap_err();
        assert!(error.to_string().contains("page 9 of region ram of generation web@1"), "{error}");
        reader.read_run(0, 10, &mut bytes[..PAGE_SIZE]).unwrap();
        assert_eq!(bytes[..PAGE_SIZE], page(10, 0));
    }
}
