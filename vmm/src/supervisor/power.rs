//! Power-fail signals, and the clock of the hold-up.
//!
//! The warning comes as `SIGPWR` (what an init system or a UPS daemon sends), as `SIGTERM`, `SIGINT` or `SIGHUP` (a host
//! that shuts down, a terminal that goes), or over the control socket. The hold-up is the time from the warning to
//! darkness. Where it is given, darkness is simulated honestly: when it ends, the process is killed, done or not.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::machine::jail::{self, Role};

/// `SIGPWR`: power failure (System V; Linux signal 30 on x86).
pub const SIGPWR: i32 = libc::SIGPWR;

/// The signals that mean "power is going", as something to poll.
#[derive(Debug)]
pub struct PowerSignals {
    reader: UnixStream,
}

impl PowerSignals {
    /// Catches the signals from now on.
    ///
    /// # Errors
    /// As the system says.
    pub fn catch() -> std::io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        for signal in [SIGPWR, SIGTERM, SIGINT, SIGHUP] {
            pipe::register(signal, writer.try_clone()?)?;
        }
        Ok(Self { reader })
    }

    /// For `poll`: readable when a signal has come.
    #[must_use]
    pub fn descriptor(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.reader)
    }

    /// Whether a signal has come since the last call.
    #[must_use]
    pub fn take(&self) -> bool {
        let mut buffer = [0; 64];
        let mut came = false;
        while matches!(std::io::Read::read(&mut &self.reader, &mut buffer), Ok(1..)) {
            came = true;
        }
        came
    }
}

/// The time between a power-fail signal and darkness.
#[derive(Debug, Clone, Copy)]
pub struct HoldUp {
    started: Instant,
    length: Option<Duration>,
}

impl HoldUp {
    /// Begins now. `None`: darkness comes when it comes.
    #[must_use]
    pub fn begin(length: Option<Duration>) -> Self {
        Self { started: Instant::now(), length }
    }

    /// When the signal came.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// What is left of it; `None` if its length is not known.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.length.map(|length| length.saturating_sub(self.started.elapsed()))
    }

    /// Arms darkness: the process is killed when the hold-up ends, whatever it is doing, unless the guard is dropped
    /// before.
    #[must_use]
    pub fn arm(&self) -> Darkness {
        let Some(length) = self.length else { return Darkness(None) };
        let deadline = self.started + length;
        let (disarm, armed) = std::sync::mpsc::channel::<()>();
        let spawned = jail::spawn("hold-up", Role::HoldUp, move || {
            let left = deadline.saturating_duration_since(Instant::now());
            if armed.recv_timeout(left) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                go_dark();
            }
        });
        if let Err(error) = spawned {
            tracing::warn!("the end of the hold-up cannot be simulated: {error}");
        }
        Darkness(Some(disarm))
    }
}

/// Darkness that is due; dropping this calls it off.
#[derive(Debug)]
pub struct Darkness(#[expect(dead_code, reason = "its drop closes the channel")] Option<std::sync::mpsc::Sender<()>>);

/// The end of the power: nothing of this process goes on, no destructor runs.
pub fn go_dark() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_up_runs_out() {
        let hold_up = HoldUp::begin(Some(Duration::ZERO));
        assert_eq!(hold_up.left(), Some(Duration::ZERO));
        assert_eq!(HoldUp::begin(None).left(), None);
        assert!(HoldUp::begin(Some(Duration::from_secs(60))).left() > Some(Duration::from_secs(59)));
    }

    #[test]
    fn darkness_called_off_does_not_come() {
        let hold_up = HoldUp::begin(Some(Duration::from_millis(5)));
        drop(hold_up.arm());
        std::thread::sleep(Duration::from_millis(20));
    }
}
