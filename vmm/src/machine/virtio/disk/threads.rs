//! Disk I/O by threads: where `io_uring` is refused.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use devices::virtio::block::{BlockBackend, Completion, Operation, Token};
use rustix::fs::FallocateFlags;
use vfs::cut::trace::Trace;
use vmm_sys_util::eventfd::EventFd;

use super::flushes::Flushes;
use super::image::Image;
use super::transfer::{Direction, Transfer};
use crate::machine::jail::{self, Role};

/// How many requests are worked on at a time, beside a flush.
const WORKERS: usize = 4;

/// What a thread is to do.
enum Job {
    Transfer(Token, Transfer),
    Allocate(Token, Range<u64>, FallocateFlags),
    /// For all that wait for one.
    Flush,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<Job>,
    flushes: Flushes,
    completed: Vec<Completion>,
    /// Requests that are not in `completed` yet.
    open: usize,
    end: bool,
}

struct Shared {
    work: Mutex<Work>,
    /// There is a job, or the end.
    more: Condvar,
    /// Something is complete.
    less: Condvar,
    image: Arc<Image>,
    done: EventFd,
}

/// The image's I/O.
pub(super) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts them; `done` is rung at each completion.
    ///
    /// # Errors
    /// As the system says.
    pub(super) fn start(image: Arc<Image>, done: EventFd) -> io::Result<Self> {
        let (more, less) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { work: Mutex::default(), more, less, image, done });
        let mut threads = Self { shared, workers: Vec::new() };
        // One more than that: a flush may take long.
        for _ in 0..=WORKERS {
            let shared = Arc::clone(&threads.shared);
            let worker = jail::spawn("disk-io", Role::Device, move || shared.serve())?;
            threads.workers.push(worker);
        }
        Ok(threads)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        loop {
            let mut work = self.lock();
            let job = loop {
                if work.end {
                    return;
                }
                match work.jobs.pop_front() {
                    Some(job) => break job,
                    None => work = self.more.wait(work).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(work);
            self.perform(job);
        }
    }

    fn perform(&self, job: Job) {
        match job {
            Job::Transfer(token, mut transfer) => match self.transfer(&mut transfer) {
                Ok(()) if transfer.durable => {
                    let mut work = self.lock();
                    work.flushes.ask(token);
                    self.begin_flush(&mut work);
                }
                result => self.complete(token, result),
            },
            Job::Allocate(token, range, mode) => self.complete(token, self.allocate(&range, mode)),
            Job::Flush => {
                let result = self.image.flush_for_guest();
                let mut work = self.lock();
                let (flushes, completed) = work.flushes_and_completed();
                let before = completed.len();
                flushes.end(&result, completed);
                work.open -= work.completed.len() - before;
                self.begin_flush(&mut work);
                drop(work);
                self.tell();
            }
        }
    }

    /// Writes what a trace can be told of: the very bytes, whatever the guest does to its memory meanwhile.
    fn write_traced(&self, transfer: &Transfer, trace: &Trace) -> io::Result<()> {
        let bytes = transfer.bytes();
        self.image.file().0.write_all_at(&bytes, transfer.at)?;
        trace.wrote(&bytes, transfer.at);
        Ok(())
    }

    fn transfer(&self, transfer: &mut Transfer) -> io::Result<()> {
        if let (Direction::Write, Some(trace)) = (transfer.direction, self.image.trace()) {
            return self.write_traced(transfer, trace);
        }
        loop {
            let (pieces, descriptor) = (transfer.pieces(), self.image.descriptor());
            let count = libc::c_int::try_from(pieces.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
            let at = libc::off_t::try_from(transfer.at).map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: the pieces are guest memory, which the transfer keeps mapped, and of which no Rust reference is made; the descriptor
            // is open for as long as the image.
            let moved = unsafe {
                match transfer.direction {
                    Direction::Read => libc::preadv(descriptor, pieces.as_ptr(), count, at),
                    Direction::Write => libc::pwritev(descriptor, pieces.as_ptr(), count, at),
                }
            };
            match usize::try_from(moved) {
                Ok(moved) => {
                    if transfer.advance(moved)? {
                        return Ok(());
                    }
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn allocate(&self, range: &Range<u64>, mode: FallocateFlags) -> io::Result<()> {
        let length = range.end - range.start;
        if length == 0 {
            return Ok(());
        }
        // SAFETY: the descriptor is open for as long as the image.
        let file = unsafe { BorrowedFd::borrow_raw(self.image.descriptor()) };
        let place = self.image.place(range.start);
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, place, length))?;
        if let Some(trace) = self.image.trace() {
            trace.zeroed(&(place..place + length));
        }
        Ok(())
    }

    fn complete(&self, token: Token, result: io::Result<()>) {
        let mut work = self.lock();
        work.completed.push(Completion { token, result });
        work.open -= 1;
        drop(work);
        self.tell();
    }

    fn tell(&self) {
        self.less.notify_all();
        // The counter does not overflow: nobody writes to it so often.
        let _ = self.done.write(1);
    }

    fn begin_flush(&self, work: &mut Work) {
        if work.flushes.begin() {
            work.jobs.push_back(Job::Flush);
            self.more.notify_one();
        }
    }
}

impl Work {
    fn flushes_and_completed(&mut self) -> (&mut Flushes, &mut Vec<Completion>) {
        (&mut self.flushes, &mut self.completed)
    }
}

impl BlockBackend for Threads {
    fn submit(&mut self, token: Token, operation: Operation<'_>) {
        let image = &self.shared.image;
        image.before(&operation);
        let transfer = |direction, at, buffers, durable| {
            Transfer::new(direction, image.place(at), buffers, durable).map(|transfer| Job::Transfer(token, transfer))
        };
        let job = match operation {
            Operation::Read { at, buffers } => transfer(Direction::Read, at, buffers, false),
            Operation::Write { at, buffers, durable } => {
                transfer(Direction::Write, at, buffers, durable || image.is_written_through())
            }
            Operation::Flush => {
                let mut work = self.shared.lock();
                work.open += 1;
                return work.flushes.ask(token);
            }
            Operation::Discard(range) => Ok(Job::Allocate(token, range, image.discard_mode())),
            Operation::WriteZeroes { range, unmap } => Ok(Job::Allocate(token, range, image.zero_mode(unmap))),
        };
        self.shared.lock().open += 1;
        match job {
            Ok(job) => {
                self.shared.lock().jobs.push_back(job);
                self.shared.more.notify_one();
            }
            Err(error) => self.shared.complete(token, Err(error)),
        }
    }

    fn start(&mut self) {
        self.shared.begin_flush(&mut self.shared.lock());
    }

    fn take_completed(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.shared.lock().completed);
    }

    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        let mut work = self.shared.lock();
        while work.completed.is_empty() && work.open > 0 {
            work = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => break,
                Some(left) => self.shared.less.wait_timeout(work, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.shared.less.wait(work).unwrap_or_else(PoisonError::into_inner),
            };
        }
        !work.completed.is_empty()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.more.notify_all();
        for worker in self.workers.drain(..) {
            // Each ends what it is at: nothing touches the guest's memory after this.
            let _ = worker.join();
        }
    }
}
