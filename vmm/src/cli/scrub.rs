//! `perdure scrub`

use std::process::ExitCode;

use allocator::Pool;
use serde::Serialize;
use snapshot::{Damage, Lost, RepairReport, ScrubReport, Store};

use super::lineage::{families, open_store, require};
use super::output::say;
use super::progress::Progress;
use super::{Environment, output};
use crate::machine::config::generations::GenerationsConfig;

/// Read and verify every generation, and every copy of everything stored.
///
/// Exit status 1 if anything is damaged and was not healed. VMs run on meanwhile.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A virtual machine: its store, which it shares with its forks [default: all stores of the pool]
    name: Option<String>,
    /// Heal what is damaged from what has a good copy
    #[arg(long)]
    repair: bool,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Scrubbed {
    family: String,
    clean: bool,
    nodes: u64,
    pages: u64,
    bytes: u64,
    healed: Vec<DamageView>,
    damage: Vec<DamageView>,
    lost: Vec<LostView>,
    lost_records: u64,
}

#[derive(Debug, Serialize)]
struct DamageView {
    file: String,
    offset: u64,
    length: u64,
    what: String,
    healable: bool,
}

#[derive(Debug, Serialize)]
struct LostView {
    generation: String,
    region: Option<String>,
    pages: Vec<(u64, u64)>,
    what: String,
}

impl From<Damage> for DamageView {
    fn from(damage: Damage) -> Self {
        let Damage { file, offset, length, what, healable } = damage;
        Self { file, offset, length, what, healable }
    }
}

impl From<Lost> for LostView {
    fn from(lost: Lost) -> Self {
        let Lost { generation, region, pages, what } = lost;
        let pages = pages.into_iter().map(|range| (range.first, range.count)).collect();
        Self { generation: generation.to_string(), region, pages, what }
    }
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    let pool = environment.open_pool()?;
    let mut results = Vec::new();
    let (stores, unreadable) = stores(&pool, args.name.as_deref())?;
    for (family, store) in stores {
        results.push(scrub(family, &store, args.repair)?);
    }
    if args.json {
        output::json(&results)?;
    } else {
        results.iter().for_each(Scrubbed::print);
    }
    let clean = unreadable == 0 && results.iter().all(|result| result.clean);
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The stores that are meant, and how many there are besides that cannot be opened, which it says.
fn stores(pool: &Pool, name: Option<&str>) -> anyhow::Result<(Vec<(String, Store)>, usize)> {
    if let Some(name) = name {
        let lineage = require(pool, name)?;
        return Ok((vec![(lineage.family, lineage.store)], 0));
    }
    let (mut stores, mut unreadable) = (Vec::new(), 0);
    for family in families(pool)? {
        match open_store(pool, &family, &GenerationsConfig::default()) {
            Ok(store) => stores.extend(store.map(|store| (family, store))),
            Err(error) => {
                eprintln!("perdure: {family}: {}", super::one_line(&error.into()));
                unreadable += 1;
            }
        }
    }
    Ok((stores, unreadable))
}

fn scrub(family: String, store: &Store, repair: bool) -> anyhow::Result<Scrubbed> {
    let mut line = Progress::new(format!("{family}: {}", if repair { "repairing" } else { "verifying" }));
    let mut progress = |so_far: snapshot::Progress| {
        line.say(|| format!("{} nodes, {} pages, {}", so_far.nodes, so_far.pages, output::bytes(so_far.bytes)));
    };
    let (healed, report) = if repair {
        let RepairReport { healed, remaining } = store.repair(&mut progress)?;
        (healed, remaining)
    } else {
        (Vec::new(), store.scrub(&mut progress)?)
    };
    let clean = report.is_clean();
    let ScrubReport { verified, damage, lost, lost_records } = report;
    Ok(Scrubbed {
        family,
        clean,
        nodes: verified.nodes,
        pages: verified.pages,
        bytes: verified.bytes,
        healed: healed.into_iter().map(DamageView::from).collect(),
        damage: damage.into_iter().map(DamageView::from).collect(),
        lost: lost.into_iter().map(LostView::from).collect(),
        lost_records,
    })
}

impl Scrubbed {
    fn print(&self) {
        let Self { family, nodes, pages, .. } = self;
        let verdict = if self.clean { "all well" } else { "DAMAGED" };
        say!("{family}: {verdict}: {nodes} nodes, {pages} pages, {} read", output::bytes(self.bytes));
        for damage in &self.healed {
            say!("  healed: {} at byte {}: {}", damage.file, damage.offset, damage.what);
        }
        for damage in &self.damage {
            let what_now = if damage.healable { "--repair heals it" } else { "no good copy" };
            say!("  damaged: {} at byte {}: {} ({what_now})", damage.file, damage.offset, damage.what);
        }
        for lost in &self.lost {
            let region = lost.region.as_deref().map(|region| format!(" region {region}")).unwrap_or_default();
            say!("  lost: {}{region}: {}{}", lost.generation, lost.what, ranges(&lost.pages));
        }
        if self.lost_records > 0 {
            say!("  lost: {} records of the ledger, of which nothing more is known", self.lost_records);
        }
    }
}

fn ranges(pages: &[(u64, u64)]) -> String {
    let one = |(first, count): &(u64, u64)| match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    };
    if pages.is_empty() {
        String::new()
    } else {
        format!(": pages {}", pages.iter().map(one).collect::<Vec<_>>().join(", "))
    }
}
