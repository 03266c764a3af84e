use super::layout::{self, ENTRIES_AT, Entries, NotACatalog, SECTOR};
use super::*;
use crate::frame;
use proptest::prelude::*;
use vfs::CrashVfs;

const LENGTH: usize = ENTRIES_AT + 8 * SECTOR;

fn settings() -> Settings {
    let limit = MediumSettings { directory: Some("/mnt/disk".into()), capacity: Some(1 << 40) };
    let media = BTreeMap::from([(MediumKind::File, limit), (MediumKind::Dax, MediumSettings::default())]);
    Settings { default_medium: MediumKind::File, media, ram_limit: Some(1 << 33) }
}

fn region(id: u64, name: &str) -> RegionInfo {
    RegionInfo {
        id,
        name: name.parse().unwrap(),
        kind: Kind::Ram,
        medium: MediumKind::File,
        size: 4096,
        data_offset: MIN_DATA_OFFSET,
    }
}

fn catalog() -> Catalog {
    let mut catalog = Catalog::new(5, settings());
    catalog.regions = vec![region(1, "web/ram"), region(3, &"a".repeat(64))];
    catalog.next_id = 4;
    catalog
}

fn encoded(catalog: &Catalog) -> Vec<u8> {
    let entries = layout::place(catalog, &Entries::from([(3, 0)]), LENGTH).unwrap();
    layout::encode(catalog, &entries, LENGTH).unwrap()
}

fn pool_with(catalog: &Catalog) -> CrashVfs {
    let vfs = CrashVfs::new();
    vfs.create_dir_all(Path::new("/pool")).unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
    Edit::new(&vfs, Path::new("/pool")).commit(catalog).unwrap();
    vfs
}

