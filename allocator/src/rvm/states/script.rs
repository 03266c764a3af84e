//! What is done to the memory, and what it is after each transaction.

use std::ops::Range;
use std::sync::Arc;

use vfs::crash::CrashVfs;

use crate::rvm::{Commit, Engine, LogSpec, Memory, Mode, Rvm, RvmError, Transaction};
use crate::{Kind, MediumKind, Pool, RegionName, RegionSpec};

pub(super) const LOG: &str = "bank/log";
pub(super) const ACCOUNTS: &str = "bank/accounts";
pub(super) const TELLERS: &str = "bank/tellers";
pub(super) const REGION_LEN: usize = 8192;
/// A ring of 32 KiB with the redo engine, four slots of 1 KiB with the undo engine.
const LOG_LEN: u64 = 40 << 10;
const UNDO_LOG_LEN: u64 = 12 << 10;

pub(super) fn name(text: &str) -> RegionName {
    text.parse().unwrap()
}

/// Both regions.
pub(super) type State = [Vec<u8>; 2];

/// How far a run has come.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    /// The state that was said to be durable last.
    pub(super) durable: usize,
    /// Before the first transaction, and after each whose commit has begun.
    pub(super) states: Vec<State>,
}

impl Progress {
    pub(super) fn begin() -> Self {
        Self { durable: 0, states: vec![[vec![0; REGION_LEN], vec![0; REGION_LEN]]] }
    }

    /// A commit begins: from now on the next state may be found.
    fn reach(&mut self, writes: &[Write]) {
        let mut next = self.states.last().unwrap().clone();
        writes.iter().for_each(|write| next[write.region][write.range.clone()].fill(write.byte));
        self.states.push(next);
    }
}

/// Bytes that a transaction sets.
#[derive(Debug, Clone)]
pub(super) struct Write {
    region: usize,
    range: Range<usize>,
    byte: u8,
}

fn write(region: usize, range: Range<usize>, byte: u8) -> Write {
    Write { region, range, byte }
}

#[derive(Debug, Clone)]
enum Step {
    Commit(Vec<Write>, Commit),
    Abort(Vec<Write>),
    Drop(Vec<Write>),
    /// Two at a time, on the lower and the upper half of both regions. The first commits first; `true`: the second, too.
    Both(Vec<Write>, Vec<Write>, bool),
    Flush,
    Truncate,
    Remap,
}

/// Steps, one after the other.
pub(super) struct Script {
    pub(super) name: &'static str,
    steps: Vec<Step>,
}

/// A pool with a log and two regions.
pub(super) fn world(medium: MediumKind) -> CrashVfs {
    let disk = CrashVfs::new();
    let pool = Pool::create_or_open("/pool", Arc::new(disk.clone())).unwrap();
    let size = if medium == MediumKind::File { LOG_LEN } else { UNDO_LOG_LEN };
    Rvm::create_log(&pool, &name(LOG), LogSpec { size, medium: Some(medium), slots: 4 }).unwrap();
    for region in [ACCOUNTS, TELLERS] {
        let spec = RegionSpec { kind: Kind::Swap, size: REGION_LEN as u64, medium: Some(medium) };
        pool.allocate(&name(region), spec).unwrap();
    }
    disk.after_cut(0)
}

/// Plays `script`. `moment` is called whenever bytes were changed.
pub(super) fn play(
    rvm: &Rvm,
    script: &Script,
    progress: &mut Progress,
    moment: &mut dyn FnMut(&Progress),
) -> Result<(), RvmError> {
    let mut memory = [rvm.map(&name(ACCOUNTS))?, rvm.map(&name(TELLERS))?];
    for step in &script.steps {
        match step {
            Step::Commit(writes, commit) => {
                let transaction = change(rvm, &mut memory, writes, progress, moment)?;
                progress.reach(writes);
                moment(progress);
                transaction.end_transaction(*commit)?;
                if *commit == Commit::Flush || rvm.engine() == Engine::Undo {
                    progress.durable = progress.states.len() - 1;
                }
            }
            Step::Abort(writes) => change(rvm, &mut memory, writes, progress, moment)?.abort_transaction()?,
            Step::Drop(writes) => drop(change(rvm, &mut memory, writes, progress, moment)?),
            Step::Both(lower, upper, second) => {
                memory = both(rvm, memory, [lower, upper], *second, progress, moment)?;
            }
            Step::Flush => {
                rvm.flush()?;
                progress.durable = progress.states.len() - 1;
            }
            Step::Truncate => rvm.truncate()?,
            Step::Remap => {
                for memory in memory {
                    rvm.unmap(memory)?;
                }
                progress.durable = progress.states.len() - 1;
                memory = [rvm.map(&name(ACCOUNTS))?, rvm.map(&name(TELLERS))?];
            }
        }
        let now = progress.states.last().unwrap();
        assert!(memory[0][..] == now[0] && memory[1][..] == now[1], "{step:?} of {}", script.name);
        moment(progress);
    }
    Ok(())
}

/// Begins a transaction and sets what it is to set, each range in two goes.
fn change<'r>(
    rvm: &'r Rvm,
    memory: &'r mut [Memory; 2],
    writes: &[Write],
    progress: &Progress,
    moment: &mut dyn FnMut(&Progress),
) -> Result<Transaction<'r>, RvmError> {
    let mut transaction = rvm.begin_transaction(Mode::Restore)?;
    let [first, second] = memory;
    let parts = [transaction.enroll(first)?, transaction.enroll(second)?];
    for Write { region, range, byte } in writes {
        let bytes = transaction.set_range(parts[*region], range.clone())?;
        let middle = bytes.len() / 2;
        bytes[..middle].fill(*byte);
        moment(progress);
        transaction.set_range(parts[*region], range.clone())?[middle..].fill(*byte);
        moment(progress);
    }
    Ok(transaction)
}

