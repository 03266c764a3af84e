//! A campaign of power cuts: one guest, whose machine loses its power again and again, at moments drawn by a seed.
//!
//! The [`Guest`] is a stock Linux that prints a hash chain ([`Chain`]), or Debian with SQLite ([`Sqlite`]). It runs with a generation a second.
//! A cut comes
//!
//! - **running**: without a warning, in the middle of a generation or between two;
//! - **freezing**: after a power-fail signal, and before the freeze is known to be done;
//! - **frozen**: when it is;
//! - **resuming**: after the machine is up again, before the guest is known to run: a second failure in the recovery of the first.
//!
//! What must hold, whatever the moment: the VM goes on; each step that it prints (a link, a row) is the right one and the one that follows; after
//! *frozen* the very next step comes; otherwise nothing is lost that lies before the moment of a generation that was durable. Of the chain
//! no byte of its memory is of another moment; of SQLite each row is on the disk once and its database is whole, as the guest sees it in each life and
//! this machine after the last, and the guest's kernel warns of nothing.

mod chain;
mod judge;
mod sqlite;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::judge::Judge;
use super::disk::{Cache, Disk, SplitMix, make_ext4};
use super::guest;
use super::machine::{L1, Options};

pub use self::chain::Chain;
pub use self::sqlite::Sqlite;

const SOON: Duration = Duration::from_secs(90);
const GUEST_BOOT: Duration = Duration::from_secs(300);
/// In the outer machine's memory: a cut takes it.
const SERIAL: &str = "/tmp/serial";
/// With the first of them after the guest's boot: in emulation, storing what Debian does while it boots takes longer than a second.
const GENERATIONS: &str = "--snapshot-every 1s --max-snapshots 4";

/// What is cut: how it is run, and what its console says.
///
/// A *life* is the whole lines of its console since its machine was resumed; the first may be the end of one that was begun before.
pub trait Guest {
    /// Of its VM.
    fn name(&self) -> &'static str;

    /// For `perdure run`: all but its name, its medium and its console.
    fn words(&self) -> String;

    /// For [`Options::qemu`].
    fn qemu(&self) -> Vec<String> {
        Vec::new()
    }

    /// So many times what the chain takes it takes to freeze, to come back and to have a generation stored, in the lab.
    fn slower(&self) -> u64 {
        1
    }

    /// Whether this life has looked at all that went through the cut.
    fn has_shown_enough(&self, life: &str) -> bool;

    /// The numbers of the steps that a life reports, in its order; the first that a guest ever does is 1.
    ///
    /// # Errors
    ///
    /// What shows by itself that something is not as it was.
    fn steps(&mut self, life: &str) -> Result<Vec<u64>, String>;

    /// Ends it, if it knows an end. All that this life said.
    fn end(&mut self, _l1: &mut L1, _place: &Place<'_>) -> Option<String> {
        None
    }

    /// Looks, after that, at what it left, which is of so many steps.
    ///
    /// # Panics
    ///
    /// When that is not as it must be.
    fn inspect(&mut self, _l1: L1, _place: &Place<'_>, _steps: u64) {}
}

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
    /// Where the machine's disks are, and the last console that was judged: what there is to look at after a violation.
    pub directory: PathBuf,
}

/// What a guest is looked at with when it has ended.
pub struct Place<'a> {
    /// For files.
    pub directory: &'a Path,
    /// What L1 is made of.
    pub options: &'a Options,
    /// The command in L1, on the campaign's pool.
    pub perdure: &'a str,
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cuts by their moment.
    pub cuts: BTreeMap<Moment, u64>,
    /// What the VM went on from, and how often.
    pub from: BTreeMap<&'static str, u64>,
    /// The most steps that were seen and had to be done again.
    pub steps_lost_most: u64,
    /// Sectors that the disk had acknowledged and not flushed when the power went, all cuts together.
    pub unflushed: usize,
}

/// Runs a campaign; `told` gets a line for each time that the machine is up again.
///
/// # Panics
///
/// On the first violation; the message has the seed, the cut and its moment.
pub fn campaign<G: Guest>(plan: &Plan, guest: G, told: &mut dyn FnMut(&str)) -> Tally {
    let disk = Disk::create(&plan.directory.join("disk"), 3072, Cache::Volatile { seed: plan.seed });
    let dax = plan.directory.join("pmem");
    make_ext4(&dax, 768);
    let files = guest::files(&plan.chain);
    let options = Options { disk: Some(disk), dax: Some(dax), files, qemu: guest.qemu(), ..Options::default() };
    let home = if plan.medium == "dax" { "/dax" } else { "/pool" };
    let perdure = format!("export PERDURE_POOL={home}/pool PERDURE_LOG=info; perdure");
    let (judge, draw) = (Judge::new(guest), SplitMix(!plan.seed));
    let mut campaign = Campaign { plan, options, perdure, draw, judge, tally: Tally::default() };
    campaign.run(told);
    campaign.tally
}

struct Campaign<'a, G> {
    plan: &'a Plan,
    options: Options,
    /// The command in L1, on this pool.
    perdure: String,
    draw: SplitMix,
    judge: Judge<G>,
    tally: Tally,
}

