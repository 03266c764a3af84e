//! What is to happen: which VMs, and how the power goes.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use allocator::MediumKind;
use guests::random::SplitMix64;
use serde::{Deserialize, Serialize};
use vfs::cut::point::{CutAt, Fault, NoSuchPoint, Point};

use super::damage::Damage;
use crate::machine::config::ByteSize;
use crate::machine::config::disks::MIN_DISK;
use crate::machine::config::pmem::PMEM_UNIT;

/// Without a hold-up, a cut at random comes so long after the signal at most: as long as most freezes take, and as long again.
const CUT_AT_RANDOM: Duration = Duration::from_millis(40);

/// When the power-fail signal comes, counted from the guest's first output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// After so long.
    After(Duration),
    /// Somewhere between these.
    Between(Duration, Duration),
}

/// Why a text is no [`Moment`].
#[derive(Debug, thiserror::Error)]
pub enum NoMoment {
    /// It is no time.
    #[error(transparent)]
    Time(#[from] humantime::DurationError),
    /// It ends before it begins.
    #[error("{0} is no span of time: it ends before it begins")]
    Backwards(String),
}

impl FromStr for Moment {
    type Err = NoMoment;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let time = |text: &str| humantime::parse_duration(text.trim());
        match text.split_once("..") {
            _ if text == "random" => Ok(Self::RANDOM),
            None => Ok(Self::After(time(text)?)),
            Some((from, to)) => match (time(from)?, time(to)?) {
                (from, to) if from <= to => Ok(Self::Between(from, to)),
                _ => Err(NoMoment::Backwards(text.to_owned())),
            },
        }
    }
}

impl Moment {
    /// Between 20 ms and 1 s.
    pub const RANDOM: Self = Self::Between(Duration::from_millis(20), Duration::from_secs(1));

    pub(super) fn draw(self, random: &mut SplitMix64) -> Duration {
        match self {
            Self::After(time) => time,
            Self::Between(from, to) => between(random, from, to),
        }
    }
}

fn between(random: &mut SplitMix64, from: Duration, to: Duration) -> Duration {
    let span = u64::try_from(to.saturating_sub(from).as_nanos()).unwrap_or(u64::MAX);
    from + Duration::from_nanos(random.below(span))
}

/// The hold-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoldUpLength(pub Option<Duration>);

impl HoldUpLength {
    /// In microseconds, as a configuration has it.
    #[must_use]
    pub fn microseconds(self) -> Option<u64> {
        self.0.map(|length| u64::try_from(length.as_micros()).unwrap_or(u64::MAX))
    }
}

impl FromStr for HoldUpLength {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self(None)),
            time => Ok(Self(Some(humantime::parse_duration(time)?))),
        }
    }
}

/// When darkness comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// As the hold-up has passed; without one, as all is durable.
    AfterHoldup,
    /// As the VMM passes a point.
    At(CutAt),
    /// At any moment from the signal to the end of the hold-up, or (one in four) without a signal.
    Random,
    /// Without a signal.
    Unannounced,
    /// Not at all: the power comes back during the hold-up.
    Never,
}

impl FromStr for Cut {
    type Err = NoSuchPoint;

    fn from_str(text: &str) -> Result<Self, NoSuchPoint> {
        Ok(match text {
            "after-holdup" => Self::AfterHoldup,
            "random" => Self::Random,
            "unannounced" => Self::Unannounced,
            "never" => Self::Never,
            point => Self::At(point.strip_prefix("at:").unwrap_or(point).parse()?),
        })
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AfterHoldup => f.write_str("after-holdup"),
            Self::At(at) => write!(f, "at:{at}"),
            Self::Random => f.write_str("random"),
            Self::Unannounced => f.write_str("unannounced"),
            Self::Never => f.write_str("never"),
        }
    }
}

/// Where in a VM's life a point is passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    /// While it is made, before it first runs.
    Birth,
    /// While it runs, whether or not the power goes.
    Life,
    /// Between the signal and darkness.
    Freeze,
    /// On the way back from a freeze.
    Resume,
    /// On the way back to a generation.
    Recovery,
}