fn contents(vfs: &CrashVfs) -> Vec<u8> {
    let file = vfs.open(Path::new("/pool/catalog"), OpenMode::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn change(vfs: &CrashVfs, change: impl FnOnce(&mut Catalog)) -> Catalog {
    let (mut edit, mut catalog) = Edit::open(vfs, Path::new("/pool")).unwrap();
    change(&mut catalog);
    edit.commit(&catalog).unwrap();
    catalog
}

#[test]
fn a_catalog_comes_back_as_it_was_committed() {
    let pool = Path::new("/pool");
    let vfs = pool_with(&catalog());
    assert_eq!(Catalog::load_durable(&vfs, pool).unwrap(), (catalog(), true));
    assert_eq!(vfs.entry_kind(&pool.join(TEMPORARY)).unwrap(), None);
    let changed = change(&vfs, |catalog| {
        catalog.regions.remove(0);
        catalog.regions.push(region(4, "new"));
        catalog.next_id = 5;
        catalog.settings.ram_limit = None;
        catalog.settings.media.clear();
    });
    assert_eq!(Catalog::load_durable(&vfs, pool).unwrap(), (changed.clone(), true));
    assert_eq!(Catalog::load(&vfs.after_cut(0), pool).unwrap(), changed);
}

#[test]
fn a_change_is_one_flush_and_writes_what_it_changes() {
    let vfs = pool_with(&catalog());
    let before = (vfs.ops(), vfs.syncs());
    change(&vfs, |catalog| catalog.regions[0].name = "other".parse().unwrap());
    let trace = &vfs.trace()[before.0 as usize..];
    assert_eq!(vfs.syncs() - before.1, 1, "{trace:#?}");
    // The batch with two sectors, its flush, the seal.
    assert_eq!(trace.len(), 3, "{trace:#?}");
    assert!(trace[0].contains("write 1536 bytes"), "{trace:#?}");
}

#[test]
fn many_changes_go_round_the_log_and_more_regions_than_entries_make_a_larger_file() {
    let (vfs, pool) = (pool_with(&catalog()), Path::new("/pool"));
    let length = contents(&vfs).len();
    for id in 4..404 {
        let changed = change(&vfs, |catalog| {
            catalog.regions.push(region(id, &format!("vm{id}/ram")));
            catalog.next_id = id + 1;
        });
        if id % 7 == 0 {
            assert_eq!(Catalog::load(&vfs.after_cut(id), pool).unwrap(), changed);
        }
    }
    assert!(contents(&vfs).len() > length);
    // More at a time than the log takes.
    let renamed = change(&vfs, |catalog| {
        for region in &mut catalog.regions {
            region.name = format!("all/{}", region.name).parse().unwrap();
        }
    });
    assert_eq!(Catalog::load(&vfs.after_cut(0), pool).unwrap(), renamed);
    let freed = change(&vfs, |catalog| catalog.regions.truncate(1));
    assert_eq!(Catalog::load(&vfs, pool).unwrap(), freed);
}

/// Cuts `change` of what lies on `ground` at every step: the catalog is then as before or as after, all that is durable stays, and the next
/// change works, whatever was left; a cut of that one, too.
fn cut_everywhere(ground: &CrashVfs, change_it: fn(&mut Catalog), what: &str) -> u64 {
    let pool = Path::new("/pool");
    let before = Catalog::load(&ground.after_kill(), pool).unwrap();
    // Another one only where a process was killed.
    let durable = Catalog::load(&ground.after_cut(0), pool).unwrap();
    let mut after = before.clone();
    change_it(&mut after);
    for step in 1.. {
        let vfs = ground.after_kill();
        vfs.cut_at(step);
        let outcome = Edit::open(&vfs, pool).and_then(|(mut edit, mut catalog)| {
            change_it(&mut catalog);
            edit.commit(&catalog)
        });
        assert_eq!(outcome.is_ok(), !vfs.is_cut(), "{what}: {outcome:?}");
        for seed in 0..16 {
            let left = if seed == 0 { vfs.after_kill() } else { vfs.after_cut(seed) };
            let what = format!("{what}, cut at {step}, disk {seed}: {:?}", vfs.trace().last());
            let found = Catalog::load(&left, pool).unwrap_or_else(|error| panic!("{what}: {error:?}"));
            let is_earlier = |found: &Catalog| *found == before || *found == durable;
            assert!(found == after || (outcome.is_err() && is_earlier(&found)), "{what}");
            // The next change recovers, and the power goes at one of its steps.
            let again = left.after_kill();
            again.cut_at(seed + 1);
            drop(Edit::open(&again, pool).and_then(|(mut edit, mut catalog)| {
                catalog.next_id += 1;
                edit.commit(&catalog)
            }));
            let mut next = found.clone();
            next.next_id += 1;
            let last = Catalog::load(&again.after_cut(seed + 7), pool);
            let last = last.unwrap_or_else(|error| panic!("{what}, then at {}: {error:?}", seed + 1));
            // Killed, the first may have left what was never durable.
            assert!(last == found || last == next || (seed == 0 && is_earlier(&last)), "{what}, then at {}", seed + 1);
            let healed = change(&left, |catalog| catalog.next_id += 1);
            assert_eq!(Catalog::load_durable(&left.after_cut(seed), pool).unwrap().0, healed, "{what}");
        }
        if outcome.is_ok() {
            return step;
        }
    }
    unreachable!("it ends")
}

#[test]
fn a_cut_at_any_step_of_any_kind_of_change_leaves_the_catalog_before_or_after_it() {
    let more = |catalog: &mut Catalog| {
        let id = catalog.next_id;
        catalog.regions.push(region(id, &format!("vm{id}")));
        catalog.next_id += 1;
    };
    let sealed = pool_with(&catalog());
    let small = cut_everywhere(&sealed, more, "one region");
    let all_of_them = |catalog: &mut Catalog| {
        for region in &mut catalog.regions {
            region.name = format!("all/{}", region.name).parse().unwrap();
        }
    };
    // A quarter of the log is in use, and is brought to the memory first.
    let crowded = pool_with(&catalog());
    let mut changes = 0;
    while small >= steps_of(&crowded, more) {
        change(&crowded, more);
        changes += 1;
    }
    assert!((5..60).contains(&changes), "{changes}");
    let truncated = cut_everywhere(&crowded, more, "a truncation first");
    assert!(truncated > small, "{truncated}");
    // More than the log has room for.
    (0..40).for_each(|_| drop(change(&sealed, more)));
    cut_everywhere(&sealed, all_of_them, "more than the log takes");
    // No entry is free.
    let entries = (contents(&sealed).len() - file::PAGE - file::LOG - ENTRIES_AT) / SECTOR;
    while change(&sealed, more).regions.len() < entries {}
    cut_everywhere(&sealed, more, "no free entry");
    // What a process that was killed has left, and what a cut has.
    let killed = sealed.after_kill();
    killed.cut_at(3);
    drop(Edit::open(&killed, Path::new("/pool")).and_then(|(mut edit, mut catalog)| {
        more(&mut catalog);
        edit.commit(&catalog)
    }));
    cut_everywhere(&killed.after_kill(), more, "after a kill");
    cut_everywhere(&killed.after_cut(3), more, "after a cut");
}

/// How many steps a change takes.
fn steps_of(ground: &CrashVfs, change_it: fn(&mut Catalog)) -> u64 {
    let vfs = ground.after_kill();
    change(&vfs, change_it);
    vfs.ops() + 1
}

#[test]
fn who_reads_while_others_change_sees_whole_changes() {
    let directory = tempfile::tempdir().unwrap();
    let (pool, host) = (directory.path(), vfs::HostVfs);
    let mut first = catalog();
    first.regions = (1..=9).map(|id| region(id, &format!("vm{id}/odd"))).collect();
    first.next_id = 10;
    Edit::new(&host, pool).commit(&first).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut looks = 0;
                while !done.load(order) {
                    let seen = Catalog::load(&host, pool).unwrap();
                    let odd = seen.regions.iter().filter(|region| region.name.as_str().ends_with("/odd")).count();
                    assert!([0, seen.regions.len()].contains(&odd), "half of a change");
                    looks += 1;
                }
                assert!(looks > 10, "{looks}");
            });
        }
        for number in 0..60 {
            let _lock = CatalogLock::take(&host, pool).unwrap();
            let (mut edit, mut catalog) = Edit::open(&host, pool).unwrap();
            for region in &mut catalog.regions {
                let part = if number % 2 == 0 { "even" } else { "odd" };
                region.name = format!("vm{}/{part}", region.id).parse().unwrap();
            }
            edit.commit(&catalog).unwrap();
        }
        done.store(true, order);
    });
}

