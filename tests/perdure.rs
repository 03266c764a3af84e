//! Drives the `perdure` binary as a user does: a pool of its own, a time limit on everything, and no process left behind.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

pub use rustix::process::Signal;

/// What a command may take that runs no guest for long.
pub const LIMIT: Duration = Duration::from_secs(180);

/// The binary and a pool. Dropped, every VM that runs from this pool is killed and the pool removed.
pub struct Perdure {
    binary: PathBuf,
    pool: PathBuf,
    _own: Option<TempDir>,
}

/// A command's end.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The arguments it was given, for messages.
    pub arguments: String,
    /// Exit status, or none when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote to stdout; a guest's console may be any bytes, what is not UTF-8 is replaced.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Ended {
    /// Asserts the exit status, and passes the rest on.
    ///
    /// # Panics
    ///
    /// When it is another, with both outputs.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(
            self.code == Some(code),
            "perdure {}: wanted status {code}, got {:?} (signal {:?})\n--- stdout\n{}\n--- stderr\n{}",
            self.arguments,
            self.code,
            self.signal,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Asserts that stdout is one JSON document, and returns it.
    ///
    /// # Panics
    ///
    /// When it is not.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| {
            panic!("perdure {}: stdout is not JSON ({error}):\n{}", self.arguments, self.stdout)
        })
    }
}

impl Perdure {
    /// With a fresh pool, in the directory for temporary files (`TMPDIR`).
    ///
    /// # Panics
    ///
    /// When there is no binary, see [`binary`].
    #[expect(clippy::new_without_default, reason = "it makes a directory: not a default value")]
    pub fn new() -> Self {
        let own = tempfile::Builder::new().prefix("perdure-pool-").tempdir().expect("a temporary directory");
        Self { binary: binary(), pool: own.path().join("pool"), _own: Some(own) }
    }

    /// On a pool that is there, or whose directory the test looks after.
    ///
    /// # Panics
    ///
    /// When there is no binary, see [`binary`].
    pub fn on(pool: &Path) -> Self {
        Self { binary: binary(), pool: pool.to_owned(), _own: None }
    }

    /// The pool's directory. The first command makes it.
    pub fn pool(&self) -> &Path {
        &self.pool
    }

    /// A command on this pool, for what the methods below do not cover. The pool goes by `PERDURE_POOL`, so arguments
    /// may say `--pool` themselves.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("PERDURE_POOL", &self.pool).env_remove("PERDURE_LOG");
        command
    }

    /// Runs to the end, stdin empty.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`LIMIT`].
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.run_within(LIMIT, arguments)
    }

    /// Runs to the end, stdin empty.
    ///
    /// # Panics
    ///
    /// When that takes longer than `limit`.
    #[track_caller]
    pub fn run_within(&self, limit: Duration, arguments: &[&str]) -> Ended {
        let mut running = self.spawn(arguments);
        running.close_stdin();
        running.wait(limit)
    }

    /// Starts a command and leaves it running, its stdin a pipe.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[track_caller]
    pub fn spawn(&self, arguments: &[&str]) -> Running {
        Running::start(&mut self.command(arguments), arguments.join(" "))
    }

    /// The process ids that `list --json` tells of; empty when it tells nothing.
    pub fn pids(&self) -> Vec<i32> {
        let list = self.command(&["list", "--json"]).stdin(Stdio::null()).stderr(Stdio::null()).output();
        let document = list.ok().and_then(|output| serde_json::from_slice(&output.stdout).ok());
        let mut pids = Vec::new();
        collect_pids(&document.unwrap_or_default(), &mut pids);
        pids
    }
}

impl Drop for Perdure {
    fn drop(&mut self) {
        for pid in self.pids() {
            // A stale id may be another's by now: only what runs our binary is killed.
            let ours = std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == self.binary);
            if ours {
                signal(pid, Signal::KILL);
            }
        }
    }
}

fn collect_pids(value: &serde_json::Value, pids: &mut Vec<i32>) {
    match value {
        serde_json::Value::Array(items) => items.iter().for_each(|item| collect_pids(item, pids)),
        serde_json::Value::Object(fields) => {
            let pid = fields.get("pid").and_then(serde_json::Value::as_i64);
            pids.extend(pid.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 0));
            fields.values().for_each(|field| collect_pids(field, pids));
        }
        _ => {}
    }
}

/// Sends a signal; a process that is gone already is no error.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The binary under test: `PERDURE_BIN`, else the newer of `release/perdure` and `debug/perdure` beside this test.
///
/// # Panics
///
/// When there is none; it is not built by `cargo test` of another package.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("PERDURE_BIN") {
        let path = PathBuf::from(path);
        return path.canonicalize().unwrap_or_else(|error| panic!("PERDURE_BIN={}: {error}", path.display()));
    }
    let test = std::env::current_exe().expect("a running program has a path");
    let built = |path: &PathBuf| path.metadata().and_then(|found| found.modified()).ok();
    let newest = test
        .ancestors()
        .skip(1)
        .take(3)
        .flat_map(|directory| ["release", "debug"].map(|profile| directory.join(profile).join("perdure")))
        .filter_map(|path| Some((built(&path)?, path)))
        .max_by_key(|(time, _): &(SystemTime, PathBuf)| *time);
    let Some((_, path)) = newest else {
        panic!("no perdure binary beside {}: cargo build --release first, or set PERDURE_BIN", test.display())
    };
    path
}

