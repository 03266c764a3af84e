//! A generation lies together, however many small changes came before it; and what keeps it together loses nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod world;

use std::num::NonZeroU32;
use std::sync::Arc;

use snapshot::{GenerationId, Options, PAGE_SIZE, Parent, Store};
use vfs::Vfs;
use vfs::crash::CrashVfs;
use world::{CODECS, Image, Memory, Put, check, commit, dir, open, options, put};

const PAGES: u64 = 512;
const CHANGED: u64 = 8;

fn spread(percent: u32) -> Options {
    // Segments of eight pages, since the memory is small; pages that do not fit into a pack's round size do not count.
    Options {
        spread: NonZeroU32::new(percent),
        segment_bytes: 32 << 10,
        data_pack_bytes: 4 << 20,
        archive_pack_bytes: 4 << 20,
        ..options()
    }
}

/// Pages anywhere, the same for the same generation; odd seeds, so that they do not compress.
fn scattered(generation: u64) -> Vec<Put> {
    let mut state = generation.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    (0..CHANGED).map(|_| put("ram", random() % PAGES, random() as u32 | 1)).collect()
}

/// A full generation and `changes` small ones. Returns what each must be.
fn history(store: &Store, changes: u64) -> Vec<Image> {
    let full: Vec<Put> = (0..PAGES).map(|page| put("ram", page, page as u32 * 2 + 1)).collect();
    let mut images = vec![commit(store, "vm", Parent::None, &Image::new(&[("ram", PAGES as usize)]), &full).unwrap().1];
    for generation in 1..=changes {
        let puts = scattered(generation);
        images.push(commit(store, "vm", Parent::Newest, &images[generation as usize - 1], &puts).unwrap().1);
    }
    images
}

/// Bytes read for each byte restored.
fn amplification(store: &Store, number: u64) -> f64 {
    let reader = store.reader(&GenerationId::new("vm", number)).unwrap();
    let memory = Memory::new(PAGES as usize);
    let report = reader.restore_region(0, &memory, &mut |_, _| ()).unwrap();
    report.bytes_read as f64 / (PAGES as usize * PAGE_SIZE) as f64
}

fn simulated() -> Arc<dyn Vfs> {
    Arc::new(CrashVfs::new())
}

#[test]
fn any_generation_of_many_is_read_without_much_that_is_not_its_own() {
    let (together, apart) = (simulated(), simulated());
    let store = open(&together, &spread(120)).unwrap();
    let images = history(&store, 300);
    let unbounded = open(&apart, &Options { spread: None, ..spread(1) }).unwrap();
    history(&unbounded, 300);
    assert!(amplification(&unbounded, 301) > 1.7, "the changes are not scattered: this shows nothing");
    for number in [1, 50, 100, 200, 301] {
        let read = amplification(&store, number);
        assert!(read < 1.35, "generation {number} reads {read} bytes for one");
        check(&store, &GenerationId::new("vm", number), &images[number as usize - 1]).unwrap();
    }
    let stored: u64 = store.generations("vm").iter().skip(1).map(|generation| generation.page_bytes_stored).sum();
    assert!(stored <= 5 * 300 * CHANGED * PAGE_SIZE as u64, "{stored} bytes written");
}

#[test]
fn a_handle_that_has_just_been_opened_finds_out_where_things_lie() {
    let vfs = simulated();
    let images = history(&open(&vfs, &Options { spread: None, ..spread(1) }).unwrap(), 200);
    let before = amplification(&open(&vfs, &options()).unwrap(), 201);
    let mut image = images[200].clone();
    for generation in 201..=400 {
        let store = open(&vfs, &spread(120)).unwrap();
        image = commit(&store, "vm", Parent::Newest, &image, &scattered(generation)).unwrap().1;
    }
    let store = open(&vfs, &options()).unwrap();
    let after = amplification(&store, 401);
    assert!(before > 1.5 && after < 1.35, "{before} before, {after} after");
    check(&store, &GenerationId::new("vm", 401), &image).unwrap();
    store.purge(&(1..=400).map(|number| GenerationId::new("vm", number)).collect::<Vec<_>>()).unwrap();
    store.sweep(&mut |_| ()).unwrap();
    assert_eq!(store.zombies().unwrap(), 0);
    check(&store, &GenerationId::new("vm", 401), &image).unwrap();
}

