//! What each kind of thread may ask of the system, beside nothing.

use std::collections::BTreeMap;

use libc::{
    AF_UNIX, CLONE_THREAD, CLONE_VM, PR_GET_NAME, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PROT_EXEC, SYS_accept4, SYS_bind,
    SYS_brk, SYS_capget, SYS_capset, SYS_chmod, SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone,
    SYS_clone3, SYS_close, SYS_connect, SYS_dup, SYS_dup2, SYS_dup3, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fadvise64, SYS_fallocate, SYS_fcntl, SYS_fdatasync,
    SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getdents64, SYS_getpid, SYS_getrandom,
    SYS_getsockopt, SYS_gettid, SYS_io_destroy, SYS_io_getevents, SYS_io_setup, SYS_io_submit, SYS_io_uring_enter,
    SYS_io_uring_register, SYS_io_uring_setup, SYS_ioctl, SYS_kill, SYS_listen, SYS_lseek, SYS_lstat, SYS_madvise,
    SYS_memfd_create, SYS_mkdir, SYS_mkdirat, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_msync, SYS_munmap, SYS_nanosleep,
    SYS_newfstatat, SYS_open, SYS_openat, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2,
    SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlink, SYS_readlinkat, SYS_readv, SYS_recvfrom,
    SYS_rename, SYS_renameat, SYS_renameat2, SYS_restart_syscall, SYS_rmdir, SYS_rseq, SYS_rt_sigaction,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_yield, SYS_seccomp,
    SYS_sendto, SYS_set_robust_list, SYS_setpriority, SYS_setsid, SYS_setsockopt, SYS_shutdown, SYS_sigaltstack,
    SYS_socket, SYS_stat, SYS_statfs, SYS_statx, SYS_sync_file_range, SYS_tgkill, SYS_timer_create, SYS_timer_delete,
    SYS_timer_settime, SYS_unlink, SYS_unlinkat, SYS_userfaultfd, SYS_write, SYS_writev,
};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::super::kvm::requests;
use super::numbers;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU, and the devices that it accesses.
    Vcpu,
    /// Serves a device, or does its I/O.
    Device,
    /// Makes a region durable.
    Flush,
    /// Brings a guest's memory, and takes it away.
    Pager,
    /// Reports what RAM the VM needs.
    Budget,
    /// Stores generations.
    Generations,
    /// Answers on the control socket; its consoles too.
    Control,
    /// Waits for the end of a hold-up.
    HoldUp,
    /// Decides everything, and puts a new machine together when the guest reboots.
    Supervisor,
}

/// What an argument must be.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// Argument number .0 is .1.
    Is(u8, u64),
    /// Argument number .0 is no address.
    Null(u8),
    /// Of argument number .0, the bits of .1 are those of .2.
    Bits(u8, u64, u64),
    /// Argument number .0 is this process.
    Own(u8),
}

use When::{Always, Bits, Is, Null, Own};

type Calls = &'static [(libc::c_long, When)];

/// What the C library and Rust's own do anywhere: memory that is not executed, locks, signals, time, the start and the end of a thread.
const RUNTIME: Calls = &[
    (SYS_brk, Always),
    (SYS_clock_getres, Always),
    (SYS_clock_gettime, Always),
    (SYS_clock_nanosleep, Always),
    (SYS_close, Always),
    (SYS_exit, Always),
    (SYS_exit_group, Always),
    (SYS_futex, Always),
    (SYS_getpid, Always),
    (SYS_getrandom, Always),
    (SYS_gettid, Always),
    // It may end itself: darkness, and cuts that are simulated.
    (SYS_kill, Own(0)),
    (SYS_madvise, Always),
    (SYS_mmap, Bits(2, PROT_EXEC as u64, 0)),
    (SYS_mprotect, Bits(2, PROT_EXEC as u64, 0)),
    (SYS_mremap, Always),
    (SYS_munmap, Always),
    (SYS_nanosleep, Always),
    // rustix looks for the vDSO so when it first asks for the time.
    (SYS_prctl, Is(0, PR_GET_AUXV)),
    (SYS_prctl, Is(0, PR_GET_NAME as u64)),
    (SYS_prctl, Is(0, PR_SET_NAME as u64)),
    (SYS_read, Always),
    (SYS_restart_syscall, Always),
    (SYS_rseq, Always),
    (SYS_rt_sigaction, Always),
    (SYS_rt_sigprocmask, Always),
    (SYS_rt_sigreturn, Always),
    (SYS_sched_getaffinity, Always),
    (SYS_sched_yield, Always),
    (SYS_set_robust_list, Always),
    (SYS_sigaltstack, Always),
    (SYS_tgkill, Own(0)),
    (SYS_write, Always),
];

