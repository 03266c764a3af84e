//! `perdure remove`

use allocator::Pool;
use anyhow::{Context as _, bail};

use super::Environment;
use super::lineage::{self, Lineage};
use super::survey::{VmState, survey};
use crate::persistence::regions::{RegionsError, region_name};
use crate::persistence::working_set;

/// Remove a virtual machine: its regions with all that is in them, and its generations.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Its name
    name: String,
    /// Also if it is frozen (what it had in memory is lost then) or has protected generations
    #[arg(long)]
    force: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let pool = environment.open_pool()?;
    let name = &args.name;
    let state = match survey(environment, &pool, name) {
        Ok(survey) => survey.state,
        // A VM that is gone may have left generations: a removal that was cut.
        Err(RegionsError::NoSuchVm(_)) if lineage::find(&pool, name)?.is_some() => VmState::Stopped,
        Err(error) => return Err(error.into()),
    };
    if state == VmState::Frozen && !args.force {
        bail!("VM {name} is frozen and can be resumed: `perdure remove --force {name}` gives up what it has in memory");
    }
    let lineage = match lineage::find(&pool, name) {
        Err(error) if args.force => {
            pool.free_tree(&name.parse()?)?;
            eprintln!("perdure: the generations of {name} are left where they are: {}", super::one_line(&error));
            return Ok(());
        }
        found => found
            .with_context(|| format!("`perdure remove --force {name}` removes the VM and leaves its generations"))?,
    };
    let guarded = lineage.iter().flat_map(Lineage::all).filter(|generation| generation.protected).count();
    if guarded > 0 && !args.force {
        bail!("VM {name} has {guarded} protected generations: `perdure remove --force {name}` gives them up");
    }
    free(&pool, name)?;
    let _ = std::fs::remove_file(environment.pool.join("run").join(format!("{name}.log")));
    let _ = std::fs::remove_file(working_set::path(&environment.pool, name));
    Ok(())
}

/// Frees all regions of a VM, then its generations: a cut between leaves those, and another removal removes them.
pub(super) fn free(pool: &Pool, name: &str) -> anyhow::Result<()> {
    // The name is checked by making one of its regions' names.
    let ram = region_name(name, "ram")?;
    let lineage = lineage::find(pool, name)?;
    if pool.get(&ram).is_some() || lineage.is_none() {
        pool.free_tree(&name.parse()?)?;
    }
    lineage.map_or(Ok(()), |lineage| forget(pool, &lineage))
}

/// Removes a lineage, and the store if it was the last.
fn forget(pool: &Pool, lineage: &Lineage) -> anyhow::Result<()> {
    let all = lineage.all();
    for generation in all.iter().filter(|generation| generation.protected) {
        lineage.store.protect(&generation.id, false)?;
    }
    let ids: Vec<_> = all.into_iter().map(|generation| generation.id).collect();
    lineage.store.purge(&ids)?;
    if !lineage.store.lineages().is_empty() {
        lineage.sweep(true)?;
    }
    lineage::remove_if_empty(pool, &lineage.family)
}
