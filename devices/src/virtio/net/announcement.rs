//! A frame that tells the switches on the way where a card is now.

use super::{HEADER, Mac};

const BROADCAST: [u8; 6] = [0xff; 6];
/// EtherType of RARP.
const RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet and IPv4 with addresses of 6 and 4 bytes, and the operation "request reverse" (RFC 903).
const REQUEST: [u8; 8] = [0, 1, 0x08, 0, 6, 4, 0, 3];
/// The shortest frame on an Ethernet without its check sequence.
const SHORTEST: usize = 60;

/// A reverse ARP request of `mac` for itself, behind an empty header: what QEMU sends after a migration. No answer matters, but
/// every switch that it passes learns the port of the card's address, whatever protocols the guest speaks.
pub(super) fn announcement(mac: Mac) -> Vec<u8> {
    let mac = mac.bytes();
    let mut frame = vec![0; HEADER];
    for part in [&BROADCAST[..], &mac, &RARP, &REQUEST, &mac, &[0; 4], &mac, &[0; 4]] {
        frame.extend_from_slice(part);
    }
    frame.resize(HEADER + SHORTEST, 0);
    frame
}
