//! The images themselves, assembled here and kept in read-only sections of the program.
//!
//! This is the crate's only unsafe code: an image's bounds are two symbols of the assembler.

use std::arch::global_asm;

// One block for all: see the head of `runtime.s`.
global_asm!(
    include_str!("asm/runtime.s"),
    include_str!("asm/storage.s"),
    include_str!("asm/boot.s"),
    include_str!("asm/counter.s"),
    include_str!("asm/echo.s"),
    include_str!("asm/memwalk.s"),
    include_str!("asm/pages.s"),
    include_str!("asm/probe.s"),
    include_str!("asm/records.s"),
    include_str!("asm/smp.s"),
    options(att_syntax, raw)
);

macro_rules! image {
    ($name:ident, $start:ident, $end:ident) => {
        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both symbols are defined by the block above, the second behind the first in one section
            // that is read-only. The bytes from the one up to the other are the image; nothing writes them.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

image!(boot, perdure_guest_boot, perdure_guest_boot_end);
image!(counter, perdure_guest_counter, perdure_guest_counter_end);
image!(echo, perdure_guest_echo, perdure_guest_echo_end);
image!(memwalk, perdure_guest_memwalk, perdure_guest_memwalk_end);
image!(pages, perdure_guest_pages, perdure_guest_pages_end);
image!(probe, perdure_guest_probe, perdure_guest_probe_end);
image!(records, perdure_guest_records, perdure_guest_records_end);
image!(smp, perdure_guest_smp, perdure_guest_smp_end);
