//! `perdure bench paging` and `perdure bench residence`

use std::path::{Path, PathBuf};

use allocator::MediumKind;
use anyhow::Context as _;

use super::super::output::{self, say};
use super::{Results, tell};
use crate::bench::paging::overhead::Overhead;
use crate::bench::paging::{self, Leg, LegResult, PagingResult};
use crate::bench::patterns::Pattern;
use crate::bench::plot::{self, Chart, Group, Series};
use crate::bench::residence::{self, Level, Point, ResidenceResult, Return, Way};
use crate::bench::{BenchPool, Conditions};
use crate::machine::config::ByteSize;

/// What walks over more memory than RAM have in common.
#[derive(Debug, clap::Args)]
struct WalkArgs {
    /// Orders of accesses, separated by commas
    #[arg(long, value_enum, value_name = "PATTERN", value_delimiter = ',', default_values_t = Pattern::ALL)]
    pattern: Vec<Pattern>,
    /// RAM that the walks may have; their memory is four times as large, their working set almost that
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    ram: ByteSize,
    /// What the guest's regions lie on
    #[arg(long, value_name = "MEDIUM", default_value = "nvdimm")]
    medium: MediumKind,
    /// Per cent of accesses that write
    #[arg(long, value_name = "N", default_value = "30", value_parser = clap::value_parser!(u32).range(0..=100))]
    writes: u32,
    /// Seed of the lists
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// What was measured as lines of comma-separated values, to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// A picture of it, in SVG, to this file; of several, to files of its name with pattern and VMs in it
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = PAGING_HELP)]
pub(super) struct PagingArgs {
    #[command(flatten)]
    walk: WalkArgs,
    /// Accesses before a list begins anew, in working sets
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(1..=64))]
    rounds: u32,
    /// What perdure's process may have beyond RAM and what it has before its guest begins
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    overhead: ByteSize,
    /// How long a walk's time counts
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    length: std::time::Duration,
    /// How long it goes on before that, after once through its list
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = humantime::parse_duration)]
    warm_up: std::time::Duration,
    /// How often all of it is measured
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
}

const PAGING_HELP: &str = "\
Kernel swap is measured in a memory cgroup with the same limit and a swap file on the pool's disk, over the very same list of
accesses. That needs root. Swap belongs to the whole system; it is taken back in the end, however the bench ends.";

#[derive(Debug, clap::Args)]
pub(super) struct ResidenceArgs {
    #[command(flatten)]
    walk: WalkArgs,
    /// How many VMs share the RAM; numbers separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..=16))]
    vms: Vec<u32>,
    /// Ways back, separated by commas
    #[arg(long, value_enum, value_name = "WAY", value_delimiter = ',', default_values_t = Way::ALL)]
    way: Vec<Way>,
    /// How long it is observed before the outage, after once through its list
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    before: std::time::Duration,
    /// How long it is observed after it, in each way back
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    after: std::time::Duration,
}

pub(super) fn paging(parent: &Path, args: &PagingArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let plan = paging::Plan {
        ram: args.walk.ram,
        medium: Some(args.walk.medium),
        write_percent: args.walk.writes,
        rounds: args.rounds,
        seed: args.walk.seed,
        overhead: args.overhead,
        warm_up_ms: milliseconds(args.warm_up),
        length_ms: milliseconds(args.length),
    };
    let mut results = Vec::new();
    for run in 1..=args.runs {
        for pattern in &args.walk.pattern {
            eprintln!("perdure: paging: {pattern}, {} of RAM, run {run} of {}", args.walk.ram, args.runs);
            results.push(paging::measure(&pool, &plan, *pattern)?);
        }
    }
    if let Some(path) = &args.walk.csv {
        write(path, &paging_csv(&results))?;
    }
    if let Some(path) = &args.walk.plot {
        write(path, &paging_plot(&results)?)?;
    }
    if args.walk.json {
        output::json(&Results { conditions, results: results.iter().collect() })?;
        return all_walked(&results);
    }
    let rows: Vec<Vec<String>> =
        results.iter().flat_map(|result| result.legs.iter().map(|leg| leg_cells(result, leg))).collect();
    output::table(&PAGING_HEADINGS, &rows);
    for result in &results {
        let pattern = result.workload.pattern;
        if let Some(ratio) = result.ratio {
            say!("{pattern}: {ratio:.2} times the kernel's swap");
        }
        if let Some(Overhead { percent, quartiles: [low, high], pairs, threads_percent, .. }) = &result.overhead {
            say!(
                "{pattern}: where all fits, the pager costs {percent:.1} % (quartiles {low:.1} and {high:.1}, {pairs} pairs); its threads took {threads_percent:.2} % of the processor time"
            );
        }
    }
    for absent in results.iter().take(1).flat_map(|result| &result.legs).filter_map(|leg| leg.absent.as_ref()) {
        say!("not measured: {absent}");
    }
    let failed = results.iter().flat_map(|result| result.legs.iter().map(move |leg| (result.workload.pattern, leg)));
    let failed = failed.filter_map(|(pattern, leg)| Some((pattern, leg.leg.name(), leg.failed.as_ref()?)));
    let failed: Vec<String> = failed.map(|(pattern, leg, why)| format!("{pattern}, {leg}: {why}")).collect();
    failed.iter().for_each(|failed| say!("failed: {failed}"));
    tell(&conditions);
    all_walked(&results)
}

