//! Memory that is yet to come: it is in a source, and in no frame and no slot.
//!
//! A fault brings it into a frame, as it would from a slot; from then on it is as any other memory, and goes to a slot when it leaves its frame,
//! changed or not. The thread `fetch` brings what nobody has asked for: what is likely to be asked for soon into free frames, the rest into
//! slots, past the frames, so that it pushes nothing out. It rests while faults wait, though not for long: a guest that never stops faulting must
//! not keep it from its end.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::evict::{AGAIN, digest, is_zero};
use super::faults::{Need, Source};
use super::slots::Buffer;
use super::{BUSY, ELSEWHERE, IN_IMAGE, KNOWN, LOST, Pager, PagingError, PagingEvent, SAVED, Shared, State};
use crate::filler::ClusterSource;

/// How long faults have the disk before `fetch` looks again.
const YIELD: Duration = Duration::from_micros(500);
/// How often it looks before it goes on all the same.
const YIELDS_MAX: u32 = 16;
/// Its nice value: the guest's vCPUs go first.
const NICE: i32 = 10;
/// Bytes fetched into frames and not flushed at most: what a freeze finds to flush on top of what the guest wrote.
const UNFLUSHED_MAX: u64 = 16 << 20;

/// Where memory is that is yet to come.
pub struct Elsewhere {
    /// It gives clusters of the [`super::Geometry`], the last one as far as memory goes.
    pub source: Box<dyn ClusterSource>,
    /// Which clusters are here already, the first one first; what is not mentioned is not.
    pub present: Vec<bool>,
    /// The clusters that are fetched first, into frames while some are free; `None`: none is fetched at all that nobody asks for.
    pub prefetch: Option<Vec<u32>>,
}

impl fmt::Debug for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elsewhere").field("source", &self.source).finish_non_exhaustive()
    }
}

/// Which frames a cluster that is fetched may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Likely {
    /// It was asked for the last time: all that are free.
    Soon,
    /// Nothing is known: half of them. Otherwise it goes to a slot.
    Unknown,
}

/// What `fetch` may do with a cluster.
enum Turn {
    /// Nothing, or not now.
    Skip,
    /// Fill this frame.
    Frame(u32),
    /// Fill a slot.
    Slot,
    /// The pager ends.
    End,
}

/// The pager ends.
struct Ended;

impl Pager {
    /// Which clusters are not elsewhere. To be asked while the pager is held, before [`Pager::persist`].
    #[must_use]
    pub fn present(&self) -> Vec<bool> {
        let state = self.shared.state();
        state.flags.iter().map(|flags| flags & ELSEWHERE == 0).collect()
    }

    /// Whether nothing is elsewhere.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.shared.state().status.elsewhere == 0
    }

    /// The clusters that somebody waited for until they came from where they were, in that order.
    #[must_use]
    pub fn trace(&self) -> Vec<u32> {
        self.shared.state().trace.clone()
    }

    /// Nothing is fetched that nobody waits for, or it is again.
    pub fn hold_fetch(&self, held: bool) {
        self.shared.state().fetch_held = held;
        self.shared.fetch.tell();
    }
}

impl Shared {
    /// Fills `bytes`, a cluster, from where it is. `false`: with zeros.
    pub(super) fn read_elsewhere(&self, cluster: u32, bytes: &mut [u8]) -> Result<bool, PagingError> {
        let std::ops::Range { start, end } = self.geometry.bytes_of(cluster);
        let failed = |source| PagingError::Elsewhere { start, end, source };
        let elsewhere = self.elsewhere.as_ref().ok_or_else(|| failed(None))?;
        let length = usize::try_from(end - start).unwrap_or(usize::MAX).min(bytes.len());
        let (memory, beyond) = bytes.split_at_mut(length);
        beyond.fill(0);
        let any = elsewhere.source.read(start, memory).map_err(|source| failed(Some(source)))?;
        if !any {
            memory.fill(0);
        }
        Ok(any)
    }

    /// A cluster is not elsewhere any more.
    pub(super) fn note_here(&self, state: &mut State, cluster: u32) {
        if state.is_here(cluster) {
            self.fetch.tell();
        }
    }

