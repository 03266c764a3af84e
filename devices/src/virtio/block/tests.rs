mod host;
mod notifications;

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, MmapRegion};

use super::*;
use crate::device::{Device, Freezable};
use crate::state::DeviceState;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY, SIZE};
use host::{Holds, Host};

const SECTORS: u64 = 256;
const EVENT_IDX: u64 = 1 << 29;
const HEADERS: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1_0000;

/// A driver of a disk whose every sector is filled with its number's low byte.
struct Guest {
    driver: Driver,
    host: Host,
    offered: u64,
}

fn disk(read_only: bool, queues: u16) -> Disk {
    Disk { id: "data".to_owned(), sectors: SECTORS, read_only, queues }
}

fn image() -> Vec<u8> {
    (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8).collect()
}

impl Guest {
    fn new(disk: Disk, features: u64) -> Self {
        let host = Host::new(image());
        let mut driver = Driver::new(Block::new(disk, Box::new(host.clone())));
        driver.set_up(features);
        Self { driver, host, offered: 0 }
    }

    fn usual() -> Self {
        Self::new(disk(false, 1), feature::FLUSH)
    }

    /// As after an outage: another process, the same image and memory.
    fn resumed(&self, state: &DeviceState) -> Self {
        let host = Host::new(self.host.state().image.clone());
        let mut driver = self.driver.resumed(Block::new(disk(false, 1), Box::new(host.clone())));
        driver.restore(state).unwrap();
        Self { driver, host, offered: self.offered }
    }

    /// Writes a header; where, and where its status goes.
    fn header(&mut self, kind: u32, sector: u64) -> (u64, u64) {
        let at = HEADERS + (self.offered % 64) * 64;
        self.offered += 1;
        self.driver.put(at, &kind.to_le_bytes());
        self.driver.put(at + 4, &[0; 4]);
        self.driver.put(at + 8, &sector.to_le_bytes());
        self.driver.put(at + 48, &[0xff]);
        (at, at + 48)
    }

    /// Offers a request with its data in one piece; where its status goes.
    fn offer(&mut self, kind: u32, sector: u64, data: (u64, u32)) -> u64 {
        let (header, status) = self.header(kind, sector);
        match kind {
            0 | 8 => self.driver.offer(0, &[(header, 16)], &[data, (status, 1)]),
            4 => self.driver.offer(0, &[(header, 16)], &[(status, 1)]),
            _ => self.driver.offer(0, &[(header, 16), data], &[(status, 1)]),
        };
        status
    }

    fn status(&self, at: u64) -> u8 {
        self.driver.get(at, 1)[0]
    }

    /// Offers a request, and gives its status.
    fn ask(&mut self, kind: u32, sector: u64, data: (u64, u32)) -> u8 {
        let status = self.offer(kind, sector, data);
        self.driver.notify(0);
        assert_eq!(self.driver.used(0).len(), 1, "it is completed once");
        self.status(status)
    }

    /// The range of a discard or a write of zeros.
    fn range(&self, sector: u64, count: u32, flags: u32) -> (u64, u32) {
        self.driver.put(DATA, &sector.to_le_bytes());
        self.driver.put(DATA + 8, &count.to_le_bytes());
        self.driver.put(DATA + 12, &flags.to_le_bytes());
        (DATA, 16)
    }

    /// What the thread of the device does when the host has something.
    fn ready(&self) {
        self.driver.mmio.engine().lock().unwrap().ready(0);
    }
}

#[test]
fn the_configuration_tells_size_limits_and_queues() {
    let mut guest = Guest::new(disk(false, 4), 0);
    let config = guest.driver.config(0, 64);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!((word(8), word(12), word(20)), (64 << 10, 254, 512));
    assert_eq!((config[24], config[26], config[34], config[56]), (3, 8, 4, 1));
    assert_eq!((word(36), word(40), word(44), word(48), word(52)), (1 << 21, 1, 8, 1 << 21, 1));
    assert_eq!(guest.driver.offered() & 0xff_ffff, 0x7646);
    assert_eq!(Guest::new(disk(true, 1), 0).driver.offered() & 0xff_ffff, 0x0666);
}

