//! Restoring whole regions at the speed of the disk: pages are read in the order in which they lie in the packs.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vfs::ReadFrom;

use crate::codec::Codec;
use crate::error::StoreError;
use crate::frame::Malformed;
use crate::generation::{PAGE_SIZE, Page, pages_of};
use crate::hash::Hash;
use crate::node::{Entry, FANOUT, Link, ManifestRegion};
use crate::pack::PackFile;
use crate::place::PAGE_GAP;
use crate::reader::Reader;
use crate::store::{Integrity, Store};
use crate::stream::{Read, Source};

/// Leaves planned at a time: up to 4 GiB of pages, some 70 MiB of plan.
const WINDOW: usize = (1 << 20) / FANOUT;
/// Leaves held at a time while a plan is made: some 4 MiB.
const LEAVES: usize = 2048;

/// Where restored pages go. Called from several threads at once, each page by one of them.
pub trait PageSink: Sync {
    /// Takes consecutive pages, the first of which is `first_page`. The region's last page comes whole, padded with zeros.
    ///
    /// # Errors
    /// Whatever stops the restore.
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()>;

    /// Takes `count` pages that are zero. For a region that is zero already there is nothing to do.
    ///
    /// # Errors
    /// Whatever stops the restore.
    fn zero(&self, first_page: u64, count: u64) -> io::Result<()>;
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestoreReport {
    /// Pages written that are not zero.
    pub pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Bytes read from data packs.
    pub bytes_read: u64,
    /// Pages of which one copy was bad and another good.
    pub saved_by_redundancy: u64,
    /// Pages that no copy has, left out under [`Integrity::Warn`], in order.
    pub damaged: Vec<u64>,
}

/// A page to be read.
#[derive(Debug, Clone, Copy)]
struct Job {
    page: u64,
    entry: Entry,
}

impl Job {
    fn link(&self) -> &Link {
        &self.entry.first
    }
}

/// What the threads of one restore share.
struct Work<'a> {
    reader: &'a Reader,
    region: &'a ManifestRegion,
    sink: &'a dyn PageSink,
    pages: AtomicU64,
    bytes: AtomicU64,
    saved: AtomicU64,
    damaged: Mutex<Vec<u64>>,
    failed: Mutex<Option<StoreError>>,
    stop: AtomicBool,
}

impl Reader {
    /// Writes a whole region to `sink`. Every page is verified before the sink sees it.
    ///
    /// `progress` hears how many pages of how many are done, zero ones included, about once a megabyte.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] for a page that no copy has (unless [`Integrity::Warn`]) or an archive that cannot be read;
    /// [`StoreError::Sink`] if the sink refuses. What was written by then stays written.
    pub fn restore_region(
        &self,
        region: usize,
        sink: &dyn PageSink,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<RestoreReport, StoreError> {
        let region = self.manifest_region(region)?;
        let total = pages_of(region.size);
        let work = Work {
            reader: self,
            region,
            sink,
            pages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            saved: AtomicU64::new(0),
            damaged: Mutex::default(),
            failed: Mutex::default(),
            stop: AtomicBool::new(false),
        };
        let (mut next, mut zero_pages) = (0, 0);
        while next < total {
            let (jobs, zeros, until) = self.plan(region, next, total)?;
            for range in zeros {
                zero_pages += range.end - range.start;
                let zeroed = sink.zero(range.start, range.end - range.start);
                zeroed.map_err(|source| StoreError::Sink { region: region.name.clone(), source })?;
            }
            let before = zero_pages;
            work.run(&jobs, &mut |pages| progress(before + pages, total));
            if let Some(error) = work.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return Err(error);
            }
            next = until;
        }
        progress(total, total);
        let mut damaged = work.damaged.into_inner().unwrap_or_else(PoisonError::into_inner);
        damaged.sort_unstable();
        Ok(RestoreReport {
            pages: work.pages.into_inner(),
            zero_pages,
            bytes_read: work.bytes.into_inner(),
            saved_by_redundancy: work.saved.into_inner(),
            damaged,
        })
    }

