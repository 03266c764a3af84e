//! Several hands on one store: writers take turns, readers do not wait; and what depth does to a generation: nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod world;

use std::sync::Arc;
use std::time::Duration;

use snapshot::{GenerationId, NewGeneration, Options, Parent, RetentionPolicy, Store, StoreError};
use vfs::Vfs;
use vfs::crash::CrashVfs;
use vfs::host::HostVfs;
use world::{Image, check, commit, open, options, put};

fn simulated() -> Arc<dyn Vfs> {
    Arc::new(CrashVfs::new())
}

#[test]
fn a_second_writer_is_refused_and_a_reader_is_not() {
    let vfs = simulated();
    let (one, other) = (open(&vfs, &options()).unwrap(), open(&vfs, &options()).unwrap());
    let base = Image::new(&[("ram", 50)]);
    let (id, image) = commit(&one, "web", Parent::Newest, &base, &[put("ram", 1, 1)]).unwrap();
    let writer = one.begin(NewGeneration::automatic("web", 1)).unwrap();
    assert!(matches!(other.begin(NewGeneration::automatic("web", 1)), Err(StoreError::Busy { .. })));
    assert!(matches!(other.sweep(&mut |_| ()), Err(StoreError::Busy { .. })));
    other.refresh().unwrap();
    check(&other, &id, &image).unwrap();
    drop(writer);
    let (second, image) = commit(&other, "db", Parent::None, &base, &[put("ram", 2, 1)]).unwrap();
    one.refresh().unwrap();
    check(&one, &second, &image).unwrap();
    assert_eq!(one.generation(&second).unwrap().pages_stored, 0, "the other lineage has this page");
}

#[test]
fn writers_of_two_lineages_take_turns_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let vfs: Arc<dyn Vfs> = Arc::new(HostVfs);
    let options = Options { threads: 2, lock_wait: Duration::from_secs(60), store_id: None, ..options() };
    let at = dir.path().join("store");
    Store::open(Arc::clone(&vfs), &at, options.clone()).unwrap();
    let image = |lineage: usize| {
        let store = Store::open(Arc::clone(&vfs), &at, options.clone()).unwrap();
        let name = ["web", "db"][lineage];
        let mut image = Image::new(&[("ram", 400)]);
        for generation in 0..12u32 {
            let puts: Vec<_> = (0..40)
                .map(|n| put("ram", u64::from(generation * 7 + n * 9) % 400, generation + n + lineage as u32))
                .collect();
            let (id, made) = commit(&store, name, Parent::Newest, &image, &puts).unwrap();
            check(&store, &id, &made).unwrap();
            if generation % 4 == 3 {
                store.purge(&[GenerationId::new(name, id.number - 2)]).unwrap();
                store.sweep(&mut |_| ()).unwrap();
            }
            image = made;
        }
        image
    };
    let (web, db) = std::thread::scope(|scope| {
        let web = scope.spawn(|| image(0));
        (scope.spawn(|| image(1)).join().unwrap(), web.join().unwrap())
    });
    let store = Store::open(Arc::clone(&vfs), &at, options.clone()).unwrap();
    check(&store, &GenerationId::new("db", 12), &web).unwrap();
    check(&store, &GenerationId::new("web", 12), &db).unwrap();
    assert_eq!((store.generations("web").len(), store.generations("db").len()), (9, 9));
    store.sweep(&mut |_| ()).unwrap();
    assert_eq!(store.zombies().unwrap(), 0);
    assert!(store.scrub(&mut |_| ()).unwrap().is_clean());
}

