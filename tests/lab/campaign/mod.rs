//! A campaign of power cuts: one guest, whose machine loses its power again and again, at moments drawn by a seed.
//!
//! The guest is a stock Linux that prints the [hash chain](super::chain). It runs with a generation a second. A cut comes
//!
//! - **running**: without a warning, in the middle of a generation or between two;
//! - **freezing**: after a power-fail signal, and before the freeze is known to be done;
//! - **frozen**: when it is;
//! - **resuming**: after the machine is up again, before the guest is known to run: a second failure in the recovery of the first.
//!
//! What must hold, whatever the moment: the VM goes on; each link that it prints is the right one, so no byte of its memory is of another
//! moment; after *frozen* the very next link comes; otherwise nothing is lost that lies before the moment of a generation that was seen.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::chain::{self, Chain};
use super::disk::{Cache, Disk, SplitMix, make_ext4};
use super::guest;
use super::machine::{L1, Options};

const SOON: Duration = Duration::from_secs(90);
const GUEST_BOOT: Duration = Duration::from_secs(300);
/// MiB of state under the chain, and milliseconds between links: its window passes over all of it in 32 links.
const CHAIN: (usize, u32) = (8, 20);
/// Links that each life must add, to have looked at all that went through the cut.
const LINKS: u64 = 40;
/// In the outer machine's memory: a cut takes it.
const SERIAL: &str = "/tmp/serial";

/// When the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Unannounced, while the guest runs.
    Running,
    /// After the signal.
    Freezing,
    /// After the freeze.
    Frozen,
    /// In the recovery from the last one.
    Resuming,
}

impl fmt::Display for Moment {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Running => "running",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
            Self::Resuming => "resuming",
        })
    }
}

/// What a campaign is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `file`, `nvdimm` or `dax`.
    pub medium: String,
    /// Cuts.
    pub count: u64,
    /// Equal seeds draw equal moments; the machine's own timing varies.
    pub seed: u64,
    /// The program that prints the chain.
    pub chain: PathBuf,
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cuts by their moment.
    pub cuts: BTreeMap<Moment, u64>,
    /// What the VM went on from, and how often.
    pub from: BTreeMap<&'static str, u64>,
    /// The most links that were printed and had to be computed again.
    pub links_lost_most: u64,
    /// Sectors that the disk had acknowledged and not flushed when the power went, all cuts together.
    pub unflushed: usize,
}

/// Runs a campaign; `told` gets a line for each cut.
///
/// # Panics
///
/// On the first violation; the message has the seed, the cut and its moment.
pub fn campaign(plan: &Plan, told: &mut dyn FnMut(&str)) -> Tally {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let disk = Disk::create(&directory.path().join("disk"), 3072, Cache::Volatile { seed: plan.seed });
    let dax = directory.path().join("pmem");
    make_ext4(&dax, 768);
    let options = Options { disk: Some(disk), dax: Some(dax), files: guest::files(&plan.chain), ..Options::default() };
    let mut campaign =
        Campaign { plan, options, draw: SplitMix(!plan.seed), known: Known::new(), tally: Tally::default() };
    campaign.run(told);
    campaign.tally
}

struct Campaign<'a> {
    plan: &'a Plan,
    options: Options,
    draw: SplitMix,
    known: Known,
    tally: Tally,
}

