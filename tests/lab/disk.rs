//! A disk with a volatile write cache, and what is left of it after a power cut.
//!
//! QEMU's own caches cannot be lost by `kill -9`: what a guest wrote lies in this machine's page cache and survives,
//! flushed or not. A test on such a disk would pass without a single `fsync`. So L1's disk is served from here:
//!
//! - a write goes to memory and is acknowledged; a flush (or a write with FUA) moves it to the image;
//! - at a cut each 512-byte sector that was not flushed takes, by a seeded draw, its new or its old content: writes are
//!   lost, torn and reordered, but a sector is whole, as disks promise;
//! - a sector written twice since the last flush may have reached the medium in between, so that any of its versions
//!   can be the one that remains.
//!
//! This machine stays up, so the image itself needs no fsync.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes in a sector, the unit that is never torn.
pub const SECTOR: usize = 512;

/// What becomes of acknowledged but unflushed writes at a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Each sector is kept or lost, by this seed: a disk without power-loss protection. The honest choice.
    Volatile {
        /// Equal seeds and equal requests leave equal disks.
        seed: u64,
    },
    /// All are kept: QEMU's `cache=writeback` and this machine's page cache, a disk with power-loss protection. Faster.
    Host,
}

/// How much of the unflushed was kept at a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Sectors acknowledged and not flushed.
    pub unflushed: usize,
    /// Those of them that reached the medium all the same.
    pub kept: usize,
}

/// L1's disk: an image file that outlives the machine, and its cache.
#[derive(Clone)]
pub struct Disk {
    path: PathBuf,
    volatile: Option<Arc<Mutex<VolatileDisk>>>,
}

impl Disk {
    /// Makes an image of `mebibytes` with an empty ext4 on it, which L1 mounts at `/pool`.
    ///
    /// # Panics
    ///
    /// When the image cannot be made.
    pub fn create(path: &Path, mebibytes: u64, cache: Cache) -> Self {
        make_ext4(path, mebibytes);
        Self::open(path, cache)
    }

    /// Takes an image that is there, whatever is on it.
    ///
    /// # Panics
    ///
    /// When it cannot be opened.
    pub fn open(path: &Path, cache: Cache) -> Self {
        let volatile = match cache {
            Cache::Host => None,
            Cache::Volatile { seed } => {
                let image = File::options()
                    .read(true)
                    .write(true)
                    .open(path)
                    .and_then(|image| VolatileDisk::new(image, seed))
                    .unwrap_or_else(|error| panic!("opening {}: {error}", path.display()));
                Some(Arc::new(Mutex::new(image)))
            }
        };
        Self { path: path.to_owned(), volatile }
    }

