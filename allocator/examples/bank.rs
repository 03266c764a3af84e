//! Accounts in recoverable memory. Transfers between them are transactions, so whatever happens to this program or its machine, the sum of all
//! accounts never changes.
//!
//! ```sh
//! cargo run --release -p allocator --example bank -- run /tmp/bank     # transfers by four threads, until it is killed; -9 will do
//! cargo run --release -p allocator --example bank -- check /tmp/bank   # how many there were, and the sum
//! ```
//!
//! `--medium dax` or `nvdimm` after the directory puts the pool's regions there. On `nvdimm`, which lives in this process's memory, the accounts
//! are as they were last saved: `run --transfers N` saves them at its end.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use allocator::rvm::{Commit, LogSpec, Memory, Mode, Options, Rvm, RvmError};
use allocator::{Kind, MediumKind, Pool, RegionName, RegionSpec};
use vfs::{HostVfs, Vfs};

/// Parts of the accounts, each under a lock of its own.
const BRANCHES: usize = 8;
/// Bytes of a branch: a count of its transfers, then accounts of 8 bytes.
const BRANCH: usize = 8192;
const ACCOUNTS: usize = BRANCH / 8 - 1;
/// What an account begins with.
const DEPOSIT: u64 = 1000;
const THREADS: u64 = 4;

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Books {
    /// Of all accounts.
    pub sum: u64,
    /// How many transfers were made.
    pub transfers: u64,
}

/// What the sum has to be.
pub const SUM: u64 = (BRANCHES * ACCOUNTS) as u64 * DEPOSIT;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A bank that is open.
pub struct Bank {
    rvm: Rvm,
    branches: Vec<Mutex<Memory>>,
}

fn name(text: &str) -> Result<RegionName, Failure> {
    Ok(text.parse()?)
}

fn word(bytes: &[u8], index: usize) -> u64 {
    bytes.get(index * 8..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_le_bytes(*word))
}

impl Bank {
    /// Opens the bank in `dir`, or founds one.
    ///
    /// # Errors
    /// As the pool and the log say.
    pub fn open(dir: &Path, vfs: Arc<dyn Vfs>, medium: MediumKind, options: Options) -> Result<Self, Failure> {
        let pool = Arc::new(Pool::create_or_open(dir, vfs)?);
        let (log, accounts) = (name("bank/log")?, name("bank/accounts")?);
        Rvm::create_log(&pool, &log, LogSpec { size: 512 << 10, medium: Some(medium), slots: 4 })?;
        let size = (BRANCHES * BRANCH) as u64;
        pool.allocate(&accounts, RegionSpec { kind: Kind::Pmem, size, medium: Some(medium) })?;
        let rvm = Rvm::initialize(pool, &log, options)?;
        let mut memory = rvm.map(&accounts)?;
        if memory.iter().all(|byte| *byte == 0) {
            found(&rvm, &mut memory)?;
        }
        let mut branches = Vec::new();
        for _ in 0..BRANCHES {
            let (branch, rest) = memory.split_at(BRANCH);
            branches.push(Mutex::new(branch));
            memory = rest;
        }
        Ok(Self { rvm, branches })
    }

