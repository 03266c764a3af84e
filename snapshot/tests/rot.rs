//! Rot: the bytes of a small store flipped in turn (each, with `PERDURE_TEST_ROT=all`); files cut short, gone, or filled with noise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;
use snapshot::{Depth, GenerationId, Integrity, Options, Parent, Store};
use vfs::crash::CrashVfs;
use vfs::{OpenMode, Vfs};
use world::{Image, Memory, check, commit, dir, files, open, options, put};

type Images = BTreeMap<u64, Image>;

/// Three small generations. With a redundancy of 1 each has copies of its own of every page.
fn small(options: &Options) -> (CrashVfs, Images) {
    let disk = CrashVfs::new();
    let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
    let store = open(&vfs, options).unwrap();
    let mut image = Image::new(&[("ram", 44)]);
    let mut images = Images::new();
    for generation in 1..=3u32 {
        image.context = vec![generation as u8; 50];
        let puts = [put("ram", 3, 2 * generation), put("ram", 40 + u64::from(generation), 2 * generation + 100)];
        let (id, made) = commit(&store, "web", Parent::Newest, &image, &puts).unwrap();
        images.insert(id.number, made.clone());
        image = made;
    }
    (disk, images)
}

fn at(disk: &CrashVfs, options: &Options) -> Store {
    let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
    open(&vfs, options).unwrap()
}

fn id(number: u64) -> GenerationId {
    GenerationId::new("web", number)
}

fn whole(store: &Store, images: &Images) -> Vec<u64> {
    images
        .iter()
        .filter(|(number, image)| check(store, &id(**number), image).is_ok())
        .map(|(number, _)| *number)
        .collect()
}

/// What the flips of a run came to.
#[derive(Debug, Default)]
struct Tally {
    found: u64,
    /// Hit bytes that nothing needs.
    idle: u64,
    /// Files and records that were healed at least once.
    healed: BTreeSet<(String, u64)>,
}

/// How far apart the bytes lie that one run flips: a minute of flips otherwise. `PERDURE_TEST_ROT=all` flips each, which takes one.
const STRIDE: usize = 3;

/// The flips of one run: which of the three bytes each time is drawn by the clock, so that all come by in a few runs, and printed.
fn chosen(all: Vec<(PathBuf, u64)>) -> Vec<(PathBuf, u64)> {
    if std::env::var("PERDURE_TEST_ROT").is_ok_and(|which| which == "all") {
        return all;
    }
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() as usize;
    println!("from byte {} on", now % STRIDE);
    all.into_iter().skip(now % STRIDE).step_by(STRIDE).collect()
}

/// Flips single bytes of every file in turn, with `mask`.
fn flip_all(options: &Options, mask: u8) -> Tally {
    let (disk, images) = small(options);
    let expected = restored(&at(&disk, options), &images);
    let all = files(&disk, &dir())
        .into_iter()
        .flat_map(|(path, length)| (0..length).map(move |offset| (path.clone(), offset)))
        .collect();
    let flips = chosen(all);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = flips.chunks(flips.len().div_ceil(threads));
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let running: Vec<_> = parts
            .map(|flips| {
                let (disk, images, expected) = (disk.after_kill(), &images, &expected);
                scope.spawn(move || {
                    let mut tally = Tally::default();
                    flips.iter().for_each(|flip| flip_one(&disk, options, images, expected, flip, mask, &mut tally));
                    tally
                })
            })
            .collect();
        running.into_iter().map(|part| part.join().unwrap()).collect()
    });
    tallies.into_iter().fold(Tally::default(), |mut all, part| {
        all.found += part.found;
        all.idle += part.idle;
        all.healed.extend(part.healed);
        all
    })
}

/// All bytes of all generations, as a restore gives them.
fn restored(store: &Store, images: &Images) -> Vec<Option<Vec<u8>>> {
    let restore = |number: &u64| {
        let (reader, memory) = (store.reader(&id(*number)).ok()?, Memory::new(70));
        reader.restore_region(0, &memory, &mut |_, _| ()).ok()?;
        let mut bytes = memory.bytes();
        bytes.extend(reader.blob("context").ok()??);
        Some(bytes)
    };
    images.keys().map(restore).collect()
}

