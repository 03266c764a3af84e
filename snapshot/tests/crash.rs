//! The power goes at every single step: what was committed is there, whole; what was not is not; and nothing is left over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod world;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use snapshot::{GenerationId, NewGeneration, Options, Parent, Store, StoreError};
use vfs::Vfs;
use vfs::crash::CrashVfs;
use world::{Image, check, commit, dir, open, options, put};

const SEEDS: u64 = 5;

type Images = BTreeMap<(String, u64), Image>;

/// What a change may leave: generations that must be there, and those that may.
struct Expected {
    before: Images,
    after: Images,
}

/// A store with some history, on a disk on which all of it is durable.
struct Prepared {
    disk: CrashVfs,
    images: Images,
}

fn as_vfs(disk: &CrashVfs) -> Arc<dyn Vfs> {
    Arc::new(disk.clone())
}

/// Six generations of one lineage, two of a fork; some purged, so that there is something to sweep.
fn prepared(options: &Options) -> Prepared {
    let disk = CrashVfs::new();
    let vfs = as_vfs(&disk);
    let store = open(&vfs, options).unwrap();
    let mut images = Images::new();
    let mut image = Image::new(&[("disk", 40), ("ram", 120)]);
    for generation in 0..6u32 {
        image.context = vec![generation as u8; 100];
        let puts: Vec<_> = (0..20)
            .map(|n| put("ram", u64::from((generation * 17 + n * 7) % 120), generation * 100 + n + 1))
            .chain((0..4).map(|n| put("disk", n, generation + 1)))
            .collect();
        let (id, made) = commit(&store, "web", Parent::Newest, &image, &puts).unwrap();
        images.insert((id.lineage, id.number), made.clone());
        image = made;
    }
    let fork = store.fork(&GenerationId::new("web", 3), "fork", 9).unwrap();
    images.insert((fork.id.lineage, 1), images[&("web".to_owned(), 3)].clone());
    store.purge(&[GenerationId::new("web", 1), GenerationId::new("web", 3)]).unwrap();
    images.retain(|(lineage, number), _| lineage != "web" || ![1, 3].contains(number));
    drop(store);
    // All of it is durable: whatever a cut does now, it does to what comes after.
    Prepared { disk: disk.after_cut(0), images }
}

fn verify_all(store: &Store, expected: &Expected, told: &str) {
    let listed: Vec<_> =
        store.lineages().iter().flat_map(|lineage| store.generations(lineage)).map(|found| found.id).collect();
    let key = |id: &GenerationId| (id.lineage.clone(), id.number);
    let is = |images: &Images| listed.len() == images.len() && listed.iter().all(|id| images.contains_key(&key(id)));
    assert!(is(&expected.before) || is(&expected.after), "{told}: neither before nor after: {listed:?}");
    for id in &listed {
        let image = expected.after.get(&key(id)).unwrap_or_else(|| &expected.before[&key(id)]);
        check(store, id, image).unwrap_or_else(|why| panic!("{told}: {why}"));
    }
}

/// Recovers, and checks everything: the generations, that the next writer can go on, and that a sweep leaves nothing over.
fn verify_recovered(disk: &CrashVfs, options: &Options, expected: &Expected, told: &str) {
    let vfs = as_vfs(disk);
    let store = open(&vfs, options).unwrap_or_else(|error| panic!("{told}: {error}"));
    verify_all(&store, expected, told);
    let base = Image::new(&[("ram", 64)]);
    let (id, image) = commit(&store, "after", Parent::None, &base, &[put("ram", 3, 4242), put("ram", 4, 17)])
        .unwrap_or_else(|error| panic!("{told}: the next commit: {error}"));
    check(&store, &id, &image).unwrap_or_else(|why| panic!("{told}: {why}"));
    store.purge(&[id]).unwrap();
    let swept = store.sweep(&mut |_| ()).unwrap_or_else(|error| panic!("{told}: {error}"));
    assert!(swept.blocked_by.is_empty(), "{told}: {swept:?}");
    assert_eq!(store.zombies().unwrap(), 0, "{told}");
    let scrubbed = store.scrub(&mut |_| ()).unwrap();
    assert!(scrubbed.is_clean(), "{told}: {scrubbed:?}");
    verify_all(&store, expected, told);
}

/// Something done to a store.
type Change<'a> = dyn Fn(&Arc<dyn Vfs>) -> Result<(), StoreError> + 'a;

