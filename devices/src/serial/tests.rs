use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

const RBR: u64 = 0;
const THR: u64 = 0;
const IER: u64 = 1;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const SCR: u64 = 7;

/// Counts edges; refuses them while told to.
#[derive(Default)]
struct Line {
    edges: AtomicUsize,
    refuses: AtomicBool,
}

impl Line {
    fn edges(&self) -> usize {
        self.edges.swap(0, Ordering::SeqCst)
    }
}

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.edges.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Keeps what it takes, up to `room` bytes; then fails with `error`.
struct Sink {
    taken: Vec<u8>,
    room: usize,
    error: io::ErrorKind,
}

#[derive(Clone)]
struct SharedSink(Arc<Mutex<Sink>>);

impl SharedSink {
    fn new(room: usize, error: io::ErrorKind) -> Self {
        Self(Arc::new(Mutex::new(Sink { taken: Vec::new(), room, error })))
    }

    fn allow(&self, room: usize) {
        self.0.lock().unwrap().room = room;
    }

    fn taken(&self) -> Vec<u8> {
        self.0.lock().unwrap().taken.clone()
    }
}

impl Write for SharedSink {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut sink = self.0.lock().unwrap();
        let taken = buf.len().min(sink.room);
        if taken == 0 {
            return Err(sink.error.into());
        }
        sink.room -= taken;
        sink.taken.extend(&buf[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn port() -> (Serial, Arc<Line>, SharedSink) {
    let line = Arc::new(Line::default());
    let sink = SharedSink::new(usize::MAX, io::ErrorKind::WouldBlock);
    (Serial::new(line.clone(), Box::new(sink.clone())), line, sink)
}

fn read(serial: &mut Serial, offset: u64) -> u8 {
    let mut data = [0];
    serial.read(offset, &mut data);
    data[0]
}

fn identify(serial: &mut Serial) -> u8 {
    read(serial, u64::from(IIR))
}

#[test]
fn after_a_reset_the_registers_are_as_in_the_datasheet() {
    let (mut serial, _, _) = port();
    assert_eq!(read(&mut serial, IER), 0);
    assert_eq!(identify(&mut serial) & 0x0f, IIR_NONE);
    assert_eq!(read(&mut serial, LSR), 0x60, "transmitter empty, no data");
}

#[test]
fn sent_bytes_reach_the_output_in_order() {
    let (mut serial, _, sink) = port();
    for byte in b"hello" {
        serial.write(THR, &[*byte]);
    }
    assert_eq!(sink.taken(), b"hello");
}

#[test]
fn the_divisor_latch_hides_the_data_register_and_sends_nothing() {
    let (mut serial, _, sink) = port();
    serial.write(LCR, &[0x83]);
    serial.write(0, &[0x01, 0x02]);
    let mut divisor = [0; 2];
    serial.read(0, &mut divisor);
    assert_eq!(divisor, [1, 2]);
    serial.write(LCR, &[0x03]);
    assert_eq!(read(&mut serial, IER), 0);
    assert_eq!(sink.taken(), b"");
}

#[test]
fn a_transmit_interrupt_follows_each_byte_once_it_was_identified() {
    let (mut serial, line, _) = port();
    serial.write(IER, &[IER_THR_EMPTY]);
    assert_eq!(line.edges(), 1, "THR is empty when the interrupt is enabled");
    assert_eq!(identify(&mut serial), IIR_FIFOS_ENABLED | IIR_THR_EMPTY);
    assert_eq!(identify(&mut serial), IIR_FIFOS_ENABLED | IIR_NONE);
    serial.write(THR, b"x");
    assert_eq!(line.edges(), 1);
}

#[test]
fn data_available_lasts_until_the_fifo_is_empty_and_comes_before_transmit() {
    let (mut serial, line, _) = port();
    serial.write(IER, &[IER_DATA_AVAILABLE | IER_THR_EMPTY]);
    assert_eq!(serial.receive(b"ab"), 2);
    assert_eq!(line.edges(), 2);
    assert_eq!(identify(&mut serial), IIR_FIFOS_ENABLED | IIR_DATA_AVAILABLE);
    assert_eq!(read(&mut serial, RBR), b'a');
    assert_eq!(identify(&mut serial), IIR_FIFOS_ENABLED | IIR_DATA_AVAILABLE);
    assert_eq!(read(&mut serial, LSR) & 1, 1);
    assert_eq!(read(&mut serial, RBR), b'b');
    assert_eq!(read(&mut serial, LSR) & 1, 0);
    assert_eq!(identify(&mut serial), IIR_FIFOS_ENABLED | IIR_THR_EMPTY, "it was not forgotten");
    assert_eq!(identify(&mut serial), IIR_FIFOS_ENABLED | IIR_NONE);
}

#[test]
fn receive_takes_what_fits_and_the_rest_can_be_offered_again() {
    let (mut serial, _, _) = port();
    let input: Vec<u8> = (0..100).collect();
    assert_eq!(serial.input_room(), FIFO_SIZE);
    let taken = serial.receive(&input);
    assert_eq!((taken, serial.input_room()), (FIFO_SIZE, 0));
    assert_eq!(serial.receive(&input[taken..]), 0);
    let mut seen = Vec::new();
    let mut rest = &input[taken..];
    while read(&mut serial, LSR) & 1 == 1 {
        seen.push(read(&mut serial, RBR));
        rest = &rest[serial.receive(rest)..];
    }
    assert_eq!(seen, input);
}

#[test]
fn loopback_takes_no_input_and_sends_none_out() {
    let (mut serial, _, sink) = port();
    serial.write(MCR, &[0x10]);
    assert_eq!(serial.receive(b"x"), 0);
    serial.write(THR, b"y");
    assert_eq!(read(&mut serial, RBR), b'y');
    assert_eq!(sink.taken(), b"");
}

#[test]
fn output_that_is_not_taken_is_kept_and_sent_later_in_order() {
    for error in [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted, io::ErrorKind::BrokenPipe] {
        let (line, sink) = (Arc::new(Line::default()), SharedSink::new(2, error));
        let mut serial = Serial::new(line, Box::new(sink.clone()));
        for byte in b"abcdef" {
            serial.write(THR, &[*byte]);
        }
        assert_eq!(sink.taken(), b"ab");
        assert_eq!(serial.drain_output(), 4);
        sink.allow(3);
        assert_eq!(serial.drain_output(), 1);
        sink.allow(usize::MAX);
        serial.write(THR, b"g");
        assert_eq!(sink.taken(), b"abcdefg");
        assert_eq!(serial.output_lost(), 0);
    }
}

#[test]
fn a_full_backlog_drops_its_oldest_bytes_and_counts_them() {
    let sink = SharedSink::new(0, io::ErrorKind::BrokenPipe);
    let mut serial = Serial::new(Arc::new(Line::default()), Box::new(sink.clone()));
    for index in 0..BACKLOG_LIMIT + 5 {
        serial.write(THR, &[index as u8]);
    }
    assert_eq!(serial.output_lost(), 5);
    sink.allow(usize::MAX);
    assert_eq!(serial.drain_output(), 0);
    assert_eq!(sink.taken().len(), BACKLOG_LIMIT);
    assert_eq!(sink.taken()[0], 5);
}

#[test]
fn a_full_backlog_loses_nothing_if_the_output_is_ready_again() {
    let sink = SharedSink::new(0, io::ErrorKind::WouldBlock);
    let mut serial = Serial::new(Arc::new(Line::default()), Box::new(sink.clone()));
    for index in 0..BACKLOG_LIMIT {
        serial.write(THR, &[index as u8]);
    }
    sink.allow(usize::MAX);
    serial.write(THR, b"!");
    assert_eq!((sink.taken().len(), serial.output_lost()), (BACKLOG_LIMIT + 1, 0));
}

#[test]
fn a_backlog_frozen_in_one_process_is_sent_by_the_next_before_anything_newer() {
    let stuck = SharedSink::new(1, io::ErrorKind::Interrupted);
    let mut serial = Serial::new(Arc::new(Line::default()), Box::new(stuck.clone()));
    for byte in b"abc" {
        serial.write(THR, &[*byte]);
    }
    let state = serial.save();
    let (mut resumed, _, sink) = port();
    resumed.restore(&state).unwrap();
    assert_eq!(sink.taken(), b"", "a restore writes nothing");
    resumed.thaw();
    resumed.write(THR, b"d");
    assert_eq!((stuck.taken(), sink.taken()), (b"a".to_vec(), b"bcd".to_vec()));
}

#[test]
fn an_interrupt_that_was_delivered_before_the_freeze_is_not_raised_again() {
    let (mut serial, line, _) = port();
    serial.write(IER, &[IER_DATA_AVAILABLE | IER_THR_EMPTY]);
    serial.receive(b"x");
    assert_eq!(line.edges(), 2);
    let state = serial.save();
    let (mut resumed, line, _) = port();
    resumed.restore(&state).unwrap();
    resumed.thaw();
    assert_eq!(identify(&mut resumed), IIR_FIFOS_ENABLED | IIR_DATA_AVAILABLE, "it is still pending");
    assert_eq!(line.edges(), 0, "neither at the thaw nor at the next access");
}

#[test]
fn an_interrupt_that_the_line_refused_is_raised_once_at_the_thaw() {
    let (mut serial, line, _) = port();
    serial.write(IER, &[IER_DATA_AVAILABLE]);
    line.refuses.store(true, Ordering::SeqCst);
    serial.receive(b"x");
    let state = serial.save();
    let (mut resumed, line, _) = port();
    resumed.restore(&state).unwrap();
    assert_eq!(line.edges(), 0, "the interrupt controller may not be there yet");
    resumed.thaw();
    resumed.thaw();
    assert_eq!(line.edges(), 1);
}

#[test]
fn a_refused_interrupt_is_raised_at_the_next_access_as_well() {
    let (mut serial, line, _) = port();
    line.refuses.store(true, Ordering::SeqCst);
    serial.write(IER, &[IER_THR_EMPTY]);
    line.refuses.store(false, Ordering::SeqCst);
    read(&mut serial, SCR);
    assert_eq!(line.edges(), 1);
}

#[test]
fn a_state_that_no_run_leads_to_is_refused_and_alters_nothing() {
    let (mut serial, _, _) = port();
    serial.receive(b"kept");
    let before = serial.save();
    let DeviceState::Serial(valid) = serial.save() else { panic!("not a serial state") };
    let wrong = [
        SerialStateV1 { interrupt_enable: 0x10, ..valid.clone() },
        SerialStateV1 { interrupt_identification: 0, ..valid.clone() },
        SerialStateV1 { interrupt_identification: 3, ..valid.clone() },
        SerialStateV1 { line_status: 0x60, ..valid.clone() },
        SerialStateV1 { modem_status: 0, ..valid.clone() },
        SerialStateV1 { receive_fifo: vec![0; FIFO_SIZE + 1], ..valid.clone() },
        SerialStateV1 { output_backlog: vec![0; BACKLOG_LIMIT + 1], ..valid.clone() },
    ];
    for state in wrong {
        assert!(matches!(
            serial.restore(&DeviceState::Serial(state)),
            Err(StateError::Invalid { device: "serial", .. })
        ));
        assert_eq!(serial.save(), before);
    }
}
