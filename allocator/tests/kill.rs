//! Real processes on the host's file system, killed with SIGKILL: before every system call that changes something, and as holders of leases.
//!
//! The child is this very test binary, run again with one `#[ignore]`d test that does what the environment says, through a
//! [`Vfs`] that counts changing calls and kills its own process before the one asked for. The loop ends only when a child lived through
//! the whole operation, so no call can be left out.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::env;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use allocator::{Kind, LeaseError, Pool, PoolError, Region, RegionName, RegionSpec};
use vfs::{DirEntry, EntryKind, HostVfs, OpenMode, Space, Vfs, VfsFile};

/// The host's file system until call number `left` that changes it.
#[derive(Debug, Clone)]
struct KillVfs {
    left: Arc<AtomicU64>,
}

impl KillVfs {
    fn step(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
            panic!("still alive");
        }
    }
}

#[derive(Debug)]
struct KillFile {
    vfs: KillVfs,
    file: Box<dyn VfsFile>,
}

impl Vfs for KillVfs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn VfsFile>> {
        if !matches!(mode, OpenMode::Read | OpenMode::ReadWrite) {
            self.step();
        }
        let (vfs, file) = (self.clone(), HostVfs.open(path, mode)?);
        Ok(Box::new(KillFile { vfs, file }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step();
        HostVfs.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step();
        HostVfs.remove_file(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.step();
        HostVfs.create_dir_all(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step();
        HostVfs.remove_dir(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        HostVfs.read_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step();
        HostVfs.sync_dir(path)
    }
    fn entry_kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        HostVfs.entry_kind(path)
    }
    fn space(&self, path: &Path) -> io::Result<Option<Space>> {
        HostVfs.space(path)
    }
}

impl VfsFile for KillFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }
    /// A kill may also come between two pages of one write.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let half = bytes.len() / 2;
        self.vfs.step();
        self.file.write_all_at(&bytes[..half], offset)?;
        self.vfs.step();
        self.file.write_all_at(&bytes[half..], offset + half as u64)
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.vfs.step();
        self.file.set_len(length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.vfs.step();
        self.file.allocate(offset, length)
    }
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.vfs.step();
        self.file.punch_hole(offset, length)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.vfs.step();
        self.file.sync_data()
    }
    fn sync_all(&self) -> io::Result<()> {
        self.vfs.step();
        self.file.sync_all()
    }
    fn try_lock(&self) -> io::Result<bool> {
        self.file.try_lock()
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.file.descriptor()
    }
}

fn name(text: &str) -> RegionName {
    text.parse().unwrap()
}

fn spec(size: u64) -> RegionSpec {
    RegionSpec { kind: Kind::Ram, size, medium: None }
}

fn open(dir: &Path) -> Pool {
    Pool::open(dir, Arc::new(HostVfs)).unwrap()
}

fn ground(dir: &Path) {
    let pool = Pool::create_or_open(dir, Arc::new(HostVfs)).unwrap();
    for (region, fill) in [("web/ram", 1), ("web/context", 2), ("other", 3)] {
        pool.allocate(&name(region), spec(8192)).unwrap();
        let region = Region::open(pool.lease(&name(region)).unwrap()).unwrap();
        region.write_at(&[fill; 8192], 0).unwrap();
    }
}

fn state(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let pool = open(dir);
    let read = |info: allocator::RegionInfo| {
        let mut bytes = vec![0; usize::try_from(info.size).unwrap()];
        let region = Region::open(pool.lease(&info.name).unwrap()).unwrap();
        region.read_at(&mut bytes, 0).unwrap();
        (info.name.to_string(), bytes)
    };
    pool.list().into_iter().map(read).collect()
}

const OPERATIONS: [&str; 7] = ["allocate", "grow", "shrink", "rename", "rename-tree", "free", "free-tree"];

fn operate(pool: &Pool, operation: &str) -> Result<(), PoolError> {
    match operation {
        "allocate" => pool.allocate(&name("new"), spec(4096)).map(drop),
        "grow" => pool.resize(&name("other"), 16384).map(drop),
        "shrink" => pool.resize(&name("other"), 4096).map(drop),
        "rename" => pool.rename(&name("other"), &name("another")),
        "rename-tree" => pool.rename_tree(&name("web"), &name("app")),
        "free" => pool.free(&name("other")),
        "free-tree" => pool.free_tree(&name("web")),
        other => panic!("no operation {other}"),
    }
}

fn child(dir: &Path, what: &str, steps: u64) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "the_child", "--ignored", "--test-threads=1", "--nocapture"]);
    command.env("KILL_DIR", dir).env("KILL_WHAT", what).env("KILL_AT", steps.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap()
}

#[test]
#[ignore = "the child of the tests in this file, which run it"]
fn the_child() {
    let Some(dir) = env::var_os("KILL_DIR") else {
        panic!("this is run by the other tests of this file");
    };
    let (dir, what) = (Path::new(&dir), env::var("KILL_WHAT").unwrap());
    if what == "hold" {
        let pool = open(dir);
        let region = Region::open(pool.lease(&name("other")).unwrap()).unwrap();
        let mapping = region.map().unwrap();
        std::hint::black_box(mapping.as_ptr());
        // The mapping alone must keep the lease.
        drop(region);
        std::fs::write(dir.join("held"), "").unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let left = Arc::new(AtomicU64::new(env::var("KILL_AT").unwrap().parse().unwrap()));
    let pool = Pool::open(dir, Arc::new(KillVfs { left })).unwrap();
    operate(&pool, &what).unwrap();
}

#[test]
fn a_process_killed_before_any_call_that_changes_something_leaves_every_region_as_before_or_as_after() {
    for operation in OPERATIONS {
        let expected = tempfile::tempdir().unwrap();
        ground(expected.path());
        let before = state(expected.path());
        operate(&open(expected.path()), operation).unwrap();
        let after = state(expected.path());
        let mut kills = 0;
        for step in 1.. {
            let dir = tempfile::tempdir().unwrap();
            ground(dir.path());
            let status = child(dir.path(), operation, step).wait().unwrap();
            let found = state(dir.path());
            let what = format!("{operation}, killed before call {step}");
            assert!(found == before || found == after, "{what}");
            let pool = open(dir.path());
            assert_eq!(pool.check().unwrap().damage().count(), 0, "{what}");
            pool.sweep().unwrap();
            assert_eq!(pool.check().unwrap().problems, [], "{what}");
            assert_eq!(state(dir.path()), found, "{what}");
            if status.success() {
                assert_eq!(found, after, "{what}");
                break;
            }
            assert_eq!(status.signal(), Some(9), "{what}: {status}");
            kills += 1;
        }
        assert!(kills >= 5, "{operation} was killed only {kills} times");
    }
}

#[test]
fn a_region_is_held_by_the_mapping_of_another_process_until_that_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    ground(dir.path());
    let mut holder = child(dir.path(), "hold", 0);
    let begun = Instant::now();
    while !dir.path().join("held").exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "the child does not come up");
        std::thread::sleep(Duration::from_millis(2));
    }
    let pool = open(dir.path());
    let error = pool.lease(&name("other")).unwrap_err();
    assert!(matches!(&error, LeaseError::Held { holder: h, .. } if h.pid == Some(holder.id())), "{error}");
    assert!(error.to_string().contains(&format!("in use by process {}", holder.id())));
    for refused in ["grow", "shrink", "rename", "free"] {
        let refusal = operate(&pool, refused).unwrap_err();
        assert!(matches!(refusal, PoolError::Lease(LeaseError::Held { .. })), "{refused}: {refusal}");
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
    pool.lease(&name("other")).unwrap();
}
