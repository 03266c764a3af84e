//! A machine that is to outlive nothing: an embedded guest over anonymous memory, its serial line kept in a buffer.

use std::io::{self, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::MachineRequest;

use crate::machine::config::{ByteSize, Kernel, SerialTarget, VmConfig};
use crate::machine::kvm::{Host, VcpuFailure};
use crate::machine::memory::{Anonymous, GuestRam};
use crate::machine::{Machine, MachineEvent, Wiring};

/// What the embedded guests need at the most, and some.
const MEMORY: usize = 16 << 20;
/// No guest that is run here prints as much; a KVM that lets one run wild must not fill our memory.
const OUTPUT_MOST: usize = 1 << 20;
/// How often a guest's output is looked at.
const LOOK: Duration = Duration::from_millis(1);

/// What a guest printed so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn length(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// All of it.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = OUTPUT_MOST.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How a wait for a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The output was as awaited.
    Reached,
    /// The guest asked for its end.
    Request(MachineRequest),
    /// A vCPU cannot go on.
    Failed(VcpuFailure),
    /// It printed nothing for so long.
    Hangs(Duration),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reached => f.write_str("it went on"),
            Self::Request(MachineRequest::PowerOff) => f.write_str("the guest powered off"),
            Self::Request(MachineRequest::Reset) => f.write_str("the guest reset the machine"),
            Self::Request(MachineRequest::DebugExit(code)) => write!(f, "the guest ended with code {code}"),
            // The long form sends the reader to `perdure doctor`, where they are already.
            Self::Failed(VcpuFailure::Emulation { at, bytes, .. }) => {
                write!(f, "KVM cannot emulate the instruction at {:#x}", at.rip)?;
                bytes
                    .iter()
                    .enumerate()
                    .try_for_each(|(index, byte)| write!(f, "{}{byte:02x}", if index == 0 { ", bytes " } else { " " }))
            }
            Self::Failed(failure) => failure.fmt(f),
            Self::Hangs(time) => write!(f, "it hangs: nothing came for {time:?}"),
        }
    }
}

/// The machine.
pub(super) struct Throwaway {
    pub(super) machine: Machine,
    events: mpsc::Receiver<MachineEvent>,
    output: Output,
}

/// Fresh memory for such a machine.
pub(super) fn memory() -> anyhow::Result<Arc<GuestRam>> {
    Ok(GuestRam::place(Box::new(Anonymous::new(MEMORY)?))?)
}

impl Throwaway {
    /// Puts a machine for `guest` together over `ram`. It is yet to be booted, or restored.
    pub(super) fn assemble(guest: &str, cmdline: &str, ram: Arc<GuestRam>, output: &Output) -> anyhow::Result<Self> {
        let config = VmConfig {
            memory: ByteSize(MEMORY as u64),
            kernel: Kernel::Guest(guest.to_owned()),
            cmdline: cmdline.to_owned(),
            serial: SerialTarget::None,
            ..VmConfig::default()
        };
        let (sender, events) = mpsc::channel();
        // Nobody listens any more where it cannot be sent.
        let tell = move |event| drop(sender.send(event));
        let wiring =
            Wiring { serial_output: Box::new(output.clone()), events: Arc::new(tell), attachments: Vec::new() };
        let machine = Machine::assemble(Host::open()?, &config, ram, wiring)?;
        Ok(Self { machine, events, output: output.clone() })
    }

    /// Waits until the output is as awaited, or the machine ends, or nothing was printed for `patience`.
    pub(super) fn wait(&self, patience: Duration, awaited: impl Fn(&str) -> bool) -> End {
        let (mut length, mut since) = (self.output.length(), Instant::now());
        loop {
            match self.events.recv_timeout(LOOK) {
                Ok(MachineEvent::Request(request)) => return End::Request(request),
                Ok(MachineEvent::Failed(failure)) => return End::Failed(failure),
                // The machine, which we hold, holds the sender.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            let now = self.output.length();
            if now != length {
                (length, since) = (now, Instant::now());
                if awaited(&self.output.text()) {
                    return End::Reached;
                }
            } else if since.elapsed() >= patience {
                return End::Hangs(patience);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_its_bound_and_the_guest_is_never_held_up() {
        let mut output = Output::default();
        output.write_all(b"tick 1\n").unwrap();
        assert_eq!(output.text(), "tick 1\n");
        output.write_all(&vec![b'x'; 2 * OUTPUT_MOST]).unwrap();
        assert_eq!(output.length(), OUTPUT_MOST);
    }

    #[test]
    fn an_emulation_failure_is_told_by_place_and_bytes() {
        let at = crate::machine::kvm::failure::Position { rip: 0x10_0123, ..Default::default() };
        let failure = VcpuFailure::Emulation { index: 0, at, bytes: vec![0xf3, 0x0f] };
        assert_eq!(End::Failed(failure).to_string(), "KVM cannot emulate the instruction at 0x100123, bytes f3 0f");
    }
}
