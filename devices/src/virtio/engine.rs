//! A virtio device with its rings and what its driver has set: what both the registers and the device's thread work on.
//!
//! ```text
//!   reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK        virtio 1.2, section 3.1.1
//!     ▲           features are chosen ┘    queues ┘       └ live: requests are served
//!     └──────────────── status 0 ◄── any                  └ NEEDS_RESET: it stands still
//! ```

use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueT};

use super::device::VirtioDevice;
use super::fault::Fault;
use super::interrupt::{Interrupt, STATUS_BITS};
use super::memory::Memory;
use super::queue_state::QueueStateV1;
use super::ring::Ring;
use super::state::VirtioMmioStateV1;
use crate::state::{StateError, ensure};

/// Device status bits (section 2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 1 << 1;
    pub(crate) const DRIVER_OK: u8 = 1 << 2;
    pub(crate) const FEATURES_OK: u8 = 1 << 3;
    pub(crate) const NEEDS_RESET: u8 = 1 << 6;
    pub(crate) const FAILED: u8 = 1 << 7;
    pub(crate) const ALL: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
}

/// Features of the transport and the rings (section 6).
mod feature {
    pub(super) const INDIRECT_DESC: u64 = 1 << 28;
    pub(super) const EVENT_IDX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
}

/// Which of a queue's three parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Descriptors,
    Available,
    Used,
}

/// The device behind a transport.
pub struct Engine {
    device: Box<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    memory: Memory,
    rings: Vec<Ring>,
    status: u8,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    config_generation: u32,
    /// The vCPUs stand: no event counts until the thaw.
    held: bool,
    name: String,
}

