//! What a VM's guest asked for first after a resume, for the next one to fetch first.
//!
//! A guest that goes on from a generation touches much the same memory as the last time (Ustiugov et al., "Benchmarking, Analysis, and
//! Optimization of Serverless Function Snapshots", ASPLOS 2021, whose REAP records the pages that faulted and fetches them first). The
//! record lies in `<pool>/run/NAME.working-set`: a frame (see `allocator`'s FORMAT.md) around the cluster's size (8 bytes) and the numbers of
//! clusters (4 bytes each), little-endian, in the order in which they were asked for. It is a hint: it is written without a flush, and one
//! that cannot be read is none.

use std::io;
use std::path::{Path, PathBuf};

use allocator::frame;
use vfs::OpenMode;

const MAGIC: [u8; 8] = *b"PDWRKSET";
const VERSION: u32 = 1;
/// Most clusters of a record: as many as paged memory has.
const CLUSTERS_MAX: usize = 1 << 17;
const BODY_MAX: usize = 8 + 4 * CLUSTERS_MAX;

/// Where the record of a VM lies.
#[must_use]
pub fn path(pool: &Path, name: &str) -> PathBuf {
    pool.join("run").join(format!("{name}.working-set"))
}

/// The clusters to fetch first; none if there is no record, or none for clusters of this size.
pub(super) fn read(pool: &Path, name: &str, cluster: u64) -> Vec<u32> {
    let read = || -> io::Result<Vec<u8>> {
        let file = vfs::cut::host().open(&path(pool, name), OpenMode::Read)?;
        let length = usize::try_from(file.len()?).unwrap_or(usize::MAX).min(frame::HEADER_LEN + BODY_MAX);
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    read().ok().and_then(|bytes| decode(&bytes, cluster)).unwrap_or_default()
}

fn decode(bytes: &[u8], cluster: u64) -> Option<Vec<u32>> {
    let frame = frame::decode(bytes, MAGIC, VERSION, BODY_MAX).ok()?;
    let (size, clusters) = frame.body.split_first_chunk::<8>()?;
    (u64::from_le_bytes(*size) == cluster)
        .then(|| clusters.as_chunks::<4>().0.iter().map(|number| u32::from_le_bytes(*number)).collect())
}

/// Adds what was asked for in this resume to what was before. Where that becomes more than half of `clusters`, the record has outlived
/// itself, and begins anew.
pub fn learn(pool: &Path, name: &str, cluster: u64, clusters: u64, asked: &[u32]) {
    let mut record = read(pool, name, cluster);
    let known: std::collections::HashSet<u32> = record.iter().copied().collect();
    let new: Vec<u32> = asked.iter().copied().filter(|number| !known.contains(number)).collect();
    if new.is_empty() {
        return;
    }
    record.extend(&new);
    if record.len() as u64 > clusters / 2 {
        record = asked.to_vec();
    }
    record.truncate(CLUSTERS_MAX);
    if let Err(error) = write(pool, name, cluster, &record) {
        tracing::debug!("{name}: what it asked for first is not remembered: {error}");
    }
}

fn write(pool: &Path, name: &str, cluster: u64, record: &[u32]) -> io::Result<()> {
    let mut body = cluster.to_le_bytes().to_vec();
    body.extend(record.iter().flat_map(|number| number.to_le_bytes()));
    let path = path(pool, name);
    let new = path.with_added_extension("new");
    let vfs = vfs::cut::host();
    vfs.open(&new, OpenMode::CreateTruncate)?.write_all_at(&frame::encode(MAGIC, VERSION, &body), 0)?;
    vfs.rename(&new, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_remembered_in_order_and_grows_until_it_begins_anew() {
        let pool = tempfile::tempdir().unwrap();
        std::fs::create_dir(pool.path().join("run")).unwrap();
        assert!(read(pool.path(), "web", 65536).is_empty());
        learn(pool.path(), "web", 65536, 20, &[7, 3, 9]);
        learn(pool.path(), "web", 65536, 20, &[3, 1]);
        assert_eq!(read(pool.path(), "web", 65536), [7, 3, 9, 1]);
        assert!(read(pool.path(), "web", 131_072).is_empty(), "of clusters of another size");
        learn(pool.path(), "web", 65536, 20, &[10, 11, 12, 13, 14, 15, 16]);
        assert_eq!(read(pool.path(), "web", 65536), [10, 11, 12, 13, 14, 15, 16]);
    }

    #[test]
    fn any_flipped_byte_makes_it_no_record() {
        let pool = tempfile::tempdir().unwrap();
        std::fs::create_dir(pool.path().join("run")).unwrap();
        learn(pool.path(), "web", 65536, 20, &[7, 3]);
        let good = std::fs::read(path(pool.path(), "web")).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert_ne!(decode(&bad, 65536), Some(vec![7, 3]), "byte {at}");
        }
        for length in 0..good.len() {
            assert_eq!(decode(&good[..length], 65536), None, "{length}");
        }
    }
}
