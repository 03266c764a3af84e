//! What an outage was for a VM: what it lost, and whether a promise was broken.

use std::path::Path;
use std::time::{Duration, Instant};

use allocator::Pool;

use super::OutageError;
use super::damage::Damaged;
use super::interrupt::Interrupt;
use super::judge::first_link;
use super::plan::Drawn;
use super::report::{Verdict, VmOutage, WentOnFrom};
use super::subject::{PATIENCE, Subject, Way, status};
use super::warning::{Answer, Answered};
use crate::machine::time::nanoseconds;
use crate::persistence::freeze::FreezeReport;

/// How the power went.
#[derive(Debug)]
pub(super) struct Darkness {
    /// From the signal; `None` if it did not come.
    pub(super) after: Option<Duration>,
    pub(super) moment: Instant,
    /// When, as generations are dated: milliseconds since 1970-01-01 UTC.
    pub(super) time_ms: u64,
    pub(super) answers: Vec<Answered>,
    /// A process cut itself off, where it was to.
    pub(super) by_itself: bool,
    /// The power came back so often.
    pub(super) flaps: usize,
}

/// What became of a VM, as far as it is known before it runs again.
#[derive(Debug)]
pub(super) struct Aftermath {
    /// What it could go on from at first.
    pub(super) first: Way,
    /// The last generation that it went back to, and when that was taken: milliseconds since 1970-01-01 UTC.
    pub(super) recovered: Option<(String, u64)>,
    pub(super) cut_off_at: Vec<String>,
    pub(super) attempts: u32,
    /// What was damaged before the first attempt.
    pub(super) damaged: Option<Damaged>,
    /// Before the outage: the last link of its chain, the newest generation that was said to be durable, when it was booted.
    pub(super) last_link: Option<u64>,
    pub(super) told_generation: u64,
    pub(super) booted: Instant,
    pub(super) resume: Option<Duration>,
    pub(super) problems: Vec<String>,
}

impl Aftermath {
    pub(super) fn new(first: Way, subject: &Subject) -> Self {
        Self {
            first,
            recovered: None,
            cut_off_at: Vec::new(),
            attempts: 1,
            damaged: None,
            last_link: subject.transcript.last_link(),
            told_generation: subject.told_generation,
            booted: subject.booted,
            resume: None,
            problems: Vec::new(),
        }
    }
}

/// The generation that `resume` says it took.
pub(super) fn went_back_to(words: &str) -> Option<String> {
    let rest = words.split_once(" goes on from generation ")?.1;
    rest.split([' ', ',']).next().map(str::to_owned)
}

/// A cut leaves a pool that is sound, but for what the next change sweeps away: what is wrong beyond that.
pub(super) fn problems_of(pool: &Path) -> Vec<String> {
    let checked = match Pool::open(pool, vfs::cut::host()) {
        // It was not there yet.
        Err(allocator::PoolError::Catalog(allocator::CatalogError::Missing { .. })) => return Vec::new(),
        other => other.and_then(|pool| pool.check()),
    };
    match checked {
        Ok(report) => report.damage().map(ToString::to_string).collect(),
        Err(error) => vec![format!("the pool cannot be checked: {error}")],
    }
}

/// An outage in which the power came back.
pub(super) fn ran_on(
    subject: &mut Subject,
    pool: &Path,
    answered: Option<&Answered>,
    interrupt: &Interrupt,
) -> Result<VmOutage, OutageError> {
    let mut problems = Vec::from_iter(subject.watch_records(pool));
    let before = subject.life.as_ref().map_or(0, |life| life.lines());
    let chained = subject.chained;
    if let Some(life) = &mut subject.life {
        let goes_on = life.wait_until(PATIENCE, interrupt, |life| !chained || life.lines() > before + 2)?;
        if let Some(status) = life.ended() {
            problems.push(format!("the power came back, and it ended: {status}: {}", life.complaints().trim()));
        } else if !goes_on || status(pool, &subject.name).is_none() {
            problems.push("the power came back, and it does not run on".to_owned());
        }
    }
    Ok(record(subject, answered, WentOnFrom::Running, problems))
}

/// What had been said to be durable, and is not what the VM could go on from.
fn broken_promises(answered: Option<&Answered>, aftermath: &Aftermath) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(report) = answered.and_then(frozen)
        && aftermath.first != Way::Resume(report.sequence)
        && !aftermath.damaged.as_ref().is_some_and(|damaged| damaged.took_the_freeze())
    {
        problems.push(format!(
            "it was said to be frozen (context {}), and what survived is {}",
            report.sequence,
            aftermath.first.words()
        ));
    }
    let newest = match &aftermath.first {
        Way::Recover(newest) => Some(newest.id.number),
        Way::Boot => Some(0),
        Way::Resume(_) => None,
    };
    if let Some(newest) = newest.filter(|newest| *newest < aftermath.told_generation) {
        let told = aftermath.told_generation;
        problems.push(format!("generation {told} was said to be durable, and the newest is {newest}"));
    }
    if let (Way::Recover(newest), Some((id, _))) = (&aftermath.first, &aftermath.recovered)
        && generation_number(id).is_some_and(|number| number < newest.id.number)
    {
        problems.push(format!("it went back to {id}, and {} was there", newest.id));
    }
    if let (Way::Recover(newest), None) = (&aftermath.first, &aftermath.recovered) {
        problems.push(format!("it did not say that it went back to {}", newest.id));
    }
    problems
}

