//! A condition that threads wait for, which costs nothing to tell when none does.
//!
//! The standard library's condition variable makes a system call for each notification, which were four of five of the pager's.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::Duration;

/// Goes with one mutex.
#[derive(Debug, Default)]
pub(super) struct Signal {
    condition: Condvar,
    /// Changed under the mutex, before a thread lets go of it to wait. So who changed under the mutex what it waits for, and looks here then,
    /// finds it, or the thread finds what changed.
    waiting: AtomicU32,
}

impl Signal {
    /// Waits until told, or for no reason.
    pub(super) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let guard = self.condition.wait(guard).unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        guard
    }

    /// As [`Signal::wait`], but not for longer than `most`.
    pub(super) fn wait_at_most<'a, T>(&self, guard: MutexGuard<'a, T>, most: Duration) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let (guard, _) = self.condition.wait_timeout(guard, most).unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        guard
    }

    /// What the threads wait for may have changed; to be called with the mutex, or after it.
    pub(super) fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.condition.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn threads_that_take_turns_never_sleep_through_one() {
        let (turn, changed) = (Mutex::new(0_u32), Signal::default());
        std::thread::scope(|scope| {
            for own in 0..3 {
                let (turn, changed) = (&turn, &changed);
                scope.spawn(move || {
                    for _ in 0..2000 {
                        let mut guard = turn.lock().unwrap();
                        while *guard % 3 != own {
                            guard = changed.wait(guard);
                        }
                        *guard += 1;
                        drop(guard);
                        changed.tell();
                    }
                });
            }
        });
        let guard = changed.wait_at_most(turn.lock().unwrap(), Duration::from_millis(1));
        assert_eq!((*guard, changed.waiting.load(Ordering::SeqCst)), (6000, 0));
    }
}
