//! The power-fail signal and what follows it: a freeze, what is left of the hold-up, the end or the return of power.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::control::{Pending, Reply, Request, Response};
use super::power::{self, HoldUp};
use super::{Around, Chain, Ended, Supervisor, SupervisorError};
use crate::machine::time::nanoseconds;
use crate::persistence::freeze::{self, FreezeError};
use crate::persistence::lifecycle::{Event, State};

impl Supervisor {
    /// The power-fail signal. `None`: the VM runs on.
    pub(super) fn on_power_fail(
        &mut self,
        holdup: Option<Duration>,
        reply: Option<&Reply>,
    ) -> Result<Option<Ended>, SupervisorError> {
        let hold_up = HoldUp::begin(holdup);
        let darkness = hold_up.arm();
        self.generations.give_up("a power-fail signal came first");
        self.power_back.store(false, Ordering::SeqCst);
        self.state = self.state.after(Event::PowerFail).unwrap_or(State::Freezing);
        let around = Around(&self.console);
        let started = hold_up.started();
        let frozen = freeze::freeze(&self.machine, &mut self.regions, &around, started, &self.power_back);
        let answer = |response| {
            if let Some(reply) = reply {
                reply.send(&response);
            }
        };
        match frozen {
            Ok(mut report) => {
                self.state = self.state.after(Event::Saved).unwrap_or(State::Frozen);
                if hold_up.left().is_some_and(|left| left.is_zero()) {
                    // Darkness is due, though the thread that brings it has not run yet.
                    power::go_dark();
                }
                if let Some(budget) = self.regions.budget() {
                    budget.learn(&report);
                }
                let promised = self.machine.config().holdup().map(nanoseconds);
                let left = promised.map(|holdup| holdup.saturating_sub(report.total_ns));
                report.holdup_left_ns = hold_up.left().map(nanoseconds).or(left);
                answer(Response::Frozen(Box::new(report)));
                // Not before: it is a hint, and that was a matter of time.
                self.remember_working_set();
                if self.power_comes_back(&hold_up)? {
                    drop(darkness);
                    self.thaw(Event::PowerBack)?;
                    return Ok(None);
                }
                Ok(Some(Ended::Frozen(report)))
            }
            Err(FreezeError::Ended) => {
                // Its end is among the news, and is next.
                drop(darkness);
                answer(Response::Refused { why: "the guest has just ended".to_owned() });
                self.state = State::Running;
                Ok(None)
            }
            Err(error) => {
                drop(darkness);
                self.called_off = matches!(error, FreezeError::PowerBack);
                if self.called_off {
                    let _ = self.power.take();
                }
                self.thaw(Event::Abort)?;
                tracing::warn!("{}: the VM runs on: {}", self.name, Chain(&error));
                answer(Response::Refused { why: format!("the VM was not frozen and runs on: {}", Chain(&error)) });
                Ok(None)
            }
        }
    }

    pub(super) fn thaw(&mut self, event: Event) -> Result<(), SupervisorError> {
        let vcpus = self.vcpus();
        freeze::thaw(&self.machine, &mut self.regions, &Around(&self.console), vcpus).map_err(SupervisorError::Thaw)?;
        self.state = self.state.after(event).unwrap_or(State::Running);
        Ok(())
    }

    /// Frozen, with power left: waits through what is left of the hold-up for the power to come back.
    fn power_comes_back(&mut self, hold_up: &HoldUp) -> Result<bool, SupervisorError> {
        while let Some(left) = hold_up.left().filter(|left| !left.is_zero()) {
            match self.inboxes.control.recv_timeout(left) {
                Ok(Pending { request: Request::PowerBack, reply }) => {
                    // Warnings from before are of the outage that is over.
                    let _ = self.power.take();
                    reply.send(&Response::Done);
                    return Ok(true);
                }
                Ok(Pending { request: Request::Status, reply }) => {
                    reply.send(&Response::Status(Box::new(self.status())));
                }
                Ok(Pending { reply, .. }) => {
                    reply.send(&Response::Refused { why: "the VM is frozen, the power is going".to_owned() });
                }
                Err(_) => break,
            }
        }
        Ok(false)
    }
}
