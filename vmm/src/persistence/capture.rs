//! A generation of a running VM: one moment of it, stored while it runs on.
//!
//! ```text
//!   step     where              what                                     if it stood elsewhere
//!   ───────  ─────────────────  ───────────────────────────────────────  ─────────────────────────────────────────────────
//!   begin    beside the guest   changes are watched from now on          before any page is copied: a change after the
//!                                                                        copy must be told
//!   precopy  beside the guest   a full generation: every page, then      before the pause, to leave little for it; a page
//!                               what changed meanwhile; else: what       torn by a write is told again, and copied again
//!                               changed, if that is much
//!   hold     the guest stands   as in a freeze: stop, quiesce, devices,  one moment for memory and for what is volatile
//!                               vCPUs; then: which pages changed since,
//!                               their copy
//!   store    beside the guest   the copy, context and configuration go   after the guest runs on: the disk's pace is not
//!                               to the store; one commit                 the guest's
//! ```
//!
//! Persistent memory is watched and copied as RAM is. Disks of the pool are of the same moment, but nothing of them is copied in the pause: what the guest overwrites while the generation is
//! stored is copied just before ([`Moment`](crate::machine::virtio::disk::Moment)).
//!
//! A generation that could not be stored leaves its pages with [`Capture::into_pages`]: the watch has forgotten them, so
//! the next generation must be given them, or it would lack them.

mod parts;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use snapshot::{GenerationId, NewGeneration, Origin, Parent, RegionKey, RegionSpec, Store, StoreError, Writer};

use super::context::{self, ContextV1, FrozenV1, Standing};
use super::freeze::{self, FreezeError, Output, StillSteps, Stopwatch, Surroundings, Vcpus};
use super::generations::{BLOB_CONFIG, BLOB_CONTEXT, GenerationsError, KIND_DISK};
use super::regions::VmRegions;
use crate::machine::Machine;
use crate::machine::dirty::{DirtyTracker, PageSet};
use crate::machine::kvm::KvmError;
use crate::machine::memory::{GuestRam, MemoryError, PAGE_SIZE};
use crate::machine::time::nanoseconds;
use crate::machine::virtio::disk;
use parts::Parts;

/// Bytes copied out of RAM at a time while the guest runs.
const CHUNK: usize = 4 << 20;
/// Fewer changed pages than this are left for the pause: copying them takes less than a millisecond.
const FEW: u64 = 512;
/// How often a full generation goes after the pages that changed meanwhile, before it pauses the guest.
const ROUNDS: usize = 3;
/// A stretch of so many zero pages is told to the store as such, a shorter one put along with its neighbours.
const ZERO_STRETCH: u64 = 64;
/// Pages of a disk that are read at a time. The guest cannot write to it meanwhile.
const DISK_CHUNK: u64 = 64;
/// What the buffer for the pause has room for beyond what is expected, in pages.
const ROOM_LEAST: u64 = 256;
/// What of that buffer is kept from one generation to the next, in bytes.
const ROOM_KEPT: usize = 64 << 20;

