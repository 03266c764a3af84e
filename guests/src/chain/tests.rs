use super::*;
use proptest::prelude::*;

/// Captured on KVM; 40 ticks over 16 lines, so that each line of memory is read back.
const SHORT: &str = include_str!("../../tests/golden/counter-8k.txt");
/// Captured on KVM; 600 ticks over 512 lines, each 50th printed.
const SPARSE: &str = include_str!("../../tests/golden/counter-256k.txt");

/// Where the lines behind the first one begin.
const FIRST_TICK: usize = "counter ticks=40 hz=500 every=1 ram=8192 verify=1\n".len();

fn without_line(output: &str, start: &str) -> String {
    output.split_inclusive('\n').filter(|line| !line.starts_with(start)).collect()
}

#[test]
fn a_real_run_verifies_to_its_end() {
    let report = verify(SHORT).unwrap();
    assert_eq!((report.ticks, report.lines, report.complete, report.partial), (40, 42, true, false));
    assert!(SHORT.ends_with(&format!("done 40 {:016x}\n", report.hash)));
    let report = verify(SPARSE).unwrap();
    assert_eq!((report.ticks, report.lines, report.complete), (600, 14, true));
}

#[test]
fn a_run_that_was_stopped_verifies_as_far_as_it_came() {
    let report = verify(&SHORT[..SHORT.find("tick 7 ").unwrap() + 3]).unwrap();
    assert_eq!((report.ticks, report.partial, report.complete), (6, true, false));
    let report = verify(&SHORT[..SHORT.find("tick 7 ").unwrap()]).unwrap();
    assert_eq!((report.ticks, report.partial, report.complete), (6, false, false));
}

#[test]
fn a_lost_tick_is_named() {
    let error = verify(&without_line(SHORT, "tick 7 ")).unwrap_err();
    assert_eq!(error, ChainError::Lost { unit: "tick", expected: 7, found: 8 });
}

#[test]
fn a_doubled_tick_is_named() {
    let line = SHORT.lines().find(|line| line.starts_with("tick 7 ")).unwrap();
    let error = verify(&SHORT.replace(line, &format!("{line}\n{line}"))).unwrap_err();
    assert_eq!(error, ChainError::Doubled { unit: "tick", expected: 8, found: 7 });
}

#[test]
fn another_hash_is_named_as_altered() {
    let line = SHORT.lines().find(|line| line.starts_with("tick 30 ")).unwrap();
    let error = verify(&SHORT.replace(line, "tick 30 0000000000000000")).unwrap_err();
    assert!(matches!(error, ChainError::Altered { number: 30, .. }), "{error}");
}

#[test]
fn the_guests_own_verdict_is_passed_on() {
    let start = SHORT.find("tick 9 ").unwrap();
    let broken = "chain broken at tick 9 memory 0000000000202008";
    let error = verify(&format!("{}{broken}\n", &SHORT[..start])).unwrap_err();
    assert_eq!(error, ChainError::Broken { line: broken.to_owned() });
}

#[test]
fn output_behind_the_end_is_refused() {
    let error = verify(&format!("{SHORT}tick 41 0000000000000000\n")).unwrap_err();
    assert!(matches!(error, ChainError::Beyond { .. }), "{error}");
}

#[test]
fn forged_first_lines_are_refused() {
    for line in ["", "counter", "echo 1\n", "counter ticks=1\n", "counter ticks=0 hz=100 every=1 ram=0 verify=1\n"] {
        assert!(matches!(verify(line), Err(ChainError::Banner(_))), "{line:?}");
    }
    let huge = SHORT.replacen("ram=8192", "ram=99999999999999", 1);
    assert!(matches!(verify(&huge), Err(ChainError::Banner(BannerError::Parameter { key: "ram", .. }))));
}

#[test]
fn a_roll_back_verifies_in_segments_only() {
    let (cut, back) = (SHORT.find("tick 20 ").unwrap() + 9, SHORT.find("tick 12 ").unwrap() + 4);
    let (first, second) = (&SHORT[..cut], &SHORT[back..]);
    let report = verify_segments(&[first, second]).unwrap();
    assert_eq!((report.ticks, report.complete, report.rewound), (40, true, 1));
    assert!(verify(&format!("{first}{second}")).is_err());
    let gap = &SHORT[SHORT.find("tick 22 ").unwrap()..];
    assert!(verify_segments(&[first, gap]).is_err(), "a segment may not begin beyond what was printed");
}

proptest! {
    #[test]
    fn any_altered_byte_is_found(at in FIRST_TICK..SHORT.len(), flip in 0_u8..7) {
        let mut bytes = SHORT.as_bytes().to_vec();
        bytes[at] ^= 1 << flip;
        prop_assert!(verify(&String::from_utf8(bytes).unwrap()).is_err());
    }

    #[test]
    fn any_lost_piece_is_found(at in FIRST_TICK..SHORT.len() - 1, length in 1_usize..100) {
        let end = (at + length).min(SHORT.len() - 1);
        let output = format!("{}{}", &SHORT[..at], &SHORT[end..]);
        prop_assume!(output.as_bytes() != &SHORT.as_bytes()[..output.len()]);
        prop_assert!(verify(&output).is_err());
    }
}
