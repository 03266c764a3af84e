//! The hold-up: the time between the power-fail signal and darkness, and power that comes back within it.

use std::time::{Duration, Instant};

use tests::perdure::{Running, Signal};

use crate::pool_bytes::PoolBytes;
use crate::random::Random;
use crate::vm::{COUNTER, MEDIA, SOON, Vm};

#[test]
fn powerfail_tells_how_much_of_the_hold_up_was_left() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        let told = vm.perdure.run(&["powerfail", "web", "--holdup", "1s", "--json"]).expect_code(0).json();
        let outcome = &told[0];
        assert_eq!(
            (&outcome["name"], &outcome["frozen"], &outcome["in_time"]),
            (&"web".into(), &true.into(), &true.into())
        );
        let left = outcome["report"]["holdup_left_ns"].as_u64().unwrap_or_else(|| panic!("{outcome}"));
        let took = outcome["report"]["total_ns"].as_u64().unwrap_or_else(|| panic!("{outcome}"));
        assert!(left < 1_000_000_000 && took > 0 && left + took < 1_100_000_000, "{outcome}");
        assert_eq!(vm.state(), "frozen");
        vm.resume();
        vm.wait_for_more();
        let told = vm.perdure.run(&["powerfail", "web", "--holdup", "1s"]).expect_code(0);
        assert!(told.stdout.contains("of the hold-up left"), "{}", told.stdout);
        vm.verify();
    }
}

/// After a cut: a VM that is frozen goes on unbroken; one that is not is refused, unaltered, and can be started anew.
fn is_as_durable_as_it_says(vm: &Vm) -> bool {
    match vm.state().as_str() {
        "frozen" => {
            vm.resume();
            vm.wait_for_more();
            vm.verify();
            true
        }
        "unclean" => {
            let before = PoolBytes::of(vm.perdure.pool());
            let refused = vm.command("resume").expect_code(1);
            assert!(refused.stderr.contains("cut off while it ran"), "{}", refused.stderr);
            assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "a refusal alters nothing");
            std::fs::remove_file(vm.serial()).unwrap();
            vm.start(&[]);
            vm.wait_for_more();
            vm.verify();
            false
        }
        other => panic!("{other}: {}", vm.record()),
    }
}

#[test]
fn a_hold_up_that_is_too_short_is_a_cut_and_never_a_broken_chain() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        let pid = vm.pid();
        let ended = vm.perdure.run(&["powerfail", "web", "--holdup", "1us"]).expect_code(1);
        assert!(ended.stderr.contains("hold-up") && ended.stderr.contains("dark"), "{}", ended.stderr);
        crate::vm::eventually("end of the process", || !std::path::Path::new(&format!("/proc/{pid}/maps")).exists());
        is_as_durable_as_it_says(&vm);
    }
}

#[test]
fn hold_ups_of_random_length_leave_what_was_durable_and_nothing_else() {
    let mut random = Random::new();
    let (mut frozen, mut cut) = (0, 0);
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        for _ in 0..10 {
            vm.wait_for_more();
            let length = format!("{}us", random.time(Duration::from_millis(15)).as_micros());
            let ended = vm.perdure.run(&["powerfail", "web", "--holdup", &length]);
            let state = vm.state();
            println!("{medium}: {length}: {state}, status {:?}", ended.code);
            assert!(ended.code == Some(1) || state == "frozen", "told to be frozen, but {state}");
            if is_as_durable_as_it_says(&vm) { frozen += 1 } else { cut += 1 }
        }
    }
    assert!(frozen + cut == 20, "{frozen} frozen, {cut} cut off");
}

/// A VM that is frozen, with a hold-up of 100 s going on, and the `powerfail` that waits for its end.
fn in_the_hold_up(vm: &Vm) -> Running {
    let powerfail = vm.perdure.spawn(&["powerfail", "web", "--holdup", "100s"]);
    vm.wait_for_state("frozen");
    assert!(vm.record()["pid"].is_u64(), "its process is there still: {}", vm.record());
    powerfail
}

#[test]
fn power_that_comes_back_within_the_hold_up_lets_the_vm_run_on() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        let pid = vm.pid();
        let begun = Instant::now();
        let powerfail = in_the_hold_up(&vm);
        let again = vm.command("powerfail").expect_code(1);
        assert!(again.stderr.contains("frozen"), "{}", again.stderr);
        vm.command("powerback").expect_code(0);
        powerfail.wait(SOON).expect_code(0);
        assert!(begun.elapsed() < Duration::from_secs(100), "nobody waits for the end of the hold-up");
        vm.wait_for_more();
        assert_eq!((vm.state().as_str(), vm.pid()), ("running", pid), "{medium}");
        vm.verify();
        // The context of a freeze that was called off is not believed any more.
        tests::perdure::signal(pid, Signal::KILL);
        vm.wait_for_state("unclean");
        vm.command("resume").expect_code(1);
    }
}

#[test]
fn after_power_came_back_the_next_outage_is_as_any_other() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        for _ in 0..3 {
            vm.wait_for_more();
            let powerfail = in_the_hold_up(&vm);
            vm.command("powerback").expect_code(0);
            powerfail.wait(SOON).expect_code(0);
        }
        vm.wait_for_more();
        vm.freeze();
        vm.resume();
        vm.wait_for_more();
        vm.freeze();
        vm.verify();
    }
}

#[test]
fn a_second_warning_while_it_is_frozen_does_not_outlast_the_return_of_the_power() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    vm.wait_for_more();
    let (pid, powerfail) = (vm.pid(), in_the_hold_up(&vm));
    // A frozen VM has nothing to do about it (the lifecycle's table has no such step).
    tests::perdure::signal(pid, Signal::POWER);
    std::thread::sleep(Duration::from_millis(100));
    vm.command("powerback").expect_code(0);
    powerfail.wait(SOON).expect_code(0);
    vm.wait_for_more();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(vm.state(), "running", "{}", vm.record());
}

#[test]
fn powerback_of_a_vm_that_has_power_is_refused() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    let refused = vm.command("powerback").expect_code(1);
    assert!(refused.stderr.contains("the power is not out"), "{}", refused.stderr);
    assert_eq!(vm.state(), "running");
}
