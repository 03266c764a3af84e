use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use super::*;
use crate::device::Freezable;
use crate::state::DeviceState;
use crate::virtio::Piece;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY, SIZE as ENTRIES};
use proptest::prelude::*;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const MERGE: u64 = feature::MRG_RXBUF;
const ANNOUNCES: u64 = feature::GUEST_ANNOUNCE | feature::CTRL_VQ | feature::STATUS;

/// The host's side of the link.
#[derive(Default)]
struct Host {
    /// What will be received.
    coming: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    /// How many more frames are taken; `None`: any number.
    takes: Option<usize>,
    fails: Option<io::ErrorKind>,
    offloads: Vec<Offloads>,
    /// How many frames came by way of memory of our own, all or a part.
    copied: usize,
    /// How many pieces of the driver's memory each frame was offered.
    offered: Vec<usize>,
}

type SharedHost = Arc<Mutex<Host>>;

struct TestTap(SharedHost);

impl TestTap {
    fn next(&self) -> io::Result<Vec<u8>> {
        let mut host = self.0.lock().unwrap();
        if let Some(kind) = host.fails {
            return Err(kind.into());
        }
        host.coming.pop_front().ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn take(&self, frame: Vec<u8>) -> io::Result<()> {
        let mut host = self.0.lock().unwrap();
        if let Some(kind) = host.fails {
            return Err(kind.into());
        }
        match &mut host.takes {
            Some(0) => return Err(io::ErrorKind::WouldBlock.into()),
            Some(left) => *left -= 1,
            None => {}
        }
        host.sent.push(frame);
        Ok(())
    }
}

impl Tap for TestTap {
    fn receive(&mut self, buffers: &[Piece<'_>], rest: &mut [u8]) -> io::Result<usize> {
        let room: usize = buffers.iter().map(|piece| piece.len()).sum();
        assert!(room + rest.len() >= FRAME_MAX, "a frame would be cut short");
        let frame = self.next()?;
        let mut left = &frame[..];
        for piece in buffers {
            let part = left.len().min(piece.len());
            piece.copy_from(&left[..part]);
            left = &left[part..];
        }
        rest[..left.len()].copy_from_slice(left);
        let mut host = self.0.lock().unwrap();
        host.offered.push(buffers.len());
        host.copied += usize::from(!left.is_empty());
        Ok(frame.len())
    }

    fn send(&mut self, buffers: &[Piece<'_>]) -> io::Result<()> {
        let mut frame = Vec::new();
        for piece in buffers {
            let mut part = vec![0_u8; piece.len()];
            piece.copy_to(&mut part[..]);
            frame.append(&mut part);
        }
        self.take(frame)
    }

    fn send_from(&mut self, frame: &[u8]) -> io::Result<()> {
        self.take(frame.to_vec())
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.0.lock().unwrap().offloads.push(offloads);
        Ok(())
    }
}

fn mac() -> Mac {
    "02:00:5e:10:00:01".parse().unwrap()
}

fn card() -> (Net, SharedHost) {
    let host = SharedHost::default();
    (Net::new(mac(), Box::new(TestTap(Arc::clone(&host)))), host)
}

fn set_up(features: u64) -> (Driver, SharedHost) {
    let (card, host) = card();
    let mut driver = Driver::new(card);
    driver.set_up(features);
    (driver, host)
}

/// A header with something in it, and `length` bytes of a frame.
fn frame(length: usize) -> Vec<u8> {
    let header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    header.into_iter().chain((0..length).map(|index| (index % 251) as u8)).collect()
}

/// `frame` as a driver gets it in `count` buffers.
fn received(frame: &[u8], count: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[NUM_BUFFERS_AT] = count;
    frame
}

const NUM_BUFFERS_AT: usize = 10;

fn arrive(driver: &mut Driver, host: &SharedHost, frame: Vec<u8>) {
    host.lock().unwrap().coming.push_back(frame);
    driver.mmio.engine().lock().unwrap().ready(0);
}

#[test]
fn a_driver_finds_the_address_and_a_link_that_is_up() {
    let (mut driver, _) = set_up(feature::MAC | feature::STATUS);
    assert_eq!(driver.config(0, 10), [2, 0, 0x5e, 0x10, 0, 1, 1, 0, 0, 0]);
    assert_eq!(driver.config(4, 4), [0, 1, 1, 0]);
    driver.write(0x100, u32::MAX);
    assert_eq!(driver.config(0, 6), mac().bytes(), "there is nothing to be written");
}

#[test]
fn a_frame_leaves_from_where_it_lies_in_as_many_pieces_as_the_driver_likes() {
    let (mut driver, host) = set_up(0);
    let sent = frame(100);
    driver.put(BUFFERS, &sent[..7]);
    driver.put(BUFFERS + 0x1000, &sent[7..]);
    let head = driver.offer(TRANSMIT, &[(BUFFERS, 7), (BUFFERS, 0), (BUFFERS + 0x1000, 105)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(host.lock().unwrap().sent, [sent]);
    assert_eq!(driver.used(TRANSMIT), [(head.into(), 0)]);
    assert_eq!(driver.edges(), 1);
}

#[test]
fn what_is_no_frame_is_dropped_and_the_next_one_leaves() {
    let (mut driver, host) = set_up(0);
    driver.put(BUFFERS, &frame(100));
    let half = (MEMORY - BUFFERS) as u32 / 2;
    for buffers in [
        &[][..],
        &[(BUFFERS, 25)],
        &[(BUFFERS, 12), (MEMORY - 10, 100)],
        &[(u64::MAX - 3, 100)],
        &[(BUFFERS, FRAME_MAX as u32 + 1)],
        &[(BUFFERS, half), (BUFFERS, half), (BUFFERS, half)],
        &[(BUFFERS, u32::MAX)],
    ] {
        let writable: &[_] = if buffers.is_empty() { &[(BUFFERS, 100)] } else { &[] };
        driver.offer(TRANSMIT, buffers, writable);
        driver.notify(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT).len(), 1, "{buffers:x?}");
    }
    assert!(host.lock().unwrap().sent.is_empty());
    driver.offer(TRANSMIT, &[(BUFFERS, 112)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(host.lock().unwrap().sent, [frame(100)]);
    assert!(!driver.needs_reset());
}

#[test]
fn the_largest_frame_leaves() {
    let (mut driver, host) = set_up(0);
    driver.offer(TRANSMIT, &[(BUFFERS, FRAME_MAX as u32)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(host.lock().unwrap().sent[0].len(), 65562);
}

#[test]
fn frames_that_the_host_does_not_take_wait_in_the_ring_in_their_order() {
    let (mut driver, host) = set_up(0);
    host.lock().unwrap().takes = Some(1);
    for index in 0..3_u8 {
        let at = BUFFERS + 0x1000 * u64::from(index);
        driver.put(at, &[index; 60]);
        driver.offer(TRANSMIT, &[(at, 60)], &[]);
    }
    driver.notify(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    host.lock().unwrap().takes = None;
    driver.notify(TRANSMIT);
    assert!(driver.used(TRANSMIT).is_empty(), "no attempt before the tap is ready");
    driver.mmio.engine().lock().unwrap().ready(0);
    assert_eq!(driver.used(TRANSMIT).len(), 2);
    let first: Vec<u8> = host.lock().unwrap().sent.iter().map(|frame| frame[0]).collect();
    assert_eq!(first, [0, 1, 2]);
}

#[test]
fn a_tap_that_fails_loses_frames_and_nothing_else() {
    let (mut driver, host) = set_up(MERGE);
    host.lock().unwrap().fails = Some(io::ErrorKind::Other);
    driver.offer(TRANSMIT, &[(BUFFERS, 100)], &[]);
    driver.notify(TRANSMIT);
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    driver.offer(RECEIVE, &[], &[(BUFFERS, 2048)]);
    arrive(&mut driver, &host, frame(60));
    assert!(driver.used(RECEIVE).is_empty() && !driver.needs_reset());
    host.lock().unwrap().fails = None;
    driver.mmio.engine().lock().unwrap().ready(0);
    assert_eq!(driver.used(RECEIVE), [(0, 72)]);
}

#[test]
fn a_frame_fills_merged_buffers_and_says_how_many() {
    let (mut driver, host) = set_up(MERGE);
    let came = frame(5000);
    for index in 0..ENTRIES {
        driver.offer(RECEIVE, &[], &[(BUFFERS + 0x2000 * u64::from(index), 4500)]);
    }
    driver.notify(RECEIVE);
    arrive(&mut driver, &host, came.clone());
    assert_eq!(driver.used(RECEIVE), [(0, 4500), (1, 512)]);
    let mut lies = driver.get(BUFFERS, 4500);
    lies.extend(driver.get(BUFFERS + 0x2000, 512));
    assert_eq!(lies, received(&came, 2));
}

#[test]
fn frames_are_offered_all_the_buffers_that_they_may_need_only_while_they_are_large() {
    let (mut driver, host) = set_up(MERGE);
    let buffer = |index: u64| BUFFERS + 0x2000 * (index % u64::from(ENTRIES));
    let (mut offered, mut next) = (0..u64::from(ENTRIES), 0);
    // Room for the largest frame is 15 of these. Large ones fill two.
    for (length, pieces, copied) in [(60, 1, 0), (5000, 1, 1), (5001, 15, 1), (60, 15, 1), (60, 1, 1)] {
        for index in offered {
            driver.offer(RECEIVE, &[], &[(buffer(index), 4500)]);
        }
        let came = frame(length);
        driver.notify(RECEIVE);
        arrive(&mut driver, &host, came.clone());
        let count = if length > 4500 { 2 } else { 1 };
        let mut lies = driver.get(buffer(next), came.len().min(4500));
        lies.extend(driver.get(buffer(next + 1), came.len().saturating_sub(4500)));
        assert_eq!(lies, received(&came, count));
        assert_eq!(host.lock().unwrap().offered.last(), Some(&pieces), "{length}");
        assert_eq!(host.lock().unwrap().copied, copied, "{length}");
        let (begin, end) = (u64::from(ENTRIES) + next, u64::from(ENTRIES) + next + u64::from(count));
        (offered, next) = (begin..end, next + u64::from(count));
    }
}

#[test]
fn a_large_frame_whose_rest_would_go_nowhere_is_lost_and_nothing_else() {
    let (mut driver, host) = set_up(MERGE);
    let nowhere = MEMORY + 0x1000;
    for index in 0..u64::from(ENTRIES) {
        let at = if index == 1 { nowhere } else { BUFFERS + 0x2000 * index };
        driver.offer(RECEIVE, &[], &[(at, 4500)]);
    }
    driver.notify(RECEIVE);
    arrive(&mut driver, &host, frame(5000));
    assert_eq!(driver.used(RECEIVE), [(0, 0)], "the first buffer comes back empty");
    assert!(!driver.needs_reset());
}

#[test]
fn a_frame_goes_into_small_buffers_too_and_waits_until_there_are_enough() {
    let (mut driver, host) = set_up(MERGE);
    let came = frame(3000);
    driver.offer(RECEIVE, &[], &[(BUFFERS, 5), (BUFFERS + 0x100, 1500)]);
    arrive(&mut driver, &host, came.clone());
    assert!(driver.used(RECEIVE).is_empty());
    driver.offer(RECEIVE, &[], &[(BUFFERS + 0x1000, 1500)]);
    driver.notify(RECEIVE);
    assert!(driver.used(RECEIVE).is_empty());
    driver.offer(RECEIVE, &[], &[(BUFFERS + 0x2000, 1500)]);
    driver.notify(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(0, 1505), (2, 1500), (3, 7)]);
    let lies = [(BUFFERS, 5), (BUFFERS + 0x100, 1500), (BUFFERS + 0x1000, 1500), (BUFFERS + 0x2000, 7)];
    let lies: Vec<u8> = lies.into_iter().flat_map(|(at, length)| driver.get(at, length)).collect();
    assert_eq!(lies, received(&came, 3));
}

#[test]
fn where_buffers_are_few_frames_go_straight_into_those_that_there_are() {
    let (mut driver, host) = set_up(MERGE);
    let buffer = |index: u64| BUFFERS + 0x1000 * index;
    (0..4).for_each(|index| _ = driver.offer(RECEIVE, &[], &[(buffer(index), 1500)]));
    // Far from room for the largest. The second small one is offered all that there is, as it comes behind a large one.
    for (length, used, pieces, copied) in [(60, 1, 1, 0), (2000, 2, 1, 1), (61, 1, 1, 1)] {
        arrive(&mut driver, &host, frame(length));
        assert_eq!(driver.used(RECEIVE).len(), used, "{length}");
        let host = host.lock().unwrap();
        assert_eq!((host.offered.last(), host.copied), (Some(&pieces), copied), "{length}");
    }
    assert_eq!(driver.get(buffer(3), 73), received(&frame(61), 1));

    // One that finds too few waits with what already lay in them.
    let came = frame(4000);
    (4..6).for_each(|index| _ = driver.offer(RECEIVE, &[], &[(buffer(index), 1500)]));
    arrive(&mut driver, &host, came.clone());
    assert!(driver.used(RECEIVE).is_empty());
    driver.offer(RECEIVE, &[], &[(buffer(6), 1500)]);
    driver.notify(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(4, 1500), (5, 1500), (6, 1012)]);
    let lies: Vec<u8> =
        [(4, 1500), (5, 1500), (6, 1012)].into_iter().flat_map(|(at, length)| driver.get(buffer(at), length)).collect();
    assert_eq!(lies, received(&came, 3));
}

#[test]
fn a_frame_that_never_has_room_is_dropped_and_the_next_one_comes() {
    let (mut driver, host) = set_up(MERGE);
    for index in 0..ENTRIES {
        driver.offer(RECEIVE, &[], &[(BUFFERS + 0x100 * u64::from(index), 100)]);
    }
    arrive(&mut driver, &host, frame(3000));
    arrive(&mut driver, &host, frame(80));
    assert_eq!(driver.used(RECEIVE), [(0, 92)]);

    let (mut driver, host) = set_up(0);
    driver.offer(RECEIVE, &[], &[(BUFFERS, 1526)]);
    arrive(&mut driver, &host, frame(3000));
    assert!(driver.used(RECEIVE).is_empty());
    arrive(&mut driver, &host, frame(1514));
    assert_eq!(driver.used(RECEIVE), [(0, 1526)]);
    assert_eq!(driver.get(BUFFERS, 1526), received(&frame(1514), 1));
}

#[test]
fn frames_come_in_order_and_wait_at_the_host_while_there_are_no_buffers() {
    let (mut driver, host) = set_up(0);
    for index in 0..5 {
        arrive(&mut driver, &host, frame(60 + index));
    }
    assert_eq!(host.lock().unwrap().coming.len(), 5, "no buffers, no frame taken");
    for index in 0..5 {
        driver.offer(RECEIVE, &[], &[(BUFFERS + 0x1000 * index, 1526)]);
        driver.notify(RECEIVE);
    }
    let lengths: Vec<u32> = driver.used(RECEIVE).into_iter().map(|(_, length)| length).collect();
    assert_eq!(lengths, [72, 73, 74, 75, 76]);
    assert_eq!(driver.edges(), 5);
}

#[test]
fn receive_buffers_that_are_none_are_given_back_empty_and_do_not_stand_in_the_way() {
    for features in [0, MERGE] {
        let (mut driver, host) = set_up(features);
        driver.offer(RECEIVE, &[(BUFFERS, 100)], &[]);
        driver.offer(RECEIVE, &[], &[(MEMORY - 10, 2048)]);
        driver.offer(RECEIVE, &[], &[(BUFFERS, 2048)]);
        for _ in 0..3 {
            arrive(&mut driver, &host, frame(100));
        }
        let used = driver.used(RECEIVE);
        assert_eq!(used.last(), Some(&(2, 112)), "{used:?} with {features:#x}");
        assert!(used.iter().rev().skip(1).all(|(_, length)| *length == 0));
        assert!(!driver.needs_reset());
    }
}

#[test]
fn the_tap_is_told_what_the_driver_takes() {
    let (mut driver, host) = set_up(feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_ECN);
    let took = Offloads { checksum: true, tcp4: true, tcp6: false, ecn: true };
    assert_eq!(host.lock().unwrap().offloads.last(), Some(&took));
    driver.write(0x70, 0);
    assert_eq!(host.lock().unwrap().offloads.last(), Some(&Offloads::default()));
}

#[test]
fn buffers_taken_before_a_freeze_are_filled_after_the_resume_once() {
    let (mut driver, host) = set_up(MERGE | ANNOUNCES);
    for index in 0..4_u64 {
        driver.offer(RECEIVE, &[], &[(BUFFERS + 0x8000 * index, 0x8000)]);
    }
    arrive(&mut driver, &host, frame(100));
    assert_eq!(driver.used(RECEIVE), [(0, 112)]);
    let state = driver.freeze();
    arrive(&mut driver, &host, frame(200));
    assert!(driver.used(RECEIVE).is_empty(), "nothing happens while it is frozen");
    let (card, host) = card();
    let mut resumed = driver.resumed(card);
    resumed.restore(&state).unwrap();
    host.lock().unwrap().coming.push_back(frame(300));
    resumed.thaw();
    assert_eq!(resumed.used(RECEIVE), [(1, 312)]);
    assert_eq!(host.lock().unwrap().offloads.len(), 1, "the tap is told anew what the driver takes");
}

#[test]
fn a_freeze_that_is_called_off_loses_no_frame() {
    let (mut driver, host) = set_up(MERGE);
    driver.offer(RECEIVE, &[], &[(BUFFERS, 100)]);
    arrive(&mut driver, &host, frame(150));
    driver.freeze();
    driver.thaw();
    driver.offer(RECEIVE, &[], &[(BUFFERS + 100, 100)]);
    driver.notify(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(0, 100), (1, 62)]);
    assert_eq!(driver.config(6, 2), [1, 0], "and announces nothing");
}

#[test]
fn after_a_resume_the_driver_is_asked_to_announce_itself_until_it_says_that_it_did() {
    let (mut driver, _) = set_up(ANNOUNCES);
    let state = driver.freeze();
    let (card, host) = card();
    let mut resumed = driver.resumed(card);
    resumed.restore(&state).unwrap();
    assert_eq!(resumed.config(6, 2), [1, 0]);
    resumed.thaw();
    assert_eq!((resumed.config(6, 2), resumed.read(0x60)), (vec![3, 0], 2));
    assert!(host.lock().unwrap().sent.is_empty(), "the guest knows its addresses best");

    // Frozen again before it answered: the request stands.
    let state = resumed.freeze();
    assert!(matches!(&state, DeviceState::VirtioMmio(state) if
        state.device == VirtioState::Net(NetStateV1 { mac: mac(), announce: true })));
    resumed.thaw();
    resumed.put(BUFFERS, &[3, 0]);
    resumed.offer(CONTROL, &[(BUFFERS, 1), (BUFFERS + 1, 1)], &[(BUFFERS + 8, 1)]);
    resumed.put(BUFFERS + 8, &[0xff]);
    resumed.notify(CONTROL);
    assert_eq!(resumed.used(CONTROL).len(), 1);
    assert_eq!((resumed.get(BUFFERS + 8, 1), resumed.config(6, 2)), (vec![0], vec![1, 0]));
}

#[test]
fn for_a_driver_that_cannot_the_card_announces_itself() {
    let (mut driver, _) = set_up(0);
    let state = driver.freeze();
    let (card, host) = card();
    let mut resumed = driver.resumed(card);
    resumed.restore(&state).unwrap();
    resumed.thaw();
    let sent = host.lock().unwrap().sent.clone();
    assert_eq!(sent.len(), 1);
    let mac = mac().bytes();
    assert_eq!(sent[0][..12], [0; 12]);
    assert_eq!((&sent[0][12..18], &sent[0][18..24], &sent[0][24..26]), (&[0xff; 6][..], &mac[..], &[0x80, 0x35][..]));
    assert_eq!((&sent[0][34..40], &sent[0][44..50], sent[0].len()), (&mac[..], &mac[..], 72));
}

#[test]
fn other_commands_and_what_are_none_are_refused() {
    let (mut driver, _) = set_up(ANNOUNCES);
    driver.put(BUFFERS, &[0, 0, 1, 3, 1]);
    for buffers in [&[(BUFFERS, 3)][..], &[(BUFFERS + 3, 2)], &[(BUFFERS + 3, 1)], &[(MEMORY, 2)], &[]] {
        driver.put(BUFFERS + 8, &[0xff]);
        driver.offer(CONTROL, buffers, &[(BUFFERS + 8, 1)]);
        driver.notify(CONTROL);
        assert_eq!((driver.used(CONTROL).len(), driver.get(BUFFERS + 8, 1)), (1, vec![1]), "{buffers:x?}");
    }
    driver.offer(CONTROL, &[(BUFFERS, 2)], &[]);
    driver.offer(CONTROL, &[(BUFFERS, 2)], &[(MEMORY, 1)]);
    driver.notify(CONTROL);
    assert_eq!(driver.used(CONTROL).iter().map(|(_, length)| *length).collect::<Vec<_>>(), [0, 0]);
    assert!(!driver.needs_reset());
}

#[test]
fn a_state_that_asks_a_driver_that_cannot_is_refused() {
    let (mut driver, _) = set_up(0);
    let DeviceState::VirtioMmio(mut state) = driver.freeze() else { panic!() };
    state.device = VirtioState::Net(NetStateV1 { mac: mac(), announce: true });
    assert!(driver.mmio.restore(&DeviceState::VirtioMmio(state.clone())).is_err());
    state.device = VirtioState::Rng;
    assert!(driver.mmio.restore(&DeviceState::VirtioMmio(state)).is_err());
}

#[test]
fn with_event_indices_the_driver_is_told_of_buffers_used_together() {
    let (mut driver, host) = set_up(MERGE | 1 << 29);
    for index in 0..4_u64 {
        driver.offer(RECEIVE, &[], &[(BUFFERS + 0x1000 * index, 100)]);
    }
    // The driver wants to hear of the first entry (used_event = 0), which lies behind those of the available ring.
    driver.put(Driver::ring(RECEIVE) + 0x4004 + 2 * u64::from(ENTRIES), &0_u16.to_le_bytes());
    arrive(&mut driver, &host, frame(250));
    assert_eq!((driver.used(RECEIVE).len(), driver.edges()), (3, 1));
    arrive(&mut driver, &host, frame(50));
    assert_eq!((driver.used(RECEIVE).len(), driver.edges()), (1, 1), "it did not ask for more");
}

/// What may happen to a card.
#[derive(Clone, Debug)]
enum Act {
    Descriptor(usize, u16, u64, u32, u16, u16),
    Offer(usize, u16),
    Notify(usize),
    Frame(usize),
    Ready,
    Takes(Option<usize>),
    Freeze,
    Resume,
}

fn act() -> impl Strategy<Value = Act> {
    let address = prop_oneof![8 => BUFFERS..MEMORY, 1 => MEMORY - 100..MEMORY + 100, 1 => any::<u64>()];
    let length = prop_oneof![8 => 0_u32..3000, 2 => 0_u32..200_000, 1 => any::<u32>()];
    prop_oneof![
        8 => (0..3_usize, 0..ENTRIES, address, length, 0_u16..8, 0..ENTRIES + 1)
            .prop_map(|(queue, index, address, length, flags, next)| Act::Descriptor(queue, index, address, length, flags, next)),
        8 => (0..3_usize, 0..ENTRIES + 1).prop_map(|(queue, head)| Act::Offer(queue, head)),
        4 => (0..4_usize).prop_map(Act::Notify),
        4 => prop_oneof![0..2000_usize, 0..65551_usize].prop_map(Act::Frame),
        2 => Just(Act::Ready),
        1 => prop::option::of(0..3_usize).prop_map(Act::Takes),
        1 => Just(Act::Freeze),
        1 => Just(Act::Resume),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_a_driver_offers_the_card_lives_freezes_and_resumes(
        features in prop::sample::select(vec![0, MERGE, MERGE | 1 << 29, MERGE | ANNOUNCES | 1 << 28]),
        acts in prop::collection::vec(act(), 0..80)
    ) {
        let (mut driver, mut host) = set_up(features);
        for act in acts {
            match act {
                Act::Descriptor(queue, index, address, length, flags, next) =>
                    driver.descriptor(queue, index, (address, length), flags, next),
                Act::Offer(queue, head) => driver.offer_head(queue, head),
                Act::Notify(queue) => driver.notify(queue),
                Act::Frame(length) => arrive(&mut driver, &host, frame(length)),
                Act::Ready => driver.mmio.engine().lock().unwrap().ready(0),
                Act::Takes(count) => host.lock().unwrap().takes = count,
                Act::Freeze => {
                    driver.freeze();
                    driver.thaw();
                }
                Act::Resume => {
                    let state = driver.freeze();
                    let (card, other) = card();
                    let mut resumed = driver.resumed(card);
                    resumed.restore(&state).unwrap();
                    resumed.thaw();
                    (driver, host) = (resumed, other);
                }
            }
        }
    }
}
