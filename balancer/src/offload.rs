//! What the kernel forwards by itself: the table's static part as nftables maps ([`shunt_host::offload`]).
//!
//! A connection's port is its state, so all of its segments but the first go where a map says: to the owner of their
//! service port (`B2`), those of plain clients to the server of their hash (`B3`), answers back with the VIP as their
//! source (`B5`). Only SYNs to redirect ports have to be decided here: they come to userspace, and so do ICMP, fragments and
//! everything that no map knows. Other SYNs and SYN-ACKs come where they are limited, need a token or get C; where
//! connections are counted ([`Config`]'s `statistics`), they do, and FINs and resets, too.
//!
//! The maps follow the table: reloads, requests and health change what differs, in one step. They end with the daemon; a
//! killed one leaves them, with the sysctls they need, and established traffic goes on until the next one changes them
//! into its own.
//!
//! In the modes `direct` and `datalink` a packet stays as it is: the maps give it its server's mark, and a rule routes what
//! has it as it routes what userspace writes to the server's device. Nothing comes back there.
//!
//! In the mode `network` the next hops are known too, as long as nothing but routing decides about them
//! ([`shunt_host::shortcuts`]): then packets are handed on where they arrive, past routing.
//!
//! What the configuration asks for and maps cannot do stays in userspace as a whole: [`Offloadable`] says what and why.
//! The kernel's counters are read every second and added to the balancer's own, so that statistics, `least-packets` and
//! the wait for a drained server are right.

mod standing;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use shunt_host::offload::{Count, Counted, End, Goal, MAX_ENTRIES, MAX_SLOTS, PortMap, Spread};
use shunt_host::{Family, Offload};
use shunt_stack::wire::TcpFlags;

use crate::Balancer;
use crate::config::{Config, ForwardMode, Legacy, Service, Transport};
use crate::host::{Devices, device_prefix};
use crate::maglev::{Maglev, SLOTS, client_seed};
use crate::route::Way;
use crate::stats::{ServerStats, Stats};
use crate::table::{ServerId, Table};

pub(crate) use standing::Standing;

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

/// The port maps: those of TCP twice, for ports whose SYNs come here, and for those where flags do not matter.
const MAPS: [(End, Transport); 6] = [
    (End::Destination, Transport::Tcp),
    (End::Source, Transport::Tcp),
    (End::Destination, Transport::Tcp),
    (End::Source, Transport::Tcp),
    (End::Destination, Transport::Udp),
    (End::Source, Transport::Udp),
];
const FIRST_OF_ALL_FLAGS: usize = 2;
const FIRST_OF_UDP: usize = 4;

/// The index in [`MAPS`].
fn place(end: End, transport: Transport, all_flags: bool) -> usize {
    let first = match (transport, all_flags) {
        (Transport::Tcp, false) => 0,
        (Transport::Tcp, true) => FIRST_OF_ALL_FLAGS,
        (Transport::Udp, _) => FIRST_OF_UDP,
    };
    first + usize::from(end == End::Source)
}

impl Plan {
    /// What the table says of packets that open no connection.
    pub(crate) fn new(config: &Config, balancer: &Balancer, devices: &Devices) -> Result<Plan, Obstacle> {
        let offloadable = Offloadable::new(config)?;
        let opens = TcpFlags::SYN.0;
        let ends = if config.statistics.is_some() { (TcpFlags::FIN | TcpFlags::RST).0 } else { 0 };
        let mut maps = MAPS.map(|(end, transport)| PortMap {
            end,
            transport,
            except_flags: if transport == Transport::Tcp { opens | ends } else { 0 },
            entries: BTreeMap::new(),
        });
        for map in &mut maps[FIRST_OF_ALL_FLAGS..FIRST_OF_UDP] {
            map.except_flags = 0;
        }
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
                mark_mask: marked.then_some(config.host.server_mark_mask),
                maps: maps.into(),
                spreads: Vec::new(),
                shortcuts: None,
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
        plan.ways_back(config, balancer);
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
        for transport in [Transport::Tcp, Transport::Udp] {
            for vip in service.vips.iter().filter(|vip| service.is_reached(**vip, transport)) {
                for (number, (server, stats)) in config.servers.iter().zip(&balancer.servers).enumerate() {
                    let Some(goal) = self.towards(number, server.address(Family::of(*vip))) else { continue };
                    for port in server.ports_of(index).flat_map(shunt_host::PortRange::ports) {
                        let all = flags_matter_not(config)
                            && service.traffic.limit.is_none()
                            && !balancer.decides_about_syns(*vip, port);
                        let map = place(End::Destination, transport, all);
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
                let map = place(End::Destination, Transport::Tcp, false);
                self.entry(map, vip, goal, Way::LegacyServer, &balancer.servers[server.index()]);
            }
        }
    }

    /// `B5`.
    fn ways_back(&mut self, config: &Config, balancer: &Balancer) {
        for (address, protocol, port, back) in balancer.table.ways_back() {
            let transport = match protocol {
                6 => Transport::Tcp,
                17 => Transport::Udp,
                _ => continue,
            };
            let map = place(End::Source, transport, flags_matter_not(config) && !back.confirms);
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
                except_flags: self.offload.maps[0].except_flags,
                seed: client_seed(config.level),
                slots: maglev.slots().iter().map(place).collect(),
                goals: servers.iter().map(|(_, goal)| *goal).collect(),
            });
        }
    }

    /// Leaves plain clients' segments to userspace, because the kernel refuses to spread them.
    fn without_spreads(&mut self, why: String) {
        self.plain = Some(Obstacle::Kernel(why));
        self.offload.spreads.clear();
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

/// Whether no connections are counted.
fn flags_matter_not(config: &Config) -> bool {
    config.statistics.is_none()
}

impl Balancer {
    /// Whether SYNs to a service port need a decision: `B1` on a port that is both, or `T4`.
    fn decides_about_syns(&self, vip: IpAddr, port: u16) -> bool {
        let redirects =
            self.table.vip(vip).is_some_and(|vip| self.table.set(vip, Transport::Tcp, port).is_some());
        redirects || self.tokens.guards(vip, port)
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
