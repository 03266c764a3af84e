//! Requests between their submission and their completion.

use vm_memory::GuestAddress;

use super::backend::Token;
use super::state::FlushV1;
use crate::virtio::buffers::Segment;

/// What the completion of a request has to see to.
#[derive(Debug)]
pub(super) enum Kind {
    /// It wrote to these pieces of memory.
    Read(Vec<Segment>),
    /// It touches no memory of the guest.
    Flush,
    /// It read memory, or touched none.
    Other,
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) queue: u16,
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    pub(super) kind: Kind,
    /// Bytes that it moves.
    pub(super) bytes: u64,
}

/// All that are in flight. How many is bounded by whoever lets them take off.
#[derive(Debug)]
pub(super) struct InFlight {
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
    of_queue: Vec<usize>,
    bytes: u64,
    flushes: usize,
}

impl InFlight {
    /// None, of `queues` queues.
    pub(super) fn new(queues: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), of_queue: vec![0; queues], bytes: 0, flushes: 0 }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// How many came by `queue`.
    pub(super) fn of_queue(&self, queue: u16) -> usize {
        self.of_queue.get(usize::from(queue)).copied().unwrap_or(0)
    }

    /// How many are no flushes: those may touch the guest's memory, or change the image.
    pub(super) fn transfers(&self) -> usize {
        self.count() - self.flushes
    }

    /// Bytes that they move.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn insert(&mut self, flight: Flight) -> Token {
        self.bytes += flight.bytes;
        self.flushes += usize::from(matches!(flight.kind, Kind::Flush));
        if let Some(count) = self.of_queue.get_mut(usize::from(flight.queue)) {
            *count += 1;
        }
        let free = self.free.pop();
        match free.and_then(|index| Some((index, self.slots.get_mut(index as usize)?))) {
            Some((index, slot)) => {
                *slot = Some(flight);
                Token(index)
            }
            None => {
                self.slots.push(Some(flight));
                // Queues have 16 bits of entries, and there are 16 bits of queues.
                Token((self.slots.len() - 1) as u32)
            }
        }
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Flight> {
        let flight = self.slots.get_mut(token.0 as usize)?.take()?;
        self.free.push(token.0);
        self.bytes -= flight.bytes;
        self.flushes -= usize::from(matches!(flight.kind, Kind::Flush));
        if let Some(count) = self.of_queue.get_mut(usize::from(flight.queue)) {
            *count -= 1;
        }
        Some(flight)
    }

    /// The flushes, for a state.
    pub(super) fn flushes(&self) -> impl Iterator<Item = FlushV1> + '_ {
        let flushes = self.slots.iter().flatten().filter(|flight| matches!(flight.kind, Kind::Flush));
        flushes.map(|Flight { queue, head, status, kind: _, bytes: _ }| FlushV1 {
            queue: *queue,
            head: *head,
            status: status.0,
        })
    }
}
