//! Where packets leave this host, as a table: what the kernel needs to hand a packet on at the link it arrives on, without
//! routing it.
//!
//! Only what routing alone would decide is in it. Where anything else has a say (a firewall's chains, policy rules, `IPsec`)
//! there are no [`Shortcuts`] at all, and destinations whose way is not one neighbour on one link are left out: what has no
//! shortcut is routed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use nlink::netlink::messages::{LinkMessage, RouteMessage, RuleMessage};
use nlink::netlink::nftables::{ChainInfo, Family as Table};
use nlink::netlink::types::route::RouteType;
use nlink::netlink::{OwnedEventStream, Xfrm};
use nlink::{Connection, RtnetlinkGroup};
use tokio_stream::StreamExt;

use crate::change::{LOCAL, MAIN, Sysctl};
use crate::error::HostError;
use crate::kernel::{self, Netlink};
use crate::nft;
use crate::prefix::{Family, Prefix};
use crate::sysctl;

/// More routes are not looked at: a router's full table changes all the time.
pub const MAX_ROUTES: usize = 4096;
/// The most ways out, each of which costs packets that go another way a look.
pub const MAX_HOPS: usize = 8;

/// How long nothing may change before changes count as complete.
pub const QUIET: Duration = Duration::from_millis(30);
/// The longest time that changes are waited for.
pub const RESTLESS: Duration = Duration::from_millis(300);

/// The table behind the main one.
const DEFAULT: u32 = 253;
/// `IFF_NOARP`: no neighbours are looked for.
const NOARP: u32 = 0x80;
const ETHERNET_ADDRESS: usize = 6;
/// Of `rp_filter`: a packet has to come from where one to its source would go.
const STRICT: u8 = 1;
/// `RTNH_F_DEAD`: the kernel passes such a route by.
const DEAD: u32 = 1;
/// `NF_INET_PRE_ROUTING`, `NF_INET_FORWARD`, `NF_INET_POST_ROUTING`, `NF_INET_INGRESS`.
const PASSED_BY: [u32; 4] = [0, 2, 4, 5];
/// How often a table that changes while it is read is read again.
const ATTEMPTS: usize = 5;

/// A way out of this host, and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The link.
    pub interface: String,
    /// Its index.
    pub index: u32,
    /// The router; `None` where the destinations are on the link.
    pub gateway: Option<IpAddr>,
    /// First and last addresses, sorted, apart from each other and of one family.
    pub destinations: Vec<(IpAddr, IpAddr)>,
}

impl Hop {
    /// Whether it leads to an address.
    pub fn leads_to(&self, address: IpAddr) -> bool {
        let behind = self.destinations.partition_point(|(first, _)| *first <= address);
        let range = behind.checked_sub(1).and_then(|at| self.destinations.get(at));
        range.is_some_and(|(first, last)| first.is_ipv4() == address.is_ipv4() && address <= *last)
    }

    /// The family of its destinations.
    pub fn family(&self) -> Option<Family> {
        self.destinations.first().map(|(first, _)| Family::of(*first))
    }
}

/// The ways out of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shortcuts {
    /// The links that packets may arrive on, by their indices.
    pub arrivals: BTreeMap<u32, String>,
    /// The ways out: of each family those that lead to the most addresses, [`MAX_HOPS`] at the most.
    pub hops: Vec<Hop>,
}

/// Why all packets have to be routed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detour {
    /// Somebody's nftables chain sees what is forwarded.
    Chain {
        /// Its table.
        table: String,
        /// Its name.
        chain: String,
    },
    /// There are tables of the old iptables, whose rules do.
    Iptables,
    /// A policy rule chooses routes.
    Rule(u32),
    /// `IPsec` policies choose packets.
    Ipsec,
    /// More than [`MAX_ROUTES`].
    Routes,
    /// No link is of Ethernet's kind, up, forwarding, no part of another, and without a strict `rp_filter`.
    Links,
}

