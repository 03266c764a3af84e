//! One of each device, with surroundings that a test controls.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::virtio::block::{Block, BlockBackend, Completion, Disk, Operation, Token};
use devices::virtio::rng::{Entropy, Rng};
use devices::virtio::vsock::{Change, Cid, StreamId};
use devices::virtio::{
    Balloon, BalloonSize, Console, DeviceMemory, Durable, GuestMemory, Line, Memory, Net, Offloads, Piece, Pmem,
    PmemPlace, Reclaim, Tap, TerminalSize, VirtioDevice, VirtioMmio, Vsock, VsockHost,
};
use devices::{
    DebugExit, Device, GuestMemorySize, InterruptLine, KeyboardController, MachineControl, MachineRequest, Power,
    Report, ResetControl, Rtc, Serial, VmGenId, WallClock,
};
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// What the devices of a [`House`] see of the world, and what they did to it.
#[derive(Default)]
pub(crate) struct World {
    /// Nanoseconds since 1970.
    pub(crate) now: AtomicU64,
    pub(crate) line_refuses: AtomicBool,
    pub(crate) edges: AtomicUsize,
    /// How many more bytes the serial output takes.
    pub(crate) output_room: AtomicUsize,
    pub(crate) output: Mutex<Vec<u8>>,
    pub(crate) requests: Mutex<Vec<MachineRequest>>,
}

/// [`World`] as the devices hold it.
#[derive(Clone)]
struct Shared(Arc<World>);

impl WallClock for Shared {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.now.load(Ordering::SeqCst))
    }
}

