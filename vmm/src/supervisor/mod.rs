//! One process, one VM: runs its life from its first instruction, or from where an outage left it, to its end.
//!
//! ```text
//!   vCPU threads ──► MachineEvent ─┐
//!   SIGPWR, SIGTERM, … ────────────┤                    ┌─► freeze ─► Frozen ─► (hold-up passes) ─► end
//!   control socket ────────────────┼──► serve(): poll ──┤
//!   terminal input ────────────────┘                    └─► the guest ends, or fails ─► end
//! ```
//!
//! The thread that calls [`Supervisor::serve`] makes every decision; the others only bring it news. It never waits for
//! a reader of output or for a client.

pub mod console;
pub mod control;
mod error;
pub mod generations;
mod inboxes;
pub mod launch;
mod measured;
mod memory_news;
mod outage;
pub mod power;
mod ram_budget;
mod status;
pub mod terminal;
mod wake;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use allocator::Pool;
use devices::MachineRequest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vfs::cut::point::{Point, pass};

use console::Console;
use control::{ControlServer, Pending, Request, Response, socket_path};
pub use error::SupervisorError;
use generations::{Generations, Order, Teller};
use inboxes::Inboxes;
use power::PowerSignals;
use ram_budget::{Place, RamBudget};
use terminal::Keyboard;
use wake::Wake;

use crate::machine::config::{ByteSize, ConsoleDevice};
use crate::machine::jail::{self, Role};
use crate::machine::kvm::{Host, VcpuFailure};
use crate::machine::{Machine, MachineEvent, Wiring};
use crate::persistence::capture::CaptureError;
use crate::persistence::context::ConsoleStateV1;
use crate::persistence::freeze::{DEVICES_REST, FreezeReport, Output, Surroundings, Vcpus};
use crate::persistence::lifecycle::{Event, State};
use crate::persistence::regions::VmRegions;
use crate::persistence::restoring::{self, Paging};
use crate::persistence::resume::{self};

/// While input waits for the guest to take it, how often it is offered.
const OFFER_EVERY: Duration = Duration::from_millis(5);

/// How a VM's life in this process ended.
#[derive(Debug)]
pub enum Ended {
    /// The guest turned itself off.
    PoweredOff,
    /// `perdure stop`.
    Stopped,
    /// The guest wrote this code to the debug-exit port.
    DebugExit(u8),
    /// A power-fail signal came, and everything is durable.
    Frozen(FreezeReport),
    /// A vCPU could not go on.
    Failed(VcpuFailure),
    /// Memory that the guest asked for cannot be had from the generation that it is restored from: why, and which page.
    MemoryLost(String),
}

/// A VM's process.
pub struct Supervisor {
    name: String,
    pool: PathBuf,
    state: State,
    started: Instant,
    /// Left before the memory goes.
    ram_budget: Option<RamBudget>,
    // Its thread before the machine, the machine before the regions that its memory lies in: fields drop in order.
    generations: Generations,
    machine: Machine,
    regions: VmRegions,
    console: Console,
    keyboard: Keyboard,
    power: PowerSignals,
    power_back: Arc<AtomicBool>,
    /// The request that called a freeze off is still to be answered.
    called_off: bool,
    /// A user paused it.
    paused: bool,
    /// Its guest waits for room in the swap region.
    swap_full: bool,
    inboxes: Inboxes,
    control: Option<ControlServer>,
}

/// How the VM is to begin.
enum Beginning {
    Boot,
    Resume { prefetch: bool },
}

impl Supervisor {
    /// Boots a VM from its kernel. Its vCPUs run when this returns.
    ///
    /// # Errors
    /// [`SupervisorError`].
    pub fn boot(pool: &Pool, regions: VmRegions, keyboard: Keyboard) -> Result<Self, SupervisorError> {
        Self::begin(pool, regions, keyboard, &Beginning::Boot)
    }

    /// Continues a frozen VM at its next instruction. Its vCPUs run when this returns. Where its memory is still being restored,
    /// `prefetch` says whether more of it is fetched than the guest asks for.
    ///
    /// # Errors
    /// [`SupervisorError::Resume`] and others; nothing was altered then.
    pub fn resume(
        pool: &Pool,
        regions: VmRegions,
        keyboard: Keyboard,
        prefetch: bool,
    ) -> Result<Self, SupervisorError> {
        Self::begin(pool, regions, keyboard, &Beginning::Resume { prefetch })
    }

