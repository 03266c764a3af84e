//! A driver, for tests: sets a device up through its registers and offers it requests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{DeviceMemory, GuestMemory, Memory, VirtioDevice, VirtioMmio};
use crate::device::{BusDevice, Device, Freezable};
use crate::interrupt::InterruptLine;
use crate::state::{DeviceState, StateError};

/// How much memory the driver has.
pub(crate) const MEMORY: u64 = 4 << 20;
/// Where its buffers may lie: what is below is the rings'.
pub(crate) const BUFFERS: u64 = 1 << 20;
const RING_AREA: u64 = 0x1_0000;
/// The entries that a driver chooses.
pub(crate) const SIZE: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Counts its edges.
#[derive(Default)]
pub(crate) struct Edges(AtomicUsize);

impl InterruptLine for Edges {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Memory that a test and its devices share.
struct Shared(GuestMemory);

impl DeviceMemory for Shared {
    fn guest_memory(&self) -> &GuestMemory {
        &self.0
    }
}

/// The driver's side of a queue.
#[derive(Clone, Copy, Default)]
struct Side {
    /// Descriptors and available entries that were used so far; both wrap around.
    descriptors: u16,
    available: u16,
    seen: u16,
}

/// A buffer: address and length.
pub(crate) type Buffer = (u64, u32);

/// A driver and its device.
pub(crate) struct Driver {
    pub(crate) mmio: VirtioMmio,
    pub(crate) memory: Memory,
    edges: Arc<Edges>,
    sides: Vec<Side>,
}

impl Driver {
    /// A machine with `device`, which is reset.
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        Self::with_memory(device, Memory::new(Arc::new(Shared(memory))), Vec::new())
    }

    /// The same over the memory that `keeper` keeps.
    pub(crate) fn over(keeper: Arc<dyn DeviceMemory>, device: impl VirtioDevice + 'static) -> Self {
        Self::with_memory(device, Memory::new(keeper), Vec::new())
    }

    /// The same memory, with the same driver, and a fresh device: as after an outage.
    pub(crate) fn resumed(&self, device: impl VirtioDevice + 'static) -> Self {
        Self::with_memory(device, self.memory.clone(), self.sides.clone())
    }

    fn with_memory(device: impl VirtioDevice + 'static, memory: Memory, sides: Vec<Side>) -> Self {
        let edges = Arc::<Edges>::default();
        let line = Arc::clone(&edges) as Arc<dyn InterruptLine>;
        let mmio = VirtioMmio::new("virtio0".to_owned(), Box::new(device), memory.clone(), line);
        let queues = mmio.engine().lock().unwrap().queues();
        let sides = if sides.is_empty() { vec![Side::default(); queues] } else { sides };
        Self { mmio, memory, edges, sides }
    }

    pub(crate) fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, register: u64, value: u32) {
        self.mmio.write(register, &value.to_le_bytes());
    }

    pub(crate) fn config(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0xa5; length];
        self.mmio.read(super::mmio::CONFIG + offset, &mut data);
        data
    }

    /// What the device offers.
    pub(crate) fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(self.read(0x10)) << 32 | u64::from(low)
    }

    /// Goes through the whole set-up with `features` beside `VERSION_1`, all queues in their places.
    pub(crate) fn set_up(&mut self, features: u64) {
        self.negotiate(features | 1 << 32);
        for queue in 0..self.sides.len() {
            self.set_up_queue(queue, SIZE);
        }
        self.write(0x70, 15);
    }

    /// Up to `FEATURES_OK`.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70) & 8, 8, "the device takes the features");
    }

    pub(crate) fn set_up_queue(&mut self, queue: usize, size: u16) {
        let base = Self::ring(queue);
        self.write(0x30, queue as u32);
        self.write(0x38, size.into());
        for (register, address) in [(0x80, base), (0x90, base + 0x4000), (0xa0, base + 0x8000)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// Where a queue's descriptors lie; the available ring 0x4000 behind, the used one 0x8000.
    pub(crate) fn ring(queue: usize) -> u64 {
        RING_AREA * (queue as u64 + 1)
    }

    /// Writes a descriptor as it is.
    pub(crate) fn descriptor(&self, queue: usize, index: u16, (address, length): Buffer, flags: u16, next: u16) {
        let at = GuestAddress(Self::ring(queue) + 16 * u64::from(index));
        self.memory.write_obj(address.to_le(), at).unwrap();
        self.memory.write_obj(length.to_le(), GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags.to_le(), GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj(next.to_le(), GuestAddress(at.0 + 14)).unwrap();
    }

    /// Offers a request of buffers to be read and buffers to be written; its head.
    pub(crate) fn offer(&mut self, queue: usize, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let parts: Vec<_> =
            readable.iter().map(|part| (*part, 0)).chain(writable.iter().map(|part| (*part, WRITE))).collect();
        let first = self.sides[queue].descriptors;
        for (index, (buffer, flags)) in parts.iter().enumerate() {
            let at = (first + index as u16) % SIZE;
            let next = if index + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(queue, at, *buffer, flags | next, (at + 1) % SIZE);
        }
        self.sides[queue].descriptors = (first + parts.len() as u16) % SIZE;
        self.offer_head(queue, first % SIZE);
        first % SIZE
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer_head(&mut self, queue: usize, head: u16) {
        let (side, ring) = (&mut self.sides[queue], Self::ring(queue) + 0x4000);
        self.memory.write_obj(head.to_le(), GuestAddress(ring + 4 + 2 * u64::from(side.available % SIZE))).unwrap();
        side.available = side.available.wrapping_add(1);
        self.memory.write_obj(side.available.to_le(), GuestAddress(ring + 2)).unwrap();
    }

    /// Where the device asks to be notified (`avail_event`), and how far the driver is, with `VIRTIO_F_EVENT_IDX`.
    pub(crate) fn awaited(&self, queue: usize) -> (u16, u16) {
        let at = Self::ring(queue) + 0x8000 + 4 + 8 * u64::from(SIZE);
        let event: u16 = self.memory.read_obj(GuestAddress(at)).unwrap();
        (u16::from_le(event), self.sides[queue].available)
    }

    pub(crate) fn notify(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// What was used since the last call: heads and lengths.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let ring = Self::ring(queue) + 0x8000;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        while self.sides[queue].seen != u16::from_le(index) {
            let at = ring + 4 + 8 * u64::from(self.sides[queue].seen % SIZE);
            let entry: [u32; 2] =
                [self.memory.read_obj(GuestAddress(at)).unwrap(), self.memory.read_obj(GuestAddress(at + 4)).unwrap()];
            used.push((u32::from_le(entry[0]), u32::from_le(entry[1])));
            self.sides[queue].seen = self.sides[queue].seen.wrapping_add(1);
        }
        used
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn edges(&self) -> usize {
        self.edges.0.load(Ordering::SeqCst)
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.read(0x70) & 0x40 != 0
    }

    /// Freezes it, and gives its state.
    pub(crate) fn freeze(&mut self) -> DeviceState {
        self.mmio.quiesce(std::time::Instant::now() + std::time::Duration::from_secs(5)).unwrap();
        self.mmio.save()
    }

    pub(crate) fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        self.mmio.restore(state)?;
        assert_eq!(&self.mmio.save(), state, "save, restore, save gives the same");
        Ok(())
    }

    pub(crate) fn thaw(&mut self) {
        self.mmio.thaw();
    }
}
