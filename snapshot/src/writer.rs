//! Adding a generation.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::{Arc, PoisonError};

use vfs::cut::point::{Point, pass};

use crate::batch::{self, Identity};
use crate::codec::decode;
use crate::dedup::DedupIndex;
use crate::error::StoreError;
use crate::fault::seeded;
use crate::generation::{
    BLOB_MAX, BLOBS_MAX, Generation, GenerationId, KIND_MAX, NewGeneration, PAGE_SIZE, Page, Parent, REGION_MAX,
    REGIONS_MAX, RegionSpec, check_label, check_name, pages_of,
};
use crate::hash::Hash;
use crate::layout::Layout;
use crate::ledger::State;
use crate::mark::Distinct;
use crate::node::{
    BLOB_PIECE, Entry, Link, Manifest, ManifestBlob, ManifestRegion, PAGE_UNIT, encode_blob, encode_manifest, level_for,
};
use crate::pack::{AppendPolicy, Appender, BLOCK, DATA, MIRRORS, run_all, sync_dir};
use crate::radix::{Change, Grafter};
use crate::record::{Committed, Ends, Record};
use crate::store::{Store, WriteLock};

/// Changes held in memory before they are worked into the archive: some 64 MiB.
const PENDING_MAX: usize = 1 << 20;

/// A region of the generation being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionKey(u16);

#[derive(Debug)]
pub(crate) struct Draft {
    /// The region as it is so far, without what is pending.
    pub(crate) region: ManifestRegion,
    /// In the order in which they came: later ones win.
    pub(crate) pending: Vec<Change>,
}

/// One generation being written. It holds the store's lock; dropped without a commit, it leaves nothing behind.
///
/// Declare every region that the generation has with [`Writer::region`]: it starts as the parent's region of that name was, or all
/// zero. Then put what changed, in any order; the last word on a page counts. Pages that turn out to be what the
/// parent has cost nothing.
///
/// It can be sent to another thread, so that the VM runs on while it works.
#[derive(Debug)]
pub struct Writer {
    pub(crate) store: Store,
    _lock: WriteLock,
    pub(crate) state: State,
    new: NewGeneration,
    number: u64,
    pub(crate) depth: u32,
    parent: Option<GenerationId>,
    pub(crate) inherited: Manifest,
    pub(crate) drafts: Vec<Draft>,
    blobs: Vec<ManifestBlob>,
    pub(crate) data: Appender,
    nodes: Appender,
    pub(crate) dedup: DedupIndex,
    staged: Vec<u8>,
    places: Vec<(RegionKey, u64)>,
    /// Where the parent lay, and this generation lies as far as it is folded. See [`Writer::defragment`].
    pub(crate) layout: Option<Layout>,
    pub(crate) changed_bytes: u64,
    pub(crate) pages_stored: u64,
    done: bool,
}

impl Store {
    /// Begins a generation. Takes the store's lock until the writer is committed or dropped.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if another writer does not finish within [`crate::Options::lock_wait`];
    /// [`StoreError::NoSuchGeneration`] for a parent that is gone; [`StoreError::Damaged`] for one whose manifest is lost;
    /// [`StoreError::Invalid`] for impossible names; [`StoreError::Poisoned`]; [`StoreError::Io`].
    pub fn begin(&self, new: NewGeneration) -> Result<Writer, StoreError> {
        check_name("lineage", &new.lineage)?;
        check_label(new.label.as_deref())?;
        let lock = self.lock()?;
        pass(Point::GenerationPages);
        let state = self.current()?;
        let parent = match &new.parent {
            Parent::None => None,
            Parent::Generation(id) => Some(Arc::clone(state.find(id)?)),
            Parent::Newest => state
                .generations
                .get(&new.lineage)
                .and_then(|all| all.last_key_value())
                .map(|(_, newest)| Arc::clone(newest)),
        };
        let inherited = match &parent {
            Some(parent) => self.inner.archive.manifest(&parent.manifest)?,
            None => Manifest::default(),
        };
        let options = &self.inner.options;
        let policy =
            |full| AppendPolicy { store: state.store, full, bufsize: options.bufsize, threads: options.threads };
        let appender = |kinds, resume, full| Appender::new(Arc::clone(&self.inner.packs), kinds, resume, policy(full));
        let dedup = &mut *self.inner.dedup.lock().unwrap_or_else(PoisonError::into_inner);
        let dedup = std::mem::replace(dedup, DedupIndex::new(options.dedup_pages));
        Ok(Writer {
            layout: Writer::known_layout(self, parent.as_ref().map(|parent| &parent.manifest)),
            number: state.next.get(&new.lineage).copied().unwrap_or(1),
            depth: parent.as_ref().map_or(0, |parent| parent.info.depth.saturating_add(1)),
            parent: parent.map(|parent| parent.info.id.clone()),
            data: appender(DATA, state.ends.data, options.data_pack_bytes),
            nodes: appender(MIRRORS, state.ends.archive, options.archive_pack_bytes),
            store: self.clone(),
            _lock: lock,
            state,
            new,
            inherited,
            drafts: Vec::new(),
            blobs: Vec::new(),
            dedup,
            staged: Vec::new(),
            places: Vec::new(),
            changed_bytes: 0,
            pages_stored: 0,
            done: false,
        })
    }

