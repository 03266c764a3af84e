use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn all(vfs: &CrashVfs, path: &str) -> Option<Vec<u8>> {
    let file = vfs.open(Path::new(path), OpenMode::Read).ok()?;
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    Some(bytes)
}

fn create(vfs: &CrashVfs, path: &str, bytes: &[u8]) -> Box<dyn VfsFile> {
    let file = vfs.open(Path::new(path), OpenMode::CreateNew).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn durable(vfs: &CrashVfs, path: &str, bytes: &[u8]) -> Box<dyn VfsFile> {
    let file = create(vfs, path, bytes);
    file.sync_data().unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
    file
}

#[test]
fn what_was_synced_survives_every_cut_and_the_rest_every_way() {
    let vfs = CrashVfs::new();
    let file = durable(&vfs, "/f", &[1; 1024]);
    file.write_all_at(&[2; 1024], 0).unwrap();
    let seen: BTreeSet<_> = (0..200).map(|seed| all(&vfs.after_cut(seed), "/f").unwrap()).collect();
    let halves: BTreeSet<_> = seen.iter().map(|bytes| (bytes[0], bytes[512])).collect();
    assert_eq!(halves, BTreeSet::from([(1, 1), (1, 2), (2, 1), (2, 2)]));
    for bytes in &seen {
        assert!(bytes[..512].iter().all(|b| *b == bytes[0]), "a sector is never mixed");
        assert!(bytes[512..].iter().all(|b| *b == bytes[512]), "a sector is never mixed");
    }
    file.sync_data().unwrap();
    for seed in 0..50 {
        assert_eq!(all(&vfs.after_cut(seed), "/f").unwrap(), [2; 1024]);
    }
}

#[test]
fn every_cut_is_all_that_seeds_can_find_and_no_more() {
    let vfs = CrashVfs::new();
    let file = durable(&vfs, "/f", &[0; 1024]);
    file.write_all_at(&[1; 1024], 0).unwrap();
    file.write_all_at(&[2; 512], 512).unwrap();
    file.set_len(1536).unwrap();
    create(&vfs, "/g", b"new").sync_all().unwrap();
    vfs.rename(Path::new("/g"), Path::new("/h")).unwrap();
    vfs.remove_file(Path::new("/f")).unwrap();
    let all: BTreeSet<u64> = vfs.every_cut(Grain::Sector).map(|left| left.digest()).collect();
    let seeded: BTreeSet<u64> = (0..20_000).map(|seed| vfs.after_cut(seed).digest()).collect();
    assert_eq!(all, seeded);
    // 2 sectors of 2 and 3 contents, 2 lengths; there or not; and a file under none, either or the later of two names.
    assert_eq!(all.len(), (2 * 3 * 2 + 1) * 3);
    let whole: BTreeSet<u64> = vfs.every_cut(Grain::Operation).map(|left| left.digest()).collect();
    assert!(whole.is_subset(&all) && whole.len() == (2 * 2 * 2 + 1) * 3);
    assert!(vfs.choices(Grain::Sector) >= vfs.choices(Grain::Operation));
    // Nobody asks what is left of a file that has no name left.
    assert_eq!(vfs.choices(Grain::Operation), 6);
    assert_eq!(vfs.every_cut(Grain::Operation).count(), (8 + 1) * 4);
}

#[test]
fn a_digest_sees_bytes_lengths_and_names_and_no_holes() {
    let make = |name: &str, bytes: &[u8]| {
        let vfs = CrashVfs::new();
        durable(&vfs, name, bytes);
        vfs.digest()
    };
    let one = make("/f", &[0, 1]);
    assert_eq!(one, make("/f", &[0, 1]));
    for other in [make("/g", &[0, 1]), make("/f", &[0, 2]), make("/f", &[0, 1, 0]), make("/f", &[])] {
        assert_ne!(one, other);
    }
    let hole = CrashVfs::new();
    durable(&hole, "/f", b"").set_len(512).unwrap();
    assert_eq!(hole.digest(), make("/f", &[0; 512]));
}

#[test]
fn a_later_write_may_survive_an_earlier_one() {
    let vfs = CrashVfs::new();
    let file = durable(&vfs, "/f", &[0; 8192]);
    file.write_all_at(&[1; 512], 0).unwrap();
    file.write_all_at(&[1; 512], 4096).unwrap();
    let found = (0..100).map(|seed| all(&vfs.after_cut(seed), "/f").unwrap());
    assert!(found.into_iter().any(|bytes| bytes[0] == 0 && bytes[4096] == 1));
}

#[test]
fn a_file_whose_directory_was_not_synced_may_vanish_though_it_was_synced() {
    let vfs = CrashVfs::new();
    create(&vfs, "/f", b"x").sync_all().unwrap();
    let seen: BTreeSet<_> = (0..50).map(|seed| all(&vfs.after_cut(seed), "/f")).collect();
    assert_eq!(seen, BTreeSet::from([None, Some(b"x".to_vec())]));
}

#[test]
fn a_directory_lost_takes_its_files_along() {
    let vfs = CrashVfs::new();
    vfs.create_dir_all(Path::new("/a/b")).unwrap();
    create(&vfs, "/a/b/f", b"x").sync_all().unwrap();
    vfs.sync_dir(Path::new("/a/b")).unwrap();
    assert_eq!(all(&vfs.after_cut(0), "/a/b/f"), None);
    vfs.sync_dir(Path::new("/a")).unwrap();
    vfs.sync_dir(Path::new("/")).unwrap();
    assert_eq!(all(&vfs.after_cut(0), "/a/b/f").unwrap(), b"x");
}

#[test]
fn a_rename_shows_the_old_or_the_new_and_never_neither() {
    let vfs = CrashVfs::new();
    durable(&vfs, "/f", b"old");
    let new = create(&vfs, "/t", b"new");
    new.sync_data().unwrap();
    vfs.rename(Path::new("/t"), Path::new("/f")).unwrap();
    let seen: BTreeSet<_> = (0..100).map(|seed| all(&vfs.after_cut(seed), "/f").unwrap()).collect();
    assert_eq!(seen, BTreeSet::from([b"old".to_vec(), b"new".to_vec()]));
    vfs.sync_dir(Path::new("/")).unwrap();
    for seed in 0..50 {
        let after = vfs.after_cut(seed);
        assert_eq!(all(&after, "/f").unwrap(), b"new");
        assert_eq!(all(&after, "/t"), None);
    }
}

#[test]
fn a_rename_without_a_sync_of_the_file_may_show_an_empty_one() {
    let vfs = CrashVfs::new();
    durable(&vfs, "/f", b"old");
    create(&vfs, "/t", b"new");
    vfs.rename(Path::new("/t"), Path::new("/f")).unwrap();
    let seen: BTreeSet<_> = (0..100).map(|seed| all(&vfs.after_cut(seed), "/f").unwrap()).collect();
    assert!(seen.contains(b"".as_slice()), "the classic mistake must show: {seen:?}");
}

#[test]
fn a_rename_between_directories_needs_both_syncs() {
    let vfs = CrashVfs::new();
    vfs.create_dir_all(Path::new("/d")).unwrap();
    durable(&vfs, "/f", b"x");
    vfs.rename(Path::new("/f"), Path::new("/d/f")).unwrap();
    vfs.sync_dir(Path::new("/d")).unwrap();
    assert_eq!(all(&vfs.after_cut(0), "/f").unwrap(), b"x");
    vfs.sync_dir(Path::new("/")).unwrap();
    assert_eq!(all(&vfs.after_cut(0), "/d/f").unwrap(), b"x");
    assert_eq!(all(&vfs.after_cut(0), "/f"), None);
}

#[test]
fn a_removed_file_may_come_back_until_the_directory_is_synced() {
    let vfs = CrashVfs::new();
    durable(&vfs, "/f", b"x");
    vfs.remove_file(Path::new("/f")).unwrap();
    let seen: BTreeSet<_> = (0..50).map(|seed| all(&vfs.after_cut(seed), "/f").is_some()).collect();
    assert_eq!(seen.len(), 2);
    vfs.sync_dir(Path::new("/")).unwrap();
    assert!((0..50).all(|seed| all(&vfs.after_cut(seed), "/f").is_none()));
}

#[test]
fn the_operation_at_the_cut_fails_and_may_have_happened() {
    let vfs = CrashVfs::new();
    let file = durable(&vfs, "/f", &[1; 512]);
    vfs.cut_at(vfs.ops() + 1);
    assert!(is_power_cut(&file.write_all_at(&[2; 512], 0).unwrap_err()));
    assert!(vfs.is_cut());
    assert!(is_power_cut(&file.read_at(&mut [0; 1], 0).unwrap_err()));
    assert!(is_power_cut(&vfs.read_dir(Path::new("/")).unwrap_err()));
    assert_eq!(all(&vfs.after_cut(0), "/f").unwrap()[0], 1);
    assert_eq!(all(&vfs.after_cut(1), "/f").unwrap()[0], 2);
    assert_eq!(all(&vfs.after_kill(), "/f").unwrap()[0], 1);
}

#[test]
fn a_sync_in_flight_makes_nothing_certain() {
    let vfs = CrashVfs::new();
    let file = durable(&vfs, "/f", &[1; 512]);
    file.write_all_at(&[2; 512], 0).unwrap();
    vfs.cut_at(vfs.ops() + 1);
    assert!(file.sync_data().is_err());
    assert_eq!(all(&vfs.after_cut(0), "/f").unwrap()[0], 1);
    assert_eq!(all(&vfs.after_cut(1), "/f").unwrap()[0], 2);
}

#[test]
fn a_kill_keeps_everything_and_makes_nothing_durable() {
    let vfs = CrashVfs::new();
    let file = create(&vfs, "/f", b"x");
    assert!(file.try_lock().unwrap());
    let next = vfs.after_kill();
    assert_eq!(all(&next, "/f").unwrap(), b"x");
    assert!(next.open(Path::new("/f"), OpenMode::Read).unwrap().try_lock().unwrap());
    assert_eq!(all(&next.after_cut(0), "/f"), None);
}

#[test]
fn a_failed_sync_poisons_and_a_later_one_does_not_bring_the_bytes_back() {
    let vfs = CrashVfs::new();
    let file = durable(&vfs, "/f", &[1; 4096]);
    file.write_all_at(&[2; 4096], 0).unwrap();
    vfs.fail_sync(vfs.syncs() + 1);
    let error = file.sync_data().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
    assert!(crate::is_poisoned(&file.write_all_at(&[3], 0).unwrap_err()));
    assert!(crate::is_poisoned(&file.sync_data().unwrap_err()));
    let again = vfs.open(Path::new("/f"), OpenMode::ReadWrite).unwrap();
    again.sync_data().unwrap();
    assert_eq!(all(&vfs, "/f").unwrap(), [2; 4096], "reads still show what is not on the disk");
    let on_disk = all(&vfs.after_cut(1), "/f").unwrap();
    assert_ne!(on_disk, [2; 4096], "a second fsync that returns Ok must not heal the first");
}

#[test]
fn a_full_disk_takes_what_fits_and_says_so() {
    let vfs = CrashVfs::new();
    let file = create(&vfs, "/f", &[1; 512]);
    assert_eq!(vfs.used(), 1024);
    vfs.set_capacity(2048);
    let error = file.write_all_at(&[2; 2048], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(all(&vfs, "/f").unwrap(), [2; 1536]);
    let error = vfs.open(Path::new("/g"), OpenMode::CreateNew).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    file.write_all_at(&[3; 1536], 0).unwrap();
    assert_eq!(file.allocate(0, 4096).unwrap_err().kind(), io::ErrorKind::StorageFull);
    vfs.remove_file(Path::new("/f")).unwrap();
    assert_eq!(vfs.space(Path::new("/")).unwrap().unwrap().available, 2048);
}

#[test]
fn reserved_storage_can_be_written_on_a_full_disk() {
    let vfs = CrashVfs::new();
    let file = create(&vfs, "/f", b"");
    file.allocate(1024, 1 << 40).unwrap();
    vfs.set_capacity(vfs.used());
    file.write_all_at(&[7; 100], (1 << 40) + 512).unwrap();
    assert_eq!(file.write_all_at(&[7; 100], 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
}

#[test]
fn flipped_bits_show_in_reads_and_after_a_cut() {
    let vfs = CrashVfs::new();
    durable(&vfs, "/f", &[0; 600]);
    vfs.flip(Path::new("/f"), 599, 0x81).unwrap();
    assert_eq!(all(&vfs, "/f").unwrap()[599], 0x81);
    assert_eq!(all(&vfs.after_cut(0), "/f").unwrap()[599], 0x81);
}

#[test]
fn a_path_cannot_climb() {
    let error = CrashVfs::new().open(Path::new("/a/../b"), OpenMode::CreateNew).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
    Allocate(u64, u64),
    Sync,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..3000u64, prop::collection::vec(any::<u8>(), 0..1500)).prop_map(|(at, b)| Step::Write(at, b)),
        (0..4000u64).prop_map(Step::SetLen),
        (0..4000u64, 0..2000u64).prop_map(|(at, n)| Step::Punch(at, n)),
        (0..4000u64, 1..2000u64).prop_map(|(at, n)| Step::Allocate(at, n)),
        Just(Step::Sync),
    ]
}

fn run(file: &dyn VfsFile, step: &Step) {
    match step {
        Step::Write(at, bytes) => file.write_all_at(bytes, *at).unwrap(),
        Step::SetLen(length) => file.set_len(*length).unwrap(),
        Step::Punch(at, length) => file.punch_hole(*at, *length).unwrap(),
        Step::Allocate(at, length) => file.allocate(*at, *length).unwrap(),
        Step::Sync => file.sync_data().unwrap(),
    }
}

proptest! {
    /// The page cache of the simulated disk is that of a real file system.
    #[test]
    fn a_simulated_file_reads_as_a_real_one(steps in prop::collection::vec(step(), 1..20)) {
        let dir = tempfile::tempdir().unwrap();
        let real = crate::HostVfs.open(&dir.path().join("f"), OpenMode::CreateNew).unwrap();
        let vfs = CrashVfs::new();
        let simulated = vfs.open(Path::new("/f"), OpenMode::CreateNew).unwrap();
        for step in &steps {
            run(&*real, step);
            run(&*simulated, step);
            let mut bytes = vec![0; real.len().unwrap() as usize];
            real.read_exact_at(&mut bytes, 0).unwrap();
            prop_assert_eq!(&all(&vfs, "/f").unwrap(), &bytes);
        }
    }

    /// A synced file is the same after any cut, and every sector after a cut was there at some moment since the sync.
    #[test]
    fn every_sector_after_a_cut_was_there_at_some_moment(
        steps in prop::collection::vec(step(), 1..20), seed in any::<u64>()
    ) {
        let vfs = CrashVfs::new();
        let file = durable(&vfs, "/f", b"");
        let mut moments = vec![Vec::new()];
        for step in &steps {
            run(&*file, step);
            if matches!(step, Step::Sync) {
                moments.clear();
            }
            moments.push(all(&vfs, "/f").unwrap());
        }
        let after = all(&vfs.after_cut(seed), "/f").unwrap();
        prop_assert!(moments.iter().any(|m| m.len() == after.len()), "a length that never was");
        for (number, sector) in after.chunks(512).enumerate() {
            let was = |m: &Vec<u8>| {
                let old = m.get(number * 512..).unwrap_or_default();
                (0..sector.len()).all(|i| sector[i] == old.get(i).copied().unwrap_or(0))
            };
            prop_assert!(moments.iter().any(was), "sector {} was never like that", number);
        }
        prop_assert_eq!(all(&vfs.after_kill(), "/f"), all(&vfs, "/f"));
        file.sync_data().unwrap();
        prop_assert_eq!(all(&vfs.after_cut(seed), "/f"), all(&vfs, "/f"));
    }
}