fn generation_number(id: &str) -> Option<u64> {
    id.rsplit_once('@')?.1.parse().ok()
}

/// What an outage was for a VM that runs again.
pub(super) fn account(
    subject: &mut Subject,
    drawn: &Drawn,
    dark: &Darkness,
    answered: Option<&Answered>,
    aftermath: &Aftermath,
) -> VmOutage {
    let mut problems = aftermath.problems.clone();
    problems.extend(broken_promises(answered, aftermath));
    let (went_on, lost_ns) = match (&aftermath.first, &aftermath.recovered) {
        (Way::Boot, _) => (WentOnFrom::Boot, nanoseconds(dark.moment.saturating_duration_since(aftermath.booted))),
        (_, Some((id, time_ms))) => {
            let age_ns = dark.time_ms.saturating_sub(*time_ms).saturating_mul(1_000_000);
            (WentOnFrom::Generation { generation: id.clone(), age_ns }, age_ns)
        }
        (Way::Resume(sequence), None) => (WentOnFrom::Context { sequence: *sequence }, 0),
        (Way::Recover(newest), None) => (WentOnFrom::Generation { generation: newest.id.to_string(), age_ns: 0 }, 0),
    };
    let mut outage = record(subject, answered, went_on, problems);
    outage.lost_ns = lost_ns;
    outage.attempts = aftermath.attempts;
    outage.damaged = aftermath.damaged.as_ref().map(Damaged::words);
    outage.cut_off_at = drawn
        .armed
        .iter()
        .filter(|_| dark.by_itself)
        .map(ToString::to_string)
        .chain(aftermath.cut_off_at.iter().cloned())
        .collect();
    outage.resume_ns = aftermath.resume.map(nanoseconds);
    if let (Some(holdup), true) = (drawn.holdup, outage.warned) {
        let passed = dark.after.is_some_and(|after| after >= holdup);
        outage.in_time = if outage.freeze.is_some() { Some(true) } else { passed.then_some(false) };
    }
    let now = subject.life.as_ref().map(|life| life.text()).unwrap_or_default();
    let first = first_link(&now);
    outage.lost_links = match outage.went_on {
        // What a disk kept is not lost.
        WentOnFrom::Boot => {
            let found = guests::records::found(&now).unwrap_or(0);
            aftermath.last_link.map(|last| last.saturating_sub(found))
        }
        _ => aftermath.last_link.zip(first).map(|(last, first)| (last + 2).saturating_sub(first)),
    };
    outage
}

fn frozen(answered: &Answered) -> Option<FreezeReport> {
    match &answered.answer {
        Answer::Frozen(report) => Some(**report),
        Answer::Refused(_) | Answer::Silent(_) => None,
    }
}

/// What is known of every VM; the guest's chain is recomputed.
fn record(
    subject: &mut Subject,
    answered: Option<&Answered>,
    went_on: WentOnFrom,
    mut problems: Vec<String>,
) -> VmOutage {
    let now = subject.life.as_ref().map(|life| life.text()).unwrap_or_default();
    problems.extend(subject.ended_by_itself.take());
    let mut verdict = Verdict::RunsOn;
    match subject.transcript.judge(&now) {
        Some(Ok(links)) if links.rewound > subject.rewinds => {
            problems.push(format!(
                "its guest went back {} times, and it to a generation {}",
                links.rewound, subject.rewinds
            ));
        }
        Some(Ok(links)) => verdict = Verdict::Unbroken { links: links.reached },
        Some(Err(why)) => problems.push(why),
        None => {}
    }
    if !problems.is_empty() {
        verdict = Verdict::Violated { why: problems.join("; ") };
    }
    VmOutage {
        name: subject.name.clone(),
        medium: subject.medium.clone(),
        warned: answered.is_some(),
        warned_ns: answered.map_or(0, |answered| nanoseconds(answered.warned)),
        freeze: answered.and_then(frozen),
        in_time: None,
        not_frozen: answered.and_then(|answered| match &answered.answer {
            Answer::Frozen(_) => None,
            Answer::Refused(why) | Answer::Silent(why) => Some(why.clone()),
        }),
        cut_off_at: Vec::new(),
        went_on,
        attempts: 1,
        damaged: None,
        lost_ns: 0,
        lost_links: None,
        resume_ns: None,
        verdict,
    }
}
