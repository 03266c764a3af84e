//! Recoverable memory: memory that persists, changed by transactions.
//!
//! The primitives are those of *Lightweight Recoverable Virtual Memory* (Satyanarayanan, Mashburn, Kumar, Steere, Kistler; SOSP '93) by
//! name, with two engines behind them. Which one is at work is said by the medium on which log and regions lie:
//!
//! | medium | engine | a commit is | after |
//! |---|---|---|---|
//! | `file` | redo log | one sequential write and its flush | LRVM |
//! | `dax` | undo log | cache lines written back, a store, a fence | Vista (Lowell, Chen; *Free Transactions with Rio Vista*; SOSP '97) |
//! | `nvdimm` | undo log | a store; durable with the save of the memory ([`Rvm::save`]) | Vista |
//!
//! ```text
//!   create_log ─► initialize ─► map ──► begin_transaction ─► enroll ─► set_range … ─► end_transaction (flush │ no-flush)
//!                 (recovers)     │                                                    abort_transaction, or drop
//!                                └──► unmap                flush, truncate, save; query_options, set_options
//! ```
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use allocator::{Pool, rvm::{Commit, Mode, Options, Rvm}};
//! # fn transfer(pool: Arc<Pool>) -> Result<(), Box<dyn std::error::Error>> {
//! let rvm = Rvm::initialize(pool, &"bank/log".parse()?, Options::default())?;
//! let mut accounts = rvm.map(&"bank/accounts".parse()?)?;
//! let mut transfer = rvm.begin_transaction(Mode::Restore)?;
//! let part = transfer.enroll(&mut accounts)?;
//! transfer.set_range(part, 0..8)?[0] -= 1;
//! transfer.set_range(part, 64..72)?[0] += 1;
//! transfer.end_transaction(Commit::Flush)?;
//! # Ok(())
//! # }
//! ```
//!
//! **What a program cannot get wrong**: memory is read as a slice, and written only through what [`Transaction::set_range`] returned, so that
//! bytes that no range covers are never changed. An end without a begin, or an unmap under a transaction, does not compile.
//!
//! **What is the program's**: serialisation, as in LRVM. A transaction borrows its memory mutably; threads that share some put it in a
//! `Mutex` and lock what they need before they begin ([`Memory::split_at`] makes parts as small as wanted). What a transaction saw is then what
//! it overwrites. Commits become durable in the order in which they were made. A transaction that is forgotten ([`std::mem::forget`]) leaves its memory
//! out of use.
//!
//! **One log for several regions** (on the same kind of medium), so that one transaction may change all of them. A region belongs to one log
//! from [`Rvm::map`] to [`Rvm::unmap`], which is written in its header; another log refuses it, since the first may hold changes of it. Where LRVM has
//! a file and Vista an undo log inside its segment, here both engines have a region of kind `log`, leased and named like any other.
//!
//! The log's bytes: `FORMAT.md`. A program cut anywhere finds all of a transaction or nothing of it, and every one that was said to be durable:
//! `states.rs` goes through the states that a cut can leave.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::medium::MediumKind;
use crate::name::RegionName;
use crate::pool::{Pool, RegionSpec};
use crate::region::{Kind, Region};

mod batch;
mod error;
mod fault;
mod group;
#[cfg(test)]
#[expect(clippy::duplicate_mod, reason = "the same source over other locks")]
mod interleavings;
mod memory;
mod ranges;
mod redo;
mod resume;
mod segments;
#[cfg(test)]
mod states;
mod status;
#[cfg(test)]
mod tests;
mod transaction;
mod undo;

/// What `group.rs` locks with.
mod sync {
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
}

pub use error::RvmError;
pub use memory::Memory;
pub use redo::Recovery;
pub use status::Engine;
pub use transaction::{Commit, Mode, Part, Transaction};

pub(crate) use memory::ByCopy;
use memory::{ByMedium, Mapped, Mapper};
pub(crate) use resume::{NewLog, Resumed, look};
pub(crate) use segments::Segments;

use redo::{LEAST_RING, Redo, Truncator};
use status::{RECORDS_AT, Status, damaged};
use undo::{LEAST_SLOT, MOST_SLOTS, Slots, Undo};

