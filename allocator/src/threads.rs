//! The threads of this crate, and what the process wants each of them to do first.

use std::io;
use std::sync::OnceLock;
use std::thread::JoinHandle;

static BEGINNING: OnceLock<fn()> = OnceLock::new();

/// Each thread that this crate starts from now on to serve a region or a pager calls `first` before anything else: a process that gives
/// up privileges by thread does so there. The first call counts; threads that end with the call that started them do what their
/// starter may.
pub fn at_beginning(first: fn()) {
    let _ = BEGINNING.set(first);
}

/// Starts a thread.
///
/// # Errors
/// As the system says.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let begun = move || {
        if let Some(first) = BEGINNING.get() {
            first();
        }
        body();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(begun)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    static CALLED: AtomicBool = AtomicBool::new(false);

    #[test]
    fn a_thread_does_first_what_the_process_wants() {
        at_beginning(|| CALLED.store(true, Ordering::SeqCst));
        spawn("first", || assert!(CALLED.load(Ordering::SeqCst))).unwrap().join().unwrap();
    }
}