/// A leg that failed is in the results, and is the bench's failure all the same: a page may have been damaged.
fn all_walked(results: &[PagingResult]) -> anyhow::Result<()> {
    match results.iter().flat_map(|result| &result.legs).filter(|leg| leg.failed.is_some()).count() {
        0 => Ok(()),
        failed => anyhow::bail!("{failed} of the walks failed"),
    }
}

fn milliseconds(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 1_000_000)
}

const PAGING_HEADINGS: [&str; 11] = [
    "PATTERN",
    "PAGES",
    "WHO",
    "PAGES/S",
    "PAGES/CPU S",
    "FROM DISK/S",
    "OTHER FAULTS/S",
    "HARD/S",
    "SOFT/S",
    "READ AHEAD/S",
    "LIMIT",
];

fn leg_cells(result: &PagingResult, leg: &LegResult) -> Vec<String> {
    let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"));
    vec![
        result.workload.pattern.to_string(),
        result.workload.pages.to_string(),
        leg.leg.name().to_owned(),
        rate(leg.pages_per_second),
        rate(leg.pages_per_cpu_second),
        rate(leg.major_faults_per_second),
        rate(leg.minor_faults_per_second),
        rate(leg.hard_faults_per_second),
        rate(leg.soft_faults_per_second),
        rate(leg.read_ahead_per_second),
        leg.limit.map_or_else(|| "-".to_owned(), output::bytes),
    ]
}

fn paging_csv(results: &[PagingResult]) -> String {
    let mut text =
        "pattern,pages,leg,pages_per_second,pages_per_cpu_second,major_faults_per_second,minor_faults_per_second,hard_faults_per_second,\
                    soft_faults_per_second,read_ahead_per_second,limit\n"
            .to_owned();
    for (result, leg) in results.iter().flat_map(|result| result.legs.iter().map(move |leg| (result, leg))) {
        let rate = |rate: Option<f64>| rate.map(|rate| format!("{rate:.1}")).unwrap_or_default();
        let cells = [
            result.workload.pattern.to_string(),
            result.workload.pages.to_string(),
            leg.leg.name().replace(", ", " "),
            rate(leg.pages_per_second),
            rate(leg.pages_per_cpu_second),
            rate(leg.major_faults_per_second),
            rate(leg.minor_faults_per_second),
            rate(leg.hard_faults_per_second),
            rate(leg.soft_faults_per_second),
            rate(leg.read_ahead_per_second),
            leg.limit.map(|limit| limit.to_string()).unwrap_or_default(),
        ];
        text.push_str(&cells.join(","));
        text.push('\n');
    }
    text
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Pages a second of each pattern, by those that walk the same list; of several runs the best.
fn paging_plot(results: &[PagingResult]) -> Result<String, plot::PlotError> {
    const SHOWN: [Leg; 4] = [Leg::KernelSwap, Leg::Perdure, Leg::Process, Leg::Guest];
    let best = |pattern: Pattern, leg: Leg| {
        let of = results.iter().filter(|result| result.workload.pattern == pattern).flat_map(|result| &result.legs);
        of.filter(|result| result.leg == leg).filter_map(|result| result.pages_per_second).max_by(f64::total_cmp)
    };
    let group = |pattern: Pattern| Group {
        name: pattern.to_string(),
        bars: SHOWN.map(|leg| (leg.name().to_owned(), best(pattern, leg))).into(),
    };
    let measured = |pattern: &Pattern| results.iter().any(|result| result.workload.pattern == *pattern);
    let groups: Vec<_> = Pattern::ALL.into_iter().filter(measured).map(group).collect();
    let ram = results.first().map(|result| result.plan.ram.to_string()).unwrap_or_default();
    plot::bars(&format!("A working set of four times {ram} of RAM"), "pages a second", &groups)
}

pub(super) fn residence(parent: &Path, args: &ResidenceArgs) -> anyhow::Result<()> {
    let (pool, conditions) = (BenchPool::create(parent)?, Conditions::now());
    let mut results = Vec::new();
    for vms in &args.vms {
        for pattern in &args.walk.pattern {
            eprintln!("perdure: residence: {pattern}, {} of RAM, {vms} VMs", args.walk.ram);
            let plan = residence::Plan {
                ram: args.walk.ram,
                vms: *vms,
                ways: args.way.clone(),
                medium: Some(args.walk.medium),
                write_percent: args.walk.writes,
                seed: args.walk.seed,
                before_ms: milliseconds(args.before),
                after_ms: milliseconds(args.after),
            };
            results.push(residence::measure(&pool, &plan, *pattern)?);
        }
    }
    if let Some(path) = &args.walk.csv {
        write(path, &residence_csv(&results))?;
    }
    if let Some(path) = &args.walk.plot {
        for result in &results {
            let path = if results.len() == 1 { path.clone() } else { of_row(path, result) };
            write(&path, &plot::charts(&residence_charts(result))?)?;
        }
    }
    if args.walk.json {
        return output::json(&Results { conditions, results });
    }
    let rows: Vec<Vec<String>> = results.iter().flat_map(residence_rows).collect();
    output::table(&RESIDENCE_HEADINGS, &rows);
    let absent = results.iter().take(1).flat_map(|result| result.vms.iter().take(1)).flat_map(|vm| &vm.returns);
    for (way, why) in absent.filter_map(|back| Some((back.way, back.absent.as_ref()?))) {
        say!("{}: not here: {why}", way.name());
    }
    tell(&conditions);
    Ok(())
}

/// `plot.svg` → `plot-zipf-2.svg`.
fn of_row(path: &Path, result: &ResidenceResult) -> PathBuf {
    let part = |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned());
    let (stem, extension) = (part(path.file_stem()).unwrap_or_default(), part(path.extension()));
    let extension = extension.map(|extension| format!(".{extension}")).unwrap_or_default();
    path.with_file_name(format!("{stem}-{}-{}{extension}", result.workload.pattern, result.plan.vms))
}

