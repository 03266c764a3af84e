//! `run --ram`: a VM with less RAM than memory. Its guests are `counter`, whose chain of hashes no altered byte survives, and `memwalk`,
//! which compares every page that it touches with what it wrote there last.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::Value;
use tests::perdure::{Perdure, Signal};

use crate::random::Random;
use crate::vm::{MEDIA, Vm, eventually, record};

/// A chain over 8 MiB: four times the RAM of the VMs here.
const CHAIN: [&str; 4] = ["--guest", "counter", "--cmdline", "hz=2000 every=10 ram=8M"];
const SHAPE: [&str; 4] = ["--memory", "16M", "--ram", "2M"];

#[track_caller]
fn paged(perdure: &Perdure, name: &str) -> Value {
    record(perdure, name)["status"]["paged"].clone()
}

#[track_caller]
fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no number {key}: {value}"))
}

/// Starts `web` with [`SHAPE`] in place of the usual memory.
#[track_caller]
fn start(vm: &Vm, what: &[&str], more: &[&str]) {
    let serial = vm.serial();
    let serial = serial.to_str().expect("a path of plain text");
    vm.perdure.run(&[&["run", "web", "--detach", "--serial", serial], what, more].concat()).expect_code(0);
}

fn fifty_outages(medium: &str) {
    let mut random = Random::new();
    let vm = Vm::new("web");
    start(&vm, &CHAIN, &[&SHAPE[..], &["--medium", medium]].concat());
    // Once over all of its memory: 2048 lines, one a page.
    vm.wait_until("all of its memory in use", |output| output.contains("\ntick 2050 "));
    let mut brought = 0;
    let so_far = || {
        let status = paged(&vm.perdure, "web");
        number(&status, "hard_faults") + number(&status, "read_ahead")
    };
    for outage in 0..50 {
        random.pause(Duration::from_millis(40));
        if outage % 5 == 0 {
            eventually("clusters from swap", || so_far() >= 5);
        }
        brought += so_far();
        vm.command("powerfail").expect_code(0);
        vm.resume();
    }
    vm.wait_for_more();
    vm.freeze();
    assert!(vm.verify() > 2048);
    assert!(brought >= 50, "{medium}: its memory was swapped: {brought} clusters came back");
}

#[test]
fn a_chain_over_four_times_its_ram_is_unbroken_through_fifty_outages_on_file() {
    fifty_outages("file");
}

#[test]
fn a_chain_over_four_times_its_ram_is_unbroken_through_fifty_outages_on_nvdimm() {
    fifty_outages("nvdimm");
}

#[test]
fn after_an_outage_the_same_memory_is_in_ram() {
    let vm = Vm::new("web");
    let walk = ["--guest", "memwalk", "--cmdline", "pattern=zipf ws=8388608 write=30 verify=1 report=1000"];
    start(&vm, &walk, &SHAPE);
    eventually("a steady state", || number(&paged(&vm.perdure, "web"), "hard_faults") > 500);
    let before = paged(&vm.perdure, "web");
    vm.freeze();
    vm.resume();
    let after = paged(&vm.perdure, "web");
    assert!(number(&after, "resident") + 40 >= number(&before, "resident"), "{before} {after}");
    assert!(before["residence"].as_f64() < Some(40.0), "{before}");
    assert!(number(&after, "zero_faults") < 50, "next to nothing is new: {after}");
    assert!(!vm.output().contains("damaged"), "{}", vm.output());
}

#[test]
fn generations_hold_memory_that_is_swapped_out() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        start(&vm, &CHAIN, &[&SHAPE[..], &["--medium", medium]].concat());
        vm.wait_until("all of its memory in use", |output| output.contains("\ntick 2050 "));
        vm.perdure.run(&["snapshot", "web"]).expect_code(0);
        vm.wait_for_more();
        vm.perdure.run(&["snapshot", "web"]).expect_code(0);
        vm.wait_for_more();
        tests::perdure::signal(vm.pid(), Signal::KILL);
        vm.wait_for_state("unclean");
        let at = vm.output().len();
        // What came after the generation is said again: the last ticks before it may be, too.
        vm.resume();
        eventually("more output", || vm.output().len() > at + 200);
        vm.freeze();
        let all = vm.output();
        let (before, after) = (&all[..at], &all[at..]);
        let again = after.lines().nth(1).expect("a whole line");
        let joint = before.find(again).unwrap_or_else(|| panic!("{again:?} was never said before: {before}"));
        crate::vm::unbroken(&format!("{}{}", &before[..joint], &after[after.find(again).unwrap_or(0)..]));

        vm.perdure.run(&["resume", "web", "--generation", "1", "--detach"]).expect_code(0);
        vm.perdure.run(&["fork", "web@1", "kid", "--serial", "none"]).expect_code(0);
        vm.perdure.run(&["resume", "kid", "--detach"]).expect_code(0);
        for name in ["web", "kid"] {
            eventually("faults", || number(&paged(&vm.perdure, name), "hard_faults") > 20);
        }
    }
}

