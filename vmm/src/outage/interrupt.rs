//! Ctrl-C: the simulation ends where it is, and leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::OutageError;

/// How long it takes at most until it is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Whether the user wants an end.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens to `SIGINT`, `SIGTERM` and `SIGHUP` from now on.
    ///
    /// # Errors
    /// [`OutageError::System`].
    pub fn listen() -> Result<Self, OutageError> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&flag))
                .map_err(|source| OutageError::System { doing: "catch Ctrl-C", source })?;
        }
        Ok(Self(flag))
    }

    /// All that look at it end.
    pub(super) fn raise(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(super) fn check(&self) -> Result<(), OutageError> {
        if self.0.load(Ordering::SeqCst) { Err(OutageError::Interrupted) } else { Ok(()) }
    }

    /// Waits until `until`, to the microsecond as far as the system lets it.
    pub(super) fn wait_until(&self, until: Instant) -> Result<(), OutageError> {
        const SPIN: Duration = Duration::from_micros(150);
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            match left.checked_sub(SPIN) {
                Some(rest) if !rest.is_zero() => std::thread::sleep(rest.min(LOOK_EVERY)),
                _ if left.is_zero() => return Ok(()),
                _ => std::hint::spin_loop(),
            }
        }
    }
}
