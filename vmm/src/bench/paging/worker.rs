//! Who walks: a process of its own, this very program, so that it can be in a cgroup and its faults are its own.
//!
//! ```text
//!   bench                          worker
//!     │ spec ───────────────────────► joins the group, prepares
//!     │ ◄─────────────────────── ready
//!     │ (sets the group's limit)
//!     │ go ─────────────────────────► walks, until its input ends
//!     │ ◄──────── sample, sample, …
//! ```

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use guests::pages::{List, PROGRESS_ADDRESS};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::native::Walker;
use super::{PagingError, group};
use crate::bench::BenchError;
use crate::machine::time::nanoseconds;
use crate::persistence::paging::PagedStatus;
use crate::persistence::regions::VmRegions;
use crate::supervisor::terminal::Keyboard;
use crate::supervisor::{Ended, Supervisor};

/// Accesses between two looks at the clock.
const STRIDE: u64 = 256;
/// Between two looks at how much of memory left RAM.
const SQUEEZE: Duration = Duration::from_millis(5);
/// How long that may take.
const SQUEEZE_MOST: Duration = Duration::from_secs(30);
/// How long a guest runs before its RAM is taken away.
const SETTLE: Duration = Duration::from_secs(2);
/// Names of the threads of [`allocator::paging`], and of the one that takes part in the budget.
const PAGERS: [&str; 5] = ["faults", "evict", "ahead", "fetch", "budget"];
/// How long a worker may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who walks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::bench) enum Part {
    /// The process itself, over a list in a file.
    Native {
        /// The file.
        list: PathBuf,
        /// As the guest's parameter.
        pages: u32,
    },
    /// The guest of a VM.
    Guest {
        /// The pool's directory.
        pool: PathBuf,
        /// The VM.
        name: String,
        /// From where.
        begin: Begin,
    },
}

/// From where a guest walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::bench) enum Begin {
    /// From its kernel.
    Boot,
    /// From where it was frozen.
    Resume {
        /// Where its memory is still being restored: fetch more than it asks for.
        prefetch: bool,
    },
    /// The same, with as much of its memory in the swap region as can be.
    ResumeFromSwap,
}

/// What a worker is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::bench) struct Spec {
    /// Who walks.
    pub(in crate::bench) part: Part,
    /// The file of a cgroup that it enters first.
    pub(in crate::bench) processes: Option<PathBuf>,
    /// Time between two samples.
    pub(in crate::bench) sample_ms: u64,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Since the walk began.
    pub at_ns: u64,
    /// Accesses done.
    pub accesses: u64,
    /// Page faults of the process that read from the disk (`majflt`, proc(5)).
    pub major: u64,
    /// Its other page faults (`minflt`).
    pub minor: u64,
    /// Processor time of the process, its guest's included, in nanoseconds.
    pub cpu_ns: u64,
    /// Of that, what the threads took that page, and that take part in the budget of RAM.
    pub pager_ns: u64,
    /// Where the guest's memory is, if it is paged.
    pub paged: Option<PagedStatus>,
    /// How far it is restored, if it is: clusters that are there, and all.
    pub restored: Option<(u64, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Ready,
    Sample(Box<Sample>),
    /// A power-fail signal came, and everything is durable: since how many nanoseconds after it.
    Frozen(u64),
    Failed(String),
}

/// The bench's side. Dropped, the worker is killed.
pub(in crate::bench) struct Worker {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<Line>,
}

