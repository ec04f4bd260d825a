//! The server's TOML file: what may be written, what is left out, and what is refused with file and line.

mod decapsulate;
mod file;
mod shared;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use shunt_host::control::ControlOptions;
use shunt_host::{ConfigError, HostOptions, Source};
use shunt_stack::redirect::{ServerConfig, ServicePorts, Silence, TokenPolicy};
use shunt_stack::time::WallClock;

pub use decapsulate::Decapsulate;

/// Which packets the agent gets to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DivertMode {
    /// SYNs that carry the option and SYN-ACKs of service ports, marked by nftables; where the kernel lacks nftables,
    /// as `All`, with a warning.
    #[default]
    Nft,
    /// Every TCP segment to the ports and from the service ports, by policy rules: established traffic too, at the
    /// speed of one userspace loop.
    All,
}

/// A redirect port of this server and the service port it stands for here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name, for messages.
    pub name: String,
    /// X.
    pub redirect_port: u16,
    /// Y.
    pub service_port: u16,
}

/// The server's configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The interface clients' packets arrive by.
    pub interface: String,
    /// What they are addressed to when they arrive: the VIP, or this server's own address behind a balancer that
    /// rewrites it. Not empty.
    pub addresses: Vec<IpAddr>,
    /// The services, each at every address. Not empty.
    pub services: Vec<Service>,
    /// Which packets the agent sees.
    pub divert: DivertMode,
    /// Whether the ports' packets bypass connection tracking, which can take a handshake that changes its port for an
    /// invalid one. ICMP errors about untracked connections count as invalid there.
    pub notrack: bool,
    /// Half-open connections remembered (`S5`).
    pub half_open_limit: usize,
    /// How long they are (`S5`).
    pub half_open_lifetime: Duration,
    /// Redirects of one connect after which it is left plain (`C3`).
    pub max_hops: u8,
    /// How often the kernel is asked who listens (`S6`).
    pub listener_interval: Duration,
    /// Connections asked to move at a time (`M1`); they are diverted meanwhile.
    pub moves: usize,
    /// How long a client is asked (`M2`).
    pub move_timeout: Duration,
    /// What follows if it has not closed by then (`M2`, O8).
    pub move_silence: Silence,
    /// Tokens: made where there are keys, demanded as it says (PROTOCOL.md §10).
    pub tokens: TokenPolicy,
    /// Where their keys were read from.
    pub token_file: Option<PathBuf>,
    /// The VIP of each service socket, where clients know it by another address than ours: tokens are bound to that.
    pub shared: BTreeMap<SocketAddr, IpAddr>,
    /// The control socket.
    pub control: ControlOptions,
    /// Where the count of connections is served to balancers, if it is.
    pub status: Option<SocketAddr>,
    /// Which tunnels of balancers end here, if any.
    pub decapsulate: Option<Decapsulate>,
    /// Numbers and names used on the host.
    pub host: HostOptions,
    /// The file it came from, which SIGHUP reads again.
    pub path: PathBuf,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        Self::from_source(&Source::read(path.as_ref())?)
    }

    /// The same from text in memory.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn from_source(source: &Source) -> Result<Self, ConfigError> {
        file::read(source)
    }

    /// Each service at each address, as the protocol machine wants them.
    pub fn service_ports(&self) -> Vec<ServicePorts> {
        let at = |address: &IpAddr, service: &Service| ServicePorts {
            address: *address,
            redirect_port: service.redirect_port,
            service_port: service.service_port,
        };
        self.addresses
            .iter()
            .flat_map(|address| self.services.iter().map(move |service| at(address, service)))
            .collect()
    }

    /// What the protocol machine is told; `mtu` is that of the way to clients, `isn_key` a secret.
    pub fn machine(&self, mtu: usize, isn_key: [u8; 16], clock: WallClock) -> ServerConfig {
        ServerConfig {
            exid: self.host.exid,
            services: self.service_ports(),
            isn_key,
            half_open_limit: self.half_open_limit,
            half_open_lifetime: self.half_open_lifetime,
            mtu,
            max_hops: self.max_hops,
            redirect_timeout: self.move_timeout,
            on_silence: self.move_silence,
            tokens: self.tokens.clone(),
            shared: self.shared.clone(),
            clock,
            ..ServerConfig::default()
        }
    }

    /// The sockets that programs must listen on (`S6`), with their services' names.
    pub(crate) fn service_sockets(&self) -> impl Iterator<Item = (SocketAddr, &str)> {
        self.addresses.iter().flat_map(|address| {
            self.services
                .iter()
                .map(|service| (SocketAddr::new(*address, service.service_port), service.name.as_str()))
        })
    }

    /// Why `new` cannot take this one's place while the agent runs; `None` if it can.
    pub(crate) fn needs_restart(&self, new: &Config) -> Option<&'static str> {
        let same = [
            (self.interface == new.interface, "interface"),
            (self.host == new.host, "[host]"),
            (self.limits() == new.limits(), "[limits]"),
            (self.moving() == new.moving(), "moves, move_s and move_reset_s"),
            (self.control.same_socket(&new.control), "[control]"),
            (self.status == new.status, "[status]"),
            (self.decapsulate == new.decapsulate, "[decapsulate]"),
        ];
        same.into_iter().find(|(same, _)| !same).map(|(_, key)| key)
    }

    fn moving(&self) -> (usize, Duration, Silence) {
        (self.moves, self.move_timeout, self.move_silence)
    }

    fn limits(&self) -> (usize, Duration, u8) {
        (self.half_open_limit, self.half_open_lifetime, self.max_hops)
    }
}
