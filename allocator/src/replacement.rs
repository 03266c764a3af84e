//! Which cluster leaves its frame, where the hardware does not say what was used.
//!
//! There are no accessed bits for memory that KVM maps here. What a pager sees are faults: a **hard** one, when a cluster is not in a
//! frame, and a **soft** one, when it is in its frame but was unmapped on purpose. So recency comes from unmapping, as in VAX/VMS
//! (Turner and Levy: *Segmented FIFO page replacement*, SIGMETRICS 1981): a resident cluster is *mapped*, or on *standby*.
//!
//! ```text
//!   first fault ─► probation, mapped ─► probation, standby ─► victim … remembered
//!                        ▲      soft fault │       ▲                        │
//!                        └─── too long ago─┤       │ displaced              │ hard fault
//!                                          ▼       │                        ▼
//!                 used again sooner than ─► main, mapped ─► main, standby ◄─ the same question
//!                 the coldest of main       ▲                    │
//!                                           └──── soft fault ────┘
//! ```
//!
//! - A newcomer goes through a small *probation* first (Johnson and Shasha: *2Q*, VLDB 1994; Yang et al.: *S3-FIFO*, SOSP 2023), so that
//!   a scan passes through without a trace.
//! - It enters *main* when it is used again sooner than main's coldest cluster, which it displaces. That is the question of LIRS (Jiang
//!   and Zhang, SIGMETRICS 2002) and CLOCK-Pro (Jiang, Chen, Zhang, USENIX ATC 2005), answered with two times: of the newcomer's last known
//!   use, and of the unmapping of the coldest cluster, which has not been used since. In a loop larger than memory the answer is always
//!   no, and main stays as it is, which is the best that can be done.
//! - The share of probation adapts as in ARC (Megiddo and Modha, FAST 2003): it grows when a cluster that probation has just
//!   lost comes back and enters main, and shrinks when one comes back that main has lost.
//! - Clusters are unmapped only as others are evicted, two for each: a guest that fits in its frames has no soft faults.
//!
//! Time is counted in faults. Every operation takes constant time and allocates nothing.
//!
//! # Measured
//! `cargo run --release -p allocator --example replacement` plays twelve seeded traces of 2,000,000 accesses, four times as many clusters
//! as frames. Cost in microseconds per access: a hard fault 120, a soft fault 40 (as measured on KVM with userfaultfd, 64 KiB a cluster,
//! files in memory), a mapped hit nothing. The mean is the geometric one of all twelve. A star: needs accessed bits, or the future.
//!
//! |  | uniform | zipf | loop 1.2× | loop 4× | 90/10 | phases | zipf phases | zipf, scan | hot, scans | moving edge | mean |
//! |---|---|---|---|---|---|---|---|---|---|---|---|
//! | FIFO | 89.99 | 27.21 | 120.00 | 120.00 | 14.40 | 2.06 | 27.44 | 55.80 | 29.99 | 39.33 | 38.15 |
//! | random | 89.99 | 27.25 | 37.64 | 117.60 | 14.42 | 5.27 | 27.69 | 55.75 | 34.67 | 44.77 | 30.17 |
//! | segmented FIFO, 5 % | 90.49 | 26.68 | 120.00 | 120.00 | 12.38 | 2.06 | 26.95 | 55.41 | 29.89 | 39.57 | 37.53 |
//! | segmented FIFO, 10 % | 91.00 | 26.56 | 120.00 | 120.00 | 11.68 | 2.06 | 26.84 | 55.34 | 29.90 | 39.85 | 37.35 |
//! | segmented FIFO, 25 % | 92.49 | 26.82 | 120.00 | 120.00 | 12.28 | 8.36 | 27.13 | 55.58 | 31.15 | 40.75 | 42.56 |
//! | segmented FIFO, 50 % | 94.99 | 28.44 | 120.00 | 120.00 | 15.97 | 19.25 | 28.77 | 56.91 | 39.98 | 42.70 | 48.65 |
//! | `Replacement` | 91.49 | 21.39 | 31.34 | 93.47 | 9.74 | 5.33 | 23.10 | 48.48 | 19.26 | 46.95 | 26.73 |
//! | `Replacement`, some free | 92.87 | 21.99 | 33.96 | 95.12 | 9.92 | 5.58 | 23.64 | 49.05 | 19.41 | 47.50 | 28.07 |
//! | CLOCK* | 90.01 | 22.11 | 120.00 | 120.00 | 9.00 | 2.27 | 22.67 | 50.70 | 28.79 | 38.78 | 34.93 |
//! | LRU* | 90.01 | 22.90 | 120.00 | 120.00 | 8.99 | 2.06 | 23.36 | 51.73 | 29.28 | 39.27 | 35.06 |
//! | S3-FIFO* | 89.97 | 18.95 | 34.49 | 120.00 | 9.01 | 4.43 | 21.24 | 43.63 | 19.21 | 45.10 | 26.01 |
//! | optimum* | 46.09 | 10.96 | 20.05 | 90.09 | 5.22 | 1.99 | 11.57 | 29.24 | 18.02 | 24.16 | 14.53 |
//!
//! Of those that can be built it is the best on every trace but four. `uniform` gives nothing to learn, and asking costs 2 %. In a loop
//! that is larger than memory by 3 % (not shown), eviction at random does better: 7 against 12. `phases` (a working set that fits and then
//! is another one) pays for the newcomers that probation turns away, and `moving edge` (the newer, the hotter) is made for LRU.
//! *Some free*: a pager that evicts in batches, so that 1/32 to 1/16 of the frames are free; the others here have none free, and evict one by one.

