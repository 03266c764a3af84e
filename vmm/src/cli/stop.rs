//! `perdure stop`

use super::Environment;
use super::power::wait_for_end;
use super::survey::survey;
use crate::supervisor::control::{ControlClient, Request, Response};

/// Turn a virtual machine off, as if its power button were held: its guest is not asked.
///
/// `perdure run NAME` starts it anew. To keep what it has in memory, use `perdure powerfail NAME`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    survey(environment, &environment.open_pool()?, &args.name)?;
    match ControlClient::connect(&environment.pool, &args.name)?.ask(&Request::Stop)? {
        Response::Done => wait_for_end(environment, &args.name),
        Response::Refused { why } => anyhow::bail!("{}: {why}", args.name),
        other => anyhow::bail!("{}: an unexpected answer: {other:?}", args.name),
    }
}
