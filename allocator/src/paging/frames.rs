//! Which cluster of a guest's memory is in which frame of the RAM region.
//!
//! Frames are handed out so that clusters that follow one another get frames that do: then one mapping shows both.

/// No frame.
const NONE: u32 = u32::MAX;

/// The frame table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frames {
    /// By cluster.
    frame_of: Vec<u32>,
    /// By frame: a bit each, set where it is free.
    free: Vec<u64>,
    /// By frame: a bit each, set where it has memory, which it gets when it is first used.
    warm: Vec<u64>,
    warm_count: u32,
    frames: u32,
    in_use: u32,
    /// How many may be in use.
    limit: u32,
    /// Of these, kept for a hurry.
    spare: u32,
    /// The same, but 0 in a hurry.
    spared: u32,
    /// Where the last one was taken.
    last: u32,
}

impl Frames {
    /// All free.
    pub(super) fn new(clusters: u32, frames: u32, spare: u32) -> Self {
        let mut free = vec![u64::MAX; frames.div_ceil(64) as usize];
        if let Some(last) = free.last_mut().filter(|_| !frames.is_multiple_of(64)) {
            *last = (1 << (frames % 64)) - 1;
        }
        Self {
            frame_of: vec![NONE; clusters as usize],
            warm: vec![0; free.len()],
            warm_count: 0,
            free,
            frames,
            in_use: 0,
            limit: frames,
            spare,
            spared: spare,
            last: 0,
        }
    }

    /// The frame that a cluster is in.
    pub(super) fn frame_of(&self, cluster: u32) -> Option<u32> {
        self.frame_of.get(cluster as usize).copied().filter(|frame| *frame != NONE)
    }

    /// How many clusters are in one.
    pub(super) fn in_use(&self) -> u32 {
        self.in_use
    }

    /// How many more may be taken.
    pub(super) fn available(&self) -> u32 {
        self.limit.saturating_sub(self.spared).saturating_sub(self.in_use)
    }

    /// Whether so many more may be taken without those that are spared, hurry or not.
    pub(super) fn has_room_for(&self, frames: u32) -> bool {
        self.limit.saturating_sub(self.spare).saturating_sub(self.in_use) >= frames
    }

    /// How many may be in use.
    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    /// Whether free frames have memory that may not be used.
    pub(super) fn has_surplus(&self) -> bool {
        self.warm_count > self.limit.max(self.in_use)
    }

    /// A free frame whose memory is to be given back. It cannot be taken before [`Frames::end_release`].
    pub(super) fn begin_release(&mut self) -> Option<u32> {
        if !self.has_surplus() {
            return None;
        }
        let words = self.free.iter().zip(&self.warm).map(|(free, warm)| free & warm);
        let (index, word) = words.enumerate().find(|(_, word)| *word != 0)?;
        let frame = index as u32 * 64 + word.trailing_zeros();
        self.free[index] &= !(1 << (frame % 64));
        self.warm[index] &= !(1 << (frame % 64));
        self.warm_count -= 1;
        Some(frame)
    }

    /// A frame that was released may be taken again.
    pub(super) fn end_release(&mut self, frame: u32) {
        if let Some(word) = self.free.get_mut(frame as usize / 64) {
            *word |= 1 << (frame % 64);
        }
    }

    /// From now on so many may be in use; those that are stay so until they are given back.
    pub(super) fn set_limit(&mut self, limit: u32) {
        self.limit = limit.min(self.frames);
    }

    /// Spare frames may be taken, or not any more.
    pub(super) fn use_spare(&mut self, hurry: bool) {
        self.spared = if hurry { 0 } else { self.spare };
    }

    /// Puts a cluster into a free frame, if it is in none: behind that of the cluster before it, where that is free.
    pub(super) fn take(&mut self, cluster: u32) -> Option<u32> {
        if self.available() == 0 || self.frame_of(cluster).is_some() || cluster as usize >= self.frame_of.len() {
            return None;
        }
        let behind = cluster.checked_sub(1).and_then(|before| self.frame_of(before)).map(|frame| frame + 1);
        let frame = behind.filter(|frame| self.is_free(*frame)).or_else(|| self.next_free())?;
        self.claim(cluster, frame).then_some(frame)
    }

    /// Puts a cluster into this very frame. Whether that was possible: both must be free.
    pub(super) fn claim(&mut self, cluster: u32, frame: u32) -> bool {
        if !self.is_free(frame) || self.frame_of.get(cluster as usize) != Some(&NONE) {
            return false;
        }
        self.frame_of[cluster as usize] = frame;
        let bit = 1 << (frame % 64);
        self.free[frame as usize / 64] &= !bit;
        self.warm_count += u32::from(self.warm[frame as usize / 64] & bit == 0);
        self.warm[frame as usize / 64] |= bit;
        self.in_use += 1;
        self.last = frame;
        true
    }

