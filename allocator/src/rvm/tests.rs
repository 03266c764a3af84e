//! The interface, over files of the host; bad input.

use std::sync::Arc;

use vfs::{HostVfs, OpenMode, Vfs};

use super::*;
use crate::RegionName;

fn name(text: &str) -> RegionName {
    text.parse().unwrap()
}

struct Bank {
    _dir: tempfile::TempDir,
    pool: Arc<Pool>,
}

const LOG_LEN: u64 = 8192 + (64 << 10);

impl Bank {
    fn on(medium: MediumKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pool = Arc::new(Pool::create_or_open(dir.path().join("pool"), Arc::new(HostVfs)).unwrap());
        Rvm::create_log(&pool, &name("log"), LogSpec { size: LOG_LEN, medium: Some(medium), slots: 4 }).unwrap();
        for region in ["a", "b"] {
            let spec = RegionSpec { kind: Kind::Pmem, size: 64 << 10, medium: Some(medium) };
            pool.allocate(&name(region), spec).unwrap();
        }
        Self { _dir: dir, pool }
    }

    fn open(&self) -> Rvm {
        self.open_with(Options::default()).unwrap()
    }

    fn open_with(&self, options: Options) -> Result<Rvm, RvmError> {
        Rvm::initialize(Arc::clone(&self.pool), &name("log"), options)
    }

    /// Writes bytes of the log's data behind its back.
    fn spoil(&self, at: u64, bytes: &[u8]) {
        let info = self.pool.get(&name("log")).unwrap();
        let file = HostVfs.open(&self.pool.path_of(&info), OpenMode::ReadWrite).unwrap();
        file.write_all_at(bytes, info.data_offset + at).unwrap();
    }
}

fn set(
    rvm: &Rvm,
    memory: &mut Memory,
    range: std::ops::Range<usize>,
    byte: u8,
    commit: Commit,
) -> Result<(), RvmError> {
    let mut transaction = rvm.begin_transaction(Mode::Restore)?;
    let part = transaction.enroll(memory)?;
    transaction.set_range(part, range)?.fill(byte);
    transaction.end_transaction(commit)
}

