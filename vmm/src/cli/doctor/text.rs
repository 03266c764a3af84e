//! The report for people: a line an item, a mark before it, at the end what to do.

use std::fmt::Write as _;

use super::super::output::{bytes, time};
use super::device::Device;
use super::embedded::Guest;
use super::media::{Media, Place};
use super::probe::{Execution, TestResult, Verdict};
use super::report::{Advice, Report};
use super::system::{DirtyTracking, Limits, System};
use super::{continuity, probe};

/// How an item is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Yes,
    No,
    /// Neither good nor bad.
    Plain,
}

impl From<bool> for Mark {
    fn from(yes: bool) -> Self {
        if yes { Self::Yes } else { Self::No }
    }
}

/// Headings and items, in columns.
#[derive(Default)]
struct Page(String);

/// Where the second column begins, behind the mark.
const LABEL: usize = 28;

impl Page {
    fn heading(&mut self, title: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        let _ = writeln!(self.0, "{gap}{title}");
    }

    fn item(&mut self, mark: impl Into<Mark>, label: &str, text: impl AsRef<str>) {
        let mark = match mark.into() {
            Mark::Yes => "yes",
            Mark::No => "NO",
            Mark::Plain => "",
        };
        let line = format!("  {mark:<3}  {label:<LABEL$}  {}", text.as_ref());
        let _ = writeln!(self.0, "{}", line.trim_end());
    }

    fn plain(&mut self, label: &str, text: impl AsRef<str>) {
        self.item(Mark::Plain, label, text);
    }
}

/// The whole report.
pub(super) fn render(report: &Report) -> String {
    let mut page = Page::default();
    system(&mut page, &report.system);
    kvm(&mut page, &report.kvm);
    if let Some(probe) = &report.probe {
        runs(&mut page, probe);
        probed(&mut page, probe);
    }
    survives(&mut page, report);
    tracking(&mut page, &report.system.dirty_tracking);
    media(&mut page, &report.media);
    limits(&mut page, &report.system.limits);
    embedded(&mut page, &report.embedded_guests);
    verdict(&mut page, report);
    page.0
}

fn system(page: &mut Page, system: &System) {
    page.heading("Host");
    page.plain("kernel", format!("Linux {}", system.kernel));
    let processor = &system.processor;
    page.plain("processor", format!("{} ({})", processor.model, processor.vendor));
    let virtualisation = processor.hardware_virtualisation;
    page.item(
        virtualisation.is_some(),
        "hardware virtualisation",
        virtualisation.unwrap_or("neither vmx nor svm in /proc/cpuinfo: not in this CPU, turned off, or not passed on"),
    );
    let itself = processor.hypervisor.as_ref();
    page.plain(
        "runs on",
        itself.map_or_else(|| "the bare machine".to_owned(), |whose| format!("a virtual machine itself ({whose})")),
    );
}

fn kvm(page: &mut Page, device: &Device) {
    page.heading("KVM");
    let usable = device.error.as_deref().unwrap_or("can be used");
    page.item(device.error.is_none(), "/dev/kvm", usable);
    if let Some(version) = device.api_version {
        page.item(version == 12, "API version", version.to_string());
    }
    if let (Some(vcpus), Some(slots)) = (device.max_vcpus, device.max_memory_slots) {
        page.plain("most in a VM", format!("{vcpus} vCPUs, {slots} memory slots"));
    }
    for capability in &device.capabilities {
        let need = if capability.needed { "needed" } else { "of use" };
        let value = if capability.value > 1 { format!("{need}, {}", capability.value) } else { need.to_owned() };
        page.item(capability.value > 0, capability.name, value);
    }
}

fn runs(page: &mut Page, probe: &probe::Findings) {
    page.heading("What runs here");
    let speed = probe.kernel_speed().map_or_else(String::new, |speed| format!(", {} instructions/s", round(speed)));
    let (mark, how) = match probe.execution {
        Execution::Native => (Mark::Yes, "the processor itself"),
        Execution::Emulated => {
            (Mark::No, "KVM's instruction emulator, which is slow and does not know every instruction")
        }
        Execution::Unknown => (Mark::Plain, "unknown: the probe did not get that far"),
    };
    page.item(mark, "kernel code (CPL0) natively", format!("{how}{speed}"));
    for guest in probe.embedded_guests.iter().chain([&probe.stock_linux]) {
        page.item(guest.runs, guest.name, because(guest));
    }
}