#[test]
fn what_was_written_is_read_however_it_is_cut_into_pieces() {
    let mut guest = Guest::usual();
    let bytes: Vec<u8> = (0..1024_u32).map(|at| (at * 7) as u8).collect();
    guest.driver.put(DATA, &bytes);
    // Header and data in three pieces that do not end where they do.
    let (header, status) = guest.header(1, 5);
    guest.driver.put(DATA - 6, &guest.driver.get(header + 10, 6));
    guest.driver.offer(0, &[(header, 10), (DATA - 6, 106), (DATA + 100, 924)], &[(status, 1)]);
    guest.driver.notify(0);
    assert_eq!((guest.driver.used(0), guest.status(status)), (vec![(0, 1)], 0));
    assert_eq!(guest.host.state().image[5 * 512..7 * 512], bytes);
    // Data and status in one piece, an empty one among them.
    let (header, _) = guest.header(0, 5);
    guest.driver.offer(0, &[(header, 16)], &[(DATA + 4096, 7), (DATA, 0), (DATA + 8192, 1018)]);
    guest.driver.notify(0);
    assert_eq!(guest.driver.used(0), [(4, 1025)]);
    assert_eq!(guest.driver.get(DATA + 4096, 7), bytes[..7]);
    assert_eq!(guest.driver.get(DATA + 8192, 1018), [&bytes[7..], &[0]].concat());
    assert_eq!(guest.driver.edges(), 2);
}

#[test]
fn a_flush_makes_durable_and_a_driver_without_flushes_gets_durable_writes() {
    for (features, durable_at_once) in [(feature::FLUSH, false), (0, true)] {
        let mut guest = Guest::new(disk(false, 1), features);
        guest.driver.put(DATA, &[0x77; 512]);
        assert_eq!(guest.ask(1, 9, (DATA, 512)), 0);
        assert_eq!(guest.host.state().durable[9 * 512] == 0x77, durable_at_once);
        assert_eq!(guest.ask(4, 0, (0, 0)), 0);
        assert_eq!(guest.host.state().durable[9 * 512..10 * 512], [0x77; 512]);
    }
}

#[test]
fn the_name_of_the_disk_is_its_serial_number() {
    let mut guest = Guest::usual();
    guest.driver.put(DATA, &[0xaa; 24]);
    assert_eq!(guest.ask(8, 0, (DATA, 20)), 0);
    assert_eq!(guest.driver.get(DATA, 24), [b"data".as_slice(), &[0; 16], &[0xaa; 4]].concat());
    assert_eq!(guest.ask(8, 0, (DATA, 19)), 1, "no room for it");
}

#[test]
fn ranges_are_discarded_and_made_zeros() {
    let mut guest = Guest::usual();
    let range = guest.range(3, 2, 0);
    assert_eq!(guest.ask(11, 0, range), 0);
    let range = guest.range(SECTORS - 1, 1, 1);
    assert_eq!(guest.ask(13, 0, range), 0);
    let state = guest.host.state();
    let sectors: Vec<u8> = [2, 3, 4, 5, 255].map(|sector| state.image[sector * 512]).to_vec();
    assert_eq!(sectors, [2, 0xdd, 0xdd, 5, 0]);
    assert_eq!((state.holes.len(), &state.holes[0]), (1, &((SECTORS - 1) * SECTOR..SECTORS * SECTOR)));
}

#[test]
fn ranges_that_are_none_are_refused() {
    let mut guest = Guest::usual();
    for (kind, sector, count, flags, status) in [
        (11, 0, 1, 1, 2),
        (11, 0, 1, 4, 2),
        (13, 0, 1, 2, 2),
        (11, SECTORS, 1, 0, 1),
        (13, SECTORS - 1, 2, 0, 1),
        (13, u64::MAX, 1, 0, 1),
        (13, 0, u32::MAX, 0, 1),
    ] {
        let range = guest.range(sector, count, flags);
        assert_eq!(guest.ask(kind, 0, range), status, "{kind} of {count} at {sector}, flags {flags}");
    }
    assert_eq!(guest.ask(11, 0, (DATA, 15)), 1);
    assert_eq!(guest.ask(13, 0, (DATA, 32)), 1, "two of them");
    assert_eq!(guest.host.state().image, image());
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    let mut guest = Guest::new(disk(true, 1), feature::RO);
    let range = guest.range(0, 1, 0);
    assert_eq!([1, 11, 13].map(|kind| guest.ask(kind, 0, if kind == 1 { (DATA, 512) } else { range })), [1; 3]);
    assert_eq!(guest.ask(0, 7, (DATA, 512)), 0);
    assert_eq!(guest.driver.get(DATA, 512), [7; 512]);
    assert_eq!(guest.host.state().image, image());
}

