//! The command line: one command a file.

mod balloon;
mod bench;
mod console;
mod demo;
mod diff;
mod doctor;
mod export;
mod fork;
mod generations;
mod import;
mod inspect;
mod lineage;
mod list;
mod live;
mod man;
mod names;
mod outage;
mod output;
mod pause;
mod pool;
mod power;
mod progress;
mod protect;
mod prune;
mod purge;
mod remove;
mod resume;
mod retention;
mod run;
mod scrub;
mod snapshot;
mod stop;
mod survey;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use allocator::{CatalogError, Pool, PoolError};
use anyhow::Context as _;
use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::machine::config::ConfigError;

/// The guest was frozen by a power-fail signal, and can be resumed.
const EXIT_FROZEN: u8 = 3;

/// Virtual machines that outlive the power.
#[derive(Debug, Parser)]
#[command(name = "perdure", version, about, max_term_width = 100, after_help = AFTER_HELP, propagate_version = true)]
struct Cli {
    /// Directory of the pool [default: $XDG_STATE_HOME/perdure, else ~/.local/state/perdure]
    #[arg(long, global = true, value_name = "DIR", env = "PERDURE_POOL")]
    pool: Option<PathBuf>,
    /// More words on standard error; twice for still more. PERDURE_LOG=debug does the same
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
The story in four lines:
  perdure run web --guest counter --detach     a VM whose memory is a region, web/ram
  perdure powerfail web                        the power is going: all is made durable
  perdure resume web                           it is back: the guest's next instruction
  perdure demo                                 the same, checked and timed

Exit status: 0 done (run, resume: the guest powered off), 1 failed, 2 usage,
3 frozen by a power-fail signal (run, resume).";

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Resume(resume::Args),
    Powerfail(power::FailArgs),
    Powerback(power::BackArgs),
    List(list::Args),
    Top(top::Args),
    Inspect(inspect::Args),
    Console(console::Args),
    Stop(stop::Args),
    /// Take memory from a running guest, or give it back
    Balloon(balloon::Args),
    /// Stop a virtual machine's CPUs where they are
    Pause(pause::Args),
    /// Let a paused virtual machine run on
    Unpause(pause::Args),
    Snapshot(snapshot::Args),
    Generations(generations::Args),
    Diff(diff::Args),
    Protect(protect::Args),
    Purge(purge::Args),
    Prune(prune::Args),
    Scrub(scrub::Args),
    Fork(fork::Args),
    Export(export::Args),
    Import(import::Args),
    Remove(remove::Args),
    Pool(pool::Args),
    Outage(outage::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
    Completions(man::CompletionArgs),
    /// Print the manual page (troff)
    Man,
}

/// What commands share.
#[derive(Debug)]
struct Environment {
    pool: PathBuf,
}

impl Environment {
    /// The pool, which must be there.
    fn open_pool(&self) -> anyhow::Result<Pool> {
        Ok(Pool::open(&self.pool, vfs::cut::host())?)
    }

    /// The pool, if there is one.
    fn open_pool_if_any(&self) -> anyhow::Result<Option<Pool>> {
        match Pool::open(&self.pool, vfs::cut::host()) {
            Err(PoolError::Catalog(CatalogError::Missing { .. })) => Ok(None),
            other => Ok(Some(other?)),
        }
    }

    /// The pool, made if it is not there.
    fn open_or_create_pool(&self) -> anyhow::Result<Pool> {
        Ok(Pool::create_or_open(&self.pool, vfs::cut::host())?)
    }
}

/// Parses, runs, and turns the result into an exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.verbose);
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            let (why, code) = (one_line(&error), exit_code(&error));
            eprintln!("perdure: {why}");
            live::report_failure(why, code);
            ExitCode::from(code)
        }
    }
}

/// 2 if the command line asks for a VM that cannot be, else 1.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<ConfigError>() { 2 } else { 1 }
}

/// An error with its causes, none said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&words);
        }
    }
    text
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let pool = match cli.pool {
        Some(pool) => pool,
        None => allocator::default_pool_dir().context("cannot tell where the pool is: use --pool DIR")?,
    };
    let pool = std::path::absolute(&pool).with_context(|| format!("cannot use {} as a pool", pool.display()))?;
    let environment = Environment { pool };
    let done = |()| ExitCode::SUCCESS;
    match cli.command {
        Command::Run(args) => run::run(&environment, &args),
        Command::Resume(args) => resume::run(&environment, &args),
        Command::Powerfail(args) => power::fail(&environment, &args),
        Command::Powerback(args) => power::back(&environment, &args),
        Command::List(args) => list::run(&environment, &args).map(done),
        Command::Top(args) => top::run(&environment, &args).map(done),
        Command::Inspect(args) => inspect::run(&environment, &args).map(done),
        Command::Console(args) => console::run(&environment, &args).map(done),
        Command::Stop(args) => stop::run(&environment, &args).map(done),
        Command::Balloon(args) => balloon::run(&environment, &args).map(done),
        Command::Pause(args) => pause::pause(&environment, &args).map(done),
        Command::Unpause(args) => pause::unpause(&environment, &args).map(done),
        Command::Snapshot(args) => snapshot::run(&environment, &args).map(done),
        Command::Generations(args) => generations::run(&environment, &args).map(done),
        Command::Diff(args) => diff::run(&environment, &args).map(done),
        Command::Protect(args) => protect::run(&environment, &args).map(done),
        Command::Purge(args) => purge::run(&environment, &args).map(done),
        Command::Prune(args) => prune::run(&environment, &args).map(done),
        Command::Scrub(args) => scrub::run(&environment, &args),
        Command::Fork(args) => fork::run(&environment, &args).map(done),
        Command::Export(args) => export::run(&environment, &args).map(done),
        Command::Import(args) => import::run(&environment, &args).map(done),
        Command::Remove(args) => remove::run(&environment, &args).map(done),
        Command::Pool(args) => pool::run(&environment, &args),
        Command::Outage(args) => outage::run(&environment, &args),
        Command::Demo(args) => demo::run(&args).map(done),
        Command::Bench(args) => bench::run(&environment, &args).map(done),
        Command::Doctor(args) => doctor::run(&environment, &args),
        Command::Completions(args) => man::completions(Cli::command(), &args).map(done),
        Command::Man => man::man(Cli::command()).map(done),
    }
}

fn start_logging(verbose: u8) {
    let by_flag = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let wanted = std::env::var("PERDURE_LOG").ok().filter(|_| verbose == 0);
    let filter = wanted.as_deref().unwrap_or(by_flag);
    let targets: Targets = filter.parse().unwrap_or_else(|error| {
        eprintln!("perdure: PERDURE_LOG: {error}; see `perdure --help`");
        Targets::new().with_default(tracing::Level::WARN)
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    tracing_subscriber::registry().with(lines).with(targets).init();
}
