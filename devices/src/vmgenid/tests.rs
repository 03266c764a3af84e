use super::*;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::virtio::GuestMemory;

#[derive(Default)]
struct Line {
    edges: AtomicUsize,
    refuses: AtomicBool,
}

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        self.edges.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

const ADDRESS: u64 = 0x100;

fn device(id: u8) -> (VmGenId, Memory, Arc<Line>) {
    let memory = Memory::new(Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()));
    let line = Arc::<Line>::default();
    (VmGenId::new([id; LENGTH], memory.clone(), ADDRESS, Arc::clone(&line) as _), memory, line)
}

fn seen(memory: &Memory) -> [u8; LENGTH] {
    memory.read_obj(GuestAddress(ADDRESS)).unwrap()
}

#[test]
fn a_plain_resume_tells_the_guest_nothing() {
    let (device, memory, line) = device(1);
    device.show().unwrap();
    let state = device.save();
    let mut resumed = VmGenId::new([2; LENGTH], memory.clone(), ADDRESS, Arc::clone(&line) as _);
    resumed.restore(&state).unwrap();
    assert_eq!(resumed.save(), state);
    resumed.thaw();
    assert_eq!((seen(&memory), line.edges.load(Ordering::SeqCst)), ([1; LENGTH], 0));
}

#[test]
fn a_guest_that_went_back_sees_the_new_id_and_is_interrupted_once() {
    let (mut device, memory, line) = device(1);
    device.show().unwrap();
    let state = DeviceState::VmGenId(VmGenIdStateV1 { id: vec![9; LENGTH], changed: true });
    device.restore(&state).unwrap();
    assert_eq!((device.save(), seen(&memory)), (state, [1; LENGTH]), "no side effects before the thaw");
    device.thaw();
    device.thaw();
    assert_eq!((seen(&memory), line.edges.load(Ordering::SeqCst)), ([9; LENGTH], 1));
    let told = VmGenIdStateV1 { id: vec![9; LENGTH], changed: false };
    assert_eq!(device.save(), DeviceState::VmGenId(told));
}

#[test]
fn an_interrupt_that_did_not_arrive_is_repeated_after_the_next_freeze() {
    let (mut device, _, line) = device(1);
    line.refuses.store(true, Ordering::SeqCst);
    device.restore(&DeviceState::VmGenId(VmGenIdStateV1 { id: vec![9; LENGTH], changed: true })).unwrap();
    device.thaw();
    line.refuses.store(false, Ordering::SeqCst);
    device.thaw();
    assert_eq!(line.edges.load(Ordering::SeqCst), 1);
}

#[test]
fn an_id_of_another_length_is_refused() {
    let (mut device, _, _) = device(1);
    let before = device.save();
    assert!(device.restore(&DeviceState::VmGenId(VmGenIdStateV1 { id: vec![9; 15], changed: true })).is_err());
    assert_eq!(device.save(), before);
}
