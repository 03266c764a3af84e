//! A source of randomness (virtio 1.2, section 5.4).
//!
//! It has no state, and must have none: what a guest gets after a resume, a rollback or a fork is drawn then.

#[cfg(test)]
mod tests;

use std::io;

use virtio_queue::Writer;

use super::device::{VirtioDevice, VirtioKind};
use super::fault::Fault;
use super::ring::{Chain, Ring};
use super::state::VirtioState;
use crate::state::StateError;

const DEVICE: &str = "virtio-rng";
const QUEUES: [u16; 1] = [64];
/// The most bytes that one request gets: Linux asks for 64 at most, and a guest that offers gigabytes is not to hold us up.
const REQUEST_MAX: usize = 4096;

/// Where random bytes come from; implemented by the VMM.
pub trait Entropy: Send {
    /// Fills `bytes` with random numbers fit for keys.
    ///
    /// # Errors
    /// As the system says.
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// The device.
pub struct Rng {
    entropy: Box<dyn Entropy>,
}

impl Rng {
    /// A device that hands out what `entropy` gives.
    #[must_use]
    pub fn new(entropy: Box<dyn Entropy>) -> Self {
        Self { entropy }
    }

    /// Fills what it can of a request's buffers; how many bytes that were.
    fn answer(&mut self, chain: Chain) -> Result<u32, Fault> {
        let memory = chain.memory().clone();
        let mut writer: Writer<'_, _> = match chain.writer(&memory) {
            Ok(writer) => writer,
            // Buffers that are nowhere: the request is done, with nothing in it.
            Err(_) => return Ok(0),
        };
        let mut bytes = [0; REQUEST_MAX];
        let room = writer.available_bytes().min(REQUEST_MAX);
        let Some(bytes) = bytes.get_mut(..room) else { return Ok(0) };
        self.entropy.fill(bytes).map_err(|source| Fault::Host { doing: "get random numbers", source })?;
        let written = io::Write::write(&mut writer, bytes).unwrap_or(0);
        Ok(u32::try_from(written).unwrap_or(0))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, _: u64) {}

    fn reset(&mut self) {}

    fn notified(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        let Some(ring) = rings.first_mut() else { return Ok(()) };
        ring.drain(|ring, chain| {
            let head = chain.head_index();
            let written = self.answer(chain)?;
            ring.complete(head, written)
        })?;
        ring.signal()
    }

    fn save(&self) -> VirtioState {
        let Self { entropy: _ } = self;
        VirtioState::Rng
    }

    fn restore(&mut self, state: &VirtioState, _: u64) -> Result<(), StateError> {
        match state {
            VirtioState::Rng => Ok(()),
            other => Err(StateError::wrong_virtio_device(DEVICE, other)),
        }
    }
}
