//! A vCPU that runs for a slice of time, and then looks whether it may go on: a bound on what it can write where KVM's rings cannot be one.
//!
//! The slice's end is a timer of the vCPU's own thread (`timer_create` with `SIGEV_THREAD_ID`): the kernel raises its signal in the timer's interrupt,
//! which makes the CPU leave the guest, whatever else the machine has to do; while the thread does not run, nothing is written. The signal's
//! handler marks the slice as over, and KVM as not to be entered (`immediate_exit`): so a signal that comes just before KVM is entered is not lost.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use vmm_sys_util::signal::SIGRTMIN;

/// What the handler marks.
struct Mark {
    is_over: AtomicBool,
    /// `kvm_run::immediate_exit` of the vCPU.
    immediate_exit: *mut u8,
}

/// The slices of a vCPU. It belongs to the vCPU's thread.
pub(super) struct Slices {
    timer: libc::timer_t,
    /// Its address is the timer's.
    mark: Box<Mark>,
}

impl Slices {
    /// Of the calling thread, which runs a vCPU whose `immediate_exit` that is. None has begun.
    ///
    /// # Safety
    /// `immediate_exit` is mapped for as long as this lives.
    pub(super) unsafe fn of_this_thread(immediate_exit: *mut u8) -> io::Result<Self> {
        let mark = Box::new(Mark { is_over: AtomicBool::new(true), immediate_exit });
        // SAFETY: plain data, for which zeros are valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        event.sigev_value.sival_ptr = (&raw const *mark).cast_mut().cast();
        // Not `libc::gettid`: with link-time optimisation that is the standard library's weak symbol of the name, which a static C library leaves null.
        event.sigev_notify_thread_id = rustix::thread::gettid().as_raw_nonzero().get();
        let mut timer = std::ptr::null_mut();
        // SAFETY: both live for the call; the timer is deleted before `mark` goes.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { timer, mark })
    }

    /// Whether none runs.
    pub(super) fn is_over(&self) -> bool {
        self.mark.is_over.load(Ordering::Relaxed)
    }

    /// Begins one.
    pub(super) fn begin(&self, length: Duration) -> io::Result<()> {
        // Zero would disarm the timer.
        let length = length.max(Duration::from_nanos(1));
        // SAFETY: plain data, for which zeros are valid.
        let mut spec: libc::itimerspec = unsafe { std::mem::zeroed() };
        spec.it_value.tv_sec = libc::time_t::try_from(length.as_secs()).unwrap_or(libc::time_t::MAX);
        spec.it_value.tv_nsec = length.subsec_nanos().into();
        self.mark.is_over.store(false, Ordering::Relaxed);
        // SAFETY: the timer lives as long as this.
        if unsafe { libc::timer_settime(self.timer, 0, &raw const spec, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Slices {
    fn drop(&mut self) {
        // SAFETY: it was created, and is deleted once. A signal that is under way reaches this thread, whose timer it is, before the call returns.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// What the handler of the signal does. A signal that a timer did not send is a kick, which has left its mark already.
///
/// # Safety
/// `info` is what the kernel gave to the handler.
pub(super) unsafe fn on_signal(info: *const libc::siginfo_t) {
    // SAFETY: the kernel's, and alive for the handler's time; a signal of SI_TIMER carries the value of a `sigevent`, and no timers are made
    // with this signal but those above, whose mark lives as long as they do.
    unsafe {
        if info.is_null() || (*info).si_code != libc::SI_TIMER {
            return;
        }
        let mark = (*info).si_value().sival_ptr.cast::<Mark>();
        (*mark).is_over.store(true, Ordering::Relaxed);
        AtomicU8::from_ptr((*mark).immediate_exit).store(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_slice_ends_by_itself_and_keeps_kvm_from_being_entered() {
        super::super::vcpu::install_signal_handler();
        let mut immediate_exit = 0_u8;
        // SAFETY: it lives until the end of this test.
        let slices = unsafe { Slices::of_this_thread(&raw mut immediate_exit) }.unwrap();
        assert!(slices.is_over(), "none has begun");
        for _ in 0..3 {
            slices.begin(Duration::from_millis(2)).unwrap();
            let begun = Instant::now();
            while !slices.is_over() {
                assert!(begun.elapsed() < Duration::from_secs(20), "it does not end");
                std::hint::spin_loop();
            }
            assert!(begun.elapsed() >= Duration::from_millis(1), "{:?}", begun.elapsed());
            // SAFETY: as above.
            let mark = unsafe { AtomicU8::from_ptr(&raw mut immediate_exit) };
            assert_eq!(mark.swap(0, Ordering::SeqCst), 1);
        }
        slices.begin(Duration::from_secs(3600)).unwrap();
        assert!(!slices.is_over());
    }
}
