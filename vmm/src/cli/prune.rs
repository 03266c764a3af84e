//! `perdure prune`

use std::time::Duration;

use serde::Serialize;
use snapshot::{GenerationId, Reason};

use super::output::say;
use super::{Environment, lineage, output};
use crate::persistence::generations::retention;
use crate::persistence::rollback::now_ms;

/// Delete the generations of a virtual machine that its policy does not keep.
///
/// The policy is the one that the VM was started with, except for what is given here. Generations that a person asked for or
/// labelled, and protected ones, stay; and so does the newest.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// Say what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
    /// How many to keep at most
    #[arg(long, value_name = "N")]
    max_snapshots: Option<u32>,
    /// How many to keep at least, however old
    #[arg(long, value_name = "N")]
    min_snapshots: Option<u32>,
    /// Delete what is older, as in 12h or 30days
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    expiration: Option<Duration>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Pruned {
    /// Whether they were deleted, or would be.
    deleted: bool,
    generations: Vec<Doomed>,
    kept: usize,
}

#[derive(Debug, Serialize)]
struct Doomed {
    id: String,
    /// "too-many" or "expired".
    why: &'static str,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let lineage = lineage::require(&environment.open_pool()?, &args.name)?;
    let mut policy = retention(&lineage.config);
    policy.max_snapshots = args.max_snapshots.or(policy.max_snapshots);
    policy.min_snapshots = args.min_snapshots.unwrap_or(policy.min_snapshots);
    let expiration = args.expiration.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    policy.expiration_ms = expiration.or(policy.expiration_ms);
    let doomed: Vec<(GenerationId, Reason)> = if args.dry_run {
        let verdicts = lineage.store.judge(&lineage.name, &policy, now_ms()).into_iter();
        let doomed = verdicts.filter(|verdict| !verdict.keep);
        doomed.map(|verdict| (GenerationId::new(&lineage.name, verdict.number), verdict.reason)).collect()
    } else {
        lineage.store.retain(&lineage.name, &policy, now_ms())?
    };
    let swept = if args.dry_run { None } else { lineage.sweep(false)? };
    let why = |reason| if reason == Reason::TooMany { "too-many" } else { "expired" };
    let generations: Vec<Doomed> =
        doomed.into_iter().map(|(id, reason)| Doomed { id: id.to_string(), why: why(reason) }).collect();
    let kept = lineage.all().len() - if args.dry_run { generations.len() } else { 0 };
    if args.json {
        return output::json(&Pruned { deleted: !args.dry_run, generations, kept });
    }
    let verb = if args.dry_run { "would be deleted" } else { "deleted" };
    for doomed in &generations {
        say!("{} {verb}: {}", doomed.id, doomed.why.replace('-', " "));
    }
    say!("{} {verb}, {kept} stay", generations.len());
    if let Some(report) = swept {
        super::purge::tell_sweep(&report);
    }
    Ok(())
}
