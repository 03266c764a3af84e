//! Boot page tables and descriptor tables.
//!
//! Six pages map the first 4 GiB one to one with 2 MiB pages, whatever the size of RAM: kernel, initrd,
//! `boot_params` and command line all lie there, and Linux builds its own tables at once.
//! (1 GiB pages would save four pages, but not every CPU and not every KVM has them.)

use vm_memory::GuestMemoryBackend;

use super::layout::{GDT, IDT, PAGE_SIZE, PAGE_TABLES};
use super::{BootError, write};

/// Selector of the code segment, `__BOOT_CS` of the Linux boot protocol.
pub const BOOT_CS: u16 = 0x10;
/// Selector of the data segments, `__BOOT_DS` of the Linux boot protocol.
pub const BOOT_DS: u16 = 0x18;
/// Descriptor: 64-bit code, execute and read, accessed.
pub const CODE64: u64 = 0x00af_9b00_0000_ffff;
/// Descriptor: 32-bit code, base 0, limit 4 GiB, execute and read, accessed.
pub const CODE32: u64 = 0x00cf_9b00_0000_ffff;
/// Descriptor: 32-bit data, base 0, limit 4 GiB, read and write, accessed.
pub const DATA: u64 = 0x00cf_9300_0000_ffff;
/// Number of descriptors in the GDT.
pub const GDT_ENTRIES: usize = 4;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = PAGE_SIZE / 8;
const DIRECTORIES: u64 = 4;

/// Writes PML4, PDPT and four page directories to [`PAGE_TABLES`].
pub(super) fn write_identity_map<M: GuestMemoryBackend>(memory: &M) -> Result<(), BootError> {
    let pdpt = PAGE_TABLES + PAGE_SIZE;
    let directories = pdpt + PAGE_SIZE;
    let pml4_entries = std::iter::once(pdpt | PRESENT_WRITABLE);
    let pdpt_entries = (0..DIRECTORIES).map(|n| (directories + n * PAGE_SIZE) | PRESENT_WRITABLE);
    let pages = (0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE_SIZE) | PRESENT_WRITABLE | LARGE_PAGE);

    // Whole tables are written: memory that is used anew holds what the last guest left there.
    let table = |entries: &mut dyn Iterator<Item = u64>, count: u64| -> Vec<u8> {
        entries.chain(std::iter::repeat(0)).take(count as usize).flat_map(u64::to_le_bytes).collect()
    };
    let mut bytes = table(&mut { pml4_entries }, ENTRIES);
    bytes.extend(table(&mut { pdpt_entries }, ENTRIES));
    bytes.extend(table(&mut { pages }, DIRECTORIES * ENTRIES));
    write(memory, "the boot page tables", PAGE_TABLES, &bytes)
}

/// Writes the GDT, with `code` as its code segment, and an empty IDT.
pub(super) fn write_descriptor_tables<M: GuestMemoryBackend>(memory: &M, code: u64) -> Result<(), BootError> {
    let descriptors: [u64; GDT_ENTRIES] = [0, 0, code, DATA];
    let bytes: Vec<u8> = descriptors.into_iter().flat_map(u64::to_le_bytes).collect();
    write(memory, "the GDT", GDT, &bytes)?;
    write(memory, "the IDT", IDT, &[0; 8])
}