/// Runs `change` with the power cut at each of its steps, and looks at what each cut may leave.
fn cut_everywhere(prepared: &Prepared, options: &Options, after: &Images, change: &Change<'_>) -> u64 {
    let expected = Expected { before: prepared.images.clone(), after: after.clone() };
    let whole = prepared.disk.after_cut(0);
    change(&as_vfs(&whole)).unwrap();
    let steps = whole.ops();
    verify_recovered(&whole.after_cut(0), options, &Expected { before: after.clone(), after: after.clone() }, "uncut");
    let mut states = 0;
    for step in 1..=steps {
        let disk = prepared.disk.after_cut(0);
        disk.cut_at(step);
        let result = change(&as_vfs(&disk));
        assert!(disk.is_cut());
        // Whoever was told that it is done must find it done.
        let promised = if result.is_ok() {
            Expected { before: after.clone(), after: after.clone() }
        } else {
            Expected { before: expected.before.clone(), after: expected.after.clone() }
        };
        for seed in 0..SEEDS {
            let told = format!("step {step} of {steps} ({:?}), seed {seed}", disk.trace().last());
            let left = disk.after_cut(seed);
            verify_recovered(&left, options, &promised, &told);
            states += 1;
        }
        let told = format!("killed at step {step} of {steps}");
        verify_recovered(&disk.after_kill(), options, &promised, &told);
        states += 1;
    }
    states
}

fn commit_change(options: &Options) -> (Prepared, Images, Box<Change<'static>>) {
    let prepared = prepared(options);
    let base = prepared.images[&("web".to_owned(), 6)].clone();
    let puts: Vec<_> = (0..30).map(|n| put("ram", n * 4, 9000 + n as u32)).collect();
    let mut after = prepared.images.clone();
    let mut image = base.clone();
    for put in &puts {
        image.regions.get_mut("ram").unwrap()[put.page as usize] = put.seed;
    }
    after.insert(("web".to_owned(), 7), image);
    let options = options.clone();
    let change = move |vfs: &Arc<dyn Vfs>| {
        let store = open(vfs, &options)?;
        commit(&store, "web", Parent::Newest, &base, &puts).map(drop)
    };
    (prepared, after, Box::new(change))
}

#[test]
fn a_commit_cut_anywhere_is_whole_or_not_there() {
    for (compression, redundancy) in [(world::CODECS[0], None), (world::CODECS[1], NonZeroU32::new(2))] {
        let options = Options { compression, redundancy, ..options() };
        let (prepared, after, change) = commit_change(&options);
        let states = cut_everywhere(&prepared, &options, &after, &change);
        assert!(states > 60, "{states}");
    }
}

#[test]
fn a_purge_cut_anywhere_deletes_all_it_was_to_or_nothing() {
    let prepared = prepared(&options());
    let doomed = [GenerationId::new("web", 2), GenerationId::new("web", 6)];
    let mut after = prepared.images.clone();
    doomed.iter().for_each(|id| drop(after.remove(&(id.lineage.clone(), id.number))));
    cut_everywhere(&prepared, &options(), &after, &|vfs| open(vfs, &options())?.purge(&doomed));
}

#[test]
fn a_sweep_cut_anywhere_loses_nothing() {
    let prepared = prepared(&options());
    let after = prepared.images.clone();
    cut_everywhere(&prepared, &options(), &after, &|vfs| open(vfs, &options())?.sweep(&mut |_| ()).map(drop));
}

#[test]
fn a_purge_and_a_sweep_cut_anywhere_lose_nothing_else() {
    let prepared = prepared(&options());
    let doomed = [GenerationId::new("web", 2), GenerationId::new("web", 5)];
    let mut after = prepared.images.clone();
    doomed.iter().for_each(|id| drop(after.remove(&(id.lineage.clone(), id.number))));
    cut_everywhere(&prepared, &options(), &after, &|vfs| {
        let store = open(vfs, &options())?;
        store.purge(&doomed)?;
        store.sweep(&mut |_| ()).map(drop)
    });
}

