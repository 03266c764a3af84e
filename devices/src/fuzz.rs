//! Entry points for fuzzing: a guest that does anything to a virtio device, and a host that answers in any way. The targets in `fuzz/` call
//! them; so do the tests here, with every input in `fuzz/corpus`, so that no target rots.
//!
//! An input is a list of [acts](act). A device may neither panic nor touch what is not the guest's memory (`vm-memory` checks that), and whenever
//! it is frozen its state must be taken by a fresh device, which says the same of itself.

mod host;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::device::{BusDevice, Device, Freezable};
use crate::interrupt::InterruptLine;
use crate::virtio::balloon::{Balloon, BalloonSize};
use crate::virtio::block::{Block, Disk};
use crate::virtio::console::Console;
use crate::virtio::net::Net;
use crate::virtio::pmem::{Pmem, PmemPlace};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Cid, Vsock};
use crate::virtio::{GuestMemory, Memory, VirtioDevice, VirtioMmio};
use host::Host;

/// A target: bytes in, nothing out.
pub type Target = fn(&[u8]);

/// All targets, by the names of their corpora.
pub const TARGETS: [(&str, Target); 7] = [
    ("rng", rng),
    ("block", block),
    ("net", net),
    ("vsock", vsock),
    ("balloon", balloon),
    ("console", console),
    ("pmem", pmem),
];

/// Bytes of guest memory: rings and buffers overlap with ease.
const MEMORY: usize = 0x1_0000;
/// Bytes of a queue's part of it: descriptors, and 0x400 and 0x800 behind them the rings.
const RING: u64 = 0x1000;
/// Entries that the guest chooses.
const SIZE: u16 = 16;
/// Acts of one input, at most.
const ACTS: usize = 4096;

/// virtio-rng.
pub fn rng(bytes: &[u8]) {
    run(bytes, |host| Rng::new(Box::new(host)));
}

/// virtio-block, with two queues.
pub fn block(bytes: &[u8]) {
    run(bytes, |host| {
        let disk = Disk { id: "fuzz".to_owned(), sectors: host::SECTORS, read_only: false, queues: 2 };
        Block::new(disk, Box::new(host))
    });
}

/// virtio-net.
pub fn net(bytes: &[u8]) {
    let Ok(mac) = "02:00:5e:10:00:01".parse() else { return };
    run(bytes, |host| Net::new(mac, Box::new(host)));
}

/// virtio-vsock.
pub fn vsock(bytes: &[u8]) {
    let Ok(cid) = Cid::new(3) else { return };
    run(bytes, |host| Vsock::new(cid, Box::new(host)));
}

/// virtio-balloon.
pub fn balloon(bytes: &[u8]) {
    run(bytes, |host| Balloon::new(BalloonSize::default(), Box::new(host)));
}

/// virtio-console.
pub fn console(bytes: &[u8]) {
    run(bytes, |host| Console::new(Box::new(host)));
}

/// virtio-pmem.
pub fn pmem(bytes: &[u8]) {
    run(bytes, |host| Pmem::new(PmemPlace { start: 1 << 32, size: 2 << 20 }, Box::new(host)));
}

/// Swallows its edges.
struct Line;

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest with its device.
struct Machine<F> {
    mmio: VirtioMmio,
    memory: Memory,
    host: Host,
    make: F,
    available: Vec<u16>,
}

fn run<D: VirtioDevice + 'static>(bytes: &[u8], make: impl Fn(Host) -> D) {
    let Ok(memory) = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]) else { return };
    let (memory, host) = (Memory::new(Arc::new(memory)), Host::default());
    let mmio = transport(make(host.clone()), &memory);
    let mut machine = Machine { mmio, memory, host, make, available: Vec::new() };
    let mut input = Input(bytes);
    for _ in 0..ACTS {
        if machine.act(&mut input).is_none() {
            return;
        }
    }
}

fn transport(device: impl VirtioDevice + 'static, memory: &Memory) -> VirtioMmio {
    VirtioMmio::new("fuzz".to_owned(), Box::new(device), memory.clone(), Arc::new(Line))
}

/// What is left of an input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn short(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }

    fn word(&mut self) -> Option<u32> {
        Some(u32::from(self.short()?) | u32::from(self.short()?) << 16)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()?).min(self.0.len());
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(bytes)
    }
}

