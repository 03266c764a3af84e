//! The devices of a machine: which there are, where they are on the buses, and their state as a whole.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use devices::ports as at;
use devices::virtio::{Fault, Memory};
use devices::{
    DebugExit, Device, DeviceState, GuestMemorySize, KeyboardController, MachineControl, MachineRequest, Power, Report,
    ReportHandle, ResetControl, Rtc, Serial, StateError, VmGenId, WallClock,
};

use super::boot::events::GENERATION_GSI;
use super::boot::layout::{MMIO_GAP_END, MMIO_GAP_START, VM_GENERATION_ID};
use super::bus::{Buses, Overlap, SharedDevice};
use super::config::ClockPolicy;
use super::entropy;
use super::kvm::vm::Outage;
use super::kvm::{KvmError, Vm};
use super::memory::GuestRam;
use super::virtio::sockets::SocketError;
use super::virtio::tap::TapError;
use super::virtio::{self, AcpiNode, Attachment, Placed};
use super::{MachineEvent, MachineEvents};

/// The serial port's interrupt.
pub const SERIAL_IRQ: u32 = at::SERIAL0_IRQ;

/// Devices that machines of earlier releases did not have: their guests were not told of them, and go on without.
const SINCE_VERSION_1: [&str; 1] = ["vmgenid"];

