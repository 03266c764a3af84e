//! The regions of one VM: leased, mapped, stamped.
//!
//! `NAME/ram` is guest memory, `NAME/context` what is volatile, `NAME/DISK` a disk, `NAME/PMEM` persistent memory. Whoever holds a [`VmRegions`] holds the VM: the leases
//! die with the process, and a second process is told who has them.

mod config;
mod error;
mod holdup;

use std::sync::{Arc, Mutex};

use allocator::paging::{Pager, PagingEvents};
use allocator::{Dirty, Kind, LeaseError, Mapping, MediumKind, Pool, Region, RegionError, RegionName, RegionSpec};

pub use error::RegionsError;

use super::context::{self, ContextError, ContextV1, Encoded, Slots, Standing};
use super::disks::{self, Disks, Origins};
use super::holdup::{DirtyBudget, Pace, SharedJournal};
use super::paging::{self, Memory, PagedMemory as Paged, Persisted};
use super::pmem::{self, PmemRegions};
use super::restoring::{Destination, PagedMemory, Paging, Restoring, RestoringError, RestoringV1};
use crate::machine::config::VmConfig;
use crate::machine::config::disks::DiskConfig;
use crate::machine::dirty::PageSet;
use crate::machine::kvm::Host;
use crate::machine::memory::{GuestRam, HostMemory, PAGE_SIZE};
use crate::machine::virtio::Links;
use crate::machine::virtio::disk::Moment;
use crate::machine::{Machine, MachineError, Wiring};

/// The regions of a VM.
pub struct VmRegions {
    name: String,
    ram: Arc<Region>,
    /// Where memory lies that is not in RAM, if the VM has less of that than memory.
    swap: Option<Arc<Region>>,
    disks: Disks,
    pmem: PmemRegions,
    links: Links,
    pager: Option<Arc<Pager>>,
    /// Memory is zeros, whatever the context says.
    fresh: bool,
    paging_events: PagingEvents,
    mapping: Option<Arc<Mapping>>,
    placed: Option<Arc<GuestRam>>,
    restoring: Option<Restoring>,
    journal: Option<SharedJournal>,
    /// Pages that were brought home from the journal, and are not durable there.
    replayed: Mutex<Option<PageSet>>,
    budget: Option<DirtyBudget>,
    /// Of the medium, if there is a hold-up.
    pace: Option<Pace>,
    context_region: Region,
    context: ContextV1,
    /// What it was made of, until a start with something else has succeeded and that is written down.
    before: Option<VmConfig>,
    damage: Vec<String>,
}

/// The name of one of a VM's regions.
///
/// # Errors
/// [`RegionsError::Name`], [`RegionsError::Nested`].
pub fn region_name(vm: &str, part: &str) -> Result<RegionName, RegionsError> {
    if vm.contains('/') {
        return Err(RegionsError::Nested(vm.to_owned()));
    }
    format!("{vm}/{part}").parse().map_err(|source| RegionsError::Name { name: vm.to_owned(), source })
}

impl VmRegions {
    /// Allocates the regions of a new VM and writes down what it is.
    ///
    /// # Errors
    /// [`RegionsError`]; what was allocated is freed again then.
    pub fn create(pool: &Pool, name: &str, config: &VmConfig) -> Result<Self, RegionsError> {
        Self::create_with(pool, name, config, true)
    }

    /// As [`VmRegions::create`], for a VM that is to be restored from a generation: it counts as cut off until it is, so that what
    /// a cut leaves is recovered and not booted.
    ///
    /// # Errors
    /// As [`VmRegions::create`].
    pub fn create_for_restore(pool: &Pool, name: &str, config: &VmConfig) -> Result<Self, RegionsError> {
        Self::create_with(pool, name, config, false)
    }

