//! The benches of memory that is less than the guest's, in the smallest: that they measure what they say, and leave nothing behind.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tests::perdure::{Perdure, Signal};

use crate::vm::eventually;

const LONG: Duration = Duration::from_secs(240);

/// Nothing of a bench in this pool is left: no file, no swap.
#[track_caller]
fn nothing_is_left(pool: &Path) {
    let left: Vec<_> = fs::read_dir(pool).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("bench-")), "{left:?}");
    assert!(!swaps(pool), "a swap file is left");
}

fn swaps(pool: &Path) -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    swaps.contains(&*pool.to_string_lossy())
}

fn leg<'a>(result: &'a Value, name: &str) -> &'a Value {
    let legs = result["legs"].as_array().expect("legs");
    legs.iter().find(|leg| leg["leg"] == name).unwrap_or_else(|| panic!("no {name}: {result}"))
}

#[test]
fn pages_are_counted_on_every_leg_that_is_permitted() {
    let perdure = Perdure::new();
    fs::create_dir_all(perdure.pool()).expect("a directory");
    let (csv, svg) = (perdure.pool().join("table.csv"), perdure.pool().join("plot.svg"));
    let (csv_path, svg_path) = (csv.to_str().expect("text"), svg.to_str().expect("text"));
    let arguments = ["bench", "paging", "--pattern", "zipf", "--ram", "8M", "--length", "200ms", "--warm-up", "0s"];
    let more = ["--rounds", "1", "--json", "--csv", csv_path, "--plot", svg_path];
    let document = perdure.run_within(LONG, &[&arguments[..], &more].concat()).expect_code(0).json();
    let result = &document["results"][0];
    for name in ["perdure", "process", "guest", "fits", "fits-paged", "kernel-swap"] {
        let leg = leg(result, name);
        let measured = leg["pages_per_second"].as_f64().is_some_and(|rate| rate > 0.0);
        // A cgroup or swap may not be permitted; nothing else is needed but KVM.
        let limited = ["perdure", "kernel-swap"].contains(&name);
        assert!(measured || (limited && leg["absent"].is_string()), "{leg}");
    }
    if leg(result, "perdure")["absent"].is_null() {
        let ours = leg(result, "perdure");
        assert!(ours["hard_faults_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "it does not fit: {ours}");
    }
    assert_eq!(fs::read_to_string(&csv).expect("a table").lines().count(), 7);
    assert!(fs::read_to_string(&svg).expect("a picture").starts_with("<svg"));
    nothing_is_left(perdure.pool());
}

#[test]
fn a_bench_that_is_killed_gives_its_swap_and_its_disk_back() {
    let perdure = Perdure::new();
    let bench =
        perdure.spawn(&["bench", "paging", "--pattern", "uniform", "--ram", "32M", "--length", "60s", "--json"]);
    // With the swap of the kernel, where that is permitted; with files in the pool in any case.
    let begun = || fs::read_dir(perdure.pool()).into_iter().flatten().count() > 0;
    eventually("the bench's pool", begun);
    for _ in 0..100 {
        if swaps(perdure.pool()) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let permitted = swaps(perdure.pool());
    bench.signal(Signal::KILL);
    drop(bench);
    if permitted {
        eventually("the end of all of it", || {
            !swaps(perdure.pool()) && fs::read_dir(perdure.pool()).into_iter().flatten().count() == 0
        });
    }
}

#[test]
fn residence_after_a_resume_in_place_is_that_of_before() {
    let perdure = Perdure::new();
    let arguments = ["bench", "residence", "--pattern", "zipf", "--vms", "2", "--ram", "16M", "--before", "1s"];
    // On a busy machine the first look at a VM may come when it has all of its memory again: then it is looked at once more.
    for attempt in 1.. {
        let document =
            perdure.run_within(LONG, &[&arguments[..], &["--after", "2s", "--json"]].concat()).expect_code(0).json();
        let vms = document["results"][0]["vms"].as_array().expect("VMs").clone();
        assert_eq!(vms.len(), 2);
        vms.iter().for_each(returned_in_every_way);
        let late: Vec<_> = vms.iter().flat_map(came_back_with_all).collect();
        assert!(late.is_empty() || attempt < 4, "they have no less in RAM than before: {late:?}");
        if late.is_empty() {
            break;
        }
    }
    nothing_is_left(perdure.pool());
}

fn way(vm: &Value, name: &str) -> Value {
    let returns = vm["returns"].as_array().expect("ways").clone();
    returns.into_iter().find(|back| back["way"] == name).unwrap_or_else(|| panic!("no {name}"))
}

fn residence_at_outage(vm: &Value, name: &str) -> f64 {
    way(vm, name)["at_outage"]["residence"].as_f64().expect("a residence")
}

fn returned_in_every_way(vm: &Value) {
    let before = vm["before"]["residence"].as_f64().expect("a residence");
    assert!((5.0..50.0).contains(&before), "a quarter fits: {before}");
    let in_place = residence_at_outage(vm, "in-place");
    assert!((in_place - before).abs() < 5.0, "{in_place} after {before}");
    for lazily in ["lazily", "lazily-on-demand"] {
        let series = way(vm, lazily)["series"].as_array().expect("moments").clone();
        let faults = series.iter().filter_map(|moment| moment["faults_per_second"].as_f64());
        assert!(faults.sum::<f64>() > 0.0, "the guest waited for none of it: {}", way(vm, lazily));
    }
    for back in vm["returns"].as_array().expect("ways") {
        assert!(back["absent"].is_null() && back["after"].is_object(), "{back}");
    }
    let series = way(vm, "in-place")["series"].as_array().expect("moments").len();
    assert!(series >= 10, "{series} moments");
}

/// Ways in which all was in swap, or in the generation, at the outage, and no less in RAM at the first look.
fn came_back_with_all(vm: &Value) -> Vec<&'static str> {
    let before = vm["before"]["residence"].as_f64().expect("a residence");
    let mut ways = vec!["from-swap", "lazily", "lazily-on-demand"];
    ways.retain(|way| residence_at_outage(vm, way) >= before * 0.9);
    ways
}

#[test]
fn transactions_are_measured_with_each_engine_and_with_many_threads() {
    let perdure = Perdure::new();
    fs::create_dir_all(perdure.pool()).expect("a directory");
    let arguments = ["bench", "rvm", "--runs", "3", "--threads", "1,8", "--json"];
    let document = perdure.run_within(LONG, &arguments).expect_code(0).json();
    let results = document["results"].as_array().expect("results");
    let rows: Vec<_> = results.iter().map(|row| (row["what"].as_str(), row["threads"].as_u64())).collect();
    let (unflushed, write, flushed) = ("64 bytes, no flush", "a sector written durably", "64 bytes, flush");
    let expected = [(unflushed, 1), (unflushed, 1), (write, 1), (flushed, 1), (flushed, 8), (write, 1)];
    assert_eq!(rows, expected.map(|(what, threads)| (Some(what), Some(threads))));
    assert!(results.iter().all(|row| row["each"]["p50_ns"].as_u64().is_some_and(|time| time > 0)), "{document}");
    nothing_is_left(perdure.pool());
}
