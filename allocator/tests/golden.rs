//! Pools of released versions are readable for ever.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use allocator::{Dirty, Kind, MediumKind, Pool, Region, RegionInfo, RegionSpec};
use vfs::HostVfs;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// The version that the catalog's frame says.
fn version(pool: &Path) -> u8 {
    fs::read(pool.join("catalog")).unwrap()[8]
}

fn opens_verifies_and_can_be_changed(golden: &str, written: u8) {
    let dir = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(golden), dir.path());
    assert_eq!(version(dir.path()), written);
    let pool = Pool::open(dir.path(), Arc::new(HostVfs)).unwrap();
    assert_eq!(pool.check().unwrap().problems, []);
    let region = |id, name: &str, kind, medium, size| RegionInfo {
        id,
        name: name.parse().unwrap(),
        kind,
        medium,
        size,
        data_offset: 16384,
    };
    let expected = [
        region(2, "app/ram", Kind::Ram, MediumKind::Nvdimm, 8192),
        region(3, "app/context", Kind::Context, MediumKind::File, 4096),
    ];
    assert_eq!(pool.list(), expected);
    let settings = pool.settings();
    assert_eq!(settings.media[&MediumKind::File].capacity, Some(1 << 30));
    let again = RegionSpec { kind: Kind::Ram, size: 8192, medium: None };
    let ram = Region::open(pool.lease(&expected[0].name).unwrap()).unwrap();
    assert_eq!(ram.is_clean(), Some(41));
    let mut bytes = [0; 8192];
    ram.read_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == (i / 4096) as u8 + 1));
    let context = Region::open(pool.lease(&expected[1].name).unwrap()).unwrap();
    assert_eq!(context.is_clean(), None);
    ram.clear_stamp().unwrap();
    let mapping = ram.map().unwrap();
    assert_eq!(ram.persist(&mapping, Dirty::Unknown).unwrap().pages, Some(0));
    drop((ram, context, mapping));
    assert_eq!(pool.allocate(&expected[0].name, again).unwrap(), expected[0]);
    assert_eq!(version(dir.path()), written, "looking, leasing and finding again convert nothing");
    pool.resize(&expected[0].name, 16384).unwrap();
    assert_eq!(version(dir.path()), 2, "a change writes what is written now");
    let pool = Pool::open(dir.path(), Arc::new(HostVfs)).unwrap();
    assert_eq!(pool.list(), [RegionInfo { size: 16384, ..expected[0].clone() }, expected[1].clone()]);
    assert_eq!(pool.settings(), settings);
    pool.free(&expected[1].name).unwrap();
    assert_eq!(pool.check().unwrap().problems, []);
}

#[test]
fn a_pool_of_version_1_opens_verifies_and_is_converted_by_the_first_change() {
    opens_verifies_and_can_be_changed("v1", 1);
}

/// Its last change is in the log alone.
#[test]
fn a_pool_of_version_2_opens_verifies_and_can_be_changed() {
    opens_verifies_and_can_be_changed("v2", 2);
}
