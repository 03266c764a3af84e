//! Runs the embedded guest `probe`, and says what its findings mean: which guests run here, and how.

use std::time::{Duration, Instant};

use guests::probe::{Outcome, ProbeReport, TESTS};
use serde::Serialize;

use super::throwaway::{End, Output, Throwaway, memory};
use crate::machine::time::nanoseconds;

/// A test of the probe takes half a second at the most; a slow host gets some more.
const PATIENCE: Duration = Duration::from_secs(5);

/// What one test found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct TestResult {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) works: bool,
    /// `works`, `exception`, `absent`, `wrong`, `timeout`, `unsupported`, `hangs`.
    pub(super) outcome: &'static str,
    /// In words: the vector, the instruction that KVM cannot run, ….
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) instructions_per_second: Option<u64>,
}

/// How kernel code (CPL0) is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Execution {
    /// By the processor.
    Native,
    /// By KVM's instruction emulator.
    Emulated,
    /// The probe did not get as far as to tell.
    Unknown,
}

/// Whether something runs here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    pub(super) name: &'static str,
    pub(super) runs: bool,
    /// What is missing: `what` of each test.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) lacks: Vec<&'static str>,
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Findings {
    pub(super) execution: Execution,
    pub(super) embedded_guests: Vec<Verdict>,
    pub(super) stock_linux: Verdict,
    pub(super) tests: Vec<TestResult>,
    /// How often it had to be started.
    pub(super) starts: usize,
    pub(super) nanoseconds: u64,
    /// Why it came to no end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

impl Findings {
    /// The speed of kernel code.
    pub(super) fn kernel_speed(&self) -> Option<u64> {
        self.tests.iter().find(|test| test.name == "cpl0")?.instructions_per_second
    }
}

/// What happened at each start, added up.
#[derive(Debug, Default)]
pub(super) struct Collected {
    report: ProbeReport,
    /// How the machine ended in a test.
    ends: Vec<(&'static str, End)>,
    starts: usize,
}

impl Collected {
    /// Adds a start: what it printed, and how the machine ended.
    fn add(&mut self, output: &str, end: End) -> Result<(), String> {
        self.starts += 1;
        let added = self.report.add(output).map_err(|error| format!("{error} ({end})"));
        let last = self.report.outcomes().last().filter(|(_, outcome)| *outcome == Outcome::Ended);
        if let Some((test, _)) = last
            && !self.ends.iter().any(|(name, _)| *name == test.name)
        {
            self.ends.push((test.name, end));
        }
        added
    }
}

/// Runs the probe as often as it takes. `tsc_khz` turns its cycles into time.
pub(super) fn run(tsc_khz: Option<u32>) -> Findings {
    let begun = Instant::now();
    let mut collected = Collected::default();
    let error = start_until_complete(&mut collected).err();
    let took = nanoseconds(begun.elapsed());
    findings(&collected, tsc_khz, error, took)
}

fn start_until_complete(collected: &mut Collected) -> Result<(), String> {
    // Each start must end at least one test, so this cannot take more.
    for _ in 0..=TESTS.len() {
        let Some(cmdline) = collected.report.next_cmdline() else { return Ok(()) };
        let output = Output::default();
        let end = start(&cmdline, &output).map_err(|error| super::super::one_line(&error))?;
        collected.add(&output.text(), end)?;
    }
    Ok(())
}

fn start(cmdline: &str, output: &Output) -> anyhow::Result<End> {
    let mut probe = Throwaway::assemble("probe", cmdline, memory()?, output)?;
    probe.machine.boot()?;
    probe.machine.run()?;
    // Dropping the machine stops a guest that hangs.
    Ok(probe.wait(PATIENCE, |_| false))
}

fn findings(collected: &Collected, tsc_khz: Option<u32>, error: Option<String>, nanoseconds: u64) -> Findings {
    let report = &collected.report;
    let execution = match report.native_kernel() {
        Some(true) => Execution::Native,
        Some(false) => Execution::Emulated,
        None => Execution::Unknown,
    };
    let end_of = |name| collected.ends.iter().find(|(known, _)| *known == name).map(|(_, end)| end);
    let tests = report.outcomes().map(|(test, outcome)| {
        let (word, detail) = describe(outcome, end_of(test.name));
        let instructions_per_second = tsc_khz.and_then(|khz| outcome.instructions_per_second(khz));
        let (name, what) = (test.name, test.what);
        TestResult { name, what, works: outcome.works(), outcome: word, detail, instructions_per_second }
    });
    Findings {
        execution,
        embedded_guests: guests::all().iter().map(|guest| verdict(report, guest.name, &needs(guest.name))).collect(),
        stock_linux: verdict(report, "stock Linux", &linux_needs()),
        tests: tests.collect(),
        starts: collected.starts,
        nanoseconds,
        error,
    }
}

fn describe(outcome: Outcome, end: Option<&End>) -> (&'static str, Option<String>) {
    match outcome {
        Outcome::Works | Outcome::Speed { .. } => ("works", None),
        Outcome::Exception(vector) => ("exception", Some(format!("raises exception {vector}"))),
        Outcome::Absent => ("absent", Some(outcome.to_string())),
        Outcome::Wrong => ("wrong", Some(outcome.to_string())),
        Outcome::Timeout => ("timeout", Some(outcome.to_string())),
        Outcome::Ended => {
            let word = if matches!(end, Some(End::Hangs(_))) { "hangs" } else { "unsupported" };
            (word, Some(end.map_or_else(|| outcome.to_string(), ToString::to_string)))
        }
    }
}

/// What an embedded guest uses of what the probe tests.
fn needs(guest: &str) -> Vec<&'static str> {
    match guest {
        "counter" => vec!["msr", "interrupt", "sse_move"],
        "echo" => vec!["interrupt"],
        "memwalk" | "pages" => vec!["string", "cpl3", "cpl3_fault"],
        "smp" | "records" => vec!["lapic", "interrupt", "string"],
        _ => Vec::new(),
    }
}

/// A stock Linux kernel and its programs use all that is tested, except the following. `hypercall`: only where the
/// paravirtual spinlock is on. `kvmclock`: there are other clocks. `cpl3_bitmap`, `cpl3_iopl`: only X servers of old.
/// `cpl3_int`: only 32-bit programs.
fn linux_needs() -> Vec<&'static str> {
    const SPARED: [&str; 5] = ["hypercall", "kvmclock", "cpl3_bitmap", "cpl3_iopl", "cpl3_int"];
    TESTS.iter().map(|test| test.name).filter(|name| !SPARED.contains(name)).collect()
}

