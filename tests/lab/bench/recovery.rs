//! `lab bench recovery`: how long a user waits after an outage, by what he has: the same stock Linux, in the same L1, until its program answers again.
//!
//! ```text
//!   before:  a guest counts with its hash chain; perdure freezes it, or QEMU saves it (savevm, migrate to a file)
//!   each:    L1's page cache is dropped, as a power-up finds it ─► the VMM's process starts ─► the guest's next whole link
//! ```
//!
//! L1's own boot is the same for all and not counted. Its disk is in the page cache of the machine below: reading costs less than on a real one, which favours
//! those that read much. L1 is emulated, so that seconds mean little by themselves; their ratio says what each way saves. Times are of L1's
//! clock, in hundredths of a second.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::cpio::File;
use super::super::disk::{Cache, Disk};
use super::super::guest;
use super::super::machine::{L1, Options};
use super::{median, tools};

const SOON: Duration = Duration::from_secs(300);
/// 10 s on an idle machine; far more on a busy one.
const LIMIT: Duration = Duration::from_secs(900);
const MEMORY_MIB: u32 = 256;
const KERNEL_WORDS: &str = "console=ttyS0 quiet perdure.chain=16,50";
/// Before a guest is frozen or saved: it is to be at work.
const LINKS: u32 = 20;

/// How a guest comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// perdure goes on in place.
    PerdureResume,
    /// perdure boots it.
    PerdureBoot,
    /// QEMU boots it.
    QemuBoot,
    /// QEMU loads what `savevm` saved.
    QemuLoadvm,
    /// QEMU takes in what it migrated to a file.
    QemuIncoming,
}

impl Way {
    /// All, in the order of the table.
    pub const ALL: [Self; 5] =
        [Self::PerdureResume, Self::PerdureBoot, Self::QemuBoot, Self::QemuLoadvm, Self::QemuIncoming];

    /// Unique, without blanks.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerdureResume => "perdure-resume",
            Self::PerdureBoot => "perdure-boot",
            Self::QemuBoot => "qemu-boot",
            Self::QemuLoadvm => "qemu-loadvm",
            Self::QemuIncoming => "qemu-incoming",
        }
    }

    /// The command in L1 that brings it back. `serial` is where it prints.
    fn command(self, serial: &str) -> String {
        let qemu = |more: &str| {
            format!(
                "/bench/bin/qemu-system-x86_64 -L /bench/share -M microvm,accel=kvm,rtc=on -cpu host -m {MEMORY_MIB} -smp 1 -nodefaults \
                 -no-user-config -display none -no-reboot -serial file:{serial} -kernel {} -initrd {} -append '{KERNEL_WORDS}' \
                 -drive if=none,id=state,file=/pool/state.qcow2,format=qcow2 -monitor tcp:127.0.0.1:4444,server=on,wait=off {more}",
                guest::KERNEL,
                guest::INITRD
            )
        };
        match self {
            Self::PerdureResume => "perdure resume web".to_owned(),
            Self::PerdureBoot => format!(
                "perdure run web --kernel {} --initrd {} --memory {MEMORY_MIB}M --medium file --serial {serial} --cmdline '{KERNEL_WORDS}'",
                guest::KERNEL,
                guest::INITRD
            ),
            Self::QemuBoot => qemu(""),
            Self::QemuLoadvm => qemu("-loadvm one"),
            Self::QemuIncoming => qemu("-incoming file:/pool/incoming"),
        }
    }

    fn is_qemu(self) -> bool {
        !matches!(self, Self::PerdureResume | Self::PerdureBoot)
    }

    /// A perdure that goes on prints where it printed before.
    fn serial(self) -> &'static str {
        if self.is_qemu() { "/tmp/serial.qemu" } else { "/tmp/serial.perdure" }
    }
}

/// What a way came to.
#[derive(Clone, Debug)]
struct Measured {
    way: Way,
    seconds: Vec<f64>,
    /// What the state takes on the disk, in KiB; of a boot nothing.
    kib: u64,
}

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    rounds: u32,
    ways: Vec<Measured>,
}

/// Measures so many rounds, and tells on stderr how far it is.
///
/// # Panics
///
/// When something of the lab does not work.
pub fn recovery(rounds: u32, chain_program: &Path) -> Report {
    let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary directory: {error}"));
    let mut l1 = boot(directory.path(), chain_program);
    let mut ways: Vec<Measured> =
        Way::ALL.iter().map(|way| Measured { way: *way, seconds: Vec::new(), kib: 0 }).collect();
    for round in 0..rounds {
        eprintln!("lab bench: round {} of {rounds}", round + 1);
        // Boots come first: what they leave is what the others go on from.
        for way in [Way::PerdureBoot, Way::PerdureResume, Way::QemuBoot, Way::QemuLoadvm, Way::QemuIncoming] {
            let seconds = back(&mut l1, way);
            let kib = leave(&mut l1, way, round == 0);
            let measured = ways.iter_mut().find(|measured| measured.way == way);
            let measured = measured.unwrap_or_else(|| panic!("{way:?} is none of them"));
            measured.seconds.push(seconds);
            measured.kib = measured.kib.max(kib);
            eprintln!("{:<16} {seconds:>7.2} s", way.name());
        }
    }
    Report { rounds, ways }
}

