//! `lab`: the lab by hand, and for the end-to-end suite where `/dev/kvm` is not to be had.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::lab::bench::{self, LOADS};
use tests::lab::campaign::{Chain, Plan, Sqlite, campaign};
use tests::lab::cpio::File;
use tests::lab::disk::{Cache, Disk, make_ext4};
use tests::lab::guest;
use tests::lab::machine::{L1, Options};

const USAGE: &str = "\
usage: lab exec SCRIPT [FILE...]   boot L1 with perdure and FILEs in /bin and the guest's kernel and initramfs in
                                   /guest, run SCRIPT (a shell script in one argument) in it, print its output
       lab shell [FILE...]         the same, a script per line of stdin
       lab e2e TEST...             run these test binaries in L1, one after the other, on perdure there
       lab cuts [chain|sqlite] MEDIUM COUNT SEED
                                   COUNT power cuts of L1 under a guest (chain, if not given) on MEDIUM (file, nvdimm,
                                   dax), at moments drawn from SEED; a line for each time that it is up again; ends at the first
                                   violation, and keeps what L1's disks held then. tests/lab/cuts runs it
       lab bench devices [--rounds N] [--seconds N] [--json FILE] [LOAD...]
                                   disk and network of a stock Linux in perdure and in QEMU's microvm, in turns, in L1
       lab bench recovery [--rounds N] [--json FILE]
                                   from a VMM's start until a stock Linux answers again, in L1: perdure's resume, boots, QEMU's
                                   loadvm and its migration from a file
       lab guest FILE              write the guest's initramfs to FILE, for use outside of the lab
/pool is a disk, /dax persistent memory, both fresh each time. perdure is PERDURE_BIN, or the newest built.
";

/// One test binary of the suite, in TCG.
const SUITE_LIMIT: Duration = Duration::from_secs(900);
const SCRIPT_LIMIT: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exec", script, files @ ..] => exec(script, files),
        ["shell", files @ ..] => shell(files),
        ["e2e", tests @ ..] if !tests.is_empty() => end_to_end(tests),
        ["cuts", guest @ ("chain" | "sqlite"), rest @ ..] => cuts(guest, rest),
        ["cuts", rest @ ..] => cuts("chain", rest),
        ["bench", "devices", options @ ..] => bench_devices(options),
        ["bench", "recovery", options @ ..] => bench_recovery(options),
        ["guest", file] => {
            std::fs::write(file, guest::initrd(&beside("chain"))).unwrap_or_else(|error| panic!("{file}: {error}"));
            ExitCode::SUCCESS
        }
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn exec(script: &str, files: &[&str]) -> ExitCode {
    with_l1(files, |l1| {
        let output = l1.run(script, SCRIPT_LIMIT);
        print(&output.output);
        status(output.status)
    })
}

fn shell(files: &[&str]) -> ExitCode {
    with_l1(files, |l1| {
        eprintln!("lab: L1 is up after {:.1?}; a script per line, end of input to leave", l1.boot_time());
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            let output = l1.run(&line, SCRIPT_LIMIT);
            print(&output.output);
            if output.status != 0 {
                eprintln!("lab: status {}", output.status);
            }
        }
        ExitCode::SUCCESS
    })
}

/// Each binary's output is printed as it is, with its `test result:` line, which tests/run adds up.
fn end_to_end(tests: &[&str]) -> ExitCode {
    with_l1(tests, |l1| {
        let mut worst = 0;
        for test in tests {
            let name = name(Path::new(test));
            // One at a time: in TCG two guests at once miss the time limits that a test has for one.
            let script = format!(
                "mkdir -p /pool/tmp && cd /pool/tmp && TMPDIR=/pool/tmp PERDURE_BIN=/bin/perdure {name} --test-threads=1"
            );
            println!("     Running {name} in the lab");
            let output = l1.run(&script, SUITE_LIMIT);
            print(&output.output);
            if output.status == 137 {
                println!("{name} did not end within {SUITE_LIMIT:?}");
            }
            worst = worst.max(output.status);
        }
        status(worst)
    })
}

