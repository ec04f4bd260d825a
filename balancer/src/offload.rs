//! What the kernel forwards by itself: the table's static part as nftables maps ([`shunt_host::offload`]).
//!
//! A connection's port is its state, so all of its segments but the first go where a map says: to the owner of their
//! service port (`B2`), those of plain clients to the server of their hash (`B3`), answers back with the VIP as their
//! source (`B5`). Only what opens a connection has to be decided here: SYNs and SYN-ACKs come to userspace, and so do
//! ICMP, fragments and everything that no map knows. Where connections are counted ([`Config`]'s `statistics`), FINs and
//! resets come, too.
//!
//! The maps follow the table: reloads, requests and health change what differs, in one step. They end with the daemon; a
//! killed one leaves them, with the sysctls they need, and established traffic goes on until the next one changes them
//! into its own.
//!
//! In the modes `direct` and `datalink` a packet stays as it is: the maps give it its server's mark, and a rule routes what
//! has it as it routes what userspace writes to the server's device. Nothing comes back there.
//!
//! What the configuration asks for and maps cannot do stays in userspace as a whole: [`Offloadable`] says what and why.
//! The kernel's counters are read every second and added to the balancer's own, so that statistics, `least-packets` and
//! the wait for a drained server are right.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use shunt_host::change::Sysctl;
use shunt_host::offload::{Count, Counted, End, Goal, MAX_ENTRIES, MAX_SLOTS, PortMap, Spread};
use shunt_host::{Change, Family, Host, HostError, Offload, query};
use shunt_stack::wire::TcpFlags;

use crate::Balancer;
use crate::config::{Config, ForwardMode, Legacy, Service, Transport};
use crate::host::{Devices, device_prefix};
use crate::maglev::{Maglev, SLOTS, client_seed};
use crate::route::Way;
use crate::stats::{ServerStats, Stats};
use crate::table::{ServerId, Table};

/// Why packets are not left to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// `[host] offload = "off"`.
    Off,
    /// The mode puts packets into others.
    Mode(ForwardMode),
    /// All packets are recorded.
    Capture,
    /// The kernel refuses.
    Kernel(String),
    /// A service's packets or bytes are limited.
    Limited,
    /// DSCPs are rewritten.
    Marked,
    /// More entries than [`MAX_ENTRIES`].
    Entries(usize),
    /// Plain clients only: `legacy = "drop"`.
    Dropped,
    /// Plain clients only: more slots than [`MAX_SLOTS`].
    Slots,
    /// Plain clients only: this machine's byte order makes the kernel's hash another than other machines'.
    ByteOrder,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Off => f.write_str("switched off by `[host] offload = \"off\"`"),
            Obstacle::Mode(mode) => write!(f, "not in mode {mode}: maps make no tunnels"),
            Obstacle::Capture => f.write_str("a capture records every packet"),
            Obstacle::Kernel(why) => write!(f, "the kernel refuses: {why}"),
            Obstacle::Limited => f.write_str("its packets or bytes are limited"),
            Obstacle::Marked => f.write_str("its packets' DSCP is rewritten"),
            Obstacle::Entries(count) => write!(f, "{count} service ports are more than {MAX_ENTRIES}"),
            Obstacle::Dropped => f.write_str("plain segments are dropped"),
            Obstacle::Slots => write!(f, "the hash tables have more than {MAX_SLOTS} slots"),
            Obstacle::ByteOrder => f.write_str("the kernel's hash depends on this machine's byte order"),
        }
    }
}

/// What of a configuration maps can express.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offloadable {
    /// By service, in the order of the configuration: why its service ports stay in userspace.
    pub services: Vec<Option<Obstacle>>,
    /// Why plain clients' segments to redirect ports do, all of them.
    pub plain: Option<Obstacle>,
}

