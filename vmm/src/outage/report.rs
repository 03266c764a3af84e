//! What happened.

use serde::Serialize;

use crate::bench::Distribution;
use crate::persistence::freeze::{FreezeReport, FreezeSteps};

/// One outage.
#[derive(Debug, Clone, Serialize)]
pub struct OutageReport {
    /// Counted from 1.
    pub number: u32,
    /// With `--seed` this it is the first.
    pub seed: u64,
    /// When darkness was to come.
    pub cut: String,
    /// From the guest's first output to the signal, in nanoseconds.
    pub at_ns: u64,
    /// The hold-up, in nanoseconds.
    pub holdup_ns: Option<u64>,
    /// How often the power came back before it went.
    pub flaps: usize,
    /// What the medium did, in words.
    pub fault: Option<String>,
    /// From the signal to darkness, in nanoseconds; 0 without a signal. `null` if it did not come.
    pub dark_ns: Option<u64>,
    /// Bytes that the cut took back: they are as they were, or something in between.
    pub lost_bytes: u64,
    /// Files that the cut took back.
    pub lost_files: u64,
    /// Each VM.
    pub vms: Vec<VmOutage>,
}

impl OutageReport {
    /// Whether something was not as it must be.
    #[must_use]
    pub fn is_violated(&self) -> bool {
        self.vms.iter().any(|vm| matches!(vm.verdict, Verdict::Violated { .. }))
    }
}

/// What a VM went on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum WentOnFrom {
    /// The power came back, and it ran on.
    Running,
    /// Its context: nothing is lost.
    Context {
        /// Its number.
        sequence: u64,
    },
    /// A generation.
    Generation {
        /// As in `web@17`.
        generation: String,
        /// How old it was at the cut, in nanoseconds.
        age_ns: u64,
    },
    /// Its kernel: all is lost.
    Boot,
}

/// A guest's verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Verdict {
    /// It recomputed its chain of hashes: nothing is missing, doubled or altered.
    Unbroken {
        /// Links of the chain.
        links: u64,
    },
    /// It runs on. This guest cannot tell more.
    RunsOn,
    /// Something is not as it must be.
    Violated {
        /// What.
        why: String,
    },
}

/// What an outage was for one VM.
#[derive(Debug, Clone, Serialize)]
pub struct VmOutage {
    /// Its name.
    pub name: String,
    /// What its memory lies on.
    pub medium: String,
    /// Whether it had a warning.
    pub warned: bool,
    /// From the signal to this VM's warning, in nanoseconds.
    pub warned_ns: u64,
    /// What its freeze took, if it came to its end.
    pub freeze: Option<FreezeReport>,
    /// Whether it did so before darkness; `null` without a hold-up, or without a warning.
    pub in_time: Option<bool>,
    /// Why there was no freeze.
    pub not_frozen: Option<String>,
    /// Points at which it was cut off, in order.
    pub cut_off_at: Vec<String>,
    /// What it went on from.
    pub went_on: WentOnFrom,
    /// How many times it was started until it ran.
    pub attempts: u32,
    /// What was damaged between the cut and its return, in words.
    pub damaged: Option<String>,
    /// Work that was done and is not, in nanoseconds, at most: time in which it was dark counts, too.
    pub lost_ns: u64,
    /// The same in links of the guest's chain.
    pub lost_links: Option<u64>,
    /// From the start of the process to the guest's first output, or to the VMM's answer if the guest says nothing, in nanoseconds.
    pub resume_ns: Option<u64>,
    /// What the guest says.
    pub verdict: Verdict,
}

/// Over all outages and VMs.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Outages.
    pub outages: usize,
    /// Of them, with a cut.
    pub cuts: usize,
    /// Of the warned, in per cent: frozen before darkness. `null` if there was no hold-up.
    pub holdup_met_percent: Option<f64>,
    /// VMs that went on from a context, a generation, their kernel, or ran on.
    pub from_context: usize,
    /// See above.
    pub from_generation: usize,
    /// See above.
    pub from_boot: usize,
    /// See above.
    pub ran_on: usize,
    /// Something was not as it must be.
    pub violations: usize,
    /// The signal to all durable.
    pub freeze: Distribution,
    /// Of that, what the media took.
    pub flush: Distribution,
    /// The start of the process to the first output.
    pub resume: Distribution,
    /// Work lost.
    pub lost: Distribution,
}

