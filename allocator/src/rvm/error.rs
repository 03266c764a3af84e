//! What can go wrong with recoverable memory.

use std::io;

use thiserror::Error;

use crate::lease::LeaseError;
use crate::medium::MediumKind;
use crate::name::RegionName;
use crate::pool::PoolError;
use crate::region::RegionError;
use crate::size::Size;

/// Why recoverable memory could not be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RvmError {
    /// The pool stands in the way.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A lease stands in the way.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A region cannot be read, written or mapped.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The region is there and no log.
    #[error("region {name} is of kind {kind} and no log: make one with `Rvm::create_log` under another name")]
    NotALog {
        /// The region.
        name: RegionName,
        /// What it is.
        kind: crate::region::Kind,
    },
    /// A log is no memory.
    #[error("region {name} is a log and is not mapped as memory: name the region that holds the data")]
    IsALog {
        /// The region.
        name: RegionName,
    },
    /// The log was never finished, or neither copy of its status can be read.
    #[error(
        "the log {name} cannot be used ({reason}): nothing was altered; go back to a copy of the pool, or free the log \
             if the changes that it holds are not needed"
    )]
    LogDamaged {
        /// The log.
        name: RegionName,
        /// What is wrong.
        reason: String,
    },
    /// The log is of a newer version.
    #[error("the log {name} was written by a newer perdure (version {version}): use that one; nothing was altered")]
    LogNewer {
        /// The log.
        name: RegionName,
        /// As stored.
        version: u32,
    },
    /// A log of another pool, or of another region, was put in this one's place.
    #[error("the log {name} holds the records of another log (pool {pool:016x}, region {id}): nothing was altered")]
    ForeignLog {
        /// The log.
        name: RegionName,
        /// The pool that it says.
        pool: u64,
        /// The region that it says.
        id: u64,
    },
    /// The log says that it is of another length than its region.
    #[error("the log {name} says that it has {} and its region has {}: it was cut or grown; nothing was altered", Size(*says), Size(*has))]
    LogLength {
        /// The log.
        name: RegionName,
        /// Bytes that it says.
        says: u64,
        /// Bytes of the region.
        has: u64,
    },
    /// Too small a log was asked for.
    #[error("a log of {} is too small: give at least {}", Size(*size), Size(*least))]
    LogTooSmall {
        /// Bytes that were asked for.
        size: u64,
        /// The least.
        least: u64,
    },
    /// A log serves regions on its own kind of medium: the medium decides what a commit must do.
    #[error("region {region} lies on {medium} and the log on {log}: use a log on {medium}")]
    OtherMedium {
        /// The region.
        region: RegionName,
        /// Its medium.
        medium: MediumKind,
        /// The log's.
        log: MediumKind,
    },
    /// Another log may hold changes of this region.
    #[error(
        "region {region} belongs to the log {log}, which may hold changes of it: use that log, and unmap the region there first"
    )]
    BoundElsewhere {
        /// The region.
        region: RegionName,
        /// The log, by name if it is there.
        log: String,
    },
    /// The region is mapped, and its memory is in use.
    #[error("region {region} is mapped already: use `Memory::split_at` to divide it among threads")]
    AlreadyMapped {
        /// The region.
        region: RegionName,
    },
    /// There are other parts of the memory.
    #[error("region {region} cannot be unmapped while other parts of its memory are in use: drop them first")]
    InUse {
        /// The region.
        region: RegionName,
    },
    /// A transaction on it was forgotten, or ended without restoring what it had changed.
    #[error(
        "the memory of region {region} holds what no transaction committed (one was forgotten, or dropped in no-restore mode): \
             initialize the log anew to have it back as it was committed"
    )]
    Unrestored {
        /// The region.
        region: RegionName,
    },
    /// The memory was mapped by another [`crate::rvm::Rvm`].
    #[error("the memory of region {region} was mapped through another log: use each with its own transactions")]
    ForeignMemory {
        /// The region.
        region: RegionName,
    },
    /// A part that is of another transaction.
    #[error("a part of another transaction was given: enroll the memory in this one")]
    ForeignPart,
    /// A range that is not in the memory.
    #[error("bytes {start}..{end} are not all in the {length} bytes of the memory of region {region}")]
    OutOfBounds {
        /// The region.
        region: RegionName,
        /// The memory's length.
        length: usize,
        /// The first byte.
        start: usize,
        /// The byte after the last.
        end: usize,
    },
    /// A transaction that does not fit the log.
    #[error("the transaction needs {} of log and may have {}: make it smaller, or the log larger; nothing of it was committed",
            Size(*needed), Size(*allowed))]
    TooLarge {
        /// Bytes that it would take.
        needed: u64,
        /// Bytes that it may.
        allowed: u64,
    },
    /// More transactions at a time than the undo log has slots.
    #[error(
        "{slots} transactions are running, and the log has room for no more: end one first, or make a log with more slots"
    )]
    TooManyTransactions {
        /// How many there may be.
        slots: u32,
    },
    /// Memory cannot be saved under a running transaction.
    #[error("{running} transactions are running: end them before the memory is saved")]
    Running {
        /// How many.
        running: usize,
    },
    /// An abort of a transaction that kept no old values.
    #[error(
        "a transaction in no-restore mode cannot be aborted: its memory is out of use until the log is initialized anew"
    )]
    NoRestore,
    /// An earlier write or flush of the log failed.
    #[error(
        "an earlier write of the log failed, so nothing is committed any more: initialize it anew, which recovers what was committed"
    )]
    Poisoned,
    /// A save of an NVDIMM was cut.
    #[error(
        "the power went while the memory of the log {name} was being saved: what was saved is in part older than the rest, and \
             is not used; go back to a copy of the pool"
    )]
    SaveCut {
        /// The log.
        name: RegionName,
    },
    /// No thread for the truncation.
    #[error("could not start the thread that truncates the log")]
    Thread {
        /// Why.
        #[source]
        source: io::Error,
    },
}
