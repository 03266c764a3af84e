use super::*;
use crate::device::OPEN_BUS;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY, SIZE as ENTRIES};
use crate::virtio::state::VirtioState;
use crate::virtio::{Ring, VirtioKind};
use proptest::prelude::*;

/// Takes what comes and completes it at once; what a test wants to see of a device is in its configuration.
#[derive(Default)]
struct Sink {
    config: [u8; 8],
}

impl VirtioDevice for Sink {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Rng
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 256]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::device::read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let Some(to) = usize::try_from(at).ok().and_then(|at| self.config.get_mut(at)) {
                *to = *byte;
            }
        }
    }

    fn activate(&mut self, _: u64) {}

    fn reset(&mut self) {
        self.config = [0; 8];
    }

    fn notified(&mut self, queue: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        while let Some(chain) = rings[queue].pop()? {
            rings[queue].complete(chain.head_index(), 0)?;
        }
        rings[queue].signal()
    }

    fn save(&self) -> VirtioState {
        VirtioState::Rng
    }

    fn restore(&mut self, _: &VirtioState, _: u64) -> Result<(), StateError> {
        Ok(())
    }
}

fn driver() -> Driver {
    Driver::new(Sink::default())
}

#[test]
fn a_driver_finds_a_device_of_version_2_with_its_features_and_queues() {
    let mut driver = driver();
    assert_eq!((driver.read(0), driver.read(4), driver.read(8)), (0x7472_6976, 2, 4));
    assert_eq!(driver.offered(), 0b101 | 1 << 28 | 1 << 29 | 1 << 32);
    let sizes = [0, 1, 2].map(|queue| {
        driver.write(0x30, queue);
        driver.read(0x34)
    });
    assert_eq!(sizes, [64, 256, 0]);
}

#[test]
fn features_that_were_not_offered_or_an_old_driver_are_not_taken() {
    for features in [1 << 1 | 1_u64 << 32, 0b101] {
        let mut driver = driver();
        driver.write(0x70, 1);
        driver.write(0x70, 3);
        driver.write(0x20, features as u32);
        driver.write(0x24, 1);
        driver.write(0x20, (features >> 32) as u32);
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 3, "features {features:#x}");
    }
}

#[test]
fn the_status_goes_its_way_step_by_step_or_back_to_the_beginning() {
    let mut driver = driver();
    driver.write(0x70, 4);
    driver.write(0x70, 8);
    assert_eq!(driver.read(0x70), 0, "DRIVER_OK and FEATURES_OK need what comes before");
    driver.set_up(0);
    assert_eq!(driver.read(0x70), 15);
    driver.write(0x70, 1);
    assert_eq!(driver.read(0x70), 15, "bits are not taken back one by one");
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x70, 0);
    driver.write(0x30, 1);
    assert_eq!((driver.read(0x70), driver.read(0x44)), (0, 0));
}

#[test]
fn queues_are_set_up_between_features_and_driver_ok_alone() {
    let mut driver = driver();
    driver.set_up_queue(0, 8);
    assert_eq!(driver.read(0x44), 0, "before");
    driver.set_up(0);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 1, "after");
}

#[test]
fn a_queue_size_that_is_no_power_of_two_or_too_large_is_not_taken() {
    let mut driver = driver();
    driver.negotiate(1 << 32);
    for size in [0, 3, 128, 0x1_0010, u32::MAX] {
        driver.write(0x30, 0);
        driver.write(0x38, size);
    }
    driver.write(0x44, 1);
    let DeviceState::VirtioMmio(state) = driver.mmio.save() else { panic!() };
    assert_eq!(state.queues[0].size, 64);
}

#[test]
fn a_queue_outside_of_the_memory_makes_the_device_ask_for_its_reset() {
    let mut driver = driver();
    driver.negotiate(1 << 32);
    driver.set_up_queue(0, ENTRIES);
    driver.write(0x84, 1);
    driver.write(0x70, 15);
    assert_eq!(driver.read(0x70), 0x4f);
    driver.notify(0);
    assert_eq!((driver.read(0x60), driver.edges()), (2, 1), "told once, by the configuration's interrupt");
    driver.set_up(0);
    assert_eq!(driver.read(0x70), 15, "a reset makes all good again");
}

#[test]
fn an_available_ring_that_ran_further_than_it_is_long_makes_the_device_ask_for_its_reset() {
    let mut driver = driver();
    driver.set_up(0);
    driver.put(Driver::ring(0) + 0x4002, &1000_u16.to_le_bytes());
    driver.notify(0);
    assert!(driver.needs_reset());
}

