//! The redo engine (LRVM): new values go to a log on a disk; one write and its flush commit.
//!
//! ```text
//!   end_transaction ─► spool (memory) ─► batch in the log ─► region's file
//!                        no-flush: here      flush: here        truncation: the batch is needed no longer
//! ```
//!
//! Batches follow each other in a ring. Its head, where the oldest batch that counts begins, stands in the log's status. **Truncation**
//! takes an epoch, the batches from the head on up to a bound, brings the newest bytes of each range to the regions, flushes those, and only then
//! moves the head. It reads batches that are durable and writes where no mapping looks, so commits go on meanwhile.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::batch::{self, HEADER, Place, SECTOR};
use super::fault::seeded;
use super::group::{Group, GroupError, Ticket};
use super::ranges::{Ranges, encoded_len};
use super::status::{RECORDS_AT, Status, damaged};
use super::{Options, Regions, RvmError};
use crate::region::{Region, RegionError};

/// The least that a ring has, in bytes.
pub(crate) const LEAST_RING: u64 = 8192;
/// What an epoch has at most, in bytes of log: it is in memory meanwhile.
const EPOCH: u64 = 16 << 20;
/// How much is looked at in one read when headers are sought.
const LOOK: u64 = 1 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The ring of a log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ring<'a> {
    log: &'a Region,
    length: u64,
}

impl<'a> Ring<'a> {
    pub(crate) fn of(log: &'a Region) -> Result<Self, RvmError> {
        let length = log.size().saturating_sub(RECORDS_AT) / SECTOR * SECTOR;
        if length < LEAST_RING {
            return Err(RvmError::LogTooSmall { size: log.size(), least: RECORDS_AT + LEAST_RING });
        }
        Ok(Self { log, length })
    }

    /// Where `length` bytes at `position` lie in the region: one piece, or two around the end of the ring.
    fn pieces(&self, position: u64, length: usize) -> (u64, usize) {
        let at = position % self.length;
        (RECORDS_AT + at, length.min(usize::try_from(self.length - at).unwrap_or(usize::MAX)))
    }

    /// At most a ring's length can be asked for.
    fn read(&self, position: u64, length: u64) -> Result<Vec<u8>, RegionError> {
        let mut bytes = vec![0; length.min(self.length) as usize];
        let (at, first) = self.pieces(position, bytes.len());
        let (head, tail) = bytes.split_at_mut(first);
        self.log.read_at(head, at)?;
        self.log.read_at(tail, RECORDS_AT)?;
        Ok(bytes)
    }

    /// Writes and returns once it is durable.
    fn write(&self, position: u64, bytes: &[u8]) -> Result<(), RegionError> {
        let (at, first) = self.pieces(position, bytes.len());
        if seeded("a commit is not flushed") {
            self.log.write_at(&bytes[..first], at)?;
            return self.log.write_at(&bytes[first..], RECORDS_AT);
        }
        if first == bytes.len() {
            return self.log.write_durable_at(bytes, at);
        }
        self.log.write_at(&bytes[..first], at)?;
        if !seeded("what lies behind the end of the ring is not written") {
            self.log.write_at(&bytes[first..], RECORDS_AT)?;
        }
        self.log.sync()
    }

    /// The batch at `position`, if it is whole and ends at or before `until`: its ranges are added, and where the next begins is returned.
    fn batch(&self, place: Place, until: u64, ranges: &mut Ranges) -> Result<Option<u64>, RvmError> {
        let room = until.saturating_sub(place.position);
        let header = self.read(place.position, room.min(HEADER as u64))?;
        let Some(head) =
            batch::decode_head(&header).filter(|head| head.place == place && head.length <= room && !head.is_seal())
        else {
            return Ok(None);
        };
        let body = self.read(place.position + HEADER as u64, head.length - HEADER as u64)?;
        match batch::decode_body(&head, &body, ranges) {
            Ok(()) => Ok(Some(place.position + head.length.next_multiple_of(SECTOR))),
            Err(batch::BodyError::Sum) => Ok(None),
            Err(error @ batch::BodyError::Malformed) => Err(damaged(self.log, format!("a batch: {error}"))),
        }
    }

    /// Whether there is a seal at `place`: all before it was durable when it was written.
    fn is_sealed(&self, place: Place, until: u64) -> Result<bool, RegionError> {
        let room = until.saturating_sub(place.position);
        let header = self.read(place.position, room.min(HEADER as u64))?;
        Ok(batch::decode_head(&header).is_some_and(|head| head.place == place && head.is_seal()))
    }

