//! What follows a sequence is brought before it is asked for.
//!
//! A fault on the cluster behind the last one of a sequence makes that longer by a *window*, which doubles each time. The first cluster of
//! a window is not mapped though its bytes are there: the soft fault on it says that the guest has got so far, and the next window is
//! brought while it uses this one (the marker page of Linux's read-ahead does the same).

use std::ops::Range;

use super::slots::Buffer;
use super::{BUSY, IN_IMAGE, LOST, MAPPED, PagingError, SAVED, Shared, Spot, State};

/// Sequences that are followed at a time.
const STREAMS: usize = 8;
/// Bytes of the longest window.
const WINDOW_MAX: u64 = 2 << 20;

/// One sequence.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The cluster whose fault says that the guest has got so far.
    marker: u32,
    /// Behind what was brought for it.
    end: u32,
    window: u32,
    /// When it was last right.
    used: u64,
}

/// The sequences of a guest's faults.
#[derive(Debug)]
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    now: u64,
    longest: u32,
}

impl Streams {
    pub(super) fn new(cluster: u64) -> Self {
        let longest = u32::try_from(WINDOW_MAX / cluster).unwrap_or(1).max(2);
        Self { streams: [Stream::default(); STREAMS], now: 0, longest }
    }

    /// A fault on a cluster: what is to be brought because of it.
    pub(super) fn fault(&mut self, cluster: u32) -> Option<Range<u32>> {
        self.now += 1;
        let longest = self.longest;
        let now = self.now;
        let follows = |stream: &&mut Stream| stream.used > 0 && (cluster == stream.marker || cluster == stream.end);
        if let Some(stream) = self.streams.iter_mut().find(follows) {
            // Behind the end: the guest was quicker than the read-ahead.
            let start = if cluster == stream.end { cluster + 1 } else { stream.end };
            stream.window = (stream.window * 2).clamp(1, longest);
            *stream = Stream { marker: start, end: start.saturating_add(stream.window), used: now, ..*stream };
            return Some(start..stream.end);
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            let next = cluster.saturating_add(1);
            *oldest = Stream { marker: next, end: next, window: 0, used: now };
        }
        None
    }
}

impl Shared {
    /// The thread `ahead`.
    pub(super) fn bring_ahead(&self) {
        let mut buffer = Buffer::default();
        loop {
            let mut state = self.state();
            while !state.ended && (state.held || (state.ahead.is_empty() && state.to_place.is_empty())) {
                state = self.wish.wait(state);
            }
            if state.ended {
                return;
            }
            if let Some((first, count)) = state.ahead.pop_front() {
                drop(state);
                self.bring(first, count, &mut buffer);
            } else {
                self.place_resident(&mut state);
            }
        }
    }

    /// Places some of the clusters that were in frames at the last freeze, the hottest first; neighbours at once.
    fn place_resident(&self, state: &mut State) {
        for _ in 0..64 {
            let Some(cluster) = state.to_place.pop() else { return };
            let absent = MAPPED | BUSY | LOST | IN_IMAGE;
            let Some(frame) = state.frames.frame_of(cluster).filter(|_| !state.has(cluster, absent)) else { continue };
            let spot = |state: &State, cluster| Some(Spot { cluster, frame: state.frames.frame_of(cluster)? });
            let (mut count, next) = (1, |state: &State, count| {
                let pair = spot(state, cluster + count - 1).zip(spot(state, cluster + count));
                let there = pair.is_some_and(|(one, next)| self.store.follows(one, next));
                there && state.to_place.last() == Some(&(cluster + count)) && !state.has(cluster + count, absent)
            });
            while next(state, count) {
                state.to_place.pop();
                count += 1;
            }
            if self.store.place(&self.memory, Spot { cluster, frame }, count).is_ok() {
                (cluster..cluster + count).for_each(|cluster| {
                    state.clear(cluster, SAVED);
                    state.set(cluster, MAPPED);
                    // It may have been withdrawn from the guest, as far as the policy knows, before it was placed: a victim that is mapped
                    // would never leave.
                    state.policy.touched(cluster);
                });
                let _ = self.memory.wake(cluster, count);
            }
        }
    }

    /// Brings a run of clusters as far as they are in slots and frames are free, the first one without mapping it.
    fn bring(&self, first: u32, count: u32, buffer: &mut Buffer) {
        let mut at = first;
        let end = first.saturating_add(count).min(self.geometry.clusters());
        while at < end {
            let run = self.claim_run(at, end);
            if run.is_empty() {
                at += 1;
                continue;
            }
            at = run.end;
            let read = self.read_run(run.clone(), buffer);
            self.finish_run(run, first, read.is_ok());
        }
    }

