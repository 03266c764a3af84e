//! One VM, one process; and what a VM in each state refuses.

use std::thread;

use guests::chain;
use tests::perdure::{Ended, Perdure, Running};

use crate::vm::{COUNTER, SOON, Vm, record};

/// It failed, and says that this process has the VM.
#[track_caller]
fn names_the_holder(ended: Ended, pid: i32) {
    let ended = ended.expect_code(1);
    assert!(ended.stderr.contains(&format!("process {pid}")), "{}", ended.stderr);
}

#[test]
fn who_wants_a_running_vm_is_told_which_process_has_it() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    vm.wait_for_more();
    let pid = vm.pid();
    names_the_holder(vm.command("resume"), pid);
    names_the_holder(vm.perdure.run(&["resume", "web", "--detach"]), pid);
    names_the_holder(vm.command("run"), pid);
    names_the_holder(vm.perdure.run(&["run", "web", "--detach"]), pid);
    names_the_holder(vm.command("remove"), pid);
    names_the_holder(vm.perdure.run(&["remove", "web", "--force"]), pid);
    // After a resume too, where the process is another one.
    vm.freeze();
    vm.resume();
    assert_ne!(vm.pid(), pid);
    names_the_holder(vm.command("resume"), vm.pid());
    vm.wait_for_more();
    vm.freeze();
    vm.verify();
}

#[test]
fn a_frozen_vm_is_not_started_over_and_not_removed_by_mistake() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    vm.wait_for_more();
    vm.freeze();
    let refused = vm.command("run").expect_code(1);
    assert!(refused.stderr.contains("frozen") && refused.stderr.contains("perdure resume web"), "{}", refused.stderr);
    let refused = vm.command("remove").expect_code(1);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    for verb in ["powerfail", "powerback", "stop", "console"] {
        let refused = vm.command(verb).expect_code(1);
        assert!(refused.stderr.contains("not running"), "{verb}: {}", refused.stderr);
    }
    assert_eq!(vm.state(), "frozen");
    vm.perdure.run(&["remove", "web", "--force"]).expect_code(0);
    assert_eq!(vm.state(), "absent");
    vm.perdure.run(&["pool", "check"]).expect_code(0);
}

#[test]
fn a_power_fail_signal_does_not_pass_by_a_vm_that_is_being_resumed() {
    for whom in [&["powerfail", "web"], &["powerfail", "--all"]] {
        let vm = Vm::new("web");
        vm.start(&COUNTER);
        vm.wait_for_more();
        vm.freeze();
        // Its stamp takes so long to go that it is seen in this state.
        let mut resume = vm.perdure.command(&["resume", "web"]);
        resume.env("PERDURE_CUT_FAULT", "slow:400ms@resume.clear");
        resume.env("PERDURE_CUT_RECORD", vm.perdure.pool().with_extension("record"));
        let resumed = Running::start(&mut resume, "a slow resume".to_owned());
        vm.wait_for_state("resuming");
        vm.perdure.run(whom).expect_code(0);
        resumed.wait(SOON).expect_code(3);
        assert_eq!(vm.state(), "frozen");
        vm.verify();
    }
}

#[test]
fn what_was_never_frozen_is_not_resumed() {
    let perdure = Perdure::new();
    let arguments = ["run", "done", "--guest", "counter", "--cmdline", "ticks=2 hz=1000 ram=8K", "--memory", "8M"];
    perdure.run(&arguments).expect_code(0);
    let refused = perdure.run(&["resume", "done"]).expect_code(1);
    assert!(refused.stderr.contains("perdure run"), "{}", refused.stderr);
    perdure.run(&["remove", "done"]).expect_code(0);
}

#[test]
fn a_vm_that_is_not_there_is_named_and_list_is_recommended() {
    let perdure = Perdure::new();
    perdure.run(&["run", "--guest", "counter", "--memory", "8M", "--cmdline", "ticks=1"]).expect_code(0);
    for verb in ["resume", "powerfail", "powerback", "inspect", "console", "stop", "remove"] {
        let ended = perdure.run(&[verb, "nobody"]).expect_code(1);
        assert!(
            ended.stderr.contains("no VM nobody") && ended.stderr.contains("perdure list"),
            "{verb}: {}",
            ended.stderr
        );
        assert_eq!(ended.stdout, "", "{verb}");
    }
}

