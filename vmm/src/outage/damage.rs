//! What else an outage may leave: a slot of a context that does not verify any more, as a medium leaves one whose last write it tore, or that rots.
//!
//! Of two slots that are good one is damaged, between the cut and the return. If it is the older one, nothing may come of it. If it is
//! the newer one and the VM was frozen with it, its memory is worth nothing: it must not go on from the older one, but from a generation or from its
//! kernel, and whoever asks must be told why.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;

use allocator::{Pool, PoolError, Region};
use guests::random::SplitMix64;

use super::OutageError;
use super::subject::Way;
use crate::persistence::context::{Slot, Slots};
use crate::persistence::regions::{RegionsError, region_name};

/// A bit of so many bytes is flipped, at the beginning of a slot: each context is longer.
const WITHIN: u64 = 256;
/// How whoever is asked says that a context is damaged.
const SAID: &str = "which is damaged";

/// Which slot is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One of them, as chance has it.
    ContextSlot,
    /// That of the newest context.
    NewerSlot,
    /// The other one.
    OlderSlot,
}

const NAMES: [(&str, Damage); 3] =
    [("context-slot", Damage::ContextSlot), ("newer-slot", Damage::NewerSlot), ("older-slot", Damage::OlderSlot)];

/// A text that names no damage.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is no damage: it is context-slot, newer-slot or older-slot")]
pub struct NoSuchDamage(String);

impl FromStr for Damage {
    type Err = NoSuchDamage;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = NAMES.iter().find(|(name, _)| *name == text);
        named.map(|(_, damage)| *damage).ok_or_else(|| NoSuchDamage(text.to_owned()))
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        NAMES.iter().filter(|(_, damage)| damage == self).try_for_each(|(name, _)| f.write_str(name))
    }
}

/// What was damaged.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Damaged {
    /// The context that is no more.
    pub(super) sequence: u64,
    /// It was the newest.
    pub(super) newest: bool,
    /// What the VM could have gone on from.
    pub(super) before: Way,
}

impl Damaged {
    /// Whether the VM had been frozen with the very context that is damaged.
    pub(super) fn took_the_freeze(&self) -> bool {
        self.newest && matches!(self.before, Way::Resume(_))
    }

    /// In words.
    pub(super) fn words(&self) -> String {
        format!("context {}, the {} one", self.sequence, if self.newest { "newer" } else { "older" })
    }

    /// What is wrong with going on from `after` then.
    pub(super) fn wrong(&self, after: &Way) -> Option<String> {
        let right = match (self.took_the_freeze(), after) {
            (true, after) => !matches!(after, Way::Resume(_)),
            (false, after) => *after == self.before,
        };
        (!right).then(|| {
            format!(
                "{} was damaged, and it goes on from {} instead of {}",
                self.words(),
                after.words(),
                self.before.words()
            )
        })
    }

    /// What is wrong with not being told of it. `words` are those of whoever was asked.
    pub(super) fn unsaid(&self, words: &str) -> Option<String> {
        let unsaid = self.took_the_freeze() && !words.contains(SAID);
        unsaid.then(|| format!("{} was damaged, and nobody was told: {}", self.words(), words.trim()))
    }
}

/// What `perdure list` says of a VM that cannot be resumed.
pub(super) fn listed(pool: &Path) -> Result<String, OutageError> {
    let system = |source| OutageError::System { doing: "ask whether a VM can be resumed", source };
    let mut command = Command::new("/proc/self/exe");
    command.arg("--pool").arg(pool).args(["list", "--json"]).env_remove("PERDURE_LOG").stdin(Stdio::null());
    let output = command.output().map_err(system)?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

impl Damage {
    /// Damages a slot of the context of `vm`, which could go on from `before`, if both of them are good. No process may have it.
    ///
    /// # Errors
    /// [`OutageError::Pool`], [`OutageError::Regions`].
    pub(super) fn inflict(
        self,
        pool: &Path,
        vm: &str,
        before: &Way,
        seed: u64,
    ) -> Result<Option<Damaged>, OutageError> {
        let pool = match Pool::open(pool, vfs::cut::host()) {
            Err(PoolError::Catalog(allocator::CatalogError::Missing { .. })) => return Ok(None),
            other => other?,
        };
        let name = region_name(vm, "context")?;
        if pool.get(&name).is_none() {
            return Ok(None);
        }
        let region = Region::open(pool.lease(&name).map_err(RegionsError::Lease)?).map_err(RegionsError::from)?;
        let read = || Slots::read(&region).map_err(RegionsError::from);
        let Slots([Slot::Good(even), Slot::Good(odd)]) = read()? else { return Ok(None) };
        let (newer, older) = (even.sequence.max(odd.sequence), even.sequence.min(odd.sequence));
        let mut random = SplitMix64::new(seed);
        let newest = match self {
            Self::ContextSlot => random.below(2) == 0,
            Self::NewerSlot => true,
            Self::OlderSlot => false,
        };
        let sequence = if newest { newer } else { older };
        let at = (sequence % 2) * (region.size() / 2) + random.below(WITHIN);
        let mut byte = [0];
        region.read_at(&mut byte, at).map_err(RegionsError::from)?;
        region.write_durable_at(&[byte[0] ^ (1 << random.below(8))], at).map_err(RegionsError::from)?;
        Ok(Some(Damaged { sequence, newest, before: before.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damaged(newest: bool, before: Way) -> Damaged {
        Damaged { sequence: 7, newest, before }
    }

    #[test]
    fn a_damage_is_read_as_it_is_written() {
        for (name, _) in NAMES {
            assert_eq!(name.parse::<Damage>().unwrap().to_string(), name);
        }
        assert!("slot".parse::<Damage>().is_err());
    }

    #[test]
    fn the_older_slot_alters_nothing_and_without_the_newer_one_a_freeze_is_no_more() {
        assert_eq!(damaged(false, Way::Resume(8)).wrong(&Way::Resume(8)), None);
        assert!(damaged(false, Way::Resume(8)).wrong(&Way::Boot).is_some());
        assert!(damaged(true, Way::Resume(7)).wrong(&Way::Resume(6)).is_some());
        assert_eq!(damaged(true, Way::Resume(7)).wrong(&Way::Boot), None);
        assert_eq!(damaged(true, Way::Boot).wrong(&Way::Boot), None);
        assert!(damaged(true, Way::Boot).wrong(&Way::Resume(6)).is_some());
    }
}
