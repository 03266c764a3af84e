//! Recoverable memory.

use std::path::Path;
use std::sync::Arc;

use allocator::rvm::{Commit, LogSpec, Memory, Mode, Options, Rvm};
use allocator::{Kind, MediumKind, Pool, RegionSpec};
use anyhow::Result;
use vfs::HostVfs;

use crate::debit_credit::{ACCOUNTS, AUDIT, BRANCHES, Bank, RECORD, TELLERS, TRAIL, Transfer, balance, book};

pub(crate) struct Accounts {
    rvm: Rvm,
    memory: Memory,
    commit: Commit,
}

const TELLERS_AT: u64 = ACCOUNTS;
const BRANCHES_AT: u64 = TELLERS_AT + TELLERS;
const TRAIL_AT: usize = (BRANCHES_AT + BRANCHES) as usize * RECORD;

impl Accounts {
    pub(crate) fn open(directory: &Path, flush: bool) -> Result<Self> {
        let pool = Arc::new(Pool::create_or_open(directory.join("pool"), Arc::new(HostVfs))?);
        let (log, accounts) = ("bank/log".parse()?, "bank/accounts".parse()?);
        let medium = Some(MediumKind::File);
        Rvm::create_log(&pool, &log, LogSpec { size: 16 << 20, medium, ..LogSpec::default() })?;
        let size = (TRAIL_AT + TRAIL as usize * AUDIT).next_multiple_of(4096) as u64;
        pool.allocate(&accounts, RegionSpec { kind: Kind::Pmem, size, medium })?;
        let rvm = Rvm::initialize(pool, &log, Options::default())?;
        let memory = rvm.map(&accounts)?;
        Ok(Self { rvm, memory, commit: if flush { Commit::Flush } else { Commit::NoFlush } })
    }
}

fn record(number: u64) -> std::ops::Range<usize> {
    number as usize * RECORD..(number as usize + 1) * RECORD
}

impl Bank for Accounts {
    fn transfer(&mut self, transfer: &Transfer) -> Result<()> {
        let mut transaction = self.rvm.begin_transaction(Mode::Restore)?;
        let part = transaction.enroll(&mut self.memory)?;
        for number in [transfer.account, TELLERS_AT + transfer.teller, BRANCHES_AT + transfer.branch] {
            book(transaction.set_range(part, record(number))?, transfer.amount);
        }
        let at = TRAIL_AT + transfer.audit as usize * AUDIT;
        transaction.set_range(part, at..at + AUDIT)?.copy_from_slice(&transfer.audit_record());
        Ok(transaction.end_transaction(self.commit)?)
    }

    fn rest(&mut self) -> Result<()> {
        Ok(self.rvm.flush()?)
    }

    fn sums(&mut self) -> Result<[i64; 3]> {
        let sum =
            |from: u64, count: u64| (from..from + count).map(|number| balance(&self.memory[record(number)])).sum();
        Ok([sum(0, ACCOUNTS), sum(TELLERS_AT, TELLERS), sum(BRANCHES_AT, BRANCHES)])
    }
}
