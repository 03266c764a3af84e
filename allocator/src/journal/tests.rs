use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vfs::host::HostVfs;

use super::*;
use crate::{Kind, Pool, RegionSpec};

const RAM_PAGES: u64 = 512;
const ROOM: u64 = 64;

struct Lab {
    journal: Journal,
    ram: Region,
    other: Region,
}

fn region(pool: &Pool, name: &str, kind: Kind, size: u64) -> Region {
    let name = name.parse().unwrap();
    pool.allocate(&name, RegionSpec { kind, size, medium: None }).unwrap();
    Region::open(pool.lease(&name).unwrap()).unwrap()
}

fn lab(directory: &Path) -> Lab {
    let pool = Pool::create_or_open(directory, Arc::new(HostVfs)).unwrap();
    let ram = region(&pool, "web/ram", Kind::Ram, RAM_PAGES * PAGE_SIZE);
    let other = region(&pool, "db/ram", Kind::Ram, RAM_PAGES * PAGE_SIZE);
    let journal = Journal::open(region(&pool, "web/journal", Kind::Journal, region_size(ROOM))).unwrap();
    Lab { journal, ram, other }
}

/// A list of one run.
fn one(run: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(run).collect()
}

fn content(page: u64, seed: u8) -> Vec<u8> {
    (0..PAGE).map(|at| (at as u64 * 31 + page * 7).to_le_bytes()[0] ^ seed).collect()
}

fn write(lab: &mut Lab, sequence: u64, runs: &[Range<u64>], seed: u8) -> Result<JournalV1, JournalError> {
    lab.journal.write(&lab.ram, sequence, runs, &mut |first, into| {
        for (page, bytes) in (first..).zip(into.chunks_mut(PAGE)) {
            bytes.copy_from_slice(&content(page, seed));
        }
        Ok(())
    })
}

fn replay(lab: &mut Lab, named: &JournalV1, bound: u64) -> (BTreeMap<u64, Vec<u8>>, Result<(), JournalError>) {
    let mut home = BTreeMap::new();
    let result = lab.journal.replay(&lab.ram, named, bound, &mut |first, bytes| {
        home.extend((first..).zip(bytes.chunks(PAGE).map(<[u8]>::to_vec)));
        Ok(())
    });
    (home, result)
}

fn all(runs: &[Range<u64>], seed: u8) -> BTreeMap<u64, Vec<u8>> {
    runs.iter().cloned().flatten().map(|page| (page, content(page, seed))).collect()
}

#[test]
fn what_was_written_last_comes_home_and_what_was_before_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let (first, second) = ([3..10, 20..21, 500..512], [0..1, 7..40]);
    let before = write(&mut lab, 7, &first, 1).unwrap();
    assert_eq!(replay(&mut lab, &before, RAM_PAGES).0, all(&first, 1));
    let named = write(&mut lab, 8, &second, 2).unwrap();
    for _ in 0..2 {
        let (home, result) = replay(&mut lab, &named, RAM_PAGES);
        assert!(result.is_ok() && home == all(&second, 2), "twice is once: {result:?}");
    }
    let (home, result) = replay(&mut lab, &before, RAM_PAGES);
    assert!(home.is_empty() && matches!(result, Err(JournalError::Other(_))), "{result:?}");
}

#[test]
fn a_measurement_leaves_the_journal_alone() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let most = lab.journal.capacity();
    let named = write(&mut lab, 2, &one(0..most), 3).unwrap();
    for pages in [0, 1, PROBE_PAGES] {
        lab.journal.probe(pages).unwrap();
    }
    assert!(matches!(lab.journal.probe(PROBE_PAGES + 1), Err(JournalError::Full { .. })));
    assert_eq!(replay(&mut lab, &named, RAM_PAGES).0, all(&one(0..most), 3));
}

#[test]
fn an_empty_journal_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let named = write(&mut lab, 1, &[], 0).unwrap();
    let (home, result) = replay(&mut lab, &named, RAM_PAGES);
    assert!(result.is_ok() && home.is_empty());
}

#[test]
fn more_than_there_is_room_for_is_refused_and_as_much_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let most = lab.journal.capacity();
    assert!(most >= ROOM);
    assert!(matches!(write(&mut lab, 1, &one(0..most + 1), 3), Err(JournalError::Full { .. })));
    let named = write(&mut lab, 2, &one(0..most), 3).unwrap();
    assert_eq!(replay(&mut lab, &named, RAM_PAGES).0, all(&one(0..most), 3));
}

