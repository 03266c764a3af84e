//! Many outages: on one machine after the other, or on several side by side.
//!
//! Outage i comes to machine i mod n, each with a pool of its own; so the same seed on as many machines draws the same for each of them.
//! What is told of an outage goes on at once: nothing piles up, however many there are.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::mpsc;

use allocator::Pool;
use guests::random::SplitMix64;

use super::OutageError;
use super::interrupt::Interrupt;
use super::plan::{Drawn, OutagePlan, VmPlan};
use super::report::OutageReport;
use super::simulation::Simulation;

/// Leaves seeds that can be typed.
const SEED_SHIFT: u32 = 32;
/// Reports that may wait for somebody who is slow to hear of them.
const WAITING_MOST: usize = 16;

/// Machines of the same VMs, and supplies that fail.
#[derive(Debug)]
pub struct Campaign {
    machines: Vec<Simulation>,
    interrupt: Interrupt,
}

/// The outages of a seed, numbered from 1.
fn draw<'a>(plans: &'a [OutagePlan], count: u32, seed: u64) -> impl Iterator<Item = (u32, Drawn)> + 'a {
    let mut seeds = SplitMix64::new(seed);
    let mut seed_of = move |number: u32| if number == 1 { seed } else { seeds.draw() >> SEED_SHIFT };
    (1..=count).zip(plans.iter().cycle()).map(move |(number, plan)| (number, plan.draw(seed_of(number))))
}

impl Campaign {
    /// As many machines with these VMs, whose pools lie below `parent`.
    ///
    /// # Errors
    /// [`OutageError::System`].
    pub fn new(parent: &Path, vms: &[VmPlan], jobs: NonZeroUsize, interrupt: Interrupt) -> Result<Self, OutageError> {
        let machine = |number| Simulation::new(parent, number, vms, interrupt.clone());
        let machines = (0..jobs.get()).map(machine).collect::<Result<_, _>>()?;
        Ok(Self { machines, interrupt })
    }

    /// As many machines with a copy each of the VM `name` of `pool`, below that pool. The VM itself must not run, and is not touched.
    ///
    /// # Errors
    /// [`OutageError::NotCopied`], [`OutageError::Regions`], [`OutageError::System`].
    pub fn of_copies(pool: &Pool, name: &str, jobs: NonZeroUsize, interrupt: Interrupt) -> Result<Self, OutageError> {
        let machine = |number| Simulation::of_copy(pool, number, name, interrupt.clone());
        let machines = (0..jobs.get()).map(machine).collect::<Result<_, _>>()?;
        Ok(Self { machines, interrupt })
    }

    /// Goes through `plans`, and again, `count` outages in all. `tell` hears of each, as it is over.
    ///
    /// # Errors
    /// [`OutageError`], and what `tell` says; a violation is none, but in the report. The first ends all machines.
    pub fn run<E: From<OutageError>>(
        self,
        plans: &[OutagePlan],
        count: u32,
        seed: u64,
        tell: &mut dyn FnMut(OutageReport) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { machines, interrupt } = self;
        let jobs = machines.len();
        let (sender, reports) = mpsc::sync_channel(WAITING_MOST);
        std::thread::scope(|scope| {
            for (machine, simulation) in machines.into_iter().enumerate() {
                let sender = sender.clone();
                let outages = draw(plans, count, seed).skip(machine).step_by(jobs);
                scope.spawn(move || {
                    let ended = simulation.run(outages, |report| sender.send(Ok(report)).is_ok());
                    if let Err(error) = ended {
                        // Nobody hears it if another one ended all.
                        let _ = sender.send(Err(error));
                    }
                });
            }
            drop(sender);
            let told = reports.iter().try_for_each(|report| tell(report?));
            // All others end where they are.
            drop(reports);
            if told.is_err() {
                interrupt.raise();
            }
            told
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_share_the_outages_of_a_seed_and_each_is_drawn_once() {
        let plans = [OutagePlan { at: "5ms..1s".parse().unwrap(), ..OutagePlan::default() }, OutagePlan::default()];
        let drawn = |drawn: (u32, Drawn)| (drawn.0, drawn.1.seed, drawn.1.at);
        let all: Vec<_> = draw(&plans, 11, 7).map(drawn).collect();
        assert_eq!((all[0].1, all.len()), (7, 11));
        let mut shared: Vec<_> =
            (0..3).flat_map(|machine| draw(&plans, 11, 7).skip(machine).step_by(3).map(drawn)).collect();
        shared.sort_unstable();
        assert_eq!(shared, all);
    }
}
