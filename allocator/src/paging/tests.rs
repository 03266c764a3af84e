//! The tests touch memory as a guest does: through its addresses.
#![allow(unsafe_code)]

use super::*;
use crate::pool::{Pool, RegionSpec};
use crate::region::Kind;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

mod elsewhere;

/// Of more than one page, so that the last one can be a part.
const CLUSTER: u64 = 16 << 10;
const MEMORY: u64 = 128 * CLUSTER - 3 * PAGE_SIZE;
const RAM: u64 = 32 * CLUSTER;

/// Two regions of a VM, which outlive its pagers.
struct Home {
    _directory: tempfile::TempDir,
    pool: Pool,
    geometry: Geometry,
    swap_bytes: u64,
    events: mpsc::Receiver<PagingEvent>,
    sender: mpsc::Sender<PagingEvent>,
}

fn geometry() -> Geometry {
    divided(RAM)
}

fn divided(ram: u64) -> Geometry {
    Geometry { memory: MEMORY, cluster: CLUSTER, frames: (ram / CLUSTER) as u32 }
}

impl Home {
    fn new(medium: MediumKind, swap_bytes: u64) -> Self {
        Self::with_ram(medium, swap_bytes, RAM)
    }

    fn with_ram(medium: MediumKind, swap_bytes: u64, ram: u64) -> Self {
        Self::with_geometry(medium, swap_bytes, divided(ram))
    }

    fn with_geometry(medium: MediumKind, swap_bytes: u64, geometry: Geometry) -> Self {
        let ram = u64::from(geometry.frames) * geometry.cluster;
        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::create_or_open(directory.path().join("pool"), Arc::new(vfs::HostVfs)).unwrap();
        let medium_of = |kind| Some(if kind == Kind::Ram { medium } else { MediumKind::File });
        for (name, kind, size) in
            [("vm/ram", Kind::Ram, ram), ("vm/swap", Kind::Swap, geometry.swap_region(swap_bytes))]
        {
            pool.allocate(&name.parse().unwrap(), RegionSpec { kind, size, medium: medium_of(kind) }).unwrap();
        }
        let (sender, events) = mpsc::channel();
        Self { _directory: directory, pool, geometry, swap_bytes, events, sender }
    }

    fn region(&self, name: &str) -> Arc<Region> {
        Arc::new(Region::open(self.pool.lease(&name.parse().unwrap()).unwrap()).unwrap())
    }

    fn try_pager(&self, tables: Option<u32>) -> Result<Pager, PagingError> {
        self.try_pager_with(tables, None)
    }

    fn try_pager_with(&self, tables: Option<u32>, elsewhere: Option<Elsewhere>) -> Result<Pager, PagingError> {
        let sender = Mutex::new(self.sender.clone());
        let events: PagingEvents = Arc::new(move |event| drop(sender.lock().unwrap().send(event)));
        let (ram, swap) = (self.region("vm/ram"), self.region("vm/swap"));
        let (geometry, swap_bytes) = (self.geometry, self.swap_bytes);
        Pager::start(Plan { geometry, ram, swap, swap_bytes, tables, elsewhere, events })
    }

    fn pager(&self, tables: Option<u32>) -> Pager {
        let pager = self.try_pager(tables).unwrap();
        pager.go_on();
        pager
    }

    fn file(&self, name: &str) -> std::fs::File {
        let region = self.region(name);
        std::fs::File::options().read(true).write(true).open(region.path()).unwrap()
    }
}

fn word(pager: &Pager, page: u64) -> *mut u64 {
    // SAFETY: below, pages are numbers of pages of the memory.
    unsafe { pager.as_ptr().add((page * PAGE_SIZE + 8 * (page % 500)) as usize).cast() }
}

fn read(pager: &Pager, page: u64) -> u64 {
    // SAFETY: within the memory, which outlives the read.
    unsafe { word(pager, page).read_volatile() }
}

fn write(pager: &Pager, page: u64, value: u64) {
    // SAFETY: within the memory; a page belongs to one thread of a test.
    unsafe { word(pager, page).write_volatile(value) }
}

/// Numbers that look random (xorshift64).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A guest that knows what it wrote: reads and writes pages `first`, `first + step`, … at random.
fn walk(pager: &Pager, model: &mut [u64], (first, step): (u64, u64), seed: u64, accesses: usize) {
    let mut draw = Draw(seed);
    let pages = (MEMORY / PAGE_SIZE - first).div_ceil(step);
    for access in 0..accesses as u64 {
        let page = first + step * (draw.next() % pages);
        assert_eq!(read(pager, page), model[page as usize], "page {page}, access {access}");
        if draw.next().is_multiple_of(2) {
            let value = draw.next();
            write(pager, page, value);
            model[page as usize] = value;
        }
    }
}

