//! Things that lie anywhere in the packs, read in the order in which they lie by one thread and verified by others meanwhile.
//!
//! One reader, not several: a file that is read from its beginning to its end is what the kernel reads ahead of, in few large requests;
//! several readers of one file undo that (measured: half the throughput, also past the page cache).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

use crate::pack::{PackFile, Packs};
use crate::place::{Place, coalesce, hull};

/// Reads that wait for each thread that verifies.
const WAITING: usize = 2;

/// What lies together and was read at once.
pub(crate) struct Read<'a, T> {
    /// The things, in their order.
    pub(crate) items: &'a [T],
    /// From the first byte of the first thing to the last of any; zero where nothing could be read.
    pub(crate) bytes: &'a [u8],
    /// Bytes that were read; `None` if the file cannot be.
    pub(crate) count: Option<usize>,
}

/// A read on its way from the thread that reads.
struct Fetched {
    read: Range<usize>,
    buffer: Vec<u8>,
    length: usize,
    count: Option<usize>,
}

/// Where things are read from.
pub(crate) struct Source<'a, T, P> {
    pub(crate) packs: &'a Packs,
    pub(crate) file: PackFile,
    /// In the order in which they lie.
    pub(crate) sorted: &'a [T],
    /// Where one lies.
    pub(crate) place: P,
    /// Nothing more is to be read.
    pub(crate) stop: &'a AtomicBool,
}

impl<T: Sync, P: Fn(&T) -> Place + Sync> Source<'_, T, P> {
    /// Reads everything and has it verified by `threads` threads, this one among them, which says so to `between` after each read of its own.
    pub(crate) fn stream(&self, threads: usize, verify: &(dyn Fn(Read<'_, T>) + Sync), between: &mut dyn FnMut()) {
        let reads = coalesce(self.sorted, &self.place);
        if threads < 2 || reads.len() < 2 {
            let mut buffer = Vec::new();
            for read in reads.into_iter().take_while(|_| !self.stop.load(Ordering::Relaxed)) {
                let fetched = self.fetch(read, std::mem::take(&mut buffer));
                buffer = self.hand_over(fetched, verify);
                between();
            }
            return;
        }
        let (ready, waiting) = mpsc::sync_channel(threads * WAITING);
        let (empty, used) = mpsc::channel();
        let waiting = Mutex::new(waiting);
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for read in reads {
                    let fetched = self.fetch(read, used.try_recv().unwrap_or_default());
                    if self.stop.load(Ordering::Relaxed) || ready.send(fetched).is_err() {
                        return;
                    }
                }
            });
            for _ in 1..threads {
                let empty = empty.clone();
                scope.spawn(move || {
                    while let Ok(fetched) = next() {
                        let _ = empty.send(self.hand_over(fetched, verify));
                    }
                });
            }
            while let Ok(fetched) = next() {
                let _ = empty.send(self.hand_over(fetched, verify));
                between();
            }
        });
    }

    fn fetch(&self, read: Range<usize>, mut buffer: Vec<u8>) -> Fetched {
        let place = hull(self.sorted[read.clone()].iter().map(&self.place));
        let length = (place.end - place.start) as usize;
        let count = self.packs.read_place(self.file, place, &mut buffer).ok();
        if count.is_none() {
            buffer.fill(0);
        }
        Fetched { read, buffer, length, count }
    }

    /// Returns the buffer, to be used again.
    fn hand_over(&self, fetched: Fetched, verify: &(dyn Fn(Read<'_, T>) + Sync)) -> Vec<u8> {
        let Fetched { read, buffer, length, count } = fetched;
        verify(Read { items: &self.sorted[read], bytes: &buffer[..length], count });
        buffer
    }
}
