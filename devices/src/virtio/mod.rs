//! Paravirtual devices: virtio 1.2 over the MMIO transport.
//!
//! ```text
//!   guest's driver        vmm                                        here
//!   ──────────────        ───                                        ────
//!   registers ──────────► bus (a vCPU's thread) ───────────────────► VirtioMmio ─┐
//!   QueueNotify ────────► ioeventfd ─► the device's thread ─────────────────────►├─ Engine: VirtioDevice + Rings
//!                         host's descriptors (tap, completions) ────────────────►┘        │
//!   interrupt ◄────────── irqfd ◄───────────────────────────────────── Interrupt ◄────────┘
//! ```
//!
//! A [`VirtioDevice`] is emulation without threads or descriptors: it is told that a queue was notified, or that a source
//! of the host is ready, and works through what there is, without waiting. What it needs of the host it asks for through
//! a trait of its own. The [`Engine`] holds it together with its [`Ring`]s and is what both sides lock: a vCPU's thread for
//! a register, the device's thread for work. The interrupt status and its acknowledgement are outside of that lock.
//!
//! # Freezing
//!
//! When the vCPUs stand, [`Device::quiesce`](crate::Device::quiesce) lets the device complete what is in flight (or record it), and from then on
//! the engine takes no event. Events that come meanwhile need not be kept: thawing looks at every queue and every source again,
//! and raises the interrupt again if the guest has not acknowledged it. So neither an unread eventfd nor an irqfd whose
//! edge is still on its way to the interrupt controller is part of the state. A spurious interrupt is harmless: the driver
//! reads the status first.
//!
//! # Guests that lie
//!
//! Every address is checked by `vm-memory`, a chain of descriptors ends (`virtio-queue` counts), and a ring that makes
//! no sense makes the device ask for its reset (`DEVICE_NEEDS_RESET`, virtio 1.2 section 2.1.1) and stand still.

pub mod balloon;
pub mod block;
mod buffers;
pub mod console;
mod device;
#[cfg(test)]
mod driver;
mod engine;
mod fault;
mod interrupt;
mod memory;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue_state;
mod ring;
pub mod rng;
pub mod state;
pub mod vsock;

pub use balloon::{Balloon, BalloonSize, Reclaim};
pub use buffers::{PIECES_MAX, Piece};
pub use console::{Console, Line, TerminalSize};
pub use device::{VirtioDevice, VirtioKind};
pub use engine::Engine;
pub use fault::Fault;
pub use interrupt::Interrupt;
pub use memory::{DeviceMemory, GuestMemory, Memory};
pub use mmio::VirtioMmio;
pub use net::{Mac, Net, Offloads, Tap};
pub use pmem::{Durable, Pmem, PmemPlace};
pub use ring::{Chain, Ring};
pub use vsock::{Cid, Vsock, VsockHost};