/// Clusters that may be unmapped for each that is evicted. With one, standby dries up when it is used (`phases` cost 14 times as much);
/// three are no better than two.
pub(crate) const UNMAPS_A_VICTIM: u32 = 2;
/// Clusters that may be unmapped where there is no victim.
const UNMAPS_FOR_A_VICTIM: u32 = 16;
/// Unmappings that may be owed: more than the victims of a batch ask for.
const UNMAPS_OWED_MAX: u32 = 1024;
/// Of main, this part is on standby: 1 in …. A greater part finds the coldest better, and costs more soft faults.
const MAIN_STANDBY: u32 = 7;
/// Of probation, this part is on standby: 1 in ….
const PROBATION_STANDBY: u32 = 2;
/// Probation has this part of the frames at first, 1 in …, and later between the two others.
const PROBATION: u32 = 20;
const PROBATION_LEAST: u32 = 64;
const PROBATION_MOST: u32 = 2;

/// A miss is near if as many frames more, 1 in …, had held the cluster.
const NEAR: u32 = 16;

/// No cluster: the end of a list. No `Vec` indexed by a `u32` below `clusters` has it.
const NONE: u32 = u32::MAX;

/// Where a cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Absent,
    ProbationMapped,
    ProbationStandby,
    MainMapped,
    MainStandby,
}

impl Place {
    const ALL: usize = 5;
}

#[derive(Debug, Clone, Copy)]
struct Node {
    previous: u32,
    next: u32,
    place: Place,
    /// Main has lost it: it was displaced or evicted from there, and has not been used since.
    displaced: bool,
    /// When it was last known to be used; 0: never.
    used: u64,
    /// In [`Place::MainStandby`]: when it was unmapped. In [`Place::Absent`]: the evictions up to its own.
    since: u64,
}

impl Node {
    const NEW: Self = Self { previous: NONE, next: NONE, place: Place::Absent, displaced: false, used: 0, since: 0 };
}

/// Oldest first.
#[derive(Debug, Clone, Copy)]
struct List {
    oldest: u32,
    newest: u32,
}

