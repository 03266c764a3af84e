//! Things that lie anywhere in the packs, read in the order in which they lie and verified meanwhile.
//!
//! They are read past the page cache into huge pages, in requests of up to 2 MiB: then it matters little to the disk whether requests lie side by
//! side or far apart (`vfs::IoBuffer` has the numbers). Through the page cache those that are far apart came at a third of the
//! pace, since the kernel has nothing to read ahead of.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

use vfs::{IoBuffer, ReadFrom};

use crate::pack::{PackFile, Packs};
use crate::place::{Place, coalesce, hull};

/// Threads that read: while one request is under way, the next one is on its way already.
const READERS: usize = 2;
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
    buffer: Option<IoBuffer>,
    /// Where in the buffer the first thing begins.
    skip: usize,
    length: usize,
    count: Option<usize>,
}

/// Where things are read from.
pub(crate) struct Source<'a, T, P> {
    pub(crate) packs: &'a Packs,
    pub(crate) file: PackFile,
    pub(crate) from: ReadFrom,
    /// Bytes between two things for which it is not worth to read twice.
    pub(crate) gap: u64,
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
        let reads = coalesce(self.sorted, self.gap, &self.place);
        if threads < 2 || reads.len() < 2 {
            let mut buffer = None;
            for read in reads.into_iter().take_while(|_| !self.stop.load(Ordering::Relaxed)) {
                buffer = self.hand_over(self.fetch(read, buffer), verify);
                between();
            }
            return;
        }
        let (ready, waiting) = mpsc::sync_channel(threads * WAITING);
        let (empty, used) = mpsc::channel();
        let (waiting, used, reads) = (Mutex::new(waiting), Mutex::new(used), Mutex::new(reads.into_iter()));
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let wanted = || reads.lock().unwrap_or_else(PoisonError::into_inner).next();
        let spare = || used.lock().unwrap_or_else(PoisonError::into_inner).try_recv().unwrap_or_default();
        std::thread::scope(|scope| {
            for _ in 0..READERS {
                let ready = ready.clone();
                let (wanted, spare) = (&wanted, &spare);
                scope.spawn(move || {
                    while let Some(read) = wanted() {
                        let fetched = self.fetch(read, spare());
                        if self.stop.load(Ordering::Relaxed) || ready.send(fetched).is_err() {
                            return;
                        }
                    }
                });
            }
            // Else those who wait for what is ready would never hear that there is no more.
            drop(ready);
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

    fn fetch(&self, read: Range<usize>, mut buffer: Option<IoBuffer>) -> Fetched {
        let place = hull(self.sorted[read.clone()].iter().map(&self.place));
        let length = (place.end - place.start) as usize;
        let found = self.packs.read_large(self.file, place, self.from, &mut buffer).ok();
        let (skip, count) = found.map_or((0, None), |(skip, count)| (skip, Some(count)));
        Fetched { read, buffer, skip, length, count }
    }

    /// Returns the buffer, to be used again.
    fn hand_over(&self, fetched: Fetched, verify: &(dyn Fn(Read<'_, T>) + Sync)) -> Option<IoBuffer> {
        let Fetched { read, buffer, skip, length, count } = fetched;
        let items = &self.sorted[read];
        match (&buffer, count) {
            (Some(buffer), Some(_)) => verify(Read { items, bytes: &buffer[skip..skip + length], count }),
            _ => verify(Read { items, bytes: &vec![0; length], count: None }),
        }
        buffer
    }
}
