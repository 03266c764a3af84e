//! The control socket: how other commands speak to a running VM.
//!
//! A UNIX socket `<pool>/run/<name>.sock`, mode 0600. A client writes one line, a [`Request`] in JSON, and gets one line,
//! a [`Response`]; after `console` the connection carries the serial line itself. There is no daemon: the socket belongs
//! to the VM's own process, and a socket that nobody answers is a leftover.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};

use super::console::Console;
use super::generations::GenerationsStatus;
use crate::machine::config::VmConfig;
use crate::machine::jail::{self, Role};
use crate::machine::virtio::balloon::BalloonStatus;
use crate::persistence::capture::CaptureReport;
use crate::persistence::freeze::FreezeReport;
use crate::persistence::holdup::HoldUpStatus;
use crate::persistence::lifecycle::State;
use crate::persistence::paging::PagedStatus;
use crate::persistence::restoring::RestoringStatus;

/// A longer line is not a request.
const LINE_MOST: u64 = 4096;
/// How long either side waits for a line of the other.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How is the VM?
    Status,
    /// The power is going. With `holdup_ns` it goes after that many nanoseconds, whatever the VMM does.
    PowerFail {
        /// From the arrival of this request to darkness.
        holdup_ns: Option<u64>,
    },
    /// The power came back.
    PowerBack,
    /// Take a generation. Answered by any number of [`Response::Progress`], and then when it is durable.
    Snapshot {
        /// A name for it.
        label: Option<String>,
        /// Retention is not to delete it.
        protect: bool,
    },
    /// Stop its vCPUs until [`Request::Unpause`].
    Pause,
    /// Let its vCPUs run on.
    Unpause,
    /// Press the power button: the guest is to turn itself off. Refused if it does not listen.
    PressPowerButton,
    /// Make its memory balloon so large.
    Balloon {
        /// Of the guest's memory.
        bytes: u64,
    },
    /// Turn the VM off, as if its power button were held.
    Stop,
    /// Join this connection to the serial line.
    Console,
}

/// What it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// The answer to [`Request::Status`].
    Status(Box<Status>),
    /// All is durable.
    Frozen(Box<FreezeReport>),
    /// How far a generation is: of `total` pages `done` are copied.
    Progress {
        /// Pages copied.
        done: u64,
        /// Pages in all.
        total: u64,
    },
    /// The generation is durable.
    Snapshot(Box<CaptureReport>),
    /// Done.
    Done,
    /// It cannot be.
    Refused {
        /// Why.
        why: String,
    },
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is in its life.
    pub state: State,
    /// Its process.
    pub pid: u32,
    /// What it is made of.
    pub config: VmConfig,
    /// How long its process has had it, in seconds.
    pub up_seconds: u64,
    /// The last value that the guest reported through its report port.
    pub report: u64,
    /// Whether a user paused it.
    pub paused: bool,
    /// How far its memory is restored; `None` if all is there.
    #[serde(default)]
    pub restoring: Option<RestoringStatus>,
    /// Where its memory is; `None` if all of it is RAM.
    #[serde(default)]
    pub paged: Option<PagedStatus>,
    /// How it keeps within its hold-up, if it has one.
    #[serde(default)]
    pub holdup: Option<HoldUpStatus>,
    /// Its memory balloon, if it has one.
    #[serde(default)]
    pub balloon: Option<BalloonStatus>,
    /// How its generations fare.
    pub generations: GenerationsStatus,
}

/// A request on its way to the supervisor.
#[derive(Debug)]
pub struct Pending {
    /// What is asked.
    pub request: Request,
    /// For the answer.
    pub reply: Reply,
}

/// The way back to who asked.
#[derive(Debug)]
pub struct Reply(UnixStream);

impl Reply {
    /// Answers. It is with the system when this returns, so that the process may end then. Who has hung up misses it.
    pub fn send(&self, response: &Response) {
        let _ = write_line(&self.0, response);
    }
}

