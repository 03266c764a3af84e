//! `perdure purge`

use super::{Environment, lineage, output};

/// Delete generations of a virtual machine: all that are named, or none if one of them cannot be.
///
/// The space of pages that no other generation needs is given back once enough has gathered; --sweep gives it back now.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The virtual machine
    name: String,
    /// The generations, as in 17 18
    #[arg(required = true)]
    ids: Vec<String>,
    /// Give back the space now
    #[arg(long)]
    sweep: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let lineage = lineage::require(&environment.open_pool()?, &args.name)?;
    let ids = args.ids.iter().map(|text| lineage::id(&args.name, text)).collect::<Result<Vec<_>, _>>()?;
    lineage.store.purge(&ids)?;
    if let Some(report) = lineage.sweep(args.sweep)? {
        tell_sweep(&report);
    }
    Ok(())
}

/// What a sweep did, for people.
pub(super) fn tell_sweep(report: &snapshot::SweepReport) {
    let punched = output::bytes(report.bytes_punched);
    eprintln!("perdure: {punched} given back, {} files removed", report.files_removed);
    for why in &report.blocked_by {
        eprintln!("perdure: space is kept because of {why}: `perdure scrub --repair` heals what has a good copy");
    }
}