/// What log to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSpec {
    /// Bytes; a multiple of [`crate::PAGE_SIZE`]. With the redo engine a transaction may change up to a quarter of that, with the undo
    /// engine its share of the slots.
    pub size: u64,
    /// What it lies on, and with it the regions that it serves; `None` is the pool's default.
    pub medium: Option<MediumKind>,
    /// Undo: how many transactions may run at a time; each has an equal part of the log. 1 to 4096.
    pub slots: u32,
}

impl Default for LogSpec {
    /// 16 MiB, 64 slots.
    fn default() -> Self {
        Self { size: 16 << 20, medium: None, slots: 64 }
    }
}

/// How a log is used. Of the redo engine alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bytes that commits without a flush may hold in memory; who goes beyond flushes.
    pub spool: u64,
    /// In percent of the log: with more in use, it is truncated in the background. `None`: only when it is full, or asked to be, by whoever
    /// commits or asks; then there is no thread either, and that is decided when the log is initialized.
    pub truncate_at: Option<u8>,
}

impl Default for Options {
    /// 1 MiB, 50 %.
    fn default() -> Self {
        Self { spool: 1 << 20, truncate_at: Some(50) }
    }
}

/// How much of a log is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogUsage {
    /// Bytes that are committed without a flush, and in memory.
    pub spooled: u64,
    /// Bytes of the log that hold what is not in the regions yet.
    pub logged: u64,
}

/// The regions that are mapped.
#[derive(Debug, Default)]
struct Regions(Mutex<BTreeMap<u64, Arc<Mapped>>>);

impl Regions {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Mapped>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region(&self, id: u64) -> Option<Arc<Region>> {
        self.lock().get(&id).map(|mapped| Arc::clone(&mapped.region))
    }
}

#[derive(Debug)]
enum EngineOf {
    Redo {
        /// Ends before the log does.
        truncator: Option<Truncator>,
        redo: Arc<Redo>,
    },
    Undo(Undo),
}

/// Numbers [`Rvm`]s, so that memory of one is told from that of another.
static OWNERS: AtomicU64 = AtomicU64::new(1);
/// Bits of a transaction's id below the `Rvm`'s number.
const TRANSACTIONS: u32 = 40;

fn owner_of(transaction: u64) -> u64 {
    transaction >> TRANSACTIONS
}

/// A log in use, and the regions that are mapped by it.
///
/// When it is dropped, what was committed without a flush is lost, as by a cut: see [`Rvm::terminate`].
#[derive(Debug)]
pub struct Rvm {
    segments: Box<dyn Segments>,
    log: Arc<Region>,
    engine: EngineOf,
    regions: Arc<Regions>,
    mapper: Box<dyn Mapper>,
    owner: u64,
    transactions: AtomicU64,
}

impl Rvm {
    /// Makes a log, a region of kind `log`. If there is one of that name, size and medium, it stays as it is.
    ///
    /// # Errors
    /// [`RvmError::LogTooSmall`]; [`RvmError::Pool`]; [`RvmError::Lease`] if it is there and in use; [`RvmError::LogDamaged`] if something else is
    /// in it.
    pub fn create_log(pool: &Pool, name: &RegionName, spec: LogSpec) -> Result<(), RvmError> {
        let medium = spec.medium.unwrap_or_else(|| pool.settings().default_medium);
        let engine = Engine::of(medium);
        let slots = spec.slots.clamp(1, MOST_SLOTS);
        let least = RECORDS_AT
            + match engine {
                Engine::Redo => LEAST_RING,
                Engine::Undo => LEAST_SLOT * u64::from(slots),
            };
        if spec.size < least {
            return Err(RvmError::LogTooSmall { size: spec.size, least });
        }
        pool.allocate(name, RegionSpec { kind: Kind::Log, size: spec.size, medium: Some(medium) })?;
        let log = Region::open(pool.lease(name)?)?;
        if !is_blank(&log)? {
            return Status::load(&log).map(drop);
        }
        if engine == Engine::Redo {
            // Blocks that were reserved and never written cost a change of the file system's metadata with their first write.
            let zeros = vec![0; 1 << 20];
            for at in (RECORDS_AT..log.size()).step_by(zeros.len()) {
                let length = zeros.len().min((log.size() - at) as usize);
                log.write_at(&zeros[..length], at)?;
            }
            log.sync()?;
        }
        let key = random().map_err(|source| {
            RvmError::Pool(crate::PoolError::Io {
                what: "draw a random number for",
                path: log.path().to_owned(),
                source,
            })
        })?;
        let (pool, id, size) = (log.pool_id(), log.id(), log.size());
        let slots = if engine == Engine::Undo { slots } else { 0 };
        let mut status =
            Status { sequence: 0, pool, id, size, key, engine, saving: false, head: 0, generation: 1, slots };
        Ok(status.store(&log)?)
    }

