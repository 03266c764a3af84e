//! The power goes at every single step: what was committed is there, whole; what was not is not; and nothing is left over.
//!
//! This is the short form. The long one, with a million states: `cargo run --release -p snapshot --example crash_states`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod states;
mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use snapshot::{NewGeneration, StoreError};
use states::{Plan, Workload, enumerate, plain, verify};
use vfs::Vfs;
use vfs::crash::CrashVfs;

#[test]
fn every_cut_at_every_step_loses_nothing_that_was_committed_and_leaves_no_zombie() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let plan = Plan { states: 8_000, exhaust: 6, recoveries: 50, threads, stop_at_failure: false };
    let report = enumerate(&states::all(), &plain, plan);
    assert!(report.failures.is_empty(), "{} states, of which:\n{}", report.failures.len(), report.failures.join("\n"));
    assert!(report.distinct >= plan.states);
    for tally in &report.workloads {
        // An export changes nothing: the only moment is that after its end.
        assert!(tally.cuts > 1 || tally.name == "export", "{tally:?}");
        assert!(tally.verified.load(Ordering::Relaxed) > 0, "{tally:?}");
    }
    let of_recoveries = report.workloads.iter().map(|tally| tally.of_recoveries.load(Ordering::Relaxed)).sum::<u64>();
    assert!(of_recoveries > 1000, "{of_recoveries}");
}

fn workload(name: &str) -> Workload {
    states::all().into_iter().find(|workload| workload.name == name).unwrap()
}

fn run(workload: &Workload, disk: &CrashVfs) -> Result<(), StoreError> {
    (workload.change)(&plain(disk), &workload.options, &mut || ())
}

fn assert_stage(workload: &Workload, disk: &CrashVfs, stage: usize, told: &str) {
    let last = workload.stages.len() - 1;
    verify(workload, disk, &plain, stage..=last, stage == last).unwrap_or_else(|why| panic!("{told}: {why}"));
}

#[test]
fn a_failed_sync_is_never_taken_for_a_commit() {
    let snapshot = workload("snapshot into a new pack");
    let whole = snapshot.disk.after_kill();
    run(&snapshot, &whole).unwrap();
    assert!(whole.syncs() > 4);
    for sync in 1..=whole.syncs() {
        let disk = snapshot.disk.after_kill();
        disk.fail_sync(sync);
        assert!(run(&snapshot, &disk).is_err(), "sync {sync}");
        for seed in 0..20 {
            assert_stage(&snapshot, &disk.after_cut(seed), 0, &format!("sync {sync}, seed {seed}"));
        }
    }
}

#[test]
fn after_a_failed_sync_a_store_refuses_to_write() {
    let purge = workload("purge");
    let disk = purge.disk.after_kill();
    let vfs: Arc<dyn Vfs> = Arc::new(disk.clone());
    let store = world::open(&vfs, &purge.options).unwrap();
    disk.fail_sync(disk.syncs() + 1);
    assert!(store.protect(&snapshot::GenerationId::new("web", 3), true).is_err());
    assert!(matches!(store.begin(NewGeneration::automatic("web", 1)), Err(StoreError::Poisoned { .. })));
    assert!(matches!(store.sweep(&mut |_| ()), Err(StoreError::Poisoned { .. })));
}

#[test]
fn a_full_disk_stops_a_commit_and_nothing_else() {
    for name in ["snapshot into a new pack", "snapshot with LZ4"] {
        let snapshot = workload(name);
        let whole = snapshot.disk.after_kill();
        let used = whole.used();
        run(&snapshot, &whole).unwrap();
        let needed = whole.used();
        for capacity in (used..needed).step_by(512 * 5) {
            let disk = snapshot.disk.after_kill();
            disk.set_capacity(capacity);
            let error = run(&snapshot, &disk).unwrap_err();
            assert!(error.is_full(), "{error}");
            assert!(disk.used() <= used + 1024, "what did not fit was left behind: {} of {used}", disk.used());
            // With room again, the very same commit succeeds.
            disk.set_capacity(u64::MAX);
            assert_stage(&snapshot, &disk.after_kill(), 0, &format!("{capacity} bytes"));
            run(&snapshot, &disk).unwrap();
            assert_stage(&snapshot, &disk.after_cut(0), 1, &format!("{capacity} bytes, then more"));
        }
    }
}
