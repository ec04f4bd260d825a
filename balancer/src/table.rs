//! What the configuration means for packets: (VIP, port) to server and set, and the way back. Immutable; a reload
//! builds a new one.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use shunt_host::Family;
use shunt_stack::time::Instant;
use shunt_stack::wire::{HostAddresses, IcmpView, Packet, Protocol};

use crate::config::{
    Config, ForwardMode, IcmpRules, Legacy, Limits, PolicyName, Portless, Server, State, Transport, UdpPolicy,
};
use crate::health::Unfit;
use crate::maglev::{Maglev, Member};
use crate::places::Places;
use crate::select::{
    Candidate, Choice, Classes, Lives, Request, Select, SelectKey, Terms, datagram_policy, policy,
};

/// A server's place in the configuration that it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId(u16);

impl ServerId {
    /// The server at `index` of the configuration, which holds fewer than 65,535.
    pub fn new(index: usize) -> ServerId {
        debug_assert!(index < usize::from(u16::MAX));
        ServerId(index as u16)
    }

    /// Its index in the configuration.
    #[inline]
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Port {
    owner: u16,
    set: u16,
}

/// All ports by one protocol: an array, so that a lookup costs the same whatever is configured. 256 KiB, shared by VIPs
/// whose ports stand for the same.
type Ports = Arc<[Port; 1 << 16]>;

/// A VIP's ports.
#[derive(Debug)]
pub(crate) struct Vip {
    pub(crate) address: IpAddr,
    /// TCP's.
    ports: Ports,
    /// UDP's; `None` if no service here is reached by UDP.
    udp_ports: Option<Ports>,
    default_server: Option<ServerId>,
    legacy_server: Option<ServerId>,
    /// For packets without ports; `None` if they are not balanced or no server is up.
    pub(crate) portless: Option<Arc<Maglev>>,
}

/// The servers that take new connections on a redirect port.
#[derive(Debug)]
pub(crate) struct Set {
    /// By class and policy (`B1`); `None` if no server is up.
    pub(crate) select: Option<Choice>,
    /// For plain clients (`B3`); `None` if no server is up.
    pub(crate) maglev: Option<Arc<Maglev>>,
    /// For datagrams (§6); `None` if the service is not reached by UDP or no server is up.
    datagrams: Option<Choice>,
    /// Whether a hash keeps the datagrams of a flow together.
    keeps_flows: bool,
    /// The service port of each server, sorted, where the balancer answers itself (`B1`).
    answers: Option<Box<[(ServerId, u16)]>>,
}

impl Set {
    /// The server of a datagram (§6); `None` if no server is up.
    pub(crate) fn datagram(&self, request: &Request<'_>) -> Option<ServerId> {
        self.datagrams.as_ref()?.select(request)
    }

    /// Whether the balancer answers SYNs with R itself (`B1`).
    pub(crate) fn is_answered_here(&self) -> bool {
        self.answers.is_some()
    }

    /// The service port that the balancer sends clients of a server to, if it answers itself.
    pub(crate) fn answer(&self, server: ServerId) -> Option<u16> {
        let answers = self.answers.as_ref()?;
        let index = answers.binary_search_by_key(&server, |(id, _)| *id).ok()?;
        Some(answers[index].1)
    }

    /// The server of all datagrams of a flow, if there is one.
    pub(crate) fn flow(&self, request: &Request<'_>) -> Option<ServerId> {
        self.datagrams.as_ref().filter(|_| self.keeps_flows)?.select(request)
    }
}

/// Maglev's tables by their members.
type Filled = HashMap<Vec<Member>, Option<Arc<Maglev>>>;

/// Where answers of a server go: the VIP they are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Back {
    pub(crate) vip: IpAddr,
    pub(crate) server: ServerId,
    /// Whether SYN-ACKs get C (`B1`).
    pub(crate) confirms: bool,
}

