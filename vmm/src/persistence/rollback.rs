//! Generation → Frozen: a VM's regions become exactly what one of its generations holds.
//!
//! ```text
//!   step      what                                        if it stood elsewhere
//!   ────────  ──────────────────────────────────────────  ─────────────────────────────────────────────────────────
//!   plan      the generation verifies, and fits the VM    first: nothing is altered if it does not
//!   keep      what was becomes a generation               before the stamp goes: it is only whole while it is clean
//!   clear     RAM's stamp, durably                        before RAM changes: a cut must not find RAM half restored under
//!                                                         a stamp that says it is whole
//!   choose    the chosen generation is committed anew,    after clear, before RAM changes: from here a cut ends in the
//!             as the newest one: no pages, one record     chosen generation, since recovery takes the newest
//!   restore   storage, then RAM: zeros, then the pages;   before the context: a context must never name unsaved RAM, or
//!             flushed                                     unsaved storage (disks, persistent memory)
//!             (or the zeros alone: the pages come later)
//!   context   N+1, with the generation's machine state    before the stamp: a stamp must never name a missing context
//!   stamp     clean@N+1                                   last: it is what makes the context count
//! ```
//!
//! So a cut leaves what was, if it was clean, or RAM that is not stamped, which [`recover`] restores from the newest generation that
//! verifies: before `choose` that is what was kept, after it what was chosen. Never a stamped mixture.
//!
//! For the guest the time between is an outage like any other. Everything that a generation says is taken for hostile: sizes and
//! counts are checked here, the machine's state when it is set.

use std::io;
use std::time::{Duration, Instant};

use allocator::{Region, RegionError};
use snapshot::{
    Depth, Generation, GenerationId, NewGeneration, PageSink, Parent, Reader, RegionInfo, RegionSpec, RestoreReport,
    Store, StoreError, Writer,
};
use vfs::cut::point::{Point, pass};

use super::capture;
use super::context::{self, ContextError, ContextV1, Standing};
use super::generations::{BLOB_CONFIG, BLOB_CONTEXT, KIND_DISK, KIND_PMEM, REGION_RAM};
use super::paging::{Memory, MemoryIoError};
use super::regions::{RegionsError, VmRegions};
use super::restoring::{self, RestoringError, RestoringV1};
use crate::machine::config::generations::Integrity;
use crate::machine::config::{ByteSize, ConfigError, MAX_CPUS, VmConfig};
use crate::machine::memory::PAGE_SIZE;
use crate::machine::virtio::disk;

/// Bytes of RAM read at a time when it is kept.
const PIECE: usize = 4 << 20;