/// Why there is no generation. The VM runs on, unless it is [`CaptureError::Stuck`].
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The store cannot be had.
    #[error(transparent)]
    Open(#[from] GenerationsError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The thread that stores.
    #[error("cannot start the thread that stores generations")]
    Thread(#[source] std::io::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Reading guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A disk.
    #[error("cannot read the disk {name} as it was")]
    Disk {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The machine did not stand still.
    #[error("cannot hold the VM still for a generation")]
    Hold(#[source] FreezeError),
    /// The machine does not go on.
    #[error("the VM was held still for a generation and cannot be let go")]
    Stuck(#[source] FreezeError),
    /// Something else goes first.
    #[error("the generation was given up: {0}")]
    Cancelled(&'static str),
    /// The machine could not be held.
    #[error("the generation was given up before its moment")]
    Abandoned,
    /// No memory for the copy.
    #[error(
        "there is no memory for a copy of the {0} pages that changed; take generations more often, or give the host more memory"
    )]
    NoRoom(u64),
    /// The context cannot be put into words.
    #[error("cannot write the context as JSON")]
    Encode(#[source] serde_json::Error),
}

/// How long the guest stood, by step, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseSteps {
    /// Stopping vCPUs.
    pub stop_ns: u64,
    /// Handing on output.
    pub quiesce_ns: u64,
    /// Reading devices.
    pub devices_ns: u64,
    /// Reading vCPUs, interrupt controller, clock.
    pub cpus_ns: u64,
    /// Finding out which pages changed, and watching them anew.
    pub dirty_ns: u64,
    /// Copying them.
    pub copy_ns: u64,
    /// Letting the vCPUs go.
    pub run_ns: u64,
}

/// What a generation cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureReport {
    /// Its name, as in `web@17`.
    pub generation: String,
    /// Whether every page was looked at, and not only those that changed since the one before.
    pub full: bool,
    /// How long the guest stood, in nanoseconds.
    pub pause_ns: u64,
    /// By step.
    pub steps: PauseSteps,
    /// Pages copied in the pause.
    pub pages: u64,
    /// Pages copied before, while the guest ran; one that was copied twice counts twice.
    pub pages_before: u64,
    /// Pages that the store did not have yet.
    pub pages_stored: u64,
    /// Bytes that the store grew by: pages, and both mirrors of the archive.
    pub bytes_stored: u64,
    /// From the request to the pause, in nanoseconds.
    pub before_ns: u64,
    /// From the end of the pause until everything is durable, in nanoseconds.
    pub store_ns: u64,
    /// When the moment was: milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
}

/// What a generation is to be.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The VM.
    pub lineage: String,
    /// The generation that watching began with; `None`: there is none, so every page is looked at.
    pub base: Option<GenerationId>,
    /// A name given by a person.
    pub label: Option<String>,
    /// Not to be deleted.
    pub protect: bool,
    /// Who wants it.
    pub origin: Origin,
    /// Pages that changed since `base` and that the watch no longer tells.
    pub carried: Option<PageSet>,
    /// How many pages are expected to be left for the pause.
    pub expected: u64,
    /// Whether to copy what changed before the pause, too. It shortens the pause where most pages that change do not change again
    /// at once; where they do, each is copied and stored twice for nothing.
    pub precopy: bool,
}

/// Where the copy of the pause goes. Kept from one generation to the next: fresh memory costs a page fault a page, and
/// those would be in the pause.
#[derive(Debug, Default)]
pub struct Room(Vec<u8>);

impl Room {
    fn prepare(&mut self, pages: u64) {
        let bytes = usize::try_from(pages * PAGE_SIZE).unwrap_or(0);
        if self.0.len() < bytes && self.0.try_reserve(bytes - self.0.len()).is_ok() {
            self.0.resize(bytes, 0);
        }
    }

    fn shrink(&mut self) {
        if self.0.len() > ROOM_KEPT {
            self.0 = Vec::new();
        }
    }
}

/// One moment of a VM, copied.
#[derive(Debug)]
pub struct Moment {
    context: ContextV1,
    pages: PageSet,
    room: Room,
    disks: Vec<disk::Moment>,
    steps: PauseSteps,
    pause_ns: u64,
    /// When the guest ran on.
    ended: Instant,
}

/// A generation being taken: the part beside the guest.
#[derive(Debug)]
pub struct Capture {
    writer: Writer,
    parts: Parts,
    tracker: DirtyTracker,
    /// What the watch has told since `base`, and will not tell again.
    told: PageSet,
    full: bool,
    base: Option<GenerationId>,
    pages_before: u64,
    begun: Instant,
    chunk: Vec<u8>,
}

/// What a capture says of its progress: pages done, pages in all.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

impl Capture {
    /// Begins a generation, and to watch what changes.
    ///
    /// # Errors
    /// [`CaptureError::Store`], [`CaptureError::Kvm`]; what was carried is lost with it, so keep a copy.
    pub fn begin(store: &Store, wanted: &Wanted, tracker: DirtyTracker) -> Result<Self, CaptureError> {
        let begun = Instant::now();
        tracker.enable()?;
        let full = wanted.base.is_none();
        let new = NewGeneration {
            lineage: wanted.lineage.clone(),
            parent: wanted.base.clone().map_or(Parent::Newest, Parent::Generation),
            time_ms: context::now_ns() / 1_000_000,
            label: wanted.label.clone(),
            protected: wanted.protect,
            origin: wanted.origin,
        };
        let pages = tracker.ram().pages();
        let (writer, parts) = match open(store, new.clone(), tracker.ram()) {
            // The generation before is damaged. This one looks at every page, so it can do without.
            Err(StoreError::Damaged { what }) if full => {
                tracing::warn!("{}: the newest generation cannot be built on: {what}", wanted.lineage);
                open(store, NewGeneration { parent: Parent::None, ..new }, tracker.ram())?
            }
            other => other?,
        };
        let told = wanted.carried.clone().unwrap_or_else(|| PageSet::new(pages));
        let base = wanted.base.clone();
        Ok(Self { writer, parts, tracker, told, full, base, pages_before: 0, begun, chunk: Vec::new() })
    }

    /// Copies what can be copied while the guest runs. `room` is made ready for what is left.
    ///
    /// # Errors
    /// [`CaptureError`]; [`Capture::into_pages`] has what must not be forgotten.
    pub fn precopy(
        &mut self,
        wanted: &Wanted,
        room: &mut Room,
        cancel: &AtomicBool,
        progress: Progress<'_>,
    ) -> Result<(), CaptureError> {
        if self.full {
            // What changed before any page was copied is nothing to go after.
            self.tracker.collect(&mut PageSet::new(self.told.bound()))?;
            self.copy_everything(cancel, progress)?;
            let mut changed = 0;
            for _ in 0..ROUNDS {
                changed = self.round(None, cancel)?;
                if changed <= FEW {
                    break;
                }
            }
            self.make_room(room, changed);
        } else {
            // What is carried was told long ago: it may be copied at once, and what changes now is told again.
            let carried = wanted.carried.as_ref().filter(|carried| !carried.is_empty());
            if carried.is_some() || wanted.precopy {
                self.round(carried, cancel)?;
            }
            self.make_room(room, wanted.expected);
        }
        Ok(())
    }

    /// For what is left for the pause if that is `expected` pages, and some more.
    fn make_room(&self, room: &mut Room, expected: u64) {
        room.prepare((expected.saturating_mul(5) / 4 + ROOM_LEAST).min(self.told.bound()));
    }

    /// Copies what changed since the last round. Returns how many pages that was.
    fn round(&mut self, carried: Option<&PageSet>, cancel: &AtomicBool) -> Result<u64, CaptureError> {
        let mut changed = carried.cloned().unwrap_or_else(|| PageSet::new(self.told.bound()));
        let collected = self.tracker.collect(&mut changed);
        self.told.union(&changed);
        collected?;
        let most = CHUNK as u64 / PAGE_SIZE;
        let mut chunk = std::mem::take(&mut self.chunk);
        for run in changed.runs() {
            for first in run.clone().step_by(most as usize) {
                check(cancel)?;
                chunk.resize(((run.end - first).min(most) * PAGE_SIZE) as usize, 0);
                self.tracker.ram().copy_pages(first, &mut chunk)?;
                self.parts.put_run(&mut self.writer, first, &chunk)?;
            }
        }
        self.chunk = chunk;
        let count = changed.count();
        self.pages_before += count;
        Ok(count)
    }

    /// All of RAM and of what is behind it, in long runs; zeros are told, not put.
    fn copy_everything(&mut self, cancel: &AtomicBool, progress: Progress<'_>) -> Result<(), CaptureError> {
        let pages = self.told.bound();
        let inherits = self.writer.parent().is_some();
        let mut chunk = vec![0; CHUNK];
        let mut zeros: Option<u64> = None;
        for start in (0..pages).step_by(CHUNK / PAGE_SIZE as usize) {
            check(cancel)?;
            let count = (pages - start).min(CHUNK as u64 / PAGE_SIZE);
            let bytes = &mut chunk[..(count * PAGE_SIZE) as usize];
            self.tracker.ram().copy_pages(start, bytes)?;
            for (first, length, is_zero) in stretches(bytes) {
                if is_zero {
                    zeros.get_or_insert(start + first);
                    continue;
                }
                self.tell_zeros(zeros.take(), start + first, inherits)?;
                let range = (first * PAGE_SIZE) as usize..((first + length) * PAGE_SIZE) as usize;
                self.parts.put_run(&mut self.writer, start + first, &bytes[range])?;
                self.pages_before += length;
            }
            progress(start + count, pages);
        }
        self.tell_zeros(zeros, pages, inherits)
    }

    fn tell_zeros(&mut self, from: Option<u64>, to: u64, inherits: bool) -> Result<(), CaptureError> {
        match from {
            Some(from) if inherits && from < to => Ok(self.parts.zero_run(&mut self.writer, &(from..to))?),
            _ => Ok(()),
        }
    }

    /// Puts a moment into the store. When this returns, the generation is durable.
    ///
    /// # Errors
    /// [`CaptureError`], with what must not be forgotten: give it to the next generation as [`Wanted::carried`].
    pub fn store(mut self, moment: Moment, room: &mut Room, cancel: &AtomicBool) -> Result<CaptureReport, Failed> {
        self.told.union(&moment.pages);
        match self.put(&moment, cancel) {
            Ok(()) => {}
            Err(error) => return Err(Failed { error, pages: self.told }),
        }
        let Self { writer, told, full, pages_before, begun, .. } = self;
        let Moment { context, pages, room: used, disks, steps, pause_ns, ended } = moment;
        let generation = match writer.commit() {
            Ok(generation) => generation,
            Err(error) => return Err(Failed { error: error.into(), pages: told }),
        };
        let id = generation.id.to_string();
        disks.into_iter().for_each(|disk| disk.stored(&id));
        *room = used;
        room.shrink();
        let before = (ended - begun).saturating_sub(Duration::from_nanos(pause_ns));
        Ok(CaptureReport {
            generation: generation.id.to_string(),
            full,
            pause_ns,
            steps,
            pages: pages.count(),
            pages_before,
            pages_stored: generation.pages_stored,
            bytes_stored: generation.page_bytes_stored + 2 * generation.archive_bytes_stored,
            before_ns: nanoseconds(before),
            store_ns: nanoseconds(ended.elapsed()),
            time_ms: context.written_ns / 1_000_000,
        })
    }

    fn put(&mut self, moment: &Moment, cancel: &AtomicBool) -> Result<(), CaptureError> {
        let mut at = 0;
        for run in moment.pages.runs() {
            check(cancel)?;
            let length = ((run.end - run.start) * PAGE_SIZE) as usize;
            let bytes = moment.room.0.get(at..at + length).ok_or(CaptureError::NoRoom(moment.pages.count()))?;
            self.parts.put_run(&mut self.writer, run.start, bytes)?;
            at += length;
        }
        moment.disks.iter().try_for_each(|disk| self.put_disk(disk, cancel))?;
        self.writer.set_time(moment.context.written_ns / 1_000_000);
        let json = serde_json::to_vec(&moment.context).map_err(CaptureError::Encode)?;
        self.writer.blob(BLOB_CONTEXT, &json)?;
        let json = serde_json::to_vec(&moment.context.config).map_err(CaptureError::Encode)?;
        self.writer.blob(BLOB_CONFIG, &json)?;
        check(cancel)
    }

    /// A disk as it was: what changed of it, or all of it that is there.
    fn put_disk(&mut self, moment: &disk::Moment, cancel: &AtomicBool) -> Result<(), CaptureError> {
        let failed = |source| CaptureError::Disk { name: moment.name().to_owned(), source };
        let size = moment.length();
        let spec = RegionSpec { name: moment.name().to_owned(), kind: KIND_DISK.to_owned(), size };
        let region = self.writer.region(&spec)?;
        let base = self.base.as_ref().map(ToString::to_string);
        if moment.base().is_some() && moment.base() != base.as_deref() {
            moment.forget_base();
            return Err(CaptureError::Cancelled(
                "its disks changed since another generation; the next one looks at all of them",
            ));
        }
        let mut pages = moment.pages().clone();
        if moment.base().is_none() {
            pages = moment.data().map_err(failed)?;
            if self.writer.parent().is_some() {
                zeros_between(&mut self.writer, region, &pages)?;
            }
        }
        let mut chunk = std::mem::take(&mut self.chunk);
        for run in pages.runs() {
            for first in run.clone().step_by(DISK_CHUNK as usize) {
                check(cancel)?;
                chunk.resize(((run.end - first).min(DISK_CHUNK) * PAGE_SIZE) as usize, 0);
                moment.take(first, &mut chunk).map_err(failed)?;
                self.writer.put_run(region, first, &chunk)?;
            }
        }
        self.chunk = chunk;
        moment.check().map_err(failed)
    }

    /// Gives the generation up; nothing of it is in the store. What changed and must be carried to the next one.
    #[must_use]
    pub fn into_pages(self) -> PageSet {
        self.told
    }
}

/// A generation that could not be stored.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: CaptureError,
    /// The pages that changed since the generation before, as far as they were told.
    pub pages: PageSet,
}

