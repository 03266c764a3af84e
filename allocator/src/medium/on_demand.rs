//! A mapping that is not all there yet: clusters of a region come when they are asked for.
//!
//! ```text
//!   address space   │ file │ file │ placeholder │ file │ placeholder │ placeholder │
//!                                   ▲ anonymous, registered with userfaultfd: an access waits, and an event tells its address
//!                                   └─ whoever fills the cluster in the file then maps the file over it, and wakes
//! ```
//!
//! userfaultfd cannot wait for missing pages of a file (only of anonymous memory, shmem and hugetlbfs), so it waits for pages of a
//! placeholder, and the file takes the placeholder's place once the cluster is in it: no page is ever copied into the address space,
//! there is never a second copy of the memory, and it is the same on every medium. Neighbouring clusters of the file become one VMA
//! again by themselves. Kernel code that accesses the memory (KVM on a guest's behalf, a `read` into it) waits as user code does.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, UserfaultfdFlags};

use super::{Backing, Mapping, MediumKind, dax};

/// The `_UFFD_API` of every kernel there is (`linux/userfaultfd.h`).
const API: u64 = 0xAA;
const IOCTL_API: libc::Ioctl = 0xc018_aa3fu32 as libc::Ioctl;
pub(super) const IOCTL_REGISTER: libc::Ioctl = 0xc020_aa00u32 as libc::Ioctl;
pub(super) const IOCTL_WAKE: libc::Ioctl = 0x8010_aa02u32 as libc::Ioctl;
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`.
const IOCTL_NEW: libc::Ioctl = 0xaa00u32 as libc::Ioctl;
pub(super) const MODE_MISSING: u64 = 1;
pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of a `struct uffd_msg`, and where in it the address is.
pub(super) const MESSAGE: usize = 32;
pub(super) const ADDRESS: std::ops::Range<usize> = 16..24;
/// Messages taken at a time.
const MESSAGES: usize = 16;

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct UffdioRange {
    pub(super) start: u64,
    pub(super) length: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct UffdioRegister {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

/// A region's mapping, some clusters of which are placeholders.
#[derive(Debug)]
pub struct OnDemand {
    mapping: Arc<Mapping>,
    events: File,
    cluster: u64,
    /// Which clusters are no placeholders any more, and must never be mapped over again: on `nvdimm` that would take away what
    /// was written.
    placed: Mutex<Vec<bool>>,
}

/// Whether this process may use userfaultfd as a guest's memory needs it, which is for accesses by the kernel too.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_PTRACE`, `vm.unprivileged_userfaultfd` or access to `/dev/userfaultfd`; as the system says.
pub fn available() -> io::Result<()> {
    open().map(drop)
}

fn open() -> io::Result<File> {
    open_with(0)
}

/// A userfaultfd with all of these features.
pub(super) fn open_with(features: u64) -> io::Result<File> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: it makes a descriptor and touches no memory.
    let descriptor = match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(descriptor) => descriptor,
        Err(rustix::io::Errno::PERM) => open_device()?,
        Err(error) => return Err(error.into()),
    };
    let mut api = UffdioApi { api: API, features, ..UffdioApi::default() };
    control(descriptor.as_fd(), IOCTL_API, &mut api)?;
    Ok(File::from(descriptor))
}

