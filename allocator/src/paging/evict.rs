//! The thread that keeps frames free, and whoever else takes memory out of frames.

use super::slots::Buffer;
use super::{
    AWAITED, BUSY, Digest, ELSEWHERE, IN_IMAGE, KNOWN, LOST, MAPPED, PagingError, PagingEvent, Piece, SAVED, Shared,
    Spot, State,
};
use crate::replacement;

/// Of all frames, so many are kept free: one in this many.
const RESERVE: u32 = 32;
/// But at most as many as hold this many bytes.
const RESERVE_MAX: u64 = 16 << 20;
/// Bytes that leave RAM at a time.
const BATCH: u64 = 2 << 20;
/// Bytes that are withdrawn at a time: all that the victims of a batch call for. With less, probation alone would be withdrawn from, and what lies
/// in main unused would never leave.
const DEMOTED_MAX: u64 = replacement::UNMAPS_A_VICTIM as u64 * BATCH;
/// Frames whose memory is given back at a time.
const RELEASED_MAX: usize = 64;
/// How long before what failed is tried again.
pub(super) const AGAIN: std::time::Duration = std::time::Duration::from_millis(100);

/// What becomes of a cluster that leaves its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is zeros: nothing need be kept.
    Zeros,
    /// Its slot has it.
    Dropped,
    /// This slot is to get it.
    Written { slot: u32, crc: u32, digest: Digest },
    /// It stays: there is no slot for it, or it could not be read or written.
    Stays,
}

impl Shared {
    /// How many frames are kept free.
    pub(super) fn reserve(&self, state: &State) -> u32 {
        let most = u32::try_from(RESERVE_MAX / self.geometry.cluster).unwrap_or(1);
        (state.frames.limit() / RESERVE).min(most).max(4)
    }

    pub(super) fn keep_frames_free(&self) {
        let mut buffer = Buffer::default();
        loop {
            let mut state = self.state();
            while !state.ended && (state.held || !self.has_work(&state)) {
                state = self.pressure.wait(state);
            }
            if state.ended {
                return;
            }
            drop(state);
            // Evicting says how many are to be withdrawn; where nothing could be evicted, withdrawing makes that possible.
            let evicted = self.evict(&mut buffer);
            let demoted = self.demote();
            if !self.release() && !demoted && !evicted {
                self.rest();
            }
        }
    }

    fn has_work(&self, state: &State) -> bool {
        state.frames.available() < self.reserve(state) || state.frames.has_surplus()
    }

    /// Where less RAM may be used than was, gives some of the memory of free frames back to the system. Whether there was any.
    fn release(&self) -> bool {
        let mut released = false;
        for _ in 0..RELEASED_MAX {
            let Some(frame) = self.state().frames.begin_release() else { break };
            // If that fails the memory stays where it is, and is used again.
            let _ = self.store.release(frame);
            self.state().frames.end_release(frame);
            released = true;
        }
        released
    }

    /// Nothing can be done now: waits until something changes, or a while.
    fn rest(&self) {
        let state = self.state();
        if !state.ended {
            drop(self.pressure.wait_at_most(state, AGAIN));
        }
    }

    /// Withdraws clusters whose time it is. Whether there were any.
    fn demote(&self) -> bool {
        let mut state = self.state();
        let (mut demoted, mut any) = (Vec::new(), false);
        let most = (DEMOTED_MAX / self.geometry.cluster).max(1) as usize;
        while demoted.len() < most
            && let Some(cluster) = state.policy.demote()
        {
            if state.has(cluster, BUSY) {
                // It is being read, say: later.
                state.policy.touched(cluster);
                break;
            }
            any = true;
            // After a resume what was mapped need not be yet.
            if state.has(cluster, MAPPED) {
                state.begin_work(cluster);
                demoted.push(cluster);
            }
        }
        drop(state);
        demoted.sort_unstable();
        for run in demoted.chunk_by(|one, next| one + 1 == *next) {
            for run in run.chunks(self.memory.withdrawn_at_once()) {
                self.withdraw(run);
            }
        }
        any
    }

    /// Takes a run of busy, mapped neighbours from the guest.
    fn withdraw(&self, run: &[u32]) {
        let withdrawn = run.first().map(|first| self.memory.withdraw(*first, run.len() as u32));
        let mut state = self.state();
        let mut ring = false;
        for cluster in run {
            if matches!(withdrawn, Some(Ok(()))) {
                state.clear(*cluster, MAPPED);
            } else {
                state.policy.touched(*cluster);
            }
            ring |= state.end_work(*cluster);
        }
        drop(state);
        self.changed.tell();
        if ring {
            self.ring();
        }
    }

