//! What the balancer needs of its host: which packets are routed into its devices, and where what it writes goes.
//!
//! Rules, by preference from [`HostOptions::preference`](shunt_host::HostOptions) on:
//!
//! | rule | lookup | why |
//! |---|---|---|
//! | `iif` a server's device | that server's table: VIPs by its next hop | `direct`, `datalink` mode |
//! | a server's mark | the same | what the kernel forwards by itself in these modes (`offload`) |
//! | `iif` any device of ours | local, main, then a blackhole | what we write never comes back |
//! | `to` VIP, the administrator's ports; `from` there, by this host | this host itself | `admin_ports` |
//! | `to` VIP | our device; behind it a blackhole for when it is gone | towards servers |
//! | to the ports that health checks come from | local | answers to this host itself, `network` mode |
//! | `from` server, service and redirect ports | our device | answers, `network` mode |
//! | `from` server, a protocol without ports | our device | the same of such a protocol |
//! | our mark | our device | ICMP errors that quote a server, `network` and `gue` mode; fragments from servers, echo replies, `network` mode |

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use shunt_host::change::{LOCAL, Link, MAIN, Route, Rule, Sysctl};
use shunt_host::sandbox::{self, Confined, Policy};
use shunt_host::{
    Change, Divert, Family, HostError, PacketKind, PacketMatch, PortRange, Prefix, QuotedMatch, SegmentMatch,
    Transport, query,
};

use crate::config::{Config, ForwardMode, WayBack};

/// MTU of a device that shall not be what limits packets.
pub(crate) const LARGEST_MTU: u32 = 65_535;
/// The smallest MTU that IPv6 works with (RFC 8200 §5).
const SMALLEST_MTU: u32 = 1280;
/// Metric of the blackhole behind a VIP's route.
const BLACKHOLE_METRIC: u32 = 1000;
const DEVICE_METRIC: u32 = 10;
/// Metric of our entry for a VIP among the local addresses, so that it can stand beside an address of the host's own.
const ADMIN_METRIC: u32 = 21_600;

/// Offsets from the first route table.
mod table {
    pub(super) const VIPS: u32 = 0;
    pub(super) const BACK: u32 = 1;
    pub(super) const END: u32 = 2;
    pub(super) const ADMIN: u32 = 3;
    pub(super) const SERVERS: u32 = 10;
}

/// The devices of a running balancer, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Devices {
    /// Where packets come from.
    pub(crate) main: String,
    /// Its MTU.
    pub(crate) mtu: u32,
    /// In `direct` and `datalink` mode one a server, in the order of the configuration; its slot numbers its route table.
    pub(crate) servers: Vec<ServerDevice>,
}

/// A server's device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerDevice {
    pub(crate) name: String,
    pub(crate) slot: u32,
    /// Whether the server's link is there; without it nothing of the device's stands on the host.
    pub(crate) connected: bool,
}

/// The name of a server's device.
pub(crate) fn device_name(main: &str, slot: u32) -> String {
    let suffix = format!("-{slot}");
    let room = 15 - suffix.len();
    let base: String = main.chars().take(room).collect();
    base + &suffix
}

/// What the names of all servers' devices begin with.
pub(crate) fn device_prefix(main: &str) -> String {
    // A slot has a route table, so its number has four digits at the most.
    let base: String = main.chars().take(10).collect();
    if base == main { base + "-" } else { base }
}

/// Everything that has to stand on the host.
pub(crate) fn changes(config: &Config, devices: &Devices, nft: bool) -> Vec<Change> {
    let mut wanted = Vec::new();
    sysctls_and_links(config, devices, &mut wanted);
    wanted.push(Change::LocalLast);
    if config.checks_health() {
        wanted.push(Change::ReservePorts(vec![config.check_ports]));
    }
    for family in Family::BOTH.into_iter().filter(|family| config.sends(*family)) {
        leaving(config, devices, family, nft, &mut wanted);
        administrators(config, family, &mut wanted);
        arriving(config, devices, family, nft, &mut wanted);
    }
    if nft {
        wanted.push(divert(config, devices).into());
    }
    wanted
}

