//! The archive, changed: path copying. A change rewrites the leaf it falls into and the nodes above, and nothing else.

use crate::archive::Archive;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::node::{
    Children, Entry, FANOUT, Leaf, ManifestRegion, NODE_UNIT, Node, NodeRef, capacity, encode_inner, encode_leaf,
    slot_of,
};
use crate::pack::Appender;

/// What becomes of one page: its new entry, or zero.
pub(crate) type Change = (u64, Option<Entry>);

/// Writes new nodes over an archive that is only read.
pub(crate) struct Grafter<'a> {
    pub(crate) archive: &'a Archive,
    pub(crate) nodes: &'a mut Appender,
}

impl Grafter<'_> {
    /// Appends an encoded node.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<NodeRef, StoreError> {
        let (pack, offset) = self.nodes.append(bytes, NODE_UNIT)?;
        Ok(NodeRef { pack, unit: (offset / NODE_UNIT) as u32, length: bytes.len() as u32, hash: Hash::of(bytes) })
    }

    fn write_leaf(&mut self, leaf: Box<Leaf>) -> Result<Option<NodeRef>, StoreError> {
        if leaf.iter().all(Option::is_none) {
            return Ok(None);
        }
        let node = self.write(&encode_leaf(&leaf))?;
        self.archive.keep(node, Node::Leaf(leaf));
        Ok(Some(node))
    }

    fn write_inner(&mut self, level: u8, children: Box<Children>) -> Result<Option<NodeRef>, StoreError> {
        if children.iter().all(Option::is_none) {
            return Ok(None);
        }
        let node = self.write(&encode_inner(level, &children))?;
        self.archive.keep(node, Node::Inner { level, children });
        Ok(Some(node))
    }

    /// Makes `region` (as it was) a region of `level` at least, by new roots above the old one.
    pub(crate) fn raise(&mut self, region: &mut ManifestRegion, level: u8) -> Result<(), StoreError> {
        while region.level < level {
            if let Some(root) = region.root {
                let mut children: Box<Children> = Box::new([None; FANOUT]);
                children[0] = Some(root);
                region.root = self.write_inner(region.level + 1, children)?;
            }
            region.level += 1;
        }
        Ok(())
    }

    /// Drops the pages from `pages` on.
    pub(crate) fn truncate(&mut self, region: &mut ManifestRegion, pages: u64) -> Result<(), StoreError> {
        if let Some(root) = region.root
            && pages < capacity(region.level)
        {
            region.root = self.cut(&root, region.level, 0, pages)?;
        }
        Ok(())
    }

    fn cut(&mut self, node: &NodeRef, level: u8, first: u64, pages: u64) -> Result<Option<NodeRef>, StoreError> {
        let beyond = |slot: usize| {
            let under = if level == 0 { 1 } else { capacity(level - 1) };
            (first + slot as u64 * under >= pages, first + slot as u64 * under)
        };
        if level == 0 {
            let old = self.archive.leaf(node)?;
            let mut leaf = Box::new(*old.entries());
            (0..FANOUT).filter(|slot| beyond(*slot).0).for_each(|slot| leaf[slot] = None);
            return if *leaf == *old.entries() { Ok(Some(*node)) } else { self.write_leaf(leaf) };
        }
        let old = self.archive.inner(node, level)?;
        let mut children = Box::new(*old.children());
        for (slot, child) in children.iter_mut().enumerate() {
            let (gone, start) = beyond(slot);
            *child = match *child {
                Some(_) if gone => None,
                Some(child) if start + capacity(level - 1) > pages => self.cut(&child, level - 1, start, pages)?,
                kept => kept,
            };
        }
        if *children == *old.children() { Ok(Some(*node)) } else { self.write_inner(level, children) }
    }

    /// Applies `changes`, sorted by page without duplicates, all of them below the capacity of the region's level.
    pub(crate) fn apply(&mut self, region: &mut ManifestRegion, changes: &[Change]) -> Result<(), StoreError> {
        if !changes.is_empty() {
            region.root = self.update(region.root, region.level, changes)?;
        }
        Ok(())
    }

    fn update(&mut self, node: Option<NodeRef>, level: u8, changes: &[Change]) -> Result<Option<NodeRef>, StoreError> {
        if level == 0 {
            return self.update_leaf(node, changes);
        }
        let old: Children = match &node {
            Some(node) => *self.archive.inner(node, level)?.children(),
            None => [None; FANOUT],
        };
        let mut children = Box::new(old);
        for group in changes.chunk_by(|(a, _), (b, _)| slot_of(*a, level) == slot_of(*b, level)) {
            let slot = slot_of(group[0].0, level);
            children[slot] = self.update(children[slot], level - 1, group)?;
        }
        if *children == old { Ok(node) } else { self.write_inner(level, children) }
    }

    fn update_leaf(&mut self, node: Option<NodeRef>, changes: &[Change]) -> Result<Option<NodeRef>, StoreError> {
        let old: Leaf = match &node {
            Some(node) => *self.archive.leaf(node)?.entries(),
            None => [None; FANOUT],
        };
        let mut leaf = Box::new(old);
        for (page, entry) in changes {
            leaf[slot_of(*page, 0)] = *entry;
        }
        if *leaf == old { Ok(node) } else { self.write_leaf(leaf) }
    }
}