/// What can go wrong with devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Two devices at one address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// The saved state lacks a device that the machine has.
    #[error("the saved state has nothing of the device {0}: it was made by a machine without it")]
    Missing(String),
    /// The saved state has a device that the machine lacks.
    #[error("the saved state has the device {0}, which this machine has not")]
    Unclaimed(String),
    /// A device does not take its state.
    #[error(transparent)]
    State(#[from] StateError),
    /// An embedded guest that there is not.
    #[error("there is no embedded guest '{0}'")]
    NoSuchGuest(String),
    /// KVM does not join a device to the guest.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The VM generation ID.
    #[error("cannot give the guest a VM generation ID")]
    GenerationId(#[source] std::io::Error),
    /// More virtio devices than there are interrupts for.
    #[error("a VM has at most {most} virtio devices")]
    TooMany {
        /// How many.
        most: usize,
    },
    /// A network card's tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A guest's sockets.
    #[error(transparent)]
    Sockets(#[from] SocketError),
    /// A device's bell.
    #[error("cannot make an event descriptor for the device {device}")]
    Bell {
        /// Which.
        device: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A device's thread.
    #[error("cannot start the thread of the device {device}")]
    Thread {
        /// Which.
        device: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A device with work in flight.
    #[error("the device {device} does not come to rest")]
    Restless {
        /// Which.
        device: String,
        /// Why.
        #[source]
        source: Fault,
    },
}

/// The host's real-time clock.
struct HostClock;

impl WallClock for HostClock {
    fn now(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// The devices of a machine.
pub struct Devices {
    rtc: Arc<Mutex<Rtc>>,
    serial: Arc<Mutex<Serial>>,
    report: ReportHandle,
    generation_id: Arc<Mutex<VmGenId>>,
    all: Vec<SharedDevice>,
    virtio: Vec<Placed>,
}

/// Passes a device's request on, and makes the vCPUs stop.
struct Control {
    stopping: Arc<AtomicBool>,
    events: MachineEvents,
}

impl MachineControl for Control {
    fn request(&self, request: MachineRequest) {
        // The first request counts: what a guest asks of a machine that is ending already does not.
        if !self.stopping.swap(true, Ordering::AcqRel) {
            (self.events)(MachineEvent::Request(request));
        }
    }
}

impl Devices {
    /// Makes the devices of a machine and puts them on its buses.
    ///
    /// # Errors
    /// [`DeviceError::Overlap`].
    pub fn assemble(
        vm: &Vm,
        ram: &Arc<GuestRam>,
        serial_output: Box<dyn Write + Send>,
        events: &MachineEvents,
        attachments: Vec<Attachment>,
    ) -> Result<(Self, Buses), DeviceError> {
        let mut buses = Buses::default();
        let control: Arc<dyn MachineControl> =
            Arc::new(Control { stopping: Arc::clone(&buses.stopping), events: Arc::clone(events) });
        let serial = Arc::new(Mutex::new(Serial::new(vm.interrupt_line(at::SERIAL0_IRQ), serial_output)));
        let report = Report::new();
        let handle = report.handle();
        let rtc = Arc::new(Mutex::new(Rtc::new(Box::new(HostClock), memory_size(ram))));
        let placed: [(u16, u16, SharedDevice); 7] = [
            (at::SERIAL0_BASE, at::SERIAL0_SIZE, Arc::clone(&serial) as SharedDevice),
            (at::RTC_BASE, at::RTC_SIZE, Arc::clone(&rtc) as SharedDevice),
            (
                at::KEYBOARD_CONTROLLER_BASE,
                at::KEYBOARD_CONTROLLER_SIZE,
                shared(KeyboardController::new(Arc::clone(&control))),
            ),
            (at::RESET_CONTROL_BASE, at::RESET_CONTROL_SIZE, shared(ResetControl::new(Arc::clone(&control)))),
            (at::POWER_BASE, at::POWER_SIZE, shared(Power::new(Arc::clone(&control)))),
            (at::DEBUG_EXIT_BASE, at::DEBUG_EXIT_SIZE, shared(DebugExit::new(control))),
            (at::REPORT_BASE, at::REPORT_SIZE, shared(report)),
        ];
        for (base, size, device) in &placed {
            buses.ports.insert((*base).into(), (*size).into(), device, 0)?;
        }
        let virtio = attachments.into_iter().enumerate();
        let virtio = virtio.map(|(number, attachment)| virtio::place(vm, ram, &mut buses, number, attachment));
        let virtio = virtio.collect::<Result<Vec<_>, _>>()?;
        let generation_id = Arc::new(Mutex::new(generation_id(vm, ram)?));
        let ports = placed.into_iter().map(|(_, _, device)| device);
        let all = ports.chain([Arc::clone(&generation_id) as SharedDevice]);
        let all = all.chain(virtio.iter().map(|placed| Arc::clone(&placed.device))).collect();
        Ok((Self { rtc, serial, report: handle, generation_id, all, virtio }, buses))
    }

    /// Shows a guest that is about to boot its VM generation ID.
    ///
    /// # Errors
    /// [`DeviceError::GenerationId`].
    pub(super) fn show_generation_id(&self) -> Result<(), DeviceError> {
        let shown = self.generation_id.lock().unwrap_or_else(PoisonError::into_inner).show();
        shown.map_err(DeviceError::GenerationId)
    }

    /// What the DSDT says of them.
    pub(super) fn acpi_nodes(&self) -> impl Iterator<Item = &AcpiNode> {
        self.virtio.iter().map(|placed| &placed.node)
    }

    /// Lets every device complete what is in flight, until `deadline`. vCPUs must be stopped. Until [`Devices::thaw`] none does anything.
    ///
    /// # Errors
    /// [`DeviceError::Restless`].
    pub fn quiesce(&self, deadline: Instant) -> Result<(), DeviceError> {
        self.all.iter().try_for_each(|device| {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = device.quiesce(deadline);
            rest.map_err(|source| DeviceError::Restless { device: device.id().to_owned(), source })
        })
    }

    /// Reads every device's state. vCPUs must be stopped, and the devices quiesced.
    #[must_use]
    pub fn save(&self) -> BTreeMap<String, DeviceState> {
        let state = |device: &SharedDevice| {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            (device.id().to_owned(), device.save())
        };
        self.all.iter().map(state).collect()
    }

    /// Sets every device's state, after `outage`. Each device must find its own state, and each state its device.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn restore(&self, states: &BTreeMap<String, DeviceState>, outage: Outage) -> Result<(), DeviceError> {
        let mut claimed = 0;
        for device in &self.all {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            match states.get(device.id()) {
                Some(state) => device.restore(state)?,
                None if SINCE_VERSION_1.contains(&device.id()) => continue,
                None => return Err(DeviceError::Missing(device.id().to_owned())),
            }
            claimed += 1;
        }
        if claimed < states.len() {
            let known = |id: &str| {
                self.all.iter().any(|device| device.lock().unwrap_or_else(PoisonError::into_inner).id() == id)
            };
            let unknown = states.keys().find(|id| !known(id)).cloned().unwrap_or_default();
            return Err(DeviceError::Unclaimed(unknown));
        }
        self.rtc.lock().unwrap_or_else(PoisonError::into_inner).apply_clock_policy(match outage.policy {
            ClockPolicy::Continue => devices::ClockPolicy::Continue { frozen_at: outage.frozen_at },
            ClockPolicy::Realtime => devices::ClockPolicy::Realtime,
        });
        Ok(())
    }

    /// Delivers what was on its way at a freeze. vCPUs must still be stopped.
    pub fn thaw(&self) {
        for device in &self.all {
            device.lock().unwrap_or_else(PoisonError::into_inner).thaw();
        }
    }

    /// Offers bytes to the serial port; how many it took.
    #[must_use]
    pub fn receive_serial(&self, bytes: &[u8]) -> usize {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).receive(bytes)
    }

    /// What the guest reports through its report port.
    #[must_use]
    pub fn report(&self) -> &ReportHandle {
        &self.report
    }
}

fn generation_id(vm: &Vm, ram: &Arc<GuestRam>) -> Result<VmGenId, DeviceError> {
    let id = entropy::unique().map_err(DeviceError::GenerationId)?;
    let memory = Memory::new(Arc::clone(ram) as Arc<_>);
    Ok(VmGenId::new(id, memory, VM_GENERATION_ID, vm.interrupt_line(GENERATION_GSI)))
}

fn shared(device: impl Device + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn memory_size(ram: &GuestRam) -> GuestMemorySize {
    let within = |start: u64, end: u64| {
        ram.ram_ranges()
            .iter()
            .filter(|range| (start..end).contains(&range.guest_address))
            .map(|range| range.length)
            .sum()
    };
    GuestMemorySize { below_4g: within(0, MMIO_GAP_START), above_4g: within(MMIO_GAP_END, u64::MAX) }
}
