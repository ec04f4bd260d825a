//! `shunt ctl`: asks and tells a running daemon of this network namespace.

mod find;
mod show;

use std::net::{IpAddr, SocketAddr};
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
    /// Give a server no new connections; those it has go on (balancer). With --service, on the server itself: send new
    /// clients of a service to another server's port, and ask its connections to go on there (server).
    Drain {
        /// The server (balancer).
        #[arg(required_unless_present = "service")]
        name: Option<String>,
        /// The service (server); --to says where its clients go. Plain clients stay: drain the server at the balancer
        /// as well.
        #[arg(long, conflicts_with_all = ["name", "wait"], requires = "to")]
        service: Option<String>,
        /// Another server's service port for this service.
        #[arg(long, value_name = "PORT", requires = "service", value_parser = clap::value_parser!(u16).range(1..))]
        to: Option<u16>,
        /// Wait until it can be removed without breaking a connection: its agent (`agent = "ADDRESS:PORT"`) counts none,
        /// or, without an agent, no packet has gone to it for `[control] quiet_s`. Exit code 0: it can be removed.
        #[arg(long)]
        wait: bool,
        /// Stop waiting after so many seconds, with exit code 1; it stays drained.
        #[arg(long, value_name = "SECONDS", requires = "wait", default_value_t = 600)]
        timeout: u64,
        /// Progress and outcome as JSON, one object a line.
        #[arg(long)]
        json: bool,
    },
    /// Ask live connections of a service to go on at another server (server). Only those that are asked pass the agent
    /// meanwhile. Clients that have the byte stream follow (`boundary` of the client's file); others are served on.
    ///
    /// Ends when each has moved, was closed, or its client has done nothing for `[timers] move_s`; exit code 0: none
    /// stayed. Interrupting it stops it; what has moved has moved.
    Move(MoveArgs),
    /// Give a server new connections again (balancer); with --service, serve new clients here again (server).
    Enable {
        /// The server (balancer).
        #[arg(required_unless_present = "service")]
        name: Option<String>,
        /// The service (server).
        #[arg(long, conflicts_with = "name")]
        service: Option<String>,
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

/// Which connections are to move, and where to.
#[derive(Debug, Clone, Args)]
struct MoveArgs {
    /// The service.
    #[arg(long)]
    service: String,
    /// Where to: another server's service port. Without it, to the redirect port, where the balancer chooses: drain
    /// this server there first. ADDRESS:PORT leaves the balancer, and is followed only by clients whose
    /// `accept_prefixes` have the address.
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = target, conflicts_with = "stop")]
    to: Option<Target>,
    /// Only connections of this client.
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = client, conflicts_with = "stop")]
    client: Option<Target>,
    /// As many connections at the most.
    #[arg(long, value_name = "NUMBER", conflicts_with = "stop")]
    limit: Option<usize>,
    /// Stop a move or drain of this service that is under way.
    #[arg(long)]
    stop: bool,
    /// Progress and outcome as JSON, one object a line.
    #[arg(long)]
    json: bool,
}

/// An address, a port, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    address: Option<IpAddr>,
    port: Option<u16>,
}

/// Reads `PORT` or `ADDRESS:PORT`.
fn target(text: &str) -> Result<Target, String> {
    let both = text.parse().map(|socket: SocketAddr| (Some(socket.ip()), socket.port()));
    match both.or_else(|_| text.parse().map(|port: u16| (None, port))) {
        Ok((address, port)) if port != 0 => Ok(Target { address, port: Some(port) }),
        _ => Err("write a port, or an address and a port as 10.0.0.12:41002 or [fd00::12]:41002".to_owned()),
    }
}

/// Reads `ADDRESS` or `ADDRESS:PORT`.
fn client(text: &str) -> Result<Target, String> {
    let both = text.parse().map(|socket: SocketAddr| (socket.ip(), Some(socket.port())));
    match both.or_else(|_| text.parse().map(|address: IpAddr| (address, None))) {
        Ok((address, port)) => Ok(Target { address: Some(address), port }),
        Err(_) => Err("write an address, with a port as 10.1.0.2:50000 or [fd00::2]:50000".to_owned()),
    }
}

