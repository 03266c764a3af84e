//! `resume --lazy`: a VM that runs while its memory comes from a generation. Its guest is `memwalk`, which compares every page that it
//! touches with what it wrote there last, or `counter`, whose chain of hashes no altered byte survives.

use std::fs;

use guests::{chain, walk};
use serde_json::Value;
use tests::perdure::{LIMIT, Perdure, Running, Signal};

use crate::vm::{MEDIA, eventually, record};

/// A walk over 24 MiB, too long to end by itself in a test that does not want that.
const LONG: &str = "pattern=uniform ws=25165824 write=30 verify=1 report=1000 count=1000000000";

#[track_caller]
fn start(perdure: &Perdure, guest: &str, cmdline: &str, more: &[&str]) -> Running {
    let arguments = ["run", "web", "--guest", guest, "--memory", "48M", "--cmdline", cmdline, "--serial", "stdio"];
    perdure.spawn(&[&arguments, more].concat())
}

/// The touches that the guest has reported.
#[track_caller]
pub(crate) fn touches(perdure: &Perdure) -> u64 {
    record(perdure, "web")["status"]["report"].as_u64().unwrap_or(0)
}

#[track_caller]
pub(crate) fn walk_on(perdure: &Perdure, by: u64) {
    let before = touches(perdure);
    eventually("touches", || touches(perdure) >= before + by);
}

#[track_caller]
pub(crate) fn snapshot(perdure: &Perdure) -> Value {
    perdure.run(&["snapshot", "web", "--json"]).expect_code(0).json()
}

#[track_caller]
pub(crate) fn generation(perdure: &Perdure, id: &str) -> Value {
    let listed = perdure.run(&["generations", "web", "--json"]).expect_code(0).json();
    let all = listed["generations"].as_array().expect("generations").clone();
    all.iter().find(|generation| generation["id"] == id).unwrap_or_else(|| panic!("no {id}: {all:?}")).clone()
}

#[track_caller]
pub(crate) fn kill(running: Running) -> String {
    running.signal(Signal::KILL);
    running.wait(LIMIT).stdout
}

#[track_caller]
pub(crate) fn freeze(perdure: &Perdure, running: Running) -> String {
    perdure.run(&["powerfail", "web"]).expect_code(0);
    running.wait(LIMIT).expect_code(3).stdout
}

/// How much of the memory is restored; 100 where nothing is said of it.
#[track_caller]
pub(crate) fn restored(perdure: &Perdure) -> u64 {
    let record = record(perdure, "web");
    record["restored_percent"].as_u64().unwrap_or(100)
}

#[track_caller]
pub(crate) fn eventually_restored(perdure: &Perdure) {
    eventually("all of its memory", || restored(perdure) == 100);
}

/// A walk that was cut off after a generation of its middle.
#[track_caller]
fn cut_off(perdure: &Perdure, cmdline: &str, more: &[&str]) -> String {
    let running = start(perdure, "memwalk", cmdline, more);
    eventually("touches", || touches(perdure) >= 20_000);
    assert_eq!(snapshot(perdure)["generation"], "web@1");
    walk_on(perdure, 5000);
    kill(running)
}

#[test]
fn a_guest_that_checks_every_page_goes_on_to_its_end_while_its_memory_comes() {
    for (medium, more) in MEDIA.into_iter().zip([&[][..], &["--no-prefetch"]]) {
        let perdure = Perdure::new();
        // Some seconds of walking: the generation is taken long before its end.
        let count = "pattern=uniform ws=25165824 write=30 verify=1 report=1000 count=20000000";
        let before = cut_off(&perdure, count, &["--medium", medium]);
        let ended = perdure.run(&[&["resume", "web", "--lazy"], more].concat()).expect_code(0);
        assert!(ended.stderr.contains("goes on from generation web@1"), "{}", ended.stderr);
        assert!(ended.stderr.contains("its pages come while it runs"), "{}", ended.stderr);
        let output = before + &ended.stdout;
        let report = walk::verify(&output).unwrap_or_else(|error| panic!("{medium} {more:?}: {error}\n{output}"));
        assert_eq!(report.touches, 20_000_000);
        assert_eq!(generation(&perdure, "web@1")["protected"], false, "it is let go at the end");
        assert_eq!(record(&perdure, "web")["state"], "stopped");
    }
}

