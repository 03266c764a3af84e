//! What a guest's kernel has to complain of.

/// What a kernel warns of and may: perdure's machines have no PCI; in QEMU's emulation on a busy machine an interrupt takes its time, and a clock is
/// not compared with another where that took too long, and a thread of real-time priority (of an interrupt, at the power button, where it was
/// seen) counts as running while its CPU stands for most of a second. The last four lines are one message, of a boot at which KVM did not call the TSC stable: seen
/// once, in the lab on a busy machine, where an outer kernel has its reasons.
const ALLOWED: [&str; 10] = [
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    "hrtimer: interrupt took",
    "clocksource: Long readout interval, skipping watchdog check",
    "read-back delay of",
    "sched: RT throttling activated",
    "Unstable clock detected, switching default tracing clock to \"global\"",
    "If you want to keep using the local clock, then add:",
    "  \"trace_clock=local\"",
    "on the kernel command line",
];

/// A log is what a guest says between `kernel log begins` and `kernel log ends: `: its `dmesg -r`, and how many lines that has in all.
const BEGINS: &str = "kernel log begins";
const ENDS: &str = "kernel log ends: ";

/// Checks that there is nothing of the level "warning" or worse (lockups, stalls, clocks that are off, errors of I/O and of file systems are) in
/// any whole log of what the guest said. How many of them there are.
///
/// # Errors
///
/// What a kernel complains of; a log that is none of a whole life.
pub fn check(said: &str) -> Result<usize, String> {
    let mut count = 0;
    for log in said.split(BEGINS).skip(1) {
        let Some((log, rest)) = log.split_once(ENDS) else { continue };
        // Its line may still be under way.
        let Some((lines, _)) = rest.split_once('\n') else { continue };
        let lines: u32 = lines.trim().parse().map_err(|error| format!("{lines:?} lines: {error}"))?;
        if lines <= 100 {
            return Err(format!("{lines} lines are no log of a whole life"));
        }
        let warnings = log.lines().filter(|line| line.starts_with('<'));
        let harm: Vec<_> = warnings.filter(|line| !ALLOWED.iter().any(|allowed| line.contains(allowed))).collect();
        if !harm.is_empty() {
            return Err(format!("the guest's kernel complains: {harm:#?}"));
        }
        count += 1;
    }
    Ok(count)
}

/// [`check`] finds a log, and nothing in it.
///
/// # Panics
///
/// When it does not.
pub fn assert_clean(said: &str) {
    assert_ne!(check(said), Ok(0), "no log: {said}");
    check(said).unwrap_or_else(|why| panic!("{why}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_complains_of_is_found_in_any_whole_log() {
        let log = |line: &str| format!("{BEGINS}\r\n{line}\r\n{ENDS}321\r\n");
        let clean = log("<4>[    0.1] PCI: System does not support PCI");
        let bad = log("<3>[   99.1] EXT4-fs error (device vda): ext4_lookup:1855");
        assert_eq!(check(&format!("row 1\n{clean}{clean}")), Ok(2));
        assert!(check(&format!("{clean}{bad}")).unwrap_err().contains("EXT4-fs error"));
        // One that is not whole says nothing yet.
        assert_eq!(check(bad.trim_end()), Ok(0));
        assert_eq!(check(bad.split_once("EXT4").unwrap().1), Ok(0));
        assert!(check(&log("").replace("321", "3")).is_err(), "dmesg is cleared");
    }
}
