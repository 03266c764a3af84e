//! `perdure doctor`: what this host's KVM can do, found out by trying it.
//!
//! ```text
//!   device      /dev/kvm, its capabilities        media    the pool's file systems, the cost of a flush
//!   probe       a guest that tries instructions   system   kernel, processor, limits
//!   continuity  freeze a guest, let it go on      embedded the guests in the binary
//!                        └────────► report (what follows) ◄────────┘
//!                                     │ text, or JSON
//! ```

mod continuity;
mod device;
mod embedded;
mod media;
mod probe;
mod report;
mod system;
mod text;
mod throwaway;

use std::process::ExitCode;

use super::{Environment, one_line, output};
use report::Report;

/// Find out what this host's KVM can do.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 perdure can run here, 1 it cannot (the last lines say why, and what to do).")]
pub(super) struct Args {
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    let report = examine(environment);
    if args.json {
        output::json(&report)?;
    } else {
        super::output::say!("{}", text::render(&report).trim_end());
    }
    Ok(if report.runs { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn examine(environment: &Environment) -> Report {
    let kvm = device::look();
    let usable = kvm.error.is_none();
    let (continuity, continuity_error) = match usable.then(continuity::run) {
        Some(Ok(found)) => (Some(found), None),
        Some(Err(error)) => (None, Some(one_line(&error))),
        None => (None, None),
    };
    let tsc_khz = continuity.as_ref().and_then(|found| found.tsc_khz);
    let report = Report {
        runs: false,
        problems: Vec::new(),
        warnings: Vec::new(),
        system: system::look(),
        probe: usable.then(|| probe::run(tsc_khz)),
        kvm,
        continuity,
        continuity_error,
        media: media::look(environment),
        embedded_guests: embedded::list(),
    };
    report.judge()
}
