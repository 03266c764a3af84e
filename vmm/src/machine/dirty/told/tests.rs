use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::Machine;
use crate::machine::dirty::DirtyTracker;
use crate::machine::dirty::tests::machine_over;
use crate::machine::memory::{Anonymous, PAGE_SIZE};

const MEMORY: usize = 16 << 20;
/// Two vCPUs with the least rings that KVM gives, twice over, and a little.
const SPARE: u64 = 64;

/// Of the least size that KVM gives.
const RINGS: Bound = Bound::Rings { entries: 1 };

fn machine(bound: Bound, guest: &str, cmdline: &str, cpus: u32) -> Machine {
    let ram = GuestRam::place(Box::new(Anonymous::new(MEMORY).unwrap())).unwrap();
    ram.told().want(bound);
    machine_over(ram, guest, cmdline, cpus)
}

/// A copy of memory that is kept up to date.
struct Shadow(Vec<u8>);

impl Shadow {
    fn of(ram: &GuestRam) -> Self {
        let mut bytes = vec![0; MEMORY];
        ram.copy_pages(0, &mut bytes).unwrap();
        Self(bytes)
    }

    fn copy(&mut self, ram: &GuestRam, run: &std::ops::Range<u64>) {
        let bytes = (run.start * PAGE_SIZE) as usize..(run.end * PAGE_SIZE) as usize;
        ram.copy_pages(run.start, &mut self.0[bytes]).unwrap();
    }

    /// Pages that are not what they are now.
    fn stale(&self, ram: &GuestRam) -> Vec<u64> {
        let now = Self::of(ram).0;
        let pages = now.chunks(4096).zip(self.0.chunks(4096));
        (0..).zip(pages).filter(|(_, (now, then))| now != then).map(|(page, _)| page).collect()
    }
}

/// Flushes what is cold to `flushed`, as the flusher does, while the guest runs.
fn flush(pages: &UnflushedPages, flushed: &mut Shadow, limit: u64) {
    let standing = pages.rearm().unwrap();
    assert!(standing.unflushed <= limit, "{standing:?}, at most {limit}");
    loop {
        let runs = pages.take(16);
        if runs.is_empty() {
            break;
        }
        runs.iter().for_each(|run| flushed.copy(pages.ram(), run));
    }
    pages.flushed(true);
}

fn both_hear_of_every_page(bound: Bound, guest: &str, cmdline: &str, cpus: u32) {
    let machine = machine(bound, guest, cmdline, cpus);
    let (tracker, ram) = (machine.dirty_tracker(), Arc::clone(machine.ram()));
    let pages = machine.unflushed_pages().unwrap();
    let limit = pages.least_limit() + SPARE;
    pages.begin(&PageSet::new(ram.pages()), limit).unwrap();
    tracker.enable().unwrap();
    let (mut flushed, mut captured) = (Shadow::of(&ram), Shadow::of(&ram));
    machine.run().unwrap();
    for round in 0..20_u64 {
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(1));
            flush(&pages, &mut flushed, limit);
        }
        capture(&tracker, &mut captured);
        ram.memory().write_obj(round + 1, GuestAddress(0x4000)).unwrap();
        machine.pause().unwrap();
        assert_eq!(captured_in_pause(&tracker, &mut captured), Vec::<u64>::new(), "a generation lacks pages");
        let all = pages.all().unwrap();
        let lost: Vec<_> = flushed.stale(&ram).into_iter().filter(|page| !all.contains(*page)).collect();
        assert_eq!(lost, Vec::<u64>::new(), "neither flushed nor said to be dirty");
        // What the VMM wrote has no ring.
        assert!(all.count() <= limit + 1, "{} pages are dirty, at most {limit}", all.count());
        machine.run().unwrap();
    }
    assert!(!machine.has_ended(), "the guest went on all the time");
}

fn capture(tracker: &DirtyTracker, captured: &mut Shadow) {
    let mut told = PageSet::new(tracker.ram().pages());
    tracker.collect(&mut told).unwrap();
    told.runs().for_each(|run| captured.copy(tracker.ram(), &run));
}

fn captured_in_pause(tracker: &DirtyTracker, captured: &mut Shadow) -> Vec<u64> {
    capture(tracker, captured);
    captured.stale(tracker.ram())
}

const WALKING: &str = "pattern=uniform ws=8388608 write=100 verify=1";
const TICKING: &str = "hz=1000 ram=1048576";

#[test]
fn a_walking_guest_is_bounded_and_both_hear_of_every_page() {
    both_hear_of_every_page(RINGS, "memwalk", WALKING, 1);
    both_hear_of_every_page(Bound::Slices, "memwalk", WALKING, 1);
}

#[test]
fn a_ticking_guest_is_bounded_and_both_hear_of_every_page() {
    both_hear_of_every_page(Bound::Slices, "counter", TICKING, 1);
}

#[test]
fn two_cpus_are_bounded_and_both_hear_of_every_page() {
    both_hear_of_every_page(Bound::Slices, "smp", "", 2);
}

