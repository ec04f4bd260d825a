//! Runs world after world, several at a time, until all seeds are done or one of them goes wrong.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use shunt_sim::packets::{self, Failure, Options, Scenario, Summary};

/// Runs worlds of clients, servers and balancers in virtual time, each drawn from its seed, and checks every byte.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Streams in each world, 50,000 at the most [default: 3 to 12, by the seed]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    flows: Option<u32>,
    /// Seconds of virtual time in which they begin [default: 1 to 20, by the seed]
    #[arg(long)]
    seconds: Option<u64>,
    /// What goes wrong [default: by the seed]
    #[arg(long, value_parser = scenario, value_name = "NAME", help = scenario_help())]
    scenario: Option<Scenario>,
    /// Worlds at a time [default: one a processor]
    #[arg(long)]
    jobs: Option<usize>,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
    /// One line of JSON for each world and one for all
    #[arg(long)]
    json: bool,
    /// Only print what the worlds are made of and what will be done to them, as JSON
    #[arg(long)]
    plan: bool,
    /// Where captures of failures go
    #[arg(long, value_name = "DIR", default_value_os_t = packets::capture_folder())]
    captures: PathBuf,
}

fn names() -> String {
    Scenario::ALL.map(Scenario::name).join(", ")
}

fn scenario_help() -> String {
    format!("What goes wrong: {} [default: by the seed]", names())
}

fn scenario(name: &str) -> Result<Scenario, String> {
    let found = Scenario::ALL.into_iter().find(|scenario| scenario.name() == name);
    found.ok_or_else(|| format!("no scenario; there are {}", names()))
}

/// All worlds together.
#[derive(Debug, Default, Serialize)]
struct Total {
    worlds: u64,
    failed: u64,
    flows: u64,
    whole: u64,
    broken: u64,
    abandoned: u64,
    redirected: u64,
    moves: u64,
    packets: u64,
    virtual_hours: u64,
    seconds: f64,
}

impl Total {
    fn add(&mut self, world: &Summary) {
        self.worlds += 1;
        self.flows += world.flows;
        self.whole += world.whole;
        self.broken += world.broken;
        self.abandoned += world.abandoned;
        self.redirected += world.redirected;
        self.moves += world.moves;
        self.packets += world.packets;
    }
}

struct Run {
    arguments: Arguments,
    next: AtomicU64,
    stop: AtomicBool,
    virtual_ms: AtomicU64,
    total: Mutex<Total>,
    progress: ProgressBar,
}

impl Run {
    fn options(&self, seed: u64) -> Options {
        let Arguments { flows, seconds, scenario, .. } = self.arguments;
        Options { seed, scenario, flows: flows.map(|flows| flows as usize), seconds }
    }

    /// One thread's part.
    fn work(&self) -> anyhow::Result<()> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.arguments.seeds || self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let options = self.options(self.arguments.first.wrapping_add(number));
            match packets::run(&options, &self.arguments.captures) {
                Ok(summary) => self.on_summary(&summary)?,
                Err(failure) => self.on_failure(&failure)?,
            }
            self.progress.inc(1);
        }
    }

    fn on_summary(&self, summary: &Summary) -> anyhow::Result<()> {
        self.virtual_ms.fetch_add(summary.virtual_ms, Ordering::Relaxed);
        let mut total = lock(&self.total);
        total.add(summary);
        if self.arguments.json {
            writeln!(std::io::stdout(), "{}", serde_json::to_string(summary)?)?;
        }
        Ok(())
    }

    fn on_failure(&self, failure: &Failure) -> anyhow::Result<()> {
        lock(&self.total).failed += 1;
        if !self.arguments.keep_going {
            self.stop.store(true, Ordering::Relaxed);
        }
        let mut result = Ok(());
        self.progress.suspend(|| {
            result = if self.arguments.json {
                let line = serde_json::json!({
                    "seed": failure.options.seed,
                    "scenario": failure.scenario,
                    "violation": failure.violation.to_string(),
                    "again": failure.command(),
                    "capture": failure.capture,
                });
                writeln!(std::io::stdout(), "{line}")
            } else {
                writeln!(std::io::stderr(), "{failure}")
            };
        });
        Ok(result?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn progress(seeds: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} worlds, {per_sec}, {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(seeds) } else { ProgressBar::hidden() };
    bar.with_style(style)
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let jobs = arguments.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let progress = progress(arguments.seeds);
    let run = Run {
        arguments,
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        virtual_ms: AtomicU64::new(0),
        total: Mutex::default(),
        progress,
    };
    if run.arguments.plan {
        for number in 0..run.arguments.seeds {
            let plan = packets::plan(&run.options(run.arguments.first.wrapping_add(number)));
            writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&plan)?)?;
        }
        return Ok(());
    }
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(|| run.work())).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    run.progress.finish_and_clear();
    let mut total = lock(&run.total);
    total.seconds = begun.elapsed().as_secs_f64();
    total.virtual_hours = run.virtual_ms.load(Ordering::Relaxed) / 3_600_000;
    if run.arguments.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&*total)?)?;
    } else {
        let Total { worlds, failed, flows, whole, broken, abandoned, redirected, moves, packets, .. } =
            *total;
        writeln!(
            std::io::stdout(),
            "{worlds} worlds without a fault, {failed} with one, in {:.1} s ({} hours of their time)\n\
             {flows} streams: {whole} whole, {broken} broken for a reason, {abandoned} dropped by their programs\n\
             {redirected} on service ports, {moves} moves, {packets} packets",
            total.seconds,
            total.virtual_hours
        )?;
    }
    if total.failed > 0 {
        std::process::exit(1);
    }
    Ok(())
}
