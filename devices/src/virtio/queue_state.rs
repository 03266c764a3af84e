//! A virtqueue, frozen.

use serde::{Deserialize, Serialize};
use virtio_queue::{Error, Queue, QueueState};

/// Version 1.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct QueueStateV1 {
    /// The most entries that the device offers.
    pub max_size: u16,
    /// The entries that the driver chose.
    pub size: u16,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Whether `VIRTIO_F_EVENT_IDX` counts.
    pub event_idx: bool,
    /// The next entry of the available ring to be taken.
    pub next_avail: u16,
    /// The next entry of the used ring to be filled.
    pub next_used: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
}

impl QueueStateV1 {
    /// What `queue` is now.
    #[must_use]
    pub fn of(queue: &Queue) -> Self {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = queue.state();
        Self {
            max_size,
            size,
            ready,
            event_idx: event_idx_enabled,
            next_avail,
            next_used,
            descriptors: desc_table,
            available: avail_ring,
            used: used_ring,
        }
    }
}

impl TryFrom<QueueStateV1> for Queue {
    type Error = Error;

    fn try_from(state: QueueStateV1) -> Result<Self, Error> {
        let QueueStateV1 { max_size, size, ready, event_idx, next_avail, next_used, descriptors, available, used } =
            state;
        let state = QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready,
            desc_table: descriptors,
            avail_ring: available,
            used_ring: used,
        };
        state.try_into()
    }
}
