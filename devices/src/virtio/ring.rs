//! A virtqueue with the memory that it lies in and the interrupt that it raises.

use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::fault::Fault;
use super::interrupt::Interrupt;
use super::memory::{GuestMemory, Memory};

/// A request: descriptors that belong together. Untrusted.
pub type Chain = DescriptorChain<Memory>;

/// Bytes of a descriptor, of an entry of the available ring, of one of the used ring (virtio 1.2, section 2.7), and of what stands before and
/// behind the entries of both.
const DESCRIPTOR: u64 = 16;
const AVAILABLE: u64 = 2;
const USED: u64 = 8;
const RING_ENDS: u64 = 6;
/// The most bytes of a request's buffers that are brought in: no device uses more of one (a disk 254 pieces of 64 KiB), and a guest that offers gigabytes is
/// not to hold up a freeze.
const BROUGHT_IN_MAX: u64 = 16 << 20;

/// A virtqueue as its device sees it.
pub struct Ring {
    pub(super) queue: Queue,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    /// How many completions there are of which the driver was not told.
    news: u16,
}

impl Ring {
    pub(super) fn new(queue: Queue, memory: Memory, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, memory, interrupt, news: 0 }
    }

    pub(super) fn reset(&mut self) {
        self.queue.reset();
        self.news = 0;
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn pop(&mut self) -> Result<Option<Chain>, Fault> {
        if !self.queue.ready() {
            return Ok(None);
        }
        if self.memory.is_whole() {
            return self.next();
        }
        self.bring_in().map_err(Fault::absent)?;
        let next = self.next()?;
        if let Some(chain) = &next {
            self.bring_in_request(chain).map_err(Fault::absent)?;
        }
        Ok(next)
    }

    /// Gives requests to `take`, head and descriptors that the device writes, until it wants no more or there are none.
    ///
    /// Cheaper than a [`Ring::pop`] for each: the driver's index is read once, and no request holds a share of the memory.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub(super) fn pop_while(
        &mut self,
        mut take: impl FnMut(u16, &mut dyn Iterator<Item = Descriptor>) -> bool,
    ) -> Result<(), Fault> {
        if !self.queue.ready() {
            return Ok(());
        }
        if !self.memory.is_whole() {
            while let Some(chain) = self.pop()? {
                if !take(chain.head_index(), &mut chain.writable()) {
                    break;
                }
            }
            return Ok(());
        }
        let memory: &GuestMemory = &self.memory;
        for chain in self.queue.iter(memory).map_err(Fault::ring)? {
            if !take(chain.head_index(), &mut chain.writable()) {
                break;
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Chain>, Fault> {
        let mut available = self.queue.iter(self.memory.clone()).map_err(Fault::ring)?;
        Ok(available.next())
    }

    /// Brings in a request's buffers, and the table of its descriptors if its first says that it has one of its own (section 2.7.5.3).
    fn bring_in_request(&self, chain: &Chain) -> io::Result<()> {
        const INDIRECT: u16 = 1 << 2;
        let first = GuestAddress(self.queue.desc_table().saturating_add(DESCRIPTOR * u64::from(chain.head_index())));
        let field = |offset| GuestAddress(first.0.saturating_add(offset));
        let flags: u16 = self.memory.read_obj(field(12)).map_err(io::Error::other)?;
        if u16::from_le(flags) & INDIRECT != 0 {
            let table: u64 = self.memory.read_obj(first).map_err(io::Error::other)?;
            let length: u32 = self.memory.read_obj(field(8)).map_err(io::Error::other)?;
            // No table is longer than the largest queue's.
            let length = u64::from(u32::from_le(length)).min(DESCRIPTOR << 15);
            self.memory.bring_in(GuestAddress(u64::from_le(table)), length)?;
        }
        let mut left = BROUGHT_IN_MAX;
        chain.clone().try_for_each(|descriptor: Descriptor| {
            let length = left.min(descriptor.len().into());
            left -= length;
            self.memory.bring_in(descriptor.addr(), length)
        })
    }

    /// Brings in the memory that the ring itself lies in.
    fn bring_in(&self) -> io::Result<()> {
        let size = u64::from(self.queue.size());
        let parts = [
            (self.queue.desc_table(), DESCRIPTOR * size),
            (self.queue.avail_ring(), RING_ENDS + AVAILABLE * size),
            (self.queue.used_ring(), RING_ENDS + USED * size),
        ];
        parts.iter().try_for_each(|(start, length)| self.memory.bring_in(GuestAddress(*start), *length))
    }

    /// Takes back the last [`Ring::pop`]: the request will be the next again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Request `head` is done, `written` bytes were written to its buffers. The driver learns of it by [`Ring::signal`].
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), Fault> {
        self.queue.add_used(&*self.memory, head, written).map_err(Fault::ring)?;
        self.news = self.news.wrapping_add(1);
        Ok(())
    }

    /// Several requests are done, heads and lengths; the driver sees all of them or none.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), Fault> {
        let Some(((last, written), others)) = used.split_last() else { return Ok(()) };
        if others.iter().any(|(head, _)| *head >= self.queue.size()) {
            return Err(Fault::ring(virtio_queue::Error::InvalidDescriptorIndex));
        }
        let first = Wrapping(self.queue.next_used());
        let mut next = first;
        let mut left = others;
        // A frame of 64 KiB lies in some forty buffers: their entries are written at once, up to the end of the ring and from its start on.
        while !left.is_empty() {
            let index = next.0 % self.queue.size();
            let (now, later) = left.split_at(left.len().min((self.queue.size() - index).into()));
            self.write_used(index, now)?;
            next += u16::try_from(now.len()).unwrap_or(u16::MAX);
            left = later;
        }
        // This one publishes the index behind it, and thereby those before.
        self.queue.set_next_used(next.0);
        self.queue.add_used(&*self.memory, *last, *written).map_err(Fault::ring)?;
        self.news = self.news.wrapping_add((next - first).0).wrapping_add(1);
        Ok(())
    }

    /// Writes entries of the used ring from the `index`-th on, behind its flags and its index (section 2.7.8).
    fn write_used(&self, index: u16, used: &[(u16, u32)]) -> Result<(), Fault> {
        let at = self.queue.used_ring().checked_add(4 + USED * u64::from(index));
        let at = at.ok_or_else(|| Fault::ring(virtio_queue::Error::AddressOverflow))?;
        let entry = |(head, length): &(u16, u32)| (u64::from(*head) | u64::from(*length) << 32).to_le_bytes();
        let entries: Vec<u8> = used.iter().flat_map(entry).collect();
        let written = self.memory.write_slice(&entries, GuestAddress(at));
        written.map_err(|error| Fault::ring(virtio_queue::Error::GuestMemory(error)))
    }

    /// Interrupts the driver if something was completed since the last call and it wants to know.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn signal(&mut self) -> Result<(), Fault> {
        let news = std::mem::take(&mut self.news);
        if news > 0 && self.is_awaited(news)? {
            self.interrupt.raise_used();
        }
        Ok(())
    }

    /// Whether the driver wants to be interrupted for one of the last `news` completions: without `VIRTIO_F_EVENT_IDX` for any, else
    /// if it asked for one of them (section 2.7.7.2). Not `needs_notification` of the queue, which does not see those that were completed
    /// together.
    fn is_awaited(&self, news: u16) -> Result<bool, Fault> {
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // The driver writes its wish and then looks at the index; we wrote the index and now look at the wish.
        fence(Ordering::SeqCst);
        let at = self.queue.avail_ring().checked_add(4 + 2 * u64::from(self.queue.size()));
        let at = at.ok_or_else(|| Fault::ring(virtio_queue::Error::AddressOverflow))?;
        let wish = self.memory.load::<u16>(GuestAddress(at), Ordering::Relaxed);
        let wish = wish.map_err(|error| Fault::ring(virtio_queue::Error::GuestMemory(error)))?;
        let behind = Wrapping(self.queue.next_used()) - Wrapping(u16::from_le(wish)) - Wrapping(1);
        Ok(behind.0 < news)
    }

    /// Gives each request that there is to `serve`, also those that come meanwhile, and asks the driver to tell of the next. Whoever takes
    /// requests in another way calls [`Ring::listen`] before it waits for more: with `VIRTIO_F_EVENT_IDX` the driver stays silent otherwise.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense, or as `serve` says.
    pub fn drain(&mut self, mut serve: impl FnMut(&mut Self, Chain) -> Result<(), Fault>) -> Result<(), Fault> {
        while let Some(chain) = self.pop_or_listen()? {
            serve(self, chain)?;
        }
        Ok(())
    }

    /// As [`Ring::pop`]; where there is nothing, the driver is to notify of what comes.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn pop_or_listen(&mut self) -> Result<Option<Chain>, Fault> {
        loop {
            let next = self.pop()?;
            if next.is_some() || !self.listen()? {
                return Ok(next);
            }
        }
    }

    /// The driver is to tell of further requests. Whether there are some already, of which it does not tell.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn listen(&mut self) -> Result<bool, Fault> {
        if self.queue.ready() { self.queue.enable_notification(&*self.memory).map_err(Fault::ring) } else { Ok(false) }
    }

    /// The memory that the ring and its buffers lie in.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How many entries it has.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver has set it up.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    pub(super) fn is_valid(&self) -> bool {
        self.queue.is_valid(&*self.memory)
    }
}
