use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn vm(floor: u64, cap: u64) -> Demand {
    Demand { floor, cap, ..Demand::default() }
}

/// Divides again and again; each VM fills what it is given, and then `faults` says what it still needs.
fn rounds(limit: u64, vms: &mut [Demand], count: usize, mut faults: impl FnMut(usize, &mut Demand)) -> Vec<Vec<u64>> {
    let mut history = Vec::new();
    for _ in 0..count {
        let shares = divide(limit, vms);
        for (vm, share) in vms.iter_mut().zip(shares) {
            vm.share = share;
            vm.resident = share.target;
        }
        for (at, vm) in vms.iter_mut().enumerate() {
            faults(at, vm);
        }
        history.push(vms.iter().map(|vm| vm.share.target).collect());
    }
    history
}

fn any_demand() -> impl Strategy<Value = Demand> {
    let bytes = || prop_oneof![9 => 0..8 * GIB, 1 => any::<u64>()];
    let share = (bytes(), any::<u16>(), any::<u16>(), any::<u64>(), any::<u64>());
    let share =
        share.prop_map(|(target, rest, patience, given, needed)| Share { target, rest, patience, given, needed });
    (bytes(), bytes(), bytes(), any::<u32>(), any::<u32>(), share).prop_map(
        |(floor, cap, resident, faults, near_misses, share)| Demand {
            floor,
            cap,
            resident,
            faults,
            near_misses,
            share,
        },
    )
}

fn sane_demand() -> impl Strategy<Value = Demand> {
    (0..GIB, 0..8 * GIB, 0_u32..5000, 0_u32..5000).prop_map(|(floor, above, faults, near)| Demand {
        floor,
        cap: floor + above,
        faults,
        near_misses: near.min(faults),
        ..Demand::default()
    })
}

proptest! {
    #[test]
    fn whatever_is_told_floors_caps_and_the_limit_hold(limit in 0..u64::MAX, demands in prop::collection::vec(any_demand(), 0..9)) {
        let shares = divide(limit, &demands);
        prop_assert_eq!(shares.len(), demands.len());
        for (demand, share) in demands.iter().zip(&shares) {
            prop_assert!(share.target >= demand.floor.min(SIZE_MOST) && share.target <= demand.cap.max(demand.floor));
        }
        let all = shares.iter().map(|share| u128::from(share.target)).sum::<u128>();
        let floors = demands.iter().map(|demand| u128::from(demand.floor.min(SIZE_MOST))).sum::<u128>();
        prop_assert!(all <= u128::from(limit).max(floors), "{all} of {limit}, floors {floors}");
    }

    #[test]
    fn constant_demand_comes_to_rest(limit in GIB..32 * GIB, vms in prop::collection::vec(sane_demand(), 1..6)) {
        let mut vms = vms;
        let history = rounds(limit, &mut vms, 900, |_, _| {});
        prop_assert!(history[600..].windows(2).all(|pair| pair[0] == pair[1]), "{:?}", &history[890..]);
    }

    #[test]
    fn all_memory_is_in_use_where_it_is_wanted(limit in GIB..32 * GIB, vms in prop::collection::vec(sane_demand(), 1..6)) {
        let mut vms = vms;
        rounds(limit, &mut vms, 100, |_, _| {});
        let all: u64 = vms.iter().map(|vm| vm.share.target).sum();
        let caps: u64 = vms.iter().map(|vm| vm.cap).sum();
        let floors: u64 = vms.iter().map(|vm| vm.floor).sum();
        let crumbs = GRAIN * vms.len() as u64;
        prop_assert!(all + crumbs >= limit.min(caps).max(floors), "{all} of {limit}, {caps}");
    }

    #[test]
    fn equal_demands_become_equal_shares(
        faults in WANTS..10_000, count in 2_usize..6, targets in prop::collection::vec(0..8 * GIB, 6),
    ) {
        let mut vms = vec![Demand { faults, near_misses: faults / 3, ..vm(GIB / 8, 8 * GIB) }; count];
        for (vm, target) in vms.iter_mut().zip(targets) {
            vm.share.target = target;
            vm.resident = target;
        }
        rounds(8 * GIB, &mut vms, 600, |_, _| {});
        let (least, most) = (vms.iter().map(|vm| vm.share.target).min().unwrap(), vms.iter().map(|vm| vm.share.target).max().unwrap());
        prop_assert!(most * 4 <= least * 5 + 8 * GRAIN, "{least} and {most}");
    }

    #[test]
    fn the_same_demands_give_the_same_shares(limit in any::<u64>(), demands in prop::collection::vec(any_demand(), 0..9)) {
        prop_assert_eq!(divide(limit, &demands), divide(limit, &demands));
    }
}

