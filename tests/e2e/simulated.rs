//! The outage simulator: what it tells, what it leaves alone, and that it bites.

use std::time::Duration;

use serde_json::{Value, json};
use tests::perdure::{Ended, Perdure, Signal};

use crate::pool_bytes::PoolBytes;
use crate::vm::{COUNTER, MEDIA, SOON, Vm};

/// How long a few dozen outages may take, which take seconds. Far more than that, for machines under load.
pub(crate) const SOME: Duration = Duration::from_secs(120);

/// Whether this kernel tells what of a file is on its medium (cachestat, Linux 6.5). The lab's does not; there the power is cut for real.
pub(crate) fn kernel_tells() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    if version < (6, 5) {
        println!("not run: Linux {} does not tell what is durable", release.trim());
    }
    version >= (6, 5)
}

#[track_caller]
fn simulate(perdure: &Perdure, arguments: &[&str]) -> Ended {
    perdure.run(&[&["outage", "run", "--json"], arguments].concat())
}

/// The report of outages without a violation.
#[track_caller]
fn without_violation(ended: Ended) -> Value {
    let report = ended.expect_code(0).json();
    assert_eq!(report["summary"]["violations"], 0, "{report:#}");
    report
}

#[track_caller]
pub(crate) fn run_scenario(perdure: &Perdure, scenario: &Value, limit: Duration) -> Ended {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("scenario.json");
    std::fs::write(&path, scenario.to_string()).unwrap();
    perdure.spawn(&["outage", "run", "--json", "--scenario", path.to_str().unwrap()]).wait(limit)
}

#[track_caller]
pub(crate) fn scenario(perdure: &Perdure, scenario: &Value, limit: Duration) -> Value {
    without_violation(run_scenario(perdure, scenario, limit))
}

/// What a seed draws of an outage: its number, its own seed, its time.
fn drawn_of(outage: &Value) -> [u64; 3] {
    ["number", "seed", "at_ns"].map(|field| outage[field].as_u64().unwrap())
}

#[test]
fn an_outage_is_reported_from_its_signal_to_the_verdict_and_a_seed_draws_the_same_again() {
    if !kernel_tells() {
        return;
    }
    let perdure = Perdure::new();
    let page = perdure.pool().join("page.html");
    for medium in MEDIA {
        let arguments = [
            "--medium",
            medium,
            "--at",
            "20ms..500ms",
            "--holdup",
            "2s",
            "--cut",
            "random",
            "--seed",
            "4",
            "--repeat",
            "2",
            "--jobs",
            "2",
        ];
        let with_page = [&arguments[..], &["--report", page.to_str().unwrap()]].concat();
        let report = without_violation(simulate(&perdure, &with_page));
        let outages = report["outages"].as_array().unwrap();
        assert_eq!((outages.len(), &report["seed"]), (2, &json!(4)));
        for outage in outages {
            let vm = &outage["vms"][0];
            assert_eq!((&vm["medium"], &vm["verdict"]["is"]), (&json!(medium), &json!("unbroken")), "{outage:#}");
            assert!(vm["resume_ns"].as_u64() > Some(0), "{outage:#}");
        }
        let html = std::fs::read_to_string(&page).unwrap();
        assert!(
            html.contains("2 simulated power outages") && html.contains("unbroken") && html.contains("<svg"),
            "{html}"
        );
        let drawn = |report: &Value| {
            // Two machines, each as quick as it is.
            let mut drawn: Vec<_> = report["outages"].as_array().unwrap().iter().map(drawn_of).collect();
            drawn.sort_unstable();
            drawn
        };
        assert_eq!(drawn(&without_violation(simulate(&perdure, &arguments))), drawn(&report));
    }
}

