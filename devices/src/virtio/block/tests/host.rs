//! A host that a test controls: an image in memory, whose requests complete when the test says so.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vm_memory::Bytes;

use super::super::{BlockBackend, Buffers, Completion, Operation, Segment, Token};
use crate::virtio::memory::Memory;

/// A request that the host has taken.
pub(super) enum Taken {
    Read(u64, Memory, Vec<Segment>),
    Write(u64, Memory, Vec<Segment>, bool),
    Flush,
    Discard(Range<u64>),
    WriteZeroes(Range<u64>, bool),
}

/// Which requests wait for [`Host::release`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Holds {
    Nothing,
    Flushes,
    All,
}

pub(super) struct State {
    pub(super) image: Vec<u8>,
    /// What a cut of the power would leave.
    pub(super) durable: Vec<u8>,
    pub(super) holds: Holds,
    pub(super) fails: Option<io::ErrorKind>,
    pub(super) flushes: usize,
    /// Zeros whose blocks may be given up.
    pub(super) holes: Vec<Range<u64>>,
    /// Whether something that waits completes it: the host is quick enough for a freeze.
    pub(super) quick: bool,
    /// What happens beside the next start of requests.
    pub(super) meanwhile: Option<Box<dyn FnOnce() + Send>>,
    submitted: VecDeque<(Token, Taken)>,
    waiting: VecDeque<(Token, Taken)>,
    completed: Vec<Completion>,
}

/// The test's hand and the device's.
#[derive(Clone)]
pub(super) struct Host(Arc<Mutex<State>>);

impl Host {
    pub(super) fn new(image: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State {
            durable: image.clone(),
            image,
            holds: Holds::Nothing,
            fails: None,
            flushes: 0,
            holes: Vec::new(),
            quick: true,
            meanwhile: None,
            submitted: VecDeque::new(),
            waiting: VecDeque::new(),
            completed: Vec::new(),
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn holds(&self, holds: Holds) {
        self.state().holds = holds;
    }

    pub(super) fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Completes the request that waits at `index`.
    pub(super) fn release_one(&self, index: usize) {
        let mut state = self.state();
        if let Some((token, taken)) = state.waiting.remove(index) {
            state.perform(token, taken);
        }
    }

    pub(super) fn release(&self) {
        while self.waiting() > 0 {
            self.release_one(0);
        }
    }
}

impl State {
    fn perform(&mut self, token: Token, taken: Taken) {
        let result = match self.fails {
            Some(kind) => Err(kind.into()),
            None => {
                self.apply(taken);
                Ok(())
            }
        };
        self.completed.push(Completion { token, result });
    }

    fn apply(&mut self, taken: Taken) {
        match taken {
            Taken::Read(at, memory, segments) => {
                let mut at = at as usize;
                for Segment { address, length } in segments {
                    memory.write_slice(&self.image[at..at + length as usize], address).unwrap();
                    at += length as usize;
                }
            }
            Taken::Write(at, memory, segments, durable) => {
                let mut at = at as usize;
                for Segment { address, length } in segments {
                    let to = at..at + length as usize;
                    memory.read_slice(&mut self.image[to.clone()], address).unwrap();
                    if durable {
                        self.durable[to.clone()].copy_from_slice(&self.image[to]);
                    }
                    at += length as usize;
                }
            }
            Taken::Flush => {
                self.flushes += 1;
                self.durable.clone_from(&self.image);
            }
            Taken::Discard(range) => self.image[range.start as usize..range.end as usize].fill(0xdd),
            Taken::WriteZeroes(range, unmap) => {
                self.image[range.start as usize..range.end as usize].fill(0);
                self.holes.extend(unmap.then_some(range));
            }
        }
    }
}

impl BlockBackend for Host {
    fn submit(&mut self, token: Token, operation: Operation<'_>) {
        let own = |buffers: Buffers<'_>| (buffers.memory.clone(), buffers.segments.to_vec());
        let taken = match operation {
            Operation::Read { at, buffers } => {
                let (memory, segments) = own(buffers);
                Taken::Read(at, memory, segments)
            }
            Operation::Write { at, buffers, durable } => {
                let (memory, segments) = own(buffers);
                Taken::Write(at, memory, segments, durable)
            }
            Operation::Flush => Taken::Flush,
            Operation::Discard(range) => Taken::Discard(range),
            Operation::WriteZeroes { range, unmap } => Taken::WriteZeroes(range, unmap),
        };
        self.state().submitted.push_back((token, taken));
    }

    fn start(&mut self) {
        let meanwhile = self.state().meanwhile.take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        let mut state = self.state();
        while let Some((token, taken)) = state.submitted.pop_front() {
            let held = match state.holds {
                Holds::Nothing => false,
                Holds::Flushes => matches!(taken, Taken::Flush),
                Holds::All => true,
            };
            if held {
                state.waiting.push_back((token, taken));
            } else {
                state.perform(token, taken);
            }
        }
    }

    fn take_completed(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.state().completed);
    }

    fn wait(&mut self, deadline: Option<Instant>) -> bool {
        let mut state = self.state();
        if state.completed.is_empty() && (state.quick || deadline.is_none()) {
            // Flushes last, as if they took longest.
            let index = state.waiting.iter().position(|(_, taken)| !matches!(taken, Taken::Flush)).unwrap_or(0);
            if let Some((token, taken)) = state.waiting.remove(index) {
                state.perform(token, taken);
            }
        }
        !state.completed.is_empty()
    }
}