impl Offloadable {
    /// Decides by the configuration alone.
    ///
    /// # Errors
    /// Why nothing at all can be left to the kernel.
    pub fn new(config: &Config) -> Result<Offloadable, Obstacle> {
        if !config.host.offload {
            return Err(Obstacle::Off);
        }
        if config.forward == ForwardMode::Gue {
            return Err(Obstacle::Mode(config.forward));
        }
        let entries = entries(config);
        if entries > MAX_ENTRIES {
            return Err(Obstacle::Entries(entries));
        }
        let marks = config.classes.iter().any(|class| class.mark_dscp.is_some());
        let of = |service: &Service| {
            let limit = service.traffic.limit;
            // New connections are limited by their SYNs, which come here.
            if limit.is_some_and(|limit| limit.packets_per_s.or(limit.bytes_per_s).is_some()) {
                return Some(Obstacle::Limited);
            }
            (marks || service.traffic.mark_dscp.is_some()).then_some(Obstacle::Marked)
        };
        let plain = match config.legacy {
            Legacy::Hash if cfg!(target_endian = "big") => Some(Obstacle::ByteOrder),
            Legacy::Drop => Some(Obstacle::Dropped),
            Legacy::Hash | Legacy::DefaultServer => None,
        };
        Ok(Offloadable { services: config.services.iter().map(of).collect(), plain })
    }

    /// Whether a service's ports are left to the kernel.
    fn takes(&self, service: usize) -> bool {
        self.services.get(service).is_some_and(Option::is_none)
    }
}

/// An upper bound of the entries of all port maps.
fn entries(config: &Config) -> usize {
    let of = |(service, ports): &(usize, shunt_host::PortRange)| {
        let service = &config.services[*service];
        let ports = usize::from(ports.last() - ports.first()) + 1;
        // There and back, and the redirect port back.
        (2 * ports + 1) * service.vips.len() * service.protocols.len()
    };
    config.servers.iter().flat_map(|server| &server.ports).map(of).sum()
}

/// What an entry of the maps stands for.
#[derive(Debug)]
struct Entry {
    way: Way,
    server: Arc<ServerStats>,
    /// As last read.
    seen: Count,
}

/// What is left to the kernel, and what its counters mean.
#[derive(Debug)]
pub(crate) struct Plan {
    offload: Offload,
    entries: BTreeMap<Counted, Entry>,
    stats: Arc<Stats>,
    /// By server: its mark, in the modes that leave packets as they are; none of a server whose link is missing.
    marks: Option<Vec<Option<u32>>>,
    /// Why plain clients' segments are not.
    plain: Option<Obstacle>,
}

/// Places of the port maps.
const MAPS: [(End, Transport); 4] = [
    (End::Destination, Transport::Tcp),
    (End::Source, Transport::Tcp),
    (End::Destination, Transport::Udp),
    (End::Source, Transport::Udp),
];

impl Plan {
    /// What the table says of packets that open no connection.
    pub(crate) fn new(config: &Config, balancer: &Balancer, devices: &Devices) -> Result<Plan, Obstacle> {
        let offloadable = Offloadable::new(config)?;
        let opens = TcpFlags::SYN.0;
        let ends = if config.statistics.is_some() { (TcpFlags::FIN | TcpFlags::RST).0 } else { 0 };
        let maps = MAPS.map(|(end, transport)| PortMap { end, transport, entries: BTreeMap::new() });
        let marked = config.forward.uses_devices();
        let marks = devices
            .servers
            .iter()
            .map(|device| device.connected.then(|| config.host.server_mark(device.slot)).flatten());
        let mut plan = Plan {
            offload: Offload {
                except_interface: Some(devices.main.clone()),
                except_prefix: marked.then(|| device_prefix(&devices.main)),
                except_local_ports: if config.checks_health() {
                    vec![config.check_ports]
                } else {
                    Vec::new()
                },
                except_destinations: config.vips.iter().copied().collect(),
                except_flags: opens | ends,
                mark_mask: marked.then_some(config.host.server_mark_mask),
                maps: maps.into(),
                spreads: Vec::new(),
            },
            entries: BTreeMap::new(),
            stats: Arc::clone(&balancer.stats),
            marks: marked.then(|| marks.collect()),
            plain: offloadable.plain.clone(),
        };
        for (index, service) in config.services.iter().enumerate() {
            if offloadable.takes(index) {
                plan.service_ports(config, index, service, balancer);
                plan.legacy_server(config, service, balancer);
            }
        }
        plan.ways_back(balancer);
        if offloadable.plain.is_none() && config.legacy == Legacy::Hash {
            plan.spread(config, &offloadable, balancer);
        }
        Ok(plan)
    }

