//! What is alive: a walk over everything that generations reach, each shared subtree once.

use std::collections::{BTreeMap, HashSet};

use crate::archive::Archive;
use crate::error::StoreError;
use crate::fault::seeded;
use crate::node::{Entry, Manifest, NODE_UNIT, Node, NodeRef, PAGE_UNIT};
use crate::pack::BLOCK;

/// Nodes met so far.
#[derive(Debug, Default)]
pub(crate) struct Distinct {
    seen: HashSet<(u32, u32)>,
}

impl Distinct {
    /// Whether this is the first time that this node is met.
    fn enter(&mut self, node: &NodeRef) -> bool {
        self.seen.insert((node.pack, node.unit))
    }

    /// Calls `each` with the pages that are reached for the first time; stops when it says `false`. Skips what cannot be read.
    pub(crate) fn entries(&mut self, archive: &Archive, manifest: &NodeRef, each: &mut dyn FnMut(&Entry) -> bool) {
        let Ok(manifest) = archive.manifest(manifest) else { return };
        let mut stack: Vec<NodeRef> = manifest.regions.iter().filter_map(|region| region.root).collect();
        while let Some(node) = stack.pop() {
            if !self.enter(&node) {
                continue;
            }
            match archive.fetch(&node) {
                Ok(Node::Leaf(leaf)) => {
                    if !leaf.iter().flatten().all(&mut *each) {
                        return;
                    }
                }
                // In reverse, so that the first child comes off the stack first.
                Ok(Node::Inner { children, .. }) => stack.extend(children.iter().rev().flatten()),
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// A set of blocks of one file, one bit each, in words of 64. It takes memory for the blocks in it and not for those before them: a
/// reference may speak of any offset, in any number of packs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    words: BTreeMap<u64, u64>,
}

impl Blocks {
    /// Adds the blocks that bytes `start..end` touch.
    pub(crate) fn add(&mut self, start: u64, end: u64) {
        for block in start / BLOCK..end.div_ceil(BLOCK) {
            *self.words.entry(block / 64).or_default() |= 1 << (block % 64);
        }
    }

    pub(crate) fn has(&self, block: u64) -> bool {
        self.words.get(&(block / 64)).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Where the last block ends, in bytes.
    pub(crate) fn end(&self) -> u64 {
        let last = self.words.last_key_value();
        last.map_or(0, |(number, word)| (number * 64 + 64 - u64::from(word.leading_zeros())) * BLOCK)
    }

    /// About how many bytes the set takes.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn memory(&self) -> usize {
        self.words.len() * 16
    }

    /// The longest runs of blocks below `end` for which `wanted` holds, as byte ranges.
    pub(crate) fn runs(end: u64, mut wanted: impl FnMut(u64) -> bool) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in (0..end).filter(|block| wanted(*block)) {
            match runs.last_mut() {
                Some((_, stop)) if *stop == block * BLOCK => *stop += BLOCK,
                _ => runs.push((block * BLOCK, (block + 1) * BLOCK)),
            }
        }
        runs
    }
}

/// The blocks that are alive, pack by pack.
#[derive(Debug, Clone, Default)]
pub(crate) struct Marks {
    pub(crate) data: BTreeMap<u32, Blocks>,
    pub(crate) archive: BTreeMap<u32, Blocks>,
}

/// Parts of a walk that could not be walked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unreadable {
    pub(crate) node: NodeRef,
    pub(crate) why: String,
}

/// Largest offset a reference may speak of without being refused as nonsense: more than any pack holds.
const OFFSET_MAX: u64 = 1 << 39;

impl Marks {
    /// Marks everything that `roots` reach. Returns what could not be read in any mirror: what lies behind it is not marked.
    pub(crate) fn of(
        archive: &Archive,
        roots: impl IntoIterator<Item = NodeRef>,
        progress: &mut dyn FnMut(u64),
    ) -> (Self, Vec<Unreadable>) {
        let (mut marks, mut unreadable) = (Self::default(), Vec::new());
        let mut distinct = Distinct::default();
        let mut frontier: Vec<NodeRef> = roots.into_iter().collect();
        let mut walked = 0;
        while !frontier.is_empty() {
            for node in in_order(std::mem::take(&mut frontier)) {
                if !distinct.enter(&node) {
                    continue;
                }
                marks.node(&node);
                walked += 1;
                if walked % 1024 == 0 {
                    progress(walked);
                }
                match archive.fetch(&node) {
                    Ok(found) => marks.follow(&found, &mut frontier),
                    Err(error) => unreadable.push(Unreadable { node, why: error.to_string() }),
                }
            }
        }
        (marks, unreadable)
    }

    fn node(&mut self, node: &NodeRef) {
        if node.offset() < OFFSET_MAX {
            let blocks = self.archive.entry(node.pack).or_default();
            blocks.add(0, 1);
            blocks.add(node.offset(), node.offset() + u64::from(node.length).next_multiple_of(NODE_UNIT));
        }
    }

    pub(crate) fn follow(&mut self, node: &Node, next: &mut Vec<NodeRef>) {
        match node {
            Node::Leaf(leaf) => {
                let forgotten = |entry: &Entry| entry.second.is_some() && seeded("a walk skips one of two backlinks");
                let links = leaf.iter().flatten().flat_map(|entry| entry.links().skip(usize::from(forgotten(entry))));
                for link in links.filter(|link| link.offset() < OFFSET_MAX) {
                    let blocks = self.data.entry(link.pack).or_default();
                    if !seeded("a walk skips the headers of packs") {
                        blocks.add(0, 1);
                    }
                    blocks.add(link.offset(), link.end().next_multiple_of(PAGE_UNIT));
                }
            }
            Node::Inner { children, .. } => next.extend(children.iter().flatten()),
            Node::Manifest(manifest) => next.extend(manifest_children(manifest)),
            Node::Blob(_) => {}
        }
    }
}

/// Nodes as they lie on the disk: a walk that goes level by level in this order reads the archive nearly from front to back.
pub(crate) fn in_order(mut nodes: Vec<NodeRef>) -> Vec<NodeRef> {
    nodes.sort_unstable_by_key(|node| (node.pack, node.unit));
    nodes.dedup();
    nodes
}

/// The nodes that a manifest refers to.
pub(crate) fn manifest_children(manifest: &Manifest) -> impl Iterator<Item = NodeRef> + '_ {
    let roots = manifest.regions.iter().filter_map(|region| region.root);
    let blobs = manifest.blobs.iter().filter(|_| !seeded("a walk skips blobs"));
    roots.chain(blobs.flat_map(|blob| blob.pieces.iter().copied()))
}

/// The error of an operation that must know all that is alive, and cannot.
pub(crate) fn blocked(unreadable: &Unreadable) -> StoreError {
    StoreError::damaged(unreadable.why.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_that_the_bytes_touch() {
        let mut blocks = Blocks::default();
        blocks.add(4095, 4097);
        blocks.add(BLOCK * 100, BLOCK * 101);
        let alive: Vec<u64> = (0..200).filter(|block| blocks.has(*block)).collect();
        assert_eq!(alive, [0, 1, 100]);
        assert_eq!(blocks.end(), 101 * BLOCK);
        assert_eq!(
            Blocks::runs(102, |block| !blocks.has(block)),
            [(2 * BLOCK, 100 * BLOCK), (101 * BLOCK, 102 * BLOCK)]
        );
    }
}
