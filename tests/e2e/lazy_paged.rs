//! `resume --lazy` of a VM with less RAM than memory: clusters come from the generation into frames, and go from there, or at once, into its
//! swap region. Its guests are `memwalk` and `counter`, as in [`crate::lazy`].

use guests::{chain, walk};
use tests::perdure::{LIMIT, Perdure};

use crate::lazy::{eventually_restored, freeze, generation, kill, restored, snapshot, touches, walk_on};
use crate::vm::{MEDIA, eventually, record};

/// A walk over four times the RAM of the VMs here.
const WALK: &str = "pattern=zipf ws=8388608 write=30 verify=1 report=200";
const SHAPE: [&str; 4] = ["--memory", "16M", "--ram", "2M"];

/// A walk that was cut off after a generation of its middle; what it said.
#[track_caller]
fn cut_off(perdure: &Perdure, cmdline: &str, medium: &str) -> String {
    let arguments = ["run", "web", "--guest", "memwalk", "--cmdline", cmdline, "--serial", "stdio", "--medium", medium];
    let running = perdure.spawn(&[&arguments[..], &SHAPE].concat());
    eventually("touches", || touches(perdure) >= 5000);
    assert_eq!(snapshot(perdure)["generation"], "web@1");
    walk_on(perdure, 2000);
    kill(running)
}

fn endless() -> String {
    format!("{WALK} count=1000000000")
}

#[track_caller]
fn elsewhere(perdure: &Perdure) -> u64 {
    record(perdure, "web")["status"]["paged"]["elsewhere"].as_u64().expect("a VM that pages")
}

#[test]
fn a_guest_that_checks_every_page_goes_on_to_its_end_while_its_memory_comes() {
    for (medium, more) in MEDIA.into_iter().zip([&[][..], &["--no-prefetch"]]) {
        let perdure = Perdure::new();
        let before = cut_off(&perdure, &format!("{WALK} count=40000"), medium);
        let ended = perdure.run(&[&["resume", "web", "--lazy"], more].concat()).expect_code(0);
        assert!(ended.stderr.contains("its pages come while it runs"), "{}", ended.stderr);
        let output = before + &ended.stdout;
        let report = walk::verify(&output).unwrap_or_else(|error| panic!("{medium} {more:?}: {error}\n{output}"));
        assert_eq!(report.touches, 40_000);
        assert_eq!(generation(&perdure, "web@1")["protected"], false, "it is let go at the end");
    }
}

#[test]
fn frozen_in_the_middle_it_goes_on_restoring_where_it_was() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        let mut output = cut_off(&perdure, &endless(), medium);
        let mut percents = Vec::new();
        for arguments in [
            &["resume", "web", "--lazy", "--no-prefetch"][..],
            &["resume", "web", "--no-prefetch", "--lazy"],
            &["resume", "web"],
        ] {
            let running = perdure.spawn(arguments);
            walk_on(&perdure, 2000);
            if percents.len() == 2 {
                eventually_restored(&perdure);
                eventually("its generation to be let go", || generation(&perdure, "web@1")["protected"] == false);
                assert_eq!(elsewhere(&perdure), 0);
            } else {
                assert!(elsewhere(&perdure) > 0);
                // Small, and whole: looked at below.
                assert_eq!(snapshot(&perdure)["full"], false);
            }
            walk_on(&perdure, 1000);
            output += &freeze(&perdure, running);
            percents.push(restored(&perdure));
            if percents.len() == 1 {
                assert_eq!(generation(&perdure, "web@1")["protected"], true, "{medium}");
            }
        }
        assert!(percents[0] <= percents[1] && percents[1] < 100 && percents[2] == 100, "{percents:?}");
        assert!(!output.contains("broken") && !output.contains("damaged"), "{output}");
        for id in ["1", "2", "3"] {
            let running = perdure.spawn(&["resume", "web", "--generation", id, "--discard"]);
            walk_on(&perdure, 10_000);
            let said = freeze(&perdure, running);
            assert!(!said.contains("broken"), "{id}: {said}");
        }
    }
}

#[test]
fn killed_in_the_middle_it_is_recovered_and_never_made_of_halves() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        let chain_of = ["--guest", "counter", "--cmdline", "hz=2000 every=10 ram=8M", "--serial", "stdio"];
        let running = perdure.spawn(&[&["run", "web", "--medium", medium], &chain_of[..], &SHAPE].concat());
        running.wait_until("all of its memory in use", LIMIT, |stdout| stdout.contains("\ntick 2050 "));
        snapshot(&perdure);
        let mut lives = vec![kill(running)];
        for more in [&["--no-prefetch"][..], &[]] {
            let running = perdure.spawn(&[&["resume", "web", "--lazy"], more].concat());
            running.wait_until("ticks", LIMIT, |stdout| stdout.matches("\ntick ").count() >= 3);
            if !more.is_empty() {
                assert!(restored(&perdure) < 100);
            }
            lives.push(kill(running));
            assert_eq!(record(&perdure, "web")["state"], "unclean");
        }
        // What is half restored is kept whole.
        let running = perdure.spawn(&["resume", "web", "--lazy", "--no-prefetch"]);
        running.wait_until("ticks", LIMIT, |stdout| stdout.matches("\ntick ").count() >= 3);
        lives.push(freeze(&perdure, running));
        perdure.run(&["fork", "web", "twin", "--serial", "none"]).expect_code(0);
        perdure.run(&["resume", "twin", "--detach"]).expect_code(0);
        let running = perdure.spawn(&["resume", "web"]);
        running.wait_until("ticks", LIMIT, |stdout| stdout.matches("\ntick ").count() >= 3);
        eventually_restored(&perdure);
        lives.push(freeze(&perdure, running));
        let lives: Vec<&str> = lives.iter().map(String::as_str).collect();
        let report = chain::verify_segments(&lives).unwrap_or_else(|error| panic!("{error}\n{lives:#?}"));
        assert!(report.rewound >= 2, "{report:?}");
    }
}

#[test]
fn a_damaged_page_stops_the_vm_with_its_name() {
    let perdure = Perdure::new();
    cut_off(&perdure, &endless(), "file");
    let packs = perdure.pool().join("generations/web/packs");
    for entry in std::fs::read_dir(packs).expect("packs") {
        let path = entry.expect("a pack").path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("data-")) {
            let bytes: Vec<u8> = std::fs::read(&path).expect("a pack").into_iter().map(|byte| byte ^ 0xFF).collect();
            std::fs::write(&path, bytes).expect("a pack");
        }
    }
    let stopped = perdure.run(&["resume", "web", "--lazy", "--no-prefetch"]).expect_code(1);
    assert!(stopped.stderr.contains("web was stopped"), "{}", stopped.stderr);
    assert!(stopped.stderr.contains(" of region ram of generation web@1"), "{}", stopped.stderr);
    assert!(!stopped.stdout.contains("broken"), "the guest never saw it: {}", stopped.stdout);
    assert_eq!(record(&perdure, "web")["state"], "unclean");
}
