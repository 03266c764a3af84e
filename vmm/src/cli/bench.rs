//! `perdure bench`

mod holdup;
mod memory;
mod recoverable;

use std::path::Path;

use allocator::MediumKind;
use clap::ValueEnum as _;
use serde::Serialize;

use super::output::say;
use super::{Environment, output};
use crate::bench::alternatives::{Alternative, Way};
use crate::bench::{
    BenchPool, Conditions, Distribution, Shape, freeze, lazy, paging, restore, resume, snapshot, store,
};
use crate::machine::config::ByteSize;

/// Measure. Each bench makes a pool of its own below the pool, and removes it in the end.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// From the power-fail signal until everything is durable
    Freeze(FreezeArgs),
    /// What a hold-up costs a guest that writes as fast as it can, and whether its freezes fit (`perdure run --holdup`)
    #[command(name = "holdup")]
    HoldUp(holdup::HoldUpArgs),
    /// From the start of the process to the guest's first output; cold starts; the VMM's own memory
    Resume(ResumeArgs),
    /// Going back to a generation before its memory is restored, and after: first output, and all of the memory
    Lazy(ResumeArgs),
    /// How long a guest stands for a generation, and how long until that is durable
    Snapshot(SnapshotArgs),
    /// A generation into memory, against a raw sequential read; at depth 1 and far from it
    Restore(StoreArgs),
    /// Generations onto the disk, against a raw sequential write and other ways to keep them; open, purge, sweep, scrub
    Store(StoreArgs),
    /// A working set of four times the RAM: pages a second, against the kernel's swap over the same list of accesses
    Paging(memory::PagingArgs),
    /// Recoverable memory: a transaction of 64 bytes, with each engine, with and without a flush, by one thread and by many
    Rvm(recoverable::RvmArgs),
    /// What of memory is in RAM, and page faults a second, before an outage and after it, in each way back
    Residence(memory::ResidenceArgs),
    /// The process that walks for `bench paging`
    #[command(hide = true)]
    Worker,
    /// The process that cleans up behind it
    #[command(hide = true)]
    Guard,
}

#[derive(Debug, clap::Args)]
struct StoreArgs {
    /// Memory sizes, separated by commas
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "256M")]
    memory: Vec<ByteSize>,
    /// How many generations
    #[arg(long, value_name = "N", default_value = "1000", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    generations: u32,
    /// Samples of each
    #[arg(long, value_name = "N", default_value = "9", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Memory sizes, separated by commas
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "256M,8G")]
    memory: Vec<ByteSize>,
    /// vCPUs, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<u32>,
    /// Media, separated by commas
    #[arg(long, value_name = "MEDIUM", value_delimiter = ',', default_value = "nvdimm")]
    medium: Vec<MediumKind>,
    /// Samples of each
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct FreezeArgs {
    #[command(flatten)]
    common: Common,
    /// Memory that the guest writes between two freezes; sizes separated by commas
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "0")]
    dirty: Vec<ByteSize>,
    /// How that lies in memory, separated by commas: dense (page beside page), scattered (none beside another)
    #[arg(long, value_name = "LAYOUT", value_delimiter = ',', default_value = "dense")]
    layout: Vec<freeze::Layout>,
}

#[derive(Debug, clap::Args)]
struct ResumeArgs {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, clap::Args)]
struct SnapshotArgs {
    /// Memory sizes, separated by commas
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "256M,1G,4G")]
    memory: Vec<ByteSize>,
    /// RAM of each, where it is to be less: the rest is in a swap region
    #[arg(long, value_name = "SIZE")]
    ram: Option<ByteSize>,
    /// vCPUs, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1")]
    cpus: Vec<u32>,
    /// Media, separated by commas
    #[arg(long, value_name = "MEDIUM", value_delimiter = ',', default_value = "nvdimm")]
    medium: Vec<MediumKind>,
    /// Memory that the guest writes between two generations; sizes separated by commas
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "64K,4M,32M")]
    dirty: Vec<ByteSize>,
    /// Measure what ten generations a second cost the guest instead, for so long
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    slowdown: Option<std::time::Duration>,
    /// Samples of each
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Results<T> {
    conditions: Conditions,
    results: Vec<T>,
}

