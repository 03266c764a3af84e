//! A file after a failed sync.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// An earlier sync of this file failed, so nothing that is written through this handle can be believed.
///
/// It travels inside an [`io::Error`]; [`is_poisoned`] finds it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoisonedError {
    path: PathBuf,
}

impl fmt::Display for PoisonedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "an earlier flush of {} failed, so nothing more is written to it: check the disk, then open it anew",
            self.path.display()
        )
    }
}

impl Error for PoisonedError {}

/// Whether `error` says that the file was poisoned by an earlier failed sync.
#[must_use]
pub fn is_poisoned(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<PoisonedError>())
}

/// Set once, by a failed sync.
#[derive(Debug, Default)]
pub(crate) struct Poison(AtomicBool);

impl Poison {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(crate) fn check(&self, path: &Path) -> io::Result<()> {
        if self.0.load(Ordering::SeqCst) {
            return Err(io::Error::other(PoisonedError { path: path.to_owned() }));
        }
        Ok(())
    }
}
