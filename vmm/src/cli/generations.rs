//! `perdure generations`

use serde::Serialize;

use super::lineage::{self, View};
use super::output::say;
use super::{Environment, output};

/// List the generations of a virtual machine, the oldest first.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Listing {
    name: String,
    family: String,
    generations: Vec<View>,
    /// The whole family's, over all of its VMs.
    store: StoreView,
}

#[derive(Debug, Serialize)]
struct StoreView {
    generations: u64,
    page_bytes: u64,
    archive_bytes: u64,
    unswept_bytes: u64,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let lineage = lineage::require(&environment.open_pool()?, &args.name)?;
    let usage = lineage.store.usage();
    let generations: Vec<View> = lineage.all().iter().map(View::from).collect();
    if args.json {
        let store = StoreView {
            generations: usage.generations,
            page_bytes: usage.page_bytes,
            archive_bytes: usage.archive_bytes,
            unswept_bytes: usage.unswept_bytes,
        };
        return output::json(&Listing { name: lineage.name, family: lineage.family, generations, store });
    }
    let count = generations.len();
    let rows: Vec<_> = generations
        .into_iter()
        .map(|view| {
            let flags = if view.protected { "protected" } else { view.origin };
            vec![
                view.id,
                lineage::age(view.age_ms),
                output::bytes(view.logical_bytes),
                output::bytes(view.stored_bytes),
                flags.to_owned(),
                view.parent.unwrap_or_else(|| "-".to_owned()),
                view.label.unwrap_or_default(),
            ]
        })
        .collect();
    output::table(&["GENERATION", "AGE", "SIZE", "ADDED", "KEPT", "BUILT ON", "LABEL"], &rows);
    let stored = output::bytes(usage.page_bytes.saturating_add(usage.archive_bytes));
    say!("{count} generations; the store of {} has {} in {stored}", lineage.family, usage.generations);
    Ok(())
}