fn open(store: &Store, new: NewGeneration, ram: &GuestRam) -> Result<(Writer, Parts), StoreError> {
    let mut writer = store.begin(new)?;
    let parts = Parts::begin(&mut writer, ram)?;
    Ok((writer, parts))
}

/// All that is not in `pages` is zeros.
pub(super) fn zeros_between(writer: &mut Writer, region: RegionKey, pages: &PageSet) -> Result<(), StoreError> {
    let mut at = 0;
    for run in pages.runs() {
        if at < run.start {
            writer.zero_run(region, at, run.start - at)?;
        }
        at = run.end;
    }
    if at < pages.bound() { writer.zero_run(region, at, pages.bound() - at) } else { Ok(()) }
}

fn check(cancel: &AtomicBool) -> Result<(), CaptureError> {
    if cancel.load(Ordering::Relaxed) {
        return Err(CaptureError::Cancelled("a power-fail signal came, or the VM ended"));
    }
    Ok(())
}

/// Stretches of zero pages, and of others with short stretches of zeros in between: (first page, pages, zero).
fn stretches(bytes: &[u8]) -> Vec<(u64, u64, bool)> {
    let mut found: Vec<(u64, u64, bool)> = Vec::new();
    for page in bytes.chunks_exact(PAGE_SIZE as usize) {
        let zero = is_zero(page);
        match found.last_mut() {
            Some((_, length, kind)) if *kind == zero => *length += 1,
            _ => {
                let first = found.last().map_or(0, |(first, length, _)| first + length);
                found.push((first, 1, zero));
            }
        }
    }
    let mut joined: Vec<(u64, u64, bool)> = Vec::new();
    for (first, length, zero) in found {
        match joined.last_mut() {
            Some((_, before, false)) if !zero || length < ZERO_STRETCH => *before += length,
            _ => joined.push((first, length, zero)),
        }
    }
    joined
}

