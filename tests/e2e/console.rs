//! `perdure console`, and a VM on the user's terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guests::echo;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use tests::perdure::{Perdure, Signal};

use crate::vm::{COUNTER, SOON, eventually, record, unbroken};

const ECHO: [&str; 6] = ["--detach", "--guest", "echo", "--memory", "8M", "--serial=none"];

#[test]
fn a_console_shows_what_was_written_before_and_what_comes_and_takes_input() {
    let perdure = Perdure::new();
    perdure.run(&[&["run", "echo"], &ECHO[..]].concat()).expect_code(0);
    let mut console = perdure.spawn(&["console", "echo"]);
    console.wait_for("echo\nready\n", SOON);
    console.type_in(b"hello\n");
    console.wait_for("hello\n", SOON);
    // A second one sees the past, and both the present.
    let second = perdure.spawn(&["console", "echo"]);
    second.wait_for("hello\n", SOON);
    console.type_in(b"quit\n");
    for console in [console, second] {
        let ended = console.wait(SOON).expect_code(0);
        let report = echo::verify("hello\nquit\n", &ended.stdout).unwrap_or_else(|error| panic!("{error}"));
        assert!(report.complete, "{}", ended.stdout);
    }
}

#[test]
fn a_console_without_input_shows_output_until_the_vm_ends() {
    let perdure = Perdure::new();
    perdure
        .run(&[&["run", "c", "--detach", "--memory", "8M", "--serial", "none"], &COUNTER[..]].concat())
        .expect_code(0);
    let mut console = perdure.spawn(&["console", "c"]);
    console.close_stdin();
    console.wait_until("ticks", SOON, |stdout| stdout.lines().count() > 20);
    perdure.run(&["powerfail", "c"]).expect_code(0);
    unbroken(&console.wait(SOON).expect_code(0).stdout);
}

#[test]
fn a_console_that_goes_away_leaves_the_vm_alone() {
    let perdure = Perdure::new();
    perdure
        .run(&[&["run", "c", "--detach", "--memory", "8M", "--serial", "none"], &COUNTER[..]].concat())
        .expect_code(0);
    for _ in 0..3 {
        let console = perdure.spawn(&["console", "c"]);
        console.wait_until("ticks", SOON, |stdout| stdout.lines().count() > 3);
        console.signal(Signal::KILL);
    }
    assert_eq!(record(&perdure, "c")["state"], "running");
    perdure.run(&["powerfail", "c"]).expect_code(0);
}

#[test]
fn what_is_typed_at_a_console_survives_an_outage() {
    let perdure = Perdure::new();
    perdure.run(&[&["run", "echo"], &ECHO[..]].concat()).expect_code(0);
    let mut console = perdure.spawn(&["console", "echo"]);
    console.wait_for("ready\n", SOON);
    console.type_in(b"one\nhalf ");
    console.wait_for("one\n", SOON);
    // The rest of that line came with it.
    eventually("the input taken", || console.has_taken_its_input());
    perdure.run(&["powerfail", "echo"]).expect_code(0);
    let first = console.wait(SOON).expect_code(0).stdout;
    perdure.run(&["resume", "echo", "--detach"]).expect_code(0);
    let mut console = perdure.spawn(&["console", "echo"]);
    console.type_in(b"and half\nquit\n");
    let second = console.wait(SOON).expect_code(0).stdout;
    let report =
        echo::verify("one\nhalf and half\nquit\n", &(first + &second)).unwrap_or_else(|error| panic!("{error}"));
    assert!(report.complete);
}

/// A command on a terminal of its own.
struct OnTerminal {
    child: Child,
    keys: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl OnTerminal {
    fn start(command: &mut Command) -> Self {
        let terminal: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&terminal).expect("its owner");
        unlockpt(&terminal).expect("its lock");
        let name = ptsname(&terminal, Vec::new()).expect("its name").into_string().expect("plain text");
        let mut options = File::options();
        let user = options.read(true).write(true).custom_flags(i32::try_from(OpenptFlags::NOCTTY.bits()).unwrap());
        let user = user.open(name).expect("its other end");
        let stream = || Stdio::from(user.as_fd().try_clone_to_owned().expect("a descriptor"));
        let child = command.stdin(stream()).stdout(stream()).stderr(stream()).spawn().expect("perdure starts");
        let (keys, seen) = (File::from(terminal), Arc::new(Mutex::new(Vec::new())));
        let (mut screen, shown) = (keys.try_clone().expect("a descriptor"), Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            // EIO: nobody has the other end any more.
            while let Ok(count @ 1..) = screen.read(&mut chunk) {
                shown.lock().unwrap().extend_from_slice(&chunk[..count]);
            }
        });
        Self { child, keys, seen }
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    #[track_caller]
    fn wait_for(&self, what: &str) {
        let deadline = Instant::now() + SOON;
        while !self.screen().contains(what) {
            assert!(Instant::now() < deadline, "no {what:?} on the screen:\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).expect("the terminal takes keys");
    }

    #[track_caller]
    fn end(&mut self) -> Option<i32> {
        eventually("end", || self.gone());
        self.child.wait().expect("it is our child").code()
    }

    /// Whether it is a zombie: it ended, and nobody has waited for it yet.
    fn gone(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn on_a_terminal_ctrl_c_is_the_guests_and_the_escape_leaves_the_vm_running() {
    let perdure = Perdure::new();
    let mut terminal = OnTerminal::start(&mut perdure.command(&["run", "tty", "--guest", "echo", "--memory", "8M"]));
    terminal.wait_for("ready");
    terminal.press(b"a\x03b\r");
    terminal.wait_for("a\x03b\r\n");
    terminal.press(b"\x1d");
    assert_eq!(terminal.end(), Some(0));
    let left = record(&perdure, "tty");
    assert_eq!(left["state"], "running", "{left}");
    assert!(terminal.screen().contains("perdure console tty"), "it says how to come back: {}", terminal.screen());

    let mut terminal = OnTerminal::start(&mut perdure.command(&["console", "tty"]));
    terminal.wait_for("a\x03b");
    terminal.press(b"again\r");
    terminal.wait_for("again\r\n");
    terminal.press(b"\x1d");
    assert_eq!(terminal.end(), Some(0));
    assert_eq!(record(&perdure, "tty")["state"], "running");
    perdure.run(&["powerfail", "tty"]).expect_code(0);

    // A resume takes the terminal as run does; the guest's end ends it.
    let mut terminal = OnTerminal::start(&mut perdure.command(&["resume", "tty"]));
    // Until then the keys are the terminal driver's, which echoes them itself.
    eventually("a running VM", || record(&perdure, "tty")["state"] == "running");
    terminal.press(b"once more\r");
    terminal.wait_for("once more\r\n");
    terminal.press(b"quit\r");
    assert_eq!(terminal.end(), Some(0), "{}", terminal.screen());
    assert_eq!(record(&perdure, "tty")["state"], "stopped");
}

#[test]
fn a_power_fail_signal_to_the_process_on_the_terminal_freezes_the_vm() {
    for signal in [Signal::POWER, Signal::TERM, Signal::HUP] {
        let perdure = Perdure::new();
        let mut terminal =
            OnTerminal::start(&mut perdure.command(&["run", "tty", "--guest", "echo", "--memory", "8M"]));
        terminal.wait_for("ready");
        tests::perdure::signal(i32::try_from(terminal.child.id()).unwrap(), signal);
        assert_eq!(terminal.end(), Some(3), "{}", terminal.screen());
        assert_eq!(record(&perdure, "tty")["state"], "frozen");
    }
}
