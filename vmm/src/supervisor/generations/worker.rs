//! The thread that stores generations. It knows nothing of the machine but its memory, and decides nothing.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use snapshot::{GenerationId, Origin, Store, StoreError};

use crate::machine::config::generations::GenerationsConfig;
use crate::machine::dirty::{DirtyTracker, PageSet};
use crate::machine::jail::{self, Role};
use crate::persistence::capture::{Capture, CaptureError, CaptureReport, Failed, Moment, Room, Wanted};
use crate::persistence::generations;
use crate::supervisor::{Chain, Wake};

/// How often a client is told how far its generation is.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// Where the generations go.
#[derive(Debug, Clone)]
pub(super) struct Access {
    pub(super) pool: PathBuf,
    pub(super) family: String,
    pub(super) lineage: String,
    pub(super) config: GenerationsConfig,
}

pub(super) enum ToWorker {
    /// Take one.
    Begin(Wanted, DirtyTracker),
    /// Its moment.
    Moment(Box<Moment>),
    /// There will be none.
    Abandon,
}

pub(super) enum FromWorker {
    /// Pages copied, pages in all.
    Progress(u64, u64),
    /// The guest may be held, and the rest copied to here.
    Ready(Room),
    Stored(Box<CaptureReport>, GenerationId),
    Failed(Failed),
}

/// The thread that stores, seen from the supervisor.
#[derive(Debug)]
pub(super) struct Worker {
    inbox: Option<mpsc::Sender<ToWorker>>,
    pub(super) outbox: mpsc::Receiver<FromWorker>,
    thread: Option<JoinHandle<()>>,
    cancel: Arc<AtomicBool>,
}

impl Worker {
    pub(super) fn start(access: Access, wake: Arc<Wake>, cancel: Arc<AtomicBool>) -> Result<Self, CaptureError> {
        let (inbox, orders) = mpsc::channel();
        let (news, outbox) = mpsc::channel();
        let mut work = Work { access, news, wake, cancel: Arc::clone(&cancel), store: None, room: Room::default() };
        let serve = move || {
            while let Ok(order) = orders.recv() {
                // A moment without a beginning is an answer to a capture that failed meanwhile.
                if let ToWorker::Begin(wanted, tracker) = order {
                    work.generation(wanted, &tracker, &orders);
                }
            }
        };
        let thread = jail::spawn("generations", Role::Generations, serve);
        Ok(Self { inbox: Some(inbox), outbox, thread: Some(thread.map_err(CaptureError::Thread)?), cancel })
    }

    pub(super) fn send(&self, message: ToWorker) -> Result<(), CaptureError> {
        let sent = self.inbox.as_ref().is_some_and(|inbox| inbox.send(message).is_ok());
        if sent { Ok(()) } else { Err(CaptureError::Cancelled("the thread that stores generations is gone")) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        drop(self.inbox.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread owns.
struct Work {
    access: Access,
    news: mpsc::Sender<FromWorker>,
    wake: Arc<Wake>,
    cancel: Arc<AtomicBool>,
    store: Option<Store>,
    room: Room,
}

impl Work {
    fn tell(&self, news: FromWorker) {
        // The supervisor has ended if nobody receives.
        let _ = self.news.send(news);
        self.wake.ring();
    }

    fn generation(&mut self, wanted: Wanted, tracker: &DirtyTracker, orders: &mpsc::Receiver<ToWorker>) {
        let automatic = wanted.origin == Origin::Automatic;
        match self.take(wanted, tracker, orders) {
            Ok(report) => {
                let id = report.generation.parse();
                if let Ok(id) = id {
                    self.tell(FromWorker::Stored(Box::new(report), id));
                }
                if automatic {
                    self.retain();
                }
            }
            Err(failed) => {
                // After an error of the store nothing of what this handle knows is believed.
                self.store = None;
                self.tell(FromWorker::Failed(failed));
            }
        }
    }

    fn take(
        &mut self,
        mut wanted: Wanted,
        tracker: &DirtyTracker,
        orders: &mpsc::Receiver<ToWorker>,
    ) -> Result<CaptureReport, Failed> {
        let carried = wanted.carried.clone().unwrap_or_else(|| PageSet::new(tracker.ram().pages()));
        let mut capture = match self.begin(&mut wanted, tracker) {
            Ok(capture) => capture,
            Err(error) => return Err(Failed { error, pages: carried }),
        };
        let mut told = Instant::now();
        let mut progress = |done, total| {
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                let _ = self.news.send(FromWorker::Progress(done, total));
                self.wake.ring();
            }
        };
        let mut room = std::mem::take(&mut self.room);
        if let Err(error) = capture.precopy(&wanted, &mut room, &self.cancel, &mut progress) {
            return Err(Failed { error, pages: capture.into_pages() });
        }
        self.tell(FromWorker::Ready(room));
        match orders.recv() {
            Ok(ToWorker::Moment(moment)) => capture.store(*moment, &mut self.room, &self.cancel),
            Ok(ToWorker::Abandon | ToWorker::Begin(..)) | Err(_) => {
                Err(Failed { error: CaptureError::Abandoned, pages: capture.into_pages() })
            }
        }
    }

    fn begin(&mut self, wanted: &mut Wanted, tracker: &DirtyTracker) -> Result<Capture, CaptureError> {
        let store = match &self.store {
            Some(store) => store.clone(),
            None => {
                let Access { pool, family, config, .. } = &self.access;
                self.store.insert(generations::open(pool, family, config)?).clone()
            }
        };
        match Capture::begin(&store, wanted, tracker.clone()) {
            Err(CaptureError::Store(error @ (StoreError::NoSuchGeneration { .. } | StoreError::Damaged { .. })))
                if wanted.base.is_some() =>
            {
                tracing::warn!("{}: every page is looked at: {}", self.access.lineage, Chain(&error));
                wanted.base = None;
                Capture::begin(&store, wanted, tracker.clone())
            }
            other => other,
        }
    }

    /// Lets go of generations that are too many or too old, and takes their space back when that is worth it.
    fn retain(&mut self) {
        let Some(store) = &self.store else { return };
        let Access { lineage, config, .. } = &self.access;
        let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis();
        let policy = generations::retention(config);
        let done = store.retain(lineage, &policy, u64::try_from(now_ms).unwrap_or(u64::MAX)).and_then(|gone| {
            for (id, reason) in &gone {
                tracing::info!("generation {id} is gone: {reason:?}");
            }
            if store.sweep_is_due() { store.sweep(&mut |_| ()).map(drop) } else { Ok(()) }
        });
        if let Err(error) = done {
            tracing::warn!("{lineage}: old generations are not cleared away: {}", Chain(&error));
        }
    }
}
