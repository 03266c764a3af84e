//! Linux `boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::layout::{BOOT_PARAMS, CMDLINE};
use super::{BootError, Handover, memory_map};

/// "Undefined" boot loader: we have no registered number.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes `boot_params` with the kernel's own `header` and what is handed over.
pub(super) fn write<M: GuestMemoryBackend>(
    memory: &M,
    header: &setup_header,
    handover: &Handover,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: *header, acpi_rsdp_addr: handover.rsdp, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    let initrd = handover.initrd.clone().unwrap_or(0..0);
    // The initrd lies below the gap, so neither number exceeds 32 bits.
    params.hdr.ramdisk_image = initrd.start as u32;
    params.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;

    let map = memory_map::ranges(handover.ram);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.length, r#type: range.kind as u32 };
    }
    params.e820_entries = map.len() as u8;

    let written = BootParams::new::<boot_params>(&params, GuestAddress(BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams::<M>(&written, memory).map_err(BootError::Handover)
}
