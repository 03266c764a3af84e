//! Looking a pool over without changing it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use vfs::OpenMode;

use super::change::Stray;
use super::{Pool, PoolError};
use crate::catalog::{Catalog, RegionInfo};
use crate::header::{Copies, Header, HeaderError};
use crate::name::RegionName;
use crate::region;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many regions the catalog has.
    pub regions: usize,
    /// What is wrong, in the order of allocation, then files that belong to no region.
    pub problems: Vec<Problem>,
}

impl Report {
    /// Those that cost data or hint at a loss; the others are swept by the next change.
    pub fn damage(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(|problem| !problem.is_sweepable())
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// The catalog has the region, its medium has no file of it.
    MissingFile {
        /// The region.
        name: RegionName,
        /// Where its file should be.
        path: PathBuf,
    },
    /// The file could not be read.
    Unreadable {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file is shorter than the catalog says.
    ShortFile {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        expected: u64,
    },
    /// The file is longer: a resize was cut off. Swept.
    LongFile {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        expected: u64,
    },
    /// One copy of the header is damaged; the other one serves, but its stamp is not believed.
    HeaderCopyDamaged {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// 0 or 1.
        copy: usize,
        /// In which way.
        reason: String,
    },
    /// Both are.
    HeaderLost {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
    },
    /// The header is that of another region or pool.
    WrongIdentity {
        /// The region.
        name: RegionName,
        /// Its file.
        path: PathBuf,
        /// What the header says.
        found: String,
    },
    /// A file of this pool that no region has: an operation was cut off. Swept.
    Orphan {
        /// The file.
        path: PathBuf,
    },
    /// A file of this pool, in use once, that the catalog has never heard of. Never swept.
    Unknown {
        /// The file.
        path: PathBuf,
    },
}

impl Problem {
    /// Whether the next change removes it, without loss.
    #[must_use]
    pub fn is_sweepable(&self) -> bool {
        matches!(self, Self::Orphan { .. } | Self::LongFile { .. })
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingFile { name, path } => write!(f, "region {name}: its file {} is missing", path.display()),
            Self::Unreadable { name, path, reason } => {
                write!(f, "region {name}: its file {} cannot be read: {reason}", path.display())
            }
            Self::ShortFile { name, path, found, expected } => {
                write!(f, "region {name}: its file {} has {found} bytes, {expected} are needed", path.display())
            }
            Self::LongFile { name, path, found, expected } => write!(
                f,
                "region {name}: its file {} has {found} bytes where {expected} are needed, left by a resize that was cut off; \
                 the next change of the pool cuts it",
                path.display()
            ),
            Self::HeaderCopyDamaged { name, path, copy, reason } => write!(
                f,
                "region {name}: copy {copy} of its header is {reason} ({}); the other one serves",
                path.display()
            ),
            Self::HeaderLost { name, path } => {
                write!(f, "region {name}: both copies of its header are damaged ({})", path.display())
            }
            Self::WrongIdentity { name, path, found } => {
                write!(f, "region {name}: its file {} is that of {found}", path.display())
            }
            Self::Orphan { path } => write!(
                f,
                "{} belongs to no region, left by an operation that was cut off; the next change of the pool removes it",
                path.display()
            ),
            Self::Unknown { path } => write!(
                f,
                "{} was in use, but the catalog does not know it: is the catalog an old copy?",
                path.display()
            ),
        }
    }
}

impl Pool {
    /// Compares catalog, files and headers. Reads only; regions in use may be looked at too.
    ///
    /// # Errors
    /// As [`Pool::open`], if the catalog itself cannot be read.
    pub fn check(&self) -> Result<Report, PoolError> {
        let catalog = Catalog::load(&*self.vfs, &self.dir)?;
        let mut problems = Vec::new();
        for region in &catalog.regions {
            self.check_region(&catalog, region, &mut problems);
        }
        for (path, stray) in self.strays(&catalog) {
            problems.push(match stray {
                Stray::Orphan => Problem::Orphan { path },
                Stray::Unknown => Problem::Unknown { path },
            });
        }
        let regions = catalog.regions.len();
        Ok(Report { regions, problems })
    }

    fn check_region(&self, catalog: &Catalog, region: &RegionInfo, problems: &mut Vec<Problem>) {
        let name = || region.name.clone();
        let path = catalog.path(&self.dir, region);
        let read = self.vfs.open(&path, OpenMode::Read).and_then(|file| {
            let found = file.len()?;
            Ok((found, Copies::read(&*file)))
        });
        let (found, copies) = match read {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                problems.push(Problem::MissingFile { name: name(), path });
                return;
            }
            Err(error) => {
                problems.push(Problem::Unreadable { name: name(), path, reason: error.to_string() });
                return;
            }
        };
        let expected = region.file_length();
        let at = path.clone();
        match found.cmp(&expected) {
            std::cmp::Ordering::Less => problems.push(Problem::ShortFile { name: name(), path: at, found, expected }),
            std::cmp::Ordering::Greater => problems.push(Problem::LongFile { name: name(), path: at, found, expected }),
            std::cmp::Ordering::Equal => {}
        }
        match copies {
            Ok(copies) => check_copies(catalog.pool, region, &path, &copies, problems),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => problems.push(Problem::Unreadable { name: name(), path, reason: error.to_string() }),
        }
    }
}

fn check_copies(pool: u64, region: &RegionInfo, path: &std::path::Path, copies: &Copies, problems: &mut Vec<Problem>) {
    let (name, path) = (|| region.name.clone(), || path.to_owned());
    if copies.newest().is_none() && !copies.0.iter().any(|c| matches!(c, Err(HeaderError::Newer(_)))) {
        problems.push(Problem::HeaderLost { name: name(), path: path() });
        return;
    }
    for (copy, header) in copies.0.iter().enumerate() {
        match header {
            Ok(header) if header.belongs_to(pool, region) => {}
            Ok(header) => problems.push(wrong(region, path(), header)),
            Err(reason) => problems.push(Problem::HeaderCopyDamaged {
                name: name(),
                path: path(),
                copy,
                reason: reason.to_string(),
            }),
        }
    }
}

fn wrong(region: &RegionInfo, path: PathBuf, header: &Header) -> Problem {
    Problem::WrongIdentity { name: region.name.clone(), path, found: region::describe(header) }
}