#[test]
fn a_freeze_that_fits_loses_nothing_and_says_by_how_much() {
    if !kernel_tells() {
        return;
    }
    for medium in MEDIA {
        let arguments = ["--medium", medium, "--at", "50ms", "--holdup", "3s"];
        let report = without_violation(simulate(&Perdure::new(), &arguments));
        let vm = &report["outages"][0]["vms"][0];
        assert_eq!((&vm["in_time"], &vm["went_on"]["from"]), (&json!(true), &json!("context")), "{vm:#}");
        assert_eq!((&vm["lost_ns"], &vm["lost_links"]), (&json!(0), &json!(0)), "{vm:#}");
        let freeze = &vm["freeze"];
        let (left, total) = (freeze["holdup_left_ns"].as_u64().unwrap(), freeze["total_ns"].as_u64().unwrap());
        assert!(total > 0 && left < 3_000_000_000 && left + total > 2_500_000_000, "{freeze:#}");
        let dark = report["outages"][0]["dark_ns"].as_u64().unwrap();
        assert!(dark >= 3_000_000_000, "{dark}: not before the hold-up has passed");
    }
}

#[test]
fn a_medium_that_lies_about_its_flushes_is_found_out() {
    if !kernel_tells() {
        return;
    }
    for (medium, point) in [("file", "freeze.persist"), ("nvdimm", "freeze.persist"), ("file", "freeze.context")] {
        let fault = format!("lies@{point}");
        // Several, since the kernel may have written memory by itself meanwhile: a commit of the file system's journal does.
        let arguments = ["--medium", medium, "--at", "100ms", "--holdup", "none", "--fault", &fault, "--repeat", "4"];
        let report = simulate(&Perdure::new(), &arguments).expect_code(1).json();
        assert!(report["summary"]["violations"].as_u64() >= Some(1), "{medium}, {point}: {report:#}");
    }
}

#[test]
fn power_that_flaps_and_media_that_fail_lose_nothing_that_was_said_to_be_durable() {
    if !kernel_tells() {
        return;
    }
    let report = scenario(
        &Perdure::new(),
        &json!({
            "vms": [{"medium": "nvdimm", "priority": 1}, {"guest": "smp", "cpus": 2, "medium": "file"}],
            "outages": [
                {"at": "100ms", "holdup": "100ms", "cut": "never", "back": "2ms"},
                {"at": "50ms", "flaps": 3, "holdup": "2s", "back": "1ms"},
                {"at": "50ms", "holdup": "500ms", "fault": "io-error@freeze.persist"},
                {"at": "50ms", "holdup": "500ms", "fault": "full@freeze.context"},
                {"at": "50ms", "holdup": "200ms", "fault": "slow:300ms@freeze.stamp"},
                {"at": "50ms", "holdup": "2s", "again": ["resume.clear+1", "resume.run", "resume.assembled"]},
                {"at": "50ms", "cut": "unannounced"},
            ],
        }),
        SOME,
    );
    let outages = report["outages"].as_array().unwrap();
    let from =
        |outage: usize| outages[outage]["vms"].as_array().unwrap().iter().map(|vm| vm["went_on"]["from"].clone());
    assert!(outages[0]["dark_ns"].is_null() && from(0).all(|from| from == "running"), "{:#}", outages[0]);
    assert_eq!(outages[1]["flaps"], 3);
    assert!(from(1).all(|from| from == "context"), "{:#}", outages[1]);
    // A freeze that fails is called off: the VM runs on, and the cut finds it running.
    for failed in [2, 3] {
        assert!(from(failed).all(|from| from != "context"), "{:#}", outages[failed]);
        assert!(outages[failed]["vms"][0]["not_frozen"].is_string(), "{:#}", outages[failed]);
    }
    assert_eq!(outages[4]["vms"][0]["in_time"], false, "{:#}", outages[4]);
    assert!(outages[5]["vms"][0]["attempts"].as_u64() >= Some(2), "{:#}", outages[5]);
    assert!(from(6).all(|from| from != "context"), "{:#}", outages[6]);
}

#[test]
fn a_simulation_of_a_vm_leaves_the_vm_as_it_is() {
    if !kernel_tells() {
        return;
    }
    let vm = Vm::new("web");
    let storage = ["--disk", "data:2M", "--pmem", "log:2M"];
    vm.perdure.run(&[&["run", "web", "--detach", "--memory", "8M"], &storage[..], &COUNTER].concat()).expect_code(0);
    vm.freeze();
    let before = PoolBytes::of(vm.perdure.pool());
    let report = without_violation(simulate(&vm.perdure, &["web", "--at", "50ms", "--holdup", "2s", "--repeat", "2"]));
    assert_eq!(report["outages"][1]["vms"][0]["went_on"]["from"], "context", "{report:#}");
    let cut = ["web", "--at", "5ms..50ms", "--cut", "random", "--repeat", "3", "--jobs", "2"];
    without_violation(simulate(&vm.perdure, &cut));
    assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "something was altered");
    assert_eq!(vm.state(), "frozen");
}

