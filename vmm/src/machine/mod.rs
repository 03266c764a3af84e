//! The virtual machine itself: memory, buses, devices, vCPUs. It knows nothing of outages.
//!
//! ```text
//!                      Machine::assemble(config, ram, wiring)
//!                                    │
//!                 boot() ────────────┼──────────── restore(state)
//!                                    ▼
//!       run() ──► running ──► pause() ──► idle ──► save() ──► MachineStateV1
//!                    ▲                      │
//!                    └──────── run() ───────┘
//! ```
//!
//! A `Machine` is never reused: a reboot or a resume assembles a fresh one over the same memory.

pub mod boot;
pub mod bus;
pub mod config;
pub mod devices;
pub mod dirty;
pub mod entropy;
pub mod jail;
pub mod kvm;
pub mod memory;
pub mod time;
pub mod virtio;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ::devices::{DeviceState, MachineRequest};
use acpi_tables::Aml;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use boot::events::POWER_BUTTON_GSI;
use boot::{BootError, BootSpec, Entry, KernelSource};
use bus::Buses;
use config::{Kernel, VmConfig};
use devices::{DeviceError, Devices};
use dirty::{DirtyTracker, UnflushedPages};
use kvm::vcpu::{Accesses, VcpuEvents};
use kvm::vm::Outage;
use kvm::{Host, KvmError, Vcpu, VcpuEvent, VcpuFailure, VcpuStateV1, Vm, VmStateV1, cpuid, registers};
use memory::GuestRam;
use virtio::Attachment;
use virtio::balloon::BalloonControl;

/// What a machine tells its owner while it runs; from any thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest asked for something.
    Request(MachineRequest),
    /// A vCPU cannot go on.
    Failed(VcpuFailure),
}

/// Receives what a machine tells.
pub type MachineEvents = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// How a machine is joined to the world.
pub struct Wiring {
    /// Where the serial port's output goes.
    pub serial_output: Box<dyn Write + Send>,
    /// Who is told.
    pub events: MachineEvents,
    /// The virtio devices that need something of the host, in the order of the configuration.
    pub attachments: Vec<Attachment>,
}

/// Everything volatile of a stopped machine: plain data, and untrusted when it is read back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineStateV1 {
    /// Each device by its id.
    pub devices: BTreeMap<String, DeviceState>,
    /// Each vCPU, by index.
    pub vcpus: Vec<VcpuStateV1>,
    /// Interrupt controller, timer, clock.
    pub vm: VmStateV1,
}

impl MachineStateV1 {
    /// The VM goes back in time, or becomes another one: its guest is to know when it runs again. A guest that was booted without a VM
    /// generation ID does not.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn renew_generation_id(&mut self) -> std::io::Result<()> {
        for state in self.devices.values_mut() {
            if let DeviceState::VmGenId(state) = state {
                state.id = entropy::unique()?.to_vec();
                state.changed = true;
            }
        }
        Ok(())
    }
}

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Loading the kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A file that the kernel needs.
    #[error("cannot open {what} {path}")]
    Open {
        /// "the kernel" or "the initrd".
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// State for another number of CPUs.
    #[error("the saved state has {saved} vCPUs, the VM has {configured}")]
    CpuCount {
        /// In the state.
        saved: usize,
        /// In the configuration.
        configured: u32,
    },
}

/// A virtual machine.
pub struct Machine {
    config: VmConfig,
    ram: Arc<GuestRam>,
    host: Host,
    vm: Vm,
    // vCPUs before the buses and devices that their threads use.
    vcpus: Vec<Vcpu>,
    msr_indices: Arc<[u32]>,
    buses: Arc<Buses>,
    devices: Devices,
    balloon: Option<BalloonControl>,
    events: MachineEvents,
}

impl Machine {
    /// Puts a machine together over `ram`: nothing in it runs or has state yet.
    ///
    /// # Errors
    /// [`MachineError::Kvm`], [`MachineError::Device`].
    pub fn assemble(host: Host, config: &VmConfig, ram: Arc<GuestRam>, wiring: Wiring) -> Result<Self, MachineError> {
        let most = host.max_vcpus();
        if config.cpus as usize > most {
            return Err(KvmError::TooManyCpus { asked: config.cpus, most }.into());
        }
        let vm = Vm::create(&host, &ram, ram.told().bound())?;
        let mut attachments: Vec<_> = wiring.attachments.into_iter().chain(virtio::built_in(config)).collect();
        let balloon = config.balloon.then(|| virtio::balloon::attach(&ram)).transpose();
        let balloon = balloon.map_err(|source| DeviceError::Bell { device: "balloon", source })?;
        let balloon = balloon.map(|(attachment, control)| {
            attachments.push(attachment);
            control
        });
        let (devices, buses) = Devices::assemble(&vm, &ram, wiring.serial_output, &wiring.events, attachments)?;
        let msr_indices = host.msr_indices()?.into();
        Ok(Self {
            config: config.clone(),
            ram,
            host,
            vm,
            vcpus: Vec::new(),
            msr_indices,
            buses: Arc::new(buses),
            devices,
            balloon,
            events: wiring.events,
        })
    }