/// The residence of one VM's clusters: see the [module](self). Ids that are not of it are ignored everywhere.
#[derive(Debug)]
pub struct Replacement {
    nodes: Vec<Node>,
    lists: [List; Place::ALL],
    /// Clusters by place.
    counts: [u32; Place::ALL],
    frames: u32,
    /// Frames that are in use when one is asked for: a pager keeps some free.
    in_use: u32,
    /// None has been evicted since frames were added: newcomers go to main, there is nobody whom they could push out.
    filling: bool,
    /// Frames for probation.
    probation: u32,
    /// Faults so far.
    now: u64,
    evictions: u64,
    near_misses: u64,
    /// Clusters that may be unmapped.
    owed: u32,
}

impl Replacement {
    /// Of `clusters` clusters none is resident yet; `frames` may be.
    #[must_use]
    pub fn new(clusters: u32, frames: u32) -> Self {
        let mut new = Self {
            nodes: vec![Node::NEW; clusters as usize],
            lists: [List { oldest: NONE, newest: NONE }; Place::ALL],
            counts: [0; Place::ALL],
            frames: 0,
            in_use: 0,
            filling: true,
            probation: frames / PROBATION,
            now: 0,
            evictions: 0,
            near_misses: 0,
            owed: 0,
        };
        new.set_frames(frames);
        new
    }

    /// As [`Replacement::new`], with what [`Replacement::recency`] told, which may be anything: of clusters told twice the first counts.
    /// They count as mapped, whether they are or not: [`Replacement::touched`] does nothing to them then, and unmapping does no harm.
    #[must_use]
    pub fn restore(clusters: u32, frames: u32, order: impl Iterator<Item = u32>) -> Self {
        let mut restored = Self::new(clusters, frames);
        let mut seen = vec![false; restored.nodes.len()];
        let mut first_seen =
            |cluster: &u32| seen.get_mut(*cluster as usize).is_some_and(|seen| !std::mem::replace(seen, true));
        let order: Vec<u32> = order.take(restored.nodes.len()).filter(|cluster| first_seen(cluster)).collect();
        let main = restored.main_target() as usize;
        for (rank, &cluster) in order.iter().enumerate().rev() {
            restored.now += 1;
            restored.place(cluster, if rank < main { Place::MainMapped } else { Place::ProbationMapped });
            restored.set_used(cluster);
        }
        restored
    }

    /// The budget has changed. If more are resident, ask for victims.
    pub fn set_frames(&mut self, frames: u32) {
        if frames > self.frames {
            self.in_use = frames;
            self.filling = true;
        }
        self.frames = frames;
        self.in_use = self.in_use.min(frames);
        self.set_probation(self.probation);
    }

    /// How many clusters are resident.
    #[must_use]
    pub fn resident(&self) -> u32 {
        self.main_count() + self.probation_count()
    }

    /// A hard fault was served: the cluster is resident and mapped.
    pub fn admitted(&mut self, cluster: u32) {
        let Some(node) = self.node(cluster) else { return };
        if node.place != Place::Absent {
            return self.touched(cluster);
        }
        self.now += 1;
        let place = self.place_of_used(&node);
        self.near_misses += u64::from(self.is_near_miss(&node));
        self.adapt(&node, place);
        self.place(cluster, place);
        self.set_used(cluster);
    }

    /// It was read ahead: it is resident and has never been mapped.
    pub fn prefetched(&mut self, cluster: u32) {
        if self.node(cluster).is_some_and(|node| node.place == Place::Absent) {
            self.place(cluster, Place::ProbationStandby);
        }
    }

    /// A soft fault was served: the cluster, which was on standby, is mapped again.
    pub fn touched(&mut self, cluster: u32) {
        let Some(node) = self.node(cluster) else { return };
        let place = match node.place {
            Place::Absent | Place::ProbationMapped | Place::MainMapped => return,
            Place::MainStandby => Place::MainMapped,
            Place::ProbationStandby => self.place_of_used(&node),
        };
        self.now += 1;
        self.place(cluster, place);
        self.set_used(cluster);
    }

