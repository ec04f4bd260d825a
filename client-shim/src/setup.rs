//! What the shim changes on its host, as values. Decides; [`shunt_host::Host`] does.
//!
//! Segments of the host's own TCP to a VIP are routed into the TUN device, as are segments from a VIP that arrive;
//! what the shim writes back is routed out or taken in as if it had come by the network. The source address stays the
//! host's own, and connection tracking is not needed. ICMP errors about packets to a VIP come from any router: marks
//! divert them by what they quote.

use std::collections::BTreeSet;
use std::net::IpAddr;

use shunt_host::change::{LOCAL, Link, Route, Rule, Sysctl};
use shunt_host::options::{PREFERENCES, TABLES};
use shunt_host::query::NextHop;
use shunt_host::{
    Change, Divert, Family, HostOptions, PortRange, Prefix, QuotedMatch, SegmentMatch, SwapTable,
};

use crate::config::Config;
use crate::paths::Paths;

/// The least MTU of IPv6 (RFC 8200 §5), and of the device.
const LEAST_MTU: u32 = 1280;
/// Behind the metrics that routes have which are given none.
const LAST_METRIC: u32 = 4096;

/// Our tables, from [`HostOptions::table`] on.
mod table {
    /// Everything into the device.
    pub(super) const IN: u32 = 0;
    /// The ways of the host's own TCP to VIPs: into the device, with the host's address.
    pub(super) const APP: u32 = 1;
    /// The ways to VIPs out of the host.
    pub(super) const OUT: u32 = 2;
}

/// Our rules, from [`HostOptions::preference`] on.
mod preference {
    pub(super) const DEVICE_OUT: u32 = 0;
    pub(super) const DEVICE_LOCAL: u32 = 1;
    pub(super) const SWAPPED_OUT: u32 = 2;
    pub(super) const SWAPPED_IN: u32 = 3;
    pub(super) const MARKED: u32 = 4;
    pub(super) const ARRIVING: u32 = 5;
    pub(super) const OWN: u32 = 6;
}

/// What the set-up depends on beside configuration and paths; asked once, before anything is changed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// Whether packets can be marked.
    pub(crate) nft: bool,
    /// Interfaces that take router advertisements, which they would not do any more once IPv6 is forwarded.
    pub(crate) accept_ra: Vec<String>,
    /// The device's MTU when it was made, in bytes.
    pub(crate) mtu: u32,
    /// Whether the kernel shall exchange ports by itself.
    pub(crate) offload: bool,
}

impl Facts {
    /// Asks the kernel.
    pub(crate) async fn gather(paths: &Paths) -> Self {
        Self {
            nft: shunt_host::nft_available().await,
            accept_ra: shunt_host::query::accepting_advertisements(),
            mtu: device_mtu(paths).unwrap_or(1500),
            offload: false,
        }
    }
}

/// The MTU the device needs: no packet that it takes may be too big for the interfaces behind it, because the
/// host's own ICMP errors about that do not come back through the shim.
fn device_mtu(paths: &Paths) -> Option<u32> {
    paths.mtu().map(|mtu| mtu.max(LEAST_MTU))
}

/// All changes for these paths, in the order they must be made.
pub(crate) fn changes(config: &Config, paths: &Paths, facts: &Facts) -> Vec<Change> {
    let setup = Setup { config, host: &config.host, paths, facts };
    let mut changes = setup.device();
    for family in setup.families() {
        setup.family(family, &mut changes);
    }
    changes.push(Change::LocalLast);
    setup.routes(&mut changes);
    setup.leaving_the_device(&mut changes);
    if facts.nft {
        changes.push(setup.divert().into());
        changes.extend(setup.families().map(|family| setup.marked(family).into()));
    }
    setup.entering_the_device(&mut changes);
    if facts.offload {
        setup.past_the_device(&mut changes);
    }
    changes
}

/// Where the changes of [`guard`] live: beside those of [`changes`], so that neither's sweep removes the other's.
pub(crate) fn guard_options(host: &HostOptions) -> HostOptions {
    HostOptions {
        table: host.table.saturating_add(TABLES),
        preference: host.preference.saturating_add(PREFERENCES).min(99),
        ..host.clone()
    }
}

