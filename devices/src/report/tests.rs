use super::*;

#[test]
fn the_low_half_alone_shows_nothing_and_the_high_half_commits_both() {
    let mut report = Report::new();
    let handle = report.handle();
    report.write(0, &0x5566_7788u32.to_le_bytes());
    assert_eq!((handle.latest(), handle.count()), (0, 0));
    report.write(4, &0x1122_3344u32.to_le_bytes());
    assert_eq!((handle.latest(), handle.count()), (0x1122_3344_5566_7788, 1));
    let mut high = [0; 4];
    report.read(4, &mut high);
    assert_eq!(u32::from_le_bytes(high), 0x1122_3344);
}

#[test]
fn one_wide_write_and_eight_narrow_ones_commit_once_each() {
    let mut report = Report::new();
    report.write(0, &0x0102_0304_0506_0708u64.to_le_bytes());
    assert_eq!((report.latest(), report.handle().count()), (0x0102_0304_0506_0708, 1));
    for (offset, byte) in (0u64..).zip(0xa1a2_a3a4_a5a6_a7a8u64.to_le_bytes()) {
        report.write(offset, &[byte]);
    }
    assert_eq!((report.latest(), report.handle().count()), (0xa1a2_a3a4_a5a6_a7a8, 2));
}

#[test]
fn a_write_that_leaves_the_register_commits_what_lies_within() {
    let mut report = Report::new();
    report.write(7, &[0x80, 1, 2, 3]);
    assert_eq!(report.latest(), 0x80 << 56);
    report.write(8, &[1, 2, 3, 4]);
    report.write(u64::MAX, &[1; 8]);
    assert_eq!((report.latest(), report.handle().count()), (0x80 << 56, 1));
}

#[test]
fn a_half_written_value_and_the_handle_survive_a_restore() {
    let mut report = Report::new();
    report.write(0, &7u32.to_le_bytes());
    let state = report.save();
    let mut resumed = Report::new();
    let handle = resumed.handle();
    resumed.restore(&state).unwrap();
    resumed.write(4, &1u32.to_le_bytes());
    assert_eq!(handle.latest(), (1 << 32) + 7);
}