impl fmt::Display for Detour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Detour::Chain { table, chain } => {
                write!(f, "the chain `{chain}` of the nftables table `{table}` sees what is forwarded")
            }
            Detour::Iptables => f.write_str("there are tables of the old iptables"),
            Detour::Rule(preference) => write!(f, "the policy rule {preference} chooses routes"),
            Detour::Ipsec => f.write_str("there are IPsec policies"),
            Detour::Routes => write!(f, "there are more than {MAX_ROUTES} routes"),
            Detour::Links => f.write_str(
                "no link is of Ethernet's kind, up, forwarding, no part of another, and without a strict `rp_filter`",
            ),
        }
    }
}

/// What is ours, and so in nobody's way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own<'a> {
    /// The origin of rules.
    pub(crate) protocol: u8,
    /// Names of nftables tables.
    pub(crate) tables: &'a [String],
}

/// Why nothing has a shortcut in the calling thread's network namespace, whatever its routes.
///
/// # Errors
/// Netlink fails.
pub(crate) async fn detour(own: Own<'_>) -> Result<Option<Detour>, HostError> {
    let chains = nft::connect()?.list_chains().await;
    let chains = chains.map_err(|error| HostError::netlink("list nftables chains", error))?;
    if let Some(chain) = chains.iter().find(|chain| !own.tables.contains(&chain.table) && sees(chain)) {
        return Ok(Some(Detour::Chain { table: chain.table.clone(), chain: chain.name.clone() }));
    }
    let rules = kernel::rules(&kernel::connect()?).await?;
    let others = || rules.iter().filter(|rule| rule.protocol() != Some(own.protocol));
    let chooses =
        others().find(|rule| !is_usual(rule)).or_else(|| others().find(|rule| is_early(rule, &rules)));
    Ok(match chooses {
        Some(rule) => Some(Detour::Rule(rule.priority())),
        None => has_ipsec().await?.then_some(Detour::Ipsec),
    })
}

/// The ways out of the calling thread's network namespace where nothing has a say but routes; none leads to an address of
/// `except`.
///
/// # Errors
/// Netlink fails.
pub(crate) async fn find(except: &BTreeSet<IpAddr>) -> Result<Result<Shortcuts, Detour>, HostError> {
    let netlink = kernel::connect()?;
    let links = netlink.get_links().await;
    let links = links.map_err(|error| HostError::netlink("list the interfaces", error))?;
    let links = Links::new(&links);
    let Some(routes) = routes(&netlink, &links).await? else { return Ok(Err(Detour::Routes)) };
    let shortcuts = links.shortcuts(&routes, except);
    Ok(if shortcuts.arrivals.is_empty() { Err(Detour::Links) } else { Ok(shortcuts) })
}

/// Follows what [`Shortcuts`] are made of, as the kernel tells it (rtnetlink multicast): links, their
/// settings, addresses, routes, rules.
pub struct RouteWatch {
    events: OwnedEventStream<nlink::Route>,
    /// Something has been told that nobody has been told yet.
    pending: bool,
}

impl RouteWatch {
    /// Begins to follow.
    ///
    /// # Errors
    /// Netlink fails.
    pub async fn start() -> Result<RouteWatch, HostError> {
        use RtnetlinkGroup::{
            Ipv4Addr, Ipv4Netconf, Ipv4Route, Ipv4Rule, Ipv6Addr, Ipv6Netconf, Ipv6Route, Ipv6Rule, Link,
            Nexthop,
        };
        let v4 = [Ipv4Addr, Ipv4Netconf, Ipv4Route, Ipv4Rule];
        let v6 = [Ipv6Addr, Ipv6Netconf, Ipv6Route, Ipv6Rule];
        let multicast = kernel::connect()?;
        multicast
            .subscribe(&[&[Link, Nexthop][..], &v4, &v6].concat())
            .map_err(|error| HostError::netlink("follow the routes", error))?;
        Ok(RouteWatch { events: multicast.into_events().await, pending: false })
    }

    /// Waits until something has changed, and then until nothing more does for [`QUIET`], [`RESTLESS`] at the most.
    /// Cancel-safe.
    ///
    /// # Errors
    /// Netlink fails: nothing more will be told.
    pub async fn changed(&mut self) -> Result<(), HostError> {
        if !self.pending {
            self.next().await?;
            self.pending = true;
        }
        let all = async {
            while let Ok(more) = tokio::time::timeout(QUIET, self.next()).await {
                more?;
            }
            Ok(())
        };
        tokio::time::timeout(RESTLESS, all).await.unwrap_or(Ok(()))?;
        self.pending = false;
        Ok(())
    }

