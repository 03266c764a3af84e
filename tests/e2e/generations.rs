//! What is done with generations: recovery, rollback, forks, and the store they lie in. The guest is `counter`, whose chain of
//! hashes shows every byte of memory that is not what it was: each life of the VM is a segment of what it printed, and a
//! segment may begin at any byte that was printed before, never elsewhere.

mod cuts;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use guests::chain::{ChainReport, verify_segments};
use serde_json::Value;
use tests::perdure::{Ended, LIMIT, Perdure, Running, Signal, binary};

const RUN: [&str; 8] = ["run", "web", "--guest", "counter", "--memory", "16M", "--cmdline", "hz=100 ticks=100000"];

/// A VM and all that it has printed, life by life.
struct Web {
    perdure: Perdure,
    name: &'static str,
    lives: Vec<String>,
}

impl Web {
    fn new() -> Self {
        Self { perdure: Perdure::new(), name: "web", lives: Vec::new() }
    }

    /// Starts a life, and lets it tick.
    #[track_caller]
    fn begin(&self, arguments: &[&str]) -> Running {
        let running = self.perdure.spawn(arguments);
        let ticks = |stdout: &str| stdout.lines().filter(|line| line.starts_with("tick ")).count();
        running.wait_until("tick", LIMIT, |stdout| ticks(stdout) >= 5);
        running
    }

    /// A life from `arguments` to a freeze. Returns what was told on stderr.
    #[track_caller]
    fn live(&mut self, arguments: &[&str]) -> String {
        let running = self.begin(arguments);
        self.perdure.run(&["powerfail", self.name]).expect_code(0);
        let ended = running.wait(LIMIT).expect_code(3);
        self.lives.push(ended.stdout);
        ended.stderr
    }

    /// A life from `arguments` to a cut that nobody announced.
    #[track_caller]
    fn live_and_die(&mut self, arguments: &[&str]) -> String {
        let running = self.begin(arguments);
        running.signal(Signal::KILL);
        let ended = running.wait(LIMIT);
        assert_eq!(ended.signal, Some(9), "{}", ended.stderr);
        self.lives.push(ended.stdout);
        ended.stderr
    }

    /// A generation of the frozen VM.
    #[track_caller]
    fn take(&self) -> String {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("export");
        let ended = self.perdure.run(&["export", self.name, path(&file)]).expect_code(0);
        ended.stdout.split(' ').next().expect("the generation's name").to_owned()
    }

    /// Every life's every byte is what it must be.
    #[track_caller]
    fn unbroken(&self) -> ChainReport {
        let lives: Vec<&str> = self.lives.iter().map(String::as_str).filter(|life| !life.is_empty()).collect();
        verify_segments(&lives).unwrap_or_else(|error| panic!("{error}\n{:#?}", self.lives))
    }

    fn generations(&self) -> Vec<Value> {
        let listed = self.perdure.run(&["generations", self.name, "--json"]).expect_code(0).json();
        listed["generations"].as_array().expect("generations").clone()
    }

    fn ids(&self) -> Vec<String> {
        let id = |generation: &Value| generation["id"].as_str().expect("an id").to_owned();
        self.generations().iter().map(id).collect()
    }

    fn state(&self) -> String {
        let inspected = self.perdure.run(&["inspect", self.name, "--json"]).expect_code(0).json();
        inspected["state"].as_str().expect("a state").to_owned()
    }

    fn packs(&self, prefix: &str) -> Vec<PathBuf> {
        let directory = self.perdure.pool().join("generations").join("web").join("packs");
        let entries = fs::read_dir(directory).expect("packs").map(|entry| entry.expect("a pack").path());
        let mut packs: Vec<_> = entries
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
            .collect();
        packs.sort();
        packs
    }

    fn lengths(&self) -> Vec<(PathBuf, u64)> {
        self.packs("").into_iter().map(|pack| (pack.clone(), pack.metadata().expect("a pack").len())).collect()
    }