    /// Brings a batch of standby clusters out of their frames. Whether any left.
    fn evict(&self, buffer: &mut Buffer) -> bool {
        let victims = self.victims();
        if victims.is_empty() {
            return false;
        }
        let mut fates = self.judge(&victims, buffer);
        self.swap_out(&victims, &mut fates, buffer);
        self.finish(&victims, &fates)
    }

    fn victims(&self) -> Vec<u32> {
        let mut state = self.state();
        let batch = (BATCH / self.geometry.cluster).max(1) as usize;
        let wanted = (self.reserve(&state) * 2).saturating_sub(state.frames.available()) as usize;
        let mut victims = Vec::new();
        while victims.len() < batch.min(wanted)
            && !state.held
            && let Some(cluster) = state.policy.victim()
        {
            if state.has(cluster, MAPPED | BUSY | LOST) || state.frames.frame_of(cluster).is_none() {
                // It is being read, say: later.
                if state.frames.frame_of(cluster).is_some() {
                    state.policy.prefetched(cluster);
                }
                break;
            }
            state.begin_work(cluster);
            victims.push(cluster);
        }
        drop(state);
        // Neighbours are read at once, and get slots that follow one another where these are free.
        victims.sort_unstable();
        victims
    }

    /// Reads victims, one behind the other, and finds out what is to become of them.
    fn judge(&self, victims: &[u32], buffer: &mut Buffer) -> Vec<Fate> {
        let size = usize::try_from(self.geometry.cluster).unwrap_or(0);
        let bytes = buffer.room(victims.len() * size);
        let unread = self.read_victims(victims, bytes);
        let contents: Vec<_> = bytes.chunks_exact(size).map(Content::of).collect();
        let mut state = self.state();
        let fates = victims.iter().zip(contents).map(|(cluster, content)| match content {
            _ if unread.contains(cluster) => Fate::Stays,
            Content::Zeros => Fate::Zeros,
            Content::Bytes { crc, digest } => state.fate_of(*cluster, crc, digest),
        });
        fates.collect()
    }

    /// Reads victims, neighbours at once. Returns those that could not be read.
    fn read_victims(&self, victims: &[u32], bytes: &mut [u8]) -> Vec<u32> {
        let size = usize::try_from(self.geometry.cluster).unwrap_or(0);
        let spots: Vec<_> = {
            let state = self.state();
            let spot = |cluster: &u32| (state.spot_of(*cluster), state.has(*cluster, IN_IMAGE));
            victims.iter().map(spot).collect()
        };
        let together = |one: &(Option<Spot>, bool), next: &(Option<Spot>, bool)| match (one, next) {
            ((Some(one), false), (Some(next), false)) => self.follow(*one, *next),
            _ => false,
        };
        let (mut rest, mut unread, mut at) = (bytes, Vec::new(), 0);
        for run in spots.chunk_by(together) {
            let (bytes, behind) = std::mem::take(&mut rest).split_at_mut(run.len() * size);
            let read = match run {
                [(Some(spot), true), ..] => self.store.read_image(spot.frame, 0, bytes),
                [(Some(spot), false), ..] => self.store.read(*spot, 0, bytes),
                _ => Ok(()),
            };
            if let Err(error) = read {
                self.tell_unwritable(error);
                unread.extend_from_slice(&victims[at..at + run.len()]);
            }
            (rest, at) = (behind, at + run.len());
        }
        unread
    }

    /// Writes what is to be written, neighbouring slots as one, all of it at a time. What cannot be stays.
    fn swap_out(&self, victims: &[u32], fates: &mut [Fate], buffer: &Buffer) {
        let size = usize::try_from(self.geometry.cluster).unwrap_or(0);
        let mut parts: Vec<(u32, std::ops::Range<usize>)> = Vec::new();
        for (at, fate) in fates.iter().enumerate() {
            let Fate::Written { slot, .. } = fate else { continue };
            match parts.last_mut() {
                Some((first, run)) if run.end == at && *first + run.len() as u32 == *slot => run.end = at + 1,
                _ => parts.push((*slot, at..at + 1)),
            }
        }
        let bytes = buffer.filled();
        let bytes_of = |run: std::ops::Range<usize>| bytes.get(run.start * size..run.end * size).unwrap_or_default();
        let parts: Vec<_> = parts.into_iter().map(|(slot, run)| (slot, bytes_of(run))).collect();
        if let Err(error) = self.swap.write_many(&parts) {
            let mut state = self.state();
            for (cluster, fate) in victims.iter().zip(fates) {
                if let Fate::Written { slot, .. } = *fate {
                    // What is in the slot is not known.
                    state.slots.free(*cluster);
                    state.slots.unreserve(*cluster, slot);
                    state.clear(*cluster, KNOWN);
                    *fate = Fate::Stays;
                }
            }
            drop(state);
            self.tell_unwritable(error);
        }
    }

