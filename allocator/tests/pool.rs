//! Pools as their users see them, on the host's file system and on a simulated one.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::sync::Arc;

use allocator::catalog::CatalogError;
use allocator::{
    Kind, LeaseError, MediumKind, MediumSettings, Pool, PoolError, Problem, Region, RegionError, RegionName, RegionSpec,
};
use vfs::{CrashVfs, HostVfs, OpenMode, Vfs};

const DIR: &str = "/pool";

fn name(text: &str) -> RegionName {
    text.parse().unwrap()
}

fn spec(kind: Kind, size: u64) -> RegionSpec {
    RegionSpec { kind, size, medium: None }
}

fn simulated() -> (CrashVfs, Pool) {
    let vfs = CrashVfs::new();
    let pool = Pool::create_or_open(DIR, Arc::new(vfs.clone())).unwrap();
    (vfs, pool)
}

fn open(pool: &Pool, region: &str) -> Region {
    Region::open(pool.lease(&name(region)).unwrap()).unwrap()
}

/// The message of an error with all its causes.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        assert!(!text.contains(&cause_text), "printed twice: {text} / {cause_text}");
        text = format!("{text}: {cause_text}");
        source = cause.source();
    }
    text
}

#[test]
fn the_same_name_yields_the_same_bytes_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let host: Arc<dyn Vfs> = Arc::new(HostVfs);
    let pool = Pool::create_or_open(dir.path().join("new/pool"), Arc::clone(&host)).unwrap();
    let made = pool.allocate(&name("web/ram"), spec(Kind::Ram, 8192)).unwrap();
    open(&pool, "web/ram").write_at(b"hello", 4000).unwrap();
    drop(pool);
    let pool = Pool::open(dir.path().join("new/pool"), host).unwrap();
    assert_eq!(pool.allocate(&name("web/ram"), spec(Kind::Ram, 8192)).unwrap(), made);
    let mut found = [0; 5];
    open(&pool, "web/ram").read_at(&mut found, 4000).unwrap();
    assert_eq!(&found, b"hello");
    assert_eq!(pool.check().unwrap().problems, []);
}

#[test]
fn another_size_kind_or_medium_is_an_error_that_states_both() {
    let (_, pool) = simulated();
    pool.allocate(&name("a"), spec(Kind::Ram, 8192)).unwrap();
    open(&pool, "a").write_at(&[9; 8192], 0).unwrap();
    let other = RegionSpec { medium: Some(MediumKind::Nvdimm), ..spec(Kind::Ram, 8192) };
    for asked in [spec(Kind::Ram, 4096), spec(Kind::Disk, 8192), other] {
        let error = pool.allocate(&name("a"), asked).unwrap_err();
        let text = told(&error);
        assert!(matches!(error, PoolError::Mismatch { .. }));
        assert!(text.contains("kind ram, 8 KiB (8192 bytes), medium file"), "{text}");
        assert!(
            text.contains(&format!("kind {}, {} KiB ({} bytes)", asked.kind, asked.size / 1024, asked.size)),
            "{text}"
        );
    }
    let mut bytes = [0; 8192];
    open(&pool, "a").read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [9; 8192]);
}

#[test]
fn the_list_is_in_the_order_of_allocation_whatever_happened_since() {
    let (vfs, pool) = simulated();
    for region in ["z", "m/x", "a", "m/y"] {
        pool.allocate(&name(region), spec(Kind::Swap, 4096)).unwrap();
    }
    pool.free(&name("a")).unwrap();
    pool.allocate(&name("a"), spec(Kind::Swap, 4096)).unwrap();
    pool.rename(&name("z"), &name("b")).unwrap();
    pool.resize(&name("m/x"), 8192).unwrap();
    let again = Pool::open(DIR, Arc::new(vfs)).unwrap();
    let names: Vec<_> = again.list().into_iter().map(|region| region.name.to_string()).collect();
    assert_eq!(names, ["b", "m/x", "m/y", "a"]);
    assert!(again.list().is_sorted_by_key(|region| region.id));
}

