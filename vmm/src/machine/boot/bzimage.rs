//! bzImage kernels, by Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! The real-mode part of the file is skipped; the protected-mode part is loaded at `pref_address`
//! and entered at +0x200 in long mode. It unpacks itself within `init_size` bytes from there.
//! Loading it lower would save no memory: the unpacker of x86-64 never goes below `pref_address`.

use std::mem::{offset_of, size_of};

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::kernel::{ImageReader, LoadedKernel, ReadError};
use super::layout::{HIGH_RAM_START, MMIO_GAP_START, mebibytes};

/// "HdrS", at [`MAGIC_AT`].
pub(super) const HDRS: u32 = 0x5372_6448;
/// The oldest protocol that has `xloadflags`, and so says whether there is a 64-bit entry (Linux 3.8).
pub(super) const OLDEST_PROTOCOL: u16 = 0x020c;
/// Where the setup header may end at most, in the file.
pub(super) const HEADER_END: usize = HEADER_START + size_of::<setup_header>();

const HEADER_START: usize = 0x1f1;
const BOOT_FLAG_AT: usize = 0x1fe;
/// Operand of the short jump at 0x200: the header ends that far behind 0x202.
const JUMP_OPERAND_AT: usize = 0x201;
const MAGIC_AT: usize = 0x202;
const SECTOR: u64 = 512;
/// The 64-bit entry point, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;

/// Why a bzImage cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// Bytes of the file did not come.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Too old.
    #[error(
        "it speaks boot protocol {}.{:02}, at least 2.12 is needed: use Linux 3.8 or later, or its vmlinux",
        version >> 8, version & 0xff
    )]
    TooOld {
        /// Protocol version, as in the header.
        version: u16,
    },
    /// No 64-bit entry.
    #[error("it has no 64-bit entry point (a 32-bit kernel): only x86-64 kernels can be booted")]
    No64BitEntry,
    /// A zImage.
    #[error("it is a zImage, which loads below 1 MiB: build a bzImage")]
    NotLoadedHigh,
    /// The setup header ends before the fields that its version promises.
    #[error("its setup header ends at {end:#x}, within the fields of its version: the file is damaged")]
    ShortHeader {
        /// Where it ends, in the file.
        end: usize,
    },
    /// The file ends early.
    #[error("its header promises {expected} bytes, the file has {length}: it is truncated, copy it again")]
    Truncated {
        /// Bytes that the header promises.
        expected: u64,
        /// Size of the file.
        length: u64,
    },
    /// The compressed kernel is not within the loaded part.
    #[error(
        "its payload of {size:#x} bytes at {offset:#x} exceeds the loaded part of {loaded:#x} bytes: \
         the file is damaged"
    )]
    BadPayload {
        /// `payload_offset`.
        offset: u32,
        /// `payload_length`.
        size: u32,
        /// Size of the protected-mode part.
        loaded: u64,
    },
    /// The alignment is not a power of two.
    #[error("its kernel_alignment {alignment:#x} is not a power of two: the file is damaged")]
    BadAlignment {
        /// `kernel_alignment`.
        alignment: u32,
    },
    /// The kernel wants an address where boot data is, and cannot be moved.
    #[error("it must be loaded at {address:#x}, below 1 MiB, where boot data and the platform are")]
    TooLow {
        /// `pref_address`.
        address: u64,
    },
    /// No RAM is ever there.
    #[error("it is to be loaded at {address:#x} and takes {size:#x} bytes, but must lie below 3 GiB")]
    TooHigh {
        /// Load address.
        address: u64,
        /// Bytes needed.
        size: u64,
    },
    /// RAM is too small.
    #[error(
        "unpacking itself it reaches up to {end:#x} in memory and needs at least {} MiB, the guest has {}: \
         use --memory {}M", mebibytes(*end), mebibytes(*ram), mebibytes(*end)
    )]
    TooLittleMemory {
        /// First byte behind what it needs.
        end: u64,
        /// End of low RAM.
        ram: u64,
    },
}