impl<G: Guest> Campaign<'_, G> {
    fn run(&mut self, told: &mut dyn FnMut(&str)) {
        let mut l1 = L1::boot(&self.options);
        self.start(&mut l1);
        self.live(&mut l1, false);
        let mut cuts = 0;
        while cuts < self.plan.count {
            let moment = [Moment::Running, Moment::Freezing, Moment::Frozen][self.below(3) as usize];
            self.cut(l1, moment);
            cuts += 1;
            let mut line = format!("{}: cut {cuts}, {moment}, after step {}", self.plan.medium, self.judge.printed);
            l1 = L1::boot(&self.options);
            while cuts < self.plan.count && self.below(4) == 0 {
                self.cut(l1, Moment::Resuming);
                cuts += 1;
                line += &format!("; cut {cuts}, {}", Moment::Resuming);
                l1 = L1::boot(&self.options);
            }
            told(&(line + &self.go_on(&mut l1)));
        }
        self.end(l1);
    }

    fn start(&mut self, l1: &mut L1) {
        let (perdure, name, words) = (&self.perdure, self.judge.guest.name(), self.judge.guest.words());
        let run = format!("{perdure} run {name} {words} --medium {} --serial {SERIAL} --detach", self.plan.medium);
        l1.check(&run, SOON);
        l1.wait_until(&console(), GUEST_BOOT, |seen| self.judge.guest.steps(&seen.text()) != Ok(Vec::new()));
        l1.check(&format!("{perdure} powerfail {name} && {perdure} resume {name} --detach {GENERATIONS}"), SOON);
    }

    fn go_on(&mut self, l1: &mut L1) -> String {
        let words = l1.check(&format!("{} resume {} --detach 2>&1", self.perdure, self.judge.guest.name()), GUEST_BOOT);
        let last = self.judge.printed;
        let generation = generation(&words);
        let first = self.live(l1, generation.is_some());
        let lost = (last + 1).saturating_sub(first);
        self.tally.steps_lost_most = self.tally.steps_lost_most.max(lost);
        let from = if generation.is_some() { "a generation" } else { "its context" };
        *self.tally.from.entry(from).or_default() += 1;
        let from = generation.map_or(from.to_owned(), |generation| format!("generation {generation}"));
        format!(": went on from {from} with step {first}; {lost} steps were done again")
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.draw.next() % bound
    }

    /// Waits until this life has shown enough, and a generation holds that. The first step of it.
    fn live(&mut self, l1: &mut L1, from_generation: bool) -> u64 {
        let seen = l1.wait_until(&console(), GUEST_BOOT, |seen| self.judge.has_shown_enough(&seen.output)).output;
        let first = self.judge.begins(&seen, from_generation);
        let first = self.verdict(&seen, first);
        // The clock first, whole seconds of it: a generation is of no earlier moment than it was begun.
        let now: u64 = l1.check("date +%s", SOON).trim().parse().expect("seconds");
        let list = format!("{} generations {} --json", self.perdure, self.judge.guest.name());
        l1.wait_until(&list, SOON, |seen| newest_generation(&seen.text()) > Some((now + 1) * 1000));
        self.judge.is_stored();
        first
    }

    fn cut(&mut self, mut l1: L1, moment: Moment) {
        *self.tally.cuts.entry(moment).or_default() += 1;
        let (perdure, name) = (self.perdure.clone(), self.judge.guest.name());
        match moment {
            Moment::Running => {
                self.wait_below(1500);
                let seen = l1.get(SERIAL);
                let goes_on = self.judge.goes_on(&seen);
                self.verdict(&seen, goes_on);
            }
            Moment::Freezing => {
                l1.spawn(&format!("{perdure} powerfail {name}"), "/tmp/powerfail");
                self.wait_below(400);
            }
            Moment::Frozen => {
                l1.check(&format!("{perdure} powerfail {name}"), SOON);
                let seen = l1.get(SERIAL);
                let froze = self.judge.froze(&seen);
                self.verdict(&seen, froze);
            }
            Moment::Resuming => {
                l1.spawn(&format!("{perdure} resume {name} --detach"), "/tmp/resume");
                self.wait_below(1000);
            }
        }
        // Resumed, it may have run already.
        if moment != Moment::Frozen {
            self.judge.is_cut_off();
        }
        self.tally.unflushed += l1.power_cut().unflushed;
    }

    fn wait_below(&mut self, milliseconds: u64) {
        let milliseconds = self.below(milliseconds * self.judge.guest.slower());
        std::thread::sleep(Duration::from_millis(milliseconds));
    }

    fn end(&mut self, mut l1: L1) {
        let place = Place { directory: &self.plan.directory, options: &self.options, perdure: &self.perdure };
        let Some(said) = self.judge.guest.end(&mut l1, &place) else { return };
        let goes_on = self.judge.goes_on(said.as_bytes());
        self.verdict(said.as_bytes(), goes_on);
        self.judge.guest.inspect(l1, &place, self.judge.printed);
    }

    /// Panics where it is one of a violation, which `console` shows.
    fn verdict<T>(&self, console: &[u8], judged: Result<T, String>) -> T {
        judged.unwrap_or_else(|broken| {
            let file = self.plan.directory.join("console");
            std::fs::write(&file, console).unwrap_or_else(|error| eprintln!("{}: {error}", file.display()));
            panic!("{}, seed {}, {} cuts: {broken}", self.plan.medium, self.plan.seed, self.cuts())
        })
    }

    fn cuts(&self) -> u64 {
        self.tally.cuts.values().sum()
    }
}

fn console() -> String {
    format!("cat {SERIAL} 2>/dev/null")
}

/// The number of the generation that a VM went on from, as `perdure resume` says it.
fn generation(words: &str) -> Option<u64> {
    let number = words.split_once("goes on from generation ")?.1.split_once('@')?.1;
    number.split(|end: char| !end.is_ascii_digit()).next()?.parse().ok()
}

/// When the newest was begun, in milliseconds since 1970.
fn newest_generation(json: &str) -> Option<u64> {
    let document: serde_json::Value = serde_json::from_str(json).ok()?;
    document.get("generations")?.as_array()?.iter().filter_map(|generation| generation.get("time_ms")?.as_u64()).max()
}