#[test]
fn a_loop_of_descriptors_ends() {
    let mut driver = driver();
    driver.set_up(0);
    driver.descriptor(0, 0, (BUFFERS, 16), 1, 1);
    driver.descriptor(0, 1, (BUFFERS, 16), 1, 0);
    driver.offer_head(0, 0);
    driver.notify(0);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn registers_of_other_widths_and_places_read_as_nothing() {
    let mut driver = driver();
    for length in [0, 1, 2, 3, 5, 8] {
        let mut data = vec![OPEN_BUS; length];
        driver.mmio.read(0, &mut data);
        assert!(data.iter().all(|byte| *byte == 0), "{length} bytes");
        driver.mmio.write(0x70, &data);
    }
    assert_eq!((driver.read(2), driver.read(0x54), driver.read(0xb0)), (0, 0, u32::MAX));
    assert_eq!(driver.config(6, 4), [0; 4]);
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again_after_the_resume() {
    let mut driver = driver();
    driver.set_up(0);
    driver.offer(1, &[(BUFFERS, 1)], &[]);
    driver.notify(1);
    assert_eq!(driver.edges(), 1);
    let state = driver.freeze();
    let mut resumed = driver.resumed(Sink::default());
    resumed.restore(&state).unwrap();
    assert_eq!(resumed.edges(), 0);
    resumed.thaw();
    assert_eq!((resumed.edges(), resumed.read(0x60)), (1, 1));
    resumed.offer(1, &[(BUFFERS, 1)], &[]);
    resumed.notify(1);
    assert_eq!(resumed.used(1).len(), 2, "the ring goes on where it was");
}

#[test]
fn a_state_that_no_driver_led_to_is_refused_and_the_device_is_as_it_was() {
    let mut driver = driver();
    driver.set_up(0);
    let DeviceState::VirtioMmio(good) = driver.mmio.save() else { panic!() };
    let wrong: [fn(&mut super::super::state::VirtioMmioStateV1); 8] = [
        |state| state.status = 0x20,
        |state| state.interrupt_status = 4,
        |state| state.driver_features |= 1 << 7,
        |state| state.queues.truncate(1),
        |state| state.queues[0].size = 3,
        |state| state.queues[0].max_size = 128,
        |state| state.queues[1].used = MEMORY - 4,
        |state| state.queues[1].descriptors += 1,
    ];
    for (index, spoil) in wrong.into_iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        assert!(driver.mmio.restore(&DeviceState::VirtioMmio(state)).is_err(), "number {index}");
        assert_eq!(driver.mmio.save(), DeviceState::VirtioMmio(good.clone()));
    }
    assert!(driver.mmio.restore(&DeviceState::Stateless).is_err());
}

/// Something that a guest does.
#[derive(Clone, Debug)]
enum Act {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Scribble(u64, Vec<u8>),
    Freeze,
}

fn act() -> impl Strategy<Value = Act> {
    let register = prop_oneof![8 => (0_u64..0x42).prop_map(|word| word * 4), 1 => 0_u64..0x120, 1 => any::<u64>()];
    let value = prop_oneof![
        6 => prop_oneof![Just(0_u32), 1_u32..16, Just(0x4000), Just(0x1_0000), any::<u32>()]
            .prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..9)
    ];
    prop_oneof![
        8 => (register.clone(), value).prop_map(|(register, value)| Act::Write(register, value)),
        2 => (register, 0_usize..9).prop_map(|(register, length)| Act::Read(register, length)),
        3 => (0..0x3_0000_u64, prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Act::Scribble(at, bytes)),
        1 => Just(Act::Freeze),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_does_the_device_lives_and_its_state_can_be_restored(
        set_up in any::<bool>(), acts in prop::collection::vec(act(), 0..120)
    ) {
        let mut driver = driver();
        if set_up {
            driver.set_up(0);
        }
        for act in acts {
            match act {
                Act::Write(register, bytes) => driver.mmio.write(register, &bytes),
                Act::Read(register, length) => driver.mmio.read(register, &mut vec![0; length]),
                Act::Scribble(at, bytes) => driver.put(at, &bytes),
                Act::Freeze => {
                    let state = driver.freeze();
                    let mut resumed = driver.resumed(Sink::default());
                    resumed.restore(&state).unwrap();
                    resumed.thaw();
                    driver = resumed;
                }
            }
        }
    }
}
