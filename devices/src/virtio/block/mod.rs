//! A block device (virtio 1.2, section 5.2): a disk that the guest reads and writes by sectors.
//!
//! ```text
//!   ring ─► Request ─► Work ─► BlockBackend::submit ─► …the host… ─► take_completed ─► status byte, used ring, interrupt
//!           checked          └──────────── InFlight ────────────┘
//! ```
//!
//! Requests are independent, of one queue or of several: they complete in the order in which the host is done with them. A flush makes
//! durable what was *completed* before the guest asked for it, so that it need not wait for others that are under way either (section 5.2.6.2).
//! A driver that does without flushes gets writes that complete when they are durable.
//!
//! # What is in flight at a freeze
//!
//! Reads and writes are waited for, since they touch the guest's memory or the image. A flush may take longer than there is, and touches
//! neither: it is recorded, and done anew at the thaw. (The freeze itself makes the image durable, so no less than it promises is true
//! by then.) In the same process it is simply still under way.
//!
//! How much is waited for is bounded: no request is taken from a ring while [`IN_FLIGHT_MAX`] bytes are in flight.

pub mod backend;
mod config;
mod in_flight;
mod request;
pub mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Instant;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use super::buffers::Segment;
pub use backend::{BlockBackend, Buffers, Completion, Operation, Token};
use config::feature;
use in_flight::{Flight, InFlight, Kind};
use request::{Limits, Request, Status, Work};
use state::{BlockStateV1, FlushV1};

use super::device::{VirtioDevice, VirtioKind, read_bytes};
use super::fault::Fault;
use super::memory::Memory;
use super::ring::{Chain, Ring};
use super::state::VirtioState;
use crate::state::{StateError, ensure};

const DEVICE: &str = "virtio-block";
/// Bytes of a sector, in which the protocol counts whatever the disk's blocks are.
pub const SECTOR: u64 = 512;
/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// The most pieces of memory that one request may have beside header and status (`seg_max`): a queue's worth of descriptors.
pub const SEGMENTS_MAX: u16 = QUEUE_SIZE - 2;
/// The most bytes of one piece (`size_max`).
pub const SEGMENT_MAX: u32 = 64 << 10;
/// While so many bytes are in flight, no request is taken: what a freeze may have to wait for. One request is no larger.
pub const IN_FLIGHT_MAX: u64 = 16 << 20;
/// Bytes of a disk's name (section 5.2.6: a serial number).
const ID_LENGTH: usize = 20;

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name, of which the guest sees the first 20 bytes as its serial number.
    pub id: String,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// How many queues it has; at least one.
    pub queues: u16,
}

/// The device.
pub struct Block {
    disk: Disk,
    backend: Box<dyn BlockBackend>,
    queue_sizes: Vec<u16>,
    config: Vec<u8>,
    /// The driver does without flushes.
    write_through: bool,
    in_flight: InFlight,
    /// Flushes of a state that are to be done anew.
    recorded: Vec<FlushV1>,
    completed: Vec<Completion>,
}

impl Block {
    /// A device that shows `disk`, whose bytes are `backend`'s.
    #[must_use]
    pub fn new(disk: Disk, backend: Box<dyn BlockBackend>) -> Self {
        let queues = disk.queues.max(1);
        Self {
            config: config::bytes(disk.sectors, queues).to_vec(),
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            in_flight: InFlight::new(queues.into()),
            disk,
            backend,
            write_through: false,
            recorded: Vec::new(),
            completed: Vec::new(),
        }
    }

    /// Takes requests from a ring while there may be more in flight, has the host begin them, and tells what is done.
    ///
    /// Much of it is done at once: a read of what the host has in memory. So the driver is asked to tell of further requests only after all
    /// that: those that come meanwhile are found without it, and cost it no exit.
    fn serve(&mut self, queue: u16, rings: &mut [Ring]) -> Result<(), Fault> {
        loop {
            let Some(ring) = rings.get_mut(usize::from(queue)) else { return Ok(()) };
            let taken = self.take(queue, ring);
            self.backend.start();
            self.complete(rings)?;
            rings.iter_mut().try_for_each(Ring::signal)?;
            taken?;
            let Some(ring) = rings.get_mut(usize::from(queue)) else { return Ok(()) };
            // Without room the ring is looked at again when something has completed.
            if !self.has_room(queue) || !ring.listen()? {
                return Ok(());
            }
        }
    }

