//! Guests of a few instructions, as ELF files made by hand: for what no well-behaved guest does.
//!
//! They are entered in long mode at CPL0 with the first 4 GiB identity-mapped, interrupts off and no IDT (see `guests::ports`).

use std::path::{Path, PathBuf};

/// Where their code lies: the first address that is a guest's own.
pub(crate) const CODE: u64 = 0x10_0000;

/// `mov dx, 0x600; mov al, 0x34; out dx, al; hlt; jmp` back to `hlt`: ACPI's S5.
pub(crate) const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// A segment to load.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) memory: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Segment {
    pub(crate) fn code(bytes: &[u8]) -> Self {
        Self { address: CODE, memory: bytes.len() as u64, bytes: bytes.to_vec() }
    }
}

/// An ELF64 executable for x86-64 that is entered at [`CODE`].
pub(crate) fn elf(segments: &[Segment]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&2_u16.to_le_bytes()); // executable
    put(&62_u16.to_le_bytes()); // x86-64
    put(&1_u32.to_le_bytes());
    put(&CODE.to_le_bytes());
    put(&(HEADER as u64).to_le_bytes());
    put(&[0; 12]); // no sections, no flags
    put(&(HEADER as u16).to_le_bytes());
    put(&(PROGRAM_HEADER as u16).to_le_bytes());
    put(&u16::try_from(segments.len()).expect("few segments").to_le_bytes());
    put(&[0; 6]);
    let mut offset = (HEADER + PROGRAM_HEADER * segments.len()) as u64;
    for Segment { address, memory, bytes } in segments {
        put(&1_u32.to_le_bytes()); // to load
        put(&7_u32.to_le_bytes()); // readable, writable, executable
        for field in [offset, *address, *address, bytes.len() as u64, *memory, 1] {
            put(&field.to_le_bytes());
        }
        offset += bytes.len() as u64;
    }
    segments.iter().for_each(|segment| put(&segment.bytes));
    file
}

/// Writes an ELF of this code to `directory`; the path, as an argument.
pub(crate) fn guest(directory: &Path, name: &str, code: &[u8]) -> String {
    write(directory, name, &elf(&[Segment::code(code)]))
}

/// Writes a file to `directory`; the path, as an argument.
pub(crate) fn write(directory: &Path, name: &str, bytes: &[u8]) -> String {
    let path: PathBuf = directory.join(name);
    std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path.to_str().expect("a path of plain text").to_owned()
}

/// Shows whether the byte at 4 MiB is zero, as `0` or another character; makes it 1; powers off.
pub(crate) fn remembers() -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc3, 0, 0, 0x40, 0]; // mov rbx, 4 << 20
    code.extend([0x8a, 0x03]); // mov al, [rbx]
    code.extend([0x04, b'0']); // add al, '0'
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]); // mov dx, 0x3f8; out dx, al
    code.extend([0xc6, 0x03, 1]); // mov byte [rbx], 1
    code.extend(POWER_OFF);
    code
}

/// Writes `block` to the serial port `times` times, as fast as it goes; powers off.
pub(crate) fn writes(block: &[u8], times: u32) -> Vec<u8> {
    let length = u32::try_from(block.len()).expect("a short block");
    let mut code = vec![0xbd]; // mov ebp, times
    code.extend(times.to_le_bytes());
    let again = code.len();
    code.push(0xbe); // mov esi, block
    let address = code.len();
    code.extend([0; 4]);
    code.push(0xb9); // mov ecx, length
    code.extend(length.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xf3, 0x6e]); // rep outsb
    code.extend([0xff, 0xcd]); // dec ebp
    code.extend([0x75, 0]); // jnz again
    let end = code.len();
    code[end - 1] = 0_u8.wrapping_sub(u8::try_from(end - again).expect("a short loop"));
    code.extend(POWER_OFF);
    let block_at = u32::try_from(CODE).expect("below 4 GiB") + u32::try_from(code.len()).expect("short code");
    code[address..address + 4].copy_from_slice(&block_at.to_le_bytes());
    code.extend(block);
    code
}

/// `mov rax, value`.
fn load_rax(value: u64) -> Vec<u8> {
    [&[0x48, 0xb8][..], &value.to_le_bytes()].concat()
}

/// The next of Knuth's MMIX random numbers in rdi; its upper half in eax.
fn next_random() -> Vec<u8> {
    let mut code = load_rax(6_364_136_223_846_793_005);
    code.extend([0x48, 0x0f, 0xaf, 0xf8]); // imul rdi, rax
    code.extend(load_rax(1_442_695_040_888_963_407));
    code.extend([0x48, 0x01, 0xc7]); // add rdi, rax
    code.extend([0x48, 0x89, 0xf8]); // mov rax, rdi
    code.extend([0x48, 0xc1, 0xe8, 0x20]); // shr rax, 32
    code
}

/// Writes a random byte to every port from 0 to 0xffff but `spared`; then `k` to the serial port, and powers off.
pub(crate) fn writes_every_port(seed: u64, spared: &[u16]) -> Vec<u8> {
    let mut code = [&[0x48, 0xbf][..], &seed.to_le_bytes()].concat(); // mov rdi, seed
    code.extend([0x31, 0xf6]); // xor esi, esi
    let again = code.len();
    code.extend(next_random());
    code.extend([0x89, 0xf2]); // mov edx, esi
    for (index, port) in spared.iter().enumerate() {
        code.extend([0x81, 0xfe]); // cmp esi, port
        code.extend(u32::from(*port).to_le_bytes());
        let behind = (spared.len() - index - 1) * 8 + 1;
        code.extend([0x74, u8::try_from(behind).expect("few ports")]); // je behind the out
    }
    code.push(0xee); // out dx, al
    code.extend([0xff, 0xc6]); // inc esi
    code.extend([0x81, 0xfe, 0, 0, 1, 0]); // cmp esi, 0x10000
    code.extend([0x0f, 0x85]); // jne again
    let distance = i32::try_from(again).expect("short") - i32::try_from(code.len() + 4).expect("short");
    code.extend(distance.to_le_bytes());
    // Line and modem control as they were: no divisor latch, no loopback.
    code.extend([0x66, 0xba, 0xfb, 0x03, 0xb0, 3, 0xee, 0x66, 0xba, 0xfc, 0x03, 0xb0, 0, 0xee]);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee]);
    code.extend(POWER_OFF);
    code
}

/// Reads and writes random ports with random values, in all widths, for ever, or until one of them ends the machine.
pub(crate) fn pokes_at_random(seed: u64) -> Vec<u8> {
    let mut code = [&[0x48, 0xbf][..], &seed.to_le_bytes()].concat(); // mov rdi, seed
    let again = code.len();
    for access in [&[0xee][..], &[0x66, 0xef], &[0xef], &[0xec], &[0x66, 0xed], &[0xed]] {
        code.extend(next_random());
        code.extend([0x89, 0xc2]); // mov edx, eax: its lower half is the port
        code.extend([0xc1, 0xe8, 0x10]); // shr eax, 16: the rest is the value
        code.extend(access);
    }
    code.push(0xe9); // jmp again
    let distance = i32::try_from(again).expect("short") - i32::try_from(code.len() + 4).expect("short");
    code.extend(distance.to_le_bytes());
    code
}
