//! A transaction: a guard over memory, which aborts unless it is ended.

use std::ops::Range;

use super::memory::Memory;
use super::ranges::Coverage;
use super::redo::Redo;
use super::undo::{Journal, Undo};
use super::{Engine, EngineOf, Rvm, RvmError};

/// Whether a transaction keeps old values, so that it can be aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It does (LRVM's `restore`).
    Restore,
    /// The caller promises to end it, which saves a copy with the redo engine (LRVM's `no-restore`). If it is dropped nevertheless,
    /// its memory is out of use until the log is initialized anew. With the undo engine there are old values in any case, and it is restored.
    NoRestore,
}

/// When a commit is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// When [`Transaction::end_transaction`] returns.
    Flush,
    /// After the next [`Rvm::flush`], or the next commit with [`Commit::Flush`], or once the spool is full: never before an earlier commit. With
    /// the undo engine there is nothing to be gained, and it is as `Flush`.
    NoFlush,
}

/// Memory that is enrolled in a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    transaction: u64,
    index: usize,
}

#[derive(Debug)]
struct Enrolled<'r> {
    memory: &'r mut Memory,
    set: Coverage,
}

/// Old bytes with the redo engine: part, where in it, where in `bytes`.
#[derive(Debug, Default)]
struct Old {
    ranges: Vec<(usize, usize, Range<usize>)>,
    bytes: Vec<u8>,
}

#[derive(Debug)]
enum Log<'r> {
    /// Old values, if they are kept, and what the new ones cost.
    Redo { redo: &'r Redo, old: Option<Old>, cost: u64 },
    /// `None` before the first range, and at the end.
    Undo { undo: &'r Undo, journal: Option<Journal<'r>> },
}

/// A transaction. Dropped, it aborts.
///
/// The memory of all its parts is borrowed until it ends: nobody else sees what it changes before. What it does not give is a lock: who shares
/// memory among threads puts it in a `Mutex`, or splits it ([`Memory::split_at`]).
#[derive(Debug)]
pub struct Transaction<'r> {
    id: u64,
    parts: Vec<Enrolled<'r>>,
    log: Log<'r>,
}

impl<'r> Transaction<'r> {
    pub(super) fn begin(rvm: &'r Rvm, id: u64, mode: Mode) -> Result<Self, RvmError> {
        let log = match &rvm.engine {
            EngineOf::Redo { redo, .. } => Log::Redo { redo, old: (mode == Mode::Restore).then(Old::default), cost: 0 },
            EngineOf::Undo(undo) => Log::Undo { undo, journal: Some(undo.begin()?) },
        };
        Ok(Self { id, parts: Vec::new(), log })
    }

    /// Takes memory for this transaction.
    ///
    /// # Errors
    /// [`RvmError::ForeignMemory`]; [`RvmError::Unrestored`].
    pub fn enroll(&mut self, memory: &'r mut Memory) -> Result<Part, RvmError> {
        if memory.mapped.owner != self.owner() {
            return Err(RvmError::ForeignMemory { region: memory.region().clone() });
        }
        if !memory.enroll() {
            return Err(RvmError::Unrestored { region: memory.region().clone() });
        }
        self.parts.push(Enrolled { memory, set: Coverage::default() });
        Ok(Part { transaction: self.id, index: self.parts.len() - 1 })
    }

    /// The upper half of an id is the `Rvm`'s.
    fn owner(&self) -> u64 {
        super::owner_of(self.id)
    }

    /// The bytes of a part as they are now.
    ///
    /// # Errors
    /// [`RvmError::ForeignPart`].
    pub fn bytes(&self, part: Part) -> Result<&[u8], RvmError> {
        let enrolled = self.parts.get(part.index).filter(|_| part.transaction == self.id);
        enrolled.map(|enrolled| &**enrolled.memory).ok_or(RvmError::ForeignPart)
    }

    /// Bytes `range` of a part, to be changed: what is changed in them is committed, or restored by an abort. Ranges may be nested in earlier
    /// ones or cross them; each byte is logged once.
    ///
    /// # Errors
    /// [`RvmError::OutOfBounds`]; [`RvmError::TooLarge`], also where the sum of all ranges is; [`RvmError::ForeignPart`]. The transaction is as
    /// it was before, and can go on.
    pub fn set_range(&mut self, part: Part, range: Range<usize>) -> Result<&mut [u8], RvmError> {
        let enrolled = self.parts.get_mut(part.index).filter(|_| part.transaction == self.id);
        let Enrolled { memory, set } = enrolled.ok_or(RvmError::ForeignPart)?;
        let length = memory.len();
        let (start, end) = (range.start, range.end);
        if start > end || end > length {
            return Err(RvmError::OutOfBounds { region: memory.region().clone(), length, start, end });
        }
        self.log.make_room(set, &range)?;
        for gap in set.gaps(range.clone()) {
            let old = memory.get(gap.clone()).unwrap_or_default();
            self.log.keep(memory, part.index, gap.start, old);
        }
        set.add(range.clone());
        Ok(memory.bytes_mut(range))
    }

