//! A 16550 serial port (National Semiconductor PC16550D), around [`vm_superio::Serial`].
//!
//! ```text
//!  terminal ── receive() ─► receive FIFO (64) ─► RBR ─┐
//!                                                     ├─ guest
//!  output ◄── drain_output() ◄── backlog (16 KiB) ◄─ THR ─┘
//!                                                  └─► InterruptLine (an edge)
//! ```
//!
//! # No byte lost, none doubled
//!
//! * Input: [`Serial::receive`] says how many bytes the FIFO took. The rest stays with the caller, who offers it again.
//! * Output: what the output does not take at once (`WouldBlock`, `Interrupted`, any error) goes into a backlog, which
//!   is offered again before anything newer. The backlog is part of the saved state. Only when it is full are the
//!   oldest bytes dropped; that is counted ([`Serial::output_lost`]), saved and logged. So a write that a freeze
//!   interrupts neither holds the freeze up nor loses its byte.
//! * Interrupts: an edge is forgotten once the line took it, for then it is in the interrupt controller's state. One
//!   that the line refused is saved and delivered at the thaw. A restore raises none by itself.
//!
//! # Where it differs from the chip
//!
//! * The FIFOs are always on, the receive FIFO is 64 deep with a trigger level of one, and transmission takes no time.
//! * FCR is ignored, the reset of the receive FIFO too: what was typed before the driver opened the port is kept.
//! * The baud rate, parity, breaks and modem lines have no effect, so the line status and modem status interrupts never
//!   happen.
//! * `vm-superio` shows two pending interrupts in IIR at once and forgets both when it is read. Here IIR shows the one
//!   of the higher priority, data available lasts until the FIFO is empty, and THR empty comes after it: table III
//!   of the datasheet.

mod edge;
mod output;
mod state;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;

pub use state::SerialStateV1;
use vm_superio::serial::{Error, NoEvents, SerialState};

use self::edge::Edge;
use self::output::Output;
use crate::device::{BusDevice, Device, Freezable, read_bytewise, write_bytewise};
use crate::interrupt::InterruptLine;
use crate::ports::SERIAL0_SIZE;
use crate::state::{DeviceState, StateError};

/// Depth of the receive FIFO in bytes.
pub const FIFO_SIZE: usize = 64;
/// The most output, in bytes, that is kept for an output that does not take it.
pub const BACKLOG_LIMIT: usize = 16 << 10;

const DEVICE: &str = "serial";
const SIZE: u8 = SERIAL0_SIZE as u8;

/// Interrupt identification register: its offset, and what it shows.
const IIR: u8 = 2;
const IIR_FIFOS_ENABLED: u8 = 0xc0;
const IIR_NONE: u8 = 0x01;
const IIR_THR_EMPTY: u8 = 0x02;
const IIR_DATA_AVAILABLE: u8 = 0x04;
/// Interrupt enable register: its bits.
const IER_DATA_AVAILABLE: u8 = 0x01;
const IER_THR_EMPTY: u8 = 0x02;

type Uart = vm_superio::Serial<Edge, NoEvents, Output>;

/// A serial port.
pub struct Serial {
    uart: Uart,
    line: Arc<dyn InterruptLine>,
    thr_empty_deferred: bool,
    interrupt_undelivered: bool,
}

impl Serial {
    /// A port after a hardware reset, which raises `line` and sends to `output`.
    ///
    /// Every byte is written (and flushed) at once, so `output` should not buffer much; and it may refuse.
    pub fn new(line: Arc<dyn InterruptLine>, output: Box<dyn Write + Send>) -> Self {
        let uart = Uart::new(Edge::default(), Output::new(output));
        Self { uart, line, thr_empty_deferred: false, interrupt_undelivered: false }
    }

