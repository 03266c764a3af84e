//! Guest memory, and kernels to put into it.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::{BootError, BootSpec, Entry, KernelSource, load};

pub(super) const MIB: u64 = 1 << 20;

/// What memory holds that nothing was written to: as if an earlier guest had left it.
pub(super) const STALE: u8 = 0xa5;

/// `mebibytes` of RAM below the gap; the first `stale` bytes are not zero.
pub(super) fn memory(mebibytes: u64, stale: u64) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mebibytes * MIB) as usize)]).unwrap();
    memory.write_slice(&vec![STALE; stale as usize], GuestAddress(0)).unwrap();
    memory
}

pub(super) fn bytes(memory: &GuestMemoryMmap, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

pub(super) fn u16_at(memory: &GuestMemoryMmap, address: u64) -> u16 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

pub(super) fn u32_at(memory: &GuestMemoryMmap, address: u64) -> u32 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

pub(super) fn u64_at(memory: &GuestMemoryMmap, address: u64) -> u64 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

/// A machine with one CPU and `ram` bytes that boots `image`.
pub(super) fn spec(image: &[u8], ram: u64) -> BootSpec<'_> {
    BootSpec {
        kernel: KernelSource::Image(image, "made-up"),
        initrd: None,
        cmdline: "console=ttyS0",
        ram,
        cpus: 1,
        serial_irq: Some(4),
        rtc_irq: Some(8),
        acpi_devices: &[],
    }
}

/// Boots `image` with `mebibytes` of RAM.
pub(super) fn boot(image: &[u8], mebibytes: u64) -> Result<Entry, BootError> {
    load(&memory(mebibytes, 0), &spec(image, mebibytes * MIB))
}

/// The error of a kernel that does not boot, with its causes, as a user reads it.
pub(super) fn complaint(image: &[u8], mebibytes: u64) -> String {
    full_message(&boot(image, mebibytes).unwrap_err())
}

pub(super) fn full_message(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message += ": ";
        message += &error.to_string();
        cause = error.source();
    }
    message
}

pub(super) fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

pub(super) fn made_up_path() -> &'static Path {
    Path::new("made-up.img")
}

/// One program header and its bytes.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) kind: u32,
    pub(super) address: u64,
    pub(super) content: Vec<u8>,
    pub(super) memory_size: u64,
}

/// A segment to load, with `memory_size` bytes in memory.
pub(super) fn segment(address: u64, content: &[u8], memory_size: u64) -> Part {
    Part { kind: 1, address, content: content.to_vec(), memory_size }
}

/// A segment of notes.
pub(super) fn notes(content: Vec<u8>) -> Part {
    Part { kind: 4, address: 0, memory_size: content.len() as u64, content }
}

pub(super) fn note(kind: u32, name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, value.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    for part in [name, value] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

pub(super) fn pvh_note(entry: u32) -> Vec<u8> {
    note(18, b"Xen\0", &entry.to_le_bytes())
}

/// Offset of program header `index` in what [`elf`] makes.
pub(super) fn program_header(index: usize) -> usize {
    64 + 56 * index
}

/// An ELF64 executable for x86-64 (System V ABI): header, program headers, the parts' bytes one behind the other.
pub(super) fn elf(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64, 56, parts.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = program_header(parts.len()) as u64;
    for part in parts {
        file.extend(part.kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset, part.address, part.address, part.content.len() as u64, part.memory_size, 4] {
            file.extend(word.to_le_bytes());
        }
        offset += part.content.len() as u64;
    }
    for part in parts {
        file.extend(&part.content);
    }
    file
}

/// A kernel of one page at 1 MiB, entered at its beginning.
pub(super) fn plain_elf() -> Vec<u8> {
    elf(MIB, &[segment(MIB, &[0x90; 4096], 8192)])
}

/// The same with a PVH note whose entry is 16 bytes in.
pub(super) fn pvh_elf() -> Vec<u8> {
    elf(MIB, &[segment(MIB, &[0x90; 4096], 8192), notes(pvh_note(MIB as u32 + 16))])
}

/// Offsets in a bzImage (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
pub(super) mod header {
    pub(crate) const SETUP_SECTS: usize = 0x1f1;
    pub(crate) const SYSSIZE: usize = 0x1f4;
    pub(crate) const JUMP: usize = 0x200;
    pub(crate) const VERSION: usize = 0x206;
    pub(crate) const LOADFLAGS: usize = 0x211;
    pub(crate) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(crate) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(crate) const RELOCATABLE: usize = 0x234;
    pub(crate) const XLOADFLAGS: usize = 0x236;
    pub(crate) const CMDLINE_SIZE: usize = 0x238;
    pub(crate) const PAYLOAD_OFFSET: usize = 0x248;
    pub(crate) const PAYLOAD_LENGTH: usize = 0x24c;
    pub(crate) const PREF_ADDRESS: usize = 0x258;
    pub(crate) const INIT_SIZE: usize = 0x260;
}

pub(super) fn put(image: &mut [u8], at: usize, value: &[u8]) {
    image[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of protocol 2.15: 2 MiB at 4 MiB, `payload` in its protected-mode part from +0x1000 on.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let sectors = 3;
    let loaded = 0x1000 + payload.len().next_multiple_of(16);
    let mut image = vec![0; (sectors + 1) * 512];
    put(&mut image, header::SETUP_SECTS, &[sectors as u8]);
    put(&mut image, header::SYSSIZE, &(loaded as u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa]);
    put(&mut image, header::JUMP, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, header::VERSION, &0x020f_u16.to_le_bytes());
    put(&mut image, header::LOADFLAGS, &[1]);
    put(&mut image, header::INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, header::KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
    put(&mut image, header::RELOCATABLE, &[1]);
    put(&mut image, header::XLOADFLAGS, &3_u16.to_le_bytes());
    put(&mut image, header::CMDLINE_SIZE, &2047_u32.to_le_bytes());
    put(&mut image, header::PAYLOAD_OFFSET, &0x1000_u32.to_le_bytes());
    put(&mut image, header::PAYLOAD_LENGTH, &(payload.len() as u32).to_le_bytes());
    put(&mut image, header::PREF_ADDRESS, &(4 * MIB).to_le_bytes());
    put(&mut image, header::INIT_SIZE, &(2 * MIB as u32).to_le_bytes());
    let payload_at = image.len() + 0x1000;
    image.resize(image.len() + loaded, 0xcc);
    put(&mut image, payload_at, payload);
    image
}