    /// Flips every byte of packs `prefix…` that lies beyond `lengths`.
    fn damage_beyond(&self, prefix: &str, lengths: &[(PathBuf, u64)]) {
        let mut flipped = 0;
        for pack in self.packs(prefix) {
            let from = lengths.iter().find(|(path, _)| *path == pack).map_or(0, |(_, length)| *length);
            flipped += flip(&pack, from, u64::MAX);
        }
        assert!(flipped > 0, "there was nothing to damage");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Flips up to `count` bytes of a file from `from` on; says how many.
fn flip(file: &Path, from: u64, count: u64) -> u64 {
    let mut open = fs::OpenOptions::new().read(true).write(true).open(file).expect("a file of the store");
    open.seek(SeekFrom::Start(from)).expect("seek");
    let mut bytes = Vec::new();
    (&mut open).take(count).read_to_end(&mut bytes).expect("read");
    bytes.iter_mut().for_each(|byte| *byte ^= 0xFF);
    open.seek(SeekFrom::Start(from)).expect("seek");
    open.write_all(&bytes).expect("write");
    bytes.len() as u64
}

#[test]
fn a_rollback_goes_on_where_the_generation_was_and_keeps_what_was() {
    let mut web = Web::new();
    web.live(&RUN);
    assert_eq!(web.take(), "web@1");
    web.live(&["resume", "web"]);
    let told = web.live(&["resume", "web", "--generation", "1"]);
    assert!(told.contains("goes on from generation web@1"), "{told}");
    assert!(told.contains("what was is generation web@2"), "{told}");
    let report = web.unbroken();
    assert!(report.rewound >= 1, "{report:?}");

    let kept = &web.generations()[1];
    assert_eq!(kept["label"], "before the rollback to web@1");
    // Forward again, to what was kept; and back, keeping nothing.
    web.live(&["resume", "web", "--generation", "web@2"]);
    let before = web.ids().len();
    web.live(&["resume", "web", "--generation", "1", "--discard"]);
    web.live(&["resume", "web"]);
    assert_eq!(web.ids().len(), before + 1, "the chosen one anew, and nothing kept: {:?}", web.ids());
    web.unbroken();
}

#[test]
fn a_vm_killed_without_warning_goes_on_from_its_newest_generation_and_is_told_to() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    web.live(&["resume", "web"]);
    web.take();
    web.live_and_die(&["resume", "web"]);
    assert_eq!(web.state(), "unclean");
    let told = web.live(&["resume", "web"]);
    assert!(told.contains("was cut off while it ran"), "{told}");
    assert!(told.contains("goes on from generation web@2") && told.contains(" old ("), "{told}");
    assert!(web.unbroken().rewound >= 1);
}

/// `resume --snapshot-every` used to be forgotten at the first cut: from then on no generation was taken any more.
#[test]
fn what_a_resume_or_a_fresh_start_changed_holds_after_a_cut_too() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    web.live_and_die(&["resume", "web", "--snapshot-every", "1h", "--max-snapshots", "7"]);
    let told = web.live(&["resume", "web"]);
    assert!(told.contains("goes on from generation web@1"), "{told}");
    assert_eq!(settings(&web), (Some(3_600_000), Some(7)));
    web.live_and_die(&["resume", "web"]);
    web.unbroken();
    web.live_and_die(&[&RUN[..], &["--max-snapshots", "9"]].concat());
    assert_eq!(settings(&web), (Some(3_600_000), Some(9)));
}

/// The interval of the VM's generations in milliseconds, and how many of them stay.
fn settings(web: &Web) -> (Option<u64>, Option<u64>) {
    let inspected = web.perdure.run(&["inspect", "web", "--json"]).expect_code(0).json();
    let config = &inspected["config"];
    (config["snapshot_every_ms"].as_u64(), config["generations"]["max_snapshots"].as_u64())
}

