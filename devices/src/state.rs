//! The saved state of any device, as a context or a generation holds it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use crate::debug_exit::DebugExitStateV1;
pub use crate::power::PowerStateV1;
pub use crate::report::ReportStateV1;
pub use crate::reset::{KeyboardControllerStateV1, ResetStateV1};
pub use crate::rtc::RtcStateV1;
pub use crate::serial::SerialStateV1;
pub use crate::virtio::block::state::{BlockStateV1, FlushV1};
pub use crate::virtio::state::{VirtioMmioStateV1, VirtioState};
pub use crate::vmgenid::VmGenIdStateV1;

/// What one device was when it was frozen.
///
/// The tag names the device and the version of its layout. Layouts are never changed, only added to: a new one is a
/// new variant, and `restore` takes the old ones as well. `tests/golden` holds one of each ever written.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(tag = "device")]
pub enum DeviceState {
    /// A 16550 UART.
    #[serde(rename = "serial-v1")]
    Serial(SerialStateV1),
    /// The MC146818 clock and its CMOS memory.
    #[serde(rename = "rtc-v1")]
    Rtc(RtcStateV1),
    /// The i8042 keyboard controller.
    #[serde(rename = "keyboard-controller-v1")]
    KeyboardController(KeyboardControllerStateV1),
    /// The reset control register.
    #[serde(rename = "reset-v1")]
    Reset(ResetStateV1),
    /// The ACPI sleep registers.
    #[serde(rename = "power-v1")]
    Power(PowerStateV1),
    /// The debug exit port.
    #[serde(rename = "debug-exit-v1")]
    DebugExit(DebugExitStateV1),
    /// The report port.
    #[serde(rename = "report-v1")]
    Report(ReportStateV1),
    /// A virtio device.
    #[serde(rename = "virtio-mmio-v1")]
    VirtioMmio(VirtioMmioStateV1),
    /// The VM generation ID.
    #[serde(rename = "vmgenid-v1")]
    VmGenId(VmGenIdStateV1),
    /// A device that has no state: declared, not forgotten.
    #[serde(rename = "stateless")]
    Stateless,
}

impl DeviceState {
    /// The kind of device that this is the state of.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Serial(_) => "serial",
            Self::Rtc(_) => "rtc",
            Self::KeyboardController(_) => "keyboard-controller",
            Self::Reset(_) => "reset",
            Self::Power(_) => "power",
            Self::DebugExit(_) => "debug-exit",
            Self::Report(_) => "report",
            Self::VirtioMmio(state) => state.device.kind(),
            Self::VmGenId(_) => "vmgenid",
            Self::Stateless => "stateless",
        }
    }
}

/// Why a saved state was refused. The device that refused it is unaltered.
#[derive(Error, Debug, Clone, PartialEq, Eq)]
pub enum StateError {
    /// The state is another device's.
    #[error(
        "restoring {expected}: the saved state is one of {found}; resume with the devices that the VM was frozen with"
    )]
    WrongDevice {
        /// The kind of device that was to be restored.
        expected: &'static str,
        /// The kind of device that the state is of.
        found: &'static str,
    },
    /// No run of the device leads to this value.
    #[error(
        "restoring {device}: the saved {field} is {why}; the context is damaged, resume from an earlier generation"
    )]
    Invalid {
        /// The kind of device that was to be restored.
        device: &'static str,
        /// The field of the saved state.
        field: &'static str,
        /// What it is that it cannot be.
        why: String,
    },
}

impl StateError {
    /// A state of `found` offered to a device of kind `expected`.
    pub(crate) fn wrong_device(expected: &'static str, found: &DeviceState) -> Self {
        Self::WrongDevice { expected, found: found.kind() }
    }

    /// A state of `found` offered to a virtio device of kind `expected`.
    pub(crate) fn wrong_virtio_device(expected: &'static str, found: &VirtioState) -> Self {
        Self::WrongDevice { expected, found: found.kind() }
    }
}

/// `Ok` if `valid`; else [`StateError::Invalid`] with `why`.
pub(crate) fn ensure(
    valid: bool,
    device: &'static str,
    field: &'static str,
    why: impl FnOnce() -> String,
) -> Result<(), StateError> {
    if valid { Ok(()) } else { Err(StateError::Invalid { device, field, why: why() }) }
}
