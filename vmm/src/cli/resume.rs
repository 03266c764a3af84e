//! `perdure resume`

use std::process::ExitCode;

use allocator::Pool;
use allocator::medium::on_demand;
use anyhow::Context as _;

use super::progress::Progress;
use super::retention::RetentionArgs;
use super::survey::{VmState, names, survey};
use super::{Environment, lineage, live, output};
use crate::machine::config::net::NetConfig;
use crate::machine::config::vsock::VsockConfig;
use crate::machine::config::{ByteSize, SerialTarget, VmConfig};
use crate::machine::time::nanoseconds;
use crate::outage::plan::HoldUpLength;
use crate::persistence::disks::check_left_behind;
use crate::persistence::recovery::{Doubt, assess};
use crate::persistence::regions::{RegionsError, VmRegions, region_name};
use crate::persistence::rollback::{Pages, Plan, Restored, Skipped, recover, roll_back};
use crate::supervisor::Supervisor;
use crate::supervisor::launch::{self, Role};

/// Continue frozen virtual machines at their next instruction.
///
/// Memory is mapped where it lies: nothing is read, nothing is copied. A VM that was cut off while it ran, or whose context is
/// damaged, goes back to its newest generation that verifies, and is told to have; if it has none it is left as it is, with a
/// report of what was found.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<String>,
    /// Go back to this generation first, as in 17; what was, if it was frozen, is kept as a generation
    #[arg(long, value_name = "ID", conflicts_with = "all")]
    generation: Option<String>,
    /// Also go back to a generation where an image that the VM writes to does not: memory from then beside a disk from now, which destroys file
    /// systems that are in use. (Disks of the pool go back.)
    #[arg(long)]
    force: bool,
    /// Where it goes back to a generation, run at once: memory comes from there as the guest asks for it, and the rest meanwhile
    ///
    /// Each page is verified before the guest sees it; one that no copy of is good stops the VM, and is named. What the guest asked for
    /// first is remembered, and fetched first the next time. The generation is protected for as long as it is needed. A power failure
    /// in the middle loses nothing: the VM is frozen as it is, and `resume` goes on with both. `list` and `inspect` tell how far it is.
    #[arg(long)]
    lazy: bool,
    /// With --lazy: fetch only what the guest asks for
    #[arg(long, requires = "lazy")]
    no_prefetch: bool,
    /// With --generation: do not keep what was
    #[arg(long, requires = "generation")]
    discard: bool,
    /// A VM that swaps gets a larger swap region first, as in 8G: for one whose guest waits since RAM and swap are full
    #[arg(long, value_name = "SIZE", conflicts_with = "all")]
    swap: Option<ByteSize>,
    /// A freeze is to fit into this from now on, as in 16ms (see `perdure run --help`); none: no matter how long it takes
    #[arg(long, value_name = "TIME|none", conflicts_with = "all")]
    holdup: Option<HoldUpLength>,
    /// Move its network card to another tap, as in tap=vm1; once for each card that it has, in their order. Their addresses stay
    #[arg(long, value_name = "tap=NAME", conflicts_with = "all")]
    net: Vec<NetConfig>,
    /// Its sockets to the host are from now on here, as in 3:/run/web.vsock; its CID stays
    #[arg(long, value_name = "CID:SOCKET", conflicts_with = "all")]
    vsock: Option<VsockConfig>,
    /// All that are frozen, or were cut off and have generations, in the order of their names; in the background
    #[arg(long, conflicts_with = "RetentionArgs")]
    all: bool,
    /// Leave it in the background once it runs
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    jail: live::JailArgs,
    #[command(flatten)]
    generations: RetentionArgs,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    match &args.name {
        Some(name) => {
            let pool = environment.open_pool()?;
            if let Some(swap) = args.swap {
                grow_swap(&pool, name, swap)?;
            }
            if Role::of_this_process() != Role::First {
                return here(&pool, args, live::hold(&pool, name)?);
            }
            let back = args.generation.as_ref().map(|id| Back { id, discard: args.discard });
            let Prepared { regions, .. } = prepare(&pool, name, back.as_ref(), args)?;
            one(environment, &pool, regions, args)
        }
        None => all(environment, args),
    }
}

fn one(environment: &Environment, pool: &Pool, regions: VmRegions, args: &Args) -> anyhow::Result<ExitCode> {
    let detach = args.detach;
    if !(detach || std::io::IsTerminal::is_terminal(&std::io::stdin())) {
        return here(pool, args, regions);
    }
    let (name, serial) = (regions.name().to_owned(), regions.config().serial.clone());
    // The process of its own that may follow leases them itself.
    drop(regions);
    match live::elsewhere(environment, &name, detach, &serial)? {
        Some(code) => Ok(code),
        None => here(pool, args, live::hold(pool, &name)?),
    }
}

