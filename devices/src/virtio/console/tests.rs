use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use super::*;
use crate::state::DeviceState;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY, SIZE};
use proptest::prelude::*;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[derive(Default)]
struct Ends {
    printed: Vec<u8>,
    /// How much more it takes.
    room: usize,
    typed: VecDeque<u8>,
    size: TerminalSize,
}

#[derive(Clone, Default)]
struct Teletype(Arc<Mutex<Ends>>);

impl Teletype {
    fn with_room(room: usize) -> Self {
        let this = Self::default();
        this.ends().room = room;
        this
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap()
    }
}

impl Line for Teletype {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut ends = self.ends();
        let taken = ends.room.min(bytes.len());
        ends.room -= taken;
        ends.printed.extend(&bytes[..taken]);
        taken
    }

    fn read(&mut self, bytes: &mut [u8]) -> usize {
        let mut ends = self.ends();
        let count = bytes.len().min(ends.typed.len());
        bytes.iter_mut().zip(ends.typed.drain(..count)).for_each(|(to, from)| *to = from);
        count
    }

    fn size(&self) -> TerminalSize {
        self.ends().size
    }
}

fn set_up(room: usize) -> (Driver, Teletype) {
    let line = Teletype::with_room(room);
    let mut driver = Driver::new(Console::new(Box::new(line.clone())));
    driver.set_up(FEATURE_SIZE);
    (driver, line)
}

fn ready(driver: &Driver) {
    driver.mmio.engine().lock().unwrap().ready(0);
}

/// `length` bytes at `BUFFERS`, no two neighbours alike.
fn text(driver: &Driver, length: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    driver.put(BUFFERS, &bytes);
    bytes
}

