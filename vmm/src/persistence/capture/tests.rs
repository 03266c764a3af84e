use std::sync::Arc;

use allocator::Pool;
use vfs::host::HostVfs;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::Wiring;
use crate::machine::config::generations::GenerationsConfig;
use crate::machine::config::{ByteSize, Kernel, VmConfig};
use crate::machine::kvm::Host;
use crate::persistence::context::ConsoleStateV1;
use crate::persistence::generations::{self, REGION_RAM};

fn bytes(pages: &[u8]) -> Vec<u8> {
    pages.iter().flat_map(|byte| [vec![0; PAGE_SIZE as usize - 1], vec![*byte]].concat()).collect()
}

#[test]
fn short_stretches_of_zeros_go_with_their_neighbours() {
    assert_eq!(stretches(&bytes(&[0, 0, 1, 0, 2, 0])), [(0, 2, true), (2, 4, false)]);
    let mut long = vec![1];
    long.extend(vec![0; ZERO_STRETCH as usize]);
    long.push(1);
    let zeros = ZERO_STRETCH;
    assert_eq!(stretches(&bytes(&long)), [(0, 1, false), (1, zeros, true), (zeros + 1, 1, false)]);
    assert_eq!(stretches(&bytes(&[])), []);
}

/// Bytes of RAM, and of that and persistent memory.
const RAM: usize = 32 << 20;
const ALL: usize = RAM + (2 << 20);

struct Nobody;

impl Surroundings for Nobody {
    fn hurry(&self, _: bool) {}

    fn quiesce(&self, _: Output) -> Result<(), String> {
        Ok(())
    }

    fn save(&self) -> ConsoleStateV1 {
        ConsoleStateV1::default()
    }
}

/// A guest that writes its memory as quickly as it can, a store, and what the supervisor keeps between two generations.
struct Lab {
    machine: Machine,
    regions: VmRegions,
    store: Store,
    base: Option<GenerationId>,
    base_ram: Vec<u8>,
    carried: Option<PageSet>,
    room: Room,
    _directory: tempfile::TempDir,
}

impl Lab {
    fn new(guest: &str, cmdline: &str, cpus: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::create_or_open(directory.path(), Arc::new(HostVfs)).unwrap();
        let config = VmConfig {
            cpus,
            memory: ByteSize(RAM as u64),
            pmem: vec!["log:2M".parse().unwrap()],
            kernel: Kernel::Guest(guest.to_owned()),
            cmdline: cmdline.to_owned(),
            ..VmConfig::default()
        };
        let mut regions = VmRegions::create(&pool, "web", &config).unwrap();
        let wiring =
            Wiring { serial_output: Box::new(std::io::sink()), events: Arc::new(|_| ()), attachments: Vec::new() };
        let mut machine = regions.assemble(Host::open().unwrap(), wiring).unwrap();
        machine.boot().unwrap();
        machine.run().unwrap();
        let store = generations::open(directory.path(), "web", &GenerationsConfig::default()).unwrap();
        Self {
            machine,
            regions,
            store,
            base: None,
            base_ram: Vec::new(),
            carried: None,
            room: Room::default(),
            _directory: directory,
        }
    }

    /// Takes a generation, as the supervisor does; `cut` gives it up before it is stored. Returns RAM as it was at the moment.
    fn take(&mut self, precopy: bool, cut: bool) -> (Vec<u8>, Option<CaptureReport>) {
        std::thread::sleep(Duration::from_millis(5));
        let wanted = Wanted {
            lineage: "web".to_owned(),
            base: self.base.clone(),
            label: None,
            protect: false,
            origin: Origin::Automatic,
            carried: self.carried.take(),
            expected: 100,
            precopy,
        };
        let never = AtomicBool::new(false);
        let mut capture = Capture::begin(&self.store, &wanted, self.machine.dirty_tracker()).unwrap();
        capture.precopy(&wanted, &mut self.room, &never, &mut |_, _| ()).unwrap();
        let mut changed = PageSet::new(self.machine.ram().pages());
        let room = std::mem::take(&mut self.room);
        let moment = hold(&self.machine, &self.regions, &Nobody, Vcpus::Stay, room, &mut changed).unwrap();
        let mut ram = vec![0; ALL];
        self.machine.ram().copy_pages(0, &mut ram).unwrap();
        self.machine.run().unwrap();
        match capture.store(moment, &mut self.room, &AtomicBool::new(cut)) {
            Ok(report) => {
                self.base = Some(report.generation.parse().unwrap());
                self.base_ram.clone_from(&ram);
                (ram, Some(report))
            }
            Err(failed) => {
                assert!(matches!(failed.error, CaptureError::Cancelled(_)), "{}", failed.error);
                let changed = ram.chunks(4096).zip(self.base_ram.chunks(4096)).map(|(now, then)| now != then);
                let forgotten = (0..).zip(changed).filter(|(page, changed)| *changed && !failed.pages.contains(*page));
                assert_eq!(forgotten.count(), 0, "pages that the next generation would lack");
                self.carried = Some(failed.pages);
                (ram, None)
            }
        }
    }

