//! Verifying everything that is stored, copy by copy.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use vfs::ReadFrom;

use crate::codec::Codec;
use crate::diff::PageRange;
use crate::error::StoreError;
use crate::frame::{Malformed, crc};
use crate::generation::{GenerationId, PAGE_SIZE};
use crate::hash::Hash;
use crate::impact;
use crate::known::Known;
use crate::ledger::{FILES, State};
use crate::node::{Leaf, Link, Node, NodeRef};
use crate::pack::{BLOCK, MIRRORS, PackFile, check_header};
use crate::place::PAGE_GAP;
use crate::record::SLOT;
use crate::store::Store;
use crate::stream::{Read, Source};
use crate::walk::{ArchiveWalk, Checked};

/// Copies of pages gathered before they are sorted and read: bounds that part of a scrub's memory to some 100 MiB.
const BATCH: usize = 2 << 20;

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Archive nodes verified, in both mirrors.
    pub nodes: u64,
    /// Copies of pages verified.
    pub pages: u64,
    /// Bytes read.
    pub bytes: u64,
}

/// Something stored that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file, relative to the store.
    pub file: String,
    /// Where in it, in bytes.
    pub offset: u64,
    /// How many bytes the damaged record has.
    pub length: u64,
    /// What it is, and what is wrong.
    pub what: String,
    /// Whether a good copy exists, so that [`Store::repair`] heals it.
    pub healable: bool,
}

/// What is lost for good, unless a backup has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The generation that it hurts.
    pub generation: GenerationId,
    /// The region; `None` if it is the manifest (then nothing of the generation can be read) or a blob.
    pub region: Option<String>,
    /// The pages. Those behind a lost node of the archive count as lost, zero or not.
    pub pages: Vec<PageRange>,
    /// In words.
    pub what: String,
}

/// What a scrub found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScrubReport {
    /// What was verified.
    pub verified: Progress,
    /// Every damaged copy.
    pub damage: Vec<Damage>,
    /// What has no good copy, generation by generation.
    pub lost: Vec<Lost>,
    /// Records of the ledger that neither copy has: generations that were committed and of which nothing more is known.
    pub lost_records: u64,
}

impl ScrubReport {
    /// Whether everything is as it should be.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damage.is_empty() && self.lost.is_empty() && self.lost_records == 0
    }
}

/// A damaged copy of a node.
#[derive(Debug, Clone)]
pub(crate) struct BadNode {
    pub(crate) mirror: PackFile,
    pub(crate) node: NodeRef,
    why: Malformed,
}

/// A damaged copy of a page.
#[derive(Debug, Clone)]
pub(crate) struct BadPage {
    pub(crate) link: Link,
    pub(crate) hash: Hash,
    why: Malformed,
}

/// Everything that a scrub found, for the report and for the repair.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) verified: Progress,
    pub(crate) nodes: Vec<BadNode>,
    pub(crate) pages: Vec<BadPage>,
    /// Packs whose header block is damaged.
    pub(crate) headers: Vec<(PackFile, u32, Malformed)>,
    /// Copies that are to be read.
    gathered: Vec<(Link, Hash)>,
    known: Known,
    packs: HashSet<(PackFile, u32)>,
}

impl Findings {
    /// Nodes that no mirror has.
    pub(crate) fn lost_nodes(&self) -> HashSet<NodeRef> {
        let in_mirror = |mirror| -> HashSet<NodeRef> {
            self.nodes.iter().filter(|bad| bad.mirror == mirror).map(|bad| bad.node).collect()
        };
        in_mirror(MIRRORS[0]).intersection(&in_mirror(MIRRORS[1])).copied().collect()
    }

    /// What became of nodes.
    fn note(&mut self, nodes: Vec<Checked>) {
        for Checked { node, found, bad } in nodes {
            self.packs.extend(MIRRORS.iter().map(|mirror| (*mirror, node.pack)));
            self.verified.nodes += 1;
            self.verified.bytes += u64::from(node.length) * MIRRORS.len() as u64;
            self.nodes.extend(bad.into_iter().map(|(mirror, why)| BadNode { mirror, node, why }));
            if let Some(Node::Leaf(leaf)) = found {
                self.gather(&leaf);
            }
        }
    }

