//! The disks of a VM: in its pool, or anywhere.

use std::path::PathBuf;
use std::str::FromStr;

use allocator::RegionName;
use serde::{Deserialize, Serialize};

use super::{ByteSize, SizeError};
use crate::machine::memory::PAGE_SIZE;

/// As many as there is room for beside other devices.
pub const MAX_DISKS: usize = 8;
/// Less is no disk.
pub const MIN_DISK: ByteSize = ByteSize(1 << 20);
/// Names that a VM's other regions have.
const TAKEN: [&str; 4] = ["ram", "swap", "context", "pmem"];

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DiskConfig {
    /// A region of the pool, named after the VM and this: made with the VM, and removed with it.
    Pool {
        /// Its name.
        name: String,
        /// Its size.
        size: ByteSize,
        /// A raw image, or a block device, whose bytes it has when it is made; what is beyond them is zeros. A VM that there is does not
        /// remember it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<PathBuf>,
    },
    /// A raw image, or a block device.
    #[serde(rename_all = "kebab-case")]
    File {
        /// Where.
        path: PathBuf,
        /// It is not written, and may be shared.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        read_only: bool,
    },
}

/// A disk that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskSyntaxError {
    /// Neither.
    #[error(
        "'{0}' is no disk: write NAME:SIZE[,from=FILE], as in data:10G or root:10G,from=root.img, for one in the pool, or the path of a raw image, as in ./disk.img or /srv/disk.img,ro"
    )]
    Neither(String),
    /// Its size.
    #[error(transparent)]
    Size(#[from] SizeError),
}

/// `NAME:SIZE`, and `,from=` and a path behind it where it is not to begin as zeros; or a path, which has a `/`, and `,ro` behind it where it is
/// not to be written.
impl FromStr for DiskConfig {
    type Err = DiskSyntaxError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (disk, from) = match text.split_once(",from=") {
            Some((disk, path)) => (disk, Some(PathBuf::from(path))),
            None => (text, None),
        };
        if disk.contains('/') && from.is_none() {
            let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
            return Ok(Self::File { path: PathBuf::from(path), read_only });
        }
        let (name, size) = disk.split_once(':').ok_or_else(|| DiskSyntaxError::Neither(text.to_owned()))?;
        Ok(Self::Pool { name: name.to_owned(), size: size.parse()?, from })
    }
}

impl std::fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pool { name, size, from: None } => write!(f, "{name}:{size}"),
            Self::Pool { name, size, from: Some(path) } => write!(f, "{name}:{size},from={}", path.display()),
            Self::File { path, read_only } => write!(f, "{}{}", path.display(), if *read_only { ",ro" } else { "" }),
        }
    }
}

impl DiskConfig {
    /// What the guest sees as its serial number: the region's name, or the file's.
    #[must_use]
    pub fn id(&self) -> String {
        match self {
            Self::Pool { name, .. } => name.clone(),
            Self::File { path, .. } => {
                path.file_stem().map_or_else(|| "disk".to_owned(), |stem| stem.to_string_lossy().into_owned())
            }
        }
    }

    /// The same, once it is made: what it was made from is no part of it.
    #[must_use]
    pub fn made(self) -> Self {
        match self {
            Self::Pool { name, size, from: _ } => Self::Pool { name, size, from: None },
            file @ Self::File { .. } => file,
        }
    }

    /// Whether the guest may write to it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !matches!(self, Self::File { read_only: true, .. })
    }
}

/// Disks that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DisksError {
    /// Too many.
    #[error("a VM has at most {MAX_DISKS} disks")]
    Count,
    /// A name.
    #[error(
        "--disk {0}: the name of a disk is of letters, digits, '.', '_' and '-', begins with a letter or a digit, has no '/', and is not ram, swap, context or pmem"
    )]
    Name(DiskConfig),
    /// A name twice.
    #[error("--disk {0}: the VM has another disk of that name")]
    Twice(DiskConfig),
    /// A size.
    #[error("--disk {0}: a disk has {MIN_DISK} at least, in whole pages of 4K")]
    Size(DiskConfig),
}

/// Whether a region of a VM can be called so, beside those that every VM has.
pub(super) fn is_name(name: &str) -> bool {
    !name.contains('/') && !TAKEN.contains(&name) && name.parse::<RegionName>().is_ok()
}

/// Checks what can be checked without the host.
///
/// # Errors
/// [`DisksError`].
pub(super) fn validate(disks: &[DiskConfig]) -> Result<(), DisksError> {
    if disks.len() > MAX_DISKS {
        return Err(DisksError::Count);
    }
    for (index, disk) in disks.iter().enumerate() {
        let DiskConfig::Pool { name, size, from: _ } = disk else { continue };
        if !is_name(name) {
            return Err(DisksError::Name(disk.clone()));
        }
        if *size < MIN_DISK || !size.0.is_multiple_of(PAGE_SIZE) {
            return Err(DisksError::Size(disk.clone()));
        }
        let same = |other: &DiskConfig| matches!(other, DiskConfig::Pool { name: other, .. } if other == name);
        if disks.iter().take(index).any(same) {
            return Err(DisksError::Twice(disk.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_read_as_it_is_written() {
        for text in [
            "data:64M",
            "a.b-c_1:1T",
            "/srv/disk.img",
            "./disk.img,ro",
            "dir/x:1G",
            "root:1G,from=root.img",
            "root:1G,from=/srv/a,b",
        ] {
            assert_eq!(text.parse::<DiskConfig>().unwrap().to_string(), text);
        }
        let file = "/srv/root.img,ro".parse::<DiskConfig>().unwrap();
        assert_eq!((file.id().as_str(), file.is_writable()), ("root", false));
        assert_eq!(serde_json::to_string(&file).unwrap(), r#"{"file":{"path":"/srv/root.img","read-only":true}}"#);
        let region = "data:64M".parse::<DiskConfig>().unwrap();
        assert_eq!(serde_json::to_string(&region).unwrap(), r#"{"pool":{"name":"data","size":"64M"}}"#);
        let copied = "root:1G,from=/srv/root.img".parse::<DiskConfig>().unwrap();
        assert_eq!(
            serde_json::to_string(&copied).unwrap(),
            r#"{"pool":{"name":"root","size":"1G","from":"/srv/root.img"}}"#
        );
        assert_eq!(copied.clone().made().to_string(), "root:1G");
        for disk in [file, region, copied] {
            assert_eq!(serde_json::from_str::<DiskConfig>(&serde_json::to_string(&disk).unwrap()).unwrap(), disk);
        }
        for text in ["", "data", "data:", "data:12X", "disk.img", "root,from=/x", "/disk.img,from=/x"] {
            assert!(text.parse::<DiskConfig>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn disks_that_cannot_be_are_refused() {
        let check = |disks: &[&str]| validate(&disks.iter().map(|disk| disk.parse().unwrap()).collect::<Vec<_>>());
        assert_eq!(check(&["a:1M", "b:2M", "/x", "/x,ro"]), Ok(()));
        for name in ["ram:1M", "context:1M", ":1M", "-a:1M", "a b:1M", ".:1M"] {
            assert!(matches!(check(&[name]), Err(DisksError::Name(_))), "{name}");
        }
        assert!(matches!(check(&["a:1M", "a:2M"]), Err(DisksError::Twice(_))));
        assert!(matches!(check(&["a:4K"]), Err(DisksError::Size(_))));
        assert!(matches!(check(&["a:1048577"]), Err(DisksError::Size(_))));
        assert_eq!(check(&["/x"; MAX_DISKS + 1]), Err(DisksError::Count));
    }
}
