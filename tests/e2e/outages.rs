//! Outages: the guest's chain stays unbroken, whatever moment they come at.

use std::io::Read;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tests::perdure::{Perdure, Running, Signal};

use crate::machine_code::{guest, writes};
use crate::random::Random;
use crate::vm::{COUNTER, MEDIA, SOON, TURNS, Vm, record};

/// What means "power is going".
const WARNINGS: [Signal; 4] = [Signal::POWER, Signal::TERM, Signal::INT, Signal::HUP];

fn one_outage(medium: &str, what: &[&str]) {
    let vm = Vm::new("web");
    vm.start(&[what, &["--medium", medium]].concat());
    vm.wait_for_more();
    vm.freeze();
    let before = vm.verify();
    vm.resume();
    assert_eq!(vm.state(), "running");
    vm.wait_for_more();
    vm.freeze();
    assert!(vm.verify() > before, "{medium}: it goes on after the outage");
}

#[test]
fn a_chain_is_unbroken_after_an_outage() {
    MEDIA.iter().for_each(|medium| one_outage(medium, &COUNTER));
}

#[test]
fn a_chain_of_two_processors_is_unbroken_after_an_outage() {
    MEDIA.iter().for_each(|medium| one_outage(medium, &TURNS));
}

fn many_outages(medium: &str, what: &[&str]) {
    let mut random = Random::new();
    let vm = Vm::new("web");
    vm.start(&[what, &["--medium", medium]].concat());
    for _ in 0..12 {
        random.pause(Duration::from_millis(40));
        vm.command("powerfail").expect_code(0);
        vm.resume();
    }
    vm.wait_for_more();
    vm.freeze();
    vm.verify();
    let context = vm.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json()["context"].clone();
    assert!(context["sequence"].as_u64() >= Some(13), "each outage wrote a context: {}", context["sequence"]);
}

#[test]
fn a_chain_on_file_is_unbroken_after_a_dozen_outages() {
    many_outages("file", &COUNTER);
}

#[test]
fn a_chain_on_nvdimm_is_unbroken_after_a_dozen_outages() {
    many_outages("nvdimm", &COUNTER);
}

#[test]
fn a_chain_of_two_processors_is_unbroken_after_a_dozen_outages() {
    MEDIA.iter().for_each(|medium| many_outages(medium, &TURNS));
}

#[test]
fn what_comes_through_a_pipe_is_unbroken_whichever_signal_warns() {
    let mut random = Random::new();
    let perdure = Perdure::new();
    let mut all = String::new();
    for (outage, signal) in WARNINGS.iter().copied().cycle().take(12).enumerate() {
        let running = match outage {
            0 => perdure.spawn(&[&["run", "pipe", "--memory", "8M"], &COUNTER[..]].concat()),
            _ => perdure.spawn(&["resume", "pipe"]),
        };
        // Its handlers are in place once the guest has said something.
        running.wait_until("output", SOON, |stdout| !stdout.is_empty());
        random.pause(Duration::from_millis(40));
        running.signal(signal);
        let ended = running.wait(SOON).expect_code(3);
        assert!(ended.stderr.contains("frozen in"), "{}", ended.stderr);
        all.push_str(&ended.stdout);
    }
    assert!(crate::vm::unbroken(&all) > 12);
}

#[test]
fn a_guest_that_rests_without_a_timer_freezes_at_once() {
    for medium in MEDIA {
        let vm = Vm::new("rest");
        vm.start(&["--guest", "boot", "--medium", medium]);
        vm.wait_until("its line", |output| output == "boot\n");
        // A vCPU that is not woken from its rest keeps the freeze waiting for ever: a command has a limit.
        vm.freeze();
        vm.resume();
        vm.freeze();
        assert_eq!(vm.output(), "boot\n", "{medium}");
    }
}

#[test]
fn nobody_reads_and_the_freeze_does_not_wait_and_no_byte_is_lost() {
    let perdure = Perdure::new();
    let mut command = perdure.command(&[&["run", "slow", "--memory", "8M"], &COUNTER[..]].concat());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = child.expect("perdure starts");
    let mut pipe = child.stdout.take().expect("stdout is a pipe");
    // A page: it is full within a few hundred ticks.
    rustix::pipe::fcntl_setpipe_size(&pipe, 4096).expect("a small pipe");
    // A write that does not fit any more waits: the pipe is full when nothing is added for a while.
    let waiting = || rustix::io::ioctl_fionread(&pipe).expect("a pipe tells how much is in it");
    crate::vm::eventually("a full pipe", || {
        let before = waiting();
        std::thread::sleep(Duration::from_millis(300));
        before > 0 && waiting() == before
    });
    tests::perdure::signal(i32::try_from(child.id()).unwrap(), Signal::POWER);
    assert_eq!(end_of(&mut child).code(), Some(3));
    let mut first = String::new();
    pipe.read_to_string(&mut first).expect("plain text");
    assert!(first.len() <= 4096, "the pipe was full");

    let running = perdure.spawn(&["resume", "slow"]);
    running.wait_until("output", SOON, |stdout| stdout.lines().count() > 20);
    running.signal(Signal::POWER);
    crate::vm::unbroken(&(first + &running.wait(SOON).expect_code(3).stdout));
}

