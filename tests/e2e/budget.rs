//! VMs that keep within a hold-up: what is dirty is bounded, and a freeze writes it in one stream.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::{Value, json};
use tests::perdure::{LIMIT, Perdure};

use crate::pool_bytes::PoolBytes;
use crate::simulated::{SOME, kernel_tells, scenario};
use crate::vm::{COUNTER, MEDIA, Vm, eventually, record};

/// Long: whether a freeze is in time is a matter of what else the machine does. `perdure bench holdup` measures short ones.
const HOLD_UP: &str = "800ms";

/// A guest that writes to its pages as fast as it can, and compares what it finds with what it wrote last.
const WALK: [&str; 8] = [
    "--guest",
    "memwalk",
    "--memory",
    "48M",
    "--cmdline",
    "pattern=uniform ws=24M write=100 verify=1 report=64",
    "--holdup",
    HOLD_UP,
];

fn holdup(perdure: &Perdure) -> Value {
    record(perdure, "web")["status"]["holdup"].clone()
}

fn reports(perdure: &Perdure) -> u64 {
    record(perdure, "web")["status"]["report"].as_u64().unwrap_or(0)
}

#[test]
fn a_guest_that_writes_as_fast_as_it_can_is_frozen_in_time_each_time_and_finds_what_it_wrote() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        perdure.run(&[&["run", "web", "--detach", "--medium", medium], &WALK[..]].concat()).expect_code(0);
        for round in 0..6_u64 {
            eventually("touches", || reports(&perdure) > 64);
            std::thread::sleep(Duration::from_millis(13 * round));
            let limit = holdup(&perdure)["limit"].as_u64().unwrap_or_else(|| panic!("{}", record(&perdure, "web")));
            let told = perdure.run(&["powerfail", "web", "--holdup", HOLD_UP, "--json"]).expect_code(0).json();
            let bytes = told[0]["report"]["bytes"].as_u64().unwrap_or_else(|| panic!("{told}"));
            // What a freeze's own pace teaches changes the limit, but not by that much.
            assert!(bytes > 0 && bytes <= 2 * limit, "{medium}: {bytes} bytes were dirty, {limit} may be: {told}");
            perdure.run(&["resume", "web", "--detach"]).expect_code(0);
        }
        eventually("touches", || reports(&perdure) > 64);
        let status = holdup(&perdure);
        assert!(status["unbounded"].is_null() && status["unflushed"].as_u64() <= status["limit"].as_u64(), "{status}");
        assert_eq!(record(&perdure, "web")["state"], "running", "{medium}: a page was not as it was written last");
    }
}

#[test]
fn power_that_comes_back_finds_the_budget_in_force_and_counts_the_freezes_that_were_in_time() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        perdure.run(&[&["run", "web", "--detach", "--medium", medium], &WALK[..]].concat()).expect_code(0);
        for _ in 0..3 {
            let before = reports(&perdure);
            eventually("touches", || reports(&perdure) > before);
            let powerfail = perdure.spawn(&["powerfail", "web", "--holdup", "10s"]);
            eventually("frozen", || record(&perdure, "web")["state"] == "frozen");
            perdure.run(&["powerback", "web"]).expect_code(0);
            powerfail.wait(LIMIT).expect_code(0);
        }
        let before = reports(&perdure);
        eventually("touches", || reports(&perdure) > before);
        let status = holdup(&perdure);
        assert_eq!(status["met"].as_u64().unwrap() + status["missed"].as_u64().unwrap(), 3, "{medium}: {status}");
        let shown = perdure.run(&["inspect", "web"]).expect_code(0);
        assert!(shown.stdout.contains("may be dirty") && shown.stdout.contains("of 3 freezes"), "{}", shown.stdout);
        perdure.run(&["resume", "web"]).expect_code(1);
        perdure.run(&["powerfail", "web"]).expect_code(0);
        perdure.run(&["resume", "web", "--detach", "--holdup", "none"]).expect_code(0);
        assert!(holdup(&perdure).is_null(), "{}", record(&perdure, "web"));
        perdure.run(&["powerfail", "web"]).expect_code(0);
        perdure.run(&["resume", "web", "--detach", "--holdup", HOLD_UP]).expect_code(0);
        let before = reports(&perdure);
        eventually("touches", || reports(&perdure) > before);
        assert!(holdup(&perdure)["limit"].as_u64() > Some(0), "{}", record(&perdure, "web"));
    }
}

