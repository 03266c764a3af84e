//! What can go wrong with a store.

use std::io;
use std::path::{Path, PathBuf};

use crate::generation::GenerationId;

/// Why an operation on a store did not happen.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {doing} {path}: see the cause; after `No space left` purge generations or free space, and try again", path = .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// Another writer holds the store.
    #[error("the store {path} is being written by another process: wait for it, or stop it", path = .path.display())]
    Busy {
        /// The store's directory.
        path: PathBuf,
    },
    /// An earlier sync failed, so this handle no longer knows what is durable.
    #[error("an earlier write to the store {path} failed and what is durable is unknown: check the disk, then open the store anew", path = .path.display())]
    Poisoned {
        /// The store's directory.
        path: PathBuf,
    },
    /// The directory holds something that is no store, or a store of a version that this program does not know.
    #[error("{path} is not a store that can be opened: {why}", path = .path.display())]
    NotAStore {
        /// The store's directory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No copy of something stored verifies.
    #[error("{what} is damaged in every copy: run a scrub with repair, or go back to another generation")]
    Damaged {
        /// Which thing, and where.
        what: String,
    },
    /// There is no such generation.
    #[error("there is no generation {id}: list the generations to see which there are")]
    NoSuchGeneration {
        /// What was asked for.
        id: GenerationId,
    },
    /// The lineage has no generation.
    #[error("the lineage {lineage} has no generation: take one first")]
    EmptyLineage {
        /// What was asked for.
        lineage: String,
    },
    /// A generation that must not be deleted was to be.
    #[error("generation {id} is protected: unprotect it first")]
    Protected {
        /// Which.
        id: GenerationId,
    },
    /// The caller asked for what makes no sense.
    #[error("invalid request: {why}")]
    Invalid {
        /// What is wrong with it, and what would be right.
        why: String,
    },
    /// A sink refused the pages of a restore.
    #[error("cannot write the restored pages of region {region}: see the cause")]
    Sink {
        /// The region being restored.
        region: String,
        /// What the sink said.
        source: io::Error,
    },
}

impl StoreError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn invalid(why: impl Into<String>) -> Self {
        Self::Invalid { why: why.into() }
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }

    /// Whether the cause is a full disk.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}
