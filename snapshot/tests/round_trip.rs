//! A generation that was committed comes back, byte for byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test, outside a `#[test]` function too.

use std::path::Path;
use std::sync::Arc;

use snapshot::{GenerationId, NewGeneration, Options, PAGE_SIZE, RegionSpec, Store};
use vfs::crash::CrashVfs;

fn ram(pages: u64) -> RegionSpec {
    RegionSpec { name: "ram".into(), kind: "ram".into(), size: pages * PAGE_SIZE as u64 }
}

fn page(seed: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (at, chunk) in page.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at as u64).to_le_bytes());
    }
    page
}

#[test]
fn two_generations_are_restored_each_as_it_was() {
    let vfs = Arc::new(CrashVfs::new());
    let store = Store::open(vfs, Path::new("/pool/store"), Options { threads: 1, ..Options::default() }).unwrap();
    let mut writer = store.begin(NewGeneration::automatic("web", 1)).unwrap();
    let region = writer.region(&ram(5000)).unwrap();
    for number in 0..3000 {
        writer.put(region, number, &page(number)).unwrap();
    }
    writer.blob("context", b"frozen").unwrap();
    let first = writer.commit().unwrap();
    assert_eq!((first.id.number, first.pages_stored), (1, 3000));
    let mut writer = store.begin(NewGeneration::automatic("web", 2)).unwrap();
    let region = writer.region(&ram(5000)).unwrap();
    writer.put(region, 7, &page(7777)).unwrap();
    writer.put(region, 8, &page(8)).unwrap();
    writer.put(region, 4999, &page(5)).unwrap();
    let second = writer.commit().unwrap();
    assert_eq!(second.pages_stored, 1, "page 8 is the parent's, page 4999 equals page 5");

    let old = store.reader(&GenerationId::new("web", 1)).unwrap();
    let new = store.reader(&GenerationId::new("web", 2)).unwrap();
    assert_eq!(old.blob("context").unwrap().unwrap(), b"frozen");
    let mut found = [1; PAGE_SIZE];
    for number in 0..5000 {
        let was = if number < 3000 { page(number) } else { [0; PAGE_SIZE] };
        old.read_page(0, number, &mut found).unwrap();
        assert_eq!(found, was, "page {number} of the old one");
        let is = match number {
            7 => page(7777),
            4999 => page(5),
            _ => was,
        };
        new.read_page(0, number, &mut found).unwrap();
        assert_eq!(found, is, "page {number} of the new one");
    }
}