    /// What the kernel is told.
    #[cfg(test)]
    pub(crate) fn offload(&self) -> &Offload {
        &self.offload
    }

    /// How packets get to a server, by its address.
    fn towards(&self, server: usize, address: Option<IpAddr>) -> Option<Goal> {
        match &self.marks {
            None => address.map(Goal::Address),
            Some(marks) => marks.get(server).copied().flatten().map(Goal::Mark),
        }
    }

    fn entry(&mut self, map: usize, key: SocketAddr, to: Goal, way: Way, server: &Arc<ServerStats>) {
        if self.offload.maps[map].entries.insert(key, to).is_none() {
            let entry = Entry { way, server: Arc::clone(server), seen: Count::default() };
            self.entries.insert(Counted::Map(map, key), entry);
        }
    }

    /// `B2`.
    fn service_ports(&mut self, config: &Config, index: usize, service: &Service, balancer: &Balancer) {
        for (map, transport) in [(0, Transport::Tcp), (2, Transport::Udp)] {
            for vip in service.vips.iter().filter(|vip| service.is_reached(**vip, transport)) {
                for (number, (server, stats)) in config.servers.iter().zip(&balancer.servers).enumerate() {
                    let Some(goal) = self.towards(number, server.address(Family::of(*vip))) else { continue };
                    for port in server.ports_of(index).flat_map(shunt_host::PortRange::ports) {
                        self.entry(map, SocketAddr::new(*vip, port), goal, Way::Owner, stats);
                    }
                }
            }
        }
    }

    /// `B3` with a legacy server.
    fn legacy_server(&mut self, config: &Config, service: &Service, balancer: &Balancer) {
        if config.legacy != Legacy::DefaultServer {
            return;
        }
        for vip in unowned(&balancer.table, service) {
            let server = balancer.table.vip(vip.ip()).and_then(crate::table::Vip::legacy_server);
            let goal = server
                .and_then(|server| self.towards(server.index(), balancer.table.address(server, vip.ip())));
            if let (Some(server), Some(goal)) = (server, goal) {
                self.entry(0, vip, goal, Way::LegacyServer, &balancer.servers[server.index()]);
            }
        }
    }

    /// `B5`.
    fn ways_back(&mut self, balancer: &Balancer) {
        for (address, protocol, port, back) in balancer.table.ways_back() {
            let map = match protocol {
                6 => 1,
                17 => 3,
                _ => continue,
            };
            let stats = &balancer.servers[back.server.index()];
            let goal = Goal::Address(back.vip);
            self.entry(map, SocketAddr::new(address, port), goal, Way::ToClient, stats);
        }
    }

