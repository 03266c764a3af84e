//! Frames from the driver's buffers to the host.

use std::io::ErrorKind;

use super::link::Link;
use super::{FRAME_MAX, HEADER};
use crate::virtio::buffers;
use crate::virtio::fault::Fault;
use crate::virtio::ring::{Chain, Ring};

/// The shortest frame: an Ethernet header.
const FRAME_MIN: usize = HEADER + 14;

/// What became of a frame.
enum Sent {
    /// The host has it, or nobody does.
    Gone,
    /// The host does not take it now.
    NotYet,
}

/// What keeps frames from being sent.
#[derive(Default)]
pub(super) struct Transmitter {
    /// The host took no more.
    pub(super) is_blocked: bool,
}

impl Transmitter {
    /// Sends up to `budget` frames. Whether there may be more that can be sent now.
    pub(super) fn work(&mut self, link: &mut Link, ring: &mut Ring, budget: usize) -> Result<bool, Fault> {
        for _ in 0..budget {
            if self.is_blocked {
                return Ok(false);
            }
            let Some(chain) = ring.pop()? else {
                if ring.listen()? {
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            match send(link, ring, chain) {
                Sent::Gone => ring.complete(head, 0)?,
                Sent::NotYet => {
                    ring.put_back();
                    self.is_blocked = true;
                }
            }
        }
        Ok(true)
    }
}

/// Sends the frame in `chain`, straight from the driver's buffers. What is none is dropped, as a card drops it.
fn send(link: &mut Link, ring: &Ring, chain: Chain) -> Sent {
    let memory = ring.memory().clone();
    // One byte more than the largest, so that one that is too large shows.
    let Some(pieces) = buffers::pieces(&memory, buffers::readable(chain), FRAME_MAX + 1) else { return Sent::Gone };
    let length: usize = pieces.iter().map(|piece| piece.len()).sum();
    if !(FRAME_MIN..=FRAME_MAX).contains(&length) {
        return Sent::Gone;
    }
    loop {
        match link.tap.send(&pieces) {
            Ok(()) => return Sent::Gone,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Sent::NotYet,
            Err(error) if link.goes_on_after("send", &error) => {}
            Err(_) => return Sent::Gone,
        }
    }
}
