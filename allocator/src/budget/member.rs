//! A VM's part in the budget: it reports, and is told what it may have.
//!
//! Whoever reports first in a second divides for all, under the lock of the table; so every division is seen by all.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;
use vfs::{OpenMode, VfsFile};

use super::table::{ROWS_MOST, Row, TABLE_FILE, Table};
use super::{Demand, divide};
use crate::catalog::RegionInfo;
use crate::lease::LeaseError;
use crate::name::RegionName;
use crate::pool::{Pool, PoolError};
use crate::region::Kind;
use crate::size::Size;

/// Milliseconds between divisions. A VM evicts an eighth of some GiB in that time.
const PERIOD: u64 = 1000;
/// Milliseconds for which nobody is granted more after a table was lost: in that time every VM has reported its grant again.
const UNSETTLED: u64 = 3 * PERIOD;
/// How long a running VM waits for the lock, which is held for microseconds, and while a limit is made durable. It goes by the grant that it has.
const PATIENCE_TO_REPORT: Duration = Duration::from_secs(1);
/// How long anybody else does: who begins or looks has nothing else to go by, and a flush may take seconds on a busy disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the budget could not be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BudgetError {
    /// The table could not be opened, locked, read or written.
    #[error("could not {what} the table of the RAM budget {}", path.display())]
    Table {
        /// What was being done.
        what: &'static str,
        /// The table.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process holds the lock.
    #[error("another process has held the table of the RAM budget {} for {} s: `fuser {}` names it",
            path.display(), waited.as_secs(), path.display())]
    Busy {
        /// The table.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// What the VMs were promised is more than there is.
    #[error("{} of RAM is to be for {region} alone, and of the pool's limit of {} the running VMs leave {}: stop one, give a lower \
             --ram-min, or raise the limit (`perdure pool limit`)", Size(*floor), Size(*limit), Size(*free))]
    Floors {
        /// Whose.
        region: RegionName,
        /// Its floor in bytes.
        floor: u64,
        /// The pool's limit in bytes.
        limit: u64,
        /// What the other floors leave of it, in bytes.
        free: u64,
    },
    /// A limit that is below what was promised.
    #[error("the VMs that run were promised {} of RAM: a limit of {} is too low; stop one first", Size(*promised), Size(*limit))]
    Promised {
        /// The sum of their floors in bytes.
        promised: u64,
        /// What was asked for.
        limit: u64,
    },
    /// More VMs than a table takes.
    #[error("{ROWS_MOST} VMs share the RAM budget of this pool already: use another pool")]
    Full,
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// What a VM uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// In memory, in bytes.
    pub resident: u64,
    /// Hard faults per second since the last report.
    pub faults: u32,
    /// Of these, near misses: see [`Demand::near_misses`].
    pub near_misses: u32,
}

/// What a VM is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// It may have so much in memory, in bytes. If it has more, it is to evict at once: others wait for it.
    pub granted: u64,
    /// It is to have so much, in bytes; it is granted as others make room.
    pub target: u64,
}

/// A pool's budget.
#[derive(Debug)]
pub struct Budget {
    pool: Pool,
    path: PathBuf,
}

/// The table under its lock, which goes with it.
struct Locked {
    file: Box<dyn VfsFile>,
    table: Table,
    now: u64,
}

impl Budget {
    /// The budget of `pool`, which has a limit or not: that may change at any time.
    ///
    /// # Errors
    /// [`BudgetError::Pool`].
    pub fn of(pool: &Pool) -> Result<Self, BudgetError> {
        let pool = Pool::open(pool.dir(), Arc::clone(pool.vfs()))?;
        let path = pool.dir().join(TABLE_FILE);
        Ok(Self { pool, path })
    }

    /// Those that take part and live, in the order of names.
    ///
    /// # Errors
    /// [`BudgetError::Table`], [`BudgetError::Busy`].
    pub fn rows(&self) -> Result<Vec<Row>, BudgetError> {
        // Who only looks makes no table.
        if matches!(self.pool.vfs().entry_kind(&self.path), Ok(None)) {
            return Ok(Vec::new());
        }
        let mut rows = self.lock(now(), PATIENCE)?.table.rows;
        rows.retain(|row| self.lives(row));
        Ok(rows)
    }

    /// Sets the pool's limit in bytes, durably; `None` lifts it. Running VMs follow within seconds.
    ///
    /// # Errors
    /// [`BudgetError::Promised`]; those of [`Budget::rows`]; [`BudgetError::Pool`].
    pub fn set_limit(&self, limit: Option<u64>) -> Result<(), BudgetError> {
        // Under the table's lock, so that no VM is promised anything meanwhile.
        let mut locked = self.lock(now(), PATIENCE)?;
        self.reclaim(&mut locked.table);
        let promised = locked.table.rows.iter().fold(0_u64, |sum, row| sum.saturating_add(row.demand.floor));
        if let Some(limit) = limit.filter(|limit| *limit < promised) {
            return Err(BudgetError::Promised { promised, limit });
        }
        Ok(self.pool.set_ram_limit(limit)?)
    }

