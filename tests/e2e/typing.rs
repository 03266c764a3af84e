//! Serial input and outages: nothing that was typed is lost or doubled, taken by the guest already or not.

use std::time::Duration;

use guests::echo;
use tests::perdure::{LIMIT, Perdure, Running, Signal};

use crate::random::Random;
use crate::vm::{COUNTER, MEDIA, SOON, record};

const ECHO: [&str; 4] = ["--guest", "echo", "--memory", "8M"];

/// The output answers all of the input, which ends with `quit`.
#[track_caller]
fn answered(input: &str, output: &str) {
    let report = echo::verify(input, output).unwrap_or_else(|error| panic!("{error}\n--- output\n{output}"));
    assert!(report.complete, "{report:?}\n{output}");
}

#[test]
fn input_before_and_after_an_outage_is_answered_once() {
    for medium in MEDIA {
        let perdure = Perdure::new();
        let mut running = perdure.spawn(&[&["run", "echo", "--medium", medium], &ECHO[..]].concat());
        running.wait_for("ready\n", SOON);
        running.type_in(b"before the outage\n");
        running.wait_for("before the outage\n", SOON);
        running.type_in(b"half a line, ");
        // What is in the pipe still when the process ends was never typed as far as it is concerned.
        crate::vm::eventually("the input taken", || running.has_taken_its_input());
        running.signal(Signal::POWER);
        let first = running.wait(SOON).expect_code(3).stdout;
        let mut running = perdure.spawn(&["resume", "echo"]);
        running.type_in(b"and its rest\nquit\n");
        let second = running.wait(SOON).expect_code(0).stdout;
        answered("before the outage\nhalf a line, and its rest\nquit\n", &(first + &second));
    }
}

#[test]
fn much_input_at_once_is_answered_to_the_end() {
    // Input on its way in meets output on its way out all the time: neither side may wait for the other for good. Several
    // at once, so that they interrupt each other at any point.
    let perdure = Perdure::new();
    let mut random = Random::new();
    let mut input: String = (0..200).map(|line| format!("{line} {:x}\n", random.next())).collect();
    input.push_str("quit\n");
    let running: Vec<_> = (0..3).map(|_| perdure.spawn(&[&["run"], &ECHO[..]].concat())).collect();
    let typed = running.into_iter().map(|mut running| {
        running.type_in(input.as_bytes());
        running
    });
    for running in typed.collect::<Vec<_>>() {
        answered(&input, &running.wait(SOON).expect_code(0).stdout);
    }
}

/// One shell, one pipe: what a VM's process has not read is left to the next one. Ends when the guest does.
fn in_one_pipe(perdure: &Perdure) -> Running {
    let script = r#""$0" run echo --guest echo --memory 8M; while [ $? = 3 ]; do "$0" resume echo; done"#;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).arg(tests::perdure::binary());
    Running::start(command.env("PERDURE_POOL", perdure.pool()), "run and resume by a shell".to_owned())
}

#[test]
fn input_that_nobody_has_taken_yet_survives_outages_at_random_moments() {
    let mut random = Random::new();
    let perdure = Perdure::new();
    let mut running = in_one_pipe(&perdure);
    running.wait_for("ready\n", SOON);
    let mut input = String::new();
    for outage in 0..6 {
        // Much more than the guest takes until the freeze.
        let burst: String = (0..40).map(|line| format!("{outage}.{line} {:x}\n", random.next())).collect();
        running.type_in(burst.as_bytes());
        input.push_str(&burst);
        random.pause(Duration::from_millis(30));
        perdure.run(&["powerfail", "echo"]).expect_code(0);
        crate::vm::eventually("resumed", || record(&perdure, "echo")["state"] == "running");
    }
    running.type_in(b"quit\n");
    input.push_str("quit\n");
    let ended = running.wait(LIMIT).expect_code(0);
    answered(&input, &ended.stdout);
}

#[test]
fn what_was_read_from_the_keyboard_is_in_the_context_to_the_last_byte() {
    // `counter` takes no input: all of it waits, here or there.
    let typed: usize = 100 << 10;
    let directory = tempfile::tempdir().unwrap();
    let (rest, serial) = (directory.path().join("rest"), directory.path().join("serial"));
    std::fs::write(directory.path().join("keys"), vec![b'k'; typed]).unwrap();
    let perdure = Perdure::new();
    // `cat` finds in the pipe what the VM's process has not read.
    let script = r#"cat keys | { "$0" run "$@" --serial serial; echo $?; cat >rest; }"#;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).arg(tests::perdure::binary()).args(["deaf", "--memory", "8M"]).args(COUNTER);
    command.env("PERDURE_POOL", perdure.pool()).current_dir(directory.path());
    let shell = Running::start(&mut command, "run in a pipeline".to_owned());
    crate::vm::eventually("ticks", || std::fs::read_to_string(&serial).is_ok_and(|text| text.lines().count() > 20));
    std::thread::sleep(Duration::from_millis(300));
    perdure.run(&["powerfail", "deaf"]).expect_code(0);
    assert_eq!(shell.wait(SOON).expect_code(0).stdout, "3\n");
    let left = std::fs::read(&rest).unwrap().len();
    let context = perdure.run(&["inspect", "deaf", "--json"]).expect_code(0).json()["context"].clone();
    let queued = context["standing"]["console"]["input"].as_str().expect("the queue, in base64");
    let queued = queued.len() / 4 * 3 - queued.bytes().filter(|byte| *byte == b'=').count();
    // The serial port itself holds up to 64 bytes that the guest has not taken.
    let lost = typed - left - queued;
    assert!(lost <= 64, "{lost} bytes lost: {typed} typed, {queued} in the context, {left} not read");
}
