//! Guest RAM: host memory, placed at guest physical addresses on both sides of the hole below 4 GiB. And persistent memory behind it, which is no
//! RAM to the guest and the same to everything that watches and copies what the guest writes.

use std::sync::{Arc, OnceLock};

use allocator::medium::write_watch::WriteWatch;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::boot::layout;
pub use super::boot::layout::PAGE_SIZE;
use super::dirty::told::Told;
use super::dirty::{Bound, PageSet, Witness};

/// Host memory that a guest may be given.
///
/// # Safety
/// `len()` bytes at `as_ptr()` are mapped readable and writable for as long as the value lives, at a fixed address, and
/// nothing in this process holds a Rust reference into them.
pub unsafe trait HostMemory: Send + Sync + std::fmt::Debug {
    /// The first byte; page-aligned.
    fn as_ptr(&self) -> *mut u8;
    /// How many bytes.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Whether the mappings that it consists of stay what they are.
    fn is_fixed(&self) -> bool {
        true
    }
    /// Makes sure that the VMM itself can access `length` bytes from `offset` on; waits for those that are not there yet.
    ///
    /// # Errors
    /// They cannot be had: who accesses them gets no bytes but a signal.
    fn bring_in(&self, offset: u64, length: u64) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let _ = (offset, length);
        Ok(())
    }
    /// Makes sure that the VMM can access any of it in any order.
    ///
    /// # Errors
    /// As [`HostMemory::bring_in`].
    fn bring_all_in(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.bring_in(0, self.len() as u64)
    }
    /// vCPUs are being stopped: whoever waits for memory is not to wait for long, until this is taken back.
    fn hurry(&self, hurry: bool) {
        let _ = hurry;
    }
    /// The guest needs nothing of what lies in `length` bytes from `offset` on, whole pages: from now on they are zeros, or what they were
    /// at some time. Nobody accesses them meanwhile.
    fn give_up(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }
    /// Copies bytes out, wherever they are, without bringing them in. `false`: there is no such way; bring them in and read them.
    ///
    /// # Errors
    /// They cannot be had.
    fn copy_out(&self, offset: u64, into: &mut [u8]) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        let _ = (offset, into);
        Ok(false)
    }
}

// SAFETY: a Mapping unmaps only when it is dropped, does not move, and hands out no references into the memory.
unsafe impl HostMemory for allocator::Mapping {
    fn as_ptr(&self) -> *mut u8 {
        Self::as_ptr(self)
    }

    fn len(&self) -> usize {
        Self::len(self)
    }

    fn give_up(&self, offset: u64, length: u64) {
        // What could not be given up is still there, which is as good.
        if let Err(error) = Self::give_up(self, offset, length) {
            tracing::debug!("{length} bytes of RAM at {offset:#x} are not given back: {error}");
        }
    }
}

/// RAM of a VM that is not to outlive anything: `doctor`'s probes.
#[derive(Debug)]
pub struct Anonymous(MmapRegion);

impl Anonymous {
    /// Maps `size` bytes of zeros.
    ///
    /// # Errors
    /// [`MemoryError::Map`].
    pub fn new(size: usize) -> Result<Self, MemoryError> {
        MmapRegion::new(size).map(Self).map_err(MemoryError::Map)
    }
}

// SAFETY: an owned MmapRegion unmaps only when it is dropped, does not move, and no reference into it is made here.
unsafe impl HostMemory for Anonymous {
    fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    fn len(&self) -> usize {
        self.0.size()
    }
}

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// `mmap` failed.
    #[error("cannot map memory for the guest")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The pieces do not fit together.
    #[error("cannot place {0} bytes of RAM at guest addresses")]
    Place(u64),
    /// Pages that cannot be had.
    #[error("a part of the guest's memory cannot be had")]
    Absent(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Pages that there are not.
    #[error("cannot read {count} pages of RAM from page {first} on: there are {pages}")]
    Read {
        /// The first.
        first: u64,
        /// How many.
        count: u64,
        /// How many there are.
        pages: u64,
    },
}

pub use devices::virtio::GuestMemory;

