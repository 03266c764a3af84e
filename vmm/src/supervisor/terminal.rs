//! The user's keyboard, and the terminal in raw mode.
//!
//! On a terminal every key goes to the guest, Ctrl-C too; Ctrl-] leaves the VM running in the background. Input from a
//! pipe or file is passed on byte by byte, with no escape.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::termios::{self, OptionalActions, Termios};

use super::console::Console;

/// Ctrl-], as in telnet and virsh: leaves the VM running.
pub const ESCAPE: u8 = 0x1d;

/// Puts a terminal into raw mode until it is dropped.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Standard input in raw mode; `None` if it is no terminal.
    ///
    /// # Errors
    /// As the system says.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // A line feed from the guest alone is a line feed and a carriage return to a person.
        raw.output_modes |= termios::OutputModes::OPOST | termios::OutputModes::ONLCR;
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// What becomes of a VM whose user typed the escape.
pub trait Leave: Send {
    /// Gives the terminal back; the VM goes on without it.
    fn leave(&mut self);
}

/// Where input comes from.
pub struct Keyboard {
    terminal: bool,
    stdin: Option<io::Stdin>,
    leave: Option<Box<dyn Leave>>,
    /// Read, but not yet taken by the console.
    rest: Vec<u8>,
}

impl Keyboard {
    /// No terminal at all.
    #[must_use]
    pub fn none() -> Self {
        Self { terminal: false, stdin: None, leave: None, rest: Vec::new() }
    }

    /// Standard input. With `leave`, the escape key leaves the VM running.
    #[must_use]
    pub fn stdin(leave: Option<Box<dyn Leave>>) -> Self {
        Self { terminal: true, stdin: Some(io::stdin()), leave, rest: Vec::new() }
    }

    /// Whether there is a standard output to write to.
    #[must_use]
    pub fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// For `poll`; `None` while nothing can be taken, or after the end of input.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.stdin.as_ref().filter(|_| self.rest.is_empty()).map(AsFd::as_fd)
    }

    /// Passes on what there is to read.
    pub fn read(&mut self, console: &Console) {
        let Some(stdin) = &self.stdin else { return };
        let mut buffer = [0; 512];
        match rustix::io::read(stdin, &mut buffer) {
            Ok(0) => self.stdin = None,
            Ok(count) => self.pass_on(&buffer[..count], console),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => {
                tracing::warn!("no more input: {error}");
                self.stdin = None;
            }
        }
    }

    /// Passes on what the console had no room for.
    pub fn retry(&mut self, console: &Console) {
        let rest = std::mem::take(&mut self.rest);
        self.pass_on(&rest, console);
    }

    fn pass_on(&mut self, bytes: &[u8], console: &Console) {
        let escape = self.leave.as_ref().and_then(|_| bytes.iter().position(|byte| *byte == ESCAPE));
        let typed = &bytes[..escape.unwrap_or(bytes.len())];
        let taken = console.type_in(typed);
        self.rest = typed[taken..].to_vec();
        if escape.is_some() {
            console.leave_terminal();
            self.stdin = None;
            self.terminal = false;
            if let Some(mut leave) = self.leave.take() {
                leave.leave();
            }
        }
    }
}

impl std::fmt::Debug for Keyboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyboard").field("terminal", &self.terminal).finish_non_exhaustive()
    }
}

/// Joins this process's terminal to a VM's serial line, until the escape or the line's end. For `perdure console`.
///
/// # Errors
/// As the system says.
pub fn attach(line: &std::os::unix::net::UnixStream) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let stdin = io::stdin();
    let raw = RawTerminal::enter()?;
    let mut input_open = true;
    let mut buffer = [0; 4096];
    line.set_read_timeout(None)?;
    loop {
        let mut fds = vec![PollFd::new(line, PollFlags::IN)];
        if input_open {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let (from_line, from_stdin) =
            (!fds[0].revents().is_empty(), fds.get(1).is_some_and(|fd| !fd.revents().is_empty()));
        if from_line {
            match (&mut &*line).read(&mut buffer)? {
                0 => return Ok(()),
                count => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&buffer[..count])?;
                    stdout.flush()?;
                }
            }
        }
        if from_stdin {
            let count = rustix::io::read(&stdin, &mut buffer)?;
            input_open = count > 0;
            let escape = raw.as_ref().and_then(|_| buffer[..count].iter().position(|byte| *byte == ESCAPE));
            (&mut &*line).write_all(&buffer[..escape.unwrap_or(count)])?;
            if escape.is_some() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Note(Arc<AtomicBool>);

    impl Leave for Note {
        fn leave(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_escape_leaves_and_what_came_before_it_is_typed() {
        let left = Arc::new(AtomicBool::new(false));
        let mut keyboard = Keyboard::stdin(Some(Box::new(Note(Arc::clone(&left)))));
        let console = Console::detached();
        keyboard.pass_on(b"ls\x03\x1drm", &console);
        assert!(left.load(Ordering::SeqCst));
        assert!(keyboard.descriptor().is_none());
        assert_eq!(console.save().input, b"ls\x03");
    }

    #[test]
    fn without_a_terminal_every_byte_is_the_guests() {
        let mut keyboard = Keyboard::stdin(None);
        let console = Console::detached();
        keyboard.pass_on(b"a\x1db", &console);
        assert_eq!(console.save().input, b"a\x1db");
    }
}