#[test]
fn a_tree_is_renamed_and_freed_whole_or_not_at_all() {
    let (_, pool) = simulated();
    for region in ["web", "web/ram", "web/context", "website"] {
        pool.allocate(&name(region), spec(Kind::Ram, 4096)).unwrap();
    }
    let names = || pool.list().into_iter().map(|r| r.name.to_string()).collect::<Vec<_>>();
    pool.rename_tree(&name("web"), &name("app")).unwrap();
    assert_eq!(names(), ["app", "app/ram", "app/context", "website"]);
    pool.allocate(&name("b/ram"), spec(Kind::Ram, 4096)).unwrap();
    let error = pool.rename_tree(&name("app"), &name("b")).unwrap_err();
    assert!(matches!(error, PoolError::NameTaken { .. }), "{error}");
    assert_eq!(names(), ["app", "app/ram", "app/context", "website", "b/ram"]);
    pool.rename_tree(&name("app"), &name("app/old")).unwrap();
    assert_eq!(names(), ["app/old", "app/old/ram", "app/old/context", "website", "b/ram"]);
    let lease = pool.lease(&name("app/old/ram")).unwrap();
    assert!(matches!(pool.free_tree(&name("app")), Err(PoolError::Lease(LeaseError::Held { .. }))));
    drop(lease);
    pool.free_tree(&name("app")).unwrap();
    assert_eq!(names(), ["website", "b/ram"]);
    assert!(matches!(pool.free_tree(&name("app")), Err(PoolError::NoSuchRegion { .. })));
    assert!(matches!(pool.rename(&name("nope"), &name("x")), Err(PoolError::NoSuchRegion { .. })));
    assert_eq!(pool.check().unwrap().problems, []);
}

#[test]
fn a_resize_keeps_what_stays_and_zeroes_what_is_new() {
    let (_, pool) = simulated();
    pool.allocate(&name("a"), spec(Kind::Disk, 12288)).unwrap();
    open(&pool, "a").write_at(&[7; 12288], 0).unwrap();
    pool.resize(&name("a"), 4096).unwrap();
    pool.resize(&name("a"), 8192).unwrap();
    let mut bytes = [1; 8192];
    open(&pool, "a").read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes[..4096], [7; 4096]);
    assert_eq!(bytes[4096..], [0; 4096]);
    assert!(matches!(open(&pool, "a").read_at(&mut bytes, 4096), Err(RegionError::OutOfBounds { .. })));
    assert!(open(&pool, "a").write_at(&[0], u64::MAX).is_err());
    assert_eq!(pool.check().unwrap().problems, []);
}

#[test]
fn a_frozen_region_is_not_resized() {
    let (_, pool) = simulated();
    pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    open(&pool, "a").stamp_clean(3).unwrap();
    let error = pool.resize(&name("a"), 8192).unwrap_err();
    assert!(matches!(error, PoolError::Frozen { context: 3, .. }), "{error}");
    assert_eq!(open(&pool, "a").is_clean(), Some(3));
    open(&pool, "a").clear_stamp().unwrap();
    pool.resize(&name("a"), 8192).unwrap();
}

#[test]
fn sizes_that_no_region_can_have_are_refused() {
    let (_, pool) = simulated();
    for size in [0, 1, 4097, u64::MAX, u64::MAX - 4095, i64::MAX as u64 + 1] {
        let error = pool.allocate(&name("a"), spec(Kind::Ram, size)).unwrap_err();
        assert!(matches!(error, PoolError::BadSize { .. }), "{size}: {error}");
        assert!(matches!(pool.resize(&name("a"), size), Err(PoolError::BadSize { .. })));
    }
    let error = pool.allocate(&name("a"), spec(Kind::Ram, 1 << 50)).map(drop);
    assert!(error.is_ok(), "a simulated disk has room: {error:?}");
}

#[test]
fn the_limit_of_a_medium_holds_before_the_file_system_is_asked() {
    let (_, pool) = simulated();
    let mut settings = pool.settings();
    let limit = MediumSettings { capacity: Some(100_000), directory: None };
    settings.media.insert(MediumKind::File, limit);
    pool.configure(settings).unwrap();
    pool.allocate(&name("a"), spec(Kind::Ram, 40_960)).unwrap();
    let error = pool.allocate(&name("b"), spec(Kind::Ram, 40_960)).unwrap_err();
    let text = told(&error);
    assert!(text.contains("56 KiB are needed") && text.contains("41.7 KiB of the pool's limit of 97.7 KiB"), "{text}");
    assert!(matches!(pool.resize(&name("a"), 1 << 20), Err(PoolError::OverCapacity { .. })));
    let usage = pool.usage().unwrap();
    let file = usage.iter().find(|usage| usage.medium == MediumKind::File).unwrap();
    assert_eq!((file.capacity, file.allocated, file.free), (Some(100_000), 57_344, Some(42_656)));
    let elsewhere = RegionSpec { medium: Some(MediumKind::Nvdimm), ..spec(Kind::Ram, 40_960) };
    pool.allocate(&name("b"), elsewhere).unwrap();
}