#[test]
fn requests_that_lie_fail_and_the_next_one_is_served() {
    let mut guest = Guest::usual();
    for (kind, sector, data, status) in [
        (0, SECTORS, (DATA, 512), 1),
        (1, SECTORS - 1, (DATA, 1024), 1),
        (0, u64::MAX, (DATA, 512), 1),
        (1, u64::MAX / 512, (DATA, 512), 1),
        (0, 0, (DATA, 511), 1),
        (1, 0, (DATA, 513), 1),
        (0, 0, (MEMORY - 511, 512), 1),
        (1, 0, (MEMORY, 512), 1),
        (0, 0, (u64::MAX - 511, 512), 1),
        (0, 0, (DATA, 128 << 10), 1),
        (8, 0, (MEMORY - 1, 20), 1),
        (2, 0, (DATA, 512), 2),
        (u32::MAX, 0, (DATA, 512), 2),
        (0, 0, (DATA, 0), 0),
    ] {
        assert_eq!(guest.ask(kind, sector, data), status, "{kind} at {sector}, data {data:x?}");
    }
    assert_eq!((guest.host.state().image.clone(), guest.driver.needs_reset()), (image(), false));
    assert_eq!(guest.ask(0, 1, (DATA, 512)), 0);
}

#[test]
fn chains_without_a_header_or_a_place_for_the_status_are_given_back() {
    let mut guest = Guest::usual();
    let (header, status) = guest.header(0, 0);
    guest.driver.offer(0, &[(header, 16)], &[]);
    guest.driver.offer(0, &[(header, 16)], &[(MEMORY, 1)]);
    guest.driver.offer(0, &[(header, 16)], &[(u64::MAX, u32::MAX)]);
    guest.driver.offer(0, &[(header, 15)], &[(status, 1)]);
    guest.driver.offer(0, &[(MEMORY - 8, 16)], &[(status, 1)]);
    guest.driver.offer(0, &[], &[(status, 1)]);
    guest.driver.notify(0);
    let lengths: Vec<u32> = guest.driver.used(0).into_iter().map(|(_, length)| length).collect();
    assert_eq!((lengths, guest.status(status)), (vec![0, 0, 0, 1, 1, 1], 1));
}

#[test]
fn a_table_of_more_pieces_than_the_device_takes_is_given_back_without_work() {
    let mut guest = Guest::usual();
    let (header, status) = guest.header(0, 0);
    let table = DATA + 0x1_0000;
    for pieces in [254_u16, 255] {
        let count = pieces + 2;
        for index in 0..count {
            let (address, length, flags) = match index {
                0 => (header, 16_u32, 1_u16),
                _ if index == count - 1 => (status, 1, 2),
                _ => (DATA, 512, 3),
            };
            let at = table + 16 * u64::from(index);
            guest.driver.put(at, &address.to_le_bytes());
            guest.driver.put(at + 8, &length.to_le_bytes());
            guest.driver.put(at + 12, &[flags.to_le_bytes(), (index + 1).to_le_bytes()].concat());
        }
        guest.driver.put(status, &[0xff]);
        guest.driver.descriptor(0, 0, (table, 16 * u32::from(count)), 4, 0);
        guest.driver.offer_head(0, 0);
        guest.driver.notify(0);
        let expected = if pieces == 254 { (254 * 512 + 1, 0) } else { (0, 0xff) };
        assert_eq!((guest.driver.used(0), guest.status(status)), (vec![(0, expected.0)], expected.1));
    }
}

#[test]
fn what_the_host_cannot_do_is_told() {
    let mut guest = Guest::usual();
    for (kind, status) in [(ErrorKind::Other, 1), (ErrorKind::Unsupported, 2)] {
        guest.host.state().fails = Some(kind);
        let range = guest.range(0, 1, 0);
        assert_eq!([guest.ask(0, 0, (DATA, 512)), guest.ask(4, 0, (0, 0)), guest.ask(11, 0, range)], [status; 3]);
    }
}

