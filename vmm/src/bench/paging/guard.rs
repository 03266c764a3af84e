//! Cleans up behind a bench, however that ends: what it leaves would cost the whole system.
//!
//! This program, started once more, in a session of its own so that Ctrl-C does not reach it, waits for the end of its standard
//! input. The bench holds the other end, and the kernel closes that whatever becomes of the bench. Then it ends what is still in
//! the bench's cgroup, takes its swap file back and removes both.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::{PagingError, swap};
use crate::bench::BenchError;

/// What to clean up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Leftovers {
    /// The cgroup's directory, which the bench made.
    pub(super) group: Option<PathBuf>,
    /// The swap file.
    pub(super) swap: Option<PathBuf>,
    /// The bench's pool: removed if the bench does not come to the end where it does so itself.
    pub(super) pool: PathBuf,
}

/// The bench's side: dropped, all is cleaned up.
#[derive(Debug)]
pub(in crate::bench) struct Guard {
    child: Child,
    input: Option<ChildStdin>,
}

/// Tells the other side that the bench is alive at its end.
const ALIVE: u8 = b'.';

impl Guard {
    /// Before anything is there that it would have to clean up.
    ///
    /// # Errors
    /// The system.
    pub(super) fn start(leftovers: &Leftovers) -> Result<Self, PagingError> {
        let system = |source| BenchError::System { doing: "start the guard that cleans up", source };
        let mut command = Command::new("/proc/self/exe");
        command.args(["bench", "guard"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().map_err(system)?;
        let mut input = child.stdin.take();
        let told = serde_json::to_vec(leftovers).map_err(std::io::Error::other).and_then(|mut line| {
            line.push(b'\n');
            input.as_mut().map_or(Ok(()), |input| input.write_all(&line))
        });
        told.map_err(system)?;
        Ok(Self { child, input })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut input) = self.input.take() {
            let _ = input.write_all(&[ALIVE]);
        }
        let _ = self.child.wait();
    }
}

/// The guard's process.
///
/// # Errors
/// Its input is not a bench's.
pub fn run() -> std::io::Result<()> {
    // Fails for the leader of a group, which it is not.
    let _ = rustix::process::setsid();
    let mut input = Vec::new();
    std::io::stdin().lock().take(1 << 20).read_to_end(&mut input)?;
    let (line, rest) = input.split_at(input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len()));
    let leftovers: Leftovers = serde_json::from_slice(line).map_err(std::io::Error::other)?;
    if let Some(group) = &leftovers.group {
        remove_group(group);
    }
    if let Some(path) = &leftovers.swap {
        swap::remove(path);
    }
    if !rest.contains(&ALIVE) {
        let _ = std::fs::remove_dir_all(&leftovers.pool);
    }
    Ok(())
}

/// Ends its processes, which are the bench's, and removes it.
fn remove_group(directory: &Path) {
    for _ in 0..200 {
        let processes = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        match std::fs::remove_dir(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Ok(()) => return,
            // Its last process is still being taken apart.
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
    tracing::error!("the cgroup {} is left behind", directory.display());
}
