//! What tells the pages that a VM with a hold-up writes: each once, until it is armed again.

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_ioctls::{VcpuFd, VmFd};

use super::super::dirty::Bound;
use super::super::memory::{GuestRam, PAGE_SIZE};
use super::KvmError;
use super::log::DirtyLog;
use super::ring::DirtyRings;

/// By one of two.
#[derive(Debug)]
pub enum Teller {
    /// KVM's dirty rings, which bound what can be written before somebody looks.
    Rings(DirtyRings),
    /// KVM's dirty log, of a VM with so many vCPUs that run by the slice.
    Log(DirtyLog, AtomicU32),
}

impl Teller {
    pub(super) fn enable(fd: &VmFd, ram: &GuestRam, bound: Bound) -> Result<Self, KvmError> {
        Ok(match bound {
            Bound::Rings { entries } => Self::Rings(DirtyRings::enable(fd, entries)?),
            Bound::Slices => Self::Log(DirtyLog::enable(fd, ram)?, AtomicU32::new(0)),
        })
    }

    /// Listens to a new vCPU.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        match self {
            Self::Rings(rings) => rings.add(vcpu),
            Self::Log(_, cpus) => {
                cpus.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        }
    }

    pub(super) fn is_log(&self) -> bool {
        matches!(self, Self::Log(..))
    }

    /// Pages that its vCPUs can write to before somebody looks, given that each may run for a slice of `slice` pages at least.
    #[must_use]
    pub fn grant(&self, slice: u64) -> u64 {
        match self {
            Self::Rings(rings) => rings.pages(),
            Self::Log(_, cpus) => u64::from(cpus.load(Ordering::SeqCst)) * slice,
        }
    }

    pub(super) fn harvest(&self, fd: &VmFd, ram: &GuestRam, tell: &mut dyn FnMut(u64)) -> std::io::Result<()> {
        match self {
            Self::Rings(rings) => {
                rings.harvest(&mut |slot, offset| {
                    if let Some(page) = page_of(ram, slot, offset) {
                        tell(page);
                    }
                });
                Ok(())
            }
            Self::Log(log, _) => log.harvest(fd, tell),
        }
    }

    pub(super) fn rearm(&self, fd: &VmFd) -> std::io::Result<()> {
        match self {
            Self::Rings(rings) => rings.rearm(fd),
            Self::Log(log, _) => log.rearm(fd),
        }
    }
}

/// The number of a page that a ring names. The ring's memory is the kernel's, and yet nothing relies on it.
fn page_of(ram: &GuestRam, slot: u32, offset: u64) -> Option<u64> {
    let (ranges, slot) = (ram.ranges(), usize::try_from(slot).ok()?);
    let first: u64 = ranges.iter().take(slot).map(|range| range.length / PAGE_SIZE).sum();
    ranges.get(slot).filter(|range| offset < range.length / PAGE_SIZE).map(|_| first + offset)
}