    /// Takes part, for a VM whose RAM region this process holds. It may begin with [`Member::grant`], and asks again ([`Member::report`])
    /// until that is what it needs to begin: others may have to make room for its floor first.
    ///
    /// # Errors
    /// [`BudgetError::Floors`], [`BudgetError::Full`]; those of [`Budget::rows`]; [`BudgetError::Pool`].
    pub fn join(self, region: RegionName, floor: u64, cap: u64) -> Result<Member, BudgetError> {
        self.join_at(region, floor, cap, now())
    }

    fn join_at(self, region: RegionName, floor: u64, cap: u64, now: u64) -> Result<Member, BudgetError> {
        let demand = Demand { floor, cap: cap.max(floor), ..Demand::default() };
        let row = Row { region, pid: 0, started: 0, demand, granted: 0, written_at: 0 };
        let mut member = Member { budget: self, row };
        let mut locked = member.budget.lock_for(&member.row.region, now, PATIENCE)?;
        member.budget.reclaim(&mut locked.table);
        member.budget.check_floors(&locked.table, &member.row)?;
        // The others are to make room now.
        locked.table.divided_at = 0;
        member.update(locked)?;
        Ok(member)
    }

    fn check_floors(&self, table: &Table, new: &Row) -> Result<(), BudgetError> {
        let others = table.rows.iter().filter(|row| row.region != new.region);
        let (count, promised) =
            others.fold((0, 0_u64), |(count, sum), row| (count + 1, sum.saturating_add(row.demand.floor)));
        if count >= ROWS_MOST {
            return Err(BudgetError::Full);
        }
        let Some(limit) = self.limit()? else { return Ok(()) };
        let (floor, free) = (new.demand.floor, limit.saturating_sub(promised));
        if floor > free {
            return Err(BudgetError::Floors { region: new.region.clone(), floor, limit, free });
        }
        Ok(())
    }

    fn limit(&self) -> Result<Option<u64>, BudgetError> {
        self.pool.refresh()?;
        Ok(self.pool.settings().ram_limit)
    }