impl Common {
    fn shapes(&self) -> Vec<Shape> {
        let mut shapes = Vec::new();
        for medium in &self.medium {
            for memory in &self.memory {
                shapes.extend(self.cpus.iter().map(|cpus| Shape {
                    cpus: *cpus,
                    memory: *memory,
                    ram: None,
                    medium: Some(*medium),
                }));
            }
        }
        shapes
    }
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    match &args.what {
        What::Freeze(args) => freeze(&environment.pool, args),
        What::HoldUp(args) => holdup::holdup(&environment.pool, args),
        What::Resume(args) => resume(&environment.pool, args),
        What::Lazy(args) => lazy(&environment.pool, args),
        What::Snapshot(args) => snapshot(&environment.pool, args),
        What::Restore(args) => restore(&environment.pool, args),
        What::Store(args) => store(&environment.pool, args),
        What::Paging(args) => memory::paging(&environment.pool, args),
        What::Rvm(args) => recoverable::rvm(&environment.pool, args),
        What::Residence(args) => memory::residence(&environment.pool, args),
        What::Worker => Ok(paging::worker::run()?),
        What::Guard => Ok(paging::guard::run()?),
    }
}

fn progress(common: &Common, what: &str, shape: &Shape) {
    let medium = shape.medium.map(|medium| medium.to_string()).unwrap_or_default();
    eprintln!("perdure: {what}: {} runs, {medium}, {} CPUs, {}", common.runs, shape.cpus, shape.memory);
}

fn freeze(parent: &Path, args: &FreezeArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for shape in args.common.shapes() {
        for dirty in &args.dirty {
            // Nothing lies nowhere.
            let layouts = args.layout.iter().take(if dirty.0 == 0 { 1 } else { usize::MAX });
            for layout in layouts {
                progress(&args.common, "freeze", &shape);
                results.push(freeze::measure(&pool, shape, *dirty, *layout, args.common.runs as usize)?);
            }
        }
    }
    let cells = |result: &freeze::FreezeResult| {
        let mut row = shape_cells(&result.shape);
        row.push(result.dirty.to_string());
        row.push(result.layout.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default());
        row.extend(p50_p99(&result.own));
        row.extend(p50_p99(&result.flush));
        row.extend(p50_p99(&result.total));
        row
    };
    let headings =
        ["MEDIUM", "CPUS", "MEMORY", "DIRTY", "LAYOUT", "OWN P50", "P99", "FLUSH P50", "P99", "TOTAL P50", "P99"];
    present(conditions, results, args.common.json, &headings, cells)
}

fn snapshot(parent: &Path, args: &SnapshotArgs) -> anyhow::Result<()> {
    let SnapshotArgs { memory, ram, cpus, medium, dirty, slowdown, runs, json } = args.clone();
    let common = Common { memory, cpus, medium, runs, json };
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    if let Some(length) = slowdown {
        return slowdowns(&pool, conditions, &common, ram, &dirty, length);
    }
    let mut results = Vec::new();
    for shape in with_ram(common.shapes(), ram) {
        for dirty in &dirty {
            progress(&common, "snapshot", &shape);
            results.push(snapshot::measure(&pool, shape, *dirty, runs as usize)?);
        }
    }
    let cells = |result: &snapshot::SnapshotResult| {
        let mut row = shape_cells(&result.shape);
        row.extend([result.dirty.to_string(), output::time(result.first.pause_ns)]);
        row.push(result.pages.to_string());
        row.extend(p50_p99(&result.pause));
        row.extend(p50_p99(&result.store));
        row.push(output::bytes(result.bytes_stored));
        row
    };
    let headings =
        ["MEDIUM", "CPUS", "MEMORY", "DIRTY", "FIRST", "PAGES", "PAUSE P50", "P99", "STORE P50", "P99", "STORED"];
    present(conditions, results, json, &headings, cells)
}

/// The same, with less RAM than memory.
fn with_ram(shapes: Vec<Shape>, ram: Option<ByteSize>) -> impl Iterator<Item = Shape> {
    shapes.into_iter().map(move |shape| Shape { ram, ..shape })
}