    /// Commits: all ranges of all parts, or (after a cut) none.
    ///
    /// # Errors
    /// [`RvmError::Poisoned`], [`RvmError::Region`], [`RvmError::LogDamaged`]: the log could not be written or truncated. Whether the
    /// transaction is durable is known after the next [`Rvm::initialize`]; until then nothing more can be committed.
    pub fn end_transaction(mut self, commit: Commit) -> Result<(), RvmError> {
        let committed = match &mut self.log {
            // Nothing was set.
            Log::Redo { cost: 0, .. } => Ok(()),
            Log::Redo { redo, cost, .. } => {
                let ranges = self.parts.iter().flat_map(|Enrolled { memory, set }| {
                    let (region, base) = (memory.mapped.region.id(), memory.offset());
                    set.iter().filter_map(move |range| {
                        let bytes = memory.get(range.clone())?;
                        Some((region, (base + range.start) as u64, bytes))
                    })
                });
                redo.commit(ranges, *cost, commit == Commit::Flush)
            }
            Log::Undo { journal, .. } => {
                if !super::fault::seeded("a commit does not write the new bytes back") {
                    self.parts.iter().for_each(Enrolled::write_back);
                }
                if let Some(journal) = journal.take() {
                    journal.end();
                }
                Ok(())
            }
        };
        self.release(true);
        committed
    }

    /// Makes memory what it was at the beginning.
    ///
    /// # Errors
    /// [`RvmError::NoRestore`] in that mode with the redo engine, if something was set.
    pub fn abort_transaction(mut self) -> Result<(), RvmError> {
        if self.restore() { Ok(()) } else { Err(RvmError::NoRestore) }
    }

    /// Restores, and gives the memory back. `false` if there are no old values.
    fn restore(&mut self) -> bool {
        let restored = match &mut self.log {
            Log::Redo { old: Some(old), .. } => {
                for (part, at, bytes) in old.ranges.iter().rev() {
                    let bytes = old.bytes.get(bytes.clone()).unwrap_or_default();
                    put_back(&mut self.parts, *part, *at, bytes);
                }
                true
            }
            Log::Redo { old: None, cost, .. } => *cost == 0,
            Log::Undo { journal, .. } => {
                if let Some(journal) = journal.take() {
                    journal.saved().for_each(|(part, at, bytes)| put_back(&mut self.parts, part, at, bytes));
                    if !super::fault::seeded("an abort does not write the old bytes back") {
                        self.parts.iter().for_each(Enrolled::write_back);
                    }
                    journal.end();
                }
                true
            }
        };
        self.release(restored);
        restored
    }

    fn release(&mut self, restored: bool) {
        self.parts.drain(..).for_each(|enrolled| enrolled.memory.release(restored));
    }

    /// Which engine makes it atomic.
    #[must_use]
    pub fn engine(&self) -> Engine {
        match self.log {
            Log::Redo { .. } => Engine::Redo,
            Log::Undo { .. } => Engine::Undo,
        }
    }
}

fn put_back(parts: &mut [Enrolled<'_>], part: usize, at: usize, old: &[u8]) {
    if let Some(enrolled) = parts.get_mut(part) {
        enrolled.memory.bytes_mut(at..at + old.len()).copy_from_slice(old);
    }
}

impl Enrolled<'_> {
    fn write_back(&self) {
        self.set.iter().for_each(|range| self.memory.write_back(&range));
    }
}

impl Log<'_> {
    /// Looks whether what `range` adds to `set` fits the log, and counts it.
    fn make_room(&mut self, set: &Coverage, range: &Range<usize>) -> Result<(), RvmError> {
        match self {
            Log::Redo { redo, cost, .. } => {
                let more: u64 = set.gaps(range.clone()).map(|gap| Redo::cost(gap.len())).sum();
                let (needed, allowed) = (*cost + more, redo.most());
                if needed > allowed {
                    return Err(RvmError::TooLarge { needed, allowed });
                }
                *cost = needed;
                Ok(())
            }
            Log::Undo { undo, journal } => {
                let room = journal.as_ref().map_or(0, Journal::room);
                let more: u64 = set.gaps(range.clone()).map(|gap| Journal::cost(gap.len())).sum();
                if more > room {
                    let allowed = undo.most();
                    return Err(RvmError::TooLarge { needed: allowed - room + more, allowed });
                }
                Ok(())
            }
        }
    }

    /// Keeps `old`, the bytes at `at` of a part, for an abort or a recovery.
    fn keep(&mut self, memory: &Memory, part: usize, at: usize, old: &[u8]) {
        match self {
            Log::Redo { old: Some(kept), .. } => {
                let start = kept.bytes.len();
                kept.bytes.extend_from_slice(old);
                kept.ranges.push((part, at, start..start + old.len()));
            }
            Log::Redo { old: None, .. } => {}
            Log::Undo { journal, .. } => {
                if let Some(journal) = journal {
                    journal.save(memory.mapped.region.id(), (memory.offset() + at) as u64, old, part, at);
                }
            }
        }
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // After an end there are no parts and no journal left.
        let over = self.parts.is_empty() && !matches!(self.log, Log::Undo { journal: Some(_), .. });
        if !over {
            self.restore();
        }
    }
}
