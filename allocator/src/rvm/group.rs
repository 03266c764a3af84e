//! Group commit: those who wait for durability elect one of them to write for all.
//!
//! What is to be written is put together under a lock, by whoever commits. A waiter whose turn it is takes all of it and writes
//! without the lock, so that meanwhile the next group comes together; the others sleep until it is done (DeWitt et al., SIGMOD '84).
// The locks come from the module above: those of the standard library there, those of a model checker in `interleavings.rs`.

use super::sync::{Condvar, Mutex, MutexGuard};

/// Stands for what was added up to a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// Why something is not durable.
#[derive(Debug)]
pub(crate) enum GroupError<E> {
    /// This thread wrote for all, and could not.
    Write(E),
    /// Another one could not.
    Poisoned,
}

#[derive(Debug)]
struct State<T> {
    pending: T,
    added: u64,
    durable: u64,
    writing: bool,
    poisoned: bool,
}

#[derive(Debug)]
pub(crate) struct Group<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T: Default> Group<T> {
    pub(crate) fn new() -> Self {
        let state = State { pending: T::default(), added: 0, durable: 0, writing: false, poisoned: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Changes what is pending by `add`. `None` once a write has failed: nothing is taken any more.
    pub(crate) fn join<R>(&self, add: impl FnOnce(&mut T) -> R) -> Option<(Ticket, R)> {
        let mut state = self.lock();
        if state.poisoned {
            return None;
        }
        let added = add(&mut state.pending);
        state.added += 1;
        Some((Ticket(state.added), added))
    }

    /// A ticket for all that was added.
    pub(crate) fn newest(&self) -> Ticket {
        Ticket(self.lock().added)
    }

    /// What `look` sees in what is pending.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.lock().pending)
    }

    /// Returns once all up to `ticket` is durable. If nobody writes, this thread does: all that is pending, by `write`.
    pub(crate) fn settle<E>(&self, ticket: Ticket, write: impl Fn(T) -> Result<(), E>) -> Result<(), GroupError<E>> {
        let mut state = self.lock();
        loop {
            if state.durable >= ticket.0 {
                return Ok(());
            }
            if state.poisoned {
                return Err(GroupError::Poisoned);
            }
            if state.writing {
                state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
                continue;
            }
            state.writing = true;
            let (taken, upto) = (std::mem::take(&mut state.pending), state.added);
            drop(state);
            let written = write(taken);
            state = self.lock();
            state.writing = false;
            match &written {
                Ok(()) => state.durable = upto,
                Err(_) => state.poisoned = true,
            }
            self.changed.notify_all();
            written.map_err(GroupError::Write)?;
        }
    }
}
