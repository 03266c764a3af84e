//! The policies that are compared.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use allocator::replacement::Replacement;

use crate::traces::Random;
use crate::{CLUSTERS, FRAMES};

/// What an access met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Mapped,
    Soft,
    Hard,
}

pub(crate) trait Policy {
    /// The access number `at` of the trace.
    fn access(&mut self, cluster: u32, at: usize) -> Access;
}

/// Every policy, by name, fresh.
pub(crate) fn all(trace: &[u32]) -> Vec<(String, Box<dyn Policy>)> {
    let mut all: Vec<(String, Box<dyn Policy>)> =
        vec![("FIFO".to_owned(), Box::new(Clock::new(false))), ("random".to_owned(), Box::new(AtRandom::new()))];
    for share in [5, 10, 25, 50] {
        all.push((format!("segmented FIFO, {share} %"), Box::new(SegmentedFifo::new(share))));
    }
    all.push(("`Replacement`".to_owned(), Box::new(Ours::new(0))));
    all.push(("`Replacement`, some free".to_owned(), Box::new(Ours::new(FRAMES / 32))));
    all.push(("CLOCK*".to_owned(), Box::new(Clock::new(true))));
    all.push(("LRU*".to_owned(), Box::new(Lru::new())));
    all.push(("S3-FIFO*".to_owned(), Box::new(S3Fifo::new())));
    all.push(("optimum*".to_owned(), Box::new(Optimum::new(trace))));
    all
}

fn table<T: Clone>(value: T) -> Vec<T> {
    vec![value; CLUSTERS as usize]
}

/// Belady's: out goes what is needed last.
struct Optimum {
    /// For each access, when its cluster is accessed next.
    next: Vec<usize>,
    /// Of residents.
    needed: Vec<Option<usize>>,
    order: BTreeSet<(usize, u32)>,
}

impl Optimum {
    fn new(trace: &[u32]) -> Self {
        let mut later = table(usize::MAX);
        let mut next: Vec<usize> =
            (0..trace.len()).rev().map(|at| std::mem::replace(&mut later[trace[at] as usize], at)).collect();
        next.reverse();
        Self { next, needed: table(None), order: BTreeSet::new() }
    }
}

impl Policy for Optimum {
    fn access(&mut self, cluster: u32, at: usize) -> Access {
        let needed = self.needed[cluster as usize].replace(self.next[at]);
        if let Some(needed) = needed {
            self.order.remove(&(needed, cluster));
        } else if self.order.len() == FRAMES as usize
            && let Some((_, victim)) = self.order.pop_last()
        {
            self.needed[victim as usize] = None;
        }
        self.order.insert((self.next[at], cluster));
        if needed.is_some() { Access::Mapped } else { Access::Hard }
    }
}

struct Lru {
    /// When a cluster was used last.
    used: Vec<Option<usize>>,
    order: BTreeMap<usize, u32>,
}

impl Lru {
    fn new() -> Self {
        Self { used: table(None), order: BTreeMap::new() }
    }
}

impl Policy for Lru {
    fn access(&mut self, cluster: u32, at: usize) -> Access {
        let used = self.used[cluster as usize].replace(at);
        let hit = used.is_some_and(|used| self.order.remove(&used).is_some());
        if !hit && self.order.len() == FRAMES as usize {
            self.order.pop_first();
        }
        self.order.insert(at, cluster);
        if hit { Access::Mapped } else { Access::Hard }
    }
}

/// The second chance, or FIFO without it.
struct Clock {
    second_chance: bool,
    queue: VecDeque<u32>,
    /// The accessed bit of residents.
    accessed: Vec<Option<bool>>,
}

impl Clock {
    fn new(second_chance: bool) -> Self {
        Self { second_chance, queue: VecDeque::new(), accessed: table(None) }
    }
}

impl Policy for Clock {
    fn access(&mut self, cluster: u32, _at: usize) -> Access {
        if let Some(accessed) = &mut self.accessed[cluster as usize] {
            *accessed = self.second_chance;
            return Access::Mapped;
        }
        while self.queue.len() == FRAMES as usize
            && let Some(oldest) = self.queue.pop_front()
        {
            if self.accessed[oldest as usize] == Some(true) {
                self.accessed[oldest as usize] = Some(false);
                self.queue.push_back(oldest);
            } else {
                self.accessed[oldest as usize] = None;
            }
        }
        self.queue.push_back(cluster);
        self.accessed[cluster as usize] = Some(false);
        Access::Hard
    }
}

struct AtRandom {
    residents: Vec<u32>,
    resident: Vec<bool>,
    random: Random,
}

impl AtRandom {
    fn new() -> Self {
        Self { residents: Vec::new(), resident: table(false), random: Random(3) }
    }
}

impl Policy for AtRandom {
    fn access(&mut self, cluster: u32, _at: usize) -> Access {
        if std::mem::replace(&mut self.resident[cluster as usize], true) {
            return Access::Mapped;
        }
        if self.residents.len() < FRAMES as usize {
            self.residents.push(cluster);
        } else {
            let place = self.random.below(FRAMES) as usize;
            let victim = std::mem::replace(&mut self.residents[place], cluster);
            self.resident[victim as usize] = false;
        }
        Access::Hard
    }
}

/// Turner and Levy's: the oldest mapped clusters are kept on standby, unmapped.
struct SegmentedFifo {
    mapped_most: usize,
    mapped: VecDeque<u32>,
    /// By when they were unmapped.
    standby: BTreeMap<usize, u32>,
    state: Vec<Segment>,
}

