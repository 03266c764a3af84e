//! Medians of the rounds, side by side.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::loads::{LOADS, Load, Measured};
use super::{Plan, Vmm};

/// What is told of each request: a counter, what it is called, and how much of it is told.
const PER_REQUEST: [(&str, &str, f64); 7] = [
    ("exits", "exits", 1.0),
    ("mmio_exits", "exits to VMM", 1.0),
    ("irq_injections", "interrupts", 1.0),
    ("sleeps", "VMM's sleeps", 1.0),
    ("user_ms", "user us", 1000.0),
    ("system_ms", "system us", 1000.0),
    ("guest_ms", "guest us", 1000.0),
];

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    rounds: u32,
    seconds: u32,
    measured: Vec<(Vmm, &'static str, Measured)>,
}

impl Report {
    pub(super) fn new(plan: &Plan) -> Self {
        Self { rounds: plan.rounds, seconds: plan.seconds, measured: Vec::new() }
    }

    pub(super) fn add(&mut self, vmm: Vmm, load: &Load, measured: Measured) {
        self.measured.push((vmm, load.name, measured));
    }

    /// A VMM's rounds, in their order.
    fn of<'a>(&'a self, vmm: Vmm, load: &'a str) -> impl Iterator<Item = &'a Measured> {
        self.measured.iter().filter(move |(by, name, _)| *by == vmm && *name == load).map(|(_, _, measured)| measured)
    }

    /// The median of the rounds' rates.
    fn rate(&self, vmm: Vmm, load: &Load) -> Option<f64> {
        median(self.of(vmm, load.name).map(|measured| measured.rate))
    }

    /// perdure's rate by QEMU's in each round: they follow each other at once, so that most of what comes and goes on the machine below is the same.
    fn ratios(&self, load: &Load) -> Vec<f64> {
        let pairs = self.of(Vmm::Perdure, load.name).zip(self.of(Vmm::Qemu, load.name));
        pairs.map(|(ours, theirs)| ours.rate / theirs.rate).collect()
    }

    /// The median of a counter's rise for each request. Of KVM's without what the guest does anyway in that time.
    fn per_request(&self, vmm: Vmm, load: &Load, counter: &str) -> Option<f64> {
        let count = |measured: &Measured| measured.counters.get(counter).copied();
        let anyway = median(self.of(vmm, LOADS[0].name).filter_map(count)).filter(|_| !counter.ends_with("_ms"));
        let anyway = anyway.unwrap_or_default();
        median(
            self.of(vmm, load.name)
                .filter_map(|measured| Some((count(measured)? - anyway) / measured.requests.max(1.0))),
        )
    }

    /// All of it, for programs.
    pub fn json(&self) -> Value {
        let loads: Vec<Value> = self.loads().map(|load| self.load(load)).collect();
        json!({ "bench": "devices", "rounds": self.rounds, "seconds": self.seconds, "loads": loads })
    }

    fn load(&self, load: &Load) -> Value {
        let of = |vmm: Vmm| {
            let per_request = PER_REQUEST
                .iter()
                .map(|(counter, _, _)| ((*counter).to_owned(), json!(self.per_request(vmm, load, counter))));
            let per_request: serde_json::Map<_, _> = per_request.collect();
            let rounds = self.of(vmm, load.name).map(|measured| {
                json!({ "rate": measured.rate, "requests": measured.requests, "counters": measured.counters })
            });
            json!({ "rate": self.rate(vmm, load), "per_request": per_request, "rounds": rounds.collect::<Vec<_>>() })
        };
        let ratios = self.ratios(load);
        json!({
            "name": load.name, "unit": load.unit(), "ratio": median(ratios.iter().copied()), "ratios": ratios,
            "perdure": of(Vmm::Perdure), "qemu": of(Vmm::Qemu)
        })
    }

    fn loads(&self) -> impl Iterator<Item = &'static Load> {
        LOADS.iter().filter(|load| self.of(Vmm::Perdure, load.name).next().is_some())
    }

    /// A table, for people.
    pub fn table(&self) -> String {
        std::iter::once(header()).chain(self.loads().map(|load| self.row(load))).collect()
    }

    /// A load's line of the table.
    pub(super) fn row(&self, load: &Load) -> String {
        let [ours, theirs] = Vmm::ALL.map(|vmm| self.rate(vmm, load).unwrap_or(f64::NAN));
        let ratios = self.ratios(load);
        let ratio = median(ratios.iter().copied()).unwrap_or(f64::NAN);
        let (least, most) =
            ratios.iter().fold((f64::MAX, f64::MIN), |(least, most), ratio| (least.min(*ratio), most.max(*ratio)));
        let (rates, ratio) = (format!("{ours:.0} / {theirs:.0}"), format!("{ratio:.2} ({least:.2}-{most:.2})"));
        let mut text = format!("{:<19} {rates:>15} {ratio:>17}", load.name);
        for (counter, _, scale) in PER_REQUEST {
            let value = |vmm| self.per_request(vmm, load, counter).map_or(f64::NAN, |value| value * scale);
            let [ours, theirs] = Vmm::ALL.map(value);
            let digits = if scale > 1.0 { 0 } else { 2 };
            let _ = write!(text, " {:>15}", format!("{ours:.digits$} / {theirs:.digits$}"));
        }
        let _ = writeln!(text, "   {}", load.unit());
        text
    }
}

/// The table's first line.
pub(super) fn header() -> String {
    let mut text = format!("{:<19} {:>15} {:>17}", "perdure / QEMU", "rate", "ratio (range)");
    for (_, called, _) in PER_REQUEST {
        let _ = write!(text, " {called:>15}");
    }
    text.push_str("   each of a request or frame\n");
    text
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    let odd = values.len() % 2 == 1;
    Some(if odd { upper } else { f64::midpoint(values.get(middle - 1).copied()?, upper) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
