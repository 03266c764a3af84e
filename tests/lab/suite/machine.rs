//! That the lab is what it says: a machine with KVM, a disk that forgets, and persistent memory.

use std::time::Duration;
use tests::lab::cpio::File;
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::machine::{L1, Options, in_emulation};

const SOON: Duration = Duration::from_secs(180);

#[test]
fn l1_runs_commands_and_carries_files_of_any_bytes() {
    let mut l1 = L1::boot(&Options {
        files: vec![File::data("etc/note", b"from the initramfs".to_vec())],
        ..Options::default()
    });
    eprintln!("L1 was up after {:?}", l1.boot_time());
    assert_eq!(l1.check("cat /etc/note", SOON), "from the initramfs");
    assert_eq!(l1.check("test -c /dev/kvm && grep -cw svm /proc/cpuinfo", SOON).trim(), "1");
    let every_byte: Vec<u8> = (0..=255u8).cycle().take(300_001).collect();
    l1.put(&File::data("/tmp/bytes", every_byte.clone()));
    assert!(l1.get("/tmp/bytes") == every_byte, "a file came back altered");
    assert_eq!(l1.run("echo out; echo err >&2; exit 7", SOON).status, 7);
    assert_eq!(l1.run("echo out; echo err >&2; exit 7", SOON).text(), "out\nerr\n");
    assert_eq!(l1.run("sleep 100", Duration::from_secs(1)).status, 137);
    l1.spawn("sleep 1; echo later", "/tmp/log");
    l1.wait_until("cat /tmp/log", SOON, |seen| seen.text() == "later\n");
}

#[test]
fn a_power_cut_keeps_what_was_flushed_and_loses_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let mut lost = false;
    // Which sectors survive is drawn: a seed or two may keep them all.
    for seed in 0..8 {
        let disk = Disk::create(&directory.path().join("disk"), 128, Cache::Volatile { seed });
        let options = Options { disk: Some(disk.clone()), ..Options::default() };
        let mut l1 = L1::boot(&options);
        // fsync of the file alone would leave its name to the journal's mercy: fsync of the directory too.
        l1.check("cd /pool && seq 1 20000 >kept && sync kept . && seq 1 20000 >cached && cp kept direct && dd if=kept of=direct bs=4k oflag=direct conv=notrunc 2>&1", SOON);
        let cut = l1.power_cut();
        let mut l1 = L1::boot(&options);
        assert_eq!(l1.check("seq 1 20000 | cmp - /pool/kept && echo same", SOON).trim(), "same");
        // Page cache, never written: must be gone. Written but not flushed: as drawn.
        assert_ne!(l1.run("seq 1 20000 | cmp - /pool/cached", SOON).status, 0, "L1's page cache outlived the cut");
        l1.shutdown();
        assert_eq!(disk.fsck(), None, "seed {seed}, {cut:?}");
        lost |= cut.kept < cut.unflushed;
        if lost {
            break;
        }
    }
    assert!(lost, "eight cuts, and the disk lost nothing");
}

#[test]
fn persistent_memory_keeps_what_was_stored_without_a_flush() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("pmem");
    make_ext4(&image, 256);
    let options = Options { dax: Some(image), ..Options::default() };
    let mut l1 = L1::boot(&options);
    assert!(l1.check("grep /dax /proc/mounts", SOON).contains("dax=always"));
    // The name and the blocks are made durable, the content is then overwritten in place and not flushed.
    l1.check("cd /dax && dd if=/dev/zero of=f bs=64k count=16 2>/dev/null && sync && yes perdure | head -c 1048576 | dd of=f conv=notrunc 2>/dev/null", SOON);
    l1.power_cut();
    let mut l1 = L1::boot(&options);
    assert_eq!(l1.check("yes perdure | head -c 1048576 | cmp - /dax/f && echo same", SOON).trim(), "same");
}

#[test]
fn a_test_runs_once_more_after_a_triple_fault_and_after_nothing_else() {
    let runs = |fails: &dyn Fn(u32) -> Option<&'static str>| {
        let count = std::cell::Cell::new(0);
        let run = || {
            count.set(count.get() + 1);
            if let Some(why) = fails(count.get()) {
                panic!("{why}{}", "");
            }
        };
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| in_emulation(run)));
        (count.get(), ended.is_ok())
    };
    assert_eq!(runs(&|_| None), (1, true));
    assert_eq!(runs(&|run| (run == 1).then_some("the guest triple-faulted")), (2, true));
    assert_eq!(runs(&|_| Some("the guest triple-faulted")), (2, false));
    assert_eq!(runs(&|_| Some("a link is missing")), (1, false));
}
