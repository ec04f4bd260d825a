//! `shunt replay`: a capture through the code of a role. Reads, prints, draws; decides nothing.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use shunt_captures::{Comparison, Ladder, Learned, Reader, Replay, Role, Row, SentWriter, Tally};
use shunt_host::{Source, role_of};
use shunt_stack::redirect::{ClientConfig, Continuation, OnRedirect, ServerConfig, VipConfig};
use shunt_stack::time::WallClock;

use crate::EXIT_USAGE;

/// Files larger than this show how far the replay is.
const LARGE: u64 = 16 << 20;
/// Packets between two looks at how far it is.
const PROGRESS: u64 = 8192;
/// The MTU of links, which a capture does not tell.
const MTU: usize = 1500;

/// What help adds.
pub(crate) const HELP: &str = "\
Examples:
  shunt replay web.pcapng                         what options say, and what is against the rules
  shunt replay lb.pcapng -c balancer.toml         what the balancer decides, and why
  shunt replay c.pcapng --as client --ladder      diagrams; VIPs as the capture tells them
  shunt replay web.pcapng --svg web.svg           the same as a picture
  shunt replay a.pcapng -c b.toml > a.pcapng.expect
  shunt replay a.pcapng -c b.toml --diff          exit code 1 where it says something else now

A capture made by --capture of a daemon says which packets came in and which went out: the former
are replayed, the latter compared with what the replay sends. In other captures all packets are
replayed. Secret keys are not those of the daemon: what a `random` policy selects, and sequence
numbers of answers, may differ. All servers count as healthy, and all services as listened on.";

/// What packets are replayed through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum As {
    /// A balancer; needs --config.
    Balancer,
    /// A client's shim; without --config for the VIPs that the capture shows.
    Client,
    /// A server's agent; without --config for the services that the capture shows.
    Server,
}

/// The arguments of `shunt replay`.
#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// The capture, pcap or pcapng; `-` for standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Through whose code; by default that of --config. Without either, packets are only described and held against the
    /// rules.
    #[arg(long = "as", value_name = "ROLE")]
    role: Option<As>,

    /// The configuration, TOML, of the role.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Experiment identifier of the option, where no --config says it.
    #[arg(long, value_name = "NUMBER", value_parser = exid, default_value = "0x5244", conflicts_with = "config")]
    exid: u16,

    /// Draw connections as ladder diagrams instead of a line a packet.
    #[arg(long, conflicts_with = "json")]
    ladder: bool,

    /// Draw them into a picture.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Print a line of JSON a packet.
    #[arg(long)]
    json: bool,

    /// Keep what would have been sent as pcapng; a comment on each packet says why.
    #[arg(long, value_name = "OUT.pcapng")]
    write: Option<PathBuf>,

    /// Compare instead of printing; with FILE.expect unless named. Exit code 1 where it differs.
    #[arg(long, value_name = "EXPECT", num_args = 0..=1)]
    #[allow(clippy::option_option, reason = "an option whose value may be left out")]
    diff: Option<Option<PathBuf>>,
}

