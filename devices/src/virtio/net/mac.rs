//! The address of a network card.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac([u8; 6]);

/// Text or bytes that are no card's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a card's MAC address: write six bytes as in 02:00:5e:10:00:01, the first of them even")]
pub struct MacError(String);

impl Mac {
    /// The address of these bytes.
    ///
    /// # Errors
    /// [`MacError`]: a group's address, or none.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        let is_group = bytes.first().is_some_and(|first| first & 1 != 0);
        if is_group || bytes == [0; 6] { Err(MacError(text(bytes))) } else { Ok(Self(bytes)) }
    }

    /// An address that nobody assigned to a product, made of 48 bits of `seed`: the two lowest bits of its first byte say that it is
    /// local and one card's (IEEE 802, clause 8.4).
    #[must_use]
    pub fn local(seed: [u8; 6]) -> Self {
        let [first, rest @ ..] = seed;
        let [second, third, fourth, fifth, sixth] = rest;
        Self([first & !1 | 2, second, third, fourth, fifth, sixth])
    }

    /// Its six bytes, as they are sent.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

fn text(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text(self.0))
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(written: &str) -> Result<Self, MacError> {
        let error = || MacError(written.to_owned());
        let byte = |part: &str| {
            let is_hex = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            is_hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = written.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(error)?;
        Self::new(bytes).map_err(|_| error())
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_written_as_it_was_read() {
        assert_eq!("02:00:5E:10:00:01".parse::<Mac>().unwrap().to_string(), "02:00:5e:10:00:01");
    }

    #[test]
    fn what_is_no_cards_address_is_refused() {
        for text in
            ["", "02:00:5e:10:00", "02:00:5e:10:00:01:02", "2:0:5e:10:0:1", "+2:00:5e:10:00:01", "zz:00:5e:10:00:01"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert!("01:00:5e:00:00:01".parse::<Mac>().is_err(), "a group's");
        assert!("00:00:00:00:00:00".parse::<Mac>().is_err(), "nobody's");
    }

    #[test]
    fn a_made_up_address_is_local_and_one_cards() {
        for seed in [[0; 6], [0xff; 6]] {
            let [first, ..] = Mac::local(seed).bytes();
            assert_eq!(first & 3, 2);
        }
    }
}