    fn create_with(pool: &Pool, name: &str, config: &VmConfig, clean: bool) -> Result<Self, RegionsError> {
        let (ram, context) = (region_name(name, "ram")?, region_name(name, "context")?);
        let spec = |kind, size| RegionSpec { kind, size, medium: config.medium };
        let mut wanted = vec![(ram.clone(), spec(Kind::Ram, config.ram_bytes()))];
        if let Some(geometry) = config.geometry() {
            // Plentiful storage, whatever RAM lies on.
            let (size, medium) = (geometry.swap_region(config.swap_bytes()), Some(MediumKind::File));
            wanted.push((region_name(name, "swap")?, RegionSpec { kind: Kind::Swap, size, medium }));
        }
        wanted.extend(disks::wanted(name, config, config.medium)?);
        wanted.extend(pmem::wanted(name, config, config.medium)?);
        wanted.extend(super::holdup::wanted(name, config)?);
        // The context last: a VM that has one has all.
        wanted.push((context.clone(), spec(Kind::Context, context::region_size(config.cpus))));
        let origins = Origins::open(config)?;
        for (name, spec) in &wanted {
            pool.allocate(name, *spec)?;
        }
        let (leased_ram, context_region) = (lease(pool, name, &ram)?, lease(pool, name, &context)?);
        let others = Others::lease(pool, name, config)?;
        let slots = Slots::read(&context_region)?;
        if !slots.is_empty() {
            // Another process made it since somebody looked.
            let advice = format!("`perdure inspect {name}` tells more");
            return Err(RegionsError::Exists { name: name.to_owned(), standing: "not new", advice });
        }
        let made = move || -> Result<Self, RegionsError> {
            let ram = leased_ram;
            others.disks.fill(&origins)?;
            let made = config.disks.iter().cloned().map(DiskConfig::made).collect();
            let context = ContextV1 {
                sequence: 1,
                written_ns: context::now_ns(),
                config: VmConfig { disks: made, ..config.clone() },
                standing: Standing::Created,
            };
            Encoded::new(&context)?.write(&context_region)?;
            if clean {
                ram.stamp_clean(context.sequence)?;
            }
            Ok(Self::held(name.to_owned(), ram, others, context_region, context, Vec::new()))
        };
        let result = made();
        if result.is_err() {
            for (name, _) in wanted {
                let _ = pool.free(&name);
            }
        }
        result
    }

    /// Leased regions of which nothing is mapped yet.
    fn held(
        name: String,
        ram: Region,
        Others { swap, disks, pmem, journal }: Others,
        context_region: Region,
        context: ContextV1,
        damage: Vec<String>,
    ) -> Self {
        Self {
            name,
            ram: Arc::new(ram),
            swap,
            disks,
            pmem,
            pager: None,
            fresh: false,
            paging_events: Arc::new(|event| tracing::warn!("memory: {event:?}")),
            mapping: None,
            placed: None,
            restoring: None,
            journal,
            replayed: Mutex::default(),
            budget: None,
            pace: None,
            context_region,
            context,
            links: Links::default(),
            before: None,
            damage,
        }
    }

    /// Leases the regions of a VM that there is, and reads its context. Nothing is altered.
    ///
    /// # Errors
    /// [`RegionsError`].
    pub fn open(pool: &Pool, name: &str) -> Result<Self, RegionsError> {
        let ram = lease(pool, name, &region_name(name, "ram")?)?;
        let context_region = lease(pool, name, &region_name(name, "context")?).map_err(|error| match error {
            RegionsError::NoSuchVm(name) => RegionsError::Unfinished(name),
            other => other,
        })?;
        let slots = Slots::read(&context_region)?;
        if slots.is_empty() {
            return Err(RegionsError::Unfinished(name.to_owned()));
        }
        let damage = slots.damage();
        let context =
            slots.newest().ok_or_else(|| RegionsError::NoContext { name: name.to_owned(), damage: damage.clone() })?;
        let name = name.to_owned();
        let (config, region) = (context.config.ram_bytes(), ram.size());
        if config != region {
            return Err(RegionsError::Mismatch { name, config, region });
        }
        let others = Others::lease(pool, &name, &context.config)?;
        Ok(Self::held(name, ram, others, context_region, context, damage))
    }

    /// Leases the regions of a VM whose context cannot be read, to restore them from a generation. `config` says what it is made of.
    /// It counts as cut off until then. Nothing is altered.
    ///
    /// # Errors
    /// [`RegionsError`].
    pub fn open_without_context(pool: &Pool, name: &str, config: VmConfig) -> Result<Self, RegionsError> {
        let ram = lease(pool, name, &region_name(name, "ram")?)?;
        let context_region = lease(pool, name, &region_name(name, "context")?)?;
        let damage = Slots::read(&context_region)?.damage();
        // RAM may still be stamped with the lost context's number: this must not be taken for it.
        let lost = ram.is_clean().or(ram.doubtful_stamp()).unwrap_or(0);
        let standing = Standing::Ended { how: "its context was lost".to_owned() };
        let others = Others::lease(pool, name, &config)?;
        let context = ContextV1 { sequence: lost.saturating_add(1), written_ns: 0, config, standing };
        Ok(Self::held(name.to_owned(), ram, others, context_region, context, damage))
    }