impl<D: VirtioDevice + 'static, F: Fn(Host) -> D> Machine<F> {
    /// Does the next thing that an input says; `None` at its end.
    fn act(&mut self, input: &mut Input<'_>) -> Option<()> {
        match input.byte()? % 10 {
            0 => self.set_up(input.word()?),
            1 => {
                let register = u64::from(input.byte()?) * 4;
                self.write(register, input.word()?);
            }
            2 => {
                let at = input.short()?;
                self.mmio.write(at.into(), input.bytes()?);
            }
            3 => {
                let mut data = vec![0; usize::from(input.byte()? % 16)];
                self.mmio.read(input.short()?.into(), &mut data);
            }
            4 => {
                let at = GuestAddress(input.short()?.into());
                // What does not fit is not written.
                let _ = self.memory.write(input.bytes()?, at);
            }
            5 => self.offer(input)?,
            6 => self.write(crate::virtio::mmio::QUEUE_NOTIFY, u32::from(input.byte()? % 4)),
            7 => self.ready(input.byte()?),
            8 => self.host.answer(input.bytes()?),
            _ => self.freeze(),
        }
        Some(())
    }

    fn write(&mut self, register: u64, value: u32) {
        self.mmio.write(register, &value.to_le_bytes());
    }

    /// Sets the device up as a driver that means well does.
    fn set_up(&mut self, features: u32) {
        for (register, value) in
            [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, features), (0x24, 1), (0x20, 1), (0x70, 11)]
        {
            self.write(register, value);
        }
        let queues = self.mmio.engine().lock().map_or(0, |engine| engine.queues());
        self.available = vec![0; queues];
        for queue in 0..queues {
            let base = ring(queue);
            self.write(0x30, u32::try_from(queue).unwrap_or(u32::MAX));
            for (register, value) in [(0x38, u64::from(SIZE)), (0x80, base), (0x90, base + 0x400), (0xa0, base + 0x800)]
            {
                self.write(register, u32::try_from(value).unwrap_or(u32::MAX));
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
    }

    /// Offers a chain of up to four descriptors.
    fn offer(&mut self, input: &mut Input<'_>) -> Option<()> {
        let (which, count) = (input.byte()?, input.byte()? % 4 + 1);
        let first = u16::from(which >> 4);
        for index in 0..u16::from(count) {
            let (address, length, flags) = (input.short()?, input.short()?, input.byte()?);
            let next = if index + 1 < u16::from(count) { 1 } else { 0 };
            let at = |queue: usize, field| GuestAddress(ring(queue) + 16 * u64::from((first + index) % SIZE) + field);
            let queue = usize::from(which & 3);
            let flags = u16::from(flags & 6) | next;
            // Lengths beyond the memory now and then.
            let length = if length == u16::MAX { u32::MAX } else { length.into() };
            let _ = self.memory.write_obj(u64::from(address), at(queue, 0));
            let _ = self.memory.write_obj(length, at(queue, 8));
            let _ = self.memory.write_obj(flags, at(queue, 12));
            let _ = self.memory.write_obj((first + index + 1) % SIZE, at(queue, 14));
        }
        let queue = usize::from(which & 3);
        let available = self.available.get_mut(queue)?;
        let entry = GuestAddress(ring(queue) + 0x404 + 2 * u64::from(*available % SIZE));
        let _ = self.memory.write_obj(first, entry);
        *available = available.wrapping_add(1);
        let _ = self.memory.write_obj(*available, GuestAddress(ring(queue) + 0x402));
        Some(())
    }

    fn ready(&mut self, source: u8) {
        if let Ok(mut engine) = self.mmio.engine().lock() {
            engine.ready(usize::from(source % 2));
        }
    }

    /// An outage: a fresh device goes on with the old one's state.
    fn freeze(&mut self) {
        let quiet = self.mmio.quiesce(Instant::now() + Duration::from_secs(10));
        assert!(quiet.is_ok(), "it does not come to rest: {quiet:?}");
        let state = self.mmio.save();
        let mut resumed = transport((self.make)(self.host.clone()), &self.memory);
        let taken = resumed.restore(&state);
        assert!(taken.is_ok(), "{taken:?} of its own state {state:?}");
        assert_eq!(resumed.save(), state, "what it took is not what it says of itself");
        resumed.thaw();
        self.mmio = resumed;
    }
}

fn ring(queue: usize) -> u64 {
    RING * (queue as u64 + 1)
}

#[cfg(test)]
mod tests;
