//! ELF64 kernels: `vmlinux`, and bare-metal guests.
//!
//! Segments go to their physical addresses. A kernel that carries the note `XEN_ELFNOTE_PHYS32_ENTRY`
//! is entered there by PVH (it needs no setup header, and Linux has it since 5.0); any other
//! is entered at the ELF entry point, by Linux's 64-bit protocol.

use std::mem::size_of;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use linux_loader::loader::bootparam::{LOADED_HIGH, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::kernel::{ImageReader, LoadedKernel, ReadError};
use super::layout::{HIGH_RAM_START, MMIO_GAP_START, mebibytes};

pub(super) const MAGIC: &[u8] = b"\x7fELF";

const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Notes of a kernel take some hundred bytes. The bound is on all note segments together, for they may share bytes.
const NOTES_MAX: u64 = 1 << 20;
/// `COMMAND_LINE_SIZE` of x86 Linux without the NUL; an ELF says no other.
const LINUX_CMDLINE_MAX: u64 = 2047;

/// Why an ELF file cannot be loaded as a kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// Bytes of the file did not come.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file ends within its ELF header.
    #[error("the file has {length} bytes and ends within its ELF header: it is truncated, copy it again")]
    TruncatedHeader {
        /// Size of the file.
        length: u64,
    },
    /// 32-bit.
    #[error("it is a 32-bit ELF: only x86-64 kernels can be booted")]
    NotElf64,
    /// Big-endian.
    #[error("it is a big-endian ELF: only x86-64 kernels can be booted")]
    NotLittleEndian,
    /// For another architecture.
    #[error("it is for another architecture (ELF machine {machine}): only x86-64 kernels (62) can be booted")]
    WrongMachine {
        /// `e_machine`.
        machine: u16,
    },
    /// An object file, a core dump.
    #[error("it is no executable (ELF type {kind}; an object file is 1, a core dump 4): link it first")]
    NotExecutable {
        /// `e_type`.
        kind: u16,
    },
    /// The program headers are not where and what they should be.
    #[error(
        "its {count} program headers of {size} bytes at offset {offset:#x} do not fit a file of {length} bytes: \
         it is truncated or damaged"
    )]
    BadProgramHeaders {
        /// `e_phnum`.
        count: u16,
        /// `e_phentsize`.
        size: u16,
        /// `e_phoff`.
        offset: u64,
        /// Size of the file.
        length: u64,
    },
    /// Nothing to load.
    #[error("it has no segment to load: a kernel is needed, not a file of symbols alone")]
    NoSegments,
    /// A segment's bytes are not in the file.
    #[error(
        "segment {index} has {size} bytes at offset {offset:#x}, the file has only {length}: \
         it is truncated, copy it again"
    )]
    SegmentBeyondFile {
        /// Index of the program header.
        index: usize,
        /// `p_offset`.
        offset: u64,
        /// `p_filesz`.
        size: u64,
        /// Size of the file.
        length: u64,
    },
    /// More bytes in the file than in memory.
    #[error("segment {index} has {file} bytes in the file but {memory} in memory: the file is damaged")]
    SegmentSizes {
        /// Index of the program header.
        index: usize,
        /// `p_filesz`.
        file: u64,
        /// `p_memsz`.
        memory: u64,
    },
    /// A segment ends behind the end of the address space.
    #[error("segment {index} at {start:#x} with {size} bytes exceeds the address space: the file is damaged")]
    SegmentOverflow {
        /// Index of the program header.
        index: usize,
        /// `p_paddr`.
        start: u64,
        /// `p_memsz`.
        size: u64,
    },
    /// A segment lies where boot data and legacy devices are.
    #[error(
        "segment {index} is linked to physical address {start:#x}, but everything below 1 MiB belongs to \
         boot data and the platform: link it at 1 MiB or above"
    )]
    SegmentTooLow {
        /// Index of the program header.
        index: usize,
        /// `p_paddr`.
        start: u64,
    },
    /// Two segments claim the same memory.
    #[error("segments {first} and {second} overlap at physical address {at:#x}: the file is damaged")]
    SegmentsOverlap {
        /// Index of one program header.
        first: usize,
        /// Index of the other.
        second: usize,
        /// Where the second begins, within the first.
        at: u64,
    },
    /// RAM is too small.
    #[error(
        "it reaches up to {end:#x} in memory and needs at least {} MiB, the guest has {}: use --memory {}M",
        mebibytes(*end), mebibytes(*ram), mebibytes(*end)
    )]
    TooLittleMemory {
        /// First byte behind the kernel.
        end: u64,
        /// End of low RAM.
        ram: u64,
    },
    /// No RAM is ever there.
    #[error("it reaches up to {end:#x} in memory, but a kernel must lie below 3 GiB: link it lower")]
    TooHigh {
        /// First byte behind the kernel.
        end: u64,
    },
    /// The entry point is not in what was loaded.
    #[error(
        "its entry point {entry:#x} lies in no segment's bytes (physical addresses count): link it with a physical entry point"
    )]
    EntryOutside {
        /// The entry point.
        entry: u64,
    },
    /// A note that does not fit its segment.
    #[error("the note at offset {offset:#x} of the file is larger than its segment: the file is damaged")]
    BadNote {
        /// Offset in the file.
        offset: u64,
    },
    /// Too many notes.
    #[error("its notes take more than {} MiB: the file is damaged", NOTES_MAX >> 20)]
    NotesTooLarge,
    /// The part of a segment that is not in the file could not be cleared.
    #[error("clearing guest memory at {address:#x}")]
    Clear {
        /// Where.
        address: u64,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// A segment to load, checked against the file and the address space.
struct Segment {
    index: usize,
    offset: u64,
    file_size: u64,
    start: u64,
    end: u64,
}

impl Segment {
    fn check(index: usize, header: &Elf64_Phdr, length: u64) -> Result<Self, ElfError> {
        if header.p_filesz > header.p_memsz {
            return Err(ElfError::SegmentSizes { index, file: header.p_filesz, memory: header.p_memsz });
        }
        check_in_file(index, header, length)?;
        let start = header.p_paddr;
        let end = start.checked_add(header.p_memsz).ok_or(ElfError::SegmentOverflow {
            index,
            start,
            size: header.p_memsz,
        })?;
        if start < HIGH_RAM_START {
            return Err(ElfError::SegmentTooLow { index, start });
        }
        Ok(Self { index, offset: header.p_offset, file_size: header.p_filesz, start, end })
    }
}

/// Loads the ELF file `image` below `low_end`.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    image: &ImageReader<'_>,
    low_end: u64,
) -> Result<LoadedKernel, ElfError> {
    let header = read_header(image)?;
    let program_headers = read_program_headers(image, &header)?;
    let segments = loadable(&program_headers, image.length)?;
    let end = check_placement(&segments, low_end)?;
    let pvh_entry = find_pvh_entry(image, &program_headers)?;
    let entry = pvh_entry.map_or(header.e_entry, u64::from);
    if !segments.iter().any(|segment| (segment.start..segment.start + segment.file_size).contains(&entry)) {
        return Err(ElfError::EntryOutside { entry });
    }

    for segment in &segments {
        image.read_to_guest(memory, segment.start, segment.offset, segment.file_size)?;
        clear(memory, segment.start + segment.file_size, segment.end)?;
    }
    Ok(LoadedKernel {
        name: image.name(),
        entry,
        header: pvh_entry.is_none().then(|| Box::new(synthetic_header())),
        end,
        cmdline_max: LINUX_CMDLINE_MAX,
        initrd_max: MMIO_GAP_START - 1,
    })
}