#[test]
fn frozen_in_the_middle_it_goes_on_restoring_where_it_was() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        let mut output = cut_off(&perdure, LONG, &["--medium", medium]);
        let mut percents = Vec::new();
        // Again and again: what one process brought and changed is the next one's.
        for arguments in [&["resume", "web", "--lazy", "--no-prefetch"][..], &["resume", "web"], &["resume", "web"]] {
            let running = perdure.spawn(arguments);
            eventually("touches", || touches(&perdure) >= 20_000);
            if percents.len() == 2 {
                eventually("all of its memory", || restored(&perdure) == 100);
                eventually("its generation to be let go", || generation(&perdure, "web@1")["protected"] == false);
            }
            walk_on(&perdure, 3000);
            output += &freeze(&perdure, running);
            percents.push(restored(&perdure));
            if percents.len() == 1 {
                assert_eq!(generation(&perdure, "web@1")["protected"], true, "{medium}");
                let inspected = perdure.run(&["inspect", "web"]).expect_code(0).stdout;
                assert!(inspected.contains("restored from web@1"), "{inspected}");
            }
        }
        assert!(percents[0] < 95, "the guest does not touch all: {percents:?}");
        assert_eq!(percents[2], 100, "{percents:?}");
        assert!(!output.contains("broken"), "{output}");
        let running = perdure.spawn(&["resume", "web"]);
        walk_on(&perdure, 50_000);
        assert!(!kill(running).contains("broken"));
    }
}

#[test]
fn killed_in_the_middle_it_is_recovered_and_never_made_of_halves() {
    let perdure = Perdure::new();
    let running = start(&perdure, "counter", "hz=200 every=10 ram=4194304", &[]);
    running.wait_for("tick 40 ", LIMIT);
    snapshot(&perdure);
    let mut lives = vec![kill(running)];
    for _ in 0..3 {
        let running = perdure.spawn(&["resume", "web", "--lazy", "--no-prefetch"]);
        running.wait_until("ticks", LIMIT, |stdout| stdout.matches("\ntick ").count() >= 3);
        assert!(restored(&perdure) < 100);
        lives.push(kill(running));
        assert_eq!(record(&perdure, "web")["state"], "unclean");
    }
    // Recovered before it runs, it needs the generation no longer.
    let running = perdure.spawn(&["resume", "web"]);
    running.wait_until("ticks", LIMIT, |stdout| stdout.matches("\ntick ").count() >= 3);
    assert_eq!(generation(&perdure, "web@1")["protected"], false);
    lives.push(freeze(&perdure, running));
    let lives: Vec<&str> = lives.iter().map(String::as_str).collect();
    let report = chain::verify_segments(&lives).unwrap_or_else(|error| panic!("{error}\n{lives:#?}"));
    assert!(report.rewound >= 3, "{report:?}");
}

#[test]
fn the_generation_that_memory_comes_from_cannot_be_purged_meanwhile() {
    let perdure = Perdure::new();
    cut_off(&perdure, LONG, &[]);
    let running = perdure.spawn(&["resume", "web", "--lazy", "--no-prefetch"]);
    walk_on(&perdure, 3000);
    let refused = perdure.run(&["purge", "web", "1"]).expect_code(1);
    assert!(refused.stderr.contains("web@1") && refused.stderr.contains("protect"), "{}", refused.stderr);
    perdure.run(&["prune", "web", "--max-snapshots", "1", "--min-snapshots", "0"]);
    walk_on(&perdure, 3000);
    // A generation that a person protected is still so in the end.
    freeze(&perdure, running);
    perdure.run(&["resume", "web", "--generation", "1", "--detach"]).expect_code(0);
    assert_eq!(generation(&perdure, "web@1")["protected"], false);
    perdure.run(&["protect", "web", "1"]).expect_code(0);
    perdure.run(&["powerfail", "web"]).expect_code(0);
    perdure.run(&["resume", "web", "--generation", "1", "--discard", "--lazy", "--detach"]).expect_code(0);
    eventually("all of its memory", || restored(&perdure) == 100);
    perdure.run(&["powerfail", "web"]).expect_code(0);
    assert_eq!(restored(&perdure), 100);
    assert_eq!(generation(&perdure, "web@1")["protected"], true);
}

#[test]
fn a_generation_taken_in_the_middle_is_small_and_whole() {
    let perdure = Perdure::new();
    let mut output = cut_off(&perdure, LONG, &[]);
    for round in 0..2 {
        let lazy: &[&str] = if round == 0 { &["--lazy", "--no-prefetch"] } else { &["--no-prefetch", "--lazy"] };
        let running = perdure.spawn(&[&["resume", "web"], lazy].concat());
        eventually("touches", || touches(&perdure) >= 20_000);
        let report = snapshot(&perdure);
        assert_eq!(report["full"], false, "what is not there yet is not looked at: {report}");
        assert!(restored(&perdure) < 100, "nor brought");
        output += &freeze(&perdure, running);
    }
    // Each alone, before the VM runs: all of its pages are what the guest wrote last.
    let all = perdure.run(&["generations", "web", "--json"]).expect_code(0).json();
    for listed in all["generations"].as_array().expect("generations") {
        let id = listed["id"].as_str().and_then(|id| id.split('@').nth(1)).expect("an id");
        let running = perdure.spawn(&["resume", "web", "--generation", id, "--discard"]);
        walk_on(&perdure, 60_000);
        let said = freeze(&perdure, running);
        assert!(!said.contains("broken"), "{listed}: {said}");
    }
    assert!(!output.contains("broken"), "{output}");
}

