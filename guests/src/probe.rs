//! What `probe` prints, and its reader: what can this KVM run?
//!
//! # Output
//! ```text
//! probe
//! test <name>                                         before each test of [`TESTS`]
//! ok <name>[ instructions=<n> cycles=<n>]             it works; cycles of the TSC
//! no <name> exception <vector>|absent|wrong|timeout   it does not; the guest goes on
//! done <n>                                            after the last test: how many work; then it powers off
//! ```
//! A test that KVM cannot run at all ends the machine (`KVM_EXIT_INTERNAL_ERROR`, suberror 1: emulation failed) between its
//! `test` line and its result. Then the machine is started anew with the command line that
//! [`ProbeReport::next_cmdline`] gives, until a report is complete; tests that do this come last, to keep these few.

use std::fmt;

/// What a test tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeTest {
    /// Its name in the output.
    pub name: &'static str,
    /// What works if it does.
    pub what: &'static str,
}

const fn test(name: &'static str, what: &'static str) -> ProbeTest {
    ProbeTest { name, what }
}

/// All tests, in the order in which the guest does them.
pub const TESTS: &[ProbeTest] = &[
    test("cpuid", "CPUID"),
    test("tsc", "RDTSC"),
    test("msr", "RDMSR and WRMSR"),
    test("cpl0", "speed of kernel code (CPL0)"),
    test("lapic", "the local APIC through memory"),
    test("interrupt", "timer interrupts wake a halted kernel"),
    test("string", "REP MOVSB"),
    test("pause", "PAUSE"),
    test("popcnt", "POPCNT in the kernel"),
    test("cmpxchg16b", "LOCK CMPXCHG16B in the kernel"),
    test("kvmclock", "the paravirtual clock"),
    test("cpl3", "user code (CPL3), and exceptions from it"),
    test("cpl3_fault", "page faults of user code"),
    test("cpl3_speed", "speed of user code"),
    test("cpl3_interrupt", "timer interrupts of user code"),
    test("cpl3_sse", "SSE in user code"),
    test("cpl3_bitmap", "ports opened to user code by the TSS"),
    test("sse_move", "SSE moves in the kernel"),
    test("xsetbv", "XSETBV"),
    test("int", "INT n in the kernel (long mode)"),
    test("xgetbv", "XGETBV in the kernel"),
    test("sse", "SSE arithmetic in the kernel"),
    test("x87", "x87 in the kernel"),
    test("fxsave", "FXSAVE and FXRSTOR in the kernel"),
    test("hypercall", "VMCALL"),
    test("syscall", "SYSCALL"),
    test("syscall_port", "port input in a SYSCALL handler"),
    test("cpl3_xgetbv", "XGETBV in user code"),
    test("cpl3_iopl", "ports opened to user code by IOPL"),
    test("cpl3_int", "INT n in user code"),
];

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Works,
    /// It works, at this speed.
    Speed {
        /// Instructions done.
        instructions: u64,
        /// Cycles of the TSC that they took.
        cycles: u64,
    },
    /// It raised this exception.
    Exception(u8),
    /// CPUID does not offer it.
    Absent,
    /// It was done, with a wrong result.
    Wrong,
    /// User code did not come back within half a second.
    Timeout,
    /// The machine ended in it.
    Ended,
}

impl Outcome {
    /// Whether it works.
    #[must_use]
    pub const fn works(self) -> bool {
        matches!(self, Self::Works | Self::Speed { .. })
    }

    /// Instructions a second where the TSC runs at `tsc_khz`; `None` where no speed was measured.
    #[must_use]
    pub fn instructions_per_second(self, tsc_khz: u32) -> Option<u64> {
        let Self::Speed { instructions, cycles } = self else {
            return None;
        };
        let rate = u128::from(instructions) * u128::from(tsc_khz) * 1000 / u128::from(cycles.max(1));
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("works"),
            Self::Speed { instructions, cycles } => write!(f, "works: {instructions} instructions in {cycles} cycles"),
            Self::Exception(vector) => write!(f, "raises exception {vector}"),
            Self::Absent => f.write_str("not offered by CPUID"),
            Self::Wrong => f.write_str("gives a wrong result"),
            Self::Timeout => f.write_str("does not come back"),
            Self::Ended => f.write_str("KVM cannot run it"),
        }
    }
}