    /// Says who is told of memory that is paged; before [`VmRegions::assemble`].
    pub fn tell_of_paging(&mut self, events: PagingEvents) {
        self.paging_events = events;
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The newest context that verifies.
    #[must_use]
    pub fn context(&self) -> &ContextV1 {
        &self.context
    }

    /// What is wrong with slots of the context that do not verify.
    #[must_use]
    pub fn damage(&self) -> &[String] {
        &self.damage
    }

    /// The RAM region.
    #[must_use]
    pub fn ram(&self) -> &Region {
        &self.ram
    }

    /// What the RAM region lies on.
    #[must_use]
    pub fn medium(&self) -> MediumKind {
        self.ram.medium_kind()
    }

    /// Whether RAM is exactly what the newest context says.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.ram.is_clean() == Some(self.context.sequence)
    }

    /// Disks of the pool and persistent memory that are not what they were at the newest context, with the context that they are of.
    pub fn strays(&self) -> impl Iterator<Item = (String, Option<u64>)> {
        let in_words = |name: &str, region: &Region| match region.info().kind {
            Kind::Pmem => format!("persistent memory {name}"),
            kind => format!("{kind} {name}"),
        };
        let stamps = self.storage().map(move |(name, region)| (in_words(name, region), region.is_clean()));
        stamps.filter(|(_, stamp)| *stamp != Some(self.context.sequence))
    }

    /// The disks of the pool as they are now. The machine must be held still.
    pub(super) fn moment_of_disks(&self) -> Vec<Moment> {
        self.disks.moment()
    }

    /// What the guest keeps things in: the disks of the pool, and persistent memory, by their names.
    pub(super) fn storage(&self) -> impl Iterator<Item = (&str, &Region)> {
        self.disks.leased().chain(self.pmem.leased())
    }

    /// Makes RAM what a fresh start expects: zeros. It is so already in a VM that has never run.
    ///
    /// # Errors
    /// [`RegionsError::Region`].
    pub fn prepare_to_boot(&mut self) -> Result<(), RegionsError> {
        self.fresh = true;
        if self.is_clean() && self.context.standing == Standing::Created {
            return Ok(());
        }
        self.zero_ram()
    }

    /// Makes RAM zeros again, for a fresh start. Durably not clean from then on.
    ///
    /// # Errors
    /// [`RegionsError::Region`].
    pub fn zero_ram(&mut self) -> Result<(), RegionsError> {
        self.clear_stamp()?;
        Ok(self.ram.zero()?)
    }

    /// A fresh machine over the RAM region, which is mapped the first time. The stamp is cleared meanwhile: when this
    /// returns, RAM is durably no context's any more, and may be written, as may disks. On an error it may or may not be.
    ///
    /// # Errors
    /// [`RegionsError::Region`], [`RegionsError::Memory`], [`RegionsError::Machine`], [`RegionsError::Disk`].
    pub fn assemble(&mut self, host: Host, mut wiring: Wiring) -> Result<Machine, RegionsError> {
        self.disks.open(&self.context.config)?;
        wiring.attachments.extend(self.disks.attach(self.context.config.cpus)?);
        wiring.attachments.extend(self.links.attach(&self.context.config).map_err(MachineError::from)?);
        let ram = self.place_ram()?;
        wiring.attachments.extend(self.pmem.attach(&ram)?);
        let (machine, cleared) = std::thread::scope(|scope| {
            // Putting a machine together writes no RAM; the write that clears the stamp waits for the disk.
            let clearing = scope.spawn(|| self.clear_stamp());
            (Machine::assemble(host, self.config(), ram, wiring), clearing.join())
        });
        cleared.map_err(|_| RegionsError::Interrupted(self.name.clone()))??;
        // Not before: what is moved is no context's any more.
        self.hold_paging(false);
        Ok(machine?)
    }

    /// Goes on restoring RAM while it is used, where the context says that this was under way. Nothing is altered on an error.
    ///
    /// # Errors
    /// [`RestoringError`].
    pub fn go_on_restoring(&mut self, paging: &Paging<'_>) -> Result<(), RestoringError> {
        let Some(record) = self.context.standing.restoring() else { return Ok(()) };
        let destination = match &self.swap {
            None => Destination::Ram(Arc::clone(&self.ram)),
            Some(swap) => {
                let tables = self.context.standing.paged();
                Destination::Paged { ram: &self.ram, swap, tables, events: &self.paging_events }
            }
        };
        let restoring = Restoring::begin(record, &self.name, &self.context.config, destination, paging)?;
        self.pager = restoring.paged().cloned();
        self.restoring = Some(restoring);
        Ok(())
    }

