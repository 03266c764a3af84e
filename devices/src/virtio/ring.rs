//! A virtqueue with the memory that it lies in and the interrupt that it raises.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::device::Fault;
use super::interrupt::Interrupt;
use super::memory::Memory;

/// A request: descriptors that belong together. Untrusted.
pub type Chain = DescriptorChain<Memory>;

/// A virtqueue as its device sees it.
pub struct Ring {
    pub(super) queue: Queue,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    /// Something was completed of which the driver was not told.
    news: bool,
}

impl Ring {
    pub(super) fn new(queue: Queue, memory: Memory, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, memory, interrupt, news: false }
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn pop(&mut self) -> Result<Option<Chain>, Fault> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let mut available = self.queue.iter(self.memory.clone()).map_err(Fault::ring)?;
        Ok(available.next())
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
        let memory = self.memory.clone();
        self.queue.add_used(&*memory, head, written).map_err(Fault::ring)?;
        self.news = true;
        Ok(())
    }

    /// Interrupts the driver if something was completed since the last call and it wants to know.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn signal(&mut self) -> Result<(), Fault> {
        let memory = self.memory.clone();
        let news = std::mem::take(&mut self.news);
        if news && self.queue.needs_notification(&*memory).map_err(Fault::ring)? {
            self.interrupt.raise_used();
        }
        Ok(())
    }

    /// Gives each request that there is to `serve`, also those that come meanwhile, and asks the driver to tell of the next. Whoever takes
    /// requests in another way calls [`Ring::listen`] before it waits for more: with `VIRTIO_F_EVENT_IDX` the driver stays silent otherwise.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense, or as `serve` says.
    pub fn drain(&mut self, mut serve: impl FnMut(&mut Self, Chain) -> Result<(), Fault>) -> Result<(), Fault> {
        loop {
            while let Some(chain) = self.pop()? {
                serve(self, chain)?;
            }
            if !self.listen()? {
                return Ok(());
            }
        }
    }

    /// The driver is to tell of further requests. Whether there are some already, of which it does not tell.
    ///
    /// # Errors
    /// [`Fault`]: the ring makes no sense.
    pub fn listen(&mut self) -> Result<bool, Fault> {
        let memory = self.memory.clone();
        if self.queue.ready() { self.queue.enable_notification(&*memory).map_err(Fault::ring) } else { Ok(false) }
    }

    /// The memory that the ring and its buffers lie in.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
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
