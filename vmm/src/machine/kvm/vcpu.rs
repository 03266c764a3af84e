//! One vCPU, and the thread that runs it.
//!
//! ```text
//!            run()                    pause(): flag, immediate_exit, signal
//!   Idle ───────────► Running ─────────────────────────────────────────────► Idle
//!    │ save()            │ the guest asked for power-off, or cannot go on ───► Idle
//! ```
//!
//! A vCPU pauses only when `KVM_RUN` returned `EINTR`. With `immediate_exit` set KVM first completes the port or MMIO
//! access that the last exit began (and exits again if a string instruction goes on), and only then returns: so no
//! access is half done in the saved state, and none is done twice.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::failure::{Position, VcpuFailure};
use super::slice::{self, Slices};
use super::state::VcpuStateV1;
use super::{KvmError, Vm, registers};
use crate::machine::dirty::told::Told;
use crate::machine::jail::{self, Role};

/// How long a vCPU may take to stop before we call it stuck. A guest cannot cause it: KVM looks for signals between
/// any two instructions. A slow disk can: a fault on a page of a region waits for it, and no signal ends that wait.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// What the guest's accesses reach: the machine's buses.
pub trait Accesses: Send + Sync {
    /// `IN`.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load from an address where no memory is.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store to an address where no memory is.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// Whether the machine is to stop (power-off, reset): asked after each access.
    fn is_stopping(&self) -> bool;
    /// A vCPU cannot go on: the machine is to stop.
    fn stop(&self);
}

/// What a vCPU tells its supervisor of its own accord.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// It cannot go on.
    Failed(VcpuFailure),
}

/// Receives what vCPUs tell.
pub type VcpuEvents = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

/// A vCPU whose thread runs.
#[derive(Debug)]
pub struct Vcpu {
    index: u32,
    vm: Vm,
    shared: Arc<Shared>,
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Run,
    Save(mpsc::Sender<Result<VcpuStateV1, KvmError>>),
    NotifyPaused,
}

#[derive(Debug)]
struct Shared {
    running: Mutex<bool>,
    idle: Condvar,
    pause: AtomicBool,
    immediate_exit: ImmediateExit,
}

/// The byte in the shared `kvm_run` page that makes `KVM_RUN` return at once.
#[derive(Debug)]
struct ImmediateExit(*mut u8);

// SAFETY: the pointer is only used through an AtomicU8, from any thread, while the page is mapped (see `set`).
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(run: &mut kvm_run) -> Self {
        Self(&raw mut run.immediate_exit)
    }

    fn set(&self, value: u8) {
        // SAFETY: the byte lies in the kvm_run page, mapped until the VcpuFd is dropped, which is the thread's last
        // act; `set` is called by that thread, or by `Vcpu` before it joins the thread. The kernel reads it as a byte.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, bool> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What makes KVM return before it enters the guest, and the vCPU stop then. One that is in the guest must be kicked.
    fn ask_to_stop(&self) {
        self.pause.store(true, Ordering::SeqCst);
        self.immediate_exit.set(1);
    }

    /// Whether the vCPU is to stop, asked when something interrupted it. If not, it may enter the guest again.
    fn pause_wanted(&self) -> bool {
        if self.pause.load(Ordering::SeqCst) {
            return true;
        }
        self.immediate_exit.set(0);
        // A request that came in between had its own mark wiped out just now, and its signal may be spent: without this
        // second look the guest would run on. A later one sets the mark after this.
        self.pause.load(Ordering::SeqCst)
    }

    /// Lets the vCPU run. Whether it must be told: one that was asked to stop and has not yet need not, it just goes on.
    fn let_run(&self) -> bool {
        let mut running = self.running();
        self.pause.store(false, Ordering::SeqCst);
        self.immediate_exit.set(0);
        !std::mem::replace(&mut *running, true)
    }

    /// The vCPU has stopped, and stays so; unless it was let run in the meantime.
    fn set_idle(&self) -> bool {
        let mut running = self.running();
        *running = !self.pause.load(Ordering::SeqCst);
        self.idle.notify_all();
        !*running
    }

    /// The vCPU has stopped for good.
    fn set_ended(&self) {
        *self.running() = false;
        self.idle.notify_all();
    }
}

extern "C" fn on_signal(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Of a kick only the arrival counts: it makes KVM_RUN return EINTR.
    // SAFETY: the kernel's, as it gives it to a handler.
    unsafe { slice::on_signal(info) };
}

