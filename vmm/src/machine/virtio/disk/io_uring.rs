//! Disk I/O by the kernel: `io_uring(7)`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::block::{BlockBackend, Completion, Operation, Token};
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;

use super::flushes::Flushes;
use super::image::Image;
use super::transfer::{Direction, Transfer};

/// Entries of the submission queue. What does not fit is handed over first.
const ENTRIES: u32 = 256;
/// Entries of the completion queue: four queues' worth of requests, and a flush.
const COMPLETIONS: u32 = 2048;
/// Names the flush among the kernel's completions; a token has 32 bits.
const FLUSH: u64 = u64::MAX;

/// The image's I/O.
pub(super) struct Uring {
    ring: IoUring,
    image: Arc<Image>,
    /// What the kernel works on, by token; `None` for what is no transfer.
    transfers: Vec<Option<Transfer>>,
    flushes: Flushes,
    /// Requests that the kernel has, the flush included.
    in_kernel: usize,
    /// What is not in the submission queue yet.
    backlog: VecDeque<squeue::Entry>,
    /// What completed without the kernel.
    completed: Vec<Completion>,
}

impl Uring {
    /// Sets it up, and what becomes ready when the kernel has completed something that was not taken.
    ///
    /// # Errors
    /// As the system says: ENOSYS or EPERM where there is none for us.
    pub(super) fn new(image: Arc<Image>) -> io::Result<(Self, OwnedFd)> {
        image.wait_for_io()?;
        let ring = IoUring::builder().setup_cqsize(COMPLETIONS).setup_r_disabled().build(ENTRIES)?;
        // Kernels before 5.5 need the pieces of a transfer until it is complete, and lose completions that do not fit. None of the
        // releases that are still looked after is that old.
        if !(ring.params().is_feature_submit_stable() && ring.params().is_feature_nodrop()) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        // What goes through a ring is not seen by seccomp: it is to do what a disk does, and nothing else.
        let allowed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        ring.submitter().register_restrictions(&mut allowed.map(Restriction::sqe_op))?;
        ring.submitter().register_enable_rings()?;
        let source = completions_of(&ring)?;
        let this = Self {
            ring,
            image,
            transfers: Vec::new(),
            flushes: Flushes::default(),
            in_kernel: 0,
            backlog: VecDeque::new(),
            completed: Vec::new(),
        };
        Ok((this, source))
    }

    fn fd(&self) -> Fd {
        Fd(self.image.descriptor())
    }

    fn queue(&mut self, entry: squeue::Entry, name: u64) {
        self.backlog.push_back(entry.user_data(name));
        self.in_kernel += 1;
    }

    fn begin(&mut self, token: Token, direction: Direction, transfer: io::Result<Transfer>) {
        match transfer {
            Ok(transfer) => {
                let index = token.0 as usize;
                if self.transfers.len() <= index {
                    self.transfers.resize_with(index + 1, || None);
                }
                let entry = entry_of(self.fd(), &transfer);
                if let Some(slot) = self.transfers.get_mut(index) {
                    *slot = Some(transfer);
                }
                self.queue(entry, token.0.into());
            }
            Err(error) => {
                tracing::warn!("disk {}: a {direction:?} cannot be done: {error}", self.image.name());
                self.completed.push(Completion { token, result: Err(error) });
            }
        }
    }

    fn allocate(&mut self, token: Token, range: &std::ops::Range<u64>, mode: FallocateFlags) {
        let length = range.end - range.start;
        if length == 0 {
            return self.completed.push(Completion { token, result: Ok(()) });
        }
        let entry = opcode::Fallocate::new(self.fd(), length)
            .offset(self.image.place(range.start))
            .mode(mode.bits().cast_signed())
            .build();
        self.queue(entry, token.0.into());
    }

    fn begin_flush(&mut self) {
        while self.flushes.begin() {
            let believed = if self.image.is_read_only() { None } else { Some(self.image.is_believed()) };
            match believed {
                Some(Ok(())) => {
                    let entry = opcode::Fsync::new(self.fd()).flags(FsyncFlags::DATASYNC).build();
                    return self.queue(entry, FLUSH);
                }
                // Nothing to flush, or nothing to believe.
                other => {
                    self.flushes.end(&other.unwrap_or(Ok(())), &mut self.completed);
                }
            }
        }
    }

