//! Who is connected to whom: packets of the guest in, packets for the guest out, streams of the host on the other side.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use super::cid::Cid;
use super::connection::{BUFFER, Connection, Standing};
use super::handshake::{Handshake, Step};
use super::host::{Change, StreamId, VsockHost};
use super::packet::{ENDS_RECEIVING, ENDS_SENDING, Header, Operation, STREAM};

/// The most connections at a time: each holds a descriptor of the host.
const CONNECTIONS_MAX: usize = 256;
/// The most programs of the host that have connected and not yet said where to. One more, and the first of them must go.
const HANDSHAKES_MAX: usize = 64;
/// Packets for the guest that wait, apart from bytes; from then on none of the guest's is taken.
const OUTBOX_MAX: usize = 256;
/// Ports of the host for connections to the guest are taken from here on, as Firecracker does.
const FIRST_PORT: u32 = 1 << 30;

/// The port of the host, and that of the guest.
type Ports = (u32, u32);

/// A packet for the guest that carries nothing.
struct Word {
    ports: Ports,
    operation: Operation,
    flags: u32,
}

/// All connections of a guest.
pub(super) struct Switchboard {
    host: Box<dyn VsockHost>,
    pub(super) cid: Cid,
    connections: BTreeMap<Ports, Connection>,
    streams: BTreeMap<StreamId, Ports>,
    handshakes: BTreeMap<StreamId, Handshake>,
    outbox: VecDeque<Word>,
    /// Connections whose host may have bytes for the guest, which has room for some; each gets one packet a turn.
    turns: VecDeque<Ports>,
    next_port: u32,
}

impl Switchboard {
    pub(super) fn new(cid: Cid, host: Box<dyn VsockHost>) -> Self {
        Self {
            host,
            cid,
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            handshakes: BTreeMap::new(),
            outbox: VecDeque::new(),
            turns: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    /// Ends all connections, without a word to the guest.
    pub(super) fn clear(&mut self) {
        let Self { host, cid: _, connections, streams, handshakes, outbox, turns, next_port: _ } = self;
        connections.values().for_each(|connection| host.close(connection.stream));
        handshakes.keys().for_each(|stream| host.close(*stream));
        connections.clear();
        streams.clear();
        handshakes.clear();
        outbox.clear();
        turns.clear();
    }

    // The guest's packets.

    /// Whether the guest's next packet can be taken: an answer to it has room.
    pub(super) fn has_room(&self) -> bool {
        self.outbox.len() < OUTBOX_MAX
    }

    /// Takes a packet of the guest; `payload` is what it carries, `None` if that is not as long as it says.
    pub(super) fn take(&mut self, header: &Header, payload: Option<&[u8]>) {
        // Another guest's, or to another than the host: there is nobody to be answered.
        if header.source_cid != self.cid.number() || header.destination_cid != Cid::HOST {
            return;
        }
        let ports = (header.destination_port, header.source_port);
        let (true, Some(operation), Some(payload)) = (header.kind == STREAM, header.operation, payload) else {
            return self.break_off(ports);
        };
        if operation == Operation::Reset {
            return self.remove(ports);
        }
        if operation == Operation::Request {
            return self.request(ports, header);
        }
        let Some(connection) = self.connections.get_mut(&ports) else { return self.break_off(ports) };
        connection.learn_credit(header);
        match (operation, connection.standing) {
            (Operation::Response, Standing::Asked) => self.response(ports),
            (Operation::Data, Standing::Open) => self.data(ports, payload),
            (Operation::Shutdown, Standing::Open) => self.shutdown(ports, header.flags),
            (Operation::CreditRequest, Standing::Open) => self.say(ports, Operation::CreditUpdate, 0),
            (Operation::CreditUpdate, Standing::Open) => {}
            _ => return self.break_off(ports),
        }
        self.give_turn(ports);
    }

    fn request(&mut self, ports: Ports, header: &Header) {
        if self.connections.contains_key(&ports) || self.connections.len() >= CONNECTIONS_MAX {
            return self.break_off(ports);
        }
        let Ok(stream) = self.host.connect(ports.0) else { return self.break_off(ports) };
        let mut connection = Connection::new(stream, Standing::Open);
        connection.learn_credit(header);
        self.connections.insert(ports, connection);
        self.streams.insert(stream, ports);
        self.say(ports, Operation::Response, 0);
        self.give_turn(ports);
    }

    fn response(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        connection.standing = Standing::Open;
        // The first bytes of a stream have room, or it is broken.
        let answer = format!("OK {}\n", ports.0);
        if self.host.write(connection.stream, answer.as_bytes()).is_ok_and(|written| written == answer.len()) {
            return;
        }
        self.break_off(ports);
    }

    fn data(&mut self, ports: Ports, bytes: &[u8]) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        if connection.guest_ended_sending || !connection.take(bytes) {
            return self.break_off(ports);
        }
        self.flush(ports);
    }

    fn shutdown(&mut self, ports: Ports, flags: u32) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        connection.guest_ended_receiving |= flags & ENDS_RECEIVING != 0;
        connection.guest_ended_sending |= flags & ENDS_SENDING != 0;
        self.flush(ports);
    }