/// A server.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) addresses: HostAddresses,
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
    /// On which level of a tree hashes are read.
    pub(crate) level: u8,
    /// By address alone.
    vips: Places<Vip>,
    sets: Box<[Set]>,
    /// By server: whether it is in a set.
    taking: Box<[bool]>,
    /// By server: whether nothing can be sent to it.
    unreachable: Box<[bool]>,
    /// TCP ports of every VIP that are this host's own, sorted.
    admin_ports: Box<[u16]>,
    /// By the address, protocol and port (0 without ports) that an answer comes from.
    back: Places<Back>,
    /// What a successor may share.
    filled: Filled,
}

impl Table {
    /// The table of a configuration, with no new selections for those that are `unfit` (`B7`); `key` is the key of keyed
    /// policies, `lives` is of the same servers. What the table `before` has filled and still holds is taken from there.
    pub(crate) fn new(
        config: &Config,
        key: SelectKey,
        lives: &Lives,
        unfit: &Unfit,
        before: Option<&Table>,
    ) -> Table {
        let classes = Arc::new(Classes::new(&config.classes));
        let taking = vec![false; config.servers.len()];
        let known = HashMap::new();
        let mut builder = SetBuilder { config, key, unfit, lives, classes, known, before, taking };
        let sets = builder.sets();
        let mut known = KnownPorts::default();
        let mut vip = |address: &IpAddr| {
            ((*address, 0, 0), vip(config, *address, &mut known, builder.portless(*address)))
        };
        let vips: Vec<_> = config.vips.iter().map(&mut vip).collect();
        let back = config.ways_back().into_iter().map(|way| {
            let back = Back { vip: way.vip, server: ServerId::new(way.server), confirms: way.confirms };
            ((way.address, way.protocol, way.port), back)
        });
        Table {
            forward: config.forward,
            legacy: config.legacy,
            exid: config.host.exid,
            targets: config.servers.iter().map(Target::new).collect(),
            vips: Places::new(vips),
            protocols: config.protocols.clone(),
            icmp: config.icmp.clone(),
            limits: config.limits,
            level: config.level,
            sets,
            taking: builder.taking.into(),
            unreachable: (0..config.servers.len()).map(|index| unfit.is_unreachable(index)).collect(),
            admin_ports: config.admin_ports.clone().into(),
            back: Places::new(back),
            filled: builder.known,
        }
    }

    /// The VIP at an address.
    #[inline]
    pub(crate) fn vip(&self, address: IpAddr) -> Option<&Vip> {
        self.vips.get(address, 0, 0)
    }

    /// The set of a redirect port.
    #[inline]
    pub(crate) fn set(&self, vip: &Vip, transport: Transport, port: u16) -> Option<&Set> {
        let index = vip.port(transport, port)?.set.checked_sub(1)?;
        self.sets.get(usize::from(index))
    }

    /// The VIP that packets of a protocol from an address and port (0 without ports) answer for, in `network` mode.
    pub(crate) fn back(&self, address: IpAddr, protocol: u8, port: u16) -> Option<Back> {
        self.back.get(address, protocol, port).copied()
    }

    /// All of [`back`](Self::back).
    pub(crate) fn ways_back(&self) -> impl Iterator<Item = (IpAddr, u8, u16, Back)> {
        self.back.iter().map(|((address, protocol, port), back)| (address, protocol, port, *back))
    }

    /// The table of a service's plain clients (`B3`); `None` if no server is up.
    pub(crate) fn maglev(&self, service: usize, family: Family) -> Option<&Arc<Maglev>> {
        self.sets.get(set_index(service, family))?.maglev.as_ref()
    }

    /// A server's address of the family of `like`.
    pub(crate) fn address(&self, server: ServerId, like: IpAddr) -> Option<IpAddr> {
        self.targets.get(server.index())?.addresses.like(like)
    }

    /// Whether any port of the VIPs is this host's own.
    #[inline]
    pub(crate) fn has_admin_ports(&self) -> bool {
        !self.admin_ports.is_empty()
    }

    /// Whether a packet for a VIP is this host's own: a segment to an administrator's port, or an ICMP error about one
    /// from there.
    pub(crate) fn is_administrators(&self, vip: &Vip, packet: &Packet) -> bool {
        if self.admin_ports.is_empty() {
            return false;
        }
        let own = |port| self.admin_ports.binary_search(&port).is_ok();
        if let Some(tcp) = packet.tcp() {
            return own(tcp.destination_port());
        }
        packet.icmp().filter(IcmpView::is_error).and_then(|icmp| icmp.quoted()).is_some_and(|quoted| {
            quoted.protocol == Protocol::Tcp && quoted.source == vip.address && own(quoted.source_port)
        })
    }

