//! Regions by name: persistent memory that is there again after an outage.
//!
//! A [`Pool`] is a directory with a crash-safe catalog. It hands out **regions**, each under a [`RegionName`] such as
//! `web/ram`: the same name yields the same bytes, in this process or the next, after a kill or a power cut. A region
//! lies on a [`MediumKind`], which says what it survives and what a flush costs.
//!
//! ```text
//!             Pool ── catalog (names → regions; recoverable memory; changed under a lock, by one transaction)
//!              │
//!   allocate, resize, rename, free, list, check
//!              │
//!            lease ── one holder at a time; dies with its process
//!              │
//!            Region ── header (two copies): clean@N, cleared before a vCPU runs, set after the last byte is durable
//!            │    │
//!     read_at│    │map
//!    write_at│    ▼
//!        sync│  Mapping ── guest RAM ── persist: flush (file), CLWB (dax), save (nvdimm)
//!            │    ▲
//!            └─ Filler ── fills a region that is in use already, cluster by cluster, from a source
//! ```
//!
//! A guest may have more memory than its RAM region: [`paging`] keeps what it uses in the frames of that region and the rest in a swap
//! region, and [`replacement`] decides what is where. Where several guests share one machine's RAM, [`budget`] decides how much each has.
//!
//! Programs change regions by transactions: [`rvm`]. Where a freeze has little time, what is dirty goes out in one stream: [`journal`].
//!
//! Bytes on the medium are described in `FORMAT.md`; the words are those of the project's design.
#![deny(unsafe_code)]

pub mod budget;
pub mod catalog;
pub mod filler;
pub mod frame;
pub mod header;
pub mod journal;
pub mod lease;
pub mod medium;
pub mod name;
pub mod paging;
pub mod pool;
pub mod region;
pub mod replacement;
pub mod rvm;
mod size;
pub mod threads;

pub use catalog::{CatalogError, MediumSettings, RegionInfo, Settings};
pub use lease::{Holder, Lease, LeaseError};
pub use medium::{Dirty, Mapping, MediumError, MediumKind, PAGE_SIZE, PersistReport};
pub use name::{NameError, RegionName};
pub use pool::check::{Problem, Report};
pub use pool::{Pool, PoolError, RegionSpec, Usage, default_pool_dir};
pub use region::{Kind, Region, RegionError};
pub use size::Size;
