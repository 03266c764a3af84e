//! Scenarios: which VMs there are and how the power fails, as JSON.
//!
//! ```json
//! {
//!   "vms": [
//!     {"guest": "counter", "medium": "nvdimm", "priority": 1},
//!     {"guest": "smp", "cpus": 2, "memory": "16M", "snapshot_every": "200ms", "max_snapshots": 4},
//!     {"guest": "records", "cmdline": "hz=500 flush=4", "disk": "4M"}
//!   ],
//!   "outages": [
//!     {"at": "300ms", "holdup": "100ms", "cut": "never", "back": "4ms"},
//!     {"cut": "freeze.context+2", "again": ["resume.clear+1", "resume.run"]},
//!     {"flaps": 5, "holdup": "50ms", "back": "2ms"},
//!     {"fault": "io-error@freeze.persist"}
//!   ],
//!   "repeat": 10
//! }
//! ```
//!
//! * `vms`: see [`VmPlan`]; each field may be left out. They share a machine, its supply and its pool. Those with the highest `priority` are
//!   warned first, and others when these are frozen. `disk` and `pmem` are the sizes of a disk and of persistent memory of the
//!   pool; what `records` was told to be durable must be there.
//! * `outages`, in their order, `repeat` times over. Each field may be left out:
//!   `at` (a time from the guest's first output, a span as in `5ms..200ms` to draw it from, or `random`: `20ms..1s`; default `random`), `holdup` (a time or `none`; default `16ms`), `cut` (as `--cut`:
//!   `after-holdup`, a point, `random`, `unannounced`, `never`), `flaps` (so many signals before, after each of which the power comes back), `back`
//!   (when it does, for `flaps` and `never`; default: drawn from the hold-up), `again` (points at which the VM is cut off on its way back, one for each
//!   attempt), `fault` (`io-error@POINT`, `full@POINT`, `slow:20ms@POINT`, `lies@POINT`: what the medium does from that point to the next),
//!   `damage` (`context-slot`, `newer-slot`, `older-slot`: of two slots of the context that are good one is damaged before the return),
//!   `fresh` (all VMs are made anew before it).

use std::time::Duration;

use serde::Deserialize;
use vfs::cut::point::{CutAt, Fault};

use super::damage::Damage;
use super::plan::{Cut, HoldUpLength, Moment, OutagePlan, VmPlan};

/// A scenario as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    vms: Vec<VmPlan>,
    outages: Vec<WrittenOutage>,
    #[serde(default = "one")]
    repeat: u32,
}

fn one() -> u32 {
    1
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenOutage {
    at: Option<String>,
    holdup: Option<String>,
    cut: Option<String>,
    #[serde(default)]
    flaps: u32,
    back: Option<String>,
    #[serde(default)]
    again: Vec<String>,
    fault: Option<String>,
    damage: Option<String>,
    #[serde(default)]
    fresh: bool,
}

/// Which VMs there are, and how the power fails.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// At least one.
    pub vms: Vec<VmPlan>,
    /// At least one.
    pub outages: Vec<OutagePlan>,
    /// How often all of them come.
    pub repeat: u32,
}

/// Why a scenario cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// It is no such document.
    #[error("it is not a scenario (`perdure help outage run` shows one)")]
    Json(#[from] serde_json::Error),
    /// A field says what cannot be.
    #[error("outage {number}: {field}: {why}")]
    Field {
        /// Which outage, counted from 1.
        number: usize,
        /// Which field.
        field: &'static str,
        /// Why not.
        why: String,
    },
    /// There is nothing to do.
    #[error("it has no outages")]
    Empty,
}

/// VMs and outages that one may have at most.
const MOST: usize = 1000;

impl Scenario {
    /// Reads one.
    ///
    /// # Errors
    /// [`ScenarioError`].
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let Written { mut vms, outages, repeat } = serde_json::from_str(text)?;
        if outages.is_empty() {
            return Err(ScenarioError::Empty);
        }
        if vms.is_empty() {
            vms.push(VmPlan::default());
        }
        vms.truncate(MOST);
        let outages = outages.iter().take(MOST).enumerate().map(|(index, outage)| outage.plan(index + 1));
        Ok(Self { vms, outages: outages.collect::<Result<_, _>>()?, repeat: repeat.max(1) })
    }
}

impl WrittenOutage {
    fn plan(&self, number: usize) -> Result<OutagePlan, ScenarioError> {
        fn read<T: std::str::FromStr<Err: std::fmt::Display>>(
            number: usize,
            field: &'static str,
            text: Option<&String>,
        ) -> Result<Option<T>, ScenarioError> {
            let failed = |error: T::Err| ScenarioError::Field { number, field, why: error.to_string() };
            text.map(|text| text.parse().map_err(failed)).transpose()
        }
        let usual = OutagePlan::default();
        let time = |text: &String| humantime::parse_duration(text);
        let back: Option<Duration> = self
            .back
            .as_ref()
            .map(time)
            .transpose()
            .map_err(|error| ScenarioError::Field { number, field: "back", why: error.to_string() })?;
        let again = self.again.iter().map(|point| read::<CutAt>(number, "again", Some(point)));
        Ok(OutagePlan {
            at: read(number, "at", self.at.as_ref())?.unwrap_or(Moment::RANDOM),
            holdup: read::<HoldUpLength>(number, "holdup", self.holdup.as_ref())?
                .map_or(usual.holdup, |length| length.0),
            cut: read::<Cut>(number, "cut", self.cut.as_ref())?.unwrap_or(usual.cut),
            flaps: self.flaps,
            back,
            again: again.filter_map(Result::transpose).collect::<Result<_, _>>()?,
            fault: read::<Fault>(number, "fault", self.fault.as_ref())?,
            damage: read::<Damage>(number, "damage", self.damage.as_ref())?,
            fresh: self.fresh,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scenario_of_the_documentation_is_one() {
        let source = include_str!("scenario.rs");
        let text: String = source
            .lines()
            .skip_while(|line| *line != "//! ```json")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| line.trim_start_matches("//!"))
            .collect();
        let scenario = Scenario::parse(&text).unwrap();
        assert_eq!((scenario.vms.len(), scenario.outages.len(), scenario.repeat), (3, 4, 10));
        assert_eq!(scenario.vms[0].priority, 1);
        assert_eq!(scenario.outages[0].cut, Cut::Never);
        assert_eq!(scenario.outages[1].again.len(), 2);
        assert_eq!(scenario.outages[2].flaps, 5);
        assert!(scenario.outages[3].fault.is_some());
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (text, words) in [
            ("{}", "not a scenario"),
            (r#"{"outages": []}"#, "no outages"),
            (r#"{"outages": [{"cut": "soon"}]}"#, "outage 1: cut: there is no point"),
            (r#"{"outages": [{}, {"holdup": "16"}]}"#, "outage 2: holdup"),
            (r#"{"outages": [{"again": ["x"]}]}"#, "outage 1: again"),
            (r#"{"outages": [{"fault": "fire@freeze.stamp"}]}"#, "outage 1: fault"),
            (r#"{"outages": [{"damage": "all"}]}"#, "outage 1: damage"),
            (r#"{"outages": [{"back": "-"}]}"#, "outage 1: back"),
            (r#"{"outages": [{"when": "2s"}]}"#, "not a scenario"),
        ] {
            let error = Scenario::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