    fn finish(&self, victims: &[u32], fates: &[Fate]) -> bool {
        let mut state = self.state();
        let mut leaving = Vec::with_capacity(victims.len());
        for (cluster, fate) in victims.iter().zip(fates) {
            let cluster = *cluster;
            match fate {
                Fate::Stays | Fate::Dropped => {}
                Fate::Zeros => state.slots.free(cluster),
                Fate::Written { slot, crc, digest } => {
                    state.slots.fill(cluster, *slot, *crc);
                    state.digests[cluster as usize] = *digest;
                    state.set(cluster, KNOWN);
                }
            }
            if *fate == Fate::Stays || state.has(cluster, AWAITED) {
                // Somebody wants it: it stays where it is, and what was written was not for nothing.
                state.end_work(cluster);
                state.policy.prefetched(cluster);
            } else {
                leaving.push(cluster);
                match fate {
                    Fate::Zeros | Fate::Stays => {}
                    Fate::Dropped => state.status.dropped += 1,
                    Fate::Written { .. } => state.status.written += 1,
                }
            }
        }
        drop(state);
        self.leave(&mut leaving);
        let mut state = self.state();
        let left = !leaving.is_empty();
        let full = !left && fates.contains(&Fate::Stays) && !state.unwritable;
        let news = self.news(&mut state, full, left);
        let ring = !state.backlog.is_empty();
        drop(state);
        self.changed.tell();
        if ring {
            self.ring();
        }
        if let Some(event) = news {
            (self.events)(event);
        }
        left
    }

    /// Frees the frames of busy clusters.
    fn leave(&self, leaving: &mut [u32]) {
        leaving.sort_unstable();
        for run in leaving.chunk_by(|one, next| one + 1 == *next) {
            self.store.forget(run[0], run.len() as u32);
        }
        let mut state = self.state();
        for cluster in leaving.iter().copied() {
            state.frames.give_back(cluster);
            state.clear(cluster, SAVED | IN_IMAGE);
            state.status.swapped += u64::from(state.slots.of(cluster).is_some());
            state.end_work(cluster);
        }
    }

    /// What is to be told of a swap region that is full, or has room again.
    fn news(&self, state: &mut State, full: bool, left: bool) -> Option<PagingEvent> {
        if left {
            state.unwritable = false;
        }
        // Full is only worth a word when somebody waits.
        if full && !state.full && state.frames.available() == 0 {
            state.full = true;
            return Some(PagingEvent::SwapFull);
        }
        // A cluster that left without a slot, since it is zeros that the guest had no time to write to, makes no room: full would be told again
        // with the next fault.
        if left && state.frames.has_room_for(self.reserve(state)) && std::mem::take(&mut state.full) {
            return Some(PagingEvent::SwapRoom);
        }
        None
    }

    pub(super) fn tell_unwritable(&self, error: PagingError) {
        if !std::mem::replace(&mut self.state().unwritable, true) {
            (self.events)(PagingEvent::Unwritable(error));
        }
    }

    pub(super) fn discard(&self, offset: u64, length: u64) -> Result<(), PagingError> {
        self.clusters_of(offset, length)?;
        let (size, end) = (self.geometry.cluster, offset + length);
        let past = if end == self.memory.len() as u64 { end.div_ceil(size) } else { end / size };
        let whole = u32::try_from(offset.div_ceil(size)).unwrap_or(u32::MAX)..u32::try_from(past).unwrap_or(u32::MAX);
        for cluster in whole {
            self.discard_one(cluster);
        }
        self.changed.tell();
        self.ring();
        // Nothing leaves by itself while frames are free, so that this is the time to tell.
        let news = self.news(&mut self.state(), false, true);
        if let Some(event) = news {
            (self.events)(event);
        }
        Ok(())
    }

    fn discard_one(&self, cluster: u32) {
        let mut state = self.state();
        while state.has(cluster, BUSY) && !state.ended {
            state = self.wait(state);
        }
        if state.has(cluster, LOST) || state.ended {
            return;
        }
        state.begin_work(cluster);
        let mapped = state.has(cluster, MAPPED);
        drop(state);
        let withdrawn = !mapped || self.memory.withdraw(cluster, 1).is_ok();
        if withdrawn {
            self.store.forget(cluster, 1);
        }
        let mut state = self.state();
        if withdrawn {
            let swapped = state.slots.of(cluster).is_some() && state.frames.frame_of(cluster).is_none();
            state.status.swapped -= u64::from(swapped);
            state.policy.removed(cluster);
            state.frames.give_back(cluster);
            state.slots.free(cluster);
            state.clear(cluster, MAPPED | KNOWN | SAVED | IN_IMAGE);
            self.note_here(&mut state, cluster);
        }
        state.end_work(cluster);
    }