fn because(verdict: &Verdict) -> String {
    match verdict {
        Verdict { runs: true, .. } => String::new(),
        Verdict { lacks, .. } if lacks.is_empty() => "because no guest could be started".to_owned(),
        Verdict { lacks, .. } => format!("because this KVM lacks {}", lacks.join(", ")),
    }
}

fn probed(page: &mut Page, probe: &probe::Findings) {
    page.heading(&format!("What the probe found ({} starts, {})", probe.starts, time(probe.nanoseconds)));
    for test in &probe.tests {
        page.item(test.works, test.name, finding(test));
    }
    if let Some(error) = &probe.error {
        page.item(false, "came to its end", error);
    }
}

fn finding(test: &TestResult) -> String {
    let detail = match (&test.detail, test.instructions_per_second) {
        (Some(detail), _) => format!(": {detail}"),
        (None, Some(speed)) => format!(": {} instructions/s", round(speed)),
        (None, None) => String::new(),
    };
    format!("{}{detail}", test.what)
}

/// A number to three digits behind the point.
fn round(number: u64) -> String {
    match number {
        0..10_000 => number.to_string(),
        10_000..10_000_000 => format!("{:.3} M", number as f64 / 1e6),
        _ => format!("{:.0} M", number as f64 / 1e6),
    }
}

fn survives(page: &mut Page, report: &Report) {
    if let Some(error) = &report.continuity_error {
        page.heading("What survives a freeze");
        page.item(false, "a guest goes on", error);
    }
    let Some(found) = &report.continuity else { return };
    page.heading("What survives a freeze");
    let chain = found.error.as_deref().unwrap_or("in another machine, no tick and no byte lost");
    page.item(found.continues, "a guest goes on", chain);
    let continuity::Findings { save_nanoseconds, restore_nanoseconds, msrs, .. } = found;
    page.plain("reading all state", format!("{} ({msrs} MSRs)", time(*save_nanoseconds)));
    page.plain("setting it on a new vCPU", time(*restore_nanoseconds));
    let moving = found.differences.iter().filter(|difference| difference.moves).count();
    page.item(found.equal, "saved again it is equal", format!("but for {moving} that move with time"));
    for difference in found.differences.iter().filter(|difference| !difference.moves) {
        page.item(false, "", format!("{}: {} became {}", difference.field, difference.before, difference.after));
    }
}

fn tracking(page: &mut Page, tracking: &DirtyTracking) {
    page.heading("Finding the pages that were written");
    page.item(tracking.kvm_dirty_log, "KVM's dirty log", "the guest's writes");
    page.item(tracking.kvm_dirty_ring, "KVM's dirty ring", "the guest's writes; Linux 5.11, by its version");
    page.item(tracking.pagemap_scan, "PAGEMAP_SCAN", "Linux 6.7, by its version");
    let asynchronous = "the guest's writes and the VMM's; Linux 6.7, by its version, and a permission";
    page.item(tracking.userfaultfd_wp_async, "userfaultfd WP_ASYNC", asynchronous);
}

fn media(page: &mut Page, media: &Media) {
    page.heading("Media");
    let pool = media.error.as_deref().map_or_else(
        || if media.exists { "in use".to_owned() } else { "not there yet: `perdure run` makes it".to_owned() },
        ToOwned::to_owned,
    );
    page.item(if media.error.is_some() { Mark::No } else { Mark::Plain }, "pool", media.pool.display().to_string());
    page.plain("", pool);
    media.places.iter().for_each(|place| on_place(page, place));
}

