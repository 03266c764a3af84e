//! A VM's life without an outage: start, end, start again.

use guests::chain;
use tests::perdure::Perdure;

use crate::machine_code::{guest, remembers, write};
use crate::vm::{COUNTER, MEDIA, SOON, Vm, record};

const THIRTY: [&str; 6] = ["--guest", "counter", "--memory", "8M", "--cmdline", "ticks=30 hz=500 ram=8K"];

#[test]
fn a_guest_that_powers_off_ends_run_with_status_0_and_leaves_no_vm_that_was_given_no_name() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        let ended = perdure.run(&[&["run", "--medium", medium], &THIRTY[..]].concat()).expect_code(0);
        let report = chain::verify(&ended.stdout).unwrap_or_else(|error| panic!("{medium}: {error}"));
        assert!(report.complete && report.ticks == 30, "{medium}: {report:?}");
        assert!(ended.stderr.contains("called"), "the name is told: {}", ended.stderr);
        assert_eq!(perdure.run(&["list", "--json"]).expect_code(0).json(), serde_json::json!([]), "{medium}");
        assert_eq!(perdure.run(&["pool", "list", "--json"]).expect_code(0).json(), serde_json::json!([]));
    }
}

#[test]
fn a_named_vm_whose_guest_powered_off_is_stopped_and_starts_again_with_what_it_is_made_of() {
    let perdure = Perdure::new();
    let first = perdure.run(&[&["run", "again"], &THIRTY[..]].concat()).expect_code(0);
    let stopped = record(&perdure, "again");
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    assert!(stopped["pid"].is_null(), "{stopped}");
    let second = perdure.run(&["run", "again"]).expect_code(0);
    assert_eq!(first.stdout, second.stdout);
    assert!(chain::verify(&second.stdout).unwrap().complete);
}

#[test]
fn a_vm_that_is_started_again_finds_its_ram_zero() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest(directory.path(), "remembers", &remembers());
    for medium in MEDIA {
        let perdure = Perdure::new();
        for _ in 0..2 {
            let ended = perdure.run(&["run", "blank", "--kernel", &kernel, "--memory", "8M", "--medium", medium]);
            assert_eq!(ended.expect_code(0).stdout, "0", "{medium}");
        }
    }
}

#[test]
fn a_code_at_the_debug_exit_port_is_a_failure_that_is_named() {
    let directory = tempfile::tempdir().unwrap();
    // mov al, 7; out 0xf4, al; hlt
    let kernel = guest(directory.path(), "code-7", &[0xb0, 7, 0xe6, 0xf4, 0xf4]);
    let perdure = Perdure::new();
    let ended = perdure.run(&["run", "seven", "--kernel", &kernel, "--memory", "8M"]).expect_code(1);
    assert!(ended.stderr.contains("code 7"), "{}", ended.stderr);
    assert_eq!(record(&perdure, "seven")["state"], "stopped");
}

#[test]
fn a_guest_that_resets_the_machine_boots_anew() {
    // Shows a byte and counts it; resets the first two times, powers off the third.
    let mut code = vec![0x48, 0xc7, 0xc3, 0, 0, 0x40, 0]; // mov rbx, 4 << 20
    code.extend([0xfe, 0x03]); // inc byte [rbx]
    code.extend([0x8a, 0x03, 0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee]); // out 0x3f8, [rbx] + '0'
    code.extend([0x80, 0x3b, 3, 0x74, 9]); // cmp byte [rbx], 3; je to the end
    code.extend([0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe]); // out 0xcf9, 6; jmp self
    code.extend(crate::machine_code::POWER_OFF);
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest(directory.path(), "resets", &code);
    let ended = Perdure::new().run(&["run", "--kernel", &kernel, "--memory", "8M"]).expect_code(0);
    assert_eq!(ended.stdout, "123", "RAM stays over a reset, the code starts over");
}

#[test]
fn stop_turns_a_vm_off_and_run_then_ends_with_status_0() {
    let vm = Vm::new("off");
    let running = vm.perdure.spawn(&[&["run", "off", "--memory", "8M"], &COUNTER[..]].concat());
    running.wait_for("tick 5 ", SOON);
    vm.command("stop").expect_code(0);
    running.wait(SOON).expect_code(0);
    assert_eq!(vm.state(), "stopped");
    let again = vm.command("stop").expect_code(1);
    assert!(again.stderr.contains("not running"), "{}", again.stderr);
}

#[test]
fn without_any_argument_the_counter_runs_and_its_name_resumes_it() {
    let perdure = Perdure::new();
    let running = perdure.spawn(&["run"]);
    let stdout = running.wait_for("tick 3 ", SOON);
    assert!(stdout.starts_with("counter "), "{stdout}");
    running.signal(tests::perdure::Signal::POWER);
    let first = running.wait(SOON).expect_code(3);
    let list = perdure.run(&["list", "--json"]).expect_code(0).json();
    assert_eq!(list[0]["memory"], 512 << 20, "{list}");
    let name = list[0]["name"].as_str().expect("a name").to_owned();
    assert!(first.stderr.contains(&format!("perdure resume {name}")), "{}", first.stderr);
    let running = perdure.spawn(&["resume", &name]);
    running.wait_until("output", SOON, |stdout| stdout.lines().count() > 3);
    running.signal(tests::perdure::Signal::POWER);
    let second = running.wait(SOON).expect_code(3);
    crate::vm::unbroken(&(first.stdout + &second.stdout));
}

#[test]
fn a_config_file_describes_a_vm_and_arguments_go_before_it() {
    let perdure = Perdure::new();
    let directory = tempfile::tempdir().unwrap();
    let described = r#"{"memory": "8M", "kernel": {"guest": "counter"}, "cmdline": "ticks=4 hz=500 ram=8K"}"#;
    let file = write(directory.path(), "vm.json", described.as_bytes());
    let ended = perdure.run(&["run", "--config", &file]).expect_code(0);
    assert_eq!(chain::verify(&ended.stdout).unwrap().ticks, 4);
    let ended = perdure.run(&["run", "--config", &file, "--cmdline", "ticks=6 hz=500 ram=8K"]).expect_code(0);
    assert_eq!(chain::verify(&ended.stdout).unwrap().ticks, 6);

    let mistaken = write(directory.path(), "mistaken.json", br#"{"memroy": "8M"}"#);
    let ended = perdure.run(&["run", "--config", &mistaken]);
    assert!(matches!(ended.code, Some(1 | 2)), "{ended:?}");
    assert!(ended.stderr.contains("mistaken.json") && ended.stderr.contains("memroy"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_detached_vm_gives_the_prompt_back_at_once_and_prints_its_name_alone() {
    let perdure = Perdure::new();
    let arguments = [&["run", "apart", "--detach", "--memory", "8M"], &COUNTER[..]].concat();
    let ended = perdure.run_within(SOON, &arguments).expect_code(0);
    assert_eq!(ended.stdout, "apart\n");
    assert_eq!(record(&perdure, "apart")["state"], "running");
}
