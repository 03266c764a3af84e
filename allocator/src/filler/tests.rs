//! The tests touch a mapping as a guest does.
#![allow(unsafe_code)]

use super::*;
use crate::medium::MediumKind;
use crate::pool::{Pool, RegionSpec};
use crate::region::Kind;
use std::os::fd::AsRawFd;
use std::sync::mpsc;

const SIZE: u64 = (1 << 20) + 4096;

/// Each byte says where it is; cluster 3 is zeros; from `lost` on nothing can be had.
#[derive(Debug)]
struct Numbered {
    lost: u64,
    reads: Arc<AtomicUsize>,
}

fn byte(offset: u64) -> u8 {
    let zeros = offset / CLUSTER_MIN == 3;
    if zeros { 0 } else { (offset / 4096 * 7 + offset % 4096 * 3 + 1) as u8 }
}

impl ClusterSource for Numbered {
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<bool, SourceError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if offset + bytes.len() as u64 > self.lost {
            return Err(format!("page {} is gone", self.lost / 4096).into());
        }
        (offset..).zip(bytes.iter_mut()).for_each(|(at, to)| *to = byte(at));
        Ok(bytes.iter().any(|byte| *byte != 0))
    }
}

struct Home {
    _directory: tempfile::TempDir,
    region: Arc<Region>,
    reads: Arc<AtomicUsize>,
    events: mpsc::Receiver<FillerEvent>,
    sender: mpsc::Sender<FillerEvent>,
}

impl Home {
    fn new(medium: MediumKind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::create_or_open(directory.path().join("pool"), Arc::new(vfs::HostVfs)).unwrap();
        let name = "vm/ram".parse().unwrap();
        pool.allocate(&name, RegionSpec { kind: Kind::Ram, size: SIZE, medium: Some(medium) }).unwrap();
        let region = Arc::new(Region::open(pool.lease(&name).unwrap()).unwrap());
        let (sender, events) = mpsc::channel();
        Self { _directory: directory, region, reads: Arc::default(), events, sender }
    }

    fn pager(&self, lost: u64, present: Vec<bool>, prefetch: Option<Vec<u32>>) -> Filler {
        let sender = Mutex::new(self.sender.clone());
        let events: FillerEvents = Arc::new(move |event| drop(sender.lock().unwrap().send(event)));
        let source = Box::new(Numbered { lost, reads: Arc::clone(&self.reads) });
        let plan = Plan { cluster: cluster_size(SIZE), present, source, prefetch, events };
        Filler::start(Arc::clone(&self.region), plan).unwrap()
    }

