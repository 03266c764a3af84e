mod host;

use super::packet::{ENDS_RECEIVING, ENDS_SENDING, Operation, STREAM};
use super::*;
use crate::device::Freezable;
use crate::state::DeviceState;
use crate::virtio::driver::{BUFFERS, Driver, MEMORY, SIZE as ENTRIES};
use host::{Stream, TestHost};
use proptest::prelude::*;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
const GUEST: u64 = 3;
/// A port of the guest, and one of the host, in the tests.
const INSIDE: u32 = 1024;
const OUTSIDE: u32 = 52;
/// Where a test's receive buffers lie, and how long each is.
const ROOM: u32 = 4096 + HEADER as u32;
const RECEIVE_BUFFERS: u64 = BUFFERS;
const SENT: u64 = BUFFERS + (1 << 20);

struct Lab {
    driver: Driver,
    host: TestHost,
    /// Receive buffers offered so far.
    offered: u64,
}

fn device(host: &TestHost) -> Vsock {
    Vsock::new(Cid::new(GUEST).unwrap(), Box::new(host.clone()))
}

impl Lab {
    fn new() -> Self {
        let host = TestHost::default();
        host.0.lock().unwrap().listening = vec![OUTSIDE];
        let mut driver = Driver::new(device(&host));
        driver.set_up(0);
        let mut lab = Self { driver, host, offered: 0 };
        lab.offer_buffers(8);
        lab
    }

    fn offer_buffers(&mut self, count: u64) {
        for _ in 0..count {
            let at = RECEIVE_BUFFERS + 0x2000 * (self.offered % u64::from(ENTRIES));
            self.driver.offer(RECEIVE, &[], &[(at, 40), (at + 40, ROOM - 40)]);
            self.offered += 1;
        }
        self.driver.notify(RECEIVE);
    }

    /// What came to the guest since the last call; the buffers are offered again.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.driver.used(RECEIVE);
        let packets = used.iter().map(|(head, length)| {
            // Two descriptors each.
            let bytes = self.driver.get(RECEIVE_BUFFERS + 0x2000 * u64::from(head / 2), *length as usize);
            (Header::read(bytes.first_chunk().unwrap()), bytes[HEADER..].to_vec())
        });
        packets.collect()
    }

    /// The one packet that came: its operation, ports from host to guest, and flags.
    fn word(&mut self) -> (Operation, u32, u32, u32) {
        let packets = self.received();
        self.offer_buffers(packets.len() as u64);
        let [(header, _)] = &packets[..] else { panic!("one packet, not {packets:?}") };
        assert_eq!((header.source_cid, header.destination_cid, header.kind), (2, GUEST, STREAM));
        (header.operation.unwrap(), header.source_port, header.destination_port, header.flags)
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.put(SENT, &header.bytes());
        self.driver.put(SENT + 0x1000, payload);
        self.driver.offer(TRANSMIT, &[(SENT, 44), (SENT + 0x1000, payload.len() as u32)], &[]);
        self.driver.notify(TRANSMIT);
        assert_eq!(self.driver.used(TRANSMIT).len(), 1);
    }

    fn say(&mut self, operation: Operation) {
        self.send(header(operation), &[]);
    }

    /// A connection of the guest to the host.
    fn connect(&mut self) -> StreamId {
        self.say(Operation::Request);
        assert_eq!(self.word(), (Operation::Response, OUTSIDE, INSIDE, 0));
        StreamId(self.host.0.lock().unwrap().next - 1)
    }

    fn change(&mut self, change: Change) {
        self.host.0.lock().unwrap().changes.push_back(change);
        self.driver.mmio.engine().lock().unwrap().ready(0);
    }

    fn stream<T>(&self, id: StreamId, look: impl FnOnce(&mut Stream) -> T) -> T {
        look(self.host.0.lock().unwrap().streams.get_mut(&id.0).unwrap())
    }

    fn changed(&mut self, id: StreamId) {
        self.change(Change::Stream { id, is_gone: false });
    }

    /// A program of the host connects and says `line`.
    fn arrive(&mut self, line: &str) -> StreamId {
        let id = {
            let mut outside = self.host.0.lock().unwrap();
            let id = outside.open();
            outside.streams.get_mut(&id.0).unwrap().coming.extend(line.bytes());
            outside.arrivals.push_back(id);
            id
        };
        self.change(Change::Arrival);
        id
    }
}

