//! A virtio device, frozen: its transport, its queues, and what it is itself.

use serde::{Deserialize, Serialize};

pub use super::balloon::BalloonStateV1;
pub use super::block::state::BlockStateV1;
pub use super::console::ConsoleStateV1;
pub use super::net::NetStateV1;
pub use super::pmem::PmemStateV1;
use super::queue_state::QueueStateV1;
pub use super::vsock::VsockStateV1;

/// The MMIO transport and the device behind it, version 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct VirtioMmioStateV1 {
    /// `Status`.
    pub status: u8,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// `DriverFeatures`, both halves.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// Each queue.
    pub queues: Vec<QueueStateV1>,
    /// The device itself. (`device` is the name of the tag that says which layout all of this has.)
    #[serde(rename = "behind")]
    pub device: VirtioState,
}

/// What is volatile of a virtio device itself. Layouts are never changed, only added to.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(tag = "kind")]
pub enum VirtioState {
    /// The source of randomness has none.
    #[serde(rename = "rng-v1")]
    Rng,
    /// A network card.
    #[serde(rename = "net-v1")]
    Net(NetStateV1),
    /// Sockets between guest and host.
    #[serde(rename = "vsock-v1")]
    Vsock(VsockStateV1),
    /// A memory balloon.
    #[serde(rename = "balloon-v1")]
    Balloon(BalloonStateV1),
    /// A disk.
    #[serde(rename = "block-v1")]
    Block(BlockStateV1),
    /// A console.
    #[serde(rename = "console-v1")]
    Console(ConsoleStateV1),
    /// Persistent memory.
    #[serde(rename = "pmem-v1")]
    Pmem(PmemStateV1),
}

impl VirtioState {
    /// The kind of device that this is the state of.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Rng => "virtio-rng",
            Self::Net(_) => "virtio-net",
            Self::Vsock(_) => "virtio-vsock",
            Self::Balloon(_) => "virtio-balloon",
            Self::Block(_) => "virtio-block",
            Self::Console(_) => "virtio-console",
            Self::Pmem(_) => "virtio-pmem",
        }
    }
}
