//! Whatever a guest did to a device, freezing it changes nothing that the guest or the world can see.

use std::sync::atomic::Ordering;

use crate::house::{DEVICES, House, events};
use devices::{DeviceState, StateError};
use proptest::prelude::*;

fn json(state: &DeviceState) -> String {
    serde_json::to_string(state).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn save_restore_save_gives_equal_bytes(index in 0..DEVICES, history in events()) {
        let mut house = House::new(1_785_587_696_123_456_789);
        for event in &history {
            house.happen(index, event);
        }
        let frozen = json(&house.device(index).save());
        let mut resumed = house.twin();
        resumed.device(index).restore(&serde_json::from_str(&frozen).unwrap()).unwrap();
        prop_assert_eq!(json(&resumed.device(index).save()), frozen);
        prop_assert_eq!(resumed.world.edges.load(Ordering::SeqCst), 0, "a restore has no side effects");
        prop_assert!(resumed.world.requests.lock().unwrap().is_empty());
        prop_assert!(resumed.world.output.lock().unwrap().is_empty());
    }

    /// The one that was frozen and the one that was not go through the same afterwards, and cannot be told apart.
    #[test]
    fn a_resumed_device_goes_on_as_if_nothing_had_been(index in 0..DEVICES, before in events(), after in events()) {
        let mut house = House::new(1_785_587_696_123_456_789);
        for event in &before {
            house.happen(index, event);
        }
        let mut resumed = house.twin();
        resumed.device(index).restore(&house.device(index).save()).unwrap();
        house.world.edges.store(0, Ordering::SeqCst);
        house.world.output.lock().unwrap().clear();
        house.world.requests.lock().unwrap().clear();
        house.device(index).thaw();
        resumed.device(index).thaw();
        for event in &after {
            prop_assert_eq!(house.happen(index, event), resumed.happen(index, event), "{:?}", event);
        }
        prop_assert_eq!(house.device(index).save(), resumed.device(index).save());
        let (expected, found) = (&house.world, &resumed.world);
        prop_assert_eq!(expected.edges.load(Ordering::SeqCst), found.edges.load(Ordering::SeqCst));
        prop_assert_eq!(&*expected.output.lock().unwrap(), &*found.output.lock().unwrap());
        prop_assert_eq!(&*expected.requests.lock().unwrap(), &*found.requests.lock().unwrap());
    }

    /// With output that is taken at times only, the world gets every byte, once, in order (or it is counted as lost).
    #[test]
    fn no_output_byte_is_lost_or_doubled_over_any_number_of_freezes(
        sent in prop::collection::vec((any::<u8>(), 0..4usize, any::<bool>()), 0..200),
    ) {
        let mut house = House::new(0);
        let mut seen = Vec::new();
        for (byte, room, freeze) in &sent {
            house.world.output_room.store(*room, Ordering::SeqCst);
            house.device(0).write(0, &[*byte]);
            if *freeze {
                let state = house.device(0).save();
                seen.append(&mut house.world.output.lock().unwrap());
                house = House::new(0);
                house.device(0).restore(&state).unwrap();
                house.device(0).thaw();
            }
        }
        house.world.output_room.store(usize::MAX, Ordering::SeqCst);
        prop_assert_eq!(house.serial.drain_output(), 0);
        seen.append(&mut house.world.output.lock().unwrap());
        let expected: Vec<u8> = sent.iter().map(|(byte, ..)| *byte).collect();
        prop_assert_eq!(seen, expected);
    }
}

#[test]
fn a_state_of_another_device_is_refused_by_every_device() {
    let mut house = House::new(0);
    for from in 0..DEVICES {
        let state = house.device(from).save();
        for to in (0..DEVICES).filter(|&to| to != from) {
            let before = house.device(to).save();
            for other in [&state, &DeviceState::Stateless] {
                let refused = house.device(to).restore(other);
                assert!(matches!(refused, Err(StateError::WrongDevice { .. })), "{refused:?}");
            }
            assert_eq!(house.device(to).save(), before);
        }
    }
}

#[test]
fn every_device_has_an_id_of_its_own() {
    let mut house = House::new(0);
    let mut ids: Vec<_> = (0..DEVICES).map(|index| house.device(index).id().to_owned()).collect();
    ids.sort_unstable();
    assert_eq!(
        ids,
        [
            "balloon",
            "console",
            "debug-exit",
            "disk0",
            "keyboard-controller",
            "net0",
            "pmem0",
            "power",
            "report",
            "reset",
            "rng",
            "rtc",
            "serial0",
            "vmgenid",
            "vsock"
        ]
    );
}
