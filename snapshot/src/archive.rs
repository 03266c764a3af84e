//! The archive, read: nodes are fetched from either mirror, verified, and kept for a while.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::StoreError;
use crate::frame::Malformed;
use crate::node::{
    Children, Entry, Leaf, Manifest, ManifestBlob, ManifestRegion, Node, NodeRef, capacity, slot_of, verify,
};
use crate::pack::{MIRRORS, PackFile, Packs};

/// Nodes of one generation of the memory; there are two, so some 16 MiB at most.
const KEPT: usize = 4096;

/// Nodes used lately: those since the last turn, and those of the turn before.
#[derive(Debug, Default)]
struct Kept {
    young: HashMap<NodeRef, Arc<Node>>,
    old: HashMap<NodeRef, Arc<Node>>,
}

impl Kept {
    fn get(&mut self, node: &NodeRef) -> Option<Arc<Node>> {
        if let Some(found) = self.young.get(node) {
            return Some(Arc::clone(found));
        }
        let found = self.old.remove(node)?;
        self.insert(*node, Arc::clone(&found));
        Some(found)
    }

    fn insert(&mut self, at: NodeRef, node: Arc<Node>) {
        if self.young.len() >= KEPT {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(at, node);
    }
}

/// Reads nodes of archive packs.
#[derive(Debug)]
pub(crate) struct Archive {
    packs: Arc<Packs>,
    kept: Mutex<Kept>,
}

impl Archive {
    pub(crate) fn new(packs: Arc<Packs>) -> Self {
        Self { packs, kept: Mutex::default() }
    }

    pub(crate) fn packs(&self) -> &Packs {
        &self.packs
    }

    /// The node, if it was used lately.
    pub(crate) fn known(&self, node: &NodeRef) -> Option<Arc<Node>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(node)
    }

    /// The node, from the first mirror that has it whole.
    pub(crate) fn node(&self, node: &NodeRef) -> Result<Arc<Node>, StoreError> {
        if let Some(found) = self.known(node) {
            return Ok(found);
        }
        let found = Arc::new(self.fetch(node)?);
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(*node, Arc::clone(&found));
        Ok(found)
    }

    /// The same, past the memory.
    pub(crate) fn fetch(&self, node: &NodeRef) -> Result<Node, StoreError> {
        let mut why = Malformed("it is missing");
        for mirror in MIRRORS {
            match self.fetch_from(*mirror, node) {
                Ok(found) => return Ok(found),
                Err(error) => why = error,
            }
        }
        Err(StoreError::damaged(format!(
            "the archive node at byte {} of pack {} ({why})",
            node.offset(),
            PackFile::ArchiveA.name(node.pack)
        )))
    }

    /// The node as one mirror has it.
    pub(crate) fn fetch_from(&self, mirror: PackFile, node: &NodeRef) -> Result<Node, Malformed> {
        let mut bytes = vec![0; node.length as usize];
        let mut attempt = || {
            self.packs
                .read(mirror, node.pack, node.offset(), &mut bytes)
                .map_err(|_| Malformed("its file is missing, too short or unreadable"))?;
            verify(node, &bytes)
        };
        attempt().or_else(|_| {
            // The file may have been replaced by a repair since it was opened.
            self.packs.forget(mirror, node.pack);
            attempt()
        })
    }

