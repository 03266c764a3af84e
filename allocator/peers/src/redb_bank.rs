//! redb.

use std::path::Path;

use anyhow::Result;
use redb::{Database, Durability, ReadableTable, TableDefinition};

use crate::debit_credit::{ACCOUNTS, BRANCHES, Bank, RECORD, TELLERS, Transfer, balance, book};

type Records = TableDefinition<'static, u64, &'static [u8]>;
const TABLES: [(Records, u64); 3] = [
    (TableDefinition::new("accounts"), ACCOUNTS),
    (TableDefinition::new("tellers"), TELLERS),
    (TableDefinition::new("branches"), BRANCHES),
];
const AUDIT: Records = TableDefinition::new("audit");

pub(crate) struct Accounts {
    database: Database,
    flush: bool,
}

impl Accounts {
    pub(crate) fn open(directory: &Path, flush: bool) -> Result<Self> {
        let database = Database::create(directory.join("bank.redb"))?;
        let write = database.begin_write()?;
        for (table, count) in TABLES {
            let mut table = write.open_table(table)?;
            for number in 0..count {
                table.insert(number, &[0; RECORD][..])?;
            }
        }
        write.open_table(AUDIT)?;
        write.commit()?;
        Ok(Self { database, flush })
    }
}

impl Bank for Accounts {
    fn transfer(&mut self, transfer: &Transfer) -> Result<()> {
        let mut write = self.database.begin_write()?;
        write.set_durability(if self.flush { Durability::Immediate } else { Durability::None })?;
        let numbers = [transfer.account, transfer.teller, transfer.branch];
        for ((table, _), number) in TABLES.into_iter().zip(numbers) {
            let mut table = write.open_table(table)?;
            let mut record = [0; RECORD];
            if let Some(found) = table.get(number)? {
                record.copy_from_slice(found.value());
            }
            book(&mut record, transfer.amount);
            table.insert(number, &record[..])?;
        }
        write.open_table(AUDIT)?.insert(transfer.audit, &transfer.audit_record()[..])?;
        Ok(write.commit()?)
    }

    fn rest(&mut self) -> Result<()> {
        Ok(self.database.begin_write()?.commit()?)
    }

    fn sums(&mut self) -> Result<[i64; 3]> {
        let write = self.database.begin_write()?;
        let mut sums = [0; 3];
        for (sum, (table, _)) in sums.iter_mut().zip(TABLES) {
            for record in write.open_table(table)?.iter()? {
                *sum += balance(record?.1.value());
            }
        }
        write.abort()?;
        Ok(sums)
    }
}
