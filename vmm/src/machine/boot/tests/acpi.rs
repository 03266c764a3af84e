//! ACPI tables, read as an operating system reads them (ACPI 6.5, chapter 5).

use acpi_tables::aml;
use vm_memory::GuestMemoryMmap;

use super::super::acpi::{POWER_OFF_VALUE, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
use super::super::events::{GENERATION_GSI, POWER_BUTTON_GSI};
use super::super::{BootSpec, load};
use super::fixtures::*;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at `address`, its checksum verified.
fn table(memory: &GuestMemoryMmap, address: u64) -> Vec<u8> {
    let table = bytes(memory, address, u32_at(memory, address + 4) as usize);
    assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
    assert!((0xe_0000..0xf_f000).contains(&address) && address + table.len() as u64 <= 0xf_f000);
    table
}

struct Tables {
    fadt: Vec<u8>,
    madt: Vec<u8>,
    dsdt: Vec<u8>,
}

/// From the RSDP to every table.
fn tables(change: impl FnOnce(&mut BootSpec<'_>)) -> Tables {
    let memory = memory(16, MIB);
    let image = plain_elf();
    let mut spec = spec(&image, 16 * MIB);
    change(&mut spec);
    load(&memory, &spec).unwrap();

    let rsdp = bytes(&memory, u64_at(&memory, 0x7070), 36);
    assert_eq!(rsdp[..8], *b"RSD PTR ");
    assert_eq!(rsdp[15], 2, "revision");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(&memory, u64_at(&memory, 0xe_0000 + 24));
    assert_eq!(xsdt[..4], *b"XSDT");
    let find = |signature: &[u8]| {
        let addresses = xsdt[36..].chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap()));
        let found: Vec<_> = addresses.map(|at| table(&memory, at)).filter(|t| &t[..4] == signature).collect();
        assert_eq!(found.len(), 1);
        found[0].clone()
    };
    let fadt = find(b"FACP");
    let dsdt = table(&memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
    assert_eq!(dsdt[..4], *b"DSDT");
    Tables { madt: find(b"APIC"), fadt, dsdt }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_fadt_describes_a_hardware_reduced_machine() {
    let fadt = tables(|_| ()).fadt;
    assert_eq!(fadt.len(), 276);
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
    assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b1100, "no VGA, no MSI; no 8042; an RTC");
    // Generic addresses: space 1 (I/O), 8 bits, offset 0, byte access, port.
    let port = |port: u16| [&[1, 8, 0, 1][..], &u64::from(port).to_le_bytes()].concat();
    assert_eq!(fadt[116..128], port(0xcf9));
    assert_eq!(fadt[128], 6);
    assert_eq!(fadt[244..256], port(0x600));
    assert_eq!(fadt[256..268], port(0x601));
    assert_eq!((RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT), (0xcf9, 6, 0x600, 0x601));
}

#[test]
fn soft_off_in_the_dsdt_is_what_power_off_writes() {
    let dsdt = tables(|_| ()).dsdt;
    // NameOp _S5_, PackageOp, PkgLength, 4 elements, BytePrefix, SLP_TYP.
    let at = dsdt.windows(5).position(|window| window == b"\x08_S5_").unwrap();
    assert_eq!((dsdt[at + 5], dsdt[at + 7], dsdt[at + 8]), (0x12, 4, 0x0a));
    assert_eq!(dsdt[at + 9] << 2 | 1 << 5, POWER_OFF_VALUE);
}

/// The entries of a MADT: type and the bytes behind the length.
fn entries(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    assert_eq!(u32::from_le_bytes(madt[36..40].try_into().unwrap()), 0xfee0_0000);
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while let [kind, length, ..] = *rest {
        entries.push((kind, rest[2..usize::from(length)].to_vec()));
        rest = &rest[usize::from(length)..];
    }
    entries
}

#[test]
fn every_cpu_is_in_the_madt_and_the_dsdt_once() {
    for cpus in [1, 2, 255, 256, 600] {
        let tables = tables(|spec| spec.cpus = cpus);
        let mut ids = Vec::new();
        for (kind, body) in entries(&tables.madt) {
            match kind {
                0 => {
                    assert_eq!((body[0], &body[2..]), (body[1], &[1, 0, 0, 0][..]));
                    assert_ne!(body[1], 255, "xAPIC's broadcast is no CPU");
                    ids.push(u32::from(body[1]));
                }
                9 => {
                    assert_eq!((&body[2..6], &body[6..10]), (&body[10..14], &[1, 0, 0, 0][..]));
                    ids.push(u32::from_le_bytes(body[2..6].try_into().unwrap()));
                }
                _ => (),
            }
        }
        assert_eq!(ids, (0..u32::from(cpus)).collect::<Vec<_>>());
        let devices = tables.dsdt.windows(8).filter(|window| window == b"ACPI0007").count();
        assert_eq!(devices, usize::from(cpus));
    }
}

#[test]
fn the_io_apic_is_where_kvm_has_it() {
    let madt = tables(|_| ()).madt;
    let io_apics: Vec<_> = entries(&madt).into_iter().filter(|(kind, _)| *kind == 1).collect();
    assert_eq!(io_apics, [(1, vec![0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0])]);
}

#[test]
fn com1_and_rtc_have_their_ports_and_interrupts() {
    let dsdt = tables(|_| ()).dsdt;
    // I/O descriptor: 0x47, decodes 16 bits, minimum, maximum, alignment, length. Extended interrupt: 0x89,
    // length 6, consumer and edge (3), one, number.
    let com1 = [0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x89, 6, 0, 3, 1, 4, 0, 0, 0];
    let rtc = [0x47, 1, 0x70, 0, 0x70, 0, 1, 2, 0x89, 6, 0, 3, 1, 8, 0, 0, 0];
    assert!(contains(&dsdt, &com1) && contains(&dsdt, &rtc));
    // EISA IDs PNP0501 and PNP0B00.
    assert!(contains(&dsdt, &[0x41, 0xd0, 0x05, 0x01]) && contains(&dsdt, &[0x41, 0xd0, 0x0b, 0x00]));
}

#[test]
fn a_machine_without_a_serial_port_or_rtc_interrupt_names_none() {
    let dsdt = tables(|spec| (spec.serial_irq, spec.rtc_irq) = (None, None)).dsdt;
    assert!(!contains(&dsdt, b"COM1") && contains(&dsdt, b"RTC_"));
    assert_eq!(interrupts(&dsdt), [POWER_BUTTON_GSI, GENERATION_GSI], "those of the event device alone");
}

/// The numbers of the extended interrupt descriptors (ACPI 6.5, section 6.4.3.6), each with one interrupt.
fn interrupts(dsdt: &[u8]) -> Vec<u32> {
    let descriptors = dsdt.windows(9).filter(|bytes| bytes[..3] == [0x89, 6, 0] && bytes[4] == 1);
    descriptors.map(|bytes| u32::from_le_bytes([bytes[5], bytes[6], bytes[7], bytes[8]])).collect()
}

#[test]
fn further_devices_are_appended_in_their_order() {
    let (first, second) = (aml::Name::new("AAAA".into(), &7_u32), aml::Name::new("BBBB".into(), &9_u32));
    let dsdt = {
        let devices: [&dyn acpi_tables::Aml; 2] = [&first, &second];
        let memory = memory(16, 0);
        let image = plain_elf();
        let mut spec = spec(&image, 16 * MIB);
        spec.acpi_devices = &devices;
        load(&memory, &spec).unwrap();
        table(&memory, 0xe_0030)
    };
    assert!(dsdt.ends_with(b"\x08AAAA\x0a\x07\x08BBBB\x0a\x09"));
}

#[test]
fn too_many_cpus_or_devices_are_refused() {
    let image = plain_elf();
    let complain = |change: &dyn Fn(&mut BootSpec<'static>)| {
        let image: &'static [u8] = image.clone().leak();
        let mut spec = spec(image, 16 * MIB);
        change(&mut spec);
        load(&memory(16, 0), &spec).unwrap_err().to_string()
    };
    for cpus in [0, 4097, u16::MAX] {
        assert!(complain(&|spec| spec.cpus = cpus).contains(&format!("describe {cpus} CPUs")));
    }
    assert!(complain(&|spec| spec.cpus = 4096).contains("use fewer devices or CPUs"));
}
