//! What benches ask of a supervisor: to serve for a while, and to come back.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use snapshot::Origin;

use super::generations::{Order, Teller};
use super::{Supervisor, SupervisorError};
use crate::persistence::capture::CaptureReport;

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
        let (before, end) = (self.generations.status().taken, Instant::now() + length);
        self.generations.set_interval(every);
        while Instant::now() < end {
            self.serve_once()?;
            if every.is_some() {
                self.wait()?;
            } else {
                std::thread::sleep(LATE);
            }
        }
        self.generations.set_interval(None);
        Ok(self.generations.status().taken - before)
    }

    fn serve_once(&mut self) -> Result<(), SupervisorError> {
        match self.take_news()? {
            Some(ended) => Err(SupervisorError::NoGeneration(format!("the VM ended: {ended:?}"))),
            None => Ok(()),
        }
    }
}
