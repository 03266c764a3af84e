//! Whom damage hurts, and what can heal it.

use std::collections::{HashMap, HashSet};

use crate::archive::Archive;
use crate::diff::PageRange;
use crate::generation::{GenerationId, pages_of};
use crate::hash::Hash;
use crate::ledger::State;
use crate::node::{Entry, Link, Manifest, ManifestRegion, Node, NodeRef, capacity};
use crate::scrub::{Findings, Lost};

/// What of the findings some generation needs.
#[derive(Debug, Default)]
pub(crate) struct Needed {
    /// Damaged nodes that a generation reaches.
    pub(crate) nodes: HashSet<NodeRef>,
    /// Damaged copies of pages that a generation refers to.
    pub(crate) links: HashSet<Link>,
    /// For the content of a damaged copy: a good copy of it, anywhere in the store.
    pub(crate) sources: HashMap<Hash, Link>,
    /// What has no good copy.
    pub(crate) lost: Vec<Lost>,
}

/// What the walks share.
struct Walk<'a> {
    archive: &'a Archive,
    bad_nodes: HashSet<NodeRef>,
    lost_nodes: HashSet<NodeRef>,
    bad_links: HashSet<Link>,
    bad_content: HashSet<Hash>,
    /// Whether anything under a node is damaged, so that what is whole is walked once for all generations.
    damaged: HashMap<NodeRef, bool>,
    needed: Needed,
}

impl Needed {
    pub(crate) fn of(archive: &Archive, state: &State, findings: &Findings) -> Self {
        if findings.nodes.is_empty() && findings.pages.is_empty() {
            return Self::default();
        }
        let mut walk = Walk {
            archive,
            bad_nodes: findings.nodes.iter().map(|bad| bad.node).collect(),
            lost_nodes: findings.lost_nodes(),
            bad_links: findings.bad_links(),
            bad_content: findings.pages.iter().map(|bad| bad.hash).collect(),
            damaged: HashMap::new(),
            needed: Self::default(),
        };
        let generations = state.newest_first();
        // First all of it, since what heals one generation may belong to another; then who has lost what.
        let hurt: Vec<_> = generations.iter().filter(|committed| walk.survey(&committed.manifest)).collect();
        for committed in hurt.into_iter().rev() {
            walk.losses(&committed.info.id, &committed.manifest);
        }
        walk.needed
    }
}

impl Walk<'_> {
    /// Whether anything that `node` reaches is damaged. Notes it, and good copies of damaged content.
    fn survey(&mut self, node: &NodeRef) -> bool {
        if let Some(known) = self.damaged.get(node) {
            return *known;
        }
        let mut damaged = self.bad_nodes.contains(node);
        if damaged {
            self.needed.nodes.insert(*node);
        }
        if !self.lost_nodes.contains(node) {
            match self.archive.fetch(node) {
                Ok(Node::Leaf(leaf)) => leaf.iter().flatten().for_each(|entry| damaged |= self.survey_entry(entry)),
                Ok(Node::Inner { children, .. }) => {
                    children.iter().flatten().for_each(|child| damaged |= self.survey(child));
                }
                Ok(Node::Manifest(manifest)) => {
                    crate::mark::manifest_children(&manifest).for_each(|child| damaged |= self.survey(&child));
                }
                Ok(Node::Blob(_)) => {}
                // Damaged since it was scrubbed.
                Err(_) => {
                    self.lost_nodes.insert(*node);
                    damaged = true;
                }
            }
        }
        self.damaged.insert(*node, damaged);
        damaged
    }

    fn survey_entry(&mut self, entry: &Entry) -> bool {
        let wanted = self.bad_content.contains(&entry.hash);
        let mut damaged = false;
        for link in entry.links() {
            if self.bad_links.contains(&link) {
                self.needed.links.insert(link);
                damaged = true;
            } else if wanted {
                self.needed.sources.entry(entry.hash).or_insert(link);
            }
        }
        damaged
    }

    fn losses(&mut self, id: &GenerationId, root: &NodeRef) {
        let lost = |region: Option<&ManifestRegion>, pages: Vec<PageRange>, what: String| Lost {
            generation: id.clone(),
            region: region.map(|region| region.name.clone()),
            pages,
            what,
        };
        let Ok(manifest) = self.archive.manifest(root) else {
            self.needed.lost.push(lost(None, Vec::new(), "its manifest: nothing of it can be read".to_owned()));
            return;
        };
        for blob in self.lost_blobs(&manifest) {
            self.needed.lost.push(lost(None, Vec::new(), format!("its blob {blob}")));
        }
        for region in &manifest.regions {
            let mut pages = Vec::new();
            if let Some(root) = &region.root {
                self.lost_pages(root, region, region.level, 0, &mut pages);
            }
            if !pages.is_empty() {
                let count: u64 = pages.iter().map(|range| range.count).sum();
                let what = format!("{count} pages of region {}", region.name);
                self.needed.lost.push(lost(Some(region), pages, what));
            }
        }
    }

    fn lost_blobs(&self, manifest: &Manifest) -> Vec<String> {
        let lost = |node: &NodeRef| self.lost_nodes.contains(node);
        manifest.blobs.iter().filter(|blob| blob.pieces.iter().any(lost)).map(|blob| blob.name.clone()).collect()
    }

    fn lost_pages(&self, node: &NodeRef, region: &ManifestRegion, level: u8, first: u64, lost: &mut Vec<PageRange>) {
        if self.damaged.get(node) == Some(&false) {
            return;
        }
        let found = if self.lost_nodes.contains(node) { None } else { self.archive.fetch(node).ok() };
        match found {
            Some(Node::Leaf(leaf)) if level == 0 => {
                for (page, entry) in (first..).zip(leaf.iter()) {
                    if entry.is_some_and(|entry| self.is_lost(&entry)) {
                        add(lost, page, 1);
                    }
                }
            }
            Some(Node::Inner { children, level: has }) if has == level => {
                for (slot, child) in children.iter().enumerate() {
                    if let Some(child) = child {
                        let first = first + slot as u64 * capacity(level - 1);
                        self.lost_pages(child, region, level - 1, first, lost);
                    }
                }
            }
            Some(_) | None => {
                let end = (first + capacity(level)).min(pages_of(region.size));
                add(lost, first, end.saturating_sub(first));
            }
        }
    }

    fn is_lost(&self, entry: &Entry) -> bool {
        entry.links().all(|link| self.bad_links.contains(&link)) && !self.needed.sources.contains_key(&entry.hash)
    }
}

fn add(ranges: &mut Vec<PageRange>, first: u64, count: u64) {
    match ranges.last_mut() {
        Some(last) if last.first + last.count == first => last.count += count,
        _ if count > 0 => ranges.push(PageRange { first, count }),
        _ => {}
    }
}