    /// Whether a server takes new connections of any service (`B7`).
    pub(crate) fn takes_new(&self, server: usize) -> bool {
        self.taking.get(server).copied().unwrap_or_default()
    }

    /// Whether nothing can be sent to a server: its link is not there.
    #[inline]
    pub(crate) fn is_unreachable(&self, server: ServerId) -> bool {
        self.unreachable.get(server.index()).copied().unwrap_or_default()
    }

    /// Lets every set's policies follow time and loads; says when to be called again at the latest, if ever.
    pub(crate) fn refresh(&self, now: Instant) -> Option<Instant> {
        let choices = self.sets.iter().flat_map(|set| [&set.select, &set.datagrams]).flatten();
        choices.filter_map(|choice| choice.refresh(now)).min()
    }

    /// The servers' names, in the order of their ids.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.targets.iter().map(|target| target.name.as_str())
    }
}

impl Vip {
    #[inline]
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
    #[inline]
    pub(crate) fn owner(&self, transport: Transport, port: u16) -> Option<ServerId> {
        self.port(transport, port)?.owner.checked_sub(1).map(ServerId)
    }

    /// The server for what is not understood (`B4`).
    #[inline]
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
    unfit: &'a Unfit,
    lives: &'a Lives,
    classes: Arc<Classes>,
    /// Tables are large: equal sets share theirs.
    known: Filled,
    before: Option<&'a Table>,
    /// By server: whether it is in a set.
    taking: Vec<bool>,
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
        let up = |index: usize, server: &Server| {
            server.state == State::Up
                && !self.unfit.contains(index, service, family)
                && server.serves(family)
                && server.ports.iter().any(|(of, _)| *of == service)
        };
        let mut members = Vec::new();
        if config.services[service].vips.iter().any(|vip| Family::of(*vip) == family) {
            let servers = config.servers.iter().enumerate().filter(|(index, server)| up(*index, server));
            members.extend(servers.map(|(index, server)| member(index, server)));
        }
        for member in &members {
            self.taking[member.server.index()] = true;
        }
        let (by_udp, udp) = (&config.services[service].protocols, config.services[service].udp_policy);
        let udp = by_udp.contains(&Transport::Udp).then_some(udp);
        Set {
            select: self.choice(service, &members, None),
            datagrams: udp.and_then(|name| self.choice(service, &members, Some(name))),
            keeps_flows: udp == Some(UdpPolicy::Hash),
            maglev: self.maglev(&members),
            answers: config.services[service].is_answered_here().then(|| {
                let port = |member: &Member| {
                    let server = &config.servers[member.server.index()];
                    Some((member.server, server.port(service)?))
                };
                // In the order of the configuration, which is that of the ids.
                members.iter().filter_map(port).collect()
            }),
        }
    }

    fn maglev(&mut self, members: &[Member]) -> Option<Arc<Maglev>> {
        let before = self.before.and_then(|table| table.filled.get(members));
        let fill = || before.cloned().unwrap_or_else(|| Maglev::new(members).map(Arc::new));
        self.known.entry(members.to_vec()).or_insert_with(fill).clone()
    }

    /// The servers for packets to a VIP without ports.
    fn portless(&mut self, vip: IpAddr) -> Option<Arc<Maglev>> {
        let config = self.config;
        if !config.balances_portless() {
            return None;
        }
        let family = Family::of(vip);
        let fit = |index: usize, server: &Server| {
            server.ports.iter().any(|(service, _)| !self.unfit.contains(index, *service, family))
        };
        let up = |index: usize, server: &Server| {
            server.state == State::Up && config.serves_vip(server, vip) && fit(index, server)
        };
        let servers = config.servers.iter().enumerate().filter(|(index, server)| up(*index, server));
        let members: Vec<Member> = servers.map(|(index, server)| member(index, server)).collect();
        self.maglev(&members)
    }

    /// The policies over a set: one over all, one over the servers of each class.
    fn choice(&mut self, service: usize, members: &[Member], udp: Option<UdpPolicy>) -> Option<Choice> {
        let config = self.config;
        let all = self.policy(service, members, udp)?;
        let of_class = |class: usize| -> Vec<Member> {
            let has = |member: &&Member| config.servers[member.server.index()].classes.contains(&class);
            members.iter().filter(has).cloned().collect()
        };
        let by_class =
            (0..config.classes.len()).map(|class| self.policy(service, &of_class(class), udp)).collect();
        let patterns = &config.services[service].traffic.patterns;
        Some(Choice::new(all, by_class, Arc::clone(&self.classes), patterns))
    }

    fn policy(
        &mut self,
        service: usize,
        members: &[Member],
        udp: Option<UdpPolicy>,
    ) -> Option<Box<dyn Select>> {
        let service = &self.config.services[service];
        let candidate = |member: &Member| {
            Some(Candidate { member: member.clone(), live: Arc::clone(self.lives.get(&member.name)?) })
        };
        let candidates: Vec<Candidate> = members.iter().filter_map(candidate).collect();
        let terms = Terms {
            key: self.key,
            slow_start: service.traffic.slow_start,
            load_max_age: self.config.load_max_age,
            level: self.config.level,
        };
        let name = match (udp, service.policy) {
            (Some(name), _) => return datagram_policy(name, &candidates, || self.maglev(members), terms),
            (None, PolicyName::Payload) => service.traffic.otherwise,
            (None, name) => name,
        };
        policy(name, &candidates, || self.maglev(members), terms)
    }
}

