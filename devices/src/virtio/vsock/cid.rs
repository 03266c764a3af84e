//! The address of a guest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A context identifier that a guest may have: 0 to 2 are the hypervisor's, the loopback's and the host's, and so is the highest (virtio 1.2,
/// section 5.10.4).
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(try_from = "u64", into = "u64")]
pub struct Cid(u64);

/// A number that is no guest's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a guest's CID: take a number from 3 to 4294967294")]
pub struct CidError(String);

impl Cid {
    /// The host's.
    pub(super) const HOST: u64 = 2;

    /// The address `cid`.
    ///
    /// # Errors
    /// [`CidError`].
    pub fn new(cid: u64) -> Result<Self, CidError> {
        if (3..u64::from(u32::MAX)).contains(&cid) { Ok(Self(cid)) } else { Err(CidError(cid.to_string())) }
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for Cid {
    type Error = CidError;

    fn try_from(cid: u64) -> Result<Self, CidError> {
        Self::new(cid)
    }
}

impl From<Cid> for u64 {
    fn from(cid: Cid) -> Self {
        cid.0
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Cid {
    type Err = CidError;

    fn from_str(text: &str) -> Result<Self, CidError> {
        text.parse().ok().and_then(|cid| Self::new(cid).ok()).ok_or_else(|| CidError(text.to_owned()))
    }
}
