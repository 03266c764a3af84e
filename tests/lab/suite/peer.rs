//! A computer of its own on L1's network: it lives in this process, with an Ethernet address, IP and TCP (smoltcp), and stays when L1's plug is
//! pulled, as the rest of the world does when one machine loses its power.
//!
//! ```text
//!   this process: Peer 10.0.0.1 ── UNIX datagrams, a frame each ── QEMU's card eth0 ─ L1's bridge ─ tap vm0 ── the guest 10.0.0.2
//! ```

use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

/// Where it listens.
pub(crate) const PORT: u16 = 7000;
/// Its address; the guest has .2.
pub(crate) const ADDRESS: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
const MAC: EthernetAddress = EthernetAddress([0x02, 0, 0x5e, 0x10, 0, 0xff]);
/// A frame of Ethernet, and more than any.
const FRAME: usize = 2048;
const MTU: usize = 1514;
/// For what is on its way, each direction.
const BUFFER: usize = 64 << 10;
/// At the longest between two looks at what is to be done: 20 ms.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A whole line that came.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// When.
    pub(crate) at: SystemTime,
    /// Without its end.
    pub(crate) text: String,
}

/// What the peer was told.
#[derive(Debug, Default, Clone)]
pub(crate) struct Told {
    /// In their order.
    pub(crate) lines: Vec<Line>,
    /// Connections that were accepted.
    pub(crate) connections: u32,
    /// How the connection ended, once it has.
    pub(crate) end: Option<&'static str>,
}

/// The peer. It accepts one connection, keeps the lines that it gets, and sends each back.
pub(crate) struct Peer {
    told: Arc<Mutex<Told>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    directory: PathBuf,
}

impl Peer {
    /// Begins to listen. Its sockets lie in `directory`.
    pub(crate) fn new(directory: &Path) -> Self {
        let link = Link::new(directory);
        let (told, over) = (Arc::new(Mutex::new(Told::default())), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (told, over) = (Arc::clone(&told), Arc::clone(&over));
            move || live(link, &told, &over)
        });
        Self { told, over, thread: Some(thread), directory: directory.to_owned() }
    }

    /// QEMU's arguments for a card of L1 that is on this network.
    pub(crate) fn qemu(&self) -> Vec<String> {
        let path = |name| self.directory.join(name).display().to_string();
        let network = format!(
            "dgram,id=lan,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            path("l1"),
            path("peer")
        );
        ["-netdev", &network, "-device", "virtio-net-pci,netdev=lan"].map(str::to_owned).to_vec()
    }

    /// What it was told so far.
    pub(crate) fn told(&self) -> Told {
        lock(&self.told).clone()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(Err(why)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(why);
        }
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The cable. While nobody holds its other end, frames are lost.
struct Link {
    socket: UnixDatagram,
    other: PathBuf,
}

impl Link {
    fn new(directory: &Path) -> Self {
        let socket = UnixDatagram::bind(directory.join("peer")).expect("a socket in a fresh directory");
        socket.set_nonblocking(true).expect("a socket that does not block");
        Self { socket, other: directory.join("l1") }
    }
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a Link);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; length];
        let filled = fill(&mut frame);
        // A network that loses frames: L1 is off, or does not keep up.
        let _ = self.0.socket.send_to(&frame, &self.0.other);
        filled
    }
}

impl Device for Link {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sent<'_>)> {
        let mut frame = vec![0; FRAME];
        let length = self.socket.recv(&mut frame).ok()?;
        frame.truncate(length);
        Some((Received(frame), Sent(self)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sent<'_>> {
        Some(Sent(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// A TCP/IP stack with one socket, and the program that has it.
fn live(mut link: Link, told: &Mutex<Told>, over: &AtomicBool) {
    let mut interface = interface(&mut link);
    let mut sockets = SocketSet::new(Vec::new());
    let handle = sockets.add(listener());
    let mut state = tcp::State::Listen;
    // The begin of a line, and what is to be sent back.
    let (mut line, mut back) = (Vec::new(), VecDeque::new());
    while !over.load(Ordering::SeqCst) {
        interface.poll(Instant::now(), &mut link, &mut sockets);
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        follow(&mut state, socket.state(), told);
        // An error means that there is no connection now.
        let _ = socket.recv(|bytes| (bytes.len(), take(bytes, &mut line, &mut back, told)));
        if socket.can_send() {
            let sent = socket.send_slice(back.make_contiguous()).unwrap_or(0);
            back.drain(..sent);
        }
        if socket.state() == tcp::State::CloseWait {
            socket.close();
        }
        interface.poll(Instant::now(), &mut link, &mut sockets);
        let mut ready = [PollFd::new(&link.socket, PollFlags::IN)];
        let _ = poll(&mut ready, Some(&NAP));
    }
}

fn interface(link: &mut Link) -> Interface {
    let mut interface = Interface::new(Config::new(MAC.into()), link, Instant::now());
    interface.update_ip_addrs(|addresses| {
        addresses.push(IpCidr::new(ADDRESS.into(), 24)).expect("there is room for one");
    });
    interface
}

fn listener() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.listen(PORT).expect("a port that nobody has");
    socket
}

/// Notes what became of the connection.
fn follow(before: &mut tcp::State, now: tcp::State, told: &Mutex<Told>) {
    use tcp::State::{CloseWait, Closed, Established};
    if *before == now {
        return;
    }
    let mut told = lock(told);
    match (*before, now) {
        (_, Established) => told.connections += 1,
        (_, CloseWait) => told.end = Some("the guest closed it"),
        // After its own end it is no news.
        (_, Closed) if told.end.is_none() => told.end = Some("it was reset"),
        _ => {}
    }
    *before = now;
}

/// Takes what came apart into lines.
fn take(bytes: &[u8], line: &mut Vec<u8>, back: &mut VecDeque<u8>, told: &Mutex<Told>) {
    back.extend(bytes);
    let mut told = lock(told);
    for byte in bytes {
        if *byte == b'\n' {
            let text = String::from_utf8_lossy(&std::mem::take(line)).into_owned();
            told.lines.push(Line { at: SystemTime::now(), text });
        } else {
            line.push(*byte);
        }
    }
}
