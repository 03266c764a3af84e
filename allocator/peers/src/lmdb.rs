//! LMDB, through heed.

use std::path::Path;

use anyhow::Result;
use heed::byteorder::BE;
use heed::types::{Bytes, U64};
use heed::{Database, Env, EnvFlags, EnvOpenOptions};

use crate::debit_credit::{ACCOUNTS, BRANCHES, Bank, RECORD, TELLERS, Transfer, balance, book};

type Records = Database<U64<BE>, Bytes>;

pub(crate) struct Accounts {
    environment: Env,
    tables: [Records; 3],
    audit: Records,
}

impl Accounts {
    pub(crate) fn open(directory: &Path, flush: bool) -> Result<Self> {
        let mut options = EnvOpenOptions::new();
        options.map_size(1 << 30).max_dbs(4);
        let flags = if flush { EnvFlags::empty() } else { EnvFlags::NO_SYNC };
        // SAFETY: the directory was made for this process alone, so nobody else opens it or changes its files; NO_SYNC gives up only
        // what a cut would find.
        let environment = unsafe { options.flags(flags).open(directory) }?;
        let mut write = environment.write_txn()?;
        let mut table = |name: &str, count: u64| -> Result<Records> {
            let table: Records = environment.create_database(&mut write, Some(name))?;
            for number in 0..count {
                table.put(&mut write, &number, &[0; RECORD])?;
            }
            Ok(table)
        };
        let tables = [table("accounts", ACCOUNTS)?, table("tellers", TELLERS)?, table("branches", BRANCHES)?];
        let audit = table("audit", 0)?;
        write.commit()?;
        Ok(Self { environment, tables, audit })
    }
}

impl Bank for Accounts {
    fn transfer(&mut self, transfer: &Transfer) -> Result<()> {
        let mut write = self.environment.write_txn()?;
        let numbers = [transfer.account, transfer.teller, transfer.branch];
        for (table, number) in self.tables.iter().zip(numbers) {
            let mut record = [0; RECORD];
            if let Some(found) = table.get(&write, &number)? {
                record.copy_from_slice(found);
            }
            book(&mut record, transfer.amount);
            table.put(&mut write, &number, &record)?;
        }
        self.audit.put(&mut write, &transfer.audit, &transfer.audit_record())?;
        Ok(write.commit()?)
    }

    fn rest(&mut self) -> Result<()> {
        Ok(self.environment.force_sync()?)
    }

    fn sums(&mut self) -> Result<[i64; 3]> {
        let read = self.environment.read_txn()?;
        let mut sums = [0; 3];
        for (sum, table) in sums.iter_mut().zip(self.tables) {
            for record in table.iter(&read)? {
                *sum += balance(record?.1);
            }
        }
        Ok(sums)
    }
}
