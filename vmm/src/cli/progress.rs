//! How far something is, on one line of a terminal; to anything else, nothing.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_millis(100);

/// A line that is written over.
#[derive(Debug)]
pub(super) struct Progress {
    what: String,
    next: Option<Instant>,
    shown: bool,
}

impl Progress {
    /// `what` is being done.
    pub(super) fn new(what: impl Into<String>) -> Self {
        let next = std::io::stderr().is_terminal().then(|| Instant::now() + EVERY);
        Self { what: what.into(), next, shown: false }
    }

    /// `done` of `total` pages.
    pub(super) fn pages(&mut self, done: u64, total: u64) {
        let percent = u128::from(done) * 100 / u128::from(total.max(1));
        self.say(|| format!("{percent} %"));
    }

    /// In words.
    pub(super) fn say(&mut self, words: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.next.is_some_and(|next| now >= next) {
            self.next = Some(now + EVERY);
            self.shown = true;
            let _ = write!(std::io::stderr(), "\r{}: {}\x1b[K", self.what, words());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