fn flip_one(
    disk: &CrashVfs,
    options: &Options,
    images: &Images,
    expected: &[Option<Vec<u8>>],
    (path, offset): &(PathBuf, u64),
    mask: u8,
    tally: &mut Tally,
) {
    let told = format!("byte {offset} of {}", path.display());
    disk.flip(path, *offset, mask).unwrap();
    let store = at(disk, options);
    let report = store.scrub(&mut |_| ()).unwrap();
    if report.is_clean() {
        assert!(restored(&store, images) == expected, "{told}: not found, and it hurt");
        tally.idle += 1;
    } else {
        tally.found += 1;
        let hit = report.damage.iter().find(|damage| {
            path.ends_with(&damage.file) && (damage.offset..damage.offset + damage.length).contains(offset)
        });
        let hit = hit.unwrap_or_else(|| panic!("{told}: reported as {:?}", report.damage));
        if hit.healable {
            assert!(report.lost.is_empty(), "{told}: {report:?}");
            // A restore and a repair read whole records: whichever byte it is, so one of each, and then some.
            let first = tally.healed.insert((hit.file.clone(), hit.offset));
            if first || offset % 31 == 0 {
                assert!(restored(&store, images) == expected, "{told}: a second copy exists");
            }
            if first || offset % 509 == 0 {
                assert_heals(disk, options, images, &told);
            }
        } else {
            assert!(hit.file.contains("data-"), "{told}: everything but pages is there twice");
            assert_precise(&store, images, &report, &told);
        }
    }
    disk.flip(path, *offset, mask).unwrap();
}

/// The generations and pages that the report calls lost are those that cannot be read, and no others.
fn assert_precise(store: &Store, images: &Images, report: &snapshot::ScrubReport, told: &str) {
    for (number, image) in images {
        let reader = store.reader(&id(*number)).unwrap();
        let lost: Vec<u64> = report
            .lost
            .iter()
            .filter(|lost| lost.generation == id(*number))
            .flat_map(|lost| lost.pages.iter().flat_map(|range| range.first..range.first + range.count))
            .collect();
        let mut page = [0; snapshot::PAGE_SIZE];
        let unreadable: Vec<u64> =
            (0..image.regions["ram"].len() as u64).filter(|n| reader.read_page(0, *n, &mut page).is_err()).collect();
        assert_eq!(lost, unreadable, "{told}, generation {number}");
    }
    assert!(!report.lost.is_empty(), "{told}");
}

fn assert_heals(disk: &CrashVfs, options: &Options, images: &Images, told: &str) {
    let copy = disk.after_kill();
    let store = at(&copy, options);
    let report = store.repair(&mut |_| ()).unwrap();
    assert!(!report.healed.is_empty() && report.remaining.is_clean(), "{told}: {report:?}");
    assert!(store.scrub(&mut |_| ()).unwrap().is_clean(), "{told}");
    assert_eq!(whole(&store, images).len(), 3, "{told}");
}

#[test]
fn every_flipped_byte_is_found_or_idle_and_what_has_a_second_copy_is_healed() {
    let tally = flip_all(&options(), 0x40);
    // Idle are the zeros between the nodes and behind the last one.
    assert!(tally.found > 60_000 / STRIDE as u64 && tally.idle < tally.found, "{tally:?}");
    // Every slot of both ledgers, every header, every node of both mirrors.
    assert!(tally.healed.len() > 30, "{tally:?}");
}

#[test]
fn with_redundancy_pages_too_are_healed() {
    for (compression, step, least) in
        [(world::CODECS[0], 1021, 15), (world::CODECS[1], 5, 15), (world::CODECS[2], 5, 15)]
    {
        let options = Options { redundancy: NonZeroU32::new(1), compression, ..options() };
        let (disk, images) = small(&options);
        let store = at(&disk, &options);
        let mut healed = 0;
        // What a generation did not change it has in a copy of its own, beside the older one.
        for (path, length) in
            files(&disk, &dir()).into_iter().filter(|(path, _)| path.to_string_lossy().contains("data-"))
        {
            for offset in (4096..length).step_by(step) {
                disk.flip(&path, offset, 1).unwrap();
                let report = store.scrub(&mut |_| ()).unwrap();
                if report.damage.iter().any(|damage| damage.healable) {
                    assert!(report.lost.is_empty());
                    assert_heals(&disk, &options, &images, &format!("byte {offset}"));
                    healed += 1;
                }
                disk.flip(&path, offset, 1).unwrap();
            }
        }
        assert!(healed > least, "{compression:?}: {healed}");
    }
}