/// Where no files are opened: what the C library wants to read of the system before it gives back a thread's memory for the first time
/// (`check_may_shrink_heap`), and does without. See `hide_files`; anything else than reading is refused.
const NO_FILES: Calls = &[(SYS_openat, Is(2, READING))];

/// What a file is opened with to be read.
pub(super) const READING: u64 = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;

/// Starting a thread: one of this process, never another process.
const THREADS: Calls = &[
    // Not there: see `hide_clone3`. Here it must not be a refusal, which would go before that.
    (SYS_clone3, Always),
    (SYS_clone, Bits(0, (CLONE_VM | CLONE_THREAD) as u64, (CLONE_VM | CLONE_THREAD) as u64)),
    // The new thread enters its own role: it gives up more, and cannot get back anything.
    (SYS_capget, Always),
    (SYS_capset, Always),
    (SYS_prctl, Is(0, PR_SET_NO_NEW_PRIVS as u64)),
    (SYS_seccomp, Is(0, libc::SECCOMP_SET_MODE_FILTER as u64)),
];

/// Waiting for, and passing on, what comes through descriptors that are open.
const STREAMS: Calls = &[
    (SYS_epoll_ctl, Always),
    (SYS_epoll_pwait, Always),
    (SYS_epoll_wait, Always),
    (SYS_fcntl, Is(1, libc::F_DUPFD_CLOEXEC as u64)),
    (SYS_fcntl, Is(1, libc::F_GETFD as u64)),
    (SYS_fcntl, Is(1, libc::F_GETFL as u64)),
    (SYS_fcntl, Is(1, libc::F_SETFD as u64)),
    (SYS_fcntl, Is(1, libc::F_SETFL as u64)),
    (SYS_fstat, Always),
    (SYS_ioctl, Is(1, libc::FIONBIO)),
    (SYS_poll, Always),
    (SYS_ppoll, Always),
    (SYS_readv, Always),
    (SYS_recvfrom, Always),
    // To whom the socket is connected, and nobody else.
    (SYS_sendto, Null(4)),
    (SYS_shutdown, Always),
    (SYS_writev, Always),
];

/// Reading and writing files that are open.
const OPEN_FILES: Calls = &[
    (numbers::CACHESTAT, Always),
    (SYS_fadvise64, Always),
    (SYS_fallocate, Always),
    (SYS_fdatasync, Always),
    (SYS_fsync, Always),
    (SYS_lseek, Always),
    (SYS_msync, Always),
    (SYS_pread64, Always),
    (SYS_preadv, Always),
    (SYS_preadv2, Always),
    (SYS_pwrite64, Always),
    (SYS_pwritev, Always),
    (SYS_pwritev2, Always),
    (SYS_sync_file_range, Always),
    // Of fstat's kind: rustix and Rust's own library ask so about what is open, too.
    (SYS_newfstatat, Always),
    (SYS_statx, Always),
];

/// A device's own: its rings with the kernel are set up already, and allow what a disk does; a tap's offloads change with the guest's driver, a
/// console's size with its terminal.
const DEVICE: Calls =
    &[(SYS_io_uring_enter, Always), (SYS_ioctl, Is(1, TUNSETOFFLOAD)), (SYS_ioctl, Is(1, libc::TIOCGWINSZ))];

/// Sockets of this host's programs.
const SOCKETS: Calls = &[
    (SYS_accept4, Always),
    (SYS_connect, Always),
    (SYS_getsockopt, Always),
    (SYS_setsockopt, Always),
    (SYS_socket, Is(0, AF_UNIX as u64)),
];

