#![forbid(unsafe_code)]
//! Generations: complete, checksummed points in time of a virtual machine, stored once and kept for as long as
//! they are wanted.
//!
//! A **generation** is everything that a VM was at one moment: all its regions (RAM, swap, disks) page by page, and
//! opaque blobs beside them (context, configuration). It is restorable alone. A store keeps the generations of one VM,
//! or of a family of VMs (a VM and its forks): each VM is a **lineage** in the store, with numbers of its own, and
//! pages that are equal are stored once, whoever wrote them.
//!
//! ```text
//!   ledger-a, ledger-b       one slot of 4 KiB a generation, written twice; its last valid slot is the root
//!        │ manifest (hash)
//!        ▼
//!   packs/arc-N.a, arc-N.b   the archive: a copy-on-write radix tree (region, page) → backlinks, written twice
//!        │ backlinks (pack, offset, hash, CRC)
//!        ▼
//!   packs/data-N             pages and nothing else
//! ```
//!
//! * [`Store`] opens it; [`Writer`] adds a generation, in work and space proportional to what changed;
//!   its commit is one slot appended to the ledger after everything it needs is durable.
//!   So that a restore never reads much more than it wants, however many generations came before, a writer keeps its generation
//!   together ([`Options::spread`]).
//! * [`Reader`] restores: any page or run of pages at once and verified ([`Reader::read_page`], [`Reader::read_run`]), or whole regions
//!   in the order in which they lie on the disk ([`Reader::restore_region`]).
//! * [`RetentionPolicy`] decides, as a pure function, what stays; [`Store::purge`] and [`Store::sweep`] do it.
//! * [`Store::scrub`] reads everything and says what is damaged and whom it hurts; [`Store::repair`] heals what has a good copy.
//! * [`Store::newest_verified`] is what a recovery asks for; [`Store::diff`], [`Store::export`], [`Store::import`].
//!
//! Every byte goes through the crate `vfs`, and every byte that comes back is hostile until its hash says otherwise.
//! What lies where is told in `FORMAT.md`, and why the store is as it is in [`Store`].

mod archive;
mod batch;
mod codec;
mod dedup;
mod defragment;
mod diff;
mod error;
mod fault;
mod fetch;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod generation;
mod hash;
mod impact;
mod known;
mod layout;
mod ledger;
mod mark;
mod node;
mod pack;
mod place;
mod radix;
mod reader;
mod record;
mod recovery;
mod repair;
mod restore;
mod retention;
mod run;
mod scrub;
mod store;
mod stream;
mod sweep;
mod transfer;
mod walk;
mod writer;

pub use codec::Compression;
pub use diff::{PageRange, RegionDiff};
pub use error::StoreError;
#[cfg(feature = "seeded-faults")]
pub use fault::seed_fault;
pub use generation::{
    BlobInfo, Generation, GenerationId, NewGeneration, Origin, PAGE_SIZE, Page, Parent, RegionInfo, RegionSpec,
};
pub use reader::{Reader, ReaderStats};
pub use recovery::{Depth, Recovered, Skipped};
pub use repair::RepairReport;
pub use restore::{PageSink, RestoreReport};
pub use retention::{Candidate, Reason, RetentionPolicy, Verdict};
pub use scrub::{Damage, Lost, Progress, ScrubReport};
pub use store::{Integrity, Options, Store, Usage};
pub use sweep::SweepReport;
pub use transfer::{Export, TransferError};
pub use writer::{RegionKey, Writer};