#[test]
fn what_was_half_restored_is_kept_and_forked_whole() {
    let perdure = Perdure::new();
    cut_off(&perdure, LONG, &[]);
    let running = perdure.spawn(&["resume", "web", "--lazy", "--no-prefetch"]);
    eventually("touches", || touches(&perdure) >= 20_000);
    walk_on(&perdure, 2000);
    freeze(&perdure, running);
    assert!(restored(&perdure) < 100);
    perdure.run(&["fork", "web", "twin", "--serial", "none"]).expect_code(0);
    let told = perdure.run(&["resume", "web", "--generation", "1", "--detach"]).expect_code(0).stderr;
    let kept = told.lines().find_map(|line| line.split("what was is generation web@").nth(1)).expect("what was kept");
    perdure.run(&["powerfail", "web"]).expect_code(0);
    let running = perdure.spawn(&["resume", "web", "--generation", kept, "--discard"]);
    walk_on(&perdure, 60_000);
    assert!(!freeze(&perdure, running).contains("broken"));
    perdure.run(&["resume", "twin", "--detach"]).expect_code(0);
    let twin = || record(&perdure, "twin")["status"]["report"].as_u64().unwrap_or(0);
    eventually("touches of the twin", || twin() >= 80_000);
}

#[test]
fn a_damaged_page_stops_the_vm_with_its_name_and_an_older_generation_goes_on() {
    let perdure = Perdure::new();
    let running = start(&perdure, "memwalk", LONG, &[]);
    eventually("touches", || touches(&perdure) >= 20_000);
    snapshot(&perdure);
    let packs = perdure.pool().join("generations/web/packs");
    let lengths = data_packs(&packs);
    walk_on(&perdure, 20_000);
    snapshot(&perdure);
    kill(running);
    for (path, length) in data_packs(&packs) {
        let from = lengths.iter().find(|(known, _)| *known == path).map_or(0, |(_, length)| *length);
        let mut bytes = fs::read(&path).expect("a pack");
        bytes[usize::try_from(from).expect("a length")..].iter_mut().for_each(|byte| *byte ^= 0xFF);
        assert!(length > from || bytes.is_empty() || lengths.len() > 1, "the second generation stored pages");
        fs::write(&path, bytes).expect("a pack");
    }
    for more in [&["--no-prefetch"][..], &[]] {
        let stopped = perdure.run(&[&["resume", "web", "--lazy"], more].concat()).expect_code(1);
        assert!(stopped.stderr.contains("web was stopped"), "{}", stopped.stderr);
        assert!(stopped.stderr.contains(" of region ram of generation web@2"), "{}", stopped.stderr);
        assert!(stopped.stderr.contains("page "), "{}", stopped.stderr);
        assert!(!stopped.stdout.contains("broken"), "the guest never saw it: {}", stopped.stdout);
        assert_eq!(record(&perdure, "web")["state"], "unclean");
    }
    let running = perdure.spawn(&["resume", "web"]);
    eventually("touches", || touches(&perdure) >= 20_000);
    walk_on(&perdure, 30_000);
    assert!(running.stderr().contains("web@2 is passed over"), "{}", running.stderr());
    assert_eq!(generation(&perdure, "web@2")["protected"], false, "nothing needs it any more");
    assert!(!freeze(&perdure, running).contains("broken"));
}

fn data_packs(directory: &std::path::Path) -> Vec<(std::path::PathBuf, u64)> {
    let entries = fs::read_dir(directory).expect("packs").map(|entry| entry.expect("a pack").path());
    let data = entries.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("data-")));
    data.map(|path| (path.clone(), path.metadata().expect("a pack").len())).collect()
}

#[test]
fn what_was_touched_first_is_remembered_and_rubbish_in_its_place_does_no_harm() {
    let perdure = Perdure::new();
    cut_off(&perdure, LONG, &[]);
    let record_file = perdure.pool().join("run/web.working-set");
    assert!(!record_file.exists());
    let running = perdure.spawn(&["resume", "web", "--lazy", "--no-prefetch"]);
    walk_on(&perdure, 3000);
    freeze(&perdure, running);
    let remembered = fs::read(&record_file).expect("a record");
    assert!(remembered.len() > 100, "{}", remembered.len());
    for rubbish in [vec![], vec![0xFF; 4 << 20], remembered[..60].to_vec(), remembered] {
        fs::write(&record_file, rubbish).expect("write");
        let running = perdure.spawn(&["resume", "web", "--generation", "1", "--discard", "--lazy"]);
        eventually("all of its memory", || touches(&perdure) > 20_000 && restored(&perdure) == 100);
        assert!(!freeze(&perdure, running).contains("broken"));
    }
    perdure.run(&["remove", "web", "--force"]).expect_code(0);
    assert!(!record_file.exists());
}
