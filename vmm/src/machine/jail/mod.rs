//! The jail: what each thread of a VM's process may still ask of the system once it is set up.
//!
//! ```text
//!   prepare()        no new privileges; SIGSYS caught; clone3 hidden, so that the flags of a new thread can be seen
//!      │
//!   spawn(role, …) ─► enter(role)   each thread first: its capabilities go, its filter comes
//!      │
//!   enter(Supervisor)               the first thread, when the machine is put together, before it takes anything from guest or client
//! ```
//!
//! A filter is a list of what is allowed ([`roles`]). Anything else ends the process, and says which call it was ([`report`]): the guest's
//! memory is then as after a kill. Filters and the loss of capabilities are inherited and never taken back, and a further filter can
//! only forbid more; so what a thread starts may do at most what that thread may, and the supervisor, which puts a new machine together
//! when a guest reboots, has the longest list.
//!
//! What this does not protect from: the threads share their memory, so who takes over one of them can reach what any of them may; and
//! file names are not looked at. A process that has not called [`prepare`] has no jail, and [`enter`] does nothing there.

mod capabilities;
mod numbers;
mod report;
mod roles;

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use rustix::thread::CapabilitySet;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use capabilities::give_up;
pub use roles::Role;

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A filter that cannot be made.
    #[error("cannot make a seccomp filter (--no-jail runs without)")]
    Compile(#[from] seccompiler::BackendError),
    /// A filter that the system does not take.
    #[error("cannot install a seccomp filter (--no-jail runs without; see `perdure doctor`)")]
    Install(#[from] seccompiler::Error),
    /// The handler.
    #[error("cannot catch the signal of a refused system call (--no-jail runs without)")]
    Catch(#[source] io::Error),
    /// Capabilities.
    #[error("cannot give up capabilities (--no-jail runs without)")]
    Capabilities(#[source] io::Error),
}

/// What threads keep when they enter.
#[derive(Debug)]
struct Jail {
    capabilities: CapabilitySet,
}

static JAIL: OnceLock<Jail> = OnceLock::new();

/// The threads of this process go to jail from now on: those that are started by [`spawn`] at once, and each when it calls [`enter`]. `files`
/// are those that the process opens later by their names; root keeps the one capability that it needs where they are not its own.
///
/// # Errors
/// [`JailError`]: this system has no seccomp filters, most likely.
pub fn prepare(files: &[PathBuf]) -> Result<(), JailError> {
    let jail = Jail { capabilities: capabilities::needed(files) };
    report::catch().map_err(JailError::Catch)?;
    // Also sets "no new privileges", as the system wants it.
    apply_filter(&hide_clone3()?)?;
    if JAIL.set(jail).is_ok() {
        allocator::threads::at_beginning(|| enter(Role::Pager));
    }
    Ok(())
}

/// The calling thread is in jail when this returns; nothing if there is none. A thread that cannot be put there must not go on, and the
/// process ends.
pub fn enter(role: Role) {
    let Some(jail) = JAIL.get() else { return };
    if let Err(error) = enter_as(jail, role) {
        eprintln!(
            "perdure: {error}: {}",
            std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default()
        );
        std::process::exit(1);
    }
}

fn enter_as(jail: &Jail, role: Role) -> Result<(), JailError> {
    give_up(jail.capabilities).map_err(JailError::Capabilities)?;
    if !role.has_files() {
        apply_filter(&hide_files()?)?;
    }
    Ok(apply_filter(&compile(role)?)?)
}

/// Starts a thread that enters the jail before it does anything else.
///
/// # Errors
/// As the system says.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    role: Role,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let jailed = move || {
        enter(role);
        body()
    };
    std::thread::Builder::new().name(name.into()).spawn(jailed)
}

fn compile(role: Role) -> Result<BpfProgram, JailError> {
    let filter = SeccompFilter::new(role.rules()?, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// `clone3` has its flags in memory, where a filter cannot see them. Where it is not there the C library takes `clone`.
fn hide_clone3() -> Result<BpfProgram, JailError> {
    answered(libc::SYS_clone3, Vec::new(), libc::ENOSYS)
}

/// For a thread that has no business with them files are not there to be read: the C library looks for one, and must not end the process.
fn hide_files() -> Result<BpfProgram, JailError> {
    let reading = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, roles::READING)?;
    answered(libc::SYS_openat, vec![SeccompRule::new(vec![reading])?], libc::EACCES)
}

/// A filter with which `call` fails with `errno`: always, or where one of `rules` holds.
pub(super) fn answered(call: i64, rules: Vec<SeccompRule>, errno: i32) -> Result<BpfProgram, JailError> {
    let failing = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new([(call, rules)].into(), SeccompAction::Allow, failing, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Whether this system has what a jail takes (Linux 4.14 tells); why not otherwise.
///
/// # Errors
/// As the system says.
pub fn available() -> io::Result<()> {
    for action in [libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_ERRNO] {
        // SAFETY: SECCOMP_GET_ACTION_AVAIL reads the 4 bytes of `action`, and changes nothing.
        let found = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
        if found != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
