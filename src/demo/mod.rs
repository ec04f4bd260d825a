//! `shunt demo`: the whole on one machine, with real packets, and the two programs it runs in its hosts.
//!
//! The daemons are this same program with generated configuration; nothing of the protocol is known here beyond what
//! is read from captures to be shown.

mod client;
mod config;
mod error;
mod handshake;
mod ladder;
mod load;
mod message;
mod network;
mod output;
mod part;
mod pattern;
mod plan;
mod server;
mod show;
mod summary;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use crate::EXIT_USAGE;
use error::{Error, Result};
use output::Narrator;
use part::Stop;
use plan::Family;
use show::{Plan, Show};
use summary::Summary;

pub(crate) use load::{ClientArgs, load};
pub(crate) use server::{ServerArgs, serve};

/// Exit code after SIGINT, as shells count.
const EXIT_INTERRUPTED: u8 = 130;
/// Broken connections explained.
const EXPLAINED: usize = 10;

/// Arguments of `shunt demo`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DemoOptions {
    /// How many connections to make.
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = clap::value_parser!(u64).range(20..=1_000_000))]
    connections: u64,

    /// Use IPv6 instead of IPv4.
    #[arg(long)]
    ipv6: bool,

    /// Write the result as one JSON object to standard output, and all else to standard error.
    #[arg(long)]
    json: bool,

    /// Keep configurations, logs and a capture of every daemon in this folder.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// `shunt demo`. Exit code 1 if a redirected connection broke, 2 if this machine lacks something.
///
/// # Errors
/// A part failed; the message has the end of its log, and the files are kept.
pub(crate) fn run(options: &DemoOptions) -> anyhow::Result<ExitCode> {
    let stop = Stop::default();
    watch_signals(&stop)?;
    let folder = Folder::new(options.keep.as_deref())?;
    let mut narrator = Narrator::new(options.json);
    let result = perform(options, &folder, stop, &mut narrator);
    narrator.finish();
    match result {
        Ok(summary) => Ok(conclude(&summary, folder, &narrator)?),
        Err(Error::Lab(error @ shunt_lab::Error::Missing(_))) => {
            eprintln!("shunt: {error}");
            Ok(ExitCode::from(EXIT_USAGE))
        }
        Err(error @ Error::Interrupted) => {
            eprintln!("shunt: {error}");
            Ok(ExitCode::from(EXIT_INTERRUPTED))
        }
        Err(error) => {
            folder.keep();
            Err(error.into())
        }
    }
}

fn perform(options: &DemoOptions, folder: &Folder, stop: Stop, narrator: &mut Narrator) -> Result<Summary> {
    let plan = Plan {
        family: if options.ipv6 { Family::V6 } else { Family::V4 },
        connections: options.connections,
        capture: options.keep.is_some(),
    };
    let mut show = Show::open(plan, folder.path(), stop, narrator)?;
    show.handshake()?;
    let summary = show.changes()?;
    show.close()?;
    Ok(summary)
}

fn conclude(summary: &Summary, folder: Folder, narrator: &Narrator) -> anyhow::Result<ExitCode> {
    narrator.say(&format!("\n3. What came of it\n\n{}", summary.table(&show::remarks())));
    for reason in summary.reasons.iter().take(EXPLAINED) {
        narrator.say(&format!("broken: {reason}"));
    }
    if summary.reasons.len() > EXPLAINED {
        narrator.say(&format!("broken: {} more", summary.reasons.len() - EXPLAINED));
    }
    let why =
        if summary.broken_plain == 0 { "" } else { " (the servers changed under the hash that places them)" };
    narrator.say(&format!("broken plain connections: {}{why}", summary.broken_plain));
    narrator.say(&format!("broken redirected connections: {}", summary.broken_redirected));
    narrator.result(&serde_json::to_string(summary)?);
    if summary.broken_redirected == 0 && summary.redirected > 0 {
        return Ok(ExitCode::SUCCESS);
    }
    if summary.redirected == 0 {
        eprintln!("shunt: no connection was redirected");
    }
    eprintln!("shunt: configurations and logs are in {}", folder.keep().display());
    Ok(ExitCode::FAILURE)
}

/// Where files are: the user's folder, or a temporary one.
enum Folder {
    Kept(PathBuf),
    Temporary(tempfile::TempDir),
}

impl Folder {
    fn new(keep: Option<&Path>) -> Result<Self> {
        let Some(path) = keep else {
            let folder = tempfile::Builder::new().prefix("shunt-demo-").tempdir();
            return folder
                .map(Self::Temporary)
                .map_err(Error::file("creating a folder in", std::env::temp_dir()));
        };
        std::fs::create_dir_all(path).map_err(Error::file("creating", path))?;
        // The parts may have another working directory.
        path.canonicalize().map(Self::Kept).map_err(Error::file("finding", path))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// Keeps it after all.
    fn keep(self) -> PathBuf {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.keep(),
        }
    }
}

/// Ends the demo in order at the first signal, at once at the second: the lab's guardian cleans up then.
fn watch_signals(stop: &Stop) -> anyhow::Result<()> {
    let stop = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            for patience in [true, false] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                if patience {
                    stop.set();
                }
            }
        });
        std::process::exit(i32::from(EXIT_INTERRUPTED));
    })?;
    Ok(())
}
