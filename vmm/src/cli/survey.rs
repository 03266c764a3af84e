//! Which VMs there are, and how each is: asked of its process if one has it, else read from its regions.

use std::collections::BTreeSet;

use allocator::{Kind, Pool, RegionInfo};
use serde::Serialize;

use super::{Environment, lineage};
use crate::machine::config::VmConfig;
use crate::persistence::context::Standing;
use crate::persistence::recovery::assess;
use crate::persistence::regions::{RegionsError, VmRegions, region_name};
use crate::supervisor::control::{ControlClient, Request, Response, Status};

/// How a VM is, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum VmState {
    /// It has never run.
    Created,
    /// It runs.
    Running,
    /// A user paused it: it runs on at `perdure unpause`.
    Paused,
    /// It is being frozen.
    Freezing,
    /// It can be resumed.
    Frozen,
    /// It is being put together again.
    Resuming,
    /// Its guest ended; it can be started anew.
    Stopped,
    /// It was cut off while it ran.
    Unclean,
    /// Something of it is damaged or missing.
    Damaged,
}

impl VmState {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
            Self::Resuming => "resuming",
            Self::Stopped => "stopped",
            Self::Unclean => "unclean",
            Self::Damaged => "damaged",
        }
    }
}

/// How a VM is.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Survey {
    /// Its name.
    pub(super) name: String,
    /// In a word.
    pub(super) state: VmState,
    /// The process that has it.
    pub(super) pid: Option<u32>,
    /// The guest's memory in bytes, where it can be told.
    pub(super) memory: Option<u64>,
    /// What its memory lies on.
    pub(super) medium: Option<String>,
    /// Its vCPUs, where it can be told.
    pub(super) cpus: Option<u32>,
    /// More about the state: what was found, what to do.
    pub(super) detail: Option<String>,
    /// How much of its memory is restored, in per cent, where that goes on while it runs.
    pub(super) restored_percent: Option<u64>,
    /// What its process says of it.
    pub(super) status: Option<Status>,
    /// Its generations; looked for by [`Survey::with_generations`] alone.
    pub(super) generations: Option<Generations>,
}

/// The generations of a VM, in short.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Generations {
    /// How many.
    pub(super) count: usize,
    /// The newest.
    pub(super) newest: String,
    /// How old that is, in milliseconds.
    pub(super) newest_age_ms: u64,
}

/// The names of all VMs of a pool.
pub(super) fn names(pool: &Pool) -> BTreeSet<String> {
    // By either: whoever makes a VM may be interrupted between the two.
    let vm = |region: RegionInfo| {
        let part = match region.kind {
            Kind::Ram => "/ram",
            Kind::Context => "/context",
            Kind::Swap | Kind::Disk | Kind::Pmem | Kind::Log | Kind::Journal => return None,
        };
        region.name.to_string().strip_suffix(part).map(str::to_owned)
    };
    pool.list().into_iter().filter_map(vm).collect()
}

/// How the VM `name` is.
pub(super) fn survey(environment: &Environment, pool: &Pool, name: &str) -> Result<Survey, RegionsError> {
    let ram = pool.get(&region_name(name, "ram")?);
    let mut survey = Survey {
        name: name.to_owned(),
        state: VmState::Damaged,
        pid: None,
        memory: ram.as_ref().map(|region| region.size),
        medium: ram.as_ref().map(|region| region.medium.to_string()),
        cpus: None,
        detail: None,
        restored_percent: None,
        status: None,
        generations: None,
    };
    match VmRegions::open(pool, name) {
        Ok(regions) => survey.read_from(&regions),
        Err(RegionsError::InUse { pid, .. }) => survey.ask(environment, pid),
        Err(error @ (RegionsError::NoSuchVm(_) | RegionsError::Name { .. } | RegionsError::Nested(_))) => {
            return Err(error);
        }
        Err(error) => {
            // What was never finished has never run either: `run` starts it.
            if let RegionsError::Unfinished(_) = error {
                survey.state = VmState::Created;
            }
            survey.detail = Some(super::one_line(&error.into()));
        }
    }
    Ok(survey)
}

impl Survey {
    fn read_from(&mut self, regions: &VmRegions) {
        let VmConfig { cpus, memory, .. } = regions.config();
        (self.cpus, self.memory) = (Some(*cpus), Some(memory.0));
        match assess(regions) {
            Ok(()) => {
                self.state = VmState::Frozen;
                if let Some(restoring) = regions.context().standing.restoring() {
                    let (present, clusters) = restoring.progress(regions.config().memory.0);
                    self.restoring(&restoring.generation, present, clusters);
                }
            }
            Err(doubt) => {
                self.state = match (&regions.context().standing, regions.is_clean()) {
                    (Standing::Created, true) => VmState::Created,
                    (Standing::Ended { .. }, true) => VmState::Stopped,
                    _ => VmState::Unclean,
                };
                self.detail = Some(match &regions.context().standing {
                    Standing::Ended { how } if regions.is_clean() => how.clone(),
                    _ => doubt.to_string(),
                });
            }
        }
    }

    fn restoring(&mut self, generation: &str, present: u64, clusters: u64) {
        let percent = present.min(clusters) * 100 / clusters.max(1);
        self.restored_percent = Some(percent);
        self.detail =
            Some(format!("{percent} % of its memory are restored from {generation}, the rest comes while it runs"));
    }

    /// Looks for its generations. A store that cannot be read is told of in the detail.
    pub(super) fn with_generations(mut self, pool: &Pool) -> Self {
        match lineage::find(pool, &self.name) {
            Ok(Some(lineage)) => {
                let all = lineage.all();
                self.generations = all.last().map(|newest| Generations {
                    count: all.len(),
                    newest: newest.id.to_string(),
                    newest_age_ms: lineage::age_ms(newest),
                });
            }
            Ok(None) => {}
            Err(error) => {
                let told = self.detail.take().map(|told| format!("{told}; ")).unwrap_or_default();
                self.detail = Some(format!("{told}its generations cannot be read: {}", super::one_line(&error)));
            }
        }
        if let (VmState::Unclean | VmState::Damaged, Some(generations)) = (self.state, &self.generations) {
            let (name, newest, age) = (&self.name, &generations.newest, lineage::age(generations.newest_age_ms));
            let found = self.detail.take().map(|found| format!("{found}; or ")).unwrap_or_default();
            self.detail = Some(format!("{found}`perdure resume {name}` goes back to {newest}, {age} old"));
        }
        self
    }

    fn ask(&mut self, environment: &Environment, pid: Option<u32>) {
        self.pid = pid;
        // Leased, but not answering yet: it is being started.
        self.state = VmState::Resuming;
        let asked =
            ControlClient::connect(&environment.pool, &self.name).and_then(|client| client.ask(&Request::Status));
        match asked {
            Ok(Response::Status(status)) => {
                use crate::persistence::lifecycle::State;
                self.state = match status.state {
                    State::Freezing => VmState::Freezing,
                    State::Frozen => VmState::Frozen,
                    _ if status.paused => VmState::Paused,
                    _ => VmState::Running,
                };
                self.pid = Some(status.pid);
                (self.cpus, self.memory) = (Some(status.config.cpus), Some(status.config.memory.0));
                if let Some(restoring) = &status.restoring {
                    self.restoring(&restoring.generation, restoring.present, restoring.clusters);
                }
                self.status = Some(*status);
            }
            Ok(_) => {}
            Err(error) => self.detail = Some(super::one_line(&error.into())),
        }
    }
}