    pub(super) fn persist(&self) -> Result<(u32, Option<u64>), PagingError> {
        let mut state = self.state();
        let list: Vec<(u32, u32)> =
            state.policy.recency().filter_map(|cluster| Some((cluster, state.frames.frame_of(cluster)?))).collect();
        let mut saved = None;
        if self.store.is_apart() {
            let unsaved = list.iter().filter(|(cluster, _)| !state.has(*cluster, SAVED));
            let spots = unsaved.map(|(cluster, frame)| Spot { cluster: *cluster, frame: *frame });
            saved = Some(self.store.save(spots.collect())?);
        }
        let (ram, tables) = std::thread::scope(|scope| {
            let ram = scope.spawn(|| self.store.sync());
            let tables = self.swap.persist(&mut state.slots, &list);
            let interrupted = || PagingError::System { doing: "flush RAM", source: std::io::ErrorKind::Other.into() };
            (ram.join().unwrap_or_else(|_| Err(interrupted())), tables)
        });
        ram?;
        if self.store.is_apart() {
            // Those that the guest sees may change as soon as it runs.
            let saved = list.iter().map(|(cluster, _)| *cluster).filter(|cluster| !state.has(*cluster, MAPPED));
            saved.collect::<Vec<_>>().into_iter().for_each(|cluster| state.set(cluster, SAVED));
        }
        Ok((tables?, saved))
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PagingError> {
        let mut buffer = Buffer::default();
        for Piece { cluster, within, bytes } in self.pieces(offset, into.len())? {
            self.read_one(cluster, within, into.get_mut(bytes).unwrap_or_default(), &mut buffer)?;
        }
        Ok(())
    }

    fn read_one(&self, cluster: u32, within: u64, into: &mut [u8], buffer: &mut Buffer) -> Result<(), PagingError> {
        let mut state = self.state();
        while state.has(cluster, BUSY) && !state.ended {
            state = self.wait(state);
        }
        if state.has(cluster, LOST) {
            return Err(self.lost(&state, cluster, None));
        }
        let (frame, slot) = (state.frames.frame_of(cluster), state.slots.of(cluster));
        let elsewhere = state.has(cluster, ELSEWHERE);
        if frame.is_none() && slot.is_none() && !elsewhere {
            into.fill(0);
            return Ok(());
        }
        let image = state.has(cluster, IN_IMAGE);
        state.begin_work(cluster);
        drop(state);
        let read = match (frame, slot) {
            (Some(frame), _) if image => self.store.read_image(frame, within, into),
            (Some(frame), _) => self.store.read(Spot { cluster, frame }, within, into),
            (None, slot) => {
                let bytes = buffer.room(usize::try_from(self.geometry.cluster).unwrap_or(0));
                let read = match slot {
                    Some(slot) => self.read_slot(cluster, slot, bytes),
                    None => self.read_elsewhere(cluster, bytes).map(drop),
                };
                read.map(|()| {
                    let start = usize::try_from(within).unwrap_or(0);
                    into.copy_from_slice(bytes.get(start..start + into.len()).unwrap_or_default());
                })
            }
        };
        self.end_work(&mut self.state(), cluster);
        read
    }
}

/// What a cluster that was read holds.
enum Content {
    Zeros,
    Bytes { crc: u32, digest: Digest },
}

impl Content {
    fn of(bytes: &[u8]) -> Self {
        if is_zero(bytes) { Self::Zeros } else { Self::Bytes { crc: crc32fast::hash(bytes), digest: digest(bytes) } }
    }
}

impl State {
    /// What becomes of a cluster that leaves its frame and is not zeros.
    fn fate_of(&mut self, cluster: u32, crc: u32, digest: Digest) -> Fate {
        let known = self.has(cluster, KNOWN) && self.digests.get(cluster as usize) == Some(&digest);
        if known && self.slots.of(cluster).is_some() {
            return Fate::Dropped;
        }
        let slot = self.slots.reserve(cluster).or_else(|| self.reclaim_slot(cluster));
        slot.map_or(Fate::Stays, |slot| Fate::Written { slot, crc, digest })
    }

    /// A slot of a cluster that is in a frame as well, for one that needs it more.
    fn reclaim_slot(&mut self, needy: u32) -> Option<u32> {
        let clusters = self.flags.len() as u32;
        for step in 1..=clusters {
            let cluster = self.reclaim_at.wrapping_add(step) % clusters.max(1);
            let spare = self.frames.frame_of(cluster).is_some() && self.slots.of(cluster).is_some();
            if spare && cluster != needy && !self.has(cluster, BUSY) {
                self.reclaim_at = cluster;
                self.slots.free(cluster);
                self.clear(cluster, KNOWN);
                return self.slots.reserve(needy);
            }
        }
        None
    }
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| ZEROS.starts_with(chunk))
}

pub(super) fn digest(bytes: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    digest
}
