//! Disks of stock Linux, and the plug pulled on the machine below it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tests::lab::disk::{Cache, Disk};
use tests::lab::guest;
use tests::lab::machine::{L1, Options, in_emulation};

use crate::outages::assert_frozen;
use crate::paging::paged;

const SOON: Duration = Duration::from_secs(180);
/// For the guest's Linux to boot and to do some rounds, in KVM in TCG.
pub(crate) const WORK: Duration = Duration::from_secs(300);
/// Of this life of L1 alone.
pub(crate) const SERIAL: &str = "/tmp/serial";
/// The image of the file system, in L1: not of the pool, so that this machine can check it.
const IMAGE: &str = "/pool/fs.img";

pub(crate) fn options(directory: &Path, seed: u64) -> Options {
    let disk = Disk::create(&directory.join("disk"), 2048, Cache::Volatile { seed });
    let files = guest::files(Path::new(env!("CARGO_BIN_EXE_chain")));
    Options { disk: Some(disk), files, ..Options::default() }
}

/// `run web` of a stock Linux that runs `script`.
pub(crate) fn run(l1: &mut L1, script: &str, disks: &str) {
    // The kernel takes 2 KiB of command line.
    let script: Vec<_> = script.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut command = format!("rm -f {SERIAL}; PERDURE_POOL=/pool/pool PERDURE_LOG=info perdure run web --detach");
    write!(
        command,
        " --kernel {} --initrd {} --memory 256M --medium file --serial {SERIAL} {disks} \
         --cmdline 'console=ttyS0 quiet {}'",
        guest::KERNEL,
        guest::INITRD,
        guest::script(&script.join("\n"))
    )
    .expect("a string takes everything");
    l1.check(&command, SOON);
}

/// The number behind the last whole line that begins with `word`.
pub(crate) fn last(output: &str, word: &str) -> Option<u64> {
    let whole = output.rfind('\n').map_or("", |end| &output[..end]);
    whole.lines().rev().find_map(|line| line.trim_end().strip_prefix(word)?.trim().parse().ok())
}

/// Less than stock Linux and its initial file system take of its memory: what its disks read and write is paged meanwhile.
const RAM: &str = "80M";
/// Rounds until the guest is done.
const ROUNDS: u64 = 12;

/// Each round writes a slot of the raw disk past the guest's cache, without a flush: it is in L1's page cache alone. And it writes a file and
/// syncs it. Then it reads another slot, and another file, from their disks. A slot that is not what was last written to it ends it all.
const WORK_ON_DISKS: &str = r#"
fail() { echo "disks: MISMATCH $*"; exit 1; }
mke2fs -F /dev/vdb >/dev/null 2>&1 && mkdir -p /mnt && mount -t ext4 /dev/vdb /mnt || fail mount
round=0
while [ $round -lt ROUNDS ]; do
    slot=$((round % 8))
    dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null
    sha256sum </tmp/data >/tmp/sum.$slot
    dd if=/tmp/data of=/dev/vda bs=64k seek=$((slot * 4)) oflag=direct conv=notrunc 2>/dev/null || fail write $round
    cp /tmp/data /mnt/file.$slot && sync || fail sync $round
    other=$(((round * 5 + 3) % 8))
    if [ -e /tmp/sum.$other ]; then
        echo 3 >/proc/sys/vm/drop_caches
        [ "$(dd if=/dev/vda bs=64k skip=$((other * 4)) count=4 iflag=direct 2>/dev/null | sha256sum)" = "$(cat /tmp/sum.$other)" ] || fail raw $round
        [ "$(sha256sum </mnt/file.$other)" = "$(cat /tmp/sum.$other)" ] || fail file $round
    fi
    round=$((round + 1))
    echo "disks: round $round"
done
umount /mnt || fail umount
dmesg | grep -i -E 'I/O error|EXT4-fs (error|warning)|blocked for more|soft lockup' && fail log
echo "disks: done"
"#;