    /// The restore that this process took up; it may be complete by now.
    #[must_use]
    pub fn restore_under_way(&self) -> Option<&Restoring> {
        self.restoring.as_ref()
    }

    /// How far a restore is that is under way, for the next context. To be taken before RAM is made durable.
    #[must_use]
    pub fn restoring(&self) -> Option<RestoringV1> {
        self.restoring.as_ref().and_then(Restoring::record)
    }

    /// Memory that nobody has asked for is not fetched, or is again.
    pub fn hold_restore(&self, held: bool) {
        if let Some(restoring) = &self.restoring {
            restoring.hold(held);
        }
    }

    /// Memory stays where it is, or may move again.
    pub fn hold_paging(&self, held: bool) {
        match &self.pager {
            Some(pager) if held => pager.hold(),
            Some(pager) => pager.go_on(),
            None => {}
        }
    }

    /// What pages the memory, if it is paged.
    #[must_use]
    pub fn pager(&self) -> Option<&Arc<Pager>> {
        self.pager.as_ref()
    }

    /// A held pager of what the context says, or of zeros.
    fn begin_paging(&self, fresh: bool) -> Result<Option<Arc<Pager>>, RegionsError> {
        let paged = self.context.standing.paged().filter(|_| !fresh);
        Ok(paging::start(&self.context.config, &self.ram, self.swap.as_ref(), paged, None, &self.paging_events)?)
    }

    /// The memory of a frozen VM, for reading: none of it moves.
    pub(super) fn frozen_memory(&self) -> Result<Memory, RegionsError> {
        self.replay_journal()?;
        Ok(Memory::of(self.begin_paging(false)?, &self.ram))
    }

    /// The memory, all of it zeros: nothing that was in it is left. Durably not clean from then on.
    pub(super) fn fresh_memory(&mut self) -> Result<Memory, RegionsError> {
        self.zero_ram()?;
        let pager = self.begin_paging(true)?;
        if let Some(pager) = &pager {
            pager.go_on();
        }
        Ok(Memory::of(pager, &self.ram))
    }

    fn place_ram(&mut self) -> Result<Arc<GuestRam>, RegionsError> {
        if let Some(ram) = &self.placed {
            return Ok(Arc::clone(ram));
        }
        if self.pager.is_none() {
            self.pager = self.begin_paging(self.fresh)?;
        }
        let filler = self.restoring.as_ref().and_then(Restoring::filler);
        let (mapping, memory): (_, Box<dyn HostMemory>) = match (&self.pager, filler) {
            (Some(pager), _) => (None, Box::new(Paged(Arc::clone(pager)))),
            (None, Some(pager)) => (Some(Arc::clone(pager.mapping())), Box::new(PagedMemory(Arc::clone(pager)))),
            (None, None) => {
                let mapping = Arc::new(self.ram.map()?);
                (Some(Arc::clone(&mapping)), Box::new(mapping))
            }
        };
        let ram = GuestRam::place_with(memory, self.pmem.map()?)?;
        if let (Some(pace), Some(holdup), Some(journal)) = (&self.pace, self.context.config.holdup(), &self.journal) {
            let most = super::holdup::lock(journal).capacity();
            ram.bound_dirty_pages(most.min(pace.fits(holdup) / PAGE_SIZE), self.context.config.cpus);
        }
        self.mapping = mapping;
        self.placed = Some(Arc::clone(&ram));
        Ok(ram)
    }

    /// Makes the memory durable. The pager, if there is one, must be held.
    ///
    /// # Errors
    /// [`RegionsError::Region`], [`RegionsError::Paging`].
    pub fn persist_memory(&self) -> Result<Persisted, RegionsError> {
        if let Some(pager) = &self.pager {
            return Ok(paging::persist(pager)?);
        }
        let bytes = match &self.mapping {
            Some(mapping) => self.ram.persist(mapping, Dirty::Unknown)?.bytes,
            None => Some(0),
        };
        Ok(Persisted { bytes, paged: None, journal: None })
    }

    /// Makes disks and persistent memory durable. The machine must be held still.
    ///
    /// # Errors
    /// [`RegionsError::Disk`], [`RegionsError::Pmem`].
    pub fn persist_storage(&self) -> Result<(), RegionsError> {
        // What can be had of one is not given up for the other.
        let (disks, pmem) = (self.disks.flush(), self.pmem.persist());
        disks?;
        Ok(pmem?)
    }

