//! Generations of the running VM: when they are taken, and the thread that stores them.
//!
//! ```text
//!   supervisor's thread                        the thread "generations"
//!   ─────────────────────                      ─────────────────────────────────────────
//!   order (a client, the timer) ── Begin ────► open the store, copy while the guest runs
//!   hold the guest, copy the rest ◄─ Ready ───
//!                                 ── Moment ─► store, commit
//!   answer the client           ◄── Stored ─── then: retention, sweep
//! ```
//!
//! The supervisor never waits for the store. One generation is under way at a time; orders of clients queue up, those of the
//! timer are dropped while one is under way. A power-fail signal gives up what is under way: the freeze goes first.

mod worker;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use snapshot::{GenerationId, Origin};

use super::control::{Reply, Response};
use super::{Chain, Wake};
use crate::machine::Machine;
use crate::machine::config::VmConfig;
use crate::machine::dirty::PageSet;
use crate::persistence::capture::{self, CaptureError, CaptureReport, Failed, Room, Wanted};
use crate::persistence::freeze::{Surroundings, Vcpus};
use crate::persistence::generations;
use crate::persistence::regions::VmRegions;
use worker::{Access, FromWorker, ToWorker, Worker};

/// Fewer pages than this are left to the pause: 8 MiB are copied in about a millisecond.
const PRECOPY_FROM: u64 = 2048;
/// How many generations go by after one in which copying before the pause was for nothing.
const PRECOPY_REST: u32 = 16;

/// How generations fare, for [`super::control::Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationsStatus {
    /// The family that this VM's generations are stored with.
    pub family: String,
    /// How often one is taken by itself, in milliseconds.
    pub every_ms: Option<u64>,
    /// How many were taken since the process has the VM.
    pub taken: u64,
    /// The last of them.
    pub last: Option<CaptureReport>,
    /// Why the newest one that was tried is not there.
    pub failed: Option<String>,
}

/// Who is told what became of an order.
#[derive(Debug)]
pub(super) enum Teller {
    Client(Reply),
    Here(mpsc::Sender<Result<CaptureReport, String>>),
    Nobody,
}

impl Teller {
    fn tell(&self, result: Result<&CaptureReport, &str>) {
        match (self, result) {
            (Self::Client(reply), Ok(report)) => reply.send(&Response::Snapshot(Box::new(report.clone()))),
            (Self::Client(reply), Err(why)) => reply.send(&Response::Refused { why: why.to_owned() }),
            (Self::Here(sender), result) => drop(sender.send(result.cloned().map_err(str::to_owned))),
            (Self::Nobody, _) => {}
        }
    }
}

/// A generation that somebody wants.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) label: Option<String>,
    pub(super) protect: bool,
    pub(super) origin: Origin,
    pub(super) teller: Teller,
}

#[derive(Debug)]
enum Stage {
    Idle,
    /// Copied while the guest runs.
    Copying(Order),
    /// Stored.
    Storing(Order),
}

/// Whether pages are copied before the pause, learnt from what came of it.
#[derive(Debug, Default)]
struct Precopy {
    /// Pages that the pause had to copy last time.
    left: u64,
    /// So many generations go by before it is tried again.
    rest: u32,
}

impl Precopy {
    fn worthwhile(&self) -> bool {
        self.left > PRECOPY_FROM && self.rest == 0
    }

    fn learn(&mut self, report: &CaptureReport) {
        // The pause of a full generation has what changed in a moment, and says nothing of an interval.
        let useless = !report.full && report.pages_before > 0 && 2 * report.pages > report.pages_before;
        self.rest = if useless { PRECOPY_REST } else { self.rest.saturating_sub(1) };
        // Where it helped, it is to help again, though little was left.
        let before = if report.full { 0 } else { report.pages_before };
        self.left = report.pages.max(before);
    }
}