#[test]
fn names_that_lead_out_of_the_pool_are_refused() {
    let perdure = Perdure::new();
    for name in ["../web", "/web", "web/..", "", ".", "..", "a b", "a\nb", "web/ram"] {
        let ended = perdure.run(&["run", "--memory", "8M", "--detach", "--", name]);
        assert!(matches!(ended.code, Some(1 | 2)), "{name:?}: {ended:?}");
        assert!(!ended.stderr.contains("panicked"), "{name:?}: {}", ended.stderr);
    }
    assert_eq!(perdure.run(&["pool", "list", "--json"]).expect_code(0).json(), serde_json::json!([]));
}

#[test]
fn of_two_that_start_one_vm_at_once_one_wins_and_the_other_is_told_why_not() {
    for round in 0..10 {
        let perdure = Perdure::new();
        let arguments = [&["run", "one", "--detach", "--memory", "8M"], &COUNTER[..]].concat();
        let both = [perdure.spawn(&arguments), perdure.spawn(&arguments)].map(|running| running.wait(SOON));
        let (won, lost): (Vec<&Ended>, Vec<&Ended>) = both.iter().partition(|ended| ended.code == Some(0));
        assert_eq!((won.len(), lost.len()), (1, 1), "round {round}: {both:?}");
        assert_eq!(lost[0].code, Some(1), "round {round}: {lost:?}");
        let why = &lost[0].stderr;
        assert!(why.contains("in use by") || why.contains("exists"), "round {round}: {why}");
        assert_eq!(record(&perdure, "one")["state"], "running", "round {round}");
        perdure.run(&["stop", "one"]).expect_code(0);
        perdure.run(&["remove", "one"]).expect_code(0);
        perdure.run(&["pool", "check"]).expect_code(0);
    }
}

#[test]
fn of_two_that_resume_one_vm_at_once_one_wins_and_the_chain_is_unbroken() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    vm.wait_for_more();
    for _ in 0..5 {
        vm.freeze();
        let resume = ["resume", "web", "--detach"];
        let both = [vm.perdure.spawn(&resume), vm.perdure.spawn(&resume)].map(|running| running.wait(SOON));
        let won = both.iter().filter(|ended| ended.code == Some(0)).count();
        assert_eq!(won, 1, "{both:?}");
        vm.wait_for_more();
    }
    vm.freeze();
    vm.verify();
}

#[test]
fn ten_vms_at_once_come_to_their_end() {
    let perdure = Perdure::new();
    thread::scope(|scope| {
        for index in 0..10 {
            let perdure = &perdure;
            scope.spawn(move || {
                let name = format!("vm-{index}");
                let what = ["--guest", "counter", "--cmdline", "ticks=40 hz=500 ram=8K", "--memory", "4M"];
                let ended = perdure.run(&[&["run", &name], &what[..]].concat()).expect_code(0);
                assert!(chain::verify(&ended.stdout).unwrap_or_else(|error| panic!("{name}: {error}")).complete);
            });
        }
    });
    let list = perdure.run(&["list", "--json"]).expect_code(0).json();
    let list = list.as_array().expect("a list");
    assert!(list.len() == 10 && list.iter().all(|vm| vm["state"] == "stopped"), "{list:?}");
    perdure.run(&["pool", "check"]).expect_code(0);
}

#[test]
fn looking_on_does_not_get_in_the_way_of_outages() {
    let vm = Vm::new("web");
    vm.start(&COUNTER);
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                vm.perdure.run(&["list"]).expect_code(0);
                vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0);
                vm.perdure.run(&["pool", "list"]).expect_code(0);
            }
        });
        let cycles = thread::scope(|inner| {
            let cycles = inner.spawn(|| {
                for _ in 0..8 {
                    vm.wait_for_more();
                    vm.command("powerfail").expect_code(0);
                    vm.resume();
                }
            });
            cycles.join()
        });
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        cycles.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    vm.freeze();
    vm.verify();
}