#[test]
fn what_was_flushed_is_there_again_and_what_was_not_is_lost_with_the_process() {
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open();
    let mut a = rvm.map(&name("a")).unwrap();
    set(&rvm, &mut a, 0..100, 1, Commit::Flush).unwrap();
    set(&rvm, &mut a, 50..60, 2, Commit::NoFlush).unwrap();
    assert!(rvm.usage().spooled > 0);
    drop((a, rvm));
    let rvm = bank.open();
    let mut a = rvm.map(&name("a")).unwrap();
    assert!(a[..100].iter().all(|byte| *byte == 1) && a[100] == 0);
    set(&rvm, &mut a, 50..60, 2, Commit::NoFlush).unwrap();
    rvm.terminate().unwrap();
    drop(a);
    let rvm = bank.open();
    assert_eq!(rvm.map(&name("a")).unwrap()[49..61], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
}

#[test]
fn an_nvdimm_is_as_it_was_saved_last() {
    let bank = Bank::on(MediumKind::Nvdimm);
    let rvm = bank.open();
    let (mut a, b) = (rvm.map(&name("a")).unwrap(), rvm.map(&name("b")).unwrap());
    set(&rvm, &mut a, 0..100, 1, Commit::Flush).unwrap();
    {
        let running = rvm.begin_transaction(Mode::Restore).unwrap();
        assert!(matches!(rvm.save(), Err(RvmError::Running { running: 1 })));
        running.abort_transaction().unwrap();
    }
    rvm.save().unwrap();
    set(&rvm, &mut a, 0..100, 2, Commit::Flush).unwrap();
    drop((a, b, rvm));
    let rvm = bank.open();
    assert!(rvm.map(&name("a")).unwrap()[..100].iter().all(|byte| *byte == 1));
    // Unmapping saves, and the region is then its own.
    let mut a = rvm.map(&name("a")).unwrap();
    set(&rvm, &mut a, 5..6, 3, Commit::NoFlush).unwrap();
    rvm.unmap(a).unwrap();
    drop(rvm);
    let region = Region::open(bank.pool.lease(&name("a")).unwrap()).unwrap();
    let mut byte = [0];
    region.read_at(&mut byte, 5).unwrap();
    assert_eq!((byte, region.bound_to()), ([3], Ok(None)));
}

#[test]
fn a_save_that_was_cut_is_never_used() {
    let bank = Bank::on(MediumKind::Nvdimm);
    let log = Region::open(bank.pool.lease(&name("log")).unwrap()).unwrap();
    let mut status = Status::load(&log).unwrap();
    status.saving = true;
    status.store(&log).unwrap();
    drop(log);
    assert!(matches!(bank.open_with(Options::default()), Err(RvmError::SaveCut { .. })));
}

#[test]
fn an_abort_and_a_drop_restore_each_byte_of_every_part() {
    for medium in [MediumKind::File, MediumKind::Nvdimm] {
        let bank = Bank::on(medium);
        let rvm = bank.open();
        let (mut a, mut b) = (rvm.map(&name("a")).unwrap(), rvm.map(&name("b")).unwrap());
        set(&rvm, &mut a, 0..4000, 1, Commit::NoFlush).unwrap();
        let before = (a.to_vec(), b.to_vec());
        for explicit in [true, false] {
            let mut transaction = rvm.begin_transaction(Mode::Restore).unwrap();
            let (first, second) = (transaction.enroll(&mut a).unwrap(), transaction.enroll(&mut b).unwrap());
            // Nested and crossed: what was there before the first counts.
            for (range, byte) in [(10..100, 2), (20..30, 3), (90..200, 4), (0..300, 5)] {
                transaction.set_range(first, range).unwrap().fill(byte);
            }
            transaction.set_range(second, 65_000..65_536).unwrap().fill(6);
            assert_eq!(transaction.bytes(first).unwrap()[299], 5);
            if explicit {
                transaction.abort_transaction().unwrap();
            } else {
                drop(transaction);
            }
            assert!((a.to_vec(), b.to_vec()) == before, "{medium}");
        }
    }
}

#[test]
fn several_threads_commit_to_their_parts_and_all_of_it_is_found() {
    for medium in [MediumKind::File, MediumKind::Nvdimm] {
        let bank = Bank::on(medium);
        let rvm = bank.open_with(Options { truncate_at: Some(10), ..Options::default() }).unwrap();
        let (low, high) = rvm.map(&name("a")).unwrap().split_at(32 << 10);
        let parts = [low.split_at(16 << 10), high.split_at(16 << 10)];
        std::thread::scope(|scope| {
            for (number, mut part) in parts.into_iter().flat_map(|(first, second)| [first, second]).enumerate() {
                let rvm = &rvm;
                scope.spawn(move || {
                    for turn in 0..200_usize {
                        let commit = if turn % 10 == 9 { Commit::Flush } else { Commit::NoFlush };
                        let at = turn * 64;
                        set(rvm, &mut part, at..at + 128, number as u8 + 1, commit).unwrap();
                    }
                });
            }
        });
        assert!(matches!(rvm.map(&name("log")), Err(RvmError::Lease(_))));
        rvm.terminate().unwrap();
        let rvm = bank.open();
        let a = rvm.map(&name("a")).unwrap();
        for (number, part) in a.chunks(16 << 10).enumerate() {
            let length = 199 * 64 + 128;
            assert!(part[..length].iter().all(|byte| *byte == number as u8 + 1), "{medium}: part {number}");
            assert!(part[length..].iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn a_full_log_is_truncated_by_who_needs_the_room_and_a_transaction_that_never_fits_is_refused() {
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open_with(Options { truncate_at: None, ..Options::default() }).unwrap();
    assert!(!rvm.truncates_in_the_background());
    let mut a = rvm.map(&name("a")).unwrap();
    for turn in 0..50_u8 {
        set(&rvm, &mut a, 0..10_000, turn, Commit::Flush).unwrap();
        assert!(rvm.usage().logged <= 64 << 10);
    }
    let error = set(&rvm, &mut a, 0..20_000, 99, Commit::Flush).unwrap_err();
    assert!(matches!(error, RvmError::TooLarge { .. }), "{error}");
    assert!(a[..20_000].iter().take(10_000).all(|byte| *byte == 49) && a[10_000] == 0);
    rvm.truncate().unwrap();
    assert_eq!(rvm.usage(), LogUsage { spooled: 0, logged: 0 });
}

#[test]
fn an_undo_log_that_is_full_refuses_the_range_and_the_transaction_goes_on() {
    let bank = Bank::on(MediumKind::Nvdimm);
    let rvm = bank.open();
    let mut a = rvm.map(&name("a")).unwrap();
    let mut transaction = rvm.begin_transaction(Mode::NoRestore).unwrap();
    let part = transaction.enroll(&mut a).unwrap();
    transaction.set_range(part, 0..10_000).unwrap().fill(1);
    assert!(matches!(transaction.set_range(part, 20_000..30_000), Err(RvmError::TooLarge { .. })));
    transaction.set_range(part, 5..9_000).unwrap().fill(2);
    transaction.end_transaction(Commit::Flush).unwrap();
    assert_eq!((a[4], a[5], a[9_000], a[20_000]), (1, 2, 1, 0));
    let begun: Vec<_> = (0..4).map(|_| rvm.begin_transaction(Mode::Restore).unwrap()).collect();
    assert!(matches!(rvm.begin_transaction(Mode::Restore), Err(RvmError::TooManyTransactions { slots: 4 })));
    drop(begun);
    rvm.begin_transaction(Mode::Restore).unwrap().abort_transaction().unwrap();
}

#[test]
fn memory_that_holds_what_nobody_committed_is_out_of_use_until_it_is_recovered() {
    for medium in [MediumKind::File, MediumKind::Nvdimm] {
        let bank = Bank::on(medium);
        let rvm = bank.open();
        let mut a = rvm.map(&name("a")).unwrap();
        let mut forgotten = rvm.begin_transaction(Mode::Restore).unwrap();
        let part = forgotten.enroll(&mut a).unwrap();
        forgotten.set_range(part, 0..8).unwrap().fill(9);
        std::mem::forget(forgotten);
        assert!(matches!(set(&rvm, &mut a, 0..8, 1, Commit::Flush), Err(RvmError::Unrestored { .. })));
        assert!(matches!(rvm.unmap(a), Err(RvmError::Unrestored { .. })));
        assert!(matches!(rvm.map(&name("a")), Err(RvmError::Unrestored { .. })));
        drop(rvm);
        assert_eq!(bank.open().map(&name("a")).unwrap()[..8], [0; 8]);
    }
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open();
    let mut a = rvm.map(&name("a")).unwrap();
    let mut transaction = rvm.begin_transaction(Mode::NoRestore).unwrap();
    let part = transaction.enroll(&mut a).unwrap();
    transaction.set_range(part, 0..8).unwrap().fill(9);
    assert!(matches!(transaction.abort_transaction(), Err(RvmError::NoRestore)));
    assert!(matches!(set(&rvm, &mut a, 0..8, 1, Commit::Flush), Err(RvmError::Unrestored { .. })));
}

#[test]
fn ranges_outside_and_parts_of_others_are_refused() {
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open();
    let (mut a, mut b) = (rvm.map(&name("a")).unwrap(), rvm.map(&name("b")).unwrap());
    let mut first = rvm.begin_transaction(Mode::Restore).unwrap();
    let part = first.enroll(&mut a).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
    for range in [0..65_537, 65_537..65_537, 9..8, usize::MAX - 1..usize::MAX] {
        assert!(matches!(first.set_range(part, range), Err(RvmError::OutOfBounds { .. })));
    }
    assert!(first.set_range(part, 65_536..65_536).unwrap().is_empty());
    let mut second = rvm.begin_transaction(Mode::Restore).unwrap();
    second.enroll(&mut b).unwrap();
    assert!(matches!(second.set_range(part, 0..1), Err(RvmError::ForeignPart)));
    drop((first, second));
    let other = Bank::on(MediumKind::File);
    let others = other.open();
    let mut foreign = others.begin_transaction(Mode::Restore).unwrap();
    assert!(matches!(foreign.enroll(&mut a), Err(RvmError::ForeignMemory { .. })));
}

#[test]
fn a_region_is_mapped_once_by_one_log_and_is_free_again_when_it_was_unmapped() {
    let bank = Bank::on(MediumKind::File);
    Rvm::create_log(&bank.pool, &name("other"), LogSpec { size: LOG_LEN, ..LogSpec::default() }).unwrap();
    let rvm = bank.open();
    let other = Rvm::initialize(Arc::clone(&bank.pool), &name("other"), Options::default()).unwrap();
    let mut a = rvm.map(&name("a")).unwrap();
    assert!(matches!(rvm.map(&name("a")), Err(RvmError::AlreadyMapped { .. })));
    assert!(matches!(other.map(&name("a")), Err(RvmError::Lease(_))));
    set(&rvm, &mut a, 0..8, 1, Commit::Flush).unwrap();
    let (low, high) = a.split_at(4096);
    assert!(matches!(rvm.unmap(low), Err(RvmError::InUse { .. })));
    drop(high);
    drop(rvm);
    // Its log has a change of it.
    assert!(matches!(bank.pool.resize(&name("a"), 4096), Err(crate::PoolError::Bound { .. })));
    assert!(matches!(other.map(&name("a")), Err(RvmError::BoundElsewhere { .. })));
    let rvm = bank.open();
    rvm.unmap(rvm.map(&name("a")).unwrap()).unwrap();
    assert_eq!(other.map(&name("a")).unwrap()[..9], [1, 1, 1, 1, 1, 1, 1, 1, 0]);
    // A log that is gone holds nothing back.
    drop(other);
    bank.pool.free(&name("other")).unwrap();
    rvm.map(&name("a")).unwrap();
}

#[test]
fn a_log_that_is_none_or_anothers_or_of_another_length_alters_nothing() {
    let bank = Bank::on(MediumKind::File);
    let initialize = |log: &str| Rvm::initialize(Arc::clone(&bank.pool), &name(log), Options::default());
    assert!(matches!(initialize("a"), Err(RvmError::NotALog { .. })));
    assert!(matches!(
        Rvm::create_log(&bank.pool, &name("small"), LogSpec { size: 8192, ..LogSpec::default() }),
        Err(RvmError::LogTooSmall { .. })
    ));
    let rvm = bank.open();
    let spec = RegionSpec { kind: Kind::Pmem, size: 4096, medium: Some(MediumKind::Nvdimm) };
    bank.pool.allocate(&name("elsewhere"), spec).unwrap();
    assert!(matches!(rvm.map(&name("elsewhere")), Err(RvmError::OtherMedium { .. })));
    drop(rvm);
    // The status of a log of another pool, behind a header that is this one's.
    let other = Bank::on(MediumKind::File);
    let log = Region::open(other.pool.lease(&name("log")).unwrap()).unwrap();
    let mut theirs = vec![0; 8192];
    log.read_at(&mut theirs, 0).unwrap();
    bank.spoil(0, &theirs);
    assert!(matches!(initialize("log"), Err(RvmError::ForeignLog { .. })));
    drop(log);
    other.pool.resize(&name("log"), LOG_LEN / 2 / 4096 * 4096).unwrap();
    assert!(matches!(other.open_with(Options::default()), Err(RvmError::LogLength { .. })));
    bank.spoil(0, &[0xEE; 8192]);
    assert!(matches!(initialize("log"), Err(RvmError::LogDamaged { .. })));
    let again =
        Rvm::create_log(&bank.pool, &name("log"), LogSpec { size: LOG_LEN, medium: Some(MediumKind::File), slots: 4 });
    assert!(matches!(again, Err(RvmError::LogDamaged { .. })), "it is not formatted over what was there");
}

#[test]
fn rot_in_the_log_is_told_from_a_torn_commit() {
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open_with(Options { truncate_at: None, ..Options::default() }).unwrap();
    let mut a = rvm.map(&name("a")).unwrap();
    (1..4).for_each(|turn| set(&rvm, &mut a, 0..2000, turn, Commit::Flush).unwrap());
    let batch = 2560;
    drop((a, rvm));
    // The last one: as if its flush had been cut.
    bank.spoil(8192 + 2 * batch + 700, &[0xEE]);
    let (rvm, recovery) = Rvm::initialize_reporting(
        Arc::clone(&bank.pool),
        &name("log"),
        Options { truncate_at: None, ..Options::default() },
    )
    .unwrap();
    assert_eq!((recovery.replayed, recovery.bytes), (2, 2000));
    let mut a = rvm.map(&name("a")).unwrap();
    assert_eq!(a[0], 2);
    (5..8).for_each(|turn| set(&rvm, &mut a, 0..2000, turn, Commit::Flush).unwrap());
    drop((a, rvm));
    // One before others that are whole was durable.
    bank.spoil(8192 + 3 * batch + 700, &[0xEE]);
    assert!(matches!(bank.open_with(Options::default()), Err(RvmError::LogDamaged { .. })));
}

#[test]
fn a_log_whose_newer_status_cannot_be_read_is_not_replayed_from_the_older_one_past_its_end() {
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open_with(Options { truncate_at: None, ..Options::default() }).unwrap();
    let mut a = rvm.map(&name("a")).unwrap();
    (1..30).for_each(|turn| set(&rvm, &mut a, 0..9000, turn, Commit::Flush).unwrap());
    drop((a, rvm));
    let log = Region::open(bank.pool.lease(&name("log")).unwrap()).unwrap();
    let newest = Status::load(&log).unwrap().sequence % 2;
    drop(log);
    bank.spoil(newest * 4096, &[0xEE; 512]);
    assert!(matches!(bank.open_with(Options::default()), Err(RvmError::LogDamaged { .. })));
}

#[test]
fn changes_of_a_region_that_was_freed_are_left_out() {
    let bank = Bank::on(MediumKind::File);
    let rvm = bank.open();
    let (mut a, mut b) = (rvm.map(&name("a")).unwrap(), rvm.map(&name("b")).unwrap());
    set(&rvm, &mut a, 0..8, 1, Commit::Flush).unwrap();
    set(&rvm, &mut b, 0..8, 2, Commit::Flush).unwrap();
    drop((a, b, rvm));
    bank.pool.free(&name("a")).unwrap();
    let (rvm, recovery) = Rvm::initialize_reporting(Arc::clone(&bank.pool), &name("log"), Options::default()).unwrap();
    assert_eq!((recovery.orphans, recovery.bytes), (1, 8));
    assert_eq!(rvm.map(&name("b")).unwrap()[..8], [2; 8]);
}
