//! The bytes of a catalog in its memory: a sector of counts, the settings of each medium, then an entry of a sector for each region. All
//! of fixed length, each with a CRC of its own, so that a change writes what it changes, and damage is found where it is. `FORMAT.md`.
//!
//! A CRC does not show that a sector is an older one, or is zeros where an entry was: for that the first sector has a CRC of all entries' CRCs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::{Catalog, CatalogDamage, MediumSettings, RegionInfo, Settings};
use crate::medium::MediumKind;
use crate::name::RegionName;
use crate::region::Kind;

/// The unit of a change, and what an entry takes, in bytes.
pub(super) const SECTOR: usize = 512;
/// Where the CRC of a sector lies.
const CRC_AT: usize = SECTOR - 4;
const MAGIC: [u8; 8] = *b"PERDCATD";
/// What a medium's settings take: room for the longest path that the kernel takes.
const MEDIUM_LEN: usize = 9 * SECTOR;
const MEDIUM_CRC_AT: usize = MEDIUM_LEN - 4;
const DIRECTORY_AT: usize = 16;
const NAME_AT: usize = 32;
/// Where the entries begin.
pub(super) const ENTRIES_AT: usize = 16384;

/// Which entry a region has, by its id.
pub(super) type Entries = BTreeMap<u64, usize>;

/// How many entries so many bytes have.
pub(super) fn capacity(length: usize) -> usize {
    length.saturating_sub(ENTRIES_AT) / SECTOR
}

/// Why bytes are not a catalog.
#[derive(Debug)]
pub(super) enum NotACatalog {
    Damaged(CatalogDamage),
    /// All CRCs match, and it makes no sense.
    Malformed(String),
}

impl From<CatalogDamage> for NotACatalog {
    fn from(damage: CatalogDamage) -> Self {
        Self::Damaged(damage)
    }
}

/// Where each region's entry is to be: where it was, or in the first that is free. `None` if there are too few.
pub(super) fn place(catalog: &Catalog, before: &Entries, length: usize) -> Option<Entries> {
    let ids: BTreeSet<u64> = catalog.regions.iter().map(|region| region.id).collect();
    let mut entries: Entries = before.iter().filter(|(id, _)| ids.contains(id)).map(|(id, at)| (*id, *at)).collect();
    let taken: BTreeSet<usize> = entries.values().copied().collect();
    let mut free = (0..capacity(length)).filter(|entry| !taken.contains(entry));
    for id in ids {
        if let std::collections::btree_map::Entry::Vacant(vacant) = entries.entry(id) {
            vacant.insert(free.next()?);
        }
    }
    Some(entries)
}

/// All `length` bytes. A path that is too long for any kernel is an error.
pub(super) fn encode(catalog: &Catalog, entries: &Entries, length: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; length];
    let mut sums = vec![0; capacity(length)];
    for region in &catalog.regions {
        let entry = entries.get(&region.id).copied().unwrap_or(usize::MAX);
        let (Some(at), Some(sum)) = (sector(&mut bytes, entry), sums.get_mut(entry)) else {
            return Err(format!("there is no entry for region {}", region.name));
        };
        *sum = encode_entry(at, entry, region);
    }
    let sum = sum_of(&sums);
    for (number, medium) in MediumKind::ALL.into_iter().enumerate() {
        let at = SECTOR + number * MEDIUM_LEN;
        if let Some(at) = bytes.get_mut(at..at + MEDIUM_LEN) {
            encode_medium(at, medium, catalog.settings.media.get(&medium))?;
        }
    }
    if let Some(first) = bytes.get_mut(..SECTOR) {
        put(first, 0, &MAGIC);
        put(first, 8, &catalog.next_id.to_le_bytes());
        put(first, 16, &(catalog.regions.len() as u32).to_le_bytes());
        put(first, 20, &sum.to_le_bytes());
        put(first, 24, &[catalog.settings.default_medium.code(), u8::from(catalog.settings.ram_limit.is_some())]);
        put(first, 32, &catalog.settings.ram_limit.unwrap_or(0).to_le_bytes());
        seal(first, CRC_AT);
    }
    Ok(bytes)
}

/// Takes any bytes.
pub(super) fn decode(pool: u64, bytes: &[u8]) -> Result<(Catalog, Entries), NotACatalog> {
    let settings = |at| CatalogDamage::Settings { at };
    let first = bytes.get(..SECTOR).filter(|first| is_sealed(first, CRC_AT) && first.starts_with(&MAGIC));
    let first = first.ok_or(settings(0))?;
    let mut media = BTreeMap::new();
    for (number, medium) in MediumKind::ALL.into_iter().enumerate() {
        let at = SECTOR + number * MEDIUM_LEN;
        let found = bytes.get(at..at + MEDIUM_LEN).and_then(|bytes| decode_medium(bytes, medium));
        if let Some(found) = found.ok_or(settings(at))? {
            media.insert(medium, found);
        }
    }
    let default_medium = MediumKind::from_code(u8_at(first, 24));
    let default_medium =
        default_medium.ok_or_else(|| NotACatalog::Malformed("its default medium is none".to_owned()))?;
    let ram_limit = (u8_at(first, 25) != 0).then_some(u64_at(first, 32));
    let settings = Settings { default_medium, media, ram_limit };
    let (regions, entries, sums) = decode_entries(bytes)?;
    if regions.len() as u64 != u64::from(u32_at(first, 16)) || sum_of(&sums) != u32_at(first, 20) {
        return Err(CatalogDamage::Sum.into());
    }
    let catalog = Catalog { pool, next_id: u64_at(first, 8), settings, regions };
    catalog.validate().map_err(NotACatalog::Malformed)?;
    Ok((catalog, entries))
}

