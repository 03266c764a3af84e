//! `perdure demo`

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use guests::chain;
use serde::Serialize;

use super::output::say;
use super::{EXIT_FROZEN, output};
use crate::bench::BenchPool;
use crate::machine::time::nanoseconds;
use crate::persistence::freeze::FreezeReport;
use crate::supervisor::control::{ControlClient, Request, Response};

/// The story in a few seconds: a guest is started, the power fails twice, it goes on, and nothing is lost or doubled.
///
/// The guest counts timer interrupts and chains a hash over each tick, its registers and its memory; the whole chain is
/// recomputed in the end. Its memory is a simulated NVDIMM: what is not saved by the freeze is gone with the process.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

const VM: &str = "demo";
const TICKS: u32 = 100;
const HZ: u32 = 50;
const OUTAGES: usize = 2;
/// How long the guest runs before each outage.
const LIFE: Duration = Duration::from_millis(700);

/// One outage.
#[derive(Debug, Serialize)]
struct Outage {
    /// The last tick before darkness.
    tick: u64,
    freeze: FreezeReport,
    /// Start of the new process to the guest's next output, in nanoseconds.
    resume_ns: u64,
}

#[derive(Debug, Serialize)]
struct Story {
    outages: Vec<Outage>,
    ticks: u64,
    /// The last link of the hash chain.
    hash: String,
    /// Whether the whole chain is what it must be.
    unbroken: bool,
    took_ns: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let tell = |text: String| {
        if !args.json {
            say!("{text}");
        }
    };
    let start = Instant::now();
    let pool = BenchPool::create(&std::env::temp_dir())?;
    let pool = pool.directory();
    let cmdline = format!("ticks={TICKS} hz={HZ}");
    let guest = ["run", VM, "--guest", "counter", "--memory", "128M", "--medium", "nvdimm", "--cmdline", &cmdline];
    tell(format!("$ perdure {} \"{cmdline}\"", guest[..guest.len() - 1].join(" ")));
    let mut life = Life::begin(pool, &guest)?;
    tell(format!(
        "  first output after {}; it counts and chains a hash over its memory …",
        output::time(life.first_ns)
    ));
    let (mut outages, mut printed) = (Vec::new(), String::new());
    for _ in 0..OUTAGES {
        std::thread::sleep(LIFE);
        tell(format!("$ perdure powerfail {VM}"));
        let freeze = freeze(pool)?;
        printed.push_str(&life.end(EXIT_FROZEN)?);
        let tick = last_tick(&printed);
        tell(format!(
            "  frozen at tick {tick}: all durable {} after the signal; the process is gone, and with it all that was volatile",
            output::time(freeze.total_ns)
        ));
        tell(format!("$ perdure resume {VM}"));
        life = Life::begin(pool, &["resume", VM])?;
        let (first, period) = (output::time(life.first_ns), 1000 / HZ);
        tell(format!("  its next tick came {first} after the new process began (it ticks every {period} ms) …"));
        outages.push(Outage { tick, freeze, resume_ns: life.first_ns });
    }
    printed.push_str(&life.end(0)?);
    let verified = chain::verify(&printed).context("the chain is broken")?;
    if verified.ticks != u64::from(TICKS) {
        bail!("the chain is whole, but ends at tick {} and not at {TICKS}", verified.ticks);
    }
    let hash = format!("{:016x}", verified.hash);
    tell(format!(
        "{TICKS} ticks through {OUTAGES} outages: no tick lost, none doubled, no byte altered (chain {hash})"
    ));
    let took_ns = nanoseconds(start.elapsed());
    if args.json {
        output::json(&Story { outages, ticks: verified.ticks, hash, unbroken: true, took_ns })?;
    }
    Ok(())
}

fn freeze(pool: &Path) -> anyhow::Result<FreezeReport> {
    match ControlClient::connect(pool, VM)?.ask(&Request::PowerFail { holdup_ns: None })? {
        Response::Frozen(report) => Ok(*report),
        other => bail!("the VM was not frozen: {other:?}"),
    }
}

fn last_tick(output: &str) -> u64 {
    let mut ticks = output.lines().filter_map(|line| line.strip_prefix("tick ")?.split(' ').next()?.parse().ok());
    ticks.next_back().unwrap_or(0)
}

/// The VM in a process of its own, this very program as a user starts it.
struct Life {
    child: Child,
    first_ns: u64,
    output: std::thread::JoinHandle<std::io::Result<Vec<u8>>>,
}

impl Life {
    fn begin(pool: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--pool").arg(pool).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().context("cannot start perdure")?;
        let mut stdout = child.stdout.take().context("no output")?;
        let mut first = [0];
        if stdout.read_exact(&mut first).is_err() {
            let mut words = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                stderr.read_to_string(&mut words)?;
            }
            child.wait()?;
            bail!("`perdure {}` did not start: {}", arguments.join(" "), words.trim().trim_start_matches("perdure: "));
        }
        let first_ns = nanoseconds(start.elapsed());
        let read_on = move || {
            let mut bytes = first.to_vec();
            stdout.read_to_end(&mut bytes).map(|_| bytes)
        };
        Ok(Self { child, first_ns, output: std::thread::spawn(read_on) })
    }

    /// Waits for its end, which must be with `code`; what it printed.
    fn end(mut self, code: u8) -> anyhow::Result<String> {
        let bytes = self.output.join().ok().context("the reader of the output ended")??;
        let status = self.child.wait()?;
        if status.code() != Some(code.into()) {
            bail!("the VM's process ended with {status}, not with {code}");
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