#[test]
fn a_repair_cut_anywhere_makes_nothing_worse() {
    let prepared = prepared(&options());
    let packs = dir().join("packs");
    let all: Vec<_> = world::files(&prepared.disk, &packs);
    let (mirror, length) = all.iter().find(|(path, _)| path.extension().is_some_and(|end| end == "b")).unwrap();
    for at in (5000..*length).step_by(700) {
        prepared.disk.flip(mirror, at, 0x10).unwrap();
    }
    prepared.disk.flip(&dir().join("ledger-a"), 4096 * 3 + 50, 1).unwrap();
    let after = prepared.images.clone();
    let repaired = prepared.disk.after_cut(0);
    let report = open(&as_vfs(&repaired), &options()).unwrap().repair(&mut |_| ()).unwrap();
    assert!(report.healed.len() > 3 && report.remaining.is_clean(), "{report:?}");
    // What a cut leaves may be damaged still; after another repair it is not.
    let steps = repaired.ops();
    for step in 1..=steps {
        let disk = prepared.disk.after_cut(0);
        disk.cut_at(step);
        let _ = open(&as_vfs(&disk), &options()).and_then(|store| store.repair(&mut |_| ()));
        for seed in 0..SEEDS {
            let left = disk.after_cut(seed);
            let told = format!("step {step} of {steps}, seed {seed}");
            let store = open(&as_vfs(&left), &options()).unwrap();
            verify_all(&store, &Expected { before: after.clone(), after: after.clone() }, &told);
            let report = store.repair(&mut |_| ()).unwrap();
            assert!(report.remaining.is_clean(), "{told}: {report:?}");
            drop(store);
            verify_recovered(&left, &options(), &Expected { before: after.clone(), after: after.clone() }, &told);
        }
    }
}

#[test]
fn a_repair_of_pages_cut_anywhere_loses_none_of_their_neighbours() {
    // With a copy of its own in each generation, a page that is damaged once is healed; its neighbours in the pack have one copy.
    let options = Options { redundancy: NonZeroU32::new(1), data_pack_bytes: 4 << 20, ..options() };
    let prepared = prepared(&options);
    let packs = dir().join("packs");
    let all = world::files(&prepared.disk, &packs);
    let (data, _) = all.iter().find(|(path, _)| path.to_string_lossy().contains("data-")).unwrap();
    let store = open(&as_vfs(&prepared.disk), &options).unwrap();
    let healable = (1..all.iter().find(|(path, _)| path == data).unwrap().1 / 4096).find(|block| {
        prepared.disk.flip(data, block * 4096 + 9, 2).unwrap();
        let report = store.scrub(&mut |_| ()).unwrap();
        let healable = !report.damage.is_empty() && report.damage.iter().all(|damage| damage.healable);
        if !healable {
            prepared.disk.flip(data, block * 4096 + 9, 2).unwrap();
        }
        healable
    });
    assert!(healable.is_some());
    drop(store);
    let all_there = || Expected { before: prepared.images.clone(), after: prepared.images.clone() };
    let repair = |disk: &CrashVfs| open(&as_vfs(disk), &options)?.repair(&mut |_| ());
    let whole = prepared.disk.after_cut(0);
    assert!(!repair(&whole).unwrap().healed.is_empty());
    for step in 1..=whole.ops() {
        let disk = prepared.disk.after_cut(0);
        disk.cut_at(step);
        let _ = repair(&disk);
        for seed in 0..3 {
            let left = disk.after_cut(seed);
            let told = format!("step {step}, seed {seed}");
            let report = repair(&left).unwrap();
            assert!(report.remaining.is_clean(), "{told}: {report:?}");
            verify_recovered(&left, &options, &all_there(), &told);
        }
    }
}

#[test]
fn what_a_killed_purge_freed_goes_only_after_the_purge_is_durable() {
    let prepared = prepared(&options());
    let doomed = [GenerationId::new("web", 2), GenerationId::new("web", 5)];
    let whole = prepared.disk.after_cut(0);
    open(&as_vfs(&whole), &options()).unwrap().purge(&doomed).unwrap();
    for step in 1..=whole.ops() {
        let disk = prepared.disk.after_cut(0);
        disk.cut_at(step);
        let _ = open(&as_vfs(&disk), &options()).and_then(|store| store.purge(&doomed));
        // The process is gone, the kernel lives: the record may be visible and not durable.
        let killed = disk.after_kill();
        let steps = {
            let whole = killed.after_kill();
            open(&as_vfs(&whole), &options()).unwrap().sweep(&mut |_| ()).unwrap();
            whole.ops()
        };
        for second in 1..=steps {
            let sweeping = disk.after_kill();
            sweeping.cut_at(second);
            let _ = open(&as_vfs(&sweeping), &options()).and_then(|store| store.sweep(&mut |_| ()));
            for seed in 0..SEEDS {
                let store = open(&as_vfs(&sweeping.after_cut(seed)), &options()).unwrap();
                for generation in store.lineages().iter().flat_map(|lineage| store.generations(lineage)) {
                    let image = &prepared.images[&(generation.id.lineage.clone(), generation.id.number)];
                    check(&store, &generation.id, image)
                        .unwrap_or_else(|why| panic!("steps {step}, {second}, seed {seed}: {why}"));
                }
            }
        }
    }
}

