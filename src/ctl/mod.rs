//! `shunt ctl`: asks and tells a running daemon of this network namespace.

mod find;
mod show;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use shunt_host::control::{Answer, Client};
use tokio::time::timeout;

use crate::EXIT_USAGE;

/// How long a daemon may say nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whom to ask, and what.
#[derive(Debug, Clone, Args)]
pub(crate) struct CtlArgs {
    /// Which daemon, if more than one runs in this network namespace.
    #[arg(long, value_enum, global = true)]
    role: Option<RoleName>,

    /// The daemon's control socket, if its configuration or --socket puts it elsewhere.
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,

    /// The daemon's --state-dir.
    #[arg(long, value_name = "DIR", global = true, default_value = shunt_host::DEFAULT_STATE_DIR)]
    state_dir: PathBuf,

    #[command(subcommand)]
    command: Ctl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum RoleName {
    Balancer,
    Client,
    Server,
}

/// What holds for all changes.
pub(crate) const HELP: &str = "Changes are taken over at once and as a whole, or refused; redirected connections go on. \
They are not written to the configuration file: a later SIGHUP or `reload` takes the file as it is. `shunt ctl config` \
prints what is in force, to be saved.\n\nExit codes: 0 done, 1 refused or failed, 2 usage.";

#[derive(Debug, Clone, Subcommand)]
enum Ctl {
    /// Show services, servers, states and health (balancer); services and connections (server); VIPs and flows (client).
    Show {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the counters; those that are 0 only with --json or --prometheus.
    Counters {
        /// As JSON.
        #[arg(long, conflicts_with = "prometheus")]
        json: bool,
        /// In Prometheus' text format.
        #[arg(long)]
        prometheus: bool,
    },
    /// Show how many connections each service has on this server (server).
    Connections {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the configuration in force, as TOML (balancer).
    Config,
    /// Take the configuration file as it is now, as on SIGHUP (balancer).
    Reload,
    /// Add, change or remove a server (balancer).
    #[command(subcommand)]
    Server(ServerCommand),
    /// Give a server no new connections; those it has go on (balancer).
    Drain {
        /// The server.
        name: String,
        /// Wait until it can be removed without breaking a connection: its agent (`agent = "ADDRESS:PORT"`) counts none,
        /// or, without an agent, no packet has gone to it for `[control] quiet_s`. Exit code 0: it can be removed.
        #[arg(long)]
        wait: bool,
        /// Stop waiting after so many seconds, with exit code 1; it stays drained.
        #[arg(long, value_name = "SECONDS", requires = "wait", default_value_t = 600)]
        timeout: u64,
        /// Progress and outcome as JSON, one object a line.
        #[arg(long, requires = "wait")]
        json: bool,
    },
    /// Give a server new connections again (balancer).
    Enable {
        /// The server.
        name: String,
    },
    /// Give a server another share of the new connections (balancer).
    Weight {
        /// The server.
        name: String,
        /// From 1 to 65535.
        weight: u32,
    },
    /// Tell a server's load, for the policy `least-load`; it counts for `load_max_age_s` (balancer).
    Load {
        /// The server.
        name: String,
        /// From 0.0 (idle) to 1.0 (full).
        load: f32,
    },
    /// Choose servers for a service's new connections in another way (balancer).
    Policy {
        /// The service.
        service: String,
        /// As `policy` in the file.
        policy: String,
    },
}

#[derive(Debug, Clone, Subcommand)]
enum ServerCommand {
    /// Add a server: `server add web-3 address=10.0.0.13 ports.web=41003 weight=2`.
    Add {
        /// Its name.
        name: String,
        /// Keys as in the file's table of a server.
        #[arg(value_name = "KEY=VALUE", value_parser = assignment)]
        keys: Vec<(String, Value)>,
    },
    /// Change keys of a server; KEY= removes one.
    Set {
        /// The server.
        name: String,
        /// Keys as in the file's table of a server.
        #[arg(value_name = "KEY=VALUE", value_parser = assignment, required = true)]
        keys: Vec<(String, Value)>,
    },
    /// Remove a server; connections that it still has break (see `drain --wait`).
    Remove {
        /// The server.
        name: String,
    },
}

/// Reads `KEY=VALUE`: nothing is null; what is no JSON is a string.
fn assignment(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, as weight=2 or ports.web=41003")?;
    if key.split('.').any(str::is_empty) {
        return Err("the key is missing".to_owned());
    }
    let value = match value {
        "" => Value::Null,
        // An address may look like the beginning of a number.
        text if text.parse::<std::net::IpAddr>().is_ok() || text.parse::<SocketAddr>().is_ok() => text.into(),
        text => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    };
    Ok((key.to_owned(), value))
}

/// Dotted keys as objects in objects.
fn nested(keys: &[(String, Value)]) -> Map<String, Value> {
    let mut all = Map::new();
    for (key, value) in keys {
        let mut parts: Vec<&str> = key.split('.').collect();
        let last = parts.pop().unwrap_or_default();
        let mut map = &mut all;
        for part in parts {
            let inner = map.entry(part).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            let Value::Object(object) = inner else { return all };
            map = object;
        }
        map.insert(last.to_owned(), value.clone());
    }
    all
}

impl Ctl {
    fn request(&self) -> Value {
        match self {
            Ctl::Show { .. } => json!({ "command": "show" }),
            Ctl::Counters { prometheus, .. } => json!({ "command": "counters", "prometheus": prometheus }),
            Ctl::Connections { .. } => json!({ "command": "connections" }),
            Ctl::Config => json!({ "command": "config" }),
            Ctl::Reload => json!({ "command": "reload" }),
            Ctl::Server(ServerCommand::Add { name, keys }) => {
                json!({ "command": "server-add", "name": name, "keys": nested(keys) })
            }
            Ctl::Server(ServerCommand::Set { name, keys }) => {
                json!({ "command": "server-set", "name": name, "keys": nested(keys) })
            }
            Ctl::Server(ServerCommand::Remove { name }) => {
                json!({ "command": "server-remove", "name": name })
            }
            Ctl::Drain { name, wait, timeout, .. } => {
                let timeout = wait.then_some(timeout);
                json!({ "command": "drain", "name": name, "wait": wait, "timeout_s": timeout })
            }
            Ctl::Enable { name } => json!({ "command": "enable", "name": name }),
            Ctl::Weight { name, weight } => json!({ "command": "weight", "name": name, "weight": weight }),
            Ctl::Load { name, load } => json!({ "command": "load", "name": name, "load": load }),
            Ctl::Policy { service, policy } => {
                json!({ "command": "policy", "service": service, "policy": policy })
            }
        }
    }

    fn progress(&self, value: &Value) {
        match self {
            Ctl::Drain { json: true, .. } => println!("{}", json!({ "progress": value })),
            _ => eprintln!("{}", show::progress(value)),
        }
    }

    /// Prints what came of it.
    fn done(&self, value: &Value) {
        match self {
            Ctl::Show { json: true } | Ctl::Counters { json: true, .. } | Ctl::Connections { json: true } => {
                println!("{value}");
            }
            Ctl::Drain { json: true, .. } => println!("{}", json!({ "done": value })),
            Ctl::Counters { prometheus: true, .. } => print!("{}", value.as_str().unwrap_or_default()),
            Ctl::Counters { .. } => print!("{}", show::counters(value)),
            Ctl::Show { .. } => print!("{}", show::show(value)),
            Ctl::Connections { .. } => print!("{}", show::services(value)),
            Ctl::Config => print!("{}", value["toml"].as_str().unwrap_or_default()),
            Ctl::Drain { name, wait: true, .. } => println!("{name} is safe to remove"),
            Ctl::Drain { name, .. } => println!("{name} gets no new connections"),
            Ctl::Reload
            | Ctl::Server(_)
            | Ctl::Enable { .. }
            | Ctl::Weight { .. }
            | Ctl::Load { .. }
            | Ctl::Policy { .. } => {}
        }
    }
}

/// Asks. Exit code 0: done; 1: refused, failed or nobody there; 2: not clear whom to ask.
pub(crate) fn run(arguments: &CtlArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("no event loop: {error}"), ExitCode::FAILURE),
    };
    runtime.block_on(async {
        match find::connect(arguments).await {
            Ok(client) => ask(arguments, client).await,
            Err(find::Error::Ambiguous(message)) => fail(&message, ExitCode::from(EXIT_USAGE)),
            Err(find::Error::Nobody(message)) => fail(&message, ExitCode::FAILURE),
        }
    })
}

fn fail(message: &str, code: ExitCode) -> ExitCode {
    eprintln!("shunt: {message}");
    code
}

async fn ask(arguments: &CtlArgs, mut client: Client) -> ExitCode {
    if let Err(error) = client.ask(&arguments.command.request()).await {
        return fail(&error.to_string(), ExitCode::FAILURE);
    }
    loop {
        match timeout(PATIENCE, client.next()).await {
            Err(_) => {
                let message = format!("the daemon has said nothing for {} s", PATIENCE.as_secs());
                return fail(&message, ExitCode::FAILURE);
            }
            Ok(Err(error)) => return fail(&error.to_string(), ExitCode::FAILURE),
            Ok(Ok(Answer::Progress(value))) => arguments.command.progress(&value),
            Ok(Ok(Answer::Done(value))) => {
                arguments.command.done(&value);
                return ExitCode::SUCCESS;
            }
            Ok(Ok(Answer::Error(reason))) => {
                if matches!(arguments.command, Ctl::Drain { json: true, .. }) {
                    println!("{}", json!({ "error": reason }));
                }
                return fail(&reason, ExitCode::FAILURE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_json_where_they_can_be_and_dots_nest() {
        let keys: Vec<(String, Value)> = [
            "address=10.0.0.13",
            "agent=[fd00::1]:9000",
            "ports.web=41003",
            "ports.mail=41004",
            "weight=2",
            "state=drain",
            "gateway=",
            "list=[\"a\",\"b\"]",
        ]
        .iter()
        .map(|text| assignment(text).unwrap())
        .collect();
        let wanted = json!({
            "address": "10.0.0.13", "agent": "[fd00::1]:9000", "ports": { "web": 41003, "mail": 41004 }, "weight": 2,
            "state": "drain", "gateway": null, "list": ["a", "b"],
        });
        assert_eq!(Value::Object(nested(&keys)), wanted);
        for text in ["weight", "=2", "ports.=3", ".web=3"] {
            assert!(assignment(text).is_err(), "{text}");
        }
    }
}