    async fn next(&mut self) -> Result<(), HostError> {
        match self.events.next().await {
            Some(Ok(_)) => Ok(()),
            // Something was told that there was no room for.
            Some(Err(error)) if error.is_no_buffer_space() => Ok(()),
            Some(Err(error)) => Err(HostError::netlink("follow the routes", error)),
            None => Err(HostError::Invalid("the kernel tells no more of the routes".to_owned())),
        }
    }
}

/// Whether the old iptables has tables here; unknown is no.
pub(crate) fn has_old_iptables() -> bool {
    let named = |path| std::fs::read_to_string(path).is_ok_and(|names| !names.trim().is_empty());
    named("/proc/thread-self/net/ip_tables_names") || named("/proc/thread-self/net/ip6_tables_names")
}

/// Whether a chain sees packets that are forwarded, on their way through this host or before it.
fn sees(chain: &ChainInfo) -> bool {
    match chain.family {
        Table::Ip | Table::Ip6 | Table::Inet => chain.hook.is_some_and(|hook| PASSED_BY.contains(&hook)),
        Table::Netdev => chain.hook.is_some(),
        _ => false,
    }
}

/// One of those that every host has.
fn is_usual(rule: &RuleMessage) -> bool {
    // All bits set: suppresses nothing.
    let some = |value: Option<u32>| value.is_some_and(|value| value != u32::MAX);
    let chooses = some(rule.suppress_prefixlen())
        || some(rule.suppress_ifgroup())
        || rule.l3mdev().is_some_and(|l3mdev| l3mdev != 0)
        || rule.tun_id().is_some();
    !chooses && kernel::is_plain_lookup(rule) && [LOCAL, MAIN, DEFAULT].contains(&rule.table_id())
}

/// One that is asked before another of its family that has to come first: local, main, default.
fn is_early(rule: &RuleMessage, all: &[RuleMessage]) -> bool {
    let place =
        |rule: &RuleMessage| [LOCAL, MAIN, DEFAULT].iter().position(|table| *table == rule.table_id());
    let before = |other: &&RuleMessage| {
        other.is_ipv4() == rule.is_ipv4() && is_usual(other) && other.priority() > rule.priority()
    };
    is_usual(rule) && all.iter().filter(before).any(|other| place(other) < place(rule))
}

/// A kernel without `IPsec` has no policies.
async fn has_ipsec() -> Result<bool, HostError> {
    let Ok(xfrm) = Connection::<Xfrm>::new() else { return Ok(false) };
    match xfrm.get_security_policies().await {
        Ok(policies) => Ok(!policies.is_empty()),
        Err(error) if error.is_not_supported() => Ok(false),
        Err(error) => Err(HostError::netlink("list the IPsec policies", error)),
    }
}

/// A link that has neighbours.
#[derive(Debug, Clone)]
struct Known {
    name: String,
    mtu: u32,
}

/// Those of this host, by index.
#[derive(Debug)]
struct Links(BTreeMap<u32, Known>);

impl Links {
    fn new(all: &[LinkMessage]) -> Links {
        let fits = |link: &&LinkMessage| {
            let ethernet = link.is_broadcast() && link.address().is_some_and(|a| a.len() == ETHERNET_ADDRESS);
            let own_way = link.is_loopback() || link.master().is_some() || link.flags() & NOARP != 0;
            ethernet && !own_way && link.is_up() && link.is_running()
        };
        let known = |link: &LinkMessage| {
            Some((link.ifindex(), Known { name: link.name()?.to_owned(), mtu: link.mtu()? }))
        };
        Links(all.iter().filter(fits).filter_map(known).collect())
    }