#[test]
fn a_directory_with_regions_in_it_stays() {
    let (vfs, pool) = simulated();
    let mut settings = pool.settings();
    let elsewhere = |directory: &str| MediumSettings { directory: Some(directory.into()), capacity: None };
    settings.media.insert(MediumKind::File, elsewhere("/mnt/disk"));
    pool.configure(settings.clone()).unwrap();
    let made = pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    assert!(pool.path_of(&made).starts_with("/mnt/disk"));
    assert!(vfs.entry_kind(&pool.path_of(&made)).unwrap().is_some());
    settings.media.insert(MediumKind::File, elsewhere("/mnt/other"));
    assert!(matches!(pool.configure(settings), Err(PoolError::DirectoryInUse { regions: 1, .. })));
}

#[test]
fn two_pools_share_a_directory_and_sweep_only_their_own() {
    let vfs = CrashVfs::new();
    let pools = ["/one", "/two"].map(|dir| {
        let pool = Pool::create_or_open(dir, Arc::new(vfs.clone())).unwrap();
        let mut settings = pool.settings();
        let shared = MediumSettings { directory: Some("/shared".into()), capacity: None };
        settings.media.insert(MediumKind::File, shared);
        pool.configure(settings).unwrap();
        pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
        pool
    });
    for pool in &pools {
        pool.sweep().unwrap();
    }
    for pool in &pools {
        assert_eq!(pool.check().unwrap().problems, []);
    }
}

#[test]
fn opening_and_looking_write_nothing() {
    let (vfs, pool) = simulated();
    pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    let before = vfs.ops();
    let pool = Pool::open(DIR, Arc::new(vfs.clone())).unwrap();
    let _ = (pool.list(), pool.get(&name("a")), pool.usage().unwrap(), pool.check().unwrap());
    assert_eq!(pool.holder(&name("a")).unwrap(), None);
    assert_eq!(vfs.ops(), before, "{:?}", vfs.trace());
}

#[test]
fn a_pool_that_is_missing_newer_damaged_or_robbed_of_its_catalog_is_told_and_left_alone() {
    let vfs = CrashVfs::new();
    let error = Pool::open(DIR, Arc::new(vfs.clone())).unwrap_err();
    assert!(matches!(error, PoolError::Catalog(CatalogError::Missing { .. })), "{error}");
    let pool = Pool::create_or_open(DIR, Arc::new(vfs.clone())).unwrap();
    pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    let catalog = Path::new("/pool/catalog");
    vfs.flip(catalog, 50, 1).unwrap();
    let before = vfs.ops();
    for error in [
        Pool::open(DIR, Arc::new(vfs.clone())).unwrap_err(),
        Pool::create_or_open(DIR, Arc::new(vfs.clone())).unwrap_err(),
    ] {
        assert!(matches!(error, PoolError::Catalog(CatalogError::Damaged { .. })), "{error}");
        assert!(told(&error).contains("nothing was altered"));
    }
    assert!(pool.allocate(&name("b"), spec(Kind::Ram, 4096)).is_err());
    assert_eq!(vfs.ops(), before, "{:?}", &vfs.trace()[before as usize..]);
    vfs.remove_file(catalog).unwrap();
    let error = Pool::create_or_open(DIR, Arc::new(vfs.clone())).unwrap_err();
    assert!(matches!(error, PoolError::Catalog(CatalogError::Lost { .. })), "{error}");
    let newer = allocator::frame::encode(*b"PERDCATL", allocator::catalog::VERSION + 1, b"{}");
    vfs.open(catalog, OpenMode::CreateNew).unwrap().write_all_at(&newer, 0).unwrap();
    let error = Pool::open(DIR, Arc::new(vfs.clone())).unwrap_err();
    assert!(error.to_string().contains("made by a newer perdure"), "{error}");
}

