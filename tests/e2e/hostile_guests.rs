//! Guests that do what no guest should: the VMM outlives them, and says what became of them.

use std::time::Duration;

use tests::perdure::{Ended, Perdure};

use crate::machine_code::{guest, pokes_at_random, writes_every_port};
use crate::vm::{SOON, record};

#[track_caller]
fn run(code: &[u8]) -> Ended {
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest(directory.path(), "hostile", code);
    let perdure = Perdure::new();
    let ended = perdure.run_within(SOON, &["run", "hostile", "--kernel", &kernel, "--memory", "8M"]);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let state = record(&perdure, "hostile");
    assert_eq!(state["state"], "stopped", "{state}");
    perdure.run(&["pool", "check"]).expect_code(0);
    // It can be started again, to the same end.
    let again = perdure.run_within(SOON, &["run", "hostile"]);
    assert_eq!(again.code, ended.code);
    perdure.run(&["remove", "hostile"]).expect_code(0);
    ended
}

#[test]
fn a_triple_fault_is_called_one() {
    // mov rax, 0x7f_0000_0000; mov al, [rax]: a page fault, and there is no IDT.
    let ended = run(&[0x48, 0xb8, 0, 0, 0, 0, 0x7f, 0, 0, 0, 0x8a, 0x00]).expect_code(1);
    assert!(ended.stderr.contains("triple-faulted on vCPU 0"), "{}", ended.stderr);
    // AMD's processors forget where it was.
    assert!(ended.stderr.contains("rip=0x"), "{}", ended.stderr);
}

#[test]
fn a_jump_into_nowhere_ends_with_a_report() {
    // 512 MiB: mapped by the page tables, but no memory is there.
    let ended = run(&[0xb8, 0, 0, 0, 0x20, 0xff, 0xe0]).expect_code(1);
    assert!(ended.stderr.contains("vCPU 0") && ended.stderr.contains("rip=0x20000000"), "{}", ended.stderr);
    // A non-canonical address: a fault.
    let ended = run(&[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0xe0]).expect_code(1);
    assert!(ended.stderr.contains("vCPU 0"), "{}", ended.stderr);
}

#[test]
fn loads_and_stores_where_no_memory_is_do_no_harm() {
    // mov rbx, 512 MiB; mov al, [rbx]; mov [rbx + 4], eax; then power off.
    let mut code = vec![0xbb, 0, 0, 0, 0x20, 0x8a, 0x03, 0x89, 0x43, 0x04];
    code.extend(crate::machine_code::POWER_OFF);
    run(&code).expect_code(0);
}

#[test]
fn an_instruction_that_does_not_exist_ends_with_a_report() {
    let ended = run(&[0x0f, 0x0b]).expect_code(1);
    assert!(ended.stderr.contains("vCPU 0"), "{}", ended.stderr);
}

#[test]
fn a_guest_that_writes_every_port_comes_to_its_end() {
    // But those that end or reset the machine: ACPI sleep, debug exit, reset control, keyboard controller.
    let ended = run(&writes_every_port(0x5eed, &[0x600, 0xf4, 0xcf9, 0x64])).expect_code(0);
    assert!(ended.stdout.contains('k'), "{:?}", ended.stdout);
}

#[test]
fn a_guest_that_pokes_at_ports_at_random_can_be_stopped_frozen_and_resumed() {
    let directory = tempfile::tempdir().unwrap();
    for seed in [1, 0xdead_beef, u64::MAX / 3] {
        let kernel = guest(directory.path(), &format!("pokes-{seed}"), &pokes_at_random(seed));
        let perdure = Perdure::new();
        perdure.run(&["run", "pokes", "--detach", "--kernel", &kernel, "--memory", "8M"]).expect_code(0);
        std::thread::sleep(Duration::from_millis(500));
        // It may have ended itself by now; if not, it takes an outage like any other.
        if record(&perdure, "pokes")["state"] == "running" {
            let frozen = perdure.run(&["powerfail", "pokes"]);
            if frozen.code == Some(0) {
                perdure.run(&["resume", "pokes", "--detach"]).expect_code(0);
                std::thread::sleep(Duration::from_millis(100));
            }
            if record(&perdure, "pokes")["state"] == "running" {
                perdure.run(&["stop", "pokes"]);
            }
        }
        crate::vm::eventually("its end", || record(&perdure, "pokes")["state"] == "stopped");
        let log = std::fs::read_to_string(perdure.pool().join("run/pokes.log")).unwrap_or_default();
        assert!(!log.contains("panicked"), "{log}");
    }
}