    fn take(&mut self, queue: u16, ring: &mut Ring) -> Result<(), Fault> {
        while self.has_room(queue) {
            let Some(chain) = ring.pop()? else { break };
            self.begin(queue, chain, ring)?;
        }
        Ok(())
    }

    fn has_room(&self, queue: u16) -> bool {
        // A driver that lies offers a head that it was not given back yet: the size is no bound by itself.
        self.in_flight.bytes() < IN_FLIGHT_MAX && self.in_flight.of_queue(queue) < QUEUE_SIZE.into()
    }

    /// Submits a request, or completes it if there is nothing to be done.
    fn begin(&mut self, queue: u16, chain: Chain, ring: &mut Ring) -> Result<(), Fault> {
        let (head, memory) = (chain.head_index(), ring.memory().clone());
        let limits = Limits { sectors: self.disk.sectors, read_only: self.disk.read_only };
        // Nowhere to say what became of it: it is given back as it is.
        let Some(Request { status, work }) = Request::parse(chain, &memory, limits) else {
            return ring.complete(head, 0);
        };
        let flight = |kind, bytes| Flight { queue, head, status, kind, bytes };
        match work {
            Work::Nothing(code) => return finish(ring, head, status, code, 0),
            Work::GetId(segments) => {
                let code = if self.write_id(&memory, &segments) { Status::Ok } else { Status::IoError };
                return finish(ring, head, status, code, ID_LENGTH as u32);
            }
            Work::Read { at, segments } => {
                let bytes = length(&segments);
                let operation = Operation::Read { at, buffers: Buffers { memory: &memory, segments: &segments } };
                // The token is the flight's, which keeps the segments: those that are submitted are the same.
                let token = self.in_flight.insert(flight(Kind::Read(segments.clone()), bytes));
                self.backend.submit(token, operation);
            }
            Work::Write { at, segments } => {
                let token = self.in_flight.insert(flight(Kind::Other, length(&segments)));
                let buffers = Buffers { memory: &memory, segments: &segments };
                self.backend.submit(token, Operation::Write { at, buffers, durable: self.write_through });
            }
            Work::Flush => {
                let token = self.in_flight.insert(flight(Kind::Flush, 0));
                self.backend.submit(token, Operation::Flush);
            }
            Work::Discard(range) => {
                let token = self.in_flight.insert(flight(Kind::Other, 0));
                self.backend.submit(token, Operation::Discard(range));
            }
            Work::WriteZeroes { range, unmap } => {
                let token = self.in_flight.insert(flight(Kind::Other, 0));
                self.backend.submit(token, Operation::WriteZeroes { range, unmap });
            }
        }
        Ok(())
    }

    /// Writes the disk's name, zeros behind it.
    fn write_id(&self, memory: &Memory, segments: &[Segment]) -> bool {
        let mut id = [0; ID_LENGTH];
        for (to, from) in id.iter_mut().zip(self.disk.id.bytes()) {
            *to = from;
        }
        let mut rest = id.as_slice();
        for segment in segments {
            let (now, later) = rest.split_at(rest.len().min(segment.length as usize));
            if memory.write_slice(now, segment.address).is_err() {
                return false;
            }
            rest = later;
        }
        true
    }

    /// Completes what the host is done with. A ring that makes no sense does not keep others from being served.
    fn complete(&mut self, rings: &mut [Ring]) -> Result<(), Fault> {
        let mut completed = std::mem::take(&mut self.completed);
        self.backend.take_completed(&mut completed);
        let mut done = Ok(());
        for Completion { token, result } in completed.drain(..) {
            let Some(flight) = self.in_flight.remove(token) else { continue };
            let Some(ring) = rings.get_mut(usize::from(flight.queue)) else { continue };
            done = done.and(self.land(&flight, &result, ring));
        }
        self.completed = completed;
        done
    }

    fn land(&self, flight: &Flight, result: &io::Result<()>, ring: &mut Ring) -> Result<(), Fault> {
        let code = match result {
            Ok(()) => Status::Ok,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Err(error) => {
                tracing::warn!("disk {}: a request failed: {error}", self.disk.id);
                Status::IoError
            }
        };
        let mut written = 0;
        if let Kind::Read(segments) = &flight.kind {
            // Of one that failed, too: part of it may have been read.
            mark_written(ring.memory(), segments);
            written = if code == Status::Ok { u32::try_from(flight.bytes).unwrap_or(u32::MAX - 1) } else { 0 };
        }
        finish(ring, flight.head, flight.status, code, written)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Block
    }

    fn features(&self) -> u64 {
        config::features(self.disk.read_only, self.disk.queues)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.write_through = features & feature::FLUSH == 0;
    }

