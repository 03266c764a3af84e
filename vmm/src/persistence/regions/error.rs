//! What can go wrong with a VM's regions, in words.

use allocator::paging::PagingError;
use allocator::{LeaseError, NameError, PoolError, RegionError, RegionName};

use super::super::context::ContextError;
use super::super::disks::DiskError;
use super::super::holdup::HoldUpError;
use super::super::pmem::PmemError;
use crate::machine::MachineError;
use crate::machine::memory::MemoryError;

/// What can go wrong with a VM's regions.
#[derive(Debug, thiserror::Error)]
pub enum RegionsError {
    /// The name.
    #[error("'{name}' cannot be the name of a VM")]
    Name {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: NameError,
    },
    /// A name with several components.
    #[error("'{0}' cannot be the name of a VM: it must be a single component, without '/'")]
    Nested(String),
    /// There is no such VM.
    #[error("there is no VM {0} in this pool; `perdure list` names those that are")]
    NoSuchVm(String),
    /// There is one already.
    #[error("VM {name} exists already and is {standing}: {advice}")]
    Exists {
        /// Which.
        name: String,
        /// What it is.
        standing: &'static str,
        /// What to do.
        advice: String,
    },
    /// Another process has it.
    #[error("VM {name} is in use by {holder}")]
    InUse {
        /// Which.
        name: String,
        /// The process, in words.
        holder: String,
        /// The process, where it is known.
        pid: Option<u32>,
    },
    /// A log of recoverable memory is in the place of one of its regions.
    #[error("region {0} is a log of recoverable memory and not a VM's: free it, or give the VM another name")]
    Log(RegionName),
    /// A log may have changes of a region that are not in it yet.
    #[error(
        "region {name} belongs to the log {log} of recoverable memory, which may hold changes of it: unmap it there before a VM has it, or \
         free the log, and with it those changes"
    )]
    Bound {
        /// The region.
        name: RegionName,
        /// The log.
        log: RegionName,
    },
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A lease.
    #[error(transparent)]
    Lease(LeaseError),
    /// A region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// The context.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory that is paged.
    #[error(transparent)]
    Paging(#[from] PagingError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk of the pool that the VM was not given when it was made.
    #[error("the VM has no disk {0} in this pool: what it has there cannot change; `perdure remove` the VM first")]
    NoDisk(String),
    /// The thread that clears the stamp ended without a word.
    #[error("clearing the stamp of VM {0} was interrupted")]
    Interrupted(String),
    /// Whoever made it was interrupted.
    #[error(
        "VM {0} was never finished being made: `perdure run {0}` makes it anew, `perdure remove {0}` takes away what there is"
    )]
    Unfinished(String),
    /// Its context names a journal that there is not.
    #[error("the context of VM {0} names a journal of its freeze, and there is none: nothing was altered")]
    NoJournal(String),
    /// Its hold-up.
    #[error(transparent)]
    HoldUp(#[from] HoldUpError),
    /// The context is of another VM than the region.
    #[error(
        "the context of VM {name} says that it has {} bytes of RAM, its RAM region has {region}: nothing was altered", .config
    )]
    Mismatch {
        /// Which.
        name: String,
        /// As the context says, in bytes.
        config: u64,
        /// As it is, in bytes.
        region: u64,
    },
    /// No slot holds a context.
    #[error("the context of VM {name} cannot be read ({}): nothing was altered; `perdure inspect {name}` tells more", in_words(.damage))]
    NoContext {
        /// Which.
        name: String,
        /// What is wrong with the slots.
        damage: Vec<String>,
    },
}

fn in_words(found: &[String]) -> String {
    if found.is_empty() { "none was ever written".to_owned() } else { found.join("; ") }
}
