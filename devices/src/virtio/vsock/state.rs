//! Sockets, frozen.

use serde::{Deserialize, Serialize};

use super::{Cid, DEVICE};
use crate::state::StateError;

/// Version 1. Connections are not part of it: their other ends are programs of the host, which an outage ends.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct VsockStateV1 {
    /// The guest's address, which the driver has read.
    pub cid: u64,
    /// Whether the driver has still to be told that all connections are gone.
    pub transport_reset: bool,
}

impl VsockStateV1 {
    /// Whether a run of the device can have led here; the address.
    pub(super) fn validate(&self) -> Result<Cid, StateError> {
        let Self { cid, transport_reset: _ } = self;
        let why = || format!("{cid}, which is no guest's");
        Cid::new(*cid).map_err(|_| StateError::Invalid { device: DEVICE, field: "cid", why: why() })
    }
}
