//! A VM's part in its pool's budget of RAM (`perdure pool limit`): a thread reports what the VM uses and how much it faults, and tells its
//! pager what it may use.
//!
//! A VM that pages can be asked to give RAM up, down to its floor (`--ram-min`). One that has all its memory in RAM cannot: its floor is
//! all of it.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use allocator::budget::{Budget, BudgetError, Grant, Member, Usage};
use allocator::paging::{Geometry, Pager, PagingStatus};
use allocator::{Pool, RegionName};

use crate::machine::config::VmConfig;
use crate::machine::jail::{self, Role};
use crate::persistence::regions::VmRegions;

/// Between two reports.
const PERIOD: Duration = Duration::from_secs(1);
/// The same while RAM is to be given up, or is waited for.
const PERIOD_MOVING: Duration = Duration::from_millis(100);
/// For a VM whose RAM does not move.
const PERIOD_FIXED: Duration = Duration::from_secs(10);

/// A place in the budget, taken before the VM's memory is touched.
#[derive(Debug)]
pub(super) enum Place {
    Taken(Box<Member>),
    /// It is taken beside the guest, which does not wait for it: RAM is not limited, and this VM has what it has.
    Later {
        pool: PathBuf,
        region: RegionName,
        size: u64,
    },
}

impl Place {
    /// Takes a place for a VM that is about to run, in a pool that was read just now.
    ///
    /// # Errors
    /// [`BudgetError::Floors`]: what it must have is not there.
    pub(super) fn take(pool: &Pool, regions: &VmRegions) -> Result<Self, BudgetError> {
        let config = regions.config();
        let (region, floor, cap) = (regions.ram().name().clone(), floor(config), config.ram_bytes());
        if config.geometry().is_none() && pool.settings().ram_limit.is_none() {
            return Ok(Self::Later { pool: pool.dir().to_owned(), region, size: cap });
        }
        Budget::of(pool)?.join(region, floor, cap).map(|member| Self::Taken(Box::new(member)))
    }

    fn join(self) -> Result<Member, BudgetError> {
        match self {
            Self::Taken(member) => Ok(*member),
            Self::Later { pool, region, size } => {
                Budget::of(&Pool::open(&pool, vfs::cut::host())?)?.join(region, size, size)
            }
        }
    }

    /// Begins to report. `pager` is told at once what it may use.
    pub(super) fn begin(self, pager: Option<&Arc<Pager>>) -> std::io::Result<RamBudget> {
        let end = Arc::new((Mutex::new(false), Condvar::new()));
        let pager = pager.map(Arc::clone);
        if let (Some(pager), Self::Taken(member)) = (&pager, &self) {
            pager.set_ram(member.grant().granted);
        }
        let ended = Arc::clone(&end);
        let body = move || match self.join() {
            Ok(member) => report(member, pager.as_deref(), &ended),
            Err(error) => tracing::warn!("the budget of RAM does not know of this VM: {error}"),
        };
        let thread = jail::spawn("budget", Role::Budget, body)?;
        Ok(RamBudget { end, thread: Some(thread) })
    }
}

/// The least RAM that a VM has, in bytes.
fn floor(config: &VmConfig) -> u64 {
    match config.geometry() {
        Some(_) => config.ram_min.map_or_else(|| Geometry::least_ram(config.memory.0, config.medium), |floor| floor.0),
        None => config.ram_bytes(),
    }
}

/// The thread that reports, until this is dropped.
#[derive(Debug)]
pub(super) struct RamBudget {
    end: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for RamBudget {
    fn drop(&mut self) {
        *self.end.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.end.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn report(mut member: Member, pager: Option<&Pager>, end: &(Mutex<bool>, Condvar)) {
    let mut last = (Instant::now(), pager.map(Pager::status));
    let mut told = false;
    let mut period = PERIOD_MOVING;
    loop {
        let ended = end.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = end.1.wait_timeout_while(ended, period, |ended| !*ended);
        if *waited.unwrap_or_else(PoisonError::into_inner).0 {
            return;
        }
        let Some(pager) = pager else {
            period = PERIOD_FIXED;
            let _ = member.report(Usage { resident: member.grant().granted, ..Usage::default() });
            continue;
        };
        let (now, status) = (Instant::now(), pager.status());
        match member.report(usage(&last, now, &status)) {
            Ok(grant) => {
                pager.set_ram(grant.granted);
                period = next(grant, &status);
                told = false;
            }
            Err(error) if !std::mem::replace(&mut told, true) => tracing::warn!("the budget of RAM: {error}"),
            Err(_) => {}
        }
        // Rates over less than a second jump.
        if now - last.0 >= PERIOD {
            last = (now, Some(status));
        }
    }
}

/// How soon to report again.
fn next(grant: Grant, status: &PagingStatus) -> Duration {
    let moving = grant.granted != grant.target || status.resident * status.cluster > grant.granted;
    if moving { PERIOD_MOVING } else { PERIOD }
}

fn usage(last: &(Instant, Option<PagingStatus>), now: Instant, status: &PagingStatus) -> Usage {
    let before = last.1.unwrap_or_default();
    let seconds = (now - last.0).as_secs_f64().max(0.001);
    let rate = |now: u64, before: u64| (now.saturating_sub(before) as f64 / seconds) as u32;
    Usage {
        resident: status.resident * status.cluster,
        faults: rate(status.hard_faults, before.hard_faults),
        near_misses: rate(status.near_misses, before.near_misses),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::config::ByteSize;

    #[test]
    fn a_vm_that_pages_is_promised_its_floor_and_another_all_it_has() {
        let config = VmConfig { memory: ByteSize(1 << 30), ..VmConfig::default() };
        assert_eq!(floor(&config), 1 << 30);
        let paged = VmConfig { ram: Some(ByteSize(256 << 20)), ..config };
        assert_eq!(floor(&paged), 512 << 10);
        assert_eq!(floor(&VmConfig { ram_min: Some(ByteSize(64 << 20)), ..paged }), 64 << 20);
    }

    #[test]
    fn rates_are_of_a_second_and_what_moves_is_looked_at_sooner() {
        let before = PagingStatus { hard_faults: 100, near_misses: 10, ..PagingStatus::default() };
        let status = PagingStatus {
            hard_faults: 300,
            near_misses: 50,
            resident: 3,
            cluster: 1 << 16,
            ..PagingStatus::default()
        };
        let then = Instant::now();
        let told = usage(&(then, Some(before)), then + Duration::from_secs(2), &status);
        assert_eq!(told, Usage { resident: 3 << 16, faults: 100, near_misses: 20 });
        let grant = |granted, target| next(Grant { granted, target }, &status);
        assert_eq!(grant(4 << 16, 4 << 16), PERIOD);
        assert_eq!((grant(4 << 16, 5 << 16), grant(2 << 16, 2 << 16)), (PERIOD_MOVING, PERIOD_MOVING));
    }
}
