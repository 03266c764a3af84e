//! A VM's regions within its hold-up: the journal, made, replayed and written; the budget, begun, held and let go. See [`crate::persistence::holdup`].

use std::sync::{Arc, PoisonError};

use allocator::journal::JournalV1;
use allocator::{Pool, Region, RegionError, RegionSpec};
use vfs::cut::point::{Point, pass};

use super::super::context::Standing;
use super::super::holdup::{self, DirtyBudget, HoldUpError, Part, PartMemory, Terms};
use super::super::paging::Persisted;
use super::{RegionsError, VmRegions};
use crate::machine::Machine;
use crate::machine::dirty::PageSet;
use crate::machine::memory::{GuestRam, PAGE_SIZE};

impl VmRegions {
    /// Makes the journal of a VM that has a hold-up and none yet, and measures what its medium takes. What is in a journal stays.
    ///
    /// # Errors
    /// [`RegionsError::Pool`], [`RegionsError::HoldUp`].
    pub fn prepare_holdup(&mut self, pool: &Pool) -> Result<(), RegionsError> {
        if self.journal.is_none()
            && let Some((name, spec)) = holdup::wanted(&self.name, &self.context.config)?
        {
            let medium = Some(self.medium());
            pool.allocate(&name, RegionSpec { medium, ..spec })?;
            self.journal = holdup::lease_journal(pool, &self.name)?;
        }
        if self.context.config.holdup_us.is_some() && self.context.standing.restoring().is_some() {
            return Err(HoldUpError::Restoring(self.name.clone()).into());
        }
        if let (Some(_), Some(journal)) = (self.context.config.holdup_us, &self.journal) {
            self.pace = Some(holdup::measure(&self.name, &self.context.config, journal)?);
        }
        Ok(())
    }

    /// Brings home what the freeze left in the journal; nothing if it left nothing there, or if that was done before. It is not durable there:
    /// as long as the context counts it can be done again.
    ///
    /// # Errors
    /// [`RegionsError::HoldUp`]: unless the region itself fails, nothing was altered.
    pub fn replay_journal(&self) -> Result<(), RegionsError> {
        let Standing::Frozen(frozen) = &self.context.standing else { return Ok(()) };
        let mut replayed = self.replayed.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(named), None) = (frozen.journal, &*replayed) else { return Ok(()) };
        pass(Point::ResumeReplay);
        *replayed = Some(self.bring_home(&named)?);
        pass(Point::ResumeReplayed);
        Ok(())
    }

    fn bring_home(&self, named: &JournalV1) -> Result<PageSet, RegionsError> {
        let missing = || RegionsError::NoJournal(self.name.clone());
        let journal = self.journal.as_ref().ok_or_else(missing)?;
        let homes: Vec<&Region> =
            std::iter::once(&*self.ram).chain(self.pmem.leased().map(|(_, region)| region)).collect();
        let bound = homes.iter().map(|region| region.size() / PAGE_SIZE).sum();
        let mut replayed = PageSet::new(bound);
        let result = holdup::lock(journal).replay(&self.ram, named, bound, &mut |page, bytes| {
            replayed.insert_run(&(page..page + bytes.len() as u64 / PAGE_SIZE));
            write_home(&homes, page * PAGE_SIZE, bytes).map_err(std::io::Error::other)
        });
        result.map_err(|source| HoldUpError::Journal { name: self.name.clone(), source })?;
        Ok(replayed)
    }

    /// Begins to keep what is not durable below what fits into the hold-up, if there is one. Before any vCPU runs. The journal is written
    /// over. `is_fresh`: the machine was booted, so all of its memory may be dirty, and is made durable first; and a hold-up that is too short is
    /// an error, and not only told.
    ///
    /// # Errors
    /// [`RegionsError::HoldUp`], [`RegionsError::Region`].
    pub fn begin_holdup(&mut self, machine: &Machine, is_fresh: bool) -> Result<(), RegionsError> {
        let (Some(pages), Some(journal), Some(pace)) = (machine.unflushed_pages(), self.journal.clone(), &self.pace)
        else {
            return Ok(());
        };
        let pace = pace.clone();
        let replayed = self.replayed.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let unflushed = replayed.unwrap_or_else(|| PageSet::new(pages.ram().pages()));
        if is_fresh {
            self.persist_memory()?;
            self.pmem.persist()?;
        }
        let terms = Terms {
            name: &self.name,
            config: &self.context.config,
            ram: &self.ram,
            parts: self.parts(pages.ram()),
            journal: &journal,
            pace,
            pages,
            unflushed,
        };
        self.budget = Some(DirtyBudget::begin(terms, is_fresh)?);
        Ok(())
    }

    /// The regions in which the machine's pages lie.
    fn parts(&self, ram: &GuestRam) -> Vec<Part> {
        let memory = self.mapping.iter().map(|mapping| PartMemory::Ram(Arc::clone(&self.ram), Arc::clone(mapping)));
        let pmem = self.pmem.mapped().map(|memory| PartMemory::Pmem(Arc::clone(memory)));
        let lengths =
            std::iter::once(ram.ram_pages()).chain(ram.pmem_ranges().map(|(_, range)| range.length / PAGE_SIZE));
        let mut first = 0;
        let part = |(memory, length): (PartMemory, u64)| {
            let pages = first..first + length;
            first = pages.end;
            Part { pages, memory }
        };
        memory.chain(pmem).zip(lengths).map(part).collect()
    }

    /// How the VM keeps within its hold-up, if it has one.
    #[must_use]
    pub fn budget(&self) -> Option<&DirtyBudget> {
        self.budget.as_ref()
    }

    /// The guest was reset: `machine` goes on over the same memory. Before it runs.
    ///
    /// # Errors
    /// [`RegionsError::HoldUp`].
    pub fn machine_changes(&self, machine: &Machine) -> Result<(), RegionsError> {
        match (&self.budget, machine.unflushed_pages()) {
            (Some(budget), Some(pages)) => Ok(budget.machine_changes(pages).map_err(HoldUpError::Kvm)?),
            _ => Ok(()),
        }
    }

    /// Makes durable what a freeze as context `sequence` needs of the memory, where it lies or in the journal. The machine must stand.
    ///
    /// # Errors
    /// As [`VmRegions::persist_memory`].
    pub fn persist_for_freeze(&self, sequence: u64) -> Result<Persisted, RegionsError> {
        match self.budget.as_ref().and_then(|budget| budget.write_journal(sequence)) {
            Some(named) => {
                pass(Point::FreezeJournaled);
                Ok(Persisted { bytes: Some(named.pages * PAGE_SIZE), paged: None, journal: Some(named) })
            }
            None => self.persist_memory(),
        }
    }

    /// Makes disks durable, and persistent memory where it is not in the journal. The machine must be held still.
    ///
    /// # Errors
    /// [`RegionsError::Disk`], [`RegionsError::Pmem`].
    pub fn persist_storage_for_freeze(&self, persisted: &Persisted) -> Result<(), RegionsError> {
        match persisted.journal {
            Some(_) => Ok(self.disks.flush()?),
            None => self.persist_storage(),
        }
    }

    /// A freeze begins: nothing is flushed behind the guest any more.
    pub fn hold_flushing(&self) {
        if let Some(budget) = &self.budget {
            budget.hold();
        }
    }

    /// It runs on after a freeze, or instead of one.
    pub fn go_on_flushing(&self) {
        if let Some(budget) = &self.budget {
            budget.go_on();
        }
    }
}

