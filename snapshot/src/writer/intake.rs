//! Pages on their way into the archive: what is new is stored, what is there already is found.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use super::{RegionKey, Writer};
use crate::batch::{self, Identity};
use crate::codec::decode;
use crate::error::StoreError;
use crate::generation::PAGE_SIZE;
use crate::hash::Hash;
use crate::mark::Distinct;
use crate::node::{Entry, Link, PAGE_UNIT};
use crate::radix::{Change, Grafter};

/// Changes held in memory before they are worked into the archive: some 64 MiB.
const PENDING_MAX: usize = 1 << 20;

impl Writer {
    pub(super) fn take_in_staged(&mut self) -> Result<(), StoreError> {
        let (mut staged, mut places) = (std::mem::take(&mut self.staged), std::mem::take(&mut self.places));
        let taken = if places.is_empty() { Ok(()) } else { self.take_in(&staged, &places) };
        staged.clear();
        places.clear();
        (self.staged, self.places) = (staged, places);
        taken
    }

    /// Stores what is new in `data` and notes what became of every page.
    pub(super) fn take_in(&mut self, data: &[u8], places: &[(RegionKey, u64)]) -> Result<(), StoreError> {
        let options = &self.store.inner.options;
        let (threads, compression) = (options.threads, options.compression);
        let identities = batch::identify(data, threads);
        let page = |index: usize| &data[index * PAGE_SIZE..(index + 1) * PAGE_SIZE];
        let mut entries: Vec<Option<Entry>> = Vec::with_capacity(places.len());
        let mut fresh: Vec<usize> = Vec::new();
        let mut equal: Vec<(usize, usize)> = Vec::new();
        let mut seen: HashMap<Hash, usize> = HashMap::new();
        for (index, (identity, (region, number))) in identities.iter().zip(places).enumerate() {
            let Identity::Content(hash) = *identity else {
                entries.push(None);
                continue;
            };
            let known = match self.parents(*region, *number, hash)? {
                Some(entry) => Some(entry),
                None => self.stored(hash, page(index)),
            };
            entries.push(known);
            if known.is_none() {
                match seen.entry(hash) {
                    Slot::Occupied(first) if page(*first.get()) == page(index) => equal.push((index, *first.get())),
                    Slot::Occupied(_) => fresh.push(index),
                    Slot::Vacant(vacant) => {
                        vacant.insert(index);
                        fresh.push(index);
                    }
                }
            }
        }
        let pages: Vec<&[u8]> = fresh.iter().map(|index| page(*index)).collect();
        let encoded = batch::encode(&pages, compression, threads);
        let links = self.append(data, &pages, &encoded)?;
        for (index, link) in fresh.iter().zip(links) {
            let Identity::Content(hash) = identities[*index] else { continue };
            self.dedup.insert(hash, link);
            entries[*index] = Some(Entry { hash, first: link, second: None });
        }
        for (index, first) in equal {
            entries[index] = entries[first];
        }
        for ((region, page), entry) in places.iter().zip(entries) {
            self.drafts[usize::from(region.0)].pending.push((*page, entry));
        }
        self.fold_if_many()
    }

    /// Appends pages that are new; raw ones as one run where all of `data` is new.
    pub(super) fn append(
        &mut self,
        data: &[u8],
        pages: &[&[u8]],
        encoded: &[batch::Encoded],
    ) -> Result<Vec<Link>, StoreError> {
        let born = self.depth as u16;
        let link = |pack, offset: u64, length: usize, page: &batch::Encoded| Link {
            pack,
            unit: (offset / PAGE_UNIT) as u32,
            length: length as u16,
            codec: page.codec,
            born,
            crc: page.crc,
        };
        self.pages_stored += pages.len() as u64;
        let all_raw = encoded.iter().all(|page| page.bytes.is_empty());
        if all_raw && pages.len() * PAGE_SIZE == data.len() && !data.is_empty() {
            let (pack, start) = self.data.append_blocks(data)?;
            let offsets = (start..).step_by(PAGE_SIZE);
            return Ok(offsets.zip(encoded).map(|(offset, page)| link(pack, offset, PAGE_SIZE, page)).collect());
        }
        let mut links = Vec::with_capacity(pages.len());
        for (page, encoded) in pages.iter().zip(encoded) {
            let (bytes, align) =
                if encoded.bytes.is_empty() { (*page, PAGE_SIZE as u64) } else { (&encoded.bytes[..], PAGE_UNIT) };
            let (pack, offset) = self.data.append(bytes, align)?;
            links.push(link(pack, offset, bytes.len(), encoded));
        }
        Ok(links)
    }

    /// The entry of the same page in what this generation builds on, if it has this content.
    fn parents(&self, region: RegionKey, page: u64, hash: Hash) -> Result<Option<Entry>, StoreError> {
        let region = &self.drafts[usize::from(region.0)].region;
        if region.root.is_none() {
            return Ok(None);
        }
        Ok(self.store.inner.archive.lookup(region, page)?.filter(|entry| entry.hash == hash))
    }

    /// Content of which the store has a good copy elsewhere. The hash finds it, the bytes decide.
    pub(super) fn stored(&mut self, hash: Hash, page: &[u8]) -> Option<Entry> {
        if !self.dedup.primed {
            self.prime();
        }
        let link = self.dedup.get(hash)?;
        let mut bytes = [0; PAGE_SIZE];
        let stored = &mut bytes[..usize::from(link.length)];
        self.data.read(link.pack, link.offset(), stored).ok()?;
        let same = match link.codec {
            crate::codec::Codec::Raw => stored == page,
            codec => {
                let mut plain = [0; PAGE_SIZE];
                decode(codec, stored, &mut plain).is_ok() && plain == *page
            }
        };
        let sound = same && crate::frame::crc(&bytes[..usize::from(link.length)]) == link.crc;
        sound.then_some(Entry { hash, first: link, second: None })
    }

    /// Fills the index from the archive, newest generations first, until it is full. Once after the store was opened.
    fn prime(&mut self) {
        self.dedup.primed = true;
        let mut distinct = Distinct::default();
        for committed in self.state.newest_first() {
            if self.dedup.is_full() {
                return;
            }
            // What cannot be read is not found: its content will be stored anew.
            let dedup = &mut self.dedup;
            distinct.entries(&self.store.inner.archive, &committed.manifest, &mut |entry| {
                if dedup.get(entry.hash).is_none() {
                    dedup.insert(entry.hash, entry.first);
                }
                !dedup.is_full()
            });
        }
    }

    pub(super) fn fold_if_many(&mut self) -> Result<(), StoreError> {
        let pending: usize = self.drafts.iter().map(|draft| draft.pending.len()).sum();
        if pending < PENDING_MAX { Ok(()) } else { self.fold() }
    }

    /// Works what is pending into the archive.
    pub(crate) fn fold(&mut self) -> Result<(), StoreError> {
        for index in 0..self.drafts.len() {
            let mut changes = std::mem::take(&mut self.drafts[index].pending);
            // Stable, so that the last of several changes of one page stays last.
            changes.sort_by_key(|(page, _)| *page);
            let mut settled: Vec<Change> = Vec::with_capacity(changes.len());
            for change in changes {
                match settled.last_mut() {
                    Some(last) if last.0 == change.0 => *last = change,
                    _ => settled.push(change),
                }
            }
            self.note_changes(index, &settled)?;
            let mut grafter = Grafter { archive: &self.store.inner.archive, nodes: &mut self.nodes };
            grafter.apply(&mut self.drafts[index].region, &settled)?;
            self.nodes.publish()?;
        }
        Ok(())
    }
}