    /// Arrivals whose packets fit into all ways out: the link that leads to the most says how long they may be.
    fn shortcuts(&self, routes: &[Route], except: &BTreeSet<IpAddr>) -> Shortcuts {
        let mut ways: Vec<Hop> =
            Family::BOTH.into_iter().flat_map(|family| self.ways(family, routes, except)).collect();
        let mtu = |hop: &Hop| self.0.get(&hop.index).map_or(0, |link| link.mtu);
        let Some(longest) = ways.first().map(mtu) else { return Shortcuts::default() };
        let arrives = |link: &Known| {
            let forwards = Family::BOTH.into_iter().any(|family| is_forwarding(family, &link.name));
            link.mtu <= longest && forwards && !is_strict(&link.name)
        };
        let arrivals: BTreeMap<u32, String> = self
            .0
            .iter()
            .filter(|(_, link)| arrives(link))
            .map(|(index, link)| (*index, link.name.clone()))
            .collect();
        ways.retain(|hop| {
            let family = hop.family().unwrap_or(Family::V4);
            mtu(hop) >= longest && arrivals.values().all(|link| is_forwarding(family, link))
        });
        let mut hops = Vec::new();
        for family in Family::BOTH {
            hops.extend(ways.iter().filter(|hop| hop.family() == Some(family)).take(MAX_HOPS).cloned());
        }
        // Not by what they lead to, which changes more often.
        hops.sort_by_key(|hop| (hop.family().map(Family::bits), hop.index, hop.gateway));
        Shortcuts { arrivals, hops }
    }

    /// The ways out, those that lead to the most addresses first.
    fn ways(&self, family: Family, routes: &[Route], except: &BTreeSet<IpAddr>) -> Vec<Hop> {
        let of_family = routes.iter().filter(|route| route.prefix.family() == family).copied().collect();
        let mut ways: BTreeMap<Way, Vec<(u128, u128)>> = BTreeMap::new();
        for (first, last, way) in painted(family, of_family, except) {
            ways.entry(way).or_default().push((first, last));
        }
        let size = |ranges: &[(u128, u128)]| {
            ranges.iter().fold(0u128, |sum, (first, last)| sum.saturating_add(last - first))
        };
        let mut ways: Vec<_> = ways.into_iter().collect();
        ways.sort_by_key(|(_, ranges)| std::cmp::Reverse(size(ranges)));
        let hop = |((index, gateway), ranges): (Way, Vec<(u128, u128)>)| {
            let interface = self.0.get(&index)?.name.clone();
            let address = |number| from_number(family, number);
            let destinations =
                ranges.into_iter().map(|(first, last)| (address(first), address(last))).collect();
            Some(Hop { interface, index, gateway, destinations })
        };
        ways.into_iter().filter_map(hop).collect()
    }
}

/// A setting of a link, or of `all`; `None` if it cannot be read.
fn setting(family: Family, scope: &str, name: &str) -> Option<u8> {
    let key = Sysctl::interface(family, scope, name, "").key;
    sysctl::read(&key).ok().flatten()?.trim().parse().ok()
}

fn is_forwarding(family: Family, link: &str) -> bool {
    setting(family, link, "forwarding") == Some(1)
}

/// Whether sources are held against the routes back, which only routing does; also if nobody can tell.
fn is_strict(link: &str) -> bool {
    let of = |scope| setting(Family::V4, scope, "rp_filter");
    of("all").zip(of(link)).is_none_or(|(all, own)| all.max(own) == STRICT)
}

/// Link and router.
type Way = (u32, Option<IpAddr>);

/// What a table says of a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Route {
    /// Its place among the tables: later ones are asked first.
    place: u8,
    prefix: Prefix,
    /// Whether it is for some sources only.
    some: bool,
    metric: u32,
    /// `None` if no shortcut leads there.
    way: Option<Way>,
}

/// `None` if there are too many.
async fn routes(netlink: &Netlink, links: &Links) -> Result<Option<Vec<Route>>, HostError> {
    let mut attempt = 1;
    loop {
        match read_routes(netlink, links).await {
            Err(error) if error.is_dump_interrupted() && attempt < ATTEMPTS => attempt += 1,
            result => return result.map_err(|error| HostError::netlink("list the routes", error)),
        }
    }
}

async fn read_routes(netlink: &Netlink, links: &Links) -> nlink::Result<Option<Vec<Route>>> {
    let mut stream = netlink.stream_routes().await?;
    let mut known = Vec::new();
    while let Some(route) = stream.next().await {
        known.extend(route_of(&route?, links));
        if known.len() > MAX_ROUTES {
            return Ok(None);
        }
    }
    Ok(Some(known))
}

