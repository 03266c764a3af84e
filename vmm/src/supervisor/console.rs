//! The guest's console as people see it: a terminal, a file, attached clients; and bytes on their way. In the guest it is a serial port, and a virtio
//! console where the VM has one ([`hvc`]).
//!
//! Output never blocks a vCPU for longer than its reader does, and never blocks a freeze: what a slow reader has not
//! taken waits in a bounded queue, a full queue holds the guest's CPU back (as flow control would), and a freeze takes
//! the queue into the context. So no byte is lost at an outage, and none comes twice.

mod hvc;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use super::wake::Wake;
use crate::machine::config::{ConsoleDevice, SerialTarget, VmConfig};
use crate::persistence::context::ConsoleStateV1;
use hvc::Hvc;

/// How much output may wait for a slow reader, in bytes. What waits at a freeze must fit into the context.
const PENDING_MOST: usize = 256 << 10;
/// How much input may wait for the guest, in bytes; likewise.
const INPUT_MOST: usize = 64 << 10;
/// How much of the past a new client is shown, in bytes.
const HISTORY_MOST: usize = 64 << 10;
/// Written at once: no more than a pipe takes without blocking when it says that it is writable (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// Where output goes.
#[derive(Debug)]
enum Sink {
    Nowhere,
    Terminal(OwnedFd),
    File { file: File, path: PathBuf },
}

#[derive(Debug)]
struct Lines {
    sink: Sink,
    pending: VecDeque<u8>,
    input: VecDeque<u8>,
    history: VecDeque<u8>,
    clients: Vec<UnixStream>,
    /// A pause has been asked for: output must not wait now.
    hurry: bool,
    /// Whoever writes on what a slow reader left.
    wake: Option<Arc<Wake>>,
    /// The guest's virtio console.
    hvc: Option<Hvc>,
}

/// The serial line's far end. Clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    lines: Arc<Mutex<Lines>>,
    room: Arc<Condvar>,
}

/// Why a console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be opened.
    #[error("cannot open {path} for the serial port's output")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The terminal cannot be used.
    #[error("cannot use standard output for the serial port")]
    Terminal(#[source] io::Error),
    /// The device cannot be joined to it.
    #[error("cannot join the console to its device")]
    Device(#[source] io::Error),
    /// The output cannot be made durable.
    #[error("cannot make the serial output in {path} durable")]
    Sync {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Console {
    fn over(sink: Sink) -> Self {
        let lines = Lines {
            sink,
            pending: VecDeque::new(),
            input: VecDeque::new(),
            history: VecDeque::new(),
            clients: Vec::new(),
            hurry: false,
            wake: None,
            hvc: None,
        };
        Self { lines: Arc::new(Mutex::new(lines)), room: Arc::new(Condvar::new()) }
    }

    /// The console of a VM made of `config`, which `resumes` or boots. When output waits for a slow reader, `wake` rings, so that
    /// [`Console::drain`] is called.
    pub(super) fn open(
        config: &VmConfig,
        has_terminal: bool,
        wake: &Arc<Wake>,
        resumes: bool,
    ) -> Result<Self, ConsoleError> {
        let console = match &config.serial {
            SerialTarget::Stdio if has_terminal => Self::terminal()?,
            SerialTarget::Stdio | SerialTarget::None => Self::detached(),
            SerialTarget::File(path) => Self::file(path)?,
        };
        console.lines().wake = Some(Arc::clone(wake));
        if config.console == ConsoleDevice::Virtio {
            console.join_hvc(resumes)?;
        }
        Ok(console)
    }

    /// A console that only clients see.
    #[must_use]
    pub fn detached() -> Self {
        Self::over(Sink::Nowhere)
    }

    /// A console on standard output.
    ///
    /// # Errors
    /// [`ConsoleError::Terminal`].
    pub fn terminal() -> Result<Self, ConsoleError> {
        let fd = rustix::io::dup(rustix::stdio::stdout()).map_err(|error| ConsoleError::Terminal(error.into()))?;
        Ok(Self::over(Sink::Terminal(fd)))
    }

    /// A console that appends to a file.
    ///
    /// # Errors
    /// [`ConsoleError::Open`].
    pub fn file(path: &Path) -> Result<Self, ConsoleError> {
        let open = File::options().append(true).create(true).open(path);
        let file = open.map_err(|source| ConsoleError::Open { path: path.to_owned(), source })?;
        Ok(Self::over(Sink::File { file, path: path.to_owned() }))
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a client: it is shown the recent past and then all output. A client that does not read is dropped.
    pub fn attach(&self, client: UnixStream) {
        if client.set_nonblocking(true).is_err() {
            return;
        }
        let mut lines = self.lines();
        let past: Vec<u8> = lines.history.iter().copied().collect();
        let mut client = client;
        if client.write_all(&past).is_ok() {
            lines.clients.push(client);
        }
    }

    /// Takes the terminal away: output goes to clients alone from now on.
    pub fn leave_terminal(&self) {
        let mut lines = self.lines();
        lines.sink = Sink::Nowhere;
        lines.ring();
    }

    /// Takes what was typed; returns how much there was room for.
    #[must_use]
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut lines = self.lines();
        let room = (INPUT_MOST - lines.input.len().min(INPUT_MOST)).min(bytes.len());
        lines.input.extend(&bytes[..room]);
        lines.ring();
        room
    }

    /// Offers waiting input to `take`, which says how much of it it took. Whether any is left.
    pub fn offer_input(&self, take: impl FnOnce(&[u8]) -> usize) -> bool {
        let waiting: Vec<u8> = self.lines().input.iter().copied().collect();
        if waiting.is_empty() {
            return false;
        }
        // Without our lock: `take` waits for the serial port's, and a CPU that prints holds that and waits for ours.
        // Input is taken by the supervisor alone, so what waited is still in front.
        let taken = take(&waiting);
        let mut lines = self.lines();
        lines.input.drain(..taken.min(waiting.len()));
        !lines.input.is_empty()
    }

    /// Writes on what a slow reader left. Whether any is left still.
    #[must_use]
    pub fn drain(&self) -> bool {
        let mut lines = self.lines();
        let left = lines.drain();
        lines.let_hvc_go_on();
        drop(lines);
        self.room.notify_all();
        left
    }

    /// While `hurry` holds, output does not wait for a slow reader: vCPUs are about to be stopped.
    pub fn set_hurry(&self, hurry: bool) {
        self.lines().hurry = hurry;
        self.room.notify_all();
    }

    /// The bytes under way.
    #[must_use]
    pub fn save(&self) -> ConsoleStateV1 {
        let lines = self.lines();
        ConsoleStateV1 { input: lines.input.iter().copied().collect(), output: lines.pending.iter().copied().collect() }
    }

    /// Takes over bytes under way at the freeze.
    pub fn restore(&self, state: &ConsoleStateV1) {
        let ConsoleStateV1 { input, output } = state;
        let mut lines = self.lines();
        lines.input = input.iter().copied().collect();
        lines.emit(output);
        lines.release_hvc();
    }

    /// Makes output durable that went to a file.
    ///
    /// # Errors
    /// [`ConsoleError::Sync`].
    pub fn persist(&self) -> Result<(), ConsoleError> {
        match &self.lines().sink {
            Sink::File { file, path } => {
                file.sync_data().map_err(|source| ConsoleError::Sync { path: path.clone(), source })
            }
            Sink::Nowhere | Sink::Terminal(_) => Ok(()),
        }
    }

    /// The serial port's side of the line.
    #[must_use]
    pub fn output(&self) -> ConsoleOutput {
        ConsoleOutput(self.clone())
    }
}

impl Lines {
    /// Shows new output to everyone.
    fn emit(&mut self, bytes: &[u8]) {
        self.history.extend(bytes);
        let excess = self.history.len().saturating_sub(HISTORY_MOST);
        self.history.drain(..excess);
        self.clients.retain_mut(|client| client.write_all(bytes).is_ok());
        if !matches!(self.sink, Sink::Nowhere) {
            self.pending.extend(bytes);
            if self.drain()
                && let Some(wake) = &self.wake
            {
                wake.ring();
            }
        }
    }

    /// Writes what the sink takes without waiting. Whether any is left.
    fn drain(&mut self) -> bool {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            let chunk = &front[..front.len().min(CHUNK)];
            let written = match &mut self.sink {
                Sink::Nowhere => Ok(chunk.len()),
                Sink::File { file, .. } => file.write(chunk),
                Sink::Terminal(fd) if is_writable(fd.as_fd()) => rustix::io::write(fd, chunk).map_err(Into::into),
                Sink::Terminal(_) => return true,
            };
            match written {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    tracing::warn!("standard output was closed: serial output goes to `perdure console` alone");
                    self.sink = Sink::Nowhere;
                }
                Err(error) => {
                    // A full disk: what waits goes into the context at a freeze.
                    tracing::debug!("serial output waits: {error}");
                    return true;
                }
            }
        }
        false
    }
}

fn is_writable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) && fds[0].revents().contains(PollFlags::OUT)
}