#[test]
fn a_hold_up_into_which_no_freeze_fits_is_refused_with_what_would_do() {
    let perdure = Perdure::new();
    let refused = perdure.run(&["run", "web", "--guest", "counter", "--holdup", "100us"]).expect_code(1);
    assert!(refused.stderr.contains("too short") && refused.stderr.contains("would do"), "{}", refused.stderr);
    assert!(record(&perdure, "web").is_null(), "a VM that never ran is left behind");
    for wrong in [&["--holdup", "1us"][..], &["--holdup", HOLD_UP, "--memory", "64M", "--ram", "16M"]] {
        perdure.run(&[&["run", "web", "--guest", "counter"], wrong].concat()).expect_code(2);
    }
}

/// A chain that was frozen with a journal.
fn frozen(medium: &str) -> Vm {
    let vm = Vm::new("web");
    vm.start(&[&COUNTER[..], &["--medium", medium, "--holdup", HOLD_UP]].concat());
    vm.wait_for_more();
    vm.freeze();
    vm
}

#[test]
fn what_a_freeze_left_in_the_journal_is_in_the_generation_that_is_kept_of_the_frozen_vm() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        perdure.run(&[&["run", "web", "--detach", "--medium", medium], &WALK[..]].concat()).expect_code(0);
        eventually("touches", || reports(&perdure) > 64);
        perdure.run(&["snapshot", "web"]).expect_code(0);
        let before = reports(&perdure);
        eventually("touches", || reports(&perdure) > before + 64);
        perdure.run(&["powerfail", "web"]).expect_code(0);
        let context = perdure.run(&["inspect", "web", "--json"]).expect_code(0).json()["context"].clone();
        assert!(context["standing"]["journal"]["pages"].as_u64() > Some(0), "{medium}: {}", context["standing"]);
        // What was is kept, and is gone back to: by now the journal is another one.
        perdure.run(&["resume", "web", "--generation", "1", "--detach"]).expect_code(0);
        eventually("touches", || reports(&perdure) > 64);
        perdure.run(&["powerfail", "web"]).expect_code(0);
        perdure.run(&["resume", "web", "--generation", "2", "--discard", "--detach"]).expect_code(0);
        let before = reports(&perdure);
        eventually("touches of each page", || reports(&perdure) > before + 12_000);
        assert_eq!(record(&perdure, "web")["state"], "running", "{medium}: a page was not as it was written last");
    }
}

#[test]
fn a_journal_that_is_damaged_or_missing_is_refused_and_nothing_altered() {
    for medium in MEDIA {
        let vm = frozen(medium);
        let regions = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json()["regions"].clone();
        let journal = regions.as_array().unwrap().iter().find(|region| region["kind"] == "journal").unwrap();
        let path = journal["file"].as_str().unwrap();
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let length = file.metadata().unwrap().len();
        let header = (0..length).step_by(4096).find(|at| {
            let mut magic = [0; 8];
            file.read_exact_at(&mut magic, *at).unwrap();
            &magic == b"PDJOURNL"
        });
        // The header, the list, a page.
        for at in [20, 4100, 3 * 4096 + 17].map(|at| header.unwrap() + at) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            let before = PoolBytes::of(vm.perdure.pool());
            let refused = vm.command("resume").expect_code(1);
            assert!(refused.stderr.contains("journal"), "{medium}, byte {at}: {}", refused.stderr);
            assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "a refusal alters nothing");
            file.write_all_at(&byte, at).unwrap();
        }
        vm.resume();
        vm.wait_for_more();
        vm.verify();
    }
}

#[test]
fn a_cut_at_each_step_of_the_journal_leaves_the_state_before_or_after() {
    if !kernel_tells() {
        return;
    }
    let points = [
        "freeze.persist",
        "freeze.persist+1",
        "freeze.persist+2",
        "freeze.journaled",
        "freeze.context",
        "freeze.stamp",
        "freeze.done",
        "resume.replay",
        "resume.replayed",
        "resume.clear",
        "resume.assembled",
        "resume.run",
    ];
    for medium in MEDIA {
        let outage = |point: &&str| json!({"at": "60ms", "holdup": "5s", "cut": point});
        let report = scenario(
            &Perdure::new(),
            &json!({
                "vms": [{"medium": medium, "memory": "8M", "snapshot_every": "20ms", "max_snapshots": 2, "cmdline": "hz=500 ram=256K", "holdup": HOLD_UP}],
                "outages": points.iter().map(outage).collect::<Vec<_>>(),
            }),
            SOME,
        );
        let outages = report["outages"].as_array().unwrap();
        let cut = |point: &str| {
            outages.iter().any(|outage| outage["vms"][0]["cut_off_at"].as_array().unwrap().contains(&json!(point)))
        };
        let missed: Vec<_> = points.iter().filter(|point| !cut(point)).collect();
        assert!(missed.is_empty(), "{medium}: nothing was cut at {missed:?}");
    }
}
