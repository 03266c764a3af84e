//! Programs with recoverable memory, and the plug pulled on the machine below them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tests::lab::cpio::{self, File};
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

use crate::disks::{SERIAL, last, options, run, wait_for};

const SOON: Duration = Duration::from_secs(180);
/// Transfers that are durable before each cut, at least.
const TRANSFERS: u64 = 40;
/// A log on a disk, and one in persistent memory.
const BANKS: [(&str, &str); 2] = [("file", "/pool/bank"), ("dax", "/dax/bank")];

/// Lets both banks work for a while, and says how many transfers each has said to be durable.
fn work(l1: &mut L1) -> [u64; 2] {
    let log = |medium: &str| format!("/tmp/{medium}.log");
    for (medium, pool) in BANKS {
        l1.spawn(&format!("bank run {pool} --medium {medium}"), &log(medium));
    }
    BANKS.map(|(medium, _)| {
        let number = |text: &str| text.trim().parse::<u64>().unwrap_or(0);
        // The last whole line.
        let script = format!("tail -n 2 {} | head -n 1", log(medium));
        number(&l1.wait_until(&script, SOON, |seen| number(&seen.text()) >= TRANSFERS).text())
    })
}

/// How many transfers are in the books. The program itself fails if the sum is not what it was.
fn check(l1: &mut L1) -> [u64; 2] {
    BANKS.map(|(medium, pool)| checked(l1, pool, medium))
}

fn checked(l1: &mut L1, pool: &str, medium: &str) -> u64 {
    let said = l1.check(&format!("bank check {pool} --medium {medium}"), SOON);
    let transfers = said.split(' ').next().and_then(|number| number.parse().ok());
    transfers.unwrap_or_else(|| panic!("{medium}: {said}"))
}

fn program() -> File {
    File::program("bin/bank", std::fs::read(Path::new(env!("CARGO_BIN_EXE_bank"))).unwrap())
}

#[test]
fn a_bank_on_a_disk_and_one_in_persistent_memory_outlive_the_machine_and_lose_no_durable_transfer() {
    in_emulation(|| {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("pmem");
        make_ext4(&image, 64);
        let options = Options {
            disk: Some(Disk::create(&directory.path().join("disk"), 64, Cache::Volatile { seed: 7 })),
            dax: Some(image),
            files: vec![program()],
            ..Options::default()
        };
        let mut l1 = L1::boot(&options);
        let mut before = [0; 2];
        for cut in 0..2 {
            let said = work(&mut l1);
            l1.power_cut();
            l1 = L1::boot(&options);
            let now = check(&mut l1);
            for (index, (medium, _)) in BANKS.iter().enumerate() {
                let least = before[index] + said[index];
                assert!(now[index] >= least, "cut {cut}, {medium}: {} transfers, {least} were durable", now[index]);
            }
            before = now;
        }
        l1.shutdown();
    });
}

/// A bank on files that are mapped from the guest's persistent memory (DAX), as stock Linux has them there: it takes no `MAP_SYNC`, since a store is durable
/// only when the host was asked to flush. So the redo engine works, whose flushes are virtio-pmem's.
const IN_A_GUEST: &str = r#"
fail() { echo "bank: MISMATCH $*"; exit 1; }
gunzip -c /empty.gz >/dev/pmem0 && mkdir -p /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt || fail mount
grep -q ' /mnt ext4 .*dax' /proc/mounts || fail dax
bank run /mnt/vain --medium dax --transfers 1 && fail MAP_SYNC
bank run /mnt/bank | while read durable rest; do echo "bank: durable $durable"; done
"#;

/// An empty ext4: what BusyBox makes is ext2, and that cannot reserve a file's blocks.
fn file_system(directory: &Path) -> File {
    let image = directory.join("empty");
    make_ext4(&image, 16);
    let output = Command::new("gzip").arg("-c").arg(&image).output().expect("gzip runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    File::data("empty.gz", output.stdout)
}

fn a_guests_bank_outlives_its_host() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(directory.path(), 31);
    let initrd = options.files.iter_mut().find(|file| file.path == guest::INITRD[1..]).expect("the guest's files");
    initrd.content = cpio::append(std::mem::take(&mut initrd.content), &[program(), file_system(directory.path())]);
    options.files.push(program());
    let mut l1 = L1::boot(&options);
    run(&mut l1, IN_A_GUEST, "--pmem data:16M");
    let durable = |said: &str| last(said, "bank: durable").unwrap_or(0);
    wait_for(&mut l1, "", |said| durable(said) >= TRANSFERS);
    let said = durable(&String::from_utf8_lossy(&l1.get(SERIAL)));
    let cut = l1.power_cut();

    let mut l1 = L1::boot(&options);
    let inspected = l1.check("PERDURE_POOL=/pool/pool perdure inspect web --json", SOON);
    let document: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    let regions = document["regions"].as_array().expect("regions");
    let region = regions.iter().find(|region| region["name"] == "web/data").expect("its persistent memory");
    // As the guest would have it after a boot: behind the region's header.
    let mount = format!(
        "file={} && device=$(losetup -f) && losetup -o $(($(stat -c %s $file) - {})) $device $file && mkdir -p /mnt && mount -t ext4 $device /mnt",
        region["file"].as_str().expect("a path"),
        region["size"]
    );
    l1.check(&mount, SOON);
    let found = checked(&mut l1, "/mnt/bank", "file");
    assert!(found >= said, "{found} transfers, {said} were durable");
    eprintln!("{said} transfers were durable, {found} are found; {cut:?}");
}

#[test]
fn a_bank_in_a_guests_persistent_memory_outlives_the_guests_host_and_loses_no_durable_transfer() {
    in_emulation(a_guests_bank_outlives_its_host);
}
