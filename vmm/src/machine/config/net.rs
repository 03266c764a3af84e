//! A VM's network cards.

use std::fmt;
use std::str::FromStr;

use devices::virtio::Mac;
use serde::{Deserialize, Serialize};

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The host's interface that it is plugged into: a tap, which exists.
    pub tap: String,
    /// Its address; made up from the VM's name when the VM is made, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(with = "Option<super::schema::MacAddress>"))]
    pub mac: Option<Mac>,
}

/// A description of a card that cannot be read, or of one that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetConfigError {
    /// Neither.
    #[error("--net '{0}': write tap=NAME, or tap=NAME,mac=02:00:5e:10:00:01")]
    Form(String),
    /// No name of an interface.
    #[error("--net tap={0}: an interface's name has from 1 to 15 bytes, none of them a blank or a slash")]
    Tap(String),
    /// No address.
    #[error("--net: {0}")]
    Mac(#[from] devices::virtio::net::MacError),
    /// The same twice.
    #[error("--net {0}: two cards of a VM have the same")]
    Twice(String),
}

/// As many cards as make sense beside other devices.
pub const MAX_CARDS: usize = 8;

impl NetConfig {
    /// Checks a VM's cards.
    ///
    /// # Errors
    /// [`NetConfigError`].
    pub fn validate(cards: &[Self]) -> Result<(), NetConfigError> {
        for (index, card) in cards.iter().enumerate() {
            let bad = |byte: u8| byte.is_ascii_whitespace() || byte == b'/' || byte == 0;
            // As the kernel has it (dev_valid_name).
            if !(1..=15).contains(&card.tap.len()) || card.tap.bytes().any(bad) || [".", ".."].contains(&&*card.tap) {
                return Err(NetConfigError::Tap(card.tap.clone()));
            }
            let others = cards.iter().take(index);
            if let Some(other) = others.clone().find(|other| other.tap == card.tap) {
                return Err(NetConfigError::Twice(format!("tap={}", other.tap)));
            }
            if let Some(mac) = card.mac.filter(|mac| others.clone().any(|other| other.mac == Some(*mac))) {
                return Err(NetConfigError::Twice(format!("mac={mac}")));
            }
        }
        Ok(())
    }

    /// The address of card `number` of the VM `name`, always the same: local to whoever has VMs of that name.
    #[must_use]
    pub fn made_up_mac(name: &str, number: usize) -> Mac {
        let hash = blake3::hash(format!("perdure network card {number} of {name}").as_bytes());
        let [first, second, third, fourth, fifth, sixth, ..] = *hash.as_bytes();
        Mac::local([first, second, third, fourth, fifth, sixth])
    }

    /// Gives each of `cards` of the VM `name` an address that has none.
    pub fn complete(cards: &mut [Self], name: &str) {
        for (number, card) in cards.iter_mut().enumerate() {
            card.mac.get_or_insert_with(|| Self::made_up_mac(name, number));
        }
    }
}

impl FromStr for NetConfig {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, NetConfigError> {
        let form = || NetConfigError::Form(text.to_owned());
        let (mut tap, mut mac) = (None, None);
        for part in text.split(',') {
            match part.split_once('=').ok_or_else(form)? {
                ("tap", name) if tap.is_none() => tap = Some(name.to_owned()),
                ("mac", address) if mac.is_none() => mac = Some(address.parse()?),
                _ => return Err(form()),
            }
        }
        let card = Self { tap: tap.ok_or_else(form)?, mac };
        Self::validate(std::slice::from_ref(&card))?;
        Ok(card)
    }
}

impl fmt::Display for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tap={}", self.tap)?;
        self.mac.map_or(Ok(()), |mac| write!(f, ",mac={mac}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_read_and_written_back() {
        for text in ["tap=vm0", "tap=vm0,mac=02:00:5e:10:00:01"] {
            assert_eq!(text.parse::<NetConfig>().unwrap().to_string(), text);
        }
        assert_eq!("mac=02:00:5e:10:00:01,tap=x".parse::<NetConfig>().unwrap().tap, "x");
    }

    #[test]
    fn what_is_no_card_is_refused_with_its_reason() {
        for (text, reason) in [
            ("vm0", "write tap=NAME"),
            ("mac=02:00:5e:10:00:01", "write tap=NAME"),
            ("tap=a,tap=b", "write tap=NAME"),
            ("tap=vm0,mtu=9000", "write tap=NAME"),
            ("tap=", "1 to 15"),
            ("tap=sixteen-bytes-it", "1 to 15"),
            ("tap=../x", "slash"),
            ("tap=a b", "blank"),
            ("tap=..", "1 to 15"),
            ("tap=vm0,mac=03:00:5e:10:00:01", "MAC"),
        ] {
            let error = text.parse::<NetConfig>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn two_cards_do_not_share_a_tap_or_an_address() {
        let card = |text: &str| text.parse::<NetConfig>().unwrap();
        let (one, other) = ("tap=a,mac=02:00:5e:10:00:01", "tap=b,mac=02:00:5e:10:00:01");
        assert!(NetConfig::validate(&[card("tap=a"), card("tap=a")]).is_err());
        assert!(NetConfig::validate(&[card(one), card(other)]).is_err());
        assert!(NetConfig::validate(&[card(one), card("tap=b")]).is_ok());
    }

    #[test]
    fn a_made_up_address_is_the_same_always_and_another_for_each_card() {
        let mac = NetConfig::made_up_mac("web", 0);
        assert_eq!(mac.to_string(), NetConfig::made_up_mac("web", 0).to_string());
        assert_ne!(mac, NetConfig::made_up_mac("web", 1));
        assert_ne!(mac, NetConfig::made_up_mac("db", 0));
    }
}