#[test]
fn what_the_guest_prints_is_seen_across_buffers_and_in_order() {
    let (mut driver, line) = set_up(usize::MAX);
    let bytes = text(&driver, 10_000);
    driver.offer(TRANSMIT, &[(BUFFERS, 1), (BUFFERS + 1, 9000)], &[]);
    driver.offer(TRANSMIT, &[(BUFFERS + 9001, 999)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(line.ends().printed, bytes);
    assert_eq!(driver.used(TRANSMIT), [(0, 0), (2, 0)]);
    assert_eq!(driver.edges(), 1);
}

#[test]
fn a_slow_reader_makes_the_guest_wait_and_loses_nothing() {
    let (mut driver, line) = set_up(5000);
    let bytes = text(&driver, 9000);
    driver.offer(TRANSMIT, &[(BUFFERS, 8000)], &[]);
    driver.offer(TRANSMIT, &[(BUFFERS + 8000, 1000)], &[]);
    driver.notify(TRANSMIT);
    assert!(driver.used(TRANSMIT).is_empty(), "the request is not done");
    driver.notify(TRANSMIT);
    assert_eq!(line.ends().printed, bytes[..5000], "nothing comes twice");
    line.ends().room = 3000;
    ready(&driver);
    assert_eq!((driver.used(TRANSMIT).len(), line.ends().printed.len()), (1, 8000));
    line.ends().room = usize::MAX;
    ready(&driver);
    assert_eq!((driver.used(TRANSMIT).len(), &line.ends().printed), (1, &bytes));
}

#[test]
fn a_request_that_was_printed_in_part_goes_on_there_after_an_outage() {
    let (mut driver, line) = set_up(4100);
    let bytes = text(&driver, 9000);
    driver.offer(TRANSMIT, &[(BUFFERS, 4097), (BUFFERS + 4097, 4903)], &[]);
    driver.notify(TRANSMIT);
    let state = driver.freeze();
    let DeviceState::VirtioMmio(mmio) = &state else { panic!() };
    assert_eq!(mmio.device, VirtioState::Console(ConsoleStateV1 { sent: 4100 }));
    let after = Teletype::with_room(usize::MAX);
    let mut resumed = driver.resumed(Console::new(Box::new(after.clone())));
    resumed.restore(&state).unwrap();
    assert!(after.ends().printed.is_empty(), "not before the thaw");
    resumed.thaw();
    assert_eq!([&line.ends().printed[..], &after.ends().printed[..]].concat(), bytes);
    assert_eq!(resumed.used(TRANSMIT).len(), 1);
}

#[test]
fn what_was_typed_reaches_the_guest_and_the_rest_waits_for_buffers() {
    let (mut driver, line) = set_up(0);
    line.ends().typed.extend(b"hello, world");
    ready(&driver);
    driver.offer(RECEIVE, &[], &[(BUFFERS, 2), (BUFFERS + 100, 3)]);
    driver.offer(RECEIVE, &[], &[(BUFFERS + 200, 4)]);
    driver.notify(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(0, 5), (2, 4)]);
    assert_eq!((driver.get(BUFFERS, 2), driver.get(BUFFERS + 100, 3)), (b"he".to_vec(), b"llo".to_vec()));
    assert_eq!(line.ends().typed, b"rld");
    driver.offer(RECEIVE, &[], &[(BUFFERS + 300, 100)]);
    driver.notify(RECEIVE);
    assert_eq!((driver.used(RECEIVE), driver.get(BUFFERS + 300, 4)), (vec![(3, 3)], b"rld\0".to_vec()));
}

#[test]
fn a_buffer_without_input_is_kept_until_there_is_some() {
    let (mut driver, line) = set_up(0);
    driver.offer(RECEIVE, &[], &[(BUFFERS, 8)]);
    driver.notify(RECEIVE);
    assert!(driver.used(RECEIVE).is_empty());
    line.ends().typed.extend(b"x");
    ready(&driver);
    assert_eq!(driver.used(RECEIVE), [(0, 1)]);
}

#[test]
fn buffers_that_wait_at_a_freeze_take_what_is_typed_after_the_resume() {
    for features in [FEATURE_SIZE, FEATURE_SIZE | 1 << 29] {
        let (mut driver, line) = set_up(usize::MAX);
        driver.set_up(features);
        line.ends().typed.extend(b"before");
        for buffer in 0..4 {
            driver.offer(RECEIVE, &[], &[(BUFFERS + 100 * buffer, 100)]);
        }
        driver.notify(RECEIVE);
        assert_eq!(driver.used(RECEIVE), [(0, 6)]);
        let state = driver.freeze();
        let line = Teletype::with_room(usize::MAX);
        let mut resumed = driver.resumed(Console::new(Box::new(line.clone())));
        resumed.restore(&state).unwrap();
        resumed.thaw();
        assert!(resumed.used(RECEIVE).is_empty());
        // With `EVENT_IDX`, where the driver says what it wants to be told of (`used_event`): what comes behind the first.
        resumed.put(Driver::ring(RECEIVE) + 0x4000 + 4 + 2 * u64::from(SIZE), &1_u16.to_le_bytes());
        let edges = resumed.edges();
        line.ends().typed.extend(b"after");
        ready(&resumed);
        assert_eq!((resumed.used(RECEIVE), resumed.get(BUFFERS + 100, 5)), (vec![(1, 5)], b"after".to_vec()));
        assert_eq!(resumed.edges(), edges + 1, "the driver is told");
    }
}

#[test]
fn a_driver_that_waits_to_be_asked_is_asked_for_more() {
    let (mut driver, line) = set_up(usize::MAX);
    driver.set_up(FEATURE_SIZE | 1 << 29);
    line.ends().typed.extend(b"abc");
    for round in 1..=3 {
        driver.offer(TRANSMIT, &[(BUFFERS, 8)], &[]);
        driver.notify(TRANSMIT);
        driver.offer(RECEIVE, &[], &[(BUFFERS, 1)]);
        driver.notify(RECEIVE);
        assert_eq!((driver.awaited(TRANSMIT), driver.awaited(RECEIVE)), ((round, round), (round, round)));
    }
}

#[test]
fn buffers_that_are_nowhere_print_nothing_and_lose_no_input() {
    let (mut driver, line) = set_up(usize::MAX);
    line.ends().typed.extend(b"kept");
    driver.offer(TRANSMIT, &[(MEMORY - 1, 2)], &[]);
    driver.offer(TRANSMIT, &[], &[(BUFFERS, 8)]);
    driver.offer(RECEIVE, &[], &[(MEMORY - 1, 2)]);
    driver.offer(RECEIVE, &[(BUFFERS, 8)], &[]);
    driver.offer(RECEIVE, &[], &[(u64::MAX, u32::MAX)]);
    driver.notify(TRANSMIT);
    let lengths = |used: Vec<(u32, u32)>| used.into_iter().map(|(_, length)| length).collect::<Vec<_>>();
    assert_eq!((lengths(driver.used(TRANSMIT)), lengths(driver.used(RECEIVE))), (vec![0; 2], vec![0; 3]));
    assert!(line.ends().printed.is_empty() && line.ends().typed == b"kept" && !driver.needs_reset());
}

#[test]
fn a_request_of_gigabytes_is_printed_so_far() {
    let (mut driver, line) = set_up(usize::MAX);
    driver.offer(TRANSMIT, &[(0, MEMORY as u32), (0, MEMORY as u32)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!((driver.used(TRANSMIT).len(), line.ends().printed.len()), (1, TRANSMIT_MAX));
}

#[test]
fn a_driver_is_told_of_another_size_once() {
    let (mut driver, line) = set_up(0);
    assert_eq!(driver.config(0, 12), [0; 12]);
    line.ends().size = TerminalSize { columns: 0x102, rows: 0x304 };
    for _ in 0..2 {
        driver.mmio.engine().lock().unwrap().ready(1);
    }
    assert_eq!((driver.edges(), driver.read(0x60)), (1, 2));
    assert_eq!(driver.config(0, 8), [2, 1, 4, 3, 0, 0, 0, 0]);
    let state = driver.freeze();
    let line = Teletype::with_room(0);
    line.ends().size = TerminalSize { columns: 80, rows: 25 };
    let mut resumed = driver.resumed(Console::new(Box::new(line)));
    resumed.restore(&state).unwrap();
    resumed.write(0x64, 2);
    resumed.thaw();
    assert_eq!((resumed.read(0x60), resumed.config(0, 4)), (2, vec![80, 0, 25, 0]));
}

#[test]
fn a_driver_that_begins_anew_prints_from_the_beginning() {
    let (mut driver, line) = set_up(3);
    driver.put(BUFFERS, b"abcdef");
    driver.offer(TRANSMIT, &[(BUFFERS, 6)], &[]);
    driver.notify(TRANSMIT);
    driver.write(0x70, 0);
    line.ends().room = usize::MAX;
    let state = driver.freeze();
    let DeviceState::VirtioMmio(mmio) = &state else { panic!() };
    assert_eq!(mmio.device, VirtioState::Console(ConsoleStateV1 { sent: 0 }));
}

#[test]
fn a_state_that_no_run_leads_to_is_refused() {
    let mut console = Console::new(Box::new(Teletype::default()));
    let most = TRANSMIT_MAX as u32;
    console.restore(&VirtioState::Console(ConsoleStateV1 { sent: most }), 0).unwrap();
    assert!(console.restore(&VirtioState::Console(ConsoleStateV1 { sent: most + 1 }), 0).is_err());
    assert!(console.restore(&VirtioState::Rng, 0).is_err());
    assert_eq!(console.save(), VirtioState::Console(ConsoleStateV1 { sent: most }));
}

proptest! {
    /// However little the line takes at a time, and wherever outages come, all is printed, once, in order.
    #[test]
    fn every_byte_is_printed_once(
        requests in prop::collection::vec(prop::collection::vec(1..6000_u32, 1..4), 1..6),
        rooms in prop::collection::vec((0..5000_usize, any::<bool>()), 0..12),
    ) {
        let (mut driver, mut line) = set_up(0);
        let (mut expected, mut printed, mut at) = (Vec::new(), Vec::new(), 0_u64);
        for request in &requests {
            let buffers: Vec<_> = request.iter().map(|length| { let from = at; at += u64::from(*length); (BUFFERS + from, *length) }).collect();
            if buffers.len() + expected.len() > 15 { break; }
            driver.offer(TRANSMIT, &buffers, &[]);
            expected.extend(buffers);
        }
        let total: u64 = expected.iter().map(|(_, length)| u64::from(*length)).sum();
        let bytes = text(&driver, total as usize);
        driver.notify(TRANSMIT);
        for (room, outage) in rooms.into_iter().chain([(usize::MAX, false)]) {
            line.ends().room = room;
            ready(&driver);
            if outage {
                let state = driver.freeze();
                printed.append(&mut line.ends().printed);
                line = Teletype::with_room(0);
                driver = driver.resumed(Console::new(Box::new(line.clone())));
                driver.restore(&state).unwrap();
                driver.thaw();
            }
        }
        printed.append(&mut line.ends().printed);
        prop_assert_eq!(printed, bytes);
    }
}
