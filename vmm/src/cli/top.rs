//! `perdure top`

use std::collections::HashMap;
use std::time::{Duration, Instant};

use allocator::Pool;
use allocator::budget::Budget;
use allocator::paging::PagingStatus;
use serde::Serialize;

use super::output::{self, say};
use super::survey::{Survey, names, survey};
use super::{Environment, lineage};
use crate::persistence::paging::PagedStatus;
use crate::persistence::regions::region_name;

/// Show what virtual machines use, live: RAM, swap, faults.
///
/// MRR is the memory residence ratio: in memory / (in memory + in swap) × 100. FAULTS/S are those that waited for the swap region, or for the
/// generation that memory is restored from; DIRTY is what of
/// RAM is not on its medium yet, and so must be flushed when the power fails. LIMIT is what the VM may have in RAM now (`perdure pool limit`).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print once, after one interval, and end
    #[arg(long)]
    once: bool,
    /// The time between two looks, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// One JSON document a look, each on a line of its own
    #[arg(long)]
    json: bool,
}

/// A VM at one look.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    state: String,
    pid: Option<u32>,
    /// Bytes in RAM; `None` if that cannot be told: a VM whose memory is all RAM has the part of it that it touched.
    ram: Option<u64>,
    /// Bytes that it may have in RAM.
    limit: Option<u64>,
    /// Bytes in the swap region alone.
    swap: Option<u64>,
    /// Bytes of memory that its guest has given away.
    balloon: Option<u64>,
    /// The memory residence ratio, in per cent.
    mrr: Option<f64>,
    /// Faults a second that waited for the swap region, or for the generation that memory is restored from.
    hard_faults_per_second: Option<f64>,
    /// Faults a second that found their memory in RAM.
    soft_faults_per_second: Option<f64>,
    /// Bytes of RAM that are not on the medium.
    dirty: Option<u64>,
    /// How old the newest generation is, in milliseconds.
    generation_age_ms: Option<u64>,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let interval = Duration::from_secs(args.interval);
    let mut last = Look::take(environment)?;
    loop {
        std::thread::sleep(interval);
        let look = Look::take(environment)?;
        let rows: Vec<Row> = look.vms.iter().map(|vm| look.row(vm, &last)).collect();
        show(&rows, &look, args)?;
        if args.once {
            return Ok(());
        }
        last = look;
    }
}

fn show(rows: &[Row], look: &Look, args: &Args) -> anyhow::Result<()> {
    if args.json {
        say!("{}", serde_json::to_string(rows)?);
        return Ok(());
    }
    if !args.once && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        // Home, and all below it gone (ECMA-48 CUP, ED).
        say!("\x1b[H\x1b[J{}", look.title());
    } else if !args.once {
        say!("{}", look.title());
    }
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    let headings =
        ["NAME", "STATE", "RAM", "LIMIT", "SWAP", "BALLOON", "MRR", "FAULTS/S", "SOFT/S", "DIRTY", "GENERATION"];
    output::table(&headings, &cells);
    Ok(())
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let bytes = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), output::bytes);
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
        vec![
            self.name.clone(),
            self.state.clone(),
            bytes(self.ram),
            bytes(self.limit),
            bytes(self.swap),
            bytes(self.balloon),
            self.mrr.map_or_else(|| "-".to_owned(), |mrr| format!("{mrr:.1} %")),
            number(self.hard_faults_per_second),
            number(self.soft_faults_per_second),
            bytes(self.dirty),
            self.generation_age_ms.map_or_else(|| "-".to_owned(), lineage::age),
        ]
    }
}

/// All VMs at one moment.
struct Look {
    at: Instant,
    vms: Vec<Survey>,
    /// By RAM region, what it may have.
    granted: HashMap<String, u64>,
    limit: Option<u64>,
    dirty: HashMap<String, u64>,
}

impl Look {
    fn take(environment: &Environment) -> anyhow::Result<Self> {
        let mut look =
            Self { at: Instant::now(), vms: Vec::new(), granted: HashMap::new(), limit: None, dirty: HashMap::new() };
        let Some(pool) = environment.open_pool_if_any()? else { return Ok(look) };
        look.limit = pool.settings().ram_limit;
        let rows = Budget::of(&pool)?.rows()?;
        look.granted = rows.into_iter().map(|row| (row.region.to_string(), row.granted)).collect();
        for name in names(&pool) {
            let vm = survey(environment, &pool, &name)?.with_generations(&pool);
            if let Some(bytes) = vm.pid.and_then(|_| dirty(&pool, &name)) {
                look.dirty.insert(name, bytes);
            }
            look.vms.push(vm);
        }
        Ok(look)
    }

    fn title(&self) -> String {
        let running = self.vms.iter().filter(|vm| vm.status.is_some()).count();
        let limit = self.limit.map_or_else(
            || "no limit of RAM".to_owned(),
            |limit| {
                let granted = self.granted.values().sum();
                format!("{} of {} of RAM granted", output::bytes(granted), output::bytes(limit))
            },
        );
        format!("{running} of {} VMs run; {limit}", self.vms.len())
    }

    fn paged(&self, name: &str) -> Option<&PagedStatus> {
        self.vms.iter().find(|vm| vm.name == name)?.status.as_ref()?.paged.as_ref()
    }

    fn row(&self, vm: &Survey, last: &Self) -> Row {
        let paged = self.paged(&vm.name);
        let before = last.paged(&vm.name);
        let seconds = (self.at - last.at).as_secs_f64().max(0.001);
        // A VM that was resumed in between counts from 0 again.
        let rate = |count: fn(&PagingStatus) -> u64| {
            let (now, before) = (count(&paged?.counts), before.map_or(0, |before| count(&before.counts)));
            Some(now.checked_sub(before).unwrap_or(now) as f64 / seconds)
        };
        let holdup = vm.status.as_ref().and_then(|status| status.holdup.as_ref());
        Row {
            name: vm.name.clone(),
            state: vm.state.word().to_owned(),
            pid: vm.pid,
            ram: paged.map(|paged| paged.counts.resident * paged.counts.cluster),
            limit: self.granted.get(&format!("{}/ram", vm.name)).copied(),
            swap: paged.map(|paged| paged.counts.swapped * paged.counts.cluster),
            balloon: vm.status.as_ref().and_then(|status| status.balloon).map(|balloon| balloon.actual),
            mrr: paged.map(|paged| paged.residence),
            hard_faults_per_second: rate(PagingStatus::awaited),
            soft_faults_per_second: rate(|counts| counts.soft_faults),
            dirty: holdup.map(|holdup| holdup.unflushed).or_else(|| self.dirty.get(&vm.name).copied()),
            generation_age_ms: vm.generations.as_ref().map(|all| all.newest_age_ms),
        }
    }
}

/// Bytes of a VM's RAM region that only the page cache has.
fn dirty(pool: &Pool, name: &str) -> Option<u64> {
    let region = pool.get(&region_name(name, "ram").ok()?)?;
    pool.dirty_bytes(&region)
}