    fn next_event(&self) -> FillerEvent {
        self.events.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

fn read(pager: &Filler, offset: u64) -> u8 {
    assert!(offset < pager.mapping().len() as u64);
    // SAFETY: within the mapping, which the pager keeps.
    unsafe { pager.mapping().as_ptr().add(offset as usize).read_volatile() }
}

fn write(pager: &Filler, offset: u64, value: u8) {
    // SAFETY: as above.
    unsafe { pager.mapping().as_ptr().add(offset as usize).write_volatile(value) }
}

#[test]
fn clusters_are_of_a_size_that_a_process_can_map() {
    for size in [4096, 1 << 20, 1 << 30, 64 << 30, (2 << 40) + 4096] {
        let cluster = cluster_size(size);
        assert!(is_cluster_size(cluster, size), "{size}");
    }
    assert_eq!((cluster_size(1 << 30), cluster_size(64 << 30)), (64 << 10, 2 << 20));
    assert!(!is_cluster_size(0, 4096) && !is_cluster_size(4096, 1 << 30) && !is_cluster_size(65537, 1 << 20));
}

#[test]
fn what_is_touched_is_there_and_what_was_written_stays_through_the_prefetch() {
    for medium in [MediumKind::File, MediumKind::Nvdimm] {
        let home = Home::new(medium);
        let on_demand = home.pager(u64::MAX, vec![], None);
        for offset in [SIZE - 1, 5, 3 * CLUSTER_MIN + 9, 3 * CLUSTER_MIN + 70] {
            assert_eq!(read(&on_demand, offset), byte(offset));
        }
        assert_eq!(on_demand.trace(), [16, 0, 3], "each once");
        assert_eq!(on_demand.status(), FillerStatus { clusters: 17, present: 3, faults: 3, missing: 0 });
        on_demand.bring_in(2 * CLUSTER_MIN - 1, 2).unwrap();
        assert_eq!(on_demand.status().present, 5);
        assert_eq!(on_demand.status().faults, 3, "who asks first does not wait in a fault");
        // Another pager over what there is by now, as after an outage.
        write(&on_demand, 6, 0xEE);
        home.region.persist(on_demand.mapping(), crate::Dirty::Unknown).unwrap();
        let present = on_demand.present();
        drop(on_demand);
        home.reads.store(0, Ordering::SeqCst);
        let pager = home.pager(u64::MAX, present, Some(vec![16, 9, 9, 4_000_000]));
        write(&pager, 10 * CLUSTER_MIN, 0xDD);
        assert!(matches!(home.next_event(), FillerEvent::Complete));
        assert_eq!(home.reads.load(Ordering::SeqCst), 12, "each absent cluster is read once");
        assert!(pager.is_complete());
        for offset in 0..SIZE {
            let wanted = match offset {
                6 => 0xEE,
                _ if offset == 10 * CLUSTER_MIN => 0xDD,
                _ => byte(offset),
            };
            assert_eq!(read(&pager, offset), wanted, "{medium} {offset}");
        }
    }
}

#[test]
fn many_threads_see_the_same_bytes_while_the_prefetcher_is_at_it() {
    let home = Home::new(MediumKind::File);
    let pager = home.pager(u64::MAX, vec![], Some(vec![]));
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let pager = &pager;
            scope.spawn(move || {
                for step in 0..4000_u64 {
                    let offset = (step * 40_503 + thread * 977) % SIZE;
                    assert_eq!(read(pager, offset), byte(offset));
                }
            });
        }
    });
    assert!(matches!(home.next_event(), FillerEvent::Complete));
    assert_eq!(home.reads.load(Ordering::SeqCst), 17);
}

#[test]
fn what_cannot_be_had_is_named_stays_absent_and_is_never_zeros() {
    let home = Home::new(MediumKind::File);
    let pager = home.pager(5 * CLUSTER_MIN, vec![], Some(vec![7]));
    let FillerEvent::Missing(missing) = home.next_event() else { panic!("not told") };
    assert!(missing.source().unwrap().to_string().contains("page 80"), "{missing:?}");
    let error = pager.bring_in(5 * CLUSTER_MIN, 1).unwrap_err();
    assert!(error.to_string().contains("0x50000..0x60000"), "{error}");
    assert!(!pager.present()[5]);
    // The kernel's access, as KVM's on the guest's behalf, is refused; and told before it is.
    let (_reader, writer) = std::io::pipe().unwrap();
    let address = pager.mapping().as_ptr() as usize + 6 * CLUSTER_MIN as usize;
    // SAFETY: the kernel checks the address; a refusal is an error code.
    let written = unsafe { libc::write(writer.as_raw_fd(), address as *const libc::c_void, 1) };
    assert_eq!(written, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    let FillerEvent::Lost(_) = home.events.try_recv().unwrap() else { panic!("not told") };
    assert_eq!(read(&pager, 4 * CLUSTER_MIN), byte(4 * CLUSTER_MIN), "the others come");
}

#[test]
fn a_held_prefetcher_rests_while_faults_are_served() {
    let home = Home::new(MediumKind::File);
    let pager = home.pager(u64::MAX, vec![], None);
    pager.hold(true);
    assert_eq!(read(&pager, 0), byte(0));
    drop(pager);
    assert!(home.events.try_recv().is_err());
}

#[test]
fn whoever_sees_a_cluster_finds_it_among_those_that_are_present() {
    for _ in 0..20 {
        let home = Home::new(MediumKind::File);
        let pager = home.pager(u64::MAX, vec![], Some(vec![]));
        for cluster in (0..17_u64).rev() {
            read(&pager, cluster * CLUSTER_MIN);
            // A freeze would write this down, and lose what the guest has written there since, if it were not so.
            assert!(pager.present()[cluster as usize], "{cluster}");
        }
    }
}
