//! The balancer's configuration: read from TOML, checked as a whole, every mistake with its line.
//!
//! A [`Config`] only exists checked; what it means for packets is [`Table`](crate::table::Table)'s business.

mod answer;
mod check;
mod file;
mod health;
mod portless;
pub(crate) mod ports;
mod reach;
#[cfg(test)]
mod tests;
mod traffic;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shunt_host::control::ControlOptions;
use shunt_host::{ConfigError, Family, HostOptions, PortRange, Source};
use shunt_stack::redirect::TokenPolicy;

pub use answer::AnswerBy;
pub use health::{Check, CheckKind};

pub use portless::{IcmpRules, Portless};
pub use shunt_host::Transport;
pub use traffic::{Class, Fallback, Pattern, RateLimits, Statistics, Traffic};

/// The most VIPs of one balancer; each costs 256 KiB of table, and as much again if it has UDP services.
pub const MAX_VIPS: usize = 256;
/// The most servers.
pub const MAX_SERVERS: usize = 60_000;
/// The most servers in `gue` mode, whose routes are looked up every few seconds.
pub const MAX_TUNNELS: usize = 4096;
/// The most services.
pub const MAX_SERVICES: usize = 30_000;
/// The most servers in `direct` and `datalink` mode, where each takes a TUN device and a route table of its own. Two
/// such configurations, an old one and its successor, have room in a balancer's tables.
pub const MAX_DIRECT_SERVERS: usize = 500;
/// The most fragmented datagrams remembered at a time.
pub const MAX_FRAGMENTS: usize = 1 << 20;
/// The longest that a fragmented datagram can be remembered: longer than any host waits for the rest of one.
pub const MAX_FRAGMENT_LIFETIME: Duration = Duration::from_secs(300);
/// The deepest level of a tree of balancers, counted from 0: each reads another part of the clients' hashes.
pub const MAX_LEVEL: u8 = 3;
/// The largest weight.
pub const MAX_WEIGHT: u32 = 65_535;

/// What happens to a plain client's segments on a redirect port (`B3`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Legacy {
    /// To a server by a Maglev table over client address and port.
    #[default]
    Hash,
    /// To the legacy server, or the default server if there is none.
    DefaultServer,
    /// Dropped and counted.
    Drop,
}

/// How packets reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardMode {
    /// The destination address is rewritten to the server's; its answers pass here and get the VIP as source.
    #[default]
    Network,
    /// Nothing is rewritten; each server has a device, and the VIP itself.
    Direct,
    /// Nothing is rewritten but the destination MAC; servers share a link and the VIP.
    Datalink,
    /// Nothing is rewritten; packets go to the server's real address in UDP datagrams, and the server has the VIP itself.
    Gue,
}

impl ForwardMode {
    /// Whether each server has a TUN device of ours, whose packets leave unchanged by its link.
    pub(crate) fn uses_devices(self) -> bool {
        matches!(self, ForwardMode::Direct | ForwardMode::Datalink)
    }
}

/// How a server is chosen for a connection of a client that follows redirects (`B1`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// By a keyed hash of addresses, ports and ISN.
    #[default]
    Random,
    /// In turn.
    RoundRobin,
    /// By the client's address: the same client meets the same server.
    Source,
    /// In order and back again, as a lift goes.
    Elevator,
    /// By the packets sent to each server lately.
    LeastPackets,
    /// By the servers' loads ([`Balancer::set_load`](crate::Balancer::set_load)).
    LeastLoad,
    /// By the packet's payload: patterns lead to classes of servers, `otherwise` chooses in them.
    Payload,
}

/// How a server is chosen for a UDP datagram to a redirect port (§6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UdpPolicy {
    /// By a Maglev table over both addresses and ports: a flow stays together.
    #[default]
    Hash,
    /// Each datagram by chance.
    Random,
    /// Each datagram in turn.
    RoundRobin,
}

/// Bounds of what the balancer remembers and answers (§9, §12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Fragmented datagrams remembered, at least 1.
    pub fragments: usize,
    /// How long each.
    pub fragment_lifetime: Duration,
    /// Packets that the balancer answers itself.
    pub answers_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { fragments: 4096, fragment_lifetime: Duration::from_secs(30), answers_per_second: 100 }
    }
}

/// Whether a server takes new connections (`B7`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It does.
    #[default]
    Up,
    /// No new selections; its service ports keep working.
    Drain,
    /// Out of order: treated as drained, so that what still lives there can end.
    Down,
}

