//! Starting a VM's process apart from the one that the user started.
//!
//! * *Detached*: the user gets the prompt back as soon as the VM runs; it has no terminal.
//! * *Interactive*: the VM's process has the user's terminal, and the escape key gives it back. The process that the user
//!   started waits beside it, keeps the terminal in order, and passes power-fail signals on.
//!
//! Both start this very program again with the same arguments and [`ROLE`] in the environment. (A fork of a process that
//! already has a VM is no way: KVM binds a VM to the address space that made it.)

use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::FdFlags;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use super::power::PowerSignals;
use super::terminal::{Leave, RawTerminal};

/// The environment variable that tells a VM's process what it is, and through which descriptor it reports.
pub const ROLE: &str = "PERDURE_ROLE";

/// What this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that the user started.
    First,
    /// A VM's, without a terminal; reports through this descriptor.
    Detached(i32),
    /// A VM's, with the user's terminal; reports through this descriptor.
    Interactive(i32),
}

impl Role {
    /// Reads [`ROLE`].
    #[must_use]
    pub fn of_this_process() -> Self {
        let Ok(text) = std::env::var(ROLE) else { return Self::First };
        match text.split_once(':').map(|(role, fd)| (role, fd.parse())) {
            Some(("detached", Ok(fd))) => Self::Detached(fd),
            Some(("interactive", Ok(fd))) => Self::Interactive(fd),
            _ => Self::First,
        }
    }
}

/// What a VM's process reports to the one that started it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// Its vCPUs run.
    Ready {
        /// The VM's name.
        name: String,
        /// Its process.
        pid: u32,
    },
    /// It could not be started.
    Failed {
        /// Why, with causes.
        why: String,
        /// The exit code that says so.
        code: u8,
    },
    /// The user typed the escape.
    Left,
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The system.
    #[error("cannot start the VM's own process")]
    Spawn(#[source] io::Error),
    /// It ended without a word.
    #[error("the VM's process ended without a word ({status}); its log is {log}")]
    Silent {
        /// How it ended.
        status: String,
        /// Where it may have said something.
        log: PathBuf,
    },
    /// It said why it could not start.
    #[error("{why}")]
    Failed {
        /// Its words.
        why: String,
        /// The exit code that says so.
        code: u8,
    },
}

/// The VM's side of the reports.
#[derive(Debug)]
pub struct Reporter(File);

impl Reporter {
    /// Takes the descriptor up.
    ///
    /// # Errors
    /// As the system says.
    pub fn open(fd: i32) -> io::Result<Self> {
        // Through /proc, so that no descriptor is taken on trust; ours is close-on-exec, unlike the inherited one.
        File::options().write(true).open(format!("/proc/self/fd/{fd}")).map(Self)
    }

    /// Reports. If nobody listens any more, nobody misses it.
    pub fn report(&mut self, report: &Report) {
        if let Ok(mut line) = serde_json::to_vec(report) {
            line.push(b'\n');
            let _ = self.0.write_all(&line);
        }
    }
}

/// In the VM's process: leaves the user's terminal.
#[derive(Debug)]
pub struct LeaveTerminal(pub Reporter);

impl Leave for LeaveTerminal {
    fn leave(&mut self) {
        let _ = abandon_terminal();
        self.0.report(&Report::Left);
    }
}

/// Cuts every tie to the terminal: its signals and its streams.
///
/// # Errors
/// As the system says.
pub fn abandon_terminal() -> io::Result<()> {
    // EPERM: this process leads its group already, and has no terminal to lose then.
    let _ = rustix::process::setsid();
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

fn spawn(role: &str, name: &str, io: impl FnOnce(&mut Command)) -> io::Result<(Child, PipeReader)> {
    let (reports, writer) = io::pipe()?;
    // The child inherits this end alone.
    rustix::io::fcntl_setfd(&writer, FdFlags::empty())?;
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1));
    command.env(ROLE, format!("{role}:{}", writer.as_raw_fd()));
    command.env(NAME, name);
    io(&mut command);
    Ok((command.spawn()?, reports))
}

/// The environment variable that tells a VM's process the name that was made up for it.
pub const NAME: &str = "PERDURE_NAME";

/// Starts the VM's process without a terminal, its log in `log`, and waits until its vCPUs run.
///
/// # Errors
/// [`LaunchError`].
pub fn detached(name: &str, log: &Path) -> Result<(String, u32), LaunchError> {
    let start = || -> io::Result<(Child, PipeReader)> {
        if let Some(parent) = log.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let log = File::options().append(true).create(true).open(log)?;
        spawn("detached", name, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        })
    };
    let (mut child, reports) = start().map_err(LaunchError::Spawn)?;
    let mut line = String::new();
    BufReader::new(reports.take(1 << 20)).read_line(&mut line).map_err(LaunchError::Spawn)?;
    match serde_json::from_str(&line) {
        Ok(Report::Ready { name, pid }) => Ok((name, pid)),
        Ok(Report::Failed { why, code }) => Err(LaunchError::Failed { why, code }),
        Ok(Report::Left) | Err(_) => {
            let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            Err(LaunchError::Silent { status, log: log.to_owned() })
        }
    }
}

/// How an interactive VM's process was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InteractiveEnd {
    /// The user typed the escape: it goes on without us.
    Left,
    /// It ended with this code.
    Exited(u8),
}

/// Starts the VM's process on the user's terminal, and waits beside it.
///
/// # Errors
/// [`LaunchError::Spawn`].
pub fn interactive(name: &str) -> Result<InteractiveEnd, LaunchError> {
    wait_beside(name).map_err(LaunchError::Spawn)
}

fn wait_beside(name: &str) -> io::Result<InteractiveEnd> {
    let power = PowerSignals::catch()?;
    let _raw = RawTerminal::enter()?;
    let (mut child, reports) = spawn("interactive", name, |_| {})?;
    let mut reports = BufReader::new(reports);
    loop {
        let (signalled, reported) = wait_for(power.descriptor(), reports.get_ref())?;
        if signalled && power.take() {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                let _ = rustix::process::kill_process(pid, Signal::POWER);
            }
        }
        if reported {
            let mut line = String::new();
            match reports.read_line(&mut line)? {
                0 => break,
                _ if serde_json::from_str(&line).is_ok_and(|report: Report| report == Report::Left) => {
                    return Ok(InteractiveEnd::Left);
                }
                _ => {}
            }
        }
    }
    let status = child.wait()?;
    if let Some(signal) = status.signal() {
        tracing::error!("the VM's process was killed by signal {signal}");
    }
    Ok(InteractiveEnd::Exited(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

fn wait_for(power: BorrowedFd<'_>, reports: &PipeReader) -> io::Result<(bool, bool)> {
    let mut fds = [PollFd::from_borrowed_fd(power, PollFlags::IN), PollFd::new(reports, PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty()))
}
