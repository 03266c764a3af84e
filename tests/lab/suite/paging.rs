//! Guests with less RAM than memory, and the plug pulled on the machine below them.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

use crate::outages::{assert_frozen, find};

const SOON: Duration = Duration::from_secs(180);
/// For work that takes some tens of seconds on an idle machine.
const WORK: Duration = Duration::from_secs(300);
/// Of this life of L1 alone: [`Vm::printed`] has what came before.
const SERIAL: &str = "/tmp/serial";

/// What the pager counted. Its process counts from 0 when it begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paged {
    hard_faults: u64,
    pub(crate) swapped: u64,
    resident: u64,
}

/// A VM named `web` in L1.
struct Vm {
    l1: L1,
    options: Options,
    /// Its pool, a directory of L1 that outlives a cut.
    pool: &'static str,
    /// What its guest printed before L1's last cut.
    printed: String,
    /// Hard faults before its last freeze.
    faulted: u64,
}

impl Vm {
    fn run(options: Options, pool: &'static str, what: &str) -> Self {
        let mut vm = Self { l1: L1::boot(&options), options, pool, printed: String::new(), faulted: 0 };
        vm.perdure(&format!("run web --detach --serial {SERIAL} {what}"));
        vm
    }

    fn perdure(&mut self, arguments: &str) -> String {
        self.l1.check(&format!("PERDURE_POOL={} PERDURE_LOG=info perdure {arguments}", self.pool), SOON)
    }

    fn output(&mut self) -> String {
        format!("{}{}", self.printed, String::from_utf8_lossy(&self.l1.get(SERIAL)))
    }

    /// Waits until `done` is true of all that was printed.
    fn wait_for_output(&mut self, done: impl Fn(&str) -> bool) {
        let before = self.printed.clone();
        self.l1.wait_until(&format!("cat {SERIAL}"), WORK, |seen| done(&format!("{before}{}", seen.text())));
    }

    /// Waits until so many clusters were brought from swap since L1 booted.
    fn wait_for_hard_faults(&mut self, faults: u64) {
        let list = format!("PERDURE_POOL={} perdure list --json", self.pool);
        self.l1.wait_until(&list, WORK, |seen| paged(&seen.text()).is_some_and(|paged| paged.hard_faults >= faults));
    }

    fn paged(&mut self) -> Paged {
        let list = self.perdure("list --json");
        paged(&list).unwrap_or_else(|| panic!("nothing is paged: {list}"))
    }

    /// Freezes it; what was paged until then.
    fn freeze(&mut self) -> Paged {
        let paged = self.paged();
        assert!(paged.swapped > 0, "its memory is swapped: {paged:?}");
        self.faulted += paged.hard_faults;
        self.perdure("powerfail web");
        assert_frozen(&self.perdure("list --json"), "web");
        paged
    }

    fn resume(&mut self) {
        self.perdure("resume web --detach");
    }

    /// The power-fail signal, the plug, and the power's return.
    fn outage(mut self) -> Self {
        let paged = self.freeze();
        assert_ne!(self.l1.run("pidof perdure", SOON).status, 0, "a VMM is left after the freeze");
        let printed = self.output();
        let Self { l1, options, pool, faulted, .. } = self;
        let cut = l1.power_cut();
        eprintln!("{pool}: frozen with {paged:?}, {cut:?}");
        let mut vm = Self { l1: L1::boot(&options), options, pool, printed, faulted };
        vm.resume();
        vm
    }
}

/// What `list --json` says of `web`; `None` if it does not run, or has all of its memory in RAM.
pub(crate) fn paged(list: &str) -> Option<Paged> {
    let document: serde_json::Value = serde_json::from_str(list).ok()?;
    let paged = find(&document, "web")?.get("status")?.get("paged")?;
    let number = |key| paged.get(key)?.as_u64();
    Some(Paged { hard_faults: number("hard_faults")?, swapped: number("swapped")?, resident: number("resident")? })
}

/// Records of 8 KiB and a newline, 24 MiB in all. The guest comes to hold them three times: as written, in the memory of `sort`, and
/// sorted. That alone is more than [`RAM`], and its kernel and initial file system have touched some 80 MiB before.
const RECORDS: usize = 3 << 10;
const MEMORY: &str = "384M";
const RAM: &str = "96M";

