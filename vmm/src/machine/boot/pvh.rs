//! PVH `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h), version 1.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::layout::{CMDLINE, PVH_START_INFO};
use super::{BootError, Handover, memory_map};

/// Module list and memory map, behind `hvm_start_info` in the same page.
const MODULE_LIST: u64 = PVH_START_INFO + 0x80;
const MEMORY_MAP: u64 = PVH_START_INFO + 0x100;

/// Writes `hvm_start_info`, the module list (the initrd) and the memory map.
pub(super) fn write<M: GuestMemoryBackend>(memory: &M, handover: &Handover) -> Result<(), BootError> {
    let map: Vec<hvm_memmap_table_entry> = memory_map::ranges(handover.ram)
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.length,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<hvm_modlist_entry> = handover
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..Default::default() })
        .collect();
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: handover.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };

    let mut params = BootParams::new::<hvm_start_info>(&start_info, GuestAddress(PVH_START_INFO));
    params.set_sections::<hvm_memmap_table_entry>(&map, GuestAddress(MEMORY_MAP));
    params.set_modules::<hvm_modlist_entry>(&modules, GuestAddress(MODULE_LIST));
    PvhBootConfigurator::write_bootparams::<M>(&params, memory).map_err(BootError::Handover)
}