fn header(operation: Operation) -> Header {
    Header {
        source_cid: GUEST,
        destination_cid: 2,
        source_port: INSIDE,
        destination_port: OUTSIDE,
        length: 0,
        kind: STREAM,
        operation: Some(operation),
        flags: 0,
        buffer: 10_000,
        forwarded: 0,
    }
}

fn data(payload: &[u8]) -> Header {
    Header { length: payload.len() as u32, ..header(Operation::Data) }
}

#[test]
fn a_driver_finds_its_address() {
    assert_eq!(Lab::new().driver.config(0, 8), GUEST.to_le_bytes());
}

#[test]
fn a_guest_connects_and_bytes_go_both_ways() {
    let mut lab = Lab::new();
    let id = lab.connect();
    assert_eq!(lab.host.0.lock().unwrap().connected, [OUTSIDE]);
    lab.send(data(b"hello"), b"hello");
    assert_eq!(lab.stream(id, |stream| stream.got.clone()), b"hello");
    lab.stream(id, |stream| stream.coming.extend(b"world"));
    lab.changed(id);
    let [(header, payload)] = &lab.received()[..] else { panic!() };
    assert_eq!((header.operation, header.length, &payload[..]), (Some(Operation::Data), 5, &b"world"[..]));
    assert_eq!((header.buffer, header.forwarded), (64 << 10, 5), "the guest learns that its bytes were taken");
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut lab = Lab::new();
    lab.send(Header { destination_port: 53, ..header(Operation::Request) }, &[]);
    assert_eq!(lab.word(), (Operation::Reset, 53, INSIDE, 0));
}

#[test]
fn a_program_of_the_host_connects_says_where_to_and_is_told_when_the_guest_is_there() {
    let mut lab = Lab::new();
    let id = lab.arrive("CONN");
    lab.stream(id, |stream| stream.coming.extend(b"ECT 1024\nearly"));
    lab.changed(id);
    let (operation, port, inside, _) = lab.word();
    assert_eq!((operation, port, inside), (Operation::Request, 1 << 30, INSIDE));
    assert!(lab.stream(id, |stream| stream.got.is_empty()));
    lab.send(Header { destination_port: port, ..header(Operation::Response) }, &[]);
    assert_eq!(lab.stream(id, |stream| stream.got.clone()), b"OK 1073741824\n");
    let [(header, payload)] = &lab.received()[..] else { panic!() };
    assert_eq!((header.operation, &payload[..]), (Some(Operation::Data), &b"early"[..]), "what came behind the line");
    let next = lab.arrive("CONNECT 1024\n");
    assert_ne!(next, id);
    lab.offer_buffers(1);
    assert_eq!(lab.word(), (Operation::Request, (1 << 30) + 1, INSIDE, 0));
}

#[test]
fn a_program_that_talks_nonsense_or_leaves_is_let_go() {
    let mut lab = Lab::new();
    let id = lab.arrive("GET / HTTP/1.1\n");
    assert!(lab.stream(id, |stream| stream.closed));
    let id = lab.arrive("CONNECT 10");
    lab.stream(id, |stream| stream.ended = true);
    lab.changed(id);
    assert!(lab.stream(id, |stream| stream.closed));
    let id = lab.arrive("CONNECT 1024\n");
    lab.change(Change::Stream { id, is_gone: true });
    assert!(lab.stream(id, |stream| stream.closed), "before the guest answered");
}

