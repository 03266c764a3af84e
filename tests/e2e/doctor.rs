//! `perdure doctor`: what it says must be so, and it must say it wherever it is asked.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tests::perdure::{Ended, LIMIT, Perdure, Running, binary};

fn entries(directory: &Path) -> Vec<String> {
    let read = fs::read_dir(directory).expect("the pool's directory");
    let mut names: Vec<_> = read.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn problems(report: &Value) -> String {
    report["problems"].to_string()
}

/// Whatever else is wrong: the rest is told.
fn all_but_kvm_is_told(report: &Value) {
    assert!(report["system"]["kernel"].as_str().is_some_and(|kernel| !kernel.is_empty()), "{report}");
    assert!(report["media"]["places"][0]["file_system"].is_string(), "{report}");
    assert!(report["embedded_guests"].as_array().is_some_and(|guests| guests.len() >= 5), "{report}");
    assert!(report["probe"].is_null() && report["continuity"].is_null(), "{report}");
}

#[test]
fn what_doctor_says_of_this_kvm_is_so() {
    let perdure = Perdure::new();
    let report = perdure.run(&["doctor", "--json"]).expect_code(0).json();
    assert_eq!(report["runs"], true);
    assert_eq!(report["kvm"]["api_version"], 12);
    assert_eq!(report["continuity"]["continues"], true, "{}", report["continuity"]);
    assert_eq!(report["continuity"]["equal"], true, "{}", report["continuity"]);
    let probe = &report["probe"];
    assert!(probe["error"].is_null(), "{probe}");
    let tests = probe["tests"].as_array().expect("tests");
    assert!(tests.len() >= 20, "{probe}");
    let of =
        |name: &str| tests.iter().find(|test| test["name"] == name).unwrap_or_else(|| panic!("no {name}: {probe}"));
    assert!(of("cpl0")["instructions_per_second"].as_u64().is_some_and(|speed| speed > 10_000), "{}", of("cpl0"));

    // The verdicts, held against what they promise.
    for guest in probe["embedded_guests"].as_array().expect("guests") {
        assert_eq!(guest["runs"], true, "{guest}");
    }
    perdure.run(&["run", "promised", "--guest", "counter", "--cmdline", "ticks=3", "--memory", "16M"]).expect_code(0);
    let lacking = tests.iter().filter(|test| test["outcome"] == "unsupported").count();
    if lacking > 0 {
        assert!(probe["starts"].as_u64().is_some_and(|starts| starts > lacking as u64), "{probe}");
    }
    if probe["execution"] == "native" {
        assert_eq!(probe["stock_linux"]["runs"], true, "{probe}");
    }
}

#[test]
fn people_get_a_line_an_item_and_the_verdict_at_the_end() {
    let perdure = Perdure::new();
    let text = perdure.run(&["doctor"]).expect_code(0).stdout;
    for told in
        ["/dev/kvm", "KVM_CAP_IRQCHIP", "stock Linux", "a guest goes on", "overwrite 4 KiB", "userfaultfd", "memwalk"]
    {
        assert!(text.contains(told), "{told}:\n{text}");
    }
    assert!(text.contains("\nperdure can run on this host.\n"), "{text}");
}

#[test]
fn doctor_makes_no_pool_and_leaves_nothing_in_one() {
    let perdure = Perdure::new();
    let report = perdure.run(&["doctor", "--json"]).expect_code(0).json();
    assert_eq!(report["media"]["exists"], false);
    assert!(!perdure.pool().exists());

    perdure.run(&["run", "--guest", "counter", "--memory", "8M", "--cmdline", "ticks=1"]).expect_code(0);
    let before = entries(perdure.pool());
    let report = perdure.run(&["doctor", "--json"]).expect_code(0).json();
    assert_eq!(report["media"]["exists"], true);
    let flush = &report["media"]["places"][0]["flush"];
    assert!(flush["median"].as_u64() > Some(0) && flush["median"].as_u64() <= flush["worst"].as_u64(), "{report}");
    assert_eq!(entries(perdure.pool()), before);
}

#[test]
fn a_pool_in_ram_is_warned_of() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
    let report = Perdure::on(&directory.path().join("pool")).run(&["doctor", "--json"]).expect_code(0).json();
    assert_eq!(report["media"]["places"][0]["file_system"], "tmpfs");
    assert!(report["warnings"].to_string().contains("survives no power loss"), "{}", report["warnings"]);
}

#[test]
fn a_damaged_pool_is_a_problem_and_the_rest_is_well() {
    let perdure = Perdure::new();
    perdure.run(&["run", "--guest", "counter", "--memory", "8M", "--cmdline", "ticks=1"]).expect_code(0);
    let catalog = perdure.pool().join("catalog");
    fs::write(&catalog, "damaged").expect("the catalog is a file");
    let report = perdure.run(&["doctor", "--json"]).expect_code(1).json();
    assert_eq!(report["runs"], false);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(1), "{}", problems(&report));
    assert!(problems(&report).contains("catalog"), "{}", problems(&report));
    assert_eq!(fs::read(&catalog).unwrap(), b"damaged", "doctor alters nothing");
    assert_eq!(report["continuity"]["continues"], true);
}

/// Runs `doctor --json` where `mounts` was done first, in a mount namespace of its own.
fn run_behind(mounts: &str, pool: &Path) -> Ended {
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-e", "-c", &format!("{mounts}\nexec \"$0\" doctor --json")]).arg(binary());
    let mut running = Running::start(command.env("PERDURE_POOL", pool), "doctor".to_owned());
    running.close_stdin();
    running.wait(LIMIT)
}

#[test]
fn without_dev_kvm_doctor_says_what_to_do_and_tells_the_rest() {
    let pool = tempfile::tempdir().expect("a temporary directory");
    let report = run_behind("mount -t tmpfs none /dev", pool.path()).expect_code(1).json();
    assert_eq!((&report["kvm"]["present"], &report["runs"]), (&Value::Bool(false), &Value::Bool(false)));
    assert!(problems(&report).contains("/dev/kvm does not exist: load the KVM module"), "{}", problems(&report));
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(1), "{}", problems(&report));
    all_but_kvm_is_told(&report);
}

#[test]
fn without_permission_doctor_says_whom_to_ask_and_tells_the_rest() {
    let pool = tempfile::tempdir().expect("a temporary directory");
    // On a file system mounted nodev a device file is refused even to root, with EACCES.
    let mounts = "mount -t tmpfs -o nodev none /dev && mknod /dev/kvm c 10 232
                  mount -t tmpfs -o ro none \"$PERDURE_POOL\"";
    let report = run_behind(mounts, pool.path()).expect_code(1).json();
    assert_eq!((&report["kvm"]["present"], &report["kvm"]["permitted"]), (&Value::Bool(true), &Value::Bool(false)));
    assert!(problems(&report).contains("join the group kvm"), "{}", problems(&report));
    assert!(problems(&report).contains("is not writable"), "{}", problems(&report));
    all_but_kvm_is_told(&report);
}

#[test]
fn what_is_no_kvm_is_called_none() {
    let pool = tempfile::tempdir().expect("a temporary directory");
    let mounts = "mount --bind /dev/null /dev/kvm";
    let report = run_behind(mounts, pool.path()).expect_code(1).json();
    assert!(problems(&report).contains("perdure needs 12"), "{}", problems(&report));
    all_but_kvm_is_told(&report);
}
