//! The initial RAM disk: at the top of low RAM, as far from the kernel as can be.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryBackend;

use super::kernel::{LoadedKernel, ReadError, file_to_guest};
use super::layout::{MMIO_GAP_START, PAGE_SIZE, mebibytes};

/// Why an initrd cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file's size or type could not be found out.
    #[error("cannot look at initrd {}", path.display())]
    Inspect {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("initrd {} is not a regular file: give the path of a cpio archive", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("initrd {} is empty: give a cpio archive, or leave out --initrd", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// RAM is too small.
    #[error(
        "initrd {} of {} MiB does not fit beside the kernel: at least {} MiB are needed, use --memory {}M",
        path.display(), mebibytes(*size), mebibytes(*needed), mebibytes(*needed)
    )]
    TooLittleMemory {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes of RAM needed.
        needed: u64,
    },
    /// More RAM would not help.
    #[error(
        "initrd {} of {} MiB does not fit between the kernel's end at {start:#x} and {limit:#x}, above which \
         the kernel would not find it: use a smaller one", path.display(), mebibytes(*size)
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// End of the kernel.
        start: u64,
        /// End of what the kernel can reach.
        limit: u64,
    },
    /// Bytes of the file did not come.
    #[error("cannot load initrd {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ReadError,
    },
}

/// Loads `file` into low RAM, which ends at `low_end`, above `kernel`. Returns where it lies.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    file: &File,
    path: &Path,
    kernel: &LoadedKernel,
    low_end: u64,
) -> Result<Range<u64>, InitrdError> {
    let path = path.to_path_buf();
    let metadata = match file.metadata() {
        Ok(metadata) => metadata,
        Err(source) => return Err(InitrdError::Inspect { path, source }),
    };
    if !metadata.is_file() {
        return Err(InitrdError::NotAFile { path });
    }
    let size = metadata.len();
    if size == 0 {
        return Err(InitrdError::Empty { path });
    }
    let start = place(path.clone(), size, kernel, low_end)?;
    match file_to_guest(file, memory, start, 0, size) {
        Ok(()) => Ok(start..start + size),
        Err(source) => Err(InitrdError::Read { path, source }),
    }
}

/// The highest page-aligned address below the kernel's limit and the end of low RAM.
///
/// Being above all that the kernel needs while it unpacks itself, the initrd is never overwritten.
fn place(path: PathBuf, size: u64, kernel: &LoadedKernel, low_end: u64) -> Result<u64, InitrdError> {
    let limit = kernel.initrd_max.saturating_add(1).min(MMIO_GAP_START);
    let start_of = |end: u64| {
        let start = end.checked_sub(size)? / PAGE_SIZE * PAGE_SIZE;
        (start >= kernel.end).then_some(start)
    };
    if let Some(start) = start_of(limit.min(low_end)) {
        return Ok(start);
    }
    let needed = kernel.end.next_multiple_of(PAGE_SIZE).saturating_add(size);
    if needed > limit {
        Err(InitrdError::TooLarge { path, size, start: kernel.end, limit })
    } else {
        Err(InitrdError::TooLittleMemory { path, size, needed })
    }
}