pub(super) fn where_passed(point: Point) -> Where {
    use Point as P;
    match point {
        P::CatalogCommit | P::CatalogDone => Where::Birth,
        P::GenerationPages | P::GenerationDurable | P::GenerationCommit | P::GenerationDone => Where::Life,
        P::PurgeRecord | P::PurgeSweep => Where::Life,
        P::FreezeSignal | P::FreezeStill | P::FreezePersist | P::FreezeDisks => Where::Freeze,
        P::FreezeJournaled => Where::Freeze,
        P::FreezeContext | P::FreezeStamp | P::FreezeDone | P::ThawClear | P::ThawDone => Where::Freeze,
        P::ResumeReplay | P::ResumeReplayed => Where::Resume,
        P::ResumeVerified | P::ResumeClear | P::ResumeAssembled | P::ResumeRun => Where::Resume,
        P::RecoveryChosen | P::RecoveryAdopt | P::RecoveryDone => Where::Recovery,
    }
}

/// One outage.
#[derive(Debug, Clone)]
pub struct OutagePlan {
    /// When the signal comes.
    pub at: Moment,
    /// The hold-up.
    pub holdup: Option<Duration>,
    /// When darkness comes.
    pub cut: Cut,
    /// Signals before it, after each of which the power comes back.
    pub flaps: u32,
    /// After a signal, when the power comes back, for [`Cut::Never`] and flaps; drawn from the hold-up if not given.
    pub back: Option<Duration>,
    /// Where the VM is cut off again on its way back: at its first attempt, its second, and so on.
    pub again: Vec<CutAt>,
    /// What its medium does meanwhile.
    pub fault: Option<Fault>,
    /// What is damaged between the cut and the return.
    pub damage: Option<Damage>,
    /// The VM is made anew before it: one slot of its context is good then, and both after a freeze.
    pub fresh: bool,
}

impl Default for OutagePlan {
    fn default() -> Self {
        Self {
            at: Moment::After(Duration::from_secs(2)),
            holdup: Some(Duration::from_millis(16)),
            cut: Cut::AfterHoldup,
            flaps: 0,
            back: None,
            again: Vec::new(),
            fault: None,
            damage: None,
            fresh: false,
        }
    }
}

/// A plan, with all that is left to chance drawn.
#[derive(Debug, Clone)]
pub(super) struct Drawn {
    pub(super) seed: u64,
    pub(super) at: Duration,
    pub(super) holdup: Option<Duration>,
    pub(super) cut: DrawnCut,
    /// As it was planned, in words.
    pub(super) planned: String,
    /// For each return of the power, how long after the signal.
    pub(super) backs: Vec<Duration>,
    /// Where the process that suffers it is cut off.
    pub(super) armed: Option<CutAt>,
    /// And those after it.
    pub(super) again: Vec<CutAt>,
    pub(super) fault: Option<Fault>,
    pub(super) damage: Option<Damage>,
    /// The VM is made anew before it.
    pub(super) birth: bool,
    /// It is not to come before there is a generation to go back to.
    pub(super) needs_generation: bool,
    /// What the cut takes.
    pub(super) loss_seed: u64,
}

/// When darkness comes, once chance has spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DrawnCut {
    /// So long after the signal.
    After(Duration),
    /// As all is durable, or is not going to be.
    WhenDone,
    /// At once, without a signal.
    Unannounced,
    /// By the process itself, after a signal, which comes if it does not before.
    ByItself {
        /// Whether the signal comes first.
        signalled: bool,
    },
    /// The power stays.
    Never,
}

impl OutagePlan {
    /// Draws what is left to chance. The same seed draws the same.
    pub(super) fn draw(&self, seed: u64) -> Drawn {
        let mut random = SplitMix64::new(seed);
        let at = self.at.draw(&mut random);
        let within = self.holdup.unwrap_or(CUT_AT_RANDOM);
        let (mut again, mut armed, mut birth) = (self.again.clone(), None, self.fresh);
        let usual = || self.holdup.map_or(DrawnCut::WhenDone, DrawnCut::After);
        let cut = match self.cut {
            Cut::AfterHoldup => usual(),
            Cut::Unannounced => DrawnCut::Unannounced,
            Cut::Never => DrawnCut::Never,
            Cut::Random if random.below(4) == 0 => DrawnCut::Unannounced,
            Cut::Random => DrawnCut::After(between(&mut random, Duration::ZERO, within)),
            Cut::At(cut_at) => match where_passed(cut_at.point) {
                Where::Freeze | Where::Life => {
                    armed = Some(cut_at);
                    DrawnCut::ByItself { signalled: where_passed(cut_at.point) == Where::Freeze }
                }
                Where::Birth => {
                    (armed, birth) = (Some(cut_at), true);
                    DrawnCut::ByItself { signalled: false }
                }
                Where::Resume => {
                    again.insert(0, cut_at);
                    DrawnCut::WhenDone
                }
                Where::Recovery => {
                    again.insert(0, cut_at);
                    DrawnCut::Unannounced
                }
            },
        };
        let thaws = matches!(self.cut, Cut::At(CutAt { point: Point::ThawClear | Point::ThawDone, .. }));
        let count = self.flaps + u32::from(cut == DrawnCut::Never || thaws);
        let backs = (0..count).map(|_| self.back.unwrap_or_else(|| between(&mut random, Duration::ZERO, within)));
        let backs: Vec<_> = backs.collect();
        let needs_generation = again.iter().any(|at| where_passed(at.point) == Where::Recovery);
        let (planned, fault, loss_seed) = (self.cut.to_string(), self.fault, random.draw());
        Drawn {
            seed,
            at,
            holdup: self.holdup,
            cut,
            planned,
            backs,
            armed,
            again,
            fault,
            damage: self.damage,
            birth,
            needs_generation,
            loss_seed,
        }
    }
}

