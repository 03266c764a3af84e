//! A jail is for ever, so each deed is done in a process of its own: this test program, told by a variable to do it in place of its test.

use std::process::{Command, Output};

use super::*;

const DEED: &str = "PERDURE_TEST_DEED";

/// Something that a thread of a role does, and whether it is let.
struct Deed {
    name: &'static str,
    role: Role,
    what: fn(),
    /// The call's number and name, if it is refused.
    refused: Option<&'static str>,
}

const DEEDS: &[Deed] = &[
    Deed { name: "vcpu-makes-socket", role: Role::Vcpu, what: || socket(libc::AF_UNIX), refused: Some("41 (socket;") },
    Deed { name: "device-makes-socket", role: Role::Device, what: || socket(libc::AF_UNIX), refused: None },
    Deed {
        name: "device-goes-online",
        role: Role::Device,
        what: || socket(libc::AF_INET),
        refused: Some("41 (socket;"),
    },
    Deed { name: "vcpu-makes-vm", role: Role::Vcpu, what: || request(0xae01), refused: Some("16 (ioctl;") },
    Deed { name: "vcpu-enters-guest", role: Role::Vcpu, what: || request(0xae80), refused: None },
    Deed { name: "supervisor-makes-vm", role: Role::Supervisor, what: || request(0xae01), refused: None },
    Deed {
        name: "supervisor-types",
        role: Role::Supervisor,
        what: || request(libc::TIOCSTI),
        refused: Some("16 (ioctl;"),
    },
    Deed { name: "supervisor-executes", role: Role::Supervisor, what: execute, refused: Some("59 (execve;") },
    Deed { name: "supervisor-forks", role: Role::Supervisor, what: fork, refused: Some("56 (clone;") },
    Deed {
        name: "supervisor-maps-code",
        role: Role::Supervisor,
        what: || map(libc::PROT_EXEC),
        refused: Some("9 (mmap;"),
    },
    Deed { name: "supervisor-maps-data", role: Role::Supervisor, what: || map(libc::PROT_WRITE), refused: None },
    Deed { name: "supervisor-traces", role: Role::Supervisor, what: trace, refused: Some("101 (ptrace;") },
    Deed { name: "supervisor-kills-other", role: Role::Supervisor, what: || kill(1), refused: Some("62 (kill;") },
    Deed { name: "supervisor-starts-threads", role: Role::Supervisor, what: start_threads, refused: None },
    Deed { name: "control-writes-file", role: Role::Control, what: write_file, refused: Some("257 (openat;") },
    Deed { name: "control-reads-file", role: Role::Control, what: find_no_file, refused: None },
    Deed { name: "device-gives-memory-back", role: Role::Device, what: give_memory_back, refused: None },
    Deed { name: "generations-open", role: Role::Generations, what: open, refused: None },
    Deed { name: "supervisor-has-no-privileges", role: Role::Supervisor, what: look_at_privileges, refused: None },
];

#[test]
fn what_a_role_may_not_do_ends_the_process_and_is_told_by_number_name_and_thread() {
    if let Ok(name) = std::env::var(DEED) {
        let deed = DEEDS.iter().find(|deed| deed.name == name).unwrap();
        prepare(&[]).unwrap();
        spawn("inmate", deed.role, deed.what).unwrap().join().unwrap();
        println!("did it");
        return;
    }
    for deed in DEEDS {
        let output = alone(deed.name);
        match deed.refused {
            Some(call) => assert_refused(deed.name, &output, call),
            None => {
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success() && output.stdout.ends_with(b"did it\n"), "{}: {said}", deed.name);
            }
        }
    }
}

/// Does a deed, in a process of its own.
fn alone(deed: &str) -> Output {
    let (_, module) = module_path!().split_once("::").unwrap();
    let test = "what_a_role_may_not_do_ends_the_process_and_is_told_by_number_name_and_thread";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("{module}::{test}"), "--exact", "--nocapture", "--test-threads=1", "--quiet"]);
    let mut output = command.env(DEED, deed).output().unwrap();
    // What the test program says of itself follows.
    if let Some(end) = output.stdout.windows(7).position(|bytes| bytes == b"did it\n") {
        output.stdout.truncate(end + 7);
    }
    output
}

