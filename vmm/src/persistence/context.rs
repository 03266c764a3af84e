//! The context: the frozen volatile state of a VM, in a region of its own.
//!
//! Two slots, written in turn: context N goes to slot N mod 2, so that a cut while it is written leaves N-1 whole (the
//! flip of PhantomOS's superblock). Each slot is a frame (magic, version, length, CRC32; see `allocator`'s FORMAT.md) around
//! JSON. A context alone proves nothing about RAM: only a region stamped `clean@N` belongs to context N.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use allocator::journal::JournalV1;
use allocator::{Region, RegionError, frame};

use super::paging::PagedV1;
use super::restoring::RestoringV1;
use crate::machine::MachineStateV1;
use crate::machine::config::VmConfig;
use crate::machine::time::nanoseconds;

const MAGIC: [u8; 8] = *b"PDCONTXT";
const VERSION: u32 = 1;
/// What a slot must hold at least: configuration (a command line of 64 KiB, escaped), devices, interrupt controller, and what
/// waits on the serial line (320 KiB, in base64).
const SLOT_BASE: u64 = 1 << 20;
/// And for each vCPU: an XSAVE area with AMX (11 KiB), CPUID (10 KiB), MSRs, LAPIC; in base64, with room to spare.
const SLOT_PER_CPU: u64 = 64 << 10;

/// Bytes of the serial line that are under way at a freeze.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleStateV1 {
    /// Typed, but not yet taken by the guest's serial port.
    #[serde(with = "devices::base64_bytes")]
    pub input: Vec<u8>,
    /// Written by the guest, but not yet taken by the terminal or file.
    #[serde(with = "devices::base64_bytes")]
    pub output: Vec<u8>,
}

/// What a VM is when nobody runs it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Standing {
    /// It has never run: RAM is zeros.
    Created,
    /// It was frozen, and goes on from here.
    Frozen(Box<FrozenV1>),
    /// Its guest ended, or it was stopped: it can be started anew.
    Ended {
        /// How, in words.
        how: String,
    },
}

/// All that was volatile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrozenV1 {
    /// The machine.
    pub machine: MachineStateV1,
    /// The serial line.
    pub console: ConsoleStateV1,
    /// RAM is not all in its region yet. Never so in a generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restoring: Option<RestoringV1>,
    /// Not all of memory is in RAM. Never so in a generation, which holds it in one piece.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paged: Option<PagedV1>,
    /// What was dirty is in the journal, and not where it belongs. Never so in a generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalV1>,
}

impl Standing {
    /// Where memory is that is not all in RAM, if it was frozen.
    #[must_use]
    pub fn paged(&self) -> Option<PagedV1> {
        match self {
            Self::Frozen(frozen) => frozen.paged,
            Self::Created | Self::Ended { .. } => None,
        }
    }

    /// The restore that is under way, if there is one.
    #[must_use]
    pub fn restoring(&self) -> Option<&RestoringV1> {
        match self {
            Self::Frozen(frozen) => frozen.restoring.as_ref(),
            Self::Created | Self::Ended { .. } => None,
        }
    }
}

/// One context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContextV1 {
    /// Its number: one more than the one before.
    pub sequence: u64,
    /// When it was written: nanoseconds since 1970-01-01 UTC.
    pub written_ns: u64,
    /// What the VM is made of.
    pub config: VmConfig,
    /// What it was.
    pub standing: Standing,
}

/// What a slot holds.
#[derive(Debug)]
pub enum Slot {
    /// Nothing yet.
    Empty,
    /// A context that verifies.
    Good(Box<ContextV1>),
    /// Something else; in words.
    Bad(String),
}

/// Why a context cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The region.
    #[error("cannot {doing} the context")]
    Region {
        /// "read" or "write".
        doing: &'static str,
        /// Why.
        #[source]
        source: RegionError,
    },
    /// It does not fit.
    #[error("the context has {length} bytes, its slot {slot}: this is a fault of perdure, please report it")]
    TooLong {
        /// The frame's length in bytes.
        length: u64,
        /// The slot's.
        slot: u64,
    },
    /// It cannot be put into words.
    #[error("cannot write the context as JSON")]
    Encode(#[source] serde_json::Error),
}

/// Now, as contexts are dated: nanoseconds since 1970-01-01 UTC.
pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    nanoseconds(since)
}