/// Writes `bytes` from byte `at` on of what lies in `homes`, one behind the other.
fn write_home(homes: &[&Region], mut at: u64, mut bytes: &[u8]) -> Result<(), RegionError> {
    for region in homes {
        if bytes.is_empty() {
            break;
        }
        if at < region.size() {
            let room = usize::try_from(region.size() - at).unwrap_or(usize::MAX).min(bytes.len());
            let (here, later) = bytes.split_at(room);
            region.write_at(here, at)?;
            (at, bytes) = (0, later);
        } else {
            at -= region.size();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use allocator::Kind;
    use vfs::host::HostVfs;

    use super::*;

    #[test]
    fn pages_go_home_to_the_region_that_they_are_of_also_where_they_span_two() {
        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::create_or_open(directory.path(), Arc::new(HostVfs)).unwrap();
        let region = |name: &str, pages: u64| {
            let name = name.parse().unwrap();
            pool.allocate(&name, RegionSpec { kind: Kind::Pmem, size: pages * PAGE_SIZE, medium: None }).unwrap();
            Region::open(pool.lease(&name).unwrap()).unwrap()
        };
        let (one, two) = (region("web/ram", 4), region("web/log", 3));
        let homes = [&one, &two];
        let bytes: Vec<u8> = (0..3 * PAGE_SIZE).map(|at| (at / PAGE_SIZE) as u8 + 1).collect();
        write_home(&homes, 3 * PAGE_SIZE, &bytes).unwrap();
        let first = |region: &Region, page: u64| {
            let mut byte = [0];
            region.read_at(&mut byte, page * PAGE_SIZE).unwrap();
            byte[0]
        };
        assert_eq!([0, 1, 2, 3].map(|page| first(&one, page)), [0, 0, 0, 1]);
        assert_eq!([0, 1, 2].map(|page| first(&two, page)), [2, 3, 0]);
    }
}