/// One stretch of RAM: where the guest sees it, where we do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address.
    pub guest_address: u64,
    /// Our address.
    pub host_address: u64,
    /// Bytes.
    pub length: u64,
}

/// Persistent memory to be placed behind RAM: host memory that does not move.
#[derive(Debug)]
pub struct Pmem {
    /// What it is called in generations.
    pub name: String,
    /// Where it lies.
    pub host: Box<dyn HostMemory>,
}

/// The RAM of a VM, and its persistent memory. The host memory stays mapped for as long as this lives.
///
/// Pages are numbered through: those of RAM as they lie in its region, then those of each piece of persistent memory.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    /// RAM's, and behind them those of persistent memory.
    ranges: Vec<RamRange>,
    host: Box<dyn HostMemory>,
    pmem: Vec<Pmem>,
    witness: Witness,
    watch: OnceLock<Vec<WriteWatch>>,
    told: Told,
}

impl GuestRam {
    /// Places `host` at guest addresses: from 0, and what does not fit below the hole from 4 GiB.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn place(host: Box<dyn HostMemory>) -> Result<Arc<Self>, MemoryError> {
        Self::place_with(host, Vec::new())
    }

    /// As [`GuestRam::place`], with `pmem` behind it.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn place_with(host: Box<dyn HostMemory>, pmem: Vec<Pmem>) -> Result<Arc<Self>, MemoryError> {
        Self::place_watched_by(host, pmem, Witness::chosen())
    }

    /// As [`GuestRam::place`], with a witness of the guest's writes of the caller's choice; memory whose mappings change has KVM's log in
    /// any case.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn place_watched_by(
        host: Box<dyn HostMemory>,
        pmem: Vec<Pmem>,
        witness: Witness,
    ) -> Result<Arc<Self>, MemoryError> {
        let size = host.len() as u64;
        let (low, high) = layout::ram_ranges(size);
        let sizes = pmem.iter().map(|pmem| pmem.host.len() as u64);
        let behind = layout::pmem_ranges(size, sizes).ok_or(MemoryError::Place(size))?;
        let mut ranges = Vec::new();
        let mut regions = Vec::new();
        let mut offset = 0;
        for guest in std::iter::once(low).chain(high) {
            let length = guest.end - guest.start;
            // SAFETY: `ram_ranges` splits exactly `size` bytes, so `offset` stays within `host`'s memory.
            let pointer = unsafe { host.as_ptr().add(offset) };
            regions.push(region(pointer, guest.start, length)?);
            ranges.push(RamRange { guest_address: guest.start, host_address: pointer as u64, length });
            offset += usize::try_from(length).map_err(|_| MemoryError::Place(size))?;
        }
        for (guest, pmem) in behind.into_iter().zip(&pmem) {
            let (pointer, length) = (pmem.host.as_ptr(), guest.end - guest.start);
            regions.push(region(pointer, guest.start, length)?);
            ranges.push(RamRange { guest_address: guest.start, host_address: pointer as u64, length });
        }
        let memory = GuestMemory::from_regions(regions).map_err(|_| MemoryError::Place(size))?;
        let witness = if host.is_fixed() { witness } else { Witness::KvmLog };
        Ok(Arc::new(Self { memory, ranges, host, pmem, witness, watch: OnceLock::new(), told: Told::default() }))
    }

    /// Where all of it lies: RAM, and behind it persistent memory.
    #[must_use]
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Where the RAM lies.
    #[must_use]
    pub fn ram_ranges(&self) -> &[RamRange] {
        self.ranges.get(..self.ranges.len() - self.pmem.len()).unwrap_or_default()
    }

    /// Where persistent memory lies, by name.
    pub fn pmem_ranges(&self) -> impl Iterator<Item = (&str, &RamRange)> {
        let ranges = self.ranges.iter().skip(self.ranges.len() - self.pmem.len());
        self.pmem.iter().map(|pmem| pmem.name.as_str()).zip(ranges)
    }

    /// For reading and writing the guest's memory with its addresses checked.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How many pages there are, those of persistent memory included.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.length / PAGE_SIZE).sum()
    }

    /// How many pages of RAM there are: they are the first.
    #[must_use]
    pub fn ram_pages(&self) -> u64 {
        self.ram_ranges().iter().map(|range| range.length / PAGE_SIZE).sum()
    }

    /// Copies whole pages out of the RAM, from page `first` on, as they lie in the region. If the guest writes meanwhile, a page may
    /// be half old and half new.
    ///
    /// # Errors
    /// [`MemoryError::Read`], [`MemoryError::Absent`].
    pub fn copy_pages(&self, first: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let count = into.len() as u64 / PAGE_SIZE;
        let beyond = || MemoryError::Read { first, count, pages: self.pages() };
        let mut at = first.checked_mul(PAGE_SIZE).ok_or_else(beyond)?;
        if first + count > self.pages() {
            return Err(beyond());
        }
        // RAM may have to be brought in; persistent memory, which is behind it, is there.
        let in_ram = (self.ram_pages() * PAGE_SIZE).saturating_sub(at).min(into.len() as u64);
        let (ram, behind) = into.split_at_mut(usize::try_from(in_ram).map_err(|_| beyond())?);
        let rest = if ram.is_empty() {
            behind
        } else if self.host.copy_out(at, ram).map_err(MemoryError::Absent)? {
            at += in_ram;
            behind
        } else {
            self.host.bring_in(at, in_ram).map_err(MemoryError::Absent)?;
            into
        };
        self.read(at, rest).map_err(|()| beyond())
    }

    /// Reads what is there, from byte `at` on, all pages one behind the other.
    fn read(&self, mut at: u64, into: &mut [u8]) -> Result<(), ()> {
        let mut rest = into;
        for range in &self.ranges {
            if at < range.length && !rest.is_empty() {
                let here = usize::try_from(range.length - at).unwrap_or(usize::MAX).min(rest.len());
                let (now, later) = rest.split_at_mut(here);
                self.memory.read_slice(now, GuestAddress(range.guest_address + at)).map_err(|_| ())?;
                (rest, at) = (later, 0);
            } else {
                at = at.saturating_sub(range.length);
            }
        }
        if rest.is_empty() { Ok(()) } else { Err(()) }
    }

    /// Makes sure that all of it is there: before the VMM writes to it at addresses of its own choice.
    ///
    /// # Errors
    /// [`MemoryError::Absent`].
    pub fn bring_in(&self) -> Result<(), MemoryError> {
        self.host.bring_all_in().map_err(MemoryError::Absent)
    }

    /// vCPUs are being stopped, or were: see [`HostMemory::hurry`].
    pub(super) fn hurry(&self, hurry: bool) {
        self.host.hurry(hurry);
    }

    /// The guest needs nothing of what lies in `length` bytes from `start` on, whole pages of its memory. See [`HostMemory::give_up`].
    pub(super) fn give_up(&self, start: GuestAddress, length: u64) {
        let Some(end) = start.0.checked_add(length) else { return };
        let mut offset = 0;
        // Not of persistent memory, whatever a guest says.
        for range in self.ram_ranges() {
            let (first, past) = (start.0.max(range.guest_address), end.min(range.guest_address + range.length));
            if first < past {
                self.host.give_up(offset + (first - range.guest_address), past - first);
                // What a generation holds of it is not what is there any more.
                let length = usize::try_from(past - first).unwrap_or(usize::MAX);
                for piece in self.memory.get_slices(GuestAddress(first), length).flatten() {
                    piece.bitmap().mark_dirty(0, piece.len());
                }
            }
            offset += range.length;
        }
    }

    /// No more than some `pages` of it are to be dirty: what `cpus` vCPUs write is bounded. Before a machine is put together over it; the
    /// first time counts.
    pub fn bound_dirty_pages(&self, pages: u64, cpus: u32) {
        self.told.want(Bound::chosen(pages, cpus));
    }

    /// What was told of changed pages and is not yet dealt with, where what is dirty is bounded.
    pub(super) fn told(&self) -> &Told {
        &self.told
    }

    /// Who sees the guest's writes.
    #[must_use]
    pub fn witness(&self) -> Witness {
        self.witness
    }

    /// Begins to watch all of it, whoever writes. Twice is once.
    pub(super) fn watch(&self) -> std::io::Result<()> {
        if self.watch.get().is_none() {
            let hosts = std::iter::once(&self.host).chain(self.pmem.iter().map(|pmem| &pmem.host));
            let watches = hosts.map(|host| WriteWatch::start(host.as_ptr(), host.len()));
            // Two at once cannot be: the kernel refuses the second.
            let _ = self.watch.set(watches.collect::<Result<_, _>>()?);
        }
        Ok(())
    }

    /// Adds the pages that were written since the last call, or since [`GuestRam::watch`], whose watch this is.
    pub(super) fn take_watched(&self, into: &mut PageSet) -> std::io::Result<()> {
        let behind = self.pmem_ranges().scan(self.ram_pages(), |next, (_, range)| {
            let first = *next;
            *next += range.length / PAGE_SIZE;
            Some(first)
        });
        for (first, watch) in std::iter::once(0).chain(behind).zip(self.watch.get().into_iter().flatten()) {
            watch.collect(&mut |run| run.for_each(|page| into.insert(first + page)))?;
        }
        Ok(())
    }

    /// Adds the pages that the VMM itself wrote since the last call; each is told once.
    pub(super) fn take_written(&self, into: &mut PageSet) {
        let mut first = 0;
        for region in self.memory.iter() {
            let mapping: &MmapRegion<AtomicBitmap> = region;
            into.merge(first, &mapping.bitmap().get_and_reset());
            first += region.len() / PAGE_SIZE;
        }
    }
}