    /// Loads the kernel and sets the vCPUs to their first instruction. They are idle until [`Machine::run`].
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn boot(&mut self) -> Result<(), MachineError> {
        let entry = self.load_kernel()?;
        self.devices.show_generation_id()?;
        let supported = self.host.supported_cpuid()?;
        let fds = self.create_vcpus()?;
        for (index, fd) in (0..).zip(&fds) {
            let cpuid = cpuid::for_vcpu(&self.host, &supported, index, self.config.cpus)?;
            registers::set_cpuid(fd, &cpuid)?;
            registers::set_power_on(fd)?;
        }
        if let Some(first) = fds.first() {
            registers::set_entry(first, &entry)?;
        }
        self.start_vcpus(fds)
    }

    fn load_kernel(&self) -> Result<Entry, MachineError> {
        let open = |what, path: &PathBuf| {
            File::open(path).map_err(|source| MachineError::Open { what, path: path.clone(), source })
        };
        let embedded = |name: &str| match guests::by_name(name) {
            Some(guest) => Ok(KernelSource::Image(guest.image, guest.name)),
            None => Err(DeviceError::NoSuchGuest(name.to_owned())),
        };
        let kernel_file;
        let (kernel, initrd) = match &self.config.kernel {
            Kernel::Guest(name) => (embedded(name)?, None),
            Kernel::GuestWith { guest, initrd } => (embedded(guest)?, Some(initrd)),
            Kernel::File { path, initrd } => {
                kernel_file = open("the kernel", path)?;
                (KernelSource::File(&kernel_file, path), initrd.as_ref())
            }
        };
        let initrd = match initrd {
            Some(path) => Some((open("the initrd", path)?, path)),
            None => None,
        };
        let nodes: Vec<&dyn Aml> = self.devices.acpi_nodes().map(|node| node as &dyn Aml).collect();
        let spec = BootSpec {
            kernel,
            initrd: initrd.as_ref().map(|(file, path)| (file, path.as_path())),
            cmdline: &self.config.cmdline,
            ram: self.config.memory.0,
            cpus: u16::try_from(self.config.cpus).unwrap_or(u16::MAX),
            serial_irq: Some(devices::SERIAL_IRQ),
            rtc_irq: None,
            acpi_devices: &nodes,
        };
        Ok(boot::load(self.ram.memory(), &spec)?)
    }

    /// Sets the whole machine to a saved state; `outage` is the time between. Idle until [`Machine::run`].
    ///
    /// # Errors
    /// [`MachineError`]. Guest memory is not touched in any case.
    pub fn restore(&mut self, state: &MachineStateV1, outage: Outage) -> Result<(), MachineError> {
        let MachineStateV1 { devices, vcpus, vm } = state;
        if vcpus.len() != self.config.cpus as usize {
            return Err(MachineError::CpuCount { saved: vcpus.len(), configured: self.config.cpus });
        }
        let fds = self.create_vcpus()?;
        self.vm.restore(vm, outage)?;
        for (index, (fd, vcpu)) in fds.iter().zip(vcpus).enumerate() {
            for msr in registers::restore(&self.vm, fd, vcpu, outage)? {
                tracing::warn!("vCPU {index}: this KVM does not take MSR {msr:#x}; it keeps its reset value");
            }
        }
        self.devices.restore(devices, outage)?;
        self.start_vcpus(fds)?;
        self.notify_paused()?;
        // Last, and it cannot fail: from here on devices write to memory.
        self.devices.thaw();
        Ok(())
    }

    fn create_vcpus(&self) -> Result<Vec<VcpuFd>, MachineError> {
        (0..self.config.cpus).map(|index| self.vm.create_vcpu(index).map_err(Into::into)).collect()
    }