    /// Passes on to the host what the guest sent, and what follows from that.
    fn flush(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        if connection.flush(&mut *self.host).is_err() || connection.is_over() {
            return self.break_off(ports);
        }
        if connection.owes_update() {
            connection.updating = true;
            self.say(ports, Operation::CreditUpdate, 0);
        }
    }

    fn say(&mut self, ports: Ports, operation: Operation, flags: u32) {
        self.outbox.push_back(Word { ports, operation, flags });
    }

    /// Ends a connection, if there is one; the guest is told.
    fn break_off(&mut self, ports: Ports) {
        self.remove(ports);
        self.say(ports, Operation::Reset, 0);
    }

    fn remove(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.remove(&ports) {
            self.streams.remove(&connection.stream);
            self.host.close(connection.stream);
            // What was to be said of it would be said of the next with its ports.
            self.outbox.retain(|word| word.ports != ports);
        }
    }

    // The host's streams.

    /// Looks at all that changed at the host.
    ///
    /// # Errors
    /// The host does not say what changed.
    pub(super) fn look(&mut self) -> io::Result<()> {
        let mut changes = Vec::new();
        loop {
            let more = self.host.changes(&mut changes)?;
            for change in changes.drain(..) {
                match change {
                    Change::Arrival => self.welcome(),
                    Change::Stream { id, is_gone } => self.stream_changed(id, is_gone),
                }
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn welcome(&mut self) {
        loop {
            match self.host.accept() {
                Ok(stream) => {
                    if self.handshakes.len() >= HANDSHAKES_MAX
                        && let Some((first, _)) = self.handshakes.pop_first()
                    {
                        self.host.close(first);
                    }
                    self.handshakes.insert(stream, Handshake::default());
                    self.shake_hands(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return tracing::warn!("a connection to the guest cannot be accepted: {error}"),
            }
        }
    }

    fn shake_hands(&mut self, stream: StreamId) {
        loop {
            let mut byte = [0];
            let step = match (self.host.read(stream, &mut byte), self.handshakes.get_mut(&stream)) {
                (Ok(1..), Some(handshake)) => handshake.push(byte[0]),
                (Err(error), _) if error.kind() == io::ErrorKind::WouldBlock => return,
                (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => Step::More,
                _ => Step::Nonsense,
            };
            match step {
                Step::More => {}
                Step::Port(port) => {
                    self.handshakes.remove(&stream);
                    return self.ask(stream, port);
                }
                Step::Nonsense => {
                    self.handshakes.remove(&stream);
                    return self.host.close(stream);
                }
            }
        }
    }

    /// Asks the guest for a connection to its port.
    fn ask(&mut self, stream: StreamId, port: u32) {
        if self.connections.len() >= CONNECTIONS_MAX {
            return self.host.close(stream);
        }
        // There are fewer connections than ports: one is free.
        while self.connections.contains_key(&(self.next_port, port)) {
            self.count_port();
        }
        let ports = (self.next_port, port);
        self.count_port();
        self.connections.insert(ports, Connection::new(stream, Standing::Asked));
        self.streams.insert(stream, ports);
        self.say(ports, Operation::Request, 0);
    }

    fn count_port(&mut self) {
        self.next_port = self.next_port.wrapping_add(1) | FIRST_PORT;
    }

    fn stream_changed(&mut self, stream: StreamId, is_gone: bool) {
        if self.handshakes.contains_key(&stream) {
            return self.shake_hands(stream);
        }
        let Some(ports) = self.streams.get(&stream).copied() else { return };
        if let Some(connection) = self.connections.get_mut(&ports) {
            connection.is_readable = true;
            let went = is_gone && !std::mem::replace(&mut connection.is_gone, is_gone);
            if went && connection.standing == Standing::Asked {
                return self.break_off(ports);
            }
            if went && connection.host_ended {
                // The guest knows of one direction alone.
                self.say(ports, Operation::Shutdown, ENDS_SENDING | ENDS_RECEIVING);
            }
            self.flush(ports);
            self.give_turn(ports);
        }
    }

    // Packets for the guest.

    /// Lets a connection send bytes to the guest, if it has some and the guest takes them.
    fn give_turn(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        if connection.has_turn || !connection.wants_turn() {
            return;
        }
        if connection.credit() > 0 {
            connection.has_turn = true;
            self.turns.push_back(ports);
        } else if !std::mem::replace(&mut connection.asked_for_credit, true) {
            self.say(ports, Operation::CreditRequest, 0);
        }
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_news(&self) -> bool {
        !self.outbox.is_empty() || !self.turns.is_empty()
    }

    /// The next packet for the guest, which carries what it adds to the empty `payload`, up to `room` bytes.
    pub(super) fn next(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Header> {
        if let Some(Word { ports, operation, flags }) = self.outbox.pop_front() {
            return Some(self.header(ports, operation, flags, 0));
        }
        while let Some(ports) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            connection.has_turn = false;
            if !connection.wants_turn() || connection.credit() == 0 {
                self.give_turn(ports);
                continue;
            }
            payload.resize(room.min(connection.credit()).min(BUFFER as usize), 0);
            let read = self.host.read(connection.stream, payload);
            payload.truncate(read.as_ref().copied().unwrap_or(0));
            match read {
                Ok(0) => {
                    connection.host_ended = true;
                    let flags = ENDS_SENDING | if connection.is_gone { ENDS_RECEIVING } else { 0 };
                    return Some(self.header(ports, Operation::Shutdown, flags, 0));
                }
                Ok(_) => {
                    let length = u32::try_from(payload.len()).unwrap_or(0);
                    connection.has_sent(length);
                    self.give_turn(ports);
                    return Some(self.header(ports, Operation::Data, 0, length));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => connection.is_readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => self.give_turn(ports),
                Err(_) => {
                    self.remove(ports);
                    return Some(self.header(ports, Operation::Reset, 0, 0));
                }
            }
        }
        // A turn that led to nothing may have left a word.
        let Word { ports, operation, flags } = self.outbox.pop_front()?;
        Some(self.header(ports, operation, flags, 0))
    }

    fn header(&mut self, ports: Ports, operation: Operation, flags: u32, length: u32) -> Header {
        let connection = self.connections.get_mut(&ports);
        let (buffer, forwarded) = connection.map_or((0, 0), |connection| (BUFFER, connection.tell_taken()));
        Header {
            source_cid: Cid::HOST,
            destination_cid: self.cid.number(),
            source_port: ports.0,
            destination_port: ports.1,
            length,
            kind: STREAM,
            operation: Some(operation),
            flags,
            buffer,
            forwarded,
        }
    }
}
