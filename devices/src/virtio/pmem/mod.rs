//! Persistent memory (virtio 1.2, section 5.19): a part of the guest's addresses that is kept, and a queue for its flushes.
//!
//! ```text
//!   guest's loads and stores ─────────────────────────► the memory itself; this device has no part in them
//!   driver: flush ──► requests ──► asked ── begin ────► Durable     one at a time; who comes meanwhile shares the next
//!   driver: answer ◄─────────────────────── done ◄───── (a source of the device)
//! ```
//!
//! A flush makes durable all that was written before it, so doing one twice is as good as once: at a freeze the requests that have no answer go back to
//! where they were in the ring, and are taken up again after it. Nothing waits for a medium, and nothing is in flight in a saved state.

mod state;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

pub use state::PmemStateV1;

use super::buffers::{self, Segment};
use super::device::{VirtioDevice, VirtioKind, read_bytes};
use super::fault::Fault;
use super::memory::GuestMemory;
use super::ring::{Chain, Ring};
use super::state::VirtioState;
use crate::state::StateError;

const DEVICE: &str = "virtio-pmem";
const QUEUES: [u16; 1] = [64];
/// `type` of a request (section 5.19.6).
const FLUSH: u32 = 0;
/// `ret` of an answer.
const OK: u32 = 0;
const IO_ERROR: u32 = 1;
/// Bytes of an answer.
const ANSWER: usize = 4;

/// Where it lies in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmemPlace {
    /// Its guest physical address.
    pub start: u64,
    /// Its bytes.
    pub size: u64,
}

/// Whoever makes it durable; implemented by the VMM.
pub trait Durable: Send {
    /// Begins to make durable all that was written until now. Does not wait: a source of the device becomes ready when [`Durable::done`] has something.
    /// What was begun before and is not done need not be told any more.
    fn begin(&mut self, token: u64);

    /// What was done since the last call, and how it went: the newest that was begun, if it is.
    fn done(&mut self) -> Option<(u64, io::Result<()>)>;
}

/// A flush that the driver waits for.
struct Request {
    head: u16,
    /// Where its answer goes: as many buffers as an answer has bytes are enough.
    answer: Vec<Segment>,
    is_flush: bool,
}

/// The device.
pub struct Pmem {
    place: PmemPlace,
    medium: Box<dyn Durable>,
    /// Without answers, in the order of the ring.
    requests: VecDeque<Request>,
    /// How many of them, from the first on, the medium works for.
    asked: usize,
    /// What the medium was asked last.
    token: u64,
}

impl Pmem {
    /// The flushes of the memory in `place`, which `medium` does. It has one source.
    #[must_use]
    pub fn new(place: PmemPlace, medium: Box<dyn Durable>) -> Self {
        Self { place, medium, requests: VecDeque::new(), asked: 0, token: 0 }
    }

    /// Takes what there is, no more than the ring has room for, and begins if nothing is under way.
    fn serve(&mut self, ring: &mut Ring) -> Result<(), Fault> {
        while self.requests.len() < usize::from(ring.size()) {
            let Some(chain) = ring.pop_or_listen()? else { break };
            let memory = ring.memory().clone();
            self.requests.push_back(read_request(&memory, chain));
        }
        if self.asked == 0 && !self.requests.is_empty() {
            self.asked = self.requests.len();
            self.token = self.token.wrapping_add(1);
            self.medium.begin(self.token);
        }
        Ok(())
    }

    /// Answers those for which the medium has worked.
    fn answer(&mut self, ring: &mut Ring, done: &io::Result<()>) -> Result<(), Fault> {
        if let Err(error) = done {
            tracing::warn!("persistent memory of the guest is not durable: {error}; its flush fails");
        }
        let memory = ring.memory().clone();
        for _ in 0..std::mem::take(&mut self.asked) {
            let Some(Request { head, answer, is_flush }) = self.requests.pop_front() else { break };
            let result = if is_flush && done.is_ok() { OK } else { IO_ERROR };
            let written = buffers::scatter(&memory, answer.into_iter(), 0, &result.to_le_bytes());
            ring.complete(head, u32::try_from(written).unwrap_or(0))?;
        }
        ring.signal()
    }
}

fn read_request(memory: &GuestMemory, chain: Chain) -> Request {
    let head = chain.head_index();
    let answer = buffers::writable(chain.clone()).take(ANSWER).collect();
    let mut kind = [0; 4];
    let mut filled = 0;
    for piece in buffers::pieces(memory, buffers::readable(chain), kind.len()).unwrap_or_default() {
        filled += kind.get_mut(filled..).map_or(0, |rest| piece.copy_to(rest));
    }
    Request { head, answer, is_flush: filled == kind.len() && u32::from_le_bytes(kind) == FLUSH }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let PmemPlace { start, size } = self.place;
        let config = u128::from(start) | u128::from(size) << 64;
        read_bytes(&config.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _: u64) {}

    fn reset(&mut self) {
        // What the medium still works on is nobody's; it reads the memory and writes none of it.
        self.requests.clear();
        self.asked = 0;
    }

    fn notified(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        rings.first_mut().map_or(Ok(()), |ring| self.serve(ring))
    }

    fn ready(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        let Some(ring) = rings.first_mut() else { return Ok(()) };
        if let Some((token, done)) = self.medium.done()
            && token == self.token
            && self.asked > 0
        {
            self.answer(ring, &done)?;
        }
        self.serve(ring)
    }

    fn quiesce(&mut self, rings: &mut [Ring], _: Instant) -> Result<(), Fault> {
        let count = self.requests.len();
        self.reset();
        if let Some(ring) = rings.first_mut() {
            (0..count).for_each(|_| ring.put_back());
        }
        Ok(())
    }

    fn sources(&self) -> usize {
        1
    }

    fn save(&self) -> VirtioState {
        let Self {
            place: PmemPlace { start, size },
            // Of the host.
            medium: _,
            // Back in the ring.
            requests: _,
            asked: _,
            // Only ever compared with what this process was told.
            token: _,
        } = self;
        VirtioState::Pmem(PmemStateV1 { start: *start, size: *size })
    }

    fn restore(&mut self, state: &VirtioState, _: u64) -> Result<(), StateError> {
        let VirtioState::Pmem(state) = state else { return Err(StateError::wrong_virtio_device(DEVICE, state)) };
        state.validate(self.place)?;
        self.reset();
        Ok(())
    }
}
