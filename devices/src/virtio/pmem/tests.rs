use std::sync::{Arc, Mutex, MutexGuard};

use super::*;
use crate::state::DeviceState;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY, SIZE};

const PLACE: PmemPlace = PmemPlace { start: 1 << 32, size: 2 << 20 };
/// Where answers go.
const ANSWERS: u64 = BUFFERS + 0x1000;
/// What is there before there is one.
const NONE: [u8; 4] = [0xee; 4];

#[derive(Default)]
struct Work {
    begun: Vec<u64>,
    done: Option<(u64, io::Result<()>)>,
}

#[derive(Clone, Default)]
struct Medium(Arc<Mutex<Work>>);

impl Medium {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.0.lock().unwrap()
    }

    /// What was begun last is done.
    fn finish(&self, result: io::Result<()>) {
        let mut work = self.work();
        let token = *work.begun.last().unwrap();
        work.done = Some((token, result));
    }
}

impl Durable for Medium {
    fn begin(&mut self, token: u64) {
        self.work().begun.push(token);
    }

    fn done(&mut self) -> Option<(u64, io::Result<()>)> {
        self.work().done.take()
    }
}

fn set_up() -> (Driver, Medium) {
    let medium = Medium::default();
    let mut driver = Driver::new(Pmem::new(PLACE, Box::new(medium.clone())));
    driver.set_up(0);
    (driver, medium)
}

/// Asks for flush number `number`.
fn flush(driver: &mut Driver, number: u64) {
    driver.put(BUFFERS + 8 * number, &FLUSH.to_le_bytes());
    driver.put(ANSWERS + 8 * number, &NONE);
    driver.offer(0, &[(BUFFERS + 8 * number, 4)], &[(ANSWERS + 8 * number, 4)]);
    driver.notify(0);
}

fn answer(driver: &Driver, number: u64) -> Vec<u8> {
    driver.get(ANSWERS + 8 * number, 4)
}

fn ready(driver: &Driver) {
    driver.mmio.engine().lock().unwrap().ready(0);
}

#[test]
fn the_driver_finds_where_it_lies() {
    let (mut driver, _) = set_up();
    assert_eq!(driver.config(0, 16), [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0x20, 0, 0, 0, 0, 0]].concat());
    assert_eq!(driver.offered() & !(1 << 32 | 1 << 29 | 1 << 28), 0);
}

#[test]
fn a_flush_is_answered_when_it_is_durable_and_not_before() {
    let (mut driver, medium) = set_up();
    flush(&mut driver, 0);
    ready(&driver);
    assert!(driver.used(0).is_empty() && answer(&driver, 0) == NONE);
    medium.finish(Ok(()));
    ready(&driver);
    assert_eq!((driver.used(0), answer(&driver, 0)), (vec![(0, 4)], vec![0; 4]));
    assert_eq!(driver.edges(), 1);
}

#[test]
fn a_flush_asked_for_while_one_is_under_way_waits_for_the_next() {
    let (mut driver, medium) = set_up();
    (0..3).for_each(|number| flush(&mut driver, number));
    assert_eq!(medium.work().begun.len(), 1, "one at a time");
    medium.finish(Ok(()));
    ready(&driver);
    assert_eq!(
        (driver.used(0).len(), medium.work().begun.len()),
        (1, 2),
        "the others share one that began after they came"
    );
    medium.finish(Ok(()));
    ready(&driver);
    assert_eq!((driver.used(0).len(), medium.work().begun.len()), (2, 2));
}

#[test]
fn a_flush_that_fails_is_answered_so() {
    let (mut driver, medium) = set_up();
    flush(&mut driver, 0);
    medium.finish(Err(io::ErrorKind::Other.into()));
    ready(&driver);
    assert_eq!((driver.used(0), answer(&driver, 0)), (vec![(0, 4)], vec![1, 0, 0, 0]));
    assert!(!driver.needs_reset());
}

