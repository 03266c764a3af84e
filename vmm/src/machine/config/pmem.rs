//! The persistent memory of a VM: regions of its pool that its guest sees as such.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::disks::{self, DiskConfig};
use super::{ByteSize, MAX_MEMORY, SizeError};
use crate::machine::boot::layout;

/// As many as there is room for beside other devices.
pub const MAX_PMEM: usize = 4;
/// What its size is a multiple of: what Linux can hot-plug (a subsection).
pub const PMEM_UNIT: ByteSize = ByteSize(2 << 20);

/// A region of the pool, named after the VM and this: made with the VM, and removed with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: ByteSize,
}

/// Persistent memory that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PmemSyntaxError {
    /// No name, or no size.
    #[error("'{0}' is no persistent memory: write NAME:SIZE, as in log:256M")]
    Parts(String),
    /// Its size.
    #[error(transparent)]
    Size(#[from] SizeError),
}

impl FromStr for PmemConfig {
    type Err = PmemSyntaxError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, size) = text.split_once(':').ok_or_else(|| PmemSyntaxError::Parts(text.to_owned()))?;
        Ok(Self { name: name.to_owned(), size: size.parse()? })
    }
}

impl std::fmt::Display for PmemConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.name, self.size)
    }
}

/// Persistent memory that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PmemError {
    /// Too many.
    #[error("a VM has at most {MAX_PMEM} pieces of persistent memory")]
    Count,
    /// A name.
    #[error(
        "--pmem {0}: its name is of letters, digits, '.', '_' and '-', begins with a letter or a digit, has no '/', and is not ram, swap, context or pmem"
    )]
    Name(PmemConfig),
    /// A name twice.
    #[error("--pmem {0}: the VM has another disk or persistent memory of that name")]
    Twice(PmemConfig),
    /// A size.
    #[error("--pmem {0}: persistent memory has {PMEM_UNIT} at least, and is a multiple of that")]
    Size(PmemConfig),
    /// More than can be addressed.
    #[error("--pmem: the VM's memory and persistent memory together do not fit into {MAX_MEMORY} of addresses")]
    Addresses,
}

/// Checks what can be checked without the host.
///
/// # Errors
/// [`PmemError`].
pub(super) fn validate(pmem: &[PmemConfig], disks: &[DiskConfig], memory: ByteSize) -> Result<(), PmemError> {
    if pmem.len() > MAX_PMEM {
        return Err(PmemError::Count);
    }
    for (index, one) in pmem.iter().enumerate() {
        if !disks::is_name(&one.name) {
            return Err(PmemError::Name(one.clone()));
        }
        if one.size.0 == 0 || !one.size.0.is_multiple_of(PMEM_UNIT.0) {
            return Err(PmemError::Size(one.clone()));
        }
        let is_disk = |disk: &DiskConfig| matches!(disk, DiskConfig::Pool { name, .. } if *name == one.name);
        if disks.iter().any(is_disk) || pmem.iter().take(index).any(|other| other.name == one.name) {
            return Err(PmemError::Twice(one.clone()));
        }
    }
    let ranges = layout::pmem_ranges(memory.0, pmem.iter().map(|one| one.size.0));
    let fits = ranges.is_some_and(|ranges| ranges.last().is_none_or(|last| last.end <= MAX_MEMORY.0));
    if fits { Ok(()) } else { Err(PmemError::Addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn persistent_memory_is_read_as_it_is_written() {
        let one: PmemConfig = "log:64M".parse().unwrap();
        assert_eq!((one.to_string().as_str(), one.size.0), ("log:64M", 64 << 20));
        assert_eq!(serde_json::to_string(&one).unwrap(), r#"{"name":"log","size":"64M"}"#);
        for text in ["", "log", "log:", "log:x"] {
            assert!(text.parse::<PmemConfig>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn persistent_memory_that_cannot_be_is_refused() {
        let check = |pmem: &[&str], disks: &[&str], memory| {
            let pmem: Vec<_> = pmem.iter().map(|text| text.parse().unwrap()).collect();
            let disks: Vec<_> = disks.iter().map(|text| text.parse().unwrap()).collect();
            validate(&pmem, &disks, ByteSize(memory))
        };
        assert_eq!(check(&["a:2M", "b:1G"], &["c:1M", "/a"], 1 << 30), Ok(()));
        for name in ["ram:2M", "context:2M", "swap:2M", ":2M", "a/b:2M", "..:2M"] {
            assert!(matches!(check(&[name], &[], 1 << 30), Err(PmemError::Name(_))), "{name}");
        }
        for size in ["a:0", "a:1M", "a:3M", "a:2097153"] {
            assert!(matches!(check(&[size], &[], 1 << 30), Err(PmemError::Size(_))), "{size}");
        }
        assert!(matches!(check(&["a:2M", "a:4M"], &[], 1 << 30), Err(PmemError::Twice(_))));
        assert!(matches!(check(&["a:2M"], &["a:1M"], 1 << 30), Err(PmemError::Twice(_))));
        assert_eq!(check(&["a:2M", "b:2M", "c:2M", "d:2M", "e:2M"], &[], 1 << 30), Err(PmemError::Count));
        assert_eq!(check(&["a:64T"], &[], 1 << 30), Err(PmemError::Addresses));
        assert_eq!(check(&["a:2M"], &[], MAX_MEMORY.0), Err(PmemError::Addresses));
        assert_eq!(check(&[], &[], MAX_MEMORY.0), Ok(()), "a VM without is as large as it was");
    }
}
