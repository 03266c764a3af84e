use super::*;
use crate::machine_control::tests::Requests;

fn read(power: &mut Power, offset: u64) -> u8 {
    let mut data = [0];
    power.read(offset, &mut data);
    data[0]
}

#[test]
fn sleep_enable_with_type_5_powers_off_once() {
    let requests = Requests::new();
    let mut power = Power::new(requests.clone());
    power.write(0, &[SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT]);
    assert_eq!(requests.take(), []);
    power.write(0, &[(SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT) | SLEEP_ENABLE]);
    assert_eq!(requests.take(), [MachineRequest::PowerOff]);
}

#[test]
fn linux_writes_0x34_to_power_off() {
    // drivers/acpi/acpica/hwesleep.c: (SLP_TYP << 2) & 0x1c | 0x20.
    let requests = Requests::new();
    Power::new(requests.clone()).write(0, &[0x34]);
    assert_eq!(requests.take(), [MachineRequest::PowerOff]);
}

#[test]
fn sleep_enable_with_another_type_is_ignored() {
    let requests = Requests::new();
    let mut power = Power::new(requests.clone());
    for sleep_type in (0..8).filter(|&t| t != SLEEP_TYPE_S5) {
        power.write(0, &[(sleep_type << SLEEP_TYPE_SHIFT) | SLEEP_ENABLE]);
    }
    assert_eq!(requests.take(), []);
}

#[test]
fn sleep_enable_and_reserved_bits_read_zero() {
    let mut power = Power::new(Requests::new());
    power.write(0, &[0xff]);
    assert_eq!(read(&mut power, 0), SLEEP_TYPE_MASK);
}

#[test]
fn a_written_one_clears_wake_status_and_a_zero_does_not() {
    let mut power = Power::new(Requests::new());
    power.wake();
    assert_eq!(read(&mut power, 1), WAKE_STATUS);
    power.write(1, &[0x7f]);
    assert_eq!(read(&mut power, 1), WAKE_STATUS);
    power.write(1, &[0x80]);
    assert_eq!(read(&mut power, 1), 0);
}

#[test]
fn a_wide_write_reaches_both_registers() {
    let requests = Requests::new();
    let mut power = Power::new(requests.clone());
    power.wake();
    power.write(0, &[0x34, 0x80, 0xff, 0xff]);
    assert_eq!(requests.take(), [MachineRequest::PowerOff]);
    let mut data = [0; 4];
    power.read(0, &mut data);
    assert_eq!(data, [0x14, 0, 0xff, 0xff]);
}

#[test]
fn a_state_with_reserved_bits_is_refused_and_alters_nothing() {
    let mut power = Power::new(Requests::new());
    power.wake();
    let before = power.save();
    for (sleep_control, sleep_status) in [(0x20, 0), (0, 1), (0x1c, 0x81)] {
        let state = DeviceState::Power(PowerStateV1 { sleep_control, sleep_status });
        assert!(matches!(power.restore(&state), Err(StateError::Invalid { device: "power", .. })));
        assert_eq!(power.save(), before);
    }
}
