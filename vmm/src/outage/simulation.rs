//! Outages of one machine, one after the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use allocator::Pool;
use vfs::cut::image::Loss;
use vfs::cut::point::CutAt;

use super::OutageError;
use super::account::{Aftermath, Darkness, account, problems_of, ran_on, went_back_to};
use super::copy::copy_vm;
use super::damage::listed;
use super::ground::Ground;
use super::interrupt::Interrupt;
use super::life::{Doom, Life, was_cut};
use super::plan::{Drawn, DrawnCut, RECORDS, VmPlan, is_on_pmem};
use super::report::OutageReport;
use super::ring::Records;
use super::subject::{PATIENCE, Subject, Way};
use super::warning::{Warning, power_back};
use crate::machine::config::disks::DiskConfig;
use crate::machine::config::{Kernel, VmConfig};
use crate::machine::time::nanoseconds;

/// How long a point is waited for that a process is to cut itself off at.
const POINT_PATIENCE: Duration = Duration::from_secs(10);
/// Between two power failures of a flapping supply.
const FLAP_PAUSE: Duration = Duration::from_millis(5);
/// A VM is told a hold-up that is longer by this where the power comes back within it: that is the simulator's to say.
const GRACE: Duration = Duration::from_secs(10);
/// How many times a VM is started after an outage, at most.
const ATTEMPTS: usize = 64;

/// A machine, its VMs, and a supply that fails.
#[derive(Debug)]
pub(super) struct Simulation {
    subjects: Vec<Subject>,
    ground: Ground,
    interrupt: Interrupt,
    /// What was wrong with the pool from the beginning.
    known: Vec<String>,
    /// The outage before was not as it must be: what is left of it is no ground for another.
    broken: bool,
}

/// Whether what a guest prints can be recomputed.
fn keeps_chain(guest: &str) -> bool {
    matches!(guest, "counter" | "smp" | RECORDS)
}