fn slowdowns(
    pool: &BenchPool,
    conditions: Conditions,
    common: &Common,
    ram: Option<ByteSize>,
    dirty: &[ByteSize],
    length: std::time::Duration,
) -> anyhow::Result<()> {
    const EVERY: std::time::Duration = std::time::Duration::from_millis(100);
    let mut results = Vec::new();
    for shape in with_ram(common.shapes(), ram) {
        for dirty in dirty {
            progress(common, "slowdown", &shape);
            results.push(snapshot::slowdown(pool, shape, *dirty, EVERY, length)?);
        }
    }
    let cells = |result: &snapshot::Slowdown| {
        let mut row = shape_cells(&result.shape);
        row.extend([result.dirty.to_string(), result.generations.to_string()]);
        row.extend([result.without.to_string(), result.with.to_string(), format!("{:.1} %", result.per_cent)]);
        row
    };
    let headings = ["MEDIUM", "CPUS", "MEMORY", "DIRTY", "GENERATIONS", "PAGES/S WITHOUT", "WITH", "SLOWDOWN"];
    present(conditions, results, common.json, &headings, cells)
}

fn resume(parent: &Path, args: &ResumeArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for shape in args.common.shapes() {
        progress(&args.common, "resume", &shape);
        results.push(resume::measure(&pool, shape, args.common.runs as usize)?);
    }
    let cells = |result: &resume::ResumeResult| {
        let mut row = shape_cells(&result.shape);
        row.extend(p50_p99(&result.resume));
        row.extend(p50_p99(&result.resume_without_jail));
        row.extend(p50_p99(&result.cold_start));
        row.extend(p50_p99(&result.first_start));
        row.push(output::bytes(result.vmm_pss_bytes));
        row
    };
    let headings = [
        "MEDIUM",
        "CPUS",
        "MEMORY",
        "RESUME P50",
        "P99",
        "NO JAIL P50",
        "P99",
        "COLD P50",
        "P99",
        "NEW VM P50",
        "P99",
        "VMM PSS",
    ];
    present(conditions, results, args.common.json, &headings, cells)
}

fn lazy(parent: &Path, args: &ResumeArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for shape in args.common.shapes() {
        progress(&args.common, "lazy", &shape);
        results.extend(lazy::measure(&pool, shape, args.common.runs as usize)?);
    }
    let cells = |result: &lazy::LazyResult| {
        let mut row = shape_cells(&result.shape);
        row.push(match result.way {
            lazy::Way::Eager => "before it runs".to_owned(),
            lazy::Way::Lazy => "while it runs".to_owned(),
            lazy::Way::LazyKnown => "while it runs, known".to_owned(),
            lazy::Way::OnDemand => "on demand alone".to_owned(),
        });
        row.extend(p50_p99(&result.output));
        let never = || ["-".to_owned(), "-".to_owned()];
        row.extend(if result.whole.samples > 0 { p50_p99(&result.whole) } else { never() });
        row.push(result.faults.to_string());
        row
    };
    let headings =
        ["MEDIUM", "CPUS", "MEMORY", "MEMORY COMES", "FIRST OUTPUT P50", "P99", "ALL THERE P50", "P99", "FAULTS"];
    present(conditions, results, args.common.json, &headings, cells)
}

fn restore(parent: &Path, args: &StoreArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for memory in &args.memory {
        eprintln!("perdure: restore: {} runs, {memory}, depth {}", args.runs, args.generations);
        results.extend(restore::measure(pool.directory(), *memory, args.generations, args.runs as usize)?);
    }
    let cells = |result: &restore::RestoreResult| {
        vec![
            result.memory.to_string(),
            result.depth.to_string(),
            match result.changes {
                store::Changes::InTurn => "in turn".to_owned(),
                store::Changes::Scattered => "scattered".to_owned(),
            },
            output::rate(result.raw_read),
            output::rate(result.restore),
            format!("{:.0} %", result.share * 100.0),
            format!("{:.2}", result.amplification),
            format!("{:.2} + {:.2}", result.write_amplification, result.archive_amplification),
            format!("{:.2}", result.slowdown),
        ]
    };
    let headings = [
        "MEMORY",
        "DEPTH",
        "CHANGES",
        "RAW READ",
        "RESTORE",
        "SHARE",
        "READ/BYTE",
        "PAGES + ARCHIVE WRITTEN/CHANGED",
        "TIME/DEPTH 1",
    ];
    present(conditions, results, args.json, &headings, cells)
}