fn member(index: usize, server: &Server) -> Member {
    Member { name: server.name.clone(), weight: server.weight, server: ServerId::new(index) }
}

impl Target {
    fn new(server: &Server) -> Target {
        let v4 = server.address(Family::V4).and_then(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        let v6 = server.address(Family::V6).and_then(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        });
        Target { name: server.name.clone(), addresses: HostAddresses { v4, v6 } }
    }
}

/// The different arrays of ports that a table has so far.
#[derive(Debug, Default)]
struct KnownPorts(Vec<Ports>);

impl KnownPorts {
    fn shared(&mut self, ports: Ports) -> Ports {
        if let Some(known) = self.0.iter().find(|known| **known == ports) {
            return Arc::clone(known);
        }
        self.0.push(Arc::clone(&ports));
        ports
    }
}

/// What the ports of a VIP stand for in one protocol.
fn ports(config: &Config, address: IpAddr, transport: Transport) -> Ports {
    let family = Family::of(address);
    let mut ports = vec![Port::default(); 1 << 16];
    for (number, service) in config.services.iter().enumerate() {
        if service.is_reached(address, transport) {
            ports[usize::from(service.redirect_port)].set = set_index(number, family) as u16 + 1;
        }
    }
    for (index, server) in config.servers.iter().enumerate().filter(|(_, server)| server.serves(family)) {
        let reached = |(service, _): &&(usize, _)| config.services[*service].is_reached(address, transport);
        for port in server.ports.iter().filter(reached).flat_map(|(_, range)| range.ports()) {
            ports[usize::from(port)].owner = index as u16 + 1;
        }
    }
    Arc::<[Port]>::from(ports).try_into().expect("there are as many as numbers")
}

fn vip(config: &Config, address: IpAddr, known: &mut KnownPorts, portless: Option<Arc<Maglev>>) -> Vip {
    let family = Family::of(address);
    let udp = config.services.iter().any(|service| service.is_reached(address, Transport::Udp));
    let reachable = |server: Option<usize>| {
        server.filter(|index| config.servers[*index].serves(family)).map(ServerId::new)
    };
    Vip {
        address,
        ports: known.shared(ports(config, address, Transport::Tcp)),
        udp_ports: udp.then(|| known.shared(ports(config, address, Transport::Udp))),
        portless,
        default_server: reachable(config.default_server),
        legacy_server: reachable(config.legacy_server),
    }
}