#[test]
fn memory_is_divided_as_finely_as_tables_and_mappings_allow() {
    let (file, nvdimm) = (Some(MediumKind::File), Some(MediumKind::Nvdimm));
    assert_eq!(Geometry::least_ram(MEMORY, file), FRAMES_MIN * MAPPED_MIN);
    assert_eq!(Geometry::least_ram(MEMORY, nvdimm), FRAMES_MIN * PAGE_SIZE);
    for medium in [None, file, nvdimm] {
        let least = Geometry::least_ram(MEMORY, medium);
        assert!(Geometry::new(MEMORY, least, medium).is_some() && Geometry::new(MEMORY, least - 1, medium).is_none());
        assert!(Geometry::new(MEMORY + 1, least, medium).is_none());
        for (memory, ram) in [(1 << 28, 1 << 26), (4 << 30, 1 << 30), (1 << 40, 1 << 38)] {
            let geometry = Geometry::new(memory, ram, medium).unwrap();
            assert!(u64::from(geometry.clusters()) <= CLUSTERS_MAX);
            assert!(u64::from(geometry.frames()) <= MAPPED_MAX || is_one_mapping(medium));
            assert_eq!(u64::from(geometry.frames()) * geometry.cluster(), ram);
        }
    }
    let of = |medium| Geometry::new(1 << 28, 1 << 26, medium).unwrap().cluster();
    assert_eq!((of(nvdimm), of(file), of(None)), (4 << 10, 16 << 10, 16 << 10));
}

fn outages(medium: MediumKind) {
    outages_of(&Home::new(medium, MEMORY));
}

fn outages_of(home: &Home) {
    let geometry = home.geometry;
    let mut model = vec![0; (MEMORY / PAGE_SIZE) as usize];
    let mut tables = None;
    for outage in 0..6 {
        let pager = home.pager(tables);
        walk(&pager, &mut model, (0, 1), 7 + outage, 3000);
        pager.hold();
        let before = pager.status();
        assert!(before.resident <= u64::from(geometry.frames));
        if outage > 0 {
            assert!(before.hard_faults > 0 && before.soft_faults > 0 && before.written > 0, "{before:?}");
            assert!(before.swapped > 0 && before.residence() < 50.0, "{before:?}");
        }
        let frames: Vec<_> = {
            let state = pager.shared.state();
            (0..geometry.clusters()).map(|cluster| state.frames.frame_of(cluster)).collect()
        };
        tables = Some(pager.persist().unwrap().0);
        drop(pager);
        let pager = home.pager(tables);
        let after: Vec<_> = {
            let state = pager.shared.state();
            (0..geometry.clusters()).map(|cluster| state.frames.frame_of(cluster)).collect()
        };
        assert_eq!(after, frames, "the same clusters are in the same frames");
        assert_eq!(pager.status().swapped, before.swapped);
    }
    assert!(home.events.try_recv().is_err(), "nothing to tell");
}

#[test]
fn a_guest_four_times_its_ram_finds_every_byte_through_outages_on_a_file() {
    outages(MediumKind::File);
}

#[test]
fn a_guest_four_times_its_ram_finds_every_byte_through_outages_on_nvdimm() {
    outages(MediumKind::Nvdimm);
}

#[test]
fn a_guest_finds_every_byte_through_outages_in_clusters_of_a_page() {
    let geometry = Geometry::new(MEMORY, MEMORY / 4, Some(MediumKind::Nvdimm)).unwrap();
    assert_eq!(geometry.cluster, PAGE_SIZE);
    outages_of(&Home::with_geometry(MediumKind::Nvdimm, MEMORY, geometry));
}

