//! Which pages of RAM changed since the last look.
//!
//! Two witnesses see two kinds of writers, and only both together see all of them: KVM's dirty log has what the guest wrote (and
//! what KVM wrote on its behalf: clocks, page-table bits), `vm-memory`'s bitmap has what the VMM wrote (boot, device emulation).
//! So nothing outside of this module asks one of them alone.
//!
//! In place of KVM's dirty log the kernel's own may be asked: `PAGEMAP_SCAN` over memory that is write-protected asynchronously
//! ([`allocator::medium::write_watch`]). See [`Witness`] for which one is chosen.
//!
//! Of a VM that has a hold-up, what is dirty is bounded ([`Bound`]), and two listen to what it writes ([`told`]).
//!
//! Pages are numbered as they lie in the RAM region, one slot behind the other, not by guest address.

pub(super) mod told;

use std::ops::Range;
use std::sync::Arc;

use allocator::medium::write_watch;

use super::kvm::{KvmError, Vm};
use super::memory::GuestRam;
pub use told::{Standing, UnflushedPages};

/// A set of page numbers below a bound: a bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set of numbers below `pages`.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], pages }
    }

    /// The bound.
    #[must_use]
    pub fn bound(&self) -> u64 {
        self.pages
    }

    /// Puts a page in. One beyond the bound is ignored.
    pub fn insert(&mut self, page: u64) {
        if page < self.pages
            && let Some(word) = usize::try_from(page / 64).ok().and_then(|index| self.words.get_mut(index))
        {
            *word |= 1 << (page % 64);
        }
    }

    /// Puts in neighbours. What is beyond the bound is ignored.
    pub fn insert_run(&mut self, run: &Range<u64>) {
        self.each_word(run, |word, mask| *word |= mask);
    }

    /// Takes out neighbours.
    pub fn remove_run(&mut self, run: &Range<u64>) {
        self.each_word(run, |word, mask| *word &= !mask);
    }

    fn each_word(&mut self, run: &Range<u64>, change: impl Fn(&mut u64, u64)) {
        let end = run.end.min(self.pages);
        let mut at = run.start;
        while at < end {
            let in_word = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - in_word)) << (at % 64);
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|index| self.words.get_mut(index)) {
                change(word, mask);
            }
            at += in_word;
        }
    }

    /// Whether it is in.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|index| self.words.get(index));
        page < self.pages && word.is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Puts in what a bitmap says, whose first bit stands for page `first`.
    pub fn merge(&mut self, first: u64, bitmap: &[u64]) {
        for (index, word) in (0..).zip(bitmap).filter(|(_, word)| **word != 0) {
            let at = first + 64 * index;
            match usize::try_from(at / 64).ok().and_then(|index| self.words.get_mut(index)) {
                Some(own) if at.is_multiple_of(64) && at + 64 <= self.pages => *own |= word,
                _ => (0..64).filter(|bit| word & (1 << bit) != 0).for_each(|bit| self.insert(at + bit)),
            }
        }
    }

    /// Puts in everything that is in `other`.
    pub fn union(&mut self, other: &Self) {
        self.merge(0, &other.words);
    }

    /// How many are in.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether none is in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Runs of neighbours, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs_from(0)
    }

    /// Runs of neighbours from `at` on, ascending.
    fn runs_from(&self, mut at: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        std::iter::from_fn(move || {
            let start = self.seek(at, true)?;
            let end = self.seek(start, false).unwrap_or(self.pages);
            at = end;
            Some(start..end)
        })
    }

    /// The first number from `from` on that is in (or not).
    fn seek(&self, from: u64, set: bool) -> Option<u64> {
        let mut index = usize::try_from(from / 64).ok()?;
        let mut mask = u64::MAX << (from % 64);
        while let Some(word) = self.words.get(index) {
            let found = if set { *word } else { !*word } & mask;
            if found != 0 {
                let page = index as u64 * 64 + u64::from(found.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            mask = u64::MAX;
            index += 1;
        }
        None
    }
}

/// Who sees the guest's writes.
///
/// The rule: KVM's log, unless [`CHOICE`] says otherwise. It was the quicker one in a generation's pause wherever both were measured (KVM
/// keeps a bitmap, `PAGEMAP_SCAN` walks page tables), and on a shared mapping of a file a first write to a page costs the guest some
/// 3 µs with it and 6 to 70 µs with write protection, since the file system is asked each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Witness {
    /// KVM's dirty log.
    KvmLog,
    /// `PAGEMAP_SCAN` and write protection that the kernel lifts by itself: Linux 6.7, and a permission to use userfaultfd.
    PagemapScan,
}

/// The environment variable that chooses a [`Witness`]: `kvm-log` or `pagemap-scan`.
pub const CHOICE: &str = "PERDURE_DIRTY_TRACKING";