fn on_place(page: &mut Page, place: &Place) {
    let size = |size: Option<u64>| size.map_or_else(|| "?".to_owned(), bytes);
    let names: Vec<_> = place.media.iter().map(ToString::to_string).collect();
    page.plain("directory", format!("{} ({})", place.directory.display(), names.join(", ")));
    let file_system = place.file_system.as_deref().unwrap_or("unknown");
    page.plain("file system", format!("{file_system}, {} free of {}", size(place.free), size(place.total)));
    page.item(place.writable, "writable", "");
    page.item(!place.volatile, "survives a power loss", if place.volatile { "it lies in RAM" } else { "once flushed" });
    page.item(
        place.dax,
        "DAX (medium dax)",
        if place.dax { "" } else { "not mounted with -o dax on persistent memory" },
    );
    let cost = match (place.flush, &place.not_measured) {
        (Some(flush), _) => format!("{}, at the worst {} of {}", time(flush.median), time(flush.worst), flush.runs),
        (None, why) => format!("not measured: {}", why.as_deref().unwrap_or("it failed")),
    };
    page.plain("overwrite 4 KiB and flush", cost);
}

fn limits(page: &mut Page, limits: &Limits) {
    page.heading("Limits");
    let or_none = |limit: Option<String>| limit.unwrap_or_else(|| "none".to_owned());
    page.plain("locked memory", or_none(limits.locked_memory.map(bytes)));
    page.plain("open files", or_none(limits.open_files.map(|files| files.to_string())));
    page.plain("free RAM", limits.available_memory.map_or_else(|| "unknown".to_owned(), bytes));
    let sysctl = match limits.unprivileged_userfaultfd {
        Some(true) => "vm.unprivileged_userfaultfd is 1",
        Some(false) => "vm.unprivileged_userfaultfd is 0: for root, or who may open /dev/userfaultfd",
        None => "this kernel is built without it",
    };
    page.item(limits.userfaultfd, "userfaultfd", sysctl);
    let jail = match (limits.jail, limits.seccomp_mode) {
        (false, _) => "this kernel has no seccomp filters, or hides them: VMs run with --no-jail alone",
        (true, Some(0) | None) => "seccomp filters, for each thread of a VM's process",
        (true, Some(_)) => "seccomp filters, for each thread of a VM's process, on top of one that is there already",
    };
    page.item(limits.jail, "jail", jail);
}

fn embedded(page: &mut Page, guests: &[Guest]) {
    page.heading("Embedded guests (perdure run --guest NAME --cmdline 'KEY=VALUE …')");
    for guest in guests {
        page.plain(guest.name, guest.summary);
        for parameter in &guest.parameters {
            page.plain(&format!("  {}={}", parameter.name, parameter.default), parameter.what);
        }
    }
}

fn verdict(page: &mut Page, report: &Report) {
    page.heading(if report.runs { "perdure can run on this host." } else { "perdure cannot run on this host:" });
    let mut list = |kind: &str, items: &[Advice]| {
        for Advice { what, advice } in items {
            let _ = writeln!(page.0, "  {kind}: {what}");
            if let Some(advice) = advice {
                let _ = writeln!(page.0, "    → {advice}");
            }
        }
    };
    list("problem", &report.problems);
    list("note", &report.warnings);
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::sound;
    use super::*;

    #[test]
    fn the_last_lines_are_the_verdict_and_what_to_do() {
        let pool = tempfile::tempdir().unwrap();
        assert!(render(&sound(pool.path()).judge()).ends_with("\nperdure can run on this host.\n"));
        let mut report = sound(pool.path());
        report.media.places[0].writable = false;
        let text = render(&report.judge());
        let end: Vec<_> = text.lines().rev().take(3).collect();
        assert_eq!(end[2], "perdure cannot run on this host:");
        assert!(end[1].starts_with("  problem: ") && end[0].starts_with("    → "), "{end:?}");
    }

    #[test]
    fn without_kvm_all_the_rest_is_still_told() {
        let pool = tempfile::tempdir().unwrap();
        let mut report = sound(pool.path());
        report.kvm.error = Some("no permission to open /dev/kvm".to_owned());
        (report.probe, report.continuity) = (None, None);
        let text = render(&report.judge());
        for told in ["  NO   /dev/kvm ", "Media\n", "Limits\n", "  counter ", "PAGEMAP_SCAN", "processor"] {
            assert!(text.contains(told), "{told}:\n{text}");
        }
        assert!(!text.contains("What the probe found") && !text.contains("What survives a freeze"));
    }

    #[test]
    fn speeds_are_short() {
        assert_eq!(round(999), "999");
        assert_eq!(round(1_619_900), "1.620 M");
        assert_eq!(round(7_384_000_000), "7384 M");
    }
}