pub(super) fn install_signal_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: plain data, for which zeros are valid; the handler touches nothing but atomics (`slice::on_signal`). KVM_RUN returns at a signal in any
        // case; what else its thread asks of the system goes on.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(SIGRTMIN(), &raw const action, std::ptr::null_mut())
        };
        if installed != 0 {
            let error = std::io::Error::last_os_error();
            tracing::error!("cannot install the handler that stops vCPUs: {error}");
        }
    });
}

impl Vcpu {
    /// Starts the thread of a vCPU whose registers are set. It is idle until [`Vcpu::run`].
    ///
    /// # Errors
    /// [`KvmError::Spawn`].
    pub fn start(
        vm: &Vm,
        index: u32,
        mut fd: VcpuFd,
        msr_indices: Arc<[u32]>,
        accesses: Arc<dyn Accesses>,
        events: VcpuEvents,
    ) -> Result<Self, KvmError> {
        install_signal_handler();
        let shared = Arc::new(Shared {
            running: Mutex::new(false),
            idle: Condvar::new(),
            pause: AtomicBool::new(false),
            immediate_exit: ImmediateExit::of(fd.get_kvm_run()),
        });
        let (commands, inbox) = mpsc::channel();
        let runner = Runner { index, vm: vm.clone(), fd, msr_indices, accesses, events, shared: Arc::clone(&shared) };
        let thread = jail::spawn(format!("vcpu{index}"), Role::Vcpu, move || runner.serve(&inbox))
            .map_err(|source| KvmError::Spawn { index, source })?;
        Ok(Self { index, vm: vm.clone(), shared, commands: Some(commands), thread: Some(thread) })
    }

    fn send(&self, command: Command) -> Result<(), KvmError> {
        let commands = self.commands.as_ref().ok_or(KvmError::ThreadGone(self.index))?;
        commands.send(command).map_err(|_| KvmError::ThreadGone(self.index))
    }

    /// Lets the vCPU run.
    ///
    /// # Errors
    /// [`KvmError::ThreadGone`].
    pub fn run(&self) -> Result<(), KvmError> {
        if self.shared.let_run() { self.send(Command::Run) } else { Ok(()) }
    }

