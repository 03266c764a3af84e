//! `perdure outage`

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use allocator::MediumKind;
use anyhow::Context as _;
use vfs::cut::point::Fault;

use super::output::say;
use super::{Environment, output};
use crate::bench::Conditions;
use crate::machine::config::ByteSize;
use crate::outage::campaign::Campaign;
use crate::outage::damage::Damage;
use crate::outage::plan::{Cut, HoldUpLength, Moment, OutagePlan, VmPlan};
use crate::outage::report::{OutageReport, Summary, Tally, Verdict, VmOutage, WentOnFrom};
use crate::outage::scenario::Scenario;
use crate::outage::{self, interrupt::Interrupt};

/// Simulate power outages, and prove that nothing is lost.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Run a VM, let the power fail, take what a cut takes, resume, and let the guest verify itself
    ///
    /// The VM runs in a pool of its own, which is removed in the end: nothing else is touched. The power-fail signal comes, exactly the
    /// hold-up passes, and its process is killed. Then everything is taken from its pool that its medium would have lost: on nvdimm what was not
    /// saved; of files what no flush had covered, which is there, is not, or is torn, as the seed has it. What survived is held against what
    /// was said to be durable, the VM goes on from it, and its output is recomputed from the beginning.
    Run(Box<RunArgs>),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// A copy of this VM, which must not run; without a name: a new one with an embedded guest
    #[arg(conflicts_with_all = ["guest", "cmdline", "memory", "cpus", "medium", "disk", "pmem", "snapshot_every", "max_snapshots", "budget"])]
    name: Option<String>,
    /// An embedded guest [default: counter]
    #[arg(long, value_name = "GUEST")]
    guest: Option<String>,
    /// Its command line
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value = "16M")]
    memory: ByteSize,
    /// Its vCPUs
    #[arg(long, value_name = "N", default_value = "1")]
    cpus: u32,
    /// What it lies on: file, dax or nvdimm [default: file]
    #[arg(long, value_name = "MEDIUM")]
    medium: Option<MediumKind>,
    /// A disk of the pool, as in 4M; the guest records, whose disk is read after each cut, has one of 1M without this
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Persistent memory of the pool, as in 4M; the guest records with --cmdline on=pmem has some of 2M without this
    #[arg(long, value_name = "SIZE")]
    pmem: Option<ByteSize>,
    /// How often it takes a generation, to go on from when a freeze does not fit into the hold-up; 0s: never
    #[arg(long, value_name = "TIME", default_value = "250ms")]
    snapshot_every: String,
    /// Generations that stay at most, so that some are purged
    #[arg(long, value_name = "N")]
    max_snapshots: Option<u32>,
    /// When the power-fail signal comes, counted from the guest's first output, as in 2s; drawn from a span, as in 5ms..200ms; or random (20ms..1s)
    #[arg(long, value_name = "TIME|FROM..TO|random", default_value = "2s")]
    at: Moment,
    /// From the signal to darkness, as in 16ms (ATX power supplies give 11 to 17 ms); none: as long as the freeze takes
    #[arg(long, value_name = "TIME|none", default_value = "16ms")]
    holdup: HoldUpLength,
    /// Its VM keeps within the hold-up (`perdure run --holdup`): what is dirty is bounded, so that each freeze fits
    #[arg(long)]
    budget: bool,
    /// When darkness comes: after-holdup; at:PHASE (as in at:freeze.context, at:resume.clear+2: before the second write after it); random (within
    /// the hold-up, or without a signal); unannounced; never (the power comes back within the hold-up)
    #[arg(long, value_name = "WHEN", default_value = "after-holdup")]
    cut: Cut,
    /// What its medium does from a point on to the next one: io-error@PHASE, full@PHASE, slow:20ms@PHASE (each flush), lies@PHASE (flushes are
    /// not done, and say that they were: this must end in a violation)
    #[arg(long, value_name = "FAULT")]
    fault: Option<Fault>,
    /// Of the two slots of the context one is damaged between the cut and the return, where both are good: newer-slot, older-slot, or
    /// context-slot (one of them, as chance has it). Then it must not go on from the older one, and must say why
    #[arg(long, value_name = "WHAT")]
    damage: Option<Damage>,
    /// How many outages, one after the other
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repeat: u32,
    /// Machines side by side, each with the same VMs in a pool of its own; they share the outages. More than there are processors is sensible
    /// for guests that sleep; freezes take longer then
    #[arg(long, value_name = "N", default_value = "1", value_parser = jobs)]
    jobs: NonZeroUsize,
    /// Draws the same times, cuts and losses again, on as many machines [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// VMs and outages from a JSON file, instead of all of the above
    ///
    /// As in {"vms": [{"guest": "counter", "medium": "nvdimm", "priority": 1}, {"guest": "smp", "cpus": 2}], "outages": [{"at": "300ms",
    /// "holdup": "100ms", "cut": "never", "back": "4ms"}, {"cut": "freeze.context+2", "again": ["resume.clear+1"]}, {"flaps": 5}, {"fault":
    /// "io-error@freeze.persist"}], "repeat": 10}. VMs: guest, cmdline, cpus, memory, medium, disk and pmem (their sizes), snapshot_every, max_snapshots, priority (the highest are
    /// warned first). Outages: at, holdup, cut, flaps (signals before it, after each of which the power comes back), back (when it does), again
    /// (where the VM is cut off on its way back, one for each attempt), fault, damage,
    /// fresh (all VMs are made anew before it).
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["name", "guest", "cmdline", "memory", "cpus", "medium", "disk", "pmem", "snapshot_every", "max_snapshots", "at", "holdup", "budget", "cut", "fault", "damage", "repeat"])]
    scenario: Option<PathBuf>,
    /// Write a page about it: a time line of each outage, and distributions
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    fn vm(&self) -> VmPlan {
        VmPlan {
            guest: self.guest.clone().unwrap_or_else(|| "counter".to_owned()),
            cmdline: self.cmdline.clone(),
            cpus: self.cpus,
            memory: self.memory,
            medium: self.medium,
            disk: self.disk,
            pmem: self.pmem,
            snapshot_every: Some(self.snapshot_every.clone()),
            max_snapshots: self.max_snapshots,
            holdup: self.holdup.0.filter(|_| self.budget).map(|holdup| humantime::format_duration(holdup).to_string()),
            priority: 0,
        }
    }

    fn scenario(&self) -> anyhow::Result<Scenario> {
        let Some(path) = &self.scenario else {
            return Ok(Scenario { vms: vec![self.vm()], outages: vec![self.plan()], repeat: self.repeat });
        };
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Scenario::parse(&text).with_context(|| format!("{} is not used", path.display()))
    }

    fn plan(&self) -> OutagePlan {
        OutagePlan {
            at: self.at,
            holdup: self.holdup.0,
            cut: self.cut,
            fault: self.fault,
            damage: self.damage,
            ..OutagePlan::default()
        }
    }
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    let What::Run(args) = &args.what;
    let interrupt = Interrupt::listen()?;
    let seed = args.seed.unwrap_or_else(new_seed);
    let scenario = args.scenario()?;
    let campaign = match &args.name {
        Some(name) => Campaign::of_copies(&environment.open_pool()?, name, args.jobs, interrupt)?,
        None => Campaign::new(&environment.pool, &scenario.vms, args.jobs, interrupt)?,
    };
    // Before it takes its time.
    let page = args.report.as_ref().map(std::fs::File::create).transpose().context("cannot write the page")?;
    let mut document = args.json.then(|| Document::begin(seed));
    if document.is_none() {
        say!("seed {seed}");
    }
    let mut tally = Tally::default();
    let mut hear = |report: OutageReport| -> anyhow::Result<()> {
        match &mut document {
            Some(document) => document.add(&report)?,
            None => tell(&report),
        }
        tally.add(report);
        Ok(())
    };
    let count = scenario.repeat.saturating_mul(u32::try_from(scenario.outages.len()).unwrap_or(u32::MAX));
    let conditions = Conditions::now();
    campaign.run(&scenario.outages, count, seed, &mut hear)?;
    if let Some(mut file) = page {
        file.write_all(outage::page::page(&tally, seed, &conditions).as_bytes()).context("cannot write the page")?;
    }
    let summary = tally.summary();
    match document {
        Some(document) => document.end(&summary)?,
        None => sum_up(&summary),
    }
    Ok(if summary.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A number of machines.
fn jobs(text: &str) -> Result<NonZeroUsize, String> {
    const MOST: usize = 256;
    let jobs: NonZeroUsize = text.parse().map_err(|error: std::num::ParseIntError| error.to_string())?;
    if jobs.get() <= MOST { Ok(jobs) } else { Err(format!("at most {MOST}")) }
}

/// The document of `--json`, which is written as the outages come: of many, nothing piles up.
#[derive(Debug)]
struct Document {
    outages: usize,
}

impl Document {
    fn begin(seed: u64) -> Self {
        say!("{{\n\"seed\": {seed},\n\"outages\": [");
        Self { outages: 0 }
    }

    fn add(&mut self, outage: &OutageReport) -> anyhow::Result<()> {
        let comma = if self.outages > 0 { "," } else { "" };
        self.outages += 1;
        say!("{comma}{}", serde_json::to_string(outage)?);
        Ok(())
    }

    fn end(self, summary: &Summary) -> anyhow::Result<()> {
        say!("],\n\"summary\": {}\n}}", serde_json::to_string_pretty(summary)?);
        Ok(())
    }
}

/// One that nobody chose.
fn new_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // Short enough to be typed.
    std::hash::RandomState::new().build_hasher().finish() >> 32
}