/// A command that runs. Dropped, it is killed.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Stream,
    stderr: Stream,
    arguments: String,
    begun: Instant,
}

impl Running {
    /// Starts any command with its three streams as pipes; `title` names it in messages.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[track_caller]
    pub fn start(command: &mut Command, title: String) -> Self {
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("running {}: {error}", command.get_program().display()));
        let stdout = Stream::follow(child.stdout.take().expect("stdout is a pipe"));
        let stderr = Stream::follow(child.stderr.take().expect("stderr is a pipe"));
        Self { stdin: child.stdin.take(), child, stdout, stderr, arguments: title, begun }
    }

    /// The process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are below 2^22")
    }

    /// Sends a signal.
    pub fn signal(&self, which: Signal) {
        signal(self.pid(), which);
    }

    /// Types into it.
    ///
    /// # Panics
    ///
    /// When its stdin is closed.
    #[track_caller]
    pub fn type_in(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin
            .write_all(bytes)
            .and_then(|()| stdin.flush())
            .unwrap_or_else(|error| panic!("typing into perdure: {error}"));
    }

    /// Whether it has read all that was typed.
    ///
    /// # Panics
    ///
    /// When its stdin is closed.
    pub fn has_taken_its_input(&self) -> bool {
        let stdin = self.stdin.as_ref().expect("stdin is open");
        rustix::io::ioctl_fionread(stdin).expect("a pipe tells how much is in it") == 0
    }

    /// Ends its input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// What it wrote to stdout so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it wrote to stdout, once nothing is added for a while: of a guest that does not run.
    ///
    /// # Panics
    ///
    /// When it does not come to an end.
    #[track_caller]
    pub fn settled_stdout(&self) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            let before = self.stdout();
            std::thread::sleep(Duration::from_millis(200));
            if self.stdout() == before {
                return before;
            }
            assert!(Instant::now() < deadline, "perdure {}: its output does not end: {before}", self.arguments);
        }
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until stdout contains `pattern`; returns all of it.
    ///
    /// # Panics
    ///
    /// When it does not within `limit`, or ends without it.
    #[track_caller]
    pub fn wait_for(&self, pattern: &str, limit: Duration) -> String {
        self.wait_until(&format!("{pattern:?}"), limit, |stdout| stdout.contains(pattern))
    }

    /// Waits until `done` is true of stdout; returns all of it. `what` names it in the message.
    ///
    /// # Panics
    ///
    /// When it is not within `limit`, or it ends before.
    #[track_caller]
    pub fn wait_until(&self, what: &str, limit: Duration, done: impl Fn(&str) -> bool) -> String {
        match self.stdout.wait(limit, done) {
            Ok(text) => text,
            Err(text) => panic!(
                "perdure {}: no {what} on stdout within {limit:?}\n--- stdout\n{text}\n--- stderr\n{}",
                self.arguments,
                self.stderr()
            ),
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When it does not end within `limit`.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> Ended {
        let deadline = Instant::now() + limit;
        let status: ExitStatus = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(None) => panic!(
                    "perdure {}: still running after {limit:?}\n--- stdout\n{}\n--- stderr\n{}",
                    self.arguments,
                    self.stdout(),
                    self.stderr()
                ),
                Err(error) => panic!("waiting for perdure {}: {error}", self.arguments),
            }
        };
        let took = self.begun.elapsed();
        Ended {
            arguments: self.arguments.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout.end(),
            stderr: self.stderr.end(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An output, read by a thread as it comes.
struct Stream {
    shared: Arc<(Mutex<Seen>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

/// How long a stream may stay open after its process ended. A detached VM that kept it would hold it for ever.
const STREAM_GRACE: Duration = Duration::from_secs(5);

impl Stream {
    fn follow(mut pipe: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 65536];
            loop {
                let count = pipe.read(&mut chunk).unwrap_or(0);
                let mut seen = seen(&writer.0);
                seen.bytes.extend_from_slice(&chunk[..count]);
                seen.ended = count == 0;
                writer.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Self { shared, reader: Some(reader) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&seen(&self.shared.0).bytes).into_owned()
    }

    fn wait(&self, limit: Duration, done: impl Fn(&str) -> bool) -> Result<String, String> {
        let deadline = Instant::now() + limit;
        let mut guard = seen(&self.shared.0);
        loop {
            let text = String::from_utf8_lossy(&guard.bytes).into_owned();
            if done(&text) {
                return Ok(text);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if guard.ended || left.is_zero() {
                return Err(text);
            }
            guard = self.shared.1.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end(&mut self) -> String {
        let deadline = Instant::now() + STREAM_GRACE;
        let mut guard = seen(&self.shared.0);
        while !guard.ended && Instant::now() < deadline {
            guard = self.shared.1.wait_timeout(guard, STREAM_GRACE).unwrap_or_else(PoisonError::into_inner).0;
        }
        let open = !guard.ended;
        drop(guard);
        assert!(!open, "the process ended, but something it left behind still holds its output open");
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.text()
    }
}

fn seen(mutex: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
