//! `perdure export`

use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::output::say;
use super::{Environment, lineage, output};

/// Write a generation of a virtual machine to a file: one stream, verified page by page as it goes out.
///
/// NAME alone is the VM as it is if it is frozen, else its newest generation. `perdure import` makes a VM of the file.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The virtual machine, or one of its generations
    #[arg(value_name = "NAME[@ID]")]
    what: String,
    /// The file, which must not be there; - for standard output
    file: PathBuf,
}

pub(super) fn run(environment: &Environment, args: &Args) -> anyhow::Result<()> {
    let to_stdout = args.file == Path::new("-");
    if to_stdout && std::io::stdout().is_terminal() {
        bail!("an export is no text: redirect standard output");
    }
    if !to_stdout && args.file.exists() {
        bail!("{} exists: choose another name, or remove it", args.file.display());
    }
    let pool = environment.open_pool()?;
    let (lineage, id) = lineage::resolve(&pool, &args.what, &format!("exported to {}", args.file.display()))?;
    if to_stdout {
        lineage.store.export(&id, &mut BufWriter::with_capacity(1 << 20, std::io::stdout().lock()))?;
        return Ok(());
    }
    // Beside it, so that the file is whole once it has its name.
    let mut partial = args.file.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = write(&lineage.store, &id, &partial, &args.file);
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    let bytes = written?;
    say!("{id} {}", output::bytes(bytes));
    Ok(())
}

fn write(store: &snapshot::Store, id: &snapshot::GenerationId, partial: &Path, file: &Path) -> anyhow::Result<u64> {
    let cannot = || format!("cannot write {}", partial.display());
    let created = File::create(partial).with_context(cannot)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, created);
    let bytes = store.export(id, &mut buffered)?;
    buffered.flush().with_context(cannot)?;
    buffered.get_ref().sync_all().with_context(cannot)?;
    std::fs::rename(partial, file).with_context(|| format!("cannot name {}", file.display()))?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(parent).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("cannot make the name {} durable", file.display()))?;
    Ok(bytes)
}
