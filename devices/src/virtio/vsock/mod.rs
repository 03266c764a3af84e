//! Sockets between programs of the guest and programs of the host (virtio 1.2, section 5.10).
//!
//! ```text
//!   guest                                                     host
//!   connect to CID 2, port P ──────► Switchboard ──────────► somebody who listens at PATH_P
//!   listen at port P ◄────────────── Switchboard ◄── "CONNECT P\n" ── somebody who connects to PATH
//!                                                ──── "OK 1073741824\n" ──►
//! ```
//!
//! The host's side are UNIX sockets, with the conventions of Firecracker, so that what is written for it works here. Each direction of
//! a connection has a buffer and credit: neither side makes the other keep more than it can.
//!
//! # After an outage
//!
//! Connections are gone, since the programs of the host are. The driver is told (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`) and
//! closes them; programs of the guest that listen go on listening.

mod cid;
mod connection;
mod handshake;
mod host;
mod packet;
mod state;
mod switchboard;
#[cfg(test)]
mod tests;

pub use cid::{Cid, CidError};
pub use host::{Change, StreamId, VsockHost};
pub use state::VsockStateV1;

use super::buffers::{self, Piece};
use super::device::{VirtioDevice, VirtioKind, read_bytes};
use super::fault::Fault;
use super::ring::{Chain, Ring};
use super::state::VirtioState;
use crate::state::StateError;
use packet::{HEADER, Header};
use switchboard::Switchboard;

const DEVICE: &str = "virtio-vsock";
/// Receive, transmit, events.
const QUEUES: [u16; 3] = [256, 256, 16];
/// The most bytes that a packet carries, as in Linux.
const PAYLOAD_MAX: usize = 64 << 10;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The device.
pub struct Vsock {
    board: Switchboard,
    /// The host may have changed.
    look: bool,
    /// The driver has to be told that all connections are gone.
    transport_reset: bool,
    /// The machine comes from a saved state and has not run since.
    restored: bool,
}