/// The CRC's generator polynomial: added to any content, it leaves the CRC as it is.
fn crc_blind() -> [u8; 5] {
    let mut pattern = [1, 0, 0, 0, 0];
    for bit in 1..=32 {
        pattern[bit / 8] |= ((0x04C1_1DB7u32 >> (32 - bit) & 1) as u8) << (bit % 8);
    }
    pattern
}

#[test]
fn damage_that_the_crc_cannot_see_is_found_by_the_hash() {
    let (disk, _) = small(&options());
    let (path, length) =
        files(&disk, &dir()).into_iter().rfind(|(path, _)| path.to_string_lossy().contains("data-")).unwrap();
    let mut page = vec![0; 4096];
    let read = |page: &mut Vec<u8>| {
        disk.open(&path, OpenMode::Read).unwrap().read_exact_at(page, length - 4096).unwrap();
        crc32fast::hash(page)
    };
    let before = read(&mut page);
    for (at, mask) in (0..).zip(crc_blind()) {
        disk.flip(&path, length - 1000 + at, mask).unwrap();
    }
    assert_eq!(read(&mut page), before, "the CRC must not see it, or this test shows nothing");
    let store = at(&disk, &options());
    let mut page = [0; snapshot::PAGE_SIZE];
    assert!(store.reader(&id(3)).unwrap().read_page(0, 43, &mut page).is_err());
    assert!(store.reader(&id(3)).unwrap().restore_region(0, &Memory::new(70), &mut |_, _| ()).is_err());
    assert_eq!(store.scrub(&mut |_| ()).unwrap().damage.len(), 1);
    assert_eq!(store.newest_verified("web", Depth::Pages).unwrap().generation.unwrap().id, id(2));
}

#[test]
fn a_damaged_generation_is_skipped_by_the_recovery_and_stops_no_other() {
    let (disk, images) = small(&options());
    let store = at(&disk, &options());
    let (path, length) =
        files(&disk, &dir()).into_iter().rfind(|(path, _)| path.to_string_lossy().contains("data-")).unwrap();
    // The last page stored belongs to the newest generation alone.
    disk.flip(&path, length - 100, 0xFF).unwrap();
    let recovered = store.newest_verified("web", Depth::Pages).unwrap();
    assert_eq!(recovered.generation.unwrap().id, id(2));
    assert_eq!(recovered.skipped.len(), 1);
    assert_eq!(whole(&store, &images), [1, 2]);
    // The structure is whole: a quick look takes it, and the restore says what is wrong.
    assert_eq!(store.newest_verified("web", Depth::Structure).unwrap().generation.unwrap().id, id(3));
    let reader = store.reader(&id(3)).unwrap();
    assert!(reader.restore_region(0, &Memory::new(70), &mut |_, _| ()).is_err());
    let lenient = at(&disk, &Options { integrity: Integrity::Warn, ..options() });
    let report = lenient.reader(&id(3)).unwrap().restore_region(0, &Memory::new(70), &mut |_, _| ()).unwrap();
    assert_eq!(report.damaged, [43]);
    // Life goes on.
    let (next, image) = commit(&store, "web", Parent::Newest, &images[&3], &[put("ram", 43, 4)]).unwrap();
    check(&store, &next, &image).unwrap();
}

#[test]
fn a_file_that_is_cut_short_or_gone_is_reported_and_healed_where_a_mirror_exists() {
    let (disk, images) = small(&options());
    for (path, length) in files(&disk, &dir()).into_iter().filter(|(path, _)| !path.ends_with("lock")) {
        for keep in [None, Some(0), Some(100), Some(length / 2), Some(length - 1)] {
            let copy = disk.after_kill();
            match keep {
                None => copy.remove_file(&path).unwrap(),
                Some(keep) => copy.open(&path, OpenMode::ReadWrite).unwrap().set_len(keep).unwrap(),
            }
            let told = format!("{} cut to {keep:?}", path.display());
            let store = at(&copy, &options());
            assert_eq!(store.generations("web").len(), 3, "{told}");
            let before = store.scrub(&mut |_| ()).unwrap();
            // The last byte is padding, which nothing needs.
            assert!(!before.is_clean() || keep == Some(length - 1), "{told}");
            let report = store.repair(&mut |_| ()).unwrap();
            if path.to_string_lossy().contains("data-") {
                assert!(!report.remaining.lost.is_empty() || keep == Some(length - 1), "{told}: {report:?}");
            } else {
                assert!(report.remaining.is_clean(), "{told}: {report:?}");
                assert_eq!(whole(&store, &images).len(), 3, "{told}");
            }
            commit(&store, "web", Parent::None, &images[&1], &[put("ram", 1, 1)]).expect(&told);
        }
    }
}

