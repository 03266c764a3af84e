//! What the card is plugged into.

use std::io;

use crate::virtio::buffers::Piece;

/// Work that the driver leaves to the card when it receives: frames larger than the link's, and checksums not yet computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// TCP over IPv4 in segments of up to 64 KiB.
    pub tcp4: bool,
    /// TCP over IPv6, likewise.
    pub tcp6: bool,
    /// Such segments with explicit congestion notification.
    pub ecn: bool,
}

/// A host's end of a link: frames, each behind the 12 bytes of a `virtio_net_hdr` (virtio 1.2, section 5.1.6). Implemented by the VMM.
///
/// No call waits: `WouldBlock` says that the frame is still where it was, and a source of the device becomes ready when it is worth
/// another attempt. After any other error the frame is gone.
pub trait Tap: Send {
    /// Receives a frame into `buffers`, and marks what it wrote of them; what they have no room for goes to `rest`. Its length. Both together
    /// have room for the largest.
    ///
    /// # Errors
    /// As the system says.
    fn receive(&mut self, buffers: &[Piece<'_>], rest: &mut [u8]) -> io::Result<usize>;

    /// Sends the frame that lies in `buffers`.
    ///
    /// # Errors
    /// As the system says.
    fn send(&mut self, buffers: &[Piece<'_>]) -> io::Result<()>;

    /// Sends a frame of our own.
    ///
    /// # Errors
    /// As the system says.
    fn send_from(&mut self, frame: &[u8]) -> io::Result<()>;

    /// From now on frames may come that need `offloads`, and no others.
    ///
    /// # Errors
    /// As the system says.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}