impl MoveArgs {
    fn request(&self) -> Value {
        if self.stop {
            return json!({ "command": "move-stop", "service": self.service });
        }
        json!({
            "command": "move",
            "service": self.service,
            "to": self.to.and_then(|to| to.port),
            "address": self.to.and_then(|to| to.address),
            "client": self.client.and_then(|client| client.address),
            "client_port": self.client.and_then(|client| client.port),
            "limit": self.limit,
        })
    }
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
            Ctl::Drain { service: Some(service), to, .. } => {
                json!({ "command": "drain", "service": service, "to": to })
            }
            Ctl::Drain { name, wait, timeout, .. } => {
                let timeout = wait.then_some(timeout);
                json!({ "command": "drain", "name": name, "wait": wait, "timeout_s": timeout })
            }
            Ctl::Move(arguments) => arguments.request(),
            Ctl::Enable { service: Some(service), .. } => json!({ "command": "enable", "service": service }),
            Ctl::Enable { name, .. } => json!({ "command": "enable", "name": name }),
            Ctl::Weight { name, weight } => json!({ "command": "weight", "name": name, "weight": weight }),
            Ctl::Load { name, load } => json!({ "command": "load", "name": name, "load": load }),
            Ctl::Policy { service, policy } => {
                json!({ "command": "policy", "service": service, "policy": policy })
            }
        }
    }

    /// Whether the answer is wanted as one object a line.
    fn json_lines(&self) -> bool {
        matches!(self, Ctl::Drain { json: true, .. } | Ctl::Move(MoveArgs { json: true, .. }))
    }

    fn progress(&self, value: &Value) {
        match self {
            _ if self.json_lines() => println!("{}", json!({ "progress": value })),
            Ctl::Move(_) | Ctl::Drain { service: Some(_), .. } => eprintln!("{}", show::moves(value)),
            _ => eprintln!("{}", show::progress(value)),
        }
    }

    /// Prints what came of it.
    fn done(&self, value: &Value) -> ExitCode {
        match self {
            Ctl::Show { json: true } | Ctl::Counters { json: true, .. } | Ctl::Connections { json: true } => {
                println!("{value}");
            }
            _ if self.json_lines() => println!("{}", json!({ "done": value })),
            Ctl::Counters { prometheus: true, .. } => print!("{}", value.as_str().unwrap_or_default()),
            Ctl::Counters { .. } => print!("{}", show::counters(value)),
            Ctl::Show { .. } => print!("{}", show::show(value)),
            Ctl::Connections { .. } => print!("{}", show::services(value)),
            Ctl::Config => print!("{}", value["toml"].as_str().unwrap_or_default()),
            Ctl::Move(MoveArgs { stop: false, .. }) | Ctl::Drain { service: Some(_), .. } => {
                println!("{}", show::moves(value));
            }
            Ctl::Drain { name, wait, .. } => {
                let name = name.as_deref().unwrap_or_default();
                println!("{name} {}", if *wait { "is safe to remove" } else { "gets no new connections" });
            }
            Ctl::Move(_)
            | Ctl::Reload
            | Ctl::Server(_)
            | Ctl::Enable { .. }
            | Ctl::Weight { .. }
            | Ctl::Load { .. }
            | Ctl::Policy { .. } => {}
        }
        let moves = matches!(self, Ctl::Move(_) | Ctl::Drain { service: Some(_), .. });
        let some = |key: &str| value[key].as_u64().is_some_and(|count| count > 0);
        let stayed = moves && (some("timed_out") || some("refused"));
        if stayed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
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
            Ok(Ok(Answer::Done(value))) => return arguments.command.done(&value),
            Ok(Ok(Answer::Error(reason))) => {
                if arguments.command.json_lines() {
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
        let both = |address: &str, port| Target { address: address.parse().ok(), port };
        assert_eq!(target("41002"), Ok(both("", Some(41002))));
        assert_eq!(target("[fd00::1]:41002"), Ok(both("fd00::1", Some(41002))));
        assert_eq!(client("10.1.0.2"), Ok(both("10.1.0.2", None)));
        assert_eq!(client("10.1.0.2:50000"), Ok(both("10.1.0.2", Some(50000))));
        for text in ["0", "65536", "10.1.0.2", "10.1.0.2:0", "web"] {
            assert!(target(text).is_err(), "{text}");
        }
        for text in ["weight", "=2", "ports.=3", ".web=3"] {
            assert!(assignment(text).is_err(), "{text}");
        }
    }
}
