//! A copy of a VM, to suffer in its place.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use allocator::Pool;

use super::OutageError;
use crate::machine::config::disks::DiskConfig;
use crate::machine::config::{SerialTarget, VmConfig};
use crate::persistence::generations::{family, store_dir};
use crate::persistence::regions::VmRegions;

/// What is copied at a time.
const CHUNK: u64 = 1 << 20;

/// Copies the VM `name` of `pool`, which must not run, with its generations, into the directory `to`. What it is made of.
pub(super) fn copy_vm(pool: &Pool, name: &str, to: &Path) -> Result<VmConfig, OutageError> {
    // Held while it is copied: nobody changes it.
    let regions = VmRegions::open(pool, name)?;
    let config = regions.config().clone();
    let refused = |why: &str| OutageError::NotCopied { name: name.to_owned(), why: why.to_owned() };
    let shared = |disk: &&DiskConfig| matches!(disk, DiskConfig::File { read_only: false, .. });
    if let Some(disk) = config.disks.iter().find(shared) {
        return Err(refused(&format!(
            "its disk {disk} lies outside of the pool, and the copy would write to it, too. A disk of the pool is copied: \
             `perdure run {name} --disk NAME:SIZE,from={disk}` makes one of it"
        )));
    }
    if !config.net.is_empty() || config.vsock.is_some() {
        return Err(refused("it is joined to the host by a network card or sockets, which the copy would use, too"));
    }
    if matches!(config.serial, SerialTarget::File(_)) {
        return Err(refused("its serial line goes to a file, which the copy would write to, too"));
    }
    let system = |source| OutageError::System { doing: "copy the VM", source };
    let outside = || refused("its regions lie outside of the pool's directory");
    let copy = |path: &Path| -> Result<(), OutageError> {
        let inside = path.strip_prefix(pool.dir()).map_err(|_| outside())?;
        copy_file(path, &to.join(inside)).map_err(system)
    };
    for entry in std::fs::read_dir(pool.dir()).map_err(system)? {
        let entry = entry.map_err(system)?;
        if entry.file_type().map_err(system)?.is_file() {
            copy(&entry.path())?;
        }
    }
    let prefix = format!("{name}/");
    for region in pool.list().iter().filter(|region| region.name.to_string().starts_with(&prefix)) {
        copy(&pool.path_of(region))?;
    }
    let generations = store_dir(pool.dir(), family(&config, name));
    if generations.exists() {
        copy_tree(&generations, &store_dir(to, family(&config, name))).map_err(system)?;
    }
    Ok(config)
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type()? {
            kind if kind.is_dir() => copy_tree(&from, &to)?,
            kind if kind.is_file() => copy_file(&from, &to)?,
            _ => {}
        }
    }
    Ok(())
}

/// Holes stay holes.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let (source, target) = (std::fs::File::open(from)?, std::fs::File::create(to)?);
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; usize::try_from(CHUNK.min(length)).unwrap_or(0)];
    let mut at = 0;
    // ENXIO: nothing more.
    while let Ok(start) = rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&source, rustix::fs::SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let count = usize::try_from(CHUNK.min(end - at)).unwrap_or(0);
            let chunk = buffer.get_mut(..count).unwrap_or_default();
            source.read_exact_at(chunk, at)?;
            target.write_all_at(chunk, at)?;
            at += count as u64;
        }
    }
    target.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        use std::os::unix::fs::MetadataExt;
        let home = tempfile::tempdir().unwrap();
        let (from, to) = (home.path().join("from"), home.path().join("deep/to"));
        let file = std::fs::File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"middle", 33 << 20).unwrap();
        file.write_all_at(b"!", (64 << 20) - 1).unwrap();
        copy_file(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }
}
