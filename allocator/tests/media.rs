//! Regions of each medium through the public interface, on the host.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::sync::Arc;

use allocator::{Dirty, Kind, Mapping, MediumKind, Pool, PoolError, Region, RegionSpec};
use vfs::HostVfs;

/// A directory on the file system of the build, since `/tmp` may be a tmpfs, where nothing is ever flushed.
fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(PathBuf::from(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

fn pool(dir: &tempfile::TempDir) -> Pool {
    Pool::create_or_open(dir.path(), Arc::new(HostVfs)).unwrap()
}

fn region(pool: &Pool, medium: MediumKind, size: u64) -> Region {
    let name = "vm/ram".parse().unwrap();
    let medium = Some(medium);
    let kind = Kind::Ram;
    pool.allocate(&name, RegionSpec { kind, size, medium }).unwrap();
    Region::open(pool.lease(&name).unwrap()).unwrap()
}

fn put(mapping: &Mapping, at: usize, byte: u8) {
    assert!(at < mapping.len());
    // SAFETY: the byte lies in the mapping, which nothing else uses.
    unsafe { mapping.as_ptr().add(at).write_volatile(byte) };
}

/// KiB of the mapping that its file does not have on the disk yet, by `/proc/self/smaps`.
fn dirty_kib(mapping: &Mapping) -> u64 {
    let begin = format!("{:x}-", mapping.as_ptr() as usize);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut ours = smaps.lines().skip_while(|line| !line.starts_with(&begin)).skip(1);
    let fields = ours.by_ref().take_while(|line| !line.starts_with("VmFlags"));
    let dirty = fields.filter(|line| line.starts_with("Shared_Dirty:") || line.starts_with("Private_Dirty:"));
    dirty.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn a_persist_of_a_file_leaves_no_page_unflushed() {
    let dir = on_disk();
    let pool = pool(&dir);
    let region = region(&pool, MediumKind::File, 1 << 20);
    let mapping = region.map().unwrap();
    for page in (0..256).step_by(3) {
        put(&mapping, page * 4096, 1);
    }
    assert!(dirty_kib(&mapping) >= 86 * 4, "writes through a mapping are dirty");
    let report = region.persist(&mapping, Dirty::Unknown).unwrap();
    assert_eq!((report.bytes, report.pages), (None, None));
    assert_eq!(dirty_kib(&mapping), 0);
    put(&mapping, 0, 2);
    assert_eq!(dirty_kib(&mapping), 4, "a page that was flushed is dirty again after the next write");
    let report = region.persist(&mapping, Dirty::Bitmap(&[1])).unwrap();
    assert_eq!((report.bytes, report.pages), (Some(4096), Some(1)));
    assert_eq!(dirty_kib(&mapping), 0);
}

#[test]
fn what_a_medium_promises_is_what_a_new_mapping_shows() {
    for (medium, persist, expected) in [
        (MediumKind::File, false, 9),
        (MediumKind::File, true, 9),
        (MediumKind::Nvdimm, false, 0),
        (MediumKind::Nvdimm, true, 9),
    ] {
        let dir = on_disk();
        let pool = pool(&dir);
        let open = region(&pool, medium, 1 << 20);
        let mapping = open.map().unwrap();
        put(&mapping, 70_000, 9);
        if persist {
            let report = open.persist(&mapping, Dirty::Unknown).unwrap();
            assert!(medium == MediumKind::File || report.bytes == Some(4096), "{report:?}");
        }
        drop((mapping, open));
        let open = region(&pool, medium, 1 << 20);
        let mut found = [1];
        open.read_at(&mut found, 70_000).unwrap();
        let mapping = open.map().unwrap();
        // SAFETY: the byte lies in the mapping, which nothing else uses.
        let mapped = unsafe { mapping.as_ptr().add(70_000).read_volatile() };
        assert_eq!((found[0], mapped), (expected, expected), "{medium}, persisted: {persist}");
        assert_eq!(pool.check().unwrap().problems, []);
    }
}

#[test]
fn space_is_reserved_when_a_region_is_made() {
    use std::os::unix::fs::MetadataExt;
    let dir = on_disk();
    let pool = pool(&dir);
    let region = region(&pool, MediumKind::File, 8 << 20);
    let blocks = std::fs::metadata(region.path()).unwrap().blocks();
    assert!(blocks * 512 >= 8 << 20, "{blocks} blocks: a full disk would reach the guest as SIGBUS");
}

#[test]
fn a_dax_region_where_there_is_no_dax_is_refused_and_leaves_nothing() {
    let dir = on_disk();
    let pool = pool(&dir);
    assert_eq!(pool.settings().default_medium, MediumKind::File);
    let spec = RegionSpec { kind: Kind::Ram, size: 4096, medium: Some(MediumKind::Dax) };
    let error = pool.allocate(&"a".parse().unwrap(), spec).unwrap_err();
    assert!(matches!(error, PoolError::Medium { medium: MediumKind::Dax, .. }), "{error:?}");
    assert_eq!(pool.list(), []);
    assert_eq!(pool.check().unwrap().problems, []);
}

#[test]
fn more_than_the_file_system_has_is_refused_with_both_numbers() {
    let dir = on_disk();
    let pool = pool(&dir);
    let spec = RegionSpec { kind: Kind::Ram, size: 1 << 60, medium: None };
    let error = pool.allocate(&"a".parse().unwrap(), spec).unwrap_err();
    assert!(matches!(error, PoolError::NoSpace { needed, free, .. } if free < needed), "{error:?}");
    assert_eq!(pool.check().unwrap().problems, []);
}