#[test]
fn check_finds_each_kind_of_damage() {
    let damage = |hurt: &dyn Fn(&CrashVfs, &Path, &Path)| {
        let (vfs, pool) = simulated();
        let a = pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
        let b = pool.allocate(&name("b"), spec(Kind::Ram, 4096)).unwrap();
        hurt(&vfs, &pool.path_of(&a), &pool.path_of(&b));
        let report = pool.check().unwrap();
        assert_eq!(report.regions, 2);
        let opened = pool.lease(&name("a")).map_err(|e| e.to_string());
        let opened = opened.and_then(|lease| Region::open(lease).map(drop).map_err(|e| e.to_string()));
        (report.problems, opened)
    };
    let (found, opened) = damage(&|_, _, _| {});
    assert_eq!((found, opened), (vec![], Ok(())));
    let (found, opened) = damage(&|vfs, a, _| vfs.remove_file(a).unwrap());
    assert!(matches!(found[..], [Problem::MissingFile { .. }]));
    assert!(opened.unwrap_err().contains("is missing"));
    let cut_short = |length: u64| {
        move |vfs: &CrashVfs, a: &Path, _: &Path| vfs.open(a, OpenMode::ReadWrite).unwrap().set_len(length).unwrap()
    };
    for length in [0, 5000, 20_000] {
        let (found, opened) = damage(&cut_short(length));
        assert!(matches!(found[0], Problem::ShortFile { expected: 20_480, .. }), "{found:?}");
        assert!(opened.unwrap_err().contains("cut short"));
    }
    let (found, opened) = damage(&cut_short(30_000));
    assert!(matches!(found[..], [Problem::LongFile { .. }]) && found[0].is_sweepable());
    assert!(opened.is_ok());
    let (found, opened) = damage(&|vfs, a, _| vfs.flip(a, 4096 + 20, 4).unwrap());
    assert!(matches!(found[..], [Problem::HeaderCopyDamaged { copy: 1, .. }]));
    assert!(opened.is_ok());
    let (found, opened) = damage(&|vfs, a, _| (vfs.flip(a, 1, 4).unwrap(), vfs.flip(a, 4097, 4).unwrap()).0);
    assert!(matches!(found[..], [Problem::HeaderLost { .. }]));
    assert!(opened.unwrap_err().contains("both copies"));
    let (found, opened) = damage(&|vfs, a, b| {
        vfs.rename(a, Path::new("/t")).unwrap();
        vfs.rename(b, a).unwrap();
        vfs.rename(Path::new("/t"), b).unwrap();
    });
    assert!(found.len() == 4 && found.iter().all(|p| matches!(p, Problem::WrongIdentity { .. })), "{found:?}");
    assert!(opened.unwrap_err().contains("is not that of region a"));
    for problem in found {
        assert!(!problem.is_sweepable() && problem.to_string().contains("region"), "{problem}");
    }
}

#[test]
fn orphans_are_swept_and_files_of_a_newer_catalog_are_not() {
    let (vfs, pool) = simulated();
    pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    let catalog = Path::new("/pool/catalog");
    let old = vfs.open(catalog, OpenMode::Read).unwrap();
    let mut bytes = vec![0; old.len().unwrap() as usize];
    old.read_exact_at(&mut bytes, 0).unwrap();
    let used = pool.allocate(&name("used"), spec(Kind::Ram, 4096)).unwrap();
    open(&pool, "used").stamp_clean(1).unwrap();
    let later = pool.allocate(&name("later"), spec(Kind::Ram, 4096)).unwrap();
    vfs.open(catalog, OpenMode::CreateTruncate).unwrap().write_all_at(&bytes, 0).unwrap();

    let pool = Pool::open(DIR, Arc::new(vfs.clone())).unwrap();
    pool.sweep().unwrap();
    let problems = pool.check().unwrap().problems;
    assert!(problems.len() == 2 && problems.iter().all(|p| matches!(p, Problem::Unknown { .. })), "{problems:?}");
    let error = pool.allocate(&name("b"), spec(Kind::Ram, 4096)).unwrap_err();
    assert!(told(&error).contains(&pool.path_of(&used).display().to_string()), "{error}");
    for kept in [&used, &later] {
        assert!(vfs.entry_kind(&pool.path_of(kept)).unwrap().is_some(), "memory that was in use was swept");
    }
}