/// Many reads and writes at a time (`io_submit`).
const BATCHES: Calls =
    &[(SYS_io_destroy, Always), (SYS_io_getevents, Always), (SYS_io_setup, Always), (SYS_io_submit, Always)];

/// Memory that is not there yet, of a guest that is restored while it runs or has less RAM than memory: who needs it brings it.
const FAULTS: Calls = &[
    (SYS_ioctl, Is(1, UFFDIO_CONTINUE)),
    (SYS_ioctl, Is(1, UFFDIO_COPY)),
    (SYS_ioctl, Is(1, UFFDIO_WAKE)),
    (SYS_ioctl, Is(1, UFFDIO_WRITEPROTECT)),
    (SYS_ioctl, Is(1, UFFDIO_ZEROPAGE)),
];

/// The thread that serves faults runs beside who waits, others behind.
const PLACES: Calls = &[(SYS_sched_setaffinity, Is(0, 0)), (SYS_setpriority, Always)];

/// Files by name.
const FILES: Calls = &[
    (SYS_flock, Always),
    (SYS_fstatfs, Always),
    (SYS_ftruncate, Always),
    (SYS_getdents64, Always),
    (SYS_lstat, Always),
    (SYS_mkdir, Always),
    (SYS_mkdirat, Always),
    (SYS_open, Always),
    (SYS_openat, Always),
    (SYS_readlink, Always),
    (SYS_readlinkat, Always),
    (SYS_rename, Always),
    (SYS_renameat, Always),
    (SYS_renameat2, Always),
    (SYS_rmdir, Always),
    (SYS_stat, Always),
    (SYS_statfs, Always),
    (SYS_unlink, Always),
    (SYS_unlinkat, Always),
];

/// Pages that the VMM and the guest wrote, where KVM's log is not what tells them.
const WRITTEN_PAGES: Calls = &[
    (SYS_ioctl, Is(1, PAGEMAP_SCAN)),
    (SYS_ioctl, Is(1, USERFAULTFD_IOC_NEW)),
    (SYS_ioctl, Is(1, UFFDIO_API)),
    (SYS_ioctl, Is(1, UFFDIO_REGISTER)),
    (SYS_ioctl, Is(1, UFFDIO_UNREGISTER)),
    (SYS_ioctl, Is(1, UFFDIO_WRITEPROTECT)),
    (SYS_userfaultfd, Always),
];

/// The end of a vCPU's slice of time.
const SLICES: Calls =
    &[(SYS_timer_create, Is(0, libc::CLOCK_MONOTONIC as u64)), (SYS_timer_delete, Always), (SYS_timer_settime, Always)];

/// Putting a machine together, the control socket, the terminal, darkness.
const SUPERVISOR: Calls = &[
    (SYS_bind, Always),
    (SYS_chmod, Always),
    (SYS_dup, Always),
    (SYS_dup2, Always),
    (SYS_dup3, Always),
    (SYS_epoll_create1, Always),
    (SYS_eventfd2, Always),
    (SYS_io_uring_register, Always),
    (SYS_io_uring_setup, Always),
    (SYS_ioctl, Is(1, BLKGETSIZE64)),
    (SYS_ioctl, Is(1, libc::TCGETS)),
    (SYS_ioctl, Is(1, libc::TCSETS)),
    (SYS_ioctl, Is(1, libc::TCSETSF)),
    (SYS_ioctl, Is(1, libc::TCSETSW)),
    (SYS_listen, Always),
    (SYS_memfd_create, Always),
    (SYS_setsid, Always),
];

/// linux/prctl.h.
const PR_GET_AUXV: u64 = 0x4155_5856;
/// `_IOW('T', 208, unsigned int)` (linux/if_tun.h).
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
/// `_IOR(0x12, 114, size_t)` (linux/fs.h).
const BLKGETSIZE64: u64 = 0x8008_1272;
/// `_IOWR('f', 16, struct pm_scan_arg)` (linux/fs.h).
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// linux/userfaultfd.h: `_IOWR(0xAA, …, struct uffdio_…)`, and `_IOR` of a range.
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const UFFDIO_CONTINUE: u64 = 0xc020_aa07;
const UFFDIO_API: u64 = 0xc018_aa3f;

