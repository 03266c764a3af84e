//! What the same generations cost when they are kept in another way: the same memory, the same pages changed, the same run.
//!
//! * a store of this program;
//! * one file a page, as PhantomOS's Snapper 2 keeps them, made durable by one `syncfs` a generation, which is the cheapest way there is
//!   (Snapper itself syncs nothing);
//! * a full copy: one file a generation, and one `fsync`;
//! * qcow2 with internal snapshots: `qemu-io` writes the changed pages and flushes, `qemu-img snapshot -c` keeps them. The processes
//!   that this takes are part of it.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use snapshot::{PAGE_SIZE, Store};

use super::store::{Changes, change, create, noise, put, remove, write_full, write_raw};
use super::{BenchError, Distribution};
use crate::machine::config::ByteSize;
use crate::machine::time::nanoseconds;

/// What is done to the memory.
#[derive(Debug, Clone, Copy)]
pub struct Changing {
    /// Pages that change from one generation to the next, anywhere.
    pub dirty: u64,
    /// Generations after the first one.
    pub generations: u64,
}

/// A way to keep generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// A store of this program.
    Perdure,
    /// One file a page.
    FileAPage,
    /// One file a generation.
    FullCopy,
    /// qcow2 with internal snapshots, clusters of 64 KiB: what `qemu-img` makes unless told otherwise.
    Qcow2,
    /// The same with clusters as large as a page.
    Qcow2SmallClusters,
}

impl Way {
    const ALL: [Self; 5] = [Self::Perdure, Self::FileAPage, Self::FullCopy, Self::Qcow2, Self::Qcow2SmallClusters];
}

/// What a way costs.
#[derive(Debug, Clone, Serialize)]
pub struct Alternative {
    /// Which.
    pub way: Way,
    /// Bytes of memory.
    pub memory: ByteSize,
    /// Pages changed before each generation but the first.
    pub dirty: u64,
    /// Why there is nothing more to say.
    pub missing: Option<String>,
    /// The first generation, all of memory, until it was durable.
    pub first_ns: u64,
    /// Each other one.
    pub generation: Distribution,
    /// What all of them take on the disk.
    pub bytes: u64,
}

/// Measures all ways in `directory`, which is left empty.
///
/// # Errors
/// [`BenchError`].
pub fn measure(directory: &Path, memory: ByteSize, changing: Changing) -> Result<Vec<Alternative>, BenchError> {
    Way::ALL.into_iter().map(|way| measure_way(way, &directory.join("alternative"), memory, changing)).collect()
}

fn measure_way(way: Way, directory: &Path, memory: ByteSize, changing: Changing) -> Result<Alternative, BenchError> {
    let mut result = Alternative {
        way,
        memory,
        dirty: changing.dirty,
        missing: missing(way),
        first_ns: 0,
        generation: Distribution::of(Vec::new()),
        bytes: 0,
    };
    if result.missing.is_some() {
        return Ok(result);
    }
    let mut image = vec![0; usize::try_from(memory.0).unwrap_or(usize::MAX)];
    noise(&mut image, 1);
    std::fs::create_dir_all(directory).map_err(system("make a directory"))?;
    let (took, mut keeper) = Keeper::begin(way, directory, &image)?;
    result.first_ns = nanoseconds(took);
    let mut samples = Vec::new();
    for number in 2..2 + changing.generations {
        let pages = change(&mut image, number, changing.dirty, Changes::Scattered);
        samples.push(nanoseconds(keeper.keep(number, &image, &pages)?));
    }
    drop(keeper);
    result.generation = Distribution::of(samples);
    result.bytes = allocated(directory)?;
    remove(directory)?;
    Ok(result)
}

