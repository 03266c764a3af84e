//! What benches ask of a supervisor: to serve for a while, and to come back.

use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use snapshot::Origin;
use vm_memory::{Bytes, GuestAddress};

use super::generations::{Order, Teller};
use super::{Ended, Supervisor, SupervisorError};
use crate::persistence::capture::CaptureReport;
use crate::persistence::holdup::{DirtyBudget, HoldUpStatus};
use crate::persistence::paging::PagedStatus;

/// How long the supervisor may sleep past the end of a while.
const LATE: Duration = Duration::from_millis(5);

impl Supervisor {
    /// Takes a generation and serves the VM until it is durable.
    ///
    /// # Errors
    /// [`SupervisorError::NoGeneration`] and others.
    pub fn snapshot(&mut self) -> Result<CaptureReport, SupervisorError> {
        let (sender, result) = mpsc::channel();
        let order = Order { label: None, protect: false, origin: Origin::Manual, teller: Teller::Here(sender) };
        self.generations.order(order, &self.machine);
        loop {
            self.serve_once()?;
            match result.try_recv() {
                Ok(result) => return result.map_err(SupervisorError::NoGeneration),
                Err(_) => self.wait()?,
            }
        }
    }

    /// Serves the VM for so long, and takes a generation each time `every` has passed. Returns how many were taken.
    ///
    /// # Errors
    /// [`SupervisorError::NoGeneration`] if the VM ends, and others.
    pub fn serve_for(&mut self, length: Duration, every: Option<Duration>) -> Result<u64, SupervisorError> {
        let before = self.generations.status().taken;
        self.generations.set_interval(every);
        let ended = self.serve_until(Instant::now() + length, every.is_some())?;
        self.generations.set_interval(None);
        match ended {
            Some(ended) => Err(gone(&ended)),
            None => Ok(self.generations.status().taken - before),
        }
    }

    /// Serves the VM for so long. Returns how it ended, if it did.
    ///
    /// # Errors
    /// [`SupervisorError`].
    pub fn serve_a_while(&mut self, length: Duration) -> Result<Option<Ended>, SupervisorError> {
        self.serve_until(Instant::now() + length, false)
    }

    fn serve_until(&mut self, end: Instant, awake: bool) -> Result<Option<Ended>, SupervisorError> {
        while Instant::now() < end {
            if let Some(ended) = self.take_news()? {
                return Ok(Some(ended));
            }
            if awake {
                self.wait()?;
            } else {
                std::thread::sleep(LATE);
            }
        }
        Ok(None)
    }

    /// Where its memory is; `None` if all of it is RAM.
    #[must_use]
    pub fn paged(&self) -> Option<PagedStatus> {
        self.regions.pager().map(|pager| PagedStatus::new(pager.status(), self.swap_full))
    }

    /// How it keeps within its hold-up; `None` if it has none.
    #[must_use]
    pub fn budget(&self) -> Option<HoldUpStatus> {
        self.regions.budget().map(DirtyBudget::status)
    }

    /// How much of its memory is restored: clusters that are there, and all. `None` if it was not being restored in this process.
    #[must_use]
    pub fn restored(&self) -> Option<(u64, u64)> {
        let status = self.regions.restore_under_way()?.status();
        Some((status.present, status.clusters))
    }

    /// So much RAM may be used from now on, where memory is paged: at least the least, at most what there is.
    pub fn set_ram(&self, bytes: u64) {
        if let Some(pager) = self.regions.pager() {
            pager.set_ram(bytes);
        }
    }

    /// The 8 bytes at a guest-physical address, little-endian, as the guest wrote them last; `None` if there is no memory.
    #[must_use]
    pub fn guest_word(&self, address: u64) -> Option<u64> {
        let word = self.machine.ram().memory().load::<u64>(GuestAddress(address), Ordering::Relaxed);
        word.ok().map(u64::from_le)
    }

    fn serve_once(&mut self) -> Result<(), SupervisorError> {
        match self.take_news()? {
            Some(ended) => Err(gone(&ended)),
            None => Ok(()),
        }
    }
}

fn gone(ended: &Ended) -> SupervisorError {
    SupervisorError::NoGeneration(format!("the VM ended: {ended:?}"))
}
