//! The guest `pages`, which walks a list that it is given, and checks every page that it touches.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guests::pages::{Access, List, PAGE_WORDS, verify, word};
use guests::random::SplitMix64;
use tempfile::TempDir;
use tests::perdure::{LIMIT, Perdure, Running};

use crate::vm::{MEDIA, eventually, record};

/// A list in a file of its own.
struct Walk {
    bytes: Vec<u8>,
    file: PathBuf,
    _directory: TempDir,
}

impl Walk {
    fn new(bytes: Vec<u8>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("list");
        fs::write(&file, &bytes).expect("a list");
        Self { bytes, file, _directory: directory }
    }

    /// Every one of `pages` pages in turn, and then as many at random; a third of the accesses write.
    fn over(pages: u32) -> Self {
        let mut random = SplitMix64::new(u64::from(pages));
        let at_random: Vec<u32> =
            (0..pages).map(|_| u32::try_from(random.below(u64::from(pages))).expect("a page")).collect();
        let accesses = (0..pages).chain(at_random).zip(0_u32..);
        let accesses = accesses.map(|(page, index)| Access { page, write: index.is_multiple_of(3) });
        Self::new(List::new(accesses, pages).expect("a list").to_bytes())
    }

    #[track_caller]
    fn start(&self, perdure: &Perdure, cmdline: &str, more: &[&str]) -> Running {
        let list = self.file.to_str().expect("a path of plain text");
        let arguments = ["run", "web", "--guest", "pages", "--initrd", list, "--cmdline", cmdline, "--serial", "stdio"];
        perdure.spawn(&[&arguments, more].concat())
    }
}

/// The accesses that the guest has reported.
#[track_caller]
fn accesses(perdure: &Perdure) -> u64 {
    record(perdure, "web")["status"]["report"].as_u64().unwrap_or(0)
}

#[test]
fn a_working_set_beyond_256_mib_is_walked_to_its_end_through_outages() {
    const PAGES: u32 = 75_000; // 293 MiB
    for medium in MEDIA {
        let (perdure, walk) = (Perdure::new(), Walk::over(PAGES));
        // Seconds of it; the outages come at any access, as the commands take any time.
        let running = walk.start(&perdure, "count=100000000 every=400000", &["--memory", "320M", "--medium", medium]);
        eventually("accesses", || accesses(&perdure) >= 400_000);
        fs::remove_file(&walk.file).expect("only a boot needs it");
        let mut output = String::new();
        let mut running = Some(running);
        for pause in [3, 40, 170] {
            std::thread::sleep(Duration::from_millis(pause));
            perdure.run(&["powerfail", "web"]).expect_code(0);
            let ended = running.take().expect("a process").wait(LIMIT).expect_code(3);
            output += &ended.stdout;
            let before = verify(&output, &walk.bytes).unwrap_or_else(|error| panic!("{medium}: {error}\n{output}"));
            assert!(!before.complete, "the outage came too late");
            running = Some(perdure.spawn(&["resume", "web"]));
            eventually("life", || record(&perdure, "web")["state"] == "running");
        }
        output += &running.take().expect("a process").wait(LIMIT).expect_code(0).stdout;
        let report = verify(&output, &walk.bytes).unwrap_or_else(|error| panic!("{medium}: {error}\n{output}"));
        assert!(report.complete && report.accesses == 100_000_000, "{report:?}");
    }
}

#[test]
fn what_is_not_as_it_was_written_last_is_found_and_named() {
    const PAGE: u32 = 1234;
    // Zeros, a page that is older than its last write, another page, one word in the middle: what could come back in its place.
    let zeros: fn(&mut [u64]) = |words| words.fill(0);
    let older: fn(&mut [u64]) = |words| {
        words[1] -= 1;
        words[PAGE_WORDS - 1] = words[PAGE_WORDS - 1].wrapping_sub(1);
    };
    let another: fn(&mut [u64]) = |words| (0..).zip(words).for_each(|(index, at)| *at = word(PAGE + 1, index));
    let one_word: fn(&mut [u64]) = |words| words[100] ^= 1 << 63;
    for (what, alter) in [("zeros", zeros), ("older", older), ("another", another), ("one word", one_word)] {
        let (perdure, walk) = (Perdure::new(), Walk::over(2000));
        let running = walk.start(&perdure, "every=100000 writes=all", &["--memory", "16M", "--medium", "file"]);
        eventually("accesses", || accesses(&perdure) >= 100_000);
        perdure.run(&["powerfail", "web"]).expect_code(0);
        running.wait(LIMIT).expect_code(3);
        alter_page(perdure.pool(), PAGE, alter);
        let ended = perdure.run(&["resume", "web"]).expect_code(1);
        let damaged = format!("pages: damaged page {PAGE} at access ");
        assert!(ended.stdout.contains(&damaged), "{what}: {}", ended.stdout);
    }
}

/// Alters the page in the region that holds it.
#[track_caller]
fn alter_page(pool: &Path, page: u32, alter: impl Fn(&mut [u64])) {
    let first = word(page, 0).to_le_bytes();
    for path in regions(pool) {
        let mut bytes = fs::read(&path).expect("a region");
        let Some(found) = bytes.chunks_mut(4096).find(|chunk| chunk.starts_with(&first)) else { continue };
        let (words, _) = found.as_chunks_mut::<8>();
        let mut values: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        alter(&mut values);
        words.iter_mut().zip(values).for_each(|(word, value)| *word = value.to_le_bytes());
        return fs::write(&path, bytes).expect("a region");
    }
    panic!("page {page} lies in no region below {}", pool.display());
}

fn regions(directory: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    paths
        .flat_map(|path| match path.extension() {
            _ if path.is_dir() => regions(&path),
            Some(extension) if extension == "region" => vec![path],
            _ => Vec::new(),
        })
        .collect()
}

#[test]
fn lists_that_are_none_are_refused_in_words() {
    let entry = |page: u32| Access { page, write: false }.entry().to_le_bytes();
    let beyond = [entry(4), entry(5)].concat();
    let cases: [(&[u8], &str, &str); 4] = [
        (&beyond, "pages=5", "entry 1 of the list names page 5, beyond pages=5\n"),
        (&beyond[..7], "", "the list is no whole number of 4-byte entries\n"),
        (&beyond, "pages=100000", "pages= does not fit into the memory\n"),
        (&entry(!0), "", "pages= does not fit into the memory\n"),
    ];
    for (list, cmdline, why) in cases {
        let perdure = Perdure::new();
        let ended = Walk::new(list.to_vec()).start(&perdure, cmdline, &["--memory", "8M"]).wait(LIMIT).expect_code(1);
        assert!(ended.stdout.ends_with(why), "{}", ended.stdout);
        assert!(ended.stderr.contains("ended itself with code 2"), "{}", ended.stderr);
    }
    let perdure = Perdure::new();
    let ended = perdure.run(&["run", "--guest", "pages", "--memory", "8M"]).expect_code(1);
    assert!(ended.stdout.ends_with("no list: give one as the initial RAM disk\n"), "{}", ended.stdout);
    assert!(perdure.run(&["run", "web", "--initrd", "list"]).expect_code(2).stderr.contains("--guest"));
}
