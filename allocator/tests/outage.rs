//! Every operation of a pool, cut at every step, on a disk that loses, tears and reorders: each region is then as before
//! or as after, and the pool works.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use allocator::{Kind, MediumKind, MediumSettings, Pool, PoolError, Region, RegionName, RegionSpec};
use vfs::{CrashVfs, Vfs};

const DIR: &str = "/state/pool";
/// Disks tried per cut: the three corners of the model, then mixtures.
const SEEDS: u64 = 24;

fn name(text: &str) -> RegionName {
    text.parse().unwrap()
}

fn spec(kind: Kind, size: u64) -> RegionSpec {
    RegionSpec { kind, size, medium: None }
}

fn open(vfs: &CrashVfs) -> Result<Pool, PoolError> {
    Pool::open(DIR, Arc::new(vfs.clone()))
}

fn lease(pool: &Pool, of: &RegionName) -> Result<Region, PoolError> {
    Ok(Region::open(pool.lease(of)?)?)
}

fn region(pool: &Pool, of: &RegionName) -> Region {
    lease(pool, of).unwrap()
}

/// Name, kind, medium, stamp, bytes.
type Kept = (String, Kind, MediumKind, Option<u64>, Vec<u8>);

/// All that a pool promises to keep: names in order, kinds, media, stamps, bytes, limits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    regions: Vec<Kept>,
    limits: BTreeMap<MediumKind, Option<u64>>,
}

fn state(vfs: &CrashVfs) -> State {
    let pool = open(vfs).unwrap();
    let read = |info: allocator::RegionInfo| {
        let region = region(&pool, &info.name);
        let mut bytes = vec![0; usize::try_from(info.size).unwrap()];
        region.read_at(&mut bytes, 0).unwrap();
        assert_eq!(region.doubtful_stamp(), None, "a cut alone leaves no damaged copy");
        (info.name.to_string(), info.kind, info.medium, region.is_clean(), bytes)
    };
    let limits = pool.settings().media.into_iter().map(|(medium, set)| (medium, set.capacity));
    State { regions: pool.list().into_iter().map(read).collect(), limits: limits.collect() }
}

