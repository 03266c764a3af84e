use super::*;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use crate::virtio::driver::{BUFFERS, Driver, MEMORY};
use crate::virtio::{DeviceMemory, GuestMemory};

/// Counts up, so that a test sees what came from it.
struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        for byte in bytes {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(())
    }
}

struct Empty;

impl Entropy for Empty {
    fn fill(&mut self, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Other.into())
    }
}

fn driver() -> Driver {
    let mut driver = Driver::new(Rng::new(Box::new(Counting(0))));
    driver.set_up(0);
    driver
}

#[test]
fn a_request_is_filled_with_random_bytes_and_the_driver_is_told() {
    let mut driver = driver();
    let head = driver.offer(0, &[], &[(BUFFERS, 3), (BUFFERS + 100, 2)]);
    driver.notify(0);
    assert_eq!(driver.used(0), [(head.into(), 5)]);
    assert_eq!((driver.get(BUFFERS, 4), driver.get(BUFFERS + 100, 3)), (vec![1, 2, 3, 0], vec![4, 5, 0]));
    assert_eq!((driver.edges(), driver.read(0x60)), (1, 1));
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn a_request_for_gigabytes_gets_a_page() {
    let mut driver = driver();
    driver.offer(0, &[], &[(BUFFERS, (MEMORY - BUFFERS) as u32)]);
    driver.notify(0);
    assert_eq!(driver.used(0), [(0, REQUEST_MAX as u32)]);
}

#[test]
fn buffers_outside_of_the_memory_get_nothing_and_the_next_request_is_served() {
    let mut driver = driver();
    driver.offer(0, &[], &[(MEMORY - 1, 2)]);
    driver.offer(0, &[(u64::MAX, u32::MAX)], &[(u64::MAX, u32::MAX)]);
    driver.offer(0, &[(BUFFERS, 8)], &[]);
    driver.offer(0, &[], &[(BUFFERS, 8)]);
    driver.notify(0);
    let lengths: Vec<u32> = driver.used(0).into_iter().map(|(_, length)| length).collect();
    assert_eq!(lengths, [0, 0, 0, 8]);
    assert!(!driver.needs_reset());
}

#[test]
fn a_host_without_randomness_makes_the_device_ask_for_its_reset_and_hands_out_nothing() {
    let mut driver = Driver::new(Rng::new(Box::new(Empty)));
    driver.set_up(0);
    driver.offer(0, &[], &[(BUFFERS, 8)]);
    driver.notify(0);
    assert!(driver.used(0).is_empty() && driver.needs_reset());
}

#[test]
fn requests_that_wait_at_a_freeze_are_answered_after_the_resume() {
    let mut driver = driver();
    let first = driver.freeze();
    driver.offer(0, &[], &[(BUFFERS, 8)]);
    driver.notify(0);
    assert!(driver.used(0).is_empty(), "nothing happens while it is frozen");
    let mut resumed = driver.resumed(Rng::new(Box::new(Counting(100))));
    resumed.restore(&first).unwrap();
    assert!(resumed.used(0).is_empty(), "nothing happens before the thaw");
    resumed.thaw();
    assert_eq!(resumed.used(0), [(0, 8)]);
    assert_eq!(resumed.get(BUFFERS, 1), [101], "drawn after the resume");
}

#[test]
fn a_driver_that_waits_to_be_asked_is_asked_for_its_next_request() {
    let mut driver = Driver::new(Rng::new(Box::new(Counting(0))));
    driver.set_up(1 << 29);
    for round in 1..=3 {
        driver.offer(0, &[], &[(BUFFERS, 8)]);
        driver.notify(0);
        assert_eq!(driver.awaited(0), (round, round));
    }
}

/// Memory of which the last page cannot be had, and the others have to be asked for.
struct Partial {
    memory: GuestMemory,
    asked: Mutex<Vec<(u64, u64)>>,
}

impl DeviceMemory for Partial {
    fn guest_memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn is_whole(&self) -> bool {
        false
    }

    fn bring_in(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        self.asked.lock().unwrap().push((start.0, length));
        if start.0 + length > MEMORY - 4096 { Err(io::ErrorKind::InvalidData.into()) } else { Ok(()) }
    }
}

#[test]
fn rings_and_buffers_are_brought_in_before_they_are_used_and_what_cannot_be_had_is_not_touched() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let partial = Arc::new(Partial { memory, asked: Mutex::default() });
    let mut driver = Driver::over(Arc::clone(&partial) as _, Rng::new(Box::new(Counting(0))));
    driver.set_up(0);
    driver.offer(0, &[], &[(BUFFERS, 8)]);
    driver.notify(0);
    assert_eq!(driver.used(0), [(0, 8)]);
    let asked = partial.asked.lock().unwrap().clone();
    for wanted in
        [(Driver::ring(0), 256), (Driver::ring(0) + 0x4000, 38), (Driver::ring(0) + 0x8000, 134), (BUFFERS, 8)]
    {
        assert!(asked.contains(&wanted), "{wanted:x?} of {asked:x?}");
    }
    driver.offer(0, &[], &[(MEMORY - 8, 8)]);
    driver.notify(0);
    assert!(driver.needs_reset() && driver.used(0).is_empty());
    assert_eq!(driver.get(MEMORY - 8, 8), [0; 8]);
}
