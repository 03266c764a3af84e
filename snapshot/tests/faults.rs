//! Whether the crash harness bites: mistakes that people make, made on purpose one at a time, and each is found.
//!
//! `cargo test -p snapshot --features seeded-faults --test faults`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod careless;
mod states;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use careless::{Careless, Mistake};
use states::{Mount, Plan, Workload, enumerate, plain};
use vfs::crash::CrashVfs;

/// What each mistake is sought with.
const PLAN: Plan = Plan { states: 4000, exhaust: 5, recoveries: 25, threads: 1, stop_at_failure: true };

/// Mistakes in the store's own code, by their names there.
const IN_THE_STORE: [&str; 7] = [
    "a walk skips one of two backlinks",
    "a walk skips the headers of packs",
    "a walk skips blobs",
    "a rewrite forgets which numbers were given out",
    "a purge forgets the first of its generations",
    "a sweep takes the last pack for a dead writer's",
    "the end of a pack is recorded one block short",
];

/// The first state that the mistake spoils.
fn sought(workloads: &[Workload], name: &'static str, mount: &Mount) -> Option<String> {
    snapshot::seed_fault(Some(name));
    let report = enumerate(workloads, mount, PLAN);
    snapshot::seed_fault(None);
    report.failures.into_iter().next()
}

#[test]
fn every_seeded_fault_is_caught_and_nothing_is_where_there_is_none() {
    // Where a fault makes the store panic, that is a find and no news.
    std::panic::set_hook(Box::new(|_| ()));
    let workloads = states::all();
    let careless = careless::MISTAKES.iter().map(|(name, mistake)| (*name, Some(*mistake)));
    let faults: Vec<(&str, Option<Mistake>)> =
        careless.chain(IN_THE_STORE.map(|name| (name, None))).chain([("none at all", None)]).collect();
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    let work = || {
        while let Some(&(name, mistake)) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mount = move |disk: &CrashVfs| match mistake {
                Some(mistake) => Arc::new(Careless::new(disk, mistake)),
                None => plain(disk),
            };
            let caught = sought(&workloads, name, &mount);
            found.lock().unwrap().push((name, caught));
        }
    };
    std::thread::scope(|scope| {
        (1..std::thread::available_parallelism().map_or(1, usize::from)).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    drop(std::panic::take_hook());
    let found = found.into_inner().unwrap();
    for (name, caught) in &found {
        println!("{name}: {}", caught.as_deref().unwrap_or("not caught"));
    }
    let survivors: Vec<&str> = found.iter().filter(|(_, caught)| caught.is_none()).map(|(name, _)| *name).collect();
    assert_eq!(survivors, ["none at all"]);
    assert!(found.len() > 25);
}