#[test]
fn the_first_of_too_many_who_say_nothing_is_let_go() {
    let mut lab = Lab::new();
    let first = lab.arrive("");
    let second = lab.arrive("");
    for _ in 0..63 {
        lab.arrive("");
    }
    assert!(lab.stream(first, |stream| stream.closed));
    assert!(!lab.stream(second, |stream| stream.closed));
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.stream(id, |stream| stream.coming.extend([7; 25_000]));
    lab.changed(id);
    let packets = lab.received();
    let sent: Vec<u32> = packets.iter().map(|(header, _)| header.length).collect();
    assert_eq!(sent[..3], [4096, 4096, 10_000 - 8192]);
    assert_eq!(packets[3].0.operation, Some(Operation::CreditRequest));
    assert_eq!(packets.len(), 4);
    lab.offer_buffers(4);
    lab.send(Header { forwarded: 9000, ..header(Operation::CreditUpdate) }, &[]);
    let sent: u32 = lab.received().iter().map(|(header, _)| header.length).sum();
    assert_eq!(sent, 9000);
}

#[test]
fn a_guest_that_lies_about_its_credit_gets_nothing() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.send(Header { forwarded: 5, ..header(Operation::CreditUpdate) }, &[]);
    lab.stream(id, |stream| stream.coming.extend([7; 10]));
    lab.changed(id);
    assert_eq!(lab.word().0, Operation::CreditRequest);
}

#[test]
fn bytes_that_the_host_does_not_take_are_kept_up_to_the_credit_and_more_ends_the_connection() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.stream(id, |stream| stream.room = 100);
    let bytes = [5; 2048];
    for _ in 0..32 {
        lab.send(data(&bytes), &bytes);
    }
    assert_eq!(lab.stream(id, |stream| stream.got.len()), 100);
    assert!(lab.received().is_empty());
    lab.stream(id, |stream| stream.room = usize::MAX);
    lab.changed(id);
    assert_eq!(lab.stream(id, |stream| stream.got.len()), 65536);
    let [(update, _)] = &lab.received()[..] else { panic!() };
    assert_eq!((update.operation, update.forwarded), (Some(Operation::CreditUpdate), 65536));
    lab.offer_buffers(1);

    lab.stream(id, |stream| stream.room = 0);
    for _ in 0..32 {
        lab.send(data(&bytes), &bytes);
    }
    assert!(lab.received().is_empty());
    lab.send(data(&[1]), &[1]);
    assert_eq!(lab.word().0, Operation::Reset);
    assert!(lab.stream(id, |stream| stream.closed));
}

#[test]
fn a_guest_that_closes_is_answered_when_the_host_has_all_it_sent() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.stream(id, |stream| stream.room = 2);
    lab.send(data(b"last"), b"last");
    lab.send(Header { flags: ENDS_RECEIVING | ENDS_SENDING, ..header(Operation::Shutdown) }, &[]);
    assert!(lab.received().is_empty());
    lab.stream(id, |stream| stream.room = 2);
    lab.changed(id);
    assert_eq!(lab.word().0, Operation::Reset);
    assert_eq!(lab.stream(id, |stream| (stream.got.clone(), stream.closed)), (b"last".to_vec(), true));
}

#[test]
fn either_side_may_end_its_half_alone() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.send(Header { flags: ENDS_SENDING, ..header(Operation::Shutdown) }, &[]);
    assert!(lab.stream(id, |stream| stream.finished && !stream.closed));
    lab.stream(id, |stream| stream.coming.extend(b"still"));
    lab.changed(id);
    assert_eq!(lab.word().0, Operation::Data);
    lab.send(data(b"x"), b"x");
    assert_eq!(lab.word().0, Operation::Reset, "it said that it sends no more");

    let id = lab.connect();
    lab.stream(id, |stream| stream.ended = true);
    lab.changed(id);
    assert_eq!(lab.word(), (Operation::Shutdown, OUTSIDE, INSIDE, ENDS_SENDING));
    lab.send(data(b"still"), b"still");
    assert_eq!(lab.stream(id, |stream| stream.got.clone()), b"still");
    lab.change(Change::Stream { id, is_gone: true });
    assert_eq!(lab.word(), (Operation::Shutdown, OUTSIDE, INSIDE, ENDS_SENDING | ENDS_RECEIVING));
}