impl Worker {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// It could not prepare.
    pub(in crate::bench) fn start(spec: &Spec) -> Result<Self, PagingError> {
        let system = |source| BenchError::System { doing: "start a worker", source };
        let mut command = Command::new("/proc/self/exe");
        command.args(["bench", "worker"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(system)?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(system(std::io::Error::other("no pipe")).into());
        };
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let Ok(line) = serde_json::from_str(&line) else { return };
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let told = serde_json::to_vec(spec).map_err(std::io::Error::other).and_then(|mut line| {
            line.push(b'\n');
            input.write_all(&line)
        });
        told.map_err(system)?;
        let mut worker = Self { child, input, lines };
        match worker.line()? {
            Line::Ready => Ok(worker),
            other => Err(unexpected(other)),
        }
    }

    /// Lets it walk.
    ///
    /// # Errors
    /// It is gone.
    pub(in crate::bench) fn go(&mut self) -> Result<(), PagingError> {
        let told = self.input.write_all(b"go\n");
        Ok(told.map_err(|source| BenchError::System { doing: "let a worker go", source })?)
    }

    /// Its next sample.
    ///
    /// # Errors
    /// It failed, or says nothing any more.
    pub(in crate::bench) fn sample(&mut self) -> Result<Sample, PagingError> {
        match self.line()? {
            Line::Sample(sample) => Ok(*sample),
            other => Err(unexpected(other)),
        }
    }

    /// What it has told so far does not matter.
    pub(in crate::bench) fn forget(&mut self) {
        self.lines.try_iter().for_each(drop);
    }

    /// It stands still until [`Worker::go_on`].
    ///
    /// # Errors
    /// It is gone.
    pub(in crate::bench) fn halt(&self) -> Result<(), PagingError> {
        self.signal(Signal::STOP)
    }

    /// See [`Worker::halt`].
    ///
    /// # Errors
    /// It is gone.
    pub(in crate::bench) fn go_on(&self) -> Result<(), PagingError> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), PagingError> {
        let system = |source: rustix::io::Errno| BenchError::System { doing: "signal a worker", source: source.into() };
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(pid.ok_or_else(|| system(rustix::io::Errno::SRCH))?, signal).map_err(system)?)
    }

    /// The power fails. Waits until everything is durable and the process gone; returns how long that took, in nanoseconds.
    ///
    /// # Errors
    /// It could not be frozen.
    pub(in crate::bench) fn power_fail(mut self) -> Result<u64, PagingError> {
        self.signal(Signal::POWER)?;
        loop {
            match self.line()? {
                Line::Sample(_) => {}
                Line::Frozen(took) => return Ok(took),
                other => return Err(unexpected(other)),
            }
        }
    }

    fn line(&mut self) -> Result<Line, PagingError> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Ok(line),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(BenchError::Guest(format!("no sign of life within {PATIENCE:?}")).into())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(BenchError::Guest(format!("the process that walks ended ({status}): out of memory and swap?"))
                    .into())
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unexpected(line: Line) -> PagingError {
    match line {
        Line::Failed(why) => BenchError::Guest(why).into(),
        Line::Ready | Line::Sample(_) | Line::Frozen(_) => {
            BenchError::Guest(format!("{line:?} at the wrong time")).into()
        }
    }
}

/// The worker's process.
///
/// # Errors
/// Its output is gone.
pub fn run() -> std::io::Result<()> {
    // Should the bench be killed, so are we.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let failed = match serde_json::from_str(&line) {
        Ok(spec) => walk(&spec).err(),
        Err(error) => Some(PagingError::from(BenchError::Guest(error.to_string()))),
    };
    failed.map_or(Ok(()), |error| say(&Line::Failed(crate::supervisor::Chain(&error).to_string())))
}

fn say(line: &Line) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    let mut output = std::io::stdout().lock();
    output.write_all(&bytes)?;
    output.flush()
}

fn walk(spec: &Spec) -> Result<(), PagingError> {
    let system = |doing| move |source| BenchError::System { doing, source };
    if let Some(processes) = &spec.processes {
        group::join(processes).map_err(system("enter the cgroup"))?;
    }
    let every = Duration::from_millis(spec.sample_ms.max(1));
    match &spec.part {
        Part::Native { list, pages } => {
            let bytes = std::fs::read(list).map_err(system("read the list"))?;
            let list = List::parse(&bytes, *pages)?;
            drop(bytes);
            native(Walker::new(list), every)
        }
        Part::Guest { pool, name, begin } => {
            wait_for_go().map_err(system("hear from the bench"))?;
            let pool = allocator::Pool::open(pool, Arc::new(vfs::host::HostVfs)).map_err(BenchError::from)?;
            let regions = VmRegions::open(&pool, name).map_err(BenchError::from)?;
            let start = Instant::now();
            let keyboard = Keyboard::none();
            let begun = match begin {
                Begin::Boot => Supervisor::boot(&pool, regions, keyboard),
                Begin::Resume { prefetch } => Supervisor::resume(&pool, regions, keyboard, *prefetch),
                Begin::ResumeFromSwap => Supervisor::resume(&pool, regions, keyboard, true),
            };
            let mut supervisor = begun.map_err(BenchError::from)?;
            let mut began = start;
            if *begin == Begin::ResumeFromSwap {
                squeeze(&mut supervisor)?;
                began = Instant::now();
            }
            guest(supervisor, began, every)
        }
    }
}

/// Takes all RAM away from the guest but the least that it can have, and gives it back once its memory is in the swap region.
fn squeeze(supervisor: &mut Supervisor) -> Result<(), PagingError> {
    let Some(paged) = supervisor.paged() else { return Ok(()) };
    // What the freeze left in RAM is shown to the guest first: what is not yet shown is not withdrawn either.
    if let Some(ended) = supervisor.serve_a_while(SETTLE).map_err(BenchError::from)? {
        return Err(BenchError::Guest(format!("{ended:?}")).into());
    }
    let began = Instant::now();
    supervisor.set_ram(0);
    while supervisor.paged().is_some_and(|paged| paged.counts.resident > paged.counts.frames) {
        if let Some(ended) = supervisor.serve_a_while(SQUEEZE).map_err(BenchError::from)? {
            return Err(BenchError::Guest(format!("{ended:?}")).into());
        }
        if began.elapsed() > SQUEEZE_MOST {
            return Err(BenchError::Guest("its memory does not leave RAM".to_owned()).into());
        }
    }
    supervisor.set_ram(paged.counts.frames * paged.counts.cluster);
    Ok(())
}

