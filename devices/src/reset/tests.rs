use super::*;
use crate::device::{BusDevice, Freezable};
use crate::machine_control::MachineRequest;
use crate::machine_control::tests::Requests;
use crate::state::{DeviceState, StateError};

const DATA: u64 = 0;
const COMMAND: u64 = 4;

fn read(device: &mut impl BusDevice, offset: u64) -> u8 {
    let mut data = [0];
    device.read(offset, &mut data);
    data[0]
}

fn ask(controller: &mut KeyboardController, command: u8) -> Option<u8> {
    controller.write(COMMAND, &[command]);
    (read(controller, COMMAND) & 1 == 1).then(|| read(controller, DATA))
}

#[test]
fn every_pulse_of_the_reset_line_resets_and_no_other_does() {
    let requests = Requests::new();
    let mut controller = KeyboardController::new(requests.clone());
    for command in 0..=0xff {
        controller.write(COMMAND, &[command]);
        let expected: &[_] = if command >= 0xf0 && command % 2 == 0 { &[MachineRequest::Reset] } else { &[] };
        assert_eq!(requests.take(), expected, "command {command:#x}");
    }
}

#[test]
fn the_output_port_resets_only_when_its_lowest_bit_is_cleared() {
    let requests = Requests::new();
    let mut controller = KeyboardController::new(requests.clone());
    for (byte, expected) in [(0xdf, 0), (0xdd, 0), (0xfe, 1)] {
        controller.write(COMMAND, &[0xd1]);
        controller.write(DATA, &[byte]);
        assert_eq!(requests.take().len(), expected, "{byte:#x}");
    }
    assert_eq!(ask(&mut controller, 0xd0), Some(0xff));
}

#[test]
fn the_input_buffer_is_never_full_so_nobody_waits_for_it() {
    let mut controller = KeyboardController::new(Requests::new());
    for command in 0..=0xff {
        controller.write(COMMAND, &[command]);
        assert_eq!(read(&mut controller, COMMAND) & 2, 0);
        controller.write(DATA, &[command]);
        assert_eq!(read(&mut controller, COMMAND) & 2, 0);
    }
}

/// What Linux does in `i8042_probe` (drivers/input/serio/i8042.c), in that order.
#[test]
fn the_probe_of_linux_finds_a_controller_without_waiting_and_no_auxiliary_port() {
    let mut controller = KeyboardController::new(Requests::new());
    assert_eq!(read(&mut controller, COMMAND) & 1, 0, "i8042_flush: nothing to flush");
    assert_eq!(ask(&mut controller, 0xaa), Some(0x55), "i8042_controller_selftest");
    let command_byte = ask(&mut controller, 0x20).unwrap();
    assert_eq!(ask(&mut controller, 0x20), Some(command_byte), "i8042_controller_init: twice the same");
    controller.write(COMMAND, &[0x60]);
    controller.write(DATA, &[0x74 | 0x20]);
    assert_eq!(ask(&mut controller, 0x20), Some(0x74));
    controller.write(COMMAND, &[0xd3]);
    controller.write(DATA, &[0x5a]);
    let status = read(&mut controller, COMMAND);
    assert_eq!(status & 0x21, 0x01, "i8042_check_aux: an answer, but not from the auxiliary port");
    let test = ask(&mut controller, 0xa9).unwrap();
    assert!(![0, 0xfa, 0xff].contains(&test), "i8042_check_aux: {test:#x} would be a port");
}

#[test]
fn a_byte_for_the_missing_keyboard_times_out() {
    let mut controller = KeyboardController::new(Requests::new());
    controller.write(DATA, &[0xf2]);
    assert_eq!(read(&mut controller, COMMAND) & 0x41, 0x41);
    assert_eq!(read(&mut controller, DATA), 0xfe);
    assert_eq!(read(&mut controller, COMMAND) & 0x41, 0);
}

#[test]
fn the_status_shows_the_system_flag_of_the_command_byte() {
    let mut controller = KeyboardController::new(Requests::new());
    for (byte, flag) in [(0x00, 0), (0x04, 4)] {
        controller.write(COMMAND, &[0x60]);
        controller.write(DATA, &[byte]);
        assert_eq!(read(&mut controller, COMMAND) & 4, flag);
    }
}

#[test]
fn a_command_that_waits_for_its_byte_still_does_after_a_restore() {
    let requests = Requests::new();
    let mut controller = KeyboardController::new(requests.clone());
    controller.write(COMMAND, &[0xd1]);
    let state = controller.save();
    let mut resumed = KeyboardController::new(requests.clone());
    resumed.restore(&state).unwrap();
    resumed.write(DATA, &[0xfe]);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
}

#[test]
fn a_controller_state_that_no_run_leads_to_is_refused_and_alters_nothing() {
    let mut controller = KeyboardController::new(Requests::new());
    let before = controller.save();
    let DeviceState::KeyboardController(valid) = controller.save() else { panic!("another device's state") };
    let wrong = [
        KeyboardControllerStateV1 { status: valid.status | 0x02, ..valid.clone() },
        KeyboardControllerStateV1 { status: 0, ..valid.clone() },
        KeyboardControllerStateV1 { output_port: 0xce, ..valid.clone() },
        KeyboardControllerStateV1 { memory: vec![0; 31], ..valid.clone() },
        KeyboardControllerStateV1 { memory: Vec::new(), ..valid.clone() },
        KeyboardControllerStateV1 { waiting_command: Some(0xaa), ..valid.clone() },
    ];
    for state in wrong {
        let refused = controller.restore(&DeviceState::KeyboardController(state));
        assert!(matches!(refused, Err(StateError::Invalid { device: "keyboard-controller", .. })));
        assert_eq!(controller.save(), before);
    }
}

#[test]
fn the_reset_control_register_resets_on_a_rising_edge_alone() {
    let requests = Requests::new();
    let mut register = ResetControl::new(requests.clone());
    // As Linux does for reboot=pci: the kind first, then the edge.
    register.write(0, &[0x02]);
    assert_eq!(requests.take(), []);
    register.write(0, &[0x06]);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
    register.write(0, &[0x0e]);
    assert_eq!(requests.take(), [], "RST_CPU was set already");
    assert_eq!(read(&mut register, 0), 0x0e);
    register.write(0, &[0x00]);
    register.write(0, &[0x04]);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
}

#[test]
fn a_frozen_reset_control_register_still_waits_for_an_edge() {
    let requests = Requests::new();
    let mut register = ResetControl::new(requests.clone());
    register.restore(&DeviceState::Reset(ResetStateV1 { control: 0x06 })).unwrap();
    register.write(0, &[0x06]);
    assert_eq!(requests.take(), []);
    let refused = register.restore(&DeviceState::Reset(ResetStateV1 { control: 0x81 }));
    assert!(matches!(refused, Err(StateError::Invalid { device: "reset", .. })));
    assert_eq!(register.save(), DeviceState::Reset(ResetStateV1 { control: 0x06 }));
}
