//! A memory cgroup of a bench's own, version 1 or 2 (Linux, `Documentation/admin-guide/cgroup-v1/memory.rst` and `cgroup-v2.rst`).
//!
//! It lies below the group that this process is in, so that whatever holds for that one holds for what is measured too. Version 2
//! lets a group that has processes of its own have no groups with limits below it: then it lies beside.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Absent, PagingError};

const PAGE: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A group without processes yet. Whoever made it removes it: see [`super::guard`].
#[derive(Debug)]
pub(super) struct MemoryGroup {
    directory: PathBuf,
    version: Version,
}

impl MemoryGroup {
    /// Makes it.
    ///
    /// # Errors
    /// [`PagingError::Absent`], with what is needed.
    pub(super) fn create(name: &str) -> Result<Self, PagingError> {
        let (groups, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
        let none =
            "there is no memory cgroup here: a kernel with CONFIG_MEMCG and a mounted cgroup file system are needed";
        let (own, version) = own_group(&groups, &mounts).ok_or_else(|| Absent::new(none))?;
        let mut refusals = Vec::new();
        for parent in parents(&own, version) {
            if version == Version::Two {
                // It may be on already, or refused: then the limit below is not there, and is found out.
                let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
            }
            let directory = parent.join(name);
            match fs::create_dir(&directory) {
                Ok(()) => {}
                Err(error) => {
                    refusals.push(format!("{}: {error}", directory.display()));
                    continue;
                }
            }
            let group = Self { directory, version };
            if group.limit_file().exists() {
                return Ok(group);
            }
            refusals.push(format!("{} has no limits", group.directory.display()));
            let _ = fs::remove_dir(&group.directory);
        }
        let why =
            format!("no memory cgroup can be made ({}): root, or a delegated group, is needed", refusals.join("; "));
        Err(Absent::new(why).into())
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a process writes its id to be in it.
    pub(super) fn processes(&self) -> PathBuf {
        self.directory.join("cgroup.procs")
    }

    fn limit_file(&self) -> PathBuf {
        self.directory.join(match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        })
    }

    /// Bytes that its processes may have in memory.
    ///
    /// # Errors
    /// [`PagingError::Absent`]; there is less than they have already, and nowhere to put it.
    pub(super) fn limit(&self, bytes: u64) -> Result<(), PagingError> {
        let file = self.limit_file();
        let refused = |error| Absent::new(format!("{} does not take {bytes}: {error}", file.display()));
        fs::write(&file, bytes.next_multiple_of(PAGE).to_string()).map_err(refused)?;
        if self.version == Version::One {
            // With all pages active and their writes under way, version 1 at times kills a process though swap has room (seen with 52 of
            // 256 MB in use). This lets it wait for the writes instead. If it cannot be had, it may be killed, which is then told.
            let _ = fs::write(self.directory.join("memory.oom_control"), "1");
        }
        Ok(())
    }

    /// Bytes that its processes have in memory.
    ///
    /// # Errors
    /// [`PagingError::Absent`].
    pub(super) fn usage(&self) -> Result<u64, PagingError> {
        let name = match self.version {
            Version::One => "memory.usage_in_bytes",
            Version::Two => "memory.current",
        };
        let text = read(self.directory.join(name))?;
        let number = text.trim().parse().map_err(|_| Absent::new(format!("{name} of the cgroup says {text:?}")))?;
        Ok(number)
    }
}

/// Makes this process one of a group's.
pub(super) fn join(processes: &Path) -> io::Result<()> {
    fs::write(processes, std::process::id().to_string())
}

fn read(path: impl AsRef<Path>) -> Result<String, Absent> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|error| Absent::new(format!("{} cannot be read: {error}", path.display())))
}

/// Where to try: below the own group, then beside it.
fn parents(own: &Path, version: Version) -> Vec<PathBuf> {
    match version {
        Version::One => vec![own.to_owned()],
        Version::Two => [Some(own), own.parent()].into_iter().flatten().map(Path::to_owned).collect(),
    }
}

/// The directory of the group that limits this process's memory, from `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn own_group(groups: &str, mounts: &str) -> Option<(PathBuf, Version)> {
    let find = |version: Version| {
        let path = groups.lines().find_map(|line| group_path(line, version))?;
        let directory = mounts.lines().find_map(|line| mounted(line, version, path))?;
        Some((directory, version))
    };
    find(Version::One).or_else(|| find(Version::Two))
}

/// The path that a line `hierarchy:controllers:path` gives for memory.
fn group_path(line: &str, version: Version) -> Option<&str> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let fits = match version {
        Version::One => controllers.split(',').any(|controller| controller == "memory"),
        Version::Two => controllers.is_empty(),
    };
    fits.then_some(path)
}

/// The directory of group `path`, if this line of mountinfo mounts it: `id parent major:minor root point options … - type source options`.
fn mounted(line: &str, version: Version, path: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, _, options) = (after.next()?, after.next()?, after.next()?);
    let fits = match version {
        Version::One => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        Version::Two => kind == "cgroup2",
    };
    let below = Path::new(path).strip_prefix(root).ok()?;
    fits.then(|| Path::new(point).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: &str = "\
30 25 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
31 25 0:27 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_group_is_found_where_memory_is_limited() {
        let version_one = "5:cpu,cpuacct:/a\n4:memory:/jobs/7\n0::/\n";
        let found = own_group(version_one, BOTH).unwrap();
        assert_eq!(found, (PathBuf::from("/sys/fs/cgroup/memory/jobs/7"), Version::One));

        let alone = "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = own_group("0::/user.slice/a:b\n", alone).unwrap();
        assert_eq!(found, (PathBuf::from("/sys/fs/cgroup/user.slice/a:b"), Version::Two));
    }

    #[test]
    fn in_a_container_the_path_is_that_below_the_root_of_the_mount() {
        let mounts = "30 25 0:26 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let found = own_group("4:memory:/docker/x/y\n", mounts).unwrap();
        assert_eq!(found.0, PathBuf::from("/sys/fs/cgroup/memory/y"));
        assert_eq!(own_group("4:memory:/elsewhere\n", mounts), None);
    }

    #[test]
    fn without_a_group_nothing_is_made_up() {
        assert_eq!(own_group("", BOTH), None);
        assert_eq!(own_group("4:memory:/\n", "nonsense\n- - -\n"), None);
    }
}
