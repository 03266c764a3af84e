//! Crash points: where a process may cut itself off.
//!
//! `PERDURE_CUT_AT=freeze.context` lets a process kill itself as it passes that point; `freeze.context+2` just before its second operation
//! on the file system after it, if there are so many before the next point. So each step can be cut at, and each write within it. A process
//! that does not pass there is not cut. Without the variables a point costs three loads.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use std::{io, thread};

use rustix::io::Errno;

use super::log::Kind;

/// Names where the process kills itself.
pub const CUT_AT: &str = "PERDURE_CUT_AT";

/// Names what is to go wrong with the medium.
pub const FAULT: &str = "PERDURE_CUT_FAULT";

macro_rules! points {
    ($($(#[doc = $doc:literal])+ $point:ident = $name:literal,)+) => {
        /// A step that has just been begun.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point {
            $($(#[doc = $doc])+ $point,)+
        }

        impl Point {
            /// All of them, those of one undertaking in their order.
            pub const ALL: &[Self] = &[$(Self::$point,)+];

            /// As it is written.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)+
                }
            }
        }
    };
}

points! {
    /// The power-fail signal has come.
    FreezeSignal = "freeze.signal",
    /// vCPUs stand, devices are quiet, all state is read.
    FreezeStill = "freeze.still",
    /// Memory goes to its medium.
    FreezePersist = "freeze.persist",
    /// What was dirty is in the journal, durably.
    FreezeJournaled = "freeze.journaled",
    /// Disks go to theirs.
    FreezeDisks = "freeze.disks",
    /// The context is written.
    FreezeContext = "freeze.context",
    /// Disks and memory are stamped.
    FreezeStamp = "freeze.stamp",
    /// All is durable; nobody was told yet.
    FreezeDone = "freeze.done",
    /// The power came back: the stamp goes.
    ThawClear = "thaw.clear",
    /// It runs on.
    ThawDone = "thaw.done",
    /// The context verifies, nothing was altered.
    ResumeVerified = "resume.verified",
    /// The journal of the freeze is brought home.
    ResumeReplay = "resume.replay",
    /// It is there, and not yet durable.
    ResumeReplayed = "resume.replayed",
    /// The stamp goes.
    ResumeClear = "resume.clear",
    /// Machine and memory are together, no vCPU has run.
    ResumeAssembled = "resume.assembled",
    /// vCPUs are about to run.
    ResumeRun = "resume.run",
    /// A generation is chosen to go back to.
    RecoveryChosen = "recovery.chosen",
    /// Its memory is restored, and becomes that of a context.
    RecoveryAdopt = "recovery.adopt",
    /// The VM is that of the generation.
    RecoveryDone = "recovery.done",
    /// Pages of a generation are stored.
    GenerationPages = "generation.pages",
    /// They are made durable.
    GenerationDurable = "generation.durable",
    /// It is committed.
    GenerationCommit = "generation.commit",
    /// It is committed; nobody was told yet.
    GenerationDone = "generation.done",
    /// Generations are struck from the ledger.
    PurgeRecord = "purge.record",
    /// What they alone needed is given back.
    PurgeSweep = "purge.sweep",
    /// A catalog is put in the place of the one before.
    CatalogCommit = "catalog.commit",
    /// It is there.
    CatalogDone = "catalog.done",
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where to cut: a point, and how many operations on the file system after it (0: at the point itself).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutAt {
    /// The point.
    pub point: Point,
    /// The cut comes just before the operation of this number, counted from 1; 0 is the point itself.
    pub operation: u64,
}

/// No point is so called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoSuchPoint(String);

impl fmt::Display for NoSuchPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Point::ALL.iter().map(|point| point.name()).collect();
        write!(
            f,
            "there is no point {:?} to cut at; there are {}, each also as in {}+2",
            self.0,
            names.join(", "),
            names[0]
        )
    }
}

impl std::error::Error for NoSuchPoint {}

impl FromStr for CutAt {
    type Err = NoSuchPoint;

    fn from_str(text: &str) -> Result<Self, NoSuchPoint> {
        let unknown = || NoSuchPoint(text.to_owned());
        let (name, operation) = text.split_once('+').unwrap_or((text, "0"));
        let point = Point::ALL.iter().copied().find(|point| point.name() == name).ok_or_else(unknown)?;
        Ok(Self { point, operation: operation.parse().map_err(|_| unknown())? })
    }
}

impl fmt::Display for CutAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            0 => write!(f, "{}", self.point),
            operation => write!(f, "{}+{operation}", self.point),
        }
    }
}

fn cut_at() -> Option<CutAt> {
    static AT: OnceLock<Option<CutAt>> = OnceLock::new();
    // A point that is misspelt must not look like one that was never passed.
    let parse = |text: String| text.parse().unwrap_or_else(|_| std::process::abort());
    *AT.get_or_init(|| std::env::var(CUT_AT).ok().map(parse))
}

