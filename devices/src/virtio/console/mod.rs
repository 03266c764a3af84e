//! A console (virtio 1.2, section 5.3): the guest's `hvc0`. One port.
//!
//! ```text
//!   driver                                        host
//!   receive ring ◄── what was typed ────────────── Line
//!   transmit ring ── what the guest prints ──────► Line    takes what there is room for; the rest stays in the ring
//! ```
//!
//! Nothing is kept here: what was typed and is not yet the guest's is the line's, and what the guest printed and the line has no room for is
//! still in the transmit ring. Of a request that the line took in part it is known how much that was, also after a freeze: so no byte is
//! lost at an outage, and none comes twice.

mod state;
#[cfg(test)]
mod tests;

pub use state::ConsoleStateV1;

use super::buffers;
use super::device::{VirtioDevice, VirtioKind, read_bytes};
use super::fault::Fault;
use super::memory::GuestMemory;
use super::ring::{Chain, Ring};
use super::state::VirtioState;
use crate::state::StateError;

const DEVICE: &str = "virtio-console";
/// Receive, transmit.
const QUEUES: [u16; 2] = [64, 64];
/// The configuration has the terminal's size (section 5.3.3).
const FEATURE_SIZE: u64 = 1;
/// The most bytes of one request that are printed; what is beyond is not. Linux sends 32 KiB at most, and a guest that offers gigabytes is not to
/// hold up a freeze.
const TRANSMIT_MAX: usize = 1 << 20;
/// The most bytes that one request of the driver's for input gets.
const RECEIVE_MAX: usize = 4096;
/// Bytes offered to the line at a time.
const CHUNK: usize = 4096;

/// How large a terminal is, in characters; zeros if that is not known, or there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// Whoever reads what the guest prints, and types; implemented by the VMM.
///
/// No call waits. A source of the device becomes ready when there is input where there was none, room for output after there was too little, or
/// another size.
pub trait Line: Send {
    /// Takes output; how many of `bytes`, from the first on.
    fn write(&mut self, bytes: &[u8]) -> usize;

    /// Gives input; how many bytes, which are not to be given again.
    fn read(&mut self, bytes: &mut [u8]) -> usize;

    /// How large its terminal is.
    fn size(&self) -> TerminalSize;
}

/// The console.
pub struct Console {
    line: Box<dyn Line>,
    /// How much of the first request in the transmit ring the line has taken, in bytes.
    sent: usize,
    /// The size of which the driver was told.
    told: Option<TerminalSize>,
    configuration_changed: bool,
}

impl Console {
    /// A console on `line`. It has two sources: one for input and room, the other for the terminal's size.
    #[must_use]
    pub fn new(line: Box<dyn Line>) -> Self {
        Self { line, sent: 0, told: None, configuration_changed: false }
    }

    /// `cols` and `rows` of `virtio_console_config`; what is behind them is of features that are not offered.
    fn configuration(&self) -> [u8; 4] {
        let TerminalSize { columns, rows } = self.line.size();
        (u32::from(columns) | u32::from(rows) << 16).to_le_bytes()
    }

    fn serve(&mut self, rings: &mut [Ring]) -> Result<(), Fault> {
        let [receive, transmit] = rings else { return Ok(()) };
        self.transmit(transmit)?;
        transmit.signal()?;
        self.receive(receive)?;
        receive.signal()
    }

    /// Prints what there is, as far as the line takes it.
    fn transmit(&mut self, ring: &mut Ring) -> Result<(), Fault> {
        while let Some(chain) = ring.pop_or_listen()? {
            let (head, memory) = (chain.head_index(), ring.memory().clone());
            if !self.print(&memory, chain) {
                ring.put_back();
                return Ok(());
            }
            self.sent = 0;
            ring.complete(head, 0)?;
        }
        Ok(())
    }

    /// Prints what is left of a request. Whether the line took all of it.
    fn print(&mut self, memory: &GuestMemory, chain: Chain) -> bool {
        // What is not in the memory is nothing that can be printed.
        let pieces = buffers::pieces(memory, buffers::readable(chain), TRANSMIT_MAX).unwrap_or_default();
        let mut before = self.sent;
        let mut bytes = [0; CHUNK];
        for piece in pieces {
            let mut at = before.min(piece.len());
            before -= at;
            while at < piece.len() {
                let Ok(rest) = piece.offset(at) else { break };
                let count = rest.copy_to(&mut bytes);
                let taken = self.line.write(bytes.get(..count).unwrap_or_default()).min(count);
                self.sent += taken;
                at += taken;
                if taken < count {
                    return false;
                }
            }
        }
        true
    }

    /// Gives the driver what was typed, as far as it has room.
    fn receive(&mut self, ring: &mut Ring) -> Result<(), Fault> {
        while let Some(chain) = ring.pop_or_listen()? {
            let (head, memory) = (chain.head_index(), ring.memory().clone());
            // Before anything is taken from the line: a buffer outside of the memory goes back empty, and loses nothing.
            let pieces = buffers::pieces(&memory, buffers::writable(chain), RECEIVE_MAX).unwrap_or_default();
            let room: usize = pieces.iter().map(|piece| piece.len()).sum();
            let mut bytes = [0; RECEIVE_MAX];
            let typed = match bytes.get_mut(..room) {
                Some(bytes) if room > 0 => self.line.read(bytes).min(room),
                _ => {
                    ring.complete(head, 0)?;
                    continue;
                }
            };
            if typed == 0 {
                ring.put_back();
                return Ok(());
            }
            let mut rest = bytes.get(..typed).unwrap_or_default();
            for piece in pieces {
                let (now, later) = rest.split_at(rest.len().min(piece.len()));
                piece.copy_from(now);
                rest = later;
            }
            ring.complete(head, u32::try_from(typed).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Console
    }

    fn features(&self) -> u64 {
        FEATURE_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.configuration(), offset, data);
    }

    fn take_configuration_change(&mut self) -> bool {
        std::mem::take(&mut self.configuration_changed)
    }

    fn activate(&mut self, _: u64) {
        // The driver reads the size when it begins.
        self.told = Some(self.line.size());
    }

    fn reset(&mut self) {
        self.sent = 0;
        self.told = None;
        self.configuration_changed = false;
    }

    fn notified(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        self.serve(rings)
    }

    fn ready(&mut self, _: usize, rings: &mut [Ring]) -> Result<(), Fault> {
        let size = Some(self.line.size());
        self.configuration_changed |= std::mem::replace(&mut self.told, size) != size;
        self.serve(rings)
    }

    fn sources(&self) -> usize {
        2
    }

    fn save(&self) -> VirtioState {
        let Self {
            // What was typed is saved with it.
            line: _,
            sent,
            // The driver is told again.
            told: _,
            // The transport has raised it.
            configuration_changed: _,
        } = self;
        VirtioState::Console(ConsoleStateV1 { sent: u32::try_from(*sent).unwrap_or(u32::MAX) })
    }

    fn restore(&mut self, state: &VirtioState, _: u64) -> Result<(), StateError> {
        let VirtioState::Console(state) = state else { return Err(StateError::wrong_virtio_device(DEVICE, state)) };
        self.sent = state.validate()?;
        // The machine may be joined to another terminal now.
        self.told = None;
        Ok(())
    }
}