/// Why a VM was not brought back to a generation.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the generation says of the machine cannot be read.
    #[error(
        "generation {id} has no machine state that can be read: {why}; take another one (`perdure generations` lists them)"
    )]
    Unreadable {
        /// Which.
        id: GenerationId,
        /// What is wrong with it.
        why: String,
    },
    /// The generation is of a VM of another shape.
    #[error(
        "generation {id} does not fit VM {name}: it has {theirs}, the VM has {ours}; `perdure fork {id} NEW` makes a VM that fits"
    )]
    Shape {
        /// Which.
        id: GenerationId,
        /// The VM.
        name: String,
        /// The generation's, in words.
        theirs: String,
        /// The VM's, in words.
        ours: String,
    },
    /// The generation's configuration cannot be.
    #[error("generation {id} describes no VM")]
    Config {
        /// Which.
        id: GenerationId,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// RAM could not be read or written.
    #[error("cannot {doing} the memory of VM {name}")]
    Region {
        /// "read", "zero", …
        doing: &'static str,
        /// The VM.
        name: String,
        /// Why.
        #[source]
        source: MemoryIoError,
    },
    /// The system has no random numbers.
    #[error("cannot draw a VM generation ID: the system gives no random numbers")]
    Random(#[source] io::Error),
    /// A disk, or persistent memory, could not be read.
    #[error("cannot read the disk or persistent memory {name}")]
    Storage {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The regions.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// The restore that was under way.
    #[error(transparent)]
    Restoring(#[from] RestoringError),
    /// The stamp.
    #[error(transparent)]
    Stamp(#[from] RegionError),
    /// No generation can be used.
    #[error("none of the {} generations of VM {name} can be used; the newest: {}. `perdure scrub {name} --repair` heals what has a good copy",
        .skipped.len(), first_reason(.skipped))]
    NoneUsable {
        /// The VM.
        name: String,
        /// Each, the newest first, and what is wrong with it.
        skipped: Vec<Skipped>,
    },
}

fn first_reason(skipped: &[Skipped]) -> String {
    skipped.first().map(|skipped| format!("{}: {}", skipped.generation.id, skipped.why)).unwrap_or_default()
}

impl From<ContextError> for RollbackError {
    fn from(error: ContextError) -> Self {
        Self::Regions(error.into())
    }
}

/// A generation that a recovery passed over.
#[derive(Debug)]
pub struct Skipped {
    /// Which.
    pub generation: Generation,
    /// What is wrong with it, in words.
    pub why: String,
}

/// What a VM was brought back to.
#[derive(Debug)]
pub struct Restored {
    /// The generation that was chosen.
    pub generation: Generation,
    /// What was before, kept as a generation.
    pub kept: Option<Generation>,
    /// Newer ones that a recovery passed over, the newest first.
    pub skipped: Vec<Skipped>,
    /// What it took.
    pub report: RestoreReport,
    /// How long the restore took.
    pub took: Duration,
}

/// A generation that verifies and fits: ready to be restored.
#[derive(Debug)]
pub struct Plan {
    reader: Reader,
    ram: usize,
    context: ContextV1,
}

impl Plan {
    /// Opens generation `id` for VM `name`, whose RAM has `size` bytes, and looks at all of it but its pages. Nothing is altered.
    ///
    /// # Errors
    /// [`RollbackError`].
    pub fn new(store: &Store, id: &GenerationId, name: &str, size: Option<u64>) -> Result<Self, RollbackError> {
        let reader = store.reader(id)?;
        let unreadable = |why: &str| RollbackError::Unreadable { id: id.clone(), why: why.to_owned() };
        let announced = reader.blobs().into_iter().find(|blob| blob.name == BLOB_CONTEXT).map(|blob| blob.length);
        if announced.is_some_and(|length| length > context::region_size(MAX_CPUS)) {
            return Err(unreadable("it is longer than any"));
        }
        let bytes = reader.blob(BLOB_CONTEXT)?.ok_or_else(|| unreadable("there is none in it"))?;
        let context: ContextV1 = serde_json::from_slice(&bytes).map_err(|error| unreadable(&error.to_string()))?;
        let Standing::Frozen(frozen) = &context.standing else {
            return Err(unreadable("its machine was not running"));
        };
        if frozen.restoring.is_some() || frozen.paged.is_some() {
            return Err(unreadable("it says that its memory is elsewhere"));
        }
        let config = &context.config;
        config.validate().map_err(|source| RollbackError::Config { id: id.clone(), source })?;
        if frozen.machine.vcpus.len() != config.cpus as usize {
            return Err(unreadable("it has not as many vCPUs as it says"));
        }
        let ram = reader.region(REGION_RAM).ok_or_else(|| unreadable("it holds no RAM"))?;
        let known = |region: &RegionInfo| region.name == REGION_RAM || is_storage(&region.kind);
        if let Some(other) = reader.regions().iter().find(|region| !known(region)) {
            return Err(unreadable(&format!("it holds a region {}, which this perdure does not know", other.name)));
        }
        let held = reader.regions().get(ram).map_or(0, |region| region.size);
        let wanted = size.unwrap_or(config.memory.0);
        for theirs in [held, config.memory.0] {
            if theirs != wanted {
                let (theirs, ours) = (in_memory(theirs), in_memory(wanted));
                return Err(RollbackError::Shape { id: id.clone(), name: name.to_owned(), theirs, ours });
            }
        }
        Ok(Self { reader, ram, context })
    }

    /// What the VM was made of when the generation was taken.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.context.config
    }

    fn check_fit(&self, regions: &VmRegions) -> Result<(), RollbackError> {
        let differ = |theirs, ours| {
            let (id, name) = (self.reader.generation().id.clone(), regions.name().to_owned());
            RollbackError::Shape { id, name, theirs, ours }
        };
        let (theirs, ours) = (self.config().cpus, regions.config().cpus);
        if theirs != ours {
            let in_cpus = |cpus: u32| format!("{cpus} CPUs");
            return Err(differ(in_cpus(theirs), in_cpus(ours)));
        }
        let (theirs, ours) = (in_words(self.storage()), in_words(regions.storage().map(shape)));
        if theirs == ours { Ok(()) } else { Err(differ(theirs, ours)) }
    }

    /// The disks and the persistent memory that it holds: kinds, names and sizes.
    fn storage(&self) -> impl Iterator<Item = (String, String, u64)> {
        let storage = self.reader.regions().into_iter().filter(|region| is_storage(&region.kind));
        storage.map(|region| (region.kind, region.name, region.size))
    }

    /// Makes disks and persistent memory of the VM what they were. They must be stamped no more.
    fn restore_storage(&self, regions: &VmRegions) -> Result<(), RollbackError> {
        for (name, region) in regions.storage() {
            let Some(index) = self.reader.region(name) else { continue };
            let failed = RollbackError::Stamp;
            region.zero().map_err(failed)?;
            self.reader.restore_region(index, &StorageSink(region), &mut |_, _| ())?;
            region.sync().map_err(failed)?;
        }
        Ok(())
    }
}

fn is_storage(kind: &str) -> bool {
    [KIND_DISK, KIND_PMEM].contains(&kind)
}

fn shape((name, region): (&str, &Region)) -> (String, String, u64) {
    (region.info().kind.to_string(), name.to_owned(), region.size())
}

fn in_words(storage: impl Iterator<Item = (String, String, u64)>) -> String {
    let words = |(kind, name, size)| format!("the {kind} {name}:{}", ByteSize(size));
    let mut storage: Vec<String> = storage.map(words).collect();
    storage.sort_unstable();
    if storage.is_empty() { "no disks in the pool".to_owned() } else { storage.join(", ") }
}

/// The region of a disk or of persistent memory as a sink. It was zeroed before.
struct StorageSink<'a>(&'a Region);

