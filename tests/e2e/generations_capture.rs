//! Generations of a running VM: taken by hand, by the timer, in a pause, through an outage, onto a full disk. The guest is
//! `counter`, whose chain of hashes shows every byte of memory and every register that is not what it must be.

use std::process::Command;
use std::time::{Duration, Instant};

use guests::chain::{ChainReport, verify, verify_segments};
use serde_json::Value;
use tests::perdure::{LIMIT, Perdure, Running, Signal};

use crate::vm::eventually;

const RUN: [&str; 10] = [
    "run",
    "web",
    "--guest",
    "counter",
    "--memory",
    "16M",
    "--cmdline",
    "hz=200 every=10 ram=4194304",
    "--serial",
    "stdio",
];

/// Starts the VM with more arguments, and lets it tick.
#[track_caller]
fn start(perdure: &Perdure, more: &[&str]) -> Running {
    let running = perdure.spawn(&[&RUN, more].concat());
    running.wait_for("tick 20 ", LIMIT);
    running
}

/// Waits until the guest has printed `count` more ticks.
#[track_caller]
fn let_tick(running: &Running, count: usize) {
    let ticks = |stdout: &str| stdout.matches("\ntick ").count();
    let before = ticks(&running.stdout());
    running.wait_until("tick", LIMIT, |stdout| ticks(stdout) >= before + count);
}

#[track_caller]
fn generations(perdure: &Perdure) -> Vec<Value> {
    let listed = perdure.run(&["generations", "web", "--json"]).expect_code(0).json();
    listed["generations"].as_array().expect("generations").clone()
}

#[track_caller]
fn status(perdure: &Perdure) -> Value {
    perdure.run(&["list", "--json"]).expect_code(0).json()[0].clone()
}

#[track_caller]
fn snapshot(perdure: &Perdure, more: &[&str]) -> Value {
    perdure.run(&[&["snapshot", "web", "--json"], more].concat()).expect_code(0).json()
}

/// The lives of a VM, each of which but the first goes on at a byte that was printed before.
#[track_caller]
fn unbroken(lives: &[&str]) -> ChainReport {
    let said: Vec<&str> = lives.iter().copied().filter(|life| !life.is_empty()).collect();
    verify_segments(&said).unwrap_or_else(|error| panic!("{error}\n{lives:#?}"))
}

#[test]
fn a_frozen_vm_is_resumed_with_an_interval_of_generations_that_it_did_not_have_and_keeps_it() {
    let perdure = Perdure::new();
    let mut lives = vec![];
    let mut running = start(&perdure, &[]);
    for resume in [&["resume", "web", "--snapshot-every", "100ms"][..], &["resume", "web"]] {
        perdure.run(&["powerfail", "web"]).expect_code(0);
        lives.push(running.wait(LIMIT).stdout);
        let before = if lives.len() == 1 { 0 } else { generations(&perdure).len() };
        running = perdure.spawn(resume);
        eventually("generations", || {
            let listed = perdure.run(&["generations", "web", "--json"]);
            listed.code == Some(0) && generations(&perdure).len() > before
        });
    }
    perdure.run(&["powerfail", "web"]).expect_code(0);
    lives.push(running.wait(LIMIT).stdout);
    assert_eq!(verify(&lives.concat()).map(|chain| chain.ticks > 20), Ok(true));
    perdure.run(&["resume", "--all", "--snapshot-every", "100ms"]).expect_code(2);
}

#[test]
fn generations_ten_times_a_second_leave_the_chain_whole_and_each_can_be_gone_back_to() {
    let perdure = Perdure::new();
    let running = start(&perdure, &["--snapshot-every", "100ms"]);
    let deadline = Instant::now() + LIMIT;
    while status(&perdure)["status"]["generations"]["taken"].as_u64() < Some(12) {
        assert!(Instant::now() < deadline, "{:?}", status(&perdure));
        std::thread::sleep(Duration::from_millis(100));
    }
    let found = status(&perdure);
    assert!(found["status"]["generations"]["last"]["full"] == false, "{found}");
    let_tick(&running, 3);
    running.signal(Signal::KILL);
    let first = running.wait(LIMIT).stdout;
    assert!(unbroken(&[&first]).ticks > 100);

    let mut lives = vec![first];
    let all = generations(&perdure);
    let numbers = [1, all.len() / 2, all.len()].map(|nth| all[nth - 1]["id"].as_str().expect("an id").to_owned());
    for id in numbers {
        let number = id.rsplit('@').next().expect("a number");
        let running = perdure.spawn(&["resume", "web", "--generation", number]);
        let_tick(&running, 5);
        perdure.run(&["powerfail", "web"]).expect_code(0);
        lives.push(running.wait(LIMIT).expect_code(3).stdout);
        let lives: Vec<&str> = lives.iter().map(String::as_str).collect();
        unbroken(&lives);
    }
}

