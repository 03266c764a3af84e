//! The end of a generation: redundancy, manifest, durability, the ledger's record.

use std::sync::PoisonError;

use vfs::cut::point::{Point, pass};

use super::Writer;
use crate::batch;
use crate::error::StoreError;
use crate::fault::seeded;
use crate::generation::{Generation, PAGE_SIZE};
use crate::ledger::State;
use crate::node::{Entry, Manifest, encode_manifest};
use crate::pack::{BLOCK, run_all, sync_dir};
use crate::radix::Grafter;
use crate::record::{Committed, Ends, Record};

impl Writer {
    /// Writes another copy of pages on which too many generations lean. Looks at one part of all leaves each time.
    fn add_redundancy(&mut self) -> Result<(), StoreError> {
        let Some(redundancy) = self.store.inner.options.redundancy else { return Ok(()) };
        let redundancy = redundancy.get().min(1 << 14);
        let (depth, period) = (self.depth, (redundancy / 2).max(1));
        for index in 0..self.drafts.len() {
            let region = self.drafts[index].region.clone();
            let mut due: Vec<(u64, Entry)> = Vec::new();
            self.store.inner.archive.leaves(&region, 0, &mut |first, leaf| {
                if (first / leaf.len() as u64) % u64::from(period) == u64::from(depth % period) {
                    due.extend((first..).zip(leaf).filter_map(|(page, entry)| {
                        let age = u32::from((depth as u16).wrapping_sub(entry.as_ref()?.first.born));
                        // Nobody looks again for `period` generations, so what would be too old by then is copied now.
                        (age + period > redundancy).then_some((page, (*entry)?))
                    }));
                }
                Ok(true)
            })?;
            for (page, entry) in due {
                if let Some(copied) = self.copy(&entry)? {
                    self.drafts[index].pending.push((page, Some(copied)));
                }
            }
        }
        self.fold()
    }

    /// Another copy of a page, or a younger one that is there already; `None` if no copy can be read.
    fn copy(&mut self, entry: &Entry) -> Result<Option<Entry>, StoreError> {
        let mut page = [0; PAGE_SIZE];
        let Ok(good) = self.store.read_entry(entry, &mut page) else { return Ok(None) };
        // The older backlink of the new entry is the copy that has just been read.
        let (old, depth) = (entry.links().nth(good), self.depth as u16);
        let young = |found: &Entry| found.first.born == depth && Some(found.first) != old;
        if let Some(found) = self.stored(entry.hash, &page).filter(young) {
            return Ok(Some(Entry { second: old, ..found }));
        }
        let encoded = batch::encode(&[&page], self.store.inner.options.compression, 1);
        // Never as one run with others: the empty slice says that there is none.
        let links = self.append(&[], &[&page], &encoded)?;
        Ok(links.first().map(|link| {
            self.dedup.insert(entry.hash, *link);
            Entry { hash: entry.hash, first: *link, second: old }
        }))
    }

    /// Makes the generation durable and part of the store. When this returns, a cut cannot take it away.
    ///
    /// # Errors
    /// [`StoreError::Io`]: the generation is not there, unless the ledger's own sync failed: then the store is poisoned and the next
    /// opening knows. [`StoreError::Damaged`] as in [`Writer::put`]. [`StoreError::Invalid`] for a manifest over 256 KiB.
    pub fn commit(mut self) -> Result<Generation, StoreError> {
        self.take_in_staged()?;
        self.fold()?;
        self.defragment()?;
        self.add_redundancy()?;
        let manifest = Manifest {
            regions: self.drafts.iter().map(|draft| draft.region.clone()).collect(),
            blobs: std::mem::take(&mut self.blobs),
        };
        let bytes = encode_manifest(&manifest).ok_or_else(|| {
            StoreError::invalid("too many regions and blobs, or too long names: the manifest is over 256 KiB")
        })?;
        pass(Point::GenerationDurable);
        let manifest_node = Grafter { archive: &self.store.inner.archive, nodes: &mut self.nodes }.write(&bytes)?;
        self.make_durable()?;
        let mut ends = Ends { data: self.data.end(), archive: self.nodes.end() };
        if seeded("the end of a pack is recorded one block short") {
            ends.data.end = ends.data.end.saturating_sub(BLOCK);
        }
        let info = Generation {
            id: self.id(),
            parent: self.parent.clone(),
            time_ms: self.new.time_ms,
            label: self.new.label.clone(),
            protected: self.new.protected,
            origin: self.new.origin,
            sequence: 0,
            depth: self.depth,
            logical_bytes: manifest.regions.iter().map(|region| region.size).fold(0, u64::saturating_add),
            pages_stored: self.pages_stored,
            page_bytes_stored: self.data.appended,
            archive_bytes_stored: self.nodes.appended,
        };
        let id = info.id.clone();
        let record = Record::Generation(Box::new(Committed { info, manifest: manifest_node, ends }));
        let mut state = std::mem::replace(&mut self.state, State::empty());
        pass(Point::GenerationCommit);
        if let Err((error, undone)) = self.store.record(&mut state, vec![record]) {
            // What the record refers to may be taken back only if the record is certainly not there.
            self.done = !undone;
            return Err(error);
        }
        pass(Point::GenerationDone);
        self.done = true;
        *self.store.layout() = self.layout.take().map(|layout| layout.committed(manifest_node));
        *self.store.inner.dedup.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut self.dedup);
        Ok(state.find(&id)?.info.clone())
    }

    /// All that the ledger's record will need, durable. Order: contents, then names.
    fn make_durable(&mut self) -> Result<(), StoreError> {
        self.data.seal()?;
        self.nodes.seal()?;
        let created = self.data.created() || self.nodes.created();
        let syncs = self.data.syncs().chain(self.nodes.syncs()).collect();
        run_all(syncs, self.store.inner.options.threads).inspect_err(|_| self.store.poison())?;
        if created {
            sync_dir(&*self.store.inner.vfs, &self.store.inner.packs.dir).inspect_err(|_| self.store.poison())?;
        }
        Ok(())
    }
}