/// A VM that is to suffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmPlan {
    /// An embedded guest.
    pub guest: String,
    /// Its command line.
    pub cmdline: Option<String>,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its memory.
    pub memory: ByteSize,
    /// What it lies on.
    pub medium: Option<MediumKind>,
    /// A disk of the pool of this size, `data`; none if not given, but for the guest `records`, which needs one.
    pub disk: Option<ByteSize>,
    /// The same for persistent memory, `log`, which `records` needs with `on=pmem`.
    pub pmem: Option<ByteSize>,
    /// Take a generation each time this has passed, as in `200ms`; none if not given.
    pub snapshot_every: Option<String>,
    /// Generations that stay at most.
    pub max_snapshots: Option<u32>,
    /// The hold-up that it is to keep within, as in `16ms`; what is dirty is not bounded if not given.
    pub holdup: Option<String>,
    /// Where several VMs share a hold-up, those with the highest are signalled first, and others when these are frozen.
    pub priority: i32,
}

impl Default for VmPlan {
    fn default() -> Self {
        Self {
            guest: "counter".to_owned(),
            cmdline: None,
            cpus: 1,
            memory: ByteSize(16 << 20),
            medium: None,
            disk: None,
            pmem: None,
            snapshot_every: Some("250ms".to_owned()),
            max_snapshots: None,
            holdup: None,
            priority: 0,
        }
    }
}

/// The guest whose disk is looked at.
pub(super) const RECORDS: &str = "records";
/// The disk of a VM of the simulator's own.
const DISK: &str = "data";
/// And its persistent memory.
const PMEM: &str = "log";
/// Those of `records`, as small as they can be: so it goes round soon.
const RECORDS_DISK: ByteSize = MIN_DISK;
const RECORDS_PMEM: ByteSize = PMEM_UNIT;

/// Whether `records` writes to persistent memory with this command line.
pub(super) fn is_on_pmem(cmdline: &str) -> bool {
    cmdline.split(' ').rfind(|word| word.starts_with("on=")) == Some("on=pmem")
}

impl VmPlan {
    /// Its disk and its persistent memory.
    fn storage(&self) -> (Option<ByteSize>, Option<ByteSize>) {
        let on = self.records_on();
        let needed = |name, size| (on == Some(name)).then_some(size);
        (self.disk.or(needed(DISK, RECORDS_DISK)), self.pmem.or(needed(PMEM, RECORDS_PMEM)))
    }

