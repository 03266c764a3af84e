//! One virtual machine as KVM sees it: memory slots, interrupt lines, interrupt controller, timer, clock.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::InterruptLine;
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::boot::layout;
use super::super::config::ClockPolicy;
use super::super::dirty::{Bound, PageSet};
use super::super::memory::{GuestRam, PAGE_SIZE, RamRange};
use super::super::time::nanoseconds;
use super::state::{Blob, ClockStateV1, VmStateV1};
use super::teller::Teller;
use super::{Doing, Host, KvmError};

const IRQCHIPS: [(u32, &str); 3] =
    [(KVM_IRQCHIP_PIC_MASTER, "first PIC"), (KVM_IRQCHIP_PIC_SLAVE, "second PIC"), (KVM_IRQCHIP_IOAPIC, "IOAPIC")];

/// A VM with its memory, interrupt controller and timer.
#[derive(Debug, Clone)]
pub struct Vm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: VmFd,
    /// Mapped into the VM: must outlive `fd`, and so stands after it (fields drop in order).
    ram: Arc<GuestRam>,
    /// Whether KVM logs which pages the guest writes.
    logs: Mutex<bool>,
    /// What tells them, and is asked in place of its log, where what is dirty is bounded.
    teller: Option<Teller>,
}

impl Inner {
    /// Tells KVM of a stretch of RAM, or tells it anew with other flags.
    fn set_slot(&self, slot: u32, range: &RamRange, flags: u32) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: range.guest_address,
            memory_size: range.length,
            userspace_addr: range.host_address,
        };
        // SAFETY: the range is mapped for as long as `ram` lives (GuestRam's promise), and `self` keeps `ram` for longer
        // than the VM; ranges of one GuestRam do not overlap, neither in the guest nor in the host.
        unsafe { self.fd.set_user_memory_region(region) }
            .doing("giving the guest its memory (KVM_SET_USER_MEMORY_REGION)")
    }
}

impl Vm {
    /// Creates a VM over `ram`, with the in-kernel interrupt controller and PIT. With `bound` it tells
    /// the pages that it writes from the first on.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`], [`KvmError::Capability`].
    pub fn create(host: &Host, ram: &Arc<GuestRam>, bound: Option<Bound>) -> Result<Self, KvmError> {
        let fd = host.kvm.create_vm().doing("creating a VM (KVM_CREATE_VM)")?;
        let teller = bound.map(|bound| Teller::enable(&fd, ram, bound)).transpose()?;
        let flags = if teller.is_some() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let inner = Inner { fd, ram: Arc::clone(ram), logs: Mutex::new(teller.is_some()), teller };
        for (slot, range) in (0..).zip(ram.ranges()) {
            inner.set_slot(slot, range, flags)?;
        }
        let fd = &inner.fd;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).doing("placing a page (KVM_SET_IDENTITY_MAP_ADDR)")?;
        fd.set_tss_address(layout::KVM_TSS as usize).doing("placing the TSS (KVM_SET_TSS_ADDR)")?;
        fd.create_irq_chip().doing("creating the interrupt controller (KVM_CREATE_IRQCHIP)")?;
        // The speaker port is answered by the PIT: kernels read port 0x61 to calibrate the TSC.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).doing("creating the timer (KVM_CREATE_PIT2)")?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Lets KVM log which pages the guest writes, from now on. The guest may run.
    pub(in super::super) fn log_dirty_pages(&self) -> Result<(), KvmError> {
        let mut logs = self.inner.logs.lock().unwrap_or_else(PoisonError::into_inner);
        if !*logs {
            for (slot, range) in (0..).zip(self.inner.ram.ranges()) {
                self.inner.set_slot(slot, range, KVM_MEM_LOG_DIRTY_PAGES)?;
            }
            *logs = true;
        }
        Ok(())
    }