/// Something runs if all that it needs works, or is not offered by CPUID (then it does without). A test that was not done
/// is no reason to promise anything.
fn verdict(report: &ProbeReport, name: &'static str, needs: &[&'static str]) -> Verdict {
    let serves = |name: &str| report.outcome(name).is_some_and(|outcome| outcome.works() || outcome == Outcome::Absent);
    let lacking = TESTS.iter().filter(|test| needs.contains(&test.name) && !serves(test.name));
    let lacks: Vec<_> = lacking.map(|test| test.what).collect();
    // A guest that needs nothing in particular still needs a machine that starts.
    Verdict { name, runs: lacks.is_empty() && report.outcomes().next().is_some(), lacks }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::kvm::VcpuFailure;
    use crate::machine::kvm::failure::Position;
    use devices::MachineRequest;

    fn emulation() -> End {
        End::Failed(VcpuFailure::Emulation { index: 0, at: Position::default(), bytes: vec![0xcd, 0x30] })
    }

    /// All tests pass but those that `broken` gives another result line, or none: there the machine ends.
    fn collect(broken: &[(&str, Option<&str>)], end: &End) -> Collected {
        let mut collected = Collected::default();
        while !collected.report.complete() {
            let mut text = "probe\n".to_owned();
            let mut ended = false;
            for test in TESTS.iter().filter(|test| collected.report.outcome(test.name).is_none()) {
                text += &format!("test {}\n", test.name);
                match broken.iter().find(|(name, _)| *name == test.name) {
                    None if test.name == "cpl0" => text += "ok cpl0 instructions=20000 cycles=40000000\n",
                    None if test.name == "cpl3_speed" => text += "ok cpl3_speed instructions=400000 cycles=200000\n",
                    None => text += &format!("ok {}\n", test.name),
                    Some((_, Some(result))) => text += &format!("no {} {result}\n", test.name),
                    Some((_, None)) => {
                        ended = true;
                        break;
                    }
                }
            }
            if !ended {
                text += "done 1\n";
            }
            let end = if ended { end.clone() } else { End::Request(MachineRequest::PowerOff) };
            collected.add(&text, end).unwrap();
        }
        collected
    }

    fn result<'a>(findings: &'a Findings, name: &str) -> &'a TestResult {
        findings.tests.iter().find(|test| test.name == name).unwrap()
    }

    #[test]
    fn what_ends_the_machine_is_unsupported_and_stock_linux_lacks_it() {
        let found = findings(&collect(&[("int", None), ("sse", None)], &emulation()), Some(2_000_000), None, 0);
        assert_eq!(found.starts, 3);
        assert_eq!(result(&found, "int").outcome, "unsupported");
        assert!(result(&found, "int").detail.as_ref().unwrap().contains("bytes cd 30"));
        assert!(!found.stock_linux.runs);
        assert_eq!(found.stock_linux.lacks, ["INT n in the kernel (long mode)", "SSE arithmetic in the kernel"]);
        assert!(found.embedded_guests.iter().all(|guest| guest.runs));
    }

    #[test]
    fn what_does_not_come_back_hangs() {
        let found = findings(&collect(&[("cpl3_int", None)], &End::Hangs(PATIENCE)), None, None, 0);
        assert_eq!(result(&found, "cpl3_int").outcome, "hangs");
        assert!(found.stock_linux.runs, "INT n in user code is for 32-bit programs alone");
    }

    #[test]
    fn what_cpuid_does_not_offer_is_not_missed() {
        let found = findings(&collect(&[("popcnt", Some("absent"))], &emulation()), None, None, 0);
        assert_eq!(result(&found, "popcnt").outcome, "absent");
        assert!(!result(&found, "popcnt").works);
        assert!(found.stock_linux.runs);
    }

    #[test]
    fn a_guest_lacks_what_it_uses_and_others_run() {
        let found = findings(&collect(&[("sse_move", Some("exception 6"))], &emulation()), None, None, 0);
        let runs = |name| found.embedded_guests.iter().find(|guest| guest.name == name).unwrap().runs;
        assert!(!runs("counter") && runs("echo") && runs("smp") && runs("boot"));
        assert_eq!(result(&found, "sse_move").detail.as_deref(), Some("raises exception 6"));
    }

    #[test]
    fn execution_is_judged_by_speed_and_speed_told_in_instructions_per_second() {
        let found = findings(&collect(&[], &emulation()), Some(2_000_000), None, 0);
        assert_eq!(found.execution, Execution::Emulated);
        assert_eq!(found.kernel_speed(), Some(1_000_000));
        assert_eq!(findings(&Collected::default(), None, None, 0).execution, Execution::Unknown);
    }

    #[test]
    fn a_machine_that_prints_nothing_runs_nothing_and_says_how_it_ended() {
        let mut collected = Collected::default();
        let error = collected.add("", emulation()).unwrap_err();
        assert!(error.contains("cannot emulate"), "{error}");
        let found = findings(&collected, None, Some(error), 0);
        assert!(!found.stock_linux.runs && found.embedded_guests.iter().all(|guest| !guest.runs));
    }

    #[test]
    fn every_need_is_a_test_of_the_probe() {
        for need in guests::all().iter().flat_map(|guest| needs(guest.name)) {
            assert!(TESTS.iter().any(|test| test.name == need), "{need}");
        }
        assert_eq!(linux_needs().len() + 5, TESTS.len(), "what Linux is spared is all in the probe");
    }
}
