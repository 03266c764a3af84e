//! The frozen form of everything that KVM holds: plain data, untrusted when it comes back.
//!
//! KVM's own structures are kept as they are, byte for byte, in base64. They are the kernel's stable ABI, so their
//! layout does not change; [`Blob::view`] takes them back only at their exact size.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::KvmError;

/// The bytes of one of KVM's structures.
#[derive(Clone, PartialEq, Eq)]
pub struct Blob(Vec<u8>);

impl Blob {
    /// Keeps a structure's bytes.
    pub(super) fn of<T: IntoBytes + Immutable>(value: &T) -> Self {
        Self(value.as_bytes().to_vec())
    }

    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Gives the structure back.
    ///
    /// # Errors
    /// [`KvmError::BadState`] if the size is not the structure's.
    pub(super) fn view<T: FromBytes>(&self, what: &'static str) -> Result<T, KvmError> {
        T::read_from_bytes(&self.0).map_err(|_| KvmError::BadState {
            what,
            why: format!("it has {} bytes, not {}", self.0.len(), size_of::<T>()),
        })
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        STANDARD.decode(text.as_bytes()).map(Self).map_err(serde::de::Error::custom)
    }
}

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuStateV1 {
    /// `kvm_cpuid_entry2[]`: what the guest was told its CPU is.
    pub cpuid: Blob,
    /// The TSC's frequency in kHz, where KVM tells it.
    pub tsc_khz: Option<u32>,
    /// `kvm_sregs`: segments, control registers, the APIC base.
    pub sregs: Blob,
    /// `kvm_regs`: general registers, RIP, RFLAGS.
    pub regs: Blob,
    /// `kvm_xcrs`: extended control registers.
    pub xcrs: Blob,
    /// The XSAVE area, in KVM's layout.
    pub xsave: Blob,
    /// `(number, value)` of every MSR that KVM lists and could read.
    pub msrs: Vec<(u32, u64)>,
    /// `kvm_lapic_state`: the local APIC's registers.
    pub lapic: Blob,
    /// `kvm_debugregs`.
    pub debug_registers: Blob,
    /// `kvm_vcpu_events`: exceptions, NMIs and interrupts on their way in.
    pub events: Blob,
    /// `kvm_mp_state.mp_state`: running, halted, waiting for SIPI, ….
    pub mp_state: u32,
}

/// The clocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockStateV1 {
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// The host's CLOCK_REALTIME at the same moment, in nanoseconds since 1970-01-01 UTC.
    pub realtime_ns: u64,
}

/// What belongs to the VM as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStateV1 {
    /// `kvm_irqchip` of the first PIC, the second PIC and the IOAPIC.
    pub irqchips: [Blob; 3],
    /// `kvm_pit_state2`.
    pub pit: Blob,
    /// The clocks.
    pub clock: ClockStateV1,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_survives_json_and_refuses_another_size() {
        let blob = Blob::from_bytes(vec![0, 255, 7, 9]);
        let text = serde_json::to_string(&blob).unwrap();
        assert_eq!(text, "\"AP8HCQ==\"");
        let back: Blob = serde_json::from_str(&text).unwrap();
        assert_eq!(back, blob);
        assert_eq!(back.view::<u32>("test").unwrap(), u32::from_le_bytes([0, 255, 7, 9]));
        let error = back.view::<u64>("test").unwrap_err().to_string();
        assert!(error.contains("4 bytes, not 8"), "{error}");
    }

    #[test]
    fn a_blob_that_is_not_base64_is_refused() {
        assert!(serde_json::from_str::<Blob>("\"a?\"").is_err());
        assert!(serde_json::from_str::<Blob>("7").is_err());
    }
}
