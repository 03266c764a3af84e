//! Flushes that share one `fdatasync`.

use std::io;

use devices::virtio::block::{Completion, Token};

/// Who waits for which flush: at most one is under way, and whoever asked before it began shares its verdict.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    waiting: Vec<Token>,
    under_way: Vec<Token>,
}

impl Flushes {
    /// `token` asks for a flush.
    pub(super) fn ask(&mut self, token: Token) {
        self.waiting.push(token);
    }

    /// Whether a flush is to begin now, for all that wait. It ends with [`Flushes::end`].
    pub(super) fn begin(&mut self) -> bool {
        if self.waiting.is_empty() || !self.under_way.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.waiting, &mut self.under_way);
        true
    }

    /// The flush that is under way ended so.
    pub(super) fn end(&mut self, result: &io::Result<()>, completed: &mut Vec<Completion>) {
        completed.extend(self.under_way.drain(..).map(|token| Completion { token, result: again(result) }));
    }
}

/// The same result once more: an error cannot be cloned.
fn again(result: &io::Result<()>) -> io::Result<()> {
    result.as_ref().copied().map_err(|error| match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    })
}
