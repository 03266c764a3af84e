//! Every state that a cut can leave: operations on a store, cut at each of their steps; what each cut can leave on the
//! disk, all of it where that is few states, else whole operations in every combination and a sample of the rest; and what
//! a store on each of these disks is worth.
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::panic)] // Two tests and an example use their own parts of it.

mod enumerate;
mod verify;
mod workload;

use std::sync::Arc;

use vfs::Vfs;
use vfs::crash::CrashVfs;

pub(crate) use enumerate::{Plan, Report, enumerate};
pub(crate) use verify::verify;
pub(crate) use workload::{Workload, all};

/// How a disk is given to the store: as it is, or through something that makes mistakes.
pub(crate) type Mount = dyn Fn(&CrashVfs) -> Arc<dyn Vfs> + Sync;

/// As it is.
pub(crate) fn plain(disk: &CrashVfs) -> Arc<dyn Vfs> {
    Arc::new(disk.clone())
}