#[test]
fn a_generation_is_the_same_at_depth_1000_and_needs_none_of_those_before_it() {
    let vfs = simulated();
    let options = Options { data_pack_bytes: 4 << 20, archive_pack_bytes: 4 << 20, ..options() };
    let store = open(&vfs, &options).unwrap();
    let mut image = Image::new(&[("ram", 200)]);
    let mut images = Vec::new();
    for generation in 0..1000u32 {
        let puts = [put("ram", u64::from(generation * 37 % 200), generation * 2 + 2)];
        let (_, made) = commit(&store, "web", Parent::Newest, &image, &puts).unwrap();
        images.push(made.clone());
        image = made;
    }
    assert_eq!(store.newest("web").unwrap().depth, 999);
    for number in [1, 2, 500, 999, 1000] {
        check(&store, &GenerationId::new("web", number), &images[number as usize - 1]).unwrap();
    }
    // Without all others it is still what it was, and takes no more than it needs.
    let policy = RetentionPolicy { max_snapshots: Some(1), ..RetentionPolicy::default() };
    assert_eq!(store.retain("web", &policy, 1 << 40).unwrap().len(), 999);
    store.sweep(&mut |_| ()).unwrap();
    assert_eq!(store.zombies().unwrap(), 0);
    let store = open(&vfs, &options).unwrap();
    check(&store, &GenerationId::new("web", 1000), &images[999]).unwrap();
    let (next, made) = commit(&store, "web", Parent::Newest, &image, &[put("ram", 0, 3)]).unwrap();
    assert_eq!(next.number, 1001, "numbers are never used twice");
    check(&store, &next, &made).unwrap();
}

#[test]
fn work_and_space_follow_the_change_and_not_the_memory() {
    let vfs = simulated();
    let store = open(&vfs, &options()).unwrap();
    let base = Image::new(&[("ram", 20_000)]);
    let puts: Vec<_> = (0..20_000).map(|page| put("ram", page, page as u32 * 2 + 2)).collect();
    let (first, image) = commit(&store, "web", Parent::Newest, &base, &puts).unwrap();
    let full = store.generation(&first).unwrap();
    let (second, _) = commit(&store, "web", Parent::Newest, &image, &[put("ram", 777, 1)]).unwrap();
    let one = store.generation(&second).unwrap();
    assert_eq!((one.pages_stored, one.page_bytes_stored), (1, 4096));
    assert!(one.archive_bytes_stored < 8192, "{} bytes for one page", one.archive_bytes_stored);
    assert!(full.archive_bytes_stored < 20_000 * 40, "{} bytes of archive", full.archive_bytes_stored);
    let (third, _) = commit(&store, "web", Parent::Newest, &image, &[put("ram", 778, 0)]).unwrap();
    assert_eq!(store.generation(&third).unwrap().pages_stored, 0, "a zero page costs nothing");
}

#[test]
fn a_fork_costs_no_pages_and_goes_its_own_way() {
    let vfs = simulated();
    let store = open(&vfs, &options()).unwrap();
    let base = Image::new(&[("disk", 20), ("ram", 100)]);
    let puts: Vec<_> = (0..90).map(|page| put("ram", page, page as u32 + 1)).collect();
    let (of, image) = commit(&store, "web", Parent::Newest, &base, &puts).unwrap();
    let fork = store.fork(&of, "web-2", 5).unwrap();
    assert_eq!((fork.pages_stored, fork.parent.as_ref()), (0, Some(&of)));
    assert!(store.fork(&of, "web-2", 5).is_err(), "the name is taken");
    let (_, on) = commit(&store, "web-2", Parent::Newest, &image, &[put("ram", 5, 77)]).unwrap();
    store.purge(&[of]).unwrap();
    store.sweep(&mut |_| ()).unwrap();
    check(&store, &fork.id, &image).unwrap();
    check(&store, &GenerationId::new("web-2", 2), &on).unwrap();
}

