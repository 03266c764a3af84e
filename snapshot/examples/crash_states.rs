//! Goes through the states that a power cut can leave a store in, and says what was found.
//!
//! ```sh
//! cargo run --release -p snapshot --example crash_states -- --states 1000000 [--json]
//! ```
//!
//! Ends with status 1 if a committed generation was lost, or anything else was not as it should be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Part of the tests.

#[path = "../tests/states/mod.rs"]
mod states;
#[path = "../tests/world/mod.rs"]
mod world;

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use states::{Plan, Report};

const USAGE: &str = "usage: crash_states [--states NUMBER] [--threads NUMBER] [--exhaust BITS] [--json]
  --states   distinct states after which it is enough (default 1000000)
  --threads  default: as many as there are processors
  --exhaust  cuts that at most so many yes-or-no choices decide are gone through whole (default 12)";

struct Wanted {
    plan: Plan,
    json: bool,
}

fn wanted(mut arguments: impl Iterator<Item = String>) -> Result<Wanted, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let plan = Plan { states: 1_000_000, exhaust: 12, recoveries: 50, threads, stop_at_failure: false };
    let mut wanted = Wanted { plan, json: false };
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<u64, String> {
            let text = arguments.next().ok_or_else(|| format!("{argument} needs a number"))?;
            text.parse().map_err(|_| format!("{argument} {text}: not a number"))
        };
        match argument.as_str() {
            "--states" => wanted.plan.states = number()?,
            "--threads" => wanted.plan.threads = number()?.clamp(1, 64) as usize,
            "--exhaust" => wanted.plan.exhaust = number()?.min(24) as u32,
            "--json" => wanted.json = true,
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    Ok(wanted)
}

fn main() -> ExitCode {
    let wanted = match wanted(std::env::args().skip(1)) {
        Ok(wanted) => wanted,
        Err(why) => {
            eprintln!("{why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let report = states::enumerate(&states::all(), &states::plain, wanted.plan);
    if wanted.json {
        print_json(&report);
    } else {
        print_table(&report);
    }
    ExitCode::from(u8::from(!report.failures.is_empty()))
}

fn print_table(report: &Report) {
    println!("{:42} {:>5} {:>7} {:>9} {:>9} {:>14}", "workload", "cuts", "whole", "made", "verified", "of recoveries");
    for tally in &report.workloads {
        let [made, verified, of_recoveries] =
            [&tally.made, &tally.verified, &tally.of_recoveries].map(|count| count.load(Ordering::Relaxed));
        let (name, cuts, whole) = (tally.name, tally.cuts, tally.exhausted);
        println!("{name:42} {cuts:>5} {whole:>7} {made:>9} {verified:>9} {of_recoveries:>14}");
    }
    report.failures.iter().take(20).for_each(|failure| println!("FAILED: {failure}"));
    let (distinct, failures) = (report.distinct, report.failures.len());
    println!(
        "{distinct} distinct states in {:.1} s, {failures} of them not as they should be",
        report.took.as_secs_f64()
    );
}

fn print_json(report: &Report) {
    let workloads: Vec<_> = report
        .workloads
        .iter()
        .map(|tally| {
            serde_json::json!({
                "name": tally.name,
                "cuts": tally.cuts,
                "cuts_enumerated_whole": tally.exhausted,
                "states_made": tally.made.load(Ordering::Relaxed),
                "states_verified": tally.verified.load(Ordering::Relaxed),
                "of_recoveries": tally.of_recoveries.load(Ordering::Relaxed),
            })
        })
        .collect();
    let all = serde_json::json!({
        "distinct_states": report.distinct,
        "failures": report.failures,
        "seconds": report.took.as_secs_f64(),
        "workloads": workloads,
    });
    println!("{all:#}");
}