/// What is known after one start of the probe, or several.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProbeReport {
    outcomes: Vec<(&'static str, Outcome)>,
    complete: bool,
}

impl ProbeReport {
    /// The outcome of the test `name`; `None` if it was not done.
    #[must_use]
    pub fn outcome(&self, name: &str) -> Option<Outcome> {
        self.outcomes.iter().find(|(known, _)| *known == name).map(|(_, outcome)| *outcome)
    }

    /// Tests and outcomes, in the order in which they were done.
    pub fn outcomes(&self) -> impl Iterator<Item = (&'static ProbeTest, Outcome)> {
        let known = |name: &str| TESTS.iter().find(|test| test.name == name);
        self.outcomes.iter().filter_map(move |(name, outcome)| known(name).map(|test| (test, *outcome)))
    }

    /// Whether the last start came to its end, so that nothing is left to do.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// Adds what a further start printed. A test that was announced and has no result counts as [`Outcome::Ended`]: call
    /// this after the machine ended, or was stopped because it no longer moved.
    ///
    /// # Errors
    /// A line that the probe does not print, or a start that did not get as far as a new test.
    pub fn add(&mut self, output: &str) -> Result<(), ProbeError> {
        let mut lines = output.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        if lines.next() != Some("probe") {
            return Err(ProbeError::NotProbe);
        }
        let before = self.outcomes.len();
        let mut announced = None;
        for line in lines {
            let unknown = || ProbeError::Line { line: line.chars().take(80).collect() };
            match line.split_once(' ').ok_or_else(unknown)? {
                ("test", name) if announced.is_none() => announced = Some(known_name(name).ok_or_else(unknown)?),
                ("done", _) if announced.is_none() => self.complete = true,
                ("exception", _) => break, // the probe itself ended, in the test announced last
                (kind, rest) => {
                    let (name, detail) = rest.split_once(' ').unwrap_or((rest, ""));
                    let name = announced.take().filter(|announced| *announced == name).ok_or_else(unknown)?;
                    self.record(name, outcome(kind, detail).ok_or_else(unknown)?);
                }
            }
        }
        if let Some(name) = announced {
            self.record(name, Outcome::Ended);
        }
        if self.outcomes.len() == before && !self.complete {
            return Err(ProbeError::NoProgress);
        }
        Ok(())
    }

    fn record(&mut self, name: &'static str, outcome: Outcome) {
        if self.outcome(name).is_none() {
            self.outcomes.push((name, outcome));
        }
    }

    /// The command line of the next start, which leaves out what is known; `None` when the report is complete.
    #[must_use]
    pub fn next_cmdline(&self) -> Option<String> {
        if self.complete {
            return None;
        }
        let names: Vec<&str> = self.outcomes.iter().map(|(name, _)| *name).collect();
        Some(if names.is_empty() { String::new() } else { format!("skip={}", names.join(",")) })
    }

    /// Whether kernel code runs on the processor itself, judged by its speed against that of user code: an emulator is
    /// slower by two orders of magnitude and more. `None` where either was not measured.
    #[must_use]
    pub fn native_kernel(&self) -> Option<bool> {
        const TSC_KHZ: u32 = 1_000_000; // any one will do for a ratio
        let kernel = self.outcome("cpl0")?.instructions_per_second(TSC_KHZ)?;
        let user = self.outcome("cpl3_speed")?.instructions_per_second(TSC_KHZ)?;
        Some(kernel.saturating_mul(20) > user)
    }
}

/// What is wrong with the output of the probe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// It does not begin as the probe does.
    #[error("reading the probe: its first line is missing; the KVM did not even start it, or a port is not wired")]
    NotProbe,
    /// A line that the probe does not print.
    #[error("reading the probe: {line:?} is no line of it; give its serial output and nothing else")]
    Line {
        /// The line.
        line: String,
    },
    /// A start brought nothing new.
    #[error("reading the probe: it ended before its next test; start it with the command line of the report")]
    NoProgress,
}

/// Reads the output of one start; see [`ProbeReport::add`].
///
/// # Errors
/// As [`ProbeReport::add`].
pub fn parse(output: &str) -> Result<ProbeReport, ProbeError> {
    let mut report = ProbeReport::default();
    report.add(output)?;
    Ok(report)
}

fn known_name(name: &str) -> Option<&'static str> {
    TESTS.iter().map(|test| test.name).find(|known| *known == name)
}

