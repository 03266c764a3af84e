//! The memory map that a guest is told, the same for e820 and PVH.

use super::layout::{ACPI_START, EBDA_START, HIGH_RAM_START, KVM_IDENTITY_MAP, MMIO_GAP_END, ram_ranges};

/// What a range of the map is; the numbers of e820, which PVH shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapRange {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) kind: RangeKind,
}

/// The map for `ram` bytes of RAM (more than 1 MiB), sorted, without overlaps.
///
/// The EBDA page, the ACPI tables and the reset code are RAM that the guest must leave alone. KVM's own
/// pages are told because on Intel they are mapped into the guest.
pub(super) fn ranges(ram: u64) -> Vec<MapRange> {
    let (low, high) = ram_ranges(ram);
    let range = |start: u64, end: u64, kind| MapRange { start, length: end - start, kind };
    let mut map = vec![
        range(0, EBDA_START, RangeKind::Ram),
        range(EBDA_START, 0xa_0000, RangeKind::Reserved),
        range(ACPI_START, HIGH_RAM_START, RangeKind::Reserved),
        range(HIGH_RAM_START, low.end.max(HIGH_RAM_START), RangeKind::Ram),
        range(KVM_IDENTITY_MAP, MMIO_GAP_END, RangeKind::Reserved),
    ];
    map.extend(high.map(|high| range(high.start, high.end, RangeKind::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_is_sorted_and_disjoint_and_holds_all_ram_but_the_legacy_hole() {
        for ram in [2 << 20, 128 << 20, 3 << 30, (3 << 30) + 4096, 64 << 30] {
            let map = ranges(ram);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].length <= pair[1].start, "{pair:x?}");
            }
            let usable: u64 = map.iter().filter(|range| range.kind == RangeKind::Ram).map(|range| range.length).sum();
            assert_eq!(usable, ram - (HIGH_RAM_START - EBDA_START));
        }
    }
}
