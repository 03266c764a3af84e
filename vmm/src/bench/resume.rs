//! From the start of a process to the guest's first output; and what the VMM takes of memory beside the guest's.
//!
//! Each sample is a process of its own, this very program as a user starts it, with a pipe for its output. The guest prints
//! all the time, so that its first byte after a resume comes from its next instructions.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use super::{BenchError, BenchPool, Distribution, Shape};
use crate::machine::time::nanoseconds;

/// Ticks so fast that the guest is never done with printing one when the next comes.
pub(super) const BUSY: &str = "hz=4000";

/// One row of results.
#[derive(Debug, Clone, Serialize)]
pub struct ResumeResult {
    /// The VM.
    pub shape: Shape,
    /// Start of `perdure resume` to the guest's first byte.
    pub resume: Distribution,
    /// The same with `--no-jail`, each right after one with a jail.
    pub resume_without_jail: Distribution,
    /// Start of `perdure run` to the guest's first byte, of a VM that was made before and has never run.
    pub cold_start: Distribution,
    /// The same with a new VM, whose regions are made first.
    pub first_start: Distribution,
    /// Memory of the VMM beyond the guest's, in bytes: the proportional set size of all but the RAM region.
    pub vmm_pss_bytes: u64,
}

/// Measures `runs` resumes and starts of one VM.
///
/// # Errors
/// [`BenchError`].
pub fn measure(pool: &BenchPool, shape: Shape, runs: usize) -> Result<ResumeResult, BenchError> {
    let bench = Bench { pool, shape };
    let first_start = (0..runs).map(|run| bench.first_start(run)).collect::<Result<_, _>>()?;
    let cold_start = bench.cold_starts(runs)?;
    let Resumes { jailed, free, pss } = bench.resumes(runs)?;
    Ok(ResumeResult {
        shape,
        resume: Distribution::of(jailed),
        resume_without_jail: Distribution::of(free),
        cold_start: Distribution::of(cold_start),
        first_start: Distribution::of(first_start),
        vmm_pss_bytes: pss,
    })
}

/// Times in nanoseconds, and memory in bytes.
struct Resumes {
    jailed: Vec<u64>,
    free: Vec<u64>,
    pss: u64,
}

struct Bench<'a> {
    pool: &'a BenchPool,
    shape: Shape,
}

impl Bench<'_> {
    fn first_start(&self, run: usize) -> Result<u64, BenchError> {
        let name = format!("first-{run}");
        let (memory, cpus) = (self.shape.memory.to_string(), self.shape.cpus.to_string());
        let medium = self.shape.medium.map(|medium| medium.to_string());
        let mut arguments = vec!["run", &name, "--guest", "boot", "--memory", &memory, "--cpus", &cpus];
        arguments.extend(medium.iter().flat_map(|medium| ["--medium", medium]));
        let (mut child, took) = start(self.pool, &arguments)?;
        kill(&mut child)?;
        self.free(&name)?;
        Ok(took)
    }

    fn cold_starts(&self, runs: usize) -> Result<Vec<u64>, BenchError> {
        let mut samples = Vec::with_capacity(runs);
        for run in 0..runs {
            let name = format!("cold-{run}");
            drop(self.pool.vm(&name, &self.shape, "boot", "")?);
            let (mut child, took) = start(self.pool, &["run", &name])?;
            samples.push(took);
            kill(&mut child)?;
            self.free(&name)?;
        }
        Ok(samples)
    }

    fn resumes(&self, runs: usize) -> Result<Resumes, BenchError> {
        drop(self.pool.vm("resume", &self.shape, "counter", BUSY)?);
        let (mut child, _) = start(self.pool, &["run", "resume"])?;
        let mut resumes = Resumes { jailed: Vec::with_capacity(runs), free: Vec::with_capacity(runs), pss: 0 };
        for _ in 0..runs {
            freeze(&mut child)?;
            let (mut jailed, took) = start(self.pool, &["resume", "resume"])?;
            resumes.jailed.push(took);
            resumes.pss = vmm_pss(&jailed)?;
            freeze(&mut jailed)?;
            let (free, took) = start(self.pool, &["resume", "resume", "--no-jail"])?;
            resumes.free.push(took);
            child = free;
        }
        kill(&mut child)?;
        self.free("resume")?;
        Ok(resumes)
    }

    fn free(&self, name: &str) -> Result<(), BenchError> {
        let root = name.parse().map_err(|_| BenchError::Guest(name.to_owned()))?;
        // The process is gone, but the kernel may still be taking its memory apart.
        for _ in 0..500 {
            match self.pool.pool().free_tree(&root) {
                Err(allocator::PoolError::Lease(_)) => std::thread::sleep(Duration::from_millis(10)),
                other => return Ok(other?),
            }
        }
        Ok(self.pool.pool().free_tree(&root)?)
    }
}