const RESIDENCE_HEADINGS: [&str; 12] = [
    "PATTERN",
    "VM",
    "WAY BACK",
    "MRR BEFORE",
    "AT",
    "AFTER",
    "FAULTS/S BEFORE",
    "AT",
    "AFTER",
    "PAGES/S BEFORE",
    "AFTER",
    "BACK",
];

fn residence_rows(result: &ResidenceResult) -> Vec<Vec<String>> {
    let row = |name: &str, before: &Level, back: &Return| {
        let percent = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} %"));
        let rate = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
        let (at, after) = (back.at_outage, back.after);
        vec![
            result.workload.pattern.to_string(),
            name.to_owned(),
            back.way.name().to_owned(),
            percent(Some(before.residence)),
            percent(at.map(|at| at.residence)),
            percent(after.map(|after| after.residence)),
            rate(Some(before.faults_per_second)),
            rate(at.map(|at| at.faults_per_second)),
            rate(after.map(|after| after.faults_per_second)),
            rate(Some(before.pages_per_second)),
            rate(after.map(|after| after.pages_per_second)),
            back.back_ms.map_or_else(|| "-".to_owned(), |ms| output::time((ms * 1e6) as u64)),
        ]
    };
    let of_vm =
        |vm: &residence::VmResult| vm.returns.iter().map(|back| row(&vm.name, &vm.before, back)).collect::<Vec<_>>();
    result.vms.iter().flat_map(of_vm).collect()
}

/// What a way back shows, with what was before it.
type Moments<'a> = (&'static str, &'a [Point]);

fn residence_csv(results: &[ResidenceResult]) -> String {
    let mut text =
        "pattern,vms,vm,way,at_ms,residence,faults_per_second,soft_faults_per_second,pages_per_second\n".to_owned();
    for (result, vm) in results.iter().flat_map(|result| result.vms.iter().map(move |vm| (result, vm))) {
        let before: Moments<'_> = ("before", &vm.series_before);
        let after = vm.returns.iter().map(|back| (back.way.name(), back.series.as_slice()));
        for (way, point) in
            std::iter::once(before).chain(after).flat_map(|(way, all)| all.iter().map(move |at| (way, at)))
        {
            let Point { at_ms, residence, faults_per_second, soft_faults_per_second, pages_per_second } = point;
            let (pattern, vms, name) = (result.workload.pattern, result.plan.vms, &vm.name);
            let way = way.replace(", ", " ");
            text.push_str(&format!(
                "{pattern},{vms},{name},{way},{at_ms:.1},{residence:.2},{faults_per_second:.1},{soft_faults_per_second:.1},\
                 {pages_per_second:.1}\n"
            ));
        }
    }
    text
}

/// Residence, faults and pages over time, of each VM, the ways back in one chart.
fn residence_charts(result: &ResidenceResult) -> Vec<Chart> {
    type Of = fn(&Point) -> f64;
    const SHOWN: [(&str, Of); 3] = [
        ("memory residence ratio, %", |point| point.residence),
        ("faults a second", |point| point.faults_per_second),
        ("pages a second", |point| point.pages_per_second),
    ];
    let of_vm = |vm: &residence::VmResult| {
        let chart = |(up, of): (&str, Of)| {
            let points = |series: &[Point]| series.iter().map(|point| (point.at_ms / 1e3, of(point))).collect();
            let before = Series { name: "before the outage".to_owned(), points: points(&vm.series_before) };
            let there = vm.returns.iter().filter(|back| back.absent.is_none());
            let after = there.map(|back| Series { name: back.way.name().to_owned(), points: points(&back.series) });
            Chart {
                title: format!("{}, {}: {up}", result.workload.pattern, vm.name),
                across: "seconds since it could come back".to_owned(),
                up: up.to_owned(),
                series: std::iter::once(before).chain(after).collect(),
                marks: vec![(0.0, "the outage".to_owned())],
            }
        };
        SHOWN.map(chart)
    };
    result.vms.iter().flat_map(of_vm).collect()
}