fn sysctls_and_links(config: &Config, devices: &Devices, wanted: &mut Vec<Change>) {
    wanted.push(Link::tun(&devices.main, devices.mtu).into());
    wanted.extend(devices.servers.iter().map(|device| Link::tun(&device.name, LARGEST_MTU).into()));
    if config.sends(Family::V6) {
        wanted.push(Sysctl::new("net/ipv6/conf/all/forwarding", 1).into());
    }
    if !config.sends(Family::V4) {
        return;
    }
    wanted.push(Sysctl::new("net/ipv4/ip_forward", 1).into());
    let conf =
        |interface: &str, name: &str, value| Sysctl::interface(Family::V4, interface, name, value).into();
    wanted.push(conf("all", "rp_filter", 0));
    for device in devices.names() {
        wanted.push(conf(device, "rp_filter", 0));
        // What we write may come from an address of this host: a VIP, or its own ICMP errors.
        wanted.push(conf(device, "accept_local", 1));
    }
    // Answers carry the VIP, whose route leads into our device.
    let connected = config.servers.iter().zip(&devices.servers).filter(|(_, device)| device.connected);
    let towards: BTreeSet<&String> = connected.filter_map(|(server, _)| server.device.as_ref()).collect();
    wanted.extend(towards.into_iter().map(|device| conf(device, "rp_filter", 0)));
}

/// Where packets go that we have written.
fn leaving(config: &Config, devices: &Devices, family: Family, nft: bool, wanted: &mut Vec<Change>) {
    let (tables, first) = (config.host.table, config.host.preference);
    wanted.push(Route::blackhole(tables + table::END, Prefix::all(family)).into());
    for name in devices.names() {
        for (offset, table) in [(1, LOCAL), (2, MAIN), (3, tables + table::END)] {
            wanted.push(Rule::new(family, first + offset, table).interface(name).into());
        }
    }
    for (server, device) in config.servers.iter().zip(&devices.servers) {
        let usable = device.connected && server.serves(family);
        let Some(out) = server.device.as_ref().filter(|_| usable) else { continue };
        let own = tables + table::SERVERS + device.slot;
        for vip in vips(config, family) {
            let route = Route::device(own, vip, out);
            let route = match server.next_hop(family) {
                Some(gateway) => route.via(Some(gateway)).on_link(),
                None => route,
            };
            wanted.push(route.into());
        }
        wanted.push(Rule::new(family, first, own).interface(&device.name).into());
        let mark = config.host.server_mark(device.slot).filter(|_| nft && config.host.offload);
        let marked = |mark| Rule::new(family, first, own).mark(mark, config.host.server_mark_mask);
        wanted.extend(mark.map(|mark| Change::from(marked(mark))));
    }
}

/// The administrator's ports of the VIPs lead to this host itself, before any other rule about a VIP.
fn administrators(config: &Config, family: Family, wanted: &mut Vec<Change>) {
    if config.admin_ports.is_empty() {
        return;
    }
    let own = config.host.table + table::ADMIN;
    for vip in vips(config, family) {
        // The kernel answers from an address only that is one of its own by the local table.
        wanted.push(Route::local(LOCAL, vip, "lo").metric(ADMIN_METRIC).into());
        wanted.push(Route::local(own, vip, "lo").into());
        for ports in PortRange::merged(config.admin_ports.iter().map(|port| PortRange::from(*port))) {
            let rule = |table| Rule::new(family, config.host.preference + 3, table);
            wanted.push(rule(own).to(vip).destination_port(ports).into());
            // This host's connections to itself have the VIP at both ends.
            wanted.push(rule(LOCAL).interface("lo").from(vip).source_port(ports).into());
        }
    }
}

