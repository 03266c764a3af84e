//! A VM `db`: Debian with its root file system on a disk of the pool, and SQLite in it (`tests/lab/ledger`), that commits row after row.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::disk::{Cache, Disk};
use super::machine::{L1, Options};
use super::{guest, image};

/// The VM's name.
pub const NAME: &str = "db";
/// For a command in L1.
pub const SOON: Duration = Duration::from_secs(180);
/// For Debian to boot, in KVM in TCG, and to commit some; for a busy machine, too.
pub const WORK: Duration = Duration::from_secs(600);
/// The command in L1, on a pool on its disk.
pub const PERDURE: &str = "export PERDURE_POOL=/pool/pool PERDURE_LOG=info; perdure";
/// The console, of this life of L1 alone.
pub const SERIAL: &str = "/tmp/serial";
/// The disk that `prepare` made is L1's second.
const ORIGIN: &str = "/dev/vdb";
/// No less than the image has that `prepare` makes.
const DISK_MIB: u64 = 64;

/// L1 with a disk that forgets what was not flushed, what Debian's disk is made from, `chain` (the built program), and what else QEMU is told.
pub fn options(directory: &Path, seed: u64, chain: &Path, more: Vec<String>) -> Options {
    let disk = Disk::create(&directory.join("disk"), 2048, Cache::Volatile { seed });
    let mut qemu = origin();
    qemu.extend(more);
    Options { disk: Some(disk), files: guest::files(chain), qemu, ..Options::default() }
}

/// For [`Options::qemu`]: what Debian's disk is made from.
pub fn origin() -> Vec<String> {
    let drive = format!("file={},format=raw,if=virtio,readonly=on", image().join("debian.ext4").display());
    vec!["-drive".to_owned(), drive]
}

/// The words for `perdure run` that make the VM, with `ledger` at work: the words of that program, with commas between them.
pub fn words(ledger: &str) -> String {
    format!(
        "--kernel {} --initrd {} --disk root:{DISK_MIB}M,from={ORIGIN} --cpus 2 --memory 128M \
         --cmdline 'console=ttyS0 quiet root=/dev/vda rcupdate.rcu_cpu_stall_timeout=10 perdure.ledger={ledger}'",
        guest::KERNEL,
        guest::INITRD
    )
}

/// Runs the VM on L1's disk with `ledger` at work.
pub fn run(l1: &mut L1, ledger: &str, more: &str) {
    let words = words(ledger);
    l1.check(&format!("{PERDURE} run {NAME} --detach --medium file --serial {SERIAL} {more} {words}"), SOON);
}

/// What the guest said in this life of L1.
///
/// # Panics
///
/// When it is of something that is not as it must be.
pub fn serial(l1: &mut L1) -> String {
    let said = l1.run(&format!("cat {SERIAL}"), SOON).text();
    assert!(!said.contains("MISMATCH"), "{said}");
    said
}

/// Presses the power button, by the command `perdure`. What the guest said until it was off.
///
/// # Panics
///
/// When it does not go off by itself, or leaves its disk in use.
pub fn stop(l1: &mut L1, perdure: &str) -> String {
    let stopped = l1.check(&format!("{perdure} stop {NAME} --timeout 250s 2>&1"), WORK);
    let said = serial(l1);
    assert!(!stopped.contains("is turned off"), "{stopped}{said}");
    assert!(said.contains("the root file system is read-only"), "{said}");
    said
}

/// A row that was committed, as the ledger reports it.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// From 1 on.
    pub number: u64,
    /// The guest's uptime then, in seconds.
    pub uptime: f64,
    /// Seconds since 1970 by the guest's clock.
    pub date: i64,
}

impl Row {
    /// A line that reports one.
    pub fn read(line: &str) -> Option<Self> {
        let words: Vec<_> = line.trim().strip_prefix("row ")?.split(' ').collect();
        let [number, uptime, date] = words.as_slice() else { return None };
        Some(Self { number: number.parse().ok()?, uptime: uptime.parse().ok()?, date: date.parse().ok()? })
    }
}