#[test]
fn a_generation_is_in_proportion_to_what_changed_and_carries_its_label_and_protection() {
    let perdure = Perdure::new();
    let running = start(&perdure, &[]);
    let first = snapshot(&perdure, &[]);
    let second = snapshot(&perdure, &["--label", "before the upgrade", "--protect"]);
    assert_eq!((&first["generation"], &second["generation"]), (&"web@1".into(), &"web@2".into()));
    assert_eq!((&first["full"], &second["full"]), (&true.into(), &false.into()));
    let pages =
        |report: &Value| report["pages"].as_u64().expect("pages") + report["pages_before"].as_u64().expect("pages");
    assert!(pages(&first) > 150, "the guest has written a page a tick: {first}");
    assert!(pages(&second) < pages(&first) / 2, "and few since: {second}");
    assert!(second["pause_ns"].as_u64().is_some_and(|pause| pause > 0), "{second}");
    let listed = generations(&perdure);
    assert_eq!(listed[1]["label"], "before the upgrade");
    assert_eq!(listed[1]["protected"], true);
    perdure.run(&["stop", "web"]).expect_code(0);
    verify(&running.wait(LIMIT).expect_code(0).stdout).unwrap();
}

#[test]
fn retention_keeps_what_it_is_told_to_keep() {
    let perdure = Perdure::new();
    let running = start(&perdure, &["--snapshot-every", "50ms", "--max-snapshots", "3", "--min-snapshots", "1"]);
    snapshot(&perdure, &["--label", "mine"]);
    let deadline = Instant::now() + LIMIT;
    while status(&perdure)["status"]["generations"]["taken"].as_u64() < Some(15) {
        assert!(Instant::now() < deadline, "{:?}", status(&perdure));
        std::thread::sleep(Duration::from_millis(50));
    }
    perdure.run(&["stop", "web"]).expect_code(0);
    running.wait(LIMIT).expect_code(0);
    let listed = generations(&perdure);
    let by_hand = listed.iter().filter(|generation| generation["label"] == "mine").count();
    assert_eq!(by_hand, 1, "what a person asked for stays: {listed:?}");
    assert!((3..=4).contains(&(listed.len() - by_hand)), "{listed:?}");
}

#[test]
fn a_paused_vm_answers_and_is_snapshot_and_frozen_and_goes_on_where_it_stood() {
    let perdure = Perdure::new();
    let running = start(&perdure, &[]);
    perdure.run(&["pause", "web"]).expect_code(0);
    perdure.run(&["pause", "web"]).expect_code(0);
    assert_eq!(status(&perdure)["state"], "paused");
    // What it wrote before is still on its way to this process.
    let stood = running.settled_stdout();
    let report = snapshot(&perdure, &[]);
    assert_eq!(report["generation"], "web@1");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(running.stdout(), stood, "a snapshot does not let a paused VM go");
    perdure.run(&["unpause", "web"]).expect_code(0);
    assert_eq!(status(&perdure)["state"], "running");
    let_tick(&running, 3);

    perdure.run(&["pause", "web"]).expect_code(0);
    perdure.run(&["powerfail", "web"]).expect_code(0);
    let first = running.wait(LIMIT).expect_code(3).stdout;
    let resumed = perdure.spawn(&["resume", "web"]);
    let_tick(&resumed, 3);
    perdure.run(&["stop", "web"]).expect_code(0);
    let second = resumed.wait(LIMIT).expect_code(0).stdout;
    verify(&[first, second].concat()).unwrap();
}