type Operation = (&'static str, fn(&Pool) -> Result<(), PoolError>);

const OPERATIONS: &[Operation] = &[
    ("allocate", |pool| pool.allocate(&name("new/ram"), spec(Kind::Ram, 8192)).map(drop)),
    ("allocate on a medium whose directory is new", |pool| {
        let medium = Some(MediumKind::Nvdimm);
        let spec = RegionSpec { medium, ..spec(Kind::Ram, 8192) };
        pool.allocate(&name("new/ram"), spec).map(drop)
    }),
    ("reallocate", |pool| pool.allocate(&name("web/ram"), spec(Kind::Ram, 8192)).map(drop)),
    ("grow", |pool| pool.resize(&name("web/context"), 16384).map(drop)),
    ("shrink", |pool| pool.resize(&name("web/context"), 4096).map(drop)),
    ("rename", |pool| pool.rename(&name("web/ram"), &name("other"))),
    ("rename a tree", |pool| pool.rename_tree(&name("web"), &name("app/old"))),
    ("free", |pool| pool.free(&name("web/context"))),
    ("free a tree", |pool| pool.free_tree(&name("web"))),
    ("configure", |pool| {
        let mut settings = pool.settings();
        let limit = MediumSettings { directory: None, capacity: Some(1 << 30) };
        settings.media.insert(MediumKind::File, limit);
        pool.configure(settings)
    }),
    ("stamp", |pool| Ok(lease(pool, &name("swap"))?.stamp_clean(8)?)),
    ("clear a stamp", |pool| Ok(lease(pool, &name("web/ram"))?.clear_stamp()?)),
];

/// A pool with some history, of which only what is durable is left.
fn ground() -> CrashVfs {
    let vfs = CrashVfs::new();
    let pool = Pool::create_or_open(DIR, Arc::new(vfs.clone())).unwrap();
    for (region_name, kind, size) in [
        ("gone", Kind::Disk, 4096),
        ("web/ram", Kind::Ram, 8192),
        ("web/context", Kind::Context, 12288),
        ("swap", Kind::Swap, 4096),
    ] {
        pool.allocate(&name(region_name), spec(kind, size)).unwrap();
        let region = region(&pool, &name(region_name));
        let bytes: Vec<u8> = (0..size).map(|i| (i / 512 * 7 + size / 4096 + i % 251) as u8).collect();
        region.write_at(&bytes, 0).unwrap();
        region.sync().unwrap();
        if region_name == "web/ram" {
            region.stamp_clean(7).unwrap();
        }
    }
    pool.free(&name("gone")).unwrap();
    let expected = state(&vfs);
    let durable = vfs.after_cut(0);
    assert_eq!(state(&durable), expected, "what returned Ok must be durable");
    // The file of `gone` may be back.
    open(&durable).unwrap().sweep().unwrap();
    durable.sync_dir(&Path::new(DIR).join("media/file")).unwrap();
    durable
}

/// A disk of its own with the same content and the same uncertainties.
fn copy(vfs: &CrashVfs) -> CrashVfs {
    vfs.after_kill()
}

fn after(ground: &CrashVfs, operation: &Operation) -> (State, u64) {
    let vfs = copy(ground);
    (operation.1)(&open(&vfs).unwrap()).unwrap();
    assert_eq!(state(&vfs.after_cut(0)), state(&vfs), "{}: Ok must mean durable", operation.0);
    let ops = copy(ground);
    (operation.1)(&open(&ops).unwrap()).unwrap();
    (state(&vfs), ops.ops())
}

/// The pool on `vfs` is sound, is as one of `allowed`, and a change after the crash leaves no trace of it.
fn judge(vfs: &CrashVfs, allowed: &[&State], what: &str) {
    let pool = open(vfs).unwrap_or_else(|error| panic!("{what}: {error}"));
    let report = pool.check().unwrap();
    let damage: Vec<_> = report.damage().collect();
    assert!(damage.is_empty(), "{what}: {damage:?}");
    let found = state(vfs);
    assert!(allowed.contains(&&found), "{what}: neither as before nor as after: {found:?}");
    pool.sweep().unwrap();
    assert_eq!(pool.check().unwrap().problems, [], "{what}: not swept");
    assert_eq!(state(vfs), found, "{what}: the sweep changed something");
}

#[test]
fn a_power_cut_at_any_step_leaves_every_region_as_before_or_as_after() {
    let ground = ground();
    let before = state(&ground);
    for operation in OPERATIONS {
        let (after, steps) = after(&ground, operation);
        // What is there and durable is found without a write.
        assert_eq!(steps > 0, operation.0 != "reallocate", "{}: {steps} steps", operation.0);
        for step in 1..=steps {
            let vfs = copy(&ground);
            vfs.cut_at(step);
            let outcome = (operation.1)(&open(&vfs).unwrap());
            assert!(vfs.is_cut(), "{} took fewer steps this time", operation.0);
            // What is left to do after the commit may be cut off without an error.
            let allowed: &[&State] = if outcome.is_ok() { &[&after] } else { &[&before, &after] };
            for seed in 0..SEEDS {
                let what = format!("{}, cut at {step} of {steps}, disk {seed}, {:?}", operation.0, vfs.trace());
                judge(&vfs.after_cut(seed), allowed, &what);
            }
        }
    }
}

#[test]
fn a_kill_at_any_step_leaves_every_region_as_before_or_as_after_and_so_does_a_cut_later() {
    let ground = ground();
    let before = state(&ground);
    for operation in OPERATIONS {
        let (after, steps) = after(&ground, operation);
        for step in 1..=steps + 1 {
            let vfs = copy(&ground);
            vfs.cut_at(step);
            drop((operation.1)(&open(&vfs).unwrap()));
            let killed = vfs.after_kill();
            let what = format!("{}, killed at {step} of {steps}", operation.0);
            judge(&copy(&killed), &[&before, &after], &what);
            // The next process sweeps, and the power goes during that.
            let found = state(&copy(&killed));
            let probe = copy(&killed);
            open(&probe).unwrap().sweep().unwrap();
            for later in 1..=probe.ops() + 1 {
                let vfs = copy(&killed);
                vfs.cut_at(later);
                drop(open(&vfs).unwrap().sweep());
                for seed in 0..8 {
                    let what = format!("{what}, then cut at {later} of the sweep, disk {seed}");
                    judge(&vfs.after_cut(seed), &[&before, &after], &what);
                }
            }
            // Or it does the same again, which must work whatever the first one left.
            let again = copy(&killed);
            let outcome = (operation.1)(&open(&again).unwrap());
            if found == before {
                outcome.unwrap_or_else(|error| panic!("{what}, and again: {error}"));
                assert_eq!(state(&again.after_cut(0)), after, "{what}, and again: Ok must mean durable");
            }
        }
    }
}

#[test]
fn what_another_process_left_half_durable_is_durable_once_allocate_finds_it() {
    let ground = ground();
    let operation = &OPERATIONS[0];
    let (after, steps) = after(&ground, operation);
    for step in 1..=steps + 1 {
        let vfs = copy(&ground);
        vfs.cut_at(step);
        drop((operation.1)(&open(&vfs).unwrap()));
        let next = vfs.after_kill();
        (operation.1)(&open(&next).unwrap()).unwrap();
        for seed in 0..SEEDS {
            assert_eq!(state(&next.after_cut(seed)), after, "killed at {step} of {steps}, disk {seed}");
        }
    }
}

#[test]
fn a_pool_that_is_cut_while_it_is_made_can_be_made() {
    let whole = CrashVfs::new();
    Pool::create_or_open(DIR, Arc::new(whole.clone())).unwrap();
    for step in 1..=whole.ops() {
        let vfs = CrashVfs::new();
        vfs.cut_at(step);
        Pool::create_or_open(DIR, Arc::new(vfs.clone())).unwrap_err();
        let disks = (0..SEEDS).map(|seed| vfs.after_cut(seed)).chain([vfs.after_kill()]);
        for disk in disks {
            let pool = Pool::create_or_open(DIR, Arc::new(disk.clone())).unwrap();
            pool.allocate(&name("a"), spec(Kind::Ram, 4096)).unwrap();
            assert_eq!(pool.check().unwrap().problems, [], "cut at {step}");
            let durable = disk.after_cut(0);
            assert_eq!(state(&durable), state(&disk), "cut at {step}: {:?}", disk.trace());
        }
    }
}

#[test]
fn a_full_disk_leaves_everything_as_it_was_and_says_how_much_is_missing() {
    let ground = ground();
    let before = state(&ground);
    for operation in OPERATIONS {
        let (after, _) = after(&ground, operation);
        let used = copy(&ground).used();
        let mut capacity = used;
        loop {
            let vfs = copy(&ground);
            vfs.set_capacity(capacity);
            let outcome = (operation.1)(&open(&vfs).unwrap());
            let what = format!("{} with {} bytes free", operation.0, capacity - used);
            let found = state(&vfs);
            match &outcome {
                Ok(()) => assert_eq!(found, after, "{what}"),
                Err(error) => {
                    assert_eq!(found, before, "{what}: {error}");
                    assert!(says_full(error), "{what}: {error:?}");
                }
            }
            assert_eq!(open(&vfs).unwrap().check().unwrap().problems, [], "{what}");
            judge(&vfs.after_cut(0), &[&before, &after], &what);
            if outcome.is_ok() {
                break;
            }
            capacity += 512;
            assert!(capacity < used + (1 << 20), "{what}: never enough");
        }
    }
}

fn says_full(error: &PoolError) -> bool {
    if let PoolError::NoSpace { needed, .. } = error {
        return *needed > 0;
    }
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(found) = cause {
        if let Some(io) = found.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::StorageFull;
        }
        cause = found.source();
    }
    false
}

