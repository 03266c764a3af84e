//! A VMM that is killed: nothing was frozen, and nobody claims that it was.

use std::path::PathBuf;
use std::time::Duration;

use tests::perdure::{Perdure, Signal};

use crate::pool_bytes::PoolBytes;
use crate::random::Random;
use crate::vm::{COUNTER, MEDIA, SOON, Vm, record};

#[test]
fn a_vm_whose_vmm_was_killed_is_unclean_and_refused_and_left_as_it_is_until_it_is_started_anew() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        tests::perdure::signal(vm.pid(), Signal::KILL);
        vm.wait_for_state("unclean");
        let before = PoolBytes::of(vm.perdure.pool());
        let refused = vm.command("resume").expect_code(1);
        assert!(refused.stderr.contains("`perdure run` boots it anew"), "{}", refused.stderr);
        let detached = vm.perdure.run(&["resume", "web", "--detach"]).expect_code(1);
        assert!(detached.stderr.contains("`perdure run` boots it anew"), "{}", detached.stderr);
        vm.perdure.run(&["inspect", "web"]).expect_code(0);
        vm.perdure.run(&["resume", "--all"]).expect_code(0);
        vm.perdure.run(&["pool", "check"]).expect_code(0);
        assert_eq!(PoolBytes::of(vm.perdure.pool()), before, "{medium}: something was altered");
        assert_eq!(vm.state(), "unclean");

        std::fs::remove_file(vm.serial()).unwrap();
        vm.start(&[]);
        vm.wait_for_more();
        vm.freeze();
        vm.verify();
    }
}

#[test]
fn a_vm_whose_vmm_was_killed_after_a_resume_does_not_go_back_to_the_context_before() {
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        vm.freeze();
        vm.resume();
        tests::perdure::signal(vm.pid(), Signal::KILL);
        vm.wait_for_state("unclean");
        vm.command("resume").expect_code(1);
    }
}

/// `pool check` finds nothing, or only what the next change sweeps.
#[track_caller]
fn the_pool_is_sound(perdure: &Perdure) {
    let check = perdure.run(&["pool", "check", "--json"]);
    let report = check.json();
    let problems = report["problems"].as_array().unwrap_or_else(|| panic!("{report}"));
    let sweepable = |problem: &str| problem.contains("the next change of the pool");
    assert!(problems.iter().all(|problem| problem.as_str().is_some_and(sweepable)), "{report}");
}

#[test]
fn a_run_that_is_killed_while_it_makes_its_vm_leaves_a_sound_pool_and_a_vm_that_can_be_started_or_none() {
    let mut random = Random::new();
    let perdure = Perdure::new();
    perdure.run(&["run", "--guest", "counter", "--memory", "8M", "--cmdline", "ticks=1"]).expect_code(0);
    for round in 0..30 {
        let name = format!("half-{round}");
        let medium = random.choose(&MEDIA);
        let running = perdure.spawn(&[&["run", &name, "--memory", "8M", "--medium", medium], &COUNTER[..]].concat());
        random.pause(Duration::from_millis(30));
        running.signal(Signal::KILL);
        assert_eq!(running.wait(SOON).signal, Some(9));
        the_pool_is_sound(&perdure);
        let state = record(&perdure, &name)["state"].clone();
        println!("{name}: {state}");
        assert!(state.is_null() || state == "created" || state == "unclean", "{name}: {state}");
    }
    // Whatever was left of it is no obstacle.
    for round in 0..30 {
        let name = format!("half-{round}");
        let arguments = ["run", &name, "--guest", "counter", "--cmdline", "ticks=1 hz=1000 ram=8K", "--memory", "8M"];
        perdure.run(&arguments).expect_code(0);
        perdure.run(&["remove", &name]).expect_code(0);
    }
    assert_eq!(perdure.run(&["pool", "list", "--json"]).expect_code(0).json(), serde_json::json!([]));
    perdure.run(&["pool", "check"]).expect_code(0);
    let media = perdure.pool().join("media");
    let left: Vec<PathBuf> = MEDIA
        .iter()
        .filter_map(|medium| std::fs::read_dir(media.join(medium)).ok())
        .flat_map(|directory| directory.map(|entry| entry.unwrap().path()))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_resume_that_is_killed_at_a_random_moment_leaves_a_vm_that_is_frozen_or_unclean() {
    let mut random = Random::new();
    for medium in MEDIA {
        let vm = Vm::new("web");
        vm.start(&[&COUNTER[..], &["--medium", medium]].concat());
        vm.wait_for_more();
        vm.freeze();
        for _ in 0..10 {
            let running = vm.perdure.spawn(&["resume", "web"]);
            random.pause(Duration::from_millis(12));
            running.signal(Signal::KILL);
            running.wait(SOON);
            match vm.state().as_str() {
                "frozen" => {}
                "unclean" => {
                    vm.command("resume").expect_code(1);
                    std::fs::remove_file(vm.serial()).unwrap();
                    vm.start(&[]);
                    vm.wait_for_more();
                    vm.freeze();
                }
                other => panic!("{other}: {}", vm.record()),
            }
            vm.verify();
        }
        vm.resume();
        vm.wait_for_more();
        vm.verify();
    }
}