/// Starts this program, and waits for the first byte of its output.
pub(super) fn start(pool: &BenchPool, arguments: &[&str]) -> Result<(Child, u64), BenchError> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--pool").arg(pool.directory()).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn().map_err(|source| BenchError::System { doing: "start perdure", source })?;
    let mut byte = [0];
    let output = child.stdout.as_mut().ok_or_else(|| BenchError::Guest("no output".to_owned()))?;
    let read = output.read_exact(&mut byte);
    let took = nanoseconds(start.elapsed());
    match read {
        Ok(()) => Ok((child, took)),
        Err(source) => {
            kill(&mut child)?;
            Err(BenchError::System { doing: "read the guest's first output", source })
        }
    }
}

fn send(child: &Child, signal: Signal) -> Result<(), BenchError> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| BenchError::Guest("no process".to_owned()))?;
    kill_process(pid, signal).map_err(|source| BenchError::System { doing: "signal perdure", source: source.into() })
}

/// Freezes the VM, and waits until its process is gone. Its output is read on meanwhile, so that it is not held back.
pub(super) fn freeze(child: &mut Child) -> Result<(), BenchError> {
    send(child, Signal::POWER)?;
    if let Some(output) = &mut child.stdout {
        let _ = std::io::copy(output, &mut std::io::sink());
    }
    wait(child)
}

pub(super) fn kill(child: &mut Child) -> Result<(), BenchError> {
    send(child, Signal::KILL)?;
    wait(child)
}

fn wait(child: &mut Child) -> Result<(), BenchError> {
    child.wait().map(drop).map_err(|source| BenchError::System { doing: "wait for perdure", source })
}

/// The proportional set size of a VMM without its guest's RAM, in bytes (Linux, `Documentation/filesystems/proc.rst`).
fn vmm_pss(child: &Child) -> Result<u64, BenchError> {
    let path = format!("/proc/{}/smaps", child.id());
    let smaps = std::fs::read_to_string(path)
        .map_err(|source| BenchError::System { doing: "read the VMM's memory map", source })?;
    Ok(pss_without_regions(&smaps))
}

fn pss_without_regions(smaps: &str) -> u64 {
    let (mut total, mut counts) = (0, true);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Pss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            total += if counts { kib * 1024 } else { 0 };
        } else if line.split_once('-').is_some_and(|(start, _)| u64::from_str_radix(start, 16).is_ok()) {
            counts = !line.ends_with(".region");
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_does_not_count_as_the_vmms() {
        let smaps = "\
7f00-7f10 rw-s 00000000 fe:00 12 /pool/media/file/0001.region\nSize: 64 kB\nPss:          64 kB\nPss_Dirty: 1 kB\n\
8000-8010 rw-p 00000000 00:00 0 [heap]\nPss:           8 kB\nPss_Anon:   8 kB\n";
        assert_eq!(pss_without_regions(smaps), 8 * 1024);
    }
}