    fn start_vcpus(&mut self, fds: Vec<VcpuFd>) -> Result<(), MachineError> {
        let events: VcpuEvents = {
            let events = Arc::clone(&self.events);
            Arc::new(move |VcpuEvent::Failed(failure)| events(MachineEvent::Failed(failure)))
        };
        for (index, fd) in (0..).zip(fds) {
            let (msrs, buses) = (Arc::clone(&self.msr_indices), Arc::clone(&self.buses));
            self.vcpus.push(Vcpu::start(&self.vm, index, fd, msrs, buses, Arc::clone(&events))?);
        }
        Ok(())
    }

    /// Its memory balloon, if it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&BalloonControl> {
        self.balloon.as_ref()
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`KvmError::ThreadGone`].
    pub fn run(&self) -> Result<(), MachineError> {
        Ok(self.vcpus.iter().try_for_each(Vcpu::run)?)
    }

    /// Stops the vCPUs, each between two instructions, with every access of theirs complete.
    ///
    /// # Errors
    /// [`KvmError::Stuck`], [`KvmError::ThreadGone`].
    pub fn pause(&self) -> Result<(), MachineError> {
        self.vcpus.iter().for_each(Vcpu::request_pause);
        // One that waits for memory does not hear of the request before it has that.
        self.ram.hurry(true);
        let idle = self.vcpus.iter().try_for_each(Vcpu::wait_idle);
        self.ram.hurry(false);
        Ok(idle?)
    }

    /// Whether the guest ended (power-off, reset, failure), though its owner may not have been told yet.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.buses.is_stopping()
    }

    /// Tells the guest that it was stopped on purpose, so that it does not report hung CPUs. Before [`Machine::run`].
    ///
    /// # Errors
    /// [`KvmError::ThreadGone`].
    pub fn notify_paused(&self) -> Result<(), MachineError> {
        Ok(self.vcpus.iter().try_for_each(Vcpu::notify_paused)?)
    }

    /// Lets devices complete what is in flight, or record it, until `deadline`. The machine must be paused; no device does anything then until
    /// [`Machine::thaw_devices`].
    ///
    /// # Errors
    /// [`DeviceError::Restless`], by the device's name.
    pub fn quiesce_devices(&self, deadline: Instant) -> Result<(), MachineError> {
        Ok(self.devices.quiesce(deadline)?)
    }

    /// Reads the devices' state. The machine must be paused and its devices quiesced.
    #[must_use]
    pub fn save_devices(&self) -> BTreeMap<String, DeviceState> {
        self.devices.save()
    }

    /// Reads the state of the vCPUs (each on its own thread), interrupt controller and clock. The machine must be
    /// paused and its devices saved: they may interrupt until then.
    ///
    /// # Errors
    /// [`MachineError::Kvm`].
    pub fn save_cpus(&self, devices: BTreeMap<String, DeviceState>) -> Result<MachineStateV1, MachineError> {
        let pending = self.vcpus.iter().map(Vcpu::begin_save).collect::<Result<Vec<_>, _>>()?;
        let vcpus = pending.into_iter().map(kvm::vcpu::PendingSave::wait).collect::<Result<_, _>>()?;
        let vm = self.vm.save()?;
        Ok(MachineStateV1 { devices, vcpus, vm })
    }

    /// Lets devices deliver what was on its way at a freeze. Before [`Machine::run`].
    pub fn thaw_devices(&self) {
        self.devices.thaw();
    }

    /// Presses the power button. `false`: the guest does not listen to it, so nothing was done.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn press_power_button(&self) -> Result<bool, MachineError> {
        if self.vm.is_masked(POWER_BUTTON_GSI)? {
            return Ok(false);
        }
        let pressed = self.vm.interrupt_line(POWER_BUTTON_GSI).trigger();
        pressed.map_err(|source| KvmError::Ioctl { doing: "pressing the power button (KVM_IRQ_LINE)", source })?;
        Ok(true)
    }

    /// Its devices, for the supervisor: serial input, reports.
    #[must_use]
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// For asking which pages of its memory changed.
    #[must_use]
    pub fn dirty_tracker(&self) -> DirtyTracker {
        DirtyTracker::new(self.vm.clone(), Arc::clone(&self.ram))
    }

    /// The pages of its memory that are not durable, where it has a hold-up.
    #[must_use]
    pub fn unflushed_pages(&self) -> Option<UnflushedPages> {
        UnflushedPages::of(&self.vm)
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What it is made of.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("config", &self.config).finish_non_exhaustive()
    }
}