impl Witness {
    /// As [`CHOICE`] says, where the kernel has it.
    #[must_use]
    pub fn chosen() -> Self {
        match std::env::var(CHOICE).as_deref() {
            Ok("pagemap-scan") => match write_watch::available() {
                Ok(()) => Self::PagemapScan,
                Err(error) => {
                    tracing::warn!(
                        "{CHOICE}: this kernel has no PAGEMAP_SCAN with WP_ASYNC ({error}): KVM's log is used"
                    );
                    Self::KvmLog
                }
            },
            Ok("kvm-log") | Err(_) => Self::KvmLog,
            Ok(other) => {
                tracing::warn!("{CHOICE} is {other:?}, and not kvm-log or pagemap-scan: KVM's log is used");
                Self::KvmLog
            }
        }
    }
}

/// What keeps a guest from writing to more pages than it may before somebody looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// KVM's dirty rings ([`super::kvm::ring`]), of so many entries each: KVM lets nobody go on whose ring is full.
    Rings {
        /// Of the ring of each vCPU.
        entries: u32,
    },
    /// Time ([`super::kvm::slice`]), where rings cannot be relied upon: a vCPU runs for a slice, and then looks.
    Slices,
}

/// The environment variable that says what bounds a guest, whatever would be chosen: `rings` or `slices`.
pub const BOUND: &str = "PERDURE_DIRTY_BOUND";

impl Bound {
    /// For `cpus` vCPUs where some `pages` may be dirty.
    ///
    /// Rings: the larger, the more pages stay writable, since what fits in the rings is told once. But there must be room for two rings full
    /// ([`told`]), also when less fits later.
    #[must_use]
    pub fn chosen(pages: u64, cpus: u32) -> Self {
        let most = u32::try_from(pages / 4 / u64::from(cpus.max(1))).unwrap_or(u32::MAX).max(1);
        let rings = Self::Rings { entries: 1 << most.ilog2() };
        match std::env::var(BOUND).as_deref() {
            Ok("rings") => rings,
            Ok("slices") => Self::Slices,
            Err(_) if super::kvm::ring::are_sound() => rings,
            Err(_) => Self::Slices,
            Ok(other) => {
                tracing::warn!("{BOUND} is {other:?}, and not rings or slices: slices it is, which work everywhere");
                Self::Slices
            }
        }
    }
}

/// Tells which pages of a machine's RAM changed. Clones ask the same machine; what one was told the other is not.
#[derive(Debug, Clone)]
pub struct DirtyTracker {
    vm: Vm,
    ram: Arc<GuestRam>,
}

impl DirtyTracker {
    pub(super) fn new(vm: Vm, ram: Arc<GuestRam>) -> Self {
        Self { vm, ram }
    }

    /// The memory that is watched.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Begins to watch; from then on the guest's first write to each page costs it some microseconds. The guest may run.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn enable(&self) -> Result<(), KvmError> {
        if self.vm.teller().is_some() {
            self.ram.told().watch(self.ram.pages());
            return Ok(());
        }
        match self.ram.witness() {
            Witness::KvmLog => self.vm.log_dirty_pages(),
            Witness::PagemapScan => self.ram.watch().map_err(failed("write-protecting RAM (UFFDIO_WRITEPROTECT)")),
        }
    }

    /// Adds the pages that changed since the last call (or since [`DirtyTracker::enable`]) to `into`; each is told once.
    ///
    /// While the guest runs, a page that it writes during the call is told by this call or by the next: a copy made after the
    /// call has the content told by this one, or the next call tells the page again.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]: what was told so far is in `into`, and what was not will be told again.
    pub fn collect(&self, into: &mut PageSet) -> Result<(), KvmError> {
        if self.vm.teller().is_some() {
            return self.ram.told().collect(&self.vm, into);
        }
        match self.ram.witness() {
            Witness::KvmLog => self.vm.take_dirty_pages(into)?,
            Witness::PagemapScan => {
                self.ram.take_watched(into).map_err(failed("finding the pages written (PAGEMAP_SCAN)"))?;
            }
        }
        self.ram.take_written(into);
        Ok(())
    }
}