#[test]
fn a_full_swap_region_makes_the_guest_wait_and_a_larger_one_lets_it_go_on() {
    let vm = Vm::new("web");
    let small = ["--memory", "16M", "--ram", "2M", "--swap", "3M"];
    start(&vm, &CHAIN, &small);
    eventually("a full swap region", || paged(&vm.perdure, "web")["swap_full"] == true);
    // What it had begun ends; then its guest waits.
    eventually("standstill", || {
        let before = vm.output().len();
        std::thread::sleep(Duration::from_millis(300));
        vm.output().len() == before
    });
    let stood = vm.output().len();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(vm.output().len(), stood, "its guest waits");
    vm.freeze();
    vm.perdure.run(&["resume", "web", "--swap", "1M", "--detach"]).expect_code(1);
    vm.perdure.run(&["resume", "web", "--swap", "16M", "--detach"]).expect_code(0);
    vm.wait_until("all of its memory in use", |output| output.contains("\ntick 2050 "));
    let status = paged(&vm.perdure, "web");
    assert_eq!((status["swap_full"].as_bool(), number(&status, "slots")), (Some(false), 1024));
    vm.freeze();
    vm.resume();
    vm.wait_for_more();
    vm.freeze();
    assert!(vm.verify() > 2048);
    let log = fs::read_to_string(vm.perdure.pool().join("run/web.log")).expect("a log");
    assert!(log.contains("RAM and swap are full"), "{log}");
}

#[test]
fn a_damaged_slot_stops_the_vm_and_is_named() {
    let vm = Vm::new("web");
    start(&vm, &CHAIN, &SHAPE);
    vm.wait_until("all of its memory in use", |output| output.contains("\ntick 2050 "));
    vm.freeze();
    let files = fs::read_dir(vm.perdure.pool().join("media/file")).expect("the pool's files");
    let files = files.map(|file| file.expect("a file").path());
    let length = |path: &std::path::PathBuf| fs::metadata(path).expect("a file").len();
    // Of RAM, context and swap that is by far the largest.
    let swap = files.max_by_key(length).expect("a swap region");
    let file = fs::File::options().read(true).write(true).open(&swap).expect("the region's file");
    let length = length(&swap);
    // A byte in the middle of every slot: those of clusters that are in RAM, too, do not matter.
    for at in (1 << 20..length).step_by(8 << 10) {
        file.write_all_at(&[0x5a], at).expect("room for a byte");
    }
    vm.resume();
    eventually("the end", || vm.state() != "running");
    let log = fs::read_to_string(vm.perdure.pool().join("run/web.log")).expect("a log");
    assert!(log.contains("cannot be had from slot"), "{log}");
    assert!(!vm.output().contains("broken"), "the guest saw nothing that was not its own");
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_made() {
    let perdure = Perdure::new();
    for (wrong, says) in [
        (&["--ram", "256K"][..], "from 512K of RAM"),
        (&["--ram", "1G"], "from 512K of RAM"),
        (&["--swap", "1G"], "--swap 1G"),
        (&["--ram", "4M", "--swap", "5000"], "--swap 5000"),
    ] {
        let ended = perdure.run(&[&["run", "web", "--memory", "64M"], wrong].concat());
        assert!(ended.code == Some(1) || ended.code == Some(2), "{ended:?}");
        assert!(ended.stderr.contains(says), "{}", ended.stderr);
        assert!(!perdure.pool().exists(), "nothing is made");
    }
}

/// Bytes that it has in RAM.
#[track_caller]
fn ram_of(perdure: &Perdure, name: &str) -> u64 {
    let status = paged(perdure, name);
    number(&status, "resident") * number(&status, "cluster")
}

/// Starts a walk over 24 MiB that has all of them in RAM if it can.
#[track_caller]
fn start_walk(perdure: &Perdure, name: &str, more: &[&str]) -> tests::perdure::Ended {
    let walk = "pattern=uniform ws=25165824 write=30 verify=1 report=1000";
    let shape = ["--memory", "40M", "--ram", "32M", "--serial", "none", "--detach"];
    perdure.run(&[&["run", name, "--guest", "memwalk", "--cmdline", walk], &shape[..], more].concat())
}

/// One look of `top`.
#[track_caller]
fn top(perdure: &Perdure, name: &str) -> Value {
    let rows = perdure.run(&["top", "--once", "--json"]).expect_code(0).json();
    let rows = rows.as_array().expect("rows").clone();
    rows.iter().find(|row| row["name"] == name).cloned().unwrap_or_else(|| panic!("no {name}: {rows:?}"))
}

#[test]
fn two_vms_share_what_ram_there_is_with_a_floor_each_and_nothing_is_lost() {
    let perdure = Perdure::new();
    start_walk(&perdure, "one", &["--ram-min", "8M"]).expect_code(0);
    eventually("all of it in RAM", || ram_of(&perdure, "one") > 24 << 20);
    perdure.run(&["pool", "limit", "--ram", "40M"]).expect_code(0);
    start_walk(&perdure, "two", &["--ram-min", "8M"]).expect_code(0);
    let refused = start_walk(&perdure, "three", &["--ram-min", "30M"]).expect_code(1);
    assert!(refused.stderr.contains("--ram-min"), "{}", refused.stderr);
    let ram = |name: &str| top(&perdure, name)["ram"].as_u64().unwrap_or_default();
    eventually("both within the limit", || {
        let (one, two) = (ram("one"), ram("two"));
        one + two <= 40 << 20 && one >= 8 << 20 && two >= 8 << 20 && one + two > 30 << 20
    });
    let row = top(&perdure, "two");
    assert!(row["hard_faults_per_second"].as_f64() > Some(0.0) && row["mrr"].as_f64() < Some(100.0), "{row}");
    perdure.run(&["pool", "limit", "--ram", "10M"]).expect_code(1);
    perdure.run(&["stop", "one"]).expect_code(0);
    eventually("the other one takes what is free", || ram("two") > 24 << 20);
    perdure.run(&["powerfail", "two"]).expect_code(0);
    perdure.run(&["resume", "two", "--detach"]).expect_code(0);
    eventually("more touches", || record(&perdure, "two")["status"]["report"].as_u64() > Some(2000));
    let table = perdure.run(&["top", "--once"]).expect_code(0).stdout;
    assert!(table.contains("MRR") && table.contains("two") && table.contains("running"), "{table}");
}