    /// Takes frames for clusters from `at` on whose slots follow one another. They are busy from then on.
    fn claim_run(&self, at: u32, end: u32) -> Range<u32> {
        let mut state = self.state();
        let mut run = at..at;
        let mut slot = None;
        while run.end < end && !state.held && state.frames.available() > self.reserve(&state) / 2 {
            let cluster = run.end;
            let found = state.slots.of(cluster).map(|slot| slot.number);
            let follows = found.is_some() && slot.is_none_or(|before: u32| found == Some(before + 1));
            if !follows || state.has(cluster, MAPPED | BUSY | LOST) || state.frames.frame_of(cluster).is_some() {
                break;
            }
            if state.frames.take(cluster).is_none() {
                break;
            }
            state.begin_work(cluster);
            slot = found;
            run.end += 1;
        }
        run
    }

    /// Reads the slots of a run into its frames, verified.
    fn read_run(&self, run: Range<u32>, buffer: &mut Buffer) -> Result<(), PagingError> {
        let cluster = usize::try_from(self.geometry.cluster).unwrap_or(0);
        let (slots, spots): (Vec<_>, Vec<_>) = {
            let state = self.state();
            let spot = |cluster| Some(Spot { cluster, frame: state.frames.frame_of(cluster)? });
            run.clone().filter_map(|at| Some((state.slots.of(at)?, spot(at)?))).unzip()
        };
        let Some(first) = slots.first() else { return Ok(()) };
        let bytes = buffer.room(slots.len() * cluster);
        self.swap.read(first.number, bytes)?;
        for ((bytes, slot), at) in bytes.chunks_exact(cluster).zip(&slots).zip(run) {
            if crc32fast::hash(bytes) != slot.crc {
                let state = self.state();
                return Err(self.lost(&state, at, None));
            }
        }
        let mut done = 0;
        for spots in spots.chunk_by(|one, next| self.store.follows(*one, *next)) {
            let Some(first) = spots.first() else { continue };
            let bytes = bytes.get(done * cluster..(done + spots.len()) * cluster).unwrap_or_default();
            self.store.write(*first, bytes)?;
            done += spots.len();
        }
        Ok(())
    }

    /// Gives a run to the guest, or back: whoever asks for a cluster of it finds out by itself what is wrong.
    fn finish_run(&self, run: Range<u32>, marker: u32, good: bool) {
        if !good {
            self.store.forget(run.start, run.end - run.start);
        }
        let mut state = self.state();
        let mut ring = false;
        for cluster in run.clone() {
            ring |= state.end_work(cluster);
            if good {
                state.status.swapped -= 1;
                state.status.read_ahead += 1;
                state.clear(cluster, SAVED | IN_IMAGE);
            } else {
                state.frames.give_back(cluster);
            }
        }
        if good {
            self.place_run(&mut state, run.clone(), marker);
            for cluster in run {
                if state.has(cluster, MAPPED) {
                    state.policy.admitted(cluster);
                } else {
                    state.policy.prefetched(cluster);
                }
            }
        }
        drop(state);
        self.changed.tell();
        if ring {
            self.ring();
        }
    }

    fn place_run(&self, state: &mut State, run: Range<u32>, marker: u32) {
        let spot = |state: &State, cluster| Some(Spot { cluster, frame: state.frames.frame_of(cluster)? });
        let mut at = run.start;
        while at < run.end {
            let Some(first) = spot(state, at).filter(|_| at != marker) else {
                at += 1;
                continue;
            };
            let (mut count, mut last) = (1, first);
            while at + count < run.end
                && let Some(next) = spot(state, at + count).filter(|next| self.store.follows(last, *next))
            {
                (count, last) = (count + 1, next);
            }
            if self.store.place(&self.memory, first, count).is_ok() {
                (at..at + count).for_each(|cluster| {
                    state.set(cluster, MAPPED);
                });
                let _ = self.memory.wake(at, count);
            }
            at += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_followed_in_windows_that_double_and_random_faults_bring_nothing() {
        let mut streams = Streams::new(64 << 10);
        assert_eq!(streams.fault(100), None);
        assert_eq!(streams.fault(101), Some(102..103));
        assert_eq!(streams.fault(102), Some(103..105), "the marker");
        assert_eq!(streams.fault(103), Some(105..109));
        assert_eq!(streams.fault(109), Some(110..118), "quicker than the read-ahead");
        let mut end = 118;
        for _ in 0..10 {
            let marker = streams.streams.iter().max_by_key(|stream| stream.used).unwrap().marker;
            let run = streams.fault(marker).unwrap();
            assert_eq!(run.start, end);
            assert!(run.len() <= 32);
            end = run.end;
        }
        for cluster in [5, 900, 30, 7000, 12] {
            assert_eq!(streams.fault(cluster), None);
        }
        assert!(streams.fault(u32::MAX).is_none());
    }
}
