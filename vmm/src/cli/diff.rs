//! `perdure diff`

use serde::Serialize;
use snapshot::RegionDiff;

use super::output::say;
use super::{Environment, lineage, output};

/// Show how two generations of a virtual machine differ: regions, and pages of 4 KiB.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// The one, as in 17
    old: String,
    /// The other
    new: String,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Difference {
    old: String,
    new: String,
    regions: Vec<RegionView>,
}

#[derive(Debug, Serialize)]
struct RegionView {
    region: String,
    /// In bytes; none if the generation has no such region.
    old_size: Option<u64>,
    new_size: Option<u64>,
    pages: u64,
    /// First page and how many, in order.
    changed: Vec<(u64, u64)>,
}

impl From<RegionDiff> for RegionView {
    fn from(diff: RegionDiff) -> Self {
        let pages = diff.pages();
        let changed = diff.changed.into_iter().map(|range| (range.first, range.count)).collect();
        Self { region: diff.region, old_size: diff.old_size, new_size: diff.new_size, pages, changed }
    }
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let lineage = lineage::require(&environment.open_pool()?, &args.name)?;
    let (old, new) = (lineage::id(&args.name, &args.old)?, lineage::id(&args.name, &args.new)?);
    let regions: Vec<RegionView> = lineage.store.diff(&old, &new)?.into_iter().map(RegionView::from).collect();
    if args.json {
        return output::json(&Difference { old: old.to_string(), new: new.to_string(), regions });
    }
    for region in regions {
        let size = |size: Option<u64>| size.map_or_else(|| "not there".to_owned(), output::bytes);
        let sizes = match region.old_size == region.new_size {
            true => size(region.old_size),
            false => format!("{} → {}", size(region.old_size), size(region.new_size)),
        };
        let bytes = output::bytes(region.pages.saturating_mul(snapshot::PAGE_SIZE as u64));
        say!("{}: {sizes}, {} pages differ ({bytes})", region.region, region.pages);
        for (first, count) in region.changed {
            match count {
                1 => say!("  {first}"),
                _ => say!("  {first}-{}", first + count - 1),
            }
        }
    }
    Ok(())
}