impl PageSink for StorageSink<'_> {
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(bytes, first_page.saturating_mul(snapshot::PAGE_SIZE as u64)).map_err(io::Error::other)
    }

    fn zero(&self, _first_page: u64, _count: u64) -> io::Result<()> {
        Ok(())
    }
}

fn in_memory(bytes: u64) -> String {
    format!("{} of memory", ByteSize(bytes))
}

/// A VM's memory as a sink. It was zeroed before, so zero pages need nothing.
impl PageSink for Memory {
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = first_page.saturating_mul(snapshot::PAGE_SIZE as u64);
        self.write_at(bytes, offset).map_err(io::Error::other)
    }

    fn zero(&self, _first_page: u64, _count: u64) -> io::Result<()> {
        Ok(())
    }
}

/// When a generation's pages are to be in the RAM region.
pub enum Pages<'a> {
    /// Before the VM runs. Hears how many pages of how many are done.
    Now(&'a mut dyn FnMut(u64, u64)),
    /// While it runs: [`super::restoring`].
    Later,
}

/// Puts a plan into effect: from `clear` on. What was is lost; if this fails, or is cut, RAM counts as cut off.
///
/// The VM keeps what is about its surroundings (medium, serial port, family); what it is for its guest comes from the generation.
///
/// # Errors
/// [`RollbackError`]: a [`recover`] is due then.
pub fn restore(
    store: &Store,
    plan: &Plan,
    regions: &mut VmRegions,
    pages: &mut Pages<'_>,
) -> Result<RestoreReport, RollbackError> {
    plan.check_fit(regions)?;
    let before = regions.context().standing.restoring().filter(|restoring| restoring.unprotect).cloned();
    let VmConfig { cpus, memory, kernel, cmdline, clock, console, .. } = plan.config().clone();
    let config = VmConfig { cpus, memory, kernel, cmdline, clock, console, ..regions.config().clone() };
    let geometry = config.geometry();
    let name = regions.name().to_owned();
    let failed = |doing| {
        let name = name.clone();
        move |source| RollbackError::Region { doing, name, source }
    };
    let fresh = regions.fresh_memory()?;
    store.refresh()?;
    plan.restore_storage(regions)?;
    let (report, base) = match pages {
        Pages::Now(progress) => (plan.reader.restore_region(plan.ram, &fresh, *progress)?, None),
        Pages::Later => (RestoreReport::default(), Some(store.generation(&plan.reader.generation().id)?)),
    };
    let paged = fresh.persist().map_err(failed("flush"))?;
    drop(fresh);
    let mut standing = plan.context.standing.clone();
    if let Standing::Frozen(frozen) = &mut standing {
        // It may be protected for a restore from it that this one takes the place of.
        let ours = |base: &Generation| before.as_ref().is_some_and(|before| before.generation == base.id.to_string());
        let nothing_yet =
            |base: &Generation| RestoringV1::nothing_yet(&base.id, !base.protected || ours(base), memory.0, geometry);
        frozen.machine.renew_generation_id().map_err(RollbackError::Random)?;
        frozen.paged = paged;
        frozen.restoring = base.as_ref().map(nothing_yet);
    }
    pass(Point::RecoveryAdopt);
    regions.adopt(ContextV1 { sequence: regions.next_sequence(), written_ns: context::now_ns(), config, standing })?;
    pass(Point::RecoveryDone);
    if let Some(base) = base.as_ref().filter(|base| !base.protected) {
        store.protect(&base.id, true)?;
    }
    let still = base.map(|base| base.id.to_string());
    if let Some(before) = before.filter(|before| Some(&before.generation) != still.as_ref()) {
        restoring::release(store, &before.generation.parse()?)?;
    }
    Ok(report)
}

