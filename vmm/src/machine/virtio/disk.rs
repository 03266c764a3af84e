//! Disks: the image of a virtio block device, read and written behind the guest's back.
//!
//! ```text
//!   devices::virtio::block ─► BlockBackend ─┬─ io_uring   the kernel does it, what it has in memory at once
//!                                           └─ threads    where io_uring is refused: a few threads do
//!                               both: Image   which file, which part of it, and whether it is still believed
//!                                     Flushes one at a time; whoever asks meanwhile shares the next
//! ```
//!
//! All I/O goes through the page cache: guest memory may be paged (`--ram`), and a page that the pager may take cannot be pinned for direct
//! I/O. A write is therefore durable after a flush (`fdatasync`), on each medium: on `dax` the kernel's copy goes past the CPU's caches, on
//! `nvdimm` a disk is in the image itself, and not in what stands for DRAM.
//!
//! # After a failed flush
//!
//! The kernel tells of a write that was lost once, to one flush of an open file. So there is one flush of it at a time, its verdict is that of
//! all who share it, and after a failure all later ones fail ([`Image::is_believed`]). The freeze flushes through an open file of its
//! own, to be told as well.

mod flushes;
mod image;
mod io_uring;
mod moment;
#[cfg(test)]
mod tests;
mod threads;
mod transfer;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use devices::virtio::block::{Block, BlockBackend, Disk, SECTOR};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Attachment;
use io_uring::Uring;
use threads::Threads;

pub use image::{Blocks, Image};
pub use moment::{Moment, data_pages};

/// The most queues that a disk has; more do not help a host that has a queue for each disk itself.
const QUEUES_MAX: u16 = 4;

/// The environment variable that chooses who does the I/O: `io_uring` or `threads`. `io_uring` if it is not set, where the kernel has it.
pub const CHOICE: &str = "PERDURE_DISK_IO";

/// Who does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worker {
    /// The kernel.
    IoUring,
    /// Threads of this process.
    Threads,
}

impl Worker {
    /// As [`CHOICE`] says.
    fn chosen() -> Option<Self> {
        match std::env::var(CHOICE).as_deref() {
            Ok("io_uring") => Some(Self::IoUring),
            Ok("threads") => Some(Self::Threads),
            Ok(other) => {
                tracing::warn!("{CHOICE} is {other:?}, and not io_uring or threads: it is not heeded");
                None
            }
            Err(_) => None,
        }
    }
}

/// Disk number `number` of a machine of `cpus` CPUs.
///
/// # Errors
/// As the system says.
pub fn attach(number: usize, image: &Arc<Image>, cpus: u32) -> io::Result<Attachment> {
    let (backend, source) = backend(image)?;
    let disk = Disk {
        id: image.name().to_owned(),
        sectors: image.length() / SECTOR,
        read_only: image.is_read_only(),
        queues: u16::try_from(cpus).unwrap_or(QUEUES_MAX).clamp(1, QUEUES_MAX),
    };
    let device = Box::new(Block::new(disk, backend));
    Ok(Attachment { id: format!("disk{number}"), device, sources: vec![source] })
}

/// Whoever does the I/O, and what tells that something is done.
fn backend(image: &Arc<Image>) -> io::Result<(Box<dyn BlockBackend>, OwnedFd)> {
    // What the kernel does by itself, nobody can tell of.
    match Worker::chosen().filter(|_| image.trace().is_none()).or(image.trace().map(|_| Worker::Threads)) {
        Some(worker) => open(worker, image),
        None => open(Worker::IoUring, image).or_else(|error| match error.raw_os_error() {
            // Not in this kernel; forbidden (`kernel.io_uring_disabled`, seccomp); too little memory that may be locked.
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::ENOMEM) => {
                tracing::info!("disk {}: threads do its I/O, since io_uring is refused: {error}", image.name());
                open(Worker::Threads, image)
            }
            _ => Err(error),
        }),
    }
}

fn open(worker: Worker, image: &Arc<Image>) -> io::Result<(Box<dyn BlockBackend>, OwnedFd)> {
    match worker {
        Worker::IoUring => {
            let (backend, source) = Uring::new(Arc::clone(image))?;
            Ok((Box::new(backend), source))
        }
        Worker::Threads => {
            let done = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            let source = super::thread::borrow(&done).try_clone_to_owned()?;
            Ok((Box::new(Threads::start(Arc::clone(image), done)?), source))
        }
    }
}