/// The region that the guest of the VM `name` keeps records on, if it does.
fn records_region(name: &str, config: &VmConfig) -> Option<String> {
    if !matches!(&config.kernel, Kernel::Guest(guest) if guest == RECORDS) {
        return None;
    }
    let on = match (is_on_pmem(&config.cmdline), config.pmem.first(), config.disks.first()) {
        (true, Some(pmem), _) => &pmem.name,
        (false, _, Some(DiskConfig::Pool { name, .. })) => name,
        _ => return None,
    };
    Some(format!("{name}/{on}"))
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Simulation {
    /// A machine with these VMs, whose pool lies below `parent`.
    ///
    /// # Errors
    /// [`OutageError::System`].
    pub(super) fn new(
        parent: &Path,
        machine: usize,
        vms: &[VmPlan],
        interrupt: Interrupt,
    ) -> Result<Self, OutageError> {
        let ground = Ground::create(parent, machine)?;
        let subject = |(index, plan): (usize, &VmPlan)| {
            let name = if vms.len() == 1 { plan.guest.clone() } else { format!("{}-{}", plan.guest, index + 1) };
            let run = plan.arguments(&name);
            let chained = keeps_chain(&plan.guest);
            let records = Records::on(plan.records_region(&name));
            Subject { priority: plan.priority, chained, records, ..Subject::new(name, run) }
        };
        let subjects = vms.iter().enumerate().map(subject).collect();
        Ok(Self { subjects, ground, interrupt, known: Vec::new(), broken: false })
    }

    /// A machine with a copy of the VM `name` of `pool`, below that pool. The VM itself must not run, and is not touched.
    ///
    /// # Errors
    /// [`OutageError::NotCopied`], [`OutageError::Regions`], [`OutageError::System`].
    pub(super) fn of_copy(pool: &Pool, machine: usize, name: &str, interrupt: Interrupt) -> Result<Self, OutageError> {
        let ground = Ground::create(pool.dir(), machine)?;
        let config = copy_vm(pool, name, &ground.pool())?;
        let mut subject = Subject::new(name.to_owned(), vec!["run".to_owned(), name.to_owned()]);
        let guest = match &config.kernel {
            Kernel::Guest(guest) => keeps_chain(guest),
            _ => false,
        };
        subject.records = Records::on(records_region(name, &config));
        // Of a guest that was booted before, the beginning of its chain is not known.
        subject.chained = guest && subject.way(&ground.pool())? == Way::Boot;
        // Regions of other VMs are not in the copy.
        let known = problems_of(&ground.pool());
        Ok(Self { subjects: vec![subject], ground, interrupt, known, broken: false })
    }

    /// Suffers outages, which come with their numbers, one after the other. `tell` hears of each; it says whether to go on.
    ///
    /// # Errors
    /// [`OutageError`]; a violation is none, but in the report.
    pub(super) fn run(
        mut self,
        outages: impl Iterator<Item = (u32, Drawn)>,
        mut tell: impl FnMut(OutageReport) -> bool,
    ) -> Result<(), OutageError> {
        let mut outages = outages.peekable();
        if let Some((_, first)) = outages.peek().filter(|(_, first)| !first.birth) {
            self.bear(first)?;
        }
        while let Some((number, now)) = outages.next() {
            let outage = self.outage(number, &now, outages.peek().map(|(_, next)| next))?;
            if !tell(outage) {
                break;
            }
        }
        Ok(())
    }

    fn pool(&self) -> PathBuf {
        self.ground.pool()
    }

    /// Starts all VMs.
    fn bear(&mut self, first: &Drawn) -> Result<(), OutageError> {
        let (pool, record) = (self.pool(), self.ground.record());
        let ways = self.subjects.iter().map(|subject| subject.way(&pool)).collect::<Result<Vec<_>, _>>()?;
        self.ground.settle()?;
        for (subject, way) in self.subjects.iter_mut().zip(&ways) {
            subject.start(way, &pool, &record, Doom { cut_at: first.armed, fault: first.fault })?;
        }
        for subject in &mut self.subjects {
            let up = subject.wait_until_up(&pool, &self.interrupt)?;
            let cut = subject.life.as_mut().and_then(|life| life.ended()).is_some_and(was_cut);
            if up.is_none() && !cut {
                let words = subject.life.as_ref().map(|life| life.complaints()).unwrap_or_default();
                return Err(OutageError::NotStarted { name: subject.name.clone(), words: words.trim().to_owned() });
            }
        }
        Ok(())
    }

    /// The VMs as they were never before.
    fn bear_anew(&mut self, drawn: &Drawn) -> Result<(), OutageError> {
        let pool = self.pool();
        for subject in &mut self.subjects {
            subject.life = None;
            subject.medium.clear();
            subject.records.forget();
        }
        let system = |source| OutageError::System { doing: "empty the simulator's pool", source };
        std::fs::remove_dir_all(&pool).and_then(|()| std::fs::create_dir(&pool)).map_err(system)?;
        self.bear(drawn)
    }

    fn outage(&mut self, number: u32, drawn: &Drawn, next: Option<&Drawn>) -> Result<OutageReport, OutageError> {
        if drawn.birth || self.broken {
            self.bear_anew(drawn)?;
        }
        self.live(drawn)?;
        let dark = self.power_goes(drawn)?;
        let mut loss = Loss::default();
        let mut aftermath = match dark.after {
            Some(_) => self.come_back(drawn, next, &mut loss)?,
            None => Vec::new(),
        };
        let mut vms = Vec::new();
        let pool = self.pool();
        for (subject, aftermath) in self.subjects.iter_mut().zip(&mut aftermath) {
            aftermath.problems.extend(subject.watch_records(&pool));
        }
        for (index, subject) in self.subjects.iter_mut().enumerate() {
            let answered = dark.answers.iter().rfind(|answered| answered.vm == index);
            vms.push(match aftermath.get(index) {
                Some(aftermath) => account(subject, drawn, &dark, answered, aftermath),
                None => ran_on(subject, &pool, answered, &self.interrupt)?,
            });
            if let Some(freeze) = vms.last_mut().and_then(|vm| vm.freeze.as_mut()) {
                // It may have been told another one, see GRACE.
                freeze.holdup_left_ns = drawn.holdup.map(|holdup| nanoseconds(holdup).saturating_sub(freeze.total_ns));
            }
        }
        let report = OutageReport {
            number,
            seed: drawn.seed,
            cut: drawn.planned.clone(),
            at_ns: nanoseconds(drawn.at),
            holdup_ns: drawn.holdup.map(nanoseconds),
            flaps: dark.flaps,
            fault: drawn.fault.map(|fault| fault.to_string()),
            dark_ns: dark.after.map(nanoseconds),
            lost_bytes: loss.lost,
            lost_files: loss.lost_names,
            vms,
        };
        self.broken = report.is_violated();
        Ok(report)
    }

    /// Until the power goes.
    fn live(&mut self, drawn: &Drawn) -> Result<(), OutageError> {
        let until = Instant::now() + drawn.at;
        let pool = self.pool();
        let by_itself = drawn.cut == (DrawnCut::ByItself { signalled: false });
        let limit = until + if by_itself || drawn.needs_generation { POINT_PATIENCE } else { Duration::ZERO };
        while Instant::now() < limit {
            self.interrupt.wait_until((Instant::now() + Duration::from_millis(5)).min(limit))?;
            if drawn.needs_generation && Instant::now() > until {
                self.subjects.iter_mut().for_each(|subject| subject.note_generations(&pool));
                if self.subjects.iter().all(|subject| subject.told_generation > 0) {
                    break;
                }
            }
            for subject in &mut self.subjects {
                let Some(status) = subject.life.as_mut().and_then(|life| life.ended()) else { continue };
                // A point may be one that is passed as a VM runs already: its process may have survived the outage before.
                if was_cut(status) && subject.doomed {
                    return Ok(());
                }
                let words = subject.life.as_ref().map(|life| life.complaints()).unwrap_or_default();
                subject.ended_by_itself = Some(format!("it ended by itself, with {status}: {}", words.trim()));
                return Ok(());
            }
        }
        for subject in &mut self.subjects {
            subject.note_generations(&pool);
            if subject.medium.is_empty() {
                let regions = Pool::open(&pool, vfs::cut::host())?.list();
                let ram = format!("{}/ram", subject.name);
                let found = regions.iter().find(|region| region.name.to_string() == ram);
                subject.medium = found.map(|region| region.medium.to_string()).unwrap_or_default();
            }
        }
        Ok(())
    }

    fn warn(&self, holdup: Option<Duration>) -> Warning {
        let vms = self.subjects.iter().enumerate();
        let vms = vms.map(|(index, subject)| (index, subject.name.clone(), subject.priority)).collect();
        Warning::send(self.pool(), vms, holdup)
    }

    fn any_ended(&mut self) -> bool {
        self.subjects.iter_mut().any(|subject| subject.life.as_mut().is_none_or(|life| life.ended().is_some()))
    }

    fn cut_all(&mut self) {
        self.subjects.iter_mut().filter_map(|subject| subject.life.as_mut()).for_each(Life::cut);
    }

    /// From the signal to darkness, or to the return of the power.
    fn power_goes(&mut self, drawn: &Drawn) -> Result<Darkness, OutageError> {
        let mut dark = Darkness {
            after: None,
            moment: Instant::now(),
            time_ms: 0,
            answers: Vec::new(),
            by_itself: false,
            flaps: 0,
        };
        for back in &drawn.backs {
            if self.any_ended() {
                break;
            }
            self.interrupt.wait_until(Instant::now() + FLAP_PAUSE)?;
            let warning = self.warn(Some(drawn.holdup.unwrap_or_default() + *back + GRACE));
            self.interrupt.wait_until(warning.begun + *back)?;
            let pool = self.pool();
            for subject in &self.subjects {
                // A refusal says that it was not warned yet, or has not begun; then it is once more.
                let until = Instant::now() + PATIENCE;
                while power_back(&pool, &subject.name).is_err_and(|why| why.contains("not out"))
                    && Instant::now() < until
                {
                    self.interrupt.wait_until(Instant::now() + Duration::from_millis(1))?;
                }
            }
            dark.answers = warning.finish();
            dark.flaps += 1;
        }
        if drawn.cut == DrawnCut::Never && !self.subjects.iter_mut().any(Subject::cut_itself_off) {
            return Ok(dark);
        }
        // The power came back since.
        dark.answers.clear();
        let (begun, warning) = match drawn.cut {
            DrawnCut::Unannounced | DrawnCut::ByItself { signalled: false } => (Instant::now(), None),
            _ if self.any_ended() => (Instant::now(), None),
            _ => {
                let warning = self.warn(drawn.holdup.filter(|_| !matches!(drawn.cut, DrawnCut::ByItself { .. })));
                (warning.begun, Some(warning))
            }
        };
        let warning = self.await_darkness(drawn, begun, warning)?;
        let lives = self.subjects.iter_mut().filter_map(|subject| subject.life.as_mut());
        dark.by_itself = lives.filter_map(Life::ended).any(was_cut);
        self.cut_all();
        dark.after = Some(if warning.is_some() { begun.elapsed() } else { Duration::ZERO });
        (dark.moment, dark.time_ms) = (Instant::now(), now_ms());
        if let Some(warning) = warning {
            dark.answers = warning.finish();
        }
        Ok(dark)
    }

    fn await_darkness(
        &mut self,
        drawn: &Drawn,
        begun: Instant,
        warning: Option<Warning>,
    ) -> Result<Option<Warning>, OutageError> {
        let Some(mut warning) = warning else { return Ok(None) };
        if let DrawnCut::After(time) = drawn.cut {
            self.interrupt.wait_until(begun + time)?;
            return Ok(Some(warning));
        }
        let limit = Instant::now() + PATIENCE;
        let by_itself = matches!(drawn.cut, DrawnCut::ByItself { .. });
        loop {
            // One that is cut off takes all others with it. Its connection breaks before its end is known.
            let answered = warning.is_answered() && !(by_itself && warning.is_broken());
            if answered || Instant::now() > limit || (by_itself && self.any_ended()) {
                break;
            }
            self.interrupt.wait_until(Instant::now() + Duration::from_micros(500))?;
        }
        Ok(Some(warning))
    }

    /// From darkness until all VMs run.
    fn come_back(
        &mut self,
        drawn: &Drawn,
        next: Option<&Drawn>,
        loss: &mut Loss,
    ) -> Result<Vec<Aftermath>, OutageError> {
        let (pool, record) = (self.pool(), self.ground.record());
        let mut aftermath: Vec<Aftermath> = Vec::new();
        for attempt in 0..ATTEMPTS {
            let wrong = self.bury()?;
            let lost = self.ground.lose(drawn.loss_seed.wrapping_add(attempt as u64))?;
            loss.lost += lost.lost;
            loss.lost_names += lost.lost_names;
            let ways = self.survivors(drawn, &mut aftermath)?;
            aftermath.iter_mut().zip(wrong).for_each(|(aftermath, wrong)| aftermath.problems.extend(wrong));
            for ((subject, way), aftermath) in self.subjects.iter().zip(&ways).zip(&mut aftermath) {
                if !matches!(way, Way::Recover(_)) {
                    aftermath.problems.extend(subject.records.survived(&pool));
                }
            }
            let again = drawn.again.get(attempt).copied();
            let doom = match again {
                Some(cut_at) => Doom { cut_at: Some(cut_at), fault: None },
                None => next
                    .filter(|next| !next.birth)
                    .map_or_else(Doom::default, |next| Doom { cut_at: next.armed, fault: next.fault }),
            };
            self.ground.settle()?;
            for (subject, way) in self.subjects.iter_mut().zip(&ways) {
                subject.start(way, &pool, &record, doom)?;
            }
            if !self.are_up(&ways, again, doom.cut_at.is_some(), &mut aftermath)? {
                break;
            }
        }
        Ok(aftermath)
    }

    /// What each VM can go on from after a cut, and what of that is not as it must be. After the first cut of an outage a slot of its
    /// context may be damaged, too.
    fn survivors(&self, drawn: &Drawn, aftermath: &mut Vec<Aftermath>) -> Result<Vec<Way>, OutageError> {
        let pool = self.pool();
        let mut ways = Vec::new();
        for (index, subject) in self.subjects.iter().enumerate() {
            let mut way = subject.way(&pool)?;
            if let Some(aftermath) = aftermath.get_mut(index) {
                aftermath.attempts += 1;
                ways.push(way);
                continue;
            }
            let damaged = match drawn.damage {
                Some(damage) => damage.inflict(&pool, &subject.name, &way, drawn.loss_seed)?,
                None => None,
            };
            let mut problems = Vec::new();
            if let Some(damaged) = &damaged {
                way = subject.way(&pool)?;
                problems.extend(damaged.wrong(&way));
                if way == Way::Boot {
                    problems.extend(damaged.unsaid(&listed(&pool)?));
                }
            }
            aftermath.push(Aftermath { damaged, problems, ..Aftermath::new(way.clone(), subject) });
            ways.push(way);
        }
        if let Some(first) = aftermath.first_mut() {
            first.problems.extend(problems_of(&pool).into_iter().filter(|problem| !self.known.contains(problem)));
        }
        Ok(ways)
    }

    /// What processes left goes into the transcripts. What is wrong with what each said of its disk.
    fn bury(&mut self) -> Result<Vec<Option<String>>, OutageError> {
        self.cut_all();
        let bury = |subject: &mut Subject| {
            let Some(life) = subject.life.take() else { return Ok(None) };
            let printed = life.end()?;
            subject.transcript.push(&printed);
            Ok(subject.records.bury(&printed))
        };
        self.subjects.iter_mut().map(bury).collect()
    }

    /// Waits until all VMs run. Whether one was cut off where it was to be, so that all must begin anew.
    fn are_up(
        &mut self,
        ways: &[Way],
        again: Option<CutAt>,
        armed: bool,
        aftermath: &mut [Aftermath],
    ) -> Result<bool, OutageError> {
        let pool = self.pool();
        let mut cut_off = false;
        for ((subject, way), aftermath) in self.subjects.iter_mut().zip(ways).zip(aftermath) {
            aftermath.resume = subject.wait_until_up(&pool, &self.interrupt)?;
            let Some(life) = &mut subject.life else { continue };
            if let Way::Recover(newest) = way {
                let went = |words: &str| went_back_to(words).is_some();
                let words = life.wait_for_complaints(PATIENCE, &self.interrupt, went)?;
                // One that was cut off may have said nothing.
                let id = went_back_to(&words);
                let id = id.or_else(|| again.map(|_| newest.id.to_string()));
                aftermath.recovered = id.map(|id| (id, newest.time_ms)).or(aftermath.recovered.take());
            }
            if let (Way::Recover(_), 1, None, Some(damaged)) =
                (way, aftermath.attempts, life.ended(), &aftermath.damaged)
            {
                aftermath.problems.extend(damaged.unsaid(&life.complaints()));
            }
            match (life.ended(), again) {
                (Some(status), Some(point)) if was_cut(status) => {
                    aftermath.cut_off_at.push(point.to_string());
                    cut_off = true;
                }
                // It passed the point of the next outage already.
                (Some(status), None) if was_cut(status) && armed => {}
                (Some(status), _) => {
                    let words = life.complaints();
                    aftermath.problems.push(format!("it did not come back: {status}: {}", words.trim()));
                }
                (None, _) => {}
            }
        }
        Ok(cut_off)
    }
}