    /// The next cluster to unmap; it is on standby from now on. `None`: that is enough for now. Ask until it is, after each fault.
    pub fn demote(&mut self) -> Option<u32> {
        if self.owed == 0 {
            return None;
        }
        let (probation, main) = (self.oldest(Place::ProbationMapped), self.oldest(Place::MainMapped));
        let probation_lacks = self.count(Place::ProbationStandby) < self.probation_count().div_ceil(PROBATION_STANDBY);
        let main_lacks = self.count(Place::MainStandby) < self.main_count().div_ceil(MAIN_STANDBY);
        // Where there is no victim, this is to make one.
        let stuck = self.next_victim().is_none();
        let cluster = probation.filter(|_| probation_lacks || stuck).or(main.filter(|_| main_lacks || stuck))?;
        self.owed -= 1;
        let standby = if Some(cluster) == main { Place::MainStandby } else { Place::ProbationStandby };
        self.place(cluster, standby);
        if standby == Place::MainStandby {
            self.set_since(cluster, self.now);
        }
        Some(cluster)
    }

    /// The next cluster to evict: it was on standby and is no longer resident. `None`: none is on standby; then
    /// [`Replacement::demote`] gives one, if any is resident.
    pub fn victim(&mut self) -> Option<u32> {
        let Some(cluster) = self.next_victim() else {
            self.owed = self.owed.max(UNMAPS_FOR_A_VICTIM);
            return None;
        };
        self.owed = (self.owed + UNMAPS_A_VICTIM).min(UNMAPS_OWED_MAX);
        self.in_use = self.resident().min(self.frames);
        self.filling = false;
        self.evictions += 1;
        self.set_displaced(cluster);
        self.place(cluster, Place::Absent);
        self.set_since(cluster, self.evictions);
        Some(cluster)
    }

    /// The guest has freed it, or its frame was taken away: it is not resident, and what was known of it is forgotten.
    pub fn removed(&mut self, cluster: u32) {
        self.place(cluster, Place::Absent);
        if let Some(node) = self.nodes.get_mut(cluster as usize) {
            *node = Node::NEW;
        }
    }

    /// Hard faults so far for clusters that were evicted of late: a sixteenth more frames would have saved them, about. What more memory
    /// is worth, as ARC asks its ghosts.
    #[must_use]
    pub fn near_misses(&self) -> u64 {
        self.near_misses
    }

    /// The resident clusters, hottest first as far as that is known: main, probation.
    pub fn recency(&self) -> impl Iterator<Item = u32> {
        let places = [Place::MainMapped, Place::MainStandby, Place::ProbationMapped, Place::ProbationStandby];
        places.into_iter().flat_map(|place| {
            let newest = self.list(place).newest;
            std::iter::successors(self.linked(newest), |cluster| self.linked(self.node(*cluster)?.previous))
        })
    }

    /// Where a cluster goes that is being used.
    fn place_of_used(&mut self, node: &Node) -> Place {
        let room = self.main_count() < self.main_target();
        if room && (node.used != 0 || self.filling) {
            return Place::MainMapped;
        }
        let Some(coldest) = self.oldest(Place::MainStandby) else { return Place::ProbationMapped };
        // The coldest has not been used since it was unmapped. Never used is longest ago.
        if self.node(coldest).is_none_or(|coldest| node.used <= coldest.since) {
            return Place::ProbationMapped;
        }
        self.set_displaced(coldest);
        self.place(coldest, Place::ProbationStandby);
        Place::MainMapped
    }

    fn is_near_miss(&self, node: &Node) -> bool {
        let ago = self.evictions.saturating_sub(node.since);
        node.since != 0 && ago <= u64::from(self.frames / NEAR)
    }

    /// Learns from a cluster that comes back to `place` how large probation should be.
    fn adapt(&mut self, node: &Node, place: Place) {
        let ago = self.evictions.saturating_sub(node.since);
        let known = node.used != 0;
        if known && node.displaced && ago <= u64::from(self.frames) {
            self.set_probation(self.probation.saturating_sub(1));
        }
        if known && !node.displaced && place == Place::MainMapped && ago <= 2 * u64::from(self.probation) {
            self.set_probation(self.probation.saturating_add(1));
        }
    }

