//! `perdure import`

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use allocator::MediumKind;
use anyhow::Context as _;

use super::fork::{Birth, born, vacant};
use super::output::say;
use super::{Environment, lineage};
use crate::machine::config::SerialTarget;
use crate::machine::config::generations::GenerationsConfig;
use crate::persistence::disks::check_left_behind;
use crate::persistence::generations::open;
use crate::persistence::rollback::Plan;

/// Make a virtual machine of a file that `perdure export` wrote: `perdure resume NAME` continues it.
///
/// The whole file is verified before anything of it counts.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file; - for standard input
    file: PathBuf,
    /// The VM's name [default: the one it had]
    name: Option<String>,
    /// Its serial port: stdio, none, or a file to append to [default: as it was, but none for a file]
    #[arg(long, value_name = "stdio|FILE|none")]
    serial: Option<SerialTarget>,
    /// What its regions lie on: file, dax or nvdimm [default: as it was]
    #[arg(long, value_name = "MEDIUM")]
    medium: Option<MediumKind>,
    /// Also if it had a raw image that it could write: that is as it is now
    #[arg(long)]
    force: bool,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let pool = environment.open_or_create_pool()?;
    let mut stream: Box<dyn Read> = if args.file == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
        Box::new(BufReader::with_capacity(1 << 20, file))
    };
    let in_file = || format!("cannot import {}", args.file.display());
    let export = snapshot::Export::open(&mut *stream).with_context(in_file)?;
    let name = args.name.clone().unwrap_or_else(|| export.id().lineage.clone());
    vacant(&pool, &name)?;
    // A family of its own: a store of its own.
    let store = open(pool.dir(), &name, &GenerationsConfig::default())?;
    let imported = export.import(&store, &name).with_context(in_file);
    if imported.is_err() {
        let _ = lineage::remove_if_empty(&pool, &name);
    }
    let generation = imported?;
    let planned = Plan::new(&store, &generation.id, &name, None).map_err(anyhow::Error::from).and_then(|plan| {
        if !args.force {
            check_left_behind(&name, plan.config())?;
        }
        Ok(plan)
    });
    let plan = match planned {
        Ok(plan) => plan,
        Err(error) => {
            store.purge(std::slice::from_ref(&generation.id))?;
            lineage::remove_if_empty(&pool, &name)?;
            return Err(error).with_context(in_file);
        }
    };
    let birth = Birth { serial: args.serial.as_ref(), medium: args.medium, family: &name };
    let config = birth.config(plan.config(), &name)?;
    born(&pool, &store, &plan, &name, &config)?;
    say!("{name} {}", generation.id);
    Ok(())
}
