//! Goes through the states.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use snapshot::StoreError;
use vfs::crash::{CrashVfs, Grain};

use super::verify::verify;
use super::{Mount, Workload};
use crate::world::open;

/// How far to go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Distinct states after which it is enough. What can be enumerated whole is, whatever this says.
    pub(crate) states: u64,
    /// A cut that at most so many choices decide is enumerated whole, sector by sector.
    pub(crate) exhaust: u32,
    /// Of one in so many distinct states the recovery is cut as well, at each of its steps.
    pub(crate) recoveries: u64,
    pub(crate) threads: usize,
    /// Gives up at the first state that should not be.
    pub(crate) stop_at_failure: bool,
}

/// What was found of one workload.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) name: &'static str,
    /// Steps at which it was cut, the moment after its end included.
    pub(crate) cuts: u64,
    /// Of these, how many were enumerated whole.
    pub(crate) exhausted: u64,
    /// States that were made, equal ones included.
    pub(crate) made: AtomicU64,
    /// Different ones (of this workload and promise), all verified.
    pub(crate) verified: AtomicU64,
    /// Of these, left by a cut of a recovery.
    pub(crate) of_recoveries: AtomicU64,
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) workloads: Vec<Tally>,
    /// Different disks, over all workloads.
    pub(crate) distinct: u64,
    pub(crate) failures: Vec<String>,
    pub(crate) took: Duration,
}

/// A workload, cut at one of its steps.
struct Cut {
    workload: usize,
    step: u64,
    what: String,
    disk: CrashVfs,
    stages: RangeInclusive<usize>,
    /// Whoever did it was told that it is done.
    returned: bool,
    exhausted: bool,
}

/// What was seen already: disks, and what was expected of them.
#[derive(Debug, Default)]
struct Seen {
    disks: HashSet<u64>,
    verified: HashSet<(u64, u16)>,
}

struct Run<'a> {
    plan: Plan,
    workloads: &'a [Workload],
    mount: &'a Mount,
    tallies: Vec<Tally>,
    seen: Mutex<Seen>,
    failures: Mutex<Vec<String>>,
    sampling: AtomicBool,
    enough: AtomicBool,
}

/// Seeds that are tried at a time.
const SEEDS: u64 = 16;

/// Cuts each workload at each of its steps, and verifies what each cut can leave.
pub(crate) fn enumerate(workloads: &[Workload], mount: &Mount, plan: Plan) -> Report {
    let begun = Instant::now();
    let mut run = Run {
        plan,
        workloads,
        mount,
        tallies: Vec::new(),
        seen: Mutex::default(),
        failures: Mutex::default(),
        sampling: AtomicBool::new(false),
        enough: AtomicBool::new(false),
    };
    let mut cuts = Vec::new();
    for (index, workload) in workloads.iter().enumerate() {
        let all = run.cuts(index);
        let exhausted = all.iter().filter(|cut| cut.exhausted).count() as u64;
        run.tallies.push(Tally { name: workload.name, cuts: all.len() as u64, exhausted, ..Tally::default() });
        cuts.extend(all);
    }
    run.in_parallel(cuts.len(), |index| run.few(&cuts[index]));
    let many: Vec<&Cut> = cuts.iter().filter(|cut| !cut.exhausted).collect();
    let rounds = if many.is_empty() { 0 } else { usize::MAX };
    run.sampling.store(true, Ordering::Relaxed);
    run.look_whether_enough();
    run.in_parallel(rounds, |turn| {
        let (cut, first) = (many[turn % many.len()], (turn / many.len()) as u64 * SEEDS);
        (first..first + SEEDS).for_each(|seed| run.state(cut, &format!("seed {seed}"), &cut.disk.after_cut(seed)));
    });
    let distinct = run.seen.lock().unwrap_or_else(PoisonError::into_inner).disks.len() as u64;
    let failures = run.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    Report { workloads: run.tallies, distinct, failures, took: begun.elapsed() }
}

