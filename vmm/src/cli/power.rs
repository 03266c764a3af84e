//! `perdure powerfail`, `perdure powerback`

use std::panic::resume_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::output::say;
use super::survey::{VmState, names, survey};
use super::{Environment, output};
use crate::machine::time::nanoseconds;
use crate::persistence::freeze::FreezeReport;
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::control::{ControlClient, ControlError, Request, Response};

/// How long a frozen VM's process may take to be gone.
const END_DEADLINE: Duration = Duration::from_secs(30);
/// How long a process that has a VM may take to answer: one that is just starting it does not yet.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Raise the power-fail signal: what is volatile is frozen, everything is made durable, the process ends.
///
/// All VMs are signalled at once; one that is just being started or resumed, as soon as it runs. With --holdup darkness is simulated: when that time has passed since the signal, the VM's
/// process is killed, whether it was done or not. While it lasts, `perdure powerback` lets the VM run on.
#[derive(Debug, clap::Args)]
pub(super) struct FailArgs {
    #[command(flatten)]
    which: Which,
    /// Time from the signal to darkness, as in 16ms (ATX power supplies give 11 to 17 ms)
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    holdup: Option<Duration>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

/// Let virtual machines run on whose hold-up has not passed: the power came back.
#[derive(Debug, clap::Args)]
pub(super) struct BackArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
struct Which {
    /// Its name
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<String>,
    /// All that run
    #[arg(long)]
    all: bool,
}

impl Which {
    /// Those meant: the one that is named, or all of a state that is `wanted`.
    fn names(&self, environment: &Environment, wanted: &[VmState]) -> anyhow::Result<Vec<String>> {
        let pool = environment.open_pool()?;
        if let Some(name) = &self.name {
            // Says that there is no such VM, before it says that nobody answers.
            survey(environment, &pool, name)?;
            return Ok(vec![name.clone()]);
        }
        let mut running = Vec::new();
        for name in names(&pool) {
            if wanted.contains(&survey(environment, &pool, &name)?.state) {
                running.push(name);
            }
        }
        Ok(running)
    }

    /// Whether this VM may have been taken for one that runs while somebody only looked at it.
    fn may_rest(&self, error: &ControlError) -> bool {
        self.all && matches!(error, ControlError::Nobody { .. })
    }
}

/// What became of one VM.
#[derive(Debug, Serialize)]
struct Outcome {
    name: String,
    frozen: bool,
    /// Whether the freeze was done before darkness; `null` without --holdup.
    in_time: Option<bool>,
    report: Option<FreezeReport>,
    why: Option<String>,
}

pub(super) fn fail(environment: &Environment, args: &FailArgs) -> anyhow::Result<ExitCode> {
    const AWAKE: [VmState; 4] = [VmState::Running, VmState::Paused, VmState::Freezing, VmState::Resuming];
    let names = args.which.names(environment, &AWAKE)?;
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let asked: Vec<_> = names.iter().map(|name| scope.spawn(move || fail_one(environment, name, args))).collect();
        asked.into_iter().filter_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    if args.json {
        output::json(&outcomes)?;
    } else {
        outcomes.iter().for_each(print);
    }
    let all_frozen = outcomes.iter().all(|outcome| outcome.frozen);
    Ok(if all_frozen { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `None`: it was not running after all, and nobody named it.
fn fail_one(environment: &Environment, name: &str, args: &FailArgs) -> Option<Outcome> {
    let holdup_ns = args.holdup.map(nanoseconds);
    let mut outcome = Outcome { name: name.to_owned(), frozen: false, in_time: None, report: None, why: None };
    let asked = connect(environment, name).and_then(|client| client.ask(&Request::PowerFail { holdup_ns }));
    match asked {
        Err(error) if args.which.may_rest(&error) => return None,
        Ok(Response::Frozen(report)) => {
            outcome.frozen = true;
            outcome.in_time = holdup_ns.map(|_| true);
            outcome.report = Some(*report);
            if let Err(error) = wait_for_end(environment, name) {
                outcome.why = Some(super::one_line(&error));
            }
        }
        Ok(Response::Refused { why }) => outcome.why = Some(why),
        Ok(_) => outcome.why = Some("an unexpected answer".to_owned()),
        Err(ControlError::Broken { .. }) if holdup_ns.is_some() => {
            outcome.in_time = Some(false);
            // Its connection breaks before the system has taken all of it apart: what is said next is to be true.
            let gone = wait_for_end(environment, name).err().map(|error| format!("; {}", super::one_line(&error)));
            let dark = "the hold-up passed before the freeze was done: it went dark";
            outcome.why = Some(format!("{dark}{}", gone.unwrap_or_default()));
        }
        Err(error) => outcome.why = Some(super::one_line(&error.into())),
    }
    Some(outcome)
}

/// Connects to the process that has a VM, as soon as it answers. It has the VM before that: from the moment on that a resume cleared
/// the stamp a cut loses it, so a power-fail signal must not pass it by. Who only looks at a VM has it for moments.
fn connect(environment: &Environment, name: &str) -> Result<ControlClient, ControlError> {
    let begun = Instant::now();
    loop {
        let nobody = match ControlClient::connect(&environment.pool, name) {
            Err(error @ ControlError::Nobody { .. }) => error,
            other => return other,
        };
        let in_use = |pool| matches!(VmRegions::open(&pool, name), Err(RegionsError::InUse { .. }));
        let had = || environment.open_pool().is_ok_and(in_use);
        if begun.elapsed() > START_DEADLINE || !had() {
            return Err(nobody);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until no process has the VM any more (or it runs on, because the power came back).
pub(super) fn wait_for_end(environment: &Environment, name: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let pool = environment.open_pool()?;
        match VmRegions::open(&pool, name) {
            Err(RegionsError::InUse { .. }) if start.elapsed() < END_DEADLINE => {
                let running = ControlClient::connect(&environment.pool, name)
                    .and_then(|client| client.ask(&Request::Status))
                    .is_ok_and(|answer| {
                        use crate::persistence::lifecycle::State;
                        matches!(answer, Response::Status(status) if status.state == State::Running)
                    });
                if running {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error @ RegionsError::InUse { .. }) => {
                return Err(error).with_context(|| format!("it was not gone after {END_DEADLINE:?}"));
            }
            _ => return Ok(()),
        }
    }
}

fn print(outcome: &Outcome) {
    let name = &outcome.name;
    match (&outcome.report, &outcome.why) {
        (Some(report), _) => {
            let left = report.holdup_left_ns.map(|left| format!(", {} of the hold-up left", output::time(left)));
            say!(
                "{name}: frozen in {} (of which flushing {}), context {}{}{}",
                output::time(report.total_ns),
                output::time(report.flush_ns),
                report.sequence,
                report.bytes.map(|bytes| format!(", {} of memory saved", output::bytes(bytes))).unwrap_or_default(),
                left.unwrap_or_default(),
            );
        }
        (None, why) => eprintln!("perdure: {name}: {}", why.as_deref().unwrap_or("not frozen")),
    }
}

pub(super) fn back(environment: &Environment, args: &BackArgs) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in args.which.names(environment, &[VmState::Running, VmState::Paused, VmState::Freezing])? {
        match ControlClient::connect(&environment.pool, &name)?.ask(&Request::PowerBack)? {
            Response::Done => say!("{name}: runs on"),
            Response::Refused { why } => {
                eprintln!("perdure: {name}: {why}");
                code = ExitCode::FAILURE;
            }
            other => anyhow::bail!("{name}: an unexpected answer: {other:?}"),
        }
    }
    Ok(code)
}