/// Whether a file that begins with `head` has a setup header.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC_AT..MAGIC_AT + 4) == Some(&HDRS.to_le_bytes())
        && head.get(BOOT_FLAG_AT..BOOT_FLAG_AT + 2) == Some(&[0x55, 0xaa])
}

/// Loads the bzImage `image`, which begins with `head`, below `low_end`.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    image: &ImageReader<'_>,
    head: &[u8],
    low_end: u64,
) -> Result<LoadedKernel, BzImageError> {
    let mut header = parse_header(head)?;
    let (offset, size) = protected_mode_part(&header, image.length)?;
    let address = load_address(&header)?;
    let end = address
        .checked_add(size.max(u64::from(header.init_size)))
        .filter(|end| *end <= MMIO_GAP_START)
        .ok_or(BzImageError::TooHigh { address, size: size.max(u64::from(header.init_size)) })?;
    if end > low_end {
        return Err(BzImageError::TooLittleMemory { end, ram: low_end });
    }

    image.read_to_guest(memory, address, offset, size)?;
    header.code32_start = address as u32;
    Ok(LoadedKernel {
        name: image.name(),
        entry: address + ENTRY_64,
        end,
        cmdline_max: u64::from(header.cmdline_size),
        initrd_max: u64::from(header.initrd_addr_max),
        header: Some(Box::new(header)),
    })
}

/// The setup header; what lies behind its own end reads as zero.
fn parse_header(head: &[u8]) -> Result<setup_header, BzImageError> {
    let jump = head.get(JUMP_OPERAND_AT).copied().unwrap_or(0);
    let end = (MAGIC_AT + usize::from(jump)).min(head.len()).min(HEADER_END);
    let version_end = HEADER_START + offset_of!(setup_header, version) + 2;
    if end < version_end {
        return Err(BzImageError::ShortHeader { end });
    }
    let mut header = setup_header::default();
    header.as_mut_slice()[..end - HEADER_START].copy_from_slice(&head[HEADER_START..end]);
    let version = header.version;
    if version < OLDEST_PROTOCOL {
        return Err(BzImageError::TooOld { version });
    }
    if end < HEADER_START + offset_of!(setup_header, handover_offset) {
        return Err(BzImageError::ShortHeader { end });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BzImageError::NotLoadedHigh);
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::No64BitEntry);
    }
    Ok(header)
}

/// Offset and size of the protected-mode part in a file of `length` bytes.
fn protected_mode_part(header: &setup_header, length: u64) -> Result<(u64, u64), BzImageError> {
    // Zero means four, for the oldest of kernels.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (sectors + 1) * SECTOR;
    let expected = offset + (u64::from(header.syssize) * 16).max(ENTRY_64 + 1);
    if expected > length {
        return Err(BzImageError::Truncated { expected, length });
    }
    // Distributions append a signature; it is loaded too, as boot.rst has it.
    let loaded = length - offset;
    let (payload, size) = (header.payload_offset, header.payload_length);
    if u64::from(payload) + u64::from(size) > loaded {
        return Err(BzImageError::BadPayload { offset: payload, size, loaded });
    }
    Ok((offset, loaded))
}

fn load_address(header: &setup_header) -> Result<u64, BzImageError> {
    let preferred = header.pref_address;
    if header.relocatable_kernel == 0 {
        return if preferred < HIGH_RAM_START {
            Err(BzImageError::TooLow { address: preferred })
        } else {
            Ok(preferred)
        };
    }
    let alignment = header.kernel_alignment;
    if !alignment.is_power_of_two() {
        return Err(BzImageError::BadAlignment { alignment });
    }
    preferred
        .max(HIGH_RAM_START)
        .checked_next_multiple_of(u64::from(alignment))
        .ok_or(BzImageError::TooHigh { address: preferred, size: u64::from(header.init_size) })
}