impl Vsock {
    /// The guest `cid`'s sockets, with the host's at `host`. It has one source: any change of any stream.
    #[must_use]
    pub fn new(cid: Cid, host: Box<dyn VsockHost>) -> Self {
        Self { board: Switchboard::new(cid, host), look: false, transport_reset: false, restored: false }
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Fault> {
        let [receive, transmit, events] = rings else { return Ok(()) };
        if std::mem::take(&mut self.look) {
            self.board.look().map_err(|source| Fault::Host { doing: "look at the host's sockets", source })?;
        }
        self.tell_of_reset(events)?;
        loop {
            let taken = self.take(transmit)?;
            let given = self.give(receive)?;
            transmit.signal()?;
            receive.signal()?;
            if !taken && !given {
                return Ok(());
            }
        }
    }

    /// Takes packets of the guest while they can be answered. Whether there were any.
    fn take(&mut self, ring: &mut Ring) -> Result<bool, Fault> {
        let mut any = false;
        while self.board.has_room() {
            let Some(chain) = ring.pop_or_listen()? else { return Ok(any) };
            let head = chain.head_index();
            if let Some((header, payload)) = read(ring, chain) {
                self.board.take(&header, payload.as_deref());
            }
            ring.complete(head, 0)?;
            any = true;
        }
        Ok(any)
    }

    /// Gives packets to the guest while it has buffers. Whether there were any.
    fn give(&mut self, ring: &mut Ring) -> Result<bool, Fault> {
        let (mut any, mut payload) = (false, Vec::new());
        while self.board.has_news() {
            let Some(chain) = ring.pop_or_listen()? else { return Ok(any) };
            let head = chain.head_index();
            let memory = ring.memory().clone();
            let pieces = buffers::pieces(&memory, buffers::writable(chain), HEADER + PAYLOAD_MAX);
            let room = pieces.iter().flatten().map(|piece| piece.len()).sum::<usize>().checked_sub(HEADER);
            let (Some(pieces), Some(room)) = (pieces, room) else {
                // Nothing fits into it, or it is nowhere: back it goes.
                ring.complete(head, 0)?;
                continue;
            };
            payload.clear();
            match self.board.next(room, &mut payload) {
                Some(header) => ring.complete(head, write(&pieces, &header, &payload))?,
                None => ring.put_back(),
            }
            any = true;
        }
        Ok(any)
    }

    fn tell_of_reset(&mut self, ring: &mut Ring) -> Result<(), Fault> {
        while self.transport_reset {
            let Some(chain) = ring.pop_or_listen()? else { return Ok(()) };
            let head = chain.head_index();
            let memory = ring.memory().clone();
            let written = buffers::scatter(&memory, buffers::writable(chain), 0, &TRANSPORT_RESET);
            self.transport_reset = written < TRANSPORT_RESET.len();
            ring.complete(head, u32::try_from(written).unwrap_or(0))?;
        }
        ring.signal()
    }
}

/// A packet of the guest, and what it carries; no payload if that is not as long as its header says. `None`: not even a header.
fn read(ring: &Ring, chain: Chain) -> Option<(Header, Option<Vec<u8>>)> {
    let memory = ring.memory().clone();
    let pieces = buffers::pieces(&memory, buffers::readable(chain), HEADER + PAYLOAD_MAX)?;
    let length = pieces.iter().map(|piece| piece.len()).sum();
    let mut bytes = vec![0; length];
    let mut filled = 0;
    for piece in &pieces {
        filled += piece.copy_to(bytes.get_mut(filled..)?);
    }
    let header = Header::read(bytes.first_chunk()?);
    let end = HEADER.checked_add(usize::try_from(header.length).ok()?);
    let payload = end.and_then(|end| bytes.get(HEADER..end)).map(<[u8]>::to_vec);
    Some((header, payload))
}

/// Writes a packet for the guest, which has room for it; its length.
fn write(pieces: &[Piece<'_>], header: &Header, payload: &[u8]) -> u32 {
    let packet = [&header.bytes(), payload].concat();
    let mut rest = &packet[..];
    for piece in pieces {
        let (part, behind) = rest.split_at_checked(piece.len()).unwrap_or((rest, &[]));
        piece.copy_from(part);
        rest = behind;
    }
    u32::try_from(packet.len() - rest.len()).unwrap_or(0)
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Vsock
    }

    /// None: there are streams alone, which is what none says.
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.board.cid.number().to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _: u64) {
        // Programs of the host may wait already.
        self.look = true;
        self.restored = false;
    }

    fn reset(&mut self) {
        let Self { board, look: _, transport_reset, restored } = self;
        board.clear();
        *transport_reset = false;
        *restored = false;
    }

    fn notified(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        self.serve(rings)
    }

    fn ready(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        self.look = true;
        self.serve(rings)
    }

    fn sources(&self) -> usize {
        1
    }

    fn save(&self) -> VirtioState {
        // Connections do not outlive the process.
        let Self { board, look: _, transport_reset, restored: _ } = self;
        VirtioState::Vsock(VsockStateV1 { cid: board.cid.number(), transport_reset: *transport_reset })
    }

    fn restore(&mut self, state: &VirtioState, _: u64) -> Result<(), StateError> {
        let VirtioState::Vsock(state) = state else { return Err(StateError::wrong_virtio_device(DEVICE, state)) };
        let cid = state.validate()?;
        let VsockStateV1 { cid: _, transport_reset } = state;
        self.board.clear();
        self.board.cid = cid;
        self.transport_reset = *transport_reset;
        self.restored = true;
        Ok(())
    }

    fn thaw(&mut self, _: &mut [Ring]) -> Result<(), Fault> {
        self.transport_reset |= std::mem::take(&mut self.restored);
        Ok(())
    }
}
