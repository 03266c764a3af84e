//! KVM's dirty rings: which pages the guest writes, told as it writes them, and never more than fit.
//!
//! Each vCPU has a ring of entries in memory that it shares with us (Linux 5.11, `Documentation/virt/kvm/api.rst`, `KVM_CAP_DIRTY_LOG_RING`). KVM
//! puts in each page that the vCPU makes writable, and that page stays writable until its entry was taken ([`DirtyRings::harvest`]) and armed again
//! ([`DirtyRings::rearm`]). A vCPU whose ring is full does not enter the guest any more. So as long as nobody arms again, a VM can write to no more
//! pages than its rings have entries: the one bound that a guest cannot outrun.
//!
//! An entry is put in for each write that KVM emulates, too, so the same page may be told many times.

use std::arch::x86_64::__cpuid;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};

use super::super::memory::PAGE_SIZE;
use super::KvmError;
use super::requests::RESET_DIRTY_RINGS;

/// `linux/kvm.h`: KVM has put it in; it was taken.
const DIRTY: u32 = 1 << 0;
const TAKEN: u32 = 1 << 1;
/// A ring has a page at least.
const ENTRIES_LEAST: u32 = (PAGE_SIZE as usize / size_of::<kvm_dirty_gfn>()) as u32;
/// `KVM_DIRTY_RING_MAX_ENTRIES`.
const ENTRIES_MOST: u32 = 1 << 16;

/// Whether the rings of this machine's KVM tell every page.
///
/// KVM keeps 64 entries in reserve, and looks whether a ring is full before it enters the guest. A KVM that works without VMX and SVM (KVM-PVM)
/// emulates what a guest does at CPL0 in batches, of which each write is an entry, and looks between batches only: under load the reserve was seen to be
/// overrun, and pages that the guest wrote were not told (the unit test `rings_tell_every_page_of_a_ticking_guest` shows it).
#[must_use]
pub(in super::super) fn are_sound() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let has_vmx = __cpuid(1).ecx & VMX != 0;
    let has_svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & SVM != 0;
    has_vmx || has_svm
}

/// The rings of a VM.
#[derive(Debug)]
pub struct DirtyRings {
    /// Of each ring.
    entries: u32,
    rings: Mutex<Vec<Ring>>,
}

#[derive(Debug)]
struct Ring {
    base: NonNull<kvm_dirty_gfn>,
    entries: u32,
    next: u32,
    /// Entries that were taken and are not armed again.
    taken: u64,
}

// SAFETY: the memory is the process's, not a thread's; it is used under the lock of `DirtyRings::rings` alone.
unsafe impl Send for Ring {}

impl DirtyRings {
    /// Gives a VM that has no vCPU yet rings of `wanted` entries, or of as few more as this KVM wants.
    ///
    /// # Errors
    /// [`KvmError::Capability`]: this KVM has none.
    pub(super) fn enable(fd: &VmFd, wanted: u32) -> Result<Self, KvmError> {
        let mut entries = wanted.clamp(ENTRIES_LEAST, ENTRIES_MOST).next_power_of_two();
        while entries <= ENTRIES_MOST {
            let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
            let cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING, args: [bytes, 0, 0, 0], ..Default::default() };
            if fd.enable_cap(&cap).is_ok() {
                return Ok(Self { entries, rings: Mutex::default() });
            }
            // Too few for what this CPU logs by itself (Intel's page modification log).
            entries *= 2;
        }
        Err(KvmError::Capability("dirty rings (KVM_CAP_DIRTY_LOG_RING, Linux 5.11), which --holdup needs"))
    }

    /// Maps the ring of a new vCPU.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let length = self.entries as usize * size_of::<kvm_dirty_gfn>();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the descriptor belongs to `vcpu`, which lives until the end of this; a null hint lets the kernel choose free addresses; the
        // mapping keeps the vCPU's file open.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: as above.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, access, MapFlags::SHARED, fd, offset) };
        let failed = |source| KvmError::Ioctl { doing: "mapping a vCPU's dirty ring", source };
        let base = NonNull::new(base.map_err(|error| failed(error.into()))?.cast());
        let base = base.ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        self.lock().push(Ring { base, entries: self.entries, next: 0, taken: 0 });
        Ok(())
    }

    /// Pages that can be written to before the rings are full, of all vCPUs together.
    #[must_use]
    pub fn pages(&self) -> u64 {
        u64::from(self.entries) * self.lock().len() as u64
    }

    /// Takes what was put in: `tell` is told slot and page within it. What was taken is not told again, and can be written to without being told,
    /// until [`DirtyRings::rearm`].
    pub fn harvest(&self, tell: &mut dyn FnMut(u32, u64)) {
        self.lock().iter_mut().for_each(|ring| ring.harvest(tell));
    }

    /// Pages that were taken are told anew from now on, all of them.
    ///
    /// Linux 6.18 breaks off where a signal is pending, says how many entries it did, and was seen to leave pages unwatched then, for good. vCPUs are
    /// kicked by signals; so none is let through meanwhile.
    pub(super) fn rearm(&self, fd: &VmFd) -> io::Result<()> {
        let mut rings = self.lock();
        let mut left: u64 = rings.iter().map(|ring| ring.taken).sum();
        let _undisturbed = Undisturbed::begin();
        while left > 0 {
            // SAFETY: KVM_RESET_DIRTY_RINGS has no argument; it changes entries that are marked as taken, which nobody looks at.
            let rearmed = unsafe { libc::ioctl(fd.as_raw_fd(), RESET_DIRTY_RINGS as libc::Ioctl, 0) };
            match u64::try_from(rearmed) {
                Err(_) => return Err(io::Error::last_os_error()),
                Ok(0) => return Err(io::Error::other(format!("{left} entries were not armed again"))),
                Ok(rearmed) => left = left.saturating_sub(rearmed),
            }
        }
        rings.iter_mut().for_each(|ring| ring.taken = 0);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn harvest(&mut self, tell: &mut dyn FnMut(u32, u64)) {
        for _ in 0..self.entries {
            // SAFETY: the index is below `entries`, so the entry lies in the mapping, which lives as long as this.
            let entry = unsafe { self.base.as_ptr().add((self.next % self.entries) as usize) };
            // SAFETY: `flags` is an aligned u32 of the entry; we and the kernel both access it atomically.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & (DIRTY | TAKEN) != DIRTY {
                return;
            }
            // SAFETY: the kernel wrote both before the flag, and does not touch them until the entry is armed again.
            let (slot, offset) =
                unsafe { ((&raw const (*entry).slot).read_volatile(), (&raw const (*entry).offset).read_volatile()) };
            tell(slot & 0xffff, offset);
            flags.store(TAKEN, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            self.taken += 1;
        }
    }
}

/// No signal reaches this thread until this is dropped.
struct Undisturbed(libc::sigset_t);

impl Undisturbed {
    fn begin() -> Self {
        // SAFETY: both sets are plain data that the calls fill in; only the calling thread's mask changes.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        // SAFETY: the mask is the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let length = self.entries as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: mapped in `add`, and owned by this alone.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), length) };
    }
}