    /// The pages from `from` on, sorted by where they lie; the zero ranges between; and where the plan ends.
    #[allow(clippy::type_complexity)]
    fn plan(
        &self,
        region: &ManifestRegion,
        from: u64,
        total: u64,
    ) -> Result<(Vec<Job>, Vec<Range<u64>>, u64), StoreError> {
        let Store { inner } = &self.store;
        let (mut jobs, mut zeros, mut next) = (Vec::new(), Vec::new(), from);
        let (leaves, until) = inner.archive.leaves_from(region, from, WINDOW, inner.options.threads)?;
        for leaves in leaves.chunks(LEAVES) {
            for (first, leaf) in inner.archive.load_leaves(leaves, inner.options.threads)? {
                for (page, entry) in (first..total).zip(leaf.entries()).filter(|(page, _)| *page >= from) {
                    if let Some(entry) = entry {
                        if next < page {
                            zeros.push(next..page);
                        }
                        jobs.push(Job { page, entry: *entry });
                        next = page + 1;
                    }
                }
            }
        }
        let end = until.unwrap_or(total).min(total);
        if next < end {
            zeros.push(next..end);
        }
        jobs.sort_by_cached_key(|job| (job.link().pack, job.link().unit, job.page));
        Ok((jobs, zeros, end))
    }
}

impl Work<'_> {
    fn run(&self, jobs: &[Job], progress: &mut dyn FnMut(u64)) {
        let source = Source {
            packs: &self.reader.store.inner.packs,
            file: PackFile::Data,
            from: ReadFrom::Nearest,
            gap: PAGE_GAP,
            sorted: jobs,
            place: |job: &Job| job.link().place(),
            stop: &self.stop,
        };
        // What cannot be read fails its checksum, and is tried again page by page.
        let verify = |read: Read<'_, Job>| {
            self.bytes.fetch_add(read.count.unwrap_or(0) as u64, Ordering::Relaxed);
            self.hand_out(read.items, read.bytes);
        };
        source.stream(self.reader.store.inner.options.threads, &verify, &mut || {
            progress(self.pages.load(Ordering::Relaxed));
        });
    }

    fn fail(&self, error: StoreError) {
        self.stop.store(true, Ordering::Relaxed);
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    /// The pages of one read, verified, and handed on in runs.
    fn hand_out(&self, jobs: &[Job], buffer: &[u8]) {
        let start = jobs[0].link().offset();
        let stored = |job: &Job| {
            let at = (job.link().offset() - start) as usize;
            at..at + usize::from(job.link().length)
        };
        let raw = jobs.iter().filter(|job| job.link().codec == Codec::Raw).map(|job| &buffer[stored(job)]);
        let mut hashes = Hash::of_pages(raw).into_iter();
        // Pages that lie side by side both here and in the region go to the sink as one.
        let mut run: Option<(u64, Range<usize>)> = None;
        let mut plain = [0; PAGE_SIZE];
        for job in jobs {
            let stored = stored(job);
            // The hash says all that the CRC could.
            if job.link().codec == Codec::Raw && hashes.next() == Some(job.entry.hash) {
                run = match run.take() {
                    Some((first, bytes))
                        if bytes.end == stored.start
                            && first + ((bytes.end - bytes.start) / PAGE_SIZE) as u64 == job.page =>
                    {
                        Some((first, bytes.start..stored.end))
                    }
                    other => {
                        self.hand_on(other, buffer);
                        Some((job.page, stored))
                    }
                };
            } else if self.decode_or_reread(job, &buffer[stored], &mut plain) {
                self.write(job.page, &plain);
            }
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
        }
        self.hand_on(run, buffer);
    }

    /// The page from what was read, or else from any copy. `false` if there is none.
    fn decode_or_reread(&self, job: &Job, stored: &[u8], plain: &mut Page) -> bool {
        if Store::check_copy(job.entry.hash, job.link(), stored, plain).is_ok() {
            return true;
        }
        match self.reader.store.read_entry(&job.entry, plain) {
            Ok(copy) => {
                self.saved.fetch_add(u64::from(copy > 0), Ordering::Relaxed);
                true
            }
            Err(why) => {
                self.give_up(job, why);
                false
            }
        }
    }

    fn give_up(&self, job: &Job, why: Malformed) {
        match self.reader.store.inner.options.integrity {
            Integrity::Fail => self.fail(self.reader.lost(self.region, job.page, why)),
            Integrity::Warn => self.damaged.lock().unwrap_or_else(PoisonError::into_inner).push(job.page),
        }
    }

    fn hand_on(&self, run: Option<(u64, Range<usize>)>, buffer: &[u8]) {
        if let Some((first, bytes)) = run {
            self.write(first, &buffer[bytes]);
        }
    }

    fn write(&self, first: u64, bytes: &[u8]) {
        match self.sink.write(first, bytes) {
            Ok(()) => drop(self.pages.fetch_add((bytes.len() / PAGE_SIZE) as u64, Ordering::Relaxed)),
            Err(source) => self.fail(StoreError::Sink { region: self.region.name.clone(), source }),
        }
    }
}
