//! `lab bench devices`: what a stock Linux gets out of its disk and its network in perdure, and in QEMU's `microvm`, in the same L1.
//!
//! ```text
//!   two guests, one idle while the other works      each round, each load: perdure, QEMU; in the next round QEMU, perdure
//!   L1:  counters ─► "block 2 randread 4k 32" ──► guest: fio or iperf3 ──► result ─► counters
//! ```
//!
//! Same kernel, same initial file system, one vCPU, images alike, a tap each. The image is in L1's page cache, and the peer of the network is
//! L1 itself: what is compared is what the VMMs cost. QEMU gets what it is fastest with in its own process: io_uring, an I/O
//! thread, virtio 1 with event indices; not vhost.
//!
//! L1 is emulated and has one CPU: guest, VMM and peer share it, an instruction costs what TCG makes of it, and an exit several times
//! what it costs on hardware. So the rates mean nothing by themselves. Their ratio, taken of turns that follow each other, says who does
//! less for a request; exits and interrupts for a request are KVM's own counts (debugfs).

mod loads;
pub mod recovery;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::cpio::{self, File};
use super::disk::{Cache, Disk};
use super::guest;
use super::machine::{L1, Options};
pub use loads::{LOADS, Load, Measured};
pub use report::Report;
use report::median;

const SOON: Duration = Duration::from_secs(120);
/// 10 s each on an idle machine, and 300 on a very busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(900);
/// What a load takes beside its time.
const OVERHEAD: Duration = Duration::from_secs(180);
const GUEST_MIB: u32 = 512;
const INITRD: &str = "guest/bench-initrd";

/// Who runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// The built binary.
    Perdure,
    /// QEMU's `microvm` machine.
    Qemu,
}

impl Vmm {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Perdure, Self::Qemu];

    /// Numbers its tap, its image and its network.
    fn number(self) -> u32 {
        match self {
            Self::Perdure => 0,
            Self::Qemu => 1,
        }
    }

    /// The command in L1 that runs the guest.
    fn command(self) -> String {
        let number = self.number();
        let mac = format!("02:00:5e:10:00:0{number}");
        let script = guest::script(&format!("sh /bench.sh 10.0.{number}"));
        let cmdline = format!("console=ttyS0 quiet {script}");
        match self {
            Self::Perdure => format!(
                "perdure run bench --kernel {} --initrd /{INITRD} --memory {GUEST_MIB}M --medium file --serial /tmp/serial.{number} \
                 --disk /pool/disk{number} --net tap=vm{number},mac={mac} --cmdline '{cmdline}'",
                guest::KERNEL
            ),
            Self::Qemu => format!(
                "/bench/bin/qemu-system-x86_64 -L /bench/share -M microvm,accel=kvm,rtc=on -cpu host -m {GUEST_MIB} -smp 1 \
                 -nodefaults -no-user-config -display none -no-reboot -serial file:/tmp/serial.{number} \
                 -kernel {} -initrd /{INITRD} -global virtio-mmio.force-legacy=false -object iothread,id=io \
                 -drive id=disk,file=/pool/disk{number},format=raw,if=none,cache=writeback,aio=io_uring \
                 -device virtio-blk-device,drive=disk,iothread=io \
                 -netdev tap,id=net,ifname=vm{number},script=no,downscript=no \
                 -device virtio-net-device,netdev=net,mac={mac} -append '{cmdline}'",
                guest::KERNEL
            ),
        }
    }

    fn start(self, l1: &mut L1) {
        let number = self.number();
        l1.spawn(
            &format!(
                "export PERDURE_POOL=/tmp/pool PERDURE_LOG=warn; echo $$ >/tmp/vmm.{number}; exec {}",
                self.command()
            ),
            &format!("/tmp/log.{number}"),
        );
        let console = format!("cat /tmp/serial.{number} /tmp/log.{number}");
        l1.wait_until(&console, BOOT_LIMIT, |seen| seen.text().contains("bench: ready"));
    }
}

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Turns of each VMM.
    pub rounds: u32,
    /// How long a load runs.
    pub seconds: u32,
    /// Which; all if there are none.
    pub loads: Vec<String>,
}

impl Plan {
    fn loads(&self) -> impl Iterator<Item = &'static Load> {
        LOADS
            .iter()
            .filter(|load| load.is_null() || self.loads.is_empty() || self.loads.iter().any(|name| name == load.name))
    }
}

/// Measures, and tells on stderr how far it is.
///
/// # Panics
///
/// When something of the lab does not work.
pub fn devices(plan: &Plan, chain_program: &Path) -> Report {
    let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary directory: {error}"));
    let mut l1 = boot(directory.path(), chain_program);
    Vmm::ALL.iter().for_each(|vmm| vmm.start(&mut l1));
    let mut report = Report::new(plan);
    for round in 0..plan.rounds {
        eprintln!("lab bench: round {} of {}; medians so far:", round + 1, plan.rounds);
        eprint!("{}", report::header());
        for load in plan.loads() {
            // Neither is always the one that finds the other's traces.
            let order = if round % 2 == 0 { Vmm::ALL } else { [Vmm::Qemu, Vmm::Perdure] };
            for vmm in order {
                report.add(vmm, load, measure(&mut l1, vmm, load, plan.seconds));
            }
            eprint!("{}", report.row(load));
        }
    }
    report
}

fn measure(l1: &mut L1, vmm: Vmm, load: &Load, seconds: u32) -> Measured {
    let script = format!("load {} {}", vmm.number(), load.words(seconds));
    let answer = l1.check(&script, Duration::from_secs(seconds.into()) + OVERHEAD);
    load.measured(&answer).unwrap_or_else(|why| panic!("{} in {vmm:?}: {why}\n{answer}", load.name))
}

fn boot(directory: &Path, chain_program: &Path) -> L1 {
    let tools = tools();
    let read = |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut initrd = guest::initrd(chain_program);
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(read(&tools.join("guest.cpio")));
    let initrd = cpio::append(initrd, &[File::data("bench.sh", include_bytes!("guest.sh").to_vec())]);
    let mut files = guest::files(chain_program);
    files.push(File::data(INITRD, initrd));
    let image = format!("file={},format=raw,if=virtio,readonly=on", tools.join("tools.img").display());
    let mut l1 = L1::boot(&Options {
        memory_mib: 3072,
        disk: Some(Disk::create(&directory.join("disk"), 1024, Cache::Host)),
        files,
        qemu: vec!["-drive".to_owned(), image],
        ..Options::default()
    });
    l1.check(include_str!("l1.sh"), SOON);
    l1
}

/// The directory that `prepare` fills.
fn tools() -> PathBuf {
    let prepare = concat!(env!("CARGO_MANIFEST_DIR"), "/lab/bench/prepare");
    let output = Command::new("bash").arg(prepare).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("running {prepare}: {error}"));
    assert!(output.status.success(), "the bench cannot be prepared:\n{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/lab/bench"))
}
