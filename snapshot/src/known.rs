//! Which copies of pages have been met: most leaves of an archive list mostly what others list.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::hash::Hash;
use crate::node::Link;

/// Copies met so far: where each lies, and a fingerprint of what it must be. Takes 20 to 40 bytes for each.
#[derive(Debug)]
pub(crate) struct Known {
    meanings: HashMap<u64, u64, Keys>,
}

impl Default for Known {
    fn default() -> Self {
        Self { meanings: HashMap::with_hasher(Keys::random()) }
    }
}

impl Known {
    /// Whether this copy is met for the first time, or is to be something else than it was before.
    pub(crate) fn insert(&mut self, link: &Link, hash: Hash) -> bool {
        let (low, high) = hash.halves();
        let packed = link.length | link.codec.number() << 13;
        let form = u64::from(link.crc) << 32 | u64::from(link.born) << 16 | u64::from(packed);
        let keys = self.meanings.hasher();
        let meaning = keys.mix(keys.mix(low) ^ high) ^ keys.mix(form);
        let place = u64::from(link.pack) << 32 | u64::from(link.unit);
        self.meanings.insert(place, meaning) != Some(meaning)
    }
}

/// The keys of a quick hash, drawn anew each time, so that nobody can prepare places that collide.
#[derive(Debug, Clone, Copy)]
struct Keys {
    add: u64,
    multiply: u64,
}

impl Keys {
    fn random() -> Self {
        let state = RandomState::new();
        Self { add: state.hash_one(0), multiply: state.hash_one(1) | 1 }
    }

    /// A product of 128 bits, folded (wyhash, Wang Yi 2019).
    fn mix(&self, word: u64) -> u64 {
        let product = u128::from(word ^ self.add) * u128::from(self.multiply);
        (product >> 64) as u64 ^ product as u64
    }
}

impl BuildHasher for Keys {
    type Hasher = PlaceHasher;

    fn build_hasher(&self) -> PlaceHasher {
        PlaceHasher { keys: *self, hash: 0 }
    }
}

/// The hash of one place.
#[derive(Debug)]
struct PlaceHasher {
    keys: Keys,
    hash: u64,
}

impl Hasher for PlaceHasher {
    fn finish(&self) -> u64 {
        self.hash
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.hash = self.keys.mix(self.hash ^ word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;

    #[test]
    fn a_copy_is_met_once_and_again_if_it_is_to_be_something_else() {
        let mut known = Known::default();
        let link = Link { pack: 1, unit: 32, length: 4096, codec: Codec::Raw, born: 0, crc: 7 };
        let others = [
            (Link { crc: 8, ..link }, Hash([1; 16])),
            (Link { born: 9, ..link }, Hash([1; 16])),
            (Link { length: 4095, ..link }, Hash([1; 16])),
            (Link { codec: Codec::Lz4, ..link }, Hash([1; 16])),
            (link, Hash([2; 16])),
            (link, Hash([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2])),
        ];
        assert!(known.insert(&link, Hash([1; 16])));
        assert!(!known.insert(&link, Hash([1; 16])));
        for (other, hash) in others {
            assert!(known.insert(&other, hash), "{other:?}");
            assert!(known.insert(&link, Hash([1; 16])));
        }
        assert!(known.insert(&Link { unit: 64, ..link }, Hash([1; 16])));
        assert!(known.insert(&Link { pack: 2, ..link }, Hash([1; 16])));
    }
}