    /// Moves `amount` between two accounts, if the first has it: all of it, or nothing.
    ///
    /// # Errors
    /// As the log says; then the transfer was not made, or it is not known whether it was until the bank is opened again.
    pub fn transfer(&self, from: [usize; 2], to: [usize; 2], amount: u64, commit: Commit) -> Result<(), RvmError> {
        let ([from_branch, from_account], [to_branch, to_account]) = (from, to);
        let lock =
            |branch: usize| self.branches.get(branch).map(|one| one.lock().unwrap_or_else(PoisonError::into_inner));
        // In one order, or two threads wait for each other.
        let (mut low, mut high) = (lock(from_branch.min(to_branch)), None);
        if from_branch != to_branch {
            high = lock(from_branch.max(to_branch));
        }
        let Some(low) = low.as_deref_mut() else { return Ok(()) };
        let mut transfer = self.rvm.begin_transaction(Mode::Restore)?;
        let first = transfer.enroll(low)?;
        let second = high.as_deref_mut().map(|memory| transfer.enroll(memory)).transpose()?.unwrap_or(first);
        let (payer, payee) = if from_branch <= to_branch { (first, second) } else { (second, first) };
        for (part, index, change) in
            [(payer, from_account + 1, amount.wrapping_neg()), (payee, to_account + 1, amount), (payer, 0, 1)]
        {
            let bytes = transfer.set_range(part, index * 8..index * 8 + 8)?;
            let value = word(bytes, 0).wrapping_add(change);
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        if word(transfer.bytes(payer)?, from_account + 1) > SUM {
            return transfer.abort_transaction();
        }
        transfer.end_transaction(commit)
    }

    /// Transfers at random by several threads, `count` by each, from `seed`. `done` is told how many each has made durably.
    ///
    /// # Errors
    /// The first of any.
    pub fn work(&self, seed: u64, count: u64, done: impl Fn(u64) + Sync) -> Result<(), RvmError> {
        let durable = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let work = |thread: u64| {
                let (durable, done) = (&durable, &done);
                scope.spawn(move || {
                    let mut random = seed.wrapping_mul(THREADS).wrapping_add(thread) | 1;
                    for number in 0..count {
                        // xorshift64 (Marsaglia, 2003).
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let place = |bits: u32| {
                            [(random >> bits) as usize % BRANCHES, (random >> (bits + 4)) as usize % ACCOUNTS]
                        };
                        let commit = if number % 8 == 7 { Commit::Flush } else { Commit::NoFlush };
                        self.transfer(place(0), place(24), random >> 56, commit)?;
                        if commit == Commit::Flush {
                            done(durable.fetch_add(1, Ordering::SeqCst) + 1);
                        }
                    }
                    Ok(())
                })
            };
            let threads: Vec<_> = (0..THREADS).map(work).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    /// Adds it all up.
    #[must_use]
    pub fn books(&self) -> Books {
        let mut books = Books { sum: 0, transfers: 0 };
        for branch in &self.branches {
            let branch = branch.lock().unwrap_or_else(PoisonError::into_inner);
            books.transfers += word(&branch, 0);
            books.sum = (1..=ACCOUNTS).fold(books.sum, |sum, account| sum.wrapping_add(word(&branch, account)));
        }
        books
    }

    /// Ends properly.
    ///
    /// # Errors
    /// As [`Rvm::terminate`].
    pub fn close(self) -> Result<(), RvmError> {
        self.rvm.terminate()
    }
}

/// Fills all accounts, in one transaction for each region: a bank is founded, or it is not.
fn found(rvm: &Rvm, memory: &mut Memory) -> Result<(), RvmError> {
    let mut founding = rvm.begin_transaction(Mode::Restore)?;
    let part = founding.enroll(memory)?;
    let bytes = founding.set_range(part, 0..BRANCHES * BRANCH)?;
    for branch in bytes.chunks_exact_mut(BRANCH) {
        branch.chunks_exact_mut(8).skip(1).for_each(|account| account.copy_from_slice(&DEPOSIT.to_le_bytes()));
    }
    founding.end_transaction(Commit::Flush)
}

const USAGE: &str = "usage: bank run|check DIRECTORY [--medium file|dax|nvdimm] [--transfers N]";

// The tests include this file for the bank alone.
#[allow(dead_code)]
fn main() -> ExitCode {
    match command(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bank: {error}");
            ExitCode::from(2)
        }
    }
}

fn command(arguments: Vec<String>) -> Result<ExitCode, Failure> {
    let mut words = arguments.into_iter();
    let (Some(verb), Some(dir)) = (words.next(), words.next()) else { return Err(USAGE.into()) };
    let (mut medium, mut transfers) = (MediumKind::File, u64::MAX);
    while let (Some(option), Some(value)) = (words.next(), words.next()) {
        match option.as_str() {
            "--medium" => medium = value.parse()?,
            "--transfers" => transfers = value.parse()?,
            _ => return Err(USAGE.into()),
        }
    }
    let bank = Bank::open(Path::new(&dir), Arc::new(HostVfs), medium, Options::default())?;
    let books = bank.books();
    println!("{} transfers, {} in all accounts", books.transfers, books.sum);
    if books.sum != SUM {
        println!("it should be {SUM}");
        return Ok(ExitCode::FAILURE);
    }
    if verb == "run" {
        bank.work(books.transfers + 1, transfers, |durable| println!("{durable}"))?;
        bank.close()?;
    }
    Ok(ExitCode::SUCCESS)
}