/// What holds TCP to and from VIPs back while the shim is away: its rules come after the shim's, and matter when those
/// lead nowhere.
pub(crate) fn guard(config: &Config, paths: &Paths) -> Vec<Change> {
    let host = guard_options(&config.host);
    let setup = Setup { config, host: &host, paths, facts: &Facts::default() };
    let mut changes = vec![Change::LocalLast];
    for family in setup.families() {
        changes.push(Route::blackhole(host.table, Prefix::all(family)).into());
    }
    for (vip, path) in paths.iter() {
        let rule = || Rule::new(Family::of(vip), host.preference, host.table).tcp();
        changes.push(rule().interface(&path.hop.interface).from(vip).into());
        changes.push(rule().interface("lo").to(vip).into());
    }
    changes
}

struct Setup<'a> {
    config: &'a Config,
    host: &'a HostOptions,
    paths: &'a Paths,
    facts: &'a Facts,
}

impl Setup<'_> {
    fn table(&self, offset: u32) -> u32 {
        self.host.table + offset
    }

    fn preference(&self, offset: u32) -> u32 {
        self.host.preference + offset
    }

    fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.paths.iter().map(|(vip, _)| vip)
    }

    /// Where streams may be moved to beside the VIPs.
    fn accepted(&self) -> impl Iterator<Item = Prefix> {
        let prefixes = self.config.proxy.iter().flat_map(|proxy| &proxy.accept_prefixes);
        prefixes.copied().filter(|prefix| self.families().any(|family| family == prefix.family()))
    }

    fn families(&self) -> impl Iterator<Item = Family> {
        Family::BOTH.into_iter().filter(|family| self.vips().any(|vip| Family::of(vip) == *family))
    }

    /// The interfaces by which VIPs of a family are reached.
    fn interfaces(&self, family: Family) -> BTreeSet<&str> {
        self.paths
            .iter()
            .filter(|(vip, _)| Family::of(*vip) == family)
            .map(|(_, path)| path.hop.interface.as_str())
            .collect()
    }

    fn device(&self) -> Vec<Change> {
        let device = &self.host.device;
        let mut changes = vec![Link::tun(device, self.facts.mtu).into()];
        // A change of its own: undoing the first would take the device down.
        if let Some(mtu) = device_mtu(self.paths)
            && mtu != self.facts.mtu
        {
            changes.push(Link { interface: device.clone(), mtu: Some(mtu), quiet: false, up: false }.into());
        }
        changes
    }

    fn family(&self, family: Family, changes: &mut Vec<Change>) {
        let device = self.host.device.as_str();
        let mut set = |sysctl: Sysctl| changes.push(sysctl.into());
        // Early demultiplexing attaches the socket to what must be forwarded, and forwarding then drops it. The key
        // is for both families.
        set(Sysctl::new("net/ipv4/tcp_early_demux", 0));
        match family {
            Family::V4 => {
                set(Sysctl::interface(family, "all", "rp_filter", 0));
                set(Sysctl::interface(family, device, "accept_local", 1));
                for interface in self.interfaces(family).into_iter().chain([device]) {
                    set(Sysctl::interface(family, interface, "rp_filter", 0));
                    set(Sysctl::interface(family, interface, "forwarding", 1));
                }
            }
            Family::V6 => {
                // Before forwarding, or the routes learnt from advertisements are dropped.
                for interface in &self.facts.accept_ra {
                    set(Sysctl::interface(family, interface, "accept_ra", 2).optional());
                }
                set(Sysctl::interface(family, "all", "forwarding", 1));
            }
        }
    }

    fn routes(&self, changes: &mut Vec<Change>) {
        let device = self.host.device.as_str();
        for family in self.families() {
            changes.push(Route::device(self.table(table::IN), Prefix::all(family), device).into());
        }
        for (vip, path) in self.paths.iter() {
            let hop = &path.hop;
            let mut out = Route::device(self.table(table::OUT), vip, &hop.interface).via(hop.gateway);
            if hop.gateway.is_some() {
                // The lookup has found it on the link, whatever this table knows.
                out = out.on_link();
            }
            changes.push(out.into());
            if self.config.proxy.is_none() {
                changes.push(Route::device(self.table(table::APP), vip, device).source(hop.source).into());
            }
            if self.facts.offload {
                changes.push(self.in_absence(vip, hop).into());
            }
        }
    }

    /// Where the host's own TCP finds a way while the device is gone: a segment is swapped only once it has one, and the
    /// guard's blackhole is none. What is not swapped then is dropped ([`Divert::held`]).
    fn in_absence(&self, vip: IpAddr, hop: &NextHop) -> Route {
        let way = Route::device(self.table(table::APP), vip, &hop.interface).via(hop.gateway);
        let way = if hop.gateway.is_some() { way.on_link() } else { way };
        way.source(hop.source).metric(LAST_METRIC)
    }

    fn leaving_the_device(&self, changes: &mut Vec<Change>) {
        let from_device = |family, offset, table| {
            Rule::new(family, self.preference(offset), table).interface(&self.host.device)
        };
        for vip in self.vips() {
            let out = self.table(table::OUT);
            changes.push(from_device(Family::of(vip), preference::DEVICE_OUT, out).to(vip).into());
        }
        for family in self.families() {
            changes.push(from_device(family, preference::DEVICE_LOCAL, LOCAL).into());
        }
    }

    fn marked(&self, family: Family) -> Rule {
        Rule::new(family, self.preference(preference::MARKED), self.table(table::IN))
            .mark(self.host.mark, self.host.mark_mask)
    }

    fn entering_the_device(&self, changes: &mut Vec<Change>) {
        if let Some(proxy) = &self.config.proxy {
            changes.push(Change::ReservePorts(vec![proxy.ports]));
        }
        let rule = |vip, offset, table| Rule::new(Family::of(vip), self.preference(offset), table).tcp();
        let arriving = |vip, interface: &str| {
            rule(vip, preference::ARRIVING, self.table(table::IN)).interface(interface).from(vip)
        };
        if let Some(proxy) = &self.config.proxy {
            for prefix in self.accepted() {
                for interface in self.interfaces(prefix.family()) {
                    let offset = self.preference(preference::ARRIVING);
                    let arriving = Rule::new(prefix.family(), offset, self.table(table::IN)).tcp();
                    let arriving = arriving.interface(interface).from(prefix);
                    changes.push(arriving.destination_port(proxy.ports).into());
                }
            }
        }
        for (vip, path) in self.paths.iter() {
            if let Some(proxy) = &self.config.proxy {
                // Its own address may be that of another of these interfaces.
                for interface in self.interfaces(Family::of(vip)) {
                    changes.push(arriving(vip, interface).destination_port(proxy.ports).into());
                }
            } else {
                changes.push(arriving(vip, &path.hop.interface).into());
                let own = rule(vip, preference::OWN, self.table(table::APP)).interface("lo").to(vip);
                changes.push(own.into());
            }
        }
    }

    /// What the kernel has swapped by itself. It has the mark of what is diverted, which only other packets have: the host's
    /// own segments never, and of what arrives ICMP errors alone.
    fn past_the_device(&self, changes: &mut Vec<Change>) {
        let (mark, mask) = (self.host.mark, self.host.mark_mask);
        for vip in self.vips() {
            let rule =
                |offset, table| Rule::new(Family::of(vip), self.preference(offset), table).mark(mark, mask);
            changes
                .push(rule(preference::SWAPPED_OUT, self.table(table::OUT)).interface("lo").to(vip).into());
            changes.push(rule(preference::SWAPPED_IN, LOCAL).from(vip).tcp().into());
        }
        changes.push(SwapTable { except_interface: self.host.device.clone(), mark, mask }.into());
    }

    fn divert(&self) -> Divert {
        let vips: Vec<IpAddr> = self.vips().collect();
        let mut divert = Divert {
            mark: self.host.mark,
            mask: self.host.mark_mask,
            except_interface: Some(self.host.device.clone()),
            icmp: vec![QuotedMatch {
                destination: vips.clone(),
                destination_prefixes: self.accepted().collect(),
                ..QuotedMatch::default()
            }],
            ..Divert::default()
        };
        if self.facts.offload {
            divert.held.clone_from(&vips);
        }
        if self.config.notrack && !vips.is_empty() {
            self.untrack(&vips, &mut divert);
        }
        divert
    }

    fn untrack(&self, vips: &[IpAddr], divert: &mut Divert) {
        let prefixes: Vec<Prefix> = vips.iter().copied().map(Prefix::host).chain(self.accepted()).collect();
        let ports: Vec<PortRange> = self.config.proxy.iter().map(|proxy| proxy.ports).collect();
        let from_vip = |interface: &str, source| SegmentMatch {
            interface: Some(interface.to_owned()),
            source,
            destination_ports: ports.clone(),
            ..SegmentMatch::default()
        };
        let to_vip = |interface: Option<String>| SegmentMatch {
            interface,
            destination: prefixes.clone(),
            source_ports: ports.clone(),
            ..SegmentMatch::default()
        };
        for (vip, path) in self.paths.iter() {
            divert.untracked_incoming.push(from_vip(&path.hop.interface, vec![Prefix::host(vip)]));
        }
        for prefix in self.accepted() {
            for interface in self.interfaces(prefix.family()) {
                divert.untracked_incoming.push(from_vip(interface, vec![prefix]));
            }
        }
        divert.untracked_incoming.push(from_vip(&self.host.device, prefixes.clone()));
        divert.untracked_incoming.push(to_vip(Some(self.host.device.clone())));
        if self.config.proxy.is_none() {
            divert.untracked_outgoing.push(to_vip(None));
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_host::Source;

    use super::*;
    use crate::paths::Path;

    fn config(extra: &str) -> Config {
        let text = format!(
            "role = \"client\"\n{extra}\n[[vip]]\naddress = \"203.0.113.10\"\n[[vip]]\naddress = \"2001:db8::10\"\n"
        );
        let text = if extra.contains("proxy") {
            format!("{text}[proxy]\nsocks5 = \"127.0.0.1:1080\"\n")
        } else {
            text
        };
        Config::from_source(&Source::new("client.toml", text)).unwrap()
    }

    fn path(gateway: &str, source: &str, mtu: u32) -> Path {
        let hop = NextHop {
            index: 2,
            interface: "eth0".to_owned(),
            gateway: Some(gateway.parse().unwrap()),
            source: Some(source.parse().unwrap()),
            local: false,
        };
        Path { hop, mtu }
    }

    fn paths() -> Paths {
        Paths::from_iter([
            ("203.0.113.10".parse().unwrap(), path("10.0.0.1", "10.0.0.2", 1500)),
            ("2001:db8::10".parse().unwrap(), path("fe80::1", "2001:db8:1::2", 1400)),
        ])
    }

    fn rules(changes: &[Change]) -> impl Iterator<Item = &Rule> {
        changes.iter().filter_map(|change| match change {
            Change::Rule(rule) => Some(rule),
            _ => None,
        })
    }

    #[test]
    fn only_tcp_is_diverted_by_rules_or_neighbour_discovery_breaks() {
        for mode in ["", "mode = \"proxy\""] {
            let changes = changes(&config(mode), &paths(), &Facts { nft: true, ..Facts::default() });
            let device = HostOptions::defaults(shunt_host::Role::Client).device;
            for rule in rules(&changes) {
                let leaves = rule.interface.as_ref() == Some(&device);
                assert!(leaves || rule.protocol.is_some() || rule.mark.is_some(), "{rule:?}");
            }
        }
    }

    #[test]
    fn the_proxy_takes_its_own_ports_only_and_no_connection_of_the_kernel() {
        let changes = changes(&config("mode = \"proxy\""), &paths(), &Facts::default());
        let arriving: Vec<&Rule> = rules(&changes).filter(|rule| rule.from.is_some()).collect();
        assert_eq!(arriving.len(), 2);
        assert!(arriving.iter().all(|rule| rule.destination_port == Some(PortRange::new(50_000, 50_999))));
        assert!(!rules(&changes).any(|rule| rule.interface.as_deref() == Some("lo")));
    }

    #[test]
    fn j6_what_comes_from_accepted_addresses_to_the_proxys_ports_is_its_own() {
        let mut config = config("mode = \"proxy\"");
        let prefix = Prefix::new("2001:db8:3::".parse().unwrap(), 64);
        config.proxy.as_mut().unwrap().accept_prefixes = vec![prefix];
        let changes = changes(&config, &paths(), &Facts { nft: true, ..Facts::default() });
        let arriving: Vec<&Rule> = rules(&changes).filter(|rule| rule.from == Some(prefix)).collect();
        assert_eq!(arriving.len(), 1);
        assert_eq!(arriving[0].destination_port, Some(PortRange::new(50_000, 50_999)));
        assert_eq!(arriving[0].interface.as_deref(), Some("eth0"));
        let quoted = changes.iter().find_map(|change| match change {
            Change::Divert(divert) => Some(&divert.icmp[0].destination_prefixes),
            _ => None,
        });
        assert_eq!(quoted.unwrap(), &[prefix]);
    }

    #[test]
    fn traffic_enters_the_device_only_when_it_can_leave_it() {
        let changes = changes(&config(""), &paths(), &Facts::default());
        let into = changes
            .iter()
            .position(|change| matches!(change, Change::Rule(rule) if rule.protocol.is_some()))
            .unwrap();
        let later = &changes[into..];
        assert!(
            later.iter().all(|change| matches!(change, Change::Rule(rule) if rule.protocol.is_some())),
            "{later:?}"
        );
    }

    #[test]
    fn the_device_takes_no_packet_too_big_for_the_interfaces_behind_it() {
        let facts = Facts { mtu: 1500, ..Facts::default() };
        let links: Vec<u32> = changes(&config(""), &paths(), &facts)
            .iter()
            .filter_map(|change| match change {
                Change::Link(link) => link.mtu,
                _ => None,
            })
            .collect();
        assert_eq!(links, [1500, 1400]);
    }

    #[test]
    fn the_guards_numbers_are_not_swept_with_the_shims() {
        let main = HostOptions::defaults(shunt_host::Role::Client);
        let guard = guard_options(&main);
        assert!(!main.preferences().contains(&guard.preference) && !main.tables().contains(&guard.table));
        assert!(!guard.preferences().contains(&main.preference) && !guard.tables().contains(&main.table));
    }

    #[test]
    fn a_vip_without_a_route_changes_nothing() {
        let changes = changes(&config(""), &Paths::default(), &Facts { nft: true, ..Facts::default() });
        assert_eq!(rules(&changes).count(), 0);
    }
    #[test]
    fn c11_what_the_kernel_has_swapped_goes_past_the_device_and_errors_of_routers_do_not() {
        let facts = Facts { nft: true, offload: true, ..Facts::default() };
        let config = config("");
        let changes = changes(&config, &paths(), &facts);
        let marked: Vec<&Rule> = rules(&changes).filter(|rule| rule.mark.is_some()).collect();
        let to_device = marked.iter().find(|rule| rule.from.is_none() && rule.to.is_none()).unwrap();
        for vip in config.vips() {
            let out = marked.iter().find(|rule| rule.to == Some(Prefix::host(vip))).unwrap();
            assert_eq!((out.interface.as_deref(), out.table), (Some("lo"), config.host.table + table::OUT));
            let back = marked.iter().find(|rule| rule.from == Some(Prefix::host(vip))).unwrap();
            assert_eq!((back.protocol, back.table), (Some(6), LOCAL));
            assert!(out.preference < to_device.preference && back.preference < to_device.preference);
        }
        assert!(matches!(changes.last(), Some(Change::SwapTable(_))));
    }

    #[test]
    fn c12_without_its_device_what_is_swapped_finds_a_way_and_the_rest_none() {
        let in_absence = |extra: &str, offload| {
            let facts = Facts { nft: true, offload, ..Facts::default() };
            let config = config(extra);
            let changes = changes(&config, &paths(), &facts);
            let fallback =
                |change: &&Change| matches!(change, Change::Route(route) if route.metric.is_some());
            let held = changes.iter().find_map(|change| match change {
                Change::Divert(divert) => Some(divert.held.len()),
                _ => None,
            });
            (changes.iter().filter(fallback).count(), held.unwrap())
        };
        assert_eq!(in_absence("", true), (2, 2));
        assert_eq!(in_absence("", false), (0, 0));
    }
}
