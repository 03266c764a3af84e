//! Disks, and persistent memory, that a guest drives: `records` appends to one, and says what a flush has made durable. It must be there after an outage, and what is not must
//! be found out, by the guest and by the host.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guests::judge::Judge;
use guests::records::{Ring, acknowledged};
use serde_json::{Value, json};
use tests::perdure::{Perdure, Signal, signal};

use crate::simulated::{SOME, kernel_tells, run_scenario, scenario};
use crate::vm::{MEDIA, Vm};

/// So few slots that a lap of them takes a moment.
const RECORDS: [&str; 6] = ["--guest", "records", "--disk", "data:1M", "--cmdline", "hz=0"];

/// The file of the VM's disk, and where in it the disk begins.
#[track_caller]
fn disk(vm: &Vm) -> (std::fs::File, u64) {
    let regions = vm.perdure.run(&["pool", "list", "--json"]).expect_code(0).json();
    let regions = regions.as_array().expect("regions").clone();
    let disk = regions.into_iter().find(|region| region["name"] == "web/data").expect("its disk");
    let path = Path::new(disk["file"].as_str().expect("a path"));
    let file = OpenOptions::new().read(true).write(true).open(path).expect("it is there");
    let length = file.metadata().expect("its length").len();
    (file, length - disk["size"].as_u64().expect("a size"))
}

/// Where the slot of record `number` begins.
fn slot_of(output: &str, number: u64) -> u64 {
    (number - 1) % Ring::of(output).expect("its first lines").slots() * 4096
}

/// Flips a bit in the middle of the record.
#[track_caller]
fn flip(vm: &Vm, number: u64) {
    let (file, begin) = disk(vm);
    let (at, mut byte) = (begin + slot_of(&vm.output(), number) + 2000, [0]);
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("written");
}

/// What all lives of a VM have printed is what is due.
#[track_caller]
fn verify(lives: &[&str]) -> u64 {
    let mut judge = Judge::of(lives[0]).expect("a guest with a chain").expect("its first lines");
    lives.iter().for_each(|life| judge.follow(life).unwrap_or_else(|error| panic!("{error}\n{life}")));
    judge.preview("").expect("it was followed").reached
}

#[test]
fn records_go_on_after_an_outage_and_are_found_by_who_begins_anew() {
    let vm = Vm::new("web");
    vm.start(&[&RECORDS[..], &["--medium", "nvdimm"]].concat());
    // More than a lap: records take the place of others.
    vm.wait_until("a lap", |output| acknowledged(output) > Some(300));
    vm.freeze();
    vm.resume();
    vm.wait_for_more();
    signal(vm.pid(), Signal::KILL);
    vm.wait_for_state("unclean");
    let first = vm.output();
    let reached = verify(&[&first]);
    // Without a generation it boots anew, from the same disk.
    vm.start(&RECORDS);
    vm.wait_until("records of the second life", |output| output[first.len()..].lines().count() > 5);
    vm.freeze();
    let all = vm.output();
    // What was under way as it was killed is there, or is not.
    let second = &all[all.rfind("records ").expect("its second start")..];
    let found = guests::records::found(second).expect("what it found");
    assert!((reached..=reached + 2).contains(&found), "{found} of {reached}");
    assert!(verify(&[second]) > found);
}

#[test]
fn a_guest_finds_a_bit_that_was_flipped_on_its_disk_before_it_overwrites_it_and_as_it_begins() {
    for cold in [false, true] {
        let vm = Vm::new("web");
        vm.start(&RECORDS);
        vm.wait_until("a record", |output| acknowledged(output) > Some(20));
        if cold {
            signal(vm.pid(), Signal::KILL);
            vm.wait_for_state("unclean");
        } else {
            vm.freeze();
        }
        // Of the last ones a guest that begins anew cannot know that they were flushed.
        let number = acknowledged(&vm.output()).expect("records") - 5;
        flip(&vm, number);
        if cold {
            vm.start(&RECORDS);
        } else {
            vm.resume();
        }
        vm.wait_until("its complaint", |output| output.contains("chain broken") && output.ends_with('\n'));
        let output = vm.output();
        let due = format!("chain broken at record {number} its slot holds 0000000000000000\n");
        assert!(output.ends_with(&due), "{due}{output}");
        vm.wait_for_state("stopped");
    }
}