/// The serial port's side of the line.
#[derive(Debug)]
pub struct ConsoleOutput(Console);

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lines();
        lines.emit(bytes);
        // Flow control: the CPU that writes waits here, in steps short enough to notice a reader by ourselves.
        while lines.pending.len() > PENDING_MOST && !lines.hurry {
            let waited = self.0.room.wait_timeout(lines, Duration::from_millis(10));
            lines = waited.unwrap_or_else(PoisonError::into_inner).0;
            lines.drain();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn output_reaches_the_file_and_grows_it() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        std::fs::write(&path, "before ").unwrap();
        let console = Console::file(&path).unwrap();
        console.output().write_all(b"after").unwrap();
        console.persist().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before after");
    }

    #[test]
    fn a_client_sees_the_past_and_then_the_present() {
        let console = Console::detached();
        console.output().write_all(b"past ").unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        console.attach(theirs);
        console.output().write_all(b"present").unwrap();
        let mut seen = [0; 12];
        ours.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"past present");
    }

    #[test]
    fn input_waits_until_the_guest_takes_it() {
        let console = Console::detached();
        assert_eq!(console.type_in(b"hello"), 5);
        assert!(console.offer_input(|bytes| bytes.len().min(2)));
        assert_eq!(console.save().input, b"llo");
        assert!(!console.offer_input(<[u8]>::len));
    }

    #[test]
    fn input_beyond_the_bound_is_left_to_the_sender() {
        let console = Console::detached();
        assert_eq!(console.type_in(&vec![b'x'; INPUT_MOST + 10]), INPUT_MOST);
        assert_eq!(console.type_in(b"y"), 0);
    }

    #[test]
    fn bytes_under_way_survive_a_freeze_once() {
        let state = ConsoleStateV1 { input: b"in".to_vec(), output: b"out".to_vec() };
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let console = Console::file(&path).unwrap();
        console.restore(&state);
        assert_eq!(std::fs::read(&path).unwrap(), b"out");
        assert_eq!(console.save(), ConsoleStateV1 { input: b"in".to_vec(), output: Vec::new() });
    }
}