/// After an unclean end: restores the newest generation that verifies. What it passes over is in the result.
///
/// # Errors
/// [`RollbackError::NoneUsable`], [`RollbackError::Store`] if there is none at all; others if the VM's regions fail.
pub fn recover(store: &Store, regions: &mut VmRegions, pages: &mut Pages<'_>) -> Result<Restored, RollbackError> {
    let name = regions.name().to_owned();
    let mut generations = store.generations(&name);
    if generations.is_empty() {
        return Err(StoreError::EmptyLineage { lineage: name }.into());
    }
    let mut skipped = Vec::new();
    while let Some(generation) = generations.pop() {
        let begun = Instant::now();
        let attempt = store
            .verify(&generation.id, Depth::Structure)
            .map_err(RollbackError::from)
            .and_then(|()| Plan::new(store, &generation.id, &name, Some(regions.config().memory.0)))
            .inspect(|_| pass(Point::RecoveryChosen))
            .and_then(|plan| restore(store, &plan, regions, pages));
        match attempt {
            Ok(report) => return Ok(Restored { generation, kept: None, skipped, report, took: begun.elapsed() }),
            Err(error) if concerns_one(&error) => skipped.push(Skipped { generation, why: chain(&error) }),
            Err(error) => return Err(error),
        }
    }
    Err(RollbackError::NoneUsable { name, skipped })
}