#[test]
fn requests_complete_in_the_order_in_which_the_host_is_done() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    let statuses = [1, 2, 3].map(|sector| guest.offer(0, sector, (DATA + sector * 512, 512)));
    guest.driver.notify(0);
    assert!(guest.driver.used(0).is_empty());
    guest.host.release_one(1);
    guest.ready();
    assert_eq!(guest.driver.used(0), [(3, 513)]);
    guest.host.release();
    guest.ready();
    assert_eq!(guest.driver.used(0), [(0, 513), (6, 513)]);
    assert_eq!((statuses.map(|at| guest.status(at)), guest.driver.get(DATA + 1536, 1)), ([0; 3], vec![3]));
}

#[test]
fn every_queue_is_served() {
    let mut guest = Guest::new(disk(false, 3), feature::FLUSH | feature::MQ);
    let (header, status) = guest.header(0, 42);
    for queue in 0..3 {
        let to = DATA + 512 * queue as u64;
        guest.driver.offer(queue, &[(header, 16)], &[(to, 512), (status, 1)]);
        guest.driver.notify(queue);
        assert_eq!((guest.driver.used(queue), guest.driver.get(to, 1)), (vec![(0, 513)], vec![42]));
    }
}

#[test]
fn no_more_is_in_flight_than_a_freeze_may_wait_for_and_the_rest_follows() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    // The same head again and again, which no honest driver offers: 15 requests of 2 pieces of 64 KiB, 64 of one.
    let (header, status) = guest.header(0, 0);
    guest.driver.descriptor(0, 0, (header, 16), 1, 1);
    guest.driver.descriptor(0, 1, (DATA, 64 << 10), 3, 2);
    guest.driver.descriptor(0, 2, (status, 1), 2, 0);
    let most = (IN_FLIGHT_MAX / (64 << 10)) as usize;
    for _ in 0..2 * most / usize::from(SIZE) {
        (0..SIZE).for_each(|_| guest.driver.offer_head(0, 0));
        guest.driver.notify(0);
        if guest.host.waiting() == most {
            break;
        }
    }
    assert_eq!(guest.host.waiting(), most);
    (0..SIZE).for_each(|_| guest.driver.offer_head(0, 0));
    guest.driver.notify(0);
    assert_eq!(guest.host.waiting(), most, "there is no room");
    guest.host.release();
    guest.ready();
    assert_eq!(guest.host.waiting(), usize::from(SIZE), "there is room again");
}

#[test]
fn no_more_flushes_are_in_flight_than_a_queue_has_entries() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    let (header, status) = guest.header(4, 0);
    guest.driver.descriptor(0, 0, (header, 16), 1, 1);
    guest.driver.descriptor(0, 1, (status, 1), 2, 0);
    for _ in 0..2 * QUEUE_SIZE / SIZE {
        (0..SIZE).for_each(|_| guest.driver.offer_head(0, 0));
        guest.driver.notify(0);
        if guest.host.waiting() == usize::from(QUEUE_SIZE) {
            break;
        }
    }
    (0..SIZE).for_each(|_| guest.driver.offer_head(0, 0));
    guest.driver.notify(0);
    assert_eq!(guest.host.waiting(), usize::from(QUEUE_SIZE));
}

#[test]
fn a_driver_that_is_to_notify_at_an_entry_is_told_which() {
    let mut guest = Guest::new(disk(false, 1), feature::FLUSH | EVENT_IDX);
    for round in 1..40_u16 {
        assert_eq!(guest.ask(0, 1, (DATA, 512)), 0);
        assert_eq!(guest.driver.awaited(0), (round, round));
    }
}

#[test]
fn memory_that_the_host_wrote_counts_as_changed() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    guest.offer(0, 1, (DATA + 4000, 512));
    guest.driver.notify(0);
    let memory = guest.driver.memory.clone();
    let region = memory.iter().next().unwrap();
    let bitmap = MmapRegion::bitmap(region);
    // The host writes through its own mapping: here the bitmap is cleaned behind it.
    guest.host.release();
    bitmap.reset();
    guest.ready();
    let dirty = [DATA, DATA + 4096, DATA + 8192].map(|at| bitmap.dirty_at(at as usize));
    assert_eq!(dirty, [true, true, false]);
}

