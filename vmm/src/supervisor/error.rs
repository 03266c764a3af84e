//! What can go wrong around a VM.

use allocator::budget::BudgetError;

use super::console::ConsoleError;
use super::control::ControlError;
use crate::machine::MachineError;
use crate::machine::kvm::KvmError;
use crate::persistence::capture::CaptureError;
use crate::persistence::freeze::FreezeError;
use crate::persistence::regions::RegionsError;
use crate::persistence::resume::ResumeError;

/// What can go wrong around a VM.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its regions.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// Its part of the pool's RAM.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// Resuming.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Letting it run on.
    #[error("the VM was frozen and cannot be let run on; it can be resumed")]
    Thaw(#[source] FreezeError),
    /// A generation.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A generation that was asked for in this process.
    #[error("there is no generation: {0}")]
    NoGeneration(String),
    /// Waiting for news.
    #[error("cannot {doing}")]
    System {
        /// What.
        doing: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}