/// Why the control socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It cannot be made.
    #[error("cannot make the control socket {path}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody answers.
    #[error("no VM answers at {path}: it is not running")]
    Nobody {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the VM at {path} broke off: its process may just have ended")]
    Broken {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It answered something else.
    #[error("the VM at {path} gave an answer that this perdure does not understand; is it of another version?")]
    Garbled {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// Where the socket of a VM lies.
#[must_use]
pub fn socket_path(pool: &Path, name: &str) -> PathBuf {
    pool.join("run").join(format!("{name}.sock"))
}

/// A way to the socket that is short enough for a socket address (108 bytes), however deep the pool lies.
fn short_way(path: &Path) -> io::Result<(File, PathBuf)> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let directory = File::open(parent)?;
    let name = path.file_name().unwrap_or_default();
    let way = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    Ok((directory, way))
}

/// The VM's side. Dropping it removes the socket.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
}

impl ControlServer {
    /// Makes the socket and answers on it from a thread of its own; requests arrive at `inbox`, each announced by `notify`.
    /// The VM's lease must be held: a socket that is there already is a leftover then.
    ///
    /// # Errors
    /// [`ControlError::Bind`].
    pub fn start(
        path: PathBuf,
        console: Console,
        inbox: mpsc::Sender<Pending>,
        notify: impl Fn(&Request) + Send + Sync + 'static,
    ) -> Result<Self, ControlError> {
        let listener = bind(&path).map_err(|source| ControlError::Bind { path: path.clone(), source })?;
        let notify = Arc::new(notify);
        let serve = move || {
            for connection in listener.incoming().flatten() {
                match receive(&connection) {
                    Some(Request::Console) => {
                        let (console, notify) = (console.clone(), Arc::clone(&notify));
                        let join = move || join_console(&connection, &console, &|| notify(&Request::Console));
                        let _ = jail::spawn("console", Role::Control, join);
                    }
                    Some(request) => {
                        if inbox.send(Pending { request: request.clone(), reply: Reply(connection) }).is_err() {
                            return;
                        }
                        notify(&request);
                    }
                    None => {}
                }
            }
        };
        jail::spawn("control", Role::Control, serve)
            .map_err(|source| ControlError::Bind { path: path.clone(), source })?;
        Ok(Self { path })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (_directory, way) = short_way(path)?;
    let listener = UnixListener::bind(way)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Reads the request of a new connection. What is not one is answered here.
fn receive(connection: &UnixStream) -> Option<Request> {
    connection.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    connection.set_write_timeout(Some(Duration::from_secs(1))).ok()?;
    match read_line::<Request>(connection) {
        Ok(request) => Some(request),
        Err(error) => {
            let _ = write_line(connection, &Response::Refused { why: format!("not a request: {error}") });
            None
        }
    }
}

/// Joins a client to the serial line until it hangs up. `typed` is called when there is input for the guest.
fn join_console(mut connection: &UnixStream, console: &Console, typed: &dyn Fn()) {
    let joined = write_line(connection, &Response::Done).and_then(|()| connection.try_clone());
    let Ok(output) = joined else { return };
    console.attach(output);
    let mut buffer = [0; 512];
    loop {
        let mut fds = [PollFd::new(connection, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None).map(|_| connection.read(&mut buffer)) {
            Ok(Ok(0)) => return,
            Ok(Ok(count)) => type_all(console, &buffer[..count], typed),
            Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(rustix::io::Errno::INTR) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// Types everything, at the pace at which the guest reads.
fn type_all(console: &Console, mut bytes: &[u8], typed: &dyn Fn()) {
    while !bytes.is_empty() {
        let taken = console.type_in(bytes);
        typed();
        bytes = &bytes[taken..];
        if taken == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn read_line<T: serde::de::DeserializeOwned>(connection: &UnixStream) -> io::Result<T> {
    let mut line = String::new();
    // One byte a read: what follows the line belongs to whoever takes the connection over.
    let mut reader = BufReader::with_capacity(1, connection.take(LINE_MOST));
    reader.read_line(&mut line)?;
    if !line.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_str(&line).map_err(Into::into)
}

fn write_line<T: Serialize>(mut connection: &UnixStream, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    connection.write_all(&line)
}

/// A client's side.
#[derive(Debug)]
pub struct ControlClient {
    path: PathBuf,
    connection: UnixStream,
}

impl ControlClient {
    /// Connects to the VM `name` of a pool.
    ///
    /// # Errors
    /// [`ControlError::Nobody`].
    pub fn connect(pool: &Path, name: &str) -> Result<Self, ControlError> {
        let path = socket_path(pool, name);
        let connect = || -> io::Result<UnixStream> {
            let (_directory, way) = short_way(&path)?;
            let connection = UnixStream::connect(way)?;
            connection.set_read_timeout(Some(PATIENCE))?;
            Ok(connection)
        };
        match connect() {
            Ok(connection) => Ok(Self { path, connection }),
            Err(source) => Err(ControlError::Nobody { path, source }),
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`ControlError::Broken`], [`ControlError::Garbled`].
    pub fn ask(&self, request: &Request) -> Result<Response, ControlError> {
        write_line(&self.connection, request).map_err(|source| self.broken(source))?;
        self.answer()
    }

    /// Asks for something that takes as long as it takes: `progress` hears how far it is, pages done and pages in all.
    ///
    /// # Errors
    /// As [`ControlClient::ask`].
    pub fn ask_patiently(
        &self,
        request: &Request,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Response, ControlError> {
        // A process that is gone closes the connection; one that is there may wait for a slow disk.
        self.connection.set_read_timeout(None).map_err(|source| self.broken(source))?;
        let mut response = self.ask(request)?;
        while let Response::Progress { done, total } = response {
            progress(done, total);
            response = self.answer()?;
        }
        Ok(response)
    }

    fn broken(&self, source: io::Error) -> ControlError {
        ControlError::Broken { path: self.path.clone(), source }
    }

    fn answer(&self) -> Result<Response, ControlError> {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            (&self.connection).read_exact(&mut byte).map_err(|source| self.broken(source))?;
            line.push(byte[0]);
        }
        serde_json::from_slice(&line).map_err(|source| ControlError::Garbled { path: self.path.clone(), source })
    }

    /// The connection itself, after `console`.
    #[must_use]
    pub fn into_connection(self) -> UnixStream {
        self.connection
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(pool: &Path, name: &str) -> (ControlServer, mpsc::Receiver<Pending>) {
        let (sender, inbox) = mpsc::channel();
        (ControlServer::start(socket_path(pool, name), Console::detached(), sender, |_| {}).unwrap(), inbox)
    }

    #[test]
    fn a_question_gets_its_answer_however_deep_the_pool_lies() {
        let directory = tempfile::tempdir().unwrap();
        let pool = directory.path().join("x".repeat(200));
        fs::create_dir(&pool).unwrap();
        let (_server, inbox) = serve(&pool, "vm");
        let answerer = std::thread::spawn(move || {
            let pending = inbox.recv().unwrap();
            assert_eq!(pending.request, Request::PowerFail { holdup_ns: Some(7) });
            pending.reply.send(&Response::Done);
        });
        let client = ControlClient::connect(&pool, "vm").unwrap();
        assert_eq!(client.ask(&Request::PowerFail { holdup_ns: Some(7) }).unwrap(), Response::Done);
        answerer.join().unwrap();
    }

    #[test]
    fn garbage_is_refused_and_the_next_question_answered() {
        let directory = tempfile::tempdir().unwrap();
        let (_server, inbox) = serve(directory.path(), "vm");
        let mut liar = ControlClient::connect(directory.path(), "vm").unwrap().into_connection();
        liar.write_all(b"{\"request\":\"explode\"}\n").unwrap();
        let mut answer = String::new();
        BufReader::new(&liar).read_line(&mut answer).unwrap();
        assert!(answer.contains("not a request"), "{answer}");
        let client = ControlClient::connect(directory.path(), "vm").unwrap();
        let asking = std::thread::spawn(move || client.ask(&Request::PowerBack).unwrap());
        inbox.recv().unwrap().reply.send(&Response::Done);
        assert_eq!(asking.join().unwrap(), Response::Done);
    }

    #[test]
    fn nobody_answers_at_a_leftover() {
        let directory = tempfile::tempdir().unwrap();
        let (server, _inbox) = serve(directory.path(), "vm");
        drop(server);
        let error = ControlClient::connect(directory.path(), "vm").unwrap_err();
        assert!(error.to_string().contains("not running"), "{error}");
    }
}
