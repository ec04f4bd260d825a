//! The `shunt` command: arguments in, a driver started; nothing is decided here.

mod check;
mod cli;
mod ctl;
mod daemon;
mod demo;
mod doctor;
mod replay;
mod simulate;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

/// Exit code for a mistake of the user's: a wrong configuration, a missing privilege.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // User namespaces can only be entered while there is one thread.
    if matches!(cli.command, Command::Demo(_))
        && let Err(error) = shunt_lab::rootless::enter()
    {
        eprintln!("shunt: {error}");
        return ExitCode::from(EXIT_USAGE);
    }
    cli::log(cli.verbose);
    let result = match cli.command {
        Command::Balancer(arguments) => daemon::balancer(arguments),
        Command::Client(arguments) => daemon::client(arguments),
        Command::Server(arguments) => daemon::server(arguments),
        Command::Check(arguments) => return check::run(&arguments),
        Command::Doctor(arguments) => return doctor::run(&arguments),
        Command::Ctl(arguments) => return ctl::run(&arguments),
        Command::Replay(arguments) => return replay::run(&arguments),
        Command::Simulate(arguments) => return simulate::run(&arguments),
        Command::Demo(options) => demo::run(&options),
        Command::DemoServer(arguments) => demo::serve(arguments),
        Command::DemoClient(arguments) => demo::load(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("shunt: {error:#}");
        let usage = error.is::<shunt_host::ConfigError>();
        if usage { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
    })
}
