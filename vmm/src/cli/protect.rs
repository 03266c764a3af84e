//! `perdure protect`

use super::{Environment, lineage};

/// Protect a generation from being deleted, or no longer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The virtual machine
    name: String,
    /// The generation, as in 17
    id: String,
    /// No longer
    #[arg(long)]
    off: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let lineage = lineage::require(&environment.open_pool()?, &args.name)?;
    Ok(lineage.store.protect(&lineage::id(&args.name, &args.id)?, !args.off)?)
}
