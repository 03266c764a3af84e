//! What firmware leaves in CMOS memory.

use super::CMOS_SIZE;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 * KIB;

const EQUIPMENT: usize = 0x14;
const EQUIPMENT_FPU: u8 = 0x02;
/// The checksum, high byte first, is over these.
const CHECKED: std::ops::Range<usize> = 0x10..0x2e;
const CHECKSUM: usize = 0x2e;

/// RAM of the guest in bytes, as its firmware would tell it through CMOS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemorySize {
    /// From address 0 up to the 32-bit gap.
    pub below_4g: u64,
    /// From 4 GiB on.
    pub above_4g: u64,
}

/// CMOS memory for a machine with `memory`.
///
/// | bytes | unit | what |
/// |---|---|---|
/// | 0x15, 0x16 | KiB | below 1 MiB, at most 640 |
/// | 0x17, 0x18 and 0x30, 0x31 | KiB | from 1 MiB on, at most 65,535 |
/// | 0x34, 0x35 | 64 KiB | from 16 MiB up to the gap, at most 65,535 |
/// | 0x5b to 0x5d | 64 KiB | from 4 GiB on, at most 2²⁴ − 1 |
///
/// As QEMU's `pc_cmos_init` and SeaBIOS have it. What does not fit is cut to the highest value that does.
pub(super) fn contents(memory: GuestMemorySize) -> [u8; CMOS_SIZE] {
    let GuestMemorySize { below_4g, above_4g } = memory;
    let mut cmos = [0; CMOS_SIZE];
    cmos[EQUIPMENT] = EQUIPMENT_FPU;
    let extended = below_4g.saturating_sub(MIB) / KIB;
    store(&mut cmos[0x15..=0x16], (below_4g / KIB).min(640));
    store(&mut cmos[0x17..=0x18], extended);
    store(&mut cmos[0x30..=0x31], extended);
    store(&mut cmos[0x34..=0x35], below_4g.saturating_sub(16 * MIB) / BLOCK);
    store(&mut cmos[0x5b..=0x5d], above_4g / BLOCK);
    let sum = cmos[CHECKED].iter().fold(0u16, |sum, &byte| sum.wrapping_add(u16::from(byte)));
    cmos[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    cmos
}

/// Little-endian, the most that fits if `value` is more.
fn store(bytes: &mut [u8], value: u64) {
    let most = (1u64 << (8 * bytes.len())) - 1;
    let value = value.min(most).to_le_bytes();
    bytes.copy_from_slice(&value[..bytes.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(cmos: &[u8; CMOS_SIZE], bytes: std::ops::RangeInclusive<usize>) -> u64 {
        cmos[bytes].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    fn sizes(below_4g: u64, above_4g: u64) -> [u64; 5] {
        let cmos = contents(GuestMemorySize { below_4g, above_4g });
        [0x15..=0x16, 0x17..=0x18, 0x30..=0x31, 0x34..=0x35, 0x5b..=0x5d].map(|bytes| number(&cmos, bytes))
    }

    #[test]
    fn sizes_are_in_their_units_and_cut_where_they_do_not_fit() {
        assert_eq!(sizes(0, 0), [0; 5]);
        assert_eq!(sizes(512 * KIB, 0), [512, 0, 0, 0, 0]);
        assert_eq!(sizes(32 * MIB, 0), [640, 31 * 1024, 31 * 1024, 256, 0]);
        assert_eq!(sizes(3 * KIB * MIB, 5 * KIB * MIB), [640, 65_535, 65_535, 3056 * 16, 5 * 1024 * 16]);
        assert_eq!(sizes(u64::MAX, u64::MAX), [640, 65_535, 65_535, 65_535, (1 << 24) - 1]);
    }

    #[test]
    fn the_checksum_is_over_the_bytes_that_linux_checks() {
        // drivers/char/nvram.c: PC_CKS_RANGE_START 2 to PC_CKS_RANGE_END 31, counted from byte 14.
        let cmos = contents(GuestMemorySize { below_4g: 768 * MIB, above_4g: 0 });
        let sum: u16 = cmos[14 + 2..=14 + 31].iter().map(|&byte| u16::from(byte)).sum();
        assert_eq!([cmos[14 + 32], cmos[14 + 33]], sum.to_be_bytes());
    }
}