#[test]
fn a_catalog_of_version_1_is_replaced_by_the_first_change_and_only_then() {
    let (vfs, pool) = (CrashVfs::new(), Path::new("/pool"));
    vfs.create_dir_all(pool).unwrap();
    let old = frame::encode(MAGIC, 1, &serde_json::to_vec(&catalog()).unwrap());
    let file = vfs.open(&pool.join(FILE), OpenMode::CreateNew).unwrap();
    file.write_all_at(&old, 0).unwrap();
    file.sync_all().unwrap();
    vfs.sync_dir(pool).unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
    assert_eq!(Catalog::load_durable(&vfs, pool).unwrap(), (catalog(), false));
    drop(Edit::open(&vfs, pool).unwrap());
    assert_eq!(contents(&vfs), old);
    let mut steps = 0;
    loop {
        steps += 1;
        let vfs = vfs.after_kill();
        vfs.cut_at(steps);
        let (mut edit, mut changed) = match Edit::open(&vfs, pool) {
            Ok(opened) => opened,
            Err(error) => {
                assert!(vfs.is_cut(), "{error}");
                continue;
            }
        };
        changed.regions.pop();
        let committed = edit.commit(&changed).is_ok();
        assert_eq!(committed, !vfs.is_cut());
        for seed in 0..24 {
            let left = if seed == 0 { vfs.after_kill() } else { vfs.after_cut(seed) };
            let found = Catalog::load(&left, pool).unwrap();
            assert!(found == changed || (!committed && found == catalog()), "cut at {steps}");
            let again = change(&left, |catalog| catalog.regions.truncate(1));
            assert_eq!(Catalog::load(&left.after_cut(seed), pool).unwrap(), again, "cut at {steps}");
            assert_eq!(contents(&left)[8], 2, "converted");
        }
        if committed {
            break;
        }
    }
    assert!(steps > 5, "{steps}");
}

