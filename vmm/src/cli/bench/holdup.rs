//! `perdure bench holdup`

use std::path::Path;
use std::time::Duration;

use allocator::MediumKind;

use super::{BenchPool, Conditions, Shape, output, p50_p99, present, shape_cells};
use crate::bench::holdup::{self, HoldUpResult, Plan};
use crate::machine::config::ByteSize;

#[derive(Debug, clap::Args)]
pub(super) struct HoldUpArgs {
    /// Hold-ups, separated by commas
    #[arg(long, value_name = "TIME", value_delimiter = ',', default_value = "1ms,5ms,16ms,100ms,300ms", value_parser = humantime::parse_duration)]
    holdup: Vec<Duration>,
    /// Media, separated by commas
    #[arg(long, value_name = "MEDIUM", value_delimiter = ',', default_value = "nvdimm,file")]
    medium: Vec<MediumKind>,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: ByteSize,
    /// What of it the guest writes to, a page at a time, any of them
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    working_set: ByteSize,
    /// In which order, separated by commas: uniform (any page, all as often), hotcold (nine of ten writes to a tenth of the pages), zipf, sequential, phases
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', default_value = "uniform,hotcold")]
    pattern: Vec<String>,
    /// vCPUs
    #[arg(long, value_name = "N", default_value = "1")]
    cpus: u32,
    /// For how long the guest's speed is measured
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = humantime::parse_duration)]
    length: Duration,
    /// Power failures with each
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub(super) fn holdup(parent: &Path, args: &HoldUpArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    let media = args.medium.iter().flat_map(|medium| args.pattern.iter().map(move |pattern| (medium, pattern)));
    for (medium, pattern) in media {
        let plan = Plan {
            shape: Shape { cpus: args.cpus, memory: args.memory, ram: None, medium: Some(*medium) },
            working_set: args.working_set,
            pattern: pattern.clone(),
            holdups: args.holdup.clone(),
            length: args.length,
            freezes: args.runs as usize,
        };
        let tell = |holdup: Option<Duration>| {
            let holdup = holdup.map_or_else(|| "no hold-up".to_owned(), |holdup| format!("{holdup:?}"));
            eprintln!("perdure: holdup: {} runs, {medium}, {pattern}, {holdup}", args.runs);
        };
        results.extend(holdup::measure(&pool, &plan, &tell)?);
    }
    let headings = [
        "MEDIUM",
        "CPUS",
        "MEMORY",
        "PATTERN",
        "HOLD-UP",
        "MAY BE DIRTY",
        "WAS P50",
        "MOST",
        "FREEZE P50",
        "P99",
        "MOST",
        "MET",
        "TOUCHES/S",
        "SPEED",
    ];
    present(conditions, results, args.json, &headings, cells)
}

fn cells(result: &HoldUpResult) -> Vec<String> {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), output::bytes);
    let mut row = shape_cells(&result.shape);
    row.push(result.pattern.clone());
    row.push(result.holdup_ns.map_or_else(|| "none".to_owned(), output::time));
    if let Some(why) = &result.refused {
        row.push(format!("refused: {why}"));
        return row;
    }
    row.push(bytes(result.budget.as_ref().map(|budget| budget.limit)));
    row.extend([bytes(result.unflushed_p50), bytes(result.unflushed_max)]);
    row.extend(p50_p99(&result.freeze));
    row.push(output::time(result.freeze.max_ns));
    row.push(result.met.map_or_else(|| "-".to_owned(), |met| format!("{met:.0} %")));
    row.push(format!("{:.0}", result.touches_per_second));
    row.push(result.speed.map_or_else(|| "-".to_owned(), |speed| format!("{:.1} %", 100.0 * speed)));
    row
}