/// Two transactions at a time, each on its half of both regions.
fn both(
    rvm: &Rvm,
    memory: [Memory; 2],
    writes: [&Vec<Write>; 2],
    second_commits: bool,
    progress: &mut Progress,
    moment: &mut dyn FnMut(&Progress),
) -> Result<[Memory; 2], RvmError> {
    let [accounts, tellers] = memory;
    let (accounts_low, accounts_high) = accounts.split_at(REGION_LEN / 2);
    let (tellers_low, tellers_high) = tellers.split_at(REGION_LEN / 2);
    let (mut low, mut high) = ([accounts_low, tellers_low], [accounts_high, tellers_high]);
    let first = change(rvm, &mut low, writes[0], progress, moment)?;
    let above: Vec<Write> = writes[1]
        .iter()
        .map(|write| Write { range: write.range.start - REGION_LEN / 2..write.range.end - REGION_LEN / 2, ..*write })
        .collect();
    let second = change(rvm, &mut high, &above, progress, moment)?;
    progress.reach(writes[0]);
    moment(progress);
    first.end_transaction(Commit::Flush)?;
    progress.durable = progress.states.len() - 1;
    if second_commits {
        progress.reach(writes[1]);
        moment(progress);
        second.end_transaction(Commit::Flush)?;
        progress.durable = progress.states.len() - 1;
    } else {
        second.abort_transaction()?;
    }
    drop((low, high));
    Ok([rvm.map(&name(ACCOUNTS))?, rvm.map(&name(TELLERS))?])
}

/// All scripts for an engine.
pub(super) fn all(engine: Engine) -> Vec<Script> {
    let mut all = vec![mixed(), at_a_time()];
    match engine {
        Engine::Redo => all.extend([around_the_ring(), without_flush()]),
        Engine::Undo => all.extend([small_words()]),
    }
    all
}

/// Sizes of a few bytes and of several sectors, in both regions, aborts between.
fn mixed() -> Script {
    let steps = vec![
        Step::Commit(vec![write(0, 0..8, 1), write(1, 8184..8192, 1)], Commit::Flush),
        Step::Commit(vec![write(0, 100..300, 2), write(1, 500..700, 2), write(0, 250..350, 3)], Commit::Flush),
        Step::Abort(vec![write(0, 0..200, 4), write(1, 0..10, 4)]),
        Step::Commit(vec![write(1, 510..514, 5)], Commit::Flush),
        Step::Drop(vec![write(1, 500..900, 6), write(0, 7..9, 6)]),
        Step::Commit(vec![write(0, 0..500, 7), write(1, 640..650, 7)], Commit::Flush),
    ];
    Script { name: "mixed", steps }
}

/// Two transactions at a time.
fn at_a_time() -> Script {
    let (low, high) = (0, REGION_LEN / 2);
    let of = |region: usize, half: usize, at: usize, length: usize, byte: u8| {
        write(region, half + at..half + at + length, byte)
    };
    let steps = vec![
        Step::Both(
            vec![of(0, low, 0, 64, 1), of(1, low, 8, 8, 1)],
            vec![of(0, high, 0, 150, 2), of(1, high, 2000, 10, 2)],
            true,
        ),
        Step::Both(vec![of(0, low, 4048, 48, 3)], vec![of(0, high, 0, 8, 4), of(1, high, 0, 50, 4)], false),
        Step::Commit(vec![write(0, high - 10..high + 10, 5), write(1, 0..300, 5)], Commit::Flush),
        Step::Both(vec![of(1, low, 0, 8, 6)], vec![of(1, high, 4088, 8, 7)], true),
    ];
    Script { name: "two at a time", steps }
}

/// So much that the ring is gone round twice, and truncated when it is full; and a region is unmapped.
fn around_the_ring() -> Script {
    let step = |number: usize| {
        let (at, byte) = (number * 1371 % 3500, number as u8 + 1);
        let length = 700 * (number % 4);
        let writes = vec![write(0, at..at + 4000, byte), write(1, at / 2..at / 2 + length, byte)];
        Step::Commit(writes, Commit::Flush)
    };
    let steps = (0..9).map(step).chain([Step::Remap]).chain((9..16).map(step)).collect();
    Script { name: "around the ring", steps }
}

/// Commits in memory, that supersede each other, and flushes.
fn without_flush() -> Script {
    let step = |number: usize| {
        let byte = number as u8 + 1;
        let (first, second) = (640 * (number % 3), 80 * number);
        let writes = vec![write(0, first..first + 1000, byte), write(1, second..second + 1600, byte)];
        match number % 9 {
            4 => Step::Flush,
            6 => Step::Truncate,
            7 => Step::Commit(writes, Commit::Flush),
            8 => Step::Abort(writes),
            _ => Step::Commit(writes, Commit::NoFlush),
        }
    };
    Script { name: "without flush", steps: (0..27).map(step).collect() }
}

/// Words, and parts of them.
fn small_words() -> Script {
    let step = |number: usize| {
        let at = number * 5;
        let writes = vec![write(0, at..at + 1 + number % 9, number as u8 + 1), write(1, at..at + 3, number as u8 + 1)];
        if number % 4 == 3 { Step::Abort(writes) } else { Step::Commit(writes, Commit::NoFlush) }
    };
    Script { name: "small words", steps: (0..24).map(step).collect() }
}
