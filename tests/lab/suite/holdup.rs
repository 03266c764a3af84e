//! VMs within a hold-up, on KVM proper, bounded by its rings and by slices of time: what a freeze left in the journal is brought home after a cut, on each medium.

use std::path::Path;
use std::time::Duration;

use guests::chain;
use serde_json::Value;
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

const SOON: Duration = Duration::from_secs(180);
/// In emulation a freeze takes some 3 ms; a disk that others keep busy as well was measured at 9 MB/s, and less than 2 MiB is refused.
const HOLD_UP: &str = "10s";
/// Each medium, and the directory of its pool.
const VMS: [(&str, &str); 3] = [("file", "/pool"), ("nvdimm", "/pool"), ("dax", "/dax")];
/// What bounds what is dirty, of each.
const BOUNDS: [&str; 3] = ["rings", "slices", "rings"];
const LIVES: usize = 3;

fn perdure(home: &str) -> String {
    format!("export PERDURE_POOL={home}/pool; perdure")
}

/// In L1's memory: a cut takes it, after it was copied.
fn serial(medium: &str) -> String {
    format!("/tmp/{medium}")
}

/// Waits until this life has printed so much that all of its memory was looked at.
fn wait_for_more(l1: &mut L1, medium: &str) {
    l1.wait_until(&format!("wc -l <{}", serial(medium)), SOON, |seen| {
        seen.text().trim().parse().is_ok_and(|lines: u64| lines > 150)
    });
}

fn is_bounded_by(l1: &mut L1, medium: &str, home: &str, bound: &str) {
    let shown = l1.check(&format!("{} inspect {medium} --json", perdure(home)), SOON);
    let shown: Value = serde_json::from_str(&shown).unwrap_or_else(|error| panic!("{error}: {shown}"));
    let told = shown["status"]["holdup"]["bound"].to_string();
    assert!(told.contains(bound), "{medium}: {told}, and not {bound}: {}", shown["status"]);
}

/// A freeze within the hold-up, with what it left in the journal.
fn freeze(l1: &mut L1, medium: &str, home: &str) {
    let perdure = perdure(home);
    let told = l1.check(&format!("{perdure} powerfail {medium} --holdup {HOLD_UP} --json"), SOON);
    let told: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!((&told[0]["frozen"], &told[0]["in_time"]), (&true.into(), &true.into()), "{medium}: {told}");
    let shown = l1.check(&format!("{perdure} inspect {medium} --json"), SOON);
    let shown: Value = serde_json::from_str(&shown).unwrap_or_else(|error| panic!("{error}: {shown}"));
    let pages = shown["context"]["standing"]["journal"]["pages"].as_u64();
    assert!(pages > Some(0), "{medium}: nothing is in the journal: {}", shown["context"]["standing"]);
}

#[test]
fn chains_within_a_hold_up_go_on_from_their_journals_after_cuts_on_each_medium() {
    in_emulation(|| {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::create(&directory.path().join("disk"), 1024, Cache::Volatile { seed: 6 });
        let dax = directory.path().join("pmem");
        make_ext4(&dax, 512);
        let options = Options {
            disk: Some(disk),
            dax: Some(dax),
            files: guest::files(Path::new(env!("CARGO_BIN_EXE_chain"))),
            ..Options::default()
        };
        let mut printed = VMS.map(|_| String::new());
        let mut l1 = L1::boot(&options);
        for life in 0..LIVES {
            for ((medium, home), bound) in VMS.into_iter().zip(BOUNDS) {
                let (perdure, serial) =
                    (format!("export PERDURE_DIRTY_BOUND={bound}; {}", perdure(home)), serial(medium));
                if life == 0 {
                    let guest = "--guest counter --cmdline 'hz=200 ram=512K' --memory 16M";
                    l1.check(&format!("{perdure} run {medium} --medium {medium} {guest} --serial {serial} --holdup {HOLD_UP} --detach"), SOON);
                    continue;
                }
                // Cut off while it brings the journal home, and before it is done: that can be done again.
                for point in ["resume.replay", "resume.replayed"] {
                    let cut = l1.run(
                        &format!("PERDURE_CUT_AT={point}; export PERDURE_CUT_AT; {perdure} resume {medium}"),
                        SOON,
                    );
                    assert_ne!(cut.status, 0, "{medium}, {point}: {}", cut.text());
                }
                l1.check(&format!("{perdure} resume {medium} --detach"), SOON);
            }
            for ((medium, home), bound) in VMS.into_iter().zip(BOUNDS) {
                is_bounded_by(&mut l1, medium, home, bound);
                wait_for_more(&mut l1, medium);
                freeze(&mut l1, medium, home);
            }
            for ((medium, _), printed) in VMS.iter().zip(&mut printed) {
                printed.push_str(&String::from_utf8_lossy(&l1.get(&serial(medium))));
            }
            if life + 1 < LIVES {
                let cut = l1.power_cut();
                eprintln!("life {life}: {cut:?}");
                l1 = L1::boot(&options);
            }
        }
        for ((medium, _), printed) in VMS.iter().zip(&printed) {
            let report = chain::verify(printed).unwrap_or_else(|error| panic!("{medium}: {error}\n{printed}"));
            eprintln!("{medium}: {report:?}");
        }
        l1.shutdown();
    });
}