    /// Opens a log and recovers what it has: afterwards each region that it serves is as it was after the last transaction that was
    /// durable. O(log).
    ///
    /// # Errors
    /// A log that cannot be trusted: [`RvmError::LogDamaged`], [`RvmError::LogNewer`], [`RvmError::ForeignLog`], [`RvmError::LogLength`],
    /// [`RvmError::SaveCut`], [`RvmError::NotALog`]; then nothing was altered. [`RvmError::Lease`] if it or a region that it has changes of is in
    /// use. [`RvmError::Region`].
    pub fn initialize(pool: Arc<Pool>, log: &RegionName, options: Options) -> Result<Self, RvmError> {
        Self::initialize_reporting(pool, log, options).map(|(rvm, _)| rvm)
    }

    /// As [`Rvm::initialize`], and says what was recovered.
    ///
    /// # Errors
    /// As [`Rvm::initialize`].
    pub fn initialize_reporting(
        pool: Arc<Pool>,
        log: &RegionName,
        options: Options,
    ) -> Result<(Self, Recovery), RvmError> {
        Self::initialize_on(Box::new(pool), log, options, Box::new(ByMedium))
    }

    fn initialize_on(
        segments: Box<dyn Segments>,
        log: &RegionName,
        options: Options,
        mapper: Box<dyn Mapper>,
    ) -> Result<(Self, Recovery), RvmError> {
        segments.refresh()?;
        let log = Arc::new(segments.open(log)?);
        if log.info().kind != Kind::Log {
            return Err(RvmError::NotALog { name: log.name().clone(), kind: log.info().kind });
        }
        let mut status = Status::load(&log)?;
        let recovery = recover(&*segments, &log, &mut status)?;
        let end = status.head;
        Ok((Self::over(segments, log, status, end, options, mapper)?, recovery))
    }

