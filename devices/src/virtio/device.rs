//! What is behind a virtio transport.

use std::time::Instant;

use super::fault::Fault;
use super::ring::Ring;
use super::state::VirtioState;
use crate::state::StateError;

/// Which device it is (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum VirtioKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Source of randomness.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Sockets between guest and host.
    Vsock = 19,
    /// Persistent memory.
    Pmem = 27,
}

/// A virtio device without its transport.
///
/// It never waits, but in [`VirtioDevice::quiesce`] and [`VirtioDevice::reset`]. `rings` has one [`Ring`] for each of
/// [`VirtioDevice::queue_sizes`]; all come from the guest.
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn kind(&self) -> VirtioKind;

    /// The features that it offers, without those of the transport.
    fn features(&self) -> u64;

    /// The most entries of each of its queues, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration. `data` is zeros; what is beyond the configuration stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration; most have nothing to write.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Whether its configuration changed by itself since the last call: the driver is told then.
    fn take_configuration_change(&mut self) -> bool {
        false
    }

    /// The driver is set up, and uses these features of those offered.
    fn activate(&mut self, features: u64);

    /// Back to the beginning. When it returns nothing accesses the guest's memory any more.
    fn reset(&mut self);

    /// Queue `queue` may have new requests.
    ///
    /// # Errors
    /// [`Fault`].
    fn notified(&mut self, queue: usize, rings: &mut [Ring]) -> Result<(), Fault>;

    /// Source `source` of the host, of those that the VMM listens to for it, may be ready. Told once for each change: the device
    /// works through all that there is, or remembers.
    ///
    /// # Errors
    /// [`Fault`].
    fn ready(&mut self, source: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        let _ = (source, rings);
        Ok(())
    }

    /// The vCPUs stand. Completes what is in flight until `deadline`, or sees to it that [`VirtioDevice::save`] records it. When
    /// it returns nothing accesses the guest's memory any more.
    ///
    /// # Errors
    /// [`Fault::Busy`]: not in time; the machine cannot be frozen now.
    fn quiesce(&mut self, rings: &mut [Ring], deadline: Instant) -> Result<(), Fault> {
        let _ = (rings, deadline);
        Ok(())
    }

    /// All that is volatile of it.
    fn save(&self) -> VirtioState;

    /// Takes over `state`, which is untrusted; `features` are those that the driver uses. No side effects.
    ///
    /// # Errors
    /// [`StateError`]; it is as it was then.
    fn restore(&mut self, state: &VirtioState, features: u64) -> Result<(), StateError>;

    /// The machine is about to run again, after [`VirtioDevice::quiesce`] or [`VirtioDevice::restore`]: takes up what was
    /// recorded. Every queue is notified and every source ready after this.
    ///
    /// # Errors
    /// [`Fault`].
    fn thaw(&mut self, rings: &mut [Ring]) -> Result<(), Fault> {
        let _ = rings;
        Ok(())
    }

    /// How many sources of the host there are.
    fn sources(&self) -> usize {
        0
    }
}

/// Reads `data.len()` bytes at `offset` of `config`, a device's configuration as it lies in its registers.
pub(super) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}
