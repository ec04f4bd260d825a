//! The arguments of the command.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{ctl, demo, doctor, replay, simulate};

/// A stateless TCP load balancer by port redirection.
///
/// The port is the state: in the handshake a server names a port of its own, the client goes on there, and balancers
/// forward on destination ports alone. They remember nothing, so any number of them share the traffic, and adding,
/// draining or restarting anything breaks no redirected connection.
#[derive(Debug, Parser)]
#[command(name = "shunt", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Log more: -v for decisions of the handshake, -vv for everything. `RUST_LOG` overrides it.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Forward packets of shared addresses to servers, on destination ports alone.
    Balancer(DaemonArgs),
    /// Let this host's programs use redirection: transparently, or as a SOCKS5 proxy or port forward.
    Client(ClientArgs),
    /// Let this host's servers redirect clients to ports of their own.
    Server(DaemonArgs),
    /// Ask and tell a running daemon: show, counters, drain, add and remove servers, change weights and policies, move
    /// connections.
    #[command(after_help = ctl::HELP)]
    Ctl(ctl::CtlArgs),
    /// Check configuration files of any role; say what is wrong and in which line.
    Check(CheckArgs),
    /// Look for what on this host stands in the way: settings, firewall rules, marks, routes, listeners; say how to mend it.
    #[command(after_help = doctor::HELP)]
    Doctor(doctor::DoctorArgs),
    /// Put a capture through the code of a balancer, client or server, in the capture's own time: what would be decided
    /// about each packet, and why.
    #[command(after_help = replay::HELP)]
    Replay(replay::ReplayArgs),
    /// Compare with other ways of balancing: how many connections break when servers and balancers change. A simulation
    /// of millions of connections, without packets.
    #[command(after_help = simulate::HELP)]
    Simulate(simulate::SimulateArgs),
    /// Show it at work: clients, a balancer and four servers in namespaces of this machine, real packets, real TCP.
    Demo(demo::DemoOptions),
    /// The demo's web server.
    #[command(hide = true)]
    DemoServer(demo::ServerArgs),
    /// The demo's web client.
    #[command(hide = true)]
    DemoClient(demo::ClientArgs),
}

/// What every daemon is told.
#[derive(Debug, Clone, Args)]
pub(crate) struct DaemonArgs {
    /// The configuration, TOML. Reloaded on SIGHUP; refused whole if wrong.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: PathBuf,

    /// Write every packet that comes in and goes out to a pcapng file; comments say what was decided about it.
    #[arg(long, value_name = "FILE")]
    pub(crate) capture: Option<PathBuf>,

    /// Remember here, for the next start, what was changed on the host.
    #[arg(long, value_name = "DIR", default_value = shunt_host::DEFAULT_STATE_DIR)]
    pub(crate) state_dir: PathBuf,

    /// Serve `shunt ctl` here, whatever the file says; by default below the --state-dir.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Keep all rights. Without it the daemon gives up, before the first packet, what it does not need any more:
    /// capabilities (but `CAP_NET_ADMIN`), files other than those it reads again and its state (Landlock), system calls
    /// (seccomp), as far as the kernel has these; -v says what is left and why. A file named in a new configuration
    /// outside of the folders it knows then takes a restart.
    #[arg(long)]
    pub(crate) no_sandbox: bool,
}

/// What the client is told.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClientArgs {
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,

    /// Forward a local port to a VIP and its port, in proxy mode; added to those of the file. Repeatable.
    #[arg(long, value_name = "LISTEN=VIP:PORT")]
    pub(crate) forward: Vec<shunt_client_shim::config::Forward>,

    /// Offer SOCKS5 here, in proxy mode; instead of what the file says.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) socks5: Option<std::net::SocketAddr>,

    /// Let a server move connections to another, in proxy mode, where its clients' streams may be cut: `none`, `line`
    /// (behind a newline) or `idle:50ms` (after a silence both ways); instead of what the file says.
    #[arg(long, value_name = "WHERE")]
    pub(crate) boundary: Option<shunt_client_shim::config::Boundary>,
}

/// What is to be checked.
#[derive(Debug, Clone, Args)]
pub(crate) struct CheckArgs {
    /// Configuration files; each says its role.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Logs to standard error, at a level that -v raises.
pub(crate) fn log(verbose: u8) {
    let level = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(format!("{level},nlink=error")));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
