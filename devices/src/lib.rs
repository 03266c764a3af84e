//! The devices of a virtual machine, each of which can be frozen.
//!
//! A device is what a guest reaches through ports, or through a page of addresses ([`virtio`]). It is plain emulation: no KVM, no threads, no
//! unsafe code. What it needs from the machine it asks for through traits that it defines and the VMM implements:
//! an interrupt line ([`InterruptLine`]), the machine's own switches ([`MachineControl`]), the wall clock
//! ([`WallClock`]).
//!
//! ```text
//!            guest: in/out
//!                 │
//!            vmm's bus            decodes; offset relative to the device's base
//!                 │ BusDevice
//!    ┌───────┬────┴──┬──────────┬───────┬────────────┬────────┐
//!  Serial   Rtc   Keyboard-  ResetCon- Power     DebugExit  Report
//!                 Controller  trol
//!    │       │       └────┬─────┴───────┴────────────┘
//!    ▼       ▼            ▼
//! Interrupt- WallClock  MachineControl
//! Line
//! ```
//!
//! Everything a guest can do to a port is defined: every offset, every width. A byte outside a device's registers
//! reads as [`OPEN_BUS`] and is ignored when written.
//!
//! # Frozen is not running
//!
//! Each device has a `state.rs` with a plain struct (`SerialStateV1`, …) that is what a context or a generation holds.
//! [`Freezable::save`] takes the device apart field by field, so that a forgotten one does not compile;
//! [`Freezable::restore`] treats the state as untrusted, and either takes all of it or leaves the device as it was.
//! `save → restore → save` yields equal bytes, for every device. [`Device::thaw`] then delivers what was on its way.
#![forbid(unsafe_code)]

pub mod base64_bytes;
pub mod debug_exit;
pub mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod interrupt;
pub mod machine_control;
pub mod ports;
pub mod power;
pub mod report;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod state;
pub mod virtio;
pub mod vmgenid;

pub use debug_exit::DebugExit;
pub use device::{BusDevice, Device, Freezable, OPEN_BUS};
pub use interrupt::InterruptLine;
pub use machine_control::{MachineControl, MachineRequest};
pub use power::Power;
pub use report::{Report, ReportHandle};
pub use reset::{KeyboardController, ResetControl};
pub use rtc::{ClockPolicy, GuestMemorySize, Rtc, WallClock};
pub use serial::Serial;
pub use state::{DeviceState, StateError};
pub use vmgenid::VmGenId;