fn is_zero(page: &[u8]) -> bool {
    const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    page == ZEROS
}

/// Holds a machine still for as long as it takes to copy what changed: the only part that the guest waits for. It goes on when this
/// returns, whatever this returns, but for [`CaptureError::Stuck`]; or stays paused if a user paused it (`vcpus`).
///
/// # Errors
/// [`CaptureError`]; `changed` has the pages that were told, and must not be forgotten then.
pub fn hold(
    machine: &Machine,
    regions: &VmRegions,
    surroundings: &dyn Surroundings,
    vcpus: Vcpus,
    room: Room,
    changed: &mut PageSet,
) -> Result<Moment, CaptureError> {
    let start = Instant::now();
    let never = AtomicBool::new(false);
    let mut steps = Stopwatch::start(&never);
    let held = copy_moment(machine, regions, surroundings, room, changed, &mut steps);
    if matches!(held, Err(CaptureError::Hold(FreezeError::Ended))) {
        // Nothing is left to be let go; its end is on its way to the supervisor.
        surroundings.hurry(false);
        return held;
    }
    steps.lap();
    freeze::let_go(machine, surroundings, vcpus).map_err(CaptureError::Stuck)?;
    let mut moment = held?;
    moment.steps.run_ns = steps.lap();
    moment.pause_ns = nanoseconds(start.elapsed());
    moment.ended = Instant::now();
    Ok(moment)
}