/// A number of 16 bits, decimal or with 0x.
fn exid(text: &str) -> Result<u16, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// Replays; exit code 1 if what is printed is not what is expected, 2 for a mistake of the user's.
pub(crate) fn run(arguments: &ReplayArgs) -> ExitCode {
    match replay(arguments) {
        Ok(code) => code,
        Err(error) => {
            // Whoever read our output has seen enough.
            let pipe = error.downcast_ref::<io::Error>().map(io::Error::kind);
            if pipe == Some(io::ErrorKind::BrokenPipe) {
                return ExitCode::SUCCESS;
            }
            eprintln!("shunt: {error:#}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn replay(arguments: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let role = role(arguments)?;
    let mut run = Run::open(arguments, role)?;
    let begun = Instant::now();
    let (input, size): (Box<dyn Read>, _) = if is_stdin(&arguments.file) {
        (Box::new(io::stdin()), None)
    } else {
        let file = File::open(&arguments.file).with_context(|| named(&arguments.file))?;
        let size = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|data| data.len());
        (Box::new(file), size)
    };
    let mut reader = Reader::new(input).with_context(|| named(&arguments.file))?;
    let bar = progress(size);
    while let Some(next) = reader.next_record() {
        match next {
            Ok(record) => {
                run.record(&record)?;
                if record.number.is_multiple_of(PROGRESS) {
                    bar.set_position(reader.offset());
                }
            }
            Err(trouble) => run.trouble(&trouble)?,
        }
    }
    bar.finish_and_clear();
    let missing = reader.missing();
    if missing > 0 {
        eprintln!("{missing} packets are missing in the capture: whoever wrote it could not follow");
    }
    report(run.replay.tally(), begun.elapsed());
    if run.replay.is_directed() && matches!(run.replay.role(), Role::Wire { .. }) {
        eprintln!(
            "the capture says which packets came in and which went out: -c FILE or --as ROLE replays it"
        );
    }
    run.finish()
}

fn named(path: &Path) -> String {
    path.display().to_string()
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn progress(size: Option<u64>) -> ProgressBar {
    let Some(size) = size.filter(|size| *size > LARGE && io::stderr().is_terminal()) else {
        return ProgressBar::hidden();
    };
    let bar = ProgressBar::new(size);
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The role by what the user said.
fn role(arguments: &ReplayArgs) -> anyhow::Result<Role> {
    match (&arguments.config, arguments.role) {
        (Some(config), role) => configured(config, role),
        (None, None) => Ok(Role::Wire { exid: arguments.exid }),
        (None, Some(As::Balancer)) => {
            anyhow::bail!("a balancer decides by its configuration: add -c FILE")
        }
        (None, Some(role)) => {
            if is_stdin(&arguments.file) {
                anyhow::bail!("what comes by standard input cannot be read twice: add -c FILE");
            }
            let mut reader = Reader::open(&arguments.file).with_context(|| named(&arguments.file))?;
            learned(&Learned::of(&mut reader, arguments.exid), role, arguments.exid)
        }
    }
}

fn configured(path: &Path, role: Option<As>) -> anyhow::Result<Role> {
    let says = match role_of(&Source::read(path)?)? {
        shunt_host::Role::Balancer => As::Balancer,
        shunt_host::Role::Client => As::Client,
        shunt_host::Role::Server => As::Server,
    };
    if role.is_some_and(|role| role != says) {
        anyhow::bail!("{} is no configuration of the role that --as names", path.display());
    }
    Ok(match says {
        As::Balancer => Role::balancer(&shunt_balancer::Config::load(path)?),
        As::Client => {
            let config = shunt_client_shim::Config::load(path)?;
            Role::client(ClientConfig { mtu: MTU, ..config.client })
        }
        As::Server => {
            let config = shunt_server_agent::Config::load(path)?;
            Role::server(config.machine(MTU, [0; 16], WallClock::default()))
        }
    })
}

fn learned(learned: &Learned, role: As, exid: u16) -> anyhow::Result<Role> {
    if learned.left_out > 0 {
        eprintln!("{} addresses and services of the capture are too many: add -c FILE", learned.left_out);
    }
    if learned.vips.is_empty() {
        anyhow::bail!(
            "no packet of the capture has the option, so nothing tells which address is a VIP: add -c FILE"
        );
    }
    let services = learned.services();
    if role == As::Server && services.is_empty() {
        anyhow::bail!("no packet of the capture tells which port stands for which: add -c FILE");
    }
    if role == As::Server {
        return Ok(Role::server(ServerConfig { exid, services, mtu: MTU, ..ServerConfig::default() }));
    }
    let vip = |address: &std::net::IpAddr| VipConfig {
        address: *address,
        continuation: Continuation::Auto,
        on_redirect: OnRedirect::Hint,
    };
    let vips = learned.vips.iter().map(vip).collect();
    Ok(Role::client(ClientConfig { exid, vips, mtu: MTU, ..ClientConfig::default() }))
}

/// Where lines go.
enum Out {
    Print(BufWriter<io::StdoutLock<'static>>),
    Compare(Comparison<BufReader<File>>),
}

impl Out {
    fn line(&mut self, line: &str) -> io::Result<()> {
        match self {
            Out::Print(out) => writeln!(out, "{line}"),
            Out::Compare(comparison) => comparison.line(line),
        }
    }
}

/// A replay and what is made of it.
struct Run {
    replay: Replay,
    out: Out,
    json: bool,
    ladder: Option<Ladder>,
    print_ladder: bool,
    svg: Option<PathBuf>,
    sent: Option<SentWriter<BufWriter<File>>>,
}

impl Run {
    fn open(arguments: &ReplayArgs, role: Role) -> anyhow::Result<Run> {
        let out = match &arguments.diff {
            None => Out::Print(BufWriter::new(io::stdout().lock())),
            Some(expect) => {
                let path = expect.clone().unwrap_or_else(|| {
                    let mut name = arguments.file.clone().into_os_string();
                    name.push(".expect");
                    name.into()
                });
                let file = File::open(&path).with_context(|| {
                    format!(
                        "{}: keep there what is expected (leave out --diff, and add > FILE)",
                        path.display()
                    )
                })?;
                Out::Compare(Comparison::new(BufReader::new(file)))
            }
        };
        let create = |path: &PathBuf| File::create(path).with_context(|| named(path));
        let sent = arguments.write.as_ref().map(create).transpose()?;
        let sent = sent.map(|file| SentWriter::new(BufWriter::new(file))).transpose()?;
        let draws = arguments.ladder || arguments.svg.is_some();
        Ok(Run {
            replay: Replay::new(role),
            out,
            json: arguments.json,
            ladder: draws.then(Ladder::new),
            print_ladder: arguments.ladder,
            svg: arguments.svg.clone(),
            sent,
        })
    }

    fn record(&mut self, record: &shunt_captures::Record) -> io::Result<()> {
        let mut rows = Vec::new();
        self.replay.record(record, |row| rows.push(row));
        rows.iter().try_for_each(|row| self.row(row))
    }

    fn trouble(&mut self, trouble: &shunt_captures::Trouble) -> io::Result<()> {
        eprintln!("{trouble}");
        let row = self.replay.trouble(trouble);
        self.row(&row)
    }

    fn row(&mut self, row: &Row) -> io::Result<()> {
        if let Some(sent) = &mut self.sent {
            sent.row(row)?;
        }
        if let Some(ladder) = &mut self.ladder {
            ladder.row(row);
        }
        match (self.json, self.print_ladder) {
            (true, _) => self.out.line(&row.json()),
            (false, false) => self.out.line(&row.to_string()),
            (false, true) => Ok(()),
        }
    }

    fn finish(mut self) -> anyhow::Result<ExitCode> {
        if let Some(sent) = self.sent {
            sent.finish()?;
        }
        if let (Some(ladder), Some(path)) = (&self.ladder, &self.svg) {
            std::fs::write(path, ladder.svg()).with_context(|| named(path))?;
        }
        if let Some(ladder) = self.ladder.as_ref().filter(|_| self.print_ladder) {
            ladder.text().lines().try_for_each(|line| self.out.line(line))?;
        }
        let difference = match self.out {
            Out::Print(mut out) => {
                out.flush()?;
                None
            }
            Out::Compare(comparison) => comparison.finish()?,
        };
        match difference {
            None => Ok(ExitCode::SUCCESS),
            Some(difference) => {
                println!("{difference}");
                Ok(ExitCode::FAILURE)
            }
        }
    }
}

/// What it came to, on standard error.
fn report(tally: &Tally, took: Duration) {
    let rate = u128::from(tally.packets) * 1_000_000 / took.as_micros().max(1);
    eprintln!("{} packets in {:.3} s: {rate} packets a second", tally.packets, took.as_secs_f64());
    let counts = [
        (tally.sent, "packets would have been sent"),
        (tally.agree, "packets that went out are as replayed"),
        (tally.differ, "packets that went out are not what the replay sends"),
        (tally.violations, "packets are against a rule"),
        (tally.no_ip, "packets carry no IP"),
        (tally.snapped, "packets were captured in part"),
        (tally.unreadable, "packets cannot be read"),
        (tally.troubles, "places of the file cannot be read"),
        (tally.backwards, "packets come before an earlier one by their time"),
        (tally.left_out, "packets were too many to be compared"),
        (tally.forgotten, "connections were too many to be remembered"),
    ];
    for (count, what) in counts.into_iter().filter(|(count, _)| *count > 0) {
        eprintln!("{count} {what}");
    }
    let decisions: Vec<String> =
        tally.decisions.iter().map(|(name, count)| format!("{name} {count}")).collect();
    if !decisions.is_empty() {
        eprintln!("{}", decisions.join(", "));
    }
}