#[test]
fn a_scrub_reads_no_page_twice_however_many_leaves_list_it() {
    let store = open(&simulated(), &spread(120)).unwrap();
    history(&store, 100);
    let stored: u64 = store.generations("vm").iter().map(|generation| generation.pages_stored).sum();
    let report = store.scrub(&mut |_| ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    // A page that is put twice for one generation is stored twice, and needed once.
    assert!((stored * 9 / 10..=stored).contains(&report.verified.pages), "{stored} stored, {report:?}");
}

#[test]
fn compressed_and_redundant_pages_are_kept_together_too() {
    let options = Options { compression: CODECS[1], redundancy: NonZeroU32::new(8), ..spread(110) };
    let vfs = simulated();
    let store = open(&vfs, &options).unwrap();
    let images = history(&store, 60);
    for number in [1, 30, 61] {
        check(&store, &GenerationId::new("vm", number), &images[number as usize - 1]).unwrap();
    }
    assert!(store.scrub(&mut |_| ()).unwrap().is_clean());
}

#[test]
fn a_damaged_page_is_not_copied_and_hinders_nobody() {
    let disk = CrashVfs::new();
    let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
    let images = history(&open(&vfs, &Options { spread: None, ..spread(1) }).unwrap(), 100);
    // The first pages of the first pack: some generations need them, the newest one perhaps.
    for page in 1..20 {
        disk.flip(&dir().join("packs/data-00000001"), page * 4096 + 9, 0x40).unwrap();
    }
    let store = open(&vfs, &spread(101)).unwrap();
    let lost = store.scrub(&mut |_| ()).unwrap().damage.len();
    let mut image = images[100].clone();
    for generation in 101..=140 {
        image = commit(&store, "vm", Parent::Newest, &image, &scattered(generation)).unwrap().1;
    }
    assert!(lost > 0);
    assert_eq!(store.scrub(&mut |_| ()).unwrap().damage.len(), lost, "no damage was copied, and none hidden");
}

#[test]
fn a_commit_that_copies_is_whole_or_not_there_wherever_it_is_cut() {
    let options = spread(101);
    let prepared = CrashVfs::new();
    let prepared_vfs: Arc<dyn Vfs> = Arc::new(prepared.clone());
    let images = history(&open(&prepared_vfs, &Options { spread: None, ..spread(1) }).unwrap(), 20);
    let prepared = prepared.after_cut(0);
    let change = |disk: &CrashVfs| {
        let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
        let store = open(&vfs, &options)?;
        let (id, image) = commit(&store, "vm", Parent::Newest, &images[20], &scattered(21))?;
        Ok::<_, snapshot::StoreError>((store.generation(&id)?.pages_stored, image))
    };
    let whole = prepared.after_cut(0);
    let (stored, after) = change(&whole).unwrap();
    assert!(stored > 2 * CHANGED, "nothing was copied: this shows nothing");
    for step in 1..=whole.ops() {
        let disk = prepared.after_cut(0);
        disk.cut_at(step);
        let _ = change(&disk);
        for seed in 0..4 {
            let left: Arc<dyn Vfs> = Arc::new(disk.after_cut(seed));
            let store = open(&left, &options).unwrap();
            check(&store, &GenerationId::new("vm", 21), &images[20]).unwrap();
            if store.newest("vm").unwrap().id.number == 22 {
                check(&store, &GenerationId::new("vm", 22), &after).unwrap();
            }
            store.sweep(&mut |_| ()).unwrap();
            assert_eq!(store.zombies().unwrap(), 0, "step {step}, seed {seed}");
        }
    }
}