    fn begin(
        pool: &Pool,
        mut regions: VmRegions,
        keyboard: Keyboard,
        beginning: &Beginning,
    ) -> Result<Self, SupervisorError> {
        let system = |doing| move |source| SupervisorError::System { doing, source };
        let power = PowerSignals::catch().map_err(system("catch power-fail signals"))?;
        // Before anything is altered: there may be no RAM for it.
        let place = Place::take(pool, &regions)?;
        regions.prepare_holdup(pool)?;
        let pool = pool.dir().to_owned();
        let inboxes = Inboxes::new().map_err(system("make an event descriptor"))?;
        let resumes = matches!(beginning, Beginning::Resume { .. });
        let console = Console::open(regions.config(), keyboard.has_terminal(), &inboxes.wake, resumes)?;
        let wiring = inboxes.wiring(&console)?;
        regions.tell_of_paging(inboxes.of_paging());
        let (machine, state) = match beginning {
            Beginning::Boot => (boot(&pool, &mut regions, wiring)?, State::Created.after(Event::Start)),
            Beginning::Resume { prefetch } => {
                let surroundings = Around(&console);
                let paging = Paging { pool: &pool, prefetch: *prefetch, events: inboxes.of_memory() };
                let machine = resume::resume(&mut regions, wiring, &paging, |bytes| surroundings.0.restore(bytes))?;
                (machine, State::Resuming.after(Event::Restored))
            }
        };
        let name = regions.name().to_owned();
        let state = state.unwrap_or(State::Running);
        let mut generations = Generations::new(pool.clone(), &name, regions.config(), Arc::clone(&inboxes.wake));
        if let Some(restoring) = regions.restore_under_way() {
            // Before it runs: what it changes from now on is what the next generation has to look at.
            generations.build_on(restoring.generation(), restoring.changed_before(), &machine)?;
        }
        begin_holdup(&mut regions, &machine, resumes)?;
        if let Err(error) = regions.record_config() {
            tracing::warn!("{name}: what it is made of now is not written down until it is frozen: {}", Chain(&error));
        }
        let ram_budget = place.begin(regions.pager()).map_err(system("start the thread of the budget of RAM"))?;
        pass(Point::ResumeRun);
        // Its threads are in jail.
        machine.run()?;
        // This one follows beside the guest, which does not wait for it: before anything is taken from the guest, or from a client.
        jail::enter(Role::Supervisor);
        let mut supervisor = Self {
            name,
            pool,
            state,
            started: Instant::now(),
            ram_budget: Some(ram_budget),
            generations,
            machine,
            regions,
            console,
            keyboard,
            power,
            power_back: Arc::new(AtomicBool::new(false)),
            called_off: false,
            paused: false,
            swap_full: false,
            inboxes,
            control: None,
        };
        // After the vCPUs run: nobody who asks is kept from being answered, and the guest does not wait for it.
        supervisor.open_control_socket()?;
        Ok(supervisor)
    }

    fn open_control_socket(&mut self) -> Result<(), SupervisorError> {
        let Some(sender) = self.inboxes.control_sender.take() else { return Ok(()) };
        let path = socket_path(&self.pool, &self.name);
        let (wake, power_back) = (Arc::clone(&self.inboxes.wake), Arc::clone(&self.power_back));
        let notify = move |request: &Request| {
            // At once, and not when the supervisor looks: it may be in the middle of the freeze that this calls off.
            if *request == Request::PowerBack {
                power_back.store(true, Ordering::SeqCst);
            }
            wake.ring();
        };
        self.control = Some(ControlServer::start(path, self.console.clone(), sender, notify)?);
        Ok(())
    }

    /// Ends the VM's process as far as others see it. `quickly`: what the system takes back by itself when the process
    /// ends is left to it (unmapping gigabytes takes tenths of a second).
    pub fn close(mut self, quickly: bool) {
        drop(self.control.take());
        drop(self.ram_budget.take());
        if quickly {
            std::mem::forget(self);
        }
    }

    /// The power came back after [`Ended::Frozen`]: the VM runs on, and can be served again.
    ///
    /// # Errors
    /// [`SupervisorError::Thaw`].
    pub fn power_back(&mut self) -> Result<(), SupervisorError> {
        self.thaw(Event::PowerBack)
    }

