//! Addresses of a guest's memory over which clusters of frames are mapped, and from which they are taken again.
//!
//! ```text
//!   guest memory   │ frame 7 │ placeholder │ frame 3 │ frame 4 │ placeholder …
//!                      ▲            ▲ anonymous, registered with userfaultfd: an access waits, and an event tells its address
//!                      └ a piece of the file of frames, mapped shared
//! ```
//!
//! A frame is *placed* by mapping its file over the addresses (`mmap`, 5 to 10 µs), and *withdrawn* by moving a placeholder over it: one
//! `mremap` of a second, never touched stretch of placeholders. That is one step for whoever accesses the memory, guest or kernel: it
//! finds the frame or waits. `mmap` of fresh memory and registering it then would be two, with an access between them that finds zeros.
//! `MREMAP_DONTUNMAP` leaves the stretch where it is, for the next time; `UFFD_FEATURE_EVENT_REMAP` makes the moved placeholder stay
//! registered, at the price that `mremap` returns only when the thread that reads events has read of it.
//!
//! Neighbours become one VMA again by themselves; a process may have 65530 of them (`vm.max_map_count`).
//!
//! Where frames are memory of this process's own (`nvdimm`), all of that is needless: guest memory is one mapping of a memfd as long as
//! itself, and a frame is what the memfd has at a cluster's own place. userfaultfd waits there for pages that are missing, and for those that
//! are in the memfd and in no page table (`UFFDIO_REGISTER_MODE_MINOR`, Linux 5.14). Such a cluster is placed by `UFFDIO_CONTINUE` (1 µs), and
//! withdrawn by `MADV_DONTNEED` (2 µs), which for a shared mapping empties page tables and nothing else. No VMA is made, nobody is woken, and
//! page tables alone are locked.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::on_demand::{
    ADDRESS, EVENT_PAGEFAULT, IOCTL_REGISTER, IOCTL_WAKE, MESSAGE, MODE_MISSING, UffdioRange, UffdioRegister, control,
    open_with,
};

/// `UFFD_FEATURE_EVENT_REMAP` and `UFFD_FEATURE_THREAD_ID` (`linux/userfaultfd.h`).
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_THREAD_ID: u64 = 1 << 8;
/// `UFFD_FEATURE_MISSING_SHMEM` and `UFFD_FEATURE_MINOR_SHMEM`.
const FEATURE_SHMEM: u64 = 1 << 5 | 1 << 10;
const MODE_MINOR: u64 = 1 << 2;
/// `_IOWR(UFFDIO, 0x07, struct uffdio_continue)`.
const IOCTL_CONTINUE: libc::Ioctl = 0xc020_aa07u32 as libc::Ioctl;
const CONTINUE_DONTWAKE: u64 = 1;
/// Where in a message the thread is.
const THREAD: std::ops::Range<usize> = 24..28;
/// Messages taken at a time.
const MESSAGES: usize = 16;
/// Clusters that are withdrawn at once, at most, by moving placeholders.
const WITHDRAWN_MAX: u32 = 16;

/// Guest memory of which clusters are placed and withdrawn. Unmapped when dropped.
#[derive(Debug)]
pub struct PagedMemory {
    base: NonNull<u8>,
    length: usize,
    cluster: usize,
    events: File,
    kind: Kind,
}

/// What the addresses show.
#[derive(Debug)]
enum Kind {
    /// Frames of a file, in any order, and placeholders. What takes a frame's place comes from here: never touched, nobody's, as long as
    /// [`WITHDRAWN_MAX`] clusters.
    Pieces(NonNull<u8>),
    /// A memfd, from its beginning on.
    Whole,
}

/// `struct uffdio_continue`.
#[repr(C)]
#[derive(Default)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}

// SAFETY: addresses of the process, not of a thread; what is done to them here are system calls, which are safe from any thread.
unsafe impl Send for PagedMemory {}
// SAFETY: as above; `&PagedMemory` gives out a raw pointer alone, and using that is the caller's unsafe block.
unsafe impl Sync for PagedMemory {}

/// A cluster that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Awaited {
    /// Which.
    pub cluster: u32,
    /// The thread that waits.
    pub thread: u32,
}

/// A file that frames lie in, and how it is mapped.
#[derive(Debug, Clone, Copy)]
pub struct FrameFile<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where frame 0 begins.
    pub offset: u64,
    /// Whether to ask for `MAP_SYNC`: persistent memory.
    pub sync: bool,
}

fn whole(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::Unsupported.into())
}

fn reserve(length: usize) -> io::Result<NonNull<u8>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a null hint lets the kernel choose free addresses, so no existing mapping is replaced.
    let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, access, flags) }?;
    NonNull::new(base.cast()).ok_or_else(|| io::ErrorKind::Unsupported.into())
}

