//! `perdure pause`, `perdure unpause`

use super::Environment;
use super::survey::survey;
use crate::supervisor::control::{ControlClient, Request, Response};

/// Stop a virtual machine's CPUs where they are, until `perdure unpause`.
///
/// It still answers: it can be frozen, and generations of it can be taken. After a freeze and a resume it runs.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
}

pub(super) fn pause(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    ask(environment, &args.name, &Request::Pause)
}

pub(super) fn unpause(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    ask(environment, &args.name, &Request::Unpause)
}

fn ask(environment: &Environment, name: &str, request: &Request) -> anyhow::Result<()> {
    survey(environment, &environment.open_pool()?, name)?;
    match ControlClient::connect(&environment.pool, name)?.ask(request)? {
        Response::Done => Ok(()),
        Response::Refused { why } => anyhow::bail!("{name}: {why}"),
        other => anyhow::bail!("{name}: an unexpected answer: {other:?}"),
    }
}