/// Lives the VM's life in this process.
fn here(pool: &Pool, args: &Args, mut regions: VmRegions) -> anyhow::Result<ExitCode> {
    let mut config = regions.config().clone();
    config.swap = args.swap.or(config.swap);
    if let Some(holdup) = args.holdup {
        config.holdup_us = holdup.microseconds();
    }
    move_cards(&mut config, regions.name(), &args.net)?;
    move_sockets(&mut config, regions.name(), args.vsock.as_ref())?;
    args.generations.configure(&mut config);
    if config != *regions.config() {
        config.validate()?;
        regions.set_config(config.clone());
    }
    let begin = |keyboard| Ok(Supervisor::resume(pool, regions, keyboard, !args.no_prefetch)?);
    live::here(args.jail, (pool, &config), begin, |_| {})
}

/// Plugs the cards of the VM `name` into other taps, if some are given. What is in the guest knows their addresses: those stay.
fn move_cards(config: &mut VmConfig, name: &str, to: &[NetConfig]) -> anyhow::Result<()> {
    if to.is_empty() {
        return Ok(());
    }
    if to.len() != config.net.len() {
        anyhow::bail!("--net: VM {name} has {} network cards, and {} taps are given", config.net.len(), to.len());
    }
    for (card, new) in config.net.iter_mut().zip(to) {
        if let Some(mac) = new.mac.filter(|mac| card.mac != Some(*mac)) {
            anyhow::bail!("--net mac={mac}: a card's address cannot change while the guest uses it");
        }
        card.tap.clone_from(&new.tap);
    }
    Ok(config.validate()?)
}

fn move_sockets(config: &mut VmConfig, name: &str, to: Option<&VsockConfig>) -> anyhow::Result<()> {
    match (to, &config.vsock) {
        (None, _) => {}
        (Some(to), Some(from)) if to.cid == from.cid => config.vsock = Some(to.clone()),
        (Some(_), Some(from)) => anyhow::bail!("--vsock: the CID of VM {name} is {} and stays so", from.cid),
        (Some(_), None) => anyhow::bail!("--vsock: VM {name} has no sockets to the host"),
    }
    Ok(())
}

/// Makes the swap region of a VM larger; nothing if it is so already. What is in it stays.
fn grow_swap(pool: &Pool, name: &str, swap: ByteSize) -> anyhow::Result<()> {
    let regions = live::hold(pool, name)?;
    let mut config = regions.config().clone();
    let (before, Some(geometry)) = (config.swap_bytes(), config.geometry()) else {
        anyhow::bail!("--swap: VM {name} does not swap: all of its {} of memory is RAM", config.memory);
    };
    if swap.0 < before {
        anyhow::bail!("--swap {swap}: VM {name} has {} of swap, and gets no less", ByteSize(before));
    }
    config.swap = Some(swap);
    config.validate()?;
    drop(regions);
    let region = region_name(name, "swap")?;
    let size = geometry.swap_region(swap.0);
    if pool.get(&region).is_some_and(|region| region.size < size) {
        pool.resize(&region, size)?;
    }
    Ok(())
}

/// The generation to go back to.
struct Back<'a> {
    id: &'a str,
    discard: bool,
}

/// A VM's regions as it is to go on from them, if it can.
struct Prepared {
    regions: VmRegions,
    /// Whether they were restored from a generation.
    restored: bool,
}

/// Brings a VM that was cut off back to a generation, or any VM to the one that is asked for.
fn prepare(pool: &Pool, name: &str, back: Option<&Back<'_>>, args: &Args) -> anyhow::Result<Prepared> {
    let mut regions = match live::hold(pool, name) {
        Err(error @ RegionsError::NoContext { .. }) => match without_context(pool, name)? {
            Some(regions) => regions,
            None => return Err(error.into()),
        },
        other => other?,
    };
    let doubt = assess(&regions).err().filter(Doubt::calls_for_recovery);
    if back.is_none() && doubt.is_none() {
        return Ok(Prepared { regions, restored: false });
    }
    if !args.force {
        let left = check_left_behind(name, regions.config());
        left.with_context(|| match &doubt {
            Some(doubt) => format!("VM {name} was not frozen: {}", doubt.found()),
            None => format!("VM {name} was not rolled back, nothing was altered"),
        })?;
    }
    let mut progress = Progress::new(format!("restoring {name} ({})", output::bytes(regions.config().memory.0)));
    let mut on_progress = |done, total| progress.pages(done, total);
    let bounded = args.holdup.map_or(regions.config().holdup_us, HoldUpLength::microseconds).is_some();
    let mut pages = if args.lazy && can_be_lazy(bounded) { Pages::Later } else { Pages::Now(&mut on_progress) };
    let restored = match back {
        Some(Back { id, discard }) => {
            let id = lineage::id(name, id)?;
            let Some(lineage) = lineage::of_held(pool, &regions)? else {
                anyhow::bail!("VM {name} has no generations: `perdure snapshot {name}` takes one while it runs");
            };
            let rolled = roll_back(&lineage.store, &mut regions, &id, *discard, &mut pages);
            rolled.with_context(|| match (regions.is_clean(), &doubt) {
                (true, _) => format!("VM {name} was not rolled back, nothing was altered"),
                (false, Some(_)) => format!("VM {name} was not rolled back"),
                (false, None) => {
                    format!("the rollback of VM {name} failed midway: `perdure resume {name}` recovers it")
                }
            })?
        }
        None => {
            let Some(lineage) = lineage::of_held(pool, &regions)? else {
                return Ok(Prepared { regions, restored: false });
            };
            recover(&lineage.store, &mut regions, &mut pages)
                .with_context(|| format!("VM {name} was cut off while it ran"))?
        }
    };
    drop(progress);
    if let Some(doubt) = doubt {
        eprintln!("perdure: {name} was not frozen: {}", doubt.found());
    }
    tell(name, &restored, regions.context().standing.restoring().is_some());
    // That took a while, in which others may have changed the pool.
    pool.refresh()?;
    Ok(Prepared { regions, restored: true })
}