fn route_of(route: &RouteMessage, links: &Links) -> Option<Route> {
    let place = [DEFAULT, MAIN, LOCAL].iter().position(|table| *table == route.table_id())?;
    if route.flags() & DEAD != 0 {
        return None;
    }
    let family = if route.is_ipv4() { Family::V4 } else { Family::V6 };
    let any = || Prefix::all(family).address();
    let prefix = Prefix::new(route.destination().copied().unwrap_or_else(any), route.dst_len());
    let some = route.src_len() != 0;
    let plain = route.route_type() == RouteType::Unicast
        && place != 2
        && !some
        && route.multipath().is_none()
        && route.encap_type().is_none()
        && route.via().is_none()
        && route.metrics().is_none_or(|metrics| metrics.mtu.is_none());
    let way = route.oif().filter(|oif| plain && links.0.contains_key(oif));
    let way = way.map(|oif| (oif, route.gateway().copied()));
    let metric = route.priority().unwrap_or(0);
    Some(Route { place: u8::try_from(place).ok()?, prefix, some, metric, way })
}

/// All addresses that one way leads to, as ranges: the longest prefix wins, among equal ones the least metric.
fn painted(family: Family, mut routes: Vec<Route>, except: &BTreeSet<IpAddr>) -> Vec<(u128, u128, Way)> {
    // The last that is painted is what is seen.
    routes.sort_by_key(|route| (route.place, route.prefix, route.some, std::cmp::Reverse(route.metric)));
    routes.sort_by_key(|route| (route.place, route.prefix.len()));
    let mut picture = Picture(BTreeMap::from([(0, None)]));
    let mut routes = routes.into_iter().peekable();
    while let Some(Route { place, prefix, metric, way, .. }) = routes.next() {
        let same = |next: &Route| (next.place, next.prefix, next.metric) == (place, prefix, metric);
        // Of equal ones the kernel chooses.
        let mut one = true;
        while routes.next_if(same).is_some() {
            one = false;
        }
        picture.paint(prefix, way.filter(|_| one));
    }
    for prefix in nobody(family).into_iter().chain(except.iter().copied().map(Prefix::host)) {
        if prefix.family() == family {
            picture.paint(prefix, None);
        }
    }
    picture.ranges(family)
}

/// Addresses that nothing is routed to.
fn nobody(family: Family) -> Vec<Prefix> {
    let v4 = |a, b, len| Prefix::new(Ipv4Addr::new(a, b, 0, 0).into(), len);
    let v6 = |first, len| Prefix::new(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0).into(), len);
    match family {
        Family::V4 => vec![v4(0, 0, 8), v4(127, 0, 8), v4(169, 254, 16), v4(224, 0, 3)],
        Family::V6 => vec![v6(0, 16), v6(0xfe80, 10), v6(0xff00, 8)],
    }
}

/// From where on which way leads.
struct Picture(BTreeMap<u128, Option<Way>>);