/// Set at the end of a scope, failed or not: whoever looks at it would never end otherwise.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn several_cpus_copies_and_freezes_meet_and_nothing_is_lost() {
    let home = Home::new(MediumKind::File, MEMORY);
    let pager = home.pager(None);
    let done = AtomicBool::new(false);
    let models: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let walkers: Vec<_> = (0..3_u64)
            .map(|cpu| {
                let pager = &pager;
                scope.spawn(move || {
                    let mut model = vec![0; (MEMORY / PAGE_SIZE) as usize];
                    walk(pager, &mut model, (cpu, 3), 99 + cpu, 4000);
                    model
                })
            })
            .collect();
        scope.spawn(|| {
            let mut bytes = vec![0; 5 * CLUSTER as usize];
            let mut draw = Draw(5);
            while !done.load(Ordering::SeqCst) {
                let at = draw.next() % (MEMORY - bytes.len() as u64);
                pager.read(at, &mut bytes).unwrap();
                pager.hold();
                std::thread::sleep(Duration::from_micros(300));
                pager.go_on();
            }
        });
        let _done = SetAtEnd(&done);
        walkers.into_iter().map(|walker| walker.join().unwrap()).collect()
    });
    // All of it once more, without bringing it in, and with.
    let mut copy = vec![0; MEMORY as usize];
    pager.read(0, &mut copy).unwrap();
    for page in 0..MEMORY / PAGE_SIZE {
        let value = models[(page % 3) as usize][page as usize];
        let at = (page * PAGE_SIZE + 8 * (page % 500)) as usize;
        assert_eq!(u64::from_le_bytes(copy[at..at + 8].try_into().unwrap()), value, "page {page}, copied");
        pager.bring_in(page * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(read(&pager, page), value, "page {page}");
    }
    assert!(pager.read(MEMORY - 1, &mut [0; 2]).is_err() && pager.bring_in(u64::MAX, 2).is_err());
}

#[test]
fn a_sequence_is_read_ahead_and_what_did_not_change_is_not_written_again() {
    let home = Home::new(MediumKind::File, MEMORY);
    let pager = home.pager(None);
    let pages = MEMORY / PAGE_SIZE;
    (0..pages).for_each(|page| write(&pager, page, page + 1));
    for _ in 0..4 {
        (0..pages).for_each(|page| assert_eq!(read(&pager, page), page + 1));
    }
    let status = pager.status();
    assert!(status.read_ahead > 60, "{status:?}");
    assert!(status.dropped > 2 * status.written, "{status:?}");
}

#[test]
fn memory_that_was_never_used_comes_as_zeros_ahead_of_a_sequence() {
    for medium in [MediumKind::File, MediumKind::Nvdimm] {
        let home = Home::new(medium, MEMORY);
        let pager = home.pager(None);
        let pages = MEMORY / PAGE_SIZE;
        for page in 0..pages {
            assert_eq!(read(&pager, page), 0);
            write(&pager, page, page + 1);
        }
        let status = pager.status();
        assert!(status.zero_faults < u64::from(geometry().clusters()), "{status:?}");
        (0..pages).for_each(|page| assert_eq!(read(&pager, page), page + 1));
    }
}

#[test]
fn what_the_guest_needs_no_more_is_zeros_and_takes_no_room() {
    let home = Home::new(MediumKind::File, MEMORY);
    let pager = home.pager(None);
    let pages = MEMORY / PAGE_SIZE;
    (0..pages).for_each(|page| write(&pager, page, page + 1));
    pager.discard(CLUSTER + 1, MEMORY - CLUSTER - 1).unwrap();
    let status = pager.status();
    assert!(status.resident + status.swapped <= 2 && status.slots_used <= 2, "{status:?}");
    let kept = 2 * CLUSTER / PAGE_SIZE;
    (0..pages).for_each(|page| assert_eq!(read(&pager, page), if page < kept { page + 1 } else { 0 }));
    assert!(pager.discard(0, u64::MAX).is_err());
}

/// A guest that waits for room would be waited for without end by a test that failed: it gets all the room there is then.
struct RoomAtLast<'a>(&'a Pager);

impl Drop for RoomAtLast<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nothing that was written is kept from now on, so each of these is room for all that may be written meanwhile.
            (0..1000).for_each(|_| {
                let _ = self.0.discard(0, MEMORY);
                std::thread::sleep(Duration::from_millis(1));
            });
        }
    }
}

/// Waits until `done`, for 20 s at most. Whether it is.
fn within_reason(mut done: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !done() && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    done()
}

#[test]
fn a_full_swap_region_makes_the_guest_wait_until_there_is_room_and_loses_nothing() {
    let home = Home::new(MediumKind::File, 16 * CLUSTER);
    let pager = home.pager(None);
    let pages = MEMORY / PAGE_SIZE;
    let progress = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        let _room = RoomAtLast(&pager);
        let guest = scope.spawn(|| {
            for page in 0..pages {
                write(&pager, page, page + 1);
                progress.store(page, Ordering::SeqCst);
            }
        });
        let told = home.events.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(told, PagingEvent::SwapFull), "{told:?}");
        let stood = progress.load(Ordering::SeqCst);
        assert!(stood < pages * 2 / 3, "48 clusters of 128 have room: {stood}");
        std::thread::sleep(Duration::from_millis(100));
        // To stop its vCPU what it waits for is brought, and no more.
        let stood = progress.load(Ordering::SeqCst);
        pager.hurry(true);
        assert!(within_reason(|| progress.load(Ordering::SeqCst) != stood), "what is waited for comes in a hurry");
        pager.hurry(false);
        assert!(!guest.is_finished());
        let told = home.events.try_recv();
        assert!(told.is_err(), "it is told once, and room is not told of before there is some: {told:?}");
        // Room comes: the guest's first clusters, again and again.
        let finished = within_reason(|| {
            let behind = progress.load(Ordering::SeqCst).saturating_sub(20 * CLUSTER / PAGE_SIZE) * PAGE_SIZE;
            pager.discard(0, behind).unwrap();
            guest.is_finished()
        });
        assert!(finished, "with room it goes on");
        assert!(matches!(home.events.try_recv(), Ok(PagingEvent::SwapRoom)), "room is told of");
    });
    let kept = pages - 10 * CLUSTER / PAGE_SIZE;
    (kept..pages).for_each(|page| assert_eq!(read(&pager, page), page + 1));
}