impl Run<'_> {
    /// Runs jobs 0, 1, … on all threads, until there are no more or it is enough.
    fn in_parallel(&self, jobs: usize, job: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let work = || {
            while !self.enough.load(Ordering::Relaxed) {
                match next.fetch_add(1, Ordering::Relaxed) {
                    index if index < jobs => job(index),
                    _ => break,
                }
            }
        };
        std::thread::scope(|scope| {
            (1..self.plan.threads).for_each(|_| drop(scope.spawn(work)));
            work();
        });
    }

    /// The workload, cut at each step and after the last.
    fn cuts(&self, index: usize) -> Vec<Cut> {
        let workload = &self.workloads[index];
        let mut cuts = Vec::new();
        for step in 1.. {
            let disk = workload.disk.after_kill();
            disk.cut_at(step);
            let mut reached = 0;
            let result = (workload.change)(&(self.mount)(&disk), &workload.options, &mut || reached += 1);
            let over = !disk.is_cut();
            let returned = result.is_ok();
            if over && let Err(error) = result {
                self.fail(format!("{}: without any cut: {error}", workload.name));
            }
            let exhausted = disk.choices(Grain::Sector) <= self.plan.exhaust;
            let what = if over { "after the end".to_owned() } else { disk.trace().pop().unwrap_or_default() };
            let stages = reached..=workload.stages.len() - 1;
            cuts.push(Cut { workload: index, step, what, disk, stages, returned, exhausted });
            if over {
                break;
            }
        }
        cuts
    }

    /// The states of a cut that are few enough to be gone through: all, or those in which no operation is torn; and what a
    /// kill leaves.
    fn few(&self, cut: &Cut) {
        let killed = cut.disk.after_kill();
        self.tallies[cut.workload].made.fetch_add(1, Ordering::Relaxed);
        self.verify(cut, &|| "killed".to_owned(), &killed, cut.stages.clone(), cut.returned);
        let grain = if cut.exhausted { Grain::Sector } else { Grain::Operation };
        if cut.disk.choices(grain) <= self.plan.exhaust {
            for (number, left) in cut.disk.every_cut(grain).enumerate() {
                self.state(cut, &format!("state {number} by {grain:?}"), &left);
            }
        }
    }

    /// A state that the cut can leave. If it is new, it is verified, and of some the recovery is cut too.
    fn state(&self, cut: &Cut, name: &str, left: &CrashVfs) {
        let Some(digest) = self.is_new(cut, left, *cut.stages.start()) else { return };
        let first = left.after_kill();
        let Some(found) = self.verify(cut, &|| name.to_owned(), left, cut.stages.clone(), cut.returned) else { return };
        if digest % self.plan.recoveries == 0 {
            self.cut_the_recovery(cut, name, digest, &first, found);
        }
        self.look_whether_enough();
    }

    /// Counts a state; `None` if it has been seen with the same expectation.
    fn is_new(&self, cut: &Cut, left: &CrashVfs, least: usize) -> Option<u64> {
        let digest = left.digest();
        self.tallies[cut.workload].made.fetch_add(1, Ordering::Relaxed);
        let expectation = (cut.workload * 8 + least) as u16;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.disks.insert(digest);
        if !seen.verified.insert((digest, expectation)) {
            return None;
        }
        drop(seen);
        self.tallies[cut.workload].verified.fetch_add(1, Ordering::Relaxed);
        Some(digest)
    }

    fn verify(
        &self,
        cut: &Cut,
        name: &dyn Fn() -> String,
        left: &CrashVfs,
        stages: RangeInclusive<usize>,
        returned: bool,
    ) -> Option<usize> {
        let workload = &self.workloads[cut.workload];
        let verified = catch_unwind(AssertUnwindSafe(|| verify(workload, left, self.mount, stages, returned)))
            .unwrap_or_else(|_| Err("it panicked".to_owned()));
        verified
            .map_err(|why| {
                let Cut { step, what, .. } = cut;
                self.fail(format!("{}, cut at step {step} ({what}), {}: {why}", workload.name, name()));
            })
            .ok()
    }

    /// The power goes again while the next process puts things in order.
    fn cut_the_recovery(&self, cut: &Cut, name: &str, digest: u64, first: &CrashVfs, found: usize) {
        let workload = &self.workloads[cut.workload];
        let recover = |disk: &CrashVfs| -> Result<(), StoreError> {
            let store = open(&(self.mount)(disk), &workload.options)?;
            store.repair(&mut |_| ())?;
            store.sweep(&mut |_| ()).map(drop)
        };
        for step in 1.. {
            let again = first.after_kill();
            again.cut_at(step);
            let result = recover(&again);
            if !again.is_cut() {
                if let Err(error) = result {
                    self.fail(format!("{}, cut at step {}, {name}: its recovery: {error}", workload.name, cut.step));
                }
                return;
            }
            for seed in [0, 1, digest, digest.rotate_left(17)] {
                let left = again.after_cut(seed);
                // 4 and up: apart from states that a cut of the workload itself left.
                if self.is_new(cut, &left, 4 + found).is_some() {
                    self.tallies[cut.workload].of_recoveries.fetch_add(1, Ordering::Relaxed);
                    let name = || format!("{name}, then at step {step} of its recovery, seed {seed}");
                    self.verify(cut, &name, &left, found..=found, false);
                }
            }
        }
    }

    fn look_whether_enough(&self) {
        let distinct = self.seen.lock().unwrap_or_else(PoisonError::into_inner).disks.len() as u64;
        if distinct >= self.plan.states && self.sampling.load(Ordering::Relaxed) {
            self.enough.store(true, Ordering::Relaxed);
        }
    }

    fn fail(&self, what: String) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        if self.plan.stop_at_failure {
            self.enough.store(true, Ordering::Relaxed);
        }
    }
}