    fn reset(&mut self) {
        // What the host has taken cannot be called back. Its memory must be left alone when this returns, so it is waited for.
        while self.in_flight.count() > 0 {
            self.backend.wait(None);
            self.backend.take_completed(&mut self.completed);
            for Completion { token, result: _ } in self.completed.drain(..) {
                self.in_flight.remove(token);
            }
        }
        self.recorded.clear();
        self.write_through = false;
    }

    fn notified(&mut self, queue: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        u16::try_from(queue).map_or(Ok(()), |queue| self.serve(queue, rings))
    }

    fn ready(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        self.complete(rings)?;
        rings.iter_mut().try_for_each(Ring::signal)?;
        // There is room now for what could not be taken before.
        (0..).zip(0..rings.len()).try_for_each(|(queue, _)| self.serve(queue, rings))
    }

    fn quiesce(&mut self, rings: &mut [Ring], deadline: Instant) -> Result<(), Fault> {
        let mut done = Ok(());
        loop {
            done = done.and(self.complete(rings));
            match self.in_flight.transfers() {
                0 => break,
                left if !self.backend.wait(Some(deadline)) => {
                    return Err(Fault::Busy(format!("{left} of disk {}", self.disk.id)));
                }
                _ => {}
            }
        }
        done?;
        rings.iter_mut().try_for_each(Ring::signal)
    }

    fn save(&self) -> VirtioState {
        let Self { disk, backend: _, queue_sizes: _, config: _, write_through: _, in_flight, recorded, completed: _ } =
            self;
        let Disk { id: _, sectors, read_only, queues: _ } = disk;
        let mut flushes: Vec<FlushV1> = in_flight.flushes().chain(recorded.iter().copied()).collect();
        flushes.sort_unstable();
        VirtioState::Block(BlockStateV1 { sectors: *sectors, read_only: *read_only, flushes })
    }

    fn restore(&mut self, state: &VirtioState, features: u64) -> Result<(), StateError> {
        let VirtioState::Block(BlockStateV1 { sectors, read_only, flushes }) = state else {
            return Err(StateError::wrong_virtio_device(DEVICE, state));
        };
        ensure(*sectors == self.disk.sectors, DEVICE, "size", || {
            format!("{sectors} sectors, and disk {} has {} now", self.disk.id, self.disk.sectors)
        })?;
        ensure(*read_only == self.disk.read_only, DEVICE, "access", || {
            let word = |read_only| if read_only { "read-only" } else { "writable" };
            format!("{}, and disk {} is {} now", word(*read_only), self.disk.id, word(self.disk.read_only))
        })?;
        let of_queue = |queue| flushes.iter().filter(|flush| usize::from(flush.queue) == queue).count();
        let known = (0..self.queue_sizes.len()).map(of_queue).collect::<Vec<_>>();
        let bounded = known.iter().all(|count| *count <= QUEUE_SIZE.into());
        let sorted = flushes.is_sorted() && flushes.iter().all(|flush| flush.head < QUEUE_SIZE);
        ensure(bounded && sorted && known.iter().sum::<usize>() == flushes.len(), DEVICE, "flushes", || {
            "a list that this device's queues cannot have led to".to_owned()
        })?;
        self.recorded.clone_from(flushes);
        self.write_through = features & feature::FLUSH == 0;
        Ok(())
    }

    fn thaw(&mut self, _: &mut [Ring]) -> Result<(), Fault> {
        for FlushV1 { queue, head, status } in std::mem::take(&mut self.recorded) {
            let flight = Flight { queue, head, status: GuestAddress(status), kind: Kind::Flush, bytes: 0 };
            let token = self.in_flight.insert(flight);
            self.backend.submit(token, Operation::Flush);
        }
        self.backend.start();
        Ok(())
    }

    fn sources(&self) -> usize {
        1
    }
}

/// Tells what became of a request, of which `written` bytes of data were written to the guest's memory.
fn finish(ring: &mut Ring, head: u16, status: GuestAddress, code: Status, written: u32) -> Result<(), Fault> {
    let told = ring.memory().write_obj(code as u8, status).is_ok();
    let written = if code == Status::Ok { written } else { 0 };
    ring.complete(head, if told { written.saturating_add(1) } else { 0 })
}

fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.length)).sum()
}

/// The host wrote to these, past `vm-memory`'s eyes.
fn mark_written(memory: &Memory, segments: &[Segment]) {
    for segment in segments {
        for slice in memory.get_slices(segment.address, segment.length as usize).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