    /// The number of the next context.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.context.sequence + 1
    }

    /// Writes a context to the slot that does not hold the newest one.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn write_context(&mut self, encoded: &Encoded) -> Result<(), ContextError> {
        encoded.write(&self.context_region)?;
        self.context.sequence = encoded.sequence();
        Ok(())
    }

    /// Makes `context`, which has the next number, the newest one, and says that RAM is exactly its. RAM must be durable by now.
    ///
    /// # Errors
    /// [`RegionsError::Context`], [`RegionsError::Region`]: RAM is not stamped then.
    pub fn adopt(&mut self, context: ContextV1) -> Result<(), RegionsError> {
        self.write_context(&Encoded::new(&context)?)?;
        self.stamp_clean(context.sequence)?;
        self.context = context;
        self.damage.clear();
        Ok(())
    }

    /// Says that RAM, disks and persistent memory are exactly those of context `sequence`.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn stamp_clean(&self, sequence: u64) -> Result<(), RegionError> {
        // RAM's counts for the VM, so it is the last.
        self.storage().try_for_each(|(_, region)| region.stamp_clean(sequence))?;
        self.ram.stamp_clean(sequence)
    }

    /// Says that RAM, disks and persistent memory are no context's any more; before anything changes them.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn clear_stamp(&self) -> Result<(), RegionError> {
        self.ram.clear_stamp()?;
        self.storage().try_for_each(|(_, region)| region.clear_stamp())
    }

    /// Writes down that the guest ended, and how: the VM can be started anew.
    ///
    /// # Errors
    /// [`RegionsError`].
    pub fn write_ended(&mut self, how: String) -> Result<(), RegionsError> {
        let sequence = self.next_sequence();
        let config = self.context.config.clone();
        let context = ContextV1 { sequence, written_ns: context::now_ns(), config, standing: Standing::Ended { how } };
        self.write_context(&Encoded::new(&context)?)?;
        // RAM of a guest that ended is nothing that anyone goes on from: it need not reach its medium. Its storage is.
        if let Err(error) = self.persist_storage() {
            tracing::warn!("{}: {error}: what its guest did not flush may be lost", self.name);
        }
        self.stamp_clean(sequence)?;
        self.context = context;
        Ok(())
    }
}

// SAFETY: as for Mapping itself; sharing it keeps it alive, and hands out no references either.
unsafe impl HostMemory for Arc<Mapping> {
    fn as_ptr(&self) -> *mut u8 {
        Mapping::as_ptr(self)
    }

    fn len(&self) -> usize {
        Mapping::len(self)
    }
}

/// The regions of a VM beside RAM and context.
struct Others {
    swap: Option<Arc<Region>>,
    disks: Disks,
    pmem: PmemRegions,
    journal: Option<SharedJournal>,
}

impl Others {
    fn lease(pool: &Pool, vm: &str, config: &VmConfig) -> Result<Self, RegionsError> {
        Ok(Self {
            swap: lease_swap(pool, vm, config)?,
            disks: Disks::lease(pool, vm, config)?,
            pmem: PmemRegions::lease(pool, vm, config)?,
            journal: super::holdup::lease_journal(pool, vm)?,
        })
    }
}

fn lease_swap(pool: &Pool, vm: &str, config: &VmConfig) -> Result<Option<Arc<Region>>, RegionsError> {
    match config.geometry() {
        Some(_) => Ok(Some(Arc::new(lease(pool, vm, &region_name(vm, "swap")?)?))),
        None => Ok(None),
    }
}

impl std::fmt::Debug for VmRegions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmRegions")
            .field("name", &self.name)
            .field("standing", &self.context.standing)
            .finish_non_exhaustive()
    }
}

pub(super) fn lease(pool: &Pool, vm: &str, name: &RegionName) -> Result<Region, RegionsError> {
    let lease = pool.lease(name).map_err(|error| match error {
        LeaseError::Held { holder, .. } => {
            RegionsError::InUse { name: vm.to_owned(), holder: holder.to_string(), pid: holder.pid }
        }
        LeaseError::NoSuchRegion { .. } => RegionsError::NoSuchVm(vm.to_owned()),
        other => RegionsError::Lease(other),
    })?;
    if lease.info().kind == Kind::Log {
        return Err(RegionsError::Log(name.clone()));
    }
    let region = Region::open(lease)?;
    match pool.log_of(&region) {
        Some(log) => Err(RegionsError::Bound { name: name.clone(), log }),
        None => Ok(region),
    }
}