/// Waits for a process's end; kills it if that does not come.
fn end_of(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + SOON;
    loop {
        match child.try_wait().expect("it is our child") {
            Some(status) => return status,
            None if Instant::now() > deadline => child.kill().expect("it is our child"),
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Waits until a process uses next to no processor time: its guest waits for somebody to read.
fn held_back(pid: u32) {
    let used = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        // utime and stime, in hundredths of a second; behind the name, which may have spaces.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split(' ').collect();
        fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap()
    };
    crate::vm::eventually("standstill", || {
        let before = used();
        std::thread::sleep(Duration::from_millis(300));
        used() - before <= 3
    });
}

#[test]
fn a_vm_freezes_though_all_the_output_that_may_wait_does() {
    // The queue of a slow reader has a bound; what waits in it when the power goes has to fit into the context.
    let block: Vec<u8> = (0..4096).map(|at| b'a' + u8::try_from(at % 23).unwrap()).collect();
    let directory = tempfile::tempdir().unwrap();
    let kernel = guest(directory.path(), "writes", &writes(&block, 100));
    let perdure = Perdure::new();
    let mut command = perdure.command(&["run", "full", "--memory", "8M", "--kernel", &kernel]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("perdure starts");
    let mut pipe = child.stdout.take().expect("stdout is a pipe");
    crate::vm::eventually("a running VM", || record(&perdure, "full")["state"] == "running");
    held_back(child.id());
    tests::perdure::signal(i32::try_from(child.id()).unwrap(), Signal::POWER);
    let mut first = Vec::new();
    let status = end_of(&mut child);
    pipe.read_to_end(&mut first).expect("its output");
    let mut stderr = String::new();
    child.stderr.take().expect("stderr is a pipe").read_to_string(&mut stderr).expect("plain text");
    assert_eq!(status.code(), Some(3), "{stderr}");
    assert!(first.len() < block.len() * 100, "the guest was held back");

    let ended = perdure.run(&["resume", "full"]).expect_code(0);
    first.extend_from_slice(ended.stdout.as_bytes());
    assert_eq!(first.len(), block.len() * 100);
    assert!(first == block.repeat(100), "a byte was altered");
}

#[test]
fn powerfail_all_freezes_every_vm_and_resume_all_continues_them() {
    let mut vms = [("a", String::new()), ("b", String::new()), ("c", String::new())];
    let directory = tempfile::tempdir().unwrap();
    let perdure = Perdure::new();
    for (index, (name, serial)) in vms.iter_mut().enumerate() {
        *serial = directory.path().join(*name).to_str().unwrap().to_owned();
        let medium = MEDIA[index % 2];
        let start = ["run", name, "--detach", "--memory", "8M", "--medium", medium, "--serial", serial];
        perdure.run(&[&start[..], &COUNTER].concat()).expect_code(0);
    }
    let outputs = || vms.iter().map(|(_, serial)| std::fs::read_to_string(serial).unwrap()).collect::<Vec<_>>();
    crate::vm::eventually("output of all", || outputs().iter().all(|output| output.lines().count() > 3));
    let told = perdure.run(&["powerfail", "--all", "--json"]).expect_code(0).json();
    assert_eq!(told.as_array().map(Vec::len), Some(3), "{told}");
    assert!(told.as_array().unwrap().iter().all(|vm| vm["frozen"] == true), "{told}");
    let frozen = outputs();
    assert!(vms.iter().all(|(name, _)| record(&perdure, name)["state"] == "frozen"));
    perdure.run(&["resume", "--all"]).expect_code(0);
    crate::vm::eventually("more of all", || {
        outputs().iter().zip(&frozen).all(|(now, then)| now.lines().count() > then.lines().count() + 2)
    });
    perdure.run(&["powerfail", "--all"]).expect_code(0);
    for output in outputs() {
        crate::vm::unbroken(&output);
    }
    // Nothing runs any more: nothing to do, and no error.
    assert_eq!(perdure.run(&["powerfail", "--all", "--json"]).expect_code(0).json(), serde_json::json!([]));
}

/// What a `run` that was cut off before its VM ran may leave: nothing, or a VM that `run` starts.
#[track_caller]
fn never_ran(perdure: &Perdure, name: &str) {
    let record = record(perdure, name);
    let state = &record["state"];
    assert!(state.is_null() || state == "created" || state == "unclean", "{record}");
}

#[test]
fn a_power_fail_signal_in_the_first_moments_leaves_a_vm_that_is_frozen_or_never_ran() {
    let mut random = Random::new();
    let perdure = Perdure::new();
    for round in 0..12 {
        let name = format!("early-{round}");
        let running: Running = perdure.spawn(&[&["run", &name, "--memory", "8M"], &COUNTER[..]].concat());
        random.pause(Duration::from_millis(25));
        running.signal(Signal::POWER);
        let ended = running.wait(SOON);
        match ended.code {
            Some(3) => {
                assert_eq!(record(&perdure, &name)["state"], "frozen");
                let running = perdure.spawn(&["resume", &name]);
                let more = ended.stdout.lines().count() + 3;
                running.wait_until("more", SOON, |stdout| stdout.lines().count() > more);
                running.signal(Signal::POWER);
                crate::vm::unbroken(&(ended.stdout + &running.wait(SOON).expect_code(3).stdout));
            }
            // Before its handlers were in place the signal ends it, as it does any program.
            None => never_ran(&perdure, &name),
            Some(code) => panic!("status {code}: {}", ended.stderr),
        }
    }
}