    /// A cluster leaves its frame, which is free then.
    pub(super) fn give_back(&mut self, cluster: u32) {
        let Some(frame) = self.frame_of(cluster) else { return };
        self.frame_of[cluster as usize] = NONE;
        self.free[frame as usize / 64] |= 1 << (frame % 64);
        self.in_use -= 1;
    }

    fn is_free(&self, frame: u32) -> bool {
        frame < self.frames && self.free.get(frame as usize / 64).is_some_and(|word| word & (1 << (frame % 64)) != 0)
    }

    /// The first free one behind the last that was taken, round and round.
    fn next_free(&self) -> Option<u32> {
        let words = self.free.len();
        let start = self.last as usize / 64;
        (0..=words).find_map(|step| {
            let index = (start + step) % words.max(1);
            let mask = if step == 0 { u64::MAX << (self.last % 64) } else { u64::MAX };
            let found = self.free.get(index)? & mask;
            (found != 0).then(|| index as u32 * 64 + found.trailing_zeros())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Clone)]
    enum Step {
        Take(u32),
        GiveBack(u32),
        Limit(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..300_u32).prop_map(Step::Take),
            4 => (0..300_u32).prop_map(Step::GiveBack),
            1 => (0..150_u32).prop_map(Step::Limit),
        ]
    }

    proptest! {
        #[test]
        fn no_frame_holds_two_clusters_and_none_is_forgotten(
            frames in 1..140_u32, steps in proptest::collection::vec(step(), 1..400)
        ) {
            let mut table = Frames::new(256, frames, 0);
            let mut model: BTreeMap<u32, u32> = BTreeMap::new();
            let mut limit = frames;
            for step in steps {
                match step {
                    Step::Take(cluster) => {
                        let possible = cluster < 256 && !model.contains_key(&cluster) && (model.len() as u32) < limit;
                        let taken = table.take(cluster);
                        prop_assert_eq!(taken.is_some(), possible);
                        if let Some(frame) = taken {
                            prop_assert!(frame < frames && model.values().all(|other| *other != frame));
                            model.insert(cluster, frame);
                        }
                    }
                    Step::GiveBack(cluster) => {
                        table.give_back(cluster);
                        model.remove(&cluster);
                    }
                    Step::Limit(new) => {
                        table.set_limit(new);
                        limit = new.min(frames);
                    }
                }
                prop_assert_eq!(table.in_use() as usize, model.len());
                prop_assert!((0..300).all(|cluster| table.frame_of(cluster) == model.get(&cluster).copied()));
            }
        }
    }

    #[test]
    fn memory_of_free_frames_is_given_back_once_where_it_may_not_be_used() {
        let mut table = Frames::new(100, 100, 0);
        assert!((0..80).all(|cluster| table.take(cluster).is_some()));
        (0..50).for_each(|cluster| table.give_back(cluster));
        assert_eq!(table.begin_release(), None, "all may be used");
        table.set_limit(40);
        let released: Vec<_> = std::iter::from_fn(|| table.begin_release()).collect();
        assert_eq!(released.len(), 40, "30 are in use, and 10 free ones may stay warm");
        assert!((100..200).all(|cluster| table.take(cluster).is_none()), "such a cluster there is not");
        let taken = table.take(0).unwrap();
        assert!(!released.contains(&taken));
        released.iter().for_each(|frame| table.end_release(*frame));
        table.set_limit(100);
        assert_eq!((0..100).filter(|cluster| table.take(*cluster).is_some()).count(), 69);
    }

    #[test]
    fn spare_frames_are_for_a_hurry() {
        let mut table = Frames::new(100, 10, 3);
        assert_eq!((0..10).filter(|cluster| table.take(*cluster).is_some()).count(), 7);
        table.use_spare(true);
        assert_eq!((table.available(), table.take(50).is_some()), (3, true));
        table.use_spare(false);
        assert_eq!((table.available(), table.take(51)), (0, None));
        assert!(table.claim(52, 9) && table.in_use() == 9, "what is there already is there");
    }

    #[test]
    fn neighbours_get_neighbouring_frames() {
        let mut table = Frames::new(100, 100, 0);
        let taken: Vec<_> = (10..20).map(|cluster| table.take(cluster).unwrap()).collect();
        assert!(taken.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }
}
