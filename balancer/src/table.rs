//! What the configuration means for packets: (VIP, port) to server and set, and the way back. Immutable; a reload
//! builds a new one.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use shunt_host::Family;

use crate::config::{
    Config, ForwardMode, IcmpRules, Legacy, Limits, PolicyName, Portless, Server, State, Transport, UdpPolicy,
};
use crate::maglev::{Maglev, Member, hash_flow};
use crate::select::{Request, Select, SelectKey, policy};

/// A server's place in the configuration that it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId(u16);

impl ServerId {
    /// The server at `index` of the configuration, which holds fewer than 65,535.
    pub(crate) fn new(index: usize) -> ServerId {
        debug_assert!(index < usize::from(u16::MAX));
        ServerId(index as u16)
    }

    /// Its index in the configuration.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// What a port of a VIP stands for: index + 1, 0 for nothing. A port may be both.
#[derive(Debug, Clone, Copy, Default)]
struct Port {
    owner: u16,
    set: u16,
}

/// A VIP's ports.
#[derive(Debug)]
pub(crate) struct Vip {
    pub(crate) address: IpAddr,
    /// TCP's.
    ports: Box<[Port]>,
    /// UDP's; `None` if no service here is reached by UDP.
    udp_ports: Option<Box<[Port]>>,
    default_server: Option<ServerId>,
    legacy_server: Option<ServerId>,
    /// For packets without ports; `None` if they are not balanced or no server is up.
    pub(crate) portless: Option<Arc<Maglev>>,
}

/// The servers that take new connections on a redirect port.
#[derive(Debug)]
pub(crate) struct Set {
    /// By policy (`B1`); `None` if no server is up.
    pub(crate) select: Option<Box<dyn Select>>,
    /// For plain clients (`B3`); `None` if no server is up.
    pub(crate) maglev: Option<Arc<Maglev>>,
    /// For each datagram anew (§6); `None` if a hash keeps flows together.
    datagrams: Option<Box<dyn Select>>,
}

impl Set {
    /// The server of a datagram (§6); `None` if no server is up.
    pub(crate) fn datagram(&self, request: &Request) -> Option<ServerId> {
        match &self.datagrams {
            Some(policy) => Some(policy.select(request)),
            None => self.flow(request),
        }
    }

    /// The server of all datagrams of a flow, if there is one.
    pub(crate) fn flow(&self, request: &Request) -> Option<ServerId> {
        let maglev = self.maglev.as_ref().filter(|_| self.datagrams.is_none())?;
        Some(maglev.lookup(hash_flow(request.client, request.service)))
    }
}

/// Where answers of a server go: the VIP they are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Back {
    pub(crate) vip: IpAddr,
    pub(crate) server: ServerId,
}

/// A server's addresses.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) v4: Option<IpAddr>,
    pub(crate) v6: Option<IpAddr>,
}

/// All of it. Lookups take no lock and allocate nothing.
#[derive(Debug)]
pub struct Table {
    pub(crate) forward: ForwardMode,
    pub(crate) legacy: Legacy,
    pub(crate) exid: u16,
    pub(crate) targets: Box<[Target]>,
    /// Protocols without ports, by number.
    pub(crate) protocols: BTreeMap<u8, Portless>,
    pub(crate) icmp: IcmpRules,
    pub(crate) limits: Limits,
    /// Sorted by address.
    vips: Box<[Vip]>,
    sets: Box<[Set]>,
    /// Sorted by address, protocol and port.
    back: Box<[((IpAddr, u8, u16), Back)]>,
}

impl Table {
    /// The table of a configuration; `key` is the key of the policy `random`.
    pub fn new(config: &Config, key: SelectKey) -> Table {
        let mut builder = SetBuilder { config, key, known: HashMap::new() };
        let mut vips: Vec<Vip> =
            config.vips.iter().map(|address| vip(config, *address, builder.portless(*address))).collect();
        vips.sort_by_key(|vip| vip.address);
        let target = |server: &Server| Target {
            name: server.name.clone(),
            v4: server.address(Family::V4),
            v6: server.address(Family::V6),
        };
        let ways = config.ways_back();
        let mut back: Vec<_> = ways
            .iter()
            .map(|way| {
                let back = Back { vip: way.vip, server: ServerId::new(way.server) };
                ((way.address, way.protocol, way.port), back)
            })
            .collect();
        back.sort_by_key(|(from, _)| *from);
        back.dedup_by_key(|(from, _)| *from);
        Table {
            forward: config.forward,
            legacy: config.legacy,
            exid: config.host.exid,
            targets: config.servers.iter().map(target).collect(),
            vips: vips.into(),
            sets: builder.sets(),
            protocols: config.protocols.clone(),
            icmp: config.icmp.clone(),
            limits: config.limits,
            back: back.into(),
        }
    }

    /// The VIP at an address.
    pub(crate) fn vip(&self, address: IpAddr) -> Option<&Vip> {
        self.vips.binary_search_by_key(&address, |vip| vip.address).ok().map(|index| &self.vips[index])
    }

    /// The set of a redirect port.
    pub(crate) fn set(&self, vip: &Vip, transport: Transport, port: u16) -> Option<&Set> {
        let index = vip.port(transport, port)?.set.checked_sub(1)?;
        self.sets.get(usize::from(index))
    }

