//! What a running agent can be asked (see [`shunt_host::control`] for the socket), and the one thing that balancers may
//! ask over TCP: how many connections it has.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;

use serde::{Deserialize, Serialize};
use shunt_host::control::{self, Call, ControlError, Reply, Server};
use shunt_host::query::TcpSockets;
use shunt_host::{HostError, Role};

use crate::agent::AgentStats;
use crate::config::{Config, DivertMode};
use crate::listeners::Watch;
use crate::moves::MoveRequest;

/// A request on the control socket.
#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// Services, who listens, connections.
    Show {},
    /// The counters.
    Counters {
        /// As Prometheus reads them.
        #[serde(default)]
        prometheus: bool,
    },
    /// The connections of each service.
    Connections {},
    /// Asks connections to move.
    Move(MoveRequest),
    /// Stops asking those of a service.
    MoveStop {
        /// The service.
        service: String,
    },
    /// Sends new clients of a service to another port, and asks its connections to move there.
    Drain {
        /// The service.
        service: String,
        /// Another server's port.
        to: u16,
    },
    /// Takes new clients of a service again.
    Enable {
        /// The service.
        service: String,
    },
}

/// What the agent is told to do, where more than its configuration and the kernel is needed.
pub(crate) enum Order {
    Move(MoveRequest, Reply),
    MoveStop(String, Reply),
    Drain {
        service: String,
        to: u16,
        reply: Reply,
    },
    Enable(String, Reply),
    /// The kernel's answer to [`Desk::ask_established`].
    Established(Result<TcpSockets, HostError>),
}

/// A request on the status address.
#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum StatusRequest {
    /// The connections of each service.
    Connections {},
}

/// What waits for the kernel's answer.
#[derive(Debug)]
enum Waiting {
    Show(Reply),
    Connections(Reply),
}

/// What there is to be answered.
pub(crate) enum Asked {
    Control(Call),
    Status(Call),
    Sockets(Result<TcpSockets, HostError>),
    Established(Result<TcpSockets, HostError>),
}

type SocketQuery = Pin<Box<dyn Future<Output = Result<TcpSockets, HostError>>>>;

/// Where requests come in.
pub(crate) struct Desk {
    control: Server,
    status: Server,
    /// The kernel is asked for all who wait at once: asking often costs no more than one look at a time.
    waiting: Vec<Waiting>,
    query: Option<SocketQuery>,
    established: Option<SocketQuery>,
}

async fn answer_of(query: &mut Option<SocketQuery>) -> Result<TcpSockets, HostError> {
    let Some(running) = query else { return std::future::pending().await };
    let answer = running.await;
    *query = None;
    answer
}

impl Desk {
    pub(crate) async fn open(
        config: &Config,
        state_dir: &Path,
        control_socket: Option<PathBuf>,
    ) -> Result<Self, ControlError> {
        let control = Server::open(&config.control.at(control_socket), state_dir, Role::Server)?;
        let status = match config.status {
            Some(address) => Server::listen(address).await?,
            None => Server::none(),
        };
        Ok(Self { control, status, waiting: Vec::new(), query: None, established: None })
    }

