//! `perdure snapshot`

use super::output::say;
use super::progress::Progress;
use super::survey::survey;
use super::{Environment, output};
use crate::persistence::capture::CaptureReport;
use crate::supervisor::control::{ControlClient, Request, Response};

/// Take a generation of a running virtual machine, and wait until it is durable.
///
/// The guest stands for about a millisecond and runs on while its moment is stored. The first generation looks at all of
/// memory, each later one at what changed. Retention leaves generations alone that were asked for by this command.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// A label, to find it again
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Never to be deleted until unprotected
    #[arg(long)]
    protect: bool,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    survey(environment, &environment.open_pool()?, &args.name)?;
    let mut progress = Progress::new(format!("{}: copying memory", args.name));
    let request = Request::Snapshot { label: args.label.clone(), protect: args.protect };
    let client = ControlClient::connect(&environment.pool, &args.name)?;
    let response = client.ask_patiently(&request, &mut |done, total| progress.pages(done, total))?;
    drop(progress);
    match response {
        Response::Snapshot(report) if args.json => output::json(&report),
        Response::Snapshot(report) => {
            say!("{}", in_words(&report));
            Ok(())
        }
        Response::Refused { why } => anyhow::bail!("{}: {why}", args.name),
        other => anyhow::bail!("{}: an unexpected answer: {other:?}", args.name),
    }
}

fn in_words(report: &CaptureReport) -> String {
    format!(
        "{}: paused for {} ({} pages), {} stored in {}",
        report.generation,
        output::time(report.pause_ns),
        report.pages,
        output::bytes(report.bytes_stored),
        output::time(report.store_ns),
    )
}