/// Whether memory can come while a VM runs, which has a hold-up if it is `bounded`; says why not.
fn can_be_lazy(bounded: bool) -> bool {
    if bounded {
        eprintln!(
            "perdure: --lazy is not for a VM with a hold-up, which bounds what is dirty: all memory is restored first"
        );
        return false;
    }
    match on_demand::available() {
        Ok(()) => true,
        Err(error) => {
            eprintln!(
                "perdure: --lazy needs userfaultfd, and this process may not use it ({error}): all memory is restored first. \
                 CAP_SYS_PTRACE, `sysctl vm.unprivileged_userfaultfd=1` or access to /dev/userfaultfd allow it"
            );
            false
        }
    }
}

/// The regions of a VM whose context cannot be read, if a generation says what it is made of.
fn without_context(pool: &Pool, name: &str) -> anyhow::Result<Option<VmRegions>> {
    let Some(lineage) = lineage::find(pool, name)? else { return Ok(None) };
    let ids = lineage.all().into_iter().rev().map(|generation| generation.id);
    let mut plans = ids.filter_map(|id| Plan::new(&lineage.store, &id, name, None).ok());
    let Some(plan) = plans.next() else { return Ok(None) };
    let family = (lineage.family != name).then_some(lineage.family);
    let config = VmConfig { family, ..plan.config().clone() };
    Ok(Some(VmRegions::open_without_context(pool, name, config)?))
}

/// What became of it, on standard error: standard output may be the guest's.
fn tell(name: &str, restored: &Restored, lazy: bool) {
    let Restored { generation, kept, skipped, report, took } = restored;
    for Skipped { generation, why } in skipped {
        eprintln!("perdure: {} is passed over: {why}", generation.id);
    }
    let label = generation.label.as_ref().map(|label| format!(" ({label})")).unwrap_or_default();
    let (age, pages) = (lineage::age(lineage::age_ms(generation)), report.pages);
    let took = output::time(nanoseconds(*took));
    let how = if lazy { "its pages come while it runs".to_owned() } else { format!("{pages} pages in {took}") };
    eprintln!("perdure: {name} goes on from generation {}{label}, {age} old ({how})", generation.id);
    if let Some(kept) = kept {
        eprintln!("perdure: what was is generation {}", kept.id);
    }
    if report.saved_by_redundancy > 0 {
        let saved = report.saved_by_redundancy;
        eprintln!("perdure: {saved} pages had a damaged copy: `perdure scrub {name} --repair` heals them");
    }
    if !report.damaged.is_empty() {
        let lost = report.damaged.len();
        eprintln!("perdure: {lost} pages are lost in every copy and were left zero, as `integrity: warn` wants it");
    }
}

fn all(environment: &Environment, args: &Args) -> anyhow::Result<ExitCode> {
    if let Role::Detached(_) = Role::of_this_process() {
        let name = std::env::var(launch::NAME).unwrap_or_default();
        let pool = environment.open_pool()?;
        return here(&pool, args, live::hold(&pool, &name)?);
    }
    let pool = environment.open_pool()?;
    let mut code = ExitCode::SUCCESS;
    for name in names(&pool) {
        match survey(environment, &pool, &name)?.state {
            VmState::Frozen => {}
            VmState::Unclean | VmState::Damaged => match prepare(&pool, &name, None, args) {
                Ok(Prepared { restored: true, .. }) => {}
                Ok(Prepared { restored: false, .. }) => continue,
                Err(error) => {
                    eprintln!("perdure: {name}: {}", super::one_line(&error));
                    code = ExitCode::FAILURE;
                    continue;
                }
            },
            _ => continue,
        }
        if live::elsewhere(environment, &name, true, &SerialTarget::None)? != Some(ExitCode::SUCCESS) {
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
