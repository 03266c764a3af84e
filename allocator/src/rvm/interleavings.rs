//! The concurrent parts under every interleaving that the memory model allows (loom).

mod sync {
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
}

/// The very source that `rvm` uses, over the model checker's locks.
#[path = "group.rs"]
#[allow(dead_code)]
mod group;

use std::sync::Arc;

use group::{Group, GroupError};

/// A disk that remembers what was written, in order.
#[derive(Debug, Default)]
struct Disk {
    written: std::sync::Mutex<Vec<u32>>,
    writes: std::sync::atomic::AtomicUsize,
}

impl Disk {
    fn write(&self, pending: &[u32], fail: Option<usize>) -> Result<(), ()> {
        let number = self.writes.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        if fail == Some(number) {
            return Err(());
        }
        self.written.lock().unwrap().extend_from_slice(pending);
        Ok(())
    }

    fn has(&self, value: u32) -> bool {
        self.written.lock().unwrap().contains(&value)
    }
}

/// Three threads commit at a time; `fail` says which write of the disk fails. No thread is preempted more often than `preemptions` says.
fn commit_at_a_time(fail: Option<usize>, preemptions: Option<usize>) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.check(move || {
        let group = Arc::new(Group::<Vec<u32>>::new());
        let disk = Arc::new(Disk::default());
        let commit = |value: u32| {
            let (group, disk) = (Arc::clone(&group), Arc::clone(&disk));
            move || {
                let Some((ticket, ())) = group.join(|pending| pending.push(value)) else { return false };
                let settled = group.settle(ticket, |pending| disk.write(&pending, fail));
                match &settled {
                    Ok(()) => assert!(disk.has(value), "{value} was said to be durable and is not"),
                    Err(GroupError::Write(()) | GroupError::Poisoned) => assert!(fail.is_some()),
                }
                settled.is_ok()
            }
        };
        let others = [1, 2].map(|value| loom::thread::spawn(commit(value)));
        let mut committed = usize::from(commit(0)());
        for other in others {
            committed += usize::from(other.join().unwrap());
        }
        if fail.is_none() {
            assert_eq!(committed, 3);
            let mut written = disk.written.lock().unwrap().clone();
            written.sort_unstable();
            assert_eq!(written, [0, 1, 2], "each is written once");
        } else {
            // Whoever comes after the failure is told, and nobody sleeps for ever.
            assert!(group.join(|_| ()).is_none() || committed == 3);
        }
    });
}

#[test]
fn under_every_interleaving_a_commit_that_returns_is_durable_and_written_once() {
    commit_at_a_time(None, None);
}

#[test]
fn however_two_preemptions_fall_a_failed_write_reaches_all_who_wait() {
    commit_at_a_time(Some(0), Some(2));
    commit_at_a_time(Some(1), Some(2));
}