#[test]
fn where_there_is_room_for_all_each_has_all_that_it_can_use() {
    let odd = GIB + 4096;
    let mut vms = [vm(0, odd), vm(0, 3 * GIB), vm(GIB, 2 * GIB)];
    let history = rounds(7 * GIB, &mut vms, 3, |_, vm| vm.faults = 500);
    assert_eq!(history[0], [odd, 3 * GIB, GIB], "the third has not yet filled its floor");
    assert_eq!(history[1], [odd, 3 * GIB, 2 * GIB]);
    assert_eq!(history[2], history[1]);
}

#[test]
fn a_vm_that_starts_takes_a_share_of_those_that_are_there() {
    let mut vms = vec![vm(GIB / 4, 4 * GIB), vm(GIB / 4, 4 * GIB)];
    rounds(4 * GIB, &mut vms, 10, |_, _| {});
    vms.push(vm(GIB, 4 * GIB));
    let shares = divide(4 * GIB, &vms);
    assert_eq!(shares[2].target, GIB);
    assert_eq!((shares[0].target, shares[1].target), (3 * GIB / 2, 3 * GIB / 2));
}

#[test]
fn an_idle_vm_gives_up_to_its_floor_while_one_that_thrashes_grows() {
    let mut vms = [vm(GIB / 2, 4 * GIB), vm(GIB / 2, 4 * GIB)];
    rounds(4 * GIB, &mut vms, 20, |_, _| {});
    assert_eq!(vms[0].share.target, 2 * GIB);
    let history = rounds(4 * GIB, &mut vms, 60, |at, vm| {
        (vm.faults, vm.near_misses) = if at == 0 { (0, 0) } else { (2000, 400) };
    });
    assert_eq!(history[59], [GIB / 2, 4 * GIB - GIB / 2]);
    // An eighth a round: half of the surplus is gone after six.
    assert!(history[6][0] < GIB / 2 + GIB, "{:?}", history[6]);
}

#[test]
fn nobody_gives_without_need() {
    let mut vms = [vm(GIB, 4 * GIB), vm(GIB, 4 * GIB)];
    vms[0].share.target = 3 * GIB;
    vms[1].share.target = GIB;
    let history = rounds(4 * GIB, &mut vms, 20, |_, vm| vm.faults = WANTS - 1);
    assert_eq!(history[19], [3 * GIB, GIB]);
}

#[test]
fn a_working_set_that_just_fits_is_not_cut_again_and_again() {
    // One needs 3 GiB and not a page less; the other streams and never has enough.
    let mut vms = [vm(GIB / 4, 4 * GIB), vm(GIB / 4, 4 * GIB)];
    let needs = |at: usize, vm: &mut Demand| {
        let fits = vm.share.target >= 3 * GIB;
        (vm.faults, vm.near_misses) = match (at, fits) {
            (0, true) => (0, 0),
            (0, false) => (3000, 1000),
            _ => (1000, 0),
        };
    };
    let history = rounds(4 * GIB, &mut vms, 2000, needs);
    let cut = history[1000..].iter().filter(|targets| targets[0] < 3 * GIB).count();
    assert!(cut < 60, "its working set was cut in {cut} of 1000 rounds");
    let moved: u64 = history[1000..].windows(2).map(|pair| pair[0][0].abs_diff(pair[1][0])).sum();
    assert!(moved / 1000 < 8 << 20, "{} MiB moved a round", (moved / 1000) >> 20);
}

#[test]
fn a_lower_limit_takes_from_what_is_above_the_floors() {
    let mut vms = [vm(GIB, 8 * GIB), vm(GIB, 8 * GIB)];
    vms[0].share.target = 5 * GIB;
    vms[1].share.target = 3 * GIB;
    let targets: Vec<u64> = divide(5 * GIB, &vms).iter().map(|share| share.target).collect();
    assert_eq!(targets, [3 * GIB, 2 * GIB]);
    let targets: Vec<u64> = divide(0, &vms).iter().map(|share| share.target).collect();
    assert_eq!(targets, [GIB, GIB], "floors are promises");
}