impl PagedMemory {
    /// Addresses for `length` bytes of memory, of which nothing is there. Both numbers in whole pages.
    ///
    /// # Errors
    /// As the system says: `PermissionDenied` where this process may not use userfaultfd.
    pub fn reserve(length: u64, cluster: u64) -> io::Result<Self> {
        let (length, cluster) = (whole(length)?, whole(cluster)?);
        let events = open_with(FEATURE_EVENT_REMAP | FEATURE_THREAD_ID)?;
        let mut memory = Self { base: reserve(length)?, length, cluster, events, kind: Kind::Whole };
        memory.register(memory.base, length, MODE_MISSING)?;
        let placeholders = reserve(cluster * WITHDRAWN_MAX as usize)?;
        memory.kind = Kind::Pieces(placeholders);
        memory.register(placeholders, cluster * WITHDRAWN_MAX as usize, MODE_MISSING)?;
        Ok(memory)
    }

    /// As [`PagedMemory::reserve`], over a memfd of at least `length` bytes: what that has at a cluster's place is what the cluster is to show,
    /// by [`PagedMemory::show`].
    ///
    /// # Errors
    /// As [`PagedMemory::reserve`]; `InvalidInput` before Linux 5.14.
    pub fn over(memfd: BorrowedFd<'_>, length: u64, cluster: u64) -> io::Result<Self> {
        let (length, cluster) = (whole(length)?, whole(cluster)?);
        let events = open_with(FEATURE_SHMEM | FEATURE_THREAD_ID)?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a null hint lets the kernel choose free addresses, so no existing mapping is replaced.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, access, flags, memfd, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::Unsupported)?;
        let memory = Self { base, length, cluster, events, kind: Kind::Whole };
        memory.register(base, length, MODE_MISSING | MODE_MINOR)?;
        Ok(memory)
    }

    fn register(&self, start: NonNull<u8>, length: usize, mode: u64) -> io::Result<()> {
        let range = UffdioRange { start: start.as_ptr() as u64, length: length as u64 };
        let mut register = UffdioRegister { range, mode, ioctls: 0 };
        control(self.events.as_fd(), IOCTL_REGISTER, &mut register)
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a guest's memory is never empty")]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Readable when somebody waits, or withdraws.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Adds the clusters that somebody waits for, as far as it was not told yet, and who. Does not wait. Who withdraws goes on.
    ///
    /// # Errors
    /// As the system says.
    pub fn awaited(&self, into: &mut Vec<Awaited>) -> io::Result<()> {
        let mut messages = [0; MESSAGE * MESSAGES];
        let read = match (&self.events).read(&mut messages) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        let base = self.base.as_ptr() as u64;
        for message in messages.get(..read).unwrap_or_default().chunks_exact(MESSAGE) {
            let address = message.get(ADDRESS).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
            let offset = address.and_then(|address| address.checked_sub(base));
            let fault = message.first() == Some(&EVENT_PAGEFAULT);
            let thread = message.get(THREAD).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes);
            let cluster = offset.filter(|offset| fault && *offset < self.length as u64);
            let cluster = cluster.and_then(|offset| u32::try_from(offset / self.cluster as u64).ok());
            into.extend(cluster.map(|cluster| Awaited { cluster, thread }));
        }
        Ok(())
    }

    /// Copies bytes to memory. Waits for what is not there.
    ///
    /// # Errors
    /// `InvalidInput`: not all of it is in the memory.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| start.checked_add(bytes.len()).is_some_and(|end| end <= self.length));
        let start = start.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range lies in the addresses that this owns, all of which are writable, or wait; `bytes` is memory of our own and
        // overlaps nothing of a guest's, into which there are no references.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(start), bytes.len()) };
        Ok(())
    }

    /// Where `count` clusters from `cluster` on lie: offset and bytes; the last one of all may be shorter.
    fn range(&self, cluster: u32, count: u32) -> io::Result<(usize, usize)> {
        let start = self.cluster.checked_mul(cluster as usize).filter(|start| *start < self.length);
        let start = start.ok_or(io::ErrorKind::InvalidInput)?;
        Ok((start, self.cluster.saturating_mul(count as usize).min(self.length - start)))
    }

    /// Frames from `frame` on are what `count` clusters from `cluster` on show from now on. Who waits is not woken by it.
    ///
    /// # Errors
    /// As the system says.
    pub fn place(&self, frames: FrameFile<'_>, frame: u32, cluster: u32, count: u32) -> io::Result<()> {
        let (start, length) = self.range(cluster, count)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::FIXED | if frames.sync { super::dax::SYNC } else { MapFlags::SHARED };
        let offset = frames.offset + u64::from(frame) * self.cluster as u64;
        // SAFETY: the range lies in the addresses that this owns, so MAP_FIXED replaces a part of those and nothing else. They stay
        // readable and writable; nobody holds references into a guest's memory.
        unsafe {
            let at = self.base.as_ptr().add(start).cast();
            rustix::mm::mmap(at, length, access, flags, frames.file, offset)?;
        }
        Ok(())
    }

    /// What the memfd has at `count` clusters from `cluster` on, all of which it must have, is what they show from now on. Who waits is not
    /// woken by it.
    ///
    /// # Errors
    /// As the system says: `EFAULT` where the memfd has nothing.
    pub fn show(&self, cluster: u32, count: u32) -> io::Result<()> {
        let (mut start, mut length) = self.range(cluster, count)?;
        while length > 0 {
            let range = UffdioRange { start: (self.base.as_ptr() as usize + start) as u64, length: length as u64 };
            let mut show = UffdioContinue { range, mode: CONTINUE_DONTWAKE, mapped: 0 };
            let shown = control(self.events.as_fd(), IOCTL_CONTINUE, &mut show);
            let mapped = usize::try_from(show.mapped).unwrap_or(0).min(length);
            match shown {
                Ok(()) => return Ok(()),
                // Some of it, and something came between: the rest is asked for again.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
            }
            (start, length) = (start + mapped, length - mapped);
        }
        Ok(())
    }

    /// Takes what is placed or shown at up to [`PagedMemory::withdrawn_at_once`] clusters away, in one step for each page: from then on an access waits. With
    /// [`PagedMemory::reserve`] it is not to be called by the thread that reads events, or one that it waits for: this returns when the event
    /// was read.
    ///
    /// # Errors
    /// As the system says.
    pub fn withdraw(&self, cluster: u32, count: u32) -> io::Result<()> {
        let (start, length) = self.range(cluster, count)?;
        let Kind::Pieces(placeholders) = self.kind else {
            // SAFETY: the range lies in the addresses that this owns. They are a shared mapping, so that what was written to them stays in
            // the memfd, and all that changes is that the next access waits.
            let emptied =
                unsafe { rustix::mm::madvise(self.base.as_ptr().add(start).cast(), length, Advice::LinuxDontNeed) };
            return Ok(emptied?);
        };
        if length > self.cluster * WITHDRAWN_MAX as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
        // SAFETY: the target lies in the addresses that this owns, so a part of those is replaced and nothing else, by memory that is as
        // readable and writable; the source is this value's own and as long as WITHDRAWN_MAX clusters, and holds nothing.
        unsafe {
            let target = self.base.as_ptr().add(start).cast();
            rustix::mm::mremap_fixed(placeholders.as_ptr().cast(), length, length, flags, target)?;
        }
        Ok(())
    }

    /// How many clusters may be withdrawn at once.
    #[must_use]
    pub fn withdrawn_at_once(&self) -> usize {
        match self.kind {
            Kind::Pieces(_) => WITHDRAWN_MAX as usize,
            Kind::Whole => usize::MAX,
        }
    }

    /// Makes a cluster that cannot be had, and that nothing is placed at, one that cannot be accessed: who waits for it, or comes later,
    /// gets `EFAULT` in the kernel and `SIGSEGV` in this process.
    ///
    /// # Errors
    /// As the system says.
    pub fn refuse(&self, cluster: u32) -> io::Result<()> {
        let (start, length) = self.range(cluster, 1)?;
        // SAFETY: the range lies in the addresses that this owns, and holds a placeholder, of which no byte was ever accessible.
        unsafe {
            rustix::mm::mprotect(self.base.as_ptr().add(start).cast(), length, MprotectFlags::empty())?;
        }
        self.wake(cluster, 1)
    }

    /// Who waits for these clusters goes on, and looks again.
    ///
    /// # Errors
    /// As the system says.
    pub fn wake(&self, cluster: u32, count: u32) -> io::Result<()> {
        let (start, length) = self.range(cluster, count)?;
        let mut range = UffdioRange { start: (self.base.as_ptr() as usize + start) as u64, length: length as u64 };
        control(self.events.as_fd(), IOCTL_WAKE, &mut range)
    }
}