/// A service: a redirect port shared by a set of servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub(crate) name: String,
    pub(crate) redirect_port: u16,
    /// By which protocols it is reached; at least one.
    pub(crate) protocols: Vec<Transport>,
    pub(crate) policy: PolicyName,
    pub(crate) udp_policy: UdpPolicy,
    /// The VIPs it is reached on.
    pub(crate) vips: Vec<IpAddr>,
    /// Selection, marking and limits beside the policy.
    pub(crate) traffic: Traffic,
    /// How its servers' health is looked at; `None` if it is not.
    pub(crate) check: Option<Check>,
    /// Who answers SYNs with R.
    pub(crate) answer: AnswerBy,
}

impl Service {
    /// Whether it is reached on a VIP by a protocol.
    pub(crate) fn is_reached(&self, vip: IpAddr, transport: Transport) -> bool {
        self.vips.contains(&vip) && self.protocols.contains(&transport)
    }
}

/// A server behind the VIPs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub(crate) name: String,
    /// At most one per family; in `direct` mode possibly none. In `datalink` mode whose MAC a packet gets.
    pub(crate) addresses: Vec<IpAddr>,
    /// From 1 to [`MAX_WEIGHT`].
    pub(crate) weight: u32,
    pub(crate) state: State,
    /// (index of the service, service ports); several of one service where what is there is a balancer itself.
    pub(crate) ports: Vec<(usize, PortRange)>,
    /// The interface towards it, in `direct` and `datalink` mode.
    pub(crate) device: Option<String>,
    /// Its real addresses, at most one per family, where tunnels to it end, in `gue` mode; `addresses` is empty then.
    pub(crate) ends: Vec<IpAddr>,
    /// Next hops on that interface, at most one per family.
    pub(crate) gateways: Vec<IpAddr>,
    /// Indices of its classes.
    pub(crate) classes: Vec<usize>,
    /// Where its agent serves its status.
    pub(crate) agent: Option<SocketAddr>,
}

impl Server {
    /// Its address of a family.
    pub(crate) fn address(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.addresses, family)
    }

    /// Whether it can be reached in a family: by its address or, in `direct` mode without addresses, in both.
    pub(crate) fn serves(&self, family: Family) -> bool {
        self.addresses.is_empty() || self.address(family).is_some()
    }

    /// The next hop towards it on its device, whose MAC packets get; `None` if the VIP itself is looked for on the link.
    pub(crate) fn next_hop(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.gateways, family).or_else(|| self.address(family))
    }
}

fn of_family(addresses: &[IpAddr], family: Family) -> Option<IpAddr> {
    addresses.iter().copied().find(|address| Family::of(*address) == family)
}

