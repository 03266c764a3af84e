use super::*;
use crate::machine_control::tests::Requests;

#[test]
fn a_write_of_any_width_asks_for_exit_with_the_lowest_byte() {
    let requests = Requests::new();
    let mut port = DebugExit::new(requests.clone());
    for data in [&[7u8][..], &[8, 1], &[9, 2, 3, 4], &[10, 0, 0, 0, 0, 0, 0, 255]] {
        port.write(0, data);
    }
    assert_eq!(requests.take(), [7, 8, 9, 10].map(MachineRequest::DebugExit));
    let mut data = [0xaa; 4];
    port.read(0, &mut data);
    assert_eq!(data, [10, 0, 0, 0]);
}

#[test]
fn a_write_beside_the_code_asks_for_nothing() {
    let requests = Requests::new();
    let mut port = DebugExit::new(requests.clone());
    port.write(1, &[1]);
    port.write(u64::MAX, &[1, 2, 3, 4]);
    port.write(0, &[]);
    assert_eq!(requests.take(), []);
}

#[test]
fn a_restore_does_not_ask_for_the_exit_again() {
    let requests = Requests::new();
    let mut port = DebugExit::new(requests.clone());
    port.restore(&DeviceState::DebugExit(DebugExitStateV1 { code: 3 })).unwrap();
    port.thaw();
    assert_eq!(requests.take(), []);
    assert_eq!(port.save(), DeviceState::DebugExit(DebugExitStateV1 { code: 3 }));
}
