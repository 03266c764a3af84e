//! What differs between two generations. Subtrees that both share are not looked into.

use crate::archive::Archive;
use crate::error::StoreError;
use crate::generation::{GenerationId, pages_of};
use crate::node::{FANOUT, Manifest, ManifestRegion, NodeRef, capacity};
use crate::store::Store;

/// Consecutive pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRange {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// How a region differs between two generations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionDiff {
    /// The region's name.
    pub region: String,
    /// Its size in the first generation, in bytes; `None` if it is not in that.
    pub old_size: Option<u64>,
    /// Its size in the second generation, in bytes; `None` if it is not in that.
    pub new_size: Option<u64>,
    /// The pages whose content differs, in order; what one of the two does not have counts as zero.
    pub changed: Vec<PageRange>,
}

impl RegionDiff {
    /// How many pages differ.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.changed.iter().map(|range| range.count).sum()
    }
}

impl Store {
    /// What differs between two generations, region by region; regions without a difference are left out.
    ///
    /// The work depends on how much differs, not on how much there is.
    ///
    /// # Errors
    /// [`StoreError::NoSuchGeneration`], [`StoreError::Damaged`] where an archive cannot be read.
    pub fn diff(&self, old: &GenerationId, new: &GenerationId) -> Result<Vec<RegionDiff>, StoreError> {
        let state = self.state();
        let archive = &self.inner.archive;
        let manifest = |id: &GenerationId| archive.manifest(&state.find(id)?.manifest);
        let (old, new) = (manifest(old)?, manifest(new)?);
        let find =
            |manifest: &Manifest, name: &str| manifest.regions.iter().find(|region| region.name == name).cloned();
        let mut names: Vec<&str> = new.regions.iter().map(|region| &*region.name).collect();
        names.extend(old.regions.iter().map(|region| &*region.name).filter(|name| find(&new, name).is_none()));
        let mut diffs = Vec::new();
        for name in names {
            let (was, is) = (find(&old, name), find(&new, name));
            let (old_size, new_size) = (was.as_ref().map(|region| region.size), is.as_ref().map(|region| region.size));
            let pages = pages_of(old_size.max(new_size).unwrap_or(0));
            let mut walk = Walk { archive, pages, changed: Vec::new() };
            walk.roots(was.as_ref(), is.as_ref())?;
            if old_size != new_size || !walk.changed.is_empty() {
                diffs.push(RegionDiff { region: name.to_owned(), old_size, new_size, changed: walk.changed });
            }
        }
        Ok(diffs)
    }
}

struct Walk<'a> {
    archive: &'a Archive,
    pages: u64,
    changed: Vec<PageRange>,
}

impl Walk<'_> {
    fn roots(&mut self, was: Option<&ManifestRegion>, is: Option<&ManifestRegion>) -> Result<(), StoreError> {
        let level = |region: Option<&ManifestRegion>| region.map_or(0, |region| region.level);
        let top = level(was).max(level(is));
        self.nodes(Side::of(was), Side::of(is), top, 0)
    }

    fn nodes(&mut self, was: Side, is: Side, level: u8, first: u64) -> Result<(), StoreError> {
        if was.node == is.node && (was.level == is.level || was.node.is_none()) {
            return Ok(());
        }
        if level == 0 {
            return self.leaves(was, is, first);
        }
        for slot in 0..FANOUT {
            let first = first + slot as u64 * capacity(level - 1);
            let (was, is) = (was.child(self.archive, level, slot)?, is.child(self.archive, level, slot)?);
            self.nodes(was, is, level - 1, first)?;
        }
        Ok(())
    }

    fn leaves(&mut self, was: Side, is: Side, first: u64) -> Result<(), StoreError> {
        let entries = |side: Side| match side.node {
            Some(node) => self.archive.leaf(&node).map(|leaf| *leaf.entries()),
            None => Ok([None; FANOUT]),
        };
        let (was, is) = (entries(was)?, entries(is)?);
        for (page, (was, is)) in (first..self.pages).zip(was.iter().zip(&is)) {
            if was.map(|entry| entry.hash) != is.map(|entry| entry.hash) {
                match self.changed.last_mut() {
                    Some(last) if last.first + last.count == page => last.count += 1,
                    _ => self.changed.push(PageRange { first: page, count: 1 }),
                }
            }
        }
        Ok(())
    }
}

/// A subtree of one of the two; its level may be below the one at which the walk is, if its region is smaller.
#[derive(Debug, Clone, Copy)]
struct Side {
    node: Option<NodeRef>,
    level: u8,
}

impl Side {
    fn of(region: Option<&ManifestRegion>) -> Self {
        Self { node: region.and_then(|region| region.root), level: region.map_or(0, |region| region.level) }
    }

    /// What lies under `slot` of a node of `level` at this place.
    fn child(self, archive: &Archive, level: u8, slot: usize) -> Result<Self, StoreError> {
        let none = Self { node: None, level: level - 1 };
        match self.node {
            None => Ok(none),
            // A smaller tree lies under the first slots of a taller one.
            Some(_) if self.level < level => Ok(if slot == 0 { self } else { none }),
            Some(node) => Ok(Self { node: archive.inner(&node, level)?.children()[slot], level: level - 1 }),
        }
    }
}
