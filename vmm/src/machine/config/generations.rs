//! How generations of a VM are stored and how long they stay: Snapper's policies, by its names.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::ByteSize;

/// What a restore does with a page that is lost in every copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Integrity {
    /// It stops: nothing goes on from memory that is not what it was.
    #[default]
    Fail,
    /// It leaves the page zero, says so, and goes on.
    Warn,
}

/// How pages lie in the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// As they are: the quickest.
    #[default]
    None,
    /// LZ4.
    Lz4,
    /// Zstandard, level 1.
    Zstd,
}

/// How generations are stored, and which stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct GenerationsConfig {
    /// How many automatic generations stay at most; `None`: any number.
    pub max_snapshots: Option<u32>,
    /// How many stay at least, however old: a machine that was off for a month must not wake to find all expired.
    pub min_snapshots: u32,
    /// Age in milliseconds from which on an automatic generation goes; `None`: age does not matter.
    pub expiration_ms: Option<u64>,
    /// How many generations may lean on one stored copy of a page before another copy is written; `None`: any number.
    pub redundancy: Option<NonZeroU32>,
    /// What a restore does with a page that is lost in every copy.
    pub integrity: Integrity,
    /// How pages lie in the store.
    pub compress: Compress,
    /// What is gathered before it is written.
    pub bufsize: ByteSize,
    /// Per cent of what is stored that purged generations may hold before their space is taken back.
    pub threshold: u32,
}

impl Default for GenerationsConfig {
    fn default() -> Self {
        Self {
            max_snapshots: Some(1000),
            min_snapshots: 10,
            expiration_ms: None,
            redundancy: None,
            integrity: Integrity::default(),
            compress: Compress::default(),
            bufsize: ByteSize(4 << 20),
            threshold: 25,
        }
    }
}