impl InterruptLine for Shared {
    fn trigger(&self) -> io::Result<()> {
        if self.0.line_refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        self.0.edges.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Write for Shared {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let room = self.0.output_room.load(Ordering::SeqCst);
        let taken = room.min(buf.len());
        if taken == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.0.output_room.store(room - taken, Ordering::SeqCst);
        self.0.output.lock().unwrap().extend(&buf[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MachineControl for Shared {
    fn request(&self, request: MachineRequest) {
        self.0.requests.lock().unwrap().push(request);
    }
}

struct Plain(GuestMemory);

impl DeviceMemory for Plain {
    fn guest_memory(&self) -> &GuestMemory {
        &self.0
    }
}

/// A tap and sockets at which nothing ever comes.
struct Unplugged;

impl Tap for Unplugged {
    fn receive(&mut self, _: &[Piece<'_>], _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&mut self, _: &[Piece<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn send_from(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

impl VsockHost for Unplugged {
    fn changes(&mut self, _: &mut Vec<Change>) -> io::Result<bool> {
        Ok(false)
    }

    fn accept(&mut self) -> io::Result<StreamId> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn connect(&mut self, _: u32) -> io::Result<StreamId> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn read(&mut self, _: StreamId, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn write(&mut self, _: StreamId, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn finish(&mut self, _: StreamId) {}

    fn close(&mut self, _: StreamId) {}
}

impl Entropy for Unplugged {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(4);
        Ok(())
    }
}

impl Reclaim for Unplugged {
    fn reclaim(&mut self, _: GuestAddress, _: u64) {}
}

impl Line for Unplugged {
    fn write(&mut self, _: &[u8]) -> usize {
        0
    }

    fn read(&mut self, _: &mut [u8]) -> usize {
        0
    }

    fn size(&self) -> TerminalSize {
        TerminalSize { columns: 80, rows: 25 }
    }
}

impl Durable for Unplugged {
    fn begin(&mut self, _: u64) {}

    fn done(&mut self) -> Option<(u64, io::Result<()>)> {
        None
    }
}

fn cid() -> Cid {
    Cid::new(3).unwrap()
}

fn mac() -> devices::virtio::Mac {
    "02:00:5e:10:00:01".parse().unwrap()
}

/// `device` behind its transport, with 64 KiB of memory.
fn virtio(id: &str, device: impl VirtioDevice + 'static, world: &Arc<World>) -> Box<dyn Device> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let line = Arc::new(Shared(Arc::clone(world)));
    Box::new(VirtioMmio::new(id.to_owned(), Box::new(device), Memory::new(Arc::new(Plain(memory))), line))
}

fn generation_id(world: &Arc<World>) -> Box<dyn Device> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let line = Arc::new(Shared(Arc::clone(world)));
    Box::new(VmGenId::new([7; 16], Memory::new(Arc::new(Plain(memory))), 0x100, line))
}

/// A disk that is done at once with whatever it is asked.
#[derive(Default)]
struct Image {
    completed: Vec<Completion>,
}

impl BlockBackend for Image {
    fn submit(&mut self, token: Token, _: Operation<'_>) {
        self.completed.push(Completion { token, result: Ok(()) });
    }

    fn start(&mut self) {}

    fn take_completed(&mut self, completed: &mut Vec<Completion>) {
        completed.append(&mut self.completed);
    }

    fn wait(&mut self, _: Option<Instant>) -> bool {
        !self.completed.is_empty()
    }
}

fn block() -> Block {
    let disk = Disk { id: "data".to_owned(), sectors: 2048, read_only: false, queues: 2 };
    Block::new(disk, Box::<Image>::default())
}

const PMEM: PmemPlace = PmemPlace { start: 1 << 32, size: 64 << 20 };

/// One of each device.
pub(crate) struct House {
    pub(crate) world: Arc<World>,
    pub(crate) serial: Serial,
    pub(crate) rtc: Rtc,
    pub(crate) others: Vec<Box<dyn Device>>,
}

/// The serial port's index.
pub(crate) const SERIAL: usize = 0;
/// How many devices a [`House`] has.
pub(crate) const DEVICES: usize = 15;

impl House {
    /// All devices after a reset, at `now` nanoseconds since 1970.
    pub(crate) fn new(now: u64) -> Self {
        let world = Arc::new(World::default());
        world.now.store(now, Ordering::SeqCst);
        let shared = Shared(Arc::clone(&world));
        let control: Arc<dyn MachineControl> = Arc::new(shared.clone());
        let memory = GuestMemorySize { below_4g: 3 << 30, above_4g: 5 << 30 };
        Self {
            serial: Serial::new(Arc::new(shared.clone()), Box::new(shared.clone())),
            rtc: Rtc::new(Box::new(shared), memory),
            others: vec![
                Box::new(KeyboardController::new(Arc::clone(&control))),
                Box::new(ResetControl::new(Arc::clone(&control))),
                Box::new(Power::new(Arc::clone(&control))),
                Box::new(DebugExit::new(control)),
                Box::new(Report::new()),
                virtio("net0", Net::new(mac(), Box::new(Unplugged)), &world),
                virtio("vsock", Vsock::new(cid(), Box::new(Unplugged)), &world),
                virtio("balloon", Balloon::new(BalloonSize::default(), Box::new(Unplugged)), &world),
                virtio("rng", Rng::new(Box::new(Unplugged)), &world),
                generation_id(&world),
                virtio("disk0", block(), &world),
                virtio("console", Console::new(Box::new(Unplugged)), &world),
                virtio("pmem0", Pmem::new(PMEM, Box::new(Unplugged)), &world),
            ],
            world,
        }
    }

    pub(crate) fn device(&mut self, index: usize) -> &mut dyn Device {
        match index {
            SERIAL => &mut self.serial,
            1 => &mut self.rtc,
            index => self.others[index - 2].as_mut(),
        }
    }

    /// A house in the same world as `self` is now, apart from what the devices did to it.
    pub(crate) fn twin(&self) -> Self {
        let twin = Self::new(self.world.now.load(Ordering::SeqCst));
        let (from, to) = (&self.world, &twin.world);
        to.line_refuses.store(from.line_refuses.load(Ordering::SeqCst), Ordering::SeqCst);
        to.output_room.store(from.output_room.load(Ordering::SeqCst), Ordering::SeqCst);
        twin
    }
}

/// Something that happens to a device.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Read { offset: u64, length: usize },
    Write { offset: u64, data: Vec<u8> },
    Input(Vec<u8>),
    OutputReady(usize),
    LineRefuses(bool),
    TimePasses(u32),
}

impl House {
    /// Lets `event` happen to device `index`; returns what the guest or the terminal got to see of it.
    pub(crate) fn happen(&mut self, index: usize, event: &Event) -> Vec<u8> {
        match event {
            Event::Read { offset, length } => {
                let mut data = vec![0xa5; *length];
                self.device(index).read(*offset, &mut data);
                return data;
            }
            Event::Write { offset, data } => self.device(index).write(*offset, data),
            Event::Input(_) | Event::OutputReady(_) if index != SERIAL => {}
            Event::Input(bytes) => return vec![self.serial.receive(bytes) as u8, self.serial.input_room() as u8],
            Event::OutputReady(room) => {
                self.world.output_room.store(*room, Ordering::SeqCst);
                return (self.serial.drain_output() as u64).to_le_bytes().to_vec();
            }
            Event::LineRefuses(refuses) => self.world.line_refuses.store(*refuses, Ordering::SeqCst),
            Event::TimePasses(milliseconds) => {
                self.world.now.fetch_add(u64::from(*milliseconds) * 1_000_000, Ordering::SeqCst);
            }
        }
        Vec::new()
    }
}

/// Mostly registers that exist, at times anything at all.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![20 => 0..8u64, 8 => (0..0x60u64).prop_map(|register| register * 4), 2 => 0..0x100u64, 1 => any::<u64>(), 1 => u64::MAX - 16..=u64::MAX]
}

/// Widths that a bus passes on, and those that it does not.
fn data() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => any::<u8>().prop_map(|byte| vec![byte]),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(low, high)| vec![low, high]),
        4 => (0..16u32).prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 4),
        1 => prop::collection::vec(any::<u8>(), 8),
        1 => prop::collection::vec(any::<u8>(), 0..20),
    ]
}

/// Any event.
pub(crate) fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (offset(), prop_oneof![Just(1usize), Just(2), Just(4), Just(8), 0..20usize])
            .prop_map(|(offset, length)| Event::Read { offset, length }),
        10 => (offset(), data()).prop_map(|(offset, data)| Event::Write { offset, data }),
        1 => prop::collection::vec(any::<u8>(), 0..80).prop_map(Event::Input),
        1 => (0..10usize).prop_map(Event::OutputReady),
        1 => any::<bool>().prop_map(Event::LineRefuses),
        1 => prop_oneof![0..3000u32, any::<u32>()].prop_map(Event::TimePasses),
    ]
}

/// A history.
pub(crate) fn events() -> impl Strategy<Value = Vec<Event>> {
    prop::collection::vec(event(), 0..60)
}