#[test]
fn a_freeze_waits_for_reads_and_writes_and_records_flushes_which_are_done_once_after_the_resume() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    guest.driver.put(DATA, &[0x55; 512]);
    let write = guest.offer(1, 3, (DATA, 512));
    let flush = guest.offer(4, 0, (0, 0));
    let read = guest.offer(0, 4, (DATA + 512, 512));
    guest.driver.notify(0);
    let state = guest.driver.freeze();
    assert_eq!([write, flush, read].map(|at| guest.status(at)), [0, 0xff, 0]);
    let DeviceState::VirtioMmio(saved) = &state else { panic!() };
    let VirtioState::Block(block) = &saved.device else { panic!() };
    assert_eq!(block.flushes, [FlushV1 { queue: 0, head: 3, status: flush }]);

    let before = guest.driver.used(0);
    assert_eq!(before.iter().map(|(head, _)| *head).collect::<Vec<_>>(), [0, 5]);
    let mut resumed = guest.resumed(&state);
    assert_eq!(resumed.host.state().flushes, 0, "nothing happens before the thaw");
    resumed.driver.thaw();
    assert_eq!(resumed.driver.used(0), [(3, 1)]);
    assert_eq!((resumed.status(flush), resumed.host.state().flushes), (0, 1));
    assert_eq!(resumed.host.state().durable[3 * 512], 0x55);
    assert_eq!(resumed.ask(0, 3, (DATA, 512)), 0);
}

#[test]
fn a_flush_under_way_at_a_freeze_that_is_called_off_completes_once() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::Flushes);
    let flush = guest.offer(4, 0, (0, 0));
    guest.driver.notify(0);
    let first = guest.driver.freeze();
    guest.host.release();
    guest.ready();
    assert_eq!((guest.status(flush), guest.driver.mmio.save()), (0xff, first), "nothing happens while it is frozen");
    guest.driver.thaw();
    assert_eq!((guest.driver.used(0), guest.host.state().flushes), (vec![(0, 1)], 1));
    guest.ready();
    assert!(guest.driver.used(0).is_empty());
}

#[test]
fn a_host_that_is_not_done_in_time_keeps_the_freeze_off_and_names_the_disk() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    guest.host.state().quick = false;
    let status = guest.offer(0, 1, (DATA, 512));
    guest.driver.notify(0);
    let refused = guest.driver.mmio.quiesce(Instant::now()).unwrap_err();
    assert!(matches!(&refused, Fault::Busy(what) if what == "1 of disk data"), "{refused}");
    guest.driver.thaw();
    guest.host.release();
    guest.ready();
    assert_eq!((guest.driver.used(0).len(), guest.status(status)), (1, 0), "it goes on");
}

#[test]
fn a_ring_that_was_spoilt_meanwhile_does_not_keep_a_freeze_off() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    guest.offer(0, 1, (DATA, 512));
    guest.driver.notify(0);
    guest.driver.put(Driver::ring(0) + 0x4002, &1000_u16.to_le_bytes());
    guest.ready();
    assert!(guest.driver.needs_reset());
    guest.driver.freeze();
    assert_eq!(guest.host.waiting(), 0, "what was in flight has landed: memory is still from now on");
}

#[test]
fn a_reset_waits_for_the_host_and_forgets_what_it_was_asked() {
    let mut guest = Guest::usual();
    guest.host.holds(Holds::All);
    guest.offer(0, 1, (DATA, 512));
    guest.offer(4, 0, (0, 0));
    guest.driver.notify(0);
    guest.driver.write(0x70, 0);
    assert_eq!(guest.host.waiting(), 0);
    guest.ready();
    assert!(guest.driver.used(0).is_empty(), "no longer the driver's");
}

