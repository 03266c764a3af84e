//! What a VM's process may still do once its VM runs.

use std::collections::BTreeMap;
use std::fs;

use crate::vm::{COUNTER, Vm, eventually};

/// Each thread of process `pid` by its name (its last where several have one), and the fields of its `status` (proc(5)).
fn threads(pid: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let texts = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let fields = |text: String| -> BTreeMap<String, String> {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    // KVM's own workers count as threads of whoever made the VM.
    let own = texts.map(fields).filter(|fields| !fields["Name"].starts_with("kvm-"));
    own.map(|fields| (fields["Name"].clone(), fields)).collect()
}

/// What has to be given up: the seccomp mode, no new privileges, and the sets of capabilities.
fn privileges(fields: &BTreeMap<String, String>) -> Vec<&str> {
    ["Seccomp", "NoNewPrivs", "CapEff", "CapPrm", "CapInh", "CapAmb"].map(|field| fields[field].as_str()).into()
}

const NONE: &str = "0000000000000000";

#[test]
fn every_thread_of_a_running_vm_is_in_jail_and_has_no_capability() {
    let vm = Vm::new("web");
    let with = ["--disk", "data:2M", "--rng", "--ram", "4M", "--snapshot-every", "50ms"];
    vm.start(&[&COUNTER[..], &with].concat());
    let jailed = |expected: &[&str]| {
        let threads = threads(&vm.pid().to_string());
        for (name, fields) in &threads {
            assert_eq!(privileges(fields), ["2", "1", NONE, NONE, NONE, NONE], "thread {name}");
        }
        expected.iter().all(|name| threads.contains_key(*name))
    };
    let own = ["vcpu0", "control", "budget", "faults", "evict", "generations", "rng"];
    eventually("all threads", || jailed(&own));
    // So they are after a resume, whose threads begin elsewhere.
    vm.wait_for_more();
    vm.freeze();
    vm.resume();
    vm.wait_for_more();
    eventually("all threads", || jailed(&own));
    vm.freeze();
    vm.verify();
}

#[test]
fn without_a_jail_a_vm_keeps_what_it_was_started_with() {
    let own = threads("self").into_values().next().expect("a thread");
    let vm = Vm::new("web");
    vm.start(&[&COUNTER[..], &["--no-jail"]].concat());
    for (name, fields) in threads(&vm.pid().to_string()) {
        assert_eq!(privileges(&fields), privileges(&own), "thread {name}");
    }
    vm.wait_for_more();
    vm.freeze();
    vm.perdure.run(&["resume", "web", "--detach", "--no-jail"]).expect_code(0);
    vm.wait_for_more();
    let vcpu = threads(&vm.pid().to_string()).remove("vcpu0").expect("a vCPU's thread");
    assert_eq!(privileges(&vcpu), privileges(&own));
    vm.freeze();
    vm.verify();
}

#[test]
fn doctor_tells_whether_there_can_be_a_jail() {
    let vm = Vm::new("web");
    let document = vm.perdure.run(&["doctor", "--json"]).json();
    assert_eq!(document["system"]["limits"]["jail"], true, "{document}");
    let page = vm.perdure.run(&["doctor"]).stdout;
    assert!(page.contains("jail") && page.contains("seccomp"), "{page}");
}