#[test]
fn a_host_that_is_gone_ends_the_connection() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.stream(id, |stream| stream.ended = true);
    lab.change(Change::Stream { id, is_gone: true });
    assert_eq!(lab.word(), (Operation::Shutdown, OUTSIDE, INSIDE, ENDS_SENDING | ENDS_RECEIVING));
    lab.stream(id, |stream| stream.broken = true);
    lab.send(data(b"x"), b"x");
    assert_eq!(lab.word().0, Operation::Reset);
    assert!(lab.stream(id, |stream| stream.closed));
}

#[test]
fn packets_out_of_place_are_answered_by_a_reset() {
    for operation in
        [Operation::Response, Operation::Shutdown, Operation::Data, Operation::CreditUpdate, Operation::CreditRequest]
    {
        let mut lab = Lab::new();
        lab.say(operation);
        assert_eq!(lab.word(), (Operation::Reset, OUTSIDE, INSIDE, 0), "{operation:?} without a connection");
    }
    let cases: [fn(Header) -> Header; 6] = [
        |header| Header { kind: 2, ..header },
        |header| Header { operation: None, ..header },
        |header| Header { operation: Some(Operation::Request), ..header },
        |header| Header { operation: Some(Operation::Response), ..header },
        |header| Header { length: 1, ..header },
        |header| Header { length: u32::MAX, ..header },
    ];
    for (number, spoil) in cases.into_iter().enumerate() {
        let mut lab = Lab::new();
        let id = lab.connect();
        lab.send(spoil(header(Operation::Data)), &[]);
        assert_eq!(lab.word().0, Operation::Reset, "number {number}");
        assert!(lab.stream(id, |stream| stream.closed), "number {number}");
    }
}

#[test]
fn packets_of_others_to_others_and_resets_are_not_answered() {
    let mut lab = Lab::new();
    lab.send(Header { source_cid: 4, ..header(Operation::Request) }, &[]);
    lab.send(Header { destination_cid: 1, ..header(Operation::Request) }, &[]);
    lab.say(Operation::Reset);
    // Not even a header; nowhere; too long.
    for buffers in [&[(SENT, 43)][..], &[(MEMORY - 4, 44)], &[(SENT, u32::MAX)]] {
        lab.driver.offer(TRANSMIT, buffers, &[]);
    }
    lab.driver.notify(TRANSMIT);
    assert_eq!(lab.driver.used(TRANSMIT).len(), 3);
    assert!(lab.received().is_empty() && !lab.driver.needs_reset());
    let id = lab.connect();
    lab.say(Operation::Reset);
    assert!(lab.received().is_empty());
    assert!(lab.stream(id, |stream| stream.closed));
}

#[test]
fn receive_buffers_without_room_go_back_and_lose_nothing() {
    let mut lab = Lab::new();
    let id = lab.connect();
    // The eight good ones are used up by words.
    (0..8).for_each(|_| lab.say(Operation::CreditRequest));
    assert_eq!(lab.received().len(), 8);
    lab.stream(id, |stream| stream.coming.extend(b"bytes"));
    lab.changed(id);
    lab.driver.offer(RECEIVE, &[], &[(BUFFERS, 43)]);
    lab.driver.offer(RECEIVE, &[], &[(MEMORY - 1, 100)]);
    lab.driver.offer(RECEIVE, &[(BUFFERS, 100)], &[]);
    lab.driver.offer(RECEIVE, &[], &[(BUFFERS, 100)]);
    lab.driver.notify(RECEIVE);
    let lengths: Vec<u32> = lab.driver.used(RECEIVE).into_iter().map(|(_, length)| length).collect();
    assert_eq!(lengths, [0, 0, 0, 49]);
    assert_eq!(lab.driver.get(BUFFERS + 44, 5), b"bytes");
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut lab = Lab::new();
    let mut sent = 0;
    for _ in 0..40 {
        lab.driver.put(SENT, &header(Operation::Data).bytes());
        for _ in 0..8 {
            lab.driver.offer(TRANSMIT, &[(SENT, 44)], &[]);
        }
        lab.driver.notify(TRANSMIT);
        let used = lab.driver.used(TRANSMIT).len();
        sent += used;
        if used < 8 {
            break;
        }
    }
    assert_eq!(sent, 256 + 8, "as many answers as are kept, and buffers that there were");
    lab.offer_buffers(8);
    assert_eq!(lab.received().len(), 16);
    assert!(!lab.driver.used(TRANSMIT).is_empty(), "it goes on");
}