    /// What its guest keeps records on, if it does.
    fn records_on(&self) -> Option<&'static str> {
        let on = if self.cmdline.as_deref().is_some_and(is_on_pmem) { PMEM } else { DISK };
        (self.guest == RECORDS).then_some(on)
    }

    /// The region of the VM `name` that its guest keeps records on.
    pub(super) fn records_region(&self, name: &str) -> Option<String> {
        self.records_on().map(|on| format!("{name}/{on}"))
    }

    /// The arguments of `perdure run`.
    pub(super) fn arguments(&self, name: &str) -> Vec<String> {
        let mut arguments = vec!["run".to_owned(), name.to_owned(), format!("--guest={}", self.guest)];
        let usual = match self.guest.as_str() {
            "counter" => "hz=500 ram=64K",
            "smp" => "hz=200",
            RECORDS => "hz=500",
            "memwalk" => "ws=4M verify=1",
            _ => "",
        };
        arguments.push(format!("--cmdline={}", self.cmdline.as_deref().unwrap_or(usual)));
        arguments.push(format!("--cpus={}", self.cpus));
        arguments.push(format!("--memory={}", self.memory.0));
        arguments.push("--serial=stdio".to_owned());
        arguments.extend(self.medium.map(|medium| format!("--medium={medium}")));
        let (disk, pmem) = self.storage();
        arguments.extend(disk.map(|size| format!("--disk={DISK}:{size}")));
        arguments.extend(pmem.map(|size| format!("--pmem={PMEM}:{size}")));
        arguments.extend(self.snapshot_every.as_ref().map(|every| format!("--snapshot-every={every}")));
        arguments.extend(self.holdup.as_ref().map(|holdup| format!("--holdup={holdup}")));
        if let Some(most) = self.max_snapshots {
            arguments.extend([format!("--max-snapshots={most}"), "--min-snapshots=1".to_owned()]);
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_and_another_one_something_else() {
        let plan = OutagePlan { at: "random".parse().unwrap(), cut: Cut::Random, flaps: 2, ..OutagePlan::default() };
        let drawn = |seed| format!("{:?}", plan.draw(seed));
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
        for seed in 0..100 {
            let drawn = plan.draw(seed);
            assert!((Duration::from_millis(20)..Duration::from_secs(1)).contains(&drawn.at));
            assert!(
                matches!(drawn.cut, DrawnCut::Unannounced)
                    || matches!(drawn.cut, DrawnCut::After(time) if time < Duration::from_millis(16))
            );
            assert_eq!(drawn.backs.len(), 2);
        }
    }

    #[test]
    fn a_moment_lies_within_its_span() {
        let plan = OutagePlan { at: "5ms..7ms".parse().unwrap(), ..OutagePlan::default() };
        for seed in 0..100 {
            assert!((Duration::from_millis(5)..Duration::from_millis(7)).contains(&plan.draw(seed).at));
        }
        let exactly = OutagePlan { at: "5ms..5ms".parse().unwrap(), ..OutagePlan::default() };
        assert_eq!(exactly.draw(1).at, Duration::from_millis(5));
        for wrong in ["7ms..5ms", "..5ms", "5..7", "soon"] {
            assert!(wrong.parse::<Moment>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_cut_is_read_as_it_is_written() {
        for text in ["after-holdup", "random", "unannounced", "never", "at:freeze.context+2", "at:recovery.adopt"] {
            assert_eq!(text.parse::<Cut>().unwrap().to_string(), text);
        }
        assert!("at:nowhere".parse::<Cut>().is_err());
    }

    #[test]
    fn a_guest_that_keeps_records_has_what_it_keeps_them_on_and_another_one_if_it_is_to() {
        let of = |guest: &str, cmdline: Option<&str>, disk, pmem| {
            let (guest, cmdline) = (guest.to_owned(), cmdline.map(str::to_owned));
            let plan = VmPlan { guest, cmdline, disk, pmem, ..VmPlan::default() };
            let arguments = plan.arguments("web");
            let storage = arguments.into_iter().filter(|one| one.starts_with("--disk") || one.starts_with("--pmem"));
            (storage.collect::<Vec<_>>().join(" "), plan.records_region("web"))
        };
        let on = |storage: &str, region: &str| (storage.to_owned(), Some(region.to_owned()));
        let large = Some(ByteSize(4 << 20));
        assert_eq!(of(RECORDS, None, None, None), on("--disk=data:1M", "web/data"));
        assert_eq!(of(RECORDS, None, large, None), on("--disk=data:4M", "web/data"));
        assert_eq!(of(RECORDS, Some("on=disk on=pmem hz=9"), None, None), on("--pmem=log:2M", "web/log"));
        assert_eq!(of(RECORDS, Some("on=pmem"), large, large), on("--disk=data:4M --pmem=log:4M", "web/log"));
        assert_eq!(of("counter", Some("on=pmem"), None, None), (String::new(), None));
        assert_eq!(of("counter", None, large, None), ("--disk=data:4M".to_owned(), None));
    }

    #[test]
    fn a_point_is_armed_in_the_process_that_passes_it() {
        let plan = |point: &str| OutagePlan { cut: point.parse().unwrap(), ..OutagePlan::default() }.draw(1);
        assert!(plan("freeze.stamp").armed.is_some() && plan("freeze.stamp").again.is_empty());
        let resume = plan("resume.clear+1");
        assert_eq!((resume.armed, resume.again.len(), resume.cut), (None, 1, DrawnCut::WhenDone));
        assert_eq!(plan("recovery.adopt").cut, DrawnCut::Unannounced);
        assert!(plan("catalog.commit+1").birth);
        assert_eq!(plan("thaw.clear").backs.len(), 1);
    }
}