impl devices::virtio::DeviceMemory for GuestRam {
    fn guest_memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn is_whole(&self) -> bool {
        self.host.is_fixed()
    }

    fn bring_in(&self, start: GuestAddress, length: u64) -> std::io::Result<()> {
        let mut offset = 0;
        for range in self.ram_ranges() {
            if let Some(at) = start.0.checked_sub(range.guest_address).filter(|at| *at < range.length) {
                // What is beyond is no memory, or begins anew behind the hole: whoever accesses it is told so.
                let here = length.min(range.length - at);
                return self.host.bring_in(offset + at, here).map_err(std::io::Error::other);
            }
            offset += range.length;
        }
        Ok(())
    }
}

fn region(pointer: *mut u8, guest: u64, length: u64) -> Result<GuestRegionMmap<AtomicBitmap>, MemoryError> {
    let place = || MemoryError::Place(length);
    let size = usize::try_from(length).map_err(|_| place())?;
    let page = std::num::NonZeroUsize::new(PAGE_SIZE as usize).ok_or_else(place)?;
    let builder = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::new(size, page))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED);
    // SAFETY: `pointer` and `size` lie within the memory of the HostMemory that GuestRam keeps for as long as this.
    let mapping = unsafe { builder.with_raw_mmap_pointer(pointer) }.build().map_err(MemoryError::Map)?;
    GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or_else(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_reached_through_guest_addresses_and_nothing_beyond() {
        let ram = GuestRam::place(Box::new(Anonymous::new(1 << 20).unwrap())).unwrap();
        ram.memory().write_obj(0x1122_3344_u32, GuestAddress(0xffffc)).unwrap();
        assert!(ram.memory().write_obj(0_u32, GuestAddress(0xffffe)).is_err());
        assert_eq!(ram.memory().last_addr().0, (1 << 20) - 1);
    }

    #[test]
    fn pages_are_copied_by_their_place_in_the_region_across_the_gap() {
        let size = (3_u64 << 30) + (1 << 20);
        let ram = GuestRam::place(Box::new(Anonymous::new(size as usize).unwrap())).unwrap();
        ram.memory().write_obj(1_u64, GuestAddress((3 << 30) - 4096)).unwrap();
        ram.memory().write_obj(2_u64, GuestAddress(4 << 30)).unwrap();
        let last_low = (3 << 30) / PAGE_SIZE - 1;
        let mut bytes = vec![0xff; 2 * PAGE_SIZE as usize];
        ram.copy_pages(last_low, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[1], bytes[4096], bytes[4097]), (1, 0, 2, 0));
        assert!(ram.copy_pages(ram.pages() - 1, &mut bytes).is_err());
        assert!(ram.copy_pages(u64::MAX / 2, &mut bytes).is_err());

        let mut written = PageSet::new(ram.pages());
        ram.take_written(&mut written);
        assert!(written.runs().eq(std::iter::once(last_low..last_low + 2)));
        written.clear();
        ram.take_written(&mut written);
        assert!(written.is_empty());
    }

    #[test]
    fn persistent_memory_is_behind_ram_and_its_pages_behind_those_of_ram() {
        let anonymous = |size: usize| Box::new(Anonymous::new(size).unwrap());
        let pmem = |name: &str, size| Pmem { name: name.to_owned(), host: anonymous(size) };
        let ram = GuestRam::place_with(anonymous(1 << 20), vec![pmem("log", 2 << 20), pmem("data", 4 << 20)]).unwrap();
        let placed: Vec<_> = ram.pmem_ranges().map(|(name, range)| (name, range.guest_address, range.length)).collect();
        assert_eq!(placed, [("log", 4 << 30, 2 << 20), ("data", 5 << 30, 4 << 20)]);
        assert_eq!((ram.ram_ranges().len(), ram.ram_pages(), ram.pages()), (1, 256, 256 + 512 + 1024));
        for (address, value) in [((1 << 20) - 8, 1_u64), (4 << 30, 2), ((4 << 30) + (2 << 20) - 8, 3), (5 << 30, 4)] {
            ram.memory().write_obj(value, GuestAddress(address)).unwrap();
        }
        let mut bytes = vec![0; 514 * PAGE_SIZE as usize];
        ram.copy_pages(255, &mut bytes).unwrap();
        let found = [4088, 4096, 513 * 4096 - 8, 513 * 4096].map(|at| bytes[at]);
        assert_eq!(found, [1, 2, 3, 4]);
        let mut written = PageSet::new(ram.pages());
        ram.take_written(&mut written);
        assert!(written.runs().eq([255..257, 767..769]), "{written:?}");
        assert!(ram.copy_pages(ram.pages() - 1, &mut bytes).is_err());
    }

    #[derive(Debug)]
    struct Keeping(Anonymous, Arc<std::sync::Mutex<Vec<(u64, u64)>>>);

    // SAFETY: as for what it is made of.
    unsafe impl HostMemory for Keeping {
        fn as_ptr(&self) -> *mut u8 {
            self.0.as_ptr()
        }

        fn len(&self) -> usize {
            self.0.len()
        }

        fn give_up(&self, offset: u64, length: u64) {
            self.1.lock().unwrap().push((offset, length));
        }
    }

    #[test]
    fn a_guest_cannot_give_its_persistent_memory_away() {
        let given = Arc::<std::sync::Mutex<Vec<_>>>::default();
        let host = |size| Box::new(Keeping(Anonymous::new(size).unwrap(), Arc::clone(&given)));
        let pmem = Pmem { name: "log".to_owned(), host: host(2 << 20) };
        let ram = GuestRam::place_with(host(1 << 20), vec![pmem]).unwrap();
        ram.give_up(GuestAddress(4 << 30), 4096);
        ram.give_up(GuestAddress(8192), 4096);
        assert_eq!(*given.lock().unwrap(), [(8192, 4096)]);
    }

    #[test]
    fn ram_beyond_three_gib_continues_above_four() {
        let size = (3_u64 << 30) + (64 << 20);
        let ram = GuestRam::place(Box::new(Anonymous::new(size as usize).unwrap())).unwrap();
        let [low, high] = ram.ranges() else { panic!("{:?}", ram.ranges()) };
        assert_eq!((low.guest_address, low.length), (0, 3 << 30));
        assert_eq!((high.guest_address, high.length), (4 << 30, 64 << 20));
        assert_eq!(high.host_address - low.host_address, 3 << 30);
    }
}