    /// Adds the pages that KVM logged since the last call, and lets it log them anew. Nothing if it does not log.
    pub(in super::super) fn take_dirty_pages(&self, into: &mut PageSet) -> Result<(), KvmError> {
        if !*self.inner.logs.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok(());
        }
        let mut first = 0;
        for (slot, range) in (0..).zip(self.inner.ram.ranges()) {
            let length = usize::try_from(range.length).unwrap_or(usize::MAX);
            let bitmap = self.inner.fd.get_dirty_log(slot, length);
            into.merge(first, &bitmap.doing("reading which pages the guest wrote (KVM_GET_DIRTY_LOG)")?);
            first += range.length / PAGE_SIZE;
        }
        Ok(())
    }

    /// What tells what the guest writes, in place of the log of [`Vm::take_dirty_pages`].
    pub(in super::super) fn teller(&self) -> Option<&Teller> {
        self.inner.teller.as_ref()
    }

    /// Whether time bounds what its vCPUs write.
    pub(in super::super) fn runs_by_slices(&self) -> bool {
        self.inner.teller.as_ref().is_some_and(Teller::is_log)
    }

    /// Has its teller tell what the guest wrote, each page once until [`Vm::rearm`].
    pub(in super::super) fn harvest(&self, tell: &mut dyn FnMut(u64)) -> Result<(), KvmError> {
        let Some(teller) = &self.inner.teller else { return Ok(()) };
        let doing = "reading which pages the guest wrote (KVM_GET_DIRTY_LOG)";
        teller.harvest(&self.inner.fd, &self.inner.ram, tell).map_err(|source| KvmError::Ioctl { doing, source })
    }

    /// What its teller told is told anew from now on.
    pub(in super::super) fn rearm(&self) -> Result<(), KvmError> {
        let Some(teller) = &self.inner.teller else { return Ok(()) };
        let doing = "watching pages again (KVM_RESET_DIRTY_RINGS, KVM_CLEAR_DIRTY_LOG)";
        teller.rearm(&self.inner.fd).map_err(|source| KvmError::Ioctl { doing, source })
    }

    /// The memory that it has.
    pub(in super::super) fn ram(&self) -> &Arc<GuestRam> {
        &self.inner.ram
    }

    pub(in super::super) fn create_vcpu(&self, index: u32) -> Result<VcpuFd, KvmError> {
        let vcpu = self.inner.fd.create_vcpu(index.into()).doing("creating a vCPU (KVM_CREATE_VCPU)")?;
        if let Some(teller) = &self.inner.teller {
            teller.add(&vcpu)?;
        }
        Ok(vcpu)
    }

    /// The size that `KVM_GET_XSAVE2` needs beyond the classic 4 KiB, in 32-bit words.
    pub(super) fn xsave_extra_words(&self) -> usize {
        let size = self.inner.fd.check_extension_int(kvm_ioctls::Cap::Xsave2);
        usize::try_from(size).unwrap_or(0).saturating_sub(4096).div_ceil(4)
    }

    /// The interrupt line `gsi` of this VM. Its edges reach the interrupt controller before `trigger` returns, so that
    /// nothing is under way when the controller's state is saved.
    #[must_use]
    pub fn interrupt_line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        Arc::new(Line { vm: Arc::clone(&self.inner), gsi })
    }

    /// As [`Vm::interrupt_line`], for devices that repeat an interrupt after a freeze: `trigger` returns before the edge has reached the
    /// interrupt controller (an irqfd).
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn interrupt_event(&self, gsi: u32) -> Result<Arc<dyn InterruptLine>, KvmError> {
        let event = event()?;
        self.inner.fd.register_irqfd(&event, gsi).doing("joining an event to an interrupt (KVM_IRQFD)")?;
        Ok(Arc::new(EventLine(event)))
    }

    /// An event that counts the guest's writes of `value`, 32 bits, to `address`, which then reach no device (an ioeventfd).
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn write_event(&self, address: u64, value: u32) -> Result<EventFd, KvmError> {
        let event = event()?;
        let registered = self.inner.fd.register_ioevent(&event, &IoEventAddress::Mmio(address), value);
        registered.doing("joining an event to an address (KVM_IOEVENTFD)")?;
        Ok(event)
    }

    /// Whether the guest has interrupt `gsi` masked at the I/O APIC, as it is where nobody listens to it.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn is_masked(&self, gsi: u32) -> Result<bool, KvmError> {
        const MASKED: u64 = 1 << 16;
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        self.inner.fd.get_irqchip(&mut chip).doing("reading the interrupt controller (KVM_GET_IRQCHIP)")?;
        // SAFETY: KVM has filled in the I/O APIC's part of the union, as asked; any bits are valid for it.
        let pins = unsafe { chip.chip.ioapic }.redirtbl;
        let pin = usize::try_from(gsi).ok().and_then(|gsi| pins.get(gsi).copied());
        // SAFETY: both parts of this union are plain 64 bits.
        Ok(pin.is_none_or(|pin| unsafe { pin.bits } & MASKED != 0))
    }

    /// Reads interrupt controller, timer and clock. vCPUs must be stopped.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn save(&self) -> Result<VmStateV1, KvmError> {
        let chip = |id| -> Result<Blob, KvmError> {
            let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
            self.inner.fd.get_irqchip(&mut chip).doing("reading the interrupt controller (KVM_GET_IRQCHIP)")?;
            Ok(Blob::of(&chip))
        };
        let irqchips = [chip(IRQCHIPS[0].0)?, chip(IRQCHIPS[1].0)?, chip(IRQCHIPS[2].0)?];
        let pit = self.inner.fd.get_pit2().doing("reading the timer (KVM_GET_PIT2)")?;
        let clock = self.inner.fd.get_clock().doing("reading the clock (KVM_GET_CLOCK)")?;
        let realtime_ns =
            if clock.flags & KVM_CLOCK_REALTIME != 0 { clock.realtime } else { nanoseconds(since_epoch()) };
        let clock = ClockStateV1 { kvmclock_ns: clock.clock, realtime_ns };
        Ok(VmStateV1 { irqchips, pit: Blob::of(&pit), clock })
    }

    /// Sets clock, interrupt controller and timer of a fresh VM, in that order. `outage` is how far the clock jumps.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`], [`KvmError::BadState`].
    pub fn restore(&self, state: &VmStateV1, outage: Outage) -> Result<(), KvmError> {
        let VmStateV1 { irqchips, pit, clock } = state;
        let clock = clock.kvmclock_ns.saturating_add(nanoseconds(outage.clock_jump()));
        let clock = kvm_clock_data { clock, ..Default::default() };
        self.inner.fd.set_clock(&clock).doing("setting the clock (KVM_SET_CLOCK)")?;
        for ((id, name), blob) in IRQCHIPS.into_iter().zip(irqchips) {
            let chip: kvm_irqchip = blob.view("interrupt controller")?;
            if chip.chip_id != id {
                let why = format!("chip {} stands where the {name} should", chip.chip_id);
                return Err(KvmError::BadState { what: "interrupt controller", why });
            }
            self.inner.fd.set_irqchip(&chip).doing("setting the interrupt controller (KVM_SET_IRQCHIP)")?;
        }
        self.inner.fd.set_pit2(&pit.view("timer")?).doing("setting the timer (KVM_SET_PIT2)")
    }
}

