//! PoweredOff → Running: the mirror image of [`super::freeze`], and the only home of that order.
//!
//! ```text
//!   step      what                                       if it stood elsewhere
//!   ────────  ─────────────────────────────────────────  ──────────────────────────────────────────────────────────
//!   verify    context verifies, RAM is clean@N           first: nothing is altered if it is not so
//!   replay    what the freeze left in the journal goes   before RAM is mapped: a private mapping shows what was there when a page
//!             home ([`super::holdup`])                   was first touched. Before the stamp goes: a cut finds the journal again
//!   map       RAM where the guest had it                 nothing is read, nothing is copied; where it is still being restored
//!                                                        ([`super::restoring`]), what is missing comes as it is asked for
//!   assemble  an empty machine over it                   writes no RAM, and so goes on beside the next
//!   clear     the stamp, durably                         before anything may write RAM: a second cut must not find RAM
//!                                                        that has gone on under a stamp that says it has not
//!   machine   clock, interrupt controller, vCPUs,        clock before vCPUs, LAPIC before its deadline timer
//!             devices
//!   thaw      devices deliver what was on its way        after the interrupt controller, before vCPUs run
//!   record    a configuration that was changed, in a     after clear: the context that RAM is stamped with must stay the newest.
//!             context with the next number               Before vCPUs run: a cut finds what they ran with (by the caller)
//!   run       vCPUs                                      last (by the caller)
//! ```
//!
//! A refusal after `clear` stamps the RAM again: no vCPU has run, so it is still that of the context.

use allocator::RegionError;
use vfs::cut::point::{Point, pass};

use super::context::{ConsoleStateV1, FrozenV1, Standing};
use super::recovery::{Doubt, assess};
use super::regions::{RegionsError, VmRegions};
use super::restoring::{Paging, RestoringError};
use crate::machine::kvm::vm::Outage;
use crate::machine::kvm::{Host, KvmError};
use crate::machine::{Machine, MachineError, Wiring};

/// Why a VM was not resumed. Nothing was altered.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// There is nothing to continue.
    #[error("VM {name} cannot be resumed: {doubt}")]
    Refused {
        /// Which.
        name: String,
        /// Why not, and what to do.
        #[source]
        doubt: Doubt,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The regions.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// Its memory was still being restored from a generation.
    #[error(
        "VM {name} was frozen while its memory was being restored, and that cannot go on: nothing was altered; `perdure resume {name} --generation ID` takes another generation"
    )]
    Restoring {
        /// Which.
        name: String,
        /// Why not.
        #[source]
        source: RestoringError,
    },
    /// The stamp.
    #[error(transparent)]
    Stamp(#[from] RegionError),
    /// The machine.
    #[error("the context of VM {name} verifies, but this host cannot take it up; nothing was altered")]
    Machine {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: MachineError,
    },
}

/// Puts a frozen VM together again. Its vCPUs are ready to run.
///
/// # Errors
/// [`ResumeError`].
pub fn resume(
    regions: &mut VmRegions,
    wiring: Wiring,
    paging: &Paging<'_>,
    restore_console: impl FnOnce(&ConsoleStateV1),
) -> Result<Machine, ResumeError> {
    assess(regions).map_err(|doubt| ResumeError::Refused { name: regions.name().to_owned(), doubt })?;
    pass(Point::ResumeVerified);
    regions.replay_journal()?;
    let sequence = regions.context().sequence;
    let host = Host::open()?;
    let name = regions.name().to_owned();
    regions.go_on_restoring(paging).map_err(|source| ResumeError::Restoring { name, source })?;
    pass(Point::ResumeClear);
    let restored = regions
        .assemble(host, wiring)
        .map_err(ResumeError::from)
        .and_then(|mut machine| restore(&mut machine, regions, restore_console).map(|()| machine));
    pass(Point::ResumeAssembled);
    if restored.is_err() {
        // No vCPU has run: RAM is what it was.
        regions.stamp_clean(sequence)?;
    }
    restored
}

fn restore(
    machine: &mut Machine,
    regions: &VmRegions,
    restore_console: impl FnOnce(&ConsoleStateV1),
) -> Result<(), ResumeError> {
    let name = || regions.name().to_owned();
    let Standing::Frozen(frozen) = &regions.context().standing else {
        return Err(ResumeError::Refused { name: name(), doubt: Doubt::NotFrozen("not frozen") });
    };
    let FrozenV1 { machine: state, console, restoring: _, paged: _, journal: _ } = &**frozen;
    let outage = Outage::since(&state.vm.clock, regions.config().clock);
    machine.restore(state, outage).map_err(|source| ResumeError::Machine { name: name(), source })?;
    restore_console(console);
    Ok(())
}
