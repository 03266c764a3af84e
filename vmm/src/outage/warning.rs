//! The power-fail signal to all VMs of a machine, and what they answer.

use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::machine::time::nanoseconds;
use crate::persistence::freeze::FreezeReport;
use crate::supervisor::control::{ControlClient, Request, Response};

/// What came of a warning.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// All is durable.
    Frozen(Box<FreezeReport>),
    /// It runs on: why.
    Refused(String),
    /// It went dark before it could say anything, or could not be asked.
    Silent(String),
}

/// A VM's answer, and when it was warned, counted from the signal.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) vm: usize,
    pub(super) warned: Duration,
    pub(super) answer: Answer,
}

/// A signal on its way.
#[derive(Debug)]
pub(super) struct Warning {
    /// When it came.
    pub(super) begun: Instant,
    answers: mpsc::Receiver<Answered>,
    thread: JoinHandle<()>,
    expected: usize,
    pub(super) got: Vec<Answered>,
}

/// Who is warned: the VM's number, its name, its priority.
pub(super) type Warned = (usize, String, i32);

impl Warning {
    /// Warns the VMs of `pool`, those with the highest priority first and those of one priority together; others when these have
    /// answered. They are told that the power goes after `holdup`, counted from now.
    pub(super) fn send(pool: PathBuf, mut vms: Vec<Warned>, holdup: Option<Duration>) -> Self {
        let (sender, answers) = mpsc::channel();
        let expected = vms.len();
        vms.sort_by_key(|(_, _, priority)| std::cmp::Reverse(*priority));
        let begun = Instant::now();
        let thread = std::thread::spawn(move || {
            for group in vms.chunk_by(|a, b| a.2 == b.2) {
                std::thread::scope(|scope| {
                    for (vm, name, _) in group {
                        let (sender, pool) = (sender.clone(), &pool);
                        scope.spawn(move || {
                            let warned = begun.elapsed();
                            let holdup_ns = holdup.map(|holdup| nanoseconds(holdup.saturating_sub(warned)));
                            let asked = ControlClient::connect(pool, name)
                                .and_then(|client| client.ask(&Request::PowerFail { holdup_ns }));
                            let answer = match asked {
                                Ok(Response::Frozen(report)) => Answer::Frozen(report),
                                Ok(Response::Refused { why }) => Answer::Refused(why),
                                Ok(other) => Answer::Silent(format!("an unexpected answer: {other:?}")),
                                Err(error) => Answer::Silent(error.to_string()),
                            };
                            let _ = sender.send(Answered { vm: *vm, warned, answer });
                        });
                    }
                });
            }
        });
        Self { begun, answers, thread, expected, got: Vec::new() }
    }

    /// Whether all have answered.
    pub(super) fn is_answered(&mut self) -> bool {
        self.got.extend(self.answers.try_iter());
        self.got.len() >= self.expected
    }

    /// Whether one of those asked is silent.
    pub(super) fn is_broken(&self) -> bool {
        self.got.iter().any(|answered| matches!(answered.answer, Answer::Silent(_)))
    }

    /// All answers; who is asked must have ended, or be about to answer.
    pub(super) fn finish(mut self) -> Vec<Answered> {
        let _ = self.thread.join();
        self.got.extend(self.answers.try_iter());
        self.got
    }
}

/// The power is back.
pub(super) fn power_back(pool: &std::path::Path, name: &str) -> Result<(), String> {
    let asked = ControlClient::connect(pool, name).and_then(|client| client.ask(&Request::PowerBack));
    match asked {
        Ok(Response::Done) => Ok(()),
        Ok(Response::Refused { why }) => Err(why),
        Ok(other) => Err(format!("an unexpected answer: {other:?}")),
        Err(error) => Err(error.to_string()),
    }
}