    fn lock(&self, now: u64, patience: Duration) -> Result<Locked, BudgetError> {
        let failed = |what| move |source| BudgetError::Table { what, path: self.path.clone(), source };
        let file = self.pool.vfs().open(&self.path, OpenMode::OpenOrCreate).map_err(failed("open"))?;
        let begun = Instant::now();
        while !file.try_lock().map_err(failed("lock"))? {
            if begun.elapsed() > patience {
                return Err(BudgetError::Busy { path: self.path.clone(), waited: patience });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let table = Table::read(&*file).map_err(failed("read"))?;
        Ok(Locked { file, table, now })
    }

    /// As [`Budget::lock`], for a change by the VM of `region`: if rows may be missing, what they were granted is respected.
    fn lock_for(&self, region: &RegionName, now: u64, patience: Duration) -> Result<Locked, BudgetError> {
        let mut locked = self.lock(now, patience)?;
        let table = &mut locked.table;
        // Of the future: written before the machine began anew.
        if table.damaged || table.divided_at > now {
            table.divided_at = 0;
            table.unsettled_until = if self.lacks_others(table, region)? { now + UNSETTLED } else { 0 };
        }
        table.unsettled_until = table.unsettled_until.min(now + UNSETTLED);
        Ok(locked)
    }

    /// Whether VMs run that are not in the table. A few milliseconds for each that does.
    fn lacks_others(&self, table: &Table, region: &RegionName) -> Result<bool, BudgetError> {
        self.pool.refresh()?;
        let is_ram = |other: &RegionInfo| other.kind == Kind::Ram && other.name != *region;
        let unknown = self.pool.list().into_iter().filter(|other| is_ram(other) && table.find(&other.name).is_none());
        let runs = |other: RegionInfo| self.is_leased(&other.name);
        Ok(unknown.into_iter().any(runs))
    }

    fn write(&self, locked: &Locked) -> Result<(), BudgetError> {
        let written = locked.table.write(&*locked.file);
        written.map_err(|source| BudgetError::Table { what: "write", path: self.path.clone(), source })
    }

    /// Those that died without leaving are left out.
    fn reclaim(&self, table: &mut Table) {
        table.rows.retain(|row| self.lives(row));
    }

    /// Its process, or, where process ids of another container mean nothing here, its lease.
    fn lives(&self, row: &Row) -> bool {
        started(row.pid) == Some(row.started) || self.is_leased(&row.region)
    }

    fn is_leased(&self, region: &RegionName) -> bool {
        match self.pool.holder(region) {
            Ok(holder) => holder.is_some(),
            Err(LeaseError::NoSuchRegion { .. } | LeaseError::MissingFile { .. }) => false,
            // It cannot be told; memory that is in use would be given away.
            Err(_) => true,
        }
    }

    /// Divides, if it is time.
    fn divide(&self, locked: &mut Locked) -> Result<(), BudgetError> {
        if locked.table.divided_at + PERIOD > locked.now {
            return Ok(());
        }
        self.reclaim(&mut locked.table);
        let limit = self.limit()?;
        let demands: Vec<Demand> = locked.table.rows.iter().map(|row| row.demand).collect();
        let shares = divide(limit.unwrap_or(u64::MAX), &demands);
        for (row, share) in locked.table.rows.iter_mut().zip(shares) {
            row.demand.share = share;
            if limit.is_none() {
                row.demand.share.target = row.demand.cap;
            }
        }
        locked.table.limit = limit;
        locked.table.divided_at = locked.now;
        Ok(())
    }
}

/// A VM that takes part. It leaves when this is dropped, or when its process dies.
#[derive(Debug)]
pub struct Member {
    budget: Budget,
    /// As it was last written: if the table is lost, it is written again.
    row: Row,
}

impl Member {
    /// What it may have, as of the last report.
    #[must_use]
    pub fn grant(&self) -> Grant {
        Grant { granted: self.row.granted, target: self.row.demand.share.target }
    }

    /// Reports, and is told. To be called once a second, and also when it has evicted what it was to: others wait for that.
    ///
    /// # Errors
    /// [`BudgetError::Table`], [`BudgetError::Busy`], [`BudgetError::Pool`]. The last grant holds then.
    pub fn report(&mut self, usage: Usage) -> Result<Grant, BudgetError> {
        self.report_at(usage, now())
    }

    fn report_at(&mut self, usage: Usage, now: u64) -> Result<Grant, BudgetError> {
        let Usage { resident, faults, near_misses } = usage;
        let locked = self.budget.lock_for(&self.row.region, now, PATIENCE_TO_REPORT)?;
        if let Some(row) = locked.table.find(&self.row.region) {
            self.row.demand.share = row.demand.share;
            self.row.granted = row.granted;
        }
        self.row.demand = Demand { resident, faults, near_misses, ..self.row.demand };
        self.update(locked)?;
        Ok(self.grant())
    }

    /// Writes this VM's row, with what it is granted.
    fn update(&mut self, mut locked: Locked) -> Result<(), BudgetError> {
        // Of this process: it may have forked since.
        self.row.pid = std::process::id();
        self.row.started = started(self.row.pid).unwrap_or(0);
        self.row.written_at = locked.now;
        locked.table.put(self.row.clone());
        self.budget.divide(&mut locked)?;
        let mut row = locked.table.find(&self.row.region).cloned().unwrap_or_else(|| self.row.clone());
        row.granted = grant(&row, &locked);
        locked.table.put(row.clone());
        self.budget.write(&locked)?;
        self.row = row;
        Ok(())
    }

    fn leave(&self) -> Result<(), BudgetError> {
        let mut locked = self.budget.lock_for(&self.row.region, now(), PATIENCE_TO_REPORT)?;
        locked.table.rows.retain(|row| row.region != self.row.region);
        self.budget.write(&locked)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Best effort: without it the row goes when this process does.
        drop(self.leave());
    }
}

/// What a VM may have now: the grants of all are never more than the limit, unless that was lowered and they are still evicting.
fn grant(row: &Row, locked: &Locked) -> u64 {
    let (target, has) = (row.demand.share.target, row.granted);
    if target <= has {
        return target.max(row.demand.resident.min(has));
    }
    let Some(limit) = locked.table.limit else { return target };
    let all = locked.table.rows.iter().fold(0_u64, |sum, row| sum.saturating_add(row.granted));
    let free = if locked.now < locked.table.unsettled_until { 0 } else { limit.saturating_sub(all) };
    target.min(has.saturating_add(free))
}

/// Milliseconds since the machine began, for all processes alike; stands still only while the machine is off.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec.unsigned_abs() * 1000 + time.tv_nsec.unsigned_abs() / 1_000_000
}

/// When a process began, in clock ticks since the machine did; `None` if it is no more.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // Field 22 of proc_pid_stat(5); the second one, a name in parentheses, may hold anything.
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests;
