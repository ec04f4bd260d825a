//! `shunt-bench`: the balancer side by side with others, each between a client and a server of its own; `shunt-bench
//! endpoint`: the userspace TCP endpoint.

mod addresses;
mod arguments;
mod config;
mod contestant;
mod echo;
mod endpoint;
mod figure;
mod hold;
mod installed;
mod machine;
mod measure;
mod part;
mod report;
mod results;
mod run;
mod statistics;
mod world;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};

use arguments::Arguments;
use installed::Installed;
use results::Results;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(part) = &arguments.part {
        return match part.run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    // Before any thread exists.
    let entered = shunt_lab::rootless::enter().map_err(anyhow::Error::from);
    match entered.and_then(|_| perform(&arguments)) {
        Ok(results) if results.failures.is_empty() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("shunt-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn perform(arguments: &Arguments) -> Result<Results> {
    let plan = arguments.plan();
    let load = machine::load();
    let machine = machine::describe(load);
    if let Some(folder) = &arguments.write {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let folder = tempfile::Builder::new().prefix("shunt-bench-").tempdir().context("making a folder")?;
    clean_up_when_told(folder.path())?;
    let installed = Installed::find(&plan.contestants, arguments.shunt.clone(), folder.path())?;
    let mut results = run::run(&plan, &installed, folder.path())?;
    results.remarks.extend(machine::busy(load));
    let text = report::markdown::document(&results, &[machine, installed.versions()].concat());
    if arguments.json {
        eprintln!("{text}");
        println!("{}", report::json::object(&results));
    } else {
        println!("{text}");
    }
    if let Some(folder) = &arguments.write {
        write(folder, &text, &report::chart::draw(&results))?;
    }
    Ok(results)
}

/// Writes the document and the picture that it shows.
fn write(folder: &Path, text: &str, picture: &str) -> Result<()> {
    let head = "# Results\n\nBy `bench/run.sh --write`; `bench/run.sh --help` tells what is measured.\n\n\
                ![The figures as bars](results.svg)\n\n";
    for (name, content) in [("RESULTS.md", format!("{head}{text}")), ("results.svg", format!("{picture}\n"))]
    {
        let path = folder.join(name);
        std::fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        eprintln!("written: {}", path.display());
    }
    Ok(())
}

/// At a signal the files are removed and the program ends; its hosts and what runs on them end with it.
fn clean_up_when_told(folder: &Path) -> Result<()> {
    const INTERRUPTED: i32 = 130;
    let folder = folder.to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let inside = runtime.enter();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    drop(inside);
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        let _ = std::fs::remove_dir_all(&folder);
        std::process::exit(INTERRUPTED);
    })?;
    Ok(())
}