/// Says that all is prepared, and waits for the word. From then on the end of the input is the end of this process.
fn wait_for_go() -> std::io::Result<()> {
    say(&Line::Ready)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        std::process::exit(0);
    });
    Ok(())
}

fn native(mut walker: Walker, every: Duration) -> Result<(), PagingError> {
    let system = |source| BenchError::System { doing: "tell the bench", source };
    wait_for_go().map_err(system)?;
    let (began, accesses) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let (told, (sender, failure)) = (Arc::clone(&accesses), mpsc::channel());
    std::thread::spawn(move || {
        loop {
            if let Err(damaged) = walker.walk(STRIDE) {
                let _ = sender.send(damaged);
                return;
            }
            told.store(walker.accesses(), Ordering::Relaxed);
        }
    });
    loop {
        if let Ok(damaged) = failure.recv_timeout(every) {
            return Err(BenchError::Guest(damaged.to_string()).into());
        }
        say(&Line::Sample(Box::new(sample(began, accesses.load(Ordering::Relaxed))))).map_err(system)?;
    }
}

fn guest(mut supervisor: Supervisor, began: Instant, every: Duration) -> Result<(), PagingError> {
    let say = |line| say(&line).map_err(|source| BenchError::System { doing: "tell the bench", source });
    loop {
        let accesses = supervisor.guest_word(PROGRESS_ADDRESS).unwrap_or(0);
        let (paged, restored) = (supervisor.paged(), supervisor.restored());
        say(Line::Sample(Box::new(Sample { paged, restored, ..sample(began, accesses) })))?;
        match supervisor.serve_a_while(every).map_err(BenchError::from)? {
            None => {}
            Some(Ended::Frozen(report)) => {
                say(Line::Frozen(report.total_ns))?;
                supervisor.close(true);
                return Ok(());
            }
            Some(ended) => return Err(BenchError::Guest(format!("{ended:?}")).into()),
        }
    }
}

fn sample(began: Instant, accesses: u64) -> Sample {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let Faults { minor, major } = Faults::read(&stat);
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu_ns = Duration::try_from(cpu).map_or(0, nanoseconds);
    let (at_ns, pager_ns) = (nanoseconds(began.elapsed()), pager_ns());
    Sample { at_ns, accesses, major, minor, cpu_ns, pager_ns, paged: None, restored: None }
}

/// Processor time of the threads in [`PAGERS`], from `/proc/self/task/*/schedstat` (Linux, `Documentation/scheduler/sched-stats.rst`: its first
/// number is nanoseconds on a CPU); 0 where the kernel does not count it.
fn pager_ns() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(|task| task.path());
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let pagers = tasks.filter(|task| PAGERS.contains(&read(task.join("comm")).trim()));
    pagers.filter_map(|task| read(task.join("schedstat")).split(' ').next()?.parse::<u64>().ok()).sum()
}

/// A process's page faults.
#[derive(Debug, PartialEq, Eq)]
struct Faults {
    minor: u64,
    major: u64,
}

impl Faults {
    /// From `/proc/self/stat` (proc(5)): its 10th and 12th field. The 2nd, a name, may hold spaces.
    fn read(stat: &str) -> Self {
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().skip(7);
        let mut numbers = fields.map(|field| field.parse::<u64>().unwrap_or(0));
        let mut next = |skipped: usize| numbers.nth(skipped).unwrap_or(0);
        Self { minor: next(0), major: next(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_behind_any_name() {
        let stat = "1 (a) b (c) S 4 5 6 7 8 9 1010 11 1212 13 1400 15 16 17";
        assert_eq!(Faults::read(stat), Faults { minor: 1010, major: 1212 });
        assert_eq!(Faults::read("nonsense"), Faults { minor: 0, major: 0 });
    }

    #[test]
    fn processor_time_of_pagers_is_that_of_their_threads() {
        let (end, ended) = mpsc::channel::<()>();
        let spin = move || while matches!(ended.try_recv(), Err(mpsc::TryRecvError::Empty)) {};
        let thread = std::thread::Builder::new().name("evict".to_owned()).spawn(spin).unwrap();
        let began = Instant::now();
        let before = sample(began, 0).pager_ns;
        while sample(began, 0).pager_ns == before {
            assert!(began.elapsed() < Duration::from_secs(30), "a thread that spins takes no time");
        }
        drop(end);
        thread.join().unwrap();
        assert!(sample(began, 0).pager_ns <= sample(began, 0).cpu_ns);
    }

    #[test]
    fn processor_time_is_what_this_process_worked() {
        let began = Instant::now();
        let before = sample(began, 0).cpu_ns;
        while sample(began, 0).cpu_ns < before + 2_000_000 {
            assert!(began.elapsed() < Duration::from_secs(30), "it stands still");
        }
    }

    #[test]
    fn the_faults_of_this_process_are_counted() {
        let faults_now = || sample(Instant::now(), 0).minor;
        let before = faults_now();
        let memory = vec![1_u8; 64 << 20];
        assert!(std::hint::black_box(&memory).len() == 64 << 20 && faults_now() > before);
    }
}
