//! Cuts the power at every step of recoverable memory, and goes through the states that are left.
//!
//! * **Redo**: log and regions lie on a simulated disk ([`vfs::crash`]) that drops, tears and reorders what was not flushed.
//! * **Undo**: they lie in simulated persistent memory ([`pmem`]), where each 8-byte word that was stored since its last write-back and
//!   fence may be any of the values that it had, for itself. The recovery that follows is by the files, so it is cut on the simulated disk too.
//!
//! In each state the recovery must find exactly what one prefix of the transactions left: none later than those that had begun to commit, none
//! earlier than those that were said to be durable, and the same in both regions. Of some states the recovery is cut as well, at each of its steps.
//!
//! `PERDURE_RVM_STATES=200000 cargo test --release -p allocator --lib rvm::states -- --nocapture` for the long form.

mod pmem;
mod script;

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use vfs::crash::{CrashVfs, Grain};

use super::memory::{ByCopy, ByMedium, Mapper};
use super::{Commit, Engine, Mode, Options, Rvm, RvmError};
use crate::{MediumKind, Pool};
use pmem::Snapshot;
use script::{ACCOUNTS, LOG, Progress, Script, State, TELLERS, name, play};

/// The least that a run verifies of each engine, unless the environment says more.
const STATES: u64 = 2000;
/// A cut that at most so many yes-or-no choices decide is enumerated whole.
const EXHAUST: u32 = 6;
/// The processes are gone, and the page cache is not.
const KILLED: &str = "killed";
/// Of one in so many states the recovery is cut, too.
const RECOVERIES: u64 = 20;

/// A state that a cut may leave, and what may be found in it.
struct Moment {
    what: String,
    left: Left,
    progress: Progress,
}

enum Left {
    Disk(CrashVfs),
    /// The disk as it was before, and the memory at that moment.
    Memory(CrashVfs, Snapshot),
}

/// What was found.
#[derive(Default)]
struct Tally {
    verified: HashSet<(u64, usize, usize)>,
    of_recoveries: u64,
    moments: usize,
    failures: Vec<String>,
}

/// No thread, so that every run has the same steps.
pub(super) const OPTIONS: Options = Options { spool: 16384, truncate_at: None };

fn initialize(disk: &CrashVfs, mapper: Box<dyn Mapper>) -> Result<Rvm, RvmError> {
    let pool = Arc::new(Pool::open("/pool", Arc::new(disk.clone()))?);
    Rvm::initialize_on(Box::new(pool), &name(LOG), OPTIONS, mapper).map(|(rvm, _)| rvm)
}

/// The two regions as the next process finds them.
fn found(rvm: &Rvm) -> Result<State, RvmError> {
    Ok([rvm.map(&name(ACCOUNTS))?.to_vec(), rvm.map(&name(TELLERS))?.to_vec()])
}

/// Recovers, and says which of the states it is; then commits once more, and finds that, too.
fn verify(disk: &CrashVfs, progress: &Progress) -> Result<usize, String> {
    let told = |error: RvmError| format!("{error:?}");
    let rvm = initialize(disk, Box::new(ByCopy)).map_err(told)?;
    let mut state = found(&rvm).map_err(told)?;
    let allowed = progress.durable..=progress.states.len() - 1;
    let which = allowed.clone().rev().find(|index| progress.states[*index] == state);
    let which = which.ok_or_else(|| describe(&state, progress, &allowed))?;
    if rvm.engine() == Engine::Redo {
        let mut memory = rvm.map(&name(TELLERS)).map_err(told)?;
        let mut one_more = rvm.begin_transaction(Mode::Restore).map_err(told)?;
        let part = one_more.enroll(&mut memory).map_err(told)?;
        one_more.set_range(part, 700..1300).map_err(told)?.fill(0xEE);
        one_more.end_transaction(Commit::Flush).map_err(told)?;
        state[1][700..1300].fill(0xEE);
        drop((memory, rvm));
        let rvm = initialize(&disk.after_cut(0), Box::new(ByMedium)).map_err(told)?;
        if found(&rvm).map_err(told)? != state {
            return Err("the next commit is not found".to_owned());
        }
    }
    Ok(which)
}

fn describe(state: &State, progress: &Progress, allowed: &RangeInclusive<usize>) -> String {
    let each = [0, 1].map(|region| progress.states.iter().position(|known| known[region] == state[region]));
    format!("found the regions of states {each:?}, where {allowed:?} were allowed")
}

fn verified(disk: &CrashVfs, progress: &Progress) -> Result<usize, String> {
    catch_unwind(AssertUnwindSafe(|| verify(disk, progress))).unwrap_or_else(|_| Err("it panicked".to_owned()))
}

