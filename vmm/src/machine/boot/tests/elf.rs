//! ELF kernels, sound and bad.

use proptest::prelude::*;

use super::super::{EntryProtocol, KernelSource, load};
use super::fixtures::*;

#[test]
fn a_plain_elf_is_entered_in_long_mode_at_its_entry_point() {
    let entry = boot(&plain_elf(), 16).unwrap();
    assert_eq!(entry.rip, MIB);
    let expected = EntryProtocol::Linux64 { boot_params: 0x7000, page_tables: 0x9000, gdt: 0x500, idt: 0x520 };
    assert_eq!(entry.protocol, expected);
}

#[test]
fn a_pvh_note_is_preferred_to_the_entry_point() {
    let entry = boot(&pvh_elf(), 16).unwrap();
    assert_eq!(entry.rip, MIB + 16);
    assert_eq!(entry.protocol, EntryProtocol::Pvh { start_info: 0x6000, gdt: 0x500, idt: 0x520 });
}

#[test]
fn the_pvh_note_is_found_among_others_and_in_a_later_segment() {
    let mut second = note(18, b"GNU\0", &[1; 20]);
    second.extend(note(3, b"odd", &[2; 5]));
    second.extend(note(18, b"Xen\0", &(MIB + 32).to_le_bytes()));
    let image = elf(MIB, &[notes(note(1, b"Linux\0", &[0; 4])), segment(MIB, &[0x90; 64], 64), notes(second)]);
    assert_eq!(boot(&image, 16).unwrap().rip, MIB + 32);
}

#[test]
fn segments_lie_at_their_physical_addresses_and_bss_is_cleared_of_what_was_there() {
    let image = elf(2 * MIB, &[segment(3 * MIB, b"data", 0x2_0001), segment(2 * MIB, b"text", 4)]);
    let memory = memory(8, 8 * MIB);
    load(&memory, &spec(&image, 8 * MIB)).unwrap();
    assert_eq!(bytes(&memory, 2 * MIB, 5), [b't', b'e', b'x', b't', STALE]);
    let data = bytes(&memory, 3 * MIB, 0x2_0002);
    assert_eq!(data[..4], *b"data");
    assert!(data[4..0x2_0001].iter().all(|byte| *byte == 0));
    assert_eq!(data[0x2_0001], STALE);
}

#[test]
fn a_file_loads_as_the_same_image_in_memory_does() {
    let image = elf(MIB, &[segment(MIB, &[7; 100_000], 100_000)]);
    let memory = memory(8, 0);
    let file = file_with(&image);
    let mut spec = spec(&[], 8 * MIB);
    spec.kernel = KernelSource::File(&file, made_up_path());
    load(&memory, &spec).unwrap();
    assert_eq!(bytes(&memory, MIB, 100_000), [7; 100_000]);
}

#[test]
fn what_is_no_kernel_is_named() {
    for (content, says) in [
        (&b""[..], "it is empty"),
        (b"\x1f\x8b\x08 gzip", "gunzip"),
        (b"070701", "--initrd"),
        (b"#!/bin/sh", "a script"),
        (&[b'x'; 2000], "no known format"),
    ] {
        let message = complaint(content, 8);
        assert!(message.contains("made-up") && message.contains(says), "{message}");
    }
    let directory = std::fs::File::open("/").unwrap();
    let mut spec = spec(&[], 8 * MIB);
    spec.kernel = KernelSource::File(&directory, "/".as_ref());
    let error = load(&memory(8, 0), &spec).unwrap_err();
    assert_eq!(error.to_string(), "kernel / is not a regular file: give the path of an ELF or bzImage kernel");
}

#[test]
fn an_elf_of_another_kind_is_refused() {
    for (at, value, says) in [
        (4, &[1_u8][..], "32-bit"),
        (5, &[2], "big-endian"),
        (18, &[183], "machine 183"),
        (16, &[1], "ELF type 1"),
        (54, &[55], "program headers of 55 bytes"),
        (56, &[0xff, 0xff], "truncated or damaged"),
        (32, &[0xff; 8], "truncated or damaged"),
        (56, &[0, 0], "no segment"),
    ] {
        let mut image = plain_elf();
        put(&mut image, at, value);
        let message = complaint(&image, 8);
        assert!(message.contains(says), "{at}: {message}");
    }
}

#[test]
fn a_truncated_elf_is_refused_wherever_it_ends() {
    let image = pvh_elf();
    for length in 0..image.len() {
        // Nothing of it may have been loaded by then.
        let memory = memory(8, 0);
        load(&memory, &spec(&image[..length], 8 * MIB)).unwrap_err();
        assert_eq!(bytes(&memory, MIB, 4096), [0; 4096], "cut at {length}");
    }
    assert!(complaint(&image[..40], 8).contains("ends within its ELF header"));
    assert!(complaint(&image[..200], 8).contains("segment 0 has 4096 bytes at offset"));
}

