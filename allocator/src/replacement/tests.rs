use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The same rules over plain vectors, oldest first: what they say, without the links.
#[derive(Debug, Default)]
struct Model {
    clusters: u32,
    frames: u32,
    in_use: u32,
    filling: bool,
    probation: u32,
    probation_mapped: Vec<u32>,
    probation_standby: Vec<u32>,
    main_mapped: Vec<u32>,
    main_standby: Vec<u32>,
    used: BTreeMap<u32, u64>,
    unmapped: BTreeMap<u32, u64>,
    evicted: BTreeMap<u32, u64>,
    displaced: BTreeMap<u32, bool>,
    now: u64,
    evictions: u64,
    owed: u32,
}

impl Model {
    fn new(clusters: u32, frames: u32) -> Self {
        let mut model =
            Self { clusters, frames, in_use: frames, filling: true, probation: frames / PROBATION, ..Self::default() };
        model.clamp();
        model
    }

    fn clamp(&mut self) {
        self.probation =
            self.probation.max((self.frames / PROBATION_LEAST).max(1)).min((self.frames / PROBATION_MOST).max(1));
    }

    fn list(&mut self, place: Place) -> &mut Vec<u32> {
        match place {
            Place::ProbationMapped => &mut self.probation_mapped,
            Place::ProbationStandby => &mut self.probation_standby,
            Place::MainMapped => &mut self.main_mapped,
            Place::MainStandby => &mut self.main_standby,
            Place::Absent => unreachable!(),
        }
    }

    const RESIDENT: [Place; 4] =
        [Place::ProbationMapped, Place::ProbationStandby, Place::MainMapped, Place::MainStandby];

    fn place_of(&mut self, cluster: u32) -> Option<Place> {
        Self::RESIDENT.into_iter().find(|place| self.list(*place).contains(&cluster))
    }

    fn count(&mut self, place: Place) -> u32 {
        self.list(place).len() as u32
    }

    fn main(&mut self) -> u32 {
        self.count(Place::MainMapped) + self.count(Place::MainStandby)
    }

    fn in_probation(&mut self) -> u32 {
        self.count(Place::ProbationMapped) + self.count(Place::ProbationStandby)
    }

    fn take(&mut self, cluster: u32) {
        for place in Self::RESIDENT {
            self.list(place).retain(|other| *other != cluster);
        }
    }

    fn put(&mut self, cluster: u32, place: Place) {
        self.take(cluster);
        self.list(place).push(cluster);
    }

    fn entry(&mut self, cluster: u32) -> Place {
        let used = self.used.get(&cluster).copied().unwrap_or(0);
        if self.main() < self.in_use.saturating_sub(self.probation) && (used > 0 || self.filling) {
            return Place::MainMapped;
        }
        match self.main_standby.first().copied() {
            Some(coldest) if used > self.unmapped[&coldest] => {
                self.displaced.insert(coldest, true);
                self.put(coldest, Place::ProbationStandby);
                Place::MainMapped
            }
            _ => Place::ProbationMapped,
        }
    }

    fn admitted(&mut self, cluster: u32) {
        if cluster >= self.clusters {
            return;
        }
        if self.place_of(cluster).is_some() {
            return self.touched(cluster);
        }
        self.now += 1;
        let place = self.entry(cluster);
        if self.used.contains_key(&cluster) {
            let ago = self.evictions - self.evicted.get(&cluster).copied().unwrap_or(0);
            if self.displaced.get(&cluster) == Some(&true) {
                if ago <= u64::from(self.frames) {
                    self.probation -= 1;
                }
            } else if place == Place::MainMapped && ago <= 2 * u64::from(self.probation) {
                self.probation += 1;
            }
            self.clamp();
        }
        self.use_now(cluster, place);
    }

    fn use_now(&mut self, cluster: u32, place: Place) {
        self.put(cluster, place);
        self.used.insert(cluster, self.now);
        self.displaced.remove(&cluster);
    }

    fn prefetched(&mut self, cluster: u32) {
        if cluster < self.clusters && self.place_of(cluster).is_none() {
            self.put(cluster, Place::ProbationStandby);
        }
    }

