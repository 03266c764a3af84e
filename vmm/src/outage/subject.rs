//! A VM that suffers outages: how it is started, and what it can go on from.

use std::path::Path;
use std::time::{Duration, Instant};

use allocator::{Pool, PoolError};
use snapshot::Generation;

use super::OutageError;
use super::interrupt::Interrupt;
use super::judge::Transcript;
use super::life::{Doom, Life, was_cut};
use super::ring::Records;
use crate::persistence::generations::{self, family};
use crate::persistence::recovery::{Doubt, assess};
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::control::{ControlClient, Request, Response, Status};

/// How long anything may take that takes milliseconds, on a machine that is busy.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Lines that a guest with a chain is to print before it counts as running.
const LINES: usize = 3;

/// What a VM can go on from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Way {
    /// In place, from this context.
    Resume(u64),
    /// From a generation; this is the newest.
    Recover(Box<Generation>),
    /// From its kernel.
    Boot,
}

impl Way {
    /// In words.
    pub(super) fn words(&self) -> String {
        match self {
            Self::Resume(sequence) => format!("context {sequence}"),
            Self::Recover(newest) => format!("generation {}", newest.id),
            Self::Boot => "nothing".to_owned(),
        }
    }
}

/// One VM.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) name: String,
    /// The arguments that start it from its kernel.
    pub(super) run: Vec<String>,
    pub(super) priority: i32,
    /// Whether it keeps a chain that can be recomputed.
    pub(super) chained: bool,
    pub(super) medium: String,
    pub(super) life: Option<Life>,
    pub(super) transcript: Transcript,
    /// What it has on its disk, if that can be told.
    pub(super) records: Records,
    /// How often it may have gone back since it was booted.
    pub(super) rewinds: usize,
    pub(super) booted: Instant,
    /// The newest generation that it was said to have.
    pub(super) told_generation: u64,
    /// It is to cut itself off somewhere.
    pub(super) doomed: bool,
    /// How it ended while the power was on, which it was not to.
    pub(super) ended_by_itself: Option<String>,
}

impl Subject {
    /// One that has never run.
    pub(super) fn new(name: String, run: Vec<String>) -> Self {
        Self {
            run,
            name,
            priority: 0,
            chained: false,
            medium: String::new(),
            life: None,
            transcript: Transcript::default(),
            records: Records::default(),
            rewinds: 0,
            booted: Instant::now(),
            told_generation: 0,
            doomed: false,
            ended_by_itself: None,
        }
    }

    /// What survived, by what the pool holds.
    pub(super) fn way(&self, pool: &Path) -> Result<Way, OutageError> {
        let pool = match Pool::open(pool, vfs::cut::host()) {
            Err(PoolError::Catalog(allocator::CatalogError::Missing { .. })) => return Ok(Way::Boot),
            other => other?,
        };
        let regions = match VmRegions::open(&pool, &self.name) {
            Err(RegionsError::NoSuchVm(_) | RegionsError::Unfinished(_)) => return Ok(Way::Boot),
            Err(RegionsError::NoContext { .. }) => None,
            other => Some(other?),
        };
        match regions.as_ref().map(assess) {
            Some(Ok(())) => return Ok(Way::Resume(regions.map_or(0, |regions| regions.context().sequence))),
            Some(Err(Doubt::NotFrozen(_))) => return Ok(Way::Boot),
            _ => {}
        }
        Ok(self.newest_generation(&pool, regions.as_ref())?.map_or(Way::Boot, |newest| Way::Recover(Box::new(newest))))
    }

    fn newest_generation(&self, pool: &Pool, regions: Option<&VmRegions>) -> Result<Option<Generation>, OutageError> {
        let config = regions.map(|regions| regions.config().clone()).unwrap_or_default();
        let family = family(&config, &self.name);
        match generations::open_existing(pool.dir(), family, &config.generations) {
            Ok(store) => Ok(store.and_then(|store| store.newest(&self.name))),
            // One that a cut kept from being made.
            Err(generations::GenerationsError::Store(snapshot::StoreError::NotAStore { .. })) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Starts it that way.
    pub(super) fn start(&mut self, way: &Way, pool: &Path, record: &Path, doom: Doom) -> Result<(), OutageError> {
        let resume = ["resume".to_owned(), self.name.clone()];
        let arguments = match way {
            Way::Boot => {
                self.transcript.forget();
                self.rewinds = 0;
                self.told_generation = 0;
                self.booted = Instant::now();
                &self.run[..]
            }
            Way::Recover(_) => {
                self.rewinds += 1;
                self.records.go_back();
                &resume[..]
            }
            Way::Resume(_) => &resume[..],
        };
        self.life = Some(Life::begin(pool, record, arguments, doom)?);
        self.doomed = doom.cut_at.is_some();
        Ok(())
    }

    /// Whether it has cut itself off, as it was to.
    pub(super) fn cut_itself_off(&mut self) -> bool {
        self.doomed && self.life.as_mut().and_then(Life::ended).is_some_and(was_cut)
    }

    /// Waits until the guest has said something, or its VMM answers if it never does. How long it took; `None` if it has ended.
    pub(super) fn wait_until_up(
        &mut self,
        pool: &Path,
        interrupt: &Interrupt,
    ) -> Result<Option<Duration>, OutageError> {
        let (chained, name) = (self.chained, self.name.clone());
        let Some(life) = &mut self.life else { return Ok(None) };
        let mut answered = None;
        let up = life.wait_until(PATIENCE, interrupt, |life| {
            if chained {
                return life.lines() >= LINES;
            }
            if status(pool, &name).is_some() {
                answered.get_or_insert_with(|| life.begun.elapsed());
            }
            answered.is_some()
        })?;
        if !up && life.ended().is_none() {
            let (name, words) = (self.name.clone(), life.complaints());
            return Err(OutageError::Hangs { name, words });
        }
        Ok(if chained { life.first_output().filter(|_| up) } else { answered })
    }

    /// What is wrong with its disk, as it runs.
    pub(super) fn watch_records(&mut self, pool: &Path) -> Option<String> {
        let life = self.life.as_ref();
        self.records.watch(pool, || life.map(Life::text).unwrap_or_default())
    }

    /// Learns which generations it says are durable.
    pub(super) fn note_generations(&mut self, pool: &Path) {
        let last = status(pool, &self.name).and_then(|status| status.generations.last);
        let number = last.and_then(|report| report.generation.rsplit_once('@')?.1.parse().ok());
        self.told_generation = self.told_generation.max(number.unwrap_or(0));
    }
}

/// What a VM's process says of it, if it answers.
pub(super) fn status(pool: &Path, name: &str) -> Option<Status> {
    match ControlClient::connect(pool, name).and_then(|client| client.ask(&Request::Status)) {
        Ok(Response::Status(status)) => Some(*status),
        _ => None,
    }
}
