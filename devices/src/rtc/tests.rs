use std::sync::{Arc, Mutex};

use super::*;

/// A wall clock that is set by hand.
#[derive(Clone, Default)]
struct Hand(Arc<Mutex<Duration>>);

impl Hand {
    fn at(seconds: u64) -> Self {
        Self(Arc::new(Mutex::new(Duration::from_secs(seconds))))
    }

    fn pass(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

impl WallClock for Hand {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap()
    }
}

const MEMORY: GuestMemorySize = GuestMemorySize { below_4g: 512 << 20, above_4g: 0 };
/// 2026-08-01 12:34:56 UTC, a Saturday.
const AUGUST: u64 = 1_785_587_696;
const ONE_SECOND: Duration = Duration::from_secs(1);

fn rtc_at(seconds: u64) -> (Rtc, Hand) {
    let hand = Hand::at(seconds);
    (Rtc::new(Box::new(hand.clone()), MEMORY), hand)
}

fn get(rtc: &mut Rtc, register: u8) -> u8 {
    rtc.write(0, &[register]);
    let mut data = [0];
    rtc.read(1, &mut data);
    data[0]
}

fn set(rtc: &mut Rtc, register: u8, byte: u8) {
    rtc.write(0, &[register]);
    rtc.write(1, &[byte]);
}

/// Seconds, minutes, hours, day of week, day, month, year, century.
fn time(rtc: &mut Rtc) -> [u8; 8] {
    calendar::TIME_REGISTERS.map(|register| get(rtc, register))
}

const SHOWN: [u8; 8] = [0x56, 0x34, 0x12, 0x07, 0x01, 0x08, 0x26, 0x20];

#[test]
fn the_wall_clock_is_shown_in_bcd_and_24_hours() {
    let (mut rtc, hand) = rtc_at(AUGUST);
    assert_eq!(time(&mut rtc), SHOWN);
    hand.pass(Duration::from_secs(4));
    assert_eq!(time(&mut rtc)[..2], [0x00, 0x35]);
}

#[test]
fn register_b_selects_binary_and_12_hours() {
    let (mut rtc, _) = rtc_at(AUGUST + 3600);
    set(&mut rtc, REGISTER_B, BINARY);
    assert_eq!(time(&mut rtc), [56, 34, 0x81, 7, 1, 8, 26, 20]);
}

#[test]
fn the_update_in_progress_bit_shows_shortly_before_each_second_alone() {
    let (mut rtc, hand) = rtc_at(AUGUST);
    hand.pass(Duration::from_nanos(999_755_000));
    assert_eq!(get(&mut rtc, REGISTER_A), 0x26);
    hand.pass(Duration::from_nanos(1_000));
    assert_eq!(get(&mut rtc, REGISTER_A), 0xa6);
    set(&mut rtc, REGISTER_B, SET | HOURS_24);
    assert_eq!(get(&mut rtc, REGISTER_A), 0x26, "SET inhibits updates");
    set(&mut rtc, REGISTER_B, HOURS_24);
    hand.pass(Duration::from_nanos(244_000));
    assert_eq!(get(&mut rtc, REGISTER_A), 0x26);
}

/// As `mc146818_set_time` of Linux does it: SET, divider reset, the registers, SET off, divider on.
#[test]
fn linux_sets_the_time_and_it_runs_on_half_a_second_later() {
    let (mut rtc, hand) = rtc_at(AUGUST);
    hand.pass(Duration::from_millis(300));
    set(&mut rtc, REGISTER_B, SET | HOURS_24);
    set(&mut rtc, REGISTER_A, 0x70);
    for (register, byte) in [(9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59), (0x32, 0x19)] {
        set(&mut rtc, register, byte);
    }
    hand.pass(Duration::from_secs(100));
    assert_eq!(time(&mut rtc)[..3], [0x59, 0x59, 0x23], "it stands");
    set(&mut rtc, REGISTER_B, HOURS_24);
    set(&mut rtc, REGISTER_A, 0x26);
    hand.pass(Duration::from_millis(499));
    assert_eq!(time(&mut rtc), [0x59, 0x59, 0x23, 0x06, 0x31, 0x12, 0x99, 0x19]);
    hand.pass(Duration::from_millis(1));
    assert_eq!(time(&mut rtc), [0, 0, 0, 0x07, 0x01, 0x01, 0x00, 0x20]);
}

#[test]
fn set_alone_keeps_the_phase_of_the_second() {
    let (mut rtc, hand) = rtc_at(AUGUST);
    hand.pass(Duration::from_millis(900));
    set(&mut rtc, REGISTER_B, SET | HOURS_24);
    set(&mut rtc, 0, 0x10);
    set(&mut rtc, REGISTER_B, HOURS_24);
    assert_eq!(get(&mut rtc, 0), 0x10);
    hand.pass(Duration::from_millis(100));
    assert_eq!(get(&mut rtc, 0), 0x11);
}

#[test]
fn a_running_clock_can_be_set_byte_by_byte() {
    let (mut rtc, hand) = rtc_at(AUGUST);
    set(&mut rtc, 4, 0x05);
    hand.pass(ONE_SECOND);
    assert_eq!(time(&mut rtc)[..3], [0x57, 0x34, 0x05]);
}

#[test]
fn a_time_set_by_the_guest_survives_a_freeze_and_the_policy_decides_on_the_outage() {
    let outage = Duration::from_secs(3600);
    for (policy, expected) in [
        (ClockPolicy::Realtime, [0x56, 0x34, 0x06]),
        (ClockPolicy::Continue { frozen_at: Duration::from_secs(AUGUST) }, [0x56, 0x34, 0x05]),
    ] {
        let (mut rtc, _) = rtc_at(AUGUST);
        set(&mut rtc, 4, 0x05);
        let state = rtc.save();
        let (mut resumed, _) = rtc_at(AUGUST + outage.as_secs());
        resumed.restore(&state).unwrap();
        resumed.apply_clock_policy(policy);
        assert_eq!(time(&mut resumed)[..3], expected, "{policy:?}");
    }
}

#[test]
fn a_clock_that_continues_does_so_under_a_wall_clock_that_went_back() {
    let (rtc, _) = rtc_at(AUGUST);
    let (mut resumed, _) = rtc_at(5);
    resumed.restore(&rtc.save()).unwrap();
    resumed.apply_clock_policy(ClockPolicy::Continue { frozen_at: Duration::from_secs(AUGUST) });
    assert_eq!(time(&mut resumed), SHOWN);
}

#[test]
fn a_stopped_clock_stays_stopped_over_an_outage() {
    let (mut rtc, _) = rtc_at(AUGUST);
    set(&mut rtc, REGISTER_B, SET | HOURS_24);
    set(&mut rtc, 2, 0x07);
    let (mut resumed, hand) = rtc_at(AUGUST + 1000);
    resumed.restore(&rtc.save()).unwrap();
    assert_eq!(time(&mut resumed)[..3], [0x56, 0x07, 0x12]);
    set(&mut resumed, REGISTER_B, HOURS_24);
    hand.pass(ONE_SECOND);
    assert_eq!(time(&mut resumed)[..3], [0x57, 0x07, 0x12]);
}

#[test]
fn register_c_shows_what_passed_once_and_irqf_if_enabled() {
    let (mut rtc, hand) = rtc_at(AUGUST);
    set(&mut rtc, REGISTER_A, 0x20);
    hand.pass(ONE_SECOND);
    assert_eq!(get(&mut rtc, REGISTER_C), flags::UPDATE_ENDED);
    assert_eq!(get(&mut rtc, REGISTER_C), 0);
    set(&mut rtc, REGISTER_B, HOURS_24 | UPDATE_INTERRUPT);
    hand.pass(ONE_SECOND);
    assert_eq!(get(&mut rtc, REGISTER_C), flags::UPDATE_ENDED | INTERRUPT_REQUEST);
}

#[test]
fn an_alarm_set_before_the_outage_has_rung_after_it_in_real_time_only() {
    let frozen_at = Duration::from_secs(AUGUST);
    for (policy, expected) in [(ClockPolicy::Realtime, flags::ALARM), (ClockPolicy::Continue { frozen_at }, 0)] {
        let (mut rtc, _) = rtc_at(AUGUST);
        for (register, byte) in [(1, 0x00), (3, 0x40), (5, 0x12)] {
            set(&mut rtc, register, byte);
        }
        let (mut resumed, _) = rtc_at(AUGUST + 3600);
        resumed.restore(&rtc.save()).unwrap();
        resumed.apply_clock_policy(policy);
        assert_eq!(get(&mut resumed, REGISTER_C) & flags::ALARM, expected, "{policy:?}");
    }
}

#[test]
fn setting_set_clears_the_update_interrupt() {
    let (mut rtc, _) = rtc_at(AUGUST);
    set(&mut rtc, REGISTER_B, 0xff);
    assert_eq!(get(&mut rtc, REGISTER_B), 0xef);
}

#[test]
fn the_index_port_masks_nmis_and_cannot_be_read() {
    let (mut rtc, _) = rtc_at(AUGUST);
    rtc.write(0, &[0x8f]);
    assert!(rtc.nmi_masked());
    rtc.write(1, &[0x0a]);
    rtc.write(0, &[0x0f]);
    assert!(!rtc.nmi_masked());
    let mut data = [0; 4];
    rtc.read(0, &mut data);
    assert_eq!(data, [0xff, 0x0a, 0xff, 0xff]);
}

#[test]
fn a_word_written_to_the_index_port_is_index_and_data() {
    let (mut rtc, _) = rtc_at(AUGUST);
    rtc.write(0, &0x5a0fu16.to_le_bytes());
    assert_eq!(get(&mut rtc, 0x0f), 0x5a);
}

#[test]
fn registers_c_and_d_are_read_only_and_the_battery_is_good() {
    let (mut rtc, _) = rtc_at(AUGUST);
    set(&mut rtc, REGISTER_C, 0xff);
    set(&mut rtc, REGISTER_D, 0x00);
    assert_eq!((get(&mut rtc, REGISTER_C), get(&mut rtc, REGISTER_D)), (0, 0x80));
}

#[test]
fn memory_sizes_are_where_firmware_puts_them() {
    let (mut rtc, _) = rtc_at(AUGUST);
    // 496 MiB above 16 MiB, in units of 64 KiB.
    assert_eq!([get(&mut rtc, 0x34), get(&mut rtc, 0x35)], (496u16 * 16).to_le_bytes());
}

#[test]
fn a_wall_clock_at_its_end_is_still_some_time() {
    let hand = Hand(Arc::new(Mutex::new(Duration::MAX)));
    let mut rtc = Rtc::new(Box::new(hand), MEMORY);
    rtc.apply_clock_policy(ClockPolicy::Continue { frozen_at: Duration::ZERO });
    time(&mut rtc);
    let state = rtc.save();
    rtc.restore(&state).unwrap();
    assert_eq!(rtc.save(), state);
}

#[test]
fn a_state_that_no_run_leads_to_is_refused_and_alters_nothing() {
    let (mut rtc, _) = rtc_at(AUGUST);
    let before = rtc.save();
    let DeviceState::Rtc(valid) = rtc.save() else { panic!("another device's state") };
    let with = |register: u8, byte: u8| {
        let mut memory = valid.memory.clone();
        memory[usize::from(register)] = byte;
        RtcStateV1 { memory, ..valid.clone() }
    };
    let wrong = [
        RtcStateV1 { index: 0x80, ..valid.clone() },
        RtcStateV1 { memory: vec![0; 127], ..valid.clone() },
        RtcStateV1 { memory: vec![0; 129], ..valid.clone() },
        with(REGISTER_A, 0xa6),
        with(REGISTER_B, 0x92),
        with(REGISTER_C, 0x80),
        with(REGISTER_D, 0x00),
        RtcStateV1 { offset_nanoseconds: 1_000_000_000, ..valid.clone() },
        RtcStateV1 { offset_seconds: i64::MAX, ..valid.clone() },
        RtcStateV1 { offset_seconds: i64::MIN, ..valid.clone() },
        RtcStateV1 { flags_until_seconds: i64::MIN, ..valid.clone() },
        RtcStateV1 { flags_until_nanoseconds: u32::MAX, ..valid.clone() },
    ];
    for state in wrong {
        assert!(matches!(rtc.restore(&DeviceState::Rtc(state)), Err(StateError::Invalid { device: "rtc", .. })));
        assert_eq!(rtc.save(), before);
    }
}
