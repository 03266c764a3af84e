//! Persistent memory and a virtio console of stock Linux, through outages that were announced and one that was not.

use std::time::Duration;
use tests::lab::machine::{L1, in_emulation};

use crate::disks::{SERIAL, WORK, check_file_system, last, options, outage, region_of_pool, run, wait_for};

const SOON: Duration = Duration::from_secs(180);

/// All it says it says on its virtio console, where it also repeats what it hears. It makes a file system on its persistent memory and maps files of
/// it without a page cache (DAX), among them a program that it runs. Each round compares all files with what its RAM says that they are, and writes
/// one, synced: files of another moment than RAM are found. It works until it hears of the end.
const WORK_ON_PMEM: &str = r#"
exec </dev/hvc0 >/dev/hvc0 2>&1
fail() { echo "pmem: MISMATCH $*"; poweroff -f; }
while read word; do echo "pmem: heard $word"; touch /tmp/$word; done </dev/hvc0 &
mke2fs -F -b 4096 /dev/pmem0 >/dev/null && mkdir -p /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt || fail mount
grep -q ' /mnt ext4 .*dax' /proc/mounts || fail dax
cp /bin/busybox /mnt/busybox
round=0
while [ ! -e /tmp/end ]; do
for slot in 0 1 2 3 4 5; do
[ ! -e /tmp/sum.$slot ] || [ "$(sha256sum </mnt/file.$slot)" = "$(cat /tmp/sum.$slot)" ] || fail file $slot
done
round=$((round + 1))
slot=$((round % 6))
dd if=/dev/urandom of=/tmp/data bs=64k count=1 2>/dev/null
/mnt/busybox sha256sum </tmp/data >/tmp/sum.$slot
/mnt/busybox dd if=/tmp/data of=/mnt/file.$slot bs=64k conv=fsync 2>/dev/null || fail write $round
echo "pmem: round $round"
sleep 0.5
done
rm /mnt/file.*
umount -l /mnt
sync
dmesg | grep -i -E 'I/O error|EXT4-fs (error|warning)|blocked for more|soft lockup' && fail log
echo "pmem: done"
"#;

/// Types a line at the guest's console, and waits until it was heard. `perdure console` stays for as long as the VM does, so it is ended then.
fn type_in(l1: &mut L1, word: &str) {
    let heard = format!("grep -q 'pmem: heard {word}' {SERIAL}");
    l1.check(
        &format!(
            "export PERDURE_POOL=/pool/pool; rm -f /tmp/keys; mkfifo /tmp/keys; perdure console web </tmp/keys >/dev/null & console=$!
             exec 4>/tmp/keys; echo {word} >&4
             for try in $(seq 1000); do {heard} && break; sleep 0.2; done
             kill $console; {heard} || {{ tail -n 20 {SERIAL}; exit 1; }}"
        ),
        WORK,
    );
}

fn pmem_and_console_survive() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), 17);
    let mut l1 = L1::boot(&options);
    run(&mut l1, WORK_ON_PMEM, "--console virtio --pmem log:16M");
    let reached = |rounds: u64| move |output: &str| last(output, "pmem: round").is_some_and(|round| round >= rounds);
    let mut printed = String::new();

    wait_for(&mut l1, &printed, reached(3));
    type_in(&mut l1, "before");
    l1 = outage(l1, &options, "threads", &mut printed);
    let rounds = last(&printed, "pmem: round").unwrap_or(0);
    wait_for(&mut l1, &printed, reached(rounds + 2));
    type_in(&mut l1, "after");

    // With no warning: persistent memory and RAM go back to one moment.
    l1.check("PERDURE_POOL=/pool/pool perdure snapshot web", WORK);
    let text = format!("{printed}{}", String::from_utf8_lossy(&l1.get(SERIAL)));
    let rounds = last(&text, "pmem: round").unwrap_or(0);
    wait_for(&mut l1, &printed, reached(rounds + 2));
    let cut = l1.power_cut();
    eprintln!("a generation after round {rounds}; {cut:?}");
    l1 = L1::boot(&options);
    let told = l1.check("PERDURE_POOL=/pool/pool PERDURE_LOG=info perdure resume web --detach", SOON);
    assert!(told.contains("goes on from generation"), "{told}");
    wait_for(&mut l1, "", reached(rounds + 2));
    type_in(&mut l1, "end");
    wait_for(&mut l1, "", |output| output.contains("pmem: done"));
    l1.wait_until("pidof perdure", SOON, |seen| seen.status != 0);
    let image = directory.path().join("pmem.img");
    std::fs::write(&image, region_of_pool(&mut l1, "log")).expect("the image fits");
    check_file_system(&image);
}

#[test]
fn files_mapped_from_persistent_memory_and_a_virtio_console_go_on_after_outages() {
    in_emulation(pmem_and_console_survive);
}