#[test]
fn a_bad_segment_is_refused() {
    let code = || segment(2 * MIB, &[0x90; 64], 4096);
    for (parts, says) in [
        (vec![code(), segment(2 * MIB + 4095, b"x", 1)], "segments 0 and 1 overlap at physical address 0x200fff"),
        (vec![code(), segment(MIB, b"x", MIB + 1)], "segments 1 and 0 overlap"),
        (vec![code(), segment(u64::MAX - 3, b"x", 8)], "exceeds the address space"),
        (vec![code(), segment(0x9000, b"x", 1)], "segment 1 is linked to physical address 0x9000"),
        (vec![code(), segment(MIB - 1, b"x", 1)], "below 1 MiB"),
        (vec![code(), segment(3 * MIB, b"xyz", 2)], "3 bytes in the file but 2 in memory"),
        (vec![code(), segment(3 << 30, b"x", 1)], "must lie below 3 GiB"),
        (vec![segment(MIB, &[0x90; 64], 64)], "entry point 0x200000 lies in no segment"),
        (vec![segment(2 * MIB, b"", 64)], "entry point 0x200000 lies in no segment"),
    ] {
        let message = complaint(&elf(2 * MIB, &parts), 8);
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn a_kernel_larger_than_ram_says_how_much_it_needs() {
    let image = elf(2 * MIB, &[segment(2 * MIB, b"x", 7 * MIB + 1)]);
    let message = complaint(&image, 8);
    assert!(message.ends_with("needs at least 10 MiB, the guest has 8: use --memory 10M"), "{message}");
    boot(&image, 10).unwrap();
}

#[test]
fn a_kernel_may_fill_ram_to_its_last_byte_and_no_further() {
    boot(&elf(MIB, &[segment(MIB, b"x", 7 * MIB)]), 8).unwrap();
    assert!(complaint(&elf(MIB, &[segment(MIB, b"x", 7 * MIB + 1)]), 8).contains("needs at least 9 MiB"));
}

#[test]
fn notes_that_lie_are_refused() {
    let with_notes = |content: Vec<u8>| elf(MIB, &[segment(MIB, &[0x90; 64], 64), notes(content)]);
    let mut long_name = note(1, b"Linux\0", b"");
    put(&mut long_name, 0, &u32::MAX.to_le_bytes());
    let mut long_value = note(1, b"Linux\0", b"abcd");
    put(&mut long_value, 4, &u32::MAX.to_le_bytes());
    for content in [long_name, long_value, note(18, b"Xen\0", &[1, 2, 3])] {
        let message = complaint(&with_notes(content), 8);
        assert!(message.contains("larger than its segment"), "{message}");
    }
    let message = complaint(&with_notes(pvh_note(0x9000)), 8);
    assert!(message.contains("entry point 0x9000 lies in no segment"), "{message}");
    let message = complaint(&with_notes(vec![0; (MIB + 12) as usize]), 8);
    assert!(message.contains("notes take more than 1 MiB"), "{message}");
}

/// Addresses and sizes around all the limits.
fn edge() -> impl Strategy<Value = u64> {
    let corners = [0, 0x9000, MIB, 2 * MIB, 8 * MIB, 3 << 30, 4 << 30, u64::MAX];
    (proptest::sample::select(corners.to_vec()), -2_i64..3).prop_map(|(corner, off)| corner.wrapping_add_signed(off))
}

proptest! {
    /// The reference decides in 128 bits, where nothing overflows, and pair by pair.
    #[test]
    fn segments_are_accepted_exactly_when_they_are_apart_and_in_ram(
        parts in proptest::collection::vec((edge(), 0_usize..5, edge()), 1..5),
    ) {
        let parts: Vec<Part> = parts
            .into_iter()
            .map(|(address, length, memory_size)| segment(address, &vec![0x90; length], memory_size))
            .collect();
        let loaded: Vec<&Part> = parts.iter().filter(|p| p.memory_size > 0 || !p.content.is_empty()).collect();
        let span = |p: &Part| (u128::from(p.address), u128::from(p.address) + u128::from(p.memory_size));
        let in_ram = loaded.iter().all(|p| span(p).0 >= 1 << 20 && span(p).1 <= 8 << 20);
        let sizes = loaded.iter().all(|p| p.content.len() as u64 <= p.memory_size);
        let apart = loaded.iter().enumerate().all(|(n, a)| {
            loaded[n + 1..].iter().all(|b| span(a).1 <= span(b).0 || span(b).1 <= span(a).0)
        });
        // Entered at the first byte of the first segment that has any.
        let entry = loaded.iter().find(|p| !p.content.is_empty()).map(|p| p.address);
        let sound = in_ram && sizes && apart && entry.is_some();

        let result = boot(&elf(entry.unwrap_or(MIB), &parts), 8);
        prop_assert_eq!(result.is_ok(), sound, "{:?}: {:?}", parts, result);
    }

    #[test]
    fn the_first_pvh_note_wins_whatever_surrounds_it(
        others in proptest::collection::vec((any::<u32>(), proptest::collection::vec(any::<u8>(), 0..9),
            proptest::collection::vec(any::<u8>(), 0..9)), 0..6),
        at in 0_usize..6,
    ) {
        let mut all: Vec<Vec<u8>> = others
            .iter()
            .filter(|(_, name, _)| name != b"Xen\0")
            .map(|(kind, name, value)| note(*kind, name, value))
            .collect();
        let at = at.min(all.len());
        all.insert(at, pvh_note(MIB as u32 + 8));
        all.push(pvh_note(MIB as u32 + 24));
        let image = elf(MIB, &[segment(MIB, &[0x90; 64], 64), notes(all.concat())]);
        prop_assert_eq!(boot(&image, 4).unwrap().rip, MIB + 8);
    }
}
