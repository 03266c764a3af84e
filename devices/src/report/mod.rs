//! The report register: 64 bits that a guest under test tells the VMM.
//!
//! A guest writes the low half to +0, then the high half to +4. Bytes gather in a latch, and the write that reaches the
//! last byte (+7) commits all eight at once; so any widths will do, in ascending order. Reads give the last committed
//! value. The VMM reads it from any thread through a [`ReportHandle`].

mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use state::ReportStateV1;

use crate::device::{BusDevice, Device, Freezable, read_bytewise, write_bytewise};
use crate::ports::REPORT_SIZE;
use crate::state::{DeviceState, StateError};

const SIZE: u8 = REPORT_SIZE as u8;
const LAST: u8 = SIZE - 1;

/// The report register.
#[derive(Default)]
pub struct Report {
    latch: [u8; SIZE as usize],
    committed: Arc<Committed>,
}

#[derive(Default)]
struct Committed {
    value: AtomicU64,
    count: AtomicU64,
}

/// Sees what a [`Report`] was told; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct ReportHandle(Arc<Committed>);

impl ReportHandle {
    /// The last committed value, 0 before the first.
    pub fn latest(&self) -> u64 {
        self.0.value.load(Ordering::Acquire)
    }

    /// How many values were committed, over the whole life of the VM. Once this is seen to have grown,
    /// [`latest`](Self::latest) gives that value or a later one.
    pub fn count(&self) -> u64 {
        self.0.count.load(Ordering::Acquire)
    }
}

impl Report {
    /// A register that holds 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// A handle to read the register from elsewhere. It stays valid across a restore.
    pub fn handle(&self) -> ReportHandle {
        ReportHandle(Arc::clone(&self.committed))
    }

    /// As [`ReportHandle::latest`].
    pub fn latest(&self) -> u64 {
        self.handle().latest()
    }
}

impl BusDevice for Report {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = self.latest().to_le_bytes();
        read_bytewise(offset, SIZE, data, |index| value[usize::from(index)]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut complete = false;
        write_bytewise(offset, SIZE, data, |index, byte| {
            self.latch[usize::from(index)] = byte;
            complete |= index == LAST;
        });
        if complete {
            self.committed.value.store(u64::from_le_bytes(self.latch), Ordering::Release);
            self.committed.count.fetch_add(1, Ordering::Release);
        }
    }
}

impl Freezable for Report {
    fn save(&self) -> DeviceState {
        let Self { latch, committed } = self;
        let Committed { value, count } = &**committed;
        DeviceState::Report(ReportStateV1 {
            latch: u64::from_le_bytes(*latch),
            value: value.load(Ordering::Acquire),
            count: count.load(Ordering::Acquire),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Report(state) = state else {
            return Err(StateError::wrong_device("report", state));
        };
        let ReportStateV1 { latch, value, count } = state;
        self.latch = latch.to_le_bytes();
        self.committed.value.store(*value, Ordering::Release);
        self.committed.count.store(*count, Ordering::Release);
        Ok(())
    }
}

impl Device for Report {
    fn id(&self) -> &str {
        "report"
    }
}
