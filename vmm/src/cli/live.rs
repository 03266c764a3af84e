//! What `run` and `resume` share: a VM's life in this process, or in one of its own.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use std::time::{Duration, Instant};

use allocator::Pool;
use anyhow::Context as _;

use super::output::say;
use super::{EXIT_FROZEN, Environment};
use crate::machine::config::{SerialTarget, VmConfig};
use crate::machine::jail;
use crate::persistence::regions::{RegionsError, VmRegions};
use crate::supervisor::control::ControlClient;
use crate::supervisor::launch::{self, InteractiveEnd, LaunchError, LeaveTerminal, Report, Reporter, Role};
use crate::supervisor::terminal::Keyboard;
use crate::supervisor::{Ended, Supervisor};

/// How long a passing holder of a VM's regions is waited for.
const HOLDER_PATIENCE: Duration = Duration::from_millis(500);

/// Where a VM's log goes if it is detached.
fn log_path(environment: &Environment, name: &str) -> std::path::PathBuf {
    environment.pool.join("run").join(format!("{name}.log"))
}

/// Leases a VM's regions, to use it. Who only looks (`list`, `inspect`), or is just making it, or is just ending, holds
/// them for moments: such a holder is waited for, unless it answers as a VM's process does.
pub(super) fn hold(pool: &Pool, name: &str) -> Result<VmRegions, RegionsError> {
    let start = Instant::now();
    loop {
        let passing = match VmRegions::open(pool, name) {
            Err(RegionsError::InUse { name, .. }) => ControlClient::connect(pool.dir(), &name).is_err(),
            Err(RegionsError::Unfinished(_)) => true,
            done => return done,
        };
        if !passing || start.elapsed() > HOLDER_PATIENCE {
            return VmRegions::open(pool, name);
        }
        std::thread::sleep(Duration::from_millis(5));
        // Who makes it adds regions.
        pool.refresh()?;
    }
}

/// Starts the VM in a process of its own where that is asked for, or where the terminal wants it. `None`: this process
/// is to live it.
pub(super) fn elsewhere(
    environment: &Environment,
    name: &str,
    detach: bool,
    serial: &SerialTarget,
) -> anyhow::Result<Option<ExitCode>> {
    if Role::of_this_process() != Role::First {
        return Ok(None);
    }
    if detach {
        let (name, _) = match launch::detached(name, &log_path(environment, name)) {
            Err(LaunchError::Failed { why, code }) => {
                eprintln!("perdure: {why}");
                return Ok(Some(ExitCode::from(code)));
            }
            other => other?,
        };
        say!("{name}");
        return Ok(Some(ExitCode::SUCCESS));
    }
    let on_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if !(on_terminal && *serial == SerialTarget::Stdio) {
        return Ok(None);
    }
    eprintln!("perdure: {name} has this terminal; Ctrl-] leaves it running");
    match launch::interactive(name)? {
        InteractiveEnd::Exited(code) => Ok(Some(ExitCode::from(code))),
        InteractiveEnd::Left => {
            eprintln!("\nperdure: {name} runs on; `perdure console {name}` comes back to it");
            Ok(Some(ExitCode::SUCCESS))
        }
    }
}

/// Whether a VM's process goes to jail.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct JailArgs {
    /// Leave the VM's process all its privileges, for debugging: no seccomp filters, capabilities stay
    #[arg(long)]
    no_jail: bool,
}

impl JailArgs {
    /// Prepares the jail of this process, if it is to have one: for a VM made of `config`.
    fn prepare(self, pool: &Pool, config: &VmConfig) -> anyhow::Result<()> {
        if self.no_jail {
            return Ok(());
        }
        let files: Vec<_> = config.files().chain([pool.dir()]).map(Path::to_owned).collect();
        Ok(jail::prepare(&files)?)
    }
}

/// Lives a VM's life to its end in this process. `begin` starts it with the keyboard that fits.
pub(super) fn here(
    jail: JailArgs,
    (pool, config): (&Pool, &VmConfig),
    begin: impl FnOnce(Keyboard) -> anyhow::Result<Supervisor>,
    after: impl FnOnce(&Ended),
) -> anyhow::Result<ExitCode> {
    let mut reporter = None;
    let keyboard = match Role::of_this_process() {
        Role::First => Keyboard::stdin(None),
        Role::Interactive(fd) => Keyboard::stdin(Some(Box::new(LeaveTerminal(open(fd)?)))),
        Role::Detached(fd) => {
            reporter = Some(open(fd)?);
            launch::abandon_terminal().context("cannot leave the terminal")?;
            Keyboard::none()
        }
    };
    jail.prepare(pool, config)?;
    let mut supervisor = begin(keyboard)?;
    if let Some(mut reporter) = reporter.take() {
        reporter.report(&Report::Ready { name: supervisor.name().to_owned(), pid: std::process::id() });
    }
    let ended = supervisor.serve()?;
    let code = tell(supervisor.name(), &ended);
    supervisor.close(matches!(ended, Ended::Frozen(_)));
    after(&ended);
    Ok(code)
}

/// Tells the process that started this one why there is no VM. It hears only what comes before "ready".
pub(super) fn report_failure(why: String, code: u8) {
    if let Role::Detached(fd) = Role::of_this_process()
        && let Ok(mut reporter) = Reporter::open(fd)
    {
        reporter.report(&Report::Failed { why, code });
    }
}

fn open(fd: i32) -> anyhow::Result<Reporter> {
    Reporter::open(fd).context("cannot report to the process that started this one")
}

fn tell(name: &str, ended: &Ended) -> ExitCode {
    match ended {
        Ended::PoweredOff | Ended::Stopped | Ended::DebugExit(0) => ExitCode::SUCCESS,
        Ended::DebugExit(code) => {
            eprintln!("perdure: {name}: the guest ended itself with code {code}");
            ExitCode::FAILURE
        }
        Ended::Failed(failure) => {
            eprintln!("perdure: {name}: {failure}");
            ExitCode::FAILURE
        }
        Ended::MemoryLost(why) => {
            eprintln!("perdure: {name} was stopped: {why}; `perdure resume {name}` takes a generation that is whole");
            ExitCode::FAILURE
        }
        Ended::Frozen(report) => {
            let milliseconds = report.total_ns as f64 / 1e6;
            eprintln!(
                "perdure: {name}: frozen in {milliseconds:.2} ms (context {}); continue with `perdure resume {name}`",
                report.sequence,
            );
            ExitCode::from(EXIT_FROZEN)
        }
    }
}