#[test]
fn the_making_of_a_store_cut_anywhere_can_be_done_again() {
    let disk = CrashVfs::new();
    open(&as_vfs(&disk), &options()).unwrap();
    for step in 1..=disk.ops() {
        let disk = CrashVfs::new();
        disk.cut_at(step);
        let made = open(&as_vfs(&disk), &options()).is_ok();
        for seed in 0..SEEDS {
            let left = disk.after_cut(seed);
            let none = Images::new();
            verify_recovered(
                &left,
                &options(),
                &Expected { before: none.clone(), after: none },
                &format!("step {step}"),
            );
            assert!(!made || Store::open_existing(as_vfs(&left), &dir(), options()).is_ok());
        }
    }
}

#[test]
fn a_cut_during_the_recovery_from_a_cut_changes_nothing() {
    let (prepared, after, change) = commit_change(&options());
    let expected = Expected { before: prepared.images.clone(), after };
    let whole = prepared.disk.after_cut(0);
    change(&as_vfs(&whole)).unwrap();
    for step in (1..=whole.ops()).rev().take(4) {
        let disk = prepared.disk.after_cut(0);
        disk.cut_at(step);
        let _ = change(&as_vfs(&disk));
        for seed in 0..SEEDS {
            let recover = |disk: &CrashVfs| {
                let store = open(&as_vfs(disk), &options())?;
                store.sweep(&mut |_| ())?;
                store.protect(&GenerationId::new("web", 6), true)
            };
            let first = disk.after_cut(seed);
            let steps = {
                let whole = first.after_cut(0);
                recover(&whole).unwrap();
                whole.ops()
            };
            for second in 1..=steps {
                let cut_again = first.after_cut(0);
                cut_again.cut_at(second);
                let _ = recover(&cut_again);
                let told = format!("step {step}, seed {seed}, then step {second}");
                verify_recovered(&cut_again.after_cut(seed + 1), &options(), &expected, &told);
            }
        }
    }
}

#[test]
fn a_failed_sync_is_never_taken_for_a_commit() {
    let (prepared, after, change) = commit_change(&options());
    let expected = Expected { before: prepared.images.clone(), after };
    let whole = prepared.disk.after_cut(0);
    change(&as_vfs(&whole)).unwrap();
    for sync in 1..=whole.syncs() {
        let disk = prepared.disk.after_cut(0);
        disk.fail_sync(sync);
        let vfs = as_vfs(&disk);
        let store = open(&vfs, &options()).unwrap();
        let base = prepared.images[&("web".to_owned(), 6)].clone();
        let puts: Vec<_> = (0..30).map(|n| put("ram", n * 4, 9000 + n as u32)).collect();
        let failed = commit(&store, "web", Parent::Newest, &base, &puts);
        assert!(failed.is_err(), "sync {sync}");
        let next = store.begin(NewGeneration::automatic("web", 1));
        assert!(matches!(next, Err(StoreError::Poisoned { .. })), "sync {sync}");
        drop(store);
        for seed in 0..SEEDS {
            let left = disk.after_cut(seed);
            let store = open(&as_vfs(&left), &options()).unwrap();
            for ((lineage, number), image) in &expected.before {
                check(&store, &GenerationId::new(lineage, *number), image).unwrap();
            }
        }
    }
}

#[test]
fn a_full_disk_stops_a_commit_and_nothing_else() {
    let (prepared, after, change) = commit_change(&options());
    let whole = prepared.disk.after_cut(0);
    let used = whole.used();
    change(&as_vfs(&whole)).unwrap();
    let needed = whole.used();
    let expected = Expected { before: prepared.images.clone(), after: prepared.images.clone() };
    for capacity in (used..needed).step_by(512 * 5) {
        let disk = prepared.disk.after_cut(0);
        disk.set_capacity(capacity);
        let error = change(&as_vfs(&disk)).unwrap_err();
        assert!(error.is_full(), "{error}");
        assert!(disk.used() <= used + 1024, "what did not fit was left behind: {} of {used}", disk.used());
        let store = open(&as_vfs(&disk), &options()).unwrap();
        verify_all(&store, &expected, &format!("{capacity} bytes"));
        // With room again, the very same commit succeeds.
        disk.set_capacity(needed + (1 << 20));
        change(&as_vfs(&disk)).unwrap();
        drop(store);
        let done = Expected { before: after.clone(), after: after.clone() };
        verify_recovered(&disk.after_cut(0), &options(), &done, &format!("{capacity} bytes, then more"));
    }
}
