//! `shunt check`: reads configurations as the daemons would.

use std::path::Path;
use std::process::ExitCode;

use shunt_host::{ConfigError, Role, Source, role_of};

use crate::EXIT_USAGE;
use crate::cli::CheckArgs;

/// Checks every file, so that all mistakes are seen at once; exit code 2 if there was one.
pub(crate) fn run(arguments: &CheckArgs) -> ExitCode {
    let mut wrong = false;
    for file in &arguments.files {
        match check(file) {
            Ok(summary) => println!("{}: {summary}", file.display()),
            Err(error) => {
                eprintln!("{error}");
                wrong = true;
            }
        }
    }
    if wrong { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS }
}

fn check(file: &Path) -> Result<String, ConfigError> {
    Ok(match role_of(&Source::read(file)?)? {
        Role::Balancer => {
            let config = shunt_balancer::Config::load(file)?;
            format!("a balancer for {} shared addresses", config.vips().len())
        }
        Role::Client => {
            let config = shunt_client_shim::Config::load(file)?;
            format!("a client of {} shared addresses", config.vips().count())
        }
        Role::Server => {
            let config = shunt_server_agent::Config::load(file)?;
            format!("a server of {} services", config.services.len())
        }
    })
}