#[test]
fn a_power_fail_signal_goes_before_generations_that_are_under_way() {
    let perdure = Perdure::new();
    let mut lives = String::new();
    let mut running = start(&perdure, &["--snapshot-every", "20ms"]);
    for _ in 0..5 {
        let asked: Vec<Running> = (0..3).map(|_| perdure.spawn(&["snapshot", "web"])).collect();
        let_tick(&running, 2);
        perdure.run(&["powerfail", "web"]).expect_code(0);
        lives += &running.wait(LIMIT).expect_code(3).stdout;
        for snapshot in asked {
            // Durable, or refused: never left without an answer.
            let ended = snapshot.wait(LIMIT);
            assert!(ended.code == Some(0) || ended.stderr.contains("web"), "{:?} {}", ended.code, ended.stderr);
        }
        running = perdure.spawn(&["resume", "web"]);
        let_tick(&running, 2);
    }
    perdure.run(&["stop", "web"]).expect_code(0);
    lives += &running.wait(LIMIT).expect_code(0).stdout;
    verify(&lives).unwrap();
    perdure.run(&["scrub", "web"]).expect_code(0);
}

/// A file system of its own for the generations of a pool. Unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    #[track_caller]
    fn mount(perdure: &Perdure, size: &str) -> Self {
        let directory = perdure.pool().join("generations");
        std::fs::create_dir_all(&directory).expect("a directory");
        let option = format!("size={size}");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(&directory).status();
        assert!(done.expect("mount").success(), "a tmpfs can be mounted: this test must run as root");
        Self(directory)
    }

    #[track_caller]
    fn resize(&self, size: &str) {
        let option = format!("remount,size={size}");
        let done = Command::new("mount").args(["-o", &option]).arg(&self.0).status();
        assert!(done.expect("mount").success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_costs_generations_and_nothing_else_and_the_next_one_lacks_no_page() {
    let perdure = Perdure::new();
    perdure.run(&["list"]).expect_code(0);
    let disk = SmallDisk::mount(&perdure, "7M");
    let running = start(&perdure, &[]);
    snapshot(&perdure, &[]);
    // One after the other until there is no room for another one.
    let mut refused = None;
    for _ in 0..200 {
        let_tick(&running, 3);
        let ended = perdure.run(&["snapshot", "web"]);
        if ended.code != Some(0) {
            refused = Some(ended.stderr);
            break;
        }
    }
    let why = refused.expect("7 MiB are full at some time");
    assert!(why.contains("No space left") || why.contains("space"), "{why}");
    let before = generations(&perdure).len();
    assert!(before >= 2, "{before}");
    for _ in 0..3 {
        let_tick(&running, 3);
        perdure.run(&["snapshot", "web"]).expect_code(1);
    }
    assert_eq!(generations(&perdure).len(), before, "what is there stays");
    assert!(status(&perdure)["status"]["generations"]["failed"].is_string());

    disk.resize("64M");
    let healed = snapshot(&perdure, &["--label", "healed"]);
    assert_eq!(healed["full"], false, "what was not stored was not forgotten");
    running.signal(Signal::KILL);
    let first = running.wait(LIMIT).stdout;
    let resumed = perdure.spawn(&["resume", "web"]);
    let_tick(&resumed, 20);
    perdure.run(&["stop", "web"]).expect_code(0);
    let ended = resumed.wait(LIMIT).expect_code(0);
    assert!(ended.stderr.contains(healed["generation"].as_str().expect("an id")), "{}", ended.stderr);
    unbroken(&[&first, &ended.stdout]);
}

#[test]
fn generations_are_whole_where_the_kernel_and_not_kvm_tells_what_was_written() {
    for medium in crate::vm::MEDIA {
        let perdure = Perdure::new();
        let mut command = perdure.command(&[&RUN[..], &["--medium", medium]].concat());
        let running = Running::start(command.env("PERDURE_DIRTY_TRACKING", "pagemap-scan"), "run web".to_owned());
        running.wait_for("tick 20 ", LIMIT);
        for number in 0..4 {
            let report = snapshot(&perdure, &[]);
            assert_eq!(report["full"], number == 0, "{report}");
            let_tick(&running, 2);
        }
        running.signal(Signal::KILL);
        let mut lives = vec![running.wait(LIMIT).stdout];
        for generation in ["4", "2", "1", "3"] {
            let running = perdure.spawn(&["resume", "web", "--generation", generation, "--discard"]);
            let_tick(&running, 3);
            running.signal(Signal::KILL);
            lives.push(running.wait(LIMIT).stdout);
        }
        let lives: Vec<&str> = lives.iter().map(String::as_str).collect();
        assert!(unbroken(&lives).rewound >= 3, "{medium}");
    }
}
