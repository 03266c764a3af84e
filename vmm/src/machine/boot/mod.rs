//! Getting a guest kernel into memory, with everything that it expects to find there.
//!
//! ```text
//!   BootSpec ──► kernel.rs: which format?
//!                  ├─ elf.rs      ELF64: at its physical addresses; a PVH note chooses PVH
//!                  └─ bzimage.rs  bzImage: 64-bit boot protocol 2.12 or later
//!                initrd at the top of low RAM, command line below 1 MiB
//!                acpi.rs          RSDP, XSDT, FADT, MADT, DSDT
//!                reset.rs         what runs where a BIOS would
//!                  ├─ Linux64:    boot_params.rs, page_tables.rs
//!                  └─ PVH:        pvh.rs
//!            ──► Entry: where a CPU begins, and in which state
//! ```
//!
//! Nothing here knows KVM: [`Entry`] is plain data, out of which the vCPU's registers are made.
//! `linux-loader` gives the structures of the boot protocols and writes them. The loading itself is done
//! here: its loaders lose the I/O error, read notes without a bound, leave `.bss` as it was (and
//! a region that is used anew still holds the old guest's bytes), and do not check segments against each other.
//!
//! Every kernel file is taken for hostile: each field is checked before it is used, sizes are
//! compared with the file and with RAM before anything is allocated or read.

pub mod acpi;
mod boot_params;
mod bzimage;
mod elf;
pub mod events;
mod initrd;
mod kernel;
pub mod layout;
mod memory_map;
mod page_tables;
mod pvh;
mod reset;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;

use acpi_tables::Aml;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use acpi::AcpiError;
pub use bzimage::BzImageError;
pub use elf::ElfError;
pub use initrd::InitrdError;
pub use kernel::{KernelError, KernelSource, ReadError};
pub use page_tables::{BOOT_CS, BOOT_DS, CODE32, CODE64, DATA, GDT_ENTRIES};

pub use reset::RESET_CODE;

use kernel::LoadedKernel;
use layout::{CMDLINE, CMDLINE_CAPACITY, HIGH_RAM_START, mebibytes, ram_ranges};

/// What to boot, on what.
#[derive(Clone, Copy)]
pub struct BootSpec<'a> {
    /// The kernel: ELF64 or bzImage.
    pub kernel: KernelSource<'a>,
    /// Initial RAM disk, with the name to call it by in errors.
    pub initrd: Option<(&'a File, &'a Path)>,
    /// Kernel command line, without a NUL.
    pub cmdline: &'a str,
    /// Size of RAM in bytes; it lies where [`layout::ram_ranges`] says.
    pub ram: u64,
    /// Number of CPUs; the CPU with index `n` has APIC ID `n`.
    pub cpus: u16,
    /// Interrupt (GSI) of the serial port at 0x3f8, or `None` if there is no such port.
    pub serial_irq: Option<u32>,
    /// Interrupt (GSI) of the RTC at port 0x70, or `None` if it raises none (no alarms).
    pub rtc_irq: Option<u32>,
    /// Further devices for the DSDT's `\_SB` scope, in this order (virtio-mmio, VM generation ID, …).
    pub acpi_devices: &'a [&'a dyn Aml],
}

/// Where the boot CPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction, a guest-physical address (identity-mapped, where paging is on).
    pub rip: u64,
    /// The state that the kernel expects the CPU in.
    pub protocol: EntryProtocol,
}

/// CPU state at the entry. Interrupts are off (RFLAGS = 2), all other general registers zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryProtocol {
    /// Linux's 64-bit boot protocol: long mode, paging on; RSI = `boot_params`, CS = [`BOOT_CS`],
    /// DS, ES and SS = [`BOOT_DS`] (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
    Linux64 {
        /// Address of `boot_params`, for RSI.
        boot_params: u64,
        /// CR3: an identity mapping of the first 4 GiB.
        page_tables: u64,
        /// Base of the GDT; limit 31.
        gdt: u64,
        /// Base of the IDT; limit 7.
        idt: u64,
    },
    /// Xen's PVH: 32-bit protected mode, paging off; EBX = `start_info`, flat CS, DS, ES and SS
    /// (Xen, docs/misc/pvh.pandoc).
    Pvh {
        /// Address of `hvm_start_info`, for EBX.
        start_info: u64,
        /// Base of the GDT; limit 31.
        gdt: u64,
        /// Base of the IDT; limit 7.
        idt: u64,
    },
}