    fn touched(&mut self, cluster: u32) {
        let place = match self.place_of(cluster) {
            Some(Place::MainStandby) => Place::MainMapped,
            Some(Place::ProbationStandby) => self.entry(cluster),
            _ => return,
        };
        self.now += 1;
        self.use_now(cluster, place);
    }

    fn demote(&mut self) -> Option<u32> {
        if self.owed == 0 {
            return None;
        }
        let (probation, main) = (self.probation_mapped.first().copied(), self.main_mapped.first().copied());
        let lacks_probation = self.count(Place::ProbationStandby) < self.in_probation().div_ceil(PROBATION_STANDBY);
        let lacks_main = self.count(Place::MainStandby) < self.main().div_ceil(MAIN_STANDBY);
        let main_first = self.main() > self.in_use.saturating_sub(self.probation);
        let main_can_go = main_first || self.probation_mapped.is_empty();
        let stuck = self.probation_standby.is_empty() && (self.main_standby.is_empty() || !main_can_go);
        let (cluster, place) = match (probation, main) {
            (Some(probation), _) if lacks_probation || stuck => (probation, Place::ProbationStandby),
            (_, Some(main)) if lacks_main || stuck => (main, Place::MainStandby),
            _ => return None,
        };
        self.owed -= 1;
        self.put(cluster, place);
        self.unmapped.insert(cluster, self.now);
        Some(cluster)
    }

    fn victim(&mut self) -> Option<u32> {
        let main_first = self.main() > self.in_use.saturating_sub(self.probation);
        let (probation, main) = (self.probation_standby.first().copied(), self.main_standby.first().copied());
        let spared = main.filter(|_| self.probation_mapped.is_empty());
        let Some(cluster) = (if main_first { main.or(probation) } else { probation.or(spared) }) else {
            self.owed = self.owed.max(UNMAPS_FOR_A_VICTIM);
            return None;
        };
        self.owed = (self.owed + UNMAPS_A_VICTIM).min(UNMAPS_OWED_MAX);
        self.in_use = self.frames.min(self.main() + self.in_probation());
        self.filling = false;
        self.evictions += 1;
        if Some(cluster) == main {
            self.displaced.insert(cluster, true);
        }
        self.take(cluster);
        self.evicted.insert(cluster, self.evictions);
        Some(cluster)
    }

    fn removed(&mut self, cluster: u32) {
        self.take(cluster);
        self.used.remove(&cluster);
        self.displaced.remove(&cluster);
        self.evicted.remove(&cluster);
    }

    fn recency(&self) -> Vec<u32> {
        let lists = [&self.main_mapped, &self.main_standby, &self.probation_mapped, &self.probation_standby];
        lists.into_iter().flat_map(|list| list.iter().rev().copied()).collect()
    }
}