#[test]
fn a_simulation_that_is_interrupted_leaves_nothing_behind() {
    if !kernel_tells() {
        return;
    }
    let perdure = Perdure::new();
    let running = perdure.spawn(&["outage", "run", "--at", "100ms", "--repeat", "100000"]);
    running.wait_until("an outage", SOON, |stdout| stdout.contains("[seed "));
    running.signal(Signal::INT);
    let ended = running.wait(SOON).expect_code(1);
    assert!(ended.stderr.contains("interrupted"), "{}", ended.stderr);
    assert!(!perdure.pool().exists() || std::fs::read_dir(perdure.pool()).unwrap().next().is_none());
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    let perdure = Perdure::new();
    for wrong in [
        &["--cut", "at:nowhere"][..],
        &["--fault", "fire@freeze.stamp"],
        &["--holdup", "16"],
        &["--at", "soon"],
        &["--at", "9ms..5ms"],
        &["--jobs", "0"],
    ] {
        simulate(&perdure, wrong).expect_code(2);
    }
    simulate(&perdure, &["--scenario", "/nowhere.json"]).expect_code(1);
    if kernel_tells() {
        let ended = perdure.run(&["--pool", "/dev/shm/perdure-simulated", "outage", "run"]).expect_code(1);
        assert!(ended.stderr.contains("tmpfs"), "{}", ended.stderr);
    }
}

#[test]
fn a_vm_that_shares_something_with_the_host_is_not_copied() {
    let (vm, directory) = (Vm::new("web"), tempfile::tempdir().unwrap());
    let image = directory.path().join("disk.img");
    std::fs::File::create(&image).and_then(|file| file.set_len(1 << 20)).unwrap();
    let disk = ["run", "web", "--detach", "--memory", "8M", "--disk", image.to_str().unwrap()];
    vm.perdure.run(&[&disk[..], &COUNTER].concat()).expect_code(0);
    vm.freeze();
    let before = PoolBytes::of(vm.perdure.pool());
    let ended = simulate(&vm.perdure, &["web"]).expect_code(1);
    assert!(!kernel_tells() || ended.stderr.contains("lies outside of the pool"), "{}", ended.stderr);
    assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "something was altered");
}

#[test]
fn with_the_newer_slot_damaged_a_freeze_is_no_more_and_that_is_said_and_without_the_older_one_nothing_is_lost() {
    if !kernel_tells() {
        return;
    }
    let outage =
        |cut: &str, damage: &str| json!({"at": "80ms", "holdup": "none", "cut": cut, "damage": damage, "fresh": true});
    let cuts = ["after-holdup", "freeze.context+1", "freeze.stamp+1", "resume.clear+1", "unannounced"];
    let report = scenario(
        &Perdure::new(),
        &json!({
            "vms": [{"memory": "8M", "snapshot_every": "20ms"}],
            "outages": cuts.iter().flat_map(|cut| [outage(cut, "newer-slot"), outage(cut, "older-slot")]).collect::<Vec<_>>(),
        }),
        SOME,
    );
    let vm = |index: usize| &report["outages"][index]["vms"][0];
    assert_eq!(vm(0)["damaged"], "context 2, the newer one", "{:#}", vm(0));
    assert_ne!(vm(0)["went_on"]["from"], "context", "{:#}", vm(0));
    assert_eq!(vm(1)["damaged"], "context 1, the older one", "{:#}", vm(1));
    assert_eq!(vm(1)["went_on"], json!({"from": "context", "sequence": 2}), "{:#}", vm(1));
    // The process of the first attempt finds no freeze, and so no resume to be cut off at.
    assert_ne!(vm(6)["went_on"]["from"], "context", "{:#}", vm(6));
    assert_eq!(vm(7)["cut_off_at"], json!(["resume.clear+1"]), "{:#}", vm(7));
}

