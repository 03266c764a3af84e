//! A region in use: its header, its bytes, its mapping.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vfs::VfsFile;

use crate::catalog::RegionInfo;
use crate::header::{COPY_LEN, Copies, Header, HeaderError};
use crate::lease::{Lease, LeaseError};
use crate::medium::on_demand::OnDemand;
use crate::medium::{self, Backing, Dirty, Mapping, MediumError, MediumKind, PersistReport};
use crate::name::RegionName;

/// What a region is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Guest memory.
    Ram,
    /// Where guest memory goes that does not fit.
    Swap,
    /// The frozen volatile state.
    Context,
    /// A block device.
    Disk,
    /// Persistent memory that the guest sees as such.
    Pmem,
    /// The log of recoverable memory.
    Log,
    /// What a freeze found dirty.
    Journal,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Ram, Self::Swap, Self::Context, Self::Disk, Self::Pmem, Self::Log, Self::Journal];

    /// As written in the catalog.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Swap => "swap",
            Self::Context => "context",
            Self::Disk => "disk",
            Self::Pmem => "pmem",
            Self::Log => "log",
            Self::Journal => "journal",
        }
    }

    /// As written in a header.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Ram => 1,
            Self::Swap => 2,
            Self::Context => 3,
            Self::Disk => 4,
            Self::Pmem => 5,
            Self::Log => 6,
            Self::Journal => 7,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong with a region in use.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Neither copy of the header can be read.
    #[error("both copies of the header of region {name} are damaged ({}): it is not used; resume from a generation", path.display())]
    HeaderDamaged {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
    },
    /// Its header is of a newer version.
    #[error(
        "region {name} was written by a newer perdure (header version {version}): use that one; nothing was altered"
    )]
    Newer {
        /// The region.
        name: RegionName,
        /// As stored.
        version: u32,
    },
    /// The file is that of another region or pool.
    #[error("the file {} is not that of region {name}: its header says {found}", path.display())]
    WrongIdentity {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// What the header says.
        found: String,
    },
    /// The file is shorter than the catalog says.
    #[error("the file {} of region {name} has {found} bytes, {expected} are needed: it was cut short", path.display())]
    Truncated {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        expected: u64,
    },
    /// Bytes outside the region were asked for.
    #[error("region {name} has {size} bytes; {length} at {offset} are not all in it")]
    OutOfBounds {
        /// The region.
        name: RegionName,
        /// Its size.
        size: u64,
        /// Where.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// A read, write or flush failed.
    #[error("could not {what} region {name} ({})", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Mapping or persisting it failed.
    #[error("could not {what} region {name}")]
    Medium {
        /// What was being done.
        what: &'static str,
        /// The region.
        name: RegionName,
        /// Why.
        source: MediumError,
    },
    /// Leasing it failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// A leased region. The lease ends when this and its mappings are dropped.
#[derive(Debug)]
pub struct Region {
    lease: Lease,
    header: Mutex<Stamped>,
    /// It is a part of a file that has no header of a region.
    is_part: bool,
}

/// The header that counts, and where it lies.
#[derive(Debug)]
struct Stamped {
    header: Header,
    slot: usize,
    /// The other copy cannot be read. It may have been the newer one, so a stamp in this one is not believed.
    other_lost: bool,
}

impl Region {
    /// Opens the region that `lease` stands for: two system calls, no write.
    ///
    /// # Errors
    /// [`RegionError::HeaderDamaged`], [`RegionError::Newer`], [`RegionError::WrongIdentity`], [`RegionError::Truncated`],
    /// [`RegionError::Io`]. Nothing was altered then.
    pub fn open(lease: Lease) -> Result<Self, RegionError> {
        let (name, path) = (|| lease.info.name.clone(), || lease.path.clone());
        let io = |source| RegionError::Io { what: "open", name: name(), path: path(), source };
        let (found, expected) = (lease.file.len().map_err(io)?, lease.info.file_length());
        if found < expected {
            return Err(RegionError::Truncated { name: name(), path: path(), found, expected });
        }
        let copies = Copies::read(&*lease.file).map_err(io)?;
        let newer = copies.0.iter().find_map(|copy| match copy {
            Err(HeaderError::Newer(version)) => Some(*version),
            _ => None,
        });
        if let Some(version) = newer {
            return Err(RegionError::Newer { name: name(), version });
        }
        let Some((slot, header)) = copies.newest() else {
            return Err(RegionError::HeaderDamaged { name: name(), path: path() });
        };
        if !header.belongs_to(lease.pool, &lease.info) {
            return Err(RegionError::WrongIdentity { name: name(), path: path(), found: describe(header) });
        }
        let ours = |copy: &Result<Header, _>| matches!(copy, Ok(h) if h.belongs_to(lease.pool, &lease.info));
        let other_lost = !copies.0.iter().all(ours);
        let header = Mutex::new(Stamped { header: header.clone(), slot, other_lost });
        Ok(Self { lease, header, is_part: false })
    }

    /// A part of a file that has no header of a region: `size` bytes at `data_offset`, as `lease` says, which belong to `log`. It can neither be
    /// stamped nor bound.
    pub(crate) fn part(lease: Lease, log: u64) -> Self {
        let header = Header { bound: log, ..Header::of(lease.pool, &lease.info) };
        Self { lease, header: Mutex::new(Stamped { header, slot: 0, other_lost: false }), is_part: true }
    }

    /// As the catalog has it.
    #[must_use]
    pub fn info(&self) -> &RegionInfo {
        &self.lease.info
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &RegionName {
        &self.lease.info.name
    }

    /// Bytes of data.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.lease.info.size
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.lease.path
    }

    /// The lease it is used by, for [`Lease::adopt`].
    #[must_use]
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// `Some(n)`: the content is exactly that of context n. `None` if not, or if a copy of the header is damaged: that one
    /// may have said otherwise (see [`Region::doubtful_stamp`]).
    #[must_use]
    pub fn is_clean(&self) -> Option<u64> {
        let stamped = self.stamped();
        stamped.header.clean.filter(|_| !stamped.other_lost)
    }

    /// Whether one of the two copies of the header cannot be read; it is written anew with the next stamp.
    #[must_use]
    pub fn has_lost_header_copy(&self) -> bool {
        self.stamped().other_lost
    }

    /// A stamp that is not believed because the other copy of the header is damaged; for reports.
    #[must_use]
    pub fn doubtful_stamp(&self) -> Option<u64> {
        let stamped = self.stamped();
        stamped.header.clean.filter(|_| stamped.other_lost)
    }

    /// Says durably that the content is no context's any more. To be done before anything changes it. Free if it is said already.
    ///
    /// # Errors
    /// [`RegionError::Io`]: then it is not known, and nothing may be changed.
    pub fn clear_stamp(&self) -> Result<(), RegionError> {
        let mut stamped = self.stamped();
        if stamped.header.clean.is_none() && !stamped.other_lost {
            return Ok(());
        }
        let bound = stamped.header.bound;
        self.write_header(&mut stamped, None, bound, "clear the stamp of")
    }

    /// Says durably that the content is exactly that of context `n`. To be done after it was persisted, and the context too.
    ///
    /// # Errors
    /// [`RegionError::Io`]: then it is not known whether it is said.
    pub fn stamp_clean(&self, n: u64) -> Result<(), RegionError> {
        let mut stamped = self.stamped();
        let bound = stamped.header.bound;
        self.write_header(&mut stamped, Some(n), bound, "stamp")
    }

    /// The log of recoverable memory (the id of its region) that may hold changes which are not in the data yet. `Err` with it where a
    /// copy of the header is damaged, which may have said otherwise.
    pub(crate) fn bound_to(&self) -> Result<Option<u64>, Option<u64>> {
        let stamped = self.stamped();
        let bound = (stamped.header.bound != 0).then_some(stamped.header.bound);
        if stamped.other_lost { Err(bound) } else { Ok(bound) }
    }

    /// Says durably which log's changes belong to the data, and that the content is no context's.
    pub(crate) fn bind(&self, log: Option<u64>) -> Result<(), RegionError> {
        self.write_header(&mut self.stamped(), None, log.unwrap_or(0), "bind to its log")
    }

    /// Makes durable what the header says: its writer may have been killed before it did. A part of a file has none.
    pub(crate) fn flush_header(&self) -> Result<(), RegionError> {
        if self.is_part { Ok(()) } else { self.sync() }
    }

    /// Its id, which no other region of the pool ever has.
    pub(crate) fn id(&self) -> u64 {
        self.lease.info.id
    }

    /// The pool that it belongs to.
    pub(crate) fn pool_id(&self) -> u64 {
        self.lease.pool
    }

    /// Overwrites the older copy (or the damaged one), and returns once that is durable.
    fn write_header(
        &self,
        stamped: &mut Stamped,
        clean: Option<u64>,
        bound: u64,
        what: &'static str,
    ) -> Result<(), RegionError> {
        if self.is_part {
            return Err(self.io(what, io::ErrorKind::Unsupported.into()));
        }
        let sequence = stamped.header.sequence + 1;
        let header = Header { sequence, clean, bound, ..Header::of(self.lease.pool, &self.lease.info) };
        let slot = 1 - stamped.slot;
        let written = self.lease.file.write_durable_at(&header.encode(), (slot * COPY_LEN) as u64);
        written.map_err(|source| self.io(what, source))?;
        *stamped = Stamped { header, slot, other_lost: false };
        Ok(())
    }

    fn stamped(&self) -> MutexGuard<'_, Stamped> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self, what: &'static str, source: io::Error) -> RegionError {
        RegionError::Io { what, name: self.name().clone(), path: self.lease.path.clone(), source }
    }

    /// Where in the file `length` bytes at `offset` of the data lie.
    fn locate(&self, offset: u64, length: usize) -> Result<u64, RegionError> {
        let inside = offset.checked_add(length as u64).is_some_and(|end| end <= self.size());
        if !inside {
            return Err(RegionError::OutOfBounds {
                name: self.name().clone(),
                size: self.size(),
                offset,
                length: length as u64,
            });
        }
        Ok(self.lease.info.data_offset + offset)
    }

    /// Reads all of `buffer` at `offset` of the data. (What a mapping on `nvdimm` holds and has not saved is not seen.)
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`], [`RegionError::Io`].
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), RegionError> {
        let at = self.locate(offset, buffer.len())?;
        let read = self.lease.file.read_exact_at(buffer, at);
        read.map_err(|source| self.io("read", source))
    }

    /// Writes all of `bytes` at `offset` of the data. Durable after [`Region::sync`].
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`], [`RegionError::Io`].
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), RegionError> {
        let at = self.locate(offset, bytes.len())?;
        let written = self.lease.file.write_all_at(bytes, at);
        written.map_err(|source| self.io("write", source))
    }

    /// Writes all of `bytes` at `offset` of the data and returns once they are durable. Cheaper than write and sync.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`], [`RegionError::Io`].
    pub fn write_durable_at(&self, bytes: &[u8], offset: u64) -> Result<(), RegionError> {
        let at = self.locate(offset, bytes.len())?;
        let written = self.lease.file.write_durable_at(bytes, at);
        written.map_err(|source| self.io("write", source))
    }

    /// Brings the pages of `runs`, ascending, of what was written through `mapping` on their way to the medium, and waits until they are there.
    /// Others may write meanwhile, to these pages as well. Durable after [`Region::sync`].
    ///
    /// # Errors
    /// [`RegionError::Medium`].
    pub fn write_behind(&self, mapping: &Mapping, runs: &[Range<u64>]) -> Result<(), RegionError> {
        let written = medium::write_behind(mapping, &self.backing(), runs);
        written.map_err(|source| self.medium("write behind", source))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`RegionError::Io`]; then nothing is written through this region any more: open it anew.
    pub fn sync(&self) -> Result<(), RegionError> {
        self.lease.file.sync_data().map_err(|source| self.io("flush", source))
    }

    /// Makes all data zeros, which reads and writes no data. There must be no mapping of this region. Clear the stamp first.
    ///
    /// # Errors
    /// [`RegionError::Io`]: the content is not known then, and the stamp must stay cleared.
    pub fn zero(&self) -> Result<(), RegionError> {
        let (offset, size) = (self.lease.info.data_offset, self.size());
        self.lease.file.zero(offset, size).map_err(|source| self.io("zero", source))
    }

    /// As [`Region::zero`], of `length` bytes at `offset`, which may be mapped.
    pub(crate) fn zero_at(&self, offset: u64, length: u64) -> Result<(), RegionError> {
        let at = self.locate(offset, usize::try_from(length).unwrap_or(usize::MAX))?;
        self.lease.file.zero(at, length).map_err(|source| self.io("zero", source))
    }

    fn backing(&self) -> Backing<'_> {
        Backing {
            file: &*self.lease.file,
            path: &self.lease.path,
            offset: self.lease.info.data_offset,
            size: self.size(),
        }
    }

    /// Another handle of the file, for whoever reads and writes the data by means of its own, and where in it the data lies. The lease
    /// lasts until that handle is closed, too.
    ///
    /// # Errors
    /// [`RegionError::Medium`]: it is not a file of this host. [`RegionError::Io`].
    pub fn share_file(&self) -> Result<(File, Range<u64>), RegionError> {
        let shared = self.descriptor()?.try_clone_to_owned().map_err(|source| self.io("share the file of", source))?;
        let begin = self.lease.info.data_offset;
        Ok((shared.into(), begin..begin + self.size()))
    }

    /// The file, for mapping pieces of it.
    pub(crate) fn descriptor(&self) -> Result<std::os::fd::BorrowedFd<'_>, RegionError> {
        let unmappable = || MediumError::NotMappable { path: self.lease.path.clone() };
        self.lease.file.descriptor().ok_or_else(|| self.medium("map", unmappable()))
    }

    /// Where in the file the data begins.
    pub(crate) fn data_offset(&self) -> u64 {
        self.lease.info.data_offset
    }

    /// Another handle of the file, past the page cache; see [`VfsFile::direct`].
    pub(crate) fn direct(&self) -> Result<Option<Box<dyn VfsFile>>, RegionError> {
        self.lease.file.direct().map_err(|source| self.io("open", source))
    }

    /// Maps the data, all of it, readable and writable. One system call or two; nothing is read or copied.
    ///
    /// # Errors
    /// [`RegionError::Medium`]: not a file of this host, no DAX, no address space.
    pub fn map(&self) -> Result<Mapping, RegionError> {
        let mapped = medium::map(self.lease.info.medium, &self.backing());
        mapped.map_err(|source| self.medium("map", source))
    }

    /// As [`Region::map`], but private to this process: what is written through it never reaches the file.
    pub(crate) fn map_private(&self) -> Result<Mapping, RegionError> {
        let mapped = medium::map(MediumKind::Nvdimm, &self.backing());
        mapped.map_err(|source| self.medium("map", source))
    }

    /// As [`Region::map`], but only the clusters of `cluster` bytes are there of which `present` says so; an access to others waits until
    /// [`Region::place`]. What `present` lacks is taken for missing, what it has too much is ignored.
    ///
    /// # Errors
    /// [`RegionError::Medium`]: also where this process may not use userfaultfd.
    pub fn map_on_demand(&self, cluster: u64, mut present: Vec<bool>) -> Result<OnDemand, RegionError> {
        let count = self.size().div_ceil(cluster.max(medium::PAGE_SIZE));
        present.resize(usize::try_from(count).unwrap_or(usize::MAX), false);
        let mapped = medium::on_demand::map(self.lease.info.medium, &self.backing(), cluster, present);
        mapped.map_err(|source| self.medium("map", source))
    }

    /// Cluster `cluster` of the data is what it is to be: `memory`, which must be of this region, shows it from now on, and who waits for it
    /// goes on.
    ///
    /// # Errors
    /// [`RegionError::Io`].
    pub fn place(&self, memory: &OnDemand, cluster: u64) -> Result<(), RegionError> {
        memory.place(&self.backing(), cluster).map_err(|source| self.io("map a cluster of", source))
    }

    /// Makes durable what was written through `mapping`, which must be one of this region. Nothing may write meanwhile. What `dirty`
    /// must hold: see [`Dirty`].
    ///
    /// # Errors
    /// [`RegionError::Medium`].
    pub fn persist(&self, mapping: &Mapping, dirty: Dirty<'_>) -> Result<PersistReport, RegionError> {
        let begun = Instant::now();
        let persisted = medium::persist(mapping, &self.backing(), dirty);
        let written = persisted.map_err(|source| self.medium("persist", source))?;
        Ok(PersistReport {
            pages: written,
            bytes: written.map(|pages| pages * medium::PAGE_SIZE),
            duration: begun.elapsed(),
        })
    }

    fn medium(&self, what: &'static str, source: MediumError) -> RegionError {
        RegionError::Medium { what, name: self.name().clone(), source }
    }

    /// What it lies on.
    #[must_use]
    pub fn medium_kind(&self) -> MediumKind {
        self.lease.info.medium
    }
}

pub(crate) fn describe(header: &Header) -> String {
    format!("{} {:?} (pool {:016x}, region {}) on {}", header.kind, header.name, header.pool, header.id, header.medium)
}

/// Writes the header area of a new region: two valid copies and an empty holder block, so that later writes overwrite and never extend.
pub(crate) fn format(file: &dyn VfsFile, pool: u64, info: &RegionInfo) -> io::Result<()> {
    let mut header = Header::of(pool, info);
    let mut bytes = vec![0; 3 * COPY_LEN];
    bytes[COPY_LEN..2 * COPY_LEN].copy_from_slice(&header.encode());
    header.sequence = 1;
    bytes[..COPY_LEN].copy_from_slice(&header.encode());
    file.write_all_at(&bytes, 0)
}
