//! `gue` mode: packets go to a server's real address inside UDP datagrams, through any routed network, and answers straight
//! to the client. What does not fit is answered (`I3`).
//!
//! [`Tunnels`] is what the host's routes mean for the servers of a configuration; `PathMtus` is what routers on the way
//! have said, which a driver keeps beside the fragments.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use shunt_host::{Family, HostError, query};
use shunt_stack::redirect::can_answer;
use shunt_stack::time::Instant;
use shunt_stack::wire::gue::{Outer, must_stay_whole, overhead};
use shunt_stack::wire::{Packet, Protocol};

use crate::Balancer;
use crate::config::{Config, ForwardMode};
use crate::forward::Output;
use crate::fragments::Verdict;
use crate::maglev::{hash_flow, hash_portless};
use crate::route::{DropReason, Route};
use crate::table::ServerId;

/// How long what a router said of a path counts (RFC 1191 §6.3).
const PATH_MTU_LIFETIME: Duration = Duration::from_secs(600);
/// Paths that something is known of, at most: more than servers have addresses.
const MAX_PATHS: usize = 1 << 17;
/// Source ports of outer headers: so many from here on tell flows apart.
const FIRST_PORT: u16 = 49_152;
/// The least MTU that a sender is told of, IPv4's and IPv6's (RFC 791, RFC 8200 §5).
const LEAST_MTU: [u32; 2] = [576, 1280];

/// How this host reaches an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// Its own address on the way.
    pub source: IpAddr,
    /// The MTU of the first link.
    pub mtu: u32,
}

/// The tunnels' ends that routes lead to.
pub type Hops = BTreeMap<IpAddr, Hop>;

/// Asks the kernel for the ways to the servers of a configuration in `gue` mode; of any other there are none.
pub(crate) async fn look(config: &Config) -> Result<Hops, HostError> {
    let (mut hops, mut links) = (Hops::new(), HashMap::new());
    for &end in config.servers.iter().flat_map(|server| &server.ends) {
        let hop = match query::next_hop(end).await {
            Ok(hop) => hop,
            Err(HostError::NoRoute(_)) => continue,
            Err(error) => return Err(error),
        };
        let Some(source) = hop.source else { continue };
        let mtu = match (links.get(&hop.index), &hop.interface) {
            (Some(mtu), _) => *mtu,
            (None, link) => match query::link_mtu(link).await {
                Ok(mtu) => *links.entry(hop.index).or_insert(mtu),
                // It has gone in this moment.
                Err(HostError::NoInterface(_)) => continue,
                Err(error) => return Err(error),
            },
        };
        hops.insert(end, Hop { source, mtu });
    }
    Ok(hops)
}

/// A tunnel to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    source: IpAddr,
    end: IpAddr,
    mtu: u32,
}

/// The ways to all servers.
#[derive(Debug)]
pub struct Tunnels {
    /// By server and the inner packet's family.
    ways: Box<[[Option<Way>; 2]]>,
    /// To which each end belongs, for errors from the way.
    ends: HashMap<IpAddr, Way>,
    port: u16,
    /// Of outer packets that may be fragmented.
    identification: AtomicU16,
}

impl Tunnels {
    /// The tunnels of a configuration; `None` if its mode has none. An inner packet goes to the server's address of its own
    /// family, if there is one, else to the other.
    pub fn new(config: &Config, hops: &Hops) -> Option<Tunnels> {
        if config.forward != ForwardMode::Gue {
            return None;
        }
        let way = |end: &IpAddr| hops.get(end).map(|hop| Way { source: hop.source, end: *end, mtu: hop.mtu });
        let of_server = |ends: &[IpAddr]| {
            Family::BOTH.map(|family| {
                let own = ends.iter().filter(|end| Family::of(**end) == family).find_map(way);
                own.or_else(|| ends.iter().find_map(way))
            })
        };
        let ways: Box<[_]> = config.servers.iter().map(|server| of_server(&server.ends)).collect();
        let ends = ways.iter().flatten().flatten().map(|way| (way.end, *way)).collect();
        Some(Tunnels { ways, ends, port: config.gue_port, identification: AtomicU16::new(0) })
    }