/// Whether another generation may fare better.
fn concerns_one(error: &RollbackError) -> bool {
    match error {
        RollbackError::Store(error) => !matches!(error, StoreError::Sink { .. }),
        RollbackError::Unreadable { .. } | RollbackError::Shape { .. } | RollbackError::Config { .. } => true,
        _ => false,
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

/// Rolls a VM back to generation `id`. What was, if it was frozen, is kept as a generation first, unless `discard`.
///
/// # Errors
/// [`RollbackError`]. Before RAM's stamp was cleared nothing was altered; after that a [`recover`] is due.
pub fn roll_back(
    store: &Store,
    regions: &mut VmRegions,
    id: &GenerationId,
    discard: bool,
    pages: &mut Pages<'_>,
) -> Result<Restored, RollbackError> {
    let name = regions.name().to_owned();
    let plan = Plan::new(store, id, &name, Some(regions.config().memory.0))?;
    plan.check_fit(regions)?;
    let integrity = regions.config().generations.integrity;
    // Page by page, before anything is given up for it; unless lost pages are to be left out, or pages come later, each verified then.
    let now = matches!(pages, Pages::Now(_));
    store.verify(id, if now && integrity == Integrity::Fail { Depth::Pages } else { Depth::Structure })?;
    let generation = plan.reader.generation().clone();
    let frozen = regions.is_clean() && matches!(regions.context().standing, Standing::Frozen(_));
    let kept = match frozen && !discard {
        true => Some(keep(store, regions, &format!("before the rollback to {id}"))?),
        false => None,
    };
    let begun = Instant::now();
    let clean = regions.is_clean().then(|| regions.context().sequence);
    regions.clear_stamp()?;
    if let Err(error) = choose(store, &name, id) {
        // RAM is untouched, so it is still that of its context.
        if let Some(sequence) = clean {
            regions.stamp_clean(sequence)?;
        }
        return Err(error.into());
    }
    let report = restore(store, &plan, regions, pages)?;
    Ok(Restored { generation, kept, skipped: Vec::new(), report, took: begun.elapsed() })
}

/// Makes what `id` holds the newest generation of `lineage`, unless it is that already.
fn choose(store: &Store, lineage: &str, id: &GenerationId) -> Result<(), StoreError> {
    store.refresh()?;
    if store.newest(lineage).is_some_and(|newest| newest.id == *id) {
        return Ok(());
    }
    // As old as what it holds: that is what a recovery tells.
    let time_ms = store.generation(id)?.time_ms;
    let new = NewGeneration { parent: Parent::Generation(id.clone()), ..NewGeneration::automatic(lineage, time_ms) };
    inherit(store, id, new)?.commit().map(drop)
}

/// A generation that holds all that `id` holds.
fn inherit(store: &Store, id: &GenerationId, new: NewGeneration) -> Result<Writer, StoreError> {
    let reader = store.reader(id)?;
    let mut writer = store.begin(new)?;
    for region in reader.regions() {
        writer.region(&RegionSpec { name: region.name, kind: region.kind, size: region.size })?;
    }
    for blob in reader.blobs() {
        writer.inherit_blob(&blob.name)?;
    }
    Ok(writer)
}

/// Takes a generation of a VM that is frozen, from its regions.
///
/// # Errors
/// [`RollbackError::Store`], [`RollbackError::Region`]: there is no such generation then.
pub fn keep(store: &Store, regions: &VmRegions, label: &str) -> Result<Generation, RollbackError> {
    let on = |parent| NewGeneration {
        parent,
        label: Some(label.to_owned()),
        ..NewGeneration::manual(regions.name(), now_ms())
    };
    if let Some(restoring) = regions.context().standing.restoring() {
        // What is not in the region is in the generation that it is being restored from, and nowhere else.
        return write_frozen(store, regions, on(Parent::Generation(restoring.generation.parse()?)));
    }
    match write_frozen(store, regions, on(Parent::Newest)) {
        // Not even what it would have built on can be read: then on nothing.
        Err(RollbackError::Store(StoreError::Damaged { .. })) => write_frozen(store, regions, on(Parent::None)),
        other => other,
    }
}

fn write_frozen(store: &Store, regions: &VmRegions, new: NewGeneration) -> Result<Generation, RollbackError> {
    let (memory, size) = (regions.frozen_memory()?, regions.config().memory.0);
    let read = |source| RollbackError::Region { doing: "read", name: regions.name().to_owned(), source };
    let mut writer = store.begin(new)?;
    let spec = RegionSpec { name: REGION_RAM.to_owned(), kind: allocator::Kind::Ram.to_string(), size };
    let key = writer.region(&spec)?;
    let mut buffer = vec![0; PIECE];
    for run in bytes_there(regions)? {
        let mut offset = run.start;
        while offset < run.end {
            let length = usize::try_from(run.end - offset).unwrap_or(PIECE).min(PIECE);
            let piece = buffer.get_mut(..length).unwrap_or_default();
            memory.read_at(piece, offset).map_err(read)?;
            writer.put_run(key, offset / snapshot::PAGE_SIZE as u64, piece)?;
            offset += length as u64;
        }
    }
    for (name, region) in regions.storage() {
        put_storage(&mut writer, name, region)?;
    }
    let mut context = regions.context().clone();
    if let Standing::Frozen(frozen) = &mut context.standing {
        frozen.restoring = None;
        frozen.paged = None;
        frozen.journal = None;
    }
    let json = |result: Result<Vec<u8>, _>| result.map_err(|error| RollbackError::from(ContextError::Encode(error)));
    writer.blob(BLOB_CONTEXT, &json(serde_json::to_vec(&context))?)?;
    writer.blob(BLOB_CONFIG, &json(serde_json::to_vec(regions.config()))?)?;
    Ok(writer.commit()?)
}

/// All that is there of a disk or persistent memory of a frozen VM.
fn put_storage(writer: &mut Writer, name: &str, region: &Region) -> Result<(), RollbackError> {
    let spec = RegionSpec { name: name.to_owned(), kind: region.info().kind.to_string(), size: region.size() };
    let key = writer.region(&spec)?;
    let (file, part) = region.share_file()?;
    let doing = |source| RollbackError::Storage { name: name.to_owned(), source };
    let pages = disk::data_pages(&file, &part).map_err(doing)?;
    if writer.parent().is_some() {
        capture::zeros_between(writer, key, &pages)?;
    }
    let mut buffer = vec![0; PIECE];
    for run in pages.runs() {
        let (mut offset, end) = (run.start * PAGE_SIZE, (run.end * PAGE_SIZE).min(region.size()));
        while offset < end {
            let length = usize::try_from(end - offset).unwrap_or(PIECE).min(PIECE);
            let piece = buffer.get_mut(..length).unwrap_or_default();
            region.read_at(piece, offset)?;
            writer.put_run(key, offset / PAGE_SIZE, piece)?;
            offset += length as u64;
        }
    }
    Ok(())
}

/// The bytes that are in the VM's regions: all, unless they were still being restored.
fn bytes_there(regions: &VmRegions) -> Result<Vec<std::ops::Range<u64>>, RollbackError> {
    let size = regions.config().memory.0;
    let Some(record) = regions.context().standing.restoring() else { return Ok(std::iter::once(0..size).collect()) };
    let (_, present) = record.check(size, regions.config().geometry())?;
    let pages = restoring::pages_present(&present, record.cluster, size);
    Ok(pages.runs().map(|run| run.start * PAGE_SIZE..(run.end * PAGE_SIZE).min(size)).collect())
}

/// Milliseconds since 1970-01-01 UTC.
#[must_use]
pub fn now_ms() -> u64 {
    context::now_ns() / 1_000_000
}

#[cfg(test)]
mod tests;