impl Campaign<'_> {
    fn run(&mut self, told: &mut dyn FnMut(&str)) {
        let mut l1 = L1::boot(&self.options);
        l1.check(&self.start(), SOON);
        self.live(&mut l1);
        let mut cuts = 0;
        while cuts < self.plan.count {
            let moment = [Moment::Running, Moment::Freezing, Moment::Frozen][self.below(3) as usize];
            self.cut(l1, moment);
            cuts += 1;
            let mut line = format!("{}: cut {cuts}, {moment}, after link {}", self.plan.medium, self.known.printed);
            l1 = L1::boot(&self.options);
            while cuts < self.plan.count && self.below(4) == 0 {
                self.cut(l1, Moment::Resuming);
                cuts += 1;
                line += &format!("; cut {cuts}, {}", Moment::Resuming);
                l1 = L1::boot(&self.options);
            }
            told(&(line + &self.go_on(&mut l1)));
        }
    }

    fn go_on(&mut self, l1: &mut L1) -> String {
        let words = l1.check(&format!("{} resume web --detach 2>&1", self.perdure()), GUEST_BOOT);
        let last = self.known.printed;
        let first = self.live(l1);
        let lost = (last + 1).saturating_sub(first);
        self.tally.links_lost_most = self.tally.links_lost_most.max(lost);
        let from = if words.contains("from generation") { "a generation" } else { "its context" };
        *self.tally.from.entry(from).or_default() += 1;
        format!(": went on from {from} with link {first}; {lost} links were computed again")
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.draw.next() % bound
    }

    fn perdure(&self) -> String {
        let home = if self.plan.medium == "dax" { "/dax" } else { "/pool" };
        format!("export PERDURE_POOL={home}/pool PERDURE_LOG=info; perdure")
    }

    fn start(&self) -> String {
        format!(
            "{} run web --kernel {} --initrd {} --cmdline 'console=ttyS0 quiet perdure.chain={},{}' --memory 192M \
             --medium {} --serial {SERIAL} --snapshot-every 1s --max-snapshots 4 --detach",
            self.perdure(),
            guest::KERNEL,
            guest::INITRD,
            CHAIN.0,
            CHAIN.1,
            self.plan.medium
        )
    }

    /// Waits until this life has shown enough, and checks it. The first link that it printed.
    fn live(&mut self, l1: &mut L1) -> u64 {
        let console = format!("cat {SERIAL} 2>/dev/null");
        let seen = l1.wait_until(&console, GUEST_BOOT, |seen| links(&seen.output).len() as u64 > LINKS);
        let life = links(&seen.output);
        let first = life.first().expect("it was waited for").0;
        let checked = self.known.begins_with(first).and_then(|()| self.known.check(&life));
        checked.unwrap_or_else(|broken| panic!("{}, seed {}: {broken}", self.plan.medium, self.plan.seed));
        // Without any there would be nothing to go on from.
        let list = format!("{} generations web --json", self.perdure());
        let list = l1.wait_until(&list, SOON, |seen| newest_generation(&seen.text()) > Some(0)).text();
        self.known.saw_generations(newest_generation(&list).unwrap_or_default());
        first
    }

    fn cut(&mut self, mut l1: L1, moment: Moment) {
        *self.tally.cuts.entry(moment).or_default() += 1;
        let perdure = self.perdure();
        match moment {
            Moment::Running => self.wait_below(1500),
            Moment::Freezing => {
                l1.spawn(&format!("{perdure} powerfail web"), "/tmp/powerfail");
                self.wait_below(400);
            }
            Moment::Frozen => {
                l1.check(&format!("{perdure} powerfail web"), SOON);
                let console = l1.get(SERIAL);
                let checked = self.known.froze(&console);
                checked.unwrap_or_else(|broken| panic!("{}, seed {}: {broken}", self.plan.medium, self.plan.seed));
            }
            Moment::Resuming => {
                l1.spawn(&format!("{perdure} resume web --detach"), "/tmp/resume");
                self.wait_below(1000);
                // It may have run already.
                self.known.next = None;
            }
        }
        self.tally.unflushed += l1.power_cut().unflushed;
    }

    fn wait_below(&mut self, milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(self.below(milliseconds)));
    }
}

/// What is known of the guest, from what it printed and from what its machine stored.
struct Known {
    chain: Chain,
    /// By number, from 1 on.
    hashes: Vec<String>,
    /// The last link that it printed.
    printed: u64,
    /// Links up to here are in a generation.
    floor: u64,
    /// It was frozen, and the next life's first link is this one.
    next: Option<u64>,
    /// The newest generation that was seen.
    newest: u64,
    /// Links that lie before the moment of the next one.
    before_next: u64,
}

impl Known {
    fn new() -> Self {
        let chain = Chain::new(CHAIN.0);
        Self { chain, hashes: Vec::new(), printed: 0, floor: 0, next: None, newest: 0, before_next: 0 }
    }

    fn hash(&mut self, step: u64) -> &str {
        while (self.hashes.len() as u64) < step {
            self.hashes.push(self.chain.advance().1);
        }
        &self.hashes[step as usize - 1]
    }