#[test]
fn a_newer_catalog_and_a_damaged_one_are_told_apart() {
    let (vfs, pool) = (CrashVfs::new(), Path::new("/pool"));
    vfs.create_dir_all(pool).unwrap();
    let told = |bytes: &[u8]| {
        vfs.open(&pool.join(FILE), OpenMode::CreateTruncate).unwrap().write_all_at(bytes, 0).unwrap();
        Catalog::load(&vfs, pool).unwrap_err().to_string()
    };
    let body = serde_json::to_vec(&catalog()).unwrap();
    let newer = told(&frame::encode(MAGIC, VERSION + 1, &body));
    assert!(newer.contains("made by a newer perdure"), "{newer}");
    let mut bytes = frame::encode(MAGIC, 1, &body);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    assert!(told(&bytes).contains("is damaged; nothing was altered"));
    bytes[last] ^= 1;
    bytes.push(0);
    assert!(told(&bytes).contains("1 bytes follow it"));
    assert!(told(&frame::encode(MAGIC, 1, b"{}")).contains("makes no sense"));
    assert!(told(&frame::encode(MAGIC, 2, b"{}")).contains("makes no sense"));
    let huge: Vec<u8> = [5u64, 1 << 40, 1 << 62].iter().flat_map(|n| n.to_le_bytes()).collect();
    assert!(told(&frame::encode(MAGIC, 2, &huge)).contains("makes no sense"));
    let sound = contents(&pool_with(&catalog()));
    assert!(told(&sound[..sound.len() - 512]).contains("is damaged"));
}

/// A last change that rots in the log is not taken for one that a cut tore: that would bring back the catalog before it, silently.
#[test]
fn a_rotten_bit_anywhere_is_damage_or_changes_nothing() {
    let (vfs, pool) = (pool_with(&catalog()), Path::new("/pool"));
    let mut expected = catalog();
    for name in ["b", "c", "d"] {
        expected = change(&vfs, |catalog| catalog.regions[0].name = name.parse().unwrap());
    }
    let length = contents(&vfs).len() as u64;
    let (mut damaged, mut harmless) = (0, 0);
    // Some bytes of each sector, and all of those that are in use in the first batches.
    let log = (file::PAGE + 8192) as u64;
    let places = (0..length).filter(|at| at % 509 == 3 || (log..log + 4 * 1536).contains(at) && at % 5 == 0);
    for at in places {
        vfs.flip(&pool.join(FILE), at, 1 << (at % 8)).unwrap();
        match Catalog::load(&vfs, pool) {
            Ok(found) => {
                assert_eq!(found, expected, "byte {at}");
                harmless += 1;
            }
            Err(CatalogError::Damaged { .. } | CatalogError::Malformed { .. }) => damaged += 1,
            Err(error) => panic!("byte {at}: {error}"),
        }
        vfs.flip(&pool.join(FILE), at, 1 << (at % 8)).unwrap();
    }
    assert!(damaged > 300 && harmless > 100, "{damaged}, {harmless}");
}

#[test]
fn damage_is_found_by_the_sector_and_named() {
    let refused = |at: usize| {
        let mut bytes = encoded(&catalog());
        bytes[at] ^= 4;
        match layout::decode(5, &bytes).unwrap_err() {
            NotACatalog::Damaged(damage) => damage,
            NotACatalog::Malformed(reason) => panic!("{reason}"),
        }
    };
    assert!(matches!(refused(9), CatalogDamage::Settings { at: 0 }));
    assert!(matches!(refused(600), CatalogDamage::Settings { at: 512 }));
    let entry = refused(ENTRIES_AT + SECTOR + 9);
    assert!(matches!(&entry, CatalogDamage::Entry { entry: 1, named: Some(name), .. } if name.as_str() == "web/ram"));
    assert!(entry.to_string().contains("(region web/ram, perhaps)"), "{entry}");
    assert!(matches!(refused(ENTRIES_AT + 2 * SECTOR), CatalogDamage::Entry { entry: 2, .. }));
}