#[test]
fn after_a_rollback_a_cut_does_not_bring_back_what_was_left() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    web.live(&["resume", "web"]);
    web.live_and_die(&["resume", "web", "--generation", "1"]);
    let newest = web.generations().pop().expect("a generation");
    assert_eq!(newest["parent"], "web@1");
    let told = web.live(&["resume", "web"]);
    assert!(told.contains(newest["id"].as_str().expect("an id")), "{told}");
    web.unbroken();
    let diff = web.perdure.run(&["diff", "web", "1", "3", "--json"]).expect_code(0).json();
    assert_eq!(diff["regions"].as_array().map(|regions| regions.iter().all(|region| region["pages"] == 0)), Some(true));
}

#[test]
fn a_vm_without_generations_is_refused_as_before_and_left_alone() {
    let mut web = Web::new();
    web.live_and_die(&RUN);
    let refused = web.perdure.run(&["resume", "web"]).expect_code(1);
    assert!(refused.stderr.contains("perdure run"), "{}", refused.stderr);
    let refused = web.perdure.run(&["resume", "web", "--generation", "1"]).expect_code(1);
    assert!(refused.stderr.contains("no generations"), "{}", refused.stderr);
    assert_eq!(web.state(), "unclean");
}

/// Two generations, the second with all that it added damaged in packs `prefix…`; then a cut.
fn damaged_newest(prefixes: &[&str]) -> (Web, String) {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    let lengths = web.lengths();
    web.live(&["resume", "web"]);
    web.take();
    for prefix in prefixes {
        web.damage_beyond(prefix, &lengths);
    }
    web.live_and_die(&["resume", "web"]);
    let told = web.live(&["resume", "web"]);
    (web, told)
}

#[test]
fn a_damaged_newest_generation_is_passed_over_for_the_one_before_and_named() {
    for prefixes in [&["data-"][..], &["arc-"]] {
        let (web, told) = damaged_newest(prefixes);
        assert!(told.contains("web@2 is passed over"), "{prefixes:?}: {told}");
        assert!(told.contains("goes on from generation web@1"), "{prefixes:?}: {told}");
        web.unbroken();
    }
}

#[test]
fn where_no_generation_is_whole_resume_says_so_and_what_to_do() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    web.live_and_die(&["resume", "web"]);
    web.damage_beyond("data-", &[]);
    let refused = web.perdure.run(&["resume", "web"]).expect_code(1);
    assert!(refused.stderr.contains("none of the 1 generations"), "{}", refused.stderr);
    assert!(refused.stderr.contains("scrub web --repair"), "{}", refused.stderr);
    let scrubbed = web.perdure.run(&["scrub", "web", "--json"]).expect_code(1).json();
    assert_eq!(scrubbed[0]["lost"][0]["generation"], "web@1", "{scrubbed}");
    assert_eq!(scrubbed[0]["lost"][0]["region"], "ram", "{scrubbed}");
}

#[test]
fn a_rollback_to_a_damaged_generation_alters_nothing() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    web.damage_beyond("data-", &[]);
    let refused = web.perdure.run(&["resume", "web", "--generation", "1", "--discard"]).expect_code(1);
    assert!(refused.stderr.contains("nothing was altered"), "{}", refused.stderr);
    assert_eq!(web.state(), "frozen");
    web.live(&["resume", "web"]);
    assert_eq!(web.unbroken().rewound, 0);
}

