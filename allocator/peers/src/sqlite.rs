//! SQLite, with a write-ahead log.

use std::path::Path;

use anyhow::Result;
use rusqlite::{Connection, params};

use crate::debit_credit::{ACCOUNTS, BRANCHES, Bank, RECORD, TELLERS, Transfer, balance, book};

const TABLES: [(&str, u64); 3] = [("accounts", ACCOUNTS), ("tellers", TELLERS), ("branches", BRANCHES)];
const READ: [&str; 3] = [
    "SELECT record FROM accounts WHERE id = ?1",
    "SELECT record FROM tellers WHERE id = ?1",
    "SELECT record FROM branches WHERE id = ?1",
];
const WRITE: [&str; 3] = [
    "UPDATE accounts SET record = ?2 WHERE id = ?1",
    "UPDATE tellers SET record = ?2 WHERE id = ?1",
    "UPDATE branches SET record = ?2 WHERE id = ?1",
];

pub(crate) struct Accounts {
    connection: Connection,
}

impl Accounts {
    pub(crate) fn open(directory: &Path, flush: bool) -> Result<Self> {
        let mut connection = Connection::open(directory.join("bank.sqlite"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", if flush { "FULL" } else { "OFF" })?;
        let transaction = connection.transaction()?;
        for (table, count) in TABLES {
            transaction.execute(&format!("CREATE TABLE {table} (id INTEGER PRIMARY KEY, record BLOB)"), [])?;
            let mut insert = transaction.prepare(&format!("INSERT INTO {table} VALUES (?1, ?2)"))?;
            for number in 0..count {
                insert.execute(params![number as i64, [0_u8; RECORD]])?;
            }
        }
        transaction.execute("CREATE TABLE audit (id INTEGER PRIMARY KEY, record BLOB)", [])?;
        transaction.commit()?;
        Ok(Self { connection })
    }
}

impl Bank for Accounts {
    fn transfer(&mut self, transfer: &Transfer) -> Result<()> {
        let transaction = self.connection.transaction()?;
        let numbers = [transfer.account, transfer.teller, transfer.branch];
        for ((read, write), number) in READ.iter().zip(WRITE).zip(numbers) {
            let mut record: Vec<u8> = transaction.prepare_cached(read)?.query_row([number as i64], |row| row.get(0))?;
            book(&mut record, transfer.amount);
            transaction.prepare_cached(write)?.execute(params![number as i64, record])?;
        }
        let mut audit = transaction.prepare_cached("INSERT OR REPLACE INTO audit VALUES (?1, ?2)")?;
        audit.execute(params![transfer.audit as i64, transfer.audit_record()])?;
        drop(audit);
        Ok(transaction.commit()?)
    }

    fn rest(&mut self) -> Result<()> {
        self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
        Ok(())
    }

    fn sums(&mut self) -> Result<[i64; 3]> {
        let mut sums = [0; 3];
        for (sum, (table, _)) in sums.iter_mut().zip(TABLES) {
            let mut select = self.connection.prepare(&format!("SELECT record FROM {table}"))?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                *sum += balance(&row.get::<_, Vec<u8>>(0)?);
            }
        }
        Ok(sums)
    }
}
