//! A memory balloon (virtio 1.2, section 5.5): what the guest does not need need not be kept.
//!
//! ```text
//!   driver                                                             host
//!   "these pages are in the balloon" ──► inflate ──┐
//!   "these pages are free just now" ───► reporting ─┴─ ranges ───────► Reclaim
//!   "these I take back" ───────────────► deflate    (nothing to do: they are there when they are touched)
//!   size wished, size reached ◄──────── configuration ◄─────────────── BalloonSize
//! ```
//!
//! The content of a page that the guest gives away is lost: from then on it reads as zeros or as it was, as the host likes. The guest
//! takes pages back without asking (`MUST_TELL_HOST` is not offered), also when it runs out of memory.

mod size;
mod state;
#[cfg(test)]
mod tests;

use vm_memory::{GuestAddress, GuestMemoryBackend};

pub use size::{BalloonSize, PAGE};
pub use state::BalloonStateV1;

use super::buffers::{self, Segment};
use super::device::{VirtioDevice, VirtioKind, read_bytes};
use super::fault::Fault;
use super::memory::GuestMemory;
use super::ring::{Chain, Ring};
use super::state::VirtioState;
use crate::state::StateError;

const DEVICE: &str = "virtio-balloon";
/// Inflate, deflate, free page reporting. There are queues for statistics and hints only where their features are offered, and drivers
/// count without them.
const QUEUES: [u16; 3] = [128, 128, 128];
const INFLATE: usize = 0;
const REPORTING: usize = 2;
/// The most page numbers of one request that are looked at: Linux sends 256.
const NUMBERS_MAX: usize = 16 << 10;

/// Feature bits (section 5.5.3).
mod feature {
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
    pub(super) const ALL: u64 = DEFLATE_ON_OOM | PAGE_REPORTING;
}

/// Whoever keeps the guest's memory; implemented by the VMM.
pub trait Reclaim: Send {
    /// The guest needs nothing of what lies in `length` bytes from `start` on, whole pages of its memory. When it returns, they may be used
    /// again.
    fn reclaim(&mut self, start: GuestAddress, length: u64);
}

/// The balloon.
pub struct Balloon {
    size: BalloonSize,
    reclaim: Box<dyn Reclaim>,
    /// The target of which the driver was told.
    told: Option<u32>,
    configuration_changed: bool,
}

impl Balloon {
    /// A balloon of `size`, what is in it goes to `reclaim`. It has one source: a new target.
    #[must_use]
    pub fn new(size: BalloonSize, reclaim: Box<dyn Reclaim>) -> Self {
        Self { size, reclaim, told: None, configuration_changed: false }
    }

    fn configuration(&self) -> [u8; 8] {
        let pages = u64::from(self.size.target_pages()) | u64::from(self.size.actual_pages()) << 32;
        pages.to_le_bytes()
    }

    /// Gives away the pages of a request to inflate the balloon.
    fn inflate(&mut self, memory: &GuestMemory, chain: Chain) {
        let mut numbers = page_numbers(memory, chain);
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|number, next| number.checked_add(1) == Some(*next)) {
            let Some(first) = run.first() else { continue };
            self.give_away(memory, u64::from(*first) * PAGE, run.len() as u64 * PAGE);
        }
    }

    /// Gives away free pages: they are themselves the buffers of the request.
    fn report(&mut self, memory: &GuestMemory, chain: Chain) {
        for Segment { address, length } in buffers::writable(chain) {
            let (Some(start), Some(end)) =
                (address.0.checked_next_multiple_of(PAGE), address.0.checked_add(length.into()))
            else {
                continue;
            };
            let end = end / PAGE * PAGE;
            if start < end {
                self.give_away(memory, start, end - start);
            }
        }
    }

    fn give_away(&mut self, memory: &GuestMemory, start: u64, length: u64) {
        // What lies partly elsewhere is a mistake or a lie; nothing is lost by keeping it.
        let start = GuestAddress(start);
        if usize::try_from(length).is_ok_and(|length| memory.check_range(start, length)) {
            self.reclaim.reclaim(start, length);
        }
    }
}

/// The page numbers of a request, as many as are looked at.
fn page_numbers(memory: &GuestMemory, chain: Chain) -> Vec<u32> {
    let mut numbers = Vec::new();
    let Some(pieces) = buffers::pieces(memory, buffers::readable(chain), 4 * NUMBERS_MAX) else { return numbers };
    for piece in pieces {
        let mut bytes = vec![0; piece.len()];
        piece.copy_to(&mut bytes);
        let (words, _) = bytes.as_chunks();
        numbers.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
    }
    numbers
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Balloon
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

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `actual` alone, any part of it.
        let mut actual = self.size.actual_pages().to_le_bytes();
        for (byte, at) in data.iter().zip(offset..) {
            let index = at.checked_sub(4).and_then(|index| usize::try_from(index).ok());
            if let Some(to) = index.and_then(|index| actual.get_mut(index)) {
                *to = *byte;
            }
        }
        self.size.set_actual_pages(u32::from_le_bytes(actual));
    }

    fn take_configuration_change(&mut self) -> bool {
        std::mem::take(&mut self.configuration_changed)
    }

    fn activate(&mut self, _: u64) {
        // The driver reads the target when it begins.
        self.told = Some(self.size.target_pages());
    }

    fn reset(&mut self) {
        // A driver that is reset has let go of its pages.
        self.size.set_actual_pages(0);
        self.told = None;
        self.configuration_changed = false;
    }

    fn notified(&mut self, queue: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        let Some(ring) = rings.get_mut(queue) else { return Ok(()) };
        let memory = ring.memory().clone();
        ring.drain(|ring, chain| {
            let head = chain.head_index();
            match queue {
                INFLATE => self.inflate(&memory, chain),
                REPORTING => self.report(&memory, chain),
                _ => {}
            }
            ring.complete(head, 0)
        })?;
        ring.signal()
    }

    fn ready(&mut self, _: usize, _: &mut [Ring]) -> Result<(), Fault> {
        let target = Some(self.size.target_pages());
        self.configuration_changed |= std::mem::replace(&mut self.told, target) != target;
        Ok(())
    }

    fn sources(&self) -> usize {
        1
    }

    fn save(&self) -> VirtioState {
        let Self { size, reclaim: _, told: _, configuration_changed: _ } = self;
        VirtioState::Balloon(BalloonStateV1 { target: size.target_pages(), actual: size.actual_pages() })
    }

    fn restore(&mut self, state: &VirtioState, _: u64) -> Result<(), StateError> {
        let VirtioState::Balloon(state) = state else { return Err(StateError::wrong_virtio_device(DEVICE, state)) };
        let BalloonStateV1 { target, actual } = state;
        self.size.set_target_pages(*target);
        self.size.set_actual_pages(*actual);
        // It may not have been told before it was frozen.
        self.told = None;
        Ok(())
    }
}
