//! What regions would lie on: the file systems of the pool's directories, and what a flush costs there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use allocator::catalog::CatalogError;
use allocator::{MediumKind, Pool, PoolError, Usage};
use rustix::fs::Access;
use serde::Serialize;
use vfs::host::HostVfs;
use vfs::{OpenMode, Vfs};

use super::super::Environment;
use crate::machine::time::nanoseconds;

const BLOCK: usize = 4096;
const FLUSHES: usize = 21;

/// How the pool is.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Media {
    /// The pool's directory.
    pub(super) pool: PathBuf,
    /// It is a pool, and sound as far as its catalog tells.
    pub(super) exists: bool,
    /// The directories of its media, one a file system.
    pub(super) places: Vec<Place>,
    /// Why the pool cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// A directory of regions.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Place {
    /// The directory, or the lowest one above it that is there.
    pub(super) directory: PathBuf,
    pub(super) media: Vec<MediumKind>,
    /// As `mount` calls it: `ext4`, `tmpfs`, ….
    pub(super) file_system: Option<String>,
    pub(super) total: Option<u64>,
    pub(super) free: Option<u64>,
    pub(super) writable: bool,
    /// `MAP_SYNC` works, or the mount options say that it does.
    pub(super) dax: bool,
    /// It lies in RAM: nothing in it survives a power loss.
    pub(super) volatile: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) flush: Option<Flush>,
    /// Why the cost of a flush is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) not_measured: Option<String>,
}

/// What an overwrite of 4 KiB and its flush cost, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Flush {
    pub(super) median: u64,
    pub(super) worst: u64,
    pub(super) runs: usize,
}

/// Looks at the pool. It is not made if it is not there.
pub(super) fn look(environment: &Environment) -> Media {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let directory = environment.pool.clone();
    let opened = Pool::open(&directory, Arc::new(HostVfs));
    let dax_tried = opened.as_ref().is_ok_and(|pool| pool.settings().default_medium == MediumKind::Dax);
    let usage = match opened {
        // It is made at the first `run`.
        Err(PoolError::Catalog(CatalogError::Missing { .. })) => Ok(None),
        other => other.and_then(|pool| pool.usage()).map(Some),
    };
    let exists = matches!(usage, Ok(Some(_)));
    let (usage, error) = match usage {
        Ok(usage) => (usage, None),
        Err(error) => (None, Some(super::super::one_line(&error.into()))),
    };
    let of = |usage: Vec<Usage>| usage.into_iter().map(|usage| (usage.medium, usage.directory)).collect();
    let directories = usage.map_or_else(|| MediumKind::ALL.map(|medium| (medium, directory.clone())).to_vec(), of);
    let places = group(directories).into_iter().map(|(at, media)| place(at, media, exists, dax_tried, &mounts));
    Media { pool: directory, exists, places: places.collect(), error }
}

/// The lowest directory at or above `path` that is there.
fn existing(path: &Path) -> PathBuf {
    let there = path.ancestors().find(|path| path.is_dir());
    there.unwrap_or(Path::new("/")).to_owned()
}

/// One directory a file system, with the media that lie there.
fn group(directories: Vec<(MediumKind, PathBuf)>) -> Vec<(PathBuf, Vec<MediumKind>)> {
    let mut groups: Vec<(Option<u64>, PathBuf, Vec<MediumKind>)> = Vec::new();
    for (medium, path) in directories {
        let path = existing(&path);
        let device = fs::metadata(&path).ok().map(|metadata| metadata.dev());
        match groups.iter_mut().find(|(known, ..)| *known == device) {
            Some((_, at, media)) => {
                // The directory above both, which may be the one that the other lies in.
                *at = common(at, &path);
                media.push(medium);
            }
            None => groups.push((device, path, vec![medium])),
        }
    }
    groups.into_iter().map(|(_, path, media)| (path, media)).collect()
}

fn common(a: &Path, b: &Path) -> PathBuf {
    a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

fn place(directory: PathBuf, media: Vec<MediumKind>, measure: bool, dax_tried: bool, mounts: &str) -> Place {
    let real = fs::canonicalize(&directory).unwrap_or_else(|_| directory.clone());
    let mount = mount_of(mounts, &real);
    let space = HostVfs.space(&directory).ok().flatten();
    let writable = rustix::fs::access(&directory, Access::WRITE_OK | Access::EXEC_OK).is_ok();
    let (flush, not_measured) = match (measure, writable) {
        (true, true) => match flush_cost(&directory) {
            Ok(flush) => (Some(flush), None),
            Err(error) => (None, Some(error.to_string())),
        },
        (true, false) => (None, Some("the directory is not writable".to_owned())),
        (false, _) => (None, Some("there is no pool yet".to_owned())),
    };
    Place {
        dax: mount.as_ref().is_some_and(|mount| mount.dax) || dax_tried && media.contains(&MediumKind::Dax),
        volatile: mount.as_ref().is_some_and(|mount| ["tmpfs", "ramfs"].contains(&mount.file_system.as_str())),
        file_system: mount.map(|mount| mount.file_system),
        total: space.map(|space| space.total),
        free: space.map(|space| space.available),
        directory,
        media,
        writable,
        flush,
        not_measured,
    }
}

/// What [`mount_of`] finds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    file_system: String,
    dax: bool,
}