#[test]
fn who_begins_anew_takes_what_may_have_been_under_way_for_torn_and_nothing_else() {
    let vm = Vm::new("web");
    let run = |count: u64| {
        let cmdline = format!("hz=0 flush=8 count={count}");
        vm.start(&["--guest", "records", "--disk", "data:1M", "--cmdline", &cmdline]);
        vm.wait_for_state("stopped");
    };
    // A lap and more: the disk holds 49 to 304. All may be flushed but 297 to 304, or all and 305 to 312 be on their way to the slots of 49 to 56.
    run(304);
    flip(&vm, 49);
    flip(&vm, 56);
    flip(&vm, 304);
    let second = vm.output().len();
    run(400);
    assert!(vm.output().contains("slots 256 found 303 "), "{}", vm.output());
    assert!(verify(&[&vm.output()[second..]]) == 400, "{}", vm.output());
    // Now 152 is the last that another one, 408, can have taken the place of.
    flip(&vm, 153);
    run(500);
    let output = vm.output();
    assert!(output.ends_with("chain broken at record 153 its slot holds 0000000000000000\n"), "{output}");
}

#[test]
fn what_a_flush_made_durable_is_on_the_disk_after_any_outage() {
    if !kernel_tells() {
        return;
    }
    for medium in MEDIA {
        let vm = |more: Value| {
            let mut vm = json!({"guest": "records", "medium": medium, "memory": "8M"});
            vm.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({
                "vms": [vm],
                "outages": [
                    {"at": "60ms", "holdup": "none", "fresh": true},
                    {"at": "60ms", "holdup": "100ms", "cut": "never", "back": "2ms"},
                    {"at": "60ms", "holdup": "none", "again": ["resume.run"]},
                    {"at": "60ms", "cut": "unannounced"},
                ],
            })
        };
        let flushes = json!({"cmdline": "hz=0 flush=8", "snapshot_every": "30ms"});
        let report = scenario(&Perdure::new(), &vm(flushes), SOME);
        scenario(&Perdure::new(), &vm(json!({"cmdline": "hz=0 on=pmem", "snapshot_every": "0s"})), SOME);
        let from = |report: &Value, outage: usize| report["outages"][outage]["vms"][0]["went_on"]["from"].clone();
        assert_eq!(from(&report, 3), "generation", "{report:#}");
        // What its disk has is not lost even then.
        let report = scenario(&Perdure::new(), &vm(json!({"snapshot_every": "0s"})), SOME);
        assert_eq!(from(&report, 0), "context", "{report:#}");
        assert_eq!(from(&report, 3), "boot", "{report:#}");
        let last = &report["outages"][3]["vms"][0];
        assert_eq!(last["lost_links"], 0, "{last:#}");
        assert!(last["verdict"]["links"].as_u64() > Some(20), "{last:#}");
    }
}

#[test]
fn a_disk_that_lies_about_its_flushes_is_found_out() {
    if !kernel_tells() {
        return;
    }
    // From its return on, for all of its life.
    let report = run_scenario(
        &Perdure::new(),
        &json!({
            "vms": [{"guest": "records", "memory": "8M", "snapshot_every": "0s"}],
            "outages": [
                {"at": "50ms", "holdup": "none"},
                {"at": "200ms", "cut": "unannounced", "fault": "lies@resume.run"},
            ],
        }),
        SOME,
    )
    .expect_code(1)
    .json();
    let verdict = |outage: usize| report["outages"][outage]["vms"][0]["verdict"].clone();
    assert_eq!(verdict(0)["is"], "unbroken", "{report:#}");
    let why = verdict(1)["why"].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("was told to be durable, and its slot of the disk holds"), "{report:#}");
}