    /// Puts `bytes` into the receive FIFO, as many as fit, and says how many did. The rest is the caller's to offer
    /// again, when [`input_room`](Self::input_room) has grown. A port in loopback mode takes none.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = match self.uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            // It reports a full FIFO before it takes anything. The others cannot happen: no output is involved, and
            // an `Edge` is always taken.
            Err(Error::FullFifo | Error::IOError(_)) => 0,
            Err(Error::Trigger(never)) => match never {},
        };
        self.settle();
        taken
    }

    /// How many bytes the receive FIFO has room for.
    pub fn input_room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Offers the backlog to the output again and says how many bytes are still in it. To be called when the output may
    /// have become ready; every read by the guest and every byte it sends does it too.
    pub fn drain_output(&mut self) -> usize {
        self.uart.writer_mut().drain()
    }

    /// How many bytes of output were lost over the whole life of the VM.
    pub fn output_lost(&self) -> u64 {
        self.uart.writer().lost()
    }

    fn read_register(&mut self, index: u8) -> u8 {
        if index == IIR { self.identify_interrupt() } else { self.uart.read(index) }
    }

    /// The pending interrupt of the highest priority (datasheet, table III). Reading IIR clears THR empty if that is
    /// what it shows; data available lasts until the FIFO is read.
    fn identify_interrupt(&mut self) -> u8 {
        let enabled = self.uart.state().interrupt_enable;
        let pending = self.uart.read(IIR);
        let thr_empty = enabled & IER_THR_EMPTY != 0 && (pending & IIR_THR_EMPTY != 0 || self.thr_empty_deferred);
        let data_available = enabled & IER_DATA_AVAILABLE != 0 && self.input_room() < FIFO_SIZE;
        self.thr_empty_deferred = thr_empty && data_available;
        IIR_FIFOS_ENABLED
            | match (data_available, thr_empty) {
                (true, _) => IIR_DATA_AVAILABLE,
                (false, true) => IIR_THR_EMPTY,
                (false, false) => IIR_NONE,
            }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        match self.uart.write(index, value) {
            Ok(()) => {}
            Err(Error::Trigger(never)) => match never {},
            // Neither can happen: `Output` takes everything, and a write does not report the FIFO.
            Err(error @ (Error::IOError(_) | Error::FullFifo)) => {
                tracing::error!(%error, index, "a serial register was not written");
            }
        }
    }

    /// After whatever may have wanted an interrupt: passes it on, and keeps it if the line refuses.
    fn settle(&mut self) {
        self.interrupt_undelivered |= self.uart.interrupt_evt().take();
        self.deliver();
    }

    fn deliver(&mut self) {
        if !self.interrupt_undelivered {
            return;
        }
        match self.line.trigger() {
            Ok(()) => self.interrupt_undelivered = false,
            Err(error) => {
                tracing::warn!(%error, "the serial port's interrupt was not taken; it will be raised again");
            }
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, SIZE, data, |index| self.read_register(index));
        self.drain_output();
        self.settle();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, SIZE, data, |index, byte| {
            self.write_register(index, byte);
        });
        self.settle();
    }
}

impl Freezable for Serial {
    fn save(&self) -> DeviceState {
        let Self { uart, line: _, thr_empty_deferred, interrupt_undelivered } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = uart.state();
        DeviceState::Serial(SerialStateV1 {
            divisor_latch_low: baud_divisor_low,
            divisor_latch_high: baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            thr_empty_deferred: *thr_empty_deferred,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            receive_fifo: in_buffer,
            output_backlog: uart.writer().backlog(),
            output_lost: uart.writer().lost(),
            interrupt_undelivered: *interrupt_undelivered,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Serial(state) = state else {
            return Err(StateError::wrong_device(DEVICE, state));
        };
        state.validate()?;
        let mut uart = rebuild(state)?;
        uart.writer_mut().adopt(self.uart.writer_mut());
        self.uart = uart;
        self.thr_empty_deferred = state.thr_empty_deferred;
        self.interrupt_undelivered = state.interrupt_undelivered;
        Ok(())
    }
}

/// The UART of `state`, with an output that goes nowhere yet.
fn rebuild(state: &SerialStateV1) -> Result<Uart, StateError> {
    let SerialStateV1 {
        divisor_latch_low,
        divisor_latch_high,
        interrupt_enable,
        interrupt_identification,
        thr_empty_deferred: _,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        receive_fifo,
        output_backlog,
        output_lost,
        interrupt_undelivered: _,
    } = state;
    let registers = SerialState {
        baud_divisor_low: *divisor_latch_low,
        baud_divisor_high: *divisor_latch_high,
        interrupt_enable: *interrupt_enable,
        interrupt_identification: *interrupt_identification,
        line_control: *line_control,
        line_status: *line_status,
        modem_control: *modem_control,
        modem_status: *modem_status,
        scratch: *scratch,
        in_buffer: receive_fifo.clone(),
    };
    let output = Output::resumed(Box::new(io::sink()), output_backlog, *output_lost);
    let built: Result<Uart, Error<Infallible>> = Uart::from_state(&registers, Edge::default(), NoEvents, output);
    let uart = built.map_err(|error| StateError::Invalid {
        device: DEVICE,
        field: "receive_fifo",
        why: format!("refused: {error}"),
    })?;
    // `from_state` wants an edge for whatever is pending. It was delivered before the freeze, or is in
    // `interrupt_undelivered`; raised once more it would be doubled.
    uart.interrupt_evt().take();
    Ok(uart)
}

impl Device for Serial {
    fn id(&self) -> &str {
        "serial0"
    }

    fn thaw(&mut self) {
        self.drain_output();
        self.deliver();
    }
}
