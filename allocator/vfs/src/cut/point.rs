//! Crash points: where a process may cut itself off.
//!
//! `PERDURE_CUT_AT=freeze.context` lets a process kill itself as it passes that point; `freeze.context+2` just before its second operation
//! on the file system after it, if there are so many before the next point. So each step can be cut at, and each write within it. A process
//! that does not pass there is not cut. Without the variable a point costs one load.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::log::Kind;

/// Names where the process kills itself.
pub const CUT_AT: &str = "PERDURE_CUT_AT";

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

/// The process passes `point`.
pub fn pass(point: Point) {
    if let Some(recorder) = super::recorder() {
        recorder.note(Kind::Point, [point as u64, 0, 0], &[]);
    }
    let Some(at) = cut_at() else { return };
    let here = at.point == point;
    if here && at.operation == 0 {
        die();
    }
    COUNTDOWN.store(if here { at.operation } else { 0 }, Ordering::SeqCst);
}

/// An operation is about to change the file system.
pub(super) fn operation() {
    let counted = COUNTDOWN.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    if counted == Ok(1) {
        die();
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
        for wrong in ["", "freeze", "freeze.persist+", "freeze.persist+x", "freeze.persist+-1"] {
            let error = wrong.parse::<CutAt>().unwrap_err();
            assert!(error.to_string().contains("catalog.commit"), "{error}");
        }
    }
}