#[test]
fn repair_heals_a_mirror_and_a_scrub_of_the_pool_is_clean_again() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    assert!(web.perdure.run(&["scrub"]).expect_code(0).stdout.contains("all well"));
    let mirror = web.packs("arc-").into_iter().find(|pack| path(pack).ends_with(".a")).expect("a mirror");
    flip(&mirror, 4096, 64);
    let scrubbed = web.perdure.run(&["scrub", "web", "--json"]).expect_code(1).json();
    assert_eq!(scrubbed[0]["damage"][0]["healable"], true, "{scrubbed}");
    assert_eq!(scrubbed[0]["lost"].as_array().map(Vec::len), Some(0), "{scrubbed}");
    let repaired = web.perdure.run(&["scrub", "web", "--repair", "--json"]).expect_code(0).json();
    assert!(repaired[0]["healed"].as_array().is_some_and(|healed| !healed.is_empty()), "{repaired}");
    web.perdure.run(&["scrub"]).expect_code(0);
    web.live_and_die(&["resume", "web"]);
    web.live(&["resume", "web"]);
    web.unbroken();
}

#[test]
fn an_export_goes_on_in_another_pool() {
    let mut web = Web::new();
    web.live(&RUN);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("web.export");
    web.perdure.run(&["export", "web", path(&file)]).expect_code(0);
    let again = web.perdure.run(&["export", "web", path(&file)]).expect_code(1);
    assert!(again.stderr.contains("exists"), "{}", again.stderr);

    let mut other = Web { name: "shop", ..Web::new() };
    other.lives.clone_from(&web.lives);
    let whole = fs::read(&file).expect("the export");
    let torn = directory.path().join("torn.export");
    fs::write(&torn, &whole[..whole.len() / 2]).expect("half of it");
    other.perdure.run(&["import", path(&torn), "shop"]).expect_code(1);
    let mut bent = whole.clone();
    bent[whole.len() / 2] ^= 1;
    fs::write(&torn, &bent).expect("a bent one");
    let refused = other.perdure.run(&["import", path(&torn), "shop"]).expect_code(1);
    assert!(refused.stderr.contains("damaged"), "{}", refused.stderr);
    assert_eq!(other.perdure.run(&["list", "--json"]).expect_code(0).json().as_array().map(Vec::len), Some(0));

    other.perdure.run(&["import", path(&file), "shop"]).expect_code(0);
    other.live(&["resume", "shop"]);
    assert_eq!(other.unbroken().rewound, 0);
    let refused = other.perdure.run(&["import", path(&file), "shop"]).expect_code(1);
    assert!(refused.stderr.contains("exists already"), "{}", refused.stderr);
    // The first one goes on from the same moment.
    web.live(&["resume", "web"]);
    web.unbroken();
}

#[test]
fn a_fork_and_its_origin_go_on_independently_and_share_what_is_equal() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    let stored = |web: &Web| web.perdure.run(&["generations", "web", "--json"]).json()["store"]["page_bytes"].as_u64();
    let before = stored(&web);
    web.perdure.run(&["fork", "web@1", "sibling"]).expect_code(0);
    assert_eq!(stored(&web), before, "a fork stores no page");
    let mut sibling = Web { perdure: Perdure::on(web.perdure.pool()), name: "sibling", lives: web.lives.clone() };
    sibling.live(&["resume", "sibling"]);
    web.live(&["resume", "web"]);
    sibling.live_and_die(&["resume", "sibling"]);
    sibling.live(&["resume", "sibling"]);
    sibling.unbroken();
    assert_eq!(web.unbroken().rewound, 0);
    assert_eq!(sibling.ids(), ["sibling@1"]);
    for name in ["web", "sibling"] {
        let refused = web.perdure.run(&["fork", "web", name]).expect_code(1);
        assert!(refused.stderr.contains("exists already"), "{}", refused.stderr);
    }
    // Of a frozen VM without a generation of that moment: one is taken.
    web.perdure.run(&["fork", "web", "third"]).expect_code(0);
    let mut third = Web { perdure: Perdure::on(web.perdure.pool()), name: "third", lives: web.lives.clone() };
    third.live(&["resume", "third"]);
    assert_eq!(third.unbroken().rewound, 0);

    // The store goes with the last of the family.
    let store = web.perdure.pool().join("generations").join("web");
    for (name, left) in [("web", true), ("third", true), ("sibling", false)] {
        web.perdure.run(&["remove", "--force", name]).expect_code(0);
        assert_eq!(store.exists(), left, "{name}");
    }
}