#[test]
fn an_entry_that_was_lost_or_is_an_older_one_does_not_add_up() {
    let sound = encoded(&catalog());
    let older = {
        let mut other = catalog();
        other.regions[0].name = "older".parse().unwrap();
        encoded(&other)
    };
    let entry = ENTRIES_AT + SECTOR..ENTRIES_AT + 2 * SECTOR;
    for with in [older, vec![0; LENGTH]] {
        let mut bytes = sound.clone();
        bytes[entry.clone()].copy_from_slice(&with[entry.clone()]);
        assert!(matches!(layout::decode(5, &bytes), Err(NotACatalog::Damaged(CatalogDamage::Sum))));
    }
    let mut moved = sound.clone();
    moved.copy_within(entry.clone(), ENTRIES_AT + 5 * SECTOR);
    assert!(matches!(layout::decode(5, &moved), Err(NotACatalog::Damaged(CatalogDamage::Entry { entry: 5, .. }))));
}

#[test]
fn nonsense_under_valid_checksums_is_refused() {
    let refused = |change: fn(&mut Catalog)| {
        let mut catalog = catalog();
        change(&mut catalog);
        let body = serde_json::to_vec(&catalog).unwrap();
        let v1 = v1::decode(&frame::encode(MAGIC, 1, &body), Path::new("/pool/catalog")).is_err();
        let mut entries = Entries::new();
        catalog.regions.iter().enumerate().for_each(|(entry, region)| _ = entries.insert(region.id, entry));
        let v2 = layout::decode(5, &layout::encode(&catalog, &entries, LENGTH).unwrap()).is_err();
        assert_eq!(v1, v2);
        v2
    };
    assert!(!refused(|_| {}));
    assert!(refused(|c| c.regions[1].name = c.regions[0].name.clone()));
    assert!(refused(|c| c.regions[1].id = 1));
    assert!(refused(|c| c.next_id = 3));
    assert!(refused(|c| c.regions[0].size = 0));
    assert!(refused(|c| c.regions[0].size = 4097));
    assert!(refused(|c| c.regions[0].size = u64::MAX - 4095));
    assert!(refused(|c| c.regions[0].data_offset = 8192));
    assert!(refused(|c| c.regions[0].data_offset = 1 << 63));
}

proptest! {
    #[test]
    fn arbitrary_bodies_do_no_harm(body in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(v1::decode(&frame::encode(MAGIC, 1, &body), Path::new("/pool/catalog")).is_err());
        let _ = layout::decode(5, &body);
    }

    #[test]
    fn arbitrary_sectors_under_valid_checksums_do_no_harm(
        which in 0..9usize, fields in prop::collection::vec(any::<u8>(), 48), tail in any::<[u8; 8]>(),
    ) {
        let mut bytes = encoded(&catalog());
        let (at, length) = match which {
            0 => (0, SECTOR),
            1 | 2 => (SECTOR + (which - 1) * 9 * SECTOR, 9 * SECTOR),
            entry => (ENTRIES_AT + (entry - 3) * SECTOR, SECTOR),
        };
        let sector = &mut bytes[at..at + length];
        let keep = if which == 0 { 8 } else { 0 };
        sector[keep..48].copy_from_slice(&fields[keep..]);
        sector[280..288].copy_from_slice(&tail);
        if which > 2 {
            sector[24..28].copy_from_slice(&(which as u32 - 3).to_le_bytes());
        }
        let crc = crc32fast::hash(&sector[..length - 4]);
        sector[length - 4..].copy_from_slice(&crc.to_le_bytes());
        let _ = layout::decode(5, &bytes);
    }
}
