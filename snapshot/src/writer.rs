//! Adding a generation.

mod commit;
mod intake;

use std::sync::{Arc, PoisonError};

use vfs::cut::point::{Point, pass};

use crate::dedup::DedupIndex;
use crate::error::StoreError;
use crate::generation::{
    BLOB_MAX, BLOBS_MAX, Generation, GenerationId, KIND_MAX, NewGeneration, PAGE_SIZE, Page, Parent, REGION_MAX,
    REGIONS_MAX, RegionSpec, check_label, check_name, pages_of,
};
use crate::layout::Layout;
use crate::ledger::State;
use crate::node::{BLOB_PIECE, Manifest, ManifestBlob, ManifestRegion, encode_blob, level_for};
use crate::pack::{AppendPolicy, Appender, DATA, MIRRORS};
use crate::radix::{Change, Grafter};
use crate::store::{Store, WriteLock};

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
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.done {
            self.data.roll_back();
            self.nodes.roll_back();
        }
    }
}
