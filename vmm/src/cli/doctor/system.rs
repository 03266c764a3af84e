//! The host: its kernel, its processor, its limits, and what it offers for finding dirty pages.

use std::arch::x86_64::{__cpuid, CpuidResult};
use std::fs;

use allocator::medium::dax::WriteBack;
use rustix::fs::Access;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::machine::jail;

/// What the host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct System {
    /// The kernel's release.
    pub(super) kernel: String,
    pub(super) processor: Processor,
    pub(super) dirty_tracking: DirtyTracking,
    pub(super) limits: Limits,
}

/// The processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Processor {
    /// CPUID leaf 0.
    pub(super) vendor: String,
    /// CPUID leaves 0x80000002 to 0x80000004.
    pub(super) model: String,
    /// `vmx` or `svm`, where the kernel lists it.
    pub(super) hardware_virtualisation: Option<&'static str>,
    /// Whose machine this one is, where it is virtual itself: the vendor of CPUID leaf 0x40000000.
    pub(super) hypervisor: Option<String>,
    /// How caches are written back to persistent memory: `clwb`, `clflushopt`, `clflush`.
    pub(super) cache_write_back: String,
}

/// Ways to find the pages that were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct DirtyTracking {
    /// KVM's log of guest writes: as old as KVM on x86.
    pub(super) kvm_dirty_log: bool,
    /// KVM's dirty ring, by the kernel's version (5.11).
    pub(super) kvm_dirty_ring: bool,
    /// `PAGEMAP_SCAN`, by the kernel's version (6.7).
    pub(super) pagemap_scan: bool,
    /// `UFFD_FEATURE_WP_ASYNC`, by the kernel's version (6.7) and our permission to use userfaultfd.
    pub(super) userfaultfd_wp_async: bool,
}

/// What this process may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Limits {
    /// RLIMIT_MEMLOCK, bytes; none: no limit.
    pub(super) locked_memory: Option<u64>,
    /// RLIMIT_NOFILE.
    pub(super) open_files: Option<u64>,
    /// RAM that can be had without swapping, bytes.
    pub(super) available_memory: Option<u64>,
    /// `vm.unprivileged_userfaultfd`.
    pub(super) unprivileged_userfaultfd: Option<bool>,
    /// Whether this process may catch faults of the kernel (so of KVM) with userfaultfd.
    pub(super) userfaultfd: bool,
    /// Whether a VM's process can be jailed: the kernel has the seccomp filters that it takes.
    pub(super) jail: bool,
    /// The seccomp mode that this process is in already: 0 none, 1 strict, 2 filter.
    pub(super) seccomp_mode: Option<u32>,
}

/// Looks at the host.
pub(super) fn look() -> System {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let limits = limits();
    let from = |major, minor| version(&kernel).is_some_and(|version| version >= (major, minor));
    let dirty_tracking = DirtyTracking {
        kvm_dirty_log: true,
        kvm_dirty_ring: from(5, 11),
        pagemap_scan: from(6, 7),
        userfaultfd_wp_async: from(6, 7) && limits.userfaultfd,
    };
    System { processor: processor(), dirty_tracking, limits, kernel }
}

/// Major and minor number of a kernel's release, as in `6.1.0-18-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn processor() -> Processor {
    let CpuidResult { ebx, ecx, edx, .. } = __cpuid(0);
    let in_a_machine = __cpuid(1).ecx & (1 << 31) != 0;
    let hypervisor = in_a_machine.then(|| {
        let CpuidResult { ebx, ecx, edx, .. } = __cpuid(0x4000_0000);
        text(&[ebx, ecx, edx])
    });
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Processor {
        vendor: text(&[ebx, edx, ecx]),
        model: model().unwrap_or_else(|| "unknown".to_owned()),
        hardware_virtualisation: hardware_virtualisation(&cpuinfo),
        hypervisor,
        cache_write_back: WriteBack::of_this_cpu().to_string(),
    }
}

fn model() -> Option<String> {
    const FIRST: u32 = 0x8000_0002;
    const LAST: u32 = 0x8000_0004;
    if __cpuid(0x8000_0000).eax < LAST {
        return None;
    }
    let registers: Vec<u32> = (FIRST..=LAST)
        .flat_map(|leaf| {
            let CpuidResult { eax, ebx, ecx, edx } = __cpuid(leaf);
            [eax, ebx, ecx, edx]
        })
        .collect();
    Some(text(&registers)).filter(|text| !text.is_empty())
}

/// Text that CPUID packs into registers, padded with zeros or spaces.
fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> = registers.iter().flat_map(|register| register.to_le_bytes()).collect();
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).trim().to_owned()
}

fn hardware_virtualisation(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'))?.1;
    ["vmx", "svm"].into_iter().find(|wanted| flags.split_ascii_whitespace().any(|flag| flag == *wanted))
}

fn limits() -> Limits {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").ok();
    let unprivileged = sysctl.map(|value| value.trim() == "1");
    let device = rustix::fs::access("/dev/userfaultfd", Access::READ_OK | Access::WRITE_OK).is_ok();
    Limits {
        locked_memory: getrlimit(Resource::Memlock).current,
        open_files: getrlimit(Resource::Nofile).current,
        available_memory: available_memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        unprivileged_userfaultfd: unprivileged,
        userfaultfd: unprivileged == Some(true) || device || may_trace(&status),
        jail: jail::available().is_ok(),
        seccomp_mode: field(&status, "Seccomp:").and_then(|mode| mode.parse().ok()),
    }
}

/// `userfaultfd(2)`: CAP_SYS_PTRACE may catch faults of the kernel.
fn may_trace(status: &str) -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let effective = field(status, "CapEff:").and_then(|mask| u64::from_str_radix(mask, 16).ok());
    effective.is_some_and(|mask| mask & (1 << CAP_SYS_PTRACE) != 0)
}

fn available_memory(meminfo: &str) -> Option<u64> {
    let kilobytes: u64 = field(meminfo, "MemAvailable:")?.strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// The rest of the line that begins with `name`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_kernels_are_read_whatever_follows_the_numbers() {
        assert_eq!(version("6.1.0-18-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("6.18-rc3"), Some((6, 18)));
        assert_eq!(version("5.11"), Some((5, 11)));
        assert_eq!(version("linux"), None);
        assert!(version("6.7.0") >= version("6.7") && version("6.10.1") > version("6.7"));
    }

    #[test]
    fn text_of_cpuid_ends_at_its_padding() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        assert_eq!(text(&[word(b"Auth"), word(b"enti"), word(b"cAMD")]), "AuthenticAMD");
        assert_eq!(text(&[word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]), "KVMKVMKVM");
    }

    #[test]
    fn virtualisation_is_a_flag_of_its_own_and_no_part_of_another() {
        assert_eq!(hardware_virtualisation("flags\t\t: fpu vmx sse\n"), Some("vmx"));
        assert_eq!(hardware_virtualisation("flags\t\t: fpu svm_lock\nflags: svm\n"), None);
        assert_eq!(hardware_virtualisation("vmx flags\t: x\n"), None);
        assert_eq!(hardware_virtualisation(""), None);
    }

    #[test]
    fn proc_files_are_read_and_damage_is_unknown() {
        assert_eq!(available_memory("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available_memory("MemAvailable: 18446744073709551615 kB\n"), None);
        assert_eq!(available_memory("MemAvailable: lots\n"), None);
        assert!(may_trace("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_trace("CapEff:\t0000000000000000\n") && !may_trace(""));
    }
}