#[test]
fn protect_purge_and_prune_delete_what_they_may_and_nothing_else() {
    let mut web = Web::new();
    web.live(&RUN);
    for number in 1..=4 {
        assert_eq!(web.take(), format!("web@{number}"));
        web.live(&["resume", "web"]);
    }
    web.perdure.run(&["protect", "web", "2"]).expect_code(0);
    let refused = web.perdure.run(&["purge", "web", "1", "web@2"]).expect_code(1);
    assert!(refused.stderr.contains("web@2 is protected"), "{}", refused.stderr);
    assert_eq!(web.ids(), ["web@1", "web@2", "web@3", "web@4"], "all or none");
    web.perdure.run(&["purge", "web", "1", "--sweep"]).expect_code(0);
    web.perdure.run(&["purge", "web", "1"]).expect_code(1);
    web.perdure.run(&["protect", "web", "2", "--off"]).expect_code(0);
    web.perdure.run(&["purge", "web", "2"]).expect_code(0);
    assert_eq!(web.ids(), ["web@3", "web@4"]);
    // By hand, so no policy touches them; the two that a rollback makes anew are automatic.
    web.live(&["resume", "web", "--generation", "3", "--discard"]);
    web.live(&["resume", "web", "--generation", "4", "--discard"]);
    let prune = |more: &[&str]| {
        let arguments = [&["prune", "web", "--max-snapshots", "1", "--min-snapshots", "1", "--json"], more].concat();
        web.perdure.run(&arguments).expect_code(0).json()
    };
    let would = prune(&["--dry-run"]);
    assert_eq!((&would["generations"][0]["id"], &would["deleted"]), (&Value::from("web@5"), &Value::from(false)));
    assert_eq!(web.ids(), ["web@3", "web@4", "web@5", "web@6"]);
    let done = prune(&[]);
    assert_eq!((&done["generations"], &done["kept"]), (&would["generations"], &Value::from(3)));
    assert_eq!(web.ids(), ["web@3", "web@4", "web@6"]);
    web.perdure.run(&["scrub", "web"]).expect_code(0);
    web.live_and_die(&["resume", "web"]);
    web.live(&["resume", "web"]);
    web.unbroken();
}

#[test]
fn several_commands_at_once_on_a_running_vm_all_get_their_turn() {
    let mut web = Web::new();
    web.live(&RUN);
    for _ in 0..4 {
        web.take();
        web.live(&["resume", "web"]);
    }
    let running = web.begin(&["resume", "web"]);
    let commands: [&[&str]; 7] = [
        &["purge", "web", "1", "--sweep"],
        &["purge", "web", "2", "--sweep"],
        &["protect", "web", "3"],
        &["scrub", "web", "--repair"],
        &["fork", "web@4", "one"],
        &["fork", "web@4", "two"],
        &["generations", "web", "--json"],
    ];
    let all: Vec<Running> = commands.iter().map(|arguments| web.perdure.spawn(arguments)).collect();
    for ended in all.into_iter().map(|one| one.wait(LIMIT)) {
        ended.expect_code(0);
    }
    assert_eq!(web.ids(), ["web@3", "web@4"]);
    web.perdure.run(&["scrub"]).expect_code(0);
    let refused = web.perdure.run(&["resume", "web", "--generation", "3"]).expect_code(1);
    assert!(refused.stderr.contains("in use by"), "{}", refused.stderr);
    let refused = web.perdure.run(&["remove", "web"]).expect_code(1);
    assert!(!refused.stderr.is_empty());
    assert_eq!(web.ids(), ["web@3", "web@4"], "a removal that is refused removes nothing");
    web.perdure.run(&["powerfail", "web"]).expect_code(0);
    web.lives.push(running.wait(LIMIT).stdout);
    assert_eq!(web.unbroken().rewound, 0);
}