#[derive(Debug, Clone)]
enum Step {
    Access(u32),
    Admitted(u32),
    Prefetched(u32),
    Touched(u32),
    Demote,
    Victim,
    Removed(u32),
    Frames(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let cluster = || prop_oneof![30 => 0_u32..24, 1 => 24_u32..26, 1 => Just(u32::MAX)];
    let step = prop_oneof![
        12 => cluster().prop_map(Step::Access),
        2 => cluster().prop_map(Step::Admitted),
        2 => cluster().prop_map(Step::Prefetched),
        2 => cluster().prop_map(Step::Touched),
        3 => Just(Step::Demote),
        3 => Just(Step::Victim),
        1 => cluster().prop_map(Step::Removed),
        1 => (0_u32..24).prop_map(Step::Frames),
    ];
    prop::collection::vec(step, 0..400)
}

/// What a pager does for an access: evict while there is no frame, admit or map again, unmap what should be.
fn access(policy: &mut Replacement, mapped: &mut [bool], cluster: u32) -> Access {
    let at = cluster as usize;
    if mapped[at] {
        return Access::Mapped;
    }
    let was = if policy.node(cluster).unwrap().place == Place::Absent { Access::Hard } else { Access::Soft };
    if was == Access::Soft {
        policy.touched(cluster);
    } else {
        while policy.resident() >= policy.frames {
            if policy.victim().is_none() {
                mapped[policy.demote().unwrap() as usize] = false;
            }
        }
        policy.admitted(cluster);
    }
    mapped[at] = true;
    while let Some(cluster) = policy.demote() {
        mapped[cluster as usize] = false;
    }
    was
}

#[derive(Debug, PartialEq, Eq)]
enum Access {
    Mapped,
    Soft,
    Hard,
}

/// Whether a cluster is mapped, as a pager knows it.
fn is_mapped(policy: &Replacement, cluster: u32) -> bool {
    matches!(policy.node(cluster).unwrap().place, Place::ProbationMapped | Place::MainMapped)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn it_does_what_a_model_over_plain_vectors_does(frames in 1_u32..24, steps in steps()) {
        let (mut policy, mut model) = (Replacement::new(24, frames), Model::new(24, frames));
        for step in steps {
            match step {
                Step::Access(cluster) => {
                    policy.touched(cluster);
                    model.touched(cluster);
                    policy.admitted(cluster);
                    model.admitted(cluster);
                }
                Step::Admitted(cluster) => {
                    policy.admitted(cluster);
                    model.admitted(cluster);
                }
                Step::Prefetched(cluster) => {
                    policy.prefetched(cluster);
                    model.prefetched(cluster);
                }
                Step::Touched(cluster) => {
                    policy.touched(cluster);
                    model.touched(cluster);
                }
                Step::Demote => prop_assert_eq!(policy.demote(), model.demote()),
                Step::Victim => prop_assert_eq!(policy.victim(), model.victim()),
                Step::Removed(cluster) => {
                    policy.removed(cluster);
                    model.removed(cluster);
                }
                Step::Frames(frames) => {
                    policy.set_frames(frames);
                    if frames > model.frames {
                        (model.in_use, model.filling) = (frames, true);
                    }
                    model.frames = frames;
                    model.in_use = model.in_use.min(frames);
                    model.clamp();
                }
            }
            let order: Vec<u32> = policy.recency().collect();
            prop_assert_eq!(&order, &model.recency());
            prop_assert_eq!(order.len(), policy.resident() as usize);
            prop_assert_eq!(policy.probation, model.probation);
        }
    }

    #[test]
    fn there_is_a_victim_while_anything_is_resident(frames in 0_u32..24, steps in steps()) {
        let mut policy = Replacement::new(24, frames);
        for step in steps {
            match step {
                Step::Access(cluster) | Step::Admitted(cluster) | Step::Touched(cluster) => policy.admitted(cluster),
                Step::Prefetched(cluster) => policy.prefetched(cluster),
                _ => {}
            }
        }
        for _ in 0..policy.resident() {
            let victim = policy.victim().or_else(|| {
                policy.demote().unwrap();
                policy.victim()
            });
            prop_assert!(victim.is_some());
        }
        prop_assert_eq!((policy.victim(), policy.demote(), policy.victim()), (None, None, None));
        prop_assert_eq!(policy.resident(), 0);
    }

    #[test]
    fn what_was_saved_comes_back_in_the_same_order(frames in 1_u32..24, steps in prop::collection::vec(0_u32..24, 0..200)) {
        let mut policy = Replacement::new(24, frames);
        let mut mapped = [false; 24];
        for cluster in steps {
            access(&mut policy, &mut mapped, cluster);
        }
        let saved: Vec<u32> = policy.recency().collect();
        let restored = Replacement::restore(24, frames, saved.iter().copied());
        prop_assert_eq!(restored.recency().collect::<Vec<_>>(), saved);
        prop_assert_eq!(restored.resident(), policy.resident());
    }

    #[test]
    fn any_order_can_be_restored(clusters in 0_u32..9, frames in 0_u32..9, order in prop::collection::vec(0_u32..12, 0..30)) {
        let restored = Replacement::restore(clusters, frames, order.into_iter());
        let mut resident: Vec<u32> = restored.recency().collect();
        prop_assert_eq!(resident.len(), restored.resident() as usize);
        resident.sort_unstable();
        resident.dedup();
        prop_assert_eq!(resident.len(), restored.resident() as usize);
        prop_assert!(resident.iter().all(|cluster| *cluster < clusters));
    }
}

#[test]
fn an_endless_order_is_cut_at_the_number_of_clusters() {
    assert_eq!(Replacement::restore(5, 3, std::iter::repeat(2)).recency().collect::<Vec<_>>(), [2]);
}

#[test]
fn a_guest_that_fits_is_never_unmapped() {
    let mut policy = Replacement::new(200, 100);
    let mut mapped = vec![false; 200];
    let faults = (0..10_000_u32).filter(|turn| access(&mut policy, &mut mapped, turn * 7 % 100) != Access::Mapped);
    assert_eq!(faults.count(), 100);
}

#[test]
fn a_loop_larger_than_memory_keeps_most_of_it() {
    let (frames, around) = (1000, 1200);
    let mut policy = Replacement::new(around, frames);
    let mut mapped = vec![false; around as usize];
    let mut hard = 0;
    for turn in 0..around * 20 {
        let outcome = access(&mut policy, &mut mapped, turn % around);
        hard += u32::from(outcome == Access::Hard && turn >= around * 10);
    }
    // Belady's optimum is 200 hard faults a round; LRU and FIFO have 1200.
    assert!(hard < 10 * 300, "{hard} hard faults in ten rounds");
}

#[test]
fn a_scan_leaves_what_is_hot() {
    let mut policy = Replacement::new(2000, 100);
    let mut mapped = vec![false; 2000];
    for turn in 0..1000 {
        access(&mut policy, &mut mapped, turn % 70);
    }
    for cluster in 100..2000 {
        access(&mut policy, &mut mapped, cluster);
    }
    let lost = (0..70).filter(|cluster| access(&mut policy, &mut mapped, *cluster) == Access::Hard).count();
    assert_eq!(lost, 0);
}

#[test]
fn a_new_working_set_takes_the_place_of_the_old_one() {
    let mut policy = Replacement::new(2000, 100);
    let mut mapped = vec![false; 2000];
    let mut state = 1_u64;
    let mut hard = 0;
    for turn in 0..20_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let cluster = (state >> 40) as u32 % 80 + if turn < 10_000 { 0 } else { 1000 };
        let outcome = access(&mut policy, &mut mapped, cluster);
        hard += u32::from(outcome == Access::Hard && turn >= 15_000);
    }
    assert!(hard < 50, "{hard} hard faults in 5000 accesses to what fits, long after the change");
}

