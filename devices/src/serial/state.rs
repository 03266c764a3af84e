//! A serial port, frozen.

use serde::{Deserialize, Serialize};

use super::{BACKLOG_LIMIT, DEVICE, FIFO_SIZE};
use crate::state::{StateError, ensure};

/// Version 1. Registers are named as in the PC16550D datasheet, table II.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct SerialStateV1 {
    /// DLL: divisor latch, low byte.
    pub divisor_latch_low: u8,
    /// DLM: divisor latch, high byte.
    pub divisor_latch_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// The pending interrupts: 1 for none, else bit 1 for THR empty and bit 2 for data available.
    pub interrupt_identification: u8,
    /// A THR-empty interrupt that IIR has still to show, behind one of higher priority.
    pub thr_empty_deferred: bool,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// What was received and not yet read by the guest, oldest first.
    #[serde(with = "crate::base64_bytes")]
    pub receive_fifo: Vec<u8>,
    /// What the guest sent and the output has not yet taken, oldest first.
    #[serde(with = "crate::base64_bytes")]
    pub output_backlog: Vec<u8>,
    /// How many bytes the guest sent that were lost since the output did not take them for too long.
    pub output_lost: u64,
    /// An edge that did not reach the interrupt controller. One that did is the controller's to save.
    pub interrupt_undelivered: bool,
}

impl SerialStateV1 {
    /// Whether a run of the device can have led here.
    pub(super) fn validate(&self) -> Result<(), StateError> {
        let Self {
            divisor_latch_low: _,
            divisor_latch_high: _,
            interrupt_enable,
            interrupt_identification,
            thr_empty_deferred: _,
            line_control: _,
            line_status,
            modem_control: _,
            modem_status,
            scratch: _,
            receive_fifo,
            output_backlog,
            output_lost: _,
            interrupt_undelivered: _,
        } = self;
        ensure(*interrupt_enable <= 0x0f, DEVICE, "interrupt_enable", || {
            format!("{interrupt_enable:#04x}, above 0x0f")
        })?;
        ensure(matches!(interrupt_identification, 1 | 2 | 4 | 6), DEVICE, "interrupt_identification", || {
            format!("{interrupt_identification:#04x}, not one of 1, 2, 4, 6")
        })?;
        let data_ready = u8::from(!receive_fifo.is_empty());
        ensure(*line_status == 0x60 | data_ready, DEVICE, "line_status", || {
            format!("{line_status:#04x} with {} bytes in the FIFO", receive_fifo.len())
        })?;
        ensure(*modem_status == 0xb0, DEVICE, "modem_status", || format!("{modem_status:#04x}, not 0xb0"))?;
        ensure(receive_fifo.len() <= FIFO_SIZE, DEVICE, "receive_fifo", || {
            format!("{} bytes, more than {FIFO_SIZE}", receive_fifo.len())
        })?;
        ensure(output_backlog.len() <= BACKLOG_LIMIT, DEVICE, "output_backlog", || {
            format!("{} bytes, more than {BACKLOG_LIMIT}", output_backlog.len())
        })
    }
}