/// All points that a VM passes from its birth to its return, and those of them after which it writes.
const POINTS: [&str; 24] = [
    "catalog.commit",
    "catalog.done",
    "generation.pages",
    "generation.durable",
    "generation.commit",
    "generation.done",
    "purge.record",
    "purge.sweep",
    "freeze.signal",
    "freeze.still",
    "freeze.persist",
    "freeze.disks",
    "freeze.context",
    "freeze.stamp",
    "freeze.done",
    "thaw.clear",
    "thaw.done",
    "resume.verified",
    "resume.clear",
    "resume.assembled",
    "resume.run",
    "recovery.chosen",
    "recovery.adopt",
    "recovery.done",
];

/// Cuts at all of `points`, with one slot of the context good (`fresh`) or two, of which one may be damaged before the return. Which of
/// them were cut at.
fn cut_at(medium: &str, points: &[String], fresh: bool, damage: Option<&str>, limit: Duration) -> Vec<String> {
    let outage = |point: &String| json!({"at": "60ms", "holdup": "5s", "back": "20ms", "cut": point, "fresh": fresh, "damage": damage});
    let report = scenario(
        &Perdure::new(),
        &json!({
            "vms": [{"medium": medium, "memory": "8M", "snapshot_every": "20ms", "max_snapshots": 2, "cmdline": "hz=500 ram=256K"}],
            "outages": points.iter().map(outage).collect::<Vec<_>>(),
        }),
        limit,
    );
    let vms = report["outages"].as_array().unwrap().iter().map(|outage| &outage["vms"][0]);
    let cut =
        vms.flat_map(|vm| vm["cut_off_at"].as_array().unwrap().iter().map(|point| point.as_str().unwrap().to_owned()));
    cut.collect()
}

#[test]
fn a_cut_at_each_step_leaves_the_state_before_or_after() {
    if !kernel_tells() {
        return;
    }
    let points = |only: &dyn Fn(&str) -> bool| -> Vec<String> {
        POINTS.iter().filter(|point| only(point)).map(|point| (*point).to_owned()).collect()
    };
    let of_context = |point: &str| ["freeze", "thaw", "resume"].iter().any(|what| point.starts_with(what));
    for (medium, fresh, points) in [("file", false, points(&|_| true)), ("nvdimm", true, points(&of_context))] {
        let cut = cut_at(medium, &points, fresh, None, SOME);
        let missed: Vec<_> = points.iter().filter(|point| !cut.contains(point)).collect();
        assert!(missed.is_empty(), "{medium}: nothing was cut at {missed:?}");
    }
}

/// Every write between every two steps, on each medium, with one and with two slots of the context good, and with one of two damaged before the
/// return: minutes.
#[test]
#[ignore = "takes minutes: cargo test --test e2e -- --ignored a_cut_before_each_write"]
fn a_cut_before_each_write_leaves_the_state_before_or_after() {
    // What a damaged slot leaves is no resume to be cut off at, but with the older one.
    let freezes: Vec<&str> =
        POINTS.into_iter().filter(|point| point.starts_with("freeze.c") || point.starts_with("freeze.s")).collect();
    let contexts: Vec<&str> =
        POINTS.into_iter().filter(|point| point.starts_with("freeze") || point.starts_with("resume")).collect();
    let slots = [
        (false, None, &POINTS[..]),
        (true, None, &POINTS),
        (true, Some("newer-slot"), &freezes),
        (true, Some("older-slot"), &contexts),
    ];
    for medium in MEDIA {
        for (fresh, damage, points) in slots {
            let mut left = points.to_vec();
            let mut cuts = 0;
            for operation in 1..=64 {
                let points: Vec<String> = left.iter().map(|point| format!("{point}+{operation}")).collect();
                let cut = cut_at(medium, &points, fresh, damage, 10 * SOME);
                left.retain(|point| cut.contains(&format!("{point}+{operation}")));
                cuts += cut.len();
                println!("{medium}, fresh {fresh}, {damage:?}: before operation {operation}: {left:?}");
                if left.is_empty() {
                    break;
                }
            }
            println!("{medium}, fresh {fresh}, {damage:?}: {cuts} cuts");
            assert!(cuts > points.len() / 2, "{cuts}");
        }
    }
}