    /// The image file. Complete only while no L1 has it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn volatile(&self) -> Option<Arc<Mutex<VolatileDisk>>> {
        self.volatile.clone()
    }

    /// Loses what a power cut loses. Called by [`L1::power_cut`](super::machine::L1::power_cut).
    pub(super) fn cut(&self) -> Cut {
        let Some(disk) = &self.volatile else {
            return Cut::default();
        };
        lock(disk).cut().unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    /// Flushes, as a machine does that is switched off in good order.
    pub(super) fn settle(&self) {
        if let Some(disk) = &self.volatile {
            lock(disk).flush().unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
        }
    }

    /// The complaints of `e2fsck -f -n` about the image, or nothing when it finds none.
    ///
    /// # Panics
    ///
    /// When `e2fsck` does not run.
    pub fn fsck(&self) -> Option<String> {
        let output = with_sbin(Command::new("e2fsck").args(["-f", "-n"]).arg(&self.path))
            .output()
            .unwrap_or_else(|error| panic!("running e2fsck: {error}"));
        (!output.status.success()).then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

pub(super) fn lock(disk: &Mutex<VolatileDisk>) -> MutexGuard<'_, VolatileDisk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a sparse file of `mebibytes` with an empty ext4 on it (for a disk, or for persistent memory).
///
/// # Panics
///
/// When `mke2fs` fails.
pub fn make_ext4(path: &Path, mebibytes: u64) {
    let size = format!("{mebibytes}M");
    // 4 KiB blocks: DAX needs blocks of a page.
    let output = with_sbin(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-b", "4096"]).arg(path).arg(size))
        .output()
        .unwrap_or_else(|error| panic!("running mke2fs (tests/lab/prepare installs it): {error}"));
    assert!(output.status.success(), "mke2fs {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
}

/// Debian keeps `/usr/sbin` out of a user's path.
fn with_sbin(command: &mut Command) -> &mut Command {
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"))
}

/// The disk behind the protocol: an image, and a cache that a cut loses.
pub struct VolatileDisk {
    image: File,
    size: u64,
    unflushed: BTreeMap<u64, [u8; SECTOR]>,
    random: SplitMix,
}

impl VolatileDisk {
    /// A disk on `image`; its size is rounded down to whole sectors.
    ///
    /// # Errors
    ///
    /// When the image's size cannot be read.
    pub fn new(image: File, seed: u64) -> io::Result<Self> {
        let size = image.metadata()?.len();
        Ok(Self { image, size: size - size % SECTOR as u64, unflushed: BTreeMap::new(), random: SplitMix(seed) })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn check(&self, offset: u64, length: usize) -> io::Result<()> {
        let end = offset.checked_add(length as u64);
        let aligned = offset.is_multiple_of(SECTOR as u64) && length.is_multiple_of(SECTOR);
        if aligned && end.is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{length} bytes at {offset} of {}", self.size)))
    }

    /// Reads what was last written, flushed or not.
    ///
    /// # Errors
    ///
    /// Outside the disk, not in whole sectors, or when the image cannot be read.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check(offset, buffer.len())?;
        self.image.read_exact_at(buffer, offset)?;
        let first = offset / SECTOR as u64;
        let sectors = (buffer.len() / SECTOR) as u64;
        for (sector, bytes) in self.unflushed.range(first..first + sectors) {
            buffer[(sector - first) as usize * SECTOR..][..SECTOR].copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Writes to the cache.
    ///
    /// # Errors
    ///
    /// Outside the disk, not in whole sectors, or when an older version cannot be written to the image.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len())?;
        let first = offset / SECTOR as u64;
        for (sector, new) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let new = new.try_into().expect("a chunk is a sector");
            if let Some(older) = self.unflushed.insert(sector, new)
                && self.random.coin()
            {
                self.image.write_all_at(&older, sector * SECTOR as u64)?;
            }
        }
        Ok(())
    }

    /// Writes past the cache (FUA): these sectors are durable, what else is unflushed stays so.
    ///
    /// # Errors
    ///
    /// Outside the disk, not in whole sectors, or when the image cannot be written.
    pub fn write_through(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len())?;
        self.image.write_all_at(bytes, offset)?;
        let first = offset / SECTOR as u64;
        for sector in first..first + (bytes.len() / SECTOR) as u64 {
            self.unflushed.remove(&sector);
        }
        Ok(())
    }

    /// Moves the cache to the image.
    ///
    /// # Errors
    ///
    /// When the image cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        // Neighbours go out together: a flush after megabytes of writes is then a few system calls.
        let mut run: Vec<u8> = Vec::new();
        let mut start = 0;
        for (sector, bytes) in std::mem::take(&mut self.unflushed) {
            if start + (run.len() / SECTOR) as u64 != sector {
                self.image.write_all_at(&run, start * SECTOR as u64)?;
                run.clear();
                start = sector;
            }
            run.extend_from_slice(&bytes);
        }
        self.image.write_all_at(&run, start * SECTOR as u64)
    }

    /// Loses power: each unflushed sector is kept or lost. How likely it is kept is drawn too, so that cuts which keep
    /// nearly nothing and cuts which lose nearly nothing both come up.
    ///
    /// # Errors
    ///
    /// When the image cannot be written.
    pub fn cut(&mut self) -> io::Result<Cut> {
        let unflushed = std::mem::take(&mut self.unflushed);
        let likelihood = self.random.next() % 257;
        let mut cut = Cut { unflushed: unflushed.len(), kept: 0 };
        for (sector, bytes) in unflushed {
            if self.random.next() % 256 < likelihood {
                self.image.write_all_at(&bytes, sector * SECTOR as u64)?;
                cut.kept += 1;
            }
        }
        Ok(cut)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
#[derive(Clone)]
pub struct SplitMix(
    /// The seed, and the state.
    pub u64,
);

impl SplitMix {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends, and is no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn coin(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECTORS: u64 = 16;

    fn disk(seed: u64) -> VolatileDisk {
        let image = tempfile::tempfile().unwrap();
        image.set_len(SECTORS * SECTOR as u64).unwrap();
        VolatileDisk::new(image, seed).unwrap()
    }

    #[derive(Clone, Debug)]
    enum Request {
        Write { sector: u64, count: u64, fill: u8 },
        Flush,
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            4 => (0..SECTORS, 1..5u64, 1..=255u8).prop_map(|(sector, count, fill)| Request::Write { sector, count, fill }),
            1 => Just(Request::Flush),
        ]
    }

    proptest! {
        /// Before the cut reads see the newest write; after it every sector holds its flushed content or one written since.
        #[test]
        fn a_cut_leaves_the_flushed_or_something_newer(seed: u64, requests in proptest::collection::vec(request(), 0..40)) {
            let mut disk = disk(seed);
            let mut possible = vec![vec![0u8]; SECTORS as usize];
            for request in &requests {
                match *request {
                    Request::Write { sector, count, fill } => {
                        let count = count.min(SECTORS - sector);
                        disk.write(sector * SECTOR as u64, &vec![fill; count as usize * SECTOR]).unwrap();
                        for versions in &mut possible[sector as usize..(sector + count) as usize] {
                            versions.push(fill);
                        }
                    }
                    Request::Flush => {
                        disk.flush().unwrap();
                        for versions in &mut possible {
                            *versions = versions.last().copied().into_iter().collect();
                        }
                    }
                }
            }
            let mut bytes = vec![0; SECTORS as usize * SECTOR];
            disk.read(0, &mut bytes).unwrap();
            for (sector, versions) in bytes.chunks(SECTOR).zip(&possible) {
                prop_assert!(sector.iter().all(|byte| Some(byte) == versions.last()));
            }
            disk.cut().unwrap();
            disk.read(0, &mut bytes).unwrap();
            for (sector, versions) in bytes.chunks(SECTOR).zip(&possible) {
                prop_assert!(versions.contains(&sector[0]) && sector.iter().all(|byte| *byte == sector[0]));
            }
        }
    }

    #[test]
    fn over_many_seeds_a_cut_loses_keeps_and_reorders() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut disk = disk(seed);
            disk.write(0, &[1; SECTOR]).unwrap();
            disk.write(SECTOR as u64, &[2; SECTOR]).unwrap();
            disk.cut().unwrap();
            let mut bytes = [0; 2 * SECTOR];
            disk.read(0, &mut bytes).unwrap();
            seen.insert((bytes[0], bytes[SECTOR]));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(0, 0), (0, 2), (1, 0), (1, 2)]);
    }

    #[test]
    fn a_request_outside_the_disk_or_across_sectors_is_refused() {
        let mut disk = disk(0);
        let end = SECTORS * SECTOR as u64;
        assert!(disk.write(end, &[0; SECTOR]).is_err());
        assert!(disk.write(u64::MAX - 511, &[0; SECTOR]).is_err());
        assert!(disk.write(1, &[0; SECTOR]).is_err());
        assert!(disk.read(0, &mut [0; 3]).is_err());
    }
}