#[test]
fn connections_take_turns() {
    let mut lab = Lab::new();
    let first = lab.connect();
    lab.send(Header { source_port: 2000, ..header(Operation::Request) }, &[]);
    lab.word();
    let second = StreamId(first.0 + 1);
    for id in [first, second] {
        lab.stream(id, |stream| stream.coming.extend([1; 9000]));
    }
    lab.host.0.lock().unwrap().changes.push_back(Change::Stream { id: first, is_gone: false });
    lab.changed(second);
    let ports: Vec<u32> = lab.received().iter().map(|(header, _)| header.destination_port).collect();
    assert_eq!(ports, [INSIDE, 2000, INSIDE, 2000, INSIDE, 2000]);
}

#[test]
fn after_a_resume_the_driver_is_told_that_all_connections_are_gone() {
    let mut lab = Lab::new();
    lab.connect();
    let state = lab.driver.freeze();
    let host = TestHost::default();
    let mut resumed = lab.driver.resumed(device(&host));
    resumed.restore(&state).unwrap();
    resumed.thaw();
    assert!(resumed.used(EVENTS).is_empty());
    let state = resumed.freeze();
    let DeviceState::VirtioMmio(mmio) = &state else { panic!() };
    assert_eq!(mmio.device, VirtioState::Vsock(VsockStateV1 { cid: GUEST, transport_reset: true }));
    resumed.thaw();
    resumed.put(BUFFERS, &[0xff; 4]);
    resumed.offer(EVENTS, &[], &[(BUFFERS, 2)]);
    resumed.offer(EVENTS, &[], &[(BUFFERS, 2), (BUFFERS + 2, 2)]);
    resumed.offer(EVENTS, &[], &[(BUFFERS, 4)]);
    resumed.notify(EVENTS);
    assert_eq!(resumed.used(EVENTS), [(0, 2), (1, 4)], "one that has room, and no other");
    assert_eq!(resumed.get(BUFFERS, 4), [0; 4]);
}

#[test]
fn a_freeze_that_is_called_off_ends_no_connection() {
    let mut lab = Lab::new();
    let id = lab.connect();
    lab.driver.freeze();
    lab.stream(id, |stream| stream.coming.extend(b"meanwhile"));
    lab.changed(id);
    assert!(lab.received().is_empty());
    lab.driver.thaw();
    assert_eq!(lab.word().0, Operation::Data);
    lab.driver.offer(EVENTS, &[], &[(BUFFERS, 4)]);
    lab.driver.notify(EVENTS);
    assert!(lab.driver.used(EVENTS).is_empty());
}

#[test]
fn a_driver_that_resets_the_device_ends_all_connections() {
    let mut lab = Lab::new();
    let (id, other) = (lab.connect(), lab.arrive(""));
    lab.driver.write(0x70, 0);
    assert!([id, other].into_iter().all(|id| lab.stream(id, |stream| stream.closed)));
}

#[test]
fn a_state_with_an_address_that_is_none_is_refused() {
    let mut lab = Lab::new();
    let DeviceState::VirtioMmio(mut state) = lab.driver.freeze() else { panic!() };
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        state.device = VirtioState::Vsock(VsockStateV1 { cid, transport_reset: false });
        assert!(lab.driver.mmio.restore(&DeviceState::VirtioMmio(state.clone())).is_err(), "{cid}");
    }
}

/// What may happen.
#[derive(Clone, Debug)]
enum Act {
    Packet(Header, Vec<u8>),
    Arrive(String),
    Bytes(u64, usize),
    End(u64),
    Gone(u64, bool),
    Room(u64, usize),
    Receive,
    Freeze,
    Resume,
}