    /// The same, as if every server were reached by a link of this MTU from no address in particular: for looking at
    /// decisions away from the host.
    pub fn assumed(config: &Config, mtu: u32) -> Option<Tunnels> {
        let unspecified = |end: &IpAddr| match end {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        let ends = config.servers.iter().flat_map(|server| &server.ends);
        let hops = ends.map(|end| (*end, Hop { source: unspecified(end), mtu })).collect();
        Tunnels::new(config, &hops)
    }

    /// How many servers there are.
    pub(crate) fn servers(&self) -> usize {
        self.ways.len()
    }

    /// Whether a server can be reached.
    pub fn reach(&self, server: usize) -> bool {
        self.ways.get(server).is_some_and(|ways| ways.iter().any(Option::is_some))
    }

    fn way(&self, server: ServerId, packet: &Packet) -> Option<Way> {
        self.ways.get(server.index())?[usize::from(packet.source().is_ipv6())]
    }

    fn outer(&self, way: Way, packet: &Packet) -> Outer {
        let breakable = may_break(way, packet);
        Outer {
            source: way.source,
            destination: way.end,
            source_port: FIRST_PORT | (flow(packet) % u64::from(u16::MAX - FIRST_PORT)) as u16,
            destination_port: self.port,
            identification: breakable.then(|| self.identification.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// What an ICMP error says of the path to an end: the end, and the MTU.
    fn announced(&self, packet: &Packet) -> Option<(IpAddr, u32)> {
        let icmp = packet.icmp()?;
        let (mtu, quoted) = (icmp.mtu()?, icmp.quoted()?);
        let way = self.ends.get(&quoted.destination)?;
        let ours = quoted.protocol == Protocol::Udp
            && quoted.source == way.source
            && quoted.destination_port == self.port
            && quoted.source_port >= FIRST_PORT;
        ours.then(|| (way.end, mtu.max(LEAST_MTU[usize::from(way.end.is_ipv6())])))
    }
}

/// Whether routers may fragment the outer packet: where they might have fragmented the inner one.
fn may_break(way: Way, packet: &Packet) -> bool {
    way.end.is_ipv4() && !must_stay_whole(packet)
}

/// The same for all packets of a flow, and for all fragments of a datagram.
fn flow(packet: &Packet) -> u64 {
    let (source, destination) = (packet.source(), packet.destination());
    match packet.ports().filter(|_| packet.fragment().is_none()) {
        Some((from, to)) => hash_flow(SocketAddr::new(source, from), SocketAddr::new(destination, to)),
        None => hash_portless(source, destination, packet.protocol().number(), 0),
    }
}

/// What routers have said of the paths to tunnels' ends.
#[derive(Debug, Default)]
pub(crate) struct PathMtus(HashMap<IpAddr, (u32, Instant)>);

impl PathMtus {
    fn of(&self, now: Instant, way: Way) -> u32 {
        let told = self.0.get(&way.end).filter(|(_, since)| now.since(*since) < PATH_MTU_LIFETIME);
        told.map_or(way.mtu, |(mtu, _)| way.mtu.min(*mtu))
    }

    /// Notes an MTU; says whether it is news.
    fn learn(&mut self, now: Instant, end: IpAddr, mtu: u32) -> bool {
        let fresh = |since: Instant| now.since(since) < PATH_MTU_LIFETIME;
        let known = self.0.get(&end).filter(|(_, since)| fresh(*since)).map(|(mtu, _)| *mtu);
        if known.is_some_and(|known| known <= mtu) {
            return false;
        }
        self.0.retain(|_, (_, since)| fresh(*since));
        if self.0.len() >= MAX_PATHS {
            return false;
        }
        self.0.insert(end, (mtu, now));
        true
    }
}

impl Balancer {
    /// The same balancer with these ways to its servers.
    #[must_use]
    pub fn through(mut self, tunnels: Option<Tunnels>) -> Balancer {
        self.tunnels = tunnels;
        self
    }

    /// `I3`: what has no room in its tunnel is answered instead, or dropped where no answer would help. Takes notice of
    /// what routers say.
    pub(crate) fn fit(
        &self,
        paths: &mut PathMtus,
        now: Instant,
        packet: &Packet,
        verdict: Verdict,
    ) -> Verdict {
        let Some(tunnels) = &self.tunnels else { return verdict };
        let server = match verdict {
            Ok(Route::ToServer { server, .. }) => server,
            Ok(Route::Unchanged) => {
                let news = tunnels.announced(packet);
                if news.is_some_and(|(end, mtu)| paths.learn(now, end, mtu)) {
                    self.stats.path_mtu_changed();
                }
                return verdict;
            }
            _ => return verdict,
        };
        let Some(way) = tunnels.way(server, packet) else { return verdict };
        let room = (paths.of(now, way) as usize).saturating_sub(overhead(way.end));
        if packet.len() <= room || may_break(way, packet) {
            return verdict;
        }
        // Nobody sends less than this; what is as small and does not fit is lost.
        let mtu = (room as u16).max(LEAST_MTU[usize::from(packet.source().is_ipv6())] as u16);
        if packet.len() <= usize::from(mtu) || !can_answer(packet.source()) {
            return Err(DropReason::TooBig(mtu));
        }
        Ok(Route::TooBig { mtu })
    }

    /// Puts a packet into its server's tunnel.
    #[inline(never)]
    pub(crate) fn tunnel(&self, server: ServerId, packet: &mut Packet) -> Result<Output, DropReason> {
        let way = self.tunnels.as_ref().and_then(|tunnels| Some((tunnels, tunnels.way(server, packet)?)));
        let (tunnels, way) = way.ok_or(DropReason::NoConnector(server))?;
        packet.encapsulate(&tunnels.outer(way, packet)).map_err(DropReason::Tunnel)?;
        Ok(Output::Main)
    }
}