    /// Starts the lineage `lineage` with what generation `of` holds: one record and one manifest, no pages.
    ///
    /// Use [`Store::begin`] with [`Parent::Generation`] where the fork's context or configuration must differ.
    ///
    /// # Errors
    /// As [`Store::begin`]; [`StoreError::Invalid`] if the lineage has generations already.
    pub fn fork(&self, of: &GenerationId, lineage: &str, time_ms: u64) -> Result<Generation, StoreError> {
        let parent = Parent::Generation(of.clone());
        let mut writer = self.begin(NewGeneration { parent, ..NewGeneration::manual(lineage, time_ms) })?;
        if writer.state.generations.contains_key(lineage) {
            return Err(StoreError::invalid(format!("the lineage {lineage} exists: choose another name for the fork")));
        }
        writer.inherit()?;
        writer.commit()
    }
}

impl Writer {
    /// The name that the generation will have.
    #[must_use]
    pub fn id(&self) -> GenerationId {
        GenerationId::new(self.new.lineage.clone(), self.number)
    }

    /// When the generation's moment was, in milliseconds since the Unix epoch, if that turned out only after [`Store::begin`].
    pub fn set_time(&mut self, time_ms: u64) {
        self.new.time_ms = time_ms;
    }

    /// What the generation builds on. `None`: nothing, so that every page that is not zero must be put.
    #[must_use]
    pub fn parent(&self) -> Option<&GenerationId> {
        self.parent.as_ref()
    }

    /// Declares a region.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a bad or repeated name or size; [`StoreError::Damaged`] or [`StoreError::Io`] if the parent's
    /// region must be cut to a smaller size and cannot be read.
    pub fn region(&mut self, spec: &RegionSpec) -> Result<RegionKey, StoreError> {
        check_name("region", &spec.name)?;
        if spec.kind.len() > KIND_MAX || spec.size > REGION_MAX || self.drafts.len() >= REGIONS_MAX {
            return Err(StoreError::invalid(format!(
                "region {}: a kind has at most {KIND_MAX} bytes, a region at most 2^52, a generation at most {REGIONS_MAX} regions",
                spec.name
            )));
        }
        if self.drafts.iter().any(|draft| draft.region.name == spec.name) {
            return Err(StoreError::invalid(format!("region {} is declared twice", spec.name)));
        }
        let was = self.inherited.regions.iter().find(|region| region.name == spec.name);
        let mut region = ManifestRegion {
            name: spec.name.clone(),
            kind: spec.kind.clone(),
            size: spec.size,
            level: was.map_or(0, |was| was.level),
            root: was.and_then(|was| was.root),
        };
        let mut grafter = Grafter { archive: &self.store.inner.archive, nodes: &mut self.nodes };
        if was.is_some_and(|was| was.size > spec.size) {
            grafter.truncate(&mut region, pages_of(spec.size))?;
            self.layout = None;
        }
        grafter.raise(&mut region, level_for(pages_of(spec.size)))?;
        self.nodes.publish()?;
        let key = RegionKey(self.drafts.len() as u16);
        self.drafts.push(Draft { region, pending: Vec::new() });
        Ok(key)
    }

    /// Declares all regions and blobs of the parent as they are.
    pub(crate) fn inherit(&mut self) -> Result<(), StoreError> {
        for region in self.inherited.regions.clone() {
            self.region(&RegionSpec { name: region.name, kind: region.kind, size: region.size })?;
        }
        self.blobs = self.inherited.blobs.clone();
        Ok(())
    }

    /// Keeps a blob of the parent as it is. `false` if the parent has none of that name.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it was given already.
    pub fn inherit_blob(&mut self, name: &str) -> Result<bool, StoreError> {
        self.check_new_blob(name)?;
        let found = self.inherited.blobs.iter().find(|blob| blob.name == name);
        self.blobs.extend(found.cloned());
        Ok(found.is_some())
    }

    fn check_new_blob(&self, name: &str) -> Result<(), StoreError> {
        check_name("blob", name)?;
        if self.blobs.len() >= BLOBS_MAX || self.blobs.iter().any(|blob| blob.name == name) {
            return Err(StoreError::invalid(format!("blob {name} is given twice, or one too many")));
        }
        Ok(())
    }