fn read_header(image: &ImageReader<'_>) -> Result<Elf64_Ehdr, ElfError> {
    let mut header = Elf64_Ehdr::default();
    if image.length < size_of::<Elf64_Ehdr>() as u64 {
        return Err(ElfError::TruncatedHeader { length: image.length });
    }
    image.read_at(0, header.as_mut_slice())?;
    if header.e_ident[EI_CLASS] != ELFCLASS64 {
        return Err(ElfError::NotElf64);
    }
    if header.e_ident[EI_DATA] != ELFDATA2LSB {
        return Err(ElfError::NotLittleEndian);
    }
    if header.e_machine != EM_X86_64 {
        return Err(ElfError::WrongMachine { machine: header.e_machine });
    }
    if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        return Err(ElfError::NotExecutable { kind: header.e_type });
    }
    Ok(header)
}

/// All program headers. Their number is 16 bits wide, so this is 3.5 MiB at most, and in the file.
fn read_program_headers(image: &ImageReader<'_>, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, ElfError> {
    let size = size_of::<Elf64_Phdr>();
    let bytes = usize::from(header.e_phnum) * size;
    let end = header.e_phoff.checked_add(bytes as u64);
    if usize::from(header.e_phentsize) != size || end.is_none_or(|end| end > image.length) {
        return Err(ElfError::BadProgramHeaders {
            count: header.e_phnum,
            size: header.e_phentsize,
            offset: header.e_phoff,
            length: image.length,
        });
    }
    let mut table = vec![0; bytes];
    image.read_at(header.e_phoff, &mut table)?;
    let parse = |bytes: &[u8]| {
        let mut header = Elf64_Phdr::default();
        header.as_mut_slice().copy_from_slice(bytes);
        header
    };
    Ok(table.chunks_exact(size).map(parse).collect())
}