fn failed(doing: &'static str) -> impl Fn(std::io::Error) -> KvmError {
    move |source| KvmError::Ioctl { doing, source }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::machine::config::{ByteSize, Kernel, VmConfig};
    use crate::machine::kvm::Host;
    use crate::machine::memory::{Anonymous, PAGE_SIZE};
    use crate::machine::{Machine, Wiring};

    const MEMORY: usize = 32 << 20;

    fn machine(guest: &str, cmdline: &str, cpus: u32, witness: Witness) -> Machine {
        let memory = Box::new(Anonymous::new(MEMORY).unwrap());
        machine_over(GuestRam::place_watched_by(memory, Vec::new(), witness).unwrap(), guest, cmdline, cpus)
    }

    /// A machine with an embedded guest that has been booted.
    pub(super) fn machine_over(ram: Arc<GuestRam>, guest: &str, cmdline: &str, cpus: u32) -> Machine {
        let config = VmConfig {
            cpus,
            memory: ByteSize(ram.pages() * PAGE_SIZE),
            kernel: Kernel::Guest(guest.to_owned()),
            cmdline: cmdline.to_owned(),
            ..VmConfig::default()
        };
        let wiring =
            Wiring { serial_output: Box::new(std::io::sink()), events: Arc::new(|_| ()), attachments: Vec::new() };
        let mut machine = Machine::assemble(Host::open().unwrap(), &config, ram, wiring).unwrap();
        machine.boot().unwrap();
        machine
    }

    fn copy(ram: &GuestRam, shadow: &mut [u8], pages: &PageSet) {
        for run in pages.runs() {
            let bytes = (run.start * PAGE_SIZE) as usize..(run.end * PAGE_SIZE) as usize;
            ram.copy_pages(run.start, &mut shadow[bytes]).unwrap();
        }
    }

    /// Keeps a copy up to date by what the tracker tells, partly while the guest runs, and compares all of it in each pause.
    fn a_copy_keeps_up_with(guest: &str, cmdline: &str, cpus: u32) {
        keeps_up(&machine(guest, cmdline, cpus, Witness::KvmLog));
        if write_watch::available().is_ok() {
            keeps_up(&machine(guest, cmdline, cpus, Witness::PagemapScan));
        }
    }

    fn keeps_up(machine: &Machine) {
        let (tracker, ram) = (machine.dirty_tracker(), Arc::clone(machine.ram()));
        let mut shadow = vec![0; MEMORY];
        machine.run().unwrap();
        tracker.enable().unwrap();
        ram.copy_pages(0, &mut shadow).unwrap();
        let (mut told, mut unequal) = (0, 0);
        for round in 0..20_u64 {
            std::thread::sleep(Duration::from_millis(3));
            let mut dirty = PageSet::new(ram.pages());
            tracker.collect(&mut dirty).unwrap();
            copy(&ram, &mut shadow, &dirty);
            told += dirty.count();
            // The VMM writes, too: a page that no guest here uses.
            ram.memory().write_obj(round + 1, GuestAddress(0x4000)).unwrap();
            machine.pause().unwrap();
            let mut dirty = PageSet::new(ram.pages());
            tracker.collect(&mut dirty).unwrap();
            assert!(dirty.contains(4), "the VMM's own write");
            copy(&ram, &mut shadow, &dirty);
            told += dirty.count();
            let mut now = vec![0; MEMORY];
            ram.copy_pages(0, &mut now).unwrap();
            unequal += now.chunks(4096).zip(shadow.chunks(4096)).filter(|(now, shadow)| now != shadow).count();
            machine.run().unwrap();
        }
        assert_eq!(unequal, 0, "pages that changed and were not told");
        assert!(!machine.has_ended(), "the guest went on all the time");
        assert!(told > 40, "the guest wrote: {told}");
        assert!(told < 40 * ram.pages() / 2, "what did not change is not told: {told}");
    }

    #[test]
    fn every_page_that_a_walking_guest_changes_is_told() {
        a_copy_keeps_up_with("memwalk", "pattern=uniform ws=4194304 write=60 verify=1", 1);
    }

    #[test]
    fn every_page_that_a_ticking_guest_changes_is_told() {
        a_copy_keeps_up_with("counter", "hz=1000 ram=1048576", 1);
    }

    #[test]
    fn every_page_that_two_cpus_change_is_told() {
        a_copy_keeps_up_with("smp", "", 2);
    }

    proptest! {
        #[test]
        fn a_set_is_what_was_put_in(pages in 1_u64..400, mut put in proptest::collection::btree_set(0_u64..500, 0..100)) {
            let mut set = PageSet::new(pages);
            put.iter().for_each(|page| set.insert(*page));
            put.retain(|page| *page < pages);
            prop_assert_eq!(set.count(), put.len() as u64);
            prop_assert_eq!(set.is_empty(), put.is_empty());
            let told: Vec<u64> = set.runs().flatten().collect();
            prop_assert_eq!(told, put.iter().copied().collect::<Vec<_>>());
            let later: Vec<u64> = set.runs_from(pages / 2).flatten().collect();
            prop_assert_eq!(later, put.iter().copied().filter(|page| *page >= pages / 2).collect::<Vec<_>>());
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "runs are as long as they can be");
            prop_assert!((0..500).all(|page| set.contains(page) == put.contains(&page)));
        }

        #[test]
        fn runs_are_put_in_and_taken_out(pages in 1_u64..300, put in (0_u64..350, 0_u64..200), out in (0_u64..350, 0_u64..200)) {
            let (put, out) = (put.0..put.0 + put.1, out.0..out.0 + out.1);
            let mut set = PageSet::new(pages);
            set.insert_run(&put);
            set.remove_run(&out);
            for page in 0..400 {
                prop_assert_eq!(set.contains(page), page < pages && put.contains(&page) && !out.contains(&page), "page {}", page);
            }
        }

        #[test]
        fn bitmaps_are_merged_where_they_belong(first in 0_u64..200, words in proptest::collection::vec(any::<u64>(), 0..4)) {
            let mut set = PageSet::new(300);
            set.insert(7);
            set.merge(first, &words);
            for page in 0_u64..300 {
                let bit = page.checked_sub(first).is_some_and(|bit| {
                    words.get((bit / 64) as usize).is_some_and(|word| word & (1 << (bit % 64)) != 0)
                });
                prop_assert_eq!(set.contains(page), bit || page == 7, "page {}", page);
            }
        }
    }
}