/// The size of a context region for a VM with so many vCPUs, in bytes.
#[must_use]
pub fn region_size(cpus: u32) -> u64 {
    2 * (SLOT_BASE + SLOT_PER_CPU * u64::from(cpus))
}

/// Both slots of a context region.
#[derive(Debug)]
pub struct Slots(pub [Slot; 2]);

impl Slots {
    /// Reads both slots; damage is reported in them, not as an error.
    ///
    /// # Errors
    /// [`ContextError::Region`] if the region cannot be read at all.
    pub fn read(region: &Region) -> Result<Self, ContextError> {
        Ok(Self([read_slot(region, 0)?, read_slot(region, 1)?]))
    }

    /// The newest context that verifies.
    #[must_use]
    pub fn newest(self) -> Option<ContextV1> {
        let good = self.0.into_iter().filter_map(|slot| match slot {
            Slot::Good(context) => Some(*context),
            Slot::Empty | Slot::Bad(_) => None,
        });
        good.max_by_key(|context| context.sequence)
    }

    /// Whether nothing was ever written to either.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|slot| matches!(slot, Slot::Empty))
    }

    /// What is wrong with slots that do not verify.
    #[must_use]
    pub fn damage(&self) -> Vec<String> {
        let describe = |(index, slot): (usize, &Slot)| match slot {
            Slot::Bad(why) => Some(format!("context slot {index}: {why}")),
            Slot::Empty | Slot::Good(_) => None,
        };
        self.0.iter().enumerate().filter_map(describe).collect()
    }
}

fn slot_size(region: &Region) -> u64 {
    region.size() / 2
}

fn read_slot(region: &Region, index: u64) -> Result<Slot, ContextError> {
    let read_error = |source| ContextError::Region { doing: "read", source };
    let size = slot_size(region);
    let start = index * size;
    let most = usize::try_from(size).unwrap_or(usize::MAX).saturating_sub(frame::HEADER_LEN);
    let mut header = [0; frame::HEADER_LEN];
    region.read_at(&mut header, start).map_err(read_error)?;
    if header == [0; frame::HEADER_LEN] {
        return Ok(Slot::Empty);
    }
    let length = match frame::decode_header(&header, MAGIC, VERSION, most) {
        Ok(header) => header.length,
        Err(error) => return Ok(Slot::Bad(error.to_string())),
    };
    let mut bytes = vec![0; frame::HEADER_LEN + length];
    region.read_at(&mut bytes, start).map_err(read_error)?;
    let body = match frame::decode(&bytes, MAGIC, VERSION, most) {
        Ok(frame) => frame.body,
        Err(error) => return Ok(Slot::Bad(error.to_string())),
    };
    Ok(match serde_json::from_slice::<ContextV1>(body) {
        Ok(context) if context.sequence % 2 == index => Slot::Good(Box::new(context)),
        Ok(context) => Slot::Bad(format!("context {} does not belong into this slot", context.sequence)),
        Err(error) => Slot::Bad(format!("its checksum holds, but it is not a context: {error}")),
    })
}

/// A context in its frame, ready to be written.
#[derive(Debug)]
pub struct Encoded {
    sequence: u64,
    bytes: Vec<u8>,
}

impl Encoded {
    /// Puts a context into its frame.
    ///
    /// # Errors
    /// [`ContextError::Encode`].
    pub fn new(context: &ContextV1) -> Result<Self, ContextError> {
        let body = serde_json::to_vec(context).map_err(ContextError::Encode)?;
        Ok(Self { sequence: context.sequence, bytes: frame::encode(MAGIC, VERSION, &body) })
    }

    /// The context's number.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The frame's length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it is empty; a frame never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes it to its slot, the other one left alone, and makes it durable.
    ///
    /// # Errors
    /// [`ContextError::TooLong`], [`ContextError::Region`].
    pub fn write(&self, region: &Region) -> Result<(), ContextError> {
        let write_error = |source| ContextError::Region { doing: "write", source };
        let (length, slot) = (self.bytes.len() as u64, slot_size(region));
        if length > slot {
            return Err(ContextError::TooLong { length, slot });
        }
        region.write_durable_at(&self.bytes, (self.sequence % 2) * slot).map_err(write_error)
    }
}
