//! `perdure fork`

use allocator::{MediumKind, Pool};
use anyhow::{Context as _, bail};
use snapshot::{GenerationId, Store};

use super::lineage::{self, Lineage};
use super::output::say;
use super::progress::Progress;
use super::{Environment, output};
use crate::machine::config::{SerialTarget, VmConfig};
use crate::persistence::disks::check_left_behind;
use crate::persistence::regions::{VmRegions, region_name};
use crate::persistence::rollback::{Pages, Plan, restore};

/// Make a sibling of a virtual machine, which goes on from one of its generations: `perdure resume NEW`.
///
/// NAME alone is the VM as it is if it is frozen, else its newest generation. Both have memory of their own; in the store, pages
/// that are equal are stored once.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The virtual machine, or one of its generations
    #[arg(value_name = "NAME[@ID]")]
    what: String,
    /// The sibling's name
    new: String,
    /// Its serial port: stdio, none, or a file to append to [default: as the other's, but none for a file]
    #[arg(long, value_name = "stdio|FILE|none")]
    serial: Option<SerialTarget>,
    /// What its regions lie on: file, dax or nvdimm [default: as the other's]
    #[arg(long, value_name = "MEDIUM")]
    medium: Option<MediumKind>,
    /// Also if it has a raw image that it can write: that is as it is now
    #[arg(long)]
    force: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let pool = environment.open_pool()?;
    let new = &args.new;
    vacant(&pool, new)?;
    let (lineage, id) = lineage::resolve(&pool, &args.what, &format!("forked as {new}"))?;
    let store = &lineage.store;
    let plan = Plan::new(store, &id, new, None)?;
    if !args.force {
        check_left_behind(new, plan.config())?;
    }
    // As old as what it holds: that is what a recovery tells.
    store.fork(&id, new, store.generation(&id)?.time_ms)?;
    let birth = Birth { serial: args.serial.as_ref(), medium: args.medium, family: &lineage.family };
    let config = birth.config(plan.config(), new)?;
    born(&pool, store, &plan, new, &config)?;
    say!("{new} {id}");
    Ok(())
}

/// Whether a VM called `name` can be made.
pub(super) fn vacant(pool: &Pool, name: &str) -> anyhow::Result<()> {
    for part in ["ram", "context"] {
        if pool.get(&region_name(name, part)?).is_some() {
            bail!("VM {name} exists already: choose another name, or `perdure remove {name}`");
        }
    }
    if let Some(Lineage { .. }) = lineage::find(pool, name)? {
        bail!("there are generations of a VM {name} that is gone: choose another name, or `perdure remove {name}`");
    }
    Ok(())
}

/// What a VM that begins as a generation has of its own.
pub(super) struct Birth<'a> {
    pub(super) serial: Option<&'a SerialTarget>,
    pub(super) medium: Option<MediumKind>,
    pub(super) family: &'a str,
}

impl Birth<'_> {
    /// What it is made of.
    pub(super) fn config(&self, theirs: &VmConfig, name: &str) -> anyhow::Result<VmConfig> {
        let serial = match (self.serial, &theirs.serial) {
            (Some(SerialTarget::File(path)), _) => SerialTarget::File(std::path::absolute(path)?),
            (Some(target), _) => target.clone(),
            (None, SerialTarget::File(path)) => {
                // Two VMs that append to one file make a mess of it.
                eprintln!(
                    "perdure: {name} does not write to {}: --serial FILE gives it a file of its own",
                    path.display()
                );
                SerialTarget::None
            }
            (None, target) => target.clone(),
        };
        let medium = self.medium.or(theirs.medium);
        let family = (self.family != name).then(|| self.family.to_owned());
        Ok(VmConfig { serial, medium, family, ..theirs.clone() })
    }
}

/// Makes the VM `name`, whose lineage is in `store` already, and restores its regions.
pub(super) fn born(pool: &Pool, store: &Store, plan: &Plan, name: &str, config: &VmConfig) -> anyhow::Result<()> {
    let mut regions = match VmRegions::create_for_restore(pool, name, config) {
        Ok(regions) => regions,
        Err(error) => {
            let ids: Vec<GenerationId> = store.generations(name).into_iter().map(|found| found.id).collect();
            store.purge(&ids).with_context(|| format!("`perdure remove {name}` removes what is left of it"))?;
            return Err(error.into());
        }
    };
    let mut progress = Progress::new(format!("restoring {name} ({})", output::bytes(config.memory.0)));
    restore(store, plan, &mut regions, &mut Pages::Now(&mut |done, total| progress.pages(done, total)))
        .with_context(|| format!("VM {name} is there, but not whole: `perdure resume {name}` tries again"))?;
    Ok(())
}