#[test]
fn content_that_was_swept_is_stored_again_and_not_taken_for_stored() {
    for redundancy in [None, std::num::NonZeroU32::new(1)] {
        let vfs = simulated();
        let store = open(&vfs, &Options { redundancy, ..options() }).unwrap();
        let base = Image::new(&[("ram", 200)]);
        let puts: Vec<_> = (0..20).map(|page| put("ram", page, page as u32 * 2 + 2)).collect();
        let (_, first) = commit(&store, "web", Parent::Newest, &base, &puts).unwrap();
        let (second, _) = commit(&store, "web", Parent::Newest, &first, &[put("ram", 50, 999)]).unwrap();
        let (_, third) =
            commit(&store, "web", Parent::Newest, &first, &[put("ram", 50, 0), put("ram", 60, 7)]).unwrap();
        store.purge(&[second]).unwrap();
        store.sweep(&mut |_| ()).unwrap();
        // This handle remembers where the content of seed 999 was. It is a hole now.
        let (fourth, image) = commit(&store, "web", Parent::Newest, &third, &[put("ram", 70, 999)]).unwrap();
        check(&store, &fourth, &image).unwrap();
        assert!(store.scrub(&mut |_| ()).unwrap().is_clean());
    }
}

#[test]
fn a_number_is_not_given_out_again_when_all_generations_are_gone() {
    let vfs = simulated();
    let store = open(&vfs, &options()).unwrap();
    let base = Image::new(&[("ram", 10)]);
    for _ in 0..3 {
        commit(&store, "web", Parent::Newest, &base, &[put("ram", 1, 3)]).unwrap();
    }
    store.purge(&[1, 2, 3].map(|number| GenerationId::new("web", number))).unwrap();
    store.sweep(&mut |_| ()).unwrap();
    let store = open(&vfs, &options()).unwrap();
    assert!(store.lineages().is_empty());
    assert_eq!(commit(&store, "web", Parent::Newest, &base, &[]).unwrap().0.number, 4);
}

#[test]
fn what_a_dead_builder_left_is_a_zombie_and_swept() {
    let vfs = simulated();
    let store = open(&vfs, &options()).unwrap();
    commit(&store, "web", Parent::Newest, &Image::new(&[("ram", 10)]), &[put("ram", 1, 3)]).unwrap();
    for name in ["ledger-b.new", "packs/data-00000001.new", "packs/data-00000009", "packs/arc-00000009.b"] {
        vfs.open(&world::dir().join(name), vfs::OpenMode::CreateNew).unwrap().write_all_at(b"half", 0).unwrap();
    }
    assert_eq!(store.zombies().unwrap(), 4);
    assert_eq!(store.sweep(&mut |_| ()).unwrap().files_removed, 4);
    assert_eq!(store.zombies().unwrap(), 0);
}

#[test]
fn a_protected_or_labelled_generation_outlives_every_policy() {
    let vfs = simulated();
    let store = open(&vfs, &options()).unwrap();
    let mut image = Image::new(&[("ram", 10)]);
    for generation in 0..8 {
        image = commit(&store, "web", Parent::Newest, &image, &[put("ram", 1, generation + 1)]).unwrap().1;
    }
    store.protect(&GenerationId::new("web", 2), true).unwrap();
    store.label(&GenerationId::new("web", 4), Some("before the upgrade")).unwrap();
    let policy = RetentionPolicy { max_snapshots: Some(1), expiration_ms: Some(1), ..RetentionPolicy::default() };
    store.retain("web", &policy, u64::MAX).unwrap();
    let left: Vec<u64> = store.generations("web").iter().map(|generation| generation.id.number).collect();
    assert_eq!(left, [2, 4, 8]);
    assert!(matches!(store.purge(&[GenerationId::new("web", 2)]), Err(StoreError::Protected { .. })));
    // The rewrite of the ledger keeps it all.
    store.sweep(&mut |_| ()).unwrap();
    let store = open(&vfs, &options()).unwrap();
    assert_eq!(store.generation(&GenerationId::new("web", 4)).unwrap().label.as_deref(), Some("before the upgrade"));
    assert!(store.generation(&GenerationId::new("web", 2)).unwrap().protected);
}