impl Engine {
    pub(super) fn new(device: Box<dyn VirtioDevice>, memory: Memory, interrupt: Arc<Interrupt>, name: String) -> Self {
        let rings = device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok());
        let rings = rings.map(|queue| Ring::new(queue, memory.clone(), Arc::clone(&interrupt))).collect();
        Self {
            device,
            interrupt,
            memory,
            rings,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_generation: 0,
            held: false,
            name,
        }
    }

    /// How many queues it has.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.rings.len()
    }

    /// How many sources of the host it listens to.
    #[must_use]
    pub fn sources(&self) -> usize {
        self.device.sources()
    }

    /// The guest notified queue `queue`.
    pub fn notified(&mut self, queue: usize) {
        if self.is_live() && queue < self.rings.len() {
            let done = self.device.notified(queue, &mut self.rings);
            self.note(done);
        }
    }

    /// Source `source` of the host changed.
    pub fn ready(&mut self, source: usize) {
        if self.is_live() {
            let done = self.device.ready(source, &mut self.rings);
            self.note(done);
        }
    }

    /// What the device says of itself in its configuration changed.
    pub fn configuration_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.raise_configuration();
        }
    }

    fn is_live(&self) -> bool {
        let live = self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK;
        live && !self.held
    }

    fn note(&mut self, done: Result<(), Fault>) {
        if let Err(fault) = done {
            self.demand_reset(&fault);
        }
        if self.device.take_configuration_change() {
            self.configuration_changed();
        }
    }

    fn demand_reset(&mut self, fault: &Fault) {
        let why = std::error::Error::source(fault).map(|source| format!(": {source}")).unwrap_or_default();
        tracing::warn!("{} stands still until the guest resets it: {fault}{why}", self.name);
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.raise_configuration();
        }
    }

    // What the registers do.

    pub(super) fn kind(&self) -> u32 {
        self.device.kind() as u32
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC
    }

    pub(super) fn device_features(&self) -> u32 {
        half(self.offered(), self.device_features_select)
    }

    pub(super) fn select_device_features(&mut self, select: u32) {
        self.device_features_select = select;
    }

    pub(super) fn select_driver_features(&mut self, select: u32) {
        self.driver_features_select = select;
    }

    pub(super) fn set_driver_features(&mut self, value: u32) {
        let choosing = self.status & (status::DRIVER | status::FEATURES_OK | status::FAILED) == status::DRIVER;
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if choosing {
            let others = self.driver_features & !(u64::from(u32::MAX) << shift);
            self.driver_features = others | u64::from(value) << shift;
        }
    }

    pub(super) fn select_queue(&mut self, select: u32) {
        self.queue_select = select;
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation
    }

    pub(super) fn status(&self) -> u8 {
        self.status
    }

    /// The driver writes `Status`: bits are only ever added, or all taken back.
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let added = value & status::ALL & !status::NEEDS_RESET & !self.status;
        for (bit, needs) in [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
            (status::FAILED, 0),
        ] {
            if added & bit != 0 && self.status & needs == needs {
                self.add_status(bit);
            }
        }
    }

    fn add_status(&mut self, bit: u8) {
        match bit {
            // Left out, the bit tells the driver that its choice is not taken.
            status::FEATURES_OK if !self.features_agree() => return,
            status::DRIVER_OK => return self.activate(),
            _ => {}
        }
        self.status |= bit;
    }

    fn features_agree(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    fn activate(&mut self) {
        self.status |= status::DRIVER_OK;
        for ring in &mut self.rings {
            ring.queue.set_event_idx(self.driver_features & feature::EVENT_IDX != 0);
        }
        if self.rings.iter().any(|ring| ring.is_ready() && !ring.is_valid()) {
            return self.demand_reset(&Fault::Request("a queue lies outside of the memory"));
        }
        self.device.activate(self.driver_features);
    }

    fn reset(&mut self) {
        self.device.reset();
        self.rings.iter_mut().for_each(Ring::reset);
        self.interrupt.set(0);
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }

    fn selected(&self) -> Option<&Queue> {
        let ring = self.rings.get(usize::try_from(self.queue_select).ok()?)?;
        Some(&ring.queue)
    }

    /// The selected queue while it may be set up.
    fn selected_for_setup(&mut self) -> Option<&mut Queue> {
        let chosen = status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        if self.status & chosen != status::FEATURES_OK {
            return None;
        }
        let ring = self.rings.get_mut(usize::try_from(self.queue_select).ok()?)?;
        Some(&mut ring.queue)
    }

    pub(super) fn queue_max_size(&self) -> u32 {
        self.selected().map_or(0, |queue| queue.max_size().into())
    }

    pub(super) fn queue_ready(&self) -> u32 {
        self.selected().is_some_and(QueueT::ready).into()
    }

    pub(super) fn set_queue_size(&mut self, size: u32) {
        // A size that is none is left as it was.
        if let (Some(queue), Ok(size)) = (self.selected_for_setup(), u16::try_from(size)) {
            let _ = queue.try_set_size(size);
        }
    }

    pub(super) fn set_queue_ready(&mut self, ready: u32) {
        if let Some(queue) = self.selected_for_setup() {
            queue.set_ready(ready == 1);
        }
    }

    /// Sets half of an address; one that is not aligned is left as it was.
    pub(super) fn set_queue_address(&mut self, part: Part, low: Option<u32>, high: Option<u32>) {
        let Some(queue) = self.selected_for_setup() else { return };
        match part {
            Part::Descriptors => queue.set_desc_table_address(low, high),
            Part::Available => queue.set_avail_ring_address(low, high),
            Part::Used => queue.set_used_ring_address(low, high),
        }
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & (status::DRIVER | status::FAILED) == status::DRIVER {
            self.device.write_config(offset, data);
        }
    }

    // Freezing.

    /// The vCPUs stand: no event counts from now on, and nothing is in flight when this returns.
    ///
    /// A device that waits for its reset may have something in flight as well. And a driver whose ring makes no sense just now does
    /// not keep the machine from being frozen.
    pub(super) fn quiesce(&mut self, deadline: Instant) -> Result<(), Fault> {
        match self.device.quiesce(&mut self.rings, deadline) {
            Err(busy @ Fault::Busy(_)) => return Err(busy),
            Err(fault) if self.is_live() => self.demand_reset(&fault),
            Ok(()) | Err(_) => {}
        }
        self.held = true;
        Ok(())
    }

    /// Events count again, and all that may have come meanwhile is looked for.
    pub(super) fn thaw(&mut self) {
        self.held = false;
        self.interrupt.repeat();
        if self.is_live() {
            let done = self.device.thaw(&mut self.rings);
            self.note(done);
        }
        (0..self.rings.len()).for_each(|queue| self.notified(queue));
        (0..self.sources()).for_each(|source| self.ready(source));
    }

    pub(super) fn save(&self) -> VirtioMmioStateV1 {
        let Self {
            device,
            interrupt,
            memory: _,
            rings,
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            config_generation,
            held: _,
            name: _,
        } = self;
        VirtioMmioStateV1 {
            status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            interrupt_status: interrupt.status(),
            config_generation: *config_generation,
            queues: rings.iter().map(|ring| QueueStateV1::of(&ring.queue)).collect(),
            device: device.save(),
        }
    }

    pub(super) fn restore(&mut self, state: &VirtioMmioStateV1) -> Result<(), StateError> {
        let rings = self.check(state)?;
        let VirtioMmioStateV1 {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            interrupt_status,
            config_generation,
            queues: _,
            device,
        } = state;
        self.device.restore(device, *driver_features)?;
        self.rings = rings;
        self.status = *status;
        self.device_features_select = *device_features_select;
        self.driver_features_select = *driver_features_select;
        self.driver_features = *driver_features;
        self.queue_select = *queue_select;
        self.config_generation = *config_generation;
        self.interrupt.set(*interrupt_status);
        self.held = true;
        Ok(())
    }

    /// Whether a run of this device can have led to `state`; its rings.
    fn check(&self, state: &VirtioMmioStateV1) -> Result<Vec<Ring>, StateError> {
        const DEVICE: &str = "virtio";
        let own = self.device.save().kind();
        if state.device.kind() != own {
            return Err(StateError::wrong_virtio_device(own, &state.device));
        }
        let bits = state.status;
        ensure(bits & !status::ALL == 0, DEVICE, "status", || {
            format!("{bits:#04x}, which has bits that there are not")
        })?;
        ensure(state.interrupt_status & !STATUS_BITS == 0, DEVICE, "interrupt_status", || {
            format!("{:#x}, which has bits that there are not", state.interrupt_status)
        })?;
        let chosen = state.driver_features;
        let agreed = bits & status::FEATURES_OK == 0 || chosen & !self.offered() == 0;
        ensure(agreed, DEVICE, "driver_features", || {
            format!("{chosen:#x}, and this device has {:#x} alone", self.offered())
        })?;
        ensure(state.queues.len() == self.rings.len(), DEVICE, "queues", || {
            format!("a list of {}, and this device has {}", state.queues.len(), self.rings.len())
        })?;
        let live = bits & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK;
        state.queues.iter().zip(self.device.queue_sizes()).map(|(queue, most)| self.ring(queue, *most, live)).collect()
    }

    fn ring(&self, state: &QueueStateV1, most: u16, live: bool) -> Result<Ring, StateError> {
        let invalid = |why: String| StateError::Invalid { device: "virtio", field: "queues", why };
        if state.max_size != most {
            return Err(invalid(format!("one of {} entries, and this device's has {most}", state.max_size)));
        }
        let queue = Queue::try_from(*state).map_err(|error| invalid(format!("{state:?}: {error}")))?;
        let ring = Ring::new(queue, self.memory.clone(), Arc::clone(&self.interrupt));
        if live && ring.is_ready() && !ring.is_valid() {
            return Err(invalid(format!("{state:?}, which lies outside of the memory")));
        }
        Ok(ring)
    }
}

/// The lower or the upper half of `features`; nothing beyond.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => (features & u64::from(u32::MAX)) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