/// The rows that were reported to the console in one life of L1, whose first line may be the rest of one.
pub fn rows(said: &str) -> Vec<Row> {
    // The last line may still be under way.
    let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(Row::read).collect()
}

/// The rows that the ledger's own check counted in the end, and how many of them it had back from its peer. None from any other line.
pub fn counted(line: &str) -> Option<(u64, u64)> {
    let (rows, returned) = line.trim().strip_prefix("ledger: ")?.split_once(" rows, integrity ok, returned ")?;
    Some((rows.parse().ok()?, returned.parse().ok()?))
}

/// The guest's clocks as it said in the end, in seconds since 1970: the system's, and the real-time clock's.
///
/// # Panics
///
/// When it did not.
pub fn clocks(said: &str) -> (i64, i64) {
    let told = |line: &str| {
        let (system, rtc) = line.trim().strip_prefix("debian: clocks ")?.split_once(' ')?;
        Some((system.parse().ok()?, rtc.parse().ok()?))
    };
    said.lines().find_map(told).unwrap_or_else(|| panic!("no clocks: {said}"))
}

/// Switches L1 off and looks from this machine at the disk as the guest left it, in the pool of the command `perdure`: the file system, and in it
/// the database with `rows`.
///
/// # Panics
///
/// When they are not as they must be.
pub fn check_disk(directory: &Path, options: &Options, mut l1: L1, perdure: &str, rows: u64) {
    let inspected = l1.check(&format!("{perdure} inspect {NAME} --json"), SOON);
    l1.shutdown();
    let root = root_disk(directory, options, &inspected);
    let checked = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&root).output().expect("e2fsck runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let database = directory.join("ledger.db");
    dump(&root, "/var/lib/ledger.db", &database);
    assert_eq!(sqlite(&database, "PRAGMA integrity_check"), "ok");
    let found =
        sqlite(&database, "SELECT count(*), min(number), max(number), sum(square = number * number) FROM ledger");
    assert_eq!(found, format!("{rows}|1|{rows}|{rows}"));
}

/// The disk of the VM, by way of the file system on L1's disk or in its persistent memory.
fn root_disk(directory: &Path, options: &Options, inspected: &str) -> PathBuf {
    let document: serde_json::Value = serde_json::from_str(inspected).expect("JSON");
    let regions = document["regions"].as_array().expect("regions");
    let region = regions.iter().find(|region| region["name"] == "db/root").expect("its disk");
    let file = region["file"].as_str().expect("a file in L1");
    let disk = options.disk.as_ref().map(Disk::path);
    let lies_on = |mount, image: Option<&'_ Path>| Some((image?.to_owned(), file.strip_prefix(mount)?));
    let (image, path) =
        lies_on("/pool", disk).or_else(|| lies_on("/dax", options.dax.as_deref())).expect("one of both");
    let dumped = directory.join("region");
    dump(&image, path, &dumped);
    let file = std::fs::read(&dumped).expect("a region");
    let size = usize::try_from(DISK_MIB << 20).expect("a small one");
    let root = directory.join("root.ext4");
    std::fs::write(&root, &file[file.len() - size..]).expect("room for it");
    root
}

/// Copies a file out of a file system.
fn dump(image: &Path, path: &str, to: &Path) {
    let request = format!("dump {path} {}", to.display());
    let output = Command::new("/sbin/debugfs").args(["-R", &request]).arg(image).output().expect("debugfs runs");
    assert!(to.exists(), "{request}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What Debian's SQLite says of a database; it need not be installed here.
fn sqlite(database: &Path, query: &str) -> String {
    let tree = image().join("debian");
    let libraries = ["lib", "usr/lib"].map(|lib| tree.join(lib).join("x86_64-linux-gnu"));
    let loader = libraries.iter().map(|lib| lib.join("ld-linux-x86-64.so.2")).find(|path| path.exists());
    let mut command = Command::new(loader.expect("libc6 is unpacked"));
    command.arg("--library-path").arg(libraries.map(|lib| lib.display().to_string()).join(":"));
    let output = command.arg(tree.join("usr/bin/sqlite3")).arg(database).arg(query).output().expect("it runs");
    assert!(output.status.success(), "{query}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}