fn missing(way: Way) -> Option<String> {
    let needs: &[&str] = match way {
        Way::Qcow2 | Way::Qcow2SmallClusters => &["qemu-img", "qemu-io"],
        Way::Perdure | Way::FileAPage | Way::FullCopy => &[],
    };
    let runs = |program: &str| {
        Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    let absent = needs.iter().find(|program| !runs(program))?;
    Some(format!("{absent} is not installed: apt install qemu-utils"))
}

/// Keeps generations in one way. Its functions return how long that took, what they prepare for it and clear away not counted.
enum Keeper {
    Perdure(Store),
    FileAPage(PathBuf),
    FullCopy(PathBuf),
    Qcow2(Qcow2),
}

impl Keeper {
    fn begin(way: Way, directory: &Path, image: &[u8]) -> Result<(Duration, Self), BenchError> {
        match way {
            Way::Perdure => {
                let store = create(&directory.join("store"))?;
                let begun = Instant::now();
                write_full(&store, image)?;
                Ok((begun.elapsed(), Self::Perdure(store)))
            }
            Way::FileAPage => {
                let pages: Vec<u64> = (0..(image.len() / PAGE_SIZE) as u64).collect();
                let begun = Instant::now();
                write_page_files(directory, 1, image, &pages)?;
                Ok((begun.elapsed(), Self::FileAPage(directory.to_owned())))
            }
            Way::FullCopy => {
                let begun = Instant::now();
                write_raw(&directory.join("1"), image)?;
                Ok((begun.elapsed(), Self::FullCopy(directory.to_owned())))
            }
            Way::Qcow2 => Qcow2::begin(directory, 64 << 10, image),
            Way::Qcow2SmallClusters => Qcow2::begin(directory, PAGE_SIZE, image),
        }
    }

    fn keep(&mut self, number: u64, image: &[u8], pages: &[u64]) -> Result<Duration, BenchError> {
        let begun = Instant::now();
        match self {
            Self::Perdure(store) => put(store, image, number, pages)?,
            Self::FileAPage(directory) => write_page_files(directory, number, image, pages)?,
            Self::FullCopy(directory) => drop(write_raw(&directory.join(number.to_string()), image)?),
            Self::Qcow2(disk) => return disk.keep(number, image, pages),
        }
        Ok(begun.elapsed())
    }
}

/// One generation in a directory of its own: a file for each page, and one that tells which pages there are.
fn write_page_files(directory: &Path, number: u64, image: &[u8], pages: &[u64]) -> Result<(), BenchError> {
    let directory = directory.join(number.to_string());
    std::fs::create_dir(&directory).map_err(system("make a directory"))?;
    let mut archive = Vec::with_capacity(pages.len() * 8);
    for page in pages {
        std::fs::write(directory.join(page.to_string()), page_of(image, *page)).map_err(system("write a page"))?;
        archive.extend_from_slice(&page.to_le_bytes());
    }
    std::fs::write(directory.join("archive"), archive).map_err(system("write an archive"))?;
    let opened = File::open(&directory).map_err(system("open a directory"))?;
    rustix::fs::syncfs(opened).map_err(|error| system("flush")(error.into()))
}

struct Qcow2 {
    disk: PathBuf,
    /// Where `qemu-io` finds the pages that it writes.
    pages: PathBuf,
}

impl Qcow2 {
    fn begin(directory: &Path, cluster: usize, image: &[u8]) -> Result<(Duration, Keeper), BenchError> {
        let (disk, raw, pages) = (directory.join("disk.qcow2"), directory.join("raw"), directory.join("pages"));
        write_raw(&raw, image)?;
        std::fs::create_dir(&pages).map_err(system("make a directory"))?;
        let begun = Instant::now();
        let options = format!("cluster_size={cluster}");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2", "-o", &options]).arg(&raw).arg(&disk);
        run(&mut convert, "")?;
        let qcow2 = Self { disk, pages };
        qcow2.snapshot(1)?;
        let took = begun.elapsed();
        remove(&raw)?;
        Ok((took, Keeper::Qcow2(qcow2)))
    }

    fn keep(&self, number: u64, image: &[u8], pages: &[u64]) -> Result<Duration, BenchError> {
        let mut commands = String::new();
        for page in pages {
            let path = self.pages.join(page.to_string());
            std::fs::write(&path, page_of(image, *page)).map_err(system("write a page"))?;
            let at = page * PAGE_SIZE as u64;
            let _ = writeln!(commands, "write -q -s {} {at} {PAGE_SIZE}", path.display());
        }
        commands.push_str("flush\n");
        let begun = Instant::now();
        run(Command::new("qemu-io").args(["-f", "qcow2", "-t", "writeback"]).arg(&self.disk), &commands)?;
        self.snapshot(number)?;
        let took = begun.elapsed();
        pages.iter().try_for_each(|page| remove(&self.pages.join(page.to_string())))?;
        Ok(took)
    }

    fn snapshot(&self, number: u64) -> Result<(), BenchError> {
        run(Command::new("qemu-img").args(["snapshot", "-c", &number.to_string()]).arg(&self.disk), "")?;
        File::open(&self.disk).and_then(|file| file.sync_all()).map_err(system("flush a disk"))
    }
}

/// Runs a program with `input`, and sees that it succeeds.
fn run(command: &mut Command, input: &str) -> Result<(), BenchError> {
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(system("start qemu-img or qemu-io"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(system("tell qemu-io what to write"))?;
    }
    let output = child.wait_with_output().map_err(system("wait for qemu-img or qemu-io"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(system("run qemu-img or qemu-io")(std::io::Error::other(said)))
}

fn page_of(image: &[u8], page: u64) -> &[u8] {
    let start = page as usize * PAGE_SIZE;
    image.get(start..start + PAGE_SIZE).unwrap_or_default()
}

/// What the file system has given to everything below `path`, in bytes.
fn allocated(path: &Path) -> Result<u64, BenchError> {
    let found = std::fs::symlink_metadata(path).map_err(system("look at a file"))?;
    let mut bytes = found.blocks() * 512;
    if found.is_dir() {
        for entry in std::fs::read_dir(path).map_err(system("list a directory"))? {
            bytes += allocated(&entry.map_err(system("list a directory"))?.path())?;
        }
    }
    Ok(bytes)
}

fn system(doing: &'static str) -> impl Fn(std::io::Error) -> BenchError {
    move |source| BenchError::System { doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_keeps_all_generations_or_says_what_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let memory = ByteSize(8 << 20);
        let changing = Changing { dirty: 8, generations: 2 };
        let ways = measure(directory.path(), memory, changing).unwrap();
        assert_eq!(ways.iter().map(|alternative| alternative.way).collect::<Vec<_>>(), Way::ALL);
        for alternative in ways.iter().filter(|alternative| alternative.missing.is_none()) {
            assert!(alternative.bytes >= memory.0 + changing.generations * 4096, "{alternative:?}");
            assert!(alternative.first_ns > 0 && alternative.generation.samples == changing.generations as usize);
        }
        assert!(ways[2].bytes >= (1 + changing.generations) * memory.0, "full copies share nothing");
        assert!(ways[0].bytes < ways[2].bytes);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
