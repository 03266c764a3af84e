//! A store that version 1 wrote is read by every later version.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapshot::{GenerationId, Options, Parent, Store};
use vfs::Vfs;
use vfs::host::HostVfs;
use world::{Image, Put, check, commit, put};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The history that the golden store went through. It must not change.
fn history(store: &Store) -> Vec<(GenerationId, Image)> {
    let mut image = Image::new(&[("disk", 3), ("ram", 1100)]);
    let mut all = Vec::new();
    let steps: [&[Put]; 3] = [
        &[put("ram", 0, 2), put("ram", 1, 4), put("ram", 1099, 6), put("disk", 2, 3)],
        &[put("ram", 1, 8), put("ram", 40, 2)],
        &[put("ram", 0, 0), put("disk", 0, 10)],
    ];
    for (number, puts) in steps.iter().enumerate() {
        image.context = format!("golden context {number}").into_bytes();
        let (id, made) = commit(store, "web/1", Parent::Newest, &image, puts).unwrap();
        all.push((id, made.clone()));
        image = made;
    }
    store.label(&all[1].0, Some("ein Etikett, größer als ASCII")).unwrap();
    let fork = store.fork(&all[1].0, "fork", 77).unwrap();
    all.push((fork.id, all[1].1.clone()));
    store.purge(&[all[0].0.clone()]).unwrap();
    all.remove(0);
    all
}

fn options() -> Options {
    Options { compression: world::CODECS[1], ..world::options() }
}

/// Where everything must come from: the same history in a store of this version.
fn expected() -> Vec<(GenerationId, Image)> {
    let vfs: Arc<dyn Vfs> = Arc::new(vfs::crash::CrashVfs::new());
    history(&world::open(&vfs, &options()).unwrap())
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn the_golden_store_of_version_1_is_read_written_and_swept() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("v1");
    copy_tree(&golden().join("v1"), &at);
    let store = Store::open_existing(Arc::new(HostVfs), &at, options()).unwrap();
    let all = expected();
    assert_eq!(store.lineages(), ["fork", "web/1"]);
    for (id, image) in &all {
        check(&store, id, image).unwrap();
    }
    assert_eq!(store.generation(&all[0].0).unwrap().label.as_deref(), Some("ein Etikett, größer als ASCII"));
    assert!(store.scrub(&mut |_| ()).unwrap().is_clean());
    let (next, image) = commit(&store, "web/1", Parent::Newest, &all[1].1, &[put("ram", 7, 9)]).unwrap();
    assert_eq!(next.number, 4);
    store.sweep(&mut |_| ()).unwrap();
    for (id, image) in all.iter().chain([&(next, image)]) {
        check(&store, id, image).unwrap();
    }
}

#[test]
fn the_golden_export_of_version_1_is_imported() {
    let vfs: Arc<dyn Vfs> = Arc::new(vfs::crash::CrashVfs::new());
    let store = world::open(&vfs, &options()).unwrap();
    let stream = fs::read(golden().join("v1.export")).unwrap();
    let made = store.import("copy", &mut &stream[..]).unwrap();
    let (_, image) = &expected()[1];
    check(&store, &made.id, image).unwrap();
}

/// Writes the golden files: `cargo test -p snapshot --test golden -- --ignored`. Only for a new version of the format, into a new directory.
#[test]
#[ignore = "writes the golden files"]
fn write_the_golden_files() {
    let at = golden().join("v1");
    assert!(!at.exists(), "golden files are never rewritten");
    let store = Store::open(Arc::new(HostVfs), &at, options()).unwrap();
    let all = history(&store);
    let mut stream = Vec::new();
    store.export(&all[1].0, &mut stream).unwrap();
    fs::write(golden().join("v1.export"), stream).unwrap();
}
