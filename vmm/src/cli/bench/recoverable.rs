//! `perdure bench rvm`

use std::path::Path;

use allocator::MediumKind;

use super::{BenchPool, Conditions, output, p50_p99, present};
use crate::bench::rvm::{self, RvmResult};

#[derive(Debug, clap::Args)]
pub(super) struct RvmArgs {
    /// Media with an undo log, separated by commas
    #[arg(long, value_name = "MEDIUM", value_delimiter = ',', default_value = "nvdimm")]
    medium: Vec<MediumKind>,
    /// Threads that commit at a time, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,64")]
    threads: Vec<u32>,
    /// Samples of each; without a flush, each is a thousand transactions
    #[arg(long, value_name = "N", default_value = "300", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub(super) fn rvm(parent: &Path, args: &RvmArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for medium in [MediumKind::File].iter().chain(&args.medium) {
        eprintln!("perdure: rvm: {} runs, {medium}", args.runs);
        results.push(rvm::unflushed(&pool, *medium, args.runs)?);
    }
    results.push(rvm::writes(&pool, args.runs)?);
    for threads in &args.threads {
        eprintln!("perdure: rvm: {} runs, {threads} threads", args.runs);
        results.push(rvm::flushed(&pool, (*threads).clamp(1, 1024), args.runs)?);
    }
    // Once more, for what the disk did meanwhile.
    results.push(rvm::writes(&pool, args.runs)?);
    let cells = |result: &RvmResult| {
        let mut row = vec![result.what.to_owned(), result.medium.to_string(), result.threads.to_string()];
        row.extend(p50_p99(&result.each));
        row.extend([output::time(result.each.min_ns), format!("{:.0}", result.per_second)]);
        row
    };
    let headings = ["WHAT", "MEDIUM", "THREADS", "EACH P50", "P99", "LEAST", "A SECOND"];
    present(conditions, results, args.json, &headings, cells)
}