impl Picture {
    fn paint(&mut self, prefix: Prefix, way: Option<Way>) {
        let first = number(prefix.address());
        let host_bits = u32::from(prefix.family().bits() - prefix.len());
        let last = first | 1u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1);
        let behind = last.checked_add(1);
        let resumes = self.0.range(..=last).next_back().and_then(|(_, way)| *way);
        let inside: Vec<u128> = self.0.range(first..=last).map(|(start, _)| *start).collect();
        for start in inside {
            self.0.remove(&start);
        }
        self.0.insert(first, way);
        if let Some(behind) = behind {
            self.0.entry(behind).or_insert(resumes);
        }
    }

    /// Neighbouring ranges of one way are one.
    fn ranges(self, family: Family) -> Vec<(u128, u128, Way)> {
        let end = 1u128.checked_shl(family.bits().into()).map_or(u128::MAX, |size| size - 1);
        let starts: Vec<(u128, Option<Way>)> =
            self.0.into_iter().take_while(|(start, _)| *start <= end).collect();
        let lasts = starts.iter().skip(1).map(|(start, _)| start - 1).chain([end]);
        let mut ranges: Vec<(u128, u128, Way)> = Vec::new();
        for ((first, way), last) in starts.iter().zip(lasts) {
            let Some(way) = *way else { continue };
            match ranges.last_mut() {
                Some(before) if before.2 == way && before.1 + 1 == *first => before.1 = last,
                _ => ranges.push((*first, last, way)),
            }
        }
        ranges
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn from_number(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn known(place: u8, prefix: &str, metric: u32, way: Option<u32>) -> Route {
        Route {
            place,
            prefix: prefix.parse().unwrap(),
            some: false,
            metric,
            way: way.map(|index| (index, None)),
        }
    }

    fn shown(routes: Vec<Route>, except: &[&str]) -> Vec<String> {
        let except = except.iter().map(|address| address.parse().unwrap()).collect();
        let text = |(first, last, (index, _)): (u128, u128, Way)| {
            format!("{}-{} {index}", from_number(Family::V4, first), from_number(Family::V4, last))
        };
        painted(Family::V4, routes, &except).into_iter().map(text).collect()
    }

    #[test]
    fn the_longest_prefix_and_the_least_metric_win_and_equals_do_not() {
        let two = vec![
            known(1, "10.0.0.0/8", 0, Some(1)),
            known(1, "10.0.0.0/9", 5, Some(2)),
            known(1, "10.0.0.0/9", 4, Some(3)),
            known(0, "10.0.0.0/24", 0, Some(9)),
        ];
        assert_eq!(
            shown(two, &["10.128.0.1"]),
            ["10.0.0.0-10.127.255.255 3", "10.128.0.0-10.128.0.0 1", "10.128.0.2-10.255.255.255 1"]
        );
        let equal = vec![known(1, "10.0.0.0/8", 0, Some(1)), known(1, "10.0.0.0/8", 0, Some(2))];
        assert_eq!(shown(equal, &[]), [""; 0]);
        // The local table is asked before the main one, whatever the prefixes.
        let local = vec![known(2, "10.0.0.0/8", 0, None), known(1, "10.1.0.0/16", 0, Some(1))];
        assert_eq!(shown(local, &[]), [""; 0]);
    }

    #[test]
    fn a_default_route_leads_everywhere_but_to_nobody() {
        let all = shown(vec![known(1, "0.0.0.0/0", 0, Some(4))], &[]);
        assert_eq!(
            all,
            ["1.0.0.0-126.255.255.255 4", "128.0.0.0-169.253.255.255 4", "169.255.0.0-223.255.255.255 4"]
        );
    }

    proptest! {
        /// What a search through all routes finds.
        #[test]
        fn an_address_is_in_the_range_of_its_route(
            list in proptest::collection::vec((0u8..3, any::<u32>(), 0u8..=32, 0u32..2, 0u32..3), 0..24),
            asked in proptest::collection::vec(any::<u32>(), 24),
        ) {
            let routes: Vec<Route> = list.iter().map(|(place, bits, len, metric, index)| Route {
                some: false,
                place: *place,
                prefix: Prefix::new(Ipv4Addr::from_bits(*bits).into(), *len),
                metric: *metric,
                way: Some((*index, None)).filter(|_| *index > 0 && *place < 2),
            }).collect();
            let ranges = painted(Family::V4, routes.clone(), &BTreeSet::new());
            for (one, two) in ranges.iter().zip(ranges.iter().skip(1)) {
                prop_assert!(one.1 < two.0);
            }
            for bits in asked.iter().chain(list.iter().map(|(_, bits, ..)| bits)) {
                let address = IpAddr::from(Ipv4Addr::from_bits(*bits));
                let rank = |route: &Route| (route.place, route.prefix.len(), std::cmp::Reverse(route.metric));
                let fitting = || routes.iter().filter(|route| route.prefix.contains(address));
                let best = fitting().map(rank).max();
                let winners: Vec<_> = fitting().filter(|route| Some(rank(route)) == best).collect();
                let nobody = nobody(Family::V4).iter().any(|prefix| prefix.contains(address));
                let wanted = match &winners[..] {
                    [one] if !nobody => one.way,
                    _ => None,
                };
                let found = ranges.iter().find(|(first, last, _)| (*first..=*last).contains(&u128::from(*bits)));
                prop_assert_eq!(found.map(|(_, _, way)| *way), wanted);
            }
        }
    }
}
