//! Why a vCPU could not go on, in words that say what to do.

use std::fmt;

/// Where a vCPU stood.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// The instruction pointer.
    pub rip: u64,
    /// CR0: tells real, protected and paged mode apart.
    pub cr0: u64,
    /// CR3: the page tables.
    pub cr3: u64,
    /// The code segment's selector.
    pub cs: u16,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rip={:#x} cs={:#x} cr0={:#x} cr3={:#x}", self.rip, self.cs, self.cr0, self.cr3)
    }
}

/// Why a vCPU could not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VcpuFailure {
    /// A fault while delivering a double fault.
    #[error(
        "the guest triple-faulted on vCPU {index} ({at}): it had no handler for an exception; its own page tables, IDT or \
         stack are at fault, or the kernel is not meant for this machine"
    )]
    TripleFault {
        /// Which vCPU.
        index: u32,
        /// Where.
        at: Position,
    },
    /// KVM's instruction emulator gave up.
    #[error(
        "this host's KVM cannot execute an instruction of the guest on vCPU {index} ({at}, bytes {}): its instruction \
         emulator does not know it. `perdure doctor` tells what this KVM can run; a KVM with hardware virtualisation \
         (VMX or SVM) runs any guest", hex(.bytes)
    )]
    Emulation {
        /// Which vCPU.
        index: u32,
        /// Where.
        at: Position,
        /// The instruction's first bytes, as far as KVM told them.
        bytes: Vec<u8>,
    },
    /// Another internal error of KVM.
    #[error("KVM reports an internal error on vCPU {index} (suberror {suberror}, {at}); the kernel log may tell more")]
    Internal {
        /// Which vCPU.
        index: u32,
        /// KVM's code.
        suberror: u32,
        /// Where.
        at: Position,
    },
    /// The CPU refused to enter the guest.
    #[error("the CPU refused to enter the guest on vCPU {index} (hardware reason {reason:#x}, {at})")]
    Entry {
        /// Which vCPU.
        index: u32,
        /// The processor's code.
        reason: u64,
        /// Where.
        at: Position,
    },
    /// Memory behind a guest address could not be had.
    #[error("guest memory at {address:#x} could not be accessed on vCPU {index} ({at})")]
    Memory {
        /// Which vCPU.
        index: u32,
        /// The guest physical address, or 0 where KVM does not tell it.
        address: u64,
        /// Where.
        at: Position,
    },
    /// An exit that perdure has no use for.
    #[error("KVM stopped vCPU {index} for a reason that perdure does not know ({reason}, {at})")]
    Unknown {
        /// Which vCPU.
        index: u32,
        /// What KVM said.
        reason: String,
        /// Where.
        at: Position,
    },
    /// `KVM_RUN` failed.
    #[error("KVM_RUN failed on vCPU {index} ({at}): {why}")]
    Run {
        /// Which vCPU.
        index: u32,
        /// The system's words.
        why: String,
        /// Where.
        at: Position,
    },
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    if bytes.is_empty() {
        return "unknown".to_owned();
    }
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
