//! `shunt-bench`: the balancer side by side with others, each between a client and a server of its own.

mod addresses;
mod arguments;
mod config;
mod contestant;
mod echo;
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

use std::fmt::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;

use arguments::Arguments;
use figure::Figure;
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
    let machine = machine::describe();
    let folder = tempfile::Builder::new().prefix("shunt-bench-").tempdir().context("making a folder")?;
    let installed = Installed::find(&plan.contestants, arguments.shunt.clone(), folder.path())?;
    let results = run::run(&plan, &installed, folder.path())?;
    let text = describe(&results, &[machine, installed.versions()].concat());
    if arguments.json {
        eprintln!("{text}");
        println!("{}", report::json::object(&results));
    } else {
        println!("{text}");
    }
    Ok(results)
}

/// Tables and what is to be known with them.
fn describe(results: &Results, machine: &[String]) -> String {
    let mut text = machine.join("\n") + "\n";
    for contestant in results.contestants() {
        let _ = write!(text, "\n{}: {}", contestant.name(), contestant.about());
    }
    let _ = writeln!(
        text,
        "\nmedian (least..greatest) of {} rounds; of rates, the part of kernel's",
        results.rounds()
    );
    let (rates, added): (Vec<Figure>, Vec<Figure>) =
        results.figures().into_iter().partition(|figure| !figure.is_added());
    for figures in [&rates, &added].into_iter().filter(|figures| !figures.is_empty()) {
        let _ = write!(text, "\n{}\n", report::table::figures(results, figures));
    }
    if !results.memory_counts().is_empty() {
        let _ = write!(text, "\nmemory of the process in the middle\n{}\n", report::table::memory(results));
    }
    for (contestant, why) in &results.left_out {
        let _ = write!(text, "\nleft out: {}: {why}", contestant.name());
    }
    for line in &results.remarks {
        let _ = write!(text, "\n{line}");
    }
    for failure in &results.failures {
        let _ = write!(text, "\nfailed: {failure}");
    }
    text
}
