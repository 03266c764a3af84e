//! What lies in a pool, byte for byte: to show that nothing was altered.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where a region's file names the process that holds it (FORMAT.md). It means nothing after an outage, and a look at a
/// region may rewrite it.
const HOLDER: std::ops::Range<usize> = 8192..8208;

/// Every file of a pool but the sockets and logs of its processes, by its hash.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PoolBytes(BTreeMap<PathBuf, blake3::Hash>);

impl PoolBytes {
    pub(crate) fn of(pool: &Path) -> Self {
        let mut files = BTreeMap::new();
        collect(pool, &mut files);
        Self(files)
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<PathBuf, blake3::Hash>) {
    for entry in fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            if !path.ends_with("run") {
                collect(&path, files);
            }
            continue;
        }
        let mut bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if path.extension().is_some_and(|extension| extension == "region") {
            bytes.get_mut(HOLDER).into_iter().flatten().for_each(|byte| *byte = 0);
        }
        files.insert(path, blake3::hash(&bytes));
    }
}
