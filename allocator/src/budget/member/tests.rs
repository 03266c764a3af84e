use proptest::prelude::*;
use vfs::{CrashVfs, Vfs};

use super::*;
use crate::lease::Lease;
use crate::medium::MediumKind;
use crate::pool::RegionSpec;

const GIB: u64 = 1 << 30;

fn pool() -> (CrashVfs, Pool) {
    let vfs = CrashVfs::new();
    let pool = Pool::create_or_open("/pool", Arc::new(vfs.clone())).unwrap();
    (vfs, pool)
}

fn limited(limit: u64) -> (CrashVfs, Pool) {
    let (vfs, pool) = pool();
    Budget::of(&pool).unwrap().set_limit(Some(limit)).unwrap();
    (vfs, pool)
}

fn name(name: &str) -> RegionName {
    name.parse().unwrap()
}

/// As a VMM: it holds the lease of its RAM region.
#[derive(Debug)]
struct Vm {
    member: Member,
    _lease: Lease,
}

impl Vm {
    fn grant(&self) -> Grant {
        self.member.grant()
    }

    fn report(&mut self, usage: Usage, now: u64) -> Grant {
        self.member.report_at(usage, now).unwrap()
    }

    /// It uses all that it was granted, and `faults` a second say how much more it needs.
    fn report_full(&mut self, faults: u32, now: u64) -> Grant {
        let resident = self.grant().granted;
        self.report(Usage { resident, faults, near_misses: faults / 2 }, now)
    }
}

fn allocate(pool: &Pool, region: &str) {
    let spec = RegionSpec { kind: Kind::Ram, size: 4096, medium: Some(MediumKind::File) };
    pool.allocate(&name(region), spec).unwrap();
}

fn join(pool: &Pool, region: &str, floor: u64, cap: u64, now: u64) -> Result<Vm, BudgetError> {
    allocate(pool, region);
    let _lease = pool.lease(&name(region)).unwrap();
    let member = Budget::of(pool).unwrap().join_at(name(region), floor, cap, now)?;
    Ok(Vm { member, _lease })
}

/// Some time after the start of the machine.
const BEGIN: u64 = 1_000_000;
const LATER: u64 = BEGIN + PERIOD;

#[test]
fn without_a_limit_each_has_all_that_it_can_use() {
    let (_, pool) = pool();
    let a = join(&pool, "a/ram", GIB, 4 * GIB, BEGIN).unwrap();
    let b = join(&pool, "b/ram", 0, 5 * GIB, BEGIN).unwrap();
    assert_eq!((a.grant().granted, b.grant().granted), (4 * GIB, 5 * GIB));
}

#[test]
fn one_that_comes_waits_until_the_others_have_made_room() {
    let (_, pool) = limited(4 * GIB);
    let mut a = join(&pool, "a/ram", GIB, 8 * GIB, BEGIN).unwrap();
    for second in 0..3 {
        a.report_full(0, LATER + second * PERIOD);
    }
    assert_eq!(a.grant(), Grant { granted: 4 * GIB, target: 4 * GIB });
    let now = LATER + 3 * PERIOD;
    let mut b = join(&pool, "b/ram", GIB, 8 * GIB, now).unwrap();
    assert_eq!(b.grant(), Grant { granted: 0, target: GIB });
    // It is told to, evicts half of it, then the rest.
    assert_eq!(a.report_full(0, now), Grant { granted: 4 * GIB, target: 3 * GIB });
    a.report(Usage { resident: 7 * GIB / 2, ..Usage::default() }, now);
    assert_eq!(b.report(Usage::default(), now).granted, GIB / 2);
    a.report(Usage { resident: 2 * GIB, ..Usage::default() }, now);
    assert_eq!(a.grant().granted, 3 * GIB);
    assert_eq!(b.report(Usage::default(), now).granted, GIB);
}

#[test]
fn memory_follows_need_through_the_table() {
    let (_, pool) = limited(4 * GIB);
    let mut vms = ["a/ram", "b/ram"].map(|region| join(&pool, region, GIB / 2, 4 * GIB, BEGIN).unwrap());
    for second in 0..60 {
        for (index, vm) in vms.iter_mut().enumerate() {
            let faults = if index == 0 && second > 10 { 3000 } else { 0 };
            vm.report_full(faults, LATER + second * PERIOD);
        }
    }
    assert_eq!(vms.map(|vm| vm.grant().granted), [7 * GIB / 2, GIB / 2]);
}

