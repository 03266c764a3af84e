//! `perdure balloon`

use super::Environment;
use super::survey::survey;
use crate::machine::config::ByteSize;
use crate::supervisor::control::{ControlClient, Request, Response};

/// Take memory from a running guest, or give it back.
///
/// Its memory balloon (`run --balloon`) is made so large: the guest's driver gives away as much of its memory as it can spare, and what is given away
/// takes no RAM. 0 gives all of it back. A guest that runs out of memory takes some back by itself. `perdure inspect` and `perdure list --json`
/// tell how large the balloon is; it stays so over an outage.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM
    name: String,
    /// How large the balloon is to be, as in 512M; 0: none
    size: ByteSize,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    survey(environment, &environment.open_pool()?, &args.name)?;
    let request = Request::Balloon { bytes: args.size.0 };
    match ControlClient::connect(&environment.pool, &args.name)?.ask(&request)? {
        Response::Done => Ok(()),
        Response::Refused { why } => anyhow::bail!("{}: {why}", args.name),
        other => anyhow::bail!("{}: an unexpected answer: {other:?}", args.name),
    }
}
