//! `perdure inspect`

use std::path::PathBuf;

use serde::Serialize;

use super::output::say;
use super::survey::{Survey, survey};
use super::{Environment, lineage, output};
use crate::machine::config::{ConsoleDevice, VmConfig};
use crate::persistence::context::Standing;
use crate::persistence::regions::VmRegions;

/// Show all about a virtual machine: what it is made of, its regions, and its context if it is not running.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// One JSON document on standard output; with the whole context, and as "config" what `perdure run --config` reads
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Inspection {
    #[serde(flatten)]
    survey: Survey,
    config: Option<VmConfig>,
    regions: Vec<RegionView>,
    context: Option<ContextView>,
}

#[derive(Debug, Serialize)]
struct RegionView {
    name: String,
    kind: String,
    medium: String,
    size: u64,
    file: PathBuf,
}

#[derive(Debug, Serialize)]
struct ContextView {
    sequence: u64,
    written_ns: u64,
    /// RAM's stamp: the context that it is exactly of.
    ram_clean_at: Option<u64>,
    damage: Vec<String>,
    standing: Standing,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let pool = environment.open_pool()?;
    let survey = survey(environment, &pool, &args.name)?.with_generations(&pool);
    let root = args.name.parse()?;
    let regions = pool.list().into_iter().filter(|region| region.name.is_within(&root));
    let regions = regions
        .map(|region| RegionView {
            name: region.name.to_string(),
            kind: region.kind.to_string(),
            medium: region.medium.to_string(),
            size: region.size,
            file: pool.path_of(&region),
        })
        .collect();
    let held = VmRegions::open(&pool, &args.name).ok();
    let context = held.as_ref().map(|held| ContextView {
        sequence: held.context().sequence,
        written_ns: held.context().written_ns,
        ram_clean_at: held.ram().is_clean(),
        damage: held.damage().to_vec(),
        standing: held.context().standing.clone(),
    });
    let running = survey.status.as_ref().map(|status| status.config.clone());
    let config = held.as_ref().map(|held| held.config().clone()).or(running);
    let inspection = Inspection { survey, config, regions, context };
    if args.json { output::json(&inspection) } else { inspection.print() }
}

impl Inspection {
    /// How the VM keeps within its hold-up, if it runs.
    fn holdup(&self, length: String) -> String {
        let Some(status) = self.survey.status.as_ref().and_then(|status| status.holdup.as_ref()) else { return length };
        if let Some(why) = &status.unbounded {
            return format!("{length}, which nothing bounds any more: {why}");
        }
        let freezes = status.met + status.missed;
        let overrun = match status.overrun {
            0 => String::new(),
            times => format!("; {times} times more was written in a slice of time than it was taken to allow"),
        };
        format!(
            "{length}: {} of {} may be dirty; an empty freeze takes {}; {} of {freezes} freezes were in time{overrun}",
            output::bytes(status.unflushed),
            output::bytes(status.limit),
            output::time(status.fixed_ns),
            status.met
        )
    }

    fn print(&self) -> anyhow::Result<()> {
        let line = |what: &str, value: String| say!("{what:<11} {value}");
        line("name", self.survey.name.clone());
        line("state", self.survey.state.word().to_owned());
        if let Some(pid) = self.survey.pid {
            line("pid", pid.to_string());
        }
        if let Some(detail) = &self.survey.detail {
            line("detail", detail.clone());
        }
        if let Some(generations) = &self.survey.generations {
            let age = lineage::age(generations.newest_age_ms);
            line("generations", format!("{}; the newest is {}, {age} old", generations.count, generations.newest));
        }
        if let Some(config) = &self.config {
            line("cpus", config.cpus.to_string());
            line("memory", config.memory.to_string());
            line("kernel", serde_json::to_string(&config.kernel)?);
            line("cmdline", config.cmdline.clone());
            if let Some(holdup) = config.holdup_us {
                line("hold-up", self.holdup(output::time(holdup * 1000)));
            }
            if let Some(balloon) = self.survey.status.as_ref().and_then(|status| status.balloon) {
                let (actual, target) = (output::bytes(balloon.actual), output::bytes(balloon.target));
                line("balloon", format!("{actual}, to be {target}"));
            }
            config.net.iter().for_each(|card| line("net", card.to_string()));
            config.vsock.iter().for_each(|vsock| line("vsock", vsock.to_string()));
            line("serial", serde_json::to_string(&config.serial)?);
            if config.console == ConsoleDevice::Virtio {
                line("console", "virtio (hvc0)".to_owned());
            }
        }
        for disk in self.config.iter().flat_map(|config| &config.disks) {
            line("disk", disk.to_string());
        }
        for pmem in self.config.iter().flat_map(|config| &config.pmem) {
            line("pmem", pmem.to_string());
        }
        for region in &self.regions {
            line(
                "region",
                format!("{} {} {} {}", region.name, region.medium, output::bytes(region.size), region.file.display()),
            );
        }
        if let Some(context) = &self.context {
            let stamp = context.ram_clean_at.map_or_else(|| "not clean".to_owned(), |n| format!("clean@{n}"));
            line("context", format!("{} ({stamp})", context.sequence));
            for damage in &context.damage {
                line("damage", damage.clone());
            }
            if let Standing::Frozen(frozen) = &context.standing {
                let devices: Vec<_> = frozen.machine.devices.keys().map(String::as_str).collect();
                line("frozen", format!("{} vCPUs; {}", frozen.machine.vcpus.len(), devices.join(", ")));
            }
        }
        Ok(())
    }
}
