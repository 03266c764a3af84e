//! One connection between the guest and a stream of the host, and the credit of both sides (virtio 1.2, section 5.10.6.3).

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;

use super::host::{StreamId, VsockHost};
use super::packet::Header;

/// Bytes of the guest that are kept for a host that does not take them: what it is told as `buf_alloc`.
pub(super) const BUFFER: u32 = 64 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The guest was asked and has not answered.
    Asked,
    /// Bytes may go both ways.
    Open,
}

/// A connection.
pub(super) struct Connection {
    pub(super) stream: StreamId,
    pub(super) standing: Standing,
    /// The guest's `buf_alloc` and `fwd_cnt`, as it said last; and what it was sent.
    buffer: u32,
    forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// The guest was asked for credit and has not given any.
    pub(super) asked_for_credit: bool,
    /// Bytes of the guest that the host has not taken.
    pending: VecDeque<u8>,
    /// What the host has taken so far, and what the guest knows of that.
    taken: Wrapping<u32>,
    told: Wrapping<u32>,
    /// A credit update is on its way.
    pub(super) updating: bool,
    /// The host may have bytes.
    pub(super) is_readable: bool,
    /// It waits for its turn to send bytes to the guest.
    pub(super) has_turn: bool,
    /// The host's other side is gone.
    pub(super) is_gone: bool,
    /// The host sends no more.
    pub(super) host_ended: bool,
    /// The guest receives, sends no more.
    pub(super) guest_ended_receiving: bool,
    pub(super) guest_ended_sending: bool,
    finished: bool,
}

impl Connection {
    pub(super) fn new(stream: StreamId, standing: Standing) -> Self {
        Self {
            stream,
            standing,
            buffer: 0,
            forwarded: Wrapping(0),
            sent: Wrapping(0),
            asked_for_credit: false,
            pending: VecDeque::new(),
            taken: Wrapping(0),
            told: Wrapping(0),
            updating: false,
            is_readable: true,
            has_turn: false,
            is_gone: false,
            host_ended: false,
            guest_ended_receiving: false,
            guest_ended_sending: false,
            finished: false,
        }
    }

    /// Every packet of the guest tells what it can take.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.buffer = header.buffer;
        self.forwarded = Wrapping(header.forwarded);
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// How many bytes the guest can take now. None if it says that it passed on more than it got.
    pub(super) fn credit(&self) -> usize {
        let under_way = (self.sent - self.forwarded).0;
        usize::try_from(self.buffer.saturating_sub(under_way)).unwrap_or(0)
    }

    /// `length` bytes went to the guest.
    pub(super) fn has_sent(&mut self, length: u32) {
        self.sent += Wrapping(length);
    }

    /// What the guest is told as `fwd_cnt`.
    pub(super) fn tell_taken(&mut self) -> u32 {
        self.told = self.taken;
        self.updating = false;
        self.taken.0
    }

    /// Whether the guest should hear that there is room again.
    pub(super) fn owes_update(&self) -> bool {
        (self.taken - self.told).0 >= BUFFER / 4 && !self.updating
    }

    /// Whether bytes of the host may go to the guest.
    pub(super) fn wants_turn(&self) -> bool {
        self.standing == Standing::Open && self.is_readable && !self.host_ended && !self.guest_ended_receiving
    }

    /// Takes `bytes` from the guest. Whether it had credit for them.
    pub(super) fn take(&mut self, bytes: &[u8]) -> bool {
        let room = usize::try_from(BUFFER).unwrap_or(0).saturating_sub(self.pending.len());
        let fits = bytes.len() <= room;
        if fits {
            self.pending.extend(bytes);
        }
        fits
    }

    /// Passes on to the host what it takes.
    ///
    /// # Errors
    /// The stream is broken.
    pub(super) fn flush(&mut self, host: &mut dyn VsockHost) -> io::Result<()> {
        while !self.pending.is_empty() {
            let (first, _) = self.pending.as_slices();
            match host.write(self.stream, first) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    let count = count.min(self.pending.len());
                    self.pending.drain(..count);
                    self.taken += Wrapping(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.guest_ended_sending && !std::mem::replace(&mut self.finished, true) {
            host.finish(self.stream);
        }
        Ok(())
    }

    /// Whether the guest wants nothing of it any more, and the host has all that the guest sent.
    pub(super) fn is_over(&self) -> bool {
        self.guest_ended_receiving && self.guest_ended_sending && self.pending.is_empty()
    }
}
