//! States that nobody vouches for: a device takes one whole or not at all, and works afterwards.

use crate::house::{DEVICES, House, events};
use devices::DeviceState;
use devices::state::{
    DebugExitStateV1, KeyboardControllerStateV1, PowerStateV1, ReportStateV1, ResetStateV1, RtcStateV1, SerialStateV1,
};
use proptest::prelude::*;

/// Bytes of about `length`, at times far more.
fn bytes(length: usize) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => prop::collection::vec(any::<u8>(), length),
        2 => prop::collection::vec(any::<u8>(), 0..=2 * length),
        1 => Just(vec![0; 1 << 17]),
    ]
}

/// Usually `likely`, so that something gets past the first check; else anything.
fn usually(likely: Vec<u8>) -> impl Strategy<Value = u8> {
    prop_oneof![6 => prop::sample::select(likely), 1 => any::<u8>()]
}

fn serial() -> impl Strategy<Value = DeviceState> {
    (
        (any::<u8>(), any::<u8>(), usually((0..16).collect()), usually(vec![1, 2, 4, 6]), any::<bool>(), any::<u8>()),
        (usually(vec![0x61]), any::<u8>(), usually(vec![0xb0]), any::<u8>(), bytes(20), bytes(50)),
        (any::<u64>(), any::<bool>()),
    )
        .prop_map(
            |(
                (divisor_latch_low, divisor_latch_high, interrupt_enable, interrupt_identification, deferred, lcr),
                (line_status, modem_control, modem_status, scratch, receive_fifo, output_backlog),
                (output_lost, interrupt_undelivered),
            )| {
                DeviceState::Serial(SerialStateV1 {
                    divisor_latch_low,
                    divisor_latch_high,
                    interrupt_enable,
                    interrupt_identification,
                    thr_empty_deferred: deferred,
                    line_control: lcr,
                    line_status,
                    modem_control,
                    modem_status,
                    scratch,
                    receive_fifo,
                    output_backlog,
                    output_lost,
                    interrupt_undelivered,
                })
            },
        )
}

fn rtc() -> impl Strategy<Value = DeviceState> {
    let seconds = || prop_oneof![4 => -1_000_000_000_000i64..1_000_000_000_000, 1 => any::<i64>()];
    let nanoseconds = || prop_oneof![4 => 0..1_000_000_000u32, 1 => any::<u32>()];
    (
        usually((0..0x80).collect()),
        any::<bool>(),
        bytes(128),
        // Registers A to D, so that some are sound.
        prop::option::weighted(0.8, (0..0x80u8, 0..0x80u8, (0..8u8).prop_map(|flags| flags << 4))),
        (seconds(), nanoseconds()),
        (seconds(), nanoseconds()),
    )
        .prop_map(|(index, nmi_masked, mut memory, registers, offset, flags_until)| {
            if let (Some((a, b, c)), true) = (registers, memory.len() > 0x0d) {
                memory[0x0a..=0x0d].copy_from_slice(&[a, b, c, 0x80]);
            }
            DeviceState::Rtc(RtcStateV1 {
                index,
                nmi_masked,
                memory,
                offset_seconds: offset.0,
                offset_nanoseconds: offset.1,
                flags_until_seconds: flags_until.0,
                flags_until_nanoseconds: flags_until.1,
            })
        })
}

fn state() -> impl Strategy<Value = (usize, DeviceState)> {
    let keyboard = (
        usually(vec![0x10, 0x11, 0x14, 0x15, 0x18, 0x1c, 0x55]),
        any::<u8>(),
        any::<u8>(),
        bytes(32),
        prop::option::of(usually(vec![0x60, 0x7f, 0xd1, 0xd2, 0xd3, 0xd4])),
    )
        .prop_map(|(status, output, output_port, memory, waiting_command)| {
            DeviceState::KeyboardController(KeyboardControllerStateV1 {
                status,
                output,
                output_port,
                memory,
                waiting_command,
            })
        });
    prop_oneof![
        3 => serial().prop_map(|state| (0, state)),
        3 => rtc().prop_map(|state| (1, state)),
        2 => keyboard.prop_map(|state| (2, state)),
        1 => any::<u8>().prop_map(|control| (3, DeviceState::Reset(ResetStateV1 { control }))),
        1 => any::<(u8, u8)>().prop_map(|(sleep_control, sleep_status)| {
            (4, DeviceState::Power(PowerStateV1 { sleep_control, sleep_status }))
        }),
        1 => any::<u8>().prop_map(|code| (5, DeviceState::DebugExit(DebugExitStateV1 { code }))),
        1 => any::<(u64, u64, u64)>().prop_map(|(latch, value, count)| {
            (6, DeviceState::Report(ReportStateV1 { latch, value, count }))
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_state_is_taken_whole_or_not_at_all_and_the_device_works_on((index, state) in state(), after in events()) {
        let mut house = House::new(1_785_587_696_123_456_789);
        let before = house.device(index).save();
        let taken = house.device(index).restore(&state).is_ok();
        let now = house.device(index).save();
        prop_assert_eq!(&now, if taken { &state } else { &before });
        house.device(index).thaw();
        for event in &after {
            house.happen(index, event);
        }
        // What a sound device saves is sound.
        let last = house.device(index).save();
        prop_assert!(house.device(index).restore(&last).is_ok());
    }

    #[test]
    fn damaged_json_is_refused_or_means_a_state(
        index in 0..DEVICES, at in any::<prop::sample::Index>(), with in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut house = House::new(1_785_587_696_123_456_789);
        let mut json = serde_json::to_vec(&house.device(index).save()).unwrap();
        let at = at.index(json.len());
        json.splice(at..(at + 1).min(json.len()), with);
        if let Ok(state) = serde_json::from_slice::<DeviceState>(&json) {
            for target in 0..DEVICES {
                if house.device(target).restore(&state).is_ok() {
                    prop_assert_eq!(house.device(target).save(), state.clone());
                }
            }
        }
    }
}

#[test]
fn an_unknown_device_version_or_field_is_refused() {
    for json in [
        r#"{"device":"debug-exit-v1","code":1,"colour":"red"}"#,
        r#"{"device":"debug-exit-v2","code":1}"#,
        r#"{"device":"debug-exit-v1"}"#,
        r#"{"device":"debug-exit-v1","code":256}"#,
        r#"{"code":1}"#,
        r#"{"device":"keyboard-controller-v1","status":20,"output":0,"output_port":207,"memory":"?","waiting_command":null}"#,
    ] {
        assert!(serde_json::from_str::<DeviceState>(json).is_err(), "{json}");
    }
}
