//! Keeping together what a restore will read together.
//!
//! Done when a generation is committed, behind the guest's back: if its pages are spread over much more of the packs than they
//! take up, those in the emptiest segments are written once more, at the end. Nothing moves for other generations, and the new copies are
//! as durable as anything else before the ledger speaks of them. Since each generation was the newest one once and packs never change, the
//! bound that holds then holds for each of them, however many came before.

use std::collections::HashMap;

use crate::error::StoreError;
use crate::generation::PAGE_SIZE;
use crate::hash::Hash;
use crate::layout::{Layout, SegmentKey};
use crate::node::{Entry, Link, NodeRef, PAGE_UNIT};
use crate::pack::PackFile;
use crate::place::{PAGE_GAP, coalesce, hull};
use crate::radix::Change;
use crate::store::Store;
use crate::writer::Writer;

/// Bytes that may be copied for each byte that changed, in the long run: what uniformly scattered changes need at a spread of 110 per cent.
const COPIES: u64 = 4;
/// Most that one commit copies, if that is more than what it changes; no more credit is saved up.
const CREDIT_MAX: u64 = 64 << 20;
/// Segments that a generation fills at least before it is worth the trouble.
const SEGMENTS_MIN: u64 = 16;
/// Leaves looked at in one go.
const LEAVES: usize = 2048;

impl Writer {
    /// The layout of the parent, if the store still knows it.
    pub(crate) fn known_layout(store: &Store, parent: Option<&NodeRef>) -> Option<Layout> {
        let layout = store.layout().take()?;
        (store.inner.options.spread.is_some() && layout.of.is_some() && layout.of.as_ref() == parent).then_some(layout)
    }

    /// Has the generation lean on new copies of pages, where it would be spread too far else. Everything is folded by now.
    pub(crate) fn defragment(&mut self) -> Result<(), StoreError> {
        let Some(spread) = self.store.inner.options.spread else { return Ok(()) };
        let changed = std::mem::take(&mut self.changed_bytes);
        let known = self.layout.take().filter(|_| self.has_all_of_parent());
        // A damaged archive is for a scrub to tell of: what this generation changes is sound.
        let Some(mut layout) = known.or_else(|| self.survey().ok()) else { return Ok(()) };
        let earned = layout.credit.saturating_add(changed.saturating_mul(COPIES));
        layout.credit = earned.min(changed.max(CREDIT_MAX));
        let resume = self.state.ends.data;
        let before = layout.segment_at(resume.pack, resume.end);
        let chosen = if layout.live() < SEGMENTS_MIN * self.store.inner.options.segment_bytes {
            Vec::new()
        } else {
            layout.to_empty(u64::from(spread.get()), before)
        };
        for segment in chosen {
            let copied = self.empty(&mut layout, segment)?;
            layout.credit = layout.credit.saturating_sub(copied);
        }
        self.layout = Some(layout);
        self.fold()?;
        self.changed_bytes = 0;
        Ok(())
    }

    /// Whether every region of the parent is one of this generation.
    fn has_all_of_parent(&self) -> bool {
        let kept = |name: &String| self.drafts.iter().any(|draft| draft.region.name == *name);
        self.inherited.regions.iter().all(|region| kept(&region.name))
    }

    /// Where the generation lies, by looking at all of its archive: once after the store was opened, or if the parent is another one than
    /// the last one written.
    fn survey(&self) -> Result<Layout, StoreError> {
        let (options, archive) = (&self.store.inner.options, &self.store.inner.archive);
        let mut layout = Layout::new(options.segment_bytes);
        for draft in &self.drafts {
            let (number, mut from) = (layout.region(&draft.region.name), Some(0));
            while let Some(start) = from {
                let (leaves, until) = archive.leaves_from(&draft.region, start, LEAVES, options.threads)?;
                for (first, leaf) in archive.load_leaves(&leaves, options.threads)? {
                    for (page, entry) in (first..).zip(leaf.entries()) {
                        if let Some(entry) = entry {
                            layout.add((number, page), &entry.first);
                        }
                    }
                }
                from = until;
            }
        }
        Ok(layout)
    }

