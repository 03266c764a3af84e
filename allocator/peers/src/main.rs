//! The debit-credit workload of LRVM and Vista on recoverable memory, redb, SQLite and LMDB, in one run, on one file system, with the same
//! durability.
//!
//! A transaction takes an amount from an account (one of 100,000, at random), and books it with a teller (10), a branch (1) and in an audit trail:
//! records of 128 bytes, an audit record of 64, as in section 7.1.1 of the LRVM paper (SOSP '93). All four do the same: three records are read,
//! changed and written, and one is written. Rounds go by turns, so that a slow moment of the disk meets all alike.
//!
//! With a flush, each commit is durable when it returns. Without, it is atomic, and durable later: no-flush commits here,
//! `Durability::None` of redb, `synchronous=OFF` of SQLite (WAL), `MDB_NOSYNC` of LMDB (which promises the least: a cut may corrupt it).

mod debit_credit;
mod lmdb;
mod redb_bank;
mod rvm;
mod sqlite;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use debit_credit::{ACCOUNTS, Bank, Requests};
use serde::Serialize;

const USAGE: &str = "usage: peers [--json] [--rounds N] [--flushed N] [--unflushed N] DIRECTORY
  --rounds     how often each has its turn (default 9)
  --flushed    transactions a round, each durable when it returns (default 200)
  --unflushed  transactions a round without that (default 20000)";

struct Wanted {
    directory: PathBuf,
    json: bool,
    rounds: u64,
    transactions: [u64; 2],
}

fn wanted() -> Result<Wanted> {
    let mut wanted = Wanted { directory: PathBuf::new(), json: false, rounds: 9, transactions: [20_000, 200] };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<u64> { Ok(arguments.next().context(USAGE)?.parse()?) };
        match argument.as_str() {
            "--json" => wanted.json = true,
            "--rounds" => wanted.rounds = number()?,
            "--flushed" => wanted.transactions[1] = number()?,
            "--unflushed" => wanted.transactions[0] = number()?,
            other if other.starts_with('-') => bail!("{USAGE}"),
            directory => wanted.directory = directory.into(),
        }
    }
    if wanted.directory.as_os_str().is_empty() {
        bail!("{USAGE}");
    }
    Ok(wanted)
}

#[derive(Debug, Serialize)]
struct Found {
    peer: &'static str,
    flush: bool,
    /// Transactions a second: the median round, and the slowest and the fastest.
    per_second: f64,
    slowest: f64,
    fastest: f64,
}

fn open(peer: &str, directory: &Path, flush: bool) -> Result<Box<dyn Bank>> {
    let directory = directory.join(format!("{peer}-{flush}"));
    std::fs::create_dir_all(&directory)?;
    Ok(match peer {
        "rvm" => Box::new(rvm::Accounts::open(&directory, flush)?),
        "redb" => Box::new(redb_bank::Accounts::open(&directory, flush)?),
        "SQLite" => Box::new(sqlite::Accounts::open(&directory, flush)?),
        _ => Box::new(lmdb::Accounts::open(&directory, flush)?),
    })
}

const PEERS: [&str; 4] = ["rvm", "redb", "SQLite", "LMDB"];

fn measure(wanted: &Wanted, directory: &Path, flush: bool) -> Result<Vec<Found>> {
    let transactions = wanted.transactions[usize::from(flush)];
    let mut banks = PEERS.iter().map(|peer| open(peer, directory, flush)).collect::<Result<Vec<_>>>()?;
    let mut rates = vec![Vec::new(); banks.len()];
    let mut requests: Vec<Requests> = banks.iter().map(|_| Requests::default()).collect();
    // One round to warm up, which is not counted.
    for round in 0..=wanted.rounds {
        for (index, bank) in banks.iter_mut().enumerate() {
            let begun = Instant::now();
            (0..transactions).try_for_each(|_| bank.transfer(&requests[index].next()))?;
            let rate = transactions as f64 / begun.elapsed().as_secs_f64();
            bank.rest()?;
            if round > 0 {
                rates[index].push(rate);
            }
        }
    }
    // All did the same, so they must have the same.
    let sums = banks.iter_mut().map(|bank| bank.sums()).collect::<Result<Vec<_>>>()?;
    if sums.iter().any(|sum| *sum != sums[0]) {
        bail!("the banks differ: {sums:?}");
    }
    let found = PEERS.iter().zip(rates).map(|(peer, mut rates)| {
        rates.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| rates.get(index).copied().unwrap_or(0.0);
        Found {
            peer,
            flush,
            per_second: at(rates.len() / 2),
            slowest: at(0),
            fastest: at(rates.len().saturating_sub(1)),
        }
    });
    Ok(found.collect())
}

fn main() -> Result<()> {
    let wanted = wanted()?;
    let directory = wanted.directory.join(format!("peers-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let found: Result<Vec<_>> = [false, true].iter().map(|flush| measure(&wanted, &directory, *flush)).collect();
    std::fs::remove_dir_all(&directory)?;
    let found: Vec<Found> = found?.into_iter().flatten().collect();
    if wanted.json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "accounts": ACCOUNTS, "results": found }))?);
        return Ok(());
    }
    for Found { peer, flush, per_second, slowest, fastest } in &found {
        let ours = found.iter().find(|other| other.peer == PEERS[0] && other.flush == *flush);
        let ratio = ours.map_or(0.0, |ours| ours.per_second / per_second);
        let flush = if *flush { "flush" } else { "no flush" };
        println!(
            "{peer:8} {flush:9} {per_second:>10.0} /s ({slowest:.0} to {fastest:.0}); rvm does {ratio:.2} times that"
        );
    }
    Ok(())
}
