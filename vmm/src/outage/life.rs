//! A VM's process, as the simulator sees it: what it prints, and when; how it ends.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfs::cut::RECORD;
use vfs::cut::point::{CUT_AT, CutAt, FAULT, Fault};

use super::OutageError;
use super::interrupt::Interrupt;
use crate::supervisor::launch;

/// How often a wait looks whether it has become pointless.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Of what a guest prints, as much is kept.
const OUTPUT_MOST: usize = 256 << 20;

/// An output, read by a thread as it comes.
#[derive(Debug, Default)]
struct Stream {
    seen: Mutex<Seen>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    first: Option<Instant>,
    ended: bool,
}

impl Stream {
    fn follow(mut pipe: impl Read + Send + 'static) -> (Arc<Self>, JoinHandle<()>) {
        let stream = Arc::new(Self::default());
        let writer = Arc::clone(&stream);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 16 << 10];
            loop {
                let count = pipe.read(&mut chunk).unwrap_or(0);
                let mut seen = writer.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.first.get_or_insert_with(Instant::now);
                if seen.bytes.len() < OUTPUT_MOST {
                    seen.bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
                }
                seen.ended = count == 0;
                writer.more.notify_all();
                if seen.ended {
                    return;
                }
            }
        });
        (stream, reader)
    }

    fn text(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&seen.bytes).into_owned()
    }

    /// What has come, as soon as that is `enough`, it is all, or `limit` has passed.
    fn wait_for(
        &self,
        limit: Duration,
        interrupt: &Interrupt,
        enough: impl Fn(&str) -> bool,
    ) -> Result<String, OutageError> {
        let deadline = Instant::now() + limit;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            interrupt.check()?;
            let words = String::from_utf8_lossy(&seen.bytes).into_owned();
            if enough(&words) || seen.ended || Instant::now() > deadline {
                return Ok(words);
            }
            seen = self.more.wait_timeout(seen, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What a process is to suffer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Doom {
    /// Where it is to cut itself off.
    pub(super) cut_at: Option<CutAt>,
    /// What its medium is to do.
    pub(super) fault: Option<Fault>,
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Life {
    child: Child,
    pub(super) begun: Instant,
    output: Arc<Stream>,
    errors: Arc<Stream>,
    readers: Vec<JoinHandle<()>>,
}

/// Whether a process was killed: a cut, of its own or of the simulator's.
pub(super) fn was_cut(status: ExitStatus) -> bool {
    status.signal() == Some(rustix::process::Signal::KILL.as_raw())
}

impl Life {
    /// This very program on `pool`, as a user starts it, with `record` kept.
    pub(super) fn begin(pool: &Path, record: &Path, arguments: &[String], doom: Doom) -> Result<Self, OutageError> {
        let system = |source| OutageError::System { doing: "start a VM's process", source };
        let mut command = Command::new("/proc/self/exe");
        command.arg("--pool").arg(pool).args(arguments);
        command.env(RECORD, record).env_remove(launch::ROLE).env_remove("PERDURE_LOG");
        for (name, value) in
            [(CUT_AT, doom.cut_at.map(|at| at.to_string())), (FAULT, doom.fault.map(|fault| fault.to_string()))]
        {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C is the simulator's, and no warning for the VM.
        command.process_group(0);
        let begun = Instant::now();
        let mut child = command.spawn().map_err(system)?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(system(std::io::ErrorKind::BrokenPipe.into()));
        };
        let (output, reader) = Stream::follow(stdout);
        let (errors, other) = Stream::follow(stderr);
        Ok(Self { child, begun, output, errors, readers: vec![reader, other] })
    }

    /// From its start to its first output; `None` if there was none.
    pub(super) fn first_output(&self) -> Option<Duration> {
        let seen = self.output.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.first.filter(|_| !seen.bytes.is_empty()).map(|first| first - self.begun)
    }

    /// What it printed so far.
    pub(super) fn text(&self) -> String {
        self.output.text()
    }

    /// What it complained of so far.
    pub(super) fn complaints(&self) -> String {
        self.errors.text()
    }

    /// What it complained of, as soon as that is `enough`, or all of it: of two outputs, what was written first may be read last.
    pub(super) fn wait_for_complaints(
        &self,
        limit: Duration,
        interrupt: &Interrupt,
        enough: impl Fn(&str) -> bool,
    ) -> Result<String, OutageError> {
        self.errors.wait_for(limit, interrupt, enough)
    }

    /// How many lines it printed so far.
    pub(super) fn lines(&self) -> usize {
        let seen = self.output.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.bytes.iter().filter(|byte| **byte == b'\n').count()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until `done`, its end, or `limit`. Whether `done`.
    pub(super) fn wait_until(
        &mut self,
        limit: Duration,
        interrupt: &Interrupt,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Result<bool, OutageError> {
        let deadline = Instant::now() + limit;
        loop {
            interrupt.check()?;
            if done(self) {
                return Ok(true);
            }
            if self.ended().is_some() || Instant::now() > deadline {
                return Ok(done(self));
            }
            let seen = self.output.seen.lock().unwrap_or_else(PoisonError::into_inner);
            drop(self.output.more.wait_timeout(seen, LOOK_EVERY));
        }
    }

    /// The end of its power; nothing if it has ended.
    pub(super) fn cut(&mut self) {
        let _ = self.child.kill();
    }

    /// Waits for its end, which is near; all that it printed.
    pub(super) fn end(mut self) -> Result<String, OutageError> {
        let system = |source| OutageError::System { doing: "wait for the end of a VM's process", source };
        self.child.wait().map_err(system)?;
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        Ok(self.output.text())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn words_that_come_late_are_waited_for_and_not_beyond_the_end() {
        let interrupt = Interrupt::listen().unwrap();
        let (pipe, mut writer) = std::io::pipe().unwrap();
        let (stream, reader) = Stream::follow(pipe);
        let writes = std::thread::spawn(move || {
            for words in ["it ", "goes on ", "from here"] {
                std::thread::sleep(Duration::from_millis(20));
                writer.write_all(words.as_bytes()).unwrap();
            }
        });
        let long = Duration::from_secs(60);
        let wait =
            |limit, word: &'static str| stream.wait_for(limit, &interrupt, |words| words.contains(word)).unwrap();
        assert!(wait(long, "goes on").starts_with("it goes on"));
        assert_eq!(wait(long, "nowhere"), "it goes on from here");
        writes.join().unwrap();
        reader.join().unwrap();
    }
}
