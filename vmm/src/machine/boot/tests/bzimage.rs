//! bzImage kernels, sound and bad.

use super::super::{EntryProtocol, load};
use super::fixtures::*;

#[test]
fn the_protected_mode_part_is_loaded_and_entered_at_0x200() {
    let image = bzimage(b"compressed kernel");
    let memory = memory(16, 0);
    let entry = load(&memory, &spec(&image, 16 * MIB)).unwrap();
    assert_eq!(entry.rip, 4 * MIB + 0x200);
    assert!(matches!(entry.protocol, EntryProtocol::Linux64 { .. }));
    assert_eq!(bytes(&memory, 4 * MIB, image.len() - 2048), image[2048..]);
}

#[test]
fn the_setup_header_reaches_boot_params_up_to_its_own_end() {
    let mut image = bzimage(b"kernel");
    // 0x20c: the boot loader's part is ours; 0x240: anything of the kernel's; behind the header: code.
    put(&mut image, 0x240, &[1, 2, 3, 4, 5, 6, 7, 8]);
    put(&mut image, 0x26c, &[0xcc; 0x24]);
    let memory = memory(16, 16 * MIB);
    load(&memory, &spec(&image, 16 * MIB)).unwrap();
    assert_eq!(bytes(&memory, 0x7000 + 0x202, 4), *b"HdrS");
    assert_eq!(u16_at(&memory, 0x7000 + 0x206), 0x020f);
    assert_eq!(bytes(&memory, 0x7000 + 0x240, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(bytes(&memory, 0x7000 + 0x26c, 0x24), [0; 0x24]);
    assert_eq!(u32_at(&memory, 0x7000 + 0x214), 4 * MIB as u32, "code32_start");
}

#[test]
fn an_unaligned_preferred_address_is_rounded_up_if_the_kernel_can_be_moved() {
    let mut image = bzimage(b"kernel");
    put(&mut image, header::PREF_ADDRESS, &(4 * MIB + 1).to_le_bytes());
    assert_eq!(boot(&image, 16).unwrap().rip, 6 * MIB + 0x200);
    put(&mut image, header::RELOCATABLE, &[0]);
    assert_eq!(boot(&image, 16).unwrap().rip, 4 * MIB + 1 + 0x200);
}

#[test]
fn a_kernel_that_prefers_low_memory_is_moved_up_or_refused() {
    let mut image = bzimage(b"kernel");
    put(&mut image, header::PREF_ADDRESS, &0_u64.to_le_bytes());
    assert_eq!(boot(&image, 16).unwrap().rip, 2 * MIB + 0x200);
    put(&mut image, header::RELOCATABLE, &[0]);
    assert!(complaint(&image, 16).contains("must be loaded at 0x0, below 1 MiB"));
}

#[test]
fn room_to_unpack_counts_as_kernel() {
    let message = complaint(&bzimage(b"kernel"), 5);
    assert!(message.ends_with("needs at least 6 MiB, the guest has 5: use --memory 6M"), "{message}");
    boot(&bzimage(b"kernel"), 6).unwrap();
    // The file itself may be the larger one.
    let message = complaint(&bzimage(&vec![0; 3 * MIB as usize]), 6);
    assert!(message.contains("needs at least 8 MiB"), "{message}");
}

#[test]
fn a_bad_header_is_refused() {
    for (at, value, says) in [
        (header::VERSION, &[0x0b, 2][..], "boot protocol 2.11, at least 2.12 is needed"),
        (header::VERSION, &[0, 0], "boot protocol 0.00"),
        (header::LOADFLAGS, &[0], "a zImage"),
        (header::XLOADFLAGS, &[2], "no 64-bit entry point"),
        (header::JUMP, &[0xeb, 0], "setup header ends at 0x202"),
        (header::JUMP, &[0xeb, 0x50], "setup header ends at 0x252"),
        (header::SETUP_SECTS, &[255], "it is truncated"),
        (header::SYSSIZE, &[0xff; 4], "it is truncated"),
        (header::PAYLOAD_OFFSET, &[0xff; 4], "exceeds the loaded part"),
        (header::PAYLOAD_LENGTH, &[0xff; 4], "exceeds the loaded part"),
        (header::KERNEL_ALIGNMENT, &[0; 4], "not a power of two"),
        (header::KERNEL_ALIGNMENT, &[3, 0, 0, 0], "not a power of two"),
        (header::PREF_ADDRESS, &[0xff; 8], "must lie below 3 GiB"),
        (header::PREF_ADDRESS, &[0, 0, 0, 0xc0, 0, 0, 0, 0], "must lie below 3 GiB"),
        (header::INIT_SIZE, &[0xff; 4], "must lie below 3 GiB"),
    ] {
        let mut image = bzimage(b"kernel");
        put(&mut image, at, value);
        let message = complaint(&image, 16);
        assert!(message.contains(says), "{at:#x}: {message}");
    }
}

#[test]
fn a_truncated_bzimage_is_refused_wherever_it_ends() {
    let image = bzimage(b"kernel");
    for length in 0..image.len() {
        load(&memory(8, 0), &spec(&image[..length], 8 * MIB)).unwrap_err();
    }
    assert!(complaint(&image[..image.len() - 1], 8).contains("it is truncated, copy it again"));
}

#[test]
fn the_kernel_limits_its_command_line() {
    let mut image = bzimage(b"kernel");
    put(&mut image, header::CMDLINE_SIZE, &100_u32.to_le_bytes());
    let exact = "x".repeat(100);
    let mut spec = spec(&image, 16 * MIB);
    spec.cmdline = &exact;
    load(&memory(16, 0), &spec).unwrap();
    let longer = "x".repeat(101);
    spec.cmdline = &longer;
    let message = load(&memory(16, 0), &spec).unwrap_err().to_string();
    assert_eq!(message, "the kernel command line has 101 bytes, made-up takes at most 100: shorten --cmdline");
}

#[test]
fn a_kernel_that_boasts_of_its_command_line_does_not_get_beyond_our_area() {
    let mut image = bzimage(b"kernel");
    put(&mut image, header::CMDLINE_SIZE, &[0xff; 4]);
    let mut spec = spec(&image, 16 * MIB);
    let largest = "x".repeat(0xffff);
    spec.cmdline = &largest;
    let memory = memory(16, 16 * MIB);
    load(&memory, &spec).unwrap();
    assert_eq!(bytes(&memory, 0x2_fffe, 3), [b'x', 0, STALE]);
    let longer = "x".repeat(0x1_0000);
    spec.cmdline = &longer;
    load(&memory, &spec).unwrap_err();
}