/// As the next, where KVM has VMX or SVM alone: `tests/run` knows them by name.
#[test]
fn rings_tell_every_page_of_a_ticking_guest() {
    both_hear_of_every_page(RINGS, "counter", TICKING, 1);
}

#[test]
fn rings_tell_every_page_of_two_cpus() {
    both_hear_of_every_page(RINGS, "smp", "", 2);
}

/// What a guest made writable before somebody began to listen it can change without a word.
#[test]
fn who_begins_to_listen_late_hears_of_every_page_from_then_on() {
    for bound in [RINGS, Bound::Slices] {
        let machine = machine(bound, "memwalk", WALKING, 1);
        let (tracker, ram) = (machine.dirty_tracker(), Arc::clone(machine.ram()));
        let pages = machine.unflushed_pages().unwrap();
        pages.begin(&PageSet::new(ram.pages()), 100_000).unwrap();
        machine.run().unwrap();
        let begun = Instant::now();
        while pages.look().unwrap().unflushed < 500 {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", pages.standing());
        }
        tracker.enable().unwrap();
        let mut captured = Shadow::of(&ram);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(5));
            capture(&tracker, &mut captured);
            machine.pause().unwrap();
            assert_eq!(captured_in_pause(&tracker, &mut captured), Vec::<u64>::new(), "{bound:?}");
            machine.run().unwrap();
        }
    }
}

#[test]
fn a_guest_that_waits_for_room_is_stopped_at_once_and_goes_on_when_there_is() {
    [RINGS, Bound::Slices].into_iter().for_each(waits_is_stopped_and_goes_on);
}

fn waits_is_stopped_and_goes_on(bound: Bound) {
    let machine = machine(bound, "memwalk", "pattern=uniform ws=8388608 write=100 report=64", 1);
    let pages = machine.unflushed_pages().unwrap();
    let limit = pages.least_limit();
    pages.begin(&PageSet::new(machine.ram().pages()), limit).unwrap();
    machine.run().unwrap();
    let begun = Instant::now();
    while pages.standing().waiting == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody flushes, so it waits: {:?}", pages.standing());
        std::thread::sleep(Duration::from_millis(1));
    }
    let before = machine.devices().report().count();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(machine.devices().report().count(), before, "it waits");
    machine.pause().unwrap();
    assert!(pages.all().unwrap().count() <= limit, "{:?}", pages.standing());
    machine.run().unwrap();
    let mut flushed = Shadow::of(machine.ram());
    let begun = Instant::now();
    while machine.devices().report().count() < before + 4 {
        assert!(begun.elapsed() < Duration::from_secs(20), "it goes on: {:?}", pages.standing());
        flush(&pages, &mut flushed, limit);
    }
    assert!(pages.standing().waited > Duration::from_millis(20));
}

#[test]
fn a_limit_that_is_lowered_below_what_is_dirty_slows_the_guest_and_does_not_stop_it() {
    [RINGS, Bound::Slices].into_iter().for_each(is_slowed_and_not_stopped);
}

fn is_slowed_and_not_stopped(bound: Bound) {
    let machine = machine(bound, "memwalk", "pattern=uniform ws=8388608 write=100 report=64", 1);
    let pages = machine.unflushed_pages().unwrap();
    pages.begin(&PageSet::new(machine.ram().pages()), 100_000).unwrap();
    machine.run().unwrap();
    let begun = Instant::now();
    while pages.look().unwrap().unflushed < 4 * pages.grant() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", pages.standing());
    }
    let limit = pages.least_limit();
    pages.set_limit(limit);
    let (mut flushed, before, begun) = (Shadow::of(machine.ram()), machine.devices().report().count(), Instant::now());
    while machine.devices().report().count() < before + 16 {
        assert!(begun.elapsed() < Duration::from_secs(20), "it goes on: {:?}", pages.standing());
        flush(&pages, &mut flushed, u64::MAX);
    }
    machine.pause().unwrap();
    assert!(pages.all().unwrap().count() <= limit, "{:?}", pages.standing());
}

#[test]
fn what_could_not_be_flushed_is_dirty_again() {
    let machine = machine(Bound::Slices, "boot", "", 1);
    let pages = machine.unflushed_pages().unwrap();
    let mut dirty = PageSet::new(machine.ram().pages());
    dirty.insert_run(&(10..20));
    dirty.insert(100);
    pages.begin(&dirty, 1000).unwrap();
    assert_eq!(pages.take(4).first(), Some(&(10..14)));
    assert_eq!((pages.standing().unflushed, pages.standing().cold), (11, 7));
    assert_eq!(pages.all().unwrap(), dirty, "what is under way is not durable");
    pages.flushed(false);
    assert_eq!(pages.standing().cold, 11);
    assert_eq!(pages.take(100), [14..20, 100..101], "it goes on from where it was");
    assert_eq!(pages.take(100).first(), Some(&(10..14)), "and round");
    assert!(pages.take(100).is_empty());
    pages.flushed(true);
    assert_eq!((pages.standing().unflushed, pages.all().unwrap().is_empty()), (0, true));
}
