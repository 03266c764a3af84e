//! `perdure pool`

use std::process::ExitCode;

use serde::Serialize;

use allocator::budget::Budget;

use super::output::say;
use super::{Environment, output};
use crate::machine::config::ByteSize;

/// Look at the pool itself.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List regions in the order in which they were allocated
    List(Format),
    /// Show how much each medium holds, and how much is left
    Df(Format),
    /// Show or set what running VMs may have in memory together
    Limit(Limit),
    /// Look for damage, and report it; nothing is altered. Exit status 1 if there is any
    Check(Format),
}

#[derive(Debug, clap::Args)]
struct Format {
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Limit {
    /// Set it, as in 8G; VMs that run follow within seconds
    #[arg(long, value_name = "SIZE", conflicts_with = "none")]
    ram: Option<ByteSize>,
    /// Lift it
    #[arg(long)]
    none: bool,
    #[command(flatten)]
    format: Format,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    match &args.what {
        What::List(format) => list(environment, format).map(|()| ExitCode::SUCCESS),
        What::Df(format) => df(environment, format).map(|()| ExitCode::SUCCESS),
        What::Limit(limits) => limit(environment, limits).map(|()| ExitCode::SUCCESS),
        What::Check(format) => check(environment, format),
    }
}

#[derive(Debug, Serialize)]
struct RegionRow {
    name: String,
    kind: String,
    medium: String,
    size: u64,
    file: std::path::PathBuf,
    holder: Option<u32>,
}

fn list(environment: &Environment, format: &Format) -> anyhow::Result<()> {
    let pool = environment.open_pool()?;
    let mut regions = Vec::new();
    for region in pool.list() {
        regions.push(RegionRow {
            name: region.name.to_string(),
            kind: region.kind.to_string(),
            medium: region.medium.to_string(),
            size: region.size,
            file: pool.path_of(&region),
            holder: pool.holder(&region.name).ok().flatten().and_then(|holder| holder.pid),
        });
    }
    if format.json {
        return output::json(&regions);
    }
    let cells = |row: RegionRow| {
        let holder = row.holder.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        vec![row.name, row.kind, row.medium, output::bytes(row.size), holder, row.file.display().to_string()]
    };
    let rows: Vec<_> = regions.into_iter().map(cells).collect();
    output::table(&["NAME", "KIND", "MEDIUM", "SIZE", "HELD BY", "FILE"], &rows);
    Ok(())
}

#[derive(Debug, Serialize)]
struct UsageRow {
    medium: String,
    directory: std::path::PathBuf,
    capacity: Option<u64>,
    allocated: u64,
    free: Option<u64>,
}

fn df(environment: &Environment, format: &Format) -> anyhow::Result<()> {
    let usage: Vec<_> = environment
        .open_pool()?
        .usage()?
        .into_iter()
        .map(|usage| UsageRow {
            medium: usage.medium.to_string(),
            directory: usage.directory,
            capacity: usage.capacity,
            allocated: usage.allocated,
            free: usage.free,
        })
        .collect();
    if format.json {
        return output::json(&usage);
    }
    let cells = |row: UsageRow| {
        let capacity = row.capacity.map_or_else(|| "-".to_owned(), output::bytes);
        let directory = row.directory.display().to_string();
        vec![
            row.medium,
            output::bytes(row.allocated),
            row.free.map_or_else(|| "-".to_owned(), output::bytes),
            capacity,
            directory,
        ]
    };
    let rows: Vec<_> = usage.into_iter().map(cells).collect();
    output::table(&["MEDIUM", "ALLOCATED", "FREE", "LIMIT", "DIRECTORY"], &rows);
    Ok(())
}

#[derive(Debug, Serialize)]
struct LimitDocument {
    /// In bytes.
    ram: Option<u64>,
    /// The floors of the VMs that run, in bytes.
    promised: u64,
    /// What they may have now, in bytes.
    granted: u64,
}

fn limit(environment: &Environment, args: &Limit) -> anyhow::Result<()> {
    let setting = args.none || args.ram.is_some();
    let pool = if setting { environment.open_or_create_pool()? } else { environment.open_pool()? };
    let budget = Budget::of(&pool)?;
    if setting {
        budget.set_limit(args.ram.map(|size| size.0))?;
        pool.refresh()?;
    }
    let rows = budget.rows()?;
    let document = LimitDocument {
        ram: pool.settings().ram_limit,
        promised: rows.iter().map(|row| row.demand.floor).sum(),
        granted: rows.iter().map(|row| row.granted).sum(),
    };
    if args.format.json {
        return output::json(&document);
    }
    let limit = document.ram.map_or_else(|| "none".to_owned(), output::bytes);
    let (promised, granted) = (output::bytes(document.promised), output::bytes(document.granted));
    say!("limit {limit}; {} VMs share it: {promised} promised, {granted} granted", rows.len());
    Ok(())
}

fn check(environment: &Environment, format: &Format) -> anyhow::Result<ExitCode> {
    let report = environment.open_pool()?.check()?;
    let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    if format.json {
        output::json(&serde_json::json!({ "regions": report.regions, "problems": problems }))?;
    } else {
        problems.iter().for_each(|problem| say!("{problem}"));
        say!("{} regions, {} problems", report.regions, problems.len());
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