    /// Has the copies of a leaf's pages read, unless they were gathered before. One place with two meanings is read for both.
    fn gather(&mut self, leaf: &Leaf) {
        for (link, hash) in leaf.iter().flatten().flat_map(|entry| entry.links().map(|link| (link, entry.hash))) {
            if self.known.insert(&link, hash) {
                self.gathered.push((link, hash));
            }
        }
    }

    /// Copies of pages that are bad.
    pub(crate) fn bad_links(&self) -> HashSet<Link> {
        self.pages.iter().map(|bad| bad.link).collect()
    }
}

impl Store {
    /// Reads and verifies everything that generations need: both ledgers, both mirrors of the archive, every copy of every page.
    /// Writers go on meanwhile. `progress` hears how far it is.
    ///
    /// Each node and each page is read once, past the page cache where the file system can; what looks damaged is read once more. Takes some
    /// 130 MiB of memory at most for what is under way, and to know what was read 20 to 60 bytes for each stored page (of 4 KiB) and 10 to
    /// 30 for each node of the archive (about as many): in all some 1.5 per cent of a large store that is not compressed.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::NotAStore`] if the ledger cannot be read. Damage is no error: it is in the report.
    pub fn scrub(&self, progress: &mut dyn FnMut(Progress)) -> Result<ScrubReport, StoreError> {
        let state = self.inner.ledger.load()?;
        let findings = self.find(&state, progress);
        // Without a lock: what looks damaged may have been purged and swept meanwhile. Then no generation is left that needs it.
        let now =
            if findings.nodes.is_empty() && findings.pages.is_empty() { state } else { self.inner.ledger.load()? };
        Ok(self.report(&now, &findings))
    }

    /// Verifies everything.
    pub(crate) fn find(&self, state: &State, progress: &mut dyn FnMut(Progress)) -> Findings {
        let mut findings = Findings::default();
        let manifests = state.newest_first().iter().map(|committed| committed.manifest).collect();
        let mut walk = ArchiveWalk::new(&self.inner.archive, self.inner.options.threads, manifests);
        let mut checked = walk.next();
        while let Some(nodes) = checked {
            checked = walk.next_beside(|| findings.note(nodes));
            if findings.gathered.len() >= BATCH {
                self.check_pages(&mut findings, progress);
            }
            progress(findings.verified);
        }
        self.check_pages(&mut findings, progress);
        self.check_headers(state, &mut findings);
        progress(findings.verified);
        findings
    }