fn copy_moment(
    machine: &Machine,
    regions: &VmRegions,
    surroundings: &dyn Surroundings,
    mut room: Room,
    changed: &mut PageSet,
    steps: &mut Stopwatch<'_>,
) -> Result<Moment, CaptureError> {
    let (state, still) =
        freeze::hold_still(machine, surroundings, Output::Handed, steps).map_err(CaptureError::Hold)?;
    let written_ns = context::now_ns();
    let StillSteps { stop_ns, quiesce_ns, devices_ns, cpus_ns } = still;
    let mut took = PauseSteps { stop_ns, quiesce_ns, devices_ns, cpus_ns, ..PauseSteps::default() };

    machine.dirty_tracker().collect(changed)?;
    let disks = regions.moment_of_disks();
    took.dirty_ns = steps.lap();

    copy(machine, changed, &mut room)?;
    let frozen = FrozenV1 { machine: state, console: surroundings.save(), restoring: None, paged: None, journal: None };
    took.copy_ns = steps.lap();

    let context = ContextV1 {
        sequence: regions.context().sequence,
        written_ns,
        config: machine.config().clone(),
        standing: Standing::Frozen(Box::new(frozen)),
    };
    let pages = changed.clone();
    Ok(Moment { context, pages, room, disks, steps: took, pause_ns: 0, ended: Instant::now() })
}

/// Copies pages out of RAM, one behind the other.
fn copy(machine: &Machine, pages: &PageSet, room: &mut Room) -> Result<(), CaptureError> {
    let count = pages.count();
    let bytes = usize::try_from(count * PAGE_SIZE).map_err(|_| CaptureError::NoRoom(count))?;
    if room.0.len() < bytes {
        room.0.try_reserve_exact(bytes - room.0.len()).map_err(|_| CaptureError::NoRoom(count))?;
        room.0.resize(bytes, 0);
    }
    let mut rest = &mut room.0[..bytes];
    for run in pages.runs() {
        let (now, later) = rest.split_at_mut(((run.end - run.start) * PAGE_SIZE) as usize);
        machine.ram().copy_pages(run.start, now)?;
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