/// The regions in the order of their ids, where each has its entry, and the entries' CRCs.
fn decode_entries(bytes: &[u8]) -> Result<(Vec<RegionInfo>, Entries, Vec<u32>), NotACatalog> {
    let (mut regions, mut entries, mut sums) = (Vec::new(), Entries::new(), Vec::new());
    let all = bytes.get(ENTRIES_AT..).unwrap_or_default().chunks_exact(SECTOR);
    for (entry, bytes) in all.enumerate() {
        if bytes == [0; SECTOR] {
            sums.push(0);
            continue;
        }
        if !is_sealed(bytes, CRC_AT) || u32_at(bytes, 24) as usize != entry {
            let (at, named) = (ENTRIES_AT + entry * SECTOR, name(bytes));
            return Err(CatalogDamage::Entry { entry, at, named }.into());
        }
        let region = decode_entry(bytes);
        let region = region.ok_or_else(|| NotACatalog::Malformed(format!("entry {entry} is of no region")))?;
        if entries.insert(region.id, entry).is_some() {
            return Err(NotACatalog::Malformed(format!("two entries are of region {}", region.id)));
        }
        sums.push(u32_at(bytes, CRC_AT));
        regions.push(region);
    }
    regions.sort_by_key(|region| region.id);
    Ok((regions, entries, sums))
}

fn encode_entry(bytes: &mut [u8], entry: usize, region: &RegionInfo) -> u32 {
    put(bytes, 0, &region.id.to_le_bytes());
    put(bytes, 8, &region.size.to_le_bytes());
    put(bytes, 16, &region.data_offset.to_le_bytes());
    put(bytes, 24, &(entry as u32).to_le_bytes());
    // A name has at most 255 bytes.
    let name = region.name.as_str().as_bytes();
    put(bytes, 28, &[region.kind.code(), region.medium.code(), name.len() as u8]);
    put(bytes, NAME_AT, name);
    seal(bytes, CRC_AT)
}

fn decode_entry(bytes: &[u8]) -> Option<RegionInfo> {
    Some(RegionInfo {
        id: u64_at(bytes, 0),
        name: name(bytes)?,
        kind: Kind::from_code(u8_at(bytes, 28))?,
        medium: MediumKind::from_code(u8_at(bytes, 29))?,
        size: u64_at(bytes, 8),
        data_offset: u64_at(bytes, 16),
    })
}

fn name(entry: &[u8]) -> Option<RegionName> {
    let name = entry.get(NAME_AT..)?.get(..usize::from(u8_at(entry, 30)))?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

fn encode_medium(bytes: &mut [u8], medium: MediumKind, settings: Option<&MediumSettings>) -> Result<(), String> {
    let directory = settings.and_then(|settings| settings.directory.as_ref());
    let capacity = settings.and_then(|settings| settings.capacity);
    let path = directory.map(|directory| directory.as_os_str().as_bytes()).unwrap_or_default();
    if path.len() > MEDIUM_CRC_AT - DIRECTORY_AT {
        return Err(format!("the directory of {medium} has a path of {} bytes", path.len()));
    }
    let flag = |bit: u8, set: bool| if set { 1 << bit } else { 0 };
    let flags = flag(0, settings.is_some()) | flag(1, directory.is_some()) | flag(2, capacity.is_some());
    put(bytes, 0, &[flags, medium.code()]);
    put(bytes, 2, &(path.len() as u16).to_le_bytes());
    put(bytes, 8, &capacity.unwrap_or(0).to_le_bytes());
    put(bytes, DIRECTORY_AT, path);
    seal(bytes, MEDIUM_CRC_AT);
    Ok(())
}

/// `Some(None)`: there are none.
fn decode_medium(bytes: &[u8], medium: MediumKind) -> Option<Option<MediumSettings>> {
    if !is_sealed(bytes, MEDIUM_CRC_AT) || u8_at(bytes, 1) != medium.code() {
        return None;
    }
    let flag = |bit: u8| u8_at(bytes, 0) >> bit & 1 != 0;
    if !flag(0) {
        return Some(None);
    }
    let length = usize::from(u16::from_le_bytes(*bytes.get(2..)?.first_chunk()?));
    let path = bytes.get(DIRECTORY_AT..MEDIUM_CRC_AT)?.get(..length)?;
    Some(Some(MediumSettings {
        directory: flag(1).then(|| OsStr::from_bytes(path).into()),
        capacity: flag(2).then(|| u64_at(bytes, 8)),
    }))
}

/// One number for all entries.
fn sum_of(sums: &[u32]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    // A free one behind the last is none, so that growing alone changes nothing.
    let used = sums.iter().rposition(|sum| *sum != 0).map_or(0, |last| last + 1);
    sums.iter().take(used).for_each(|sum| hasher.update(&sum.to_le_bytes()));
    hasher.finalize()
}

fn sector(bytes: &mut [u8], entry: usize) -> Option<&mut [u8]> {
    let at = entry.checked_mul(SECTOR)?.checked_add(ENTRIES_AT)?;
    bytes.get_mut(at..)?.get_mut(..SECTOR)
}

/// Lays `field` over the bytes at `at`, if there are so many.
fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(bytes) = bytes.get_mut(at..).and_then(|bytes| bytes.get_mut(..field.len())) {
        bytes.copy_from_slice(field);
    }
}

/// Puts the CRC of what is before `at` there, and returns it.
fn seal(bytes: &mut [u8], at: usize) -> u32 {
    let crc = crc32fast::hash(bytes.get(..at).unwrap_or_default());
    put(bytes, at, &crc.to_le_bytes());
    crc
}

fn is_sealed(bytes: &[u8], at: usize) -> bool {
    bytes.get(..at).is_some_and(|before| crc32fast::hash(before) == u32_at(bytes, at))
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
