//! What the device offers, and its configuration as it lies in its registers (virtio 1.2, sections 5.2.3 and 5.2.4).

use super::{SECTOR, SEGMENT_MAX, SEGMENTS_MAX};

/// Feature bits.
pub(super) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// The most sectors of one discard or write of zeros: 1 GiB, which a file system does in milliseconds.
pub(super) const RANGE_MAX: u32 = 1 << 21;
/// What the host reads and writes at a time, as a power of two of sectors: a page of its cache.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
/// Bytes of `struct virtio_blk_config` up to the last field that is offered.
const LENGTH: usize = 60;

/// The features that a device offers.
///
/// Not `CONFIG_WCE`: a driver that wants no cache does without [`feature::FLUSH`], and is served so.
pub(super) fn features(read_only: bool, queues: u16) -> u64 {
    let always = feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
    let writes = if read_only { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
    let several = if queues > 1 { feature::MQ } else { 0 };
    always | writes | several
}

/// The configuration of a device of so many sectors and queues.
pub(super) fn bytes(sectors: u64, queues: u16) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    let mut put = |at: usize, field: &[u8]| {
        for (to, from) in bytes.iter_mut().skip(at).zip(field) {
            *to = *from;
        }
    };
    put(0, &sectors.to_le_bytes());
    put(8, &SEGMENT_MAX.to_le_bytes());
    put(12, &u32::from(SEGMENTS_MAX).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXPONENT]);
    put(26, &(1_u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &RANGE_MAX.to_le_bytes());
    put(40, &1_u32.to_le_bytes());
    put(44, &(1_u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(48, &RANGE_MAX.to_le_bytes());
    put(52, &1_u32.to_le_bytes());
    put(56, &[1]);
    bytes
}