#[test]
fn a_damaged_slot_is_named_and_never_zeros_and_the_rest_lives_on() {
    let home = Home::new(MediumKind::File, MEMORY);
    let pager = home.pager(None);
    let pages = MEMORY / PAGE_SIZE;
    (0..pages).for_each(|page| write(&pager, page, page + 1));
    pager.hold();
    let (cluster, slot) = {
        let state = pager.shared.state();
        let gone = |cluster: &u32| state.frames.frame_of(*cluster).is_none() && state.slots.of(*cluster).is_some();
        let cluster = (5..geometry().clusters()).find(gone).unwrap();
        (cluster, state.slots.of(cluster).unwrap().number)
    };
    let tables = Some(pager.persist().unwrap().0);
    drop(pager);
    let region = home.region("vm/swap");
    let layout = Layout::new(geometry(), geometry().slots(MEMORY));
    let at = region.data_offset() + layout.slot_at(slot) + 1234;
    drop(region);
    let file = home.file("vm/swap");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();

    let pager = home.pager(tables);
    let lost = u64::from(cluster) * CLUSTER;
    let error = pager.bring_in(lost, 1).unwrap_err().to_string();
    assert!(error.contains(&format!("{lost:#x}")) && error.contains(&format!("slot {slot}")), "{error}");
    assert!(matches!(home.events.recv().unwrap(), PagingEvent::Lost(_)));
    assert!(pager.read(lost + 5, &mut [0; 8]).is_err());
    let per_cluster = CLUSTER / PAGE_SIZE;
    for page in (0..pages).filter(|page| page / per_cluster != u64::from(cluster)) {
        assert_eq!(read(&pager, page), page + 1);
    }
}

#[test]
fn tables_that_were_altered_or_are_of_another_freeze_are_refused() {
    let home = Home::new(MediumKind::File, MEMORY);
    let pager = home.pager(None);
    (0..MEMORY / PAGE_SIZE).for_each(|page| write(&pager, page, page + 1));
    pager.hold();
    let digest = pager.persist().unwrap().0;
    drop(pager);
    assert!(matches!(home.try_pager(Some(digest ^ 1)), Err(PagingError::Tables { .. })));
    let region = home.region("vm/swap");
    let start = region.data_offset();
    drop(region);
    let file = home.file("vm/swap");
    for at in [0, 5, 9, 700, 4096, 4096 + 4, 4096 + 40].map(|at| start + at) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
        assert!(matches!(home.try_pager(Some(digest)), Err(PagingError::Tables { .. })), "byte {at}");
        file.write_all_at(&byte, at).unwrap();
    }
    assert!(home.try_pager(Some(digest)).is_ok());
}

#[test]
fn less_ram_may_be_used_from_now_on_and_more_again_and_what_is_not_used_is_given_back() {
    for medium in [MediumKind::File, MediumKind::Nvdimm] {
        let home = Home::with_ram(medium, MEMORY, 96 * CLUSTER);
        let pager = home.pager(None);
        let mut model = vec![0; (MEMORY / PAGE_SIZE) as usize];
        walk(&pager, &mut model, (0, 1), 3, 2000);
        assert!(pager.status().resident > 60, "{:?}", pager.status());
        pager.set_ram(0);
        let begun = Instant::now();
        while pager.status().resident > 32 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", pager.status());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(pager.status().frames, 32);
        let used = pager.shared.store.memory_in_use();
        assert!(used.is_none_or(|bytes| bytes <= 40 * CLUSTER), "{used:?}");
        walk(&pager, &mut model, (0, 1), 4, 1000);
        pager.set_ram(u64::MAX);
        walk(&pager, &mut model, (0, 1), 5, 2000);
        assert!(pager.status().resident > 60, "{:?}", pager.status());
    }
}