fn check_in_file(index: usize, header: &Elf64_Phdr, length: u64) -> Result<(), ElfError> {
    let (offset, size) = (header.p_offset, header.p_filesz);
    if offset.checked_add(size).is_none_or(|end| end > length) {
        return Err(ElfError::SegmentBeyondFile { index, offset, size, length });
    }
    Ok(())
}

/// The segments to load, in order of their addresses.
fn loadable(headers: &[Elf64_Phdr], length: u64) -> Result<Vec<Segment>, ElfError> {
    let mut segments = headers
        .iter()
        .enumerate()
        .filter(|(_, header)| header.p_type == PT_LOAD && (header.p_memsz > 0 || header.p_filesz > 0))
        .map(|(index, header)| Segment::check(index, header, length))
        .collect::<Result<Vec<_>, _>>()?;
    segments.sort_by_key(|segment| segment.start);
    Ok(segments)
}

/// Segments, sorted, must be apart from each other and end within low RAM. Returns where they end.
fn check_placement(segments: &[Segment], low_end: u64) -> Result<u64, ElfError> {
    for pair in segments.windows(2) {
        if pair[1].start < pair[0].end {
            let (first, second, at) = (pair[0].index, pair[1].index, pair[1].start);
            return Err(ElfError::SegmentsOverlap { first, second, at });
        }
    }
    let end = segments.last().ok_or(ElfError::NoSegments)?.end;
    if end > MMIO_GAP_START {
        return Err(ElfError::TooHigh { end });
    }
    if end > low_end {
        return Err(ElfError::TooLittleMemory { end, ram: low_end });
    }
    Ok(end)
}

/// The 32-bit entry point of the first PVH note, if there is one.
fn find_pvh_entry(image: &ImageReader<'_>, headers: &[Elf64_Phdr]) -> Result<Option<u32>, ElfError> {
    let mut total = 0_u64;
    for (index, header) in headers.iter().enumerate().filter(|(_, header)| header.p_type == PT_NOTE) {
        check_in_file(index, header, image.length)?;
        total = total.saturating_add(header.p_filesz);
        if total > NOTES_MAX {
            return Err(ElfError::NotesTooLarge);
        }
        let mut notes = vec![0; header.p_filesz as usize];
        image.read_at(header.p_offset, &mut notes)?;
        let entry = pvh_entry(&notes);
        let entry = entry.map_err(|at| ElfError::BadNote { offset: header.p_offset + at as u64 })?;
        if entry.is_some() {
            return Ok(entry);
        }
    }
    Ok(None)
}

/// Walks the notes of one segment; the error is the offset of a note that does not fit.
///
/// Name and descriptor are padded to four bytes, as Linux writes them (include/linux/elfnote.h).
fn pvh_entry(notes: &[u8]) -> Result<Option<u32>, usize> {
    let mut at = 0;
    while let Some(head) = notes.get(at..at + size_of::<Elf64_Nhdr>()) {
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(head);
        let part = |from: usize, size: u32| -> Option<(&[u8], usize)> {
            let end = from.checked_add(size as usize)?;
            Some((notes.get(from..end)?, end.checked_next_multiple_of(4)?))
        };
        let (name, next) = part(at + head.len(), note.n_namesz).ok_or(at)?;
        let (value, next) = part(next, note.n_descsz).ok_or(at)?;
        if note.n_type == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // Linux writes four bytes, others eight; the entry is a 32-bit address either way.
            let entry = value.first_chunk::<4>().ok_or(at)?;
            return Ok(Some(u32::from_le_bytes(*entry)));
        }
        at = next;
    }
    Ok(None)
}

/// Zeroes `[from, to)`: what a segment has in memory but not in the file.
fn clear<M: GuestMemoryBackend>(memory: &M, from: u64, to: u64) -> Result<(), ElfError> {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    let mut address = from;
    while address < to {
        let count = (to - address).min(ZEROES.len() as u64);
        memory
            .write_slice(&ZEROES[..count as usize], GuestAddress(address))
            .map_err(|source| ElfError::Clear { address, source })?;
        address += count;
    }
    Ok(())
}

/// An ELF has no setup header; this is what Linux looks at in one.
fn synthetic_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: super::bzimage::HDRS,
        version: super::bzimage::OLDEST_PROTOCOL,
        loadflags: LOADED_HIGH,
        initrd_addr_max: (MMIO_GAP_START - 1) as u32,
        kernel_alignment: 16 << 20,
        cmdline_size: LINUX_CMDLINE_MAX as u32,
        ..setup_header::default()
    }
}
