//! `shunt simulate`: connections through this balancer and through others while servers change. Reads, prints, draws;
//! decides nothing.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser};
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};
use shunt_sim::flows::{self, Contender, Options, Report, Reuse, Scenario, Summary};

use crate::EXIT_USAGE;

/// What help adds.
pub(crate) const HELP: &str = "\
Examples:
  shunt simulate                                  all scenarios, a million connections each
  shunt simulate --scenario replace --plain 0
  shunt simulate --scenario syn-flood --table-size 100000
  shunt simulate --connections 100000000 --csv flows.csv --svg flows.svg
  shunt simulate --json | tail -n 1 | jq .scenarios[0].broken

The same seed gives the same figures. Half of the connections end at once, the longest last ten
minutes; open ones send every second. Every balancer hears of a change at once. Contestants:
  redirect        this balancer: the server names a port, which leads to it from any balancer
  plain clients   this balancer's others: Maglev's hash
  Maglev hash     consistent hashing alone
  Maglev + table  and a table of connections on each balancer (least recently used go first)
  two-slot        Beamer, GLB: the server of a bucket passes on what belongs to the one before
  JET             a table of those connections only that a server announced before would take
  modulo          the hash modulo the number of servers
In server-death and forced-removal servers end while they have connections: these break whoever
balances, ours too.";

/// The arguments of `shunt simulate`.
#[derive(Debug, Args)]
pub(crate) struct SimulateArgs {
    /// How many connections are opened in each scenario.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    connections: u64,

    /// Servers at the beginning.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(10..=4096))]
    servers: u16,

    /// Balancers at the beginning.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    balancers: u16,

    /// Clients of a hundred that do not speak the protocol.
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=100))]
    plain: u8,

    /// Connections that a table holds on each balancer; by default twice the mean of those open.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    table_size: Option<u32>,

    /// Only this scenario. Repeatable; all by default.
    #[arg(long, value_name = "NAME", value_parser = scenarios())]
    scenario: Vec<String>,

    /// What everything is drawn from.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,

    /// Write a line for each scenario and contestant.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Draw the shares of broken connections into a picture.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Print one JSON object instead of the table, in the last line.
    #[arg(long)]
    json: bool,
}

fn scenarios() -> PossibleValuesParser {
    let value = |scenario: Scenario| PossibleValue::new(scenario.name()).help(scenario.about());
    Scenario::ALL.map(value).into()
}

impl SimulateArgs {
    fn options(&self) -> Options {
        Options {
            connections: self.connections,
            seed: self.seed,
            servers: usize::from(self.servers),
            balancers: usize::from(self.balancers),
            plain: self.plain,
            table_size: self.table_size,
            reuse: Reuse::WhenGone,
        }
    }

    fn scenarios(&self) -> Vec<Scenario> {
        let is_wanted = |name| self.scenario.is_empty() || self.scenario.iter().any(|wanted| wanted == name);
        Scenario::ALL.into_iter().filter(|scenario| is_wanted(scenario.name())).collect()
    }
}

/// Simulates; exit code 1 if a redirected connection broke without the end of its server, 2 for a mistake of the
/// user's.
pub(crate) fn run(arguments: &SimulateArgs) -> ExitCode {
    simulate(arguments).unwrap_or_else(|error| {
        let pipe = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if pipe == Some(io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        eprintln!("shunt: {error:#}");
        ExitCode::from(EXIT_USAGE)
    })
}

fn simulate(arguments: &SimulateArgs) -> anyhow::Result<ExitCode> {
    // Before the work, not after it.
    let csv = arguments.csv.as_deref().map(create).transpose()?;
    let svg = arguments.svg.as_deref().map(create).transpose()?;
    let begun = Instant::now();
    let summary = summary(arguments);
    let seconds = begun.elapsed().as_secs_f64();
    if let Some(file) = csv {
        summary.write_csv(file).with_context(|| named(arguments.csv.as_deref()))?;
    }
    if let Some(mut file) = svg {
        let written = file.write_all(summary.svg().as_bytes()).and_then(|()| file.flush());
        written.with_context(|| named(arguments.svg.as_deref()))?;
    }
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&summary)?)?;
    } else {
        writeln!(out, "{}\n\n{}", table(&summary), notes(&summary, seconds))?;
    }
    let misrouted = |report: &Report| report.broken.redirect > report.lost.redirect;
    if summary.scenarios.iter().any(misrouted) {
        eprintln!("shunt: redirected connections broke whose servers were there: please report the seed");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn create(path: &Path) -> anyhow::Result<BufWriter<File>> {
    Ok(BufWriter::new(File::create(path).with_context(|| named(Some(path)))?))
}

fn named(path: Option<&Path>) -> String {
    path.map_or_else(String::new, |path| path.display().to_string())
}

fn summary(arguments: &SimulateArgs) -> Summary {
    let (options, scenarios) = (arguments.options(), arguments.scenarios());
    let bar = progress(options.connections * scenarios.len() as u64);
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(scenario) = scenarios.get(index) else { return done };
            let mut told = 0;
            let mut progress = |opened| bar.inc(opened - std::mem::replace(&mut told, opened));
            done.push((index, flows::run(*scenario, &options, &mut progress)));
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(scenarios.len());
    let mut reports: Vec<(usize, Report)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let finish =
            |thread: ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        threads.into_iter().flat_map(finish).collect()
    });
    reports.sort_by_key(|(index, _)| *index);
    bar.finish_and_clear();
    Summary {
        seed: options.seed,
        servers: options.servers,
        balancers: options.balancers,
        plain_percent: options.plain,
        scenarios: reports.into_iter().map(|(_, report)| report).collect(),
    }
}

fn progress(connections: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} connections, {eta} left");
    ProgressBar::new(connections).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn table(summary: &Summary) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let titles = Contender::ALL.map(|contender| contender.title().to_owned());
    table.set_header(["broken".to_owned()].into_iter().chain(titles));
    for report in &summary.scenarios {
        let cell = |contender| match report.broken.get(contender) {
            0 => "0".to_owned(),
            _ => flows::percent(report.share(contender)),
        };
        table.add_row([report.name.to_owned()].into_iter().chain(Contender::ALL.map(cell)));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What a reader of the table must know.
fn notes(summary: &Summary, seconds: f64) -> String {
    let connections = summary.scenarios.first().map_or(0, |report| report.connections);
    let mut notes = vec![
        format!(
            "{connections} connections in each scenario, {} servers, {} balancers, {} % plain clients, seed {}; {seconds:.1} s.",
            summary.servers, summary.balancers, summary.plain_percent, summary.seed
        ),
        "Shares are of a column's own connections: redirected and plain ones are this balancer's, the"
            .to_owned(),
        "other columns have all of them. What breaks ours too: plain clients move with Maglev's hash, and"
            .to_owned(),
        "a server that dies or is removed before it is drained takes its connections along.".to_owned(),
    ];
    for report in summary.scenarios.iter().filter(|report| report.lost.redirect > 0) {
        let line = format!(
            "{}: {} redirected connections ended with their server.",
            report.name, report.lost.redirect
        );
        notes.push(line);
    }
    notes.join("\n")
}
