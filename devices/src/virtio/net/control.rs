//! What the driver tells the card by its control queue (virtio 1.2, section 5.1.6.5).

use crate::virtio::buffers;
use crate::virtio::fault::Fault;
use crate::virtio::ring::{Chain, Ring};

/// Class and command of `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
const ANNOUNCED: [u8; 2] = [3, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// Answers what waits. Whether the driver says that it has announced itself; any other command is refused, as none of their features is
/// offered.
pub(super) fn answer(ring: &mut Ring) -> Result<bool, Fault> {
    let mut announced = false;
    ring.drain(|ring, chain| {
        let head = chain.head_index();
        let is_known = command(ring, &chain) == Some(ANNOUNCED);
        announced |= is_known;
        let memory = ring.memory().clone();
        let ack = if is_known { OK } else { ERR };
        let written = buffers::scatter(&memory, buffers::writable(chain), 0, &[ack]);
        ring.complete(head, u32::try_from(written).unwrap_or(0))
    })?;
    ring.signal()?;
    Ok(announced)
}

fn command(ring: &Ring, chain: &Chain) -> Option<[u8; 2]> {
    let mut command = [0; 2];
    let memory = ring.memory().clone();
    let pieces = buffers::pieces(&memory, buffers::readable(chain.clone()), command.len())?;
    let mut filled = 0;
    for piece in &pieces {
        filled += piece.copy_to(command.get_mut(filled..)?);
    }
    (filled == command.len()).then_some(command)
}