/// The generations of one VM.
#[derive(Debug)]
pub(super) struct Generations {
    access: Access,
    every: Option<Duration>,
    due: Option<Instant>,
    stage: Stage,
    queue: VecDeque<Order>,
    /// What the pages that the tracker tells are changes to.
    base: Option<GenerationId>,
    /// Changes to `base` that the tracker no longer tells.
    carried: Option<PageSet>,
    precopy: Precopy,
    watching: bool,
    worker: Option<Worker>,
    cancel: Arc<AtomicBool>,
    wake: Arc<Wake>,
    status: GenerationsStatus,
}

impl Generations {
    pub(super) fn new(pool: PathBuf, name: &str, config: &VmConfig, wake: Arc<Wake>) -> Self {
        let family = generations::family(config, name).to_owned();
        let every = config.snapshot_every_ms.map(Duration::from_millis);
        Self {
            access: Access {
                pool,
                family: family.clone(),
                lineage: name.to_owned(),
                config: config.generations.clone(),
            },
            every,
            due: every.map(|every| Instant::now() + every),
            stage: Stage::Idle,
            queue: VecDeque::new(),
            base: None,
            carried: None,
            precopy: Precopy::default(),
            watching: false,
            worker: None,
            cancel: Arc::new(AtomicBool::new(false)),
            wake,
            status: GenerationsStatus { family, every_ms: config.snapshot_every_ms, ..GenerationsStatus::default() },
        }
    }

    /// RAM is that of generation `base` but for `changed`, and for what changes from now on. With `changed` all of persistent memory may have
    /// changed, too: it was restored before the VM ran first.
    ///
    /// # Errors
    /// [`CaptureError::Kvm`].
    pub(super) fn build_on(
        &mut self,
        base: &GenerationId,
        changed: Option<&PageSet>,
        machine: &Machine,
    ) -> Result<(), CaptureError> {
        machine.dirty_tracker().enable()?;
        self.watching = true;
        self.base = Some(base.clone());
        self.carried = changed.map(|changed| {
            let ram = machine.ram();
            let mut pages = PageSet::new(ram.pages());
            pages.union(changed);
            pages.insert_run(&(ram.ram_pages()..ram.pages()));
            pages
        });
        Ok(())
    }

    pub(super) fn status(&self) -> GenerationsStatus {
        self.status.clone()
    }

    /// Takes one each time `every` has passed, from now on.
    pub(super) fn set_interval(&mut self, every: Option<Duration>) {
        self.every = every;
        self.due = every.map(|every| Instant::now() + every);
    }

    /// How long until the timer wants one; `None` if it never does.
    pub(super) fn due_in(&self) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// Looks at the clock. Of a paused VM nothing changes, so none is taken by itself.
    pub(super) fn tick(&mut self, machine: &Machine, paused: bool) {
        let (Some(due), Some(every)) = (self.due, self.every) else { return };
        let now = Instant::now();
        if now < due {
            return;
        }
        // From the time that it was due, so that the mean interval is the one asked for; what was missed is not made up for.
        self.due = Some((due + every).max(now));
        if matches!(self.stage, Stage::Idle) && self.queue.is_empty() && !paused {
            self.order(
                Order { label: None, protect: false, origin: Origin::Automatic, teller: Teller::Nobody },
                machine,
            );
        }
    }

    /// Takes an order.
    pub(super) fn order(&mut self, order: Order, machine: &Machine) {
        self.queue.push_back(order);
        self.next(machine);
    }

    /// Begins with the next order if nothing is under way.
    fn next(&mut self, machine: &Machine) {
        if !matches!(self.stage, Stage::Idle) {
            return;
        }
        let Some(order) = self.queue.pop_front() else { return };
        self.cancel.store(false, Ordering::Relaxed);
        let wanted = Wanted {
            lineage: self.access.lineage.clone(),
            base: self.base.clone(),
            label: order.label.clone(),
            protect: order.protect,
            origin: order.origin,
            carried: self.carried.take(),
            expected: self.precopy.left,
            // Paged memory that changed may be swapped out by now, and is not to be read in the pause.
            precopy: self.precopy.worthwhile() || machine.config().geometry().is_some(),
        };
        let carried = wanted.carried.clone();
        self.watching = true;
        let begun = self.worker().and_then(|worker| worker.send(ToWorker::Begin(wanted, machine.dirty_tracker())));
        match begun {
            Ok(()) => self.stage = Stage::Copying(order),
            Err(error) => {
                self.carried = carried;
                self.failed(&order, &error);
            }
        }
    }

