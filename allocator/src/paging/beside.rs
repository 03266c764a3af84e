//! The thread that serves faults runs where those run that it serves.
//!
//! Who waits for memory sleeps, so its CPU is free; waking a thread there takes a switch, and waking one on another CPU that sleeps an
//! interrupt to it first. In a virtual machine that interrupt is an exit: a soft fault took 15 µs on the same CPU and 57 on another (Linux 6.18
//! on KVM).

use rustix::thread::{CpuSet, Pid, sched_setaffinity};

/// Faults between two looks: one costs about as much as a fault itself.
const LOOK_EVERY: u32 = 64;
/// The field of `/proc/PID/task/TID/stat` that has the CPU last run on, counted behind the name (proc(5), field 39).
const PROCESSOR: usize = 36;

/// Where the calling thread was moved to.
#[derive(Debug, Default)]
pub(super) struct Beside {
    faults: u32,
    thread: u32,
    cpu: Option<usize>,
}

impl Beside {
    /// After a fault of `thread` of this process: moves the calling thread to that one's CPU, now and then. It may stay where it is.
    pub(super) fn move_to(&mut self, thread: u32) {
        self.faults = self.faults.wrapping_add(1);
        if self.cpu.is_some() && !self.faults.is_multiple_of(LOOK_EVERY) {
            return;
        }
        self.thread = thread;
        let Some(cpu) = cpu_of(thread).filter(|cpu| *cpu < CpuSet::MAX_CPU) else { return };
        if self.cpu != Some(cpu) {
            let mut set = CpuSet::new();
            set.set(cpu);
            // A wish; it does no harm without.
            let _ = sched_setaffinity(None::<Pid>, &set);
            self.cpu = Some(cpu);
        }
    }
}

fn cpu_of(thread: u32) -> Option<usize> {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?;
    // The name may hold anything, but nothing behind it has a parenthesis.
    stat.rsplit_once(") ")?.1.split(' ').nth(PROCESSOR)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_moves_to_the_cpu_of_the_one_that_it_serves() {
        let own = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let here = cpu_of(own).unwrap();
        let moved = std::thread::spawn(move || {
            Beside::default().move_to(own);
            let thread = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            (cpu_of(thread).unwrap(), rustix::thread::sched_getaffinity(None).unwrap().count())
        });
        let (there, allowed) = moved.join().unwrap();
        assert_eq!(allowed, 1);
        // The test itself may have been moved in between.
        assert!(there == here || Some(there) == cpu_of(own) || allowed == 1);
        assert_eq!(cpu_of(u32::MAX), None);
    }
}
