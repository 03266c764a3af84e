//! Every node that generations reach, verified in both mirrors of the archive in one pass from its end to its beginning.
//!
//! A node is written after those that it refers to, so it lies behind them. Going backwards, all that refer to a node have been met before
//! it comes up: each part of the archive is read once, in large pieces, each node is looked at once, and what must be remembered is
//! what newer generations want of older parts, about as much as one generation has. (A walk from the roots downwards, level by level,
//! reads the whole archive for each level.)

use std::collections::{BTreeMap, HashSet};

use vfs::{IoBuffer, ReadFrom};

use crate::archive::Archive;
use crate::frame::Malformed;
use crate::mark::manifest_children;
use crate::node::{Node, NodeRef, verify};
use crate::pack::{BLOCK, MIRRORS, PackFile};
use crate::place::Place;

/// Bytes of each mirror that are read at once: whole blocks around them fit in four huge pages.
const WINDOW: u64 = (8 << 20) - 2 * BLOCK;
/// Most nodes that are held parsed: some 10 MiB.
const NODES: usize = 4096;
/// Fewer nodes are not worth a thread.
const SHARE_MIN: usize = 64;

/// What became of one node.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) node: NodeRef,
    /// The node, if a mirror has it whole.
    pub(crate) found: Option<Node>,
    /// The mirrors that do not.
    pub(crate) bad: Vec<(PackFile, Malformed)>,
}

/// A part of an archive pack, as each mirror has it.
struct Window {
    place: Place,
    /// Where in a buffer it begins; `None` where nothing could be read.
    mirrors: Vec<(Option<IoBuffer>, usize)>,
}

/// The walk.
pub(crate) struct ArchiveWalk<'a> {
    archive: &'a Archive,
    threads: usize,
    /// Nodes to be verified, by pack and offset.
    pending: BTreeMap<(u32, u64), NodeRef>,
    /// Where nodes lie that are or were pending.
    seen: HashSet<(u32, u32)>,
    window: Window,
}

impl<'a> ArchiveWalk<'a> {
    pub(crate) fn new(archive: &'a Archive, threads: usize, roots: Vec<NodeRef>) -> Self {
        let nowhere = Place { pack: 0, start: 0, end: 0 };
        let window = Window { place: nowhere, mirrors: MIRRORS.iter().map(|_| (None, 0)).collect() };
        let mut walk = Self { archive, threads, pending: BTreeMap::new(), seen: HashSet::new(), window };
        walk.want(roots);
        walk
    }

    /// The next nodes; `None` when all have been verified.
    pub(crate) fn next(&mut self) -> Option<Vec<Checked>> {
        let mut nodes = self.within();
        if nodes.is_empty() {
            let last = self.pending.last_key_value()?.1.place();
            self.window.read(self.archive, Place { start: last.end.saturating_sub(WINDOW), ..last }, self.threads);
            nodes = self.within();
        }
        let checked = self.check(&nodes);
        for node in checked.iter().filter_map(|checked| checked.found.as_ref()) {
            match node {
                Node::Inner { children, .. } => self.want(children.iter().flatten().copied()),
                Node::Manifest(manifest) => self.want(manifest_children(manifest)),
                Node::Leaf(_) | Node::Blob(_) => {}
            }
        }
        Some(checked)
    }

    /// The same, while this thread does something else, if there may be threads.
    pub(crate) fn next_beside(&mut self, work: impl FnOnce()) -> Option<Vec<Checked>> {
        if self.threads < 2 {
            work();
            return self.next();
        }
        std::thread::scope(|scope| {
            let next = scope.spawn(|| self.next());
            work();
            next.join().unwrap_or_else(|died| std::panic::resume_unwind(died))
        })
    }

    fn want(&mut self, nodes: impl IntoIterator<Item = NodeRef>) {
        for node in nodes {
            if self.seen.insert((node.pack, node.unit)) {
                self.pending.insert((node.pack, node.offset()), node);
            }
        }
    }

    /// Takes nodes that begin in the window, the last ones. The last one pending does, once the window was read for it.
    fn within(&mut self) -> Vec<NodeRef> {
        let Place { pack, start, end } = self.window.place;
        let mut here = self.pending.split_off(&(pack, start));
        let mut beyond = here.split_off(&(pack, end));
        self.pending.append(&mut beyond);
        let later = here.len().saturating_sub(NODES);
        let taken = here.iter().nth(later).map(|(at, _)| *at).map(|at| here.split_off(&at)).unwrap_or_default();
        self.pending.append(&mut here);
        taken.into_values().collect()
    }

    /// Verifies nodes of the window in both mirrors.
    fn check(&self, nodes: &[NodeRef]) -> Vec<Checked> {
        let share = nodes.len().div_ceil(self.threads.max(1)).max(SHARE_MIN);
        let check = |nodes: &[NodeRef]| nodes.iter().map(|node| self.check_one(node)).collect::<Vec<_>>();
        if nodes.len() <= share {
            return check(nodes);
        }
        std::thread::scope(|scope| {
            let check = &check;
            let threads: Vec<_> = nodes.chunks(share).map(|share| (share, scope.spawn(move || check(share)))).collect();
            // A thread that died verified nothing: what it had is verified here.
            threads.into_iter().flat_map(|(share, thread)| thread.join().unwrap_or_else(|_| check(share))).collect()
        })
    }

    fn check_one(&self, node: &NodeRef) -> Checked {
        let mut checked = Checked { node: *node, found: None, bad: Vec::new() };
        let mut good: Option<&[u8]> = None;
        for (index, mirror) in MIRRORS.iter().enumerate() {
            let bytes = self.window.bytes(index, node);
            if bytes.is_some() && bytes == good {
                continue;
            }
            match bytes.and_then(|bytes| verify(node, bytes).ok()) {
                Some(found) => (checked.found, good) = (Some(found), bytes),
                // Once more alone: it may be a neighbour that cannot be read, or a file that was replaced.
                None => match self.archive.fetch_from(*mirror, node) {
                    Ok(found) => checked.found = Some(found),
                    Err(why) => checked.bad.push((*mirror, why)),
                },
            }
        }
        checked
    }
}

impl Window {
    fn read(&mut self, archive: &Archive, place: Place, threads: usize) {
        self.place = place;
        let read = |mirror: PackFile, (buffer, skip): &mut (Option<IoBuffer>, usize)| {
            let found = archive.packs().read_large(mirror, place, ReadFrom::Medium, buffer);
            match found {
                Ok((start, _)) => *skip = start,
                Err(_) => *buffer = None,
            }
        };
        let mirrors = MIRRORS.iter().zip(&mut self.mirrors);
        if threads < 2 {
            return mirrors.for_each(|(mirror, into)| read(*mirror, into));
        }
        std::thread::scope(|scope| {
            for (mirror, into) in mirrors {
                scope.spawn(move || read(*mirror, into));
            }
        });
    }

    /// What a mirror has where `node` should lie; `None` if that was not read.
    fn bytes(&self, mirror: usize, node: &NodeRef) -> Option<&[u8]> {
        let (buffer, skip) = self.mirrors.get(mirror)?;
        let from = usize::try_from(node.offset().checked_sub(self.place.start)?).ok()? + skip;
        let length = usize::try_from(self.place.end - self.place.start).ok()?;
        let to = from.checked_add(node.length as usize).filter(|to| *to <= length + skip)?;
        buffer.as_ref()?.get(from..to)
    }
}
