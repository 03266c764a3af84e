//! Names that people can say, for VMs that were given none.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};

const QUALITIES: [&str; 32] = [
    "amber", "bold", "brave", "bright", "calm", "clear", "cool", "deep", "eager", "early", "even", "fair", "fine",
    "firm", "fresh", "gentle", "glad", "keen", "kind", "late", "light", "lively", "lucid", "mellow", "mild", "neat",
    "patient", "quiet", "steady", "still", "swift", "warm",
];
const THINGS: [&str; 32] = [
    "alder", "ash", "aspen", "beech", "birch", "brook", "cedar", "cliff", "cove", "dale", "elm", "fern", "fjord",
    "glade", "grove", "hazel", "heath", "holm", "larch", "lake", "maple", "marsh", "meadow", "moor", "oak", "pine",
    "reef", "ridge", "rowan", "spruce", "willow", "yew",
];

/// A name that is not in `taken`.
pub(super) fn fresh(taken: &BTreeSet<String>) -> String {
    // RandomState is seeded from the system's entropy: enough to tell names apart.
    let random = |salt: u64| usize::try_from(RandomState::new().hash_one(salt) & 0xffff).unwrap_or(0);
    for attempt in 0_u64.. {
        let base = format!("{}-{}", QUALITIES[random(attempt) % 32], THINGS[random(!attempt) % 32]);
        let name = if attempt < 64 { base } else { format!("{base}-{attempt}") };
        if !taken.contains(&name) {
            return name;
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_name_is_not_taken_even_when_all_short_ones_are() {
        let all: BTreeSet<_> =
            QUALITIES.iter().flat_map(|quality| THINGS.map(|thing| format!("{quality}-{thing}"))).collect();
        let name = fresh(&all);
        assert!(!all.contains(&name) && !name.is_empty(), "{name}");
    }
}
