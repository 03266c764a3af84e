//! The host's side of the sockets.

use std::io;

/// A stream of the host, by a number that is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// What changed at the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Somebody connects.
    Arrival,
    /// A stream has bytes, room for bytes, or an end.
    Stream {
        /// Which.
        id: StreamId,
        /// The other side is gone: nothing that is written reaches it.
        is_gone: bool,
    },
}

/// Streams of the host; implemented by the VMM, by UNIX sockets. No call waits: `WouldBlock` says that there is nothing now, and that
/// there will be a [`Change`] when that is different.
pub trait VsockHost: Send {
    /// Adds what changed since the last call, each once, to `changes`; whether there may be more.
    ///
    /// # Errors
    /// As the system says.
    fn changes(&mut self, changes: &mut Vec<Change>) -> io::Result<bool>;

    /// Takes the next that connects.
    ///
    /// # Errors
    /// As the system says.
    fn accept(&mut self) -> io::Result<StreamId>;

    /// Connects to whoever listens for the guest's connections to `port`.
    ///
    /// # Errors
    /// As the system says.
    fn connect(&mut self, port: u32) -> io::Result<StreamId>;

    /// Reads; 0 bytes are the end.
    ///
    /// # Errors
    /// As the system says.
    fn read(&mut self, stream: StreamId, bytes: &mut [u8]) -> io::Result<usize>;

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// As the system says.
    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> io::Result<usize>;

    /// Nothing will be written any more: the other side sees the end.
    fn finish(&mut self, stream: StreamId);

    /// Closes it.
    fn close(&mut self, stream: StreamId);
}
