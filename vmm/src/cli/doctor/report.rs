//! Everything that was found, and what follows from it.

use serde::Serialize;

use super::device::Device;
use super::media::Media;
use super::probe::{self, Execution};
use super::system::System;
use super::{continuity, embedded};

/// The shortest time between a power-fail signal and darkness that ATX12VO allows, nanoseconds.
const HOLD_UP: u64 = 11_000_000;
/// What a host needs beside its guests.
const MEMORY_LEAST: u64 = 64 << 20;

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    /// Whether perdure can run on this host.
    pub(super) runs: bool,
    /// Why not.
    pub(super) problems: Vec<Advice>,
    /// What it can do without, or what is to be known.
    pub(super) warnings: Vec<Advice>,
    pub(super) system: System,
    pub(super) kvm: Device,
    /// What the probe found; none where no machine could be started.
    pub(super) probe: Option<probe::Findings>,
    /// Whether a machine survives a freeze.
    pub(super) continuity: Option<continuity::Findings>,
    /// Why that could not be tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) continuity_error: Option<String>,
    pub(super) media: Media,
    pub(super) embedded_guests: Vec<embedded::Guest>,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Advice {
    pub(super) what: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

fn advice(what: impl Into<String>, advice: &str) -> Advice {
    Advice { what: what.into(), advice: Some(advice.to_owned()) }
}

impl Report {
    /// Fills in what follows from the rest.
    pub(super) fn judge(mut self) -> Self {
        let mut problems = self.kvm_problems();
        problems.extend(self.media_problems());
        self.warnings = [self.kvm_warnings(), self.media_warnings(), self.system_warnings()].concat();
        self.runs = problems.is_empty();
        self.problems = problems;
        self
    }

    fn kvm_problems(&self) -> Vec<Advice> {
        // The errors of /dev/kvm say themselves what to do, and without it nothing else about KVM was tried.
        if let Some(error) = &self.kvm.error {
            return vec![Advice { what: error.clone(), advice: None }];
        }
        let mut problems = Vec::new();
        if let Some(error) = self.probe.as_ref().and_then(|probe| probe.error.as_ref()) {
            let what = format!("the probe guest came to no end: {error}");
            problems.push(advice(what, "look into the kernel's log (dmesg); run on a KVM with VMX or SVM"));
        }
        let counter = self.probe.iter().flat_map(|probe| &probe.embedded_guests).find(|guest| guest.name == "counter");
        if let Some(counter) = counter.filter(|guest| !guest.runs) {
            let what = format!("this KVM does not even run an embedded guest: it lacks {}", counter.lacks.join(", "));
            problems.push(advice(what, "run on a KVM with VMX or SVM"));
        }
        let broken = self.continuity.as_ref().filter(|found| !found.continues).and_then(|found| found.error.as_ref());
        if let Some(error) = broken.or(self.continuity_error.as_ref()) {
            let what = format!("a guest does not survive a freeze and a resume here: {error}");
            problems.push(advice(what, "update the host's kernel; nothing that is frozen here could be trusted"));
        }
        problems
    }

    fn kvm_warnings(&self) -> Vec<Advice> {
        let mut warnings = Vec::new();
        if let Some(probe) = &self.probe {
            if probe.execution == Execution::Emulated {
                let what =
                    "kernel code runs in KVM's instruction emulator, some hundred times slower than on the processor";
                warnings.push(advice(what, "run where the host has VMX or SVM; embedded guests run here all the same"));
            }
            if !probe.stock_linux.runs && probe.error.is_none() {
                let what =
                    format!("a stock Linux does not run here: this KVM lacks {}", probe.stock_linux.lacks.join(", "));
                warnings.push(advice(what, "use the embedded guests (--guest), or a host with VMX or SVM"));
            }
        }
        let unequal = self.continuity.iter().flat_map(|found| &found.differences).filter(|found| !found.moves);
        let fields: Vec<_> = unequal.map(|difference| difference.field.as_str()).collect();
        if !fields.is_empty() {
            let what = format!("this KVM does not restore {}", fields.join(", "));
            warnings.push(advice(what, "the embedded guests do not use these; try yours before you rely on it"));
        }
        warnings
    }

    fn media_problems(&self) -> Vec<Advice> {
        let damaged = self.media.error.iter().map(|error| Advice { what: error.clone(), advice: None });
        let read_only = self.media.places.iter().filter(|place| !place.writable).map(|place| {
            let what = format!("{} is not writable", place.directory.display());
            advice(what, "change its owner, or name another pool with --pool or PERDURE_POOL")
        });
        damaged.chain(read_only).collect()
    }

    fn media_warnings(&self) -> Vec<Advice> {
        let mut warnings = Vec::new();
        for place in &self.media.places {
            let directory = place.directory.display();
            if place.volatile {
                let what = format!(
                    "{directory} lies on {}: it survives no power loss",
                    place.file_system.as_deref().unwrap_or("RAM")
                );
                warnings
                    .push(advice(what, "good for tests; name a pool on a disk or on persistent memory with --pool"));
            }
            if let Some(flush) = place.flush.filter(|flush| !place.volatile && flush.median > HOLD_UP) {
                let what = format!(
                    "a flush in {directory} takes {} ms, an ATX power supply holds up 11 to 17",
                    flush.median / 1_000_000
                );
                warnings.push(advice(
                    what,
                    "use a faster disk, persistent memory (medium dax), or an uninterruptible supply",
                ));
            }
            if place.free.is_some_and(|free| free < MEMORY_LEAST) {
                warnings.push(advice(format!("{directory} is as good as full"), "make room: a guest's RAM lies there"));
            }
        }
        warnings
    }

    fn system_warnings(&self) -> Vec<Advice> {
        let low = self.system.limits.available_memory.is_some_and(|bytes| bytes < MEMORY_LEAST);
        low.then(|| advice("there is next to no free RAM", "end other programs")).into_iter().collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::media::Flush;
    use super::super::{embedded, media, system};
    use super::*;
    use crate::cli::Environment;

    fn verdict(name: &'static str, lacks: &[&'static str]) -> probe::Verdict {
        probe::Verdict { name, runs: lacks.is_empty(), lacks: lacks.to_vec() }
    }

    /// A host on which all is well, and a pool directory that is empty.
    pub(in super::super) fn sound(pool: &std::path::Path) -> Report {
        let kvm = Device {
            present: true,
            permitted: true,
            api_version: Some(12),
            capabilities: Vec::new(),
            max_vcpus: Some(8),
            max_memory_slots: Some(32),
            error: None,
        };
        let probe = probe::Findings {
            execution: Execution::Native,
            embedded_guests: vec![verdict("counter", &[])],
            stock_linux: verdict("stock Linux", &[]),
            tests: Vec::new(),
            starts: 1,
            nanoseconds: 1,
            error: None,
        };
        let continuity = continuity::Findings {
            continues: true,
            equal: true,
            differences: Vec::new(),
            msrs: 40,
            tsc_khz: None,
            save_nanoseconds: 1,
            restore_nanoseconds: 1,
            error: None,
        };
        let mut system = system::look();
        system.limits.available_memory = None;
        let mut media = media::look(&Environment { pool: pool.to_owned() });
        for place in &mut media.places {
            (place.writable, place.volatile, place.free) = (true, false, None);
        }
        Report {
            runs: false,
            problems: Vec::new(),
            warnings: Vec::new(),
            system,
            kvm,
            probe: Some(probe),
            continuity: Some(continuity),
            continuity_error: None,
            media,
            embedded_guests: embedded::list(),
        }
    }

    /// Judges the sound host after `change`.
    fn judged(change: impl FnOnce(&mut Report)) -> Report {
        let pool = tempfile::tempdir().unwrap();
        let mut report = sound(pool.path());
        change(&mut report);
        report.judge()
    }

    fn one(advice: &[Advice]) -> &str {
        let [one] = advice else { panic!("{advice:?}") };
        &one.what
    }

    #[test]
    fn where_all_is_well_there_is_nothing_to_say() {
        let report = judged(|_| {});
        assert!(report.runs && report.problems.is_empty() && report.warnings.is_empty(), "{report:?}");
    }

    #[test]
    fn without_kvm_that_is_the_one_problem() {
        let report = judged(|report| {
            report.kvm.error = Some("/dev/kvm does not exist".to_owned());
            (report.probe, report.continuity) = (None, None);
        });
        assert!(!report.runs);
        assert_eq!(one(&report.problems), "/dev/kvm does not exist");
    }

    #[test]
    fn a_broken_chain_is_a_problem_and_a_lost_register_a_warning() {
        let broken = judged(|report| {
            let found = report.continuity.as_mut().unwrap();
            (found.continues, found.error) = (false, Some("lost tick 5".to_owned()));
        });
        assert!(!broken.runs && one(&broken.problems).contains("lost tick 5"));
        let lost = judged(|report| {
            let difference = |field: &str, moves| {
                let (field, text) = (field.to_owned(), String::new());
                continuity::Difference { field, before: text.clone(), after: text, moves }
            };
            report.continuity.as_mut().unwrap().differences =
                vec![difference("vcpus[0].msrs[0x10]", true), difference("vcpus[0].msrs[0xda0]", false)];
        });
        assert!(lost.runs);
        assert_eq!(one(&lost.warnings), "this KVM does not restore vcpus[0].msrs[0xda0]");
        let not_tried = judged(|report| {
            (report.continuity, report.continuity_error) = (None, Some("no memory".to_owned()));
        });
        assert!(!not_tried.runs && one(&not_tried.problems).contains("no memory"));
    }

    #[test]
    fn what_stock_linux_lacks_is_a_warning_and_what_counter_lacks_a_problem() {
        let without_linux = judged(|report| {
            report.probe.as_mut().unwrap().stock_linux = verdict("stock Linux", &["XGETBV in the kernel"]);
        });
        assert!(without_linux.runs && one(&without_linux.warnings).contains("XGETBV"));
        let without_any = judged(|report| {
            report.probe.as_mut().unwrap().embedded_guests = vec![verdict("counter", &["timer interrupts"])];
        });
        assert!(!without_any.runs && one(&without_any.problems).contains("timer interrupts"));
    }

    #[test]
    fn a_pool_that_cannot_be_written_is_a_problem_and_one_in_ram_a_warning() {
        let read_only = judged(|report| report.media.places[0].writable = false);
        assert!(!read_only.runs && one(&read_only.problems).contains("not writable"));
        let in_ram = judged(|report| report.media.places[0].volatile = true);
        assert!(in_ram.runs && one(&in_ram.warnings).contains("survives no power loss"));
        let damaged = judged(|report| report.media.error = Some("the catalog is damaged".to_owned()));
        assert!(!damaged.runs && one(&damaged.problems).contains("damaged"));
    }

    #[test]
    fn a_flush_longer_than_a_hold_up_and_a_full_disk_are_warned_of() {
        let flush = |median| Some(Flush { median, worst: median, runs: 21 });
        let slow = judged(|report| report.media.places[0].flush = flush(HOLD_UP + 1));
        assert!(slow.runs && one(&slow.warnings).contains("takes 11 ms"));
        assert!(judged(|report| report.media.places[0].flush = flush(HOLD_UP)).warnings.is_empty());
        let full = judged(|report| report.media.places[0].free = Some(0));
        assert!(one(&full.warnings).contains("full"));
    }
}