    /// Whether a batch that was written after the one at `end` counts, or the log has gone on past what its status says. Either proves that
    /// what is at `end` was durable once, since the next batch is written only then; so it is damage, and no commit that a cut tore.
    fn goes_on(&self, place: Place, end: u64, until: u64) -> Result<bool, RvmError> {
        let mut at = end;
        while at < until {
            let bytes = self.read(at, LOOK.min(until - at))?;
            let later = bytes.chunks(SECTOR as usize).filter_map(batch::decode_head).any(|head| {
                let ours = head.place.key == place.key;
                let same = head.place.generation == place.generation && head.place.position > end;
                ours && (same || head.place.generation > place.generation)
            });
            if later {
                return Ok(true);
            }
            at += LOOK;
        }
        Ok(false)
    }
}

/// What was found in the log when it was initialized.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Redo: batches that were brought to their regions. Undo: transactions that were rolled back.
    pub replayed: u64,
    /// Bytes that were written to regions.
    pub bytes: u64,
    /// Regions whose changes were in the log and which are no longer in the pool.
    pub orphans: u64,
}

/// Finds the region of an id, if it is in the pool, and only if it belongs to the log.
pub(crate) type Find<'a> = dyn Fn(u64) -> Result<Option<Arc<Region>>, RvmError> + 'a;

/// What a log has that counts.
#[derive(Debug)]
pub(crate) struct Found {
    /// The newest bytes of each range.
    pub(crate) ranges: Ranges,
    /// Where it ends.
    pub(crate) end: u64,
    /// How many batches.
    pub(crate) batches: u64,
    /// There is a seal at the end.
    pub(crate) sealed: bool,
    /// Whether more than a quarter of the ring is in use: who reads it without a recovery reads all of that.
    pub(crate) crowded: bool,
}

/// Reads what counts, from the head on. Changes nothing.
pub(crate) fn scan(log: &Region, status: &Status) -> Result<Found, RvmError> {
    let ring = Ring::of(log)?;
    let place = |position| Place { key: status.key, generation: status.generation, position };
    let (mut ranges, mut end, mut batches) = (Ranges::default(), status.head, 0);
    let until = status.head + ring.length;
    while let Some(next) = ring.batch(place(end), until, &mut ranges)? {
        end = next;
        batches += 1;
    }
    let sealed = ring.is_sealed(place(end), until)?;
    // A later batch would lie in the place of the seal.
    if !sealed && ring.goes_on(place(end), end, until)? {
        return Err(damaged(log, format!("the batch at {end} is damaged, and it was durable once")));
    }
    Ok(Found { ranges, end, batches, sealed, crowded: end - status.head > ring.length / 4 })
}

/// Brings all that the log has to its regions, and empties it. Interrupted anywhere, it does the same again.
pub(crate) fn recover(log: &Region, status: &mut Status, find: &Find<'_>) -> Result<Recovery, RvmError> {
    let Found { ranges, end, batches, sealed, .. } = scan(log, status)?;
    if batches > 0 && !sealed && !seeded("a recovery does not flush the log first") {
        // Its writer may have been killed before it did, and what follows is half done at a cut: the log must have all of it then.
        log.sync()?;
    }
    let mut recovery = Recovery { replayed: batches, ..Recovery::default() };
    let regions = apply(log, &ranges, find, &mut recovery)?;
    if !seeded("a recovery does not flush the regions") {
        regions.iter().try_for_each(|region| region.sync())?;
    }
    status.generation += 1;
    status.head = end;
    status.store(log)?;
    Ok(recovery)
}

/// Writes `ranges` to their regions. All are looked at before the first byte is written.
fn apply(
    log: &Region,
    ranges: &Ranges,
    find: &Find<'_>,
    recovery: &mut Recovery,
) -> Result<Vec<Arc<Region>>, RvmError> {
    let mut regions: Vec<Arc<Region>> = Vec::new();
    let mut orphan = None;
    for (id, offset, bytes) in ranges.iter() {
        if regions.last().is_none_or(|region| region.id() != id) && orphan != Some(id) {
            match find(id)? {
                Some(region) => regions.push(region),
                None => {
                    orphan = Some(id);
                    recovery.orphans += 1;
                }
            }
        }
        let region = regions.last().filter(|region| region.id() == id);
        let inside = |region: &Region| offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= region.size());
        if let Some(region) = region.filter(|region| !inside(region)) {
            let reason = format!("{} bytes at {offset} are not all in region {}", bytes.len(), region.name());
            return Err(damaged(log, reason));
        }
    }
    for region in &regions {
        recovery.bytes += write_all(region, ranges.iter().filter(|(id, ..)| *id == region.id()))?;
    }
    Ok(regions)
}

