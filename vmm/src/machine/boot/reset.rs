//! What runs where a BIOS would: a few bytes that reset the machine.
//!
//! Linux with EFI support takes a hardware-reduced machine for an EFI one and reboots through EFI; finding none, it
//! goes back to real mode and jumps to the BIOS entry 0xf000:0xfff0, before it ever tries the FADT's reset register
//! (arch/x86/kernel/reboot.c, `reboot_init` and `BOOT_BIOS`). Without code there, a `reboot` in the
//! guest would run into whatever memory holds.

use vm_memory::GuestMemoryBackend;

use super::BootError;
use super::acpi::{RESET_PORT, RESET_VALUE};
use super::layout::RESET_VECTOR;

/// 16-bit code, the same wherever it lies.
#[rustfmt::skip]
pub const RESET_CODE: [u8; 10] = [
    0xb0, RESET_VALUE, // mov al, RESET_VALUE
    0xba, RESET_PORT as u8, (RESET_PORT >> 8) as u8, // mov dx, RESET_PORT
    0xee, // out dx, al
    0xfa, // cli
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// Writes [`RESET_CODE`] to [`RESET_VECTOR`].
pub(super) fn write<M: GuestMemoryBackend>(memory: &M) -> Result<(), BootError> {
    super::write(memory, "the reset code", RESET_VECTOR, &RESET_CODE)
}
