//! A network card (virtio 1.2, section 5.1) in front of a tap.
//!
//! ```text
//!   driver                                                            host
//!   rx ring ◄──── Receiver ◄─── buffers filled by one readv ◄─────── Tap
//!   tx ring ────► Transmitter ─ buffers sent by one writev ─────────► Tap
//!   control ────► "announced"        offloads: what the driver takes
//! ```
//!
//! One pair of queues and a control queue. Checksums and TCP segmentation are left to the host in both directions where the driver wants it; the
//! header in front of each frame goes through as it is, and the kernel checks it. Where the driver merges receive buffers, a frame fills
//! as many as it needs.
//!
//! # After an outage
//!
//! Frames on their way are lost, as networks lose frames. The network has to learn where the card is now: a driver that can
//! (`GUEST_ANNOUNCE`) is asked for it, and sends gratuitous ARPs for all its addresses; for one that cannot, the card
//! sends a reverse ARP request in its name.

mod announcement;
mod control;
mod link;
mod mac;
mod receiver;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod transmitter;

use std::time::Instant;

pub use mac::{Mac, MacError};
pub use state::NetStateV1;
pub use tap::{Offloads, Tap};

use super::device::{VirtioDevice, VirtioKind, read_bytes};
use super::fault::Fault;
use super::ring::Ring;
use super::state::VirtioState;
use crate::state::StateError;
use link::Link;
use receiver::Receiver;
use transmitter::Transmitter;

const DEVICE: &str = "virtio-net";
/// Receive, transmit, control.
const QUEUES: [u16; 3] = [256, 256, 64];
/// `virtio_net_hdr` of virtio 1: always with `num_buffers`.
pub const HEADER: usize = 12;
/// The longest frame: a header, and what a segment of 64 KiB comes to with its Ethernet header (section 5.1.6.3.1).
pub const FRAME_MAX: usize = HEADER + 65550;
/// Frames in one direction before the other has its turn, and before the driver is told.
const BUDGET: usize = 64;

/// Feature bits (section 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(super) const ALL: u64 = CSUM
        | GUEST_CSUM
        | MAC
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS
        | CTRL_VQ
        | GUEST_ANNOUNCE;
}

/// `status` of the configuration.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 1 << 1;

/// The card.
pub struct Net {
    mac: Mac,
    link: Link,
    receiver: Receiver,
    transmitter: Transmitter,
    /// What the driver uses.
    features: u64,
    /// The driver is asked to announce itself.
    announce: bool,
    /// The machine comes from a saved state and has not run since.
    restored: bool,
    configuration_changed: bool,
}

impl Net {
    /// A card with the address `mac` on `tap`. It has one source: the tap, which becomes ready when frames have come or can be sent again.
    #[must_use]
    pub fn new(mac: Mac, tap: Box<dyn Tap>) -> Self {
        Self {
            mac,
            link: Link::new(tap),
            receiver: Receiver::default(),
            transmitter: Transmitter::default(),
            features: 0,
            announce: false,
            restored: false,
            configuration_changed: false,
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// Works through both rings, in turns.
    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Fault> {
        let [receive, transmit, ..] = rings else { return Ok(()) };
        let merge = self.has(feature::MRG_RXBUF);
        loop {
            let sent = self.transmitter.work(&mut self.link, transmit, BUDGET)?;
            let received = self.receiver.work(&mut self.link, receive, merge, BUDGET)?;
            transmit.signal()?;
            receive.signal()?;
            if !sent && !received {
                return Ok(());
            }
        }
    }

    /// Tells the tap what the driver takes.
    fn set_offloads(&mut self) {
        let offloads = Offloads {
            checksum: self.has(feature::GUEST_CSUM),
            tcp4: self.has(feature::GUEST_TSO4),
            tcp6: self.has(feature::GUEST_TSO6),
            ecn: self.has(feature::GUEST_ECN),
        };
        if let Err(error) = self.link.tap.set_offloads(offloads) {
            tracing::warn!(
                "the tap does not take {offloads:?}: {error}; frames may not reach the guest as it wants them"
            );
        }
    }

    /// Lets the network learn where the card is.
    fn announce(&mut self) {
        if self.has(feature::GUEST_ANNOUNCE | feature::CTRL_VQ | feature::STATUS) {
            self.announce = true;
            self.configuration_changed = true;
        } else if let Err(error) = self.link.tap.send_from(&announcement::announcement(self.mac)) {
            self.link.goes_on_after("send", &error);
        }
    }

    fn configuration(&self) -> [u8; 8] {
        let [a, b, c, d, e, f] = self.mac.bytes();
        let [low, high] = (LINK_UP | if self.announce { ANNOUNCE } else { 0 }).to_le_bytes();
        [a, b, c, d, e, f, low, high]
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Net
    }

    fn features(&self) -> u64 {
        feature::ALL
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.configuration(), offset, data);
    }

    fn take_configuration_change(&mut self) -> bool {
        std::mem::take(&mut self.configuration_changed)
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.restored = false;
        self.receiver.may_be_ready = true;
        self.set_offloads();
    }

    fn reset(&mut self) {
        let Self { mac: _, link: _, receiver, transmitter, features, announce, restored, configuration_changed } = self;
        receiver.reset();
        *transmitter = Transmitter::default();
        *features = 0;
        *announce = false;
        *restored = false;
        *configuration_changed = false;
        self.set_offloads();
    }

    fn notified(&mut self, queue: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        if let (2, Some(control)) = (queue, rings.get_mut(2)) {
            if control::answer(control)? {
                self.announce = false;
            }
            return Ok(());
        }
        self.serve(rings)
    }

    fn ready(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        self.receiver.may_be_ready = true;
        self.transmitter.is_blocked = false;
        self.serve(rings)
    }

    fn sources(&self) -> usize {
        1
    }

    fn quiesce(&mut self, rings: &mut [Ring], _: Instant) -> Result<(), Fault> {
        if let Some(receive) = rings.first_mut() {
            self.receiver.put_back(receive);
        }
        Ok(())
    }

    fn save(&self) -> VirtioState {
        let Self {
            mac,
            link: _,
            receiver: _,
            transmitter: _,
            // The transport's to save.
            features: _,
            announce,
            // Resuming sets it.
            restored: _,
            // The transport has raised it.
            configuration_changed: _,
        } = self;
        VirtioState::Net(NetStateV1 { mac: *mac, announce: *announce })
    }

    fn restore(&mut self, state: &VirtioState, features: u64) -> Result<(), StateError> {
        let VirtioState::Net(state) = state else { return Err(StateError::wrong_virtio_device(DEVICE, state)) };
        state.validate(features)?;
        let NetStateV1 { mac, announce } = state;
        self.receiver.reset();
        self.transmitter = Transmitter::default();
        self.mac = *mac;
        self.features = features;
        self.announce = *announce;
        self.restored = true;
        self.configuration_changed = false;
        Ok(())
    }

    fn thaw(&mut self, _: &mut [Ring]) -> Result<(), Fault> {
        if std::mem::take(&mut self.restored) {
            self.set_offloads();
            self.announce();
        }
        Ok(())
    }
}