fn tell(outage: &OutageReport) {
    for vm in &outage.vms {
        let went = match &vm.went_on {
            WentOnFrom::Running => "ran on: the power came back".to_owned(),
            WentOnFrom::Context { sequence } => format!("went on from context {sequence}"),
            WentOnFrom::Generation { generation, .. } => {
                format!("went on from {generation}, {} old", output::time(vm.lost_ns))
            }
            WentOnFrom::Boot => format!("booted anew, {} lost", output::time(vm.lost_ns)),
        };
        let resumed = vm.resume_ns.map(|time| format!(" in {}", output::time(time))).unwrap_or_default();
        let verdict = match &vm.verdict {
            Verdict::Unbroken { links } => format!("unbroken ({links} links)"),
            Verdict::RunsOn => "runs on".to_owned(),
            Verdict::Violated { why } => format!("VIOLATED: {why}"),
        };
        let damaged = vm.damaged.as_ref().map(|what| format!("; damaged: {what}")).unwrap_or_default();
        let OutageReport { number, seed, cut, lost_bytes, .. } = outage;
        say!(
            "{number:>4}  {} {cut}, {}; lost {}{damaged}; {went}{resumed}; {verdict}  [seed {seed}]",
            vm.name,
            froze(outage, vm),
            output::bytes(*lost_bytes)
        );
    }
}