/// Outages that are kept whole.
const KEPT_MOST: usize = 250;

/// Sums outages up as they come. Of most it keeps a few numbers.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    outages: usize,
    cuts: usize,
    met: usize,
    missed: usize,
    from_context: usize,
    from_generation: usize,
    from_boot: usize,
    ran_on: usize,
    violations: usize,
    holdup_ns: Option<u64>,
    freeze: Vec<u64>,
    flush: Vec<u64>,
    resume: Vec<u64>,
    lost: Vec<u64>,
    kept: Vec<OutageReport>,
    violated: Vec<OutageReport>,
}

/// The times of all outages, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Times<'a> {
    /// The signal to all durable.
    pub freeze: &'a [u64],
    /// Of that, what the media took.
    pub flush: &'a [u64],
    /// The start of the process to the first output.
    pub resume: &'a [u64],
    /// Work lost.
    pub lost: &'a [u64],
    /// The longest hold-up.
    pub holdup_ns: Option<u64>,
}

impl Tally {
    /// One more.
    pub fn add(&mut self, outage: OutageReport) {
        self.outages += 1;
        self.cuts += usize::from(outage.dark_ns.is_some());
        self.holdup_ns = self.holdup_ns.max(outage.holdup_ns);
        let mut violations = 0;
        for vm in &outage.vms {
            match vm.in_time {
                Some(true) => self.met += 1,
                Some(false) => self.missed += 1,
                None => {}
            }
            *match vm.went_on {
                WentOnFrom::Running => &mut self.ran_on,
                WentOnFrom::Context { .. } => &mut self.from_context,
                WentOnFrom::Generation { .. } => &mut self.from_generation,
                WentOnFrom::Boot => &mut self.from_boot,
            } += 1;
            violations += usize::from(matches!(vm.verdict, Verdict::Violated { .. }));
            self.freeze.extend(vm.freeze.map(|freeze| freeze.total_ns));
            self.flush.extend(vm.freeze.map(|freeze| freeze.flush_ns));
            self.resume.extend(vm.resume_ns);
            self.lost.push(vm.lost_ns);
        }
        self.violations += violations;
        let kept = if violations > 0 { &mut self.violated } else { &mut self.kept };
        if kept.len() < KEPT_MOST {
            kept.push(outage);
        }
    }

    /// Those with violations, then the first others, as many as are kept.
    pub fn kept(&self) -> impl Iterator<Item = &OutageReport> {
        self.violated.iter().chain(&self.kept).take(KEPT_MOST)
    }

    /// All times.
    #[must_use]
    pub fn times(&self) -> Times<'_> {
        let Self { freeze, flush, resume, lost, holdup_ns, .. } = self;
        Times { freeze, flush, resume, lost, holdup_ns: *holdup_ns }
    }

    /// What it comes to.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let (met, missed) = (self.met, self.missed);
        let of = |times: &[u64]| Distribution::of(times.to_vec());
        Summary {
            outages: self.outages,
            cuts: self.cuts,
            holdup_met_percent: (met + missed > 0).then(|| met as f64 * 100.0 / (met + missed) as f64),
            from_context: self.from_context,
            from_generation: self.from_generation,
            from_boot: self.from_boot,
            ran_on: self.ran_on,
            violations: self.violations,
            freeze: of(&self.freeze),
            flush: of(&self.flush),
            resume: of(&self.resume),
            lost: of(&self.lost),
        }
    }
}

/// The steps of a freeze by name, in their order.
#[must_use]
pub fn phases(steps: &FreezeSteps) -> [(&'static str, u64); 8] {
    let FreezeSteps { stop_ns, quiesce_ns, devices_ns, cpus_ns, persist_ns, encode_ns, context_ns, stamp_ns } = *steps;
    [
        ("stop vCPUs", stop_ns),
        ("quiesce", quiesce_ns),
        ("save devices", devices_ns),
        ("save CPUs", cpus_ns),
        ("flush memory", persist_ns),
        ("encode context", encode_ns),
        ("write context", context_ns),
        ("stamp", stamp_ns),
    ]
}