    /// `B3` with a hash. Services with the same servers share a table.
    fn spread(&mut self, config: &Config, offloadable: &Offloadable, balancer: &Balancer) {
        let mut known: Vec<(Family, Arc<Maglev>, Vec<SocketAddr>)> = Vec::new();
        for (index, service) in config.services.iter().enumerate().filter(|(i, _)| offloadable.takes(*i)) {
            for target in unowned(&balancer.table, service) {
                let family = Family::of(target.ip());
                let Some(maglev) = balancer.table.maglev(index, family) else { continue };
                match known.iter_mut().find(|(f, m, _)| *f == family && Arc::ptr_eq(m, maglev)) {
                    Some((_, _, targets)) => targets.push(target),
                    None => known.push((family, Arc::clone(maglev), vec![target])),
                }
            }
        }
        if known.len() * SLOTS > MAX_SLOTS {
            self.plain = Some(Obstacle::Slots);
            return;
        }
        for (family, maglev, targets) in known {
            let servers: BTreeSet<ServerId> = maglev.slots().iter().copied().collect();
            let servers: Vec<(ServerId, Goal)> = servers
                .into_iter()
                .filter_map(|server| {
                    let address = config.servers[server.index()].address(family);
                    Some((server, self.towards(server.index(), address)?))
                })
                .collect();
            let place = |server: &ServerId| {
                servers.binary_search_by_key(server, |(id, _)| *id).map_or(u16::MAX, |place| place as u16)
            };
            let index = self.offload.spreads.len();
            for (server, goal) in &servers {
                let server = Arc::clone(&balancer.servers[server.index()]);
                let entry = Entry { way: Way::LegacyHash, server, seen: Count::default() };
                self.entries.insert(Counted::Spread(index, *goal), entry);
            }
            self.offload.spreads.push(Spread {
                targets,
                seed: client_seed(config.level),
                slots: maglev.slots().iter().map(place).collect(),
                goals: servers.iter().map(|(_, goal)| *goal).collect(),
            });
        }
    }

    /// Takes over what entries that are still the same have counted before; they count on.
    fn follow(&mut self, before: &Plan) {
        let value = |offload: &Offload, of: &Counted| match of {
            Counted::Map(map, key) => offload.maps.get(*map)?.entries.get(key).copied(),
            Counted::Spread(_, goal) => Some(*goal),
        };
        for (of, entry) in &mut self.entries {
            let Some(known) = before.entries.get(of) else { continue };
            if value(&before.offload, of) == value(&self.offload, of) {
                entry.seen = known.seen;
            }
        }
    }

    /// Adds to the balancer's counters what the kernel's have counted since they were last read.
    fn count(&mut self, now: &BTreeMap<Counted, Count>) {
        for (of, count) in now {
            let Some(entry) = self.entries.get_mut(of) else { continue };
            let new = Count {
                packets: count.packets.saturating_sub(entry.seen.packets),
                bytes: count.bytes.saturating_sub(entry.seen.bytes),
            };
            entry.seen = *count;
            self.stats.offloaded(entry.way, new.packets);
            entry.server.offloaded(entry.way == Way::ToClient, new);
        }
    }
}

/// A service's redirect ports by TCP that are nobody's service port.
fn unowned(table: &Table, service: &Service) -> impl Iterator<Item = SocketAddr> {
    let tcp = service.vips.iter().filter(|vip| service.is_reached(**vip, Transport::Tcp));
    let port = service.redirect_port;
    let owned =
        move |vip: IpAddr| table.vip(vip).is_some_and(|vip| vip.owner(Transport::Tcp, port).is_some());
    tcp.copied().filter(move |vip| !owned(*vip)).map(move |vip| SocketAddr::new(vip, port))
}

/// What stands of it on the host.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    plan: Option<Plan>,
    /// Why not, or not all.
    pub(crate) obstacle: Option<Obstacle>,
    /// Nothing is ever left to the kernel while this balancer runs.
    never: Option<Obstacle>,
    /// Interfaces towards servers: what comes from there has the VIP as its source before it is routed.
    links: BTreeSet<String>,
}

impl Standing {
    /// `recorded`: whether a capture has to see every packet; `nft`: whether the kernel has nftables.
    pub(crate) fn new(recorded: bool, nft: bool) -> Standing {
        let never = match (recorded, nft) {
            (true, _) => Some(Obstacle::Capture),
            (_, false) => Some(Obstacle::Kernel("it has no nftables".to_owned())),
            _ => None,
        };
        Standing { never, ..Standing::default() }
    }

