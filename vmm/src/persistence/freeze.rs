//! Running → Frozen. The only home of that order.
//!
//! ```text
//!   step       what                                        if it stood elsewhere
//!   ─────────  ──────────────────────────────────────────  ─────────────────────────────────────────────────────────
//!   stop       vCPUs leave the guest, accesses complete     before all: a running vCPU changes whatever is saved
//!   quiesce    devices complete what is in flight, bytes    after stop: the guest produces more until then
//!              under way reach their end or a queue
//!   devices    device state                                 before the interrupt controller: a device may still raise
//!   cpus       vCPUs, interrupt controller, clock           after devices, see above
//!   restoring  how far a restore that is under way is       before persist: what it says is there must be flushed
//!              (paged memory: nothing moves any more)       after stop: until then a vCPU may wait for what is moved
//!   persist    regions reach their medium, or the journal   before the context: a context must never name unsaved RAM
//!              has what did not ([`super::holdup`])
//!   context    the other slot is written, durable           before the stamp: a stamp must never name a missing context
//!   stamp      clean@N in the headers of disks, persistent  last: it is what makes the context count
//!              memory and RAM, RAM's last, durable
//! ```
//!
//! The first four steps are [`hold_still`], and [`super::capture`] uses them, too: a generation is the same moment, stored elsewhere.
//!
//! Until the stamp the freeze can be called off (the power came back, or a step failed): the VM is thawed and runs on,
//! as if nothing had been. Nothing here depends on the size of RAM: `persist` costs what is dirty.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use allocator::RegionError;
use serde::{Deserialize, Serialize};
use vfs::cut::point::{Point, pass};

use super::context::{self, ConsoleStateV1, ContextError, ContextV1, Encoded, FrozenV1, Standing};
use super::paging::Persisted;
use super::regions::{RegionsError, VmRegions};
use crate::machine::time::nanoseconds;
use crate::machine::{Machine, MachineError, MachineStateV1};

/// How long devices may take to complete what is in flight; one that takes longer is named, and the VM is not frozen.
pub const DEVICES_REST: Duration = Duration::from_secs(10);

/// How far output is to be brought before state is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Handed to the system: the process may end, the power not.
    Handed,
    /// Durable.
    Durable,
}

/// What the machine is joined to, as far as a freeze goes.
pub trait Surroundings {
    /// vCPUs are about to be stopped: nobody may make them wait.
    fn hurry(&self, hurry: bool);
    /// Brings output under way to its end; what cannot get there is in [`Surroundings::save`].
    ///
    /// # Errors
    /// In words, if output cannot be made durable.
    fn quiesce(&self, output: Output) -> Result<(), String>;
    /// Bytes still under way.
    fn save(&self) -> ConsoleStateV1;
}

/// How long each step took, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeSteps {
    /// Stopping vCPUs.
    pub stop_ns: u64,
    /// Bringing output to its end.
    pub quiesce_ns: u64,
    /// Reading devices.
    pub devices_ns: u64,
    /// Reading vCPUs, interrupt controller, clock.
    pub cpus_ns: u64,
    /// Bringing regions to their medium.
    pub persist_ns: u64,
    /// Putting the context into bytes.
    pub encode_ns: u64,
    /// Writing the context, durably.
    pub context_ns: u64,
    /// Stamping the regions, durably.
    pub stamp_ns: u64,
}

/// How long it took to bring a machine to a stand and to read its state, by step, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StillSteps {
    pub(super) stop_ns: u64,
    pub(super) quiesce_ns: u64,
    pub(super) devices_ns: u64,
    pub(super) cpus_ns: u64,
}

/// What a freeze did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeReport {
    /// The context's number.
    pub sequence: u64,
    /// From the power-fail signal until everything is durable, in nanoseconds.
    pub total_ns: u64,
    /// Of that, what the media took to make bytes durable (regions, context, stamp), in nanoseconds.
    pub flush_ns: u64,
    /// By step.
    pub steps: FreezeSteps,
    /// Bytes of guest memory that were not durable yet and are now; unknown where only the kernel knows (`file`).
    pub bytes: Option<u64>,
    /// The context's size in bytes.
    pub context_bytes: u64,
    /// What was left of the hold-up, in nanoseconds, if its length was given.
    pub holdup_left_ns: Option<u64>,
}