    fn worker(&mut self) -> Result<&Worker, CaptureError> {
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start(self.access.clone(), Arc::clone(&self.wake), Arc::clone(&self.cancel))?,
        };
        Ok(self.worker.insert(worker))
    }

    fn carry(&mut self, pages: &PageSet) {
        match &mut self.carried {
            Some(carried) => carried.union(pages),
            None => self.carried = Some(pages.clone()),
        }
    }

    fn failed(&mut self, order: &Order, error: &CaptureError) {
        let why = Chain(error).to_string();
        if self.status.failed.as_ref() != Some(&why) {
            tracing::warn!("{}: no generation, the VM runs on: {why}", self.access.lineage);
        }
        order.teller.tell(Err(&why));
        self.status.failed = Some(why);
    }

    /// Handles what the worker has to say.
    ///
    /// # Errors
    /// [`CaptureError::Stuck`]: the VM stands still and cannot be let go.
    pub(super) fn take_news(
        &mut self,
        machine: &Machine,
        regions: &VmRegions,
        surroundings: &dyn Surroundings,
        vcpus: Vcpus,
    ) -> Result<(), CaptureError> {
        while let Some(news) = self.worker.as_ref().and_then(|worker| worker.outbox.try_recv().ok()) {
            match news {
                FromWorker::Progress(done, total) => self.on_progress(done, total),
                FromWorker::Ready(room) => self.hold(room, machine, regions, surroundings, vcpus)?,
                FromWorker::Stored(report, id) => self.on_stored(*report, id),
                FromWorker::Failed(failed) => self.on_failed(&failed),
            }
        }
        self.next(machine);
        Ok(())
    }

    fn on_progress(&self, done: u64, total: u64) {
        if let Stage::Copying(Order { teller: Teller::Client(reply), .. }) = &self.stage {
            reply.send(&Response::Progress { done, total });
        }
    }

    fn hold(
        &mut self,
        room: Room,
        machine: &Machine,
        regions: &VmRegions,
        surroundings: &dyn Surroundings,
        vcpus: Vcpus,
    ) -> Result<(), CaptureError> {
        let Stage::Copying(order) = std::mem::replace(&mut self.stage, Stage::Idle) else { return Ok(()) };
        let mut changed = self.carried.take().unwrap_or_else(|| PageSet::new(machine.ram().pages()));
        let held = if self.cancel.load(Ordering::Relaxed) {
            Err(CaptureError::Abandoned)
        } else {
            capture::hold(machine, regions, surroundings, vcpus, room, &mut changed)
        };
        let (message, result) = match held {
            Ok(moment) => (ToWorker::Moment(Box::new(moment)), Ok(())),
            Err(error) => {
                self.carry(&changed);
                self.failed(&order, &error);
                (ToWorker::Abandon, if matches!(error, CaptureError::Stuck(_)) { Err(error) } else { Ok(()) })
            }
        };
        // Also after an error: what the worker was told comes back with its answer to this.
        self.stage = Stage::Storing(order);
        if let Err(error) = self.worker().and_then(|worker| worker.send(message)) {
            // Its pages are lost with the worker: everything is looked at next time.
            self.base = None;
            if let Stage::Storing(order) = std::mem::replace(&mut self.stage, Stage::Idle) {
                self.failed(&order, &error);
            }
        }
        result
    }

    fn on_stored(&mut self, report: CaptureReport, id: GenerationId) {
        if let Stage::Storing(order) = std::mem::replace(&mut self.stage, Stage::Idle) {
            order.teller.tell(Ok(&report));
        }
        tracing::debug!("{}: generation {id}, paused for {} ns", self.access.lineage, report.pause_ns);
        self.base = Some(id);
        self.precopy.learn(&report);
        self.status.taken += 1;
        self.status.failed = None;
        self.status.last = Some(report);
    }

    fn on_failed(&mut self, Failed { error, pages }: &Failed) {
        self.carry(pages);
        match std::mem::replace(&mut self.stage, Stage::Idle) {
            // It was told why already if the machine could not be held.
            Stage::Copying(order) | Stage::Storing(order) if !matches!(error, CaptureError::Abandoned) => {
                self.failed(&order, error);
            }
            _ => {}
        }
    }

    /// The guest was reset: a fresh machine goes on over the same memory. Before the new one runs.
    ///
    /// # Errors
    /// [`CaptureError::Kvm`].
    pub(super) fn machine_changes(&mut self, old: &Machine, new: &Machine) -> Result<(), CaptureError> {
        if self.watching {
            let mut changed = PageSet::new(old.ram().pages());
            old.dirty_tracker().collect(&mut changed)?;
            self.carry(&changed);
            new.dirty_tracker().enable()?;
        }
        Ok(())
    }

    /// Gives up what is under way and what is wanted: something else goes first. Does not wait.
    pub(super) fn give_up(&mut self, why: &str) {
        self.cancel.store(true, Ordering::Relaxed);
        for order in self.queue.drain(..) {
            order.teller.tell(Err(why));
        }
        if let Stage::Copying(order) | Stage::Storing(order) = &mut self.stage {
            std::mem::replace(&mut order.teller, Teller::Nobody).tell(Err(why));
        }
    }

    /// The guest has ended: a moment that was taken is still stored, nothing else begins.
    pub(super) fn finish(&mut self) {
        let why = "the VM ended first";
        self.due = None;
        if !matches!(self.stage, Stage::Storing(_)) {
            return self.give_up(why);
        }
        for order in self.queue.drain(..) {
            order.teller.tell(Err(why));
        }
        while matches!(self.stage, Stage::Storing(_)) {
            match self.worker.as_ref().map(|worker| worker.outbox.recv()) {
                Some(Ok(FromWorker::Stored(report, id))) => self.on_stored(*report, id),
                Some(Ok(FromWorker::Failed(failed))) => self.on_failed(&failed),
                Some(Ok(FromWorker::Ready(_) | FromWorker::Progress(..))) => {}
                Some(Err(_)) | None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(full: bool, pages: u64, pages_before: u64) -> CaptureReport {
        CaptureReport {
            generation: "web@1".to_owned(),
            full,
            pause_ns: 0,
            steps: capture::PauseSteps::default(),
            pages,
            pages_before,
            pages_stored: 0,
            bytes_stored: 0,
            before_ns: 0,
            store_ns: 0,
            time_ms: 0,
        }
    }

    #[test]
    fn pages_are_copied_before_the_pause_where_that_helps_and_no_longer_where_not() {
        let mut precopy = Precopy::default();
        precopy.learn(&report(true, 100, 1 << 18));
        assert!(!precopy.worthwhile(), "a full generation says nothing of an interval");
        precopy.learn(&report(false, 1024, 0));
        assert!(!precopy.worthwhile(), "1024 pages are few");
        precopy.learn(&report(false, 50_000, 0));
        assert!(precopy.worthwhile());
        precopy.learn(&report(false, 200, 50_000));
        assert!(precopy.worthwhile(), "it helped");
        precopy.learn(&report(false, 49_000, 50_000));
        assert!(!precopy.worthwhile(), "it was for nothing");
        for _ in 0..PRECOPY_REST {
            assert!(!precopy.worthwhile());
            precopy.learn(&report(false, 49_000, 0));
        }
        assert!(precopy.worthwhile(), "it is tried again");
    }
}
