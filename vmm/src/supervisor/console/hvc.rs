//! The console's end in the guest where that is a virtio console: the device asks for what was typed, and gives what there is room for.
//!
//! A vCPU that writes to the serial port waits for a slow reader; the device's thread does not: what does not fit stays in the guest's ring, and the bell
//! rings when there is room.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use devices::virtio::{Line, TerminalSize};
use rustix::event::{EventfdFlags, eventfd};
use signal_hook::consts::SIGWINCH;
use signal_hook::low_level::pipe;

use super::{Console, ConsoleError, Lines, PENDING_MOST, Sink};
use crate::machine::virtio::{self, Attachment};

/// What joins a console to its device.
#[derive(Debug)]
pub(super) struct Hvc {
    /// Rings when there is input, or room for output after there was too little.
    bell: OwnedFd,
    /// Readable when the terminal has another size; `None` without a terminal.
    resized: Option<UnixStream>,
    /// The device has output for which there was no room.
    output_waits: bool,
    /// Bytes under way at a freeze are still to come, and go first.
    held: bool,
}

impl Console {
    /// Joins it to a virtio console. `held`: until [`Console::restore`] nothing is printed or typed.
    ///
    /// # Errors
    /// [`ConsoleError::Device`].
    pub(super) fn join_hvc(&self, held: bool) -> Result<(), ConsoleError> {
        let mut lines = self.lines();
        let resized = match &lines.sink {
            Sink::Terminal(fd) if rustix::termios::isatty(fd) => Some(resizes().map_err(ConsoleError::Device)?),
            _ => None,
        };
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = bell.map_err(|error| ConsoleError::Device(error.into()))?;
        lines.hvc = Some(Hvc { bell, resized, output_waits: false, held });
        Ok(())
    }

    /// The virtio console, if it was joined to one; for each machine anew.
    ///
    /// # Errors
    /// [`ConsoleError::Device`].
    pub(in super::super) fn attachment(&self) -> Result<Option<Attachment>, ConsoleError> {
        let lines = self.lines();
        let Some(hvc) = &lines.hvc else { return Ok(None) };
        let mut sources = vec![hvc.bell.try_clone().map_err(ConsoleError::Device)?];
        if let Some(resized) = &hvc.resized {
            sources.push(resized.try_clone().map_err(ConsoleError::Device)?.into());
        }
        drop(lines);
        Ok(Some(virtio::console(Box::new(HvcLine(self.clone())), sources)))
    }

    /// Whether no more can be typed before the guest takes some of it.
    pub(in super::super) fn is_input_full(&self) -> bool {
        self.lines().input.len() >= super::INPUT_MOST
    }
}

/// Readable when the terminal of this process has another size.
fn resizes() -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    pipe::register(SIGWINCH, writer)?;
    Ok(reader)
}

impl Lines {
    /// There may be news for the device.
    pub(super) fn ring(&self) {
        if let Some(hvc) = &self.hvc {
            // Nobody reads it, and it takes 2^64 rings to fill it.
            let _ = rustix::io::write(&hvc.bell, &1_u64.to_ne_bytes());
        }
    }

    /// If there is room for output again that the device was refused, it is told.
    pub(super) fn let_hvc_go_on(&mut self) {
        let has_room = self.pending.len() <= PENDING_MOST / 2;
        if let Some(hvc) = &mut self.hvc
            && hvc.output_waits
            && has_room
        {
            hvc.output_waits = false;
            self.ring();
        }
    }

    /// What was under way at the freeze has gone first.
    pub(super) fn release_hvc(&mut self) {
        if let Some(hvc) = &mut self.hvc {
            hvc.held = false;
            self.ring();
        }
    }
}

/// The device's side of the line.
struct HvcLine(Console);

