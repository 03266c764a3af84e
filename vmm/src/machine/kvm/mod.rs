//! The only code that speaks to KVM.
//!
//! * [`host`]: `/dev/kvm` itself: is it there, may we, what can it do.
//! * [`vm`]: one virtual machine: memory slots, interrupt lines, interrupt controller, clock.
//! * [`vcpu`]: one virtual CPU and the thread that runs it.
//! * [`ring`], [`log`]: which pages a guest writes, by two ways; [`teller`]: by one of them. [`slice`]: a bound on what is written, by time.
//! * [`cpuid`], [`registers`]: what a CPU looks like at its first instruction.
//! * [`state`]: the frozen form of all of it, plain data.
//! * [`failure`]: why a CPU could not go on, in words.
//!
//! The order of construction matters for speed: memory slots are set *before* the interrupt controller is made, since
//! changing a slot afterwards waits for an RCU grace period (4–8 ms where it was measured, against 0.1 ms).

pub mod cpuid;
pub mod failure;
pub mod host;
pub mod log;
pub mod registers;
pub mod requests;
pub mod ring;
mod slice;
pub mod state;
pub mod teller;
pub mod vcpu;
pub mod vm;

pub use failure::VcpuFailure;
pub use host::Host;
pub use state::{Blob, ClockStateV1, VcpuStateV1, VmStateV1};
pub use vcpu::{Vcpu, VcpuEvent};
pub use vm::Vm;

/// What went wrong between us and KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device file is not there.
    #[error(
        "/dev/kvm does not exist: load the KVM module (modprobe kvm_intel or kvm_amd), enable virtualisation in the \
         firmware, or run on a host that has it"
    )]
    Missing,
    /// The device file may not be opened.
    #[error("no permission to open /dev/kvm: join the group kvm (usermod -aG kvm USER) or run as root")]
    Permission,
    /// The device file cannot be opened for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] std::io::Error),
    /// The API is not the one that has been stable since Linux 2.6.22.
    #[error("/dev/kvm speaks API version {0}, perdure needs 12")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error("this KVM lacks {0}, which perdure cannot do without; `perdure doctor` tells what it has")]
    Capability(&'static str),
    /// An ioctl failed.
    #[error("{doing} failed")]
    Ioctl {
        /// What was being done, with the ioctl's name.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The guest asks for more CPUs than this KVM gives.
    #[error("{asked} CPUs asked for, this KVM gives at most {most}: use --cpus {most} or fewer")]
    TooManyCpus {
        /// Asked for.
        asked: u32,
        /// Given.
        most: usize,
    },
    /// Saved state that KVM does not take, or that is damaged.
    #[error("the saved {what} cannot be restored: {why}")]
    BadState {
        /// Which part.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A vCPU thread is gone.
    #[error("the thread of vCPU {0} has ended unexpectedly")]
    ThreadGone(u32),
    /// A vCPU does not stop.
    #[error("vCPU {0} did not stop within {1:?} of being asked")]
    Stuck(u32, std::time::Duration),
    /// A thread could not be started.
    #[error("cannot start the thread of vCPU {index}")]
    Spawn {
        /// Which.
        index: u32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Adds what was being done to a failed ioctl.
pub(super) trait Doing<T> {
    /// Names the ioctl.
    fn doing(self, doing: &'static str) -> Result<T, KvmError>;
}

impl<T> Doing<T> for Result<T, kvm_ioctls::Error> {
    fn doing(self, doing: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError::Ioctl { doing, source: std::io::Error::from_raw_os_error(error.errno()) })
    }
}
