//! After an unclean end: which generation to resume from.

use crate::error::StoreError;
use crate::generation::{Generation, GenerationId, PAGE_SIZE};
use crate::mark::{Distinct, Marks};
use crate::node::Entry;
use crate::pack::PackFile;
use crate::store::Store;

/// How closely a generation is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Its whole archive is read and verified, and each pack is there and long enough. Milliseconds a gigabyte; a restore then
    /// verifies each page as it comes.
    Structure,
    /// Each page is read and verified too.
    Pages,
}

/// A generation that was passed over.
#[derive(Debug)]
pub struct Skipped {
    /// Which.
    pub generation: Generation,
    /// What is wrong with it.
    pub why: StoreError,
}

/// What a recovery can go on with.
#[derive(Debug)]
pub struct Recovered {
    /// The newest generation that verifies; `None` if none does.
    pub generation: Option<Generation>,
    /// Newer ones, which do not, the newest first.
    pub skipped: Vec<Skipped>,
}

impl Store {
    /// The newest generation of `lineage` that verifies, and what is wrong with the newer ones.
    ///
    /// # Errors
    /// [`StoreError::EmptyLineage`] if it has no generation at all.
    pub fn newest_verified(&self, lineage: &str, depth: Depth) -> Result<Recovered, StoreError> {
        let mut generations = self.generations(lineage);
        if generations.is_empty() {
            return Err(StoreError::EmptyLineage { lineage: lineage.to_owned() });
        }
        let mut skipped = Vec::new();
        while let Some(generation) = generations.pop() {
            match self.verify(&generation.id, depth) {
                Ok(()) => return Ok(Recovered { generation: Some(generation), skipped }),
                Err(why) => skipped.push(Skipped { generation, why }),
            }
        }
        Ok(Recovered { generation: None, skipped })
    }

    /// Whether all of a generation can be read.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] names the first thing that no copy has; [`StoreError::NoSuchGeneration`].
    pub fn verify(&self, id: &GenerationId, depth: Depth) -> Result<(), StoreError> {
        let state = self.state();
        let root = state.find(id)?.manifest;
        let (marks, unreadable) = Marks::of(&self.inner.archive, [root], &mut |_| ());
        if let Some(first) = unreadable.first() {
            return Err(crate::mark::blocked(first));
        }
        let reachable = |entry: &Entry| entry.links().any(|link| self.pack_length(link.pack) >= link.end());
        let mut bad = None;
        let mut page = [0; PAGE_SIZE];
        // The lengths of packs are asked for once each, and pages only where a pack is too short or all are wanted.
        let short = marks.data.iter().any(|(pack, blocks)| self.pack_length(*pack) < blocks.end());
        if short || depth == Depth::Pages {
            Distinct::default().entries(&self.inner.archive, &root, &mut |entry| {
                let good = match depth {
                    Depth::Structure => reachable(entry),
                    Depth::Pages => self.read_entry(entry, &mut page).is_ok(),
                };
                if !good {
                    bad = Some(*entry);
                }
                good
            });
        }
        match bad {
            None => Ok(()),
            Some(entry) => Err(StoreError::damaged(format!(
                "a page of generation {id} at byte {} of pack {}",
                entry.first.offset(),
                PackFile::Data.name(entry.first.pack)
            ))),
        }
    }

    /// The length of a data pack; 0 if it is missing.
    pub(crate) fn pack_length(&self, pack: u32) -> u64 {
        self.inner.packs.length(PackFile::Data, pack).unwrap_or(0)
    }
}
