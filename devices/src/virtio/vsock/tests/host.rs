//! A host that a test controls: programs that connect, and what they say and hear.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex};

use super::super::{Change, StreamId, VsockHost};

/// One stream as a program of the host sees it.
#[derive(Default)]
pub(super) struct Stream {
    /// What the program sent and the device has not read.
    pub(super) coming: VecDeque<u8>,
    pub(super) ended: bool,
    /// What the device wrote.
    pub(super) got: Vec<u8>,
    /// How much more the program takes.
    pub(super) room: usize,
    pub(super) broken: bool,
    pub(super) finished: bool,
    pub(super) closed: bool,
}

#[derive(Default)]
pub(super) struct Outside {
    pub(super) streams: BTreeMap<u64, Stream>,
    pub(super) next: u64,
    pub(super) arrivals: VecDeque<StreamId>,
    pub(super) changes: VecDeque<Change>,
    /// Ports at which somebody listens.
    pub(super) listening: Vec<u32>,
    pub(super) connected: Vec<u32>,
}

impl Outside {
    pub(super) fn open(&mut self) -> StreamId {
        let id = StreamId(self.next);
        self.next += 1;
        self.streams.insert(id.0, Stream { room: usize::MAX, ..Stream::default() });
        id
    }

    fn stream(&mut self, id: StreamId) -> io::Result<&mut Stream> {
        let stream = self.streams.get_mut(&id.0).expect("a stream that there is");
        assert!(!stream.closed, "a closed stream is let alone");
        if stream.broken { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(stream) }
    }
}

#[derive(Clone, Default)]
pub(super) struct TestHost(pub(super) Arc<Mutex<Outside>>);

impl VsockHost for TestHost {
    fn changes(&mut self, changes: &mut Vec<Change>) -> io::Result<bool> {
        let mut outside = self.0.lock().unwrap();
        changes.extend(outside.changes.pop_front());
        Ok(!outside.changes.is_empty())
    }

    fn accept(&mut self) -> io::Result<StreamId> {
        self.0.lock().unwrap().arrivals.pop_front().ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn connect(&mut self, port: u32) -> io::Result<StreamId> {
        let mut outside = self.0.lock().unwrap();
        if !outside.listening.contains(&port) {
            return Err(io::ErrorKind::NotFound.into());
        }
        outside.connected.push(port);
        Ok(outside.open())
    }

    fn read(&mut self, stream: StreamId, bytes: &mut [u8]) -> io::Result<usize> {
        let mut outside = self.0.lock().unwrap();
        let stream = outside.stream(stream)?;
        if stream.coming.is_empty() && !stream.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = bytes.len().min(stream.coming.len());
        assert!(count > 0 || stream.ended, "a read of nothing");
        for (to, from) in bytes.iter_mut().zip(stream.coming.drain(..count)) {
            *to = from;
        }
        Ok(count)
    }

    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> io::Result<usize> {
        let mut outside = self.0.lock().unwrap();
        let stream = outside.stream(stream)?;
        let count = bytes.len().min(stream.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stream.room -= count;
        stream.got.extend(&bytes[..count]);
        Ok(count)
    }

    fn finish(&mut self, stream: StreamId) {
        self.0.lock().unwrap().streams.get_mut(&stream.0).unwrap().finished = true;
    }

    fn close(&mut self, stream: StreamId) {
        let closed = std::mem::replace(&mut self.0.lock().unwrap().streams.get_mut(&stream.0).unwrap().closed, true);
        assert!(!closed, "it is closed once");
    }
}