#[test]
fn a_request_that_is_no_flush_fails() {
    let (mut driver, medium) = set_up();
    driver.put(BUFFERS, &[1, 0, 0, 0]);
    driver.offer(0, &[(BUFFERS, 4)], &[(ANSWERS, 1), (ANSWERS + 16, 1), (ANSWERS + 32, 8)]);
    driver.offer(0, &[(BUFFERS + 4, 3)], &[(ANSWERS + 64, 4)]);
    driver.offer(0, &[(MEMORY - 2, 4)], &[(ANSWERS + 68, 4)]);
    driver.offer(0, &[(BUFFERS + 4, 4)], &[(MEMORY - 2, 4)]);
    driver.offer(0, &[(BUFFERS + 4, 4)], &[]);
    driver.notify(0);
    for _ in 0..2 {
        medium.finish(Ok(()));
        ready(&driver);
    }
    let used = driver.used(0);
    assert_eq!(used.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [4, 4, 4, 0, 0]);
    assert_eq!(
        (driver.get(ANSWERS, 1), driver.get(ANSWERS + 16, 1), driver.get(ANSWERS + 32, 2)),
        (vec![1], vec![0], vec![0; 2])
    );
    assert_eq!(driver.get(ANSWERS + 64, 8), [1, 0, 0, 0, 1, 0, 0, 0]);
    assert!(!driver.needs_reset());
}

#[test]
fn flushes_without_an_answer_at_a_freeze_are_done_again_after_it() {
    let (mut driver, medium) = set_up();
    flush(&mut driver, 0);
    medium.finish(Ok(()));
    ready(&driver);
    assert_eq!(driver.used(0).len(), 1);
    (1..3).for_each(|number| flush(&mut driver, number));
    let state = driver.freeze();
    let DeviceState::VirtioMmio(mmio) = &state else { panic!() };
    assert_eq!((mmio.queues[0].next_avail, mmio.queues[0].next_used), (1, 1));
    let after = Medium::default();
    let mut resumed = driver.resumed(Pmem::new(PLACE, Box::new(after.clone())));
    resumed.restore(&state).unwrap();
    assert!(after.work().begun.is_empty());
    resumed.thaw();
    after.finish(Ok(()));
    ready(&resumed);
    assert_eq!((resumed.used(0).len(), answer(&resumed, 1), answer(&resumed, 2)), (2, vec![0; 4], vec![0; 4]));
}

#[test]
fn what_was_under_way_before_a_freeze_answers_nobody_after_it() {
    let (mut driver, medium) = set_up();
    flush(&mut driver, 0);
    driver.freeze();
    medium.finish(Ok(()));
    driver.thaw();
    ready(&driver);
    assert!(driver.used(0).is_empty(), "it was begun again");
    assert_eq!(medium.work().begun.len(), 2);
    medium.finish(Ok(()));
    ready(&driver);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn a_driver_that_begins_anew_hears_nothing_of_before() {
    let (mut driver, medium) = set_up();
    flush(&mut driver, 0);
    driver.write(0x70, 0);
    medium.finish(Ok(()));
    ready(&driver);
    assert_eq!(answer(&driver, 0), NONE);
}

#[test]
fn one_head_offered_again_and_again_takes_no_more_room_than_the_ring() {
    let (mut driver, medium) = set_up();
    driver.descriptor(0, 0, (BUFFERS, 4), 0, 0);
    for _ in 0..3 {
        (0..SIZE).for_each(|_| driver.offer_head(0, 0));
        driver.notify(0);
    }
    medium.finish(Ok(()));
    ready(&driver);
    medium.finish(Ok(()));
    ready(&driver);
    assert!(medium.work().begun.len() <= 4);
    assert!(driver.used(0).len() <= 3 * usize::from(SIZE));
}

#[test]
fn a_guest_that_found_it_elsewhere_is_refused() {
    let (mut driver, _) = set_up();
    let state = driver.freeze();
    for place in [PmemPlace { start: 1 << 33, ..PLACE }, PmemPlace { size: 4 << 20, ..PLACE }] {
        let mut other = driver.resumed(Pmem::new(place, Box::new(Medium::default())));
        let refused = other.restore(&state).unwrap_err().to_string();
        assert!(refused.contains("0x100000000"), "{refused}");
    }
}
