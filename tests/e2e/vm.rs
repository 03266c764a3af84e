//! A VM on a pool of its own, whose serial line goes to a file: what most tests drive.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use guests::{chain, turns};
use serde_json::Value;
use tempfile::TempDir;
use tests::perdure::{Ended, Perdure};

/// The media that any machine has. `dax` needs persistent memory: the lab has it.
pub(crate) const MEDIA: [&str; 2] = ["file", "nvdimm"];

/// How long anything may take that takes milliseconds. Far more than that, for machines under load.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// A `counter` that ticks until it is stopped, over few bytes so that a tick is cheap where CPL0 is emulated.
pub(crate) const COUNTER: [&str; 4] = ["--guest", "counter", "--cmdline", "hz=500 ram=8K"];

/// Two processors that take turns until they are stopped.
pub(crate) const TURNS: [&str; 6] = ["--guest", "smp", "--cpus", "2", "--cmdline", "hz=200"];

/// One VM. Its pool goes with it.
pub(crate) struct Vm {
    pub(crate) perdure: Perdure,
    name: &'static str,
    output: TempDir,
}

impl Vm {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { perdure: Perdure::new(), name, output: tempfile::tempdir().expect("a temporary directory") }
    }

    /// The file that its serial line is appended to.
    pub(crate) fn serial(&self) -> PathBuf {
        self.output.path().join("serial")
    }

    /// `run NAME --detach` with 8 MiB and the serial line in the file; `what` is added.
    #[track_caller]
    pub(crate) fn start(&self, what: &[&str]) {
        let serial = self.serial();
        let serial = serial.to_str().expect("a path of plain text");
        let arguments = ["run", self.name, "--detach", "--memory", "8M", "--serial", serial];
        self.perdure.run(&[&arguments, what].concat()).expect_code(0);
    }

    /// A command whose only argument is the name.
    #[track_caller]
    pub(crate) fn command(&self, verb: &str) -> Ended {
        self.perdure.run(&[verb, self.name])
    }

    #[track_caller]
    pub(crate) fn freeze(&self) {
        self.command("powerfail").expect_code(0);
        assert_eq!(self.state(), "frozen");
    }

    #[track_caller]
    pub(crate) fn resume(&self) {
        self.perdure.run(&["resume", self.name, "--detach"]).expect_code(0);
    }

    /// What `list --json` says of it; null if it is not there.
    #[track_caller]
    pub(crate) fn record(&self) -> Value {
        record(&self.perdure, self.name)
    }

    #[track_caller]
    pub(crate) fn state(&self) -> String {
        self.record()["state"].as_str().unwrap_or("absent").to_owned()
    }

    /// Its process.
    #[track_caller]
    pub(crate) fn pid(&self) -> i32 {
        let record = self.record();
        let pid = record["pid"].as_i64().unwrap_or_else(|| panic!("no pid: {record}"));
        i32::try_from(pid).expect("process ids are below 2^22")
    }

    /// What the guest wrote to the file so far.
    pub(crate) fn output(&self) -> String {
        fs::read(self.serial()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until `done` is true of the output.
    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, done: impl Fn(&str) -> bool) {
        eventually(what, || done(&self.output()));
    }

    /// Waits for more output than there is now, by a first line at least.
    #[track_caller]
    pub(crate) fn wait_for_more(&self) {
        let before = self.output().len();
        self.wait_until("more output", |output| output.len() > before + 100);
    }

    /// The output so far is an unbroken chain (of `counter`, or of `smp`); how many links it has.
    #[track_caller]
    pub(crate) fn verify(&self) -> u64 {
        unbroken(&self.output())
    }

    /// Waits for `state`.
    #[track_caller]
    pub(crate) fn wait_for_state(&self, state: &str) {
        eventually(state, || self.state() == state);
    }
}

/// What `list --json` says of a VM; null if it is not there.
#[track_caller]
pub(crate) fn record(perdure: &Perdure, name: &str) -> Value {
    let list = perdure.run(&["list", "--json"]).expect_code(0).json();
    let vms = list.as_array().unwrap_or_else(|| panic!("not a list: {list}"));
    vms.iter().find(|vm| vm["name"] == name).cloned().unwrap_or_default()
}

/// The number of links of an unbroken chain of `counter` or `smp`.
#[track_caller]
pub(crate) fn unbroken(output: &str) -> u64 {
    let links = if output.starts_with("smp") {
        turns::verify(output).map(|report| report.turns)
    } else {
        chain::verify(output).map(|report| report.ticks)
    };
    links.unwrap_or_else(|error| panic!("{error}\n--- output\n{output}"))
}

/// Waits until `done` is true.
#[track_caller]
pub(crate) fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "no {what} within {SOON:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
