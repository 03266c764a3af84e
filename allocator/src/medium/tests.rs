use std::fs::File;
use std::path::PathBuf;

use proptest::prelude::*;
use vfs::{HostVfs, OpenMode, Vfs};

use super::*;

/// An image of so many pages behind a header page.
struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
    file: Box<dyn VfsFile>,
    pages: u64,
}

impl Image {
    fn new(pages: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = HostVfs.open(&path, OpenMode::CreateNew).unwrap();
        file.allocate(0, (pages + 1) * PAGE_SIZE).unwrap();
        Self { _dir: dir, path, file, pages }
    }

    fn backing(&self) -> Backing<'_> {
        Backing { file: &*self.file, path: &self.path, offset: PAGE_SIZE, size: self.pages * PAGE_SIZE }
    }

    fn on_file(&self) -> Vec<u8> {
        let mut bytes = vec![0; (self.pages * PAGE_SIZE) as usize];
        self.file.read_exact_at(&mut bytes, PAGE_SIZE).unwrap();
        bytes
    }

    /// A mapping of `medium`. A DAX one without `MAP_SYNC`, since test machines have no such file system: all else is as there.
    fn map(&self, medium: MediumKind) -> Mapping {
        match medium {
            MediumKind::Dax => {
                let mut mapping = Mapping::new(&self.backing(), medium, MapFlags::SHARED).unwrap();
                mapping.write_back = dax::WriteBack::of_this_cpu();
                mapping
            }
            _ => map(medium, &self.backing()).unwrap(),
        }
    }
}

fn put(mapping: &Mapping, at: usize, bytes: &[u8]) {
    assert!(at + bytes.len() <= mapping.len());
    // SAFETY: the range was just checked, and nothing else uses the mapping.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), mapping.as_ptr().add(at), bytes.len()) };
}

fn all(mapping: &Mapping) -> Vec<u8> {
    // SAFETY: nothing writes to the mapping while the slice lives.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr(), mapping.len()) }.to_vec()
}

fn naive_runs(bitmap: &[u64], pages: u64) -> Vec<u64> {
    let set = |page: &u64| bitmap.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1);
    (0..pages).filter(set).collect()
}

proptest! {
    #[test]
    fn runs_are_the_set_bits_in_as_few_pieces_as_can_be(
        bitmap in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..6), pages in 0u64..400
    ) {
        let found: Vec<_> = runs(&bitmap, pages).collect();
        let flat: Vec<u64> = found.iter().cloned().flatten().collect();
        prop_assert_eq!(flat, naive_runs(&bitmap, pages));
        prop_assert!(found.iter().all(|run| run.start < run.end));
        prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
    }

    #[test]
    fn what_was_persisted_is_there_when_mapped_anew(
        writes in prop::collection::vec((0usize..40 * 4096, prop::collection::vec(any::<u8>(), 1..9000)), 1..12),
        medium in prop::sample::select(MediumKind::ALL.to_vec()),
        named: bool,
        rounds in 1usize..3,
    ) {
        let image = Image::new(44);
        let mapping = image.map(medium);
        for chunk in writes.chunks(writes.len().div_ceil(rounds)) {
            let mut bitmap = [0u64; 1];
            for (at, bytes) in chunk {
                let bytes = &bytes[..bytes.len().min(mapping.len() - at)];
                put(&mapping, *at, bytes);
                for page in at / 4096..=(at + bytes.len() - 1) / 4096 {
                    bitmap[0] |= 1 << page;
                }
            }
            let dirty = if named { Dirty::Bitmap(&bitmap) } else { Dirty::Unknown };
            let before = image.on_file();
            let saved = persist(&mapping, &image.backing(), dirty).unwrap();
            if named || medium == MediumKind::Nvdimm {
                prop_assert!(saved.unwrap() >= u64::from(bitmap[0].count_ones()));
            }
            if named {
                prop_assert_eq!(saved.unwrap(), u64::from(bitmap[0].count_ones()));
            }
            if medium == MediumKind::Nvdimm && before != all(&mapping) {
                prop_assert_ne!(before, image.on_file());
            }
        }
        let expected = all(&mapping);
        drop(mapping);
        prop_assert_eq!(all(&image.map(medium)), expected);
    }

    #[test]
    fn both_ways_to_ask_the_kernel_find_exactly_the_pages_written(
        written in prop::collection::btree_set(0u64..200, 0..60), read in prop::collection::vec(0usize..200, 0..60)
    ) {
        let image = Image::new(200);
        let mapping = image.map(MediumKind::Nvdimm);
        for page in read {
            // SAFETY: the page lies in the mapping.
            std::hint::black_box(unsafe { mapping.as_ptr().add(page * 4096).read_volatile() });
        }
        for page in &written {
            put(&mapping, (page * PAGE_SIZE) as usize + 17, &[1]);
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let flat = |found: Vec<Range<u64>>| found.into_iter().flatten().collect::<Vec<_>>();
        let expected: Vec<u64> = written.into_iter().collect();
        prop_assert_eq!(&flat(nvdimm::by_pagemap(&pagemap, &mapping).unwrap()), &expected);
        match nvdimm::by_scan(&pagemap, &mapping) {
            Ok(found) => prop_assert_eq!(flat(found), expected),
            Err(error) => prop_assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "only a kernel before 6.7 has none"),
        }
    }
}