#[test]
fn a_store_that_cannot_be_opened_is_told_and_is_no_trouble_for_others() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    let other = web.perdure.pool().join("generations").join("other");
    fs::create_dir(&other).expect("a directory");
    // No more than that is a store which a cut kept from being made.
    web.perdure.run(&["scrub"]).expect_code(0);
    fs::write(other.join("ledger-a"), "no ledger").expect("a file");
    let scrubbed = web.perdure.run(&["scrub"]).expect_code(1);
    assert!(scrubbed.stderr.contains("other") && scrubbed.stdout.contains("web: all well"), "{scrubbed:?}");
    web.perdure.run(&["fork", "web", "sibling"]).expect_code(0);
    // Its own is another matter: but what is frozen goes on.
    let store = web.perdure.pool().join("generations").join("web");
    for ledger in ["ledger-a", "ledger-b"] {
        fs::write(store.join(ledger), [0xA5; 8192]).expect("a ledger");
    }
    web.perdure.run(&["generations", "web"]).expect_code(1);
    web.live(&["resume", "web"]);
    assert_eq!(web.unbroken().rewound, 0);
    assert_eq!(web.perdure.run(&["list"]).expect_code(0).stdout.lines().count(), 3);
    web.perdure.run(&["remove", "--force", "web"]).expect_code(0);
    assert!(store.exists(), "what cannot be read is not removed by the way");
}

#[test]
fn of_two_recoveries_at_once_one_goes_on_and_the_other_says_who_has_it() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    for _ in 0..4 {
        web.live_and_die(&["resume", "web"]);
        let both =
            [web.perdure.spawn(&["resume", "web", "--detach"]), web.perdure.spawn(&["resume", "web", "--detach"])];
        let ended = both.map(|one| one.wait(LIMIT));
        let codes = ended.each_ref().map(|one| one.code);
        assert!(codes == [Some(0), Some(1)] || codes == [Some(1), Some(0)], "{ended:?}");
        let refused = ended.iter().find(|one| one.code == Some(1)).expect("one");
        assert!(refused.stderr.contains("in use by"), "{}", refused.stderr);
        web.perdure.run(&["powerfail", "web"]).expect_code(0);
    }
    web.live(&["resume", "web"]);
}

/// Runs a command where the pool's generations lie on a full disk, in a mount namespace of its own.
fn run_on_full_disk(perdure: &Perdure, arguments: &[&str]) -> Ended {
    let script = "mount -t tmpfs -o size=4M full /mnt && cp -a \"$1/generations/.\" /mnt/ && mount --bind /mnt \"$1/generations\"
        dd if=/dev/zero of=/mnt/filler bs=4096 2>/dev/null || true
        pool=$1; shift; exec \"$0\" --pool \"$pool\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-e", "-c", script]).arg(binary()).arg(perdure.pool()).args(arguments);
    let mut running = Running::start(&mut command, format!("{} on a full disk", arguments.join(" ")));
    running.close_stdin();
    running.wait(LIMIT)
}

#[test]
fn on_a_full_disk_what_cannot_be_kept_is_not_given_up() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    web.live(&["resume", "web"]);
    for arguments in [&["resume", "web", "--generation", "1"][..], &["fork", "web", "sibling"]] {
        let refused = run_on_full_disk(&web.perdure, arguments).expect_code(1);
        assert!(refused.stderr.contains("No space left"), "{arguments:?}: {}", refused.stderr);
        assert_eq!(web.state(), "frozen", "{arguments:?}");
    }
    web.live(&["resume", "web"]);
    assert_eq!(web.unbroken().rewound, 0);
    assert_eq!(web.ids(), ["web@1"]);
}