/// Which packets come to us.
fn arriving(config: &Config, devices: &Devices, family: Family, nft: bool, wanted: &mut Vec<Change>) {
    let (tables, first) = (config.host.table, config.host.preference);
    for vip in vips(config, family) {
        let table = tables + table::VIPS;
        wanted.push(Route::blackhole(table, vip).metric(BLACKHOLE_METRIC).into());
        wanted.push(Route::device(table, vip, &devices.main).metric(DEVICE_METRIC).into());
        wanted.push(Rule::new(family, first + 4, table).to(vip).into());
    }
    let back = tables + table::BACK;
    if config.forward == ForwardMode::Gue && nft {
        wanted.push(Route::device(back, Prefix::all(family), &devices.main).into());
        let host = &config.host;
        wanted.push(Rule::new(family, first + 7, back).mark(host.mark, host.mark_mask).into());
    }
    if config.forward != ForwardMode::Network {
        return;
    }
    if config.checks_health() {
        // Only what is addressed to this host finds a route there; everything else goes on to the next rules.
        wanted.push(Rule::new(family, first + 5, LOCAL).destination_port(config.check_ports).into());
    }
    wanted.push(Route::device(back, Prefix::all(family), &devices.main).into());
    let mut answers: BTreeMap<(IpAddr, u8), Option<Vec<PortRange>>> = BTreeMap::new();
    let known = |way: &WayBack| match way.protocol {
        // Marks tell: a rule would divert neighbour discovery as well.
        1 | 58 => None,
        // Fragments have no ports to tell by: without marks all has to come.
        17 if !nft => Some((way.address, 17, None)),
        6 | 17 => Some((way.address, way.protocol, Some(way.port))),
        other => Some((way.address, other, None)),
    };
    for (address, protocol, port) in config.ways_back().iter().filter_map(known) {
        let ports = answers.entry((address, protocol)).or_insert_with(|| port.map(|_| Vec::new()));
        if let Some((ports, port)) = ports.as_mut().zip(port) {
            ports.push(PortRange::from(port));
        }
    }
    for ((address, protocol), ports) in answers {
        if Family::of(address) != family {
            continue;
        }
        let rule = || Rule::new(family, first + 6, back).from(address).protocol(protocol);
        match ports {
            None => wanted.push(rule().into()),
            Some(ports) => {
                let of = |ports| rule().source_port(ports).protocol(protocol).into();
                wanted.extend(PortRange::merged(ports).into_iter().map(of));
            }
        }
    }
    if nft {
        let host = &config.host;
        wanted.push(Rule::new(family, first + 7, back).mark(host.mark, host.mark_mask).into());
    }
}

/// ICMP errors about packets to servers, what of their answers has no ports to tell by, and no connection tracking for what passes here.
fn divert(config: &Config, devices: &Devices) -> Divert {
    let ways = config.ways_back();
    let unique = |addresses: &mut dyn Iterator<Item = IpAddr>| -> Vec<Prefix> {
        addresses.collect::<BTreeSet<_>>().into_iter().map(Prefix::host).collect()
    };
    let servers: BTreeSet<IpAddr> = ways.iter().map(|way| way.address).collect();
    let shared = unique(&mut config.vips.iter().copied());
    // The host's own firewall may track what is for the host itself.
    let admin = PortRange::merged(config.admin_ports.iter().map(|port| PortRange::from(*port)));
    let balanced = match &admin[..] {
        [] => Vec::new(),
        admin => PortRange::without(&[PortRange::new(0, u16::MAX)], admin),
    };
    let mut untracked = Vec::new();
    for transport in [Transport::Tcp, Transport::Udp] {
        let of = SegmentMatch { transport, ..SegmentMatch::default() };
        if config.services.iter().any(|service| service.protocols.contains(&transport)) {
            let destination_ports = if transport == Transport::Tcp { balanced.clone() } else { Vec::new() };
            untracked.push(SegmentMatch { destination: shared.clone(), destination_ports, ..of.clone() });
            untracked.push(SegmentMatch { source: shared.clone(), ..of.clone() });
        }
        for &address in &servers {
            let own = ways.iter().filter(|way| way.address == address && way.protocol == transport.number());
            let ports = PortRange::merged(own.map(|way| PortRange::from(way.port)));
            if ports.is_empty() {
                continue;
            }
            let server = vec![Prefix::host(address)];
            untracked.push(SegmentMatch {
                source: server.clone(),
                source_ports: ports.clone(),
                ..of.clone()
            });
            untracked.push(SegmentMatch { destination: server, destination_ports: ports, ..of.clone() });
        }
    }
    let (mut icmp, mut packets) = (Vec::new(), Vec::new());
    if !servers.is_empty() {
        let answering = ways.iter().filter(|way| matches!(way.protocol, 1 | 58)).map(|way| way.address);
        let answering: BTreeSet<IpAddr> = answering.collect();
        let servers: Vec<IpAddr> = servers.into_iter().collect();
        packets.push(PacketMatch { kind: PacketKind::Fragment, source: servers.clone() });
        packets.push(PacketMatch { kind: PacketKind::IcmpAnswer, source: answering.into_iter().collect() });
        icmp.push(QuotedMatch { destination: servers, udp: true, ..QuotedMatch::default() });
    }
    // What the kernel forwards by itself has its new destination when the kernel complains of it.
    let icmp_outgoing = if config.host.offload { icmp.clone() } else { Vec::new() };
    let ends = unique(&mut config.servers.iter().flat_map(|server| server.ends.iter().copied()));
    if !ends.is_empty() {
        let destination = ends.iter().map(|end| end.address()).collect();
        icmp.push(QuotedMatch { destination, udp: true, ..QuotedMatch::default() });
        untracked.push(SegmentMatch {
            transport: Transport::Udp,
            destination: ends,
            destination_ports: vec![config.gue_port.into()],
            ..SegmentMatch::default()
        });
    }
    Divert {
        mark: config.host.mark,
        mask: config.host.mark_mask,
        except_interface: Some(devices.main.clone()),
        icmp,
        icmp_outgoing,
        packets,
        untracked_incoming: untracked,
        ..Divert::default()
    }
}