/// The SHA-256 of what the guest's `perdure.sort` has to print, as `sha256sum` computes it here.
fn sum_of_sorted_records() -> String {
    let mut key = 1_u64;
    let mut keys: Vec<u64> = std::iter::repeat_with(|| {
        key = (key * 69069 + 1) % (1 << 32);
        key
    })
    .take(RECORDS)
    .collect();
    keys.sort_unstable();
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("running sha256sum: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut record = String::new();
    for key in keys {
        record.clear();
        write!(record, "{key:015} ").expect("a string takes everything");
        let record = record.repeat(512) + "\n";
        stdin.write_all(record.as_bytes()).expect("sha256sum reads it all");
    }
    drop(stdin);
    let output = child.wait_with_output().expect("sha256sum ends");
    let text = String::from_utf8(output.stdout).expect("hexadecimal digits");
    text.split(' ').next().expect("a sum").to_owned()
}

/// The sum that the guest printed, once its line is whole.
fn printed_sum(output: &str) -> Option<&str> {
    let sum = whole_lines(output).find_map(|line| line.strip_prefix("sort: sum "))?;
    sum.split(' ').next()
}

/// A last line without its newline is still being printed.
fn whole_lines(output: &str) -> std::str::Lines<'_> {
    output.rfind('\n').map_or("", |end| &output[..end]).lines()
}

fn stock_linux_sorts_through_outages() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::create(&directory.path().join("disk"), 2048, Cache::Volatile { seed: 5 });
    let files = guest::files(Path::new(env!("CARGO_BIN_EXE_chain")));
    let options = Options { disk: Some(disk), files, ..Options::default() };
    let what = format!(
        "--kernel {} --initrd {} --cmdline 'console=ttyS0 quiet perdure.sort={RECORDS}' --medium file --memory {MEMORY} \
         --ram {RAM}",
        guest::KERNEL,
        guest::INITRD
    );
    let mut vm = Vm::run(options, "/pool/pool", &what);

    vm.wait_for_output(|output| output.contains("records are written"));
    let mut vm = vm.outage();
    // For the records that it wrote first, and for what it reads them into.
    vm.wait_for_hard_faults(100);
    let paged = vm.freeze();
    assert!(!vm.output().contains("sort: sorted"), "it is in the middle of the work");
    eprintln!("frozen while sorting with {paged:?}");
    vm.resume();
    vm.wait_for_output(|output| output.contains("sort: sorted"));
    let mut vm = vm.outage();
    vm.wait_for_output(|output| printed_sum(output).is_some());
    let output = vm.output();
    assert_eq!(printed_sum(&output), Some(sum_of_sorted_records().as_str()), "{output}");
    assert!(vm.faulted > 0, "its memory was swapped");
}

#[test]
fn a_stock_linux_sorts_in_a_quarter_of_its_memory_through_outages() {
    in_emulation(stock_linux_sorts_through_outages);
}

/// A tick rewrites a line of the next page, so 8 MiB are in use after 2048 of them, and every page comes by again after as many.
const WALK: u64 = 2048;

fn ticks(output: &str) -> u64 {
    let tick = |line: &str| line.strip_prefix("tick ")?.split(' ').next()?.parse().ok();
    whole_lines(output).rev().find_map(tick).unwrap_or(0)
}

fn chain_survives_power_cuts_on_dax() {
    let directory = tempfile::tempdir().unwrap();
    let dax = directory.path().join("pmem");
    make_ext4(&dax, 256);
    let files = guest::files(Path::new(env!("CARGO_BIN_EXE_chain")));
    let options = Options { dax: Some(dax), files, ..Options::default() };
    let what = "--guest counter --cmdline 'hz=500 every=10 ram=8M' --medium dax --memory 16M --ram 2M";
    let mut vm = Vm::run(options, "/dax/pool", what);
    vm.wait_for_output(|output| ticks(output) >= WALK);
    for _cut in 0..2 {
        for _freeze in 0..2 {
            vm.wait_for_hard_faults(20);
            vm.freeze();
            vm.resume();
        }
        vm.wait_for_hard_faults(20);
        vm = vm.outage();
    }
    // Once over all memory: every byte that went through the last outage is looked at.
    let enough = ticks(&vm.printed) + WALK;
    vm.wait_for_output(|output| ticks(output) >= enough);
    let paged = vm.freeze();
    assert!(paged.swapped > paged.resident, "most of its memory is swapped out: {paged:?}");
    let output = vm.output();
    let report = guests::chain::verify(&output).unwrap_or_else(|error| panic!("{error}\n--- output\n{output}"));
    assert!(report.ticks >= enough, "{report:?}");
}

#[test]
fn a_chain_four_times_its_ram_survives_power_cuts_on_dax() {
    in_emulation(chain_survives_power_cuts_on_dax);
}
