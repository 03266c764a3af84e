//! Where the pages of one generation lie, counted by segments of the data packs; derived from the archive, never stored.
//!
//! A restore reads whole stretches of packs, so what it takes depends on how much of them is still the generation's. Generations
//! that change pages here and there leave holes everywhere: in the end a restore reads twice what it needs, and more. So a writer looks
//! here for the emptiest segments and has its generation lean on new copies of what is left in them
//! (segment cleaning: Rosenblum and Ousterhout, The Design and Implementation of a Log-Structured File System, 1991; here the old
//! copies stay where they are, for older generations).

use std::collections::{BTreeMap, BTreeSet};

use crate::node::{Link, NodeRef};

/// Which part of which pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SegmentKey {
    pack: u32,
    index: u64,
}

/// A page of a region, the region by its number in the layout.
pub(crate) type PageKey = (u16, u64);

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    region: u16,
    first: u64,
    count: u32,
}

#[derive(Debug, Default)]
struct Segment {
    /// Bytes that pages of the generation refer to; more than there are, where several refer to the same.
    live: u64,
    /// Bytes up to the end of the last page that ever was referred to.
    extent: u64,
    /// The pages that do, and some that did.
    runs: Vec<Run>,
    /// Runs at which to look for repeated ones.
    crowded: usize,
    /// Not to be emptied: that was tried, and something in it cannot be read.
    stuck: bool,
}

/// Where one generation lies.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The manifest of the generation; `None` while a writer changes it.
    pub(crate) of: Option<NodeRef>,
    /// Bytes that may be copied: earned by bytes that changed.
    pub(crate) credit: u64,
    segment_bytes: u64,
    regions: Vec<String>,
    segments: BTreeMap<SegmentKey, Segment>,
    /// By how much is alive: those that may be emptied.
    emptiest: BTreeSet<(u64, SegmentKey)>,
    /// Bytes alive, none counted twice beyond what a segment holds.
    live: u64,
    /// Bytes of the segments over which that is spread.
    span: u64,
}

/// How far below its bound the span is brought: by this part of what is alive, at most by so many bytes.
const SLACK: u64 = 64;
const SLACK_MAX: u64 = 16 << 20;
/// Runs of a segment that are always fine.
const RUNS_MIN: usize = 256;

impl Layout {
    pub(crate) fn new(segment_bytes: u64) -> Self {
        Self {
            of: None,
            credit: 0,
            segment_bytes,
            regions: Vec::new(),
            segments: BTreeMap::new(),
            emptiest: BTreeSet::new(),
            live: 0,
            span: 0,
        }
    }

    /// The same, of a generation that is committed now.
    pub(crate) fn committed(self, manifest: NodeRef) -> Self {
        Self { of: Some(manifest), ..self }
    }

    /// The number of a region.
    pub(crate) fn region(&mut self, name: &str) -> u16 {
        let known = self.regions.iter().position(|region| region == name);
        let number = known.unwrap_or_else(|| {
            self.regions.push(name.to_owned());
            self.regions.len() - 1
        });
        number as u16
    }

    /// The regions by number.
    pub(crate) fn regions(&self) -> &[String] {
        &self.regions
    }

    /// The segment in which a stored page begins.
    pub(crate) fn segment_of(&self, link: &Link) -> SegmentKey {
        self.segment_at(link.pack, link.offset())
    }

    /// The segment of an offset in a pack.
    pub(crate) fn segment_at(&self, pack: u32, offset: u64) -> SegmentKey {
        SegmentKey { pack, index: offset / self.segment_bytes }
    }

    /// A page refers to `link` from now on.
    pub(crate) fn add(&mut self, (region, page): PageKey, link: &Link) {
        let key = self.segment_of(link);
        let end = link.end() - key.index * self.segment_bytes;
        self.change(key, |segment| {
            segment.live += u64::from(link.length);
            segment.extent = segment.extent.max(end);
            match segment.runs.last_mut() {
                Some(run)
                    if run.region == region && run.first + u64::from(run.count) == page && run.count < u32::MAX =>
                {
                    run.count += 1;
                }
                _ => segment.note(Run { region, first: page, count: 1 }),
            }
        });
    }

    /// A page does not refer to `link` any more.
    pub(crate) fn remove(&mut self, link: &Link) {
        self.change(self.segment_of(link), |segment| {
            segment.live = segment.live.saturating_sub(u64::from(link.length));
        });
    }

    fn change(&mut self, key: SegmentKey, change: impl FnOnce(&mut Segment)) {
        let segment = self.segments.entry(key).or_default();
        self.emptiest.remove(&(segment.live, key));
        self.live -= segment.live.min(segment.extent);
        self.span -= segment.extent;
        change(segment);
        if segment.live == 0 {
            self.segments.remove(&key);
            return;
        }
        self.live += segment.live.min(segment.extent);
        self.span += segment.extent;
        if !segment.stuck {
            self.emptiest.insert((segment.live, key));
        }
    }

    /// Bytes of pages that the generation consists of.
    pub(crate) fn live(&self) -> u64 {
        self.live
    }