/// A balancer's configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub(crate) path: PathBuf,
    pub(crate) vips: Vec<IpAddr>,
    pub(crate) legacy: Legacy,
    pub(crate) forward: ForwardMode,
    /// Index of the server for what is not understood (`B4`).
    pub(crate) default_server: Option<usize>,
    /// Index of the server for plain clients with `legacy = "default-server"` (`B3`).
    pub(crate) legacy_server: Option<usize>,
    pub(crate) services: Vec<Service>,
    pub(crate) servers: Vec<Server>,
    /// Protocols without ports, by number.
    pub(crate) protocols: BTreeMap<u8, Portless>,
    pub(crate) icmp: IcmpRules,
    pub(crate) limits: Limits,
    /// The UDP port of tunnels, `gue` mode.
    pub(crate) gue_port: u16,
    /// Which level of a tree of balancers this one is on, from 0 to [`MAX_LEVEL`].
    pub(crate) level: u8,
    /// Traffic classes, each with servers of its own.
    pub(crate) classes: Vec<Class>,
    /// How old a load may be to count.
    pub(crate) load_max_age: Duration,
    /// After which time a packet sent counts half.
    pub(crate) packets_half_life: Duration,
    /// TCP ports of the VIPs that are this host's own, sorted.
    pub(crate) admin_ports: Vec<u16>,
    /// Whether and how connections are counted.
    pub(crate) statistics: Option<Statistics>,
    /// Tokens: made where there are keys, demanded as it says (§10).
    pub(crate) tokens: TokenPolicy,
    /// Where their keys were read from.
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) control: ControlOptions,
    /// Own source ports of health checks.
    pub(crate) check_ports: PortRange,
    pub(crate) host: HostOptions,
    /// What was read.
    pub(crate) text: Arc<str>,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or says something that cannot be meant; with the line.
    pub fn load(path: impl Into<PathBuf>) -> Result<Config, ConfigError> {
        Config::parse(&Source::read(path)?)
    }

    /// Checks a text.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(source: &Source) -> Result<Config, ConfigError> {
        check::check(source)
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shared addresses.
    pub fn vips(&self) -> &[IpAddr] {
        &self.vips
    }

    /// The services, in the order of the file.
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// The servers, in the order of the file.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Numbers and names used on the host.
    pub fn host(&self) -> &HostOptions {
        &self.host
    }

    /// The text that says all this.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether any service's health is looked at.
    pub(crate) fn checks_health(&self) -> bool {
        self.services.iter().any(|service| service.check.is_some())
    }

    /// Whether there is a VIP of the family.
    pub(crate) fn has(&self, family: Family) -> bool {
        self.vips.iter().any(|vip| Family::of(*vip) == family)
    }

    /// Whether packets of the family leave this host: for a VIP, or in a tunnel.
    pub(crate) fn sends(&self, family: Family) -> bool {
        self.has(family) || self.servers.iter().any(|server| of_family(&server.ends, family).is_some())
    }

    /// Whether servers are chosen for packets without ports.
    pub(crate) fn balances_portless(&self) -> bool {
        self.protocols.values().copied().chain(self.icmp.all()).any(|to| to == Portless::Balance)
    }

    /// Whether a server is one of a VIP's: one of its services is reached there.
    pub(crate) fn serves_vip(&self, server: &Server, vip: IpAddr) -> bool {
        server.serves(Family::of(vip))
            && server.ports.iter().any(|(service, _)| self.services[*service].vips.contains(&vip))
    }

    /// Whether a policy asks for the packets sent to servers.
    pub(crate) fn counts_packets(&self) -> bool {
        let asks = |service: &Service| [service.policy, service.traffic.otherwise];
        self.services.iter().flat_map(asks).any(|policy| policy == PolicyName::LeastPackets)
    }

    /// Every (server's address, protocol, source port) whose packets are answers of a VIP, with that VIP, in `network`
    /// mode; not sorted, each at least once. The `usize` is the server's index.
    pub(crate) fn ways_back(&self) -> Vec<WayBack> {
        let mut ways = Vec::new();
        if self.forward != ForwardMode::Network {
            return ways;
        }
        for (index, server) in self.servers.iter().enumerate() {
            // What no rule places may meet the default server on any redirect port.
            let any = self.default_server == Some(index) || self.legacy_server == Some(index);
            for (number, service) in self.services.iter().enumerate() {
                let owned = server.ports_of(number).flat_map(PortRange::ports);
                let member = any || server.ports.iter().any(|(of, _)| *of == number);
                let ports = owned.chain(member.then_some(service.redirect_port));
                let of_protocol = |port| service.protocols.iter().map(move |of| (of.number(), port));
                for (protocol, port) in ports.flat_map(of_protocol) {
                    let confirms = service.is_confirmed_here(server.owns(number, port), protocol);
                    for &vip in &service.vips {
                        if let Some(address) = server.address(Family::of(vip)) {
                            ways.push(WayBack { address, protocol, port, vip, server: index, confirms });
                        }
                    }
                }
            }
            self.portless_ways_back(index, server, &mut ways);
        }
        ways
    }

    /// The answers without ports of a server that gets packets without ports.
    fn portless_ways_back(&self, index: usize, server: &Server, ways: &mut Vec<WayBack>) {
        let gets = |to: Portless, vip| match to {
            Portless::Balance => self.serves_vip(server, vip),
            Portless::Server(named) => named == index,
            _ => false,
        };
        for &vip in &self.vips {
            let Some(address) = server.address(Family::of(vip)) else { continue };
            let icmp = if vip.is_ipv4() { 1 } else { 58 };
            let asked = self.icmp.all().any(|to| gets(to, vip)).then_some(icmp);
            let others = self.protocols.iter().filter(|(_, to)| gets(**to, vip)).map(|(number, _)| *number);
            for protocol in others.chain(asked) {
                ways.push(WayBack { address, protocol, port: 0, vip, server: index, confirms: false });
            }
        }
    }
}

/// One entry of [`Config::ways_back`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WayBack {
    pub(crate) address: IpAddr,
    /// The IP protocol's number.
    pub(crate) protocol: u8,
    /// 0 if the protocol has no ports.
    pub(crate) port: u16,
    pub(crate) vip: IpAddr,
    pub(crate) server: usize,
    /// Whether SYN-ACKs from there get C here (`B1`).
    pub(crate) confirms: bool,
}

impl fmt::Display for ForwardMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ForwardMode::Network => "network",
            ForwardMode::Direct => "direct",
            ForwardMode::Datalink => "datalink",
            ForwardMode::Gue => "gue",
        })
    }
}
