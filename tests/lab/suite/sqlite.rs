//! SQLite in Debian, in the middle of its transactions, and the power fails: with a warning, and with none.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::lab::debian::{self, PERDURE, Row, SERIAL, SOON, WORK, check_disk, clocks, rows, run, serial, stop};
use tests::lab::disk::SplitMix;
use tests::lab::kernel_log;
use tests::lab::machine::{L1, Options, in_emulation};

use crate::outages::assert_frozen;
use crate::peer::{ADDRESS, PORT, Peer};

const MAC: &str = "02:00:5e:10:00:01";
/// L1's card and the guest's tap are ports of one bridge: L1 keeps nothing of the guest's connections that a cut could take.
const BRIDGE: &str = "\
    ip link set eth0 up && brctl addbr br0 && brctl addif br0 eth0 && tunctl -t vm0 && ip link set vm0 up && \
    brctl addif br0 vm0 && ip link set br0 up";

/// How many outages there are, where not as few as in a test run.
const OUTAGES: &str = "PERDURE_TEST_OUTAGES";
/// At which moments they come, and what L1's disk loses at each.
const SEED: &str = "PERDURE_TEST_SEED";
/// By how much clocks may differ that are read in whole seconds, on a busy machine.
const OFF: f64 = 4.0;

fn options(directory: &Path, seed: u64, more: Vec<String>) -> Options {
    debian::options(directory, seed, Path::new(env!("CARGO_BIN_EXE_chain")), more)
}

fn counted(said: &str) -> (u64, u64) {
    said.lines().find_map(debian::counted).unwrap_or_else(|| panic!("the ledger did not end: {said}"))
}

fn number_from(variable: &str, otherwise: u64) -> u64 {
    let given = std::env::var(variable);
    given.map_or(otherwise, |text| text.parse().unwrap_or_else(|why| panic!("{variable}={text}: {why}")))
}

