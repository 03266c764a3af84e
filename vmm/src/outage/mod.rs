//! The outage simulator: what a cut of the power does to VMs, without one.
//!
//! ```text
//!   run ──► (at) ──► power-fail signal ──► freeze … ──► (hold-up ends) cut ──► loss ──► what survived? ──► resume ──► verdict
//!            ▲                                │ power back                                                    │
//!            └────────────────────────────────┴───────────────────────────────────────────────────────────────┘
//! ```
//!
//! VMs are processes of this very program on a pool of the simulator's own ([`ground`]), started and asked as a user would ([`life`],
//! [`warning`]). A cut kills them, and takes from the pool what its medium would have lost ([`vfs::cut`]): on `nvdimm` memory that was
//! not saved is gone by itself; of files, what no flush covered is there, is not, or is torn, as the seed has it. On `dax` a store counts as
//! durable, as it does where the power supply keeps the caches (eADR). Then [`simulation`] looks at what survived, holds it against
//! what the VM had been told to be durable, resumes it, and lets the guest's own output be recomputed ([`judge`]); of one that keeps records on a disk the disk is read, too
//! ([`ring`]).
//!
//! [`campaign`] goes through many outages, on several such machines side by side, [`report`] sums them up, and [`page`] draws them.
//! A seed draws the same times, cuts and losses again; the machine's own timing it cannot repeat.

mod account;
pub mod campaign;
mod copy;
pub mod damage;
mod ground;
pub mod interrupt;
mod judge;
mod life;
pub mod page;
pub mod plan;
pub mod report;
mod ring;
pub mod scenario;
mod simulation;
mod subject;
mod warning;

/// Why outages cannot be simulated.
#[derive(Debug, thiserror::Error)]
pub enum OutageError {
    /// Ctrl-C.
    #[error("interrupted; nothing was left behind")]
    Interrupted,
    /// Nobody knows what a cut would take.
    #[error(
        "what a cut would take cannot be told in {}: that needs Linux 6.5 (cachestat) and a file system on a medium, not tmpfs or an overlay; \
         --pool DIR takes another place",
        .0.display()
    )]
    Untold(std::path::PathBuf),
    /// A VM does not start.
    #[error("VM {name} did not start: {words}")]
    NotStarted {
        /// Which.
        name: String,
        /// What it said.
        words: String,
    },
    /// A VM neither runs nor ends.
    #[error("VM {name} neither runs nor ends; its process said: {words:?}")]
    Hangs {
        /// Which.
        name: String,
        /// What it said.
        words: String,
    },
    /// A VM that cannot be copied.
    #[error("VM {name} cannot be copied for a simulation: {why}")]
    NotCopied {
        /// Which.
        name: String,
        /// Why not, and what to do.
        why: String,
    },
    /// The pool.
    #[error(transparent)]
    Pool(#[from] allocator::PoolError),
    /// A VM's regions.
    #[error(transparent)]
    Regions(#[from] crate::persistence::regions::RegionsError),
    /// Its generations.
    #[error(transparent)]
    Generations(#[from] crate::persistence::generations::GenerationsError),
    /// The system.
    #[error("cannot {doing}")]
    System {
        /// What.
        doing: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}