fn act() -> impl Strategy<Value = Act> {
    let port = || prop_oneof![4 => Just(OUTSIDE), 4 => Just(INSIDE), 2 => Just(1_u32 << 30), 1 => any::<u32>()];
    let number = || prop_oneof![Just(0_u32), 0_u32..10_000, any::<u32>()];
    let payload = prop::collection::vec(any::<u8>(), 0..200);
    let packet =
        (0_u16..9, 0_u32..4, port(), port(), number(), number(), prop::option::weighted(0.1, number()), payload);
    let packet =
        packet.prop_map(|(operation, flags, source_port, destination_port, buffer, forwarded, length, payload)| {
            let mut bytes = header(Operation::Data).bytes();
            bytes[30] = operation as u8;
            let length = length.unwrap_or(payload.len() as u32);
            let operation = Header::read(bytes.first_chunk().unwrap()).operation;
            let header = Header {
                operation,
                flags,
                source_port,
                destination_port,
                buffer,
                forwarded,
                length,
                ..header(Operation::Data)
            };
            Act::Packet(header, payload)
        });
    prop_oneof![
        10 => packet,
        2 => prop_oneof![Just("CONNECT 1024\n".to_owned()), Just("CONNECT 52\n".to_owned()), ".{0,40}"].prop_map(Act::Arrive),
        4 => (0..8_u64, 1..9000_usize).prop_map(|(id, count)| Act::Bytes(id, count)),
        1 => (0..8_u64).prop_map(Act::End),
        1 => (0..8_u64, any::<bool>()).prop_map(|(id, broken)| Act::Gone(id, broken)),
        1 => (0..8_u64, 0..300_usize).prop_map(|(id, room)| Act::Room(id, room)),
        6 => Just(Act::Receive),
        1 => Just(Act::Freeze),
        1 => Just(Act::Resume),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_guest_and_host_do_the_device_lives_freezes_and_resumes(acts in prop::collection::vec(act(), 0..100)) {
        let mut lab = Lab::new();
        for act in acts {
            let with = |lab: &mut Lab, id: u64, is_gone, change: &dyn Fn(&mut Stream)| {
                let known = lab.host.0.lock().unwrap().streams.get_mut(&id).filter(|stream| !stream.closed).map(change);
                if known.is_some() {
                    lab.change(Change::Stream { id: StreamId(id), is_gone });
                }
            };
            match act {
                Act::Packet(header, payload) => {
                    lab.driver.put(SENT, &[header.bytes(), payload.clone()].concat());
                    lab.driver.offer(TRANSMIT, &[(SENT, 44 + payload.len() as u32)], &[]);
                    lab.driver.notify(TRANSMIT);
                    lab.driver.used(TRANSMIT);
                }
                Act::Arrive(line) => _ = lab.arrive(&line),
                Act::Bytes(id, count) => with(&mut lab, id, false, &|stream| stream.coming.extend(vec![1; count])),
                Act::End(id) => with(&mut lab, id, false, &|stream| stream.ended = true),
                Act::Gone(id, broken) => with(&mut lab, id, true, &|stream| {
                    stream.ended = true;
                    stream.broken = broken;
                }),
                Act::Room(id, room) => with(&mut lab, id, false, &|stream| stream.room = room),
                Act::Receive => {
                    let packets = lab.received();
                    lab.offer_buffers(packets.len() as u64);
                }
                Act::Freeze => {
                    lab.driver.freeze();
                    lab.driver.thaw();
                }
                Act::Resume => {
                    let state = lab.driver.freeze();
                    let host = TestHost::default();
                    host.0.lock().unwrap().listening = vec![OUTSIDE];
                    let mut driver = lab.driver.resumed(device(&host));
                    driver.restore(&state).unwrap();
                    driver.thaw();
                    lab = Lab { driver, host, offered: lab.offered };
                }
            }
            prop_assert!(!lab.driver.needs_reset());
        }
    }
}
