//! Replacement policies on seeded traces: what they cost, and how far they are from the optimum.
//!
//! `cargo run --release -p allocator --example replacement`
//!
//! A trace is a sequence of clusters of which a quarter fits in memory (where its name does not say otherwise). An access is a mapped
//! hit, which the policy does not see and which costs nothing; a soft fault, [`SOFT_US`]; or a hard fault, [`HARD_US`]. The first
//! quarter of a trace warms up and is not counted. Policies with a star could not be built on KVM: those marked so need accessed bits,
//! the optimum needs the future.

mod policies;
mod traces;

use policies::{Access, Policy};

/// Clusters in memory.
const FRAMES: u32 = 4096;
/// Clusters of the guest.
const CLUSTERS: u32 = 4 * FRAMES;
const ACCESSES: usize = 2_000_000;
/// A hard fault: 64 KiB read and mapped. As measured with a thread that serves userfaultfd, both files in memory.
const HARD_US: f64 = 120.0;
/// A soft fault: mapped again, nothing read.
const SOFT_US: f64 = 40.0;

/// What a policy made of a trace: events per access.
#[derive(Clone, Copy)]
struct Score {
    hard: f64,
    soft: f64,
}

impl Score {
    fn microseconds(self) -> f64 {
        self.hard * HARD_US + self.soft * SOFT_US
    }
}

fn play(policy: &mut dyn Policy, trace: &[u32]) -> Score {
    let warm = trace.len() / 4;
    let (mut hard, mut soft) = (0_u32, 0_u32);
    for (at, &cluster) in trace.iter().enumerate() {
        let access = policy.access(cluster, at);
        hard += u32::from(access == Access::Hard && at >= warm);
        soft += u32::from(access == Access::Soft && at >= warm);
    }
    let counted = (trace.len() - warm) as f64;
    Score { hard: f64::from(hard) / counted, soft: f64::from(soft) / counted }
}

fn main() {
    let traces = traces::all();
    let mut scores: Vec<(String, Vec<Score>)> = Vec::new();
    for (_, trace) in &traces {
        for (row, (name, mut policy)) in policies::all(trace).into_iter().enumerate() {
            let score = play(&mut *policy, trace);
            match scores.get_mut(row) {
                Some((_, scores)) => scores.push(score),
                None => scores.push((name, vec![score])),
            }
        }
    }
    let names: Vec<&str> = traces.iter().map(|(name, _)| *name).collect();
    println!("Cost in microseconds per access; the geometric mean\n");
    show(&names, &scores, Score::microseconds, 2, true);
    println!("Hard faults per access\n");
    show(&names, &scores, |score| score.hard, 4, false);
    println!("Soft faults per access\n");
    show(&names, &scores, |score| score.soft, 4, false);
}

/// A Markdown table.
fn show(traces: &[&str], scores: &[(String, Vec<Score>)], value: fn(Score) -> f64, digits: usize, mean: bool) {
    let head: Vec<&str> = traces.iter().copied().chain(mean.then_some("mean")).collect();
    println!("| | {} |\n|---|{}", head.join(" | "), "---|".repeat(head.len()));
    for (name, scores) in scores {
        let values: Vec<f64> = scores.iter().map(|score| value(*score)).collect();
        let geometric = (values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64).exp();
        let shown = values.iter().copied().chain(mean.then_some(geometric));
        let cells: Vec<String> = shown.map(|value| format!("{value:.digits$}")).collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
    println!();
}