    /// Waits for something to be answered. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Asked {
        tokio::select! {
            sockets = answer_of(&mut self.query) => Asked::Sockets(sockets),
            sockets = answer_of(&mut self.established) => Asked::Established(sockets),
            call = self.control.next() => Asked::Control(call),
            call = self.status.next() => Asked::Status(call),
        }
    }

    /// Asks the kernel for the connections that can be moved; the answer is an [`Order`].
    pub(crate) fn ask_established(&mut self, config: &Config) {
        if self.established.is_none() {
            let locals = locals(config);
            self.established = Some(Box::pin(async move { TcpSockets::established_at(&locals).await }));
        }
    }

    /// Answers what can be answered from these; the rest is an order.
    pub(crate) fn answer(
        &mut self,
        asked: Asked,
        facts: &ShowFacts<'_>,
        stats: &AgentStats,
    ) -> Option<Order> {
        let config = facts.config;
        match asked {
            Asked::Established(sockets) => return Some(Order::Established(sockets)),
            Asked::Control(Call { line, reply }) => match control::parse(&line) {
                Ok(Request::Move(request)) => return Some(Order::Move(request, reply)),
                Ok(Request::MoveStop { service }) => return Some(Order::MoveStop(service, reply)),
                Ok(Request::Drain { service, to }) => return Some(Order::Drain { service, to, reply }),
                Ok(Request::Enable { service }) => return Some(Order::Enable(service, reply)),
                Ok(Request::Show {}) => self.wait(Waiting::Show(reply), config),
                Ok(Request::Connections {}) => self.wait(Waiting::Connections(reply), config),
                Ok(Request::Counters { prometheus: false }) => reply.done(stats),
                Ok(Request::Counters { prometheus: true }) => {
                    let stats = serde_json::to_value(stats);
                    reply.end(stats.map(|stats| control::prometheus("shunt_server", &stats)));
                }
                Err(reason) => reply.refuse(reason),
            },
            Asked::Status(Call { line, reply }) => match control::parse(&line) {
                Ok(StatusRequest::Connections {}) => self.wait(Waiting::Connections(reply), config),
                Err(reason) => reply.refuse(reason),
            },
            Asked::Sockets(sockets) => {
                for waiting in self.waiting.drain(..) {
                    match (waiting, &sockets) {
                        (Waiting::Show(reply) | Waiting::Connections(reply), Err(error)) => {
                            reply.refuse(format!("the kernel does not say: {error}"));
                        }
                        (Waiting::Show(reply), Ok(sockets)) => reply.done(show(facts, sockets)),
                        (Waiting::Connections(reply), Ok(sockets)) => {
                            reply.done(Connections { services: counts(config, sockets) });
                        }
                    }
                }
            }
        }
        None
    }

    /// The number of those that wait is that of the open connections at the most.
    fn wait(&mut self, waiting: Waiting, config: &Config) {
        self.waiting.push(waiting);
        if self.query.is_none() {
            let locals = locals(config);
            self.query = Some(Box::pin(async move { TcpSockets::served_at(&locals).await }));
        }
    }
}

/// The sockets of all services.
fn locals(config: &Config) -> HashSet<SocketAddr> {
    let at = |address: &IpAddr| {
        let address = *address;
        config.services.iter().flat_map(move |service| {
            [service.service_port, service.redirect_port].map(|port| SocketAddr::new(address, port))
        })
    };
    config.addresses.iter().flat_map(at).collect()
}

/// The answer to `connections`.
#[derive(Debug, Serialize)]
struct Connections<'a> {
    services: Vec<ServiceCount<'a>>,
}

/// One service's connections, from SYN-RECEIVED to LAST-ACK.
#[derive(Debug, Serialize)]
struct ServiceCount<'a> {
    name: &'a str,
    redirect_port: u16,
    service_port: u16,
    /// On the service port.
    connections: usize,
    /// On the redirect port: plain clients.
    plain: usize,
}

fn counts<'a>(config: &'a Config, sockets: &TcpSockets) -> Vec<ServiceCount<'a>> {
    let on = |port: u16| sockets.pairs().iter().filter(|(local, _)| local.port() == port).count();
    config
        .services
        .iter()
        .map(|service| ServiceCount {
            name: &service.name,
            redirect_port: service.redirect_port,
            service_port: service.service_port,
            connections: on(service.service_port),
            plain: on(service.redirect_port),
        })
        .collect()
}

/// What `show` tells beside what the kernel knows.
pub(crate) struct ShowFacts<'a> {
    pub(crate) config: &'a Config,
    pub(crate) watch: &'a Watch,
    /// Where new clients of drained services are sent.
    pub(crate) drained: &'a BTreeMap<String, u16>,
}

/// The answer to `show`.
#[derive(Debug, Serialize)]
struct Show<'a> {
    role: &'static str,
    interface: &'a str,
    addresses: &'a [IpAddr],
    divert: &'static str,
    services: Vec<ServiceShow<'a>>,
}

#[derive(Debug, Serialize)]
struct ServiceShow<'a> {
    #[serde(flatten)]
    count: ServiceCount<'a>,
    /// The addresses at which nobody listens on the service port (`S6`).
    silent: Vec<IpAddr>,
    /// Where new clients are sent, if the service is drained.
    drained_to: Option<u16>,
}

fn show<'a>(facts: &ShowFacts<'a>, sockets: &TcpSockets) -> Show<'a> {
    let ShowFacts { config, watch, drained } = *facts;
    let silent = |port: u16| {
        let is_silent = |address: &&IpAddr| watch.listening(SocketAddr::new(**address, port)) == Some(false);
        config.addresses.iter().filter(is_silent).copied().collect()
    };
    let services = counts(config, sockets);
    Show {
        role: "server",
        interface: &config.interface,
        addresses: &config.addresses,
        divert: match config.divert {
            DivertMode::Nft => "nft",
            DivertMode::All => "all",
        },
        services: services
            .into_iter()
            .map(|count| ServiceShow {
                silent: silent(count.service_port),
                drained_to: drained.get(count.name).copied(),
                count,
            })
            .collect(),
    }
}