#[test]
fn what_was_read_ahead_and_never_used_goes_first() {
    let mut policy = Replacement::new(100, 10);
    for cluster in 0..8 {
        policy.admitted(cluster);
    }
    policy.prefetched(8);
    policy.prefetched(9);
    assert_eq!((policy.victim(), policy.victim()), (Some(8), Some(9)));
    assert!(is_mapped(&policy, 0));
}

#[test]
fn a_near_miss_is_a_fault_for_what_went_out_of_late() {
    let mut policy = Replacement::new(1000, 160);
    let mut mapped = vec![false; 1000];
    for cluster in 0..500 {
        access(&mut policy, &mut mapped, cluster);
    }
    assert_eq!(policy.near_misses(), 0);
    let mut gone: Vec<u32> = std::iter::from_fn(|| policy.victim()).take(20).collect();
    policy.admitted(gone.remove(0));
    assert_eq!(policy.near_misses(), 0, "nineteen went after it");
    policy.admitted(gone.pop().unwrap());
    assert_eq!(policy.near_misses(), 1);
    policy.removed(gone[18 - 1]);
    policy.admitted(gone[18 - 1]);
    assert_eq!(policy.near_misses(), 1, "what the guest freed is not missed");
}

#[test]
fn what_was_removed_is_a_stranger_again() {
    let mut policy = Replacement::new(100, 10);
    policy.admitted(3);
    policy.removed(3);
    assert_eq!((policy.resident(), policy.recency().count()), (0, 0));
    assert_eq!(policy.node(3).unwrap().used, 0);
}
