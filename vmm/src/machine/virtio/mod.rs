//! Where virtio devices are, and what moves them: a window of addresses, an interrupt, and a thread each.
//!
//! A device's window is [`VIRTIO_MMIO_START`] and its number times 4 KiB, its interrupt the next of [`GSIS`]; the DSDT tells the
//! guest of both ([`AcpiNode`]). Numbers follow the order of the VM's configuration, so that a device is at the same place after a resume.

mod acpi;
pub mod balloon;
pub mod disk;
mod links;
pub mod pmem;
pub mod sockets;
pub mod tap;
mod thread;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use devices::virtio::mmio::{QUEUE_NOTIFY, SIZE};
use devices::virtio::rng::Rng;
use devices::virtio::{Console, Line, Memory, VirtioDevice, VirtioMmio};
use vmm_sys_util::eventfd::EventFd;

use super::boot::layout::VIRTIO_MMIO_START;
use super::bus::{Buses, SharedDevice};
use super::config::VmConfig;
use super::devices::DeviceError;
use super::entropy::HostEntropy;
use super::kvm::Vm;
use super::memory::GuestRam;
pub(super) use acpi::AcpiNode;
pub use links::Links;
use thread::DeviceThread;

/// The pins of the I/O APIC that nothing else uses: not the timers' (0, 2), the keyboard's (1), serial ports' (3, 4), the clock's (8), nor
/// those of [`super::boot::events`] (9, 23).
pub const GSIS: [u32; 16] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22];

/// A device that is to be joined to a machine.
pub struct Attachment {
    /// Names its state and its thread; unique within a machine.
    pub id: String,
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// What of the host it listens to, by number.
    pub sources: Vec<OwnedFd>,
}

/// A console on `line`. `sources`: that there is input or room for output, and that the terminal has another size.
#[must_use]
pub fn console(line: Box<dyn Line>, sources: Vec<OwnedFd>) -> Attachment {
    Attachment { id: "console".to_owned(), device: Box::new(Console::new(line)), sources }
}

/// The source of randomness.
fn rng() -> Attachment {
    Attachment { id: "rng".to_owned(), device: Box::new(Rng::new(Box::new(HostEntropy))), sources: Vec::new() }
}

/// The devices of a VM that need nothing of the host but what every process has.
pub(super) fn built_in(config: &VmConfig) -> Vec<Attachment> {
    if config.rng { vec![rng()] } else { Vec::new() }
}

/// A device in its place.
pub(super) struct Placed {
    pub(super) device: SharedDevice,
    pub(super) node: AcpiNode,
    _thread: DeviceThread,
}

/// Puts a device on the bus as number `number`, and starts its thread.
pub(super) fn place(
    vm: &Vm,
    ram: &Arc<GuestRam>,
    buses: &mut Buses,
    number: usize,
    attachment: Attachment,
) -> Result<Placed, DeviceError> {
    let Attachment { id, device, sources } = attachment;
    let gsi = GSIS.get(number).copied().ok_or(DeviceError::TooMany { most: GSIS.len() })?;
    let address = VIRTIO_MMIO_START + number as u64 * SIZE;
    let memory = Memory::new(Arc::clone(ram) as Arc<_>);
    let mmio = VirtioMmio::new(id.clone(), device, memory, vm.interrupt_event(gsi)?);
    let engine = mmio.engine();
    let queues = engine.lock().unwrap_or_else(std::sync::PoisonError::into_inner).queues();
    let kicks = (0..queues).map(|queue| {
        let queue = u32::try_from(queue).unwrap_or(u32::MAX);
        vm.write_event(address + QUEUE_NOTIFY, queue).map_err(DeviceError::from)
    });
    let kicks: Vec<EventFd> = kicks.collect::<Result<_, _>>()?;
    let thread = DeviceThread::start(&id, engine, kicks, sources)
        .map_err(|source| DeviceError::Thread { device: id.clone(), source })?;
    let device: SharedDevice = Arc::new(Mutex::new(mmio));
    buses.mmio.insert(address, SIZE, &device, 0)?;
    Ok(Placed { device, node: AcpiNode { number, address, gsi }, _thread: thread })
}

#[cfg(test)]
mod tests {
    use super::*;
    use guests::ports;

    #[test]
    fn devices_are_where_the_embedded_guests_look_for_them() {
        assert_eq!((ports::VIRTIO_MMIO, ports::VIRTIO_WINDOWS), (VIRTIO_MMIO_START, GSIS.len() as u64));
        assert!(GSIS.iter().all(|gsi| ports::VIRTIO_PINS.contains(gsi)));
    }
}