/// Freezes `web`, pulls the plug, and resumes it with what the disks' I/O is done by then. What it printed before is added to `printed`.
pub(crate) fn outage(mut l1: L1, options: &Options, worker: &str, printed: &mut String) -> L1 {
    let perdure = "PERDURE_POOL=/pool/pool PERDURE_LOG=info perdure";
    l1.check(&format!("{perdure} powerfail web"), SOON);
    assert_frozen(&l1.check(&format!("{perdure} list --json"), SOON), "web");
    printed.push_str(&String::from_utf8_lossy(&l1.get(SERIAL)));
    let cut = l1.power_cut();
    eprintln!("frozen after round {:?}, {cut:?}", last(printed, "disks: round"));
    let mut l1 = L1::boot(options);
    l1.check(&format!("PERDURE_DISK_IO={worker} {perdure} resume web --detach"), SOON);
    l1
}

pub(crate) fn wait_for(l1: &mut L1, printed: &str, done: impl Fn(&str) -> bool) {
    let seen = l1.wait_until(&format!("cat {SERIAL}"), WORK, |seen| {
        let text = format!("{printed}{}", seen.text());
        done(&text) || text.contains("MISMATCH")
    });
    assert!(!seen.text().contains("MISMATCH"), "{}", seen.text());
}

fn disks_survive_outages() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), 11);
    let mut l1 = L1::boot(&options);
    l1.check(&format!("truncate -s 16M {IMAGE}"), SOON);
    let script = WORK_ON_DISKS.replace("ROUNDS", &ROUNDS.to_string());
    run(&mut l1, &script, &format!("--ram {RAM} --disk data:4M --disk {IMAGE}"));
    let mut printed = String::new();
    for (outage_number, worker) in [(1, "threads"), (2, "io_uring")] {
        let rounds = ROUNDS * outage_number / 3;
        wait_for(&mut l1, &printed, |output| last(output, "disks: round").is_some_and(|round| round >= rounds));
        let list = l1.check("PERDURE_POOL=/pool/pool perdure list --json", SOON);
        assert!(paged(&list).is_some_and(|paged| paged.swapped > 0), "its memory is swapped: {list}");
        l1 = outage(l1, &options, worker, &mut printed);
    }
    wait_for(&mut l1, &printed, |output| output.contains("disks: done"));
    l1.wait_until("pidof perdure", SOON, |seen| seen.status != 0);
    assert!(
        last(&printed, "disks: round").is_some_and(|round| round < ROUNDS),
        "each outage was in the middle of the work"
    );
    let image = directory.path().join("fs.img");
    std::fs::write(&image, l1.get(IMAGE)).expect("the image fits");
    check_file_system(&image);
}

#[test]
fn what_linux_wrote_to_its_disks_flushed_or_not_is_there_after_outages() {
    in_emulation(disks_survive_outages);
}

/// The file of a disk or persistent memory `name` of the pool, without its header.
pub(crate) fn region_of_pool(l1: &mut L1, name: &str) -> Vec<u8> {
    let inspected = l1.check("PERDURE_POOL=/pool/pool perdure inspect web --json", SOON);
    let document: serde_json::Value = serde_json::from_str(&inspected).expect("JSON");
    let regions = document["regions"].as_array().expect("regions");
    let disk = regions.iter().find(|region| region["name"] == format!("web/{name}")).expect("its disk");
    let mut file = l1.get(disk["file"].as_str().expect("a path"));
    let size = usize::try_from(disk["size"].as_u64().expect("a size")).expect("a small one");
    file.split_off(file.len() - size)
}

