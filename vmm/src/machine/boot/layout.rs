//! Where things lie in the guest's physical address space.
//!
//! ```text
//!   0x0000_0500  GDT (4 descriptors), IDT behind it (empty)
//!   0x0000_6000  PVH start info, module list, memory map
//!   0x0000_7000  boot_params, the Linux "zero page"
//!   0x0000_8000  left free: a page for an AP trampoline
//!   0x0000_9000  boot page tables (6 pages)
//!   0x0002_0000  kernel command line
//!   0x0009_fc00  end of conventional memory (EBDA, VGA hole)
//!   0x000e_0000  ACPI tables, the RSDP first
//!   0x000f_f000  VM generation ID
//!   0x000f_fff0  where a BIOS would begin: code that resets the machine
//!   0x0010_0000  kernel; initrd at the top of low RAM
//!   0xc000_0000  gap: MMIO, APICs, KVM's own pages
//! 0x1_0000_0000  the rest of RAM
//!                behind it, each at a multiple of 1 GiB: persistent memory
//! ```

use std::ops::Range;

/// Page size, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Global descriptor table; four descriptors, so it ends where [`IDT`] begins.
pub const GDT: u64 = 0x500;
/// Interrupt descriptor table: one empty gate; an early exception is a triple fault.
pub const IDT: u64 = 0x520;
/// PVH `hvm_start_info`; one page that also holds the module list and the memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux `boot_params` ("zero page"), one page.
pub const BOOT_PARAMS: u64 = 0x7000;
/// A page below 1 MiB that nothing of ours uses, for a guest's AP trampoline.
pub const AP_TRAMPOLINE: u64 = 0x8000;
/// Boot page tables: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, its NUL included, in bytes.
pub const CMDLINE_CAPACITY: u64 = 0x1_0000;
/// End of conventional memory, as the e820 map says it.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first. Linux searches this area for an RSDP as well.
pub const ACPI_START: u64 = 0xe_0000;
/// First byte behind the area for ACPI tables.
pub const ACPI_END: u64 = 0xf_f000;
/// The VM generation ID, 16 bytes in a page that the memory map reserves.
pub const VM_GENERATION_ID: u64 = 0xf_f000;
/// Where a BIOS has its entry, 0xf000:0xfff0 in real mode; see [`RESET_CODE`](super::RESET_CODE).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where a kernel may begin: everything below 1 MiB is ours or the platform's.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// First byte of the gap in RAM below 4 GiB.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// First byte behind the gap: 4 GiB.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;
/// First virtio-mmio window.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// I/O APIC registers, where KVM's in-kernel one is.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers, where KVM's in-kernel one is.
pub const LAPIC: u32 = 0xfee0_0000;
/// The page that KVM on Intel needs for identity-mapped real mode (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages that KVM on Intel needs for a TSS (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Guest-physical ranges of `size` bytes of RAM: below the 32-bit gap, and, if it does not fit there, from 4 GiB on.
///
/// The two ranges together hold exactly `size` bytes unless that exceeds the address space,
/// where the second range ends at its end.
#[must_use]
pub fn ram_ranges(size: u64) -> (Range<u64>, Option<Range<u64>>) {
    let low = 0..size.min(MMIO_GAP_START);
    let rest = size - low.end;
    let high = (rest > 0).then(|| MMIO_GAP_END..MMIO_GAP_END.saturating_add(rest));
    (low, high)
}

/// What persistent memory is aligned to: every page size of the CPU's and every section of Linux's fits.
const PMEM_ALIGNMENT: u64 = 1 << 30;

/// Guest-physical ranges of persistent memory of `sizes` bytes each, behind `ram` bytes of RAM: ascending, none in the memory map.
/// `None`: they do not fit into the address space.
pub fn pmem_ranges(ram: u64, sizes: impl IntoIterator<Item = u64>) -> Option<Vec<Range<u64>>> {
    let (_, high) = ram_ranges(ram);
    let mut end = high.map_or(MMIO_GAP_END, |high| high.end);
    let place = |size| {
        let start = end.checked_next_multiple_of(PMEM_ALIGNMENT)?;
        end = start.checked_add(size)?;
        Some(start..end)
    };
    sizes.into_iter().map(place).collect()
}

/// `bytes` in MiB, rounded up: what to say to somebody who has to choose a memory size.
pub(super) fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_up_to_three_gibibytes_is_one_range() {
        assert_eq!(ram_ranges(128 << 20), (0..128 << 20, None));
        assert_eq!(ram_ranges(3 << 30), (0..3 << 30, None));
    }

    #[test]
    fn ram_beyond_the_gap_continues_at_four_gibibytes() {
        let (low, high) = ram_ranges((3 << 30) + 4096);
        assert_eq!((low, high), (0..3 << 30, Some(4 << 30..(4 << 30) + 4096)));
        let (low, high) = ram_ranges(8 << 30);
        assert_eq!((low, high), (0..3 << 30, Some(4 << 30..9 << 30)));
    }

    #[test]
    fn an_impossible_size_does_not_wrap_around() {
        assert_eq!(ram_ranges(u64::MAX).1, Some(4 << 30..u64::MAX));
    }

    #[test]
    fn persistent_memory_lies_behind_ram_and_the_gap_and_overlaps_nothing() {
        assert_eq!(pmem_ranges(1 << 20, []), Some(vec![]));
        let (small, large) = (2 << 20, 3 << 30);
        let expected = vec![4 << 30..(4 << 30) + small, 5 << 30..(5 << 30) + large, 8 << 30..(8 << 30) + small];
        assert_eq!(pmem_ranges(3 << 30, [small, large, small]), Some(expected));
        let ranges = pmem_ranges((4 << 30) + 4096, [small, small]);
        let expected = vec![6 << 30..(6 << 30) + small, 7 << 30..(7 << 30) + small];
        assert_eq!(ranges, Some(expected), "RAM ends a page behind 5 GiB");
        assert_eq!(pmem_ranges(u64::MAX, [small]), None);
        assert_eq!(pmem_ranges(0, [1 << 62, u64::MAX]), None);
    }

    #[test]
    fn areas_in_low_memory_do_not_overlap() {
        let areas = [
            (GDT, 32),
            (IDT, 8),
            (PVH_START_INFO, PAGE_SIZE),
            (BOOT_PARAMS, PAGE_SIZE),
            (AP_TRAMPOLINE, PAGE_SIZE),
            (PAGE_TABLES, 6 * PAGE_SIZE),
            (CMDLINE, CMDLINE_CAPACITY),
            (EBDA_START, 0),
            (ACPI_START, ACPI_END - ACPI_START),
            (VM_GENERATION_ID, 16),
            (RESET_VECTOR, 16),
            (HIGH_RAM_START, 0),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