#[test]
fn what_was_promised_is_kept() {
    let (_, pool) = limited(4 * GIB);
    let a = join(&pool, "a/ram", 3 * GIB, 4 * GIB, BEGIN).unwrap();
    let refused = join(&pool, "b/ram", 2 * GIB, 4 * GIB, BEGIN).map(drop).unwrap_err().to_string();
    assert!(refused.contains("2 GiB of RAM is to be for b/ram alone") && refused.contains("leave 1 GiB"), "{refused}");
    let budget = Budget::of(&pool).unwrap();
    assert!(
        matches!(budget.set_limit(Some(2 * GIB)), Err(BudgetError::Promised { promised, .. }) if promised == 3 * GIB)
    );
    drop(a);
    budget.set_limit(Some(2 * GIB)).unwrap();
    join(&pool, "b/ram", 2 * GIB, 4 * GIB, BEGIN).unwrap();
}

#[test]
fn a_limit_is_there_after_a_cut_and_another_change() {
    let (vfs, pool) = limited(5 * GIB);
    let mut settings = pool.settings();
    assert_eq!(settings.ram_limit, None, "as it was when this was opened");
    let after = vfs.after_cut(0);
    let pool = Pool::open("/pool", Arc::new(after)).unwrap();
    settings = pool.settings();
    assert_eq!(settings.ram_limit, Some(5 * GIB));
    allocate(&pool, "a/ram");
    assert_eq!(pool.settings().ram_limit, Some(5 * GIB));
}

#[test]
fn those_that_died_are_left_out_and_those_that_are_leased_elsewhere_are_not() {
    let (_, pool) = limited(4 * GIB);
    allocate(&pool, "a/ram");
    allocate(&pool, "b/ram");
    let _lease = pool.lease(&name("a/ram")).unwrap();
    let budget = Budget::of(&pool).unwrap();
    let mut locked = budget.lock(BEGIN, PATIENCE).unwrap();
    for region in ["a/ram", "b/ram", "gone/ram"] {
        let demand = Demand { floor: GIB, cap: GIB, ..Demand::default() };
        // Process 1 lives, and did not begin then.
        locked.table.put(Row { region: name(region), pid: 1, started: u64::MAX, demand, granted: GIB, written_at: 5 });
    }
    budget.write(&locked).unwrap();
    drop(locked);
    let rows = budget.rows().unwrap();
    assert_eq!(rows.iter().map(|row| row.region.as_str()).collect::<Vec<_>>(), ["a/ram"]);
    let new = join(&pool, "b/ram", 3 * GIB, 4 * GIB, BEGIN).unwrap();
    assert_eq!(new.grant().granted, 3 * GIB);
}

#[test]
fn a_table_that_another_holds_is_waited_for_and_then_named() {
    let (_, pool) = limited(4 * GIB);
    let (budget, other) = (Budget::of(&pool).unwrap(), Budget::of(&pool).unwrap());
    let held = other.lock(BEGIN, PATIENCE).unwrap();
    let waited = Duration::from_millis(20);
    let Err(BudgetError::Busy { path, waited: told }) = budget.lock(BEGIN, waited) else { panic!("it was had") };
    assert_eq!((path, told), (pool.dir().join(TABLE_FILE), waited));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| budget.lock(BEGIN, PATIENCE).is_ok());
        std::thread::sleep(waited);
        assert!(!waiting.is_finished());
        drop(held);
        assert!(waiting.join().unwrap(), "it comes when it is let go");
    });
}

#[test]
fn one_that_leaves_gives_back_what_it_had() {
    let (_, pool) = limited(4 * GIB);
    let mut a = join(&pool, "a/ram", 0, 4 * GIB, BEGIN).unwrap();
    let b = join(&pool, "b/ram", 3 * GIB, 4 * GIB, BEGIN).unwrap();
    let evicted = Usage { resident: GIB, ..Usage::default() };
    assert_eq!(a.report(evicted, LATER).granted, GIB);
    drop(b);
    assert_eq!(Budget::of(&pool).unwrap().rows().unwrap().len(), 1);
    assert_eq!(a.report_full(0, LATER + PERIOD).granted, 4 * GIB);
}

#[test]
fn a_lost_table_is_written_again_and_nobody_is_granted_more_meanwhile() {
    let (vfs, pool) = limited(4 * GIB);
    let mut vms = ["a/ram", "b/ram"].map(|region| join(&pool, region, GIB, 3 * GIB, BEGIN).unwrap());
    for second in 0..5 {
        for vm in &mut vms {
            vm.report_full(0, LATER + second * PERIOD);
        }
    }
    let held: Vec<u64> = vms.iter().map(|vm| vm.grant().granted).collect();
    assert_eq!(held.iter().sum::<u64>(), 4 * GIB);
    vfs.remove_file(Path::new("/pool/budget")).unwrap();
    let now = LATER + 5 * PERIOD;
    assert_eq!(vms[0].report_full(5000, now).granted, held[0], "it alone is in the table");
    assert_eq!(vms[1].report_full(0, now).granted, held[1]);
    for second in 0..40 {
        vms[0].report_full(5000, now + second * PERIOD);
        vms[1].report_full(0, now + second * PERIOD);
        assert!(vms[0].grant().granted + vms[1].grant().granted <= 4 * GIB);
    }
    assert_eq!(vms.map(|vm| vm.grant().granted), [3 * GIB, GIB]);
}