    /// Asks the vCPU to stop, without waiting for it: so that all of them stop at once.
    pub fn request_pause(&self) {
        self.shared.ask_to_stop();
        self.kick();
        // It may wait for room.
        if self.vm.teller().is_some() {
            self.vm.ram().told().wake();
        }
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // An error means that the thread has ended: `wait_idle` finds that out.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Waits until the vCPU has stopped, its last access complete.
    ///
    /// # Errors
    /// [`KvmError::Stuck`] after half a minute, [`KvmError::ThreadGone`].
    pub fn wait_idle(&self) -> Result<(), KvmError> {
        let start = Instant::now();
        let mut running = self.shared.running();
        while *running {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err(KvmError::ThreadGone(self.index));
            }
            if start.elapsed() > STOP_DEADLINE {
                return Err(KvmError::Stuck(self.index, STOP_DEADLINE));
            }
            let waited = self.shared.idle.wait_timeout(running, Duration::from_millis(20));
            running = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Begins to read the state of an idle vCPU, on its own thread; the result comes through the receiver.
    ///
    /// # Errors
    /// [`KvmError::ThreadGone`].
    pub fn begin_save(&self) -> Result<PendingSave, KvmError> {
        let (reply, result) = mpsc::channel();
        self.send(Command::Save(reply))?;
        Ok(PendingSave { index: self.index, result })
    }

    /// Tells the guest that it was stopped, so that it does not take the gap for a hung CPU (`KVM_KVMCLOCK_CTRL`).
    ///
    /// # Errors
    /// [`KvmError::ThreadGone`].
    pub fn notify_paused(&self) -> Result<(), KvmError> {
        self.send(Command::NotifyPaused)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.request_pause();
        drop(self.commands.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A save under way.
#[derive(Debug)]
pub struct PendingSave {
    index: u32,
    result: mpsc::Receiver<Result<VcpuStateV1, KvmError>>,
}

impl PendingSave {
    /// Waits for the state.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`], [`KvmError::ThreadGone`].
    pub fn wait(self) -> Result<VcpuStateV1, KvmError> {
        self.result.recv().map_err(|_| KvmError::ThreadGone(self.index))?
    }
}

/// What the thread owns.
struct Runner {
    index: u32,
    vm: Vm,
    fd: VcpuFd,
    msr_indices: Arc<[u32]>,
    accesses: Arc<dyn Accesses>,
    events: VcpuEvents,
    shared: Arc<Shared>,
}

impl Runner {
    fn serve(mut self, inbox: &mpsc::Receiver<Command>) {
        let slices = self.slices().map_err(|error| format!("a timer cannot be had (timer_create): {error}"));
        while let Ok(command) = inbox.recv() {
            match command {
                Command::Run => self.run(&slices),
                // Nobody waits any more if the reply cannot be sent.
                Command::Save(reply) => drop(reply.send(registers::save(&self.vm, &self.fd, &self.msr_indices))),
                Command::NotifyPaused => {
                    // EINVAL: the guest has not set up kvmclock, so there is nobody to tell.
                    let _ = self.fd.kvmclock_ctrl();
                }
            }
        }
    }

    fn run(&mut self, slices: &Result<Option<Slices>, String>) {
        loop {
            let ran = match slices {
                Ok(slices) => self.run_until_paused(slices.as_ref()),
                Err(why) => Err(self.explain(Cannot::Run(why.clone()))),
            };
            if let Err(failure) = ran {
                self.accesses.stop();
                (self.events)(VcpuEvent::Failed(failure));
            }
            if self.accesses.is_stopping() {
                return self.shared.set_ended();
            }
            if self.shared.set_idle() {
                return;
            }
        }
    }

    fn run_until_paused(&mut self, slices: Option<&Slices>) -> Result<(), VcpuFailure> {
        loop {
            if let Some(slices) = slices {
                self.keep_to(slices).map_err(|why| self.explain(Cannot::Run(why)))?;
            }
            match self.fd.run() {
                Ok(exit) => match handle(exit, &*self.accesses) {
                    Handled::Done => {}
                    Handled::PortIo => self.port_io(),
                    Handled::RingFull => self.wait_for_room().map_err(|why| self.explain(Cannot::Run(why)))?,
                    Handled::Cannot(reason) => return Err(self.explain(reason)),
                },
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    if self.shared.pause_wanted() {
                        return Ok(());
                    }
                }
                Err(error) if error.errno() == libc::EFAULT => return Err(self.explain(Cannot::Memory(0))),
                Err(error) => return Err(self.explain(Cannot::Run(error.to_string()))),
            }
            if self.accesses.is_stopping() {
                return self.complete_access();
            }
        }
    }

    fn is_to_stop(&self) -> bool {
        self.shared.pause.load(Ordering::SeqCst) || self.accesses.is_stopping()
    }

    /// It wrote as many pages as it may before somebody looks at them.
    fn wait_for_room(&self) -> Result<(), String> {
        Told::on_ring_full(&self.vm, &|| self.is_to_stop()).map_err(|error| error.to_string())
    }

    /// Where time bounds what it writes: if its slice is over, waits until there is room for the next, and begins it. One that is to stop begins
    /// none, and finds the mark of who stops it when it enters KVM.
    fn keep_to(&self, slices: &Slices) -> Result<(), String> {
        if !slices.is_over() {
            return Ok(());
        }
        match Told::next_slice(&self.vm, self.index, &|| self.is_to_stop()) {
            Ok(Some(length)) => slices.begin(length).map_err(|error| format!("its timer cannot be set: {error}")),
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The slices that it is to keep to, if it is. On its own thread.
    fn slices(&self) -> std::io::Result<Option<Slices>> {
        if !self.vm.runs_by_slices() {
            return Ok(None);
        }
        // SAFETY: the mark lies in the mapping that `fd` keeps, and they go before it: see `serve`.
        unsafe { Slices::of_this_thread(self.shared.immediate_exit.0) }.map(Some)
    }

    /// Lets KVM finish the access that made the machine stop, without running the guest any further.
    fn complete_access(&mut self) -> Result<(), VcpuFailure> {
        self.shared.immediate_exit.set(1);
        match self.fd.run() {
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// A port access: `rep outs` and `rep ins` bring several elements at once, all to the same port.
    fn port_io(&mut self) {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: this thread just saw KVM_EXIT_IO, so `io` is the member of the union that the kernel filled.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let size = usize::from(io.size).max(1);
        let length = size * io.count as usize;
        // SAFETY: the kernel put `count` elements of `size` bytes at `data_offset` into the kvm_run mapping, which
        // lives as long as `fd`; KVM_RUN has not been entered since, and no other reference into the mapping is held.
        let data = unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(io.data_offset as usize), length) };
        for element in data.chunks_mut(size) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                self.accesses.port_read(io.port, element);
            } else {
                self.accesses.port_write(io.port, element);
            }
        }
    }

    fn explain(&mut self, reason: Cannot) -> VcpuFailure {
        let (index, at) = (self.index, registers::position(&self.fd));
        match reason {
            Cannot::Shutdown => VcpuFailure::TripleFault { index, at },
            Cannot::Memory(address) => VcpuFailure::Memory { index, address, at },
            Cannot::Entry(reason) => VcpuFailure::Entry { index, reason, at },
            Cannot::Unknown(reason) => VcpuFailure::Unknown { index, reason, at },
            Cannot::Run(why) => VcpuFailure::Run { index, why, at },
            Cannot::Internal => self.explain_internal(at),
        }
    }

    fn explain_internal(&mut self, at: Position) -> VcpuFailure {
        const EMULATION: u32 = 1;
        const HAS_INSTRUCTION_BYTES: u64 = 1;
        let index = self.index;
        // SAFETY: this thread just saw KVM_EXIT_INTERNAL_ERROR, whose member of the union this is; it is plain data.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
        if error.suberror != EMULATION {
            return VcpuFailure::Internal { index, suberror: error.suberror, at };
        }
        // SAFETY: as above; the inner union has one member.
        let detail = unsafe { error.__bindgen_anon_1.__bindgen_anon_1 };
        let known = error.ndata >= 1 && error.flags & HAS_INSTRUCTION_BYTES != 0;
        let length = if known { usize::from(detail.insn_size).min(detail.insn_bytes.len()) } else { 0 };
        VcpuFailure::Emulation { index, at, bytes: detail.insn_bytes[..length].to_vec() }
    }
}

enum Handled {
    Done,
    PortIo,
    RingFull,
    Cannot(Cannot),
}

enum Cannot {
    Shutdown,
    Internal,
    Memory(u64),
    Entry(u64),
    Unknown(String),
    Run(String),
}

fn handle(exit: VcpuExit<'_>, accesses: &dyn Accesses) -> Handled {
    match exit {
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Handled::PortIo,
        VcpuExit::MmioRead(address, data) => {
            accesses.mmio_read(address, data);
            Handled::Done
        }
        VcpuExit::MmioWrite(address, data) => {
            accesses.mmio_write(address, data);
            Handled::Done
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => Handled::Done,
        VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => Handled::RingFull,
        VcpuExit::Shutdown => Handled::Cannot(Cannot::Shutdown),
        VcpuExit::InternalError => Handled::Cannot(Cannot::Internal),
        VcpuExit::FailEntry(reason, _) => Handled::Cannot(Cannot::Entry(reason)),
        VcpuExit::MemoryFault { gpa, .. } => Handled::Cannot(Cannot::Memory(gpa)),
        other => Handled::Cannot(Cannot::Unknown(format!("{other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn shared(immediate_exit: *mut u8) -> Shared {
        Shared {
            running: Mutex::new(true),
            idle: Condvar::new(),
            pause: AtomicBool::new(false),
            immediate_exit: ImmediateExit(immediate_exit),
        }
    }

    /// A vCPU that something else interrupted looks whether it is to stop, in the very moment in which it is asked to. It stops,
    /// or KVM finds the mark when it enters the guest again; else nothing would stop a guest that halts.
    #[test]
    fn a_request_to_stop_is_not_lost_while_the_vcpu_looks_for_one() {
        let (mut byte, mut lost) = (0, 0);
        let shared = shared(&raw mut byte);
        const ROUNDS: u32 = 50_000;
        // Spinning, since the moment is some nanoseconds long; each waits for the other to have come as far.
        let (looks, asked) = (AtomicU32::new(0), AtomicU32::new(0));
        let wait = |counter: &AtomicU32, round| {
            (0..).take_while(|_| counter.load(Ordering::SeqCst) < round).for_each(|spins: u32| {
                if spins % 1024 == 1023 { std::thread::yield_now() } else { std::hint::spin_loop() }
            });
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    wait(&looks, round);
                    (0..round % 8).for_each(|_| std::hint::spin_loop());
                    shared.ask_to_stop();
                    asked.store(round, Ordering::SeqCst);
                }
            });
            for round in 1..=ROUNDS {
                shared.pause.store(false, Ordering::SeqCst);
                shared.immediate_exit.set(0);
                looks.store(round, Ordering::SeqCst);
                (0..round % 7).for_each(|_| std::hint::spin_loop());
                let stops = shared.pause_wanted();
                wait(&asked, round);
                // SAFETY: `byte` lives to the end of the test, and the other thread waits for the next round.
                let marked = unsafe { AtomicU8::from_ptr(shared.immediate_exit.0) }.load(Ordering::SeqCst) == 1;
                if !stops && !marked {
                    lost += 1;
                }
            }
        });
        assert_eq!(lost, 0);
    }
}