#[test]
fn both_mirrors_of_a_node_lost_block_the_sweep_and_nothing_else() {
    let (disk, images) = small(&options());
    let store = at(&disk, &options());
    let mirrors: Vec<(PathBuf, u64)> =
        files(&disk, &dir()).into_iter().filter(|(path, _)| path.to_string_lossy().contains("arc-")).collect();
    // The first leaf of the first generation, behind its blob.
    for (path, _) in &mirrors {
        disk.flip(path, 4096 + 128 + 30, 0xFF).unwrap();
    }
    let store_again = at(&disk, &options());
    let report = store_again.scrub(&mut |_| ()).unwrap();
    assert!(report.lost.iter().all(|lost| lost.generation == id(1)) && !report.lost.is_empty(), "{report:?}");
    store.purge(&[id(2)]).unwrap();
    assert!(!store.sweep(&mut |_| ()).unwrap().blocked_by.is_empty());
    check(&store, &id(3), &images[&3]).unwrap();
    store.purge(&[id(1)]).unwrap();
    assert_eq!(store.sweep(&mut |_| ()).unwrap().blocked_by, Vec::<String>::new());
    assert_eq!(store.zombies().unwrap(), 0);
    check(&store, &id(3), &images[&3]).unwrap();
}

#[test]
fn a_store_of_a_later_version_is_refused_by_its_number_and_left_alone() {
    let (disk, _) = small(&options());
    for ledger in ["ledger-a", "ledger-b"] {
        let (path, length) = files(&disk, &dir()).into_iter().find(|(path, _)| path.ends_with(ledger)).unwrap();
        (0..length).step_by(4096).for_each(|slot| disk.flip(&path, slot + 8, 3).unwrap());
    }
    let before = disk.ops();
    let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
    let error = open(&vfs, &options()).unwrap_err().to_string();
    assert!(error.contains("version 2") && error.contains("knows 1"), "{error}");
    assert_eq!(disk.ops(), before, "nothing was written");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn files_full_of_noise_never_panic(
        which in any::<prop::sample::Index>(), noise in prop::collection::vec(any::<u8>(), 0..9000), from in 0u64..9000,
        more in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 0..30),
    ) {
        let (disk, images) = small(&options());
        let all: Vec<_> = files(&disk, &dir()).into_iter().filter(|(path, _)| !path.ends_with("lock")).collect();
        let (path, _) = which.get(&all);
        disk.open(path, OpenMode::ReadWrite).unwrap().write_all_at(&noise, from).unwrap();
        for (file, byte, mask) in &more {
            let (path, length) = file.get(&all);
            disk.flip(path, byte.index(*length as usize) as u64, *mask).unwrap();
        }
        let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
        let Ok(store) = open(&vfs, &options()) else { return Ok(()) };
        let _ = whole(&store, &images);
        let _ = store.scrub(&mut |_| ());
        let _ = store.newest_verified("web", Depth::Pages);
        let _ = store.diff(&id(1), &id(3));
        let _ = store.export(&id(2), &mut Vec::new());
        let _ = store.purge(&[id(1)]);
        let _ = store.sweep(&mut |_| ());
        let _ = store.repair(&mut |_| ());
        // Whatever is there, a full generation can be taken, and is what it should be.
        let (made, image) = commit(&store, "fresh", Parent::None, &Image::new(&[("ram", 9)]), &[put("ram", 1, 1)]).unwrap();
        prop_assert_eq!(check(&store, &made, &image), Ok(()));
    }

    #[test]
    fn a_damaged_export_is_refused_and_leaves_nothing(at_byte in any::<prop::sample::Index>(), mask in 1u8.., cut in any::<bool>()) {
        let (disk, _) = small(&options());
        let store = at(&disk, &options());
        let mut stream = Vec::new();
        store.export(&id(3), &mut stream).unwrap();
        let byte = at_byte.index(stream.len());
        if cut { stream.truncate(byte) } else { stream[byte] ^= mask }
        prop_assert!(store.import("copy", &mut &stream[..]).is_err());
        prop_assert!(store.generations("copy").is_empty());
        prop_assert!(store.sweep(&mut |_| ()).is_ok());
        prop_assert_eq!(store.zombies().unwrap(), 0);
    }
}