impl Line for HvcLine {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut lines = self.0.lines();
        let has_room = lines.pending.len() < PENDING_MOST || !lines.drain();
        match &mut lines.hvc {
            Some(hvc) if hvc.held => return 0,
            Some(hvc) if !has_room => {
                hvc.output_waits = true;
                return 0;
            }
            _ => {}
        }
        lines.emit(bytes);
        bytes.len()
    }

    fn read(&mut self, bytes: &mut [u8]) -> usize {
        let mut lines = self.0.lines();
        if lines.hvc.as_ref().is_some_and(|hvc| hvc.held) {
            return 0;
        }
        let count = bytes.len().min(lines.input.len());
        bytes.iter_mut().zip(lines.input.drain(..count)).for_each(|(to, from)| *to = from);
        count
    }

    fn size(&self) -> TerminalSize {
        let lines = self.0.lines();
        if let Some(resized) = lines.hvc.as_ref().and_then(|hvc| hvc.resized.as_ref()) {
            while matches!((&mut &*resized).read(&mut [0; 64]), Ok(1..)) {}
        }
        match &lines.sink {
            Sink::Terminal(fd) => rustix::termios::tcgetwinsize(fd).map_or_else(
                |_| TerminalSize::default(),
                |size| TerminalSize { columns: size.ws_col, rows: size.ws_row },
            ),
            Sink::Nowhere | Sink::File { .. } => TerminalSize::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arc, Wake};
    use super::*;
    use crate::persistence::context::ConsoleStateV1;
    use std::io::Write;

    fn line(console: &Console, held: bool) -> HvcLine {
        console.join_hvc(held).unwrap();
        HvcLine(console.clone())
    }

    /// How often the bell rang since the last call.
    fn rings(console: &Console) -> u64 {
        let mut count = [0; 8];
        let lines = console.lines();
        let read = rustix::io::read(&lines.hvc.as_ref().unwrap().bell, &mut count);
        read.map_or(0, |_| u64::from_ne_bytes(count))
    }

    #[test]
    fn what_is_typed_rings_and_is_given_once() {
        let console = Console::detached();
        let mut line = line(&console, false);
        assert_eq!((console.type_in(b"hello"), rings(&console)), (5, 1));
        let mut bytes = [0; 3];
        assert_eq!((line.read(&mut bytes), &bytes), (3, b"hel"));
        assert_eq!(console.save().input, b"lo");
        assert_eq!((line.read(&mut bytes), &bytes[..2]), (2, &b"lo"[..]));
        assert_eq!(line.read(&mut bytes), 0);
    }

    #[test]
    fn a_terminal_that_takes_nothing_holds_the_guest_back_and_no_byte_is_lost() {
        let (mut reader, writer) = io::pipe().unwrap();
        let console = Console::over(Sink::Terminal(writer.into()));
        let mut line = line(&console, false);
        let wake = Arc::new(Wake::new().unwrap());
        console.lines().wake = Some(Arc::clone(&wake));
        let (mut given, mut taken) = (0, 0);
        while given == 0 || taken > 0 {
            taken = line.write(&vec![(given >> 12) as u8; 4096]);
            given += taken;
            assert!(given < 2 * PENDING_MOST, "what waits is bounded");
        }
        assert!(console.save().output.len() >= PENDING_MOST, "it is in the context if a freeze comes now");
        rings(&console);
        let mut seen: Vec<u8> = Vec::new();
        while console.drain() || seen.len() < given {
            let mut bytes = vec![0; 4096];
            let count = reader.read(&mut bytes).unwrap();
            seen.extend(&bytes[..count]);
        }
        assert_eq!(rings(&console), 1, "the device is told of room, once");
        let expected: Vec<u8> = (0..given).map(|at| (at >> 12) as u8).collect();
        assert_eq!(seen, expected);
        assert!(rustix::io::read(wake.descriptor(), &mut [0; 8]).is_ok(), "whoever drains was told");
    }

    #[test]
    fn what_was_under_way_at_a_freeze_goes_first() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let console = Console::file(&path).unwrap();
        let mut line = line(&console, true);
        assert_eq!((line.write(b"after"), line.read(&mut [0; 8])), (0, 0));
        console.output().write_all(b"[serial]").unwrap();
        console.restore(&ConsoleStateV1 { input: b"typed".to_vec(), output: b"before ".to_vec() });
        assert_eq!(rings(&console), 1);
        let mut bytes = [0; 8];
        assert_eq!((line.write(b"after"), line.read(&mut bytes), &bytes[..5]), (5, 5, &b"typed"[..]));
        assert_eq!(std::fs::read(&path).unwrap(), b"[serial]before after");
    }
}