    /// Copies what the generation has in a segment. Returns how many bytes that took.
    fn empty(&mut self, layout: &mut Layout, segment: SegmentKey) -> Result<u64, StoreError> {
        let mut found = self.entries_in(layout, segment);
        found.sort_by_key(|(_, _, entry)| (entry.first.pack, entry.first.unit));
        if found.is_empty() {
            layout.give_up(segment);
        }
        let (mut copies, mut copied): (HashMap<Link, Link>, u64) = (HashMap::new(), 0);
        for read in coalesce(&found, PAGE_GAP, |(_, _, entry)| entry.first.place()) {
            copied += self.copy_together(&found[read], &mut copies)?;
        }
        for (draft, page, entry) in found {
            match copies.get(&entry.first) {
                Some(link) => self.drafts[draft].pending.push((page, Some(Entry { first: *link, ..entry }))),
                // A scrub will say so; the generation has nowhere else to lean on.
                None => layout.give_up(segment),
            }
        }
        Ok(copied)
    }

    /// The entries whose first backlink leads into a segment, with draft and page.
    fn entries_in(&self, layout: &Layout, segment: SegmentKey) -> Vec<(usize, u64, Entry)> {
        let number = |draft: &str| layout.regions().iter().position(|name| name == draft);
        let drafts: HashMap<usize, usize> =
            (0..).zip(&self.drafts).filter_map(|(index, draft)| Some((number(&draft.region.name)?, index))).collect();
        let mut found = Vec::new();
        for (region, page) in layout.pages(segment) {
            let Some(draft) = drafts.get(&usize::from(region)) else { continue };
            let entry = self.store.inner.archive.lookup(&self.drafts[*draft].region, page);
            let here = entry.ok().flatten().filter(|entry| layout.segment_of(&entry.first) == segment);
            found.extend(here.map(|entry| (*draft, page, entry)));
        }
        found
    }

    /// Copies pages that lie close together, as they are stored; only those that are whole. Returns how many bytes that took.
    fn copy_together(
        &mut self,
        found: &[(usize, u64, Entry)],
        copies: &mut HashMap<Link, Link>,
    ) -> Result<u64, StoreError> {
        let place = hull(found.iter().map(|(_, _, entry)| entry.first.place()));
        let mut buffer = Vec::new();
        if self.store.inner.packs.read_place(PackFile::Data, place, &mut buffer).is_err() {
            return Ok(0);
        }
        let (mut plain, mut copied) = ([0; PAGE_SIZE], 0);
        for (_, _, entry) in found {
            let link = entry.first;
            let start = (link.offset() - place.start) as usize;
            let stored = &buffer[start..start + usize::from(link.length)];
            if copies.contains_key(&link) || Store::check_copy(entry.hash, &link, stored, &mut plain).is_err() {
                continue;
            }
            copies.insert(link, self.append_copy(entry.hash, &link, stored)?);
            copied += u64::from(link.length);
        }
        Ok(copied)
    }

    /// Appends the stored bytes of a page once more.
    fn append_copy(&mut self, hash: Hash, link: &Link, stored: &[u8]) -> Result<Link, StoreError> {
        let align = if stored.len() == PAGE_SIZE { PAGE_SIZE as u64 } else { PAGE_UNIT };
        let (pack, offset) = self.data.append(stored, align)?;
        self.pages_stored += 1;
        let copy = Link { pack, unit: (offset / PAGE_UNIT) as u32, born: self.depth as u16, ..*link };
        self.dedup.insert(hash, copy);
        Ok(copy)
    }

    /// Tells the layout, if there is one, what becomes of pages of a draft.
    pub(crate) fn note_changes(&mut self, draft: usize, settled: &[Change]) -> Result<(), StoreError> {
        let region = &self.drafts[draft].region;
        let number = self.layout.as_mut().map(|layout| layout.region(&region.name));
        for (page, new) in settled {
            if let (Some(layout), Some(number)) = (&mut self.layout, number) {
                let old = self.store.inner.archive.lookup(region, *page)?;
                if old == *new {
                    continue;
                }
                old.iter().for_each(|entry| layout.remove(&entry.first));
                new.iter().for_each(|entry| layout.add((number, *page), &entry.first));
            }
            self.changed_bytes += new.map_or(0, |entry| u64::from(entry.first.length));
        }
        Ok(())
    }
}
