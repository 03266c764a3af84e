//! KVM's dirty log, read without being cleared: which pages the guest wrote, each told once until it is watched again.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` (Linux 5.1) reading the log (`KVM_GET_DIRTY_LOG`) is a copy of a bitmap; a page that was written to stays
//! writable, at no further cost, until it is cleared (`KVM_CLEAR_DIRTY_LOG`). So it tells what [`super::ring`] tells, in the same two steps; but
//! it bounds nothing: see [`super::slice`] for that.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::super::memory::{GuestRam, PAGE_SIZE};
use super::KvmError;
use super::requests::{CLEAR_DIRTY_LOG, GET_DIRTY_LOG};

/// Pages of a word of a bitmap.
const WORD: u64 = u64::BITS as u64;
const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "KVM's bitmaps are of unsigned longs");

/// The log of a VM, of all slots.
#[derive(Debug)]
pub struct DirtyLog {
    slots: Mutex<Vec<Slot>>,
}

#[derive(Debug)]
struct Slot {
    number: u32,
    /// Of the VM's pages, as they are numbered.
    first: u64,
    pages: u64,
    /// A bit a page: what was told, and is not watched.
    told: Vec<u64>,
    /// The log as it was read last.
    read: Vec<u64>,
}

impl DirtyLog {
    /// Of a VM that has no memory yet, and is to have `ram`.
    ///
    /// # Errors
    /// [`KvmError::Capability`]: this KVM clears what it tells.
    pub(super) fn enable(fd: &VmFd, ram: &GuestRam) -> Result<Self, KvmError> {
        let args = [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0, 0, 0];
        let cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args, ..Default::default() };
        let lacks =
            "a dirty log that is cleared by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, Linux 5.1), which --holdup needs";
        fd.enable_cap(&cap).map_err(|_| KvmError::Capability(lacks))?;
        let mut first = 0;
        let slot = |(number, range): (u32, &super::super::memory::RamRange)| {
            let pages = range.length / PAGE_SIZE;
            let words = usize::try_from(pages.div_ceil(WORD)).unwrap_or(usize::MAX);
            let slot = Slot { number, first, pages, told: vec![0; words], read: vec![0; words] };
            first += pages;
            slot
        };
        Ok(Self { slots: Mutex::new((0..).zip(ram.ranges()).map(slot).collect()) })
    }

    /// Tells what the guest wrote since the last call, each page once until [`DirtyLog::rearm`].
    ///
    /// # Errors
    /// What the kernel says; what was not told will be.
    pub(super) fn harvest(&self, fd: &VmFd, tell: &mut dyn FnMut(u64)) -> io::Result<()> {
        self.lock().iter_mut().try_for_each(|slot| slot.harvest(fd, tell))
    }

    /// What was told is told anew from now on.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn rearm(&self, fd: &VmFd) -> io::Result<()> {
        self.lock().iter_mut().try_for_each(|slot| slot.rearm(fd))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn harvest(&mut self, fd: &VmFd, tell: &mut dyn FnMut(u64)) -> io::Result<()> {
        let bitmap = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: self.read.as_mut_ptr().cast() };
        let log = kvm_dirty_log { slot: self.number, padding1: 0, __bindgen_anon_1: bitmap };
        // SAFETY: KVM writes a bit for each page of the slot, in whole words: as many as `read` has.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), GET_DIRTY_LOG as libc::Ioctl, &raw const log) })?;
        for (at, (read, told)) in (0..).zip(self.read.iter().zip(&mut self.told)) {
            let mut new = read & !*told;
            *told |= new;
            while new != 0 {
                tell(self.first + at * WORD + u64::from(new.trailing_zeros()));
                new &= new - 1;
            }
        }
        Ok(())
    }

    fn rearm(&mut self, fd: &VmFd) -> io::Result<()> {
        let is_told = |word: &u64| *word != 0;
        let (Some(from), Some(last)) = (self.told.iter().position(is_told), self.told.iter().rposition(is_told)) else {
            return Ok(());
        };
        let Some(told) = self.told.get_mut(from..=last) else { return Ok(()) };
        let first_page = from as u64 * WORD;
        // KVM takes whole words, or what goes up to the slot's end.
        let count = (told.len() as u64 * WORD).min(self.pages - first_page);
        let bitmap = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: told.as_mut_ptr().cast() };
        let num_pages = u32::try_from(count).map_err(io::Error::other)?;
        let clear = kvm_clear_dirty_log { slot: self.number, num_pages, first_page, __bindgen_anon_1: bitmap };
        // SAFETY: KVM reads a bit for each of `num_pages`, in whole words, of which `told` has as many.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), CLEAR_DIRTY_LOG as libc::Ioctl, &raw const clear) })?;
        told.fill(0);
        Ok(())
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