#[test]
fn more_runs_than_one_scan_returns_are_all_found() {
    let image = Image::new(6000);
    let mapping = image.map(MediumKind::Nvdimm);
    for page in (0..6000).step_by(2) {
        put(&mapping, page * 4096, &[7]);
    }
    assert_eq!(persist(&mapping, &image.backing(), Dirty::Unknown).unwrap(), Some(3000));
    assert!(image.on_file().chunks(8192).all(|pair| pair[0] == 7 && pair[4096] == 0));
}

#[test]
fn nvdimm_without_a_persist_is_lost_and_the_image_untouched() {
    let image = Image::new(8);
    let mapping = image.map(MediumKind::Nvdimm);
    put(&mapping, 4096, b"saved");
    persist(&mapping, &image.backing(), Dirty::Unknown).unwrap();
    let saved = image.on_file();
    put(&mapping, 4096, b"later");
    put(&mapping, 12288, b"too");
    assert_eq!(image.on_file(), saved);
    drop(mapping);
    assert_eq!(all(&image.map(MediumKind::Nvdimm)), saved);
}

#[test]
fn pages_given_back_after_a_persist_are_not_saved_again() {
    let image = Image::new(8);
    let mapping = image.map(MediumKind::Nvdimm);
    put(&mapping, 0, &[5; 3 * 4096]);
    let save = || persist(&mapping, &image.backing(), Dirty::Unknown).unwrap();
    assert_eq!(save(), Some(3));
    assert_eq!(save(), Some(3), "still private");
    mapping.forget_private().unwrap();
    assert_eq!(save(), Some(0));
    assert_eq!(all(&mapping)[..3 * 4096], [5; 3 * 4096], "read from the image now");
    put(&mapping, 4096, &[6]);
    assert_eq!(save(), Some(1));
}

#[test]
fn a_file_system_without_dax_is_told_as_such() {
    let image = Image::new(1);
    let error = map(MediumKind::Dax, &image.backing()).map(|m| m.len()).unwrap_err();
    assert!(matches!(error, MediumError::NotDax { .. }), "{error:?}");
    assert!(error.to_string().contains("is not on a DAX file system"));
}

#[test]
fn a_simulated_disk_is_not_mapped() {
    let vfs = vfs::CrashVfs::new();
    let file = vfs.open(Path::new("/f"), OpenMode::CreateNew).unwrap();
    let backing = Backing { file: &*file, path: Path::new("/f"), offset: 0, size: 4096 };
    for medium in MediumKind::ALL {
        assert!(matches!(map(medium, &backing), Err(MediumError::NotMappable { .. })));
    }
}

#[test]
fn a_mapping_of_another_region_is_refused() {
    let (small, large) = (Image::new(1), Image::new(2));
    let mapping = small.map(MediumKind::Nvdimm);
    let error = persist(&mapping, &large.backing(), Dirty::Unknown).unwrap_err();
    assert!(matches!(error, MediumError::ForeignMapping { mapping: 4096, region: 8192, .. }));
}

#[test]
fn what_nobody_needs_is_not_saved_on_nvdimm_and_stays_on_other_media() {
    for medium in [MediumKind::Nvdimm, MediumKind::File] {
        let image = Image::new(16);
        let mapping = image.map(medium);
        put(&mapping, 0, &[1; 16 * 4096]);
        persist(&mapping, &image.backing(), Dirty::Unknown).unwrap();
        put(&mapping, 0, &[2; 16 * 4096]);
        mapping.give_up(4 * 4096, 8 * 4096).unwrap();
        let given = all(&mapping)[4 * 4096..12 * 4096].to_vec();
        let expected = if medium == MediumKind::Nvdimm { 1 } else { 2 };
        assert!(given.iter().all(|byte| *byte == expected), "{medium}");
        assert!(all(&mapping)[12 * 4096..].iter().all(|byte| *byte == 2), "{medium}");
        let saved = persist(&mapping, &image.backing(), Dirty::Unknown).unwrap();
        assert_eq!(saved, (medium == MediumKind::Nvdimm).then_some(8), "{medium}");
    }
    let mapping = Image::new(16).map(MediumKind::Nvdimm);
    for (offset, length) in [(1, 4096), (0, 17 * 4096), (16 * 4096, 4096), (u64::MAX, 4096)] {
        assert!(mapping.give_up(offset, length).is_err(), "{length} bytes at {offset}");
    }
}