#[test]
fn the_journal_of_another_vm_or_context_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let named = write(&mut lab, 4, &one(1..3), 4).unwrap();
    for wrong in [
        JournalV1 { sequence: 5, ..named },
        JournalV1 { pages: 1, ..named },
        JournalV1 { pages: u64::MAX, ..named },
        JournalV1 { crc: !named.crc, ..named },
    ] {
        let (home, result) = replay(&mut lab, &wrong, RAM_PAGES);
        assert!(home.is_empty() && matches!(result, Err(JournalError::Other(_))), "{wrong:?}: {result:?}");
    }
    std::mem::swap(&mut lab.ram, &mut lab.other);
    let (home, result) = replay(&mut lab, &named, RAM_PAGES);
    let why = result.unwrap_err().to_string();
    assert!(home.is_empty() && why.contains("region"), "{why}");
}

#[test]
fn a_page_beyond_the_end_is_refused_before_any_comes_home() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let named = write(&mut lab, 4, &[1..3, 100..101], 4).unwrap();
    let (home, result) = replay(&mut lab, &named, 100);
    assert!(home.is_empty() && matches!(result, Err(JournalError::List { page: 100, .. })), "{result:?}");
}

/// A cut tears the journal anywhere: before each of its blocks was written, what was there before is still there.
#[test]
fn a_journal_torn_at_any_block_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let mut lab = lab(directory.path());
    let runs = [5..9, 30..33];
    write(&mut lab, 4, &[5..9, 30..33], 4).unwrap();
    let length = usize::try_from(data_offset(7) + 7 * PAGE_SIZE).unwrap();
    let mut old = vec![0; length];
    lab.journal.region.read_at(&mut old, 0).unwrap();
    let named = write(&mut lab, 6, &runs, 5).unwrap();
    let mut new = vec![0; length];
    lab.journal.region.read_at(&mut new, 0).unwrap();
    for sector in (0..length).step_by(512).filter(|at| old[*at..*at + 512] != new[*at..*at + 512]) {
        lab.journal.region.write_at(&old[sector..sector + 512], sector as u64).unwrap();
        let (home, result) = replay(&mut lab, &named, RAM_PAGES);
        assert!(home.is_empty() && result.is_err(), "sector at {sector}");
        lab.journal.region.write_at(&new[sector..sector + 512], sector as u64).unwrap();
    }
    for prefix in (0..length).step_by(512) {
        lab.journal.region.write_at(&new, 0).unwrap();
        lab.journal.region.write_at(&old[prefix..], prefix as u64).unwrap();
        let (home, result) = replay(&mut lab, &named, RAM_PAGES);
        assert!(home.is_empty() && result.is_err(), "{prefix} bytes of it");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_pages_come_home(pages in proptest::collection::btree_set(0..RAM_PAGES, 0..ROOM as usize), seed: u8) {
        let directory = tempfile::tempdir().unwrap();
        let mut lab = lab(directory.path());
        let runs: Vec<_> = pages.iter().map(|page| *page..page + 1).collect();
        let named = write(&mut lab, 9, &runs, seed).unwrap();
        let (home, result) = replay(&mut lab, &named, RAM_PAGES);
        prop_assert!(result.is_ok());
        prop_assert_eq!(home, all(&runs, seed));
    }

    #[test]
    fn a_journal_of_which_any_bit_is_flipped_is_none(flips in proptest::collection::vec((0_usize..72, 0_u8..8), 1..4), body: bool, at in 0_usize..5 * PAGE) {
        let directory = tempfile::tempdir().unwrap();
        let mut lab = lab(directory.path());
        let named = write(&mut lab, 9, &[7..9, 11..12], 1).unwrap();
        let mut good = vec![0; 5 * PAGE];
        lab.journal.region.read_at(&mut good, 0).unwrap();
        let mut bad = good.clone();
        for (byte, bit) in flips {
            // The header, or everything from the list on.
            let byte = if body { PAGE + (at + byte) % (4 * PAGE) } else { byte };
            bad[byte] ^= 1 << bit;
        }
        prop_assume!(bad != good);
        lab.journal.region.write_at(&bad, 0).unwrap();
        let (home, result) = replay(&mut lab, &named, RAM_PAGES);
        prop_assert!(home.is_empty() && result.is_err());
    }
}