fn assert_refused(deed: &str, output: &Output, call: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{deed}: {said}");
    let line = said.lines().find(|line| line.contains("the jail refused")).unwrap_or_else(|| panic!("{deed}: {said}"));
    assert!(line.contains(&format!("thread 'inmate' the system call {call}")), "{deed}: {line}");
    assert!(line.contains("report this line; --no-jail"), "{deed}: {line}");
    assert!(!output.stdout.ends_with(b"did it\n"), "{deed}");
}

fn status(line: &str) -> String {
    let task = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    task.lines().find_map(|found| found.strip_prefix(line)).unwrap().trim().to_owned()
}

fn socket(domain: libc::c_int) {
    // SAFETY: makes a descriptor, if anything.
    unsafe { libc::socket(domain, libc::SOCK_STREAM, 0) };
}

fn request(number: libc::c_ulong) {
    // SAFETY: a request of no descriptor: it is refused by the jail, or fails.
    assert_eq!(unsafe { libc::ioctl(-1, number, 0) }, -1);
    assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
}

fn execute() {
    let arguments = [c"/bin/true".as_ptr(), std::ptr::null()];
    // SAFETY: a path and two lists that end with null.
    unsafe { libc::execve(arguments[0], arguments.as_ptr(), arguments[1..].as_ptr()) };
}

fn fork() {
    // SAFETY: a child would do nothing but end.
    if unsafe { libc::fork() } == 0 {
        std::process::abort();
    }
}

fn map(protection: libc::c_int) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a mapping of its own, anywhere.
    unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | protection, flags, -1, 0) };
}

fn trace() {
    // SAFETY: no memory is named.
    unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, 1, 0, 0) };
}

fn kill(process: libc::pid_t) {
    // SAFETY: signal 0 is none.
    unsafe { libc::kill(process, 0) };
}

fn open() {
    drop(std::fs::File::open("/dev/null").unwrap());
}

fn write_file() {
    drop(std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap());
}

fn find_no_file() {
    assert_eq!(std::fs::File::open("/dev/null").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
}

/// Enough of it that the C library makes a thread's own heap smaller (glibc's `shrink_heap`): it looks at `vm.overcommit_memory` first.
fn give_memory_back() {
    let pieces: Vec<Vec<u8>> = (0..100).map(|_| vec![1; 100_000]).collect();
    assert_eq!(std::hint::black_box(&pieces).len(), 100);
}

fn start_threads() {
    std::thread::scope(|scope| scope.spawn(|| assert_eq!(status("Seccomp_filters:"), "2")).join().unwrap());
    let vcpu = spawn("vcpu", Role::Vcpu, || std::thread::sleep(std::time::Duration::from_millis(1)));
    vcpu.unwrap().join().unwrap();
}

fn look_at_privileges() {
    assert_eq!((status("Seccomp:"), status("NoNewPrivs:")), ("2".into(), "1".into()));
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&status(set), 16), Ok(0), "{set}");
    }
    assert!(rustix::thread::set_capabilities(None, all_capabilities()).is_err());
}

fn all_capabilities() -> rustix::thread::CapabilitySets {
    let all = CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE;
    rustix::thread::CapabilitySets { effective: all, permitted: all, inheritable: CapabilitySet::empty() }
}

#[test]
fn without_a_jail_nothing_is_given_up() {
    let look = || (status("Seccomp:"), status("CapEff:"), status("NoNewPrivs:"));
    let before = look();
    assert_eq!(spawn("free", Role::Vcpu, look).unwrap().join().unwrap(), before);
}

#[test]
fn what_the_supervisor_starts_anew_may_no_less_than_at_first() {
    let most = Role::Supervisor.rules().unwrap();
    for role in [Role::Vcpu, Role::Device, Role::Pager, Role::Budget, Role::Generations, Role::Control, Role::HoldUp] {
        for (call, rules) in role.rules().unwrap() {
            let name = numbers::name(i32::try_from(call).unwrap());
            let allowed = most.get(&call).unwrap_or_else(|| panic!("{role:?}: {name}"));
            assert!(
                allowed.is_empty() || !rules.is_empty() && rules.iter().all(|rule| allowed.contains(rule)),
                "{role:?}: {name}"
            );
        }
    }
}

#[test]
fn files_of_others_are_opened_by_root_alone_and_by_one_capability() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(capabilities::needed(&[directory.path().to_owned()]), CapabilitySet::empty());
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(directory.path(), Some(12_345), None).unwrap();
        assert_eq!(capabilities::needed(&[directory.path().to_owned()]), CapabilitySet::DAC_OVERRIDE);
    }
}

#[test]
fn this_system_has_what_a_jail_takes() {
    available().unwrap();
}
