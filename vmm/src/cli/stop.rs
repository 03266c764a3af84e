//! `perdure stop`

use std::time::{Duration, Instant};

use super::Environment;
use super::output::say;
use super::power::wait_for_end;
use super::survey::survey;
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::control::{ControlClient, Request, Response};

/// Turn a virtual machine off: its power button is pressed, and if its guest has not turned itself off in time, held.
///
/// A guest hears of the button through ACPI; Linux needs the driver `button` and someone who acts on it (systemd does). One that does
/// not listen at all is turned off at once. `perdure run NAME` starts it anew. To keep what it has in memory, use `perdure powerfail NAME`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// How long its guest has to turn itself off
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Turn it off at once, without asking its guest
    #[arg(long, conflicts_with = "timeout")]
    now: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    survey(environment, &environment.open_pool()?, &args.name)?;
    let ask = |request| ControlClient::connect(&environment.pool, &args.name)?.ask(&request);
    if !args.now && matches!(ask(Request::PressPowerButton)?, Response::Done) {
        if ends_within(environment, &args.name, args.timeout)? {
            return Ok(());
        }
        say!("{}: its guest has not turned itself off in {:?}; it is turned off", args.name, args.timeout);
    }
    match ask(Request::Stop)? {
        Response::Done => wait_for_end(environment, &args.name),
        Response::Refused { why } => anyhow::bail!("{}: {why}", args.name),
        other => anyhow::bail!("{}: an unexpected answer: {other:?}", args.name),
    }
}

/// Whether no process has the VM any more before `timeout` is over.
fn ends_within(environment: &Environment, name: &str, timeout: Duration) -> anyhow::Result<bool> {
    let begun = Instant::now();
    loop {
        match VmRegions::open(&environment.open_pool()?, name) {
            Err(RegionsError::InUse { .. }) if begun.elapsed() < timeout => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(RegionsError::InUse { .. }) => return Ok(false),
            _ => return Ok(true),
        }
    }
}
