//! What a guest's kernel has to complain of.

/// What a kernel warns of and may: perdure's machines have no PCI; in QEMU's emulation on a busy machine an interrupt takes its time, and a clock is
/// not compared with another where that took too long. The last four lines are one message, of a boot at which KVM did not call the TSC stable: seen
/// once, in the lab on a busy machine, where an outer kernel has its reasons.
const ALLOWED: [&str; 9] = [
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    "hrtimer: interrupt took",
    "clocksource: Long readout interval, skipping watchdog check",
    "read-back delay of",
    "Unstable clock detected, switching default tracing clock to \"global\"",
    "If you want to keep using the local clock, then add:",
    "  \"trace_clock=local\"",
    "on the kernel command line",
];

/// Checks that there is nothing of the level "warning" or worse (lockups, stalls, clocks that are off, errors of I/O and of file systems are) in
/// what the guest says between `kernel log begins` and `kernel log ends`: its `dmesg -r`, and how many lines that has in all.
pub(crate) fn assert_clean(said: &str) {
    let log = said.split("kernel log begins").nth(1).and_then(|log| log.split_once("kernel log ends: "));
    let (log, rest) = log.unwrap_or_else(|| panic!("no log: {said}"));
    let all: u32 =
        rest.split_whitespace().next().and_then(|count| count.parse().ok()).expect("how many lines there are");
    assert!(all > 100, "{all} lines are no log of a whole life");
    let warnings = log.lines().filter(|line| line.starts_with('<'));
    let harm: Vec<_> = warnings.filter(|line| !ALLOWED.iter().any(|allowed| line.contains(allowed))).collect();
    assert!(harm.is_empty(), "the guest's kernel complains: {harm:#?}");
}