    /// Over a log that ends at `end` (redo) or has nothing to roll back (undo).
    fn over(
        segments: Box<dyn Segments>,
        log: Arc<Region>,
        status: Status,
        end: u64,
        options: Options,
        mapper: Box<dyn Mapper>,
    ) -> Result<Self, RvmError> {
        let regions = Arc::new(Regions::default());
        let engine = match status.engine {
            Engine::Redo => {
                let redo = Arc::new(Redo::new(Arc::clone(&log), status, end, Arc::clone(&regions), options));
                let truncator = options.truncate_at.map(|_| Truncator::start(&redo)).transpose()?;
                EngineOf::Redo { truncator, redo }
            }
            Engine::Undo => {
                let slots = Slots::of(&log, &status)?;
                EngineOf::Undo(Undo::new(mapper.map(&log, Engine::Undo)?, slots))
            }
        };
        let owner = OWNERS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { segments, log, engine, regions, mapper, owner, transactions: AtomicU64::new(0) })
    }

    /// Which engine makes transactions atomic.
    #[must_use]
    pub fn engine(&self) -> Engine {
        match self.engine {
            EngineOf::Redo { .. } => Engine::Redo,
            EngineOf::Undo(_) => Engine::Undo,
        }
    }

    /// Maps a region of the pool: its memory is as the last durable transaction left it. The region belongs to this log from now on.
    ///
    /// # Errors
    /// [`RvmError::OtherMedium`], [`RvmError::IsALog`], [`RvmError::BoundElsewhere`], [`RvmError::AlreadyMapped`], [`RvmError::Unrestored`],
    /// [`RvmError::Lease`], [`RvmError::Region`].
    pub fn map(&self, name: &RegionName) -> Result<Memory, RvmError> {
        let mut regions = self.regions.lock();
        if let Some(mapped) = regions.values().find(|mapped| mapped.region.name() == name) {
            return hand_out(mapped);
        }
        let region = self.segments.open(name)?;
        let (medium, log) = (region.medium_kind(), self.log.medium_kind());
        if region.info().kind == Kind::Log {
            return Err(RvmError::IsALog { name: name.clone() });
        }
        if medium != log {
            return Err(RvmError::OtherMedium { region: name.clone(), medium, log });
        }
        self.bind(&region)?;
        let working = self.mapper.map(&region, self.engine())?;
        let region = Arc::new(region);
        let (owner, unrestored) = (self.owner, false.into());
        let mapped = Arc::new(Mapped { region, working, owner, unrestored });
        regions.insert(mapped.region.id(), Arc::clone(&mapped));
        Ok(Memory::whole(mapped))
    }

    /// Writes durably into a region's header that it belongs to this log, unless it says so.
    fn bind(&self, region: &Region) -> Result<(), RvmError> {
        let other = match region.bound_to() {
            Ok(Some(log)) | Err(Some(log)) if log == self.log.id() => {
                region.clear_stamp()?;
                return Ok(region.flush_header()?);
            }
            Ok(None) => None,
            Ok(Some(log)) => Some(self.segments.name_of(log)),
            // The copy that cannot be read may have named a log.
            Err(_) => Some(None),
        };
        match other {
            // A log that was freed holds nothing.
            Some(None) if region.bound_to().is_ok() => {}
            None => {}
            Some(log) => {
                let log = log.map_or_else(|| "in a damaged copy of its header".to_owned(), |log| log.to_string());
                return Err(RvmError::BoundElsewhere { region: region.name().clone(), log });
            }
        }
        Ok(region.bind(Some(self.log.id()))?)
    }

    /// Ends the use of a region: all that was committed is in it and durable when this returns, and it belongs to no log. `memory` must be
    /// the only part of it that is left.
    ///
    /// # Errors
    /// [`RvmError::InUse`], [`RvmError::Unrestored`], [`RvmError::ForeignMemory`], [`RvmError::Running`]; and as [`Rvm::flush`] and [`Rvm::truncate`]. It
    /// stays mapped then, and can be mapped again.
    pub fn unmap(&self, memory: Memory) -> Result<(), RvmError> {
        let name = memory.region().clone();
        let mapped = Arc::clone(&memory.mapped);
        drop(memory);
        if mapped.owner != self.owner {
            return Err(RvmError::ForeignMemory { region: name });
        }
        // Nobody can be given a part meanwhile.
        let mut regions = self.regions.lock();
        if mapped.unrestored.load(Ordering::Acquire) {
            return Err(RvmError::Unrestored { region: name });
        }
        // This one, and that of the table.
        if Arc::strong_count(&mapped) > 2 {
            return Err(RvmError::InUse { region: name });
        }
        match &self.engine {
            EngineOf::Redo { redo, .. } => {
                drop(regions);
                redo.flush()?;
                redo.truncate()?;
                regions = self.regions.lock();
            }
            EngineOf::Undo(undo) => self.save_all(undo, &regions)?,
        }
        mapped.region.bind(None)?;
        regions.remove(&mapped.region.id());
        Ok(())
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// [`RvmError::TooManyTransactions`], with the undo engine.
    pub fn begin_transaction(&self, mode: Mode) -> Result<Transaction<'_>, RvmError> {
        let number = self.transactions.fetch_add(1, Ordering::Relaxed) & ((1 << TRANSACTIONS) - 1);
        Transaction::begin(self, self.owner << TRANSACTIONS | number, mode)
    }

    /// Returns once all that was committed is durable. (On `nvdimm`: as durable as that memory is, see [`Rvm::save`].)
    ///
    /// # Errors
    /// As [`Transaction::end_transaction`].
    pub fn flush(&self) -> Result<(), RvmError> {
        match &self.engine {
            EngineOf::Redo { redo, .. } => redo.flush(),
            EngineOf::Undo(_) => Ok(()),
        }
    }

    /// Brings all that is in the log to the regions, so that the log is empty but for what is committed meanwhile. What was committed without a
    /// flush stays in memory. Nothing to do with the undo engine.
    ///
    /// # Errors
    /// As [`Transaction::end_transaction`].
    pub fn truncate(&self) -> Result<(), RvmError> {
        match &self.engine {
            EngineOf::Redo { redo, .. } => redo.truncate(),
            EngineOf::Undo(_) => Ok(()),
        }
    }

    /// On `nvdimm`, what the memory's own energy does at an outage: saves log and regions to their images. To be done when power-fail is
    /// signalled, with no transaction running. Nothing on other media.
    ///
    /// # Errors
    /// [`RvmError::Running`]; [`RvmError::Region`], and then the images are not used any more.
    pub fn save(&self) -> Result<(), RvmError> {
        let regions = self.regions.lock();
        match &self.engine {
            EngineOf::Redo { .. } => Ok(()),
            EngineOf::Undo(undo) => self.save_all(undo, &regions),
        }
    }

    /// Images that are in part older than others are worth nothing, so the log says while it is so.
    fn save_all(&self, undo: &Undo, regions: &BTreeMap<u64, Arc<Mapped>>) -> Result<(), RvmError> {
        undo.quiet(|log| {
            if self.log.medium_kind() != MediumKind::Nvdimm {
                return Ok(());
            }
            let mut status = Status::load(&self.log)?;
            status.saving = true;
            status.store(&self.log)?;
            regions.values().try_for_each(|mapped| mapped.working.save(&mapped.region))?;
            log.save(&self.log)?;
            status.saving = false;
            Ok(status.store(&self.log)?)
        })
    }

    /// Flushes, or saves, and ends.
    ///
    /// # Errors
    /// As [`Rvm::flush`] and [`Rvm::save`].
    pub fn terminate(self) -> Result<(), RvmError> {
        self.flush()?;
        self.save()
    }

    /// The options in use; those that were set at first with the undo engine, which has none.
    #[must_use]
    pub fn query_options(&self) -> Options {
        match &self.engine {
            EngineOf::Redo { redo, .. } => redo.options(),
            EngineOf::Undo(_) => Options::default(),
        }
    }

    /// Sets options; nothing with the undo engine. Whether there is a thread for the truncation does not change: without one,
    /// `truncate_at` has no effect.
    pub fn set_options(&self, options: Options) {
        if let EngineOf::Redo { redo, .. } = &self.engine {
            redo.set_options(options);
        }
    }

    /// How much of the log is in use.
    #[must_use]
    pub fn usage(&self) -> LogUsage {
        let (spooled, logged) = match &self.engine {
            EngineOf::Redo { redo, .. } => redo.used(),
            EngineOf::Undo(_) => (0, 0),
        };
        LogUsage { spooled, logged }
    }

    /// Whether truncation has a thread of its own.
    #[must_use]
    pub fn truncates_in_the_background(&self) -> bool {
        matches!(&self.engine, EngineOf::Redo { truncator: Some(_), .. })
    }
}