/// Waits until `done` is true of the number of rows that the peer was told of.
fn wait_for(l1: &mut L1, peer: &Peer, done: impl Fn(usize) -> bool) {
    let begun = Instant::now();
    while !done(peer.told().lines.len()) {
        let (said, told) = (serial(l1), peer.told());
        let count = told.lines.len();
        assert_eq!(told.end, None, "the connection ended after {count} rows: {said}");
        assert!(begun.elapsed() < WORK, "no more than {count} rows within {WORK:?}: {said}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How long the guest was away: at least, and at most, in seconds.
#[derive(Default)]
struct Away(f64, f64);

/// The power fails: everything is made durable, and then L1 loses its power, too. Both come back.
fn outage(mut l1: L1, options: &Options, peer: &Peer, away: &mut Away) -> L1 {
    let begun = Instant::now();
    l1.check(&format!("{PERDURE} powerfail db"), SOON);
    let frozen = Instant::now();
    assert_frozen(&l1.check(&format!("{PERDURE} list --json"), SOON), "db");
    serial(&mut l1);
    let cut = l1.power_cut();
    eprintln!("frozen after row {}, {cut:?}", peer.told().lines.len());
    let mut l1 = L1::boot(options);
    l1.check(BRIDGE, SOON);
    away.0 += frozen.elapsed().as_secs_f64();
    l1.check(&format!("{PERDURE} resume db --detach"), SOON);
    away.1 += begun.elapsed().as_secs_f64();
    l1
}

/// How far the guest's clock was behind this machine's when the peer had its last row; that no row is missing, and none came twice.
fn lag(peer: &Peer) -> f64 {
    let mut lag = 0.0;
    for (index, line) in peer.told().lines.iter().enumerate() {
        let row = Row::read(&line.text).unwrap_or_else(|| panic!("{line:?}"));
        assert_eq!(row.number, index as u64 + 1, "a row is missing, or came twice: {line:?}");
        let at: SystemTime = line.at;
        lag = at.duration_since(UNIX_EPOCH).expect("a date after 1970").as_secs_f64() - row.date as f64;
    }
    lag
}

fn a_database_survives_outages(outages: u64, seed: u64) {
    eprintln!("{outages} outages, {SEED}={seed}");
    let directory = tempfile::tempdir().expect("a directory");
    let mut random = SplitMix(seed);
    let peer = Peer::new(directory.path());
    let options = options(directory.path(), random.next(), peer.qemu());
    let mut l1 = L1::boot(&options);
    l1.check(BRIDGE, SOON);
    run(&mut l1, &format!("wal,{ADDRESS}:{PORT}"), &format!("--net tap=vm0,mac={MAC}"));
    wait_for(&mut l1, &peer, |count| count > 0);
    let (before, mut away) = (lag(&peer), Away::default());
    for _ in 0..outages {
        // Most in the middle of the work, some just after the one before.
        if !random.next().is_multiple_of(4) {
            let count = peer.told().lines.len();
            wait_for(&mut l1, &peer, |now| now > count);
        }
        std::thread::sleep(Duration::from_millis(random.next() % 4000));
        l1 = outage(l1, &options, &peer, &mut away);
    }
    let count = peer.told().lines.len();
    wait_for(&mut l1, &peer, |now| now > count + 20);
    let lag = lag(&peer) - before;
    assert!((away.0 - OFF..away.1 + OFF).contains(&lag), "away for {} to {} s, {lag} s behind", away.0, away.1);
    let said = stop(&mut l1, PERDURE);
    kernel_log::assert_clean(&said);
    let (system, rtc) = clocks(&said);
    assert!((system - rtc).abs() <= 2, "its clock shows {system}, its real-time clock {rtc}");
    let (rows, returned) = counted(&said);
    let told = peer.told();
    assert_eq!(told.lines.len() as u64, rows, "the peer knows of each row");
    assert!(returned > count as u64, "{returned} rows came back from the peer, {count} before the last outage");
    assert_eq!((told.connections, told.end), (1, Some("the guest closed it")));
    eprintln!("{rows} rows through {outages} outages, {returned} came back; {lag:.0} s behind");
    check_disk(directory.path(), &options, l1, PERDURE, rows);
}

#[test]
fn sqlite_in_debian_loses_no_row_and_no_connection_when_the_power_fails() {
    let seed = number_from(SEED, 21);
    in_emulation(|| a_database_survives_outages(number_from(OUTAGES, 1), seed));
}

/// What a cut may cost beyond the age of the generation, in seconds: a clock shows whole ones, and a row is told some time after its commit.
const SLACK: f64 = 2.0;

/// A generation: its number, and when it was taken, in seconds since 1970.
type Generation = (u64, f64);

fn newest_generation(l1: &mut L1) -> Option<Generation> {
    let listing = l1.run(&format!("{PERDURE} generations db --json 2>/dev/null"), SOON);
    let document: serde_json::Value = serde_json::from_str(&listing.text()).ok()?;
    let newest = document["generations"].as_array()?.last()?;
    Some((newest["number"].as_u64()?, newest["time_ms"].as_f64()? / 1000.0))
}

/// Waits for rows that were not reported before, and for a generation that is newer than `last`.
fn wait_for_generation(l1: &mut L1, reported: &[Row], last: u64) {
    let enough = reported.last().map_or(0, |row| row.number) + 5;
    let worked = |said: &str| rows(said).last().is_some_and(|row| row.number >= enough);
    l1.wait_until(&format!("cat {SERIAL}"), WORK, |said| worked(&said.text()));
    let begun = Instant::now();
    while newest_generation(l1).is_none_or(|(number, _)| number <= last) {
        assert!(begun.elapsed() < WORK, "no generation after {last} within {WORK:?}");
    }
}

/// The plug is pulled with no warning. Which generation it goes on from, resumed with more words.
fn unannounced(mut l1: L1, options: &Options, reported: &mut Vec<Row>, more: &str) -> (L1, u64) {
    splice(reported, rows(&serial(&mut l1)));
    let now: f64 = l1.check("date +%s", SOON).trim().parse().expect("seconds");
    let cut = l1.power_cut();
    let mut l1 = L1::boot(options);
    let (number, taken) = newest_generation(&mut l1).expect("a generation");
    let told = l1.check(&format!("{PERDURE} resume db --detach {more} 2>&1"), WORK);
    assert!(told.contains(&format!("goes on from generation db@{number}")), "the newest is {number}: {told}");
    l1.wait_until(&format!("cat {SERIAL}"), WORK, |said| !rows(&said.text()).is_empty());
    let next = rows(&serial(&mut l1))[0];
    // What was committed after the generation is lost, from the first such row on.
    let uptime = |row: Option<&Row>| row.map_or(0.0, |row| row.uptime);
    let lost =
        uptime(reported.last()) - uptime(reported.iter().find(|row| row.number >= next.number).or(reported.last()));
    reported.retain(|row| row.number < next.number);
    // BusyBox's date knows whole seconds.
    let age = now + 1.0 - taken;
    eprintln!("{cut:?}: on from row {} of generation {number}, {lost:.2} s lost, {age:.1} s old", next.number);
    assert!(lost <= age + SLACK, "{lost} s of work were lost, and the generation was {age} s old");
    (l1, number)
}

/// Adds what one life reported to what was reported before it. No row is missing.
fn splice(reported: &mut Vec<Row>, next: Vec<Row>) {
    for pair in next.windows(2) {
        assert_eq!(pair[1].number, pair[0].number + 1, "a row is missing, or came twice: {pair:?}");
    }
    let Some(first) = next.first() else { return };
    reported.retain(|row| row.number < first.number);
    assert_eq!(reported.last().map_or(0, |row| row.number), first.number - 1, "rows are missing");
    reported.extend(next);
}

fn a_database_goes_back_with_its_memory(cuts: u64, seed: u64) {
    eprintln!("{cuts} cuts, {SEED}={seed}");
    let directory = tempfile::tempdir().expect("a directory");
    let mut random = SplitMix(seed);
    let options = options(directory.path(), random.next(), Vec::new());
    let mut l1 = L1::boot(&options);
    run(&mut l1, "delete,console", "");
    l1.wait_until(&format!("cat {SERIAL}"), WORK, |said| !rows(&said.text()).is_empty());
    // Not from the beginning: in emulation, storing what Debian does while it boots takes longer than that.
    let generations = "--snapshot-every 1s --max-snapshots 5";
    l1.check(&format!("{PERDURE} powerfail db && {PERDURE} resume db --detach {generations}"), SOON);
    let (mut reported, mut generation) = (Vec::new(), 0);
    for cut in 1..=cuts {
        wait_for_generation(&mut l1, &reported, generation);
        std::thread::sleep(Duration::from_millis(random.next() % 3000));
        // In its last life it is left alone.
        let more = if cut == cuts { "--snapshot-every 0s" } else { "" };
        (l1, generation) = unannounced(l1, &options, &mut reported, more);
    }
    let enough = reported.last().map_or(0, |row| row.number) + 10;
    let worked = |said: &str| rows(said).last().is_some_and(|row| row.number >= enough);
    l1.wait_until(&format!("cat {SERIAL}"), WORK, |said| worked(&said.text()));
    let said = stop(&mut l1, PERDURE);
    kernel_log::assert_clean(&said);
    splice(&mut reported, rows(&said));
    let (count, _) = counted(&said);
    assert_eq!(reported.last().map(|row| row.number), Some(count));
    check_disk(directory.path(), &options, l1, PERDURE, count);
}

#[test]
fn sqlite_in_debian_goes_back_to_one_moment_when_the_plug_is_pulled_without_a_warning() {
    let seed = number_from(SEED, 22);
    in_emulation(|| a_database_goes_back_with_its_memory(number_from(OUTAGES, 1), seed));
}
