//! A device's thread: waits for the guest's notifications and the host's readiness, and tells the device.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use devices::virtio::Engine;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::machine::jail::{self, Role};

/// What an event is of: the end, or from here on queues, and behind them sources.
const END: u64 = 0;
const FIRST_QUEUE: u64 = 1;
/// Events taken at a time.
const EVENTS: usize = 16;

/// Ends its thread when it is dropped.
pub(super) struct DeviceThread {
    end: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts it: `kicks` by queue, `sources` by number. The device is told of every write to the former, and of every change of the latter.
    pub(super) fn start(
        name: &str,
        engine: Arc<Mutex<Engine>>,
        kicks: Vec<EventFd>,
        sources: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let end = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&poll, borrow(&end), EventData::new_u64(END), EventFlags::IN)?;
        for (kick, token) in kicks.iter().zip(FIRST_QUEUE..) {
            // Edges: each notification is one, and nobody has to read the counter for it.
            epoll::add(&poll, borrow(kick), EventData::new_u64(token), EventFlags::IN | EventFlags::ET)?;
        }
        let first_source = FIRST_QUEUE + kicks.len() as u64;
        for (source, token) in sources.iter().zip(first_source..) {
            // Edges: a source that the device cannot serve now (no buffers, a freeze) must not spin.
            let changes = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(&poll, source.as_fd(), EventData::new_u64(token), changes)?;
        }
        let worker = Worker { engine, poll, first_source, _kicks: kicks, _sources: sources };
        let thread = jail::spawn(name, Role::Device, move || worker.serve())?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        // The counter of an eventfd that is written once does not overflow.
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The descriptor of an event, as long as that lives.
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which lives for as long as what is returned here.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

struct Worker {
    engine: Arc<Mutex<Engine>>,
    poll: OwnedFd,
    first_source: u64,
    /// Kept open: epoll alone does not.
    _kicks: Vec<EventFd>,
    _sources: Vec<OwnedFd>,
}

impl Worker {
    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return tracing::error!("a device's thread cannot wait for events: {error}"),
            }
            for event in &events {
                // Copied out: the system's layout is packed.
                let data = event.data;
                match data.u64() {
                    END => return,
                    token => self.tell(token),
                }
            }
        }
    }

    fn tell(&self, token: u64) {
        if let Some(source) = token.checked_sub(self.first_source) {
            return self.engine().ready(usize::try_from(source).unwrap_or(usize::MAX));
        }
        let queue = usize::try_from(token - FIRST_QUEUE).unwrap_or(usize::MAX);
        // What is offered once this looks at the queue is told anew.
        self.engine().notified(queue);
    }
}