#[test]
fn a_state_of_another_disk_or_with_flushes_that_cannot_be_is_refused() {
    let mut guest = Guest::usual();
    let DeviceState::VirtioMmio(good) = guest.driver.freeze() else { panic!() };
    let flush = FlushV1 { queue: 0, head: 0, status: DATA };
    let wrong: [fn(&mut BlockStateV1, FlushV1); 6] = [
        |state, _| state.sectors += 1,
        |state, _| state.read_only = true,
        |state, flush| state.flushes = vec![FlushV1 { queue: 1, ..flush }],
        |state, flush| state.flushes = vec![FlushV1 { head: QUEUE_SIZE, ..flush }],
        |state, flush| state.flushes = vec![flush; usize::from(QUEUE_SIZE) + 1],
        |state, flush| state.flushes = vec![FlushV1 { head: 1, ..flush }, flush],
    ];
    for (index, spoil) in wrong.into_iter().enumerate() {
        let mut state = good.clone();
        let VirtioState::Block(block) = &mut state.device else { panic!() };
        spoil(block, flush);
        assert!(guest.driver.mmio.restore(&DeviceState::VirtioMmio(state)).is_err(), "number {index}");
        assert_eq!(guest.driver.mmio.save(), DeviceState::VirtioMmio(good.clone()));
    }
    // A status that is nowhere: the flush is done, and given back without a word.
    let mut state = good;
    state.device = VirtioState::Block(BlockStateV1 {
        sectors: SECTORS,
        read_only: false,
        flushes: vec![FlushV1 { status: u64::MAX, ..flush }],
    });
    guest.driver.mmio.restore(&DeviceState::VirtioMmio(state)).unwrap();
    guest.driver.thaw();
    assert_eq!(guest.driver.used(0), [(0, 0)]);
}

/// Something that happens to a disk.
#[derive(Clone, Debug)]
enum Act {
    Read(u64),
    Write(u64, u8),
    Flush,
    Hold(bool),
    Release(usize),
    Freeze,
    Outage,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..SECTORS).prop_map(Act::Read),
        4 => (0..SECTORS, any::<u8>()).prop_map(|(sector, byte)| Act::Write(sector, byte)),
        2 => Just(Act::Flush),
        2 => any::<bool>().prop_map(Act::Hold),
        3 => (0_usize..8).prop_map(Act::Release),
        1 => Just(Act::Freeze),
        1 => Just(Act::Outage),
    ]
}

/// Where the data of request number `n` lies.
fn data_of(n: u64) -> u64 {
    DATA + (n % 64) * SECTOR
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// In whatever order the host completes, and wherever a freeze falls: each request is completed once, and the image has each write.
    #[test]
    fn no_request_is_lost_or_done_twice_over_any_freezes(acts in prop::collection::vec(act(), 0..80)) {
        let mut guest = Guest::usual();
        let (mut offered, mut completed) = (0_u64, 0);
        let mut written = std::collections::BTreeMap::new();
        let mut flushes = 0;
        for act in acts {
            // The driver has as many descriptors as five requests need.
            if offered - completed >= 5 && matches!(act, Act::Read(_) | Act::Write(..) | Act::Flush) {
                guest.host.release();
                guest.ready();
                completed += guest.driver.used(0).len() as u64;
                prop_assert_eq!(completed, offered);
            }
            match act {
                Act::Read(sector) => {
                    guest.offer(0, sector, (data_of(offered), 512));
                    offered += 1;
                }
                // A sector once, since the order of two writes that are under way is anybody's.
                Act::Write(sector, byte) if !written.contains_key(&sector) => {
                    guest.driver.put(data_of(offered), &[byte; 512]);
                    guest.offer(1, sector, (data_of(offered), 512));
                    written.insert(sector, byte);
                    offered += 1;
                }
                Act::Write(..) => {}
                Act::Flush => {
                    guest.offer(4, 0, (0, 0));
                    offered += 1;
                    flushes += 1;
                }
                Act::Hold(all) => guest.host.holds(if all { Holds::All } else { Holds::Nothing }),
                Act::Release(index) => {
                    guest.host.release_one(index);
                    guest.ready();
                }
                Act::Freeze => {
                    guest.driver.freeze();
                    guest.driver.thaw();
                }
                Act::Outage => {
                    let state = guest.driver.freeze();
                    guest = guest.resumed(&state);
                    guest.driver.thaw();
                }
            }
            guest.driver.notify(0);
            completed += guest.driver.used(0).len() as u64;
            prop_assert!(completed <= offered);
        }
        guest.driver.mmio.quiesce(Instant::now() + Duration::from_secs(5)).unwrap();
        guest.driver.thaw();
        guest.host.release();
        guest.ready();
        completed += guest.driver.used(0).len() as u64;
        prop_assert_eq!(completed, offered);
        let state = guest.host.state();
        prop_assert!(state.flushes <= flushes, "none is made up");
        for (sector, byte) in written {
            prop_assert_eq!(state.image[sector as usize * 512], byte);
        }
    }
}
