//! What a kernel finds: boot_params, PVH start info, command line, initrd, page tables, descriptors.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::{RESET_CODE, load};
use super::fixtures::*;

/// e820 entries of `boot_params` (zero-page.rst): count at 0x1e8, 20 bytes each from 0x2d0.
fn e820(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let count = u64::from(bytes(memory, 0x7000 + 0x1e8, 1)[0]);
    let entry = |n: u64| 0x7000 + 0x2d0 + n * 20;
    let read = |at| (u64_at(memory, at), u64_at(memory, at + 8), u32_at(memory, at + 16));
    (0..count).map(|n| read(entry(n))).collect()
}

#[test]
fn linux_finds_its_zero_page() {
    let memory = memory(64, MIB);
    let image = plain_elf();
    let initrd = file_with(&[0x77; 5000]);
    let mut spec = spec(&image, 64 * MIB);
    spec.initrd = Some((&initrd, made_up_path()));
    load(&memory, &spec).unwrap();

    assert_eq!(u64_at(&memory, 0x7070), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(bytes(&memory, 0x71ef, 1), [0], "sentinel");
    assert_eq!(u16_at(&memory, 0x71fe), 0xaa55, "boot_flag");
    assert_eq!(bytes(&memory, 0x7202, 4), *b"HdrS");
    assert_eq!(bytes(&memory, 0x7210, 1), [0xff], "type_of_loader");
    assert_eq!(u32_at(&memory, 0x7228), 0x2_0000, "cmd_line_ptr");
    assert_eq!(bytes(&memory, 0x2_0000, 14), *b"console=ttyS0\0");
    let (start, size) = (u32_at(&memory, 0x7218), u32_at(&memory, 0x721c));
    assert_eq!((u64::from(start), size), (64 * MIB - 8192, 5000), "ramdisk_image, ramdisk_size");
    assert_eq!(bytes(&memory, u64::from(start), 5000), [0x77; 5000]);
    assert_eq!(
        e820(&memory),
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0xe_0000, 0x2_0000, 2),
            (0x10_0000, 63 * MIB, 1),
            (0xfffb_c000, 0x4_4000, 2)
        ]
    );
}

#[test]
fn without_an_initrd_none_is_announced() {
    let memory = memory(16, MIB);
    load(&memory, &spec(&plain_elf(), 16 * MIB)).unwrap();
    assert_eq!((u32_at(&memory, 0x7218), u32_at(&memory, 0x721c)), (0, 0));
    load(&memory, &spec(&pvh_elf(), 16 * MIB)).unwrap();
    assert_eq!((u32_at(&memory, 0x600c), u64_at(&memory, 0x6010)), (0, 0), "nr_modules, modlist_paddr");
}

#[test]
fn ram_above_the_gap_is_in_the_map() {
    let low = (GuestAddress(0), 3 << 30);
    let memory = GuestMemoryMmap::from_ranges(&[low, (GuestAddress(4 << 30), 16 * MIB as usize)]).unwrap();
    load(&memory, &spec(&plain_elf(), (3 << 30) + 16 * MIB)).unwrap();
    let map = e820(&memory);
    assert_eq!(map[3], (MIB, (3 << 30) - MIB, 1));
    assert_eq!(map[5], (4 << 30, 16 * MIB, 1));
}

#[test]
fn pvh_finds_its_start_info() {
    let memory = memory(64, MIB);
    let image = pvh_elf();
    let initrd = file_with(&[0x77; 5000]);
    let mut spec = spec(&image, 64 * MIB);
    spec.initrd = Some((&initrd, made_up_path()));
    load(&memory, &spec).unwrap();

    assert_eq!(u32_at(&memory, 0x6000), 0x336e_c578, "magic");
    assert_eq!(u32_at(&memory, 0x6004), 1, "version");
    assert_eq!(u32_at(&memory, 0x600c), 1, "nr_modules");
    let module = u64_at(&memory, 0x6010);
    assert_eq!((u64_at(&memory, module), u64_at(&memory, module + 8)), (64 * MIB - 8192, 5000));
    let cmdline = u64_at(&memory, 0x6018);
    assert_eq!(bytes(&memory, cmdline, 14), *b"console=ttyS0\0");
    assert_eq!(u64_at(&memory, 0x6020), 0xe_0000, "rsdp_paddr");
    let (map, count) = (u64_at(&memory, 0x6028), u32_at(&memory, 0x6030));
    assert_eq!(count, 5);
    let entry = map + 3 * 24;
    assert_eq!((u64_at(&memory, entry), u64_at(&memory, entry + 8)), (MIB, 63 * MIB));
    assert_eq!(u32_at(&memory, entry + 16), 1);
    let code = u64_at(&memory, 0x510);
    assert_eq!((code >> 53 & 1, code >> 54 & 1), (0, 1), "L clear, D set: a 32-bit code segment");
}

