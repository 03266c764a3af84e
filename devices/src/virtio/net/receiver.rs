//! Frames from the host to the driver's buffers.

use std::io;

use super::link::Link;
use super::{FRAME_MAX, HEADER};
use crate::virtio::buffers::{self, PIECES_MAX, Posted};
use crate::virtio::fault::Fault;
use crate::virtio::ring::Ring;

/// Where `num_buffers` lies in a frame's header.
const NUM_BUFFERS: usize = 10;

/// What there is to be received, and where to.
///
/// A frame's length is known when it is there. So it is read straight into the driver's buffers, and what they have no room for into memory of our
/// own. That memory is kept: a driver that is behind has few buffers, and 64 KiB cleared for each attempt would cost more than the frame.
///
/// Where the driver merges buffers, room for the largest is some 40 of them, and each is work for us and for the host even if nothing goes there.
/// So a frame is offered the first buffer alone while frames fit in that; of one that does not, the rest is copied, and the next is offered all.
#[derive(Default)]
pub(super) struct Receiver {
    /// Buffers that were taken from the ring; put back at a freeze.
    posted: Posted,
    /// The last frame did not fit in the first buffer.
    is_large: bool,
    /// Where the rest of a frame goes; empty until there is one to be received.
    rest: Vec<u8>,
    /// A frame for which the buffers do not suffice.
    waiting: Option<Vec<u8>>,
    /// The host may have frames.
    pub(super) may_be_ready: bool,
}

impl Receiver {
    /// Receives up to `budget` frames. Whether there may be more that can be received now.
    pub(super) fn work(&mut self, link: &mut Link, ring: &mut Ring, merge: bool, budget: usize) -> Result<bool, Fault> {
        for _ in 0..budget {
            if let Some(frame) = self.waiting.take() {
                if !self.place(ring, merge, &frame)? {
                    self.waiting = Some(frame);
                    return Ok(false);
                }
                continue;
            }
            if !self.may_be_ready || !self.provide(ring, merge, 1)? {
                return Ok(false);
            }
            match self.receive(link, ring, merge) {
                Ok(delivered) => delivered?,
                Err(error) => self.may_be_ready = link.goes_on_after("receive", &error),
            }
        }
        Ok(true)
    }

    /// Receives one frame.
    fn receive(&mut self, link: &mut Link, ring: &mut Ring, merge: bool) -> io::Result<Result<(), Fault>> {
        let memory = ring.memory().clone();
        let (first, room) = (self.posted.first_room().min(FRAME_MAX), self.room(merge));
        let offered = if self.is_large { room.min(FRAME_MAX) } else { first };
        // Where a buffer lies outside of the memory, all goes to memory of our own.
        let pieces = buffers::pieces(&memory, self.posted.segments(), offered);
        let (pieces, offered) = pieces.map_or((Vec::new(), 0), |pieces| (pieces, offered));
        self.rest.resize(FRAME_MAX, 0);
        let length = link.tap.receive(&pieces, self.rest.get_mut(offered..).unwrap_or_default())?;
        self.is_large = length > first;
        if length <= room {
            return Ok(self.deliver_with_rest(ring, offered, length));
        }
        // It waits for more buffers. What is no frame is gone.
        self.waiting = (length >= HEADER).then(|| {
            let mut frame = Vec::with_capacity(length);
            for piece in &pieces {
                let start = frame.len();
                frame.resize(start + piece.len(), 0);
                piece.copy_to(frame.get_mut(start..).unwrap_or_default());
            }
            frame.extend_from_slice(self.rest.get(offered..length).unwrap_or_default());
            frame
        });
        Ok(Ok(()))
    }

    /// Copies `frame` to the driver's buffers. Whether it is done with: a frame that can never have room is dropped.
    fn place(&mut self, ring: &mut Ring, merge: bool, frame: &[u8]) -> Result<bool, Fault> {
        if !self.provide(ring, merge, frame.len())? {
            // All that the driver can offer is not enough.
            let never = !merge && self.posted.len() > 0 || self.posted.len() >= ring.size().into();
            return Ok(never);
        }
        let memory = ring.memory().clone();
        if buffers::scatter(&memory, self.posted.segments(), 0, frame) < frame.len() {
            // A buffer outside of the memory: the driver gets it back, empty, and the frame is lost.
            self.give_back(ring)?;
            return Ok(true);
        }
        self.deliver(ring, frame.len())?;
        Ok(true)
    }

    /// Hands over a frame of `length` bytes, of which the first `offered` lie in the first buffers, and the others in our own memory.
    fn deliver_with_rest(&mut self, ring: &mut Ring, offered: usize, length: usize) -> Result<(), Fault> {
        let rest = self.rest.get(offered..length).unwrap_or_default();
        if buffers::scatter(ring.memory(), self.posted.segments(), offered, rest) < rest.len() {
            // A buffer outside of the memory, as above.
            return self.give_back(ring);
        }
        self.deliver(ring, length)
    }

    /// Hands over a frame of `length` bytes that lies in the first buffers.
    fn deliver(&mut self, ring: &mut Ring, length: usize) -> Result<(), Fault> {
        if length < HEADER || length > self.posted.room() {
            return Ok(());
        }
        let (used, memory) = (self.posted.first(length), ring.memory().clone());
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        buffers::scatter(&memory, self.posted.segments(), NUM_BUFFERS, &count.to_le_bytes());
        for _ in &used {
            self.posted.pop();
        }
        ring.complete_together(&used)
    }

    /// The first buffer goes back to the driver, empty.
    fn give_back(&mut self, ring: &mut Ring) -> Result<(), Fault> {
        self.posted.pop().map_or(Ok(()), |head| ring.complete(head, 0))
    }

    /// Takes buffers from the ring: with `merge` as many as the largest frame needs, else one. Whether `needed` bytes have room now; if
    /// not, the driver will tell of more.
    fn provide(&mut self, ring: &mut Ring, merge: bool, needed: usize) -> Result<bool, Fault> {
        loop {
            if self.wants_more(merge) {
                ring.pop_while(|head, descriptors| {
                    self.posted.push(head, descriptors, FRAME_MAX);
                    self.wants_more(merge)
                })?;
            }
            if self.room(merge) >= needed {
                return Ok(true);
            }
            if !merge && self.posted.len() > 0 && self.posted.room() == 0 {
                // Or it would stand in the way for ever.
                self.give_back(ring)?;
                continue;
            }
            if !self.wants_more(merge) || !ring.listen()? {
                return Ok(false);
            }
        }
    }

    /// How many bytes of a frame have room now.
    fn room(&self, merge: bool) -> usize {
        if merge { self.posted.room() } else { self.posted.first_room() }
    }

    fn wants_more(&self, merge: bool) -> bool {
        if merge { self.posted.room() < FRAME_MAX && self.posted.len() < PIECES_MAX } else { self.posted.len() == 0 }
    }

    /// Puts the buffers back into the ring: what was taken and not used is as if it had not been taken.
    pub(super) fn put_back(&mut self, ring: &mut Ring) {
        (0..self.posted.clear()).for_each(|_| ring.put_back());
    }

    /// Forgets the driver and what was to go to it.
    pub(super) fn reset(&mut self) {
        let Self { posted, is_large, rest: _, waiting, may_be_ready: _ } = self;
        posted.clear();
        *is_large = false;
        *waiting = None;
    }
}
