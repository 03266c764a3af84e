//! Generations, seen from outside: their names, and what is known of each without reading a page.

use std::fmt;
use std::str::FromStr;

use crate::error::StoreError;

/// Bytes in a page. Regions are stored in pages of this size; the last one of a region is padded with zeros.
pub const PAGE_SIZE: usize = 4096;

/// The content of one page.
pub type Page = [u8; PAGE_SIZE];

/// Most bytes in the name of a lineage or a region.
pub(crate) const NAME_MAX: usize = 255;
/// Most bytes in a label.
pub(crate) const LABEL_MAX: usize = 1024;
/// Most bytes in a region's kind.
pub(crate) const KIND_MAX: usize = 32;
/// Most regions of one generation.
pub(crate) const REGIONS_MAX: usize = 1024;
/// Most blobs of one generation.
pub(crate) const BLOBS_MAX: usize = 1024;
/// Most bytes of one blob.
pub(crate) const BLOB_MAX: u64 = 1 << 30;
/// Largest region: 2^40 pages.
pub(crate) const REGION_MAX: u64 = 1 << 52;

/// Names a generation: the lineage (a VM) and the number within it. Written `web@17`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GenerationId {
    /// The lineage: the name of a VM. Not empty, at most 255 bytes, no `@`, no control characters.
    pub lineage: String,
    /// Counts from 1 in each lineage, and is never used twice.
    pub number: u64,
}

impl GenerationId {
    /// The generation `number` of `lineage`.
    #[must_use]
    pub fn new(lineage: impl Into<String>, number: u64) -> Self {
        Self { lineage: lineage.into(), number }
    }
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.lineage, self.number)
    }
}

impl FromStr for GenerationId {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let wrong = || StoreError::invalid(format!("`{text}` does not name a generation: write NAME@NUMBER"));
        let (lineage, number) = text.rsplit_once('@').ok_or_else(wrong)?;
        check_name("lineage", lineage)?;
        Ok(Self { lineage: lineage.to_owned(), number: number.parse().map_err(|_| wrong())? })
    }
}

/// Who wanted a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A schedule. Retention may delete it.
    Automatic,
    /// A person. Retention leaves it alone unless told otherwise.
    Manual,
}

/// What a new generation is compared with, so that only the difference is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// The newest generation of the same lineage, if there is one.
    Newest,
    /// This one: after a rollback, or to fork (then it may be of another lineage).
    Generation(GenerationId),
    /// Nothing: every page that is not put is zero.
    None,
}

/// What the caller knows of a generation that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewGeneration {
    /// The lineage it belongs to; made if there is none of that name.
    pub lineage: String,
    /// What it builds on.
    pub parent: Parent,
    /// When it was, in milliseconds since the Unix epoch. The store has no clock of its own.
    pub time_ms: u64,
    /// A name given by a person, at most 1024 bytes.
    pub label: Option<String>,
    /// Not to be deleted until unprotected.
    pub protected: bool,
    /// Who wanted it.
    pub origin: Origin,
}

impl NewGeneration {
    /// An automatic generation on top of the newest one of `lineage`.
    #[must_use]
    pub fn automatic(lineage: impl Into<String>, time_ms: u64) -> Self {
        Self {
            lineage: lineage.into(),
            parent: Parent::Newest,
            time_ms,
            label: None,
            protected: false,
            origin: Origin::Automatic,
        }
    }

    /// One that a person asked for.
    #[must_use]
    pub fn manual(lineage: impl Into<String>, time_ms: u64) -> Self {
        Self { origin: Origin::Manual, ..Self::automatic(lineage, time_ms) }
    }
}

/// A region as the caller declares it for a new generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionSpec {
    /// Unique within the generation; the parent's region of the same name is what it is compared with.
    pub name: String,
    /// `ram`, `swap`, `disk`, …: opaque to the store, at most 32 bytes.
    pub kind: String,
    /// In bytes, at most 2^52. Need not be a multiple of [`PAGE_SIZE`].
    pub size: u64,
}

/// A region of a committed generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// Its name.
    pub name: String,
    /// Its kind, as declared.
    pub kind: String,
    /// In bytes.
    pub size: u64,
}

impl RegionInfo {
    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        pages_of(self.size)
    }
}

pub(crate) fn pages_of(size: u64) -> u64 {
    size.div_ceil(PAGE_SIZE as u64)
}

/// A blob of a committed generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its name.
    pub name: String,
    /// In bytes.
    pub length: u64,
}

/// What the ledger knows of a committed generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Its name.
    pub id: GenerationId,
    /// What it was built on. That one may be gone by now.
    pub parent: Option<GenerationId>,
    /// When it was, in milliseconds since the Unix epoch, as its maker said.
    pub time_ms: u64,
    /// A name given by a person.
    pub label: Option<String>,
    /// Not to be deleted until unprotected.
    pub protected: bool,
    /// Who wanted it.
    pub origin: Origin,
    /// Its place in the order in which the store's generations were committed, over all lineages.
    pub sequence: u64,
    /// How many generations it stands on, down to the first full one.
    pub depth: u32,
    /// The bytes of all its regions together.
    pub logical_bytes: u64,
    /// Pages that it added to the store: not zero, not equal to a page already there.
    pub pages_stored: u64,
    /// The bytes that these took in data packs.
    pub page_bytes_stored: u64,
    /// The bytes that it added to the archive, one mirror counted.
    pub archive_bytes_stored: u64,
}

pub(crate) fn check_name(what: &str, name: &str) -> Result<(), StoreError> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(StoreError::invalid(format!("a {what}'s name has 1 to {NAME_MAX} bytes, not {}", name.len())));
    }
    if name.contains(|c: char| c == '@' || c.is_control()) {
        return Err(StoreError::invalid(format!("a {what}'s name has no `@` and no control characters: {name:?}")));
    }
    Ok(())
}

pub(crate) fn check_label(label: Option<&str>) -> Result<(), StoreError> {
    match label {
        Some(text) if text.is_empty() || text.len() > LABEL_MAX => {
            Err(StoreError::invalid(format!("a label has 1 to {LABEL_MAX} bytes, not {}", text.len())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_being_written_and_read() {
        let id = GenerationId::new("web/ram", 17);
        assert_eq!(id.to_string().parse::<GenerationId>().unwrap(), id);
        for wrong in ["", "web", "web@", "@3", "web@-1", "web@x", "a@b@3"] {
            assert!(wrong.parse::<GenerationId>().is_err(), "{wrong}");
        }
    }
}