    /// A life begins with this link.
    fn begins_with(&mut self, step: u64) -> Result<(), String> {
        // It may take a generation at once, before it gets as far as the last life.
        self.before_next = self.before_next.min(step - 1);
        match self.next.take() {
            Some(next) if next != step => Err(format!("frozen before link {next}, it went on with {step}")),
            _ if step <= self.floor => Err(format!("went on with link {step}; {} were in a generation", self.floor)),
            _ => {
                self.printed = step - 1;
                Ok(())
            }
        }
    }

    /// These links come next, and are the right ones.
    fn check(&mut self, links: &[(u64, String)]) -> Result<(), String> {
        for (step, hash) in links {
            if *step != self.printed + 1 {
                return Err(format!("link {step} came after {}", self.printed));
            }
            if hash != self.hash(*step) {
                return Err(format!("link {step} is {hash}; {} follows", self.hash(*step)));
            }
            self.printed = *step;
        }
        Ok(())
    }

    /// The moment of a generation that was not there the last time lies behind what had been printed by then.
    fn saw_generations(&mut self, newest: u64) {
        if newest > self.newest {
            self.floor = self.floor.max(self.before_next);
        }
        (self.newest, self.before_next) = (newest, self.printed);
    }

    /// It is frozen, and this is all that its life printed.
    fn froze(&mut self, console: &[u8]) -> Result<(), String> {
        let mut life = links(console);
        life.retain(|(step, _)| *step > self.printed);
        self.check(&life)?;
        // A link whose line is not whole ends in the next life, which begins with the one after it.
        self.next = Some(self.printed + 1 + u64::from(!console.ends_with(b"\n")));
        Ok(())
    }
}

/// The whole links of one life. The end of a line that the life before began is none.
fn links(console: &[u8]) -> Vec<(u64, String)> {
    let text = String::from_utf8_lossy(console);
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let link = |line| {
        let (step, hash, _) = chain::parse(line)?;
        (step > 0).then(|| (step, hash.to_owned()))
    };
    whole.lines().filter_map(link).collect()
}

fn newest_generation(json: &str) -> Option<u64> {
    let document: serde_json::Value = serde_json::from_str(json).ok()?;
    let numbers = document.get("generations")?.as_array()?.iter().map(|generation| generation.get("number")?.as_u64());
    numbers.collect::<Option<Vec<_>>>().map(|numbers| numbers.into_iter().max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(steps: std::ops::RangeInclusive<u64>) -> Vec<(u64, String)> {
        let mut known = Known::new();
        steps.map(|step| (step, known.hash(step).to_owned())).collect()
    }

    #[test]
    fn a_life_that_goes_on_where_it_was_frozen_is_right_and_any_other_is_not() {
        for (next, right) in [(4, false), (5, true), (6, false)] {
            let mut known = Known::new();
            known.begins_with(1).unwrap();
            let console: String = life(1..=4).iter().map(|(step, hash)| format!("chain {step} {hash} 7\r\n")).collect();
            known.froze(console.as_bytes()).unwrap();
            assert_eq!(known.begins_with(next).is_ok(), right, "{next}");
        }
    }

    #[test]
    fn a_link_that_was_being_printed_ends_in_the_next_life() {
        let mut known = Known::new();
        known.begins_with(1).unwrap();
        let (_, hash) = &life(1..=1)[0];
        known.froze(format!("chain 1 {hash} 7\r\nchain 2 12").as_bytes()).unwrap();
        assert_eq!(links(b"34 8\r\nchain 3 abc 9\r\nchain"), [(3, "abc".to_owned())]);
        known.begins_with(3).unwrap();
    }

    #[test]
    fn what_lies_before_a_generation_that_was_seen_may_not_be_lost() {
        let mut known = Known::new();
        known.begins_with(1).unwrap();
        known.check(&life(1..=10)).unwrap();
        known.saw_generations(1);
        assert!(known.floor == 0, "the moment may be before the first link");
        known.check(&life(11..=20)).unwrap();
        known.saw_generations(2);
        assert!(known.begins_with(10).is_err());
        known.begins_with(11).unwrap();
        // The next generation may be of this life's first moment.
        known.saw_generations(3);
        known.begins_with(11).unwrap();
        known.check(&life(11..=12)).unwrap();
        assert!(known.check(&life(14..=14)).is_err() && known.check(&[(13, "another".to_owned())]).is_err());
    }
}