/// Writes ranges, ascending, of one region; neighbours in one go. Returns how many bytes they are.
fn write_all<'a>(region: &Region, ranges: impl Iterator<Item = (u64, u64, &'a [u8])>) -> Result<u64, RegionError> {
    let (mut start, mut run, mut written) = (0, Vec::new(), 0);
    for (_, offset, bytes) in ranges {
        if start + run.len() as u64 != offset {
            region.write_at(&run, start)?;
            run.clear();
            start = offset;
        }
        run.extend_from_slice(bytes);
        written += bytes.len() as u64;
    }
    region.write_at(&run, start)?;
    Ok(written)
}

/// Committed and not in the log yet: a batch that is put together, and those that are full.
#[derive(Debug, Default)]
pub(crate) struct Spool {
    full: Vec<Ranges>,
    open: Ranges,
}

impl Spool {
    fn bytes(&self) -> usize {
        self.full.iter().map(Ranges::encoded).sum::<usize>() + self.open.encoded()
    }
}

/// Where the log begins and ends.
#[derive(Debug)]
struct Ends {
    status: Status,
    end: u64,
}

#[derive(Debug)]
pub(crate) struct Redo {
    log: Arc<Region>,
    regions: Arc<Regions>,
    group: Group<Spool>,
    ends: Mutex<Ends>,
    /// Held by whoever truncates.
    truncating: Mutex<()>,
    options: Mutex<Options>,
    call: Mutex<Call>,
    called: Condvar,
}

/// What the truncation's thread is to do.
#[derive(Debug, Default)]
struct Call {
    truncate: bool,
    stop: bool,
}

impl Redo {
    /// Of a log that ends at `end`.
    pub(crate) fn new(log: Arc<Region>, status: Status, end: u64, regions: Arc<Regions>, options: Options) -> Self {
        Self {
            log,
            regions,
            group: Group::new(),
            ends: Mutex::new(Ends { status, end }),
            truncating: Mutex::new(()),
            options: Mutex::new(options),
            call: Mutex::default(),
            called: Condvar::new(),
        }
    }

    pub(crate) fn options(&self) -> Options {
        *lock(&self.options)
    }

    pub(crate) fn set_options(&self, options: Options) {
        *lock(&self.options) = options;
    }