/// Operations until the cut; 0: none is due.
static COUNTDOWN: AtomicU64 = AtomicU64::new(0);

/// What a medium does that fails while the power is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failing {
    /// Writes and flushes fail with `EIO`.
    IoError,
    /// Writes fail with `ENOSPC`.
    Full,
    /// Each flush takes so much longer, in milliseconds.
    Slow(u64),
    /// Flushes are not done, and say that they were.
    Lies,
}

/// A medium that fails from a point on to the next one that is passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// How.
    pub failing: Failing,
    /// From here on.
    pub point: Point,
}

/// No fault is so called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoSuchFault(String);

impl fmt::Display for NoSuchFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no fault: there are io-error@POINT, full@POINT, slow:20ms@POINT and lies@POINT", self.0)
    }
}

impl std::error::Error for NoSuchFault {}

impl FromStr for Fault {
    type Err = NoSuchFault;

    fn from_str(text: &str) -> Result<Self, NoSuchFault> {
        let unknown = || NoSuchFault(text.to_owned());
        let (failing, point) = text.split_once('@').ok_or_else(unknown)?;
        let CutAt { point, operation: 0 } = point.parse().map_err(|_| unknown())? else { return Err(unknown()) };
        let failing = match (failing, failing.strip_prefix("slow:").and_then(|time| time.strip_suffix("ms"))) {
            ("io-error", _) => Failing::IoError,
            ("full", _) => Failing::Full,
            ("lies", _) => Failing::Lies,
            (_, Some(time)) => Failing::Slow(time.parse().map_err(|_| unknown())?),
            _ => return Err(unknown()),
        };
        Ok(Self { failing, point })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failing {
            Failing::IoError => write!(f, "io-error@{}", self.point),
            Failing::Full => write!(f, "full@{}", self.point),
            Failing::Lies => write!(f, "lies@{}", self.point),
            Failing::Slow(time) => write!(f, "slow:{time}ms@{}", self.point),
        }
    }
}

fn fault() -> Option<Fault> {
    static FAULTY: OnceLock<Option<Fault>> = OnceLock::new();
    let parse = |text: String| text.parse().unwrap_or_else(|_| std::process::abort());
    *FAULTY.get_or_init(|| std::env::var(FAULT).ok().map(parse))
}

/// The fault is there now.
static FAILS: AtomicBool = AtomicBool::new(false);

/// The process passes `point`.
pub fn pass(point: Point) {
    if let Some(recorder) = super::recorder() {
        recorder.note(Kind::Point, [point as u64, 0, 0], &[]);
    }
    if let Some(fault) = fault() {
        FAILS.store(fault.point == point, Ordering::SeqCst);
    }
    let Some(at) = cut_at() else { return };
    let here = at.point == point;
    if here && at.operation == 0 {
        die();
    }
    COUNTDOWN.store(if here { at.operation } else { 0 }, Ordering::SeqCst);
}

/// What is about to be done to the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// Bytes, lengths, room.
    Write,
    /// Names.
    Name,
    /// Making it durable.
    Sync,
}

/// Whether a flush is not to be done that is to say that it was.
pub(super) fn is_lied_to() -> bool {
    fault().is_some_and(|fault| fault.failing == Failing::Lies) && FAILS.load(Ordering::SeqCst)
}

/// An operation is about to change the file system. An error is what it is to fail with.
pub(super) fn operation(what: Operation) -> io::Result<()> {
    let counted = COUNTDOWN.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    if counted == Ok(1) {
        die();
    }
    let Some(fault) = fault().filter(|_| FAILS.load(Ordering::SeqCst)) else { return Ok(()) };
    match (fault.failing, what) {
        (Failing::IoError, Operation::Write | Operation::Sync) => Err(Errno::IO.into()),
        (Failing::Full, Operation::Write) => Err(Errno::NOSPC.into()),
        (Failing::Slow(time), Operation::Sync) => {
            thread::sleep(Duration::from_millis(time));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The end of the power: no destructor runs.
fn die() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_as_they_are_written() {
        for point in Point::ALL {
            for operation in [0, 1, 17] {
                let at = CutAt { point: *point, operation };
                assert_eq!(at.to_string().parse(), Ok(at));
            }
        }
        for fault in
            ["io-error@freeze.persist", "full@generation.pages", "lies@freeze.context", "slow:20ms@freeze.stamp"]
        {
            assert_eq!(fault.parse::<Fault>().unwrap().to_string(), fault);
        }
        for wrong in ["", "full", "full@", "slow:x@freeze.stamp", "odd@freeze.stamp", "full@freeze.stamp+1"] {
            assert!(wrong.parse::<Fault>().is_err(), "{wrong}");
        }
        for wrong in ["", "freeze", "freeze.persist+", "freeze.persist+x", "freeze.persist+-1"] {
            let error = wrong.parse::<CutAt>().unwrap_err();
            assert!(error.to_string().contains("catalog.commit"), "{error}");
        }
    }
}