    /// The emptiest segments before `before`, if the span is more than `spread` per cent of what is alive: so many that with what is in
    /// them put together it is a good deal less, as far as `credit` goes.
    pub(crate) fn to_empty(&self, spread: u64, before: SegmentKey) -> Vec<SegmentKey> {
        let allowed = u64::try_from(u128::from(self.live) * u128::from(spread) / 100).unwrap_or(u64::MAX);
        if self.span <= allowed {
            return Vec::new();
        }
        // More at a time, and then nothing for a while: pages of one leaf of the archive that are copied together cost one new leaf.
        let (mut excess, mut credit) = (self.span - allowed + (self.live / SLACK).min(SLACK_MAX), self.credit);
        let mut chosen = Vec::new();
        for (live, key) in self.emptiest.iter().filter(|(_, key)| *key < before) {
            if excess == 0 || *live > credit {
                break;
            }
            let gain = self.segments.get(key).map_or(0, |segment| segment.extent.saturating_sub(*live));
            if gain == 0 {
                continue;
            }
            (excess, credit) = (excess.saturating_sub(gain), credit - live);
            chosen.push(*key);
        }
        chosen
    }

    /// The pages that refer to a segment, and some that did, sorted.
    pub(crate) fn pages(&self, key: SegmentKey) -> Vec<PageKey> {
        let runs = self.segments.get(&key).map(|segment| segment.runs.as_slice()).unwrap_or_default();
        let pages =
            runs.iter().flat_map(|run| (run.first..run.first + u64::from(run.count)).map(|page| (run.region, page)));
        let mut pages: Vec<PageKey> = pages.collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// A segment that could not be emptied is not chosen again.
    pub(crate) fn give_up(&mut self, key: SegmentKey) {
        if let Some(segment) = self.segments.get_mut(&key) {
            segment.stuck = true;
            self.emptiest.remove(&(segment.live, key));
        }
    }
}

impl Segment {
    /// Notes pages. A page that comes and goes is noted once in the end.
    fn note(&mut self, run: Run) {
        if self.runs.len() >= self.crowded.max(RUNS_MIN) {
            self.runs.sort_unstable();
            self.runs.dedup();
            self.crowded = self.runs.len() * 2;
        }
        self.runs.push(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;

    const SEGMENT: u64 = 4 * 4096;

    fn link(pack: u32, page: u64) -> Link {
        Link { pack, unit: (page * 32) as u32, length: 4096, codec: Codec::Raw, born: 0, crc: 0 }
    }

    /// 32 pages, in eight segments of pack 1.
    fn dense() -> Layout {
        let mut layout = Layout::new(SEGMENT);
        let region = layout.region("ram");
        (0..32).for_each(|page| layout.add((region, page), &link(1, page)));
        layout
    }

    fn end(layout: &Layout) -> SegmentKey {
        layout.segment_at(9, 0)
    }

    #[test]
    fn what_lies_together_is_left_alone() {
        let mut layout = dense();
        layout.credit = 1 << 30;
        assert_eq!((layout.span, layout.live()), (32 * 4096, 32 * 4096));
        assert!(layout.to_empty(100, end(&layout)).is_empty());
    }

    #[test]
    fn the_emptiest_segments_go_first_and_only_as_many_as_it_takes_and_credit_allows() {
        let mut layout = dense();
        // Three of four pages of segment 5 move, and one of each other one.
        let moved = [20, 21, 22, 0, 4, 8, 12, 16, 24, 28];
        for (index, page) in (0..).zip(moved) {
            layout.remove(&link(1, page));
            layout.add((0, page), &link(2, index));
        }
        layout.credit = 1 << 30;
        assert_eq!(layout.span, 8 * SEGMENT + 10 * 4096);
        let emptiest = layout.segment_of(&link(1, 23));
        assert_eq!(layout.to_empty(130, end(&layout)), [emptiest]);
        assert_eq!(layout.pages(emptiest), [(0, 20), (0, 21), (0, 22), (0, 23)]);
        assert_eq!(layout.to_empty(100, layout.segment_at(1, 0)), []);
        assert!(layout.to_empty(100, end(&layout)).len() > 3);
        layout.credit = 4096 + 3 * 4096;
        assert_eq!(layout.to_empty(100, end(&layout)).len(), 2);
        layout.give_up(emptiest);
        assert!(!layout.to_empty(100, end(&layout)).contains(&emptiest));
    }

    #[test]
    fn a_segment_that_nothing_refers_to_is_forgotten() {
        let mut layout = dense();
        for page in 8..12 {
            layout.remove(&link(1, page));
        }
        assert_eq!(layout.span, 7 * SEGMENT);
        assert!(layout.pages(layout.segment_of(&link(1, 8))).is_empty());
    }

    #[test]
    fn pages_that_come_and_go_do_not_fill_the_memory() {
        let mut layout = dense();
        for round in 0..100_000 {
            let page = 100 + round % 3 * 2;
            layout.add((0, page), &link(1, 1));
            layout.remove(&link(1, 1));
        }
        let key = layout.segment_of(&link(1, 1));
        assert!(layout.segments[&key].runs.len() <= 2 * RUNS_MIN);
        assert_eq!(layout.live(), 32 * 4096);
    }
}