    /// How many values the guest has reported through its report port.
    #[must_use]
    pub fn reports(&self) -> u64 {
        self.machine.devices().report().count()
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lives the VM's life to its end in this process.
    ///
    /// # Errors
    /// [`SupervisorError`].
    pub fn serve(&mut self) -> Result<Ended, SupervisorError> {
        loop {
            if let Some(ended) = self.take_news()? {
                return Ok(ended);
            }
            self.wait()?;
        }
    }

    /// Handles everything that has come in.
    fn take_news(&mut self) -> Result<Option<Ended>, SupervisorError> {
        self.inboxes.wake.hush();
        while let Ok(event) = self.inboxes.memory.try_recv() {
            if let Some(ended) = self.on_memory(event)? {
                return Ok(Some(ended));
            }
        }
        while let Ok(event) = self.inboxes.machine.try_recv() {
            if let Some(ended) = self.on_machine(event)? {
                return Ok(Some(ended));
            }
        }
        if self.power.take()
            && let Some(ended) = self.on_power_fail(None, None)?
        {
            return Ok(Some(ended));
        }
        while let Ok(pending) = self.inboxes.control.try_recv() {
            if let Some(ended) = self.on_request(pending)? {
                return Ok(Some(ended));
            }
        }
        self.generations.tick(&self.machine, self.paused);
        let (around, vcpus) = (Around(&self.console), self.vcpus());
        self.generations.take_news(&self.machine, &self.regions, &around, vcpus)?;
        Ok(None)
    }

    /// What is to become of the vCPUs when the machine was held and is let go.
    fn vcpus(&self) -> Vcpus {
        if self.paused { Vcpus::Stay } else { Vcpus::Run }
    }

    fn on_machine(&mut self, event: MachineEvent) -> Result<Option<Ended>, SupervisorError> {
        let ended = match event {
            MachineEvent::Request(MachineRequest::Reset) => {
                self.reboot()?;
                return Ok(None);
            }
            MachineEvent::Request(MachineRequest::PowerOff) => Ended::PoweredOff,
            MachineEvent::Request(MachineRequest::DebugExit(code)) => Ended::DebugExit(code),
            MachineEvent::Failed(failure) => Ended::Failed(failure),
        };
        self.end(ended).map(Some)
    }

    /// Writes down how the guest ended; the VM can be started anew then.
    fn end(&mut self, ended: Ended) -> Result<Ended, SupervisorError> {
        self.console.set_hurry(true);
        self.machine.pause()?;
        self.generations.finish();
        self.drain_output();
        let how = match &ended {
            Ended::PoweredOff => "the guest powered off".to_owned(),
            Ended::Stopped => "stopped by perdure stop".to_owned(),
            Ended::DebugExit(code) => format!("the guest ended itself with code {code}"),
            Ended::Failed(failure) => failure.to_string(),
            // Memory that is not whole is nobody's end: it counts as cut off, and a resume finds a generation that is whole.
            Ended::Frozen(_) | Ended::MemoryLost(_) => return Ok(ended),
        };
        self.let_go_of_generation();
        self.regions.write_ended(how)?;
        Ok(ended)
    }

    /// Gives what the guest wrote last a moment to reach a slow reader.
    fn drain_output(&self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.console.drain() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The guest asked for a reset: a fresh machine over the same memory boots its kernel.
    fn reboot(&mut self) -> Result<(), SupervisorError> {
        tracing::info!("{}: the guest asked for a reset", self.name);
        self.machine.pause()?;
        // What its disks still read would come into the memory of the kernel that follows.
        self.machine.quiesce_devices(Instant::now() + DEVICES_REST)?;
        // A kernel is loaded to any place.
        self.machine.ram().bring_in().map_err(CaptureError::Memory)?;
        let wiring = self.inboxes.wiring(&self.console)?;
        let mut machine = self.regions.assemble(Host::open()?, wiring)?;
        machine.boot()?;
        self.generations.machine_changes(&self.machine, &machine)?;
        self.regions.machine_changes(&machine)?;
        machine.run()?;
        self.machine = machine;
        Ok(())
    }

    fn on_request(&mut self, Pending { request, reply }: Pending) -> Result<Option<Ended>, SupervisorError> {
        let mut ended = None;
        let response = match request {
            Request::Status => Response::Status(Box::new(self.status())),
            Request::PowerFail { holdup_ns } => {
                ended = self.on_power_fail(holdup_ns.map(Duration::from_nanos), Some(&reply))?;
                // It was answered when everything was durable, or refused.
                return Ok(ended);
            }
            Request::PowerBack if std::mem::take(&mut self.called_off) => Response::Done,
            Request::PowerBack => Response::Refused { why: format!("the VM is {}: the power is not out", self.state) },
            Request::Snapshot { label, protect } => {
                let origin = snapshot::Origin::Manual;
                self.generations.order(Order { label, protect, origin, teller: Teller::Client(reply) }, &self.machine);
                // It is answered when it is durable.
                return Ok(None);
            }
            Request::Pause => self.set_paused(true)?,
            Request::Unpause => self.set_paused(false)?,
            Request::Balloon { bytes } => self.set_balloon(bytes),
            Request::PressPowerButton if self.machine.press_power_button()? => Response::Done,
            Request::PressPowerButton => Response::Refused { why: "nobody listens to its power button".to_owned() },
            Request::Stop => {
                ended = Some(self.end(Ended::Stopped)?);
                Response::Done
            }
            Request::Console => Response::Done,
        };
        reply.send(&response);
        Ok(ended)
    }

    fn set_balloon(&self, bytes: u64) -> Response {
        let refused = |why| Response::Refused { why };
        let Some(balloon) = self.machine.balloon() else {
            return refused("the VM has no memory balloon: `run --balloon` gives it one".to_owned());
        };
        let memory = self.machine.config().memory;
        if bytes > memory.0 {
            return refused(format!("a balloon of {} does not fit in {memory} of memory", ByteSize(bytes)));
        }
        match balloon.set_target(bytes) {
            Ok(()) => Response::Done,
            Err(error) => refused(format!("the guest cannot be told: {error}")),
        }
    }

    /// Stops the vCPUs at a user's wish, or lets them run on. Twice is once.
    fn set_paused(&mut self, paused: bool) -> Result<Response, SupervisorError> {
        if self.paused == paused {
            return Ok(Response::Done);
        }
        if paused {
            self.console.set_hurry(true);
            self.machine.pause()?;
            self.console.set_hurry(false);
            if self.machine.has_ended() {
                // Its end is among the news, and is next.
                return Ok(Response::Refused { why: "the guest has just ended".to_owned() });
            }
        } else {
            self.machine.notify_paused()?;
            self.machine.run()?;
        }
        self.paused = paused;
        Ok(Response::Done)
    }

    /// Waits for news.
    fn wait(&mut self) -> Result<(), SupervisorError> {
        let output_waits = self.console.drain();
        self.keyboard.retry(&self.console);
        let input_waits = match self.machine.config().console {
            ConsoleDevice::Serial => self.console.offer_input(|bytes| self.machine.devices().receive_serial(bytes)),
            // Its device takes what there is.
            ConsoleDevice::Virtio => self.console.is_input_full(),
        };
        let offer = (input_waits || output_waits).then_some(OFFER_EVERY);
        let timeout = offer.into_iter().chain(self.generations.due_in()).min();
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.inboxes.wake.descriptor(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.power.descriptor(), PollFlags::IN),
        ];
        let typed_in = if input_waits { None } else { self.keyboard.descriptor() };
        fds.extend(typed_in.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SupervisorError::System { doing: "wait for news", source: error.into() }),
        }
        let keys = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        if keys {
            self.keyboard.read(&self.console);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").field("name", &self.name).field("state", &self.state).finish_non_exhaustive()
    }
}

/// What is dirty is kept within the hold-up from now on. A VM that goes on from where it was frozen is not given up for want of that.
fn begin_holdup(regions: &mut VmRegions, machine: &Machine, resumes: bool) -> Result<(), SupervisorError> {
    match regions.begin_holdup(machine, !resumes) {
        Err(error) if resumes => {
            tracing::error!("{}: it goes on without a bound on what is dirty: {}", regions.name(), Chain(&error));
            Ok(())
        }
        Err(error) => {
            regions.revert_config();
            regions.write_ended(format!("it could not be started: {}", Chain(&error)))?;
            Err(error.into())
        }
        Ok(()) => Ok(()),
    }
}

/// A machine that has its kernel loaded. If that fails the VM counts as ended, not as cut off.
fn boot(pool: &Path, regions: &mut VmRegions, wiring: Wiring) -> Result<Machine, SupervisorError> {
    let host = Host::open()?;
    let before = regions.context().standing.restoring().filter(|restoring| restoring.unprotect).cloned();
    regions.prepare_to_boot()?;
    if let Some(Ok(id)) = before.map(|restoring| restoring.generation.parse()) {
        restoring::let_go(pool, regions.name(), regions.config(), &id);
    }
    let booted = regions.assemble(host, wiring).map_err(SupervisorError::from).and_then(|mut machine| {
        machine.boot()?;
        Ok(machine)
    });
    if let Err(error) = &booted {
        regions.revert_config();
        regions.write_ended(format!("it could not be started: {}", Chain(error)))?;
    }
    booted
}

/// The console as a freeze sees it.
struct Around<'a>(&'a Console);

impl Surroundings for Around<'_> {
    fn hurry(&self, hurry: bool) {
        self.0.set_hurry(hurry);
    }

    fn quiesce(&self, output: Output) -> Result<(), String> {
        let _ = self.0.drain();
        match output {
            Output::Durable => self.0.persist().map_err(|error| Chain(&error).to_string()),
            Output::Handed => Ok(()),
        }
    }

    fn save(&self) -> ConsoleStateV1 {
        self.0.save()
    }
}

/// An error with its causes, in one line.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