/// Shows what was measured and under which conditions: one JSON document, or a table.
fn present<R: Serialize>(
    conditions: Conditions,
    results: Vec<R>,
    json: bool,
    headings: &[&str],
    cells: impl Fn(&R) -> Vec<String>,
) -> anyhow::Result<()> {
    if json {
        return output::json(&Results { conditions, results });
    }
    output::table(headings, &results.iter().map(cells).collect::<Vec<_>>());
    tell(&conditions);
    Ok(())
}

fn store(parent: &Path, args: &StoreArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for memory in &args.memory {
        eprintln!("perdure: store: {} runs, {memory}, {} generations", args.runs, args.generations);
        results.push(store::measure(pool.directory(), *memory, args.generations, args.runs as usize)?);
    }
    if args.json {
        return output::json(&Results { conditions, results });
    }
    for result in &results {
        tell_store(result);
    }
    tell(&conditions);
    Ok(())
}

fn tell_store(result: &store::StoreResult) {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let rates = [
        ("CRC-32 alone, one thread", output::rate(result.crc), String::new()),
        ("BLAKE3 alone, a page at a time, one thread", output::rate(result.hash), String::new()),
        ("raw write, flushed", output::rate(result.raw_write), String::new()),
        ("store of a full generation", output::rate(result.store), percent(result.share)),
        ("raw read, cold", output::rate(result.raw_read), String::new()),
        ("scrub of everything, cold", output::rate(result.scrub), percent(result.scrub_share)),
    ];
    let rows: Vec<_> = rates.map(|(what, rate, share)| vec![what.to_owned(), rate, share]).into();
    output::table(&["THROUGHPUT", &result.memory.to_string(), "OF RAW"], &rows);
    let times = [("generation of 64 pages", &result.small), ("open", &result.open), ("purge of one", &result.purge)];
    let mut rows: Vec<_> = times
        .map(|(what, times)| {
            let [p50, p99] = p50_p99(times);
            vec![what.to_owned(), times.samples.to_string(), p50, p99]
        })
        .into();
    rows.push(vec!["sweep after all that".into(), "1".into(), output::time(result.sweep_ns), String::new()]);
    say!("");
    output::table(&[&format!("{} GENERATIONS", result.generations), "SAMPLES", "P50", "P99"], &rows);
    say!("");
    alternatives(&result.alternatives);
}

fn alternatives(alternatives: &[Alternative]) {
    let cells = |alternative: &Alternative| {
        let way = match alternative.way {
            Way::Perdure => "perdure",
            Way::FileAPage => "one file a page",
            Way::FullCopy => "full copy",
            Way::Qcow2 => "qcow2, 64 KiB clusters",
            Way::Qcow2SmallClusters => "qcow2, 4 KiB clusters",
        };
        if let Some(missing) = &alternative.missing {
            return vec![way.to_owned(), missing.clone()];
        }
        let [p50, p99] = p50_p99(&alternative.generation);
        vec![way.to_owned(), output::time(alternative.first_ns), p50, p99, output::bytes(alternative.bytes)]
    };
    let Some(first) = alternatives.first() else { return };
    let each = format!("{} PAGES MORE P50", first.dirty);
    let all = format!("DISK SPACE OF {}", first.generation.samples + 1);
    let headings = ["WAY", "FIRST GENERATION", &each, "P99", &all];
    output::table(&headings, &alternatives.iter().map(cells).collect::<Vec<_>>());
}

fn shape_cells(shape: &Shape) -> Vec<String> {
    let medium = shape.medium.map(|medium| medium.to_string()).unwrap_or_default();
    let memory = match shape.ram {
        Some(ram) => format!("{}, {ram} of it RAM", shape.memory),
        None => shape.memory.to_string(),
    };
    vec![medium, shape.cpus.to_string(), memory]
}

fn p50_p99(distribution: &Distribution) -> [String; 2] {
    [output::time(distribution.p50_ns), output::time(distribution.p99_ns)]
}

fn tell(conditions: &Conditions) {
    let Conditions { cpu, cpus, kernel, load } = conditions;
    say!("{cpu}, {cpus} CPUs, Linux {kernel}, load {load}");
}
