//! What survives a cut: chosen by a seed, or every choice in its turn.

use super::Grain;

/// What becomes of one operation that no sync has covered.
pub(super) enum Fate {
    Applied,
    Dropped,
    /// Each sector, and the metadata, for itself.
    Torn,
}

/// A source of answers to "does this survive?".
#[derive(Debug)]
pub(super) enum Choices {
    /// Pseudorandom; seeds 0, 1 and 2 are the corners.
    Seed(Seed),
    /// As the turn has it.
    Turn(Turn),
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
#[derive(Debug)]
pub(super) struct Seed {
    seed: u64,
    state: u64,
}

impl Seed {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// One path through the tree of choices. Which questions are asked may depend on earlier answers.
#[derive(Debug, Clone)]
pub(super) struct Turn {
    grain: Grain,
    answers: Vec<bool>,
    asked: usize,
    /// What is answered to questions that the path does not know yet.
    fallback: bool,
}

impl Turn {
    /// The path on which every answer is `answer`.
    pub(super) fn all(grain: Grain, answer: bool) -> Self {
        Self { grain, answers: Vec::new(), asked: 0, fallback: answer }
    }

    /// How many questions were asked on this path.
    pub(super) fn asked(&self) -> u32 {
        u32::try_from(self.asked).unwrap_or(u32::MAX)
    }

    /// The path after this one, in the order of binary numbers; `None` after the last one. Begin with all `false`.
    pub(super) fn next(mut self) -> Option<Self> {
        self.answers.truncate(self.asked);
        while self.answers.pop_if(|answer| *answer).is_some() {}
        *self.answers.last_mut()? = true;
        self.asked = 0;
        Some(self)
    }

    fn answer(&mut self) -> bool {
        if self.asked == self.answers.len() {
            self.answers.push(self.fallback);
        }
        self.asked += 1;
        self.answers.get(self.asked - 1).copied().unwrap_or(self.fallback)
    }
}

impl Choices {
    pub(super) fn new(seed: u64) -> Self {
        Self::Seed(Seed { seed, state: seed })
    }

    pub(super) fn coin(&mut self) -> bool {
        match self {
            Self::Seed(Seed { seed: 0, .. }) => false,
            Self::Seed(Seed { seed: 1, .. }) => true,
            Self::Seed(seed) => seed.next() & 1 == 1,
            Self::Turn(turn) => turn.answer(),
        }
    }

    pub(super) fn fate(&mut self) -> Fate {
        match self {
            Self::Seed(Seed { seed: 0, .. }) => Fate::Dropped,
            Self::Seed(Seed { seed: 1, .. }) => Fate::Applied,
            Self::Seed(Seed { seed: 2, .. }) => Fate::Torn,
            Self::Seed(seed) => match seed.next() % 3 {
                0 => Fate::Applied,
                1 => Fate::Dropped,
                _ => Fate::Torn,
            },
            // To keep every sector or none is among the ways to tear.
            Self::Turn(Turn { grain: Grain::Sector, .. }) => Fate::Torn,
            Self::Turn(turn) => {
                if turn.answer() {
                    Fate::Applied
                } else {
                    Fate::Dropped
                }
            }
        }
    }

    /// Whether the metadata of a torn operation survives.
    pub(super) fn metadata(&mut self) -> bool {
        matches!(self, Self::Seed(Seed { seed: 2, .. })) || self.coin()
    }
}