    /// Hands over what there is. Whether the kernel takes it.
    fn hand_over(&mut self) -> bool {
        loop {
            {
                let mut queue = self.ring.submission();
                while let Some(entry) = self.backlog.pop_front() {
                    // SAFETY: a transfer's pieces point into guest memory that `transfers` keeps mapped until its completion, and the list
                    // of them is read while it is submitted (IORING_FEAT_SUBMIT_STABLE). The file is open for as long as `image` is.
                    if unsafe { queue.push(&entry) }.is_err() {
                        self.backlog.push_front(entry);
                        break;
                    }
                }
                if queue.is_empty() {
                    return true;
                }
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    // No memory just now, or completions that nobody has taken: the next look at them is not far.
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => std::thread::sleep(Duration::from_micros(100)),
                    _ => {
                        tracing::error!("disk {}: io_uring takes nothing: {error}", self.image.name());
                        return false;
                    }
                },
            }
        }
    }

    /// Takes what the kernel completed; whether anything has to be handed over after it.
    fn reap(&mut self) -> bool {
        let entries: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (name, result) in entries {
            self.in_kernel -= 1;
            match name {
                FLUSH => self.end_flush(result),
                name => self.land(Token((name & u64::from(u32::MAX)) as u32), result),
            }
        }
        !self.backlog.is_empty()
    }

    fn end_flush(&mut self, result: i32) {
        let result = match result {
            0.. => self.image.is_believed(),
            error => Err(self.image.doubt(io::Error::from_raw_os_error(-error))),
        };
        self.flushes.end(&result, &mut self.completed);
        self.begin_flush();
    }

    fn land(&mut self, token: Token, result: i32) {
        let index = token.0 as usize;
        let Some(mut transfer) = self.transfers.get_mut(index).and_then(Option::take) else {
            let result = if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
            return self.completed.push(Completion { token, result });
        };
        let advanced = match result {
            0.. => transfer.advance(result.unsigned_abs() as usize),
            error if matches!(-error, libc::EINTR | libc::EAGAIN) => Ok(false),
            error => Err(io::Error::from_raw_os_error(-error)),
        };
        match advanced {
            Ok(false) => {
                let entry = entry_of(self.fd(), &transfer);
                if let Some(slot) = self.transfers.get_mut(index) {
                    *slot = Some(transfer);
                }
                self.queue(entry, token.0.into());
            }
            Ok(true) if transfer.durable => {
                self.flushes.ask(token);
                self.begin_flush();
            }
            Ok(true) => self.completed.push(Completion { token, result: Ok(()) }),
            Err(error) => self.completed.push(Completion { token, result: Err(error) }),
        }
    }

    /// Waits until the kernel has completed something, or until `deadline`.
    fn wait_for_kernel(&mut self, deadline: Option<Instant>) {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        // SAFETY: the ring's descriptor is open for as long as the ring, which outlives this call.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        // Interrupted is as good as woken: whoever waits looks again.
        let _ = poll(&mut [PollFd::from_borrowed_fd(ring, PollFlags::IN)], left.as_ref());
    }
}

/// Is ready for reading while the kernel has completed something that was not taken from `ring`.
///
/// Not an eventfd that the kernel rings at each completion: that is rung also for what was done at once, within the system call that
/// submits it, and was taken right after. Neither the ring itself: whoever waits for it to change in any way learns each time that it can
/// be written to.
fn completions_of(ring: &IoUring) -> io::Result<OwnedFd> {
    let source = epoll::create(CreateFlags::CLOEXEC)?;
    // SAFETY: the ring's descriptor is open for as long as the ring, which outlives this call.
    let ring = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
    epoll::add(&source, ring, EventData::new_u64(0), EventFlags::IN)?;
    Ok(source)
}

fn entry_of(fd: Fd, transfer: &Transfer) -> squeue::Entry {
    let pieces = transfer.pieces();
    // As many as a request has segments: far below 2³².
    let (first, count) = (pieces.as_ptr(), pieces.len() as u32);
    match transfer.direction {
        Direction::Read => opcode::Readv::new(fd, first, count).offset(transfer.at).build(),
        Direction::Write => opcode::Writev::new(fd, first, count).offset(transfer.at).build(),
    }
}

impl BlockBackend for Uring {
    fn submit(&mut self, token: Token, operation: Operation<'_>) {
        self.image.before(&operation);
        match operation {
            Operation::Read { at, buffers } => {
                let transfer = Transfer::new(Direction::Read, self.image.place(at), buffers, false);
                self.begin(token, Direction::Read, transfer);
            }
            Operation::Write { at, buffers, durable } => {
                let durable = durable || self.image.is_written_through();
                let transfer = Transfer::new(Direction::Write, self.image.place(at), buffers, durable);
                self.begin(token, Direction::Write, transfer);
            }
            Operation::Flush => self.flushes.ask(token),
            Operation::Discard(range) => self.allocate(token, &range, self.image.discard_mode()),
            Operation::WriteZeroes { range, unmap } => self.allocate(token, &range, self.image.zero_mode(unmap)),
        }
    }

    fn start(&mut self) {
        self.begin_flush();
        self.hand_over();
    }

    fn take_completed(&mut self, completed: &mut Vec<Completion>) {
        // What is handed over may be done at once.
        while self.reap() && self.hand_over() {}
        completed.append(&mut self.completed);
    }

    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        loop {
            if self.reap() {
                self.hand_over();
            }
            if !self.completed.is_empty() {
                return true;
            }
            if self.in_kernel == 0 || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return false;
            }
            self.wait_for_kernel(deadline);
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // What the kernel has it may still write to the guest's memory, which is unmapped after this.
        while self.in_kernel > 0 {
            self.hand_over();
            self.wait_for_kernel(None);
            self.reap();
        }
    }
}