#[test]
fn a_stamp_is_set_cleared_and_not_believed_beside_a_damaged_copy() {
    let (vfs, pool) = simulated();
    let info = pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    let region = open(&pool, "a");
    assert_eq!(region.is_clean(), None);
    region.stamp_clean(0).unwrap();
    assert_eq!(region.is_clean(), Some(0));
    region.stamp_clean(u64::MAX).unwrap();
    drop(region);
    assert_eq!(open(&pool, "a").is_clean(), Some(u64::MAX));
    let before = vfs.ops();
    open(&pool, "a").clear_stamp().unwrap();
    assert_eq!(vfs.ops() - before, 3, "holder, header, flush: {:?}", vfs.trace());
    open(&pool, "a").clear_stamp().unwrap();
    assert_eq!(vfs.ops() - before, 4, "a stamp that is clear costs nothing");
    // The copy that says "not clean" rots: the older one says "clean", and must not be believed.
    let path = pool.path_of(&info);
    let clean_at = (0..2).find(|copy| {
        let mut bytes = [0; 4096];
        let file = vfs.open(&path, OpenMode::Read).unwrap();
        file.read_exact_at(&mut bytes, copy * 4096).unwrap();
        allocator::header::Header::decode(&bytes).unwrap().clean.is_some()
    });
    vfs.flip(&path, (1 - clean_at.unwrap()) * 4096 + 100, 1).unwrap();
    let region = open(&pool, "a");
    assert_eq!((region.is_clean(), region.doubtful_stamp()), (None, Some(u64::MAX)));
    region.clear_stamp().unwrap();
    assert_eq!(pool.check().unwrap().problems, [], "the write healed the damaged copy");
}

#[test]
fn a_region_in_use_is_neither_leased_freed_resized_nor_renamed() {
    let (_, pool) = simulated();
    pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    let lease = pool.lease(&name("a")).unwrap();
    let me = std::process::id();
    assert_eq!(pool.holder(&name("a")).unwrap().unwrap().pid, Some(me));
    let refusals = [
        pool.lease(&name("a")).map(drop).map_err(PoolError::from),
        pool.free(&name("a")),
        pool.resize(&name("a"), 8192).map(drop),
        pool.rename(&name("a"), &name("b")),
    ];
    for refusal in refusals {
        let text = told(&refusal.unwrap_err());
        assert!(text.contains(&format!("region a is in use by process {me}")), "{text}");
    }
    drop(lease);
    assert_eq!(pool.holder(&name("a")).unwrap(), None);
    pool.rename(&name("a"), &name("b")).unwrap();
    assert!(matches!(pool.lease(&name("a")), Err(LeaseError::NoSuchRegion { .. })));
}

#[test]
fn a_pool_opened_long_ago_leases_by_the_catalog_of_now() {
    let (vfs, now) = simulated();
    now.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
    let stale = Pool::open(DIR, Arc::new(vfs)).unwrap();
    now.resize(&name("a"), 8192).unwrap();
    now.allocate(&name("b"), spec(Kind::Ram, 4096)).unwrap();
    assert_eq!(open(&stale, "a").size(), 8192);
    assert_eq!(open(&stale, "b").size(), 4096);
    now.free(&name("a")).unwrap();
    now.allocate(&name("a"), spec(Kind::Disk, 4096)).unwrap();
    // Its file is gone, another one bears the name.
    match stale.lease(&name("a")) {
        Ok(lease) => assert_eq!(lease.info().kind, Kind::Disk),
        Err(error) => assert!(matches!(error, LeaseError::MissingFile { .. }), "{error}"),
    }
}

#[test]
fn threads_that_allocate_at_once_all_succeed() {
    let dir = tempfile::tempdir().unwrap();
    let (own, shared) = (|i: usize| name(&format!("vm{i}/ram")), name("shared"));
    std::thread::scope(|scope| {
        for i in 0..6 {
            let (dir, shared, own) = (dir.path(), &shared, own(i));
            scope.spawn(move || {
                let pool = Pool::create_or_open(dir, Arc::new(HostVfs)).unwrap();
                pool.allocate(shared, spec(Kind::Disk, 4096)).unwrap();
                pool.allocate(&own, spec(Kind::Ram, 4096)).unwrap();
            });
        }
    });
    let pool = Pool::open(dir.path(), Arc::new(HostVfs)).unwrap();
    assert_eq!(pool.list().len(), 7);
    assert!((0..6).all(|i| pool.get(&own(i)).is_some()));
    assert_eq!(pool.check().unwrap().problems, []);
}