fn vips(config: &Config, family: Family) -> impl Iterator<Item = IpAddr> {
    config.vips.iter().copied().filter(move |vip| Family::of(*vip) == family)
}

impl Devices {
    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.main).chain(self.servers.iter().map(|device| &device.name)).map(String::as_str)
    }
}

/// What is left to the balancer once it runs.
pub(crate) fn confinement(config: &Config, path: &Path, state_dir: &Path, socket: Option<PathBuf>) -> Policy {
    let (keys, state_dir) = (config.token_file.clone(), state_dir.to_owned());
    let places = sandbox::Places { config: path.to_owned(), keys, state_dir, socket };
    let confined = Confined::Balancer { devices: config.forward.uses_devices(), pins: config.host.pin };
    Policy::of(&confined, &places)
}

/// The MTU of the device that packets come from.
///
/// In `network` mode the smallest on the ways to the servers: a client's segment that is too big is then refused
/// before its destination is rewritten, with an error that the client understands.
pub(crate) async fn main_mtu(config: &Config) -> Result<u32, HostError> {
    if config.forward != ForwardMode::Network {
        return Ok(LARGEST_MTU);
    }
    let mut smallest = LARGEST_MTU;
    let (mut links, mut found) = (BTreeSet::new(), false);
    for &address in config.servers.iter().flat_map(|server| &server.addresses) {
        let hop = match query::next_hop(address).await {
            Ok(hop) => hop,
            Err(HostError::NoRoute(_)) => {
                tracing::warn!(%address, "no route leads to this server");
                continue;
            }
            Err(error) => return Err(error),
        };
        if links.insert(hop.index) {
            smallest = smallest.min(query::link_mtu(&hop.interface).await?);
            found = true;
        }
    }
    Ok(if found { smallest.max(SMALLEST_MTU) } else { 1500 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn o23_the_administrators_ports_come_before_the_rule_to_the_vip_and_stay_out_of_notrack() {
        let text = "role = \"balancer\"\nvips = [\"203.0.113.10\", \"2001:db8::10\"]\nadmin_ports = [22, 23, 2222]\n\
                    [[service]]\nname = \"web\"\nredirect_port = 443\n";
        let config = Config::parse(&shunt_host::Source::new("test.toml", text)).unwrap();
        let devices = Devices { main: "shunt-lb0".to_owned(), mtu: 1500, servers: Vec::new() };
        let wanted = changes(&config, &devices, true);
        for vip in config.vips.iter().copied() {
            let rules = || {
                wanted.iter().filter_map(|change| match change {
                    Change::Rule(rule) if rule.to == Some(Prefix::host(vip)) => Some(rule),
                    _ => None,
                })
            };
            let (admin, all): (Vec<_>, Vec<_>) = rules().partition(|rule| rule.destination_port.is_some());
            assert_eq!((admin.len(), all.len()), (2, 1));
            assert_eq!(admin[0].destination_port, Some(PortRange::new(22, 23)));
            assert!(admin.iter().all(|rule| rule.preference < all[0].preference && rule.protocol == Some(6)));
        }
        let divert = wanted.iter().find_map(|change| match change {
            Change::Divert(divert) => Some(divert),
            _ => None,
        });
        let to_vips = &divert.unwrap().untracked_incoming[0];
        assert_eq!(to_vips.destination.len(), 2);
        let left: Vec<String> = to_vips.destination_ports.iter().map(ToString::to_string).collect();
        assert_eq!(left, ["0-21", "24-2221", "2223-65535"]);
    }

    #[test]
    fn server_devices_have_names_that_interfaces_can_have() {
        assert_eq!(device_name("shunt-lb0", 7), "shunt-lb0-7");
        assert_eq!(device_name("fifteen-letters", 199), "fifteen-let-199");
        for main in ["t", "shunt-lb0", "ten-letter", "fifteen-letters"] {
            for slot in [0, 9, 10, 999, 1000, shunt_host::options::BALANCER_TABLES - 1] {
                assert!(device_name(main, slot).starts_with(&device_prefix(main)), "{main} {slot}");
            }
        }
        assert_eq!(device_prefix("shunt-lb0"), "shunt-lb0-");
    }
}