/// All of a region whose parts were dropped.
fn hand_out(mapped: &Arc<Mapped>) -> Result<Memory, RvmError> {
    let region = mapped.region.name().clone();
    if Arc::strong_count(mapped) > 1 {
        return Err(RvmError::AlreadyMapped { region });
    }
    if mapped.unrestored.load(Ordering::Acquire) {
        return Err(RvmError::Unrestored { region });
    }
    Ok(Memory::whole(Arc::clone(mapped)))
}

/// Whether nothing was ever written to the status.
fn is_blank(log: &Region) -> Result<bool, RvmError> {
    let mut bytes = vec![0; RECORDS_AT as usize];
    log.read_at(&mut bytes, 0)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

fn recover(segments: &dyn Segments, log: &Region, status: &mut Status) -> Result<Recovery, RvmError> {
    let opened: Mutex<BTreeMap<u64, Option<Arc<Region>>>> = Mutex::default();
    let find = |id: u64| {
        let mut opened = opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = opened.get(&id) {
            return Ok(region.clone());
        }
        let found = match segments.name_of(id) {
            Some(name) => Some(Arc::new(leased(segments, log, &name)?)),
            None => None,
        };
        opened.insert(id, found.clone());
        Ok(found)
    };
    match status.engine {
        Engine::Redo => redo::recover(log, status, &find),
        Engine::Undo => undo::recover(log, status, &find),
    }
}

/// A region that the log has changes of.
fn leased(segments: &dyn Segments, log: &Region, name: &RegionName) -> Result<Region, RvmError> {
    if name == log.name() {
        return Err(damaged(log, "it has changes of itself"));
    }
    let region = segments.open(name)?;
    match region.bound_to() {
        Ok(Some(id)) | Err(Some(id)) if id == log.id() => Ok(region),
        _ => Err(damaged(log, format!("it has changes of region {name}, which does not belong to it"))),
    }
}