    /// The thread `fetch`.
    pub(super) fn fetch(&self) {
        // On Linux a thread has a nice value of its own. A wish; it does no harm without.
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
        let order = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.prefetch.as_deref());
        if order.is_some_and(|order| self.fetch_all(order).is_err()) {
            return;
        }
        let mut state = self.state();
        while !state.ended && state.status.elsewhere > 0 {
            state = self.fetch.wait(state);
        }
        let ended = state.ended;
        drop(state);
        if !ended {
            (self.events)(PagingEvent::Complete);
        }
    }

    fn fetch_all(&self, order: &[u32]) -> Result<(), Ended> {
        let mut buffer = Buffer::default();
        let (mut unflushed, mut told) = (0, false);
        let soon = order.iter().map(|cluster| (*cluster, Likely::Soon));
        for (cluster, likely) in soon.chain((0..self.geometry.clusters()).map(|cluster| (cluster, Likely::Unknown))) {
            let fetched = match self.await_turn(cluster, likely) {
                Turn::End => return Err(Ended),
                Turn::Skip => continue,
                Turn::Frame(frame) => {
                    unflushed += self.geometry.cluster;
                    self.fetch_into_frame(cluster, frame, likely, &mut buffer)
                }
                Turn::Slot => self.fetch_into_slot(cluster, &mut buffer)?,
            };
            // What is likely is met again; and whoever asks for it finds out by itself.
            if let (Err(error), Likely::Unknown) = (fetched, likely) {
                self.state().status.missing += 1;
                if !std::mem::replace(&mut told, true) {
                    (self.events)(PagingEvent::Missing(error));
                }
            }
            if unflushed >= UNFLUSHED_MAX {
                unflushed = 0;
                self.flush_frames();
            }
        }
        Ok(())
    }

    /// Working memory that is apart is saved by a freeze alone. What fails here fails there, too, and is told then.
    fn flush_frames(&self) {
        if !self.store.is_apart() {
            let _ = self.store.sync();
        }
    }

    /// Waits until a cluster may be fetched, if it is still elsewhere. It is busy from then on.
    fn await_turn(&self, cluster: u32, likely: Likely) -> Turn {
        for _ in 0..YIELDS_MAX {
            if self.waiting.load(Ordering::SeqCst) == 0 || self.state().ended {
                break;
            }
            std::thread::sleep(YIELD);
        }
        let mut state = self.state();
        loop {
            if state.ended {
                return Turn::End;
            }
            if !state.has(cluster, ELSEWHERE) || state.has(cluster, LOST) {
                return Turn::Skip;
            }
            if state.held || state.fetch_held {
                state = self.fetch.wait(state);
            } else if state.has(cluster, BUSY) {
                state = self.wait(state);
            } else if let Some(frame) = self.free_frame(&mut state, cluster, likely) {
                state.begin_work(cluster);
                return Turn::Frame(frame);
            } else if likely == Likely::Soon {
                return Turn::Skip;
            } else if self.has_room(&state) {
                state.begin_work(cluster);
                return Turn::Slot;
            } else {
                state = self.fetch.wait_at_most(state, AGAIN);
            }
        }
    }

    fn free_frame(&self, state: &mut State, cluster: u32, likely: Likely) -> Option<u32> {
        let left = match likely {
            Likely::Soon => self.reserve(state),
            Likely::Unknown => (state.frames.limit() / 2).max(self.reserve(state)),
        };
        if state.frames.available() > left { state.frames.take(cluster) } else { None }
    }

    /// Whether a slot can be spared: each cluster in a frame must be able to go to one.
    fn has_room(&self, state: &State) -> bool {
        let count = u64::from(state.slots.count());
        u64::from(state.frames.in_use()) + state.status.swapped < count && state.slots.in_use() < state.slots.count()
    }

    fn fetch_into_frame(
        &self,
        cluster: u32,
        frame: u32,
        likely: Likely,
        buffer: &mut Buffer,
    ) -> Result<(), PagingError> {
        let filled = self.fill(cluster, frame, Source::Elsewhere, buffer);
        let zeros = is_zero(buffer.filled());
        if filled.is_err() || zeros {
            self.store.forget(cluster, 1);
        }
        let mut state = self.state();
        let mut need = Need::Wait;
        if filled.is_err() || zeros {
            // Zeros need no frame.
            state.frames.give_back(cluster);
        }
        if filled.is_ok() {
            state.clear(cluster, SAVED | IN_IMAGE);
            state.status.fetched += 1;
            self.note_here(&mut state, cluster);
        }
        if filled.is_ok() && !zeros {
            match likely {
                Likely::Soon => {
                    state.policy.admitted(cluster);
                    need = self.place(&mut state, cluster, frame);
                }
                Likely::Unknown => state.policy.prefetched(cluster),
            }
        }
        self.end_work(&mut state, cluster);
        drop(state);
        if need == Need::Wake {
            let _ = self.memory.wake(cluster, 1);
        }
        filled
    }

    fn fetch_into_slot(&self, cluster: u32, buffer: &mut Buffer) -> Result<Result<(), PagingError>, Ended> {
        let bytes = buffer.room(usize::try_from(self.geometry.cluster).unwrap_or(0));
        if let Err(error) = self.read_elsewhere(cluster, bytes) {
            self.end_work(&mut self.state(), cluster);
            return Ok(Err(error));
        }
        if is_zero(bytes) {
            let mut state = self.state();
            state.status.fetched += 1;
            self.note_here(&mut state, cluster);
            self.end_work(&mut state, cluster);
            return Ok(Ok(()));
        }
        let (crc, digest) = (crc32fast::hash(bytes), digest(bytes));
        loop {
            // Those that wait for it meanwhile have it from the source, if this takes long.
            if let Some(slot) = self.write_slot(cluster, bytes) {
                let mut state = self.state();
                state.slots.fill(cluster, slot, crc);
                if let Some(known) = state.digests.get_mut(cluster as usize) {
                    *known = digest;
                }
                state.set(cluster, KNOWN);
                state.status.swapped += 1;
                state.status.fetched += 1;
                self.note_here(&mut state, cluster);
                self.end_work(&mut state, cluster);
                return Ok(Ok(()));
            }
            let mut state = self.state();
            self.end_work(&mut state, cluster);
            drop(self.fetch.wait_at_most(state, AGAIN));
            match self.await_turn(cluster, Likely::Unknown) {
                Turn::End => return Err(Ended),
                Turn::Skip => return Ok(Ok(())),
                Turn::Frame(frame) => return Ok(self.fetch_into_frame(cluster, frame, Likely::Unknown, buffer)),
                Turn::Slot => {}
            }
        }
    }

    /// Writes a cluster to a slot that it has from then on. `None`: there is no slot any more, or it cannot be written.
    fn write_slot(&self, cluster: u32, bytes: &[u8]) -> Option<u32> {
        let slot = self.state().slots.reserve(cluster)?;
        match self.swap.write(slot, bytes) {
            Ok(()) => Some(slot),
            Err(error) => {
                self.state().slots.unreserve(cluster, slot);
                self.tell_unwritable(error);
                None
            }
        }
    }
}
