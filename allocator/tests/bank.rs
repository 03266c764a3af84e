//! A bank in recoverable memory, killed and cut at random: the sum of all accounts never changes, and no transfer that was said to be durable is
//! lost.
//!
//! The one that is killed is this very test binary, run again (as in `kill.rs`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

#[path = "../examples/bank.rs"]
#[allow(dead_code, unreachable_pub)]
mod bank;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use allocator::MediumKind;
use allocator::rvm::Options;
use bank::{Bank, SUM};
use vfs::HostVfs;
use vfs::crash::CrashVfs;

/// How often it is killed, and cut.
const KILLS: u64 = 8;
const CUTS: u64 = 40;

#[test]
#[ignore = "the process that is killed"]
fn victim() {
    let Ok(dir) = std::env::var("PERDURE_TEST_BANK") else { return };
    let bank = Bank::open(Path::new(&dir), Arc::new(HostVfs), MediumKind::File, Options::default()).unwrap();
    let seed = bank.books().transfers + 1;
    bank.work(seed, u64::MAX, |durable| println!("durable {durable}")).unwrap();
}

/// Runs the bank until it said `count` times that transfers were durable, kills it, and returns the last number that it said.
fn killed_after(dir: &Path, count: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "victim", "--ignored", "--nocapture"])
        .env("PERDURE_TEST_BANK", dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said = |line: &str| line.split("durable ").nth(1)?.trim().parse::<u64>().ok();
    let last = lines.by_ref().filter_map(|line| said(&line)).take_while(|number| *number < count).last();
    child.kill().unwrap();
    child.wait().unwrap();
    // What was in the pipe still counts.
    let rest = lines.filter_map(|line| said(&line)).max();
    rest.max(last).unwrap_or(0)
}

#[test]
fn killed_at_random_the_sum_stays_and_no_durable_transfer_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = 0;
    for turn in 0..KILLS {
        let said = killed_after(dir.path(), 1 + turn * turn * 7);
        let bank = Bank::open(dir.path(), Arc::new(HostVfs), MediumKind::File, Options::default()).unwrap();
        let books = bank.books();
        assert_eq!(books.sum, SUM, "turn {turn}");
        assert!(books.transfers >= before + said, "turn {turn}: {} after {before} and {said} more", books.transfers);
        before = books.transfers;
    }
    assert!(before > 0);
}

#[test]
fn cut_at_random_the_sum_stays_and_no_durable_transfer_is_lost() {
    let open = |disk: &CrashVfs| {
        let options = Options { spool: 2048, truncate_at: Some(20) };
        Bank::open(Path::new("/bank"), Arc::new(disk.clone()), MediumKind::File, options)
    };
    let founded = CrashVfs::new();
    open(&founded).map(drop).unwrap();
    let mut transfers = 0;
    for turn in 0..CUTS {
        let disk = founded.after_kill();
        let bank = open(&disk).unwrap();
        disk.cut_at(disk.ops() + 1 + turn * 3);
        let durable = AtomicU64::new(0);
        let worked = bank.work(turn + 1, 400, |number| _ = durable.fetch_max(number, Ordering::SeqCst));
        assert!(worked.is_err() || !disk.is_cut());
        drop(bank);
        for seed in 0..4 {
            let books = open(&disk.after_cut(seed)).unwrap().books();
            assert_eq!(books.sum, SUM, "turn {turn}, seed {seed}");
            let said = durable.load(Ordering::SeqCst);
            assert!(books.transfers >= said, "turn {turn}, seed {seed}: {} of {said}", books.transfers);
            transfers += books.transfers;
        }
    }
    assert!(transfers > 0);
}