#[derive(Debug, Clone, Copy)]
enum Segment {
    Absent,
    Mapped,
    Standby(usize),
}

impl SegmentedFifo {
    fn new(standby_per_cent: usize) -> Self {
        let mapped_most = FRAMES as usize * (100 - standby_per_cent) / 100;
        Self { mapped_most, mapped: VecDeque::new(), standby: BTreeMap::new(), state: table(Segment::Absent) }
    }

    fn evict(&mut self) {
        let victim = self.standby.pop_first().map(|(_, victim)| victim).or_else(|| self.mapped.pop_front());
        if let Some(victim) = victim {
            self.state[victim as usize] = Segment::Absent;
        }
    }
}

impl Policy for SegmentedFifo {
    fn access(&mut self, cluster: u32, at: usize) -> Access {
        let access = match self.state[cluster as usize] {
            Segment::Mapped => return Access::Mapped,
            Segment::Standby(unmapped) => {
                self.standby.remove(&unmapped);
                Access::Soft
            }
            Segment::Absent => {
                if self.mapped.len() + self.standby.len() == FRAMES as usize {
                    self.evict();
                }
                Access::Hard
            }
        };
        self.mapped.push_back(cluster);
        self.state[cluster as usize] = Segment::Mapped;
        if self.mapped.len() > self.mapped_most
            && let Some(oldest) = self.mapped.pop_front()
        {
            self.standby.insert(at, oldest);
            self.state[oldest as usize] = Segment::Standby(at);
        }
        access
    }
}

/// Yang et al., SOSP 2023, as published: a tenth is small, the ghost queue is as long as main, frequencies go to three.
struct S3Fifo {
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    /// By the number of its entry.
    ghosts: VecDeque<(u32, usize)>,
    ghost: Vec<Option<usize>>,
    /// Of residents.
    frequency: Vec<Option<u8>>,
}

impl S3Fifo {
    const SMALL: usize = FRAMES as usize / 10;
    const MAIN: usize = FRAMES as usize - Self::SMALL;

    fn new() -> Self {
        let (small, main) = (VecDeque::new(), VecDeque::new());
        Self { small, main, ghosts: VecDeque::new(), ghost: table(None), frequency: table(None) }
    }

    fn evict(&mut self, at: usize) {
        if self.small.len() >= Self::SMALL || self.main.is_empty() {
            self.evict_small(at);
        } else {
            self.evict_main();
        }
    }

    fn evict_small(&mut self, at: usize) {
        let Some(oldest) = self.small.pop_front() else { return };
        if self.frequency[oldest as usize] > Some(1) {
            self.frequency[oldest as usize] = Some(0);
            self.main.push_back(oldest);
            if self.main.len() > Self::MAIN {
                self.evict_main();
            }
            return;
        }
        self.frequency[oldest as usize] = None;
        self.ghost[oldest as usize] = Some(at);
        self.ghosts.push_back((oldest, at));
        if self.ghosts.len() > Self::MAIN
            && let Some((forgotten, at)) = self.ghosts.pop_front()
            && self.ghost[forgotten as usize] == Some(at)
        {
            self.ghost[forgotten as usize] = None;
        }
    }

    fn evict_main(&mut self) {
        while let Some(oldest) = self.main.pop_front() {
            match &mut self.frequency[oldest as usize] {
                Some(frequency @ 1..) => {
                    *frequency -= 1;
                    self.main.push_back(oldest);
                }
                other => {
                    *other = None;
                    return;
                }
            }
        }
    }
}

impl Policy for S3Fifo {
    fn access(&mut self, cluster: u32, at: usize) -> Access {
        if let Some(frequency) = &mut self.frequency[cluster as usize] {
            *frequency = (*frequency + 1).min(3);
            return Access::Mapped;
        }
        while self.small.len() + self.main.len() >= FRAMES as usize {
            self.evict(at);
        }
        let remembered = self.ghost[cluster as usize].take().is_some();
        (if remembered { &mut self.main } else { &mut self.small }).push_back(cluster);
        self.frequency[cluster as usize] = Some(0);
        Access::Hard
    }
}

/// The crate's, as a pager uses it: it evicts in batches, so that between one and two reserves of frames are free.
struct Ours {
    policy: Replacement,
    reserve: u32,
    state: Vec<Access>,
}

impl Ours {
    fn new(reserve: u32) -> Self {
        Self { policy: Replacement::new(CLUSTERS, FRAMES), reserve, state: table(Access::Hard) }
    }

    fn make_room(&mut self) {
        if self.policy.resident() < FRAMES - self.reserve {
            return;
        }
        while self.policy.resident() >= FRAMES - 2 * self.reserve {
            if let Some(victim) = self.policy.victim() {
                self.state[victim as usize] = Access::Hard;
            } else if let Some(cluster) = self.policy.demote() {
                self.state[cluster as usize] = Access::Soft;
            }
        }
    }
}

impl Policy for Ours {
    fn access(&mut self, cluster: u32, _at: usize) -> Access {
        let access = std::mem::replace(&mut self.state[cluster as usize], Access::Mapped);
        match access {
            Access::Mapped => return access,
            Access::Soft => self.policy.touched(cluster),
            Access::Hard => {
                self.make_room();
                self.policy.admitted(cluster);
            }
        }
        while let Some(cluster) = self.policy.demote() {
            self.state[cluster as usize] = Access::Soft;
        }
        access
    }
}