    /// Verifies what was gathered, in the order in which it lies.
    fn check_pages(&self, findings: &mut Findings, progress: &mut dyn FnMut(Progress)) {
        let mut copies = std::mem::take(&mut findings.gathered);
        copies.sort_unstable_by_key(|(link, _)| (link.pack, link.unit));
        findings.packs.extend(copies.iter().map(|(link, _)| (PackFile::Data, link.pack)));
        let (bytes, pages) = (AtomicU64::new(0), AtomicU64::new(0));
        let bad: Mutex<Vec<BadPage>> = Mutex::default();
        let source = Source {
            packs: &self.inner.packs,
            file: PackFile::Data,
            from: ReadFrom::Medium,
            gap: PAGE_GAP,
            sorted: &copies,
            place: |(link, _): &(Link, Hash)| link.place(),
            stop: &AtomicBool::new(false),
        };
        let verify = |read: Read<'_, (Link, Hash)>| {
            let found = self.check_read(read.items, read.bytes, read.count.is_some());
            bytes.fetch_add(read.bytes.len() as u64, Ordering::Relaxed);
            pages.fetch_add(read.items.len() as u64, Ordering::Relaxed);
            bad.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
        };
        let before = findings.verified;
        source.stream(self.inner.options.threads, &verify, &mut || {
            let (bytes, pages) = (bytes.load(Ordering::Relaxed), pages.load(Ordering::Relaxed));
            progress(Progress { nodes: before.nodes, pages: before.pages + pages, bytes: before.bytes + bytes });
        });
        findings.verified.pages += pages.into_inner();
        findings.verified.bytes += bytes.into_inner();
        findings.pages.extend(bad.into_inner().unwrap_or_else(PoisonError::into_inner));
    }

    /// Verifies copies that were read together. Returns the bad ones.
    fn check_read(&self, copies: &[(Link, Hash)], buffer: &[u8], whole: bool) -> Vec<BadPage> {
        let start = copies[0].0.offset();
        let mut page = [0; PAGE_SIZE];
        let mut bad = Vec::new();
        let stored = |link: &Link| {
            let at = (link.offset() - start) as usize;
            &buffer[at..at + usize::from(link.length)]
        };
        let raw = copies.iter().filter(|(link, _)| link.codec == Codec::Raw).map(|(link, _)| stored(link));
        let mut hashes = Hash::of_pages(raw).into_iter();
        for (link, hash) in copies {
            let good = match link.codec {
                Codec::Raw => hashes.next() == Some(*hash) && crc(stored(link)) == link.crc,
                Codec::Lz4 | Codec::Zstd => Self::check_copy(*hash, link, stored(link), &mut page).is_ok(),
            };
            let good = good && whole;
            // Once more alone: it may be a neighbour that cannot be read, or a file that was replaced.
            if !good && let Err(why) = self.read_copy(*hash, link, &mut page) {
                bad.push(BadPage { link: *link, hash: *hash, why });
            }
        }
        bad
    }

    fn check_headers(&self, state: &State, findings: &mut Findings) {
        let mut header = vec![0; BLOCK as usize];
        let mut packs: Vec<_> = findings.packs.iter().copied().collect();
        packs.sort_unstable();
        for (file, pack) in packs {
            self.inner.packs.forget(file, pack);
            let read = self.inner.packs.read_some(file, pack, 0, &mut header);
            let checked = match read {
                Ok(_) => check_header(&header, state.store, file == PackFile::Data, pack),
                Err(_) => Err(Malformed("it is missing or cannot be read")),
            };
            findings.headers.extend(checked.err().map(|why| (file, pack, why)));
        }
    }

    /// What the findings mean for the generations of `state`.
    pub(crate) fn report(&self, state: &State, findings: &Findings) -> ScrubReport {
        let mut report =
            ScrubReport { verified: findings.verified, lost_records: state.lost, ..ScrubReport::default() };
        for bad in &state.bad {
            // An append that was cut off is in neither copy and was never committed: no damage.
            if bad.healable {
                report.damage.push(Damage {
                    file: FILES[bad.file].to_owned(),
                    offset: bad.slot * SLOT as u64,
                    length: SLOT as u64,
                    what: "a record of the ledger is damaged".to_owned(),
                    healable: true,
                });
            }
        }
        let needed = impact::Needed::of(&self.inner.archive, state, findings);
        for (file, pack, why) in &findings.headers {
            report.damage.push(damage(*file, *pack, 0..BLOCK, format!("the header of a pack: {why}"), true));
        }
        let lost = findings.lost_nodes();
        for bad in findings.nodes.iter().filter(|bad| needed.nodes.contains(&bad.node)) {
            let range = bad.node.offset()..bad.node.offset() + u64::from(bad.node.length);
            let what = format!("a node of the archive: {}", bad.why);
            report.damage.push(damage(bad.mirror, bad.node.pack, range, what, !lost.contains(&bad.node)));
        }
        for bad in findings.pages.iter().filter(|bad| needed.links.contains(&bad.link)) {
            let healable = needed.sources.contains_key(&bad.hash);
            let range = bad.link.offset()..bad.link.end();
            report.damage.push(damage(PackFile::Data, bad.link.pack, range, format!("a page: {}", bad.why), healable));
        }
        report.lost = needed.lost;
        report
    }
}

fn damage(file: PackFile, pack: u32, range: Range<u64>, what: String, healable: bool) -> Damage {
    let (offset, length) = (range.start, range.end - range.start);
    Damage { file: format!("packs/{}", file.name(pack)), offset, length, what, healable }
}