fn boot(directory: &Path, chain_program: &Path) -> L1 {
    let image = format!("file={},format=raw,if=virtio,readonly=on", tools().join("tools.img").display());
    let state = directory.join("state.qcow2");
    let made =
        std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&state).arg("64M").status();
    assert!(made.as_ref().is_ok_and(|made| made.success()), "qemu-img (package qemu-utils) makes no image: {made:?}");
    let mut l1 = L1::boot(&Options {
        memory_mib: 3072,
        disk: Some(Disk::create(&directory.join("disk"), 2048, Cache::Host)),
        files: guest::files(chain_program),
        qemu: vec!["-drive".to_owned(), image],
        ..Options::default()
    });
    let state = std::fs::read(&state).unwrap_or_else(|error| panic!("{}: {error}", state.display()));
    l1.put(&File::data("/pool/state.qcow2", state));
    l1.check(include_str!("recovery.sh"), SOON);
    l1
}

/// Brings a guest back. Seconds until it answered.
fn back(l1: &mut L1, way: Way) -> f64 {
    if way == Way::PerdureBoot {
        l1.check("export PERDURE_POOL=/pool/pool; if perdure list --json | grep -q web; then perdure remove --force web; fi; rm -f /tmp/serial.perdure", SOON);
    }
    if way.is_qemu() {
        l1.check(&format!("rm -f {}", way.serial()), SOON);
    }
    l1.put(&File::program("/tmp/vmm", format!("#!/bin/sh\nexec {}\n", way.command(way.serial())).into_bytes()));
    let told = l1.check(&format!("timeout {} answer {}", LIMIT.as_secs(), way.serial()), LIMIT + SOON);
    told.trim().parse().unwrap_or_else(|error| panic!("{}: {told:?}: {error}", way.name()))
}

/// Freezes or saves what came back, or ends it. What its state takes on the disk then, in KiB.
fn leave(l1: &mut L1, way: Way, first: bool) -> u64 {
    let links = format!("grep -c '^chain ' {}", way.serial());
    l1.wait_until(&links, LIMIT, |seen| seen.text().trim().parse().is_ok_and(|links: u32| links >= LINKS));
    let script = match way {
        // Its RAM is its region: holes of it take nothing. The context is in a region, too.
        Way::PerdureBoot | Way::PerdureResume => {
            "PERDURE_POOL=/pool/pool perdure powerfail web >/dev/null && du -sk /pool/pool | cut -f1"
        }
        Way::QemuBoot if first => "save && quit && du -k /pool/state.qcow2 | cut -f1",
        Way::QemuBoot => "quit && echo 0",
        Way::QemuLoadvm => "quit && du -k /pool/state.qcow2 | cut -f1",
        Way::QemuIncoming => "quit && du -k /pool/incoming | cut -f1",
    };
    let told = l1.check(script, SOON);
    let kib = told.trim().lines().last().and_then(|kib| kib.parse().ok());
    kib.filter(|_| !matches!(way, Way::PerdureBoot | Way::QemuBoot)).unwrap_or_default()
}

impl Report {
    /// For programs.
    pub fn json(&self) -> Value {
        let way = |measured: &Measured| {
            json!({
                "name": measured.way.name(), "seconds": measured.seconds, "median_s": median(measured.seconds.iter().copied()),
                "state_kib": measured.kib
            })
        };
        let ways: Vec<Value> = self.ways.iter().map(way).collect();
        json!({ "bench": "recovery", "rounds": self.rounds, "memory_mib": MEMORY_MIB, "ways": ways })
    }

    /// For people.
    pub fn table(&self) -> String {
        let of = |way: Way| self.ways.iter().find(|measured| measured.way == way);
        let median_of = |measured: &Measured| median(measured.seconds.iter().copied()).unwrap_or(f64::NAN);
        let ours = of(Way::PerdureResume).map_or(f64::NAN, median_of);
        let mut text = format!("{:<16} {:>9} {:>17} {:>9} {:>10}\n", "", "median", "range", "ratio", "state");
        for measured in &self.ways {
            let (least, most) =
                measured.seconds.iter().fold((f64::MAX, f64::MIN), |(least, most), s| (least.min(*s), most.max(*s)));
            let median = median_of(measured);
            let _ = writeln!(
                text,
                "{:<16} {median:>7.2} s {:>17} {:>9.1} {:>6} MiB",
                measured.way.name(),
                format!("{least:.2}-{most:.2} s"),
                median / ours,
                measured.kib / 1024
            );
        }
        text
    }
}