    /// Keeps a node that was just written, since the next generation will want it.
    pub(crate) fn keep(&self, at: NodeRef, node: Node) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(at, Arc::new(node));
    }

    pub(crate) fn manifest(&self, node: &NodeRef) -> Result<Manifest, StoreError> {
        match self.fetch(node)? {
            Node::Manifest(manifest) => Ok(manifest),
            _ => Err(wrong_kind(node, "manifest")),
        }
    }

    pub(crate) fn leaf(&self, node: &NodeRef) -> Result<LeafNode, StoreError> {
        LeafNode::new(node, self.node(node)?)
    }

    pub(crate) fn inner(&self, node: &NodeRef, level: u8) -> Result<InnerNode, StoreError> {
        let found = self.node(node)?;
        match &*found {
            Node::Inner { level: has, .. } if *has == level => Ok(InnerNode(found)),
            _ => Err(wrong_kind(node, "inner node")),
        }
    }

    /// Where page `page` lies; `None` if it is zero.
    pub(crate) fn lookup(&self, region: &ManifestRegion, page: u64) -> Result<Option<Entry>, StoreError> {
        if page >= capacity(region.level) {
            return Ok(None);
        }
        let mut at = region.root;
        for level in (1..=region.level).rev() {
            let Some(node) = at else { return Ok(None) };
            at = self.inner(&node, level)?.children()[slot_of(page, level)];
        }
        let Some(node) = at else { return Ok(None) };
        Ok(self.leaf(&node)?.entries()[slot_of(page, 0)])
    }

    /// Reads a blob.
    pub(crate) fn blob(&self, blob: &ManifestBlob) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        for piece in &blob.pieces {
            match self.fetch(piece)? {
                Node::Blob(content) => bytes.extend_from_slice(&content),
                _ => return Err(wrong_kind(piece, "piece of a blob")),
            }
        }
        if bytes.len() as u64 == blob.length {
            Ok(bytes)
        } else {
            Err(StoreError::damaged(format!(
                "the blob {} ({} bytes instead of {})",
                blob.name,
                bytes.len(),
                blob.length
            )))
        }
    }

    /// Calls `each` with every leaf under `region` that has pages from `from` on, in order: its first page, and its entries.
    /// Stops when `each` says `false`.
    pub(crate) fn leaves(
        &self,
        region: &ManifestRegion,
        from: u64,
        each: &mut dyn FnMut(u64, &Leaf) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        match region.root {
            Some(root) => self.leaves_under(&root, region.level, 0, from, each).map(drop),
            None => Ok(()),
        }
    }

    fn leaves_under(
        &self,
        node: &NodeRef,
        level: u8,
        first: u64,
        from: u64,
        each: &mut dyn FnMut(u64, &Leaf) -> Result<bool, StoreError>,
    ) -> Result<bool, StoreError> {
        if first + capacity(level) <= from {
            return Ok(true);
        }
        if level == 0 {
            return each(first, self.leaf(node)?.entries());
        }
        let inner = self.inner(node, level)?;
        for (slot, child) in inner.children().iter().enumerate() {
            if let Some(child) = child {
                let first = first + slot as u64 * capacity(level - 1);
                if !self.leaves_under(child, level - 1, first, from, each)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// A node known to be a leaf.
pub(crate) struct LeafNode(Arc<Node>);

impl LeafNode {
    /// What lies at `at`, if it is a leaf.
    pub(crate) fn new(at: &NodeRef, node: Arc<Node>) -> Result<Self, StoreError> {
        match &*node {
            Node::Leaf(_) => Ok(Self(node)),
            _ => Err(wrong_kind(at, "leaf")),
        }
    }

    pub(crate) fn entries(&self) -> &Leaf {
        match &*self.0 {
            Node::Leaf(leaf) => leaf,
            _ => &EMPTY_LEAF,
        }
    }
}

/// A node known to be an inner one.
pub(crate) struct InnerNode(Arc<Node>);

impl InnerNode {
    pub(crate) fn children(&self) -> &Children {
        match &*self.0 {
            Node::Inner { children, .. } => children,
            _ => &NO_CHILDREN,
        }
    }
}

static EMPTY_LEAF: Leaf = [None; crate::node::FANOUT];
static NO_CHILDREN: Children = [None; crate::node::FANOUT];

pub(crate) fn wrong_kind(node: &NodeRef, wanted: &str) -> StoreError {
    StoreError::damaged(format!(
        "the archive node at byte {} of pack {} (it is no {wanted})",
        node.offset(),
        PackFile::ArchiveA.name(node.pack)
    ))
}
