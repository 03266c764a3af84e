//! One saved state of every layout ever written, byte for byte. A layout never changes; a new one is added beside it, and
//! the old file stays: what lies in somebody's pool must be read for ever.

use crate::house::House;
use devices::DeviceState;
use devices::state::{
    BlockStateV1, DebugExitStateV1, FlushV1, KeyboardControllerStateV1, PowerStateV1, ReportStateV1, ResetStateV1,
    RtcStateV1, SerialStateV1, VmGenIdStateV1,
};
use devices::virtio::balloon::BalloonStateV1;
use devices::virtio::console::ConsoleStateV1;
use devices::virtio::net::NetStateV1;
use devices::virtio::pmem::PmemStateV1;
use devices::virtio::queue_state::QueueStateV1;
use devices::virtio::state::{VirtioMmioStateV1, VirtioState};
use devices::virtio::vsock::VsockStateV1;

fn check(index: usize, file: &str, expected: &DeviceState) {
    let read: DeviceState = serde_json::from_str(file).unwrap();
    assert_eq!(&read, expected, "what is read has changed");
    assert_eq!(serde_json::to_string_pretty(expected).unwrap() + "\n", file, "what is written has changed");
    let mut house = House::new(0);
    house.device(index).restore(&read).unwrap();
    assert_eq!(&house.device(index).save(), expected);
}

#[test]
fn serial_v1_reads_and_writes_as_it_always_did() {
    let state = SerialStateV1 {
        divisor_latch_low: 1,
        divisor_latch_high: 2,
        interrupt_enable: 0x05,
        interrupt_identification: 0x04,
        thr_empty_deferred: false,
        line_control: 0x13,
        line_status: 0x61,
        modem_control: 0x0b,
        modem_status: 0xb0,
        scratch: 0x5a,
        receive_fifo: b"typed ahead".to_vec(),
        output_backlog: b"not yet shown".to_vec(),
        output_lost: 3,
        interrupt_undelivered: true,
    };
    check(0, include_str!("../golden/serial-v1.json"), &DeviceState::Serial(state));
}

#[test]
fn rtc_v1_reads_and_writes_as_it_always_did() {
    let mut memory: Vec<u8> = (0..128).collect();
    memory[0x0a..=0x0d].copy_from_slice(&[0x26, 0x02, 0x50, 0x80]);
    let state = RtcStateV1 {
        index: 0x0c,
        nmi_masked: true,
        memory,
        offset_seconds: -3601,
        offset_nanoseconds: 999_999_999,
        flags_until_seconds: 1_785_587_696,
        flags_until_nanoseconds: 123_456_789,
    };
    check(1, include_str!("../golden/rtc-v1.json"), &DeviceState::Rtc(state));
}

#[test]
fn keyboard_controller_v1_reads_and_writes_as_it_always_did() {
    let state = KeyboardControllerStateV1 {
        status: 0x1d,
        output: 0xfa,
        output_port: 0xcf,
        memory: (0x74..0x94).collect(),
        waiting_command: Some(0xd1),
    };
    check(2, include_str!("../golden/keyboard-controller-v1.json"), &DeviceState::KeyboardController(state));
}

#[test]
fn reset_v1_reads_and_writes_as_it_always_did() {
    let state = ResetStateV1 { control: 0x02 };
    check(3, include_str!("../golden/reset-v1.json"), &DeviceState::Reset(state));
}

#[test]
fn power_v1_reads_and_writes_as_it_always_did() {
    let state = PowerStateV1 { sleep_control: 0x14, sleep_status: 0x80 };
    check(4, include_str!("../golden/power-v1.json"), &DeviceState::Power(state));
}

#[test]
fn debug_exit_v1_reads_and_writes_as_it_always_did() {
    check(5, include_str!("../golden/debug-exit-v1.json"), &DeviceState::DebugExit(DebugExitStateV1 { code: 42 }));
}