    /// Whether anything is left to the kernel.
    pub(crate) fn in_force(&self) -> bool {
        self.plan.is_some()
    }

    /// Why plain clients' segments to redirect ports are not.
    pub(crate) fn plain(&self) -> Option<&Obstacle> {
        self.plan.as_ref()?.plain.as_ref()
    }

    /// What stands on the host because of it.
    pub(crate) fn changes(&self) -> Vec<Change> {
        let Some(plan) = &self.plan else { return Vec::new() };
        with(plan, &self.links)
    }

    /// Makes the host as `base` says, with what the kernel can take beside it. What it refuses stays in userspace.
    pub(crate) async fn install(
        &mut self,
        host: &mut Host,
        base: Vec<Change>,
        config: &Config,
        balancer: &Balancer,
        devices: &Devices,
    ) -> Result<(), HostError> {
        self.count(host).await;
        let generation = host.offload_generation();
        let plan = match &self.never {
            Some(obstacle) => Err(obstacle.clone()),
            None => Plan::new(config, balancer, devices),
        };
        let mut plan = match plan {
            Ok(plan) => plan,
            Err(obstacle) => {
                (self.plan, self.obstacle) = (None, Some(obstacle));
                return host.replace(base).await;
            }
        };
        self.links = links(config).await?;
        let both =
            |plan: &Plan, links: &BTreeSet<String>| base.iter().cloned().chain(with(plan, links)).collect();
        let mut result = host.replace(both(&plan, &self.links)).await;
        if let Err(error) = &result
            && !plan.offload.spreads.is_empty()
        {
            tracing::warn!(%error, "the kernel does not take the hash table: plain clients' packets go through userspace");
            plan.plain = Some(Obstacle::Kernel(error.to_string()));
            plan.offload.spreads.clear();
            result = host.replace(both(&plan, &self.links)).await;
        }
        if let Err(error) = result {
            // The base may be what failed: then it fails again.
            host.replace(base).await?;
            tracing::warn!(%error, "the kernel forwards nothing by itself: all packets go through userspace");
            (self.plan, self.obstacle) = (None, Some(Obstacle::Kernel(error.to_string())));
            return Ok(());
        }
        if let Some(before) = self.plan.as_ref().filter(|_| host.offload_generation() == generation) {
            plan.follow(before);
        }
        (self.plan, self.obstacle) = (Some(plan), None);
        Ok(())
    }

    /// Reads the kernel's counters.
    pub(crate) async fn count(&mut self, host: &Host) {
        let Some(plan) = &mut self.plan else { return };
        match host.offload_counts().await {
            Ok(counts) => plan.count(&counts),
            Err(error) => tracing::debug!(%error, "the kernel's counters cannot be read"),
        }
    }
}

fn with(plan: &Plan, links: &BTreeSet<String>) -> Vec<Change> {
    let conf = |link: &String, name, value| {
        Change::from(Sysctl::interface(Family::V4, link, name, value).optional())
    };
    // Sources are checked after the maps: the VIP's route leads into our device, and it may be this host's own address.
    let checks = links.iter().flat_map(|link| [conf(link, "rp_filter", 0), conf(link, "accept_local", 1)]);
    checks.chain([plan.offload.clone().into()]).collect()
}

/// The interfaces from which answers come, `network` mode.
async fn links(config: &Config) -> Result<BTreeSet<String>, HostError> {
    let mut links = BTreeSet::new();
    if config.forward != ForwardMode::Network {
        return Ok(links);
    }
    for &address in config.servers.iter().flat_map(|server| &server.addresses) {
        match query::next_hop(address).await {
            Ok(hop) => drop(links.insert(hop.interface)),
            // Its packets go nowhere in userspace, either.
            Err(HostError::NoRoute(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(links)
}
