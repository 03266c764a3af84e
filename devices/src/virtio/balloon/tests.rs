use std::sync::{Arc, Mutex};

use super::*;
use crate::state::DeviceState;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY};
use proptest::prelude::*;

#[derive(Clone, Default)]
struct Given(Arc<Mutex<Vec<(u64, u64)>>>);

impl Given {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Reclaim for Given {
    fn reclaim(&mut self, start: GuestAddress, length: u64) {
        assert!(start.0.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0, "whole pages");
        assert!(start.0 + length <= MEMORY, "of the guest's memory");
        self.0.lock().unwrap().push((start.0, length));
    }
}

fn set_up() -> (Driver, BalloonSize, Given) {
    let (size, given) = (BalloonSize::default(), Given::default());
    let mut driver = Driver::new(Balloon::new(size.clone(), Box::new(given.clone())));
    driver.set_up(feature::ALL);
    (driver, size, given)
}

fn inflate(driver: &mut Driver, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    driver.put(BUFFERS, &bytes);
    driver.offer(INFLATE, &[(BUFFERS, bytes.len() as u32)], &[]);
    driver.notify(INFLATE);
    assert_eq!(driver.used(INFLATE).len(), 1);
}

#[test]
fn pages_of_the_balloon_are_given_away_in_runs() {
    let (mut driver, _, given) = set_up();
    inflate(&mut driver, &[0x305, 0x304, 0x301, 0x300, 0x303, 0x310, 0x300]);
    assert_eq!(given.take(), [(0x30_0000, 0x2000), (0x30_3000, 0x3000), (0x31_0000, 0x1000)]);
}

#[test]
fn pages_that_there_are_not_are_let_alone() {
    let (mut driver, _, given) = set_up();
    let last = (MEMORY / PAGE) as u32 - 1;
    inflate(&mut driver, &[u32::MAX, u32::MAX - 1, last + 2]);
    assert!(given.take().is_empty());
    driver.offer(INFLATE, &[(MEMORY - 2, 8)], &[]);
    driver.offer(INFLATE, &[(BUFFERS, 3)], &[]);
    driver.offer(INFLATE, &[], &[(BUFFERS, 4096)]);
    driver.notify(INFLATE);
    assert_eq!((driver.used(INFLATE).len(), given.take().len()), (3, 0));
    assert!(!driver.needs_reset());
}

#[test]
fn a_request_of_endless_numbers_is_looked_at_so_far() {
    let (mut driver, _, given) = set_up();
    // All of the memory from there on is zeros but for its end.
    driver.put(BUFFERS + 4 * NUMBERS_MAX as u64, &0x300_u32.to_le_bytes());
    driver.offer(INFLATE, &[(BUFFERS, (MEMORY - BUFFERS) as u32)], &[]);
    driver.notify(INFLATE);
    assert_eq!(given.take(), [(0, PAGE)]);
}

#[test]
fn free_pages_are_given_away_without_what_is_not_whole_or_not_there() {
    let (mut driver, _, given) = set_up();
    driver.offer(REPORTING, &[], &[(0x20_0000, 0x10_0000), (0x30_0001, 0x2fff), (0x30_0001, 0xffe)]);
    driver.offer(REPORTING, &[], &[(MEMORY - 0x1000, 0x2000), (u64::MAX - 0xfff, 0x1000), (u64::MAX, 1)]);
    driver.offer(REPORTING, &[(0x20_0000, 0x1000)], &[]);
    driver.notify(REPORTING);
    assert_eq!(given.take(), [(0x20_0000, 0x10_0000), (0x30_1000, 0x2000)]);
    assert_eq!(driver.used(REPORTING).len(), 3);
}

#[test]
fn pages_taken_back_need_nothing() {
    let (mut driver, _, given) = set_up();
    driver.put(BUFFERS, &0x300_u32.to_le_bytes());
    driver.offer(1, &[(BUFFERS, 4)], &[]);
    driver.notify(1);
    assert_eq!((driver.used(1).len(), given.take().len()), (1, 0));
}

#[test]
fn a_new_target_reaches_the_driver_and_its_size_reaches_us() {
    let (mut driver, size, _) = set_up();
    size.set_target(64 << 20);
    driver.mmio.engine().lock().unwrap().ready(0);
    assert_eq!((driver.config(0, 4), driver.read(0x60)), (vec![0, 0x40, 0, 0], 2));
    driver.write(0x64, 2);
    driver.mmio.engine().lock().unwrap().ready(0);
    assert_eq!(driver.read(0x60), 0, "told once");
    driver.write(0x104, 0x1234);
    assert_eq!((size.target(), size.actual()), (64 << 20, 0x1234 << 12));
    for (offset, bytes) in [(5_u64, &[0xff_u8][..]), (7, &[1; 8]), (0, &[0; 4]), (u64::MAX - 0x100, &[9; 8])] {
        crate::device::BusDevice::write(&mut driver.mmio, 0x100_u64.wrapping_add(offset), bytes);
    }
    assert_eq!(driver.config(0, 12), [0, 0x40, 0, 0, 0x34, 0xff, 0, 1, 0, 0, 0, 0]);
}

#[test]
fn a_target_that_was_set_before_a_freeze_reaches_the_driver_after_the_resume() {
    let (mut driver, size, _) = set_up();
    size.set_target(1 << 20);
    driver.write(0x104, 7);
    let state = driver.freeze();
    let DeviceState::VirtioMmio(mmio) = &state else { panic!() };
    assert_eq!(mmio.device, VirtioState::Balloon(BalloonStateV1 { target: 256, actual: 7 }));
    let size = BalloonSize::default();
    let mut resumed = driver.resumed(Balloon::new(size.clone(), Box::new(Given::default())));
    resumed.restore(&state).unwrap();
    assert_eq!((size.target(), size.actual()), (1 << 20, 7 << 12));
    resumed.thaw();
    assert_eq!((resumed.read(0x60), resumed.config(0, 4)), (2, vec![0, 1, 0, 0]));
}

#[test]
fn a_driver_that_begins_anew_has_an_empty_balloon() {
    let (mut driver, size, _) = set_up();
    size.set_target(1 << 20);
    driver.write(0x104, 7);
    driver.set_up(feature::ALL);
    assert_eq!((size.target(), size.actual()), (1 << 20, 0));
}

proptest! {
    #[test]
    fn whatever_a_driver_offers_whole_pages_of_its_memory_are_given_away(
        requests in prop::collection::vec(
            (0..3_usize, any::<bool>(), prop_oneof![0..MEMORY + 0x2000, any::<u64>()], prop_oneof![0..0x10_0000_u32, any::<u32>()]), 0..60),
        numbers in prop::collection::vec(prop_oneof![0..0x500_u32, any::<u32>()], 1000),
    ) {
        let (mut driver, _, _) = set_up();
        driver.put(BUFFERS, &numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>());
        for (queue, writable, address, length) in requests {
            let (read, write) = if writable { (vec![], vec![(address, length)]) } else { (vec![(address, length)], vec![]) };
            driver.offer(queue, &read, &write);
            driver.notify(queue);
            prop_assert_eq!(driver.used(queue).len(), 1);
        }
        prop_assert!(!driver.needs_reset());
    }
}
