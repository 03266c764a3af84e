//! Nodes by the thousand. An old archive has those of one generation lie anywhere in its packs, and a node is small: fetched one
//! after the other they cost a seek each, so they are read in the order in which they lie, several reads at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::archive::{Archive, LeafNode, wrong_kind};
use crate::error::StoreError;
use crate::node::{ManifestRegion, Node, NodeRef, capacity, verify};
use crate::pack::{MIRRORS, coalesce, hull, readers};

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
        for (index, node) in self.read_in_order(&missing, threads) {
            found[index] = Some(node);
        }
        // What the first mirror does not have whole is fetched alone, from either.
        let fetch = |(node, (_, at)): (Option<Arc<Node>>, &LeafRef)| node.map_or_else(|| self.node(at), Ok);
        found.into_iter().zip(wanted).map(fetch).collect()
    }

    /// Those of `sorted` nodes that the first mirror has whole.
    fn read_in_order(&self, sorted: &[(usize, NodeRef)], threads: usize) -> Vec<(usize, Arc<Node>)> {
        let reads = coalesce(sorted, |(_, node)| node.place());
        let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(sorted.len())));
        let work = || {
            let mut buffer = Vec::new();
            while let Some(read) = reads.get(next.fetch_add(1, Ordering::Relaxed)) {
                let nodes = &sorted[read.clone()];
                let place = hull(nodes.iter().map(|(_, node)| node.place()));
                if self.packs().read_place(MIRRORS[0], place, &mut buffer).is_err() {
                    continue;
                }
                let whole = nodes.iter().filter_map(|(index, node)| {
                    let start = (node.offset() - place.start) as usize;
                    let node = verify(node, &buffer[start..start + node.length as usize]).ok()?;
                    Some((*index, Arc::new(node)))
                });
                let whole: Vec<_> = whole.collect();
                found.lock().unwrap_or_else(PoisonError::into_inner).extend(whole);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..readers(threads, reads.len()) {
                scope.spawn(work);
            }
            work();
        });
        found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