impl Tally {
    /// Verifies a state, if it is new.
    fn state(&mut self, moment: &Moment, disk: &CrashVfs, how: &str) {
        let digest = disk.digest();
        let expected = (moment.progress.durable, moment.progress.states.len());
        // A disk that a cut left reads the same, but has nothing left to lose.
        let told_apart = if how == KILLED { !digest } else { digest };
        if !self.verified.insert((told_apart, expected.0, expected.1)) {
            return;
        }
        let first = disk.after_kill();
        match verified(disk, &moment.progress) {
            Err(why) => self.failures.push(format!("{}, {how}: {why}", moment.what)),
            // Killed before a flush, it has left what the recovery finds and a cut may take.
            Ok(which) if how == KILLED && moment.what.contains(": sync") => {
                self.cut_the_recovery(moment, &first, expected.0..=which, how);
            }
            Ok(which) if digest.is_multiple_of(RECOVERIES) => {
                self.cut_the_recovery(moment, &first, which..=which, how);
            }
            Ok(_) => {}
        }
    }

    /// The power goes during recovery: the next one must come to the same, or to what was durable if the first began with more than that.
    fn cut_the_recovery(&mut self, moment: &Moment, first: &CrashVfs, allowed: RangeInclusive<usize>, how: &str) {
        let (durable, which) = allowed.into_inner();
        for step in 1.. {
            let again = first.after_kill();
            again.cut_at(step);
            let _ = initialize(&again, Box::new(ByCopy)).and_then(|rvm| found(&rvm));
            if !again.is_cut() {
                return;
            }
            let mixtures = if durable < which { 12 } else { 1 };
            let seeds = (0..mixtures).map(|mixture| (step + mixture).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            for seed in [0, 1, 2].into_iter().chain(seeds) {
                let left = again.after_cut(seed);
                if self.verified.insert((left.digest(), usize::MAX - durable, which)) {
                    self.of_recoveries += 1;
                    let expected = Progress { durable, states: moment.progress.states[..=which].to_vec() };
                    if let Err(why) = verified(&left, &expected) {
                        let what = &moment.what;
                        self.failures
                            .push(format!("{what}, {how}, then at step {step} of the recovery, seed {seed}: {why}"));
                    }
                }
            }
        }
    }

    /// Few choices: all of them. Whether that was all that there is.
    fn few(&mut self, moment: &Moment) -> bool {
        match &moment.left {
            Left::Disk(disk) => {
                self.state(moment, &disk.after_kill(), KILLED);
                let grains = [Grain::Sector, Grain::Operation];
                let grain = grains.into_iter().find(|grain| disk.choices(*grain) <= EXHAUST);
                for (number, left) in grain.into_iter().flat_map(|grain| disk.every_cut(grain)).enumerate() {
                    self.state(moment, &left, &format!("{grain:?} {number}"));
                }
                grain == Some(Grain::Sector)
            }
            Left::Memory(disk, snapshot) => {
                let few = snapshot.few(1 << EXHAUST);
                for number in 0..few {
                    let left = snapshot.onto(disk, &mut |options| snapshot.digit(number, options));
                    self.state(moment, &left, &format!("words {number}"));
                }
                few > 0
            }
        }
    }

    fn sample(&mut self, moment: &Moment, seed: u64) {
        let left = match &moment.left {
            Left::Disk(disk) => disk.after_cut(seed),
            Left::Memory(disk, snapshot) => snapshot.onto(disk, &mut pmem::by_seed(seed)),
        };
        self.state(moment, &left, &format!("seed {seed}"));
    }
}

/// Every moment at which the power may go while `script` is played on the redo engine.
fn redo_moments(script: &Script) -> Vec<Moment> {
    let base = script::world(MediumKind::File);
    let mut moments = Vec::new();
    for step in 1.. {
        let disk = base.after_kill();
        disk.cut_at(step);
        let mut progress = Progress::begin();
        let played =
            initialize(&disk, Box::new(ByMedium)).and_then(|rvm| play(&rvm, script, &mut progress, &mut |_| ()));
        let over = !disk.is_cut();
        assert!(!over || played.is_ok(), "{}: without a cut: {played:?}", script.name);
        let what = if over { "after the end".to_owned() } else { disk.trace().pop().unwrap() };
        moments.push(Moment { what: format!("{}: {what} ({step})", script.name), left: Left::Disk(disk), progress });
        if over {
            return moments;
        }
    }
    unreachable!("it ends")
}

/// The same on the undo engine: one run, of which the memory is kept at each moment.
fn undo_moments(script: &Script) -> Vec<Moment> {
    let disk = script::world(MediumKind::Dax);
    let world = pmem::World::default();
    let rvm = initialize(&disk, Box::new(world.clone())).unwrap();
    // So that the regions belong to the log, as in any run but the first.
    let ids = [ACCOUNTS, TELLERS].map(|region| rvm.map(&name(region)).unwrap().mapped.region.id());
    assert_ne!(ids[0], ids[1]);
    let mut progress = Progress::begin();
    world.watch();
    play(&rvm, script, &mut progress, &mut |now| world.happens(now)).unwrap();
    world.happens(&progress);
    drop(rvm);
    let disk = disk.after_kill();
    let states = progress.states;
    let moment = |(number, (snapshot, durable, begun)): (usize, (Snapshot, usize, usize))| Moment {
        what: format!("{}: moment {number}", script.name),
        left: Left::Memory(disk.after_kill(), snapshot),
        progress: Progress { durable, states: states[..begun].to_vec() },
    };
    world.snapshots().into_iter().enumerate().map(moment).collect()
}

/// Goes through states until there are so many, or one is not as it should be.
fn enumerate(moments: &[Moment], states: u64, stop_at_failure: bool) -> Tally {
    let mut tally = Tally { moments: moments.len(), ..Tally::default() };
    let enough =
        |tally: &Tally| tally.verified.len() as u64 >= states || (stop_at_failure && !tally.failures.is_empty());
    let mut many = Vec::new();
    for moment in moments {
        if !tally.few(moment) {
            many.push(moment);
        }
        if stop_at_failure && enough(&tally) {
            return tally;
        }
    }
    for seed in 0..states {
        for moment in &many {
            if enough(&tally) {
                return tally;
            }
            tally.sample(moment, seed);
        }
    }
    tally
}

fn moments(engine: Engine) -> Vec<Moment> {
    let of = |script: Script| match engine {
        Engine::Redo => redo_moments(&script),
        Engine::Undo => undo_moments(&script),
    };
    script::all(engine).into_iter().flat_map(of).collect()
}

fn wanted() -> u64 {
    std::env::var("PERDURE_RVM_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(STATES)
}

fn every_state_is_one_of_those_that_may_be(engine: Engine) {
    let begun = std::time::Instant::now();
    let tally = enumerate(&moments(engine), wanted(), false);
    let (states, recoveries, cuts) = (tally.verified.len(), tally.of_recoveries, tally.moments);
    println!("{engine:?}: {states} states of {cuts} cuts, {recoveries} of them of recoveries, {:?}", begun.elapsed());
    let shown: Vec<&String> = tally.failures.iter().take(10).collect();
    assert!(tally.failures.is_empty(), "{} states, of which:\n{shown:#?}", tally.failures.len());
    assert!(states as u64 >= wanted());
    assert!(recoveries > 100, "{recoveries}");
}

#[test]
fn whatever_a_cut_leaves_of_the_redo_engine_is_what_was_committed() {
    every_state_is_one_of_those_that_may_be(Engine::Redo);
}

#[test]
fn whatever_a_cut_leaves_of_the_undo_engine_is_what_was_committed() {
    every_state_is_one_of_those_that_may_be(Engine::Undo);
}

#[cfg(feature = "seeded-faults")]
mod faults {
    use super::*;
    use crate::rvm::fault::{hush_seeded_panics, seed_fault};

    const REDO: [&str; 9] = [
        "a commit is not flushed",
        "what lies behind the end of the ring is not written",
        "the checksum of a batch is not looked at",
        "the oldest value of a byte is kept",
        "a recovery does not flush the log first",
        "a recovery does not flush the regions",
        "a truncation does not flush the regions",
        "the head is moved before the regions are flushed",
        "a truncation leaves out its last batch",
    ];
    const UNDO: [&str; 9] = [
        "a record is not persistent before its bytes change",
        "a torn record counts",
        "a commit does not write the new bytes back",
        "a commit does not fence the new bytes",
        "a commit's own word is not fenced",
        "an abort does not write the old bytes back",
        "a recovery looks at one slot alone",
        "a recovery voids the records before the old bytes are durable",
        "a recovery does not flush the regions",
    ];

    /// The first state that the mistake spoils.
    fn sought(engine: Engine, fault: Option<&'static str>) -> Option<String> {
        seed_fault(fault);
        let caught = catch_unwind(|| enumerate(&moments(engine), 20_000, true).failures.into_iter().next());
        seed_fault(None);
        caught.unwrap_or_else(|_| Some("the script itself fails".to_owned()))
    }

    fn each_is_caught(engine: Engine, faults: &[&'static str]) {
        hush_seeded_panics();
        let caught = faults.iter().map(|fault| (*fault, sought(engine, Some(fault))));
        let caught: Vec<_> = caught.inspect(|(fault, how)| println!("{fault}: {how:?}")).collect();
        let survivors: Vec<_> = caught.iter().filter(|(_, how)| how.is_none()).map(|(fault, _)| *fault).collect();
        assert_eq!(survivors, [""; 0]);
    }

    #[test]
    fn every_mistake_in_the_redo_engine_is_caught() {
        each_is_caught(Engine::Redo, &REDO);
    }

    #[test]
    fn every_mistake_in_the_undo_engine_is_caught() {
        each_is_caught(Engine::Undo, &UNDO);
    }
}