/// Pulls the plug with no warning in the middle of the work: memory and disks go back to one moment, and the guest goes on from it.
fn disks_go_back_with_memory() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), 13);
    let mut l1 = L1::boot(&options);
    let script = WORK_ON_DISKS.replace("ROUNDS", &ROUNDS.to_string());
    run(&mut l1, &script, "--disk data:4M --disk fs:16M --snapshot-every 4s");
    for rounds in [ROUNDS / 3, 2 * ROUNDS / 3] {
        wait_for(&mut l1, "", |output| last(output, "disks: round").is_some_and(|round| round >= rounds));
        let generations = l1.check("PERDURE_POOL=/pool/pool perdure generations web", SOON);
        let cut = l1.power_cut();
        eprintln!("cut after round {rounds}, {cut:?}\n{generations}");
        l1 = L1::boot(&options);
        let told = l1.check("PERDURE_POOL=/pool/pool PERDURE_LOG=info perdure resume web --detach", SOON);
        assert!(told.contains("goes on from generation"), "{told}");
    }
    wait_for(&mut l1, "", |output| output.contains("disks: done"));
    l1.wait_until("pidof perdure", SOON, |seen| seen.status != 0);
    let image = directory.path().join("fs.img");
    std::fs::write(&image, region_of_pool(&mut l1, "fs")).expect("the image fits");
    check_file_system(&image);
}

pub(crate) fn check_file_system(image: &Path) {
    let checked = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(image).output().expect("e2fsck runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

#[test]
fn memory_and_disks_of_linux_go_back_to_one_moment_when_the_plug_is_pulled_without_a_warning() {
    in_emulation(disks_go_back_with_memory);
}

/// Writes a slot of the disk and syncs it, for ever; the number is printed after that. A slot begins with its number, in text.
const WRITE_AND_SYNC: &str = r#"
round=0
while :; do
    round=$((round + 1))
    { printf '%08d' $round; dd if=/dev/urandom bs=4088 count=1 2>/dev/null; } >/tmp/slot
    sha256sum </tmp/slot >>/tmp/slot
    dd if=/tmp/slot of=/dev/DEVICE bs=8k seek=$((round % 128)) conv=notrunc,fsync 2>/dev/null && echo "disks: synced $round"
done
"#;

/// The highest number whose slot is whole in `image`.
fn newest(image: &[u8]) -> Option<u64> {
    let whole = |slot: &[u8]| {
        let (data, sum) = slot.split_at(4096);
        let number = std::str::from_utf8(&data[..8]).ok()?.parse().ok()?;
        let printed = std::str::from_utf8(&sum[..64]).ok()?;
        (printed == sha256(data)).then_some(number)
    };
    image.chunks_exact(8192).filter_map(whole).max()
}

fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("running sha256sum: {error}"));
    child.stdin.take().expect("a pipe").write_all(bytes).expect("sha256sum reads it all");
    let output = child.wait_with_output().expect("sha256sum ends");
    String::from_utf8(output.stdout).expect("hexadecimal digits").chars().take(64).collect()
}

/// `given`: what makes it `device`.
fn acknowledged_flushes_are_durable(seed: u64, given: &str, device: &str) {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), seed);
    let mut l1 = L1::boot(&options);
    run(&mut l1, &WRITE_AND_SYNC.replace("DEVICE", device), given);
    let synced = |output: &str| last(output, "disks: synced").unwrap_or(0);
    wait_for(&mut l1, "", |output| synced(output) >= 20);
    let acknowledged = synced(&String::from_utf8_lossy(&l1.get(SERIAL)));
    // No signal, no freeze.
    let cut = l1.power_cut();
    let mut l1 = L1::boot(&options);
    let refused = l1.run("PERDURE_POOL=/pool/pool perdure resume web --detach", SOON);
    assert_ne!(refused.status, 0, "{}", refused.text());
    let newest = newest(&region_of_pool(&mut l1, "data")).unwrap_or(0);
    assert!(newest >= acknowledged, "{acknowledged} was acknowledged, {newest} is the newest that is whole");
    eprintln!("acknowledged {acknowledged}, found {newest}, {cut:?}");
}

#[test]
fn a_flush_that_linux_was_told_of_is_durable_when_the_plug_is_pulled_without_a_warning() {
    in_emulation(|| acknowledged_flushes_are_durable(12, "--disk data:1M", "vda"));
}

#[test]
fn a_flush_of_persistent_memory_that_linux_was_told_of_is_durable_when_the_plug_is_pulled_without_a_warning() {
    in_emulation(|| acknowledged_flushes_are_durable(14, "--pmem data:2M", "pmem0"));
}