#[test]
fn reports_at_once_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let pool = Pool::create_or_open(directory.path(), Arc::new(vfs::HostVfs)).unwrap();
    Budget::of(&pool).unwrap().set_limit(Some(4 * GIB)).unwrap();
    let names = ["a/ram", "b/ram", "c/ram", "d/ram"];
    names.iter().for_each(|region| allocate(&pool, region));
    let vms = std::thread::scope(|scope| {
        let run = |region: &'static str| {
            let pool = &pool;
            scope.spawn(move || {
                let mut vm = join(pool, region, GIB / 2, 2 * GIB, BEGIN).unwrap();
                for report in 0..100 {
                    vm.report_full(report, BEGIN + u64::from(report) * PERIOD / 8);
                }
                vm
            })
        };
        names.map(run).map(|thread| thread.join().unwrap())
    });
    let rows = Budget::of(&pool).unwrap().rows().unwrap();
    assert_eq!(rows.iter().map(|row| row.region.as_str()).collect::<Vec<_>>(), names);
    assert!(rows.iter().all(|row| row.demand.faults == 99 && row.pid == std::process::id()));
    assert!(rows.iter().map(|row| row.granted).sum::<u64>() <= 4 * GIB);
    drop(vms);
    assert_eq!(Budget::of(&pool).unwrap().rows().unwrap(), []);
}

#[test]
fn a_process_is_told_from_a_later_one_by_when_it_began() {
    let pid = std::process::id();
    assert!(started(pid).unwrap() > 0);
    assert_eq!(started(pid), started(pid));
    assert_eq!(started(u32::MAX), None);
}

#[derive(Debug, Clone)]
enum Event {
    Report { vm: usize, evicted: bool, faults: u32 },
    Second,
    Damage { at: usize },
    Leave(usize),
    Join(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let report = (0..3_usize, any::<bool>(), 0..2000_u32);
    let event = prop_oneof![
        20 => report.prop_map(|(vm, evicted, faults)| Event::Report { vm, evicted, faults }),
        10 => Just(Event::Second),
        1 => (0..2048_usize).prop_map(|at| Event::Damage { at }),
        2 => (0..3_usize).prop_map(Event::Leave),
        4 => (0..3_usize).prop_map(Event::Join),
    ];
    prop::collection::vec(event, 0..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Every VM reports at least once in three seconds, and no memory is taken beyond a grant.
    #[test]
    fn together_they_never_have_more_than_the_limit(events in events()) {
        const LIMIT: u64 = 4 * GIB;
        let (vfs, pool) = limited(LIMIT);
        let mut vms: [Option<(Vm, u64)>; 3] = [None, None, None];
        let mut now = BEGIN;
        for event in events {
            match event {
                Event::Report { vm, evicted, faults } => {
                    if let Some((vm, resident)) = &mut vms[vm] {
                        let Grant { granted, target } = vm.grant();
                        *resident = if evicted && target < granted { target } else { granted };
                        let usage = Usage { resident: *resident, faults, near_misses: faults / 2 };
                        vm.report(usage, now);
                    }
                }
                Event::Second => {
                    now += PERIOD;
                    for (vm, resident) in vms.iter_mut().flatten() {
                        vm.report(Usage { resident: *resident, ..Usage::default() }, now);
                    }
                }
                Event::Damage { at } => {
                    let file = vfs.open(Path::new("/pool/budget"), OpenMode::OpenOrCreate).unwrap();
                    file.write_all_at(&[0xa5], at as u64).unwrap();
                }
                Event::Leave(vm) => vms[vm] = None,
                Event::Join(vm) => {
                    let region = format!("vm{vm}/ram");
                    vms[vm] = None;
                    vms[vm] = join(&pool, &region, GIB, 3 * GIB, now).ok().map(|vm| (vm, 0));
                }
            }
            let all: u64 = vms.iter().flatten().map(|(vm, _)| vm.grant().granted).sum();
            prop_assert!(all <= LIMIT, "{} GiB are granted", all as f64 / GIB as f64);
        }
    }
}
