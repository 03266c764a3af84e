//! Short use of a log, by one process after another (the pool's catalog): it is gone on with as it is, where [`Rvm::initialize`] empties it, and
//! whoever only looks changes nothing.
//!
//! What makes that safe is the **seal**, an empty batch that is written behind the last one once that is durable, and not flushed itself:
//!
//! * found: all before it is durable, so the log goes on behind the last batch, and what was read may be believed to last;
//! * not found: the writer was killed, or the power went. What the log has is then made durable by a recovery, as ever.
//!
//! So a commit by a process that comes, commits and goes costs one flush.

use super::memory::Memory;
use super::ranges::Ranges;
use super::redo::{self, Found};
use super::status::{RECORDS_AT, Status, damaged};
use super::{ByCopy, Engine, EngineOf, Options, Rvm, RvmError, Segments, batch, random, recover};
use crate::name::RegionName;
use crate::region::Region;
use std::sync::Arc;

/// No thread: the log is in use for moments.
const OPTIONS: Options = Options { spool: 0, truncate_at: None };

/// A log that was gone on with, and the memory of the one region that it serves.
#[derive(Debug)]
pub(crate) struct Resumed {
    pub(crate) rvm: Rvm,
    pub(crate) memory: Memory,
    /// What is in memory was durable before.
    pub(crate) was_sealed: bool,
    /// It is, and there is a seal that says so.
    pub(crate) is_sealed: bool,
}

impl Rvm {
    /// Goes on with `log`, a redo log that serves `region` alone. Its changes are brought to the region first if there is no seal, or more than a quarter
    /// of the log is in use.
    ///
    /// # Errors
    /// As [`Rvm::initialize`] and [`Rvm::map`].
    pub(crate) fn resume(
        segments: Box<dyn Segments>,
        log: &RegionName,
        region: &RegionName,
    ) -> Result<Resumed, RvmError> {
        segments.refresh()?;
        let log = Arc::new(segments.open(log)?);
        let mut status = Status::load(&log)?;
        let mut found = redo::scan(&log, &status)?;
        let (was_sealed, is_sealed) = (found.sealed, found.sealed && !found.crowded);
        if !is_sealed {
            recover(&*segments, &log, &mut status)?;
            found.ranges = Ranges::default();
            found.end = status.head;
        }
        let rvm = Self::over(segments, Arc::clone(&log), status, found.end, OPTIONS, Box::new(ByCopy))?;
        let mut memory = rvm.map(region)?;
        let (id, length) = (memory.mapped.region.id(), memory.len());
        overlay(&log, &found.ranges, id, memory.bytes_mut(0..length))?;
        Ok(Resumed { rvm, memory, was_sealed, is_sealed })
    }

    /// Says that all that was committed so far is durable, for [`Rvm::resume`]. To be called when it is.
    ///
    /// # Errors
    /// [`RvmError::Region`]: then it is found out by a recovery.
    pub(crate) fn seal(&self) -> Result<(), RvmError> {
        match &self.engine {
            EngineOf::Redo { redo, .. } => redo.seal(),
            EngineOf::Undo(_) => Ok(()),
        }
    }
}

/// The bytes of a region with what its log has of it, and whether all of that is durable; `None` if it was changed meanwhile. For whoever has
/// leased neither: nothing is changed, and a change that goes on at the same time shows whole or not at all, or as an error that is gone
/// when one looks again.
pub(crate) fn look(log: &Region, region: &Region) -> Result<Option<(Vec<u8>, bool)>, RvmError> {
    let before = Status::load(log)?;
    // In this order: what a truncation has begun to write meanwhile is in the log until the status says otherwise.
    let mut bytes = vec![0; usize::try_from(region.size()).map_err(|_| damaged(log, "it serves too long a region"))?];
    region.read_at(&mut bytes, 0)?;
    let Found { ranges, sealed, .. } = redo::scan(log, &before)?;
    overlay(log, &ranges, region.id(), &mut bytes)?;
    let unchanged = Status::load(log)? == before;
    Ok(unchanged.then_some((bytes, sealed)))
}

/// Lays what a log has over the bytes of the only region that it may have anything of.
fn overlay(log: &Region, ranges: &Ranges, region: u64, bytes: &mut [u8]) -> Result<(), RvmError> {
    for (id, offset, new) in ranges.iter() {
        let start = usize::try_from(offset).ok().filter(|_| id == region);
        let at = start.and_then(|start| bytes.get_mut(start..)?.get_mut(..new.len()));
        let Some(at) = at else {
            return Err(damaged(log, format!("{} bytes at {offset} are not all in what it serves", new.len())));
        };
        at.copy_from_slice(new);
    }
    Ok(())
}

/// The bytes of a redo log that has nothing yet, for a file that is put together before it is any pool's.
#[derive(Debug)]
pub(crate) struct NewLog {
    /// All of it, without a seal.
    pub(crate) bytes: Vec<u8>,
    /// The seal, to be written once the log can be found after a cut.
    pub(crate) seal: Vec<u8>,
    /// Where in the log the seal goes.
    pub(crate) seal_at: u64,
}

impl NewLog {
    /// Of region `id` with `size` bytes.
    ///
    /// # Errors
    /// The system gave no random number.
    pub(crate) fn of(pool: u64, id: u64, size: usize) -> std::io::Result<Self> {
        let (key, engine) = (random()?, Engine::Redo);
        let mut status = Status {
            sequence: 0,
            pool,
            id,
            size: size as u64,
            key,
            engine,
            saving: false,
            head: 0,
            generation: 1,
            slots: 0,
        };
        let mut bytes = vec![0; size];
        status.put(&mut bytes);
        let place = batch::Place { key, generation: status.generation, position: 0 };
        Ok(Self { bytes, seal: batch::encode(place, &Ranges::default()), seal_at: RECORDS_AT })
    }
}
