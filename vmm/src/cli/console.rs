//! `perdure console`

use super::Environment;
use super::survey::survey;
use crate::supervisor::control::{ControlClient, Request, Response};
use crate::supervisor::terminal;

/// Join this terminal to a virtual machine's console: its serial line, or hvc0 (`run --console virtio`). Ctrl-] leaves it again; the VM runs on.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    survey(environment, &environment.open_pool()?, &args.name)?;
    let client = ControlClient::connect(&environment.pool, &args.name)?;
    match client.ask(&Request::Console)? {
        Response::Done => Ok(terminal::attach(&client.into_connection())?),
        Response::Refused { why } => anyhow::bail!("{}: {why}", args.name),
        other => anyhow::bail!("{}: an unexpected answer: {other:?}", args.name),
    }
}