/// Why a guest could not be made ready to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initrd cannot be loaded.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The ACPI tables cannot be made.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// RAM does not reach the area for kernels.
    #[error("cannot boot with {bytes} bytes of RAM: a guest needs more than 1 MiB: use --memory")]
    MemoryTooSmall {
        /// Size of RAM.
        bytes: u64,
    },
    /// RAM is not where it was said to be.
    #[error("cannot boot with {} MiB of RAM: guest memory does not cover it", mebibytes(*bytes))]
    MemoryNotMapped {
        /// Size of RAM.
        bytes: u64,
    },
    /// The command line is longer than the kernel or our area takes.
    #[error("the kernel command line has {length} bytes, {kernel} takes at most {limit}: shorten --cmdline")]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// What the kernel takes.
        limit: u64,
        /// The kernel's name.
        kernel: String,
    },
    /// The command line would end at its first NUL.
    #[error(
        "the kernel command line has a NUL character at byte {position}, where the kernel would stop reading: remove it from --cmdline"
    )]
    CmdlineNul {
        /// Byte offset of the NUL.
        position: usize,
    },
    /// `boot_params` or the PVH start info could not be written.
    #[error("handing over the boot parameters in guest memory")]
    Handover(#[source] linux_loader::configurator::Error),
    /// Guest memory refused a write.
    #[error("writing {what} to guest memory at {address:#x}")]
    Write {
        /// What was written.
        what: &'static str,
        /// Where.
        address: u64,
        /// What memory said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads the kernel of `spec` and all that belongs to it into `memory`.
///
/// The files' read positions move. Guest memory is written even if an error is returned in the end.
///
/// # Errors
/// [`BootError`] if a file is not what it should be, does not fit into RAM, or cannot be read.
pub fn load<M: GuestMemoryBackend>(memory: &M, spec: &BootSpec<'_>) -> Result<Entry, BootError> {
    let low = check_memory(memory, spec.ram)?;
    let kernel = kernel::load(memory, spec.kernel, low)?;
    check_cmdline(spec.cmdline, &kernel)?;
    let initrd = spec.initrd.map(|(file, path)| initrd::load(memory, file, path, &kernel, low)).transpose()?;
    write(memory, "the kernel command line", CMDLINE, spec.cmdline.as_bytes())?;
    write(memory, "the kernel command line", CMDLINE + spec.cmdline.len() as u64, &[0])?;
    let rsdp = acpi::write(memory, spec)?;
    reset::write(memory)?;

    let handover = Handover { ram: spec.ram, initrd, rsdp };
    let protocol = match &kernel.header {
        Some(header) => {
            boot_params::write(memory, header, &handover)?;
            page_tables::write_identity_map(memory)?;
            page_tables::write_descriptor_tables(memory, CODE64)?;
            EntryProtocol::Linux64 {
                boot_params: layout::BOOT_PARAMS,
                page_tables: layout::PAGE_TABLES,
                gdt: layout::GDT,
                idt: layout::IDT,
            }
        }
        None => {
            pvh::write(memory, &handover)?;
            page_tables::write_descriptor_tables(memory, CODE32)?;
            EntryProtocol::Pvh { start_info: layout::PVH_START_INFO, gdt: layout::GDT, idt: layout::IDT }
        }
    };
    Ok(Entry { rip: kernel.entry, protocol })
}

/// What both boot protocols tell the kernel.
struct Handover {
    ram: u64,
    initrd: Option<std::ops::Range<u64>>,
    rsdp: u64,
}

/// The end of low RAM, once it is sure that guest memory holds `ram` bytes where the layout says.
fn check_memory<M: GuestMemoryBackend>(memory: &M, ram: u64) -> Result<u64, BootError> {
    if ram <= HIGH_RAM_START {
        return Err(BootError::MemoryTooSmall { bytes: ram });
    }
    let (low, high) = ram_ranges(ram);
    let covered = |range: &std::ops::Range<u64>| {
        usize::try_from(range.end - range.start)
            .is_ok_and(|len| GuestMemoryBackend::check_range(memory, GuestAddress(range.start), len))
    };
    if !covered(&low) || !high.as_ref().is_none_or(covered) {
        return Err(BootError::MemoryNotMapped { bytes: ram });
    }
    Ok(low.end)
}

fn check_cmdline(cmdline: &str, kernel: &LoadedKernel) -> Result<(), BootError> {
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { position });
    }
    let limit = kernel.cmdline_max.min(CMDLINE_CAPACITY - 1);
    if cmdline.len() as u64 > limit {
        return Err(BootError::CmdlineTooLong { length: cmdline.len(), limit, kernel: kernel.name.clone() });
    }
    Ok(())
}

fn write<M: GuestMemoryBackend>(memory: &M, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Write { what, address, source })
}