/// The mount that `path` lies in, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)): of those whose mount point is the
/// longest, the last, which hides the others.
fn mount_of(mountinfo: &str, path: &Path) -> Option<Mount> {
    let parse = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let point = unescape(before.split(' ').nth(4)?);
        let mut words = after.split(' ');
        let (file_system, options) = (words.next()?, words.nth(1)?);
        let dax = options.split(',').any(|option| matches!(option, "dax" | "dax=always"));
        Some((PathBuf::from(point), Mount { file_system: file_system.to_owned(), dax }))
    };
    let around = mountinfo.lines().filter_map(parse).filter(|(point, _)| path.starts_with(point));
    around.max_by_key(|(point, _)| point.components().count()).map(|(_, mount)| mount)
}

/// Spaces and the like stand in `mountinfo` as a backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let octal = digits.filter(|_| first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Overwrites and flushes a block of a file that is there already, as a freeze does with its context.
fn flush_cost(directory: &Path) -> std::io::Result<Flush> {
    let path = directory.join(format!("doctor-{}.tmp", std::process::id()));
    let file = HostVfs.open(&path, OpenMode::CreateNew)?;
    // Without a name nothing stays behind, however this ends.
    HostVfs.remove_file(&path)?;
    file.allocate(0, BLOCK as u64)?;
    file.write_all_at(&[0xff; BLOCK], 0)?;
    file.sync_all()?;
    let mut times = Vec::with_capacity(FLUSHES);
    for run in 0..FLUSHES {
        let block = [u8::try_from(run).unwrap_or_default(); BLOCK];
        let begun = Instant::now();
        file.write_all_at(&block, 0)?;
        file.sync_data()?;
        times.push(nanoseconds(begun.elapsed()));
    }
    Ok(summary(times))
}

fn summary(mut times: Vec<u64>) -> Flush {
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    Flush { median: at(times.len() / 2), worst: at(times.len().saturating_sub(1)), runs: times.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_empty(directory: &Path) -> bool {
        fs::read_dir(directory).unwrap().next().is_none()
    }

    const MOUNTS: &str = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
25 24 0:23 / /dev/shm rw,relatime shared:3 - tmpfs tmpfs rw,size=1k
40 27 259:1 / /mnt/p\\040mem rw - ext4 /dev/pmem0 rw,dax=always
41 27 259:1 / /mnt/never rw - xfs /dev/pmem1 rw,dax=never
42 40 0:30 / /mnt/p\\040mem rw - tmpfs none rw
damaged line
";

    #[test]
    fn the_mount_of_a_path_is_the_innermost_and_the_last() {
        let of = |path: &str| mount_of(MOUNTS, Path::new(path)).unwrap();
        assert_eq!(of("/home/x"), Mount { file_system: "ext4".into(), dax: false });
        assert_eq!(of("/dev/shm/pool").file_system, "tmpfs");
        assert_eq!(of("/dev/shmoo").file_system, "ext4", "a name that only begins alike is another directory");
        assert_eq!(of("/mnt/p mem/pool").file_system, "tmpfs", "a later mount hides an earlier one");
        assert!(!of("/mnt/never/pool").dax);
        let without_last = MOUNTS.split("42 40").next().unwrap();
        assert!(mount_of(without_last, Path::new("/mnt/p mem")).unwrap().dax);
        assert_eq!(mount_of("", Path::new("/")), None);
    }

    #[test]
    fn escapes_that_are_none_are_left_alone() {
        assert_eq!(unescape(r"a\040b\134"), r"a b\");
        assert_eq!(unescape(r"\04"), r"\04");
        assert_eq!(unescape(r"\999é"), r"\999é");
    }

    #[test]
    fn a_flush_is_summed_up_by_median_and_worst() {
        assert_eq!(summary(vec![9, 1, 5]), Flush { median: 5, worst: 9, runs: 3 });
        assert_eq!(summary(Vec::new()), Flush { median: 0, worst: 0, runs: 0 });
    }

    #[test]
    fn measuring_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let flush = flush_cost(directory.path()).unwrap();
        assert!(flush.median > 0 && flush.median <= flush.worst && flush.runs == FLUSHES);
        assert!(is_empty(directory.path()));
    }

    #[test]
    fn a_pool_that_is_not_there_is_not_made_and_its_parent_is_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let environment = Environment { pool: directory.path().join("a/b") };
        let media = look(&environment);
        assert!(!media.exists && media.error.is_none() && is_empty(directory.path()));
        let [place] = &media.places[..] else { panic!("{media:?}") };
        assert_eq!(place.directory, directory.path());
        assert!(place.flush.is_none() && place.writable && place.media == MediumKind::ALL);
    }

    #[test]
    fn a_pool_is_measured_and_a_damaged_one_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let environment = Environment { pool: directory.path().join("pool") };
        environment.open_or_create_pool().unwrap();
        let media = look(&environment);
        assert!(media.exists && media.places[0].flush.is_some(), "{media:?}");
        for entry in fs::read_dir(&environment.pool).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            fs::write(entry.path(), "damaged").unwrap();
        }
        let media = look(&environment);
        assert!(!media.exists && media.error.is_some(), "{media:?}");
    }
}