    fn set_probation(&mut self, probation: u32) {
        let most = (self.frames / PROBATION_MOST).max(1);
        self.probation = probation.clamp((self.frames / PROBATION_LEAST).max(1), most);
    }

    fn next_victim(&self) -> Option<u32> {
        let (probation, main) = (self.oldest(Place::ProbationStandby), self.oldest(Place::MainStandby));
        if self.main_count() > self.main_target() {
            return main.or(probation);
        }
        // Rather unmap another of probation than take one of main.
        probation.or_else(|| main.filter(|_| self.oldest(Place::ProbationMapped).is_none()))
    }

    fn main_target(&self) -> u32 {
        self.in_use.saturating_sub(self.probation)
    }

    fn main_count(&self) -> u32 {
        self.count(Place::MainMapped) + self.count(Place::MainStandby)
    }

    fn probation_count(&self) -> u32 {
        self.count(Place::ProbationMapped) + self.count(Place::ProbationStandby)
    }
}

/// The intrusive lists: a resident cluster is in that of its place.
impl Replacement {
    fn node(&self, cluster: u32) -> Option<Node> {
        self.nodes.get(cluster as usize).copied()
    }

    /// A link, unless it is the end.
    fn linked(&self, cluster: u32) -> Option<u32> {
        self.node(cluster).map(|_| cluster)
    }

    fn list(&self, place: Place) -> List {
        self.lists[place as usize]
    }

    fn oldest(&self, place: Place) -> Option<u32> {
        self.linked(self.list(place).oldest)
    }

    fn count(&self, place: Place) -> u32 {
        self.counts[place as usize]
    }

    /// It becomes the newest of `place`.
    fn place(&mut self, cluster: u32, place: Place) {
        self.unlink(cluster);
        if let Some(node) = self.nodes.get_mut(cluster as usize) {
            node.place = place;
        }
        self.link(cluster);
    }

    fn link(&mut self, cluster: u32) {
        let Some(node) = self.nodes.get_mut(cluster as usize) else { return };
        if node.place == Place::Absent {
            return;
        }
        self.counts[node.place as usize] += 1;
        let list = &mut self.lists[node.place as usize];
        let previous = std::mem::replace(&mut list.newest, cluster);
        (node.previous, node.next) = (previous, NONE);
        match self.nodes.get_mut(previous as usize) {
            Some(previous) => previous.next = cluster,
            None => list.oldest = cluster,
        }
    }

    fn unlink(&mut self, cluster: u32) {
        let Some(node) = self.node(cluster).filter(|node| node.place != Place::Absent) else { return };
        self.counts[node.place as usize] -= 1;
        let list = &mut self.lists[node.place as usize];
        match self.nodes.get_mut(node.previous as usize) {
            Some(previous) => previous.next = node.next,
            None => list.oldest = node.next,
        }
        match self.nodes.get_mut(node.next as usize) {
            Some(next) => next.previous = node.previous,
            None => list.newest = node.previous,
        }
    }

    fn set_used(&mut self, cluster: u32) {
        let now = self.now;
        if let Some(node) = self.nodes.get_mut(cluster as usize) {
            (node.used, node.displaced) = (now, false);
        }
    }

    fn set_since(&mut self, cluster: u32, since: u64) {
        if let Some(node) = self.nodes.get_mut(cluster as usize) {
            node.since = since;
        }
    }

    /// Main has lost it, if it was there.
    fn set_displaced(&mut self, cluster: u32) {
        if let Some(node) = self.nodes.get_mut(cluster as usize) {
            node.displaced |= matches!(node.place, Place::MainMapped | Place::MainStandby);
        }
    }
}

#[cfg(test)]
mod tests;