impl Drop for PagedMemory {
    fn drop(&mut self) {
        // SAFETY: both ranges were mapped in `reserve` or `over` and are owned by this alone; who kept the pointer promised not to use it.
        unsafe {
            let _ = rustix::mm::munmap(self.base.as_ptr().cast(), self.length);
            if let Kind::Pieces(placeholders) = self.kind {
                let _ = rustix::mm::munmap(placeholders.as_ptr().cast(), self.cluster * WITHDRAWN_MAX as usize);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const CLUSTER: u64 = 64 << 10;
    const CLUSTERS: u32 = 8;

    fn read(address: usize) -> u8 {
        // SAFETY: the tests read within a mapping that outlives the read.
        unsafe { (address as *const u8).read_volatile() }
    }

    fn write(address: usize, value: u8) {
        // SAFETY: as for `read`; nobody else accesses that byte.
        unsafe { (address as *mut u8).write_volatile(value) }
    }

    /// Places frame i at cluster i, or shows cluster i, whenever somebody asks, until told to end.
    fn serve(memory: &PagedMemory, file: &File, ended: &AtomicBool, served: &AtomicU64) {
        let frames = FrameFile { file: file.as_fd(), offset: 0, sync: false };
        let mut awaited = Vec::new();
        while !ended.load(Ordering::SeqCst) {
            memory.awaited(&mut awaited).unwrap();
            for Awaited { cluster, .. } in awaited.drain(..) {
                match memory.kind {
                    Kind::Pieces(_) => memory.place(frames, cluster, cluster, 1).unwrap(),
                    // It may be asked for twice, and there is a page in the table then.
                    Kind::Whole => drop(memory.show(cluster, 1)),
                }
                memory.wake(cluster, 1).unwrap();
                served.fetch_add(1, Ordering::SeqCst);
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_withdrawn_under_a_writer_is_asked_for_again_and_no_write_is_lost() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(CLUSTERS) * CLUSTER).unwrap();
        withdraw_under_a_writer(&file, &PagedMemory::reserve(u64::from(CLUSTERS) * CLUSTER, CLUSTER).unwrap());
    }

    #[test]
    fn what_is_withdrawn_of_a_memfd_under_a_writer_is_asked_for_again_and_no_write_is_lost() {
        let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; CLUSTERS as usize * CLUSTER as usize], 0).unwrap();
        let memory = PagedMemory::over(file.as_fd(), u64::from(CLUSTERS) * CLUSTER, CLUSTER).unwrap();
        assert!(memory.show(CLUSTERS, 1).is_err());
        withdraw_under_a_writer(&file, &memory);
    }

    fn withdraw_under_a_writer(file: &File, memory: &PagedMemory) {
        let clusters = CLUSTERS;
        let base = memory.as_ptr() as usize;
        let (ended, served) = (AtomicBool::new(false), AtomicU64::new(0));
        let begun = std::time::Instant::now();
        // On a busy machine the writer may be through before anything is withdrawn.
        let withdrawn = || served.load(Ordering::SeqCst) > 2 * u64::from(clusters);
        let wanting = || !withdrawn() && begun.elapsed() < std::time::Duration::from_secs(20);
        std::thread::scope(|scope| {
            scope.spawn(|| serve(memory, file, &ended, &served));
            let writer = scope.spawn(|| {
                let mut rounds = 0_u64;
                while rounds < 256 || wanting() {
                    let round = rounds as u8;
                    for cluster in 0..clusters as usize {
                        let at = base + cluster * CLUSTER as usize + 17 * cluster;
                        assert_eq!(read(at), round, "a write to cluster {cluster} was lost, or zeros were seen");
                        write(at, round.wrapping_add(1));
                    }
                    rounds += 1;
                }
            });
            while !writer.is_finished() {
                memory.withdraw(0, clusters).unwrap();
            }
            let wrote = writer.join();
            // Before the writer's failure is the test's: the server would be waited for without end.
            ended.store(true, Ordering::SeqCst);
            wrote.unwrap();
        });
        assert!(withdrawn(), "nothing was ever withdrawn");
    }

    #[test]
    fn who_waits_for_what_cannot_be_had_is_refused_in_the_kernel() {
        let memory = PagedMemory::reserve(2 * CLUSTER, CLUSTER).unwrap();
        let base = memory.as_ptr() as usize;
        std::thread::scope(|scope| {
            let refused = scope.spawn(|| {
                let (_reader, writer) = io::pipe().unwrap();
                // SAFETY: the kernel checks the address; a refusal is an error code.
                let written = unsafe {
                    libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), (base + 5) as *const libc::c_void, 1)
                };
                (written, io::Error::last_os_error().raw_os_error())
            });
            let mut awaited = Vec::new();
            while awaited.is_empty() {
                memory.awaited(&mut awaited).unwrap();
            }
            assert_eq!(awaited[0].cluster, 0);
            memory.refuse(0).unwrap();
            assert_eq!(refused.join().unwrap(), (-1, Some(libc::EFAULT)));
        });
        assert!(memory.place_would_be_outside(), "clusters that there are not are refused");
    }

    impl PagedMemory {
        fn place_would_be_outside(&self) -> bool {
            let file = tempfile::tempfile().unwrap();
            let frames = FrameFile { file: file.as_fd(), offset: 0, sync: false };
            self.place(frames, 0, 2, 1).is_err() && self.withdraw(u32::MAX, 1).is_err() && self.wake(2, 1).is_err()
        }
    }
}