    fn stored(&self, report: &CaptureReport) -> Vec<u8> {
        let reader = self.store.reader(&report.generation.parse().unwrap()).unwrap();
        let mut all = vec![0; ALL];
        let (ram, pmem) = all.split_at_mut(RAM);
        for (name, part) in [(REGION_RAM, ram), ("log", pmem)] {
            let region = reader.region(name).unwrap();
            assert_eq!(reader.regions()[region].size, part.len() as u64);
            for (page, bytes) in (0..).zip(part.as_chunks_mut::<4096>().0) {
                reader.read_page(region, page, bytes).unwrap();
            }
        }
        all
    }
}

fn every_generation_is_the_memory_of_its_moment(guest: &str, cmdline: &str, cpus: u32) {
    let mut lab = Lab::new(guest, cmdline, cpus);
    let mut taken = Vec::new();
    // Memory that no guest here uses: not zero in the life before, zero in the next one.
    let fill = |lab: &Lab, byte| {
        let written = lab.machine.ram().memory().write_slice(&[byte; 100 << 12], GuestAddress(28 << 20));
        written.unwrap();
    };
    // No guest here writes to persistent memory; a device may.
    let keep = |lab: &Lab, round: u8| {
        let at = GuestAddress((4 << 30) + 4096 * u64::from(round) + 1);
        lab.machine.ram().memory().write_slice(&[round + 1; 4096], at).unwrap();
    };
    fill(&lab, 0xff);
    for round in 0..12 {
        keep(&lab, round);
        // Every other one with a copy before the pause; some are given up, twice in a row, too.
        let (ram, report) = lab.take(round % 2 == 0, [3, 6, 7].contains(&round));
        taken.extend(report.map(|report| (ram, report)));
        if round == 9 {
            // As a new process begins: everything is looked at, and compared with what the store has.
            (lab.base, lab.carried) = (None, None);
            fill(&lab, 0);
        }
    }
    assert!(!lab.machine.has_ended(), "the guest went on all the time");
    assert_eq!(taken.len(), 9);
    for (ram, report) in &taken {
        let stored = lab.stored(report);
        let unequal = ram.chunks(4096).zip(stored.chunks(4096)).filter(|(ram, stored)| ram != stored).count();
        assert_eq!(unequal, 0, "pages of {report:?}");
    }
    assert!(taken.windows(2).all(|pair| pair[0].0 != pair[1].0), "the guest wrote in between");
    assert_eq!(taken.iter().filter(|(_, report)| report.full).count(), 2);
}

#[test]
fn every_generation_of_a_walking_guest_is_the_memory_of_its_moment() {
    every_generation_is_the_memory_of_its_moment("memwalk", "pattern=uniform ws=4194304 write=60 verify=1", 1);
}

/// Here a page that changed does not change again for a second: what is forgotten stays forgotten.
#[test]
fn every_generation_of_a_ticking_guest_is_the_memory_of_its_moment() {
    every_generation_is_the_memory_of_its_moment("counter", "hz=1000 ram=4194304", 1);
}

#[test]
fn every_generation_of_two_cpus_is_the_memory_of_its_moment() {
    every_generation_is_the_memory_of_its_moment("smp", "", 2);
}
