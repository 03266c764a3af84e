//! The thread that hears who waits for memory, and what serves them.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, poll};

use super::beside::Beside;
use super::slots::{Buffer, Slot};
use super::{AWAITED, BUSY, ELSEWHERE, IN_IMAGE, LOST, MAPPED, PagingError, PagingEvent, SAVED, Shared, Spot, State};
use crate::medium::paged::Awaited;

/// What a cluster that is asked for needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Whoever waits goes on.
    Wake,
    /// Nothing now: a thread is at it, or there is no free frame.
    Wait,
    /// It cannot be had.
    Refuse,
    /// This frame is to be filled.
    Fill { frame: u32, from: Source },
}

/// Where a cluster's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Zeros,
    Slot(Slot),
    /// Where it has not come from yet.
    Elsewhere,
    /// In the image of the frame.
    Image,
}

impl Shared {
    pub(super) fn serve_faults(&self) {
        let mut buffer = Buffer::default();
        let (mut awaited, mut again) = (Vec::new(), Vec::new());
        let mut beside = Beside::default();
        while !self.state().deaf {
            let mut fds = [
                PollFd::from_borrowed_fd(self.memory.descriptor(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
            ];
            // Interrupted, or in want of memory: then nobody rang as far as can be told, and it is asked again.
            let _ = poll(&mut fds, None);
            let rung = !fds[1].revents().is_empty();
            if let Err(source) = self.memory.awaited(&mut awaited) {
                let doing = "hear of page faults";
                (self.events)(PagingEvent::Lost(PagingError::System { doing, source }));
                return;
            }
            if rung {
                let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            }
            self.waiting.store(awaited.len(), Ordering::SeqCst);
            for Awaited { cluster, thread } in awaited.drain(..) {
                self.serve(cluster, &mut buffer);
                self.waiting.fetch_sub(1, Ordering::SeqCst);
                beside.move_to(thread);
            }
            again.extend(self.state().backlog.drain(..));
            for cluster in again.drain(..) {
                self.serve(cluster, &mut buffer);
            }
        }
    }

    fn serve(&self, cluster: u32, buffer: &mut Buffer) {
        let need = self.look(cluster);
        match need {
            Need::Wait => {}
            Need::Wake => drop(self.memory.wake(cluster, 1)),
            Need::Refuse => drop(self.memory.refuse(cluster)),
            Need::Fill { frame, from } => {
                let filled = self.fill(cluster, frame, from, buffer);
                self.finish_fill(cluster, frame, from, filled);
            }
        }
    }

    /// What a cluster needs; a standby one is placed at once.
    fn look(&self, cluster: u32) -> Need {
        let mut state = self.state();
        let state = &mut *state;
        if state.has(cluster, LOST) {
            return Need::Refuse;
        }
        if state.has(cluster, BUSY) {
            state.set(cluster, AWAITED);
            return Need::Wait;
        }
        if state.has(cluster, MAPPED) {
            self.changed.tell();
            return Need::Wake;
        }
        if let Some(frame) = state.frames.frame_of(cluster) {
            if state.has(cluster, IN_IMAGE) {
                state.begin_work(cluster);
                return Need::Fill { frame, from: Source::Image };
            }
            state.status.soft_faults += 1;
            state.policy.touched(cluster);
            self.note_sequence(state, cluster);
            return self.place(state, cluster, frame);
        }
        let Some(frame) = state.frames.take(cluster) else {
            state.status.stalls += 1;
            state.backlog.push_back(cluster);
            self.pressure.tell();
            return Need::Wait;
        };
        if state.frames.available() < self.reserve(state) {
            self.pressure.tell();
        }
        state.begin_work(cluster);
        let from = if state.has(cluster, ELSEWHERE) {
            state.trace.push(cluster);
            Source::Elsewhere
        } else {
            state.slots.of(cluster).map_or(Source::Zeros, Source::Slot)
        };
        Need::Fill { frame, from }
    }

    fn note_sequence(&self, state: &mut State, cluster: u32) {
        if let Some(run) = state.streams.fault(cluster) {
            state.ahead.push_back((run.start, run.end - run.start));
            self.wish.tell();
        }
    }

    /// Shows the guest a cluster in its frame.
    pub(super) fn place(&self, state: &mut State, cluster: u32, frame: u32) -> Need {
        match self.store.place(&self.memory, Spot { cluster, frame }, 1) {
            Ok(()) => {
                state.clear(cluster, SAVED);
                state.set(cluster, MAPPED);
                self.changed.tell();
                Need::Wake
            }
            Err(error) => {
                state.set(cluster, LOST);
                (self.events)(PagingEvent::Lost(self.lost(state, cluster, Some(error))));
                Need::Refuse
            }
        }
    }

    /// Brings a cluster's bytes into its frame.
    pub(super) fn fill(&self, cluster: u32, frame: u32, from: Source, buffer: &mut Buffer) -> Result<(), PagingError> {
        let bytes = buffer.room(usize::try_from(self.geometry.cluster).unwrap_or(0));
        match from {
            Source::Zeros => bytes.fill(0),
            Source::Image => self.store.read_image(frame, 0, bytes)?,
            Source::Elsewhere => drop(self.read_elsewhere(cluster, bytes)?),
            Source::Slot(slot) => self.read_slot(cluster, slot, bytes)?,
        }
        self.store.write(Spot { cluster, frame }, bytes)
    }

    /// Fills `bytes`, a cluster, from its slot, verified.
    pub(super) fn read_slot(&self, cluster: u32, slot: Slot, bytes: &mut [u8]) -> Result<(), PagingError> {
        let read = self.swap.read(slot.number, bytes).map_err(Some);
        let checked = read.and_then(|()| if crc32fast::hash(bytes) == slot.crc { Ok(()) } else { Err(None) });
        checked.map_err(|source| self.lost(&self.state(), cluster, source))
    }

    fn finish_fill(&self, cluster: u32, frame: u32, from: Source, filled: Result<(), PagingError>) {
        let mut state = self.state();
        // Whoever waited meanwhile is woken with the one who asked.
        state.clear(cluster, AWAITED);
        state.end_work(cluster);
        let need = match filled {
            Ok(()) => {
                self.count(&mut state, from);
                self.note_here(&mut state, cluster);
                state.clear(cluster, SAVED | IN_IMAGE);
                match from {
                    Source::Image => state.policy.touched(cluster),
                    Source::Zeros | Source::Slot(_) | Source::Elsewhere => state.policy.admitted(cluster),
                }
                self.note_sequence(&mut state, cluster);
                self.place(&mut state, cluster, frame)
            }
            Err(error) => {
                if from != Source::Image {
                    state.frames.give_back(cluster);
                }
                state.set(cluster, LOST);
                self.store.forget(cluster, 1);
                // First told, then refused: what a vCPU says of the refusal is to come second.
                (self.events)(PagingEvent::Lost(error));
                Need::Refuse
            }
        };
        drop(state);
        self.changed.tell();
        let _ = if need == Need::Wake { self.memory.wake(cluster, 1) } else { self.memory.refuse(cluster) };
    }

    fn count(&self, state: &mut State, from: Source) {
        match from {
            Source::Zeros => state.status.zero_faults += 1,
            Source::Image => state.status.soft_faults += 1,
            Source::Elsewhere => state.status.source_faults += 1,
            Source::Slot(_) => {
                state.status.hard_faults += 1;
                state.status.swapped -= 1;
            }
        }
    }
}