fn outcome(kind: &str, detail: &str) -> Option<Outcome> {
    match (kind, detail) {
        ("ok", "") => Some(Outcome::Works),
        ("ok", detail) => {
            let (instructions, cycles) = detail.strip_prefix("instructions=")?.split_once(" cycles=")?;
            Some(Outcome::Speed { instructions: instructions.parse().ok()?, cycles: cycles.parse().ok()? })
        }
        ("no", "absent") => Some(Outcome::Absent),
        ("no", "wrong") => Some(Outcome::Wrong),
        ("no", "timeout") => Some(Outcome::Timeout),
        ("no", detail) => Some(Outcome::Exception(detail.strip_prefix("exception ")?.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Captured on a KVM that emulates CPL0: six starts, five of which ended in a test.
    const EMULATED: &str = include_str!("../tests/golden/probe-emulated.txt");

    /// Captured on QEMU's TCG, where CPL0 and CPL3 run alike.
    const NATIVE: &str = include_str!("../tests/golden/probe-native.txt");

    fn starts() -> Vec<String> {
        EMULATED.split("probe\n").skip(1).map(|rest| format!("probe\n{rest}")).collect()
    }

    #[test]
    fn starts_add_up_to_a_complete_report() {
        let mut report = ProbeReport::default();
        assert_eq!(report.next_cmdline(), Some(String::new()));
        for start in starts() {
            assert!(!report.complete());
            report.add(&start).unwrap();
        }
        assert!(report.complete() && report.next_cmdline().is_none());
        assert_eq!(report.outcomes().count(), TESTS.len(), "every test was done");
        for name in ["popcnt", "cmpxchg16b", "int", "xgetbv", "sse"] {
            assert_eq!(report.outcome(name), Some(Outcome::Ended), "{name}");
        }
        assert_eq!(report.outcome("cpl3_int"), Some(Outcome::Exception(6)));
        assert_eq!(report.outcome("cpl3"), Some(Outcome::Works));
        assert_eq!(report.native_kernel(), Some(false));
    }

    #[test]
    fn a_machine_that_runs_everything_needs_one_start() {
        let report = parse(NATIVE).unwrap();
        assert!(report.complete());
        assert_eq!(report.native_kernel(), Some(true));
        let failing: Vec<_> = report.outcomes().filter(|(_, outcome)| !outcome.works()).collect();
        assert!(
            failing.iter().all(|(test, outcome)| test.name == "kvmclock" && *outcome == Outcome::Absent),
            "{failing:?}"
        );
    }

    #[test]
    fn a_start_that_ended_is_followed_by_one_that_skips_it() {
        let report = parse("probe\ntest cpuid\nok cpuid\ntest tsc\n").unwrap();
        assert_eq!(report.outcome("tsc"), Some(Outcome::Ended));
        assert_eq!(report.next_cmdline().as_deref(), Some("skip=cpuid,tsc"));
    }

    #[test]
    fn speed_is_given_by_the_tsc() {
        let report = parse("probe\ntest cpl0\nok cpl0 instructions=20000 cycles=20000000\n").unwrap();
        assert_eq!(report.outcome("cpl0").unwrap().instructions_per_second(2_000_000), Some(2_000_000));
        let zero = Outcome::Speed { instructions: u64::MAX, cycles: 0 };
        assert_eq!(zero.instructions_per_second(u32::MAX), Some(u64::MAX));
    }

    #[test]
    fn other_output_is_refused() {
        assert_eq!(parse(""), Err(ProbeError::NotProbe));
        assert_eq!(parse("probe\n"), Err(ProbeError::NoProgress));
        for line in [
            "ok cpuid",
            "test nothing",
            "hello world",
            "test cpuid\nok tsc",
            "test cpl0\nok cpl0 instructions=x cycles=1",
        ] {
            assert!(matches!(parse(&format!("probe\n{line}\n")), Err(ProbeError::Line { .. })), "{line}");
        }
    }

    #[test]
    fn the_image_knows_the_same_tests() {
        let image = crate::by_name("probe").unwrap().image;
        for test in TESTS {
            let text: Vec<u8> = test.name.bytes().chain([0]).collect();
            assert!(image.windows(text.len()).any(|window| window == text), "{}", test.name);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "(probe\n)?((test|ok|no|done|exception) [a-z0-9= ]{0,12}\n){0,6}") {
            let _ = parse(&text);
        }
    }
}