#[test]
fn page_tables_map_the_first_four_gibibytes_one_to_one_and_nothing_else() {
    let memory = memory(16, MIB);
    load(&memory, &spec(&plain_elf(), 16 * MIB)).unwrap();
    // A walk as the processor does it, for 2 MiB pages.
    let walk = |address: u64| {
        let entry = |table: u64, shift: u32| u64_at(&memory, table + ((address >> shift) & 511) * 8);
        let mut table = 0x9000;
        for shift in [39, 30] {
            let next = entry(table, shift);
            if next & 1 == 0 {
                return None;
            }
            table = next & 0x000f_ffff_ffff_f000;
        }
        let page = entry(table, 21);
        (page & 0x83 == 0x83).then_some((page & 0x000f_ffff_ffe0_0000) | (address & 0x1f_ffff))
    };
    for address in (0..4_u64 << 30).step_by(0x1f_f123) {
        assert_eq!(walk(address), Some(address), "{address:#x}");
    }
    for address in [4 << 30, 5 << 30, 511 << 30, 1 << 39, 255 << 39, 511 << 39] {
        assert_eq!(walk(address), None, "{address:#x}");
    }
}

#[test]
fn descriptors_are_flat_and_the_code_segment_is_64_bit() {
    let memory = memory(16, MIB);
    load(&memory, &spec(&plain_elf(), 16 * MIB)).unwrap();
    assert_eq!((u64_at(&memory, 0x500), u64_at(&memory, 0x508)), (0, 0));
    let (code, data) = (u64_at(&memory, 0x510), u64_at(&memory, 0x518));
    assert_eq!((code >> 40 & 0xff, code >> 53 & 1, code >> 54 & 1), (0x9b, 1, 0), "access, L, D");
    assert_eq!(data >> 40 & 0xff, 0x93);
    assert_eq!(u64_at(&memory, 0x520), 0, "IDT");
}

#[test]
fn a_jump_to_the_bios_entry_finds_the_reset_code() {
    let memory = memory(16, MIB);
    load(&memory, &spec(&plain_elf(), 16 * MIB)).unwrap();
    assert_eq!(bytes(&memory, 0xf_fff0, 10), RESET_CODE);
}

#[test]
fn the_trampoline_page_is_left_alone() {
    let memory = memory(16, MIB);
    load(&memory, &spec(&plain_elf(), 16 * MIB)).unwrap();
    assert_eq!(bytes(&memory, 0x8000, 4096), [STALE; 4096]);
}

#[test]
fn a_nul_in_the_command_line_is_refused() {
    let image = plain_elf();
    let mut spec = spec(&image, 16 * MIB);
    spec.cmdline = "quiet\0init=/bin/sh";
    let message = load(&memory(16, 0), &spec).unwrap_err().to_string();
    assert!(message.contains("NUL character at byte 5"), "{message}");
}

#[test]
fn memory_that_is_too_small_or_not_there_is_refused() {
    let image = plain_elf();
    let small = load(&memory(1, 0), &spec(&image, MIB)).unwrap_err().to_string();
    assert!(small.contains("more than 1 MiB: use --memory"), "{small}");
    let absent = load(&memory(16, 0), &spec(&image, 17 * MIB)).unwrap_err().to_string();
    assert!(absent.contains("guest memory does not cover it"), "{absent}");
    load(&memory(16, 0), &spec(&image, u64::MAX)).unwrap_err();
}

#[test]
fn a_bad_initrd_is_refused() {
    let image = plain_elf();
    let complain = |file: &std::fs::File, image: &[u8], mebibytes: u64| {
        let mut spec = spec(image, mebibytes * MIB);
        spec.initrd = Some((file, made_up_path()));
        full_message(&load(&memory(mebibytes, 0), &spec).unwrap_err())
    };
    assert!(complain(&file_with(b""), &image, 8).starts_with("initrd made-up.img is empty"));
    let directory = std::fs::File::open("/").unwrap();
    assert!(complain(&directory, &image, 8).contains("not a regular file"));
    // The kernel ends at 1 MiB + 8 KiB.
    let file = file_with(b"");
    file.set_len(7 * MIB).unwrap();
    let message = complain(&file, &image, 8);
    assert!(message.contains("of 7 MiB does not fit beside the kernel: at least 9 MiB"), "{message}");
    // A hole of 1 TiB is no reason to read.
    file.set_len(1 << 40).unwrap();
    assert!(complain(&file, &image, 8).contains("use a smaller one"));
    let mut low = bzimage(b"kernel");
    put(&mut low, header::INITRD_ADDR_MAX, &(7 * MIB as u32 - 1).to_le_bytes());
    file.set_len(MIB + 1).unwrap();
    let message = complain(&file, &low, 16);
    assert!(message.contains("between the kernel's end at 0x600000 and 0x700000"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_initrd_lies_as_high_as_it_may_and_clear_of_the_kernel(
        size in 1_u64..(6 * MIB), limit in (6 * MIB)..(20 * MIB), mebibytes in 6_u64..16,
    ) {
        let mut image = bzimage(b"kernel");
        put(&mut image, header::INITRD_ADDR_MAX, &(limit as u32).to_le_bytes());
        let file = file_with(b"");
        file.set_len(size).unwrap();
        let mut spec = spec(&image, mebibytes * MIB);
        spec.initrd = Some((&file, made_up_path()));
        let memory = memory(mebibytes, 0);
        let result = load(&memory, &spec);

        let end = (limit + 1).min(mebibytes * MIB);
        let highest = (6 * MIB..end).step_by(4096).filter(|start| start + size <= end).last();
        prop_assert_eq!(result.is_ok(), highest.is_some());
        if let Some(start) = highest {
            prop_assert_eq!(u64::from(memory.read_obj::<u32>(GuestAddress(0x7218)).unwrap()), start);
            prop_assert_eq!(u64::from(memory.read_obj::<u32>(GuestAddress(0x721c)).unwrap()), size);
        }
    }
}
