//! The machine that the guests expect.
//!
//! # Entry
//! Every image is an ELF64 executable for the x86-64 Linux boot protocol's 64-bit entry: long mode at CPL0, RSI the
//! address of `boot_params` (e820 table at 0x2d0, its count at 0x1e8; command line at 0x228, upper half at 0xc8; RSDP
//! at 0x70), the first GiB identity-mapped, interrupts off. An image with a PVH note (`XEN_ELFNOTE_PHYS32_ENTRY`,
//! [`PVH_NOTE_TYPE`]) can be entered by PVH as well: 32-bit protected mode, EBX the address of `hvm_start_info`.
//!
//! Images are linked and loaded at [`LOAD_ADDRESS`] and use [`IMAGE_MEMORY`] bytes there; `smp` starts its processors from
//! a page at [`TRAMPOLINE_ADDRESS`]. The rest of what the e820 table calls usable, from [`FREE_ADDRESS`] on, serves as the
//! guest's memory. Beyond that only the first MiB may hold what the loader needs (boot_params, command line, tables).
//!
//! # Devices
//! In-kernel PIC, IOAPIC, local APICs and PIT, and the ports below. Lines end in `\n` alone. `records` looks for a virtio-mmio block
//! device, or persistent memory (from 4 GiB on, at the beginning of a GiB), in the [`VIRTIO_WINDOWS`] pages from [`VIRTIO_MMIO`] on; its
//! interrupt is one of [`VIRTIO_PINS`].

/// Physical address at which every image is linked and loaded.
pub const LOAD_ADDRESS: u64 = 0x10_0000;
/// Bytes of memory from [`LOAD_ADDRESS`] that an image uses for itself and its stacks.
pub const IMAGE_MEMORY: u64 = 0x2_0000;
/// First physical address that guests use as plain memory.
pub const FREE_ADDRESS: u64 = 0x20_0000;
/// Physical address of the page from which `smp` starts its other processors.
pub const TRAMPOLINE_ADDRESS: u64 = 0x8000;

/// Physical address of the first window of a virtio-mmio device; each has a page.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Windows that are looked at.
pub const VIRTIO_WINDOWS: u64 = 16;
/// Pins of the IOAPIC of which one is such a device's interrupt.
pub const VIRTIO_PINS: std::ops::RangeInclusive<u32> = 5..=22;

/// First port of the 16550 serial line; its interrupt is [`SERIAL_IRQ`].
pub const SERIAL: u16 = 0x3f8;
/// Interrupt line of [`SERIAL`].
pub const SERIAL_IRQ: u32 = 4;
/// One byte written here ends the machine with that byte as its code ([`code`]).
pub const DEBUG_EXIT: u16 = 0xf4;
/// ACPI sleep control register (hardware-reduced); [`SLEEP_S5`] written here powers the machine off.
pub const SLEEP_CONTROL: u16 = 0x600;
/// `SLP_TYP` 5 and `SLP_EN`.
pub const SLEEP_S5: u8 = 0x34;
/// Low 32 bits of a report. Reads give back the last committed one.
pub const REPORT_LOW: u16 = 0x5d0;
/// High 32 bits of a report; writing them commits it.
pub const REPORT_HIGH: u16 = 0x5d4;

/// Type of the ELF note of name `Xen` that holds the 32-bit PVH entry point.
pub const PVH_NOTE_TYPE: u32 = 18;

/// Codes that guests write to [`DEBUG_EXIT`].
pub mod code {
    /// All went well. Guests that end well power off instead; this is for those that cannot.
    pub const SUCCESS: u8 = 0;
    /// The guest verified itself and found something lost, doubled or altered; its last line says what.
    pub const BROKEN: u8 = 1;
    /// The parameters cannot be met; the last line says why.
    pub const USAGE: u8 = 2;
    /// An exception that the guest does not expect; the last line gives vector, RIP and CR2.
    pub const EXCEPTION: u8 = 3;
}
