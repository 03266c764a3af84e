//! A network card, frozen.

use serde::{Deserialize, Serialize};

use super::{DEVICE, Mac, feature};
use crate::state::{StateError, ensure};

/// Version 1. Frames on their way are not part of it: a network may lose them, and whoever needs them sends them again.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct NetStateV1 {
    /// The card's address, which the driver has read.
    pub mac: Mac,
    /// Whether the driver has been asked to announce itself and has not yet said that it did.
    pub announce: bool,
}

impl NetStateV1 {
    /// Whether a run of the device can have led here, with `features` of the driver.
    pub(super) fn validate(&self, features: u64) -> Result<(), StateError> {
        let Self { mac: _, announce } = self;
        ensure(!announce || features & feature::GUEST_ANNOUNCE != 0, DEVICE, "announce", || {
            "set, and the driver does not announce itself".to_owned()
        })
    }
}