    /// Adds opaque bytes (the context, the configuration): stored twice, checked when read, at most 1 GiB.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a bad or repeated name or too many bytes; [`StoreError::Io`].
    pub fn blob(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_new_blob(name)?;
        let length = bytes.len() as u64;
        if length > BLOB_MAX {
            return Err(StoreError::invalid(format!("blob {name} has {length} bytes: at most {BLOB_MAX}")));
        }
        let mut grafter = Grafter { archive: &self.store.inner.archive, nodes: &mut self.nodes };
        let pieces =
            bytes.chunks(BLOB_PIECE).map(|piece| grafter.write(&encode_blob(piece))).collect::<Result<_, _>>()?;
        self.blobs.push(ManifestBlob { name: name.to_owned(), length, pieces });
        Ok(())
    }

    fn check(&self, region: RegionKey, first: u64, count: u64) -> Result<(), StoreError> {
        let draft = self.drafts.get(usize::from(region.0));
        let draft = draft.ok_or_else(|| StoreError::invalid("this region key is another writer's"))?;
        let pages = pages_of(draft.region.size);
        if first.checked_add(count).is_none_or(|end| end > pages) {
            return Err(StoreError::invalid(format!(
                "pages {first}+{count} lie outside region {}, which has {pages}",
                draft.region.name
            )));
        }
        Ok(())
    }

    /// Puts the content of one page.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] outside the region; [`StoreError::Io`] (drop the writer then); [`StoreError::Damaged`] if the
    /// parent's archive cannot be read (begin again with [`Parent::None`] and put everything).
    pub fn put(&mut self, region: RegionKey, page: u64, bytes: &Page) -> Result<(), StoreError> {
        self.put_run(region, page, bytes)
    }

    /// Puts consecutive pages, beginning with page `first`. Long runs are hashed and written from where they lie.
    ///
    /// # Errors
    /// As [`Writer::put`]; [`StoreError::Invalid`] if `bytes` is not a whole number of pages.
    pub fn put_run(&mut self, region: RegionKey, first: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let count = (bytes.len() / PAGE_SIZE) as u64;
        if !bytes.len().is_multiple_of(PAGE_SIZE) {
            return Err(StoreError::invalid("a run is a whole number of pages: pad the last one with zeros"));
        }
        self.check(region, first, count)?;
        let bufsize = self.store.inner.options.bufsize;
        let mut page = first;
        for piece in bytes.chunks(bufsize) {
            let places = (page..).zip(piece.chunks_exact(PAGE_SIZE)).map(|(page, _)| (region, page));
            page += (piece.len() / PAGE_SIZE) as u64;
            // What is staged comes first: the last word on a page counts.
            if self.staged.len() + piece.len() > bufsize {
                self.take_in_staged()?;
            }
            if piece.len() >= bufsize / 4 && self.staged.is_empty() {
                self.take_in(piece, &places.collect::<Vec<_>>())?;
            } else {
                self.places.extend(places);
                self.staged.extend_from_slice(piece);
            }
        }
        Ok(())
    }

    /// Makes `count` pages from `first` on zero.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub fn zero_run(&mut self, region: RegionKey, first: u64, count: u64) -> Result<(), StoreError> {
        self.check(region, first, count)?;
        self.take_in_staged()?;
        let draft = &mut self.drafts[usize::from(region.0)];
        // Only pages that are there need to go; what is pending may be among them.
        let mut gone: Vec<Change> = draft
            .pending
            .iter()
            .filter(|(page, _)| (first..first + count).contains(page))
            .map(|(page, _)| (*page, None))
            .collect();
        self.store.inner.archive.leaves(&draft.region, first, &mut |start, leaf| {
            let present =
                (start..).zip(leaf).filter(|(page, entry)| entry.is_some() && (first..first + count).contains(page));
            gone.extend(present.map(|(page, _)| (page, None)));
            Ok(start < first + count)
        })?;
        draft.pending.extend(gone);
        self.fold_if_many()
    }

    fn take_in_staged(&mut self) -> Result<(), StoreError> {
        let (mut staged, mut places) = (std::mem::take(&mut self.staged), std::mem::take(&mut self.places));
        let taken = if places.is_empty() { Ok(()) } else { self.take_in(&staged, &places) };
        staged.clear();
        places.clear();
        (self.staged, self.places) = (staged, places);
        taken
    }

    /// Stores what is new in `data` and notes what became of every page.
    fn take_in(&mut self, data: &[u8], places: &[(RegionKey, u64)]) -> Result<(), StoreError> {
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
    fn append(&mut self, data: &[u8], pages: &[&[u8]], encoded: &[batch::Encoded]) -> Result<Vec<Link>, StoreError> {
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
    fn stored(&mut self, hash: Hash, page: &[u8]) -> Option<Entry> {
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

    fn fold_if_many(&mut self) -> Result<(), StoreError> {
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

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.done {
            self.data.roll_back();
            self.nodes.roll_back();
        }
    }
}