#[test]
fn report_v1_reads_and_writes_as_it_always_did() {
    let state = ReportStateV1 { latch: u64::MAX - 1, value: u64::MAX, count: 7 };
    check(6, include_str!("../golden/report-v1.json"), &DeviceState::Report(state));
}

/// A device with queues of these sizes, whose driver is set up and has worked with it.
fn virtio(sizes: &[u16], driver_features: u64, device: VirtioState) -> DeviceState {
    let queues = (0..).zip(sizes).map(|(index, size)| QueueStateV1 {
        max_size: *size,
        size: size / 2,
        ready: true,
        event_idx: true,
        next_avail: 0xfffe,
        next_used: 0xfffd,
        descriptors: 0x4000 * index,
        available: 0x4000 * index + 0x2000,
        used: 0x4000 * index + 0x3000,
    });
    DeviceState::VirtioMmio(VirtioMmioStateV1 {
        status: 15,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: driver_features | 1 << 32 | 1 << 29 | 1 << 28,
        queue_select: 2,
        interrupt_status: 1,
        config_generation: 3,
        queues: queues.collect(),
        device,
    })
}

#[test]
fn virtio_net_v1_reads_and_writes_as_it_always_did() {
    let net = NetStateV1 { mac: "02:0a:5e:10:00:01".parse().unwrap(), announce: true };
    let state = virtio(&[256, 256, 64], 0x23_bba3, VirtioState::Net(net));
    check(7, include_str!("../golden/virtio-net-v1.json"), &state);
}

#[test]
fn virtio_vsock_v1_reads_and_writes_as_it_always_did() {
    let vsock = VsockStateV1 { cid: 4_294_967_294, transport_reset: true };
    let state = virtio(&[256, 256, 16], 0, VirtioState::Vsock(vsock));
    check(8, include_str!("../golden/virtio-vsock-v1.json"), &state);
}

#[test]
fn virtio_balloon_v1_reads_and_writes_as_it_always_did() {
    let balloon = BalloonStateV1 { target: 0xffff_ffff, actual: 0x1_0000 };
    let state = virtio(&[128, 128, 128], 0x24, VirtioState::Balloon(balloon));
    check(9, include_str!("../golden/virtio-balloon-v1.json"), &state);
}

#[test]
fn virtio_rng_v1_reads_and_writes_as_it_always_did() {
    check(10, include_str!("../golden/virtio-rng-v1.json"), &virtio(&[64], 0, VirtioState::Rng));
}

#[test]
fn vmgenid_v1_reads_and_writes_as_it_always_did() {
    let state = VmGenIdStateV1 { id: (1..17).collect(), changed: true };
    check(11, include_str!("../golden/vmgenid-v1.json"), &DeviceState::VmGenId(state));
}

#[test]
fn virtio_block_v1_reads_and_writes_as_it_always_did() {
    let flushes =
        vec![FlushV1 { queue: 0, head: 5, status: 0x4567 }, FlushV1 { queue: 1, head: 127, status: 0x1_0000 }];
    let block = BlockStateV1 { sectors: 2048, read_only: false, flushes };
    let state = virtio(&[256, 256], 1 << 9, VirtioState::Block(block));
    check(12, include_str!("../golden/virtio-block-v1.json"), &state);
}

#[test]
fn virtio_console_v1_reads_and_writes_as_it_always_did() {
    let state = virtio(&[64, 64], 1, VirtioState::Console(ConsoleStateV1 { sent: 4100 }));
    check(13, include_str!("../golden/virtio-console-v1.json"), &state);
}

#[test]
fn virtio_pmem_v1_reads_and_writes_as_it_always_did() {
    let pmem = PmemStateV1 { start: 0x1_0000_0000, size: 0x400_0000 };
    let state = virtio(&[64], 0, VirtioState::Pmem(pmem));
    check(14, include_str!("../golden/virtio-pmem-v1.json"), &state);
}

#[test]
fn stateless_reads_and_writes_as_it_always_did() {
    assert_eq!(serde_json::to_string(&DeviceState::Stateless).unwrap(), r#"{"device":"stateless"}"#);
}