#[test]
fn a_flush_that_fails_is_an_error_and_leaves_every_region_as_before_or_as_after() {
    let ground = ground();
    let before = state(&ground);
    for operation in OPERATIONS {
        let (after, _) = after(&ground, operation);
        let probe = copy(&ground);
        (operation.1)(&open(&probe).unwrap()).unwrap();
        for sync in 1..=probe.syncs() {
            let vfs = copy(&ground);
            vfs.fail_sync(sync);
            let outcome = (operation.1)(&open(&vfs).unwrap());
            let what = format!("{}, flush {sync} failed: {:?}", operation.0, vfs.trace());
            if let Err(error) = &outcome {
                assert!(!format!("{error:?}").contains("StorageFull"), "{what}: {error}");
            }
            let live = state_or_stamp(&vfs, &before, &after, &what);
            assert!(outcome.is_err() || live == after, "{what}: Ok, and not done");
            for seed in 0..SEEDS {
                let disk = vfs.after_cut(seed);
                let found = state_or_stamp(&disk, &before, &after, &what);
                assert!(outcome.is_err() || found == after, "{what}: Ok, and not durable, disk {seed}");
            }
        }
    }
}

/// The state, which must be that before or after; but a header copy may be lost to a flush that failed.
fn state_or_stamp(vfs: &CrashVfs, before: &State, after: &State, what: &str) -> State {
    let pool = open(vfs).unwrap_or_else(|error| panic!("{what}: {error}"));
    let hard = pool.check().unwrap();
    let hard: Vec<_> =
        hard.damage().filter(|problem| !matches!(problem, allocator::Problem::HeaderCopyDamaged { .. })).collect();
    assert!(hard.is_empty(), "{what}: {hard:?}");
    let found = state(vfs);
    assert!(found == *before || found == *after, "{what}: {found:?}");
    found
}

#[test]
fn a_write_in_place_that_is_not_flushed_is_what_the_stamp_guards() {
    let ground = ground();
    let pool = open(&ground).unwrap();
    let ram = region(&pool, &name("web/ram"));
    assert_eq!(ram.is_clean(), Some(7));
    ram.clear_stamp().unwrap();
    ram.write_at(&[0xee; 8192], 0).unwrap();
    for seed in 0..SEEDS {
        let disk = ground.after_cut(seed);
        let pool = open(&disk).unwrap();
        assert_eq!(region(&pool, &name("web/ram")).is_clean(), None, "torn memory with a stamp on it");
    }
    assert!(ground.entry_kind(Path::new(DIR)).unwrap().is_some());
}