/// The time between freeze and resume, and what the guest's clocks make of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// When it began, by the host's real-time clock: time since 1970-01-01 UTC.
    pub frozen_at: Duration,
    /// How long the VM was away, by the host's real-time clock; zero if that went backwards.
    pub length: Duration,
    /// Whether the guest's clocks go on from where they stood, or jump over the outage.
    pub policy: ClockPolicy,
}

impl Outage {
    /// The outage that ends now, of a VM frozen at `clock`.
    #[must_use]
    pub fn since(clock: &ClockStateV1, policy: ClockPolicy) -> Self {
        let frozen_at = Duration::from_nanos(clock.realtime_ns);
        Self { frozen_at, length: since_epoch().saturating_sub(frozen_at), policy }
    }

    /// How far the guest's clocks jump.
    #[must_use]
    pub fn clock_jump(self) -> Duration {
        match self.policy {
            ClockPolicy::Continue => Duration::ZERO,
            ClockPolicy::Realtime => self.length,
        }
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[derive(Debug)]
struct Line {
    vm: Arc<Inner>,
    gsi: u32,
}

impl InterruptLine for Line {
    fn trigger(&self) -> std::io::Result<()> {
        let set = |active| {
            let done = self.vm.fd.set_irq_line(self.gsi, active);
            done.map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
        };
        set(true)?;
        set(false)
    }
}

fn event() -> Result<EventFd, KvmError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| KvmError::Ioctl { doing: "making an event (eventfd2)", source })
}

#[derive(Debug)]
struct EventLine(EventFd);

impl InterruptLine for EventLine {
    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}
