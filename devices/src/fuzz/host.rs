//! A host that answers as an input says: with bytes, or not now, or with an error.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use crate::virtio::Memory;
use crate::virtio::Piece;
use crate::virtio::balloon::Reclaim;
use crate::virtio::block::{BlockBackend, Completion, Operation, SECTOR, Segment, Token};
use crate::virtio::console::{Line, TerminalSize};
use crate::virtio::net::{Offloads, Tap};
use crate::virtio::pmem::Durable;
use crate::virtio::rng::Entropy;
use crate::virtio::vsock::{Change, StreamId, VsockHost};

/// Of a disk.
pub(super) const SECTORS: u64 = 64;

#[derive(Default)]
struct Answers {
    bytes: VecDeque<u8>,
    /// Requests of a disk: begun, and completed.
    begun: VecDeque<(Token, Transfer)>,
    completed: Vec<Completion>,
    streams: u64,
    /// What of persistent memory is to be made durable.
    flush: Option<u64>,
}

/// A request's part in the guest's memory.
enum Transfer {
    Fill(Memory, Vec<Segment>),
    None,
}

/// All kinds of hosts in one.
#[derive(Clone, Default)]
pub(super) struct Host(Arc<Mutex<Answers>>);

impl Host {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is to answer next.
    pub(super) fn answer(&self, bytes: &[u8]) {
        self.answers().bytes.extend(bytes);
    }

    /// How much, of at most `most`; or why not.
    fn amount(&self, most: usize) -> io::Result<usize> {
        match self.answers().bytes.pop_front() {
            None => Err(io::ErrorKind::WouldBlock.into()),
            Some(255) => Err(io::ErrorKind::BrokenPipe.into()),
            Some(254) => Ok(most),
            Some(amount) => Ok(most.min(usize::from(amount))),
        }
    }
}

impl Entropy for Host {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(7);
        self.amount(0).map(drop).or_else(|error| match error.kind() {
            io::ErrorKind::WouldBlock => Ok(()),
            _ => Err(error),
        })
    }
}

impl Reclaim for Host {
    fn reclaim(&mut self, start: GuestAddress, length: u64) {
        assert!(start.0.is_multiple_of(4096) && length.is_multiple_of(4096), "{start:?} {length}");
        assert!(start.0 + length <= super::MEMORY as u64, "{start:?} {length}");
    }
}

impl Tap for Host {
    fn receive(&mut self, buffers: &[Piece<'_>], rest: &mut [u8]) -> io::Result<usize> {
        let room: usize = buffers.iter().map(|piece| piece.len()).sum();
        let amount = self.amount(room + rest.len())?;
        let mut left = amount;
        for piece in buffers {
            let now = left.min(piece.len());
            piece.copy_from(&vec![5_u8; now]);
            left -= now;
        }
        Ok(amount)
    }

    fn send(&mut self, _: &[Piece<'_>]) -> io::Result<()> {
        self.amount(0).map(drop)
    }

    fn send_from(&mut self, _: &[u8]) -> io::Result<()> {
        self.amount(0).map(drop)
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

impl Line for Host {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.amount(bytes.len()).unwrap_or(0)
    }

    fn read(&mut self, bytes: &mut [u8]) -> usize {
        self.amount(bytes.len()).unwrap_or(0)
    }

    fn size(&self) -> TerminalSize {
        let rows = u16::try_from(self.answers().bytes.len()).unwrap_or(u16::MAX);
        TerminalSize { columns: 80, rows }
    }
}

impl Durable for Host {
    fn begin(&mut self, token: u64) {
        self.answers().flush = Some(token);
    }

    fn done(&mut self) -> Option<(u64, io::Result<()>)> {
        let result = match self.amount(0) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            result => result.map(drop),
        };
        self.answers().flush.take().map(|token| (token, result))
    }
}

impl VsockHost for Host {
    fn changes(&mut self, changes: &mut Vec<Change>) -> io::Result<bool> {
        let mut answers = self.answers();
        let Some(what) = answers.bytes.pop_front() else { return Ok(false) };
        changes.push(match what & 3 {
            0 => Change::Arrival,
            kind => Change::Stream { id: StreamId(u64::from(what >> 2)), is_gone: kind == 3 },
        });
        Ok(what & 1 != 0)
    }

    fn accept(&mut self) -> io::Result<StreamId> {
        self.connect(0)
    }

    fn connect(&mut self, _: u32) -> io::Result<StreamId> {
        self.amount(0)?;
        let mut answers = self.answers();
        answers.streams += 1;
        Ok(StreamId(answers.streams))
    }

    fn read(&mut self, _: StreamId, bytes: &mut [u8]) -> io::Result<usize> {
        let amount = self.amount(bytes.len())?;
        for byte in bytes.iter_mut().take(amount) {
            // Words of the handshake, among others.
            *byte = self.answers().bytes.pop_front().unwrap_or(b'\n');
        }
        Ok(amount)
    }

    fn write(&mut self, _: StreamId, bytes: &[u8]) -> io::Result<usize> {
        self.amount(bytes.len())
    }

    fn finish(&mut self, _: StreamId) {}

    fn close(&mut self, _: StreamId) {}
}

impl Answers {
    /// Completes the request that was begun first.
    fn complete(&mut self) -> bool {
        let Some((token, transfer)) = self.begun.pop_front() else { return false };
        let result = match self.bytes.pop_front() {
            Some(255) => Err(io::ErrorKind::Other.into()),
            Some(253) => Err(io::ErrorKind::Unsupported.into()),
            _ => Ok(()),
        };
        if let Transfer::Fill(memory, segments) = transfer {
            for Segment { address, length } in segments {
                let filled = memory.write_slice(&vec![9; length as usize], address);
                assert!(filled.is_ok(), "the device passed on what is no memory: {address:?} {length}");
            }
        }
        self.completed.push(Completion { token, result });
        true
    }
}

impl BlockBackend for Host {
    fn submit(&mut self, token: Token, operation: Operation<'_>) {
        let inside = |at: u64, length: u64| assert!(at + length <= SECTORS * SECTOR, "{at} {length} of the image");
        let transfer = match operation {
            Operation::Read { at, buffers } => {
                inside(at, buffers.segments.iter().map(|segment| u64::from(segment.length)).sum());
                Transfer::Fill(buffers.memory.clone(), buffers.segments.to_vec())
            }
            Operation::Write { at, buffers, .. } => {
                inside(at, buffers.segments.iter().map(|segment| u64::from(segment.length)).sum());
                Transfer::None
            }
            Operation::Discard(range) | Operation::WriteZeroes { range, .. } => {
                inside(range.start, range.end - range.start);
                Transfer::None
            }
            Operation::Flush => Transfer::None,
        };
        self.answers().begun.push_back((token, transfer));
    }

    fn start(&mut self) {
        let mut answers = self.answers();
        // Now, or when somebody waits for it.
        if answers.bytes.front().is_none_or(|byte| byte & 1 == 0) {
            while answers.complete() {}
        }
    }

    fn take_completed(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.answers().completed);
    }

    fn wait(&mut self, _: Option<Instant>) -> bool {
        let mut answers = self.answers();
        answers.complete();
        !answers.completed.is_empty()
    }
}
