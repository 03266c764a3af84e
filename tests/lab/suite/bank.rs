//! Programs with recoverable memory, and the plug pulled on the machine below them.

use std::path::Path;
use std::time::Duration;
use tests::lab::cpio::File;
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::machine::{L1, Options, in_emulation};

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
    BANKS.map(|(medium, pool)| {
        let said = l1.check(&format!("bank check {pool} --medium {medium}"), SOON);
        let transfers = said.split(' ').next().and_then(|number| number.parse().ok());
        transfers.unwrap_or_else(|| panic!("{medium}: {said}"))
    })
}

#[test]
fn a_bank_on_a_disk_and_one_in_persistent_memory_outlive_the_machine_and_lose_no_durable_transfer() {
    let program = std::fs::read(Path::new(env!("CARGO_BIN_EXE_bank"))).unwrap();
    in_emulation(|| {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("pmem");
        make_ext4(&image, 64);
        let options = Options {
            disk: Some(Disk::create(&directory.path().join("disk"), 64, Cache::Volatile { seed: 7 })),
            dax: Some(image),
            files: vec![File::program("bin/bank", program.clone())],
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