    /// The VIP that packets of a protocol from an address and port (0 without ports) answer for, in `network` mode.
    pub(crate) fn back(&self, address: IpAddr, protocol: u8, port: u16) -> Option<Back> {
        let index = self.back.binary_search_by_key(&(address, protocol, port), |(from, _)| *from).ok()?;
        Some(self.back[index].1)
    }

    /// A server's address of the family of `like`.
    pub(crate) fn address(&self, server: ServerId, like: IpAddr) -> Option<IpAddr> {
        let target = self.targets.get(server.index())?;
        if like.is_ipv4() { target.v4 } else { target.v6 }
    }

    /// The servers' names, in the order of their ids.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.targets.iter().map(|target| target.name.as_str())
    }
}

impl Vip {
    fn port(&self, transport: Transport, port: u16) -> Option<Port> {
        let ports = match transport {
            Transport::Tcp => &self.ports,
            Transport::Udp => self.udp_ports.as_ref()?,
        };
        Some(ports[usize::from(port)])
    }

    /// Whether any service here is reached by UDP.
    pub(crate) fn has_udp(&self) -> bool {
        self.udp_ports.is_some()
    }

    /// The owner of a service port.
    pub(crate) fn owner(&self, transport: Transport, port: u16) -> Option<ServerId> {
        self.port(transport, port)?.owner.checked_sub(1).map(ServerId)
    }

    /// The server for what is not understood (`B4`).
    pub(crate) fn default_server(&self) -> Option<ServerId> {
        self.default_server
    }

    /// The server for plain clients with `legacy = "default-server"`.
    pub(crate) fn legacy_server(&self) -> Option<ServerId> {
        self.legacy_server
    }
}

struct SetBuilder<'a> {
    config: &'a Config,
    key: SelectKey,
    /// Tables are large: equal sets share theirs.
    known: HashMap<Vec<Member>, Option<Arc<Maglev>>>,
}

/// A set's place: each service has one a family.
fn set_index(service: usize, family: Family) -> usize {
    service * 2 + usize::from(family == Family::V6)
}

impl SetBuilder<'_> {
    fn sets(&mut self) -> Box<[Set]> {
        let services = 0..self.config.services.len();
        // In the order of `set_index`.
        services
            .flat_map(|service| Family::BOTH.map(|family| (service, family)))
            .map(|(s, f)| self.set(s, f))
            .collect()
    }

    fn set(&mut self, service: usize, family: Family) -> Set {
        let config = self.config;
        let up = |server: &Server| {
            server.state == State::Up
                && server.serves(family)
                && server.ports.iter().any(|(of, _)| *of == service)
        };
        let mut members = Vec::new();
        if config.services[service].vips.iter().any(|vip| Family::of(*vip) == family) {
            let servers = config.servers.iter().enumerate().filter(|(_, server)| up(server));
            members.extend(servers.map(|(index, server)| member(index, server)));
        }
        let maglev = self.maglev(&members);
        let by = |name| maglev.as_ref().and_then(|maglev| policy(name, &members, maglev, self.key));
        let service = &config.services[service];
        let datagrams = match service.udp_policy {
            UdpPolicy::Hash => None,
            UdpPolicy::Random => by(PolicyName::Random),
            UdpPolicy::RoundRobin => by(PolicyName::RoundRobin),
        };
        Set { select: by(service.policy), datagrams, maglev }
    }

    fn maglev(&mut self, members: &[Member]) -> Option<Arc<Maglev>> {
        let table = self.known.entry(members.to_vec());
        table.or_insert_with(|| Maglev::new(members).map(Arc::new)).clone()
    }

    /// The servers for packets to a VIP without ports.
    fn portless(&mut self, vip: IpAddr) -> Option<Arc<Maglev>> {
        let config = self.config;
        if !config.balances_portless() {
            return None;
        }
        let up = |server: &Server| server.state == State::Up && config.serves_vip(server, vip);
        let servers = config.servers.iter().enumerate().filter(|(_, server)| up(server));
        let members: Vec<Member> = servers.map(|(index, server)| member(index, server)).collect();
        self.maglev(&members)
    }
}

fn member(index: usize, server: &Server) -> Member {
    Member { name: server.name.clone(), weight: server.weight, server: ServerId::new(index) }
}

/// What the ports of a VIP stand for in one protocol.
fn ports(config: &Config, address: IpAddr, transport: Transport) -> Box<[Port]> {
    let family = Family::of(address);
    let mut ports = vec![Port::default(); 1 << 16].into_boxed_slice();
    for (number, service) in config.services.iter().enumerate() {
        if service.is_reached(address, transport) {
            ports[usize::from(service.redirect_port)].set = set_index(number, family) as u16 + 1;
        }
    }
    for (index, server) in config.servers.iter().enumerate().filter(|(_, server)| server.serves(family)) {
        for (service, port) in &server.ports {
            if config.services[*service].is_reached(address, transport) {
                ports[usize::from(*port)].owner = index as u16 + 1;
            }
        }
    }
    ports
}

fn vip(config: &Config, address: IpAddr, portless: Option<Arc<Maglev>>) -> Vip {
    let family = Family::of(address);
    let udp = config.services.iter().any(|service| service.is_reached(address, Transport::Udp));
    let reachable = |server: Option<usize>| {
        server.filter(|index| config.servers[*index].serves(family)).map(ServerId::new)
    };
    Vip {
        address,
        ports: ports(config, address, Transport::Tcp),
        udp_ports: udp.then(|| ports(config, address, Transport::Udp)),
        portless,
        default_server: reachable(config.default_server),
        legacy_server: reachable(config.legacy_server),
    }
}