fn cuts(guest: &str, words: &[&str]) -> ExitCode {
    let [medium @ ("file" | "nvdimm" | "dax"), count, seed] = words else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    let number = |word: &str| word.parse().unwrap_or_else(|error| panic!("{word}: {error}\n{USAGE}"));
    let (count, seed) = (number(count), number(seed));
    let evidence = Evidence::new();
    let directory = evidence.0.path().to_owned();
    let plan = Plan { medium: (*medium).to_owned(), count, seed, chain: beside("chain"), directory };
    let begun = Instant::now();
    let told = &mut |line: &str| println!("{line}");
    let tally = match guest {
        "sqlite" => campaign(&plan, Sqlite::new(seed), told),
        _ => campaign(&plan, Chain::new(), told),
    };
    let each = begun.elapsed().as_secs_f64() / count.max(1) as f64;
    println!("{guest} on {medium}, seed {seed}: {tally:?}, {each:.1} s a cut: no violation");
    ExitCode::SUCCESS
}

/// A directory that stays if what is done with it fails.
struct Evidence(TempDir);

impl Evidence {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("perdure-cuts-").tempdir();
        Self(directory.unwrap_or_else(|error| panic!("a temporary directory: {error}")))
    }
}

impl Drop for Evidence {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.disable_cleanup(true);
            eprintln!("lab: what L1's disks held is kept in {}", self.0.path().display());
        }
    }
}

fn bench_devices(options: &[&str]) -> ExitCode {
    let mut plan = bench::Plan { rounds: 5, seconds: 2, loads: Vec::new() };
    let mut file = None;
    let mut words = options.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().copied().unwrap_or_else(|| panic!("{word} wants a value\n{USAGE}"));
        let number = |value: &str| value.parse().unwrap_or_else(|error| panic!("{word} {value}: {error}\n{USAGE}"));
        match *word {
            "--rounds" => plan.rounds = number(value()),
            "--seconds" => plan.seconds = number(value()),
            "--json" => file = Some(value()),
            load if LOADS.iter().any(|known| known.name == load) => plan.loads.push(load.to_owned()),
            other => panic!("{other}: there is no such load or option\n{USAGE}"),
        }
    }
    let report = bench::devices(&plan, &beside("chain"));
    print(report.table().as_bytes());
    if let Some(file) = file {
        std::fs::write(file, format!("{:#}\n", report.json())).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    ExitCode::SUCCESS
}

fn bench_recovery(options: &[&str]) -> ExitCode {
    let (mut rounds, mut file) = (3, None);
    for pair in options.chunks(2) {
        match pair {
            ["--rounds", number] => {
                rounds = number.parse().unwrap_or_else(|error| panic!("--rounds {number}: {error}\n{USAGE}"));
            }
            ["--json", path] => file = Some(path),
            other => panic!("{other:?}: there is no such option\n{USAGE}"),
        }
    }
    let report = bench::recovery::recovery(rounds, &beside("chain"));
    print(report.table().as_bytes());
    if let Some(file) = file {
        std::fs::write(file, format!("{:#}\n", report.json())).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    ExitCode::SUCCESS
}

fn with_l1(programs: &[&str], work: impl FnOnce(&mut L1) -> ExitCode) -> ExitCode {
    let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary directory: {error}"));
    let dax = directory.path().join("pmem");
    make_ext4(&dax, 512);
    let read = |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let program = |path: &Path| File::program(&format!("bin/{}", name(path)), read(path));
    let mut files: Vec<File> = programs.iter().map(|path| program(Path::new(path))).collect();
    files.extend(guest::files(&beside("chain")));
    let mut l1 = L1::boot(&Options {
        memory_mib: 3072,
        disk: Some(Disk::create(&directory.path().join("disk"), 4096, Cache::Host)),
        dax: Some(dax),
        files,
        ..Options::default()
    });
    work(&mut l1)
}

fn beside(program: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap_or_else(|error| panic!("where this program is: {error}"));
    this.with_file_name(program)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn print(bytes: &[u8]) {
    // A closed stdout (a pager that was left) is no failure of the tests.
    let _ = std::io::stdout().write_all(bytes);
}

fn status(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
