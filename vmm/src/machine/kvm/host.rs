//! `/dev/kvm`: is it there, may we open it, what can it do.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::{Doing, KvmError};

/// The API version that has been stable since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What perdure cannot do without: memory that it maps itself, an interrupt controller and timers whose state can be
/// read and set, and all of a CPU's state.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// An open `/dev/kvm` that has what perdure needs.
#[derive(Debug)]
pub struct Host {
    pub(super) kvm: Kvm,
}

/// A capability that [`Host::capabilities`] reports.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Capability {
    /// The name as in the kernel's documentation.
    pub name: &'static str,
    /// What `KVM_CHECK_EXTENSION` says: 0 is "no".
    pub value: i32,
    /// Whether perdure cannot do without it.
    pub needed: bool,
}

impl Host {
    /// Opens `/dev/kvm` and checks that it can do what perdure needs.
    ///
    /// # Errors
    /// [`KvmError::Missing`], [`KvmError::Permission`], [`KvmError::Open`], [`KvmError::ApiVersion`],
    /// [`KvmError::Capability`].
    pub fn open() -> Result<Self, KvmError> {
        let host = Self::open_unchecked()?;
        for (cap, name) in NEEDED {
            if !host.kvm.check_extension(cap) {
                return Err(KvmError::Capability(name));
            }
        }
        Ok(host)
    }

    /// Opens `/dev/kvm` without a look at its capabilities: for `doctor`, which reports them.
    ///
    /// # Errors
    /// [`KvmError::Missing`], [`KvmError::Permission`], [`KvmError::Open`], [`KvmError::ApiVersion`].
    pub fn open_unchecked() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            errno => KvmError::Open(std::io::Error::from_raw_os_error(errno)),
        })?;
        match kvm.get_api_version() {
            API_VERSION => Ok(Self { kvm }),
            other => Err(KvmError::ApiVersion(other)),
        }
    }

    /// The capabilities that matter here, for `doctor`.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        let wanted = [
            (Cap::Xsave2, "KVM_CAP_XSAVE2"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
            (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
            (Cap::TscControl, "KVM_CAP_TSC_CONTROL"),
            (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        ];
        let ask = |needed| {
            move |(cap, name): (Cap, &'static str)| Capability {
                name,
                value: self.kvm.check_extension_int(cap),
                needed,
            }
        };
        NEEDED.into_iter().map(ask(true)).chain(wanted.into_iter().map(ask(false))).collect()
    }

    /// The most vCPUs that a VM may have.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// The most memory slots that a VM may have.
    #[must_use]
    pub fn max_memory_slots(&self) -> usize {
        self.kvm.get_nr_memslots()
    }

    /// The CPUID leaves that this KVM can give to a guest.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`].
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .doing("reading the supported CPUID (KVM_GET_SUPPORTED_CPUID)")
    }

    /// Whether the local APIC's TSC-deadline mode is there (KVM does not put it into the supported CPUID itself).
    pub(super) fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// The numbers of the MSRs that make up a vCPU's state here.
    pub(in super::super) fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list().doing("listing MSRs (KVM_GET_MSR_INDEX_LIST)")?;
        Ok(list.as_slice().to_vec())
    }
}