impl Role {
    fn calls(self) -> &'static [Calls] {
        match self {
            Self::Vcpu => &[RUNTIME, NO_FILES, STREAMS, OPEN_FILES, FAULTS, DEVICE, SLICES],
            Self::Device => &[RUNTIME, NO_FILES, STREAMS, OPEN_FILES, FAULTS, DEVICE, SOCKETS],
            // Which pages changed is in a file of the process's own.
            Self::Flush => &[RUNTIME, OPEN_FILES, FILES, WRITTEN_PAGES, FAULTS],
            // The store of generations is among what memory comes from.
            Self::Pager => &[RUNTIME, STREAMS, OPEN_FILES, BATCHES, FILES, FAULTS, PLACES, THREADS],
            Self::Budget => &[RUNTIME, OPEN_FILES, FILES],
            Self::Generations => &[RUNTIME, STREAMS, OPEN_FILES, BATCHES, FILES, FAULTS, WRITTEN_PAGES, THREADS],
            Self::Control => &[RUNTIME, NO_FILES, STREAMS, SOCKETS, THREADS],
            Self::HoldUp => &[RUNTIME, NO_FILES],
            Self::Supervisor => &[
                RUNTIME,
                STREAMS,
                OPEN_FILES,
                DEVICE,
                SOCKETS,
                BATCHES,
                FILES,
                WRITTEN_PAGES,
                FAULTS,
                PLACES,
                THREADS,
                SLICES,
                SUPERVISOR,
            ],
        }
    }

    /// Whether it opens files.
    pub(super) fn has_files(self) -> bool {
        !matches!(self, Self::Vcpu | Self::Device | Self::Control | Self::HoldUp)
    }

    /// Requests of KVM, the one that is made most first.
    fn requests(self) -> &'static [&'static [u64]] {
        match self {
            Self::Vcpu => &[requests::OF_A_VCPU],
            Self::Device => &[requests::OF_A_DEVICE],
            Self::Generations | Self::Flush => &[requests::OF_DIRTY_PAGES],
            Self::Supervisor => &[requests::OF_A_VCPU, requests::OF_DIRTY_PAGES, requests::OF_A_MACHINE],
            Self::Pager | Self::Budget | Self::Control | Self::HoldUp => &[],
        }
    }

    /// The rules of its filter, by the number of the call. A call without rules is allowed whatever its arguments.
    pub(super) fn rules(self) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
        let (mut rules, mut always) = (BTreeMap::<i64, Vec<SeccompRule>>::new(), Vec::new());
        let requests = self.requests().iter().copied().flatten().map(|request| (SYS_ioctl, Is(1, *request)));
        for (call, when) in requests.chain(self.calls().iter().copied().flatten().copied()) {
            let of_call = rules.entry(call).or_default();
            match when.rule()? {
                Some(rule) => of_call.push(rule),
                None => always.push(call),
            }
        }
        rules.extend(always.into_iter().map(|call| (call, Vec::new())));
        Ok(rules)
    }
}

impl When {
    fn rule(self) -> Result<Option<SeccompRule>, BackendError> {
        // Of commands, requests, flags and numbers of processes the system looks at the lower half alone.
        let (whole, half) = (SeccompCmpArgLen::Qword, SeccompCmpArgLen::Dword);
        let (argument, length, operator, value) = match self {
            Always => return Ok(None),
            Is(argument, value) => (argument, half, SeccompCmpOp::Eq, value),
            Null(argument) => (argument, whole, SeccompCmpOp::Eq, 0),
            Bits(argument, mask, value) => (argument, half, SeccompCmpOp::MaskedEq(mask), value),
            Own(argument) => (argument, half, SeccompCmpOp::Eq, std::process::id().into()),
        };
        SeccompRule::new(vec![SeccompCondition::new(argument, length, operator, value)?]).map(Some)
    }
}