fn open_device() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the argument is a plain number; the result is a new descriptor or an error.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), IOCTL_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// One userfaultfd call whose argument is a structure of the kernel's.
pub(super) fn control<T>(descriptor: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request above goes with the `repr(C)` structure that the kernel's header names for it, so that the kernel reads
    // and writes within `argument`. No request here maps or unmaps memory.
    let done = unsafe { libc::ioctl(descriptor.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How a medium maps a piece of its file.
fn flags(medium: MediumKind) -> MapFlags {
    match medium {
        MediumKind::Dax => dax::SYNC,
        MediumKind::File => MapFlags::SHARED,
        MediumKind::Nvdimm => MapFlags::PRIVATE | MapFlags::NORESERVE,
    }
}

pub(crate) fn map(
    medium: MediumKind,
    backing: &Backing<'_>,
    cluster: u64,
    placed: Vec<bool>,
) -> Result<OnDemand, super::MediumError> {
    let failed = backing.io("map");
    let events = open().map_err(backing.io("get a userfaultfd for"))?;
    let mut mapping = Mapping::reserve(backing, medium).map_err(&failed)?;
    if medium == MediumKind::Dax {
        mapping.write_back = dax::write_back_of(backing);
    }
    let mut register = UffdioRegister {
        range: UffdioRange { start: mapping.as_ptr() as u64, length: mapping.len() as u64 },
        mode: MODE_MISSING,
        ioctls: 0,
    };
    control(events.as_fd(), IOCTL_REGISTER, &mut register).map_err(&failed)?;
    let mapping = Arc::new(mapping);
    let memory = OnDemand { mapping, events, cluster, placed: Mutex::new(Vec::new()) };
    let mut first = 0;
    for run in placed.chunk_by(|one, next| one == next) {
        if run.first() == Some(&true) {
            memory.map_over(backing, first * cluster, run.len() as u64 * cluster).map_err(&failed)?;
        }
        first += run.len() as u64;
    }
    *memory.placed.lock().unwrap_or_else(PoisonError::into_inner) = placed;
    Ok(memory)
}

impl OnDemand {
    /// The mapping as a whole.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Readable when somebody waits.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The clusters that somebody waits for, as far as it was not told yet. Does not wait.
    ///
    /// # Errors
    /// As the system says.
    pub fn awaited(&self) -> io::Result<Vec<u64>> {
        let mut messages = [0; MESSAGE * MESSAGES];
        let read = match (&self.events).read(&mut messages) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        let base = self.mapping.as_ptr() as u64;
        let cluster_of = |message: &[u8]| {
            let address = message.get(ADDRESS)?.try_into().map(u64::from_ne_bytes).ok()?;
            let fault = message.first() == Some(&EVENT_PAGEFAULT);
            fault.then_some(address.saturating_sub(base) / self.cluster)
        };
        Ok(messages.get(..read).unwrap_or_default().chunks_exact(MESSAGE).filter_map(cluster_of).collect())
    }

    /// The file's bytes take the place of a placeholder, and who waits for it goes on. A second time is nothing.
    pub(crate) fn place(&self, backing: &Backing<'_>, cluster: u64) -> io::Result<()> {
        let (start, length) = self.range(cluster)?;
        {
            let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
            let placed = usize::try_from(cluster).ok().and_then(|index| placed.get_mut(index));
            let placed = placed.ok_or(io::ErrorKind::InvalidInput)?;
            if !*placed {
                self.map_over(backing, start, length)?;
                *placed = true;
            }
        }
        self.wake(start, length)
    }

    /// Makes a cluster that cannot be had one that cannot be accessed: who waits for it, or comes later, gets `EFAULT` in the kernel and
    /// `SIGSEGV` in this process. One that was placed is left alone.
    ///
    /// # Errors
    /// As the system says.
    pub fn refuse(&self, cluster: u64) -> io::Result<()> {
        let (start, length) = self.range(cluster)?;
        let placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        if usize::try_from(cluster).ok().and_then(|index| placed.get(index)) == Some(&false) {
            // SAFETY: the range lies in the mapping, which this owns, and holds a placeholder: no byte of it was ever accessible,
            // so nothing can rely on it.
            unsafe {
                let start = self.mapping.as_ptr().add(start as usize).cast();
                rustix::mm::mprotect(start, length as usize, MprotectFlags::empty())?;
            }
        }
        drop(placed);
        self.wake(start, length)
    }

    /// Where a cluster lies: its first byte, and how many; the last one may be shorter than others.
    fn range(&self, cluster: u64) -> io::Result<(u64, u64)> {
        let total = self.mapping.len() as u64;
        let start = cluster.checked_mul(self.cluster).filter(|start| *start < total);
        let start = start.ok_or(io::ErrorKind::InvalidInput)?;
        Ok((start, self.cluster.min(total - start)))
    }

    /// Maps the file over a range of placeholders.
    fn map_over(&self, backing: &Backing<'_>, start: u64, length: u64) -> io::Result<()> {
        let descriptor = backing.file.descriptor().ok_or(io::ErrorKind::Unsupported)?;
        let length = length.min((self.mapping.len() as u64).saturating_sub(start));
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the range lies in the mapping, which this owns, so MAP_FIXED replaces a part of that and nothing else. It holds
        // placeholders, which nobody ever accessed: no byte changes under anyone. Its size and protection stay.
        unsafe {
            let at = self.mapping.as_ptr().add(start as usize).cast();
            let flags = flags(self.mapping.medium) | MapFlags::FIXED;
            rustix::mm::mmap(at, length as usize, access, flags, descriptor, backing.offset + start)?;
        }
        Ok(())
    }

    fn wake(&self, start: u64, length: u64) -> io::Result<()> {
        let mut range = UffdioRange { start: self.mapping.as_ptr() as u64 + start, length };
        control(self.events.as_fd(), IOCTL_WAKE, &mut range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::time::Duration;
    use vfs::host::HostVfs;
    use vfs::{OpenMode, Vfs, VfsFile};

    const CLUSTER: u64 = 64 << 10;
    const DATA: u64 = 8192;

    fn file(directory: &Path, size: u64) -> Box<dyn VfsFile> {
        let file = HostVfs.open(&directory.join("r"), OpenMode::CreateNew).unwrap();
        file.set_len(DATA + size).unwrap();
        file
    }

    fn read(address: usize) -> u8 {
        // SAFETY: the tests read within a mapping that outlives the read.
        unsafe { (address as *const u8).read_volatile() }
    }

    fn write(address: usize, value: u8) {
        // SAFETY: as for `read`; nobody else accesses that byte.
        unsafe { (address as *mut u8).write_volatile(value) }
    }

    fn wait_for_faults(memory: &OnDemand, count: usize) -> Vec<u64> {
        let mut awaited = Vec::new();
        for _ in 0..5000 {
            awaited.extend(memory.awaited().unwrap());
            if awaited.len() >= count {
                return awaited;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("{count} should wait, {awaited:?} do");
    }

    #[test]
    fn an_access_waits_until_its_cluster_is_placed_and_sees_the_file() {
        for medium in [MediumKind::File, MediumKind::Nvdimm] {
            let directory = tempfile::tempdir().unwrap();
            let size = 3 * CLUSTER - 4096;
            let file = file(directory.path(), size);
            let backing = Backing { file: &*file, path: directory.path(), offset: DATA, size };
            file.write_all_at(&[1], DATA).unwrap();
            let memory = map(medium, &backing, CLUSTER, vec![true, false, false]).unwrap();
            let base = memory.mapping().as_ptr() as usize;
            assert_eq!(read(base), 1, "what is there is there at once");
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| (read(base + 2 * CLUSTER as usize + 5), read(base + CLUSTER as usize)));
                assert_eq!(wait_for_faults(&memory, 1), [2], "the last, which is short");
                file.write_all_at(&[7], DATA + 2 * CLUSTER + 5).unwrap();
                memory.place(&backing, 2).unwrap();
                assert_eq!(wait_for_faults(&memory, 1), [1]);
                memory.place(&backing, 1).unwrap();
                assert_eq!(waiting.join().unwrap(), (7, 0));
            });
            // What is written stays, though a cluster is placed again.
            write(base + 2 * CLUSTER as usize, 9);
            memory.place(&backing, 2).unwrap();
            memory.refuse(2).unwrap();
            assert_eq!(read(base + 2 * CLUSTER as usize), 9);
            assert!(memory.place(&backing, 3).is_err() && memory.refuse(u64::MAX).is_err());
        }
    }

    #[test]
    fn the_kernel_waits_too_and_is_refused_what_cannot_be_had() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path(), 2 * CLUSTER);
        let backing = Backing { file: &*file, path: directory.path(), offset: DATA, size: 2 * CLUSTER };
        let memory = map(MediumKind::File, &backing, CLUSTER, vec![false, false]).unwrap();
        let base = memory.mapping().as_ptr() as usize;
        // As KVM does: the kernel reads the memory on behalf of a system call.
        let from_kernel = |address: usize| {
            let (_reader, writer) = io::pipe().unwrap();
            // SAFETY: the kernel checks the address; a refusal is an error code.
            let written = unsafe { libc::write(writer.as_raw_fd(), address as *const libc::c_void, 1) };
            if written < 0 { io::Error::last_os_error().raw_os_error() } else { None }
        };
        std::thread::scope(|scope| {
            let (good, bad) = (scope.spawn(|| from_kernel(base)), scope.spawn(|| from_kernel(base + CLUSTER as usize)));
            wait_for_faults(&memory, 2);
            memory.place(&backing, 0).unwrap();
            memory.refuse(1).unwrap();
            assert_eq!(good.join().unwrap(), None);
            assert_eq!(bad.join().unwrap(), Some(libc::EFAULT));
        });
    }
}