/// Why a VM was not frozen. It runs on, unless [`FreezeError::Thaw`] says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The power came back before the stamp.
    #[error("the power came back during the freeze")]
    PowerBack,
    /// The guest ended before the signal reached it.
    #[error("the guest ended just before")]
    Ended,
    /// The machine.
    #[error("cannot read the machine's state")]
    Machine(#[source] MachineError),
    /// Output.
    #[error("cannot bring the serial output to its end: {0}")]
    Quiesce(String),
    /// The RAM region: persisting it, or its stamp.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Memory that is paged, or another region.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// The context.
    #[error(transparent)]
    Context(#[from] ContextError),
}

/// Freezes a running machine. `signalled` is when the power-fail signal came; `power_back` is looked at between steps.
///
/// # Errors
/// [`FreezeError`]: nothing counts as frozen then, and [`thaw`] lets the machine run on.
pub fn freeze(
    machine: &Machine,
    regions: &mut VmRegions,
    surroundings: &dyn Surroundings,
    signalled: Instant,
    power_back: &AtomicBool,
) -> Result<FreezeReport, FreezeError> {
    let mut steps = Stopwatch::start(power_back);
    pass(Point::FreezeSignal);
    regions.hold_restore(true);
    regions.hold_flushing();
    let (state, still) = hold_still(machine, surroundings, Output::Durable, &mut steps)?;
    let StillSteps { stop_ns, quiesce_ns, devices_ns, cpus_ns } = still;
    let mut took = FreezeSteps { stop_ns, quiesce_ns, devices_ns, cpus_ns, ..FreezeSteps::default() };

    pass(Point::FreezeStill);
    regions.hold_paging(true);
    let restoring = regions.restoring();
    pass(Point::FreezePersist);
    let sequence = regions.next_sequence();
    let persisted = regions.persist_for_freeze(sequence)?;
    pass(Point::FreezeDisks);
    regions.persist_storage_for_freeze(&persisted)?;
    let Persisted { bytes, paged, journal } = persisted;
    took.persist_ns = steps.next()?;

    let frozen = FrozenV1 { machine: state, console: surroundings.save(), restoring, paged, journal };
    let context = ContextV1 {
        sequence,
        written_ns: context::now_ns(),
        config: machine.config().clone(),
        standing: Standing::Frozen(Box::new(frozen)),
    };
    let encoded = Encoded::new(&context)?;
    took.encode_ns = steps.next()?;

    pass(Point::FreezeContext);
    regions.write_context(&encoded)?;
    took.context_ns = steps.next()?;

    pass(Point::FreezeStamp);
    regions.stamp_clean(sequence)?;
    took.stamp_ns = steps.lap();
    pass(Point::FreezeDone);

    Ok(FreezeReport {
        sequence,
        total_ns: nanoseconds(signalled.elapsed()),
        flush_ns: took.persist_ns + took.context_ns + took.stamp_ns,
        steps: took,
        bytes,
        context_bytes: encoded.len() as u64,
        holdup_left_ns: None,
    })
}

/// Brings a running machine to a stand and reads all that is volatile: the first four steps of the order above.
///
/// # Errors
/// [`FreezeError`]; the machine stands still in any case.
pub(super) fn hold_still(
    machine: &Machine,
    surroundings: &dyn Surroundings,
    output: Output,
    steps: &mut Stopwatch<'_>,
) -> Result<(MachineStateV1, StillSteps), FreezeError> {
    let mut took = StillSteps::default();
    surroundings.hurry(true);
    machine.pause().map_err(FreezeError::Machine)?;
    if machine.has_ended() {
        return Err(FreezeError::Ended);
    }
    took.stop_ns = steps.next()?;

    // Devices first: one of them may still print.
    machine.quiesce_devices(Instant::now() + DEVICES_REST).map_err(FreezeError::Machine)?;
    surroundings.quiesce(output).map_err(FreezeError::Quiesce)?;
    took.quiesce_ns = steps.next()?;

    let devices = machine.save_devices();
    took.devices_ns = steps.next()?;

    let state = machine.save_cpus(devices).map_err(FreezeError::Machine)?;
    took.cpus_ns = steps.next()?;
    Ok((state, took))
}

/// What becomes of vCPUs when a machine is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vcpus {
    /// They run on.
    Run,
    /// They stay where they are: a user paused the VM.
    Stay,
}

/// Lets a machine go on after a freeze, called off or complete: the power is back.
///
/// # Errors
/// [`FreezeError::Region`] or [`FreezeError::Machine`]: the machine stands still then, and must be given up.
pub fn thaw(
    machine: &Machine,
    regions: &mut VmRegions,
    surroundings: &dyn Surroundings,
    vcpus: Vcpus,
) -> Result<(), FreezeError> {
    // Durably, before any vCPU runs: from then on RAM is no longer that of the context.
    pass(Point::ThawClear);
    regions.clear_stamp()?;
    pass(Point::ThawDone);
    regions.hold_restore(false);
    regions.hold_paging(false);
    regions.go_on_flushing();
    let_go(machine, surroundings, vcpus)
}

/// The way back from [`hold_still`].
///
/// # Errors
/// [`FreezeError::Machine`]: the machine stands still then, and must be given up.
pub(super) fn let_go(machine: &Machine, surroundings: &dyn Surroundings, vcpus: Vcpus) -> Result<(), FreezeError> {
    machine.thaw_devices();
    surroundings.hurry(false);
    match vcpus {
        Vcpus::Run => machine.notify_paused().and_then(|()| machine.run()).map_err(FreezeError::Machine),
        Vcpus::Stay => Ok(()),
    }
}

pub(super) struct Stopwatch<'a> {
    last: Instant,
    power_back: &'a AtomicBool,
}

impl<'a> Stopwatch<'a> {
    /// `power_back`: the power came back, so that the rest need not be done.
    pub(super) fn start(power_back: &'a AtomicBool) -> Self {
        Self { last: Instant::now(), power_back }
    }

    pub(super) fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let took = now - self.last;
        self.last = now;
        nanoseconds(took)
    }

    /// Ends a step after which the freeze may still be called off.
    fn next(&mut self) -> Result<u64, FreezeError> {
        if self.power_back.load(Ordering::SeqCst) {
            return Err(FreezeError::PowerBack);
        }
        Ok(self.lap())
    }
}