/// The freeze, in words.
fn froze(outage: &OutageReport, vm: &VmOutage) -> String {
    let missed = || match (outage.dark_ns, &vm.not_frozen) {
        (None, Some(_)) => "freeze called off".to_owned(),
        (Some(dark), _) if vm.warned => format!("not frozen: dark after {}", output::time(dark)),
        _ => "no warning".to_owned(),
    };
    vm.freeze.map_or_else(missed, |freeze| {
        let left = freeze.holdup_left_ns.map(|left| format!(", {} left", output::time(left))).unwrap_or_default();
        format!("frozen in {}{left}", output::time(freeze.total_ns))
    })
}

fn sum_up(summary: &Summary) {
    let Summary { outages, cuts, from_context, from_generation, from_boot, ran_on, violations, .. } = summary;
    say!(
        "{outages} outages, {cuts} cuts: {from_context} went on from a context, {from_generation} from a generation, {from_boot} from their kernel, \
         {ran_on} ran on; {violations} violations"
    );
    if let Some(met) = summary.holdup_met_percent {
        say!("hold-ups met: {met:.1} %");
    }
    let freeze = summary.freeze;
    if freeze.samples > 0 {
        say!("signal to all durable: p50 {}, p99 {}", output::time(freeze.p50_ns), output::time(freeze.p99_ns));
    }
    say!("resumed: p50 {}, p99 {}", output::time(summary.resume.p50_ns), output::time(summary.resume.p99_ns));
}
