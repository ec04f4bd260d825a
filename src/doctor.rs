//! `shunt doctor`: what on this host stands in a daemon's way.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use shunt_host::doctor::{Finding, Needs, Severity, examine, examine_host};
use shunt_host::{Role, Source, role_of};

use crate::EXIT_USAGE;

pub(crate) const HELP: &str = "Nothing is changed. Run it as root, in the network namespace of the daemon, before the \
daemon or beside it.\n\nExit codes: 0 nothing stands in the way (there may be warnings), 1 something does, 2 a file is wrong.";

/// For whom to look.
#[derive(Debug, Clone, Args)]
pub(crate) struct DoctorArgs {
    /// Configuration files, of any role; without one, only what all roles need is looked at.
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,

    /// As JSON: an array of findings.
    #[arg(long)]
    json: bool,

    /// Show what is as it should be, too.
    #[arg(short, long)]
    all: bool,
}

/// A finding, and the file it is about.
#[derive(Debug, Serialize)]
struct Told<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a Path>,
    #[serde(flatten)]
    finding: Finding,
}

/// Looks, and tells.
pub(crate) fn run(arguments: &DoctorArgs) -> ExitCode {
    let told = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(look(&arguments.files)),
        Err(error) => Err(error.into()),
    };
    let told = match told {
        Ok(told) => told,
        Err(error) => {
            eprintln!("shunt: {error:#}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if arguments.json {
        match serde_json::to_string_pretty(&told) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("shunt: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        print(&told, arguments.all);
    }
    let in_the_way = told.iter().any(|told| told.finding.severity == Severity::Error);
    if in_the_way { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn look(files: &[PathBuf]) -> anyhow::Result<Vec<Told<'_>>> {
    // All files are read before the host is looked at: a mistake in one should not need a second run.
    let mut needs = Vec::new();
    for file in files {
        needs.push((file.as_path(), needs_of(file).await?));
    }
    let told = |file| move |finding| Told { file, finding };
    let mut all: Vec<Told<'_>> = examine_host().await.into_iter().map(told(None)).collect();
    for (file, needs) in needs {
        all.extend(examine(&needs).await.into_iter().map(told(Some(file))));
    }
    Ok(all)
}

async fn needs_of(file: &Path) -> anyhow::Result<Needs> {
    Ok(match role_of(&Source::read(file)?)? {
        Role::Balancer => shunt_balancer::doctor::needs(&shunt_balancer::Config::load(file)?).await,
        Role::Client => shunt_client_shim::doctor::needs(&shunt_client_shim::Config::load(file)?).await?,
        Role::Server => shunt_server_agent::doctor::needs(&shunt_server_agent::Config::load(file)?).await?,
    })
}

fn print(told: &[Told<'_>], all: bool) {
    let mut file = None;
    for Told { file: of, finding } in told {
        if finding.severity == Severity::Good && !all {
            continue;
        }
        if *of != file {
            file = *of;
            println!("{}:", of.unwrap_or(Path::new("")).display());
        }
        println!("{:<8} {:<10} {}", finding.severity, finding.subject, finding.found);
        if !finding.mend.is_empty() {
            println!("{:<8} {:<10} -> {}", "", "", finding.mend);
        }
    }
    let count = |severity| told.iter().filter(|told| told.finding.severity == severity).count();
    println!(
        "{} things looked at: {} stand in the way, {} may, {} to know",
        told.len(),
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Note)
    );
}
