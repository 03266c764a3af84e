//! Nodes by the thousand. An old archive has those of one generation lie anywhere in its packs, and a node is small: fetched one
//! after the other they cost a seek each, so they are read in the order in which they lie.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use vfs::ReadFrom;

use crate::archive::{Archive, LeafNode, wrong_kind};
use crate::error::StoreError;
use crate::node::{ManifestRegion, Node, NodeRef, capacity, verify};
use crate::pack::{MIRRORS, PackFile};
use crate::place::NODE_GAP;
use crate::stream::{Read, Source};

/// A leaf of a region: its first page, and where it lies.
pub(crate) type LeafRef = (u64, NodeRef);

impl Archive {
    /// The leaves of `region` that have pages from `from` on, in order; where there are more than `limit`, the first page of the first one
    /// left out.
    pub(crate) fn leaves_from(
        &self,
        region: &ManifestRegion,
        from: u64,
        limit: usize,
        threads: usize,
    ) -> Result<(Vec<LeafRef>, Option<u64>), StoreError> {
        let mut frontier: Vec<LeafRef> = region.root.iter().map(|root| (0, *root)).collect();
        let mut until = None;
        for level in (1..=region.level).rev() {
            let under = capacity(level - 1);
            let mut next = Vec::new();
            for ((first, at), node) in frontier.iter().zip(self.nodes(&frontier, threads)?) {
                let Node::Inner { level: has, children } = &*node else { return Err(wrong_kind(at, "inner node")) };
                if *has != level {
                    return Err(wrong_kind(at, "inner node"));
                }
                let children =
                    (0..).zip(children.iter()).filter_map(|(slot, child)| Some((first + slot * under, (*child)?)));
                next.extend(children.filter(|(first, _)| first + under > from));
            }
            // Each has a leaf under it at least, so these are enough.
            if let Some((first, _)) = next.get(limit) {
                until = Some(*first);
                next.truncate(limit);
            }
            frontier = next;
        }
        Ok((frontier, until))
    }

    /// Those leaves, each with its first page.
    pub(crate) fn load_leaves(&self, leaves: &[LeafRef], threads: usize) -> Result<Vec<(u64, LeafNode)>, StoreError> {
        let nodes = self.nodes(leaves, threads)?;
        leaves.iter().zip(nodes).map(|((first, at), node)| Ok((*first, LeafNode::new(at, node)?))).collect()
    }

    /// The nodes, in the order of `wanted`: from the memory, else from the first mirror that has them whole.
    fn nodes(&self, wanted: &[LeafRef], threads: usize) -> Result<Vec<Arc<Node>>, StoreError> {
        let mut found: Vec<Option<Arc<Node>>> = wanted.iter().map(|(_, node)| self.known(node)).collect();
        let mut missing: Vec<(usize, NodeRef)> = (0..)
            .zip(wanted)
            .filter(|(index, _)| found[*index].is_none())
            .map(|(index, (_, node))| (index, *node))
            .collect();
        missing.sort_unstable_by_key(|(_, node)| (node.pack, node.unit));
        for (index, node) in self.read_in_order(MIRRORS[0], &missing, threads) {
            found[index] = Some(node);
        }
        // What the first mirror does not have whole is fetched alone, from either.
        let fetch = |(node, (_, at)): (Option<Arc<Node>>, &LeafRef)| node.map_or_else(|| self.node(at), Ok);
        found.into_iter().zip(wanted).map(fetch).collect()
    }

    /// Those of `sorted` nodes that a mirror has whole.
    pub(crate) fn read_in_order(
        &self,
        mirror: PackFile,
        sorted: &[(usize, NodeRef)],
        threads: usize,
    ) -> Vec<(usize, Arc<Node>)> {
        let found = Mutex::new(Vec::with_capacity(sorted.len()));
        let source = Source {
            packs: self.packs(),
            file: mirror,
            from: ReadFrom::Nearest,
            gap: NODE_GAP,
            sorted,
            place: |(_, node): &(usize, NodeRef)| node.place(),
            stop: &AtomicBool::new(false),
        };
        let check = |read: Read<'_, (usize, NodeRef)>| {
            let start = read.items.first().map_or(0, |(_, node)| node.offset());
            let whole = read.items.iter().filter_map(|(index, node)| {
                let at = (node.offset() - start) as usize;
                let node = verify(node, &read.bytes[at..at + node.length as usize]).ok()?;
                Some((*index, Arc::new(node)))
            });
            let whole: Vec<_> = whole.collect();
            found.lock().unwrap_or_else(PoisonError::into_inner).extend(whole);
        };
        source.stream(threads, &check, &mut || ());
        found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
