//! Where a serial port sends to, and what it keeps while that does not take it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::mem;

use super::BACKLOG_LIMIT;

/// A writer that takes every byte at once: what its sink does not take goes into a bounded backlog.
pub(super) struct Output {
    sink: Box<dyn Write + Send>,
    backlog: VecDeque<u8>,
    lost: u64,
    /// The kind of the sink's last failure, so that each new one is logged once. It says nothing about the guest, so it
    /// is not saved.
    failing: Option<io::ErrorKind>,
}

impl Output {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> Self {
        Self::resumed(sink, &[], 0)
    }

    /// An output as it was: `backlog` to be sent first, `lost` bytes lost so far.
    pub(super) fn resumed(sink: Box<dyn Write + Send>, backlog: &[u8], lost: u64) -> Self {
        Self { sink, backlog: backlog.iter().copied().collect(), lost, failing: None }
    }

    /// Exchanges sinks with `other`.
    pub(super) fn adopt(&mut self, other: &mut Self) {
        mem::swap(&mut self.sink, &mut other.sink);
    }

    pub(super) fn backlog(&self) -> Vec<u8> {
        self.backlog.iter().copied().collect()
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Sends what the sink takes now; returns how many bytes it does not.
    pub(super) fn drain(&mut self) -> usize {
        while !self.backlog.is_empty() {
            let (oldest, _) = self.backlog.as_slices();
            match self.sink.write(oldest) {
                Ok(0) => {
                    self.note(&io::ErrorKind::WriteZero.into());
                    break;
                }
                Ok(taken) => {
                    // A sink that claims more than it was given is not believed.
                    self.backlog.drain(..taken.min(self.backlog.len()));
                    self.failing = None;
                }
                Err(error) => {
                    self.note(&error);
                    break;
                }
            }
        }
        self.backlog.len()
    }

    /// Logs a failure that is news. Not being ready is none, nor is a signal (a freeze sends one).
    fn note(&mut self, error: &io::Error) {
        let kind = error.kind();
        if matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) || self.failing == Some(kind) {
            return;
        }
        self.failing = Some(kind);
        tracing::warn!(%error, "the serial output takes nothing; up to {BACKLOG_LIMIT} bytes are kept for it");
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
        let excess = self.backlog.len().saturating_sub(BACKLOG_LIMIT);
        if excess == 0 {
            return;
        }
        self.backlog.drain(..excess);
        let before = self.lost;
        self.lost = before.saturating_add(excess as u64);
        // Told at 1, 2, 4, 8, … lost bytes: a guest that goes on printing must not fill the log as well.
        if before.checked_ilog2() != self.lost.checked_ilog2() {
            tracing::warn!(lost = self.lost, "serial output was lost: nothing takes it, and the backlog is full");
        }
    }
}

impl Write for Output {
    /// Takes all of `buf`. Never fails.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let sink_is_ready = self.drain() == 0;
        self.keep(buf);
        if sink_is_ready {
            self.drain();
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Err(error) = self.sink.flush() {
            self.note(&error);
        }
        Ok(())
    }
}
