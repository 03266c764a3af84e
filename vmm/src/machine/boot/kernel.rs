//! Finds out what kind of kernel a file holds, and loads it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::bzimage::{self, BzImageError};
use super::elf::{self, ElfError};

/// Where the kernel comes from.
#[derive(Clone, Copy)]
pub enum KernelSource<'a> {
    /// A regular file, and the path to call it by in errors.
    File(&'a File, &'a Path),
    /// An image in memory (an embedded guest), and its name.
    Image(&'a [u8], &'a str),
}

/// Why a kernel cannot be loaded. The kernel's name is in the message.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file's size or type could not be found out.
    #[error("cannot look at kernel {name}")]
    Inspect {
        /// The kernel's name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("kernel {name} is not a regular file: give the path of an ELF or bzImage kernel")]
    NotAFile {
        /// The kernel's name.
        name: String,
    },
    /// The file holds something else.
    #[error("kernel {name} is neither an ELF nor a bzImage: {what}")]
    UnknownFormat {
        /// The kernel's name.
        name: String,
        /// What it seems to be, and what to do.
        what: &'static str,
    },
    /// Not an ELF that can be booted.
    #[error("cannot load the ELF kernel {name}")]
    Elf {
        /// The kernel's name.
        name: String,
        /// Why.
        #[source]
        source: ElfError,
    },
    /// Not a bzImage that can be booted.
    #[error("cannot load the bzImage kernel {name}")]
    BzImage {
        /// The kernel's name.
        name: String,
        /// Why.
        #[source]
        source: BzImageError,
    },
    /// The first bytes of the file could not be read.
    #[error("cannot read kernel {name}")]
    Read {
        /// The kernel's name.
        name: String,
        /// Why.
        #[source]
        source: ReadError,
    },
}

/// Why bytes of a file did not come.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Reading failed, or the file ended early (it was changed meanwhile).
    #[error("reading {length} bytes at offset {offset:#x} of the file")]
    File {
        /// Offset in the file.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Reading into guest memory failed.
    #[error("reading {length} bytes at offset {offset:#x} of the file into guest memory at {address:#x}")]
    Guest {
        /// Offset in the file.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Guest-physical address.
        address: u64,
        /// What the system or guest memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// A kernel that lies in guest memory.
pub(super) struct LoadedKernel {
    /// For messages.
    pub(super) name: String,
    /// Guest-physical address of the first instruction.
    pub(super) entry: u64,
    /// Setup header for the Linux 64-bit protocol; `None` for PVH.
    pub(super) header: Option<Box<setup_header>>,
    /// First byte behind all that the kernel needs until it has read its memory map.
    pub(super) end: u64,
    /// Longest command line it takes, in bytes without the NUL.
    pub(super) cmdline_max: u64,
    /// Highest address that the initrd may occupy.
    pub(super) initrd_max: u64,
}

/// Loads the kernel of `source` below `low_end`, the end of low RAM.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    source: KernelSource<'_>,
    low_end: u64,
) -> Result<LoadedKernel, KernelError> {
    let name = source.name();
    let image = ImageReader::open(source)?;
    let mut head = [0; bzimage::HEADER_END];
    let available = image.length.min(head.len() as u64) as usize;
    image.read_at(0, &mut head[..available]).map_err(|source| KernelError::Read { name: name.clone(), source })?;
    let head = &head[..available];

    if head.starts_with(elf::MAGIC) {
        let loaded = elf::load(memory, &image, low_end);
        loaded.map_err(|source| KernelError::Elf { name, source })
    } else if bzimage::is_bzimage(head) {
        let loaded = bzimage::load(memory, &image, head, low_end);
        loaded.map_err(|source| KernelError::BzImage { name, source })
    } else {
        Err(KernelError::UnknownFormat { name, what: resembles(head) })
    }
}

/// What a file that is no kernel seems to be.
fn resembles(head: &[u8]) -> &'static str {
    match head {
        [] => "it is empty",
        [0x1f, 0x8b, ..] => "it is gzip-compressed; unpack it (gunzip) first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is xz-compressed; unpack it (unxz) first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is zstd-compressed; unpack it (unzstd) first",
        [b'0', b'7', b'0', b'7', b'0', ..] => "it is a cpio archive, an initrd perhaps; that belongs to --initrd",
        [b'#', b'!', ..] => "it is a script",
        head if head.get(0x38..0x3c) == Some(b"ARM\x64") => "it is a kernel for arm64; an x86-64 one is needed",
        [b'M', b'Z', ..] => "it is an EFI program; give the vmlinuz or vmlinux it was made from",
        head if head.len() < bzimage::HEADER_END => "it is too short to be a kernel",
        _ => "its first bytes are those of no known format; give a vmlinux or a vmlinuz",
    }
}

impl KernelSource<'_> {
    fn name(&self) -> String {
        match self {
            KernelSource::File(_, path) => path.display().to_string(),
            KernelSource::Image(_, name) => (*name).to_owned(),
        }
    }
}

/// A kernel image whose length is known, read by offset.
pub(super) struct ImageReader<'a> {
    source: KernelSource<'a>,
    pub(super) length: u64,
}

impl<'a> ImageReader<'a> {
    pub(super) fn name(&self) -> String {
        self.source.name()
    }

    pub(super) fn open(source: KernelSource<'a>) -> Result<Self, KernelError> {
        let length = match source {
            KernelSource::File(file, _) => {
                let metadata = file.metadata();
                let metadata = metadata.map_err(|error| KernelError::Inspect { name: source.name(), source: error })?;
                if !metadata.is_file() {
                    return Err(KernelError::NotAFile { name: source.name() });
                }
                metadata.len()
            }
            KernelSource::Image(bytes, _) => bytes.len() as u64,
        };
        Ok(Self { source, length })
    }

    /// Fills `buffer` from `offset`.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let length = buffer.len() as u64;
        let result = match self.source {
            KernelSource::File(file, _) => file.read_exact_at(buffer, offset),
            KernelSource::Image(bytes, _) => slice_at(bytes, offset, length).map(|part| buffer.copy_from_slice(part)),
        };
        result.map_err(|source| ReadError::File { offset, length, source })
    }

    /// Reads `length` bytes from `offset` straight into guest memory.
    pub(super) fn read_to_guest<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        address: u64,
        offset: u64,
        length: u64,
    ) -> Result<(), ReadError> {
        match self.source {
            KernelSource::File(file, _) => file_to_guest(file, memory, address, offset, length),
            KernelSource::Image(bytes, _) => {
                let part =
                    slice_at(bytes, offset, length).map_err(|source| ReadError::File { offset, length, source })?;
                memory.write_slice(part, GuestAddress(address)).map_err(|source| ReadError::Guest {
                    offset,
                    length,
                    address,
                    source,
                })
            }
        }
    }
}

/// Reads `length` bytes from `offset` of `file` straight into guest memory. The file's position moves.
pub(super) fn file_to_guest<M: GuestMemoryBackend>(
    mut file: &File,
    memory: &M,
    address: u64,
    offset: u64,
    length: u64,
) -> Result<(), ReadError> {
    file.seek(SeekFrom::Start(offset)).map_err(|source| ReadError::File { offset, length, source })?;
    // Everything that is loaded lies in low RAM, below 3 GiB.
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, length as usize)
        .map_err(|source| ReadError::Guest { offset, length, address, source })
}

fn slice_at(bytes: &[u8], offset: u64, length: u64) -> io::Result<&[u8]> {
    let start = usize::try_from(offset).ok();
    let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
    start.zip(end).and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
