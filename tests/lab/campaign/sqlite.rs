//! [Debian](debian) with SQLite, which commits row after row, reports each, and looks now and then whether all of them are on the disk.

use super::{Guest, Place};
use crate::lab::debian::{self, Row};
use crate::lab::kernel_log;
use crate::lab::machine::L1;

/// Rows between two looks of the guest at its database.
const EVERY: u64 = 4;
/// What the ledger says when it looked.
const CHECKED: &str = "ledger: checked ";
/// What it says when something is not as it must be.
const MISMATCH: &str = "MISMATCH";

/// Its steps are rows that were committed.
pub struct Sqlite {
    journal: &'static str,
}

impl Sqlite {
    /// With a journal by the seed: a write-ahead log, or one for rollback, which is deleted at each commit.
    pub fn new(seed: u64) -> Self {
        Self { journal: if seed.is_multiple_of(2) { "wal" } else { "delete" } }
    }
}

impl Guest for Sqlite {
    fn name(&self) -> &'static str {
        debian::NAME
    }

    fn words(&self) -> String {
        debian::words(&format!("{},console,{EVERY}", self.journal))
    }

    fn qemu(&self) -> Vec<String> {
        debian::origin()
    }

    /// Its freeze took 1.2 s, on `file`.
    fn slower(&self) -> u64 {
        4
    }

    /// It looked at its database in this life, from the beginning to the end, or has something to complain of.
    fn has_shown_enough(&self, life: &str) -> bool {
        let Some((_, looked)) = life.split_once("row ").and_then(|(_, after)| after.split_once(CHECKED)) else {
            return life.contains(MISMATCH);
        };
        kernel_log::check(looked) != Ok(0) || life.contains(MISMATCH)
    }

    fn steps(&mut self, life: &str) -> Result<Vec<u64>, String> {
        if let Some(line) = life.lines().find(|line| line.contains(MISMATCH)) {
            return Err(line.trim().to_owned());
        }
        kernel_log::check(life)?;
        let mut rows: Vec<Row> = Vec::new();
        for line in life.lines() {
            let last = rows.last();
            if let Some(row) = Row::read(line) {
                if let Some(last) = last.filter(|last| last.uptime > row.uptime) {
                    return Err(format!("its clock ran backwards: {row:?} after {last:?}"));
                }
                rows.push(row);
            } else if let Some(found) = found(line)
                && last.is_some_and(|last| last.number != found)
            {
                return Err(format!("{found} rows are on its disk, and {last:?} was its last"));
            }
        }
        Ok(rows.iter().map(|row| row.number).collect())
    }

    fn end(&mut self, l1: &mut L1, place: &Place<'_>) -> Option<String> {
        Some(debian::stop(l1, place.perdure))
    }

    fn inspect(&mut self, l1: L1, place: &Place<'_>, steps: u64) {
        debian::check_disk(place.directory, place.options, l1, place.perdure, steps);
    }
}

/// How many rows it found.
fn found(line: &str) -> Option<u64> {
    let checked = line.trim().strip_prefix(CHECKED).and_then(|rows| rows.parse().ok());
    checked.or_else(|| debian::counted(line).map(|(rows, _)| rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "kernel log begins\r\nkernel log ends: 321\r\n";

    #[test]
    fn a_life_has_shown_enough_when_the_database_was_looked_at_after_one_of_its_rows() {
        let guest = Sqlite::new(0);
        assert!(!guest.has_shown_enough(&format!("ledger: checked 8\r\n{LOG}row 9 1.0 5\r\n")));
        assert!(!guest.has_shown_enough("row 9 1.0 5\r\nledger: checked 16\r\nkernel log begins\r\n"));
        assert!(guest.has_shown_enough(&format!("row 9 1.0 5\r\nledger: checked 16\r\n{LOG}")));
        assert!(guest.has_shown_enough("ledger: MISMATCH after row 8"));
    }

    #[test]
    fn rows_pass_and_what_is_not_on_the_disk_what_sqlite_or_the_kernel_complains_of_and_a_clock_that_runs_back_do_not()
    {
        let steps = |life: &str| Sqlite::new(0).steps(life);
        assert_eq!(
            steps(&format!(".9 5\r\nrow 7 1.0 5\r\nrow 8 1.0 5\r\nledger: checked 8\r\n{LOG}row 9 2.0 6\r\n")),
            Ok(vec![7, 8, 9])
        );
        assert!(steps("row 8 1.0 5\r\nledger: checked 7\r\n").is_err());
        assert!(steps("row 8 1.0 5\r\nledger: 7 rows, integrity ok, returned 0\r\n").is_err());
        assert!(steps("row 8 1.0 5\r\nledger: MISMATCH after row 8: row 3 missing from index\r\n").is_err());
        assert!(
            steps(&format!(
                "row 8 1.0 5\r\n{}",
                LOG.replace("kernel log ends", "<3>[ 9.9] I/O error\r\nkernel log ends")
            ))
            .is_err()
        );
        assert!(steps("row 7 1.1 5\r\nrow 8 1.0 5\r\n").is_err());
    }
}