    fn ring(&self) -> Result<Ring<'_>, RvmError> {
        Ring::of(&self.log)
    }

    /// What a transaction may take at most, by [`Redo::cost`].
    pub(crate) fn most(&self) -> u64 {
        self.log.size().saturating_sub(RECORDS_AT) / 4
    }

    /// The most that a range of so many bytes can add to a batch: it may split one that is there, into two.
    pub(crate) fn cost(bytes: usize) -> u64 {
        (encoded_len(bytes) + 2 * encoded_len(0) + 64) as u64
    }

    /// Bytes that are committed and not in the log yet, and bytes of log in use.
    pub(crate) fn used(&self) -> (u64, u64) {
        let spooled = self.group.look(Spool::bytes) as u64;
        let ends = lock(&self.ends);
        (spooled, ends.end - ends.status.head)
    }

    /// Commits `ranges`, which cost at most `cost`, in memory. A full spool is flushed by whoever fills it.
    pub(crate) fn commit<'r>(
        &self,
        ranges: impl Iterator<Item = (u64, u64, &'r [u8])>,
        cost: u64,
        flush: bool,
    ) -> Result<(), RvmError> {
        // Half of the ring, so that a batch finds room once the one before it was truncated.
        let full = (self.most() * 2).saturating_sub(cost + HEADER as u64);
        let (ticket, spooled) = self
            .group
            .join(|spool| {
                if spool.open.encoded() as u64 > full {
                    spool.full.push(std::mem::take(&mut spool.open));
                }
                ranges.for_each(|(region, offset, bytes)| spool.open.insert(region, offset, bytes));
                spool.bytes() as u64
            })
            .ok_or(RvmError::Poisoned)?;
        let limit = self.options().spool;
        if flush || spooled > limit { self.settle(ticket) } else { Ok(()) }
    }

    /// Returns once all that was committed is durable.
    pub(crate) fn flush(&self) -> Result<(), RvmError> {
        self.settle(self.group.newest())
    }

    fn settle(&self, ticket: Ticket) -> Result<(), RvmError> {
        let settled = self.group.settle(ticket, |spool: Spool| {
            let batches = spool.full.into_iter().chain([spool.open]).filter(|batch| !batch.is_empty());
            batches.into_iter().try_for_each(|batch| self.append(&batch))
        });
        settled.map_err(|error| match error {
            GroupError::Write(error) => error,
            GroupError::Poisoned => RvmError::Poisoned,
        })
    }

    /// Writes a batch behind the last. Called by one thread at a time.
    fn append(&self, ranges: &Ranges) -> Result<(), RvmError> {
        let ring = self.ring()?;
        let place = {
            let ends = lock(&self.ends);
            Place { key: ends.status.key, generation: ends.status.generation, position: ends.end }
        };
        let bytes = batch::encode(place, ranges);
        let end = place.position + bytes.len() as u64;
        while end - lock(&self.ends).status.head > ring.length {
            // Back-pressure: the committer waits for the truncation, or does it.
            self.truncate_epoch(place.position)?;
        }
        ring.write(place.position, &bytes)?;
        let mut ends = lock(&self.ends);
        ends.end = end;
        let used = end - ends.status.head;
        drop(ends);
        let percent = self.options().truncate_at;
        if percent.is_some_and(|percent| used > ring.length / 100 * u64::from(percent)) {
            lock(&self.call).truncate = true;
            self.called.notify_one();
        }
        Ok(())
    }

    /// Writes a seal behind the last batch: see [`batch::Head::is_seal`]. It is not flushed, and it counts as no batch: the next one takes its
    /// place. A full log has no room for one.
    pub(crate) fn seal(&self) -> Result<(), RvmError> {
        let ring = self.ring()?;
        let ends = lock(&self.ends);
        if ends.end + SECTOR - ends.status.head > ring.length {
            return Ok(());
        }
        let place = Place { key: ends.status.key, generation: ends.status.generation, position: ends.end };
        let (at, _) = ring.pieces(place.position, SECTOR as usize);
        Ok(self.log.write_at(&batch::encode(place, &Ranges::default()), at)?)
    }

    /// Truncates what is durable in the log now.
    pub(crate) fn truncate(&self) -> Result<(), RvmError> {
        let end = lock(&self.ends).end;
        while lock(&self.ends).status.head < end {
            self.truncate_epoch(end)?;
        }
        Ok(())
    }

    /// Truncates an epoch: the batches from the head on, [`EPOCH`] bytes or one batch, none that begins at `end` or behind.
    fn truncate_epoch(&self, end: u64) -> Result<(), RvmError> {
        let _one_at_a_time = lock(&self.truncating);
        let mut status = lock(&self.ends).status.clone();
        let ring = self.ring()?;
        let mut ranges = Ranges::default();
        let first = status.head;
        while status.head < end && status.head - first < EPOCH {
            let place = Place { key: status.key, generation: status.generation, position: status.head };
            let kept =
                if seeded("a truncation leaves out its last batch") { ranges.clone() } else { Ranges::default() };
            let next = ring.batch(place, end, &mut ranges)?;
            let lost = || damaged(&self.log, format!("the batch at {}, which was written, is not there", status.head));
            status.head = next.ok_or_else(lost)?;
            if status.head >= end && seeded("a truncation leaves out its last batch") {
                ranges = kept;
                break;
            }
        }
        if status.head == first {
            return Ok(());
        }
        if seeded("the head is moved before the regions are flushed") {
            status.store(&self.log)?;
        }
        let find = |id| Ok(self.regions.region(id));
        let regions = apply(&self.log, &ranges, &find, &mut Recovery::default())?;
        if !seeded("a truncation does not flush the regions") {
            regions.iter().try_for_each(|region| region.sync())?;
        }
        status.store(&self.log)?;
        lock(&self.ends).status = status;
        Ok(())
    }

    /// Truncates whenever it is called to, until it is told to stop.
    fn attend(&self) {
        loop {
            let mut call = lock(&self.call);
            while !call.truncate && !call.stop {
                call = self.called.wait(call).unwrap_or_else(PoisonError::into_inner);
            }
            if call.stop {
                return;
            }
            call.truncate = false;
            drop(call);
            // Whoever needs the room meets the same error, and says so.
            let _ = self.truncate();
        }
    }
}

/// The thread that truncates a log in the background; it ends with this.
#[derive(Debug)]
pub(crate) struct Truncator {
    redo: Arc<Redo>,
    thread: Option<JoinHandle<()>>,
}

impl Truncator {
    pub(crate) fn start(redo: &Arc<Redo>) -> Result<Self, RvmError> {
        let attending = Arc::clone(redo);
        let thread = crate::threads::spawn("rvm truncation", move || attending.attend());
        let thread = thread.map_err(|source| RvmError::Thread { source })?;
        Ok(Self { redo: Arc::clone(redo), thread: Some(thread) })
    }
}

impl Drop for Truncator {
    fn drop(&mut self) {
        lock(&self.redo.call).stop = true;
        self.redo.called.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
