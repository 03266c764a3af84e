//! What follows a sequence is brought before it is asked for.
//!
//! A fault on the cluster behind the last one of a sequence makes that longer by a *window*, which doubles each time. The first cluster that
//! is brought of a window is not mapped though its bytes are there: the soft fault on it says that the guest has got so far, and the next window
//! is brought while it uses this one (the marker page of Linux's read-ahead does the same). Some of a sequence is often in frames already,
//! since what was hot stays: the guest goes through that without a fault, so a fault somewhat behind the end follows, too. Memory that was never
//! used is brought as well, as zeros: a guest that fills it one page after the other would wait for each.

use std::ops::Range;

use super::slots::{Buffer, Slot};
use super::{BUSY, ELSEWHERE, IN_IMAGE, LOST, MAPPED, PagingError, SAVED, Shared, Spot, State};

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
        let behind = |stream: &Stream| (stream.end..stream.end.saturating_add(stream.window.max(1))).contains(&cluster);
        let follows = |stream: &&mut Stream| stream.used > 0 && (cluster == stream.marker || behind(stream));
        if let Some(stream) = self.streams.iter_mut().find(follows) {
            // Behind the end: the guest was quicker than the read-ahead.
            let start = if behind(stream) { cluster.saturating_add(1) } else { stream.end };
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

    /// Of the window from `start` on only this was brought: from `marker` on, and nothing from `end` on.
    fn brought(&mut self, start: u32, marker: u32, end: u32) {
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.used > 0 && stream.marker == start) {
            (stream.marker, stream.end) = (marker, end);
        }
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
            let (mut count, next) = (1, |state: &State, count| {
                let pair = state.spot_of(cluster + count - 1).zip(state.spot_of(cluster + count));
                let there = pair.is_some_and(|(one, next)| self.follow(one, next));
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

    /// Brings what is in slots of a window, or zeros, as far as frames are free; the first cluster without mapping it.
    fn bring(&self, first: u32, count: u32, buffer: &mut Buffer) {
        let claimed = self.claim(first, first.saturating_add(count).min(self.geometry.clusters()));
        if !claimed.is_empty() {
            let read = self.read_claimed(&claimed, buffer);
            self.finish_claimed(&claimed, read.is_ok());
        }
    }

    /// Takes frames for the clusters of a window that are in slots, or zeros. They are busy from then on.
    fn claim(&self, first: u32, end: u32) -> Vec<u32> {
        let mut state = self.state();
        let (mut claimed, mut at) = (Vec::new(), first);
        while at < end && !state.held && state.frames.available() > self.reserve(&state) / 2 {
            let not_now = MAPPED | BUSY | LOST | ELSEWHERE;
            if !state.has(at, not_now) && state.frames.frame_of(at).is_none() && state.frames.take(at).is_some() {
                state.begin_work(at);
                claimed.push(at);
            }
            at += 1;
        }
        let marker = claimed.first().copied().unwrap_or(at);
        state.streams.brought(first, marker, at);
        claimed
    }

    /// Reads clusters from their slots into their frames, verified.
    fn read_claimed(&self, clusters: &[u32], buffer: &mut Buffer) -> Result<(), PagingError> {
        let size = usize::try_from(self.geometry.cluster).unwrap_or(0);
        let (slots, spots): (Vec<_>, Vec<_>) = {
            let state = self.state();
            clusters.iter().filter_map(|at| Some((state.slots.of(*at), state.spot_of(*at)?))).unzip()
        };
        let bytes = buffer.room(slots.len() * size);
        let (mut parts, mut rest) = (Vec::new(), &mut *bytes);
        let together = |one: &Option<Slot>, next: &Option<Slot>| match (one, next) {
            (Some(one), Some(next)) => one.number + 1 == next.number,
            (one, next) => one.is_none() && next.is_none(),
        };
        for slots in slots.chunk_by(together) {
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(slots.len() * size);
            match slots.first().copied().flatten() {
                Some(first) => parts.push((first.number, part)),
                None => part.fill(0),
            }
            rest = behind;
        }
        self.swap.read_many(parts)?;
        for ((bytes, slot), cluster) in bytes.chunks_exact(size).zip(&slots).zip(clusters) {
            if slot.is_some_and(|slot| crc32fast::hash(bytes) != slot.crc) {
                return Err(self.lost(&self.state(), *cluster, None));
            }
        }
        let mut rest = &*bytes;
        for spots in spots.chunk_by(|one, next| self.follow(*one, *next)) {
            let Some(first) = spots.first() else { continue };
            let (bytes, behind) = rest.split_at(spots.len() * size);
            self.store.write(*first, bytes)?;
            rest = behind;
        }
        Ok(())
    }

    /// Gives clusters to the guest, or back: whoever asks for one of them finds out by itself what is wrong.
    fn finish_claimed(&self, clusters: &[u32], good: bool) {
        if !good {
            clusters.iter().for_each(|cluster| self.store.forget(*cluster, 1));
        }
        let mut state = self.state();
        let mut ring = false;
        for cluster in clusters.iter().copied() {
            ring |= state.end_work(cluster);
            if good {
                state.status.swapped -= u64::from(state.slots.of(cluster).is_some());
                state.status.read_ahead += 1;
                state.clear(cluster, SAVED | IN_IMAGE);
            } else {
                state.frames.give_back(cluster);
            }
        }
        if good {
            self.place_claimed(&mut state, clusters.get(1..).unwrap_or_default());
            for cluster in clusters.iter().copied() {
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

    fn place_claimed(&self, state: &mut State, clusters: &[u32]) {
        let spots: Vec<_> = clusters.iter().filter_map(|cluster| state.spot_of(*cluster)).collect();
        for spots in spots.chunk_by(|one, next| self.follow(*one, *next)) {
            let (Some(first), count) = (spots.first(), spots.len() as u32) else { continue };
            if self.store.place(&self.memory, *first, count).is_ok() {
                spots.iter().for_each(|spot| state.set(spot.cluster, MAPPED));
                let _ = self.memory.wake(first.cluster, count);
            }
        }
    }

    /// Whether two clusters can be read, written and placed together.
    pub(super) fn follow(&self, one: Spot, next: Spot) -> bool {
        one.cluster + 1 == next.cluster && self.store.follows(one, next)
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

    #[test]
    fn a_sequence_goes_on_over_what_is_in_ram_already_and_from_where_the_last_window_was_cut_short() {
        let mut streams = Streams::new(4 << 10);
        assert_eq!((streams.fault(1000), streams.fault(1001)), (None, Some(1002..1003)));
        assert_eq!(streams.fault(1003), Some(1004..1006));
        streams.brought(1004, 1005, 1006);
        assert_eq!(streams.fault(1004), None, "it was there, and is another sequence's beginning, if anything");
        assert_eq!(streams.fault(1005), Some(1006..1010), "the first one that was brought");
        streams.brought(1006, 1006, 1008);
        assert_eq!(streams.fault(1011), Some(1012..1020), "nothing behind 1008 was brought, and some was there");
        streams.brought(7, 8, 9);
        assert_eq!(streams.fault(8), None, "of no window");
    }
}