#[test]
fn a_context_lost_in_both_slots_is_restored_from_a_generation() {
    let mut web = Web::new();
    web.live(&RUN);
    web.take();
    let regions = web.perdure.run(&["pool", "list", "--json"]).expect_code(0).json();
    let context = regions.as_array().expect("regions").iter().find(|region| region["kind"] == "context").expect("it");
    let file = Path::new(context["file"].as_str().expect("a file"));
    let (length, size) = (file.metadata().expect("it").len(), context["size"].as_u64().expect("its size"));
    flip(file, length - size, u64::MAX);
    let told = web.live(&["resume", "web"]);
    assert!(told.contains("goes on from generation web@1"), "{told}");
    assert_eq!(web.unbroken().rewound, 0);
}

/// The numbers of the ticks in what was printed.
fn ticks(output: &str) -> impl DoubleEndedIterator<Item = u64> {
    output.lines().filter_map(|line| line.strip_prefix("tick ")?.split_once(' ')?.0.parse().ok())
}

#[test]
fn a_vm_that_takes_generations_by_itself_loses_little_more_than_the_interval_each_time_it_is_killed() {
    let mut web = Web::new();
    let every = ["--snapshot-every", "200ms"];
    let mut arguments = [&RUN[..], &every].concat();
    for round in 0..6 {
        let running = web.perdure.spawn(&arguments);
        running.wait_until("many ticks", LIMIT, |stdout| ticks(stdout).count() > 90);
        running.signal(Signal::KILL);
        let ended = running.wait(LIMIT);
        if let Some(before) = web.lives.last().and_then(|life| ticks(life).next_back()) {
            let first = ticks(&ended.stdout).next().expect("a tick");
            // 20 ticks an interval; the one under way at the cut is lost too, and this machine has other things to do.
            assert!(before.saturating_sub(first) < 120, "round {round}: from tick {before} back to {first}");
            assert!(ended.stderr.contains("goes on from generation web@"), "{}", ended.stderr);
        }
        web.lives.push(ended.stdout);
        arguments = vec!["resume", "web"];
    }
    assert!(web.unbroken().ticks > 200, "it does not get on");
    web.perdure.run(&["scrub", "web"]).expect_code(0);
}

#[test]
fn a_running_vm_is_forked_exported_and_diffed_from_its_newest_generation() {
    let mut web = Web::new();
    let running = web.begin(&RUN);
    web.perdure.run(&["snapshot", "web", "--label", "one"]).expect_code(0);
    web.perdure.run(&["snapshot", "web", "--protect"]).expect_code(0);
    let diff = web.perdure.run(&["diff", "web", "1", "2", "--json"]).expect_code(0).json();
    assert!(diff["regions"][0]["pages"].as_u64() > Some(0), "{diff}");
    web.perdure.run(&["fork", "web", "sibling"]).expect_code(0);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("web.export");
    web.perdure.run(&["export", "web@1", path(&file)]).expect_code(0);
    web.perdure.run(&["import", path(&file), "copy"]).expect_code(0);
    assert_eq!(web.ids(), ["web@1", "web@2"], "a running VM is not captured by the way");
    let vms = web.perdure.run(&["list", "--json"]).expect_code(0).json();
    let of = |name: &str| vms.as_array().and_then(|vms| vms.iter().find(|vm| vm["name"] == name)).cloned();
    assert_eq!(of("web").expect("web")["generations"]["newest"], "web@2");
    web.perdure.run(&["powerfail", "web"]).expect_code(0);
    web.lives.push(running.wait(LIMIT).stdout);
    for name in ["sibling", "copy"] {
        let mut other = Web { perdure: Perdure::on(web.perdure.pool()), name, lives: web.lives.clone() };
        other.live(&["resume", name]);
        assert!(other.unbroken().rewound >= 1);
    }
    let refused = web.perdure.run(&["remove", "web", "--force"]);
    refused.expect_code(0);
    assert_eq!(web.perdure.run(&["generations", "web"]).code, Some(1));
}
