//! What the agent changes on its host, as values. Decides; [`shunt_host::Host`] does.
//!
//! Marked packets are routed into the TUN device; what the agent writes back is taken in or routed out as if it had
//! come by the network: the sender's address is then the host's own, hence `accept_local`. Nothing from the device is
//! marked or diverted again. Early demultiplexing must be off: it attaches sockets to packets on arrival, and
//! forwarding drops such packets. A host whose firewall drops what it forwards must let pass what goes to and comes
//! from the device.

use std::net::IpAddr;

use shunt_host::change::{LOCAL, Link, Route, Rule, Sysctl};
use shunt_host::divert::OPTION_KIND;
use shunt_host::query;
use shunt_host::{
    Change, Divert, Family, FlagMatch, HostError, PortRange, Prefix, QuotedMatch, SegmentMatch, TcpConnection,
};

use crate::config::{Config, DivertMode};

/// The least MTU of IPv6 (RFC 8200 §5), and of the device.
const LEAST_MTU: u32 = 1280;

/// Our rules, from [`shunt_host::HostOptions::preference`] on.
mod preference {
    pub(super) const FROM_DEVICE: u32 = 0;
    pub(super) const MARKED: u32 = 1;
    pub(super) const ARRIVING: u32 = 2;
    pub(super) const OWN: u32 = 3;
}

/// What the set-up depends on beside the configuration; asked before anything is changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Whether packets can be marked.
    pub(crate) nft: bool,
    /// The interface's MTU in bytes.
    pub(crate) mtu: u32,
    /// Interfaces that take router advertisements, which they would not do any more once IPv6 is forwarded.
    pub(crate) accept_ra: Vec<String>,
}

impl Facts {
    /// Asks the kernel.
    pub(crate) async fn gather(config: &Config) -> Result<Self, HostError> {
        let mtu = query::link_mtu(&config.interface).await?;
        Ok(Self {
            nft: shunt_host::nft_available().await,
            mtu,
            accept_ra: shunt_host::query::accepting_advertisements(),
        })
    }

    /// The device's MTU: it must take whatever the interface does.
    pub(crate) fn device_mtu(&self) -> u32 {
        self.mtu.clamp(LEAST_MTU, 65_535)
    }
}

/// All changes, in the order they must be made: nothing enters the device before it can leave it. Every segment of
/// `connections` passes the agent, too.
pub(crate) fn changes(config: &Config, facts: &Facts, connections: &[TcpConnection]) -> Vec<Change> {
    let setup = Setup { config, facts, connections };
    let mut changes: Vec<Change> = vec![Link::tun(&config.host.device, facts.device_mtu()).into()];
    changes.push(Change::ReservePorts(setup.service_ports()));
    for family in setup.families() {
        setup.sysctls(family, &mut changes);
    }
    changes.push(Change::LocalLast);
    let device = config.host.device.as_str();
    for family in setup.families() {
        changes.push(Route::device(config.host.table, Prefix::all(family), device).into());
        let leaving = Rule::new(family, config.host.preference + preference::FROM_DEVICE, LOCAL);
        changes.push(leaving.interface(device).into());
    }
    if facts.nft {
        for family in setup.families() {
            let marked = setup.rule_into_device(family, preference::MARKED);
            changes.push(marked.mark(config.host.mark, config.host.mark_mask).into());
        }
        changes.push(setup.nft().into());
    }
    if setup.all() {
        setup.divert_all(&mut changes);
    }
    changes
}

struct Setup<'a> {
    config: &'a Config,
    facts: &'a Facts,
    connections: &'a [TcpConnection],
}

impl Setup<'_> {
    /// Whether everything is diverted, wanted or not.
    fn all(&self) -> bool {
        self.config.divert == DivertMode::All || !self.facts.nft
    }

    fn families(&self) -> impl Iterator<Item = Family> {
        let has = |family| self.config.addresses.iter().any(|address| Family::of(*address) == family);
        Family::BOTH.into_iter().filter(move |family| has(*family))
    }

    fn service_ports(&self) -> Vec<PortRange> {
        self.config.services.iter().map(|service| PortRange::from(service.service_port)).collect()
    }

    fn all_ports(&self) -> Vec<PortRange> {
        let redirect = self.config.services.iter().map(|service| PortRange::from(service.redirect_port));
        redirect.chain(self.service_ports()).collect()
    }

    fn prefixes(&self) -> Vec<Prefix> {
        self.config.addresses.iter().copied().map(Prefix::host).collect()
    }

    fn sysctls(&self, family: Family, changes: &mut Vec<Change>) {
        let (device, interface) = (self.config.host.device.as_str(), self.config.interface.as_str());
        let mut set = |sysctl: Sysctl| changes.push(sysctl.into());
        // The key is for both families.
        set(Sysctl::new("net/ipv4/tcp_early_demux", 0));
        match family {
            Family::V4 => {
                set(Sysctl::interface(family, "all", "rp_filter", 0));
                set(Sysctl::interface(family, device, "rp_filter", 0));
                set(Sysctl::interface(family, device, "accept_local", 1));
                set(Sysctl::interface(family, device, "forwarding", 1));
                set(Sysctl::interface(family, interface, "forwarding", 1));
                if self.all() {
                    // The way back leads into the device.
                    set(Sysctl::interface(family, interface, "rp_filter", 0));
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

    fn rule_into_device(&self, family: Family, preference: u32) -> Rule {
        Rule::new(family, self.config.host.preference + preference, self.config.host.table)
    }

    /// One rule for each address and port: policy rules know no lists.
    fn divert_all(&self, changes: &mut Vec<Change>) {
        for address in &self.config.addresses {
            let rule = |preference| self.rule_into_device(Family::of(*address), preference);
            for ports in self.all_ports() {
                let arriving = rule(preference::ARRIVING).interface(&self.config.interface).to(*address);
                changes.push(arriving.destination_port(ports).into());
            }
            for ports in self.service_ports() {
                changes.push(rule(preference::OWN).interface("lo").from(*address).source_port(ports).into());
            }
        }
    }

    fn nft(&self) -> Divert {
        let mut divert = Divert {
            mark: self.config.host.mark,
            mask: self.config.host.mark_mask,
            except_interface: Some(self.config.host.device.clone()),
            ..Divert::default()
        };
        let interface = Some(self.config.interface.clone());
        if !self.all() {
            divert.incoming.push(SegmentMatch {
                interface: interface.clone(),
                destination: self.prefixes(),
                destination_ports: self.all_ports(),
                option: Some(OPTION_KIND),
                flags: Some(FlagMatch::SYN),
                ..SegmentMatch::default()
            });
            if self.config.tokens.may_demand() {
                // Those without the option have no token either (PROTOCOL.md §10).
                divert.incoming.push(SegmentMatch {
                    interface: interface.clone(),
                    destination: self.prefixes(),
                    destination_ports: self.service_ports(),
                    flags: Some(FlagMatch::SYN),
                    ..SegmentMatch::default()
                });
            }
            divert.outgoing.push(SegmentMatch {
                source: self.prefixes(),
                source_ports: self.service_ports(),
                flags: Some(FlagMatch::SYN_ACK),
                ..SegmentMatch::default()
            });
            divert.connections = self.connections.to_vec();
        }
        // A router's error does not say by its own addresses whose it is (I2).
        let source: Vec<IpAddr> = self.config.addresses.clone();
        divert.icmp.push(QuotedMatch { interface, source, ..QuotedMatch::default() });
        if self.config.notrack {
            self.untrack(&mut divert);
        }
        divert
    }

    /// Both directions of the ports, on each of the ways: arriving, into and out of the device, and sent.
    fn untrack(&self, divert: &mut Divert) {
        let to_us = |interface: &str| SegmentMatch {
            interface: Some(interface.to_owned()),
            destination: self.prefixes(),
            destination_ports: self.all_ports(),
            ..SegmentMatch::default()
        };
        let from_us = |interface: Option<&str>| SegmentMatch {
            interface: interface.map(str::to_owned),
            source: self.prefixes(),
            source_ports: self.all_ports(),
            ..SegmentMatch::default()
        };
        let device = self.config.host.device.as_str();
        divert.untracked_incoming = vec![to_us(&self.config.interface), to_us(device), from_us(Some(device))];
        divert.untracked_outgoing = vec![from_us(None)];
    }
}

#[cfg(test)]
mod tests {
    use shunt_host::Source;

    use super::*;

    fn config(extra: &str) -> Config {
        let text = format!(
            "role = \"server\"\ninterface = \"eth0\"\naddresses = [\"203.0.113.10\", \"2001:db8::10\"]\n{extra}\n\
             [[service]]\nname = \"web\"\nredirect_port = 443\nservice_port = 41001\n"
        );
        Config::from_source(&Source::new("server.toml", text)).unwrap()
    }

    fn facts(nft: bool) -> Facts {
        Facts { nft, mtu: 1500, accept_ra: vec!["eth0".to_owned()] }
    }

    fn rules(changes: &[Change]) -> impl Iterator<Item = &Rule> {
        changes.iter().filter_map(|change| match change {
            Change::Rule(rule) => Some(rule),
            _ => None,
        })
    }

    fn diverts(changes: &[Change]) -> Option<&Divert> {
        changes.iter().find_map(|change| match change {
            Change::Divert(divert) => Some(divert),
            _ => None,
        })
    }

    #[test]
    fn only_handshakes_are_marked() {
        let changes = changes(&config(""), &facts(true), &[]);
        let divert = diverts(&changes).unwrap();
        assert_eq!((divert.incoming.len(), divert.outgoing.len()), (1, 1));
        assert_eq!(divert.incoming[0].flags, Some(FlagMatch::SYN));
        assert_eq!(divert.incoming[0].option, Some(OPTION_KIND));
        assert_eq!(divert.outgoing[0].flags, Some(FlagMatch::SYN_ACK));
        assert_eq!(divert.outgoing[0].source_ports, [PortRange::from(41001)]);
        assert!(
            rules(&changes)
                .all(|rule| rule.mark.is_some() || rule.interface.as_deref() == Some("shunt-srv0"))
        );
    }

    #[test]
    fn connections_that_move_are_marked_whatever_they_carry_unless_all_are_diverted_anyway() {
        let moving = TcpConnection {
            local: "203.0.113.10:41001".parse().unwrap(),
            remote: "192.0.2.1:50000".parse().unwrap(),
        };
        let with = changes(&config(""), &facts(true), &[moving]);
        assert_eq!(diverts(&with).unwrap().connections, [moving]);
        let all = "divert = \"all\"";
        let without = changes(&config(all), &facts(true), &[]);
        assert_eq!(changes(&config(all), &facts(true), &[moving]), without);
    }

    #[test]
    fn where_tokens_are_demanded_all_syns_to_service_ports_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys");
        std::fs::write(&keys, "0 000102030405060708090a0b0c0d0e0f").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&keys, mode).unwrap();
        let table = |require: &str| {
            let table = format!("[token]\nkeys = \"{}\"\nrequire = \"{require}\"", keys.display());
            diverts(&changes(&config(&table), &facts(true), &[])).unwrap().incoming.clone()
        };
        assert_eq!(table("never").len(), 1);
        for require in ["always", "under-load"] {
            let incoming = table(require);
            assert_eq!(incoming.len(), 2);
            assert_eq!((incoming[1].option, incoming[1].flags), (None, Some(FlagMatch::SYN)));
            assert_eq!(incoming[1].destination_ports, [PortRange::from(41001)], "plain clients' pass by");
        }
    }

    #[test]
    fn without_nftables_the_set_up_is_that_of_divert_all() {
        let wanted = changes(&config("divert = \"all\""), &facts(false), &[]);
        assert_eq!(changes(&config(""), &facts(false), &[]), wanted);
        assert_eq!(diverts(&wanted), None);
        let arriving = rules(&wanted).filter(|rule| rule.interface.as_deref() == Some("eth0"));
        assert_eq!(arriving.count(), 4);
        let own: Vec<&Rule> = rules(&wanted).filter(|rule| rule.interface.as_deref() == Some("lo")).collect();
        assert!(own.iter().all(|rule| rule.source_port == Some(PortRange::from(41001))));
        assert_eq!(own.len(), 2);
    }

    #[test]
    fn only_tcp_is_diverted_by_rules_or_neighbour_discovery_breaks() {
        for nft in [true, false] {
            for rule in rules(&changes(&config(""), &facts(nft), &[])) {
                let leaves = rule.interface.as_deref() == Some("shunt-srv0");
                assert!(leaves || rule.protocol.is_some() || rule.mark.is_some(), "{rule:?}");
            }
        }
    }

    #[test]
    fn nothing_is_diverted_before_it_can_leave_the_device() {
        for nft in [true, false] {
            let changes = changes(&config(""), &facts(nft), &[]);
            let into = |change: &Change| match change {
                Change::Rule(rule) => rule.interface.as_deref() != Some("shunt-srv0"),
                Change::Divert(_) => true,
                _ => false,
            };
            let first = changes.iter().position(into).unwrap();
            assert!(changes[first..].iter().all(into));
        }
    }

    #[test]
    fn only_the_families_of_the_addresses_are_touched() {
        let text = "role = \"server\"\ninterface = \"eth0\"\naddresses = [\"203.0.113.10\"]\n\
                    [[service]]\nname = \"web\"\nredirect_port = 443\nservice_port = 41001\n";
        let config = Config::from_source(&Source::new("server.toml", text)).unwrap();
        let changes = changes(&config, &facts(true), &[]);
        assert!(rules(&changes).all(|rule| rule.family == Family::V4));
        assert!(
            !changes.iter().any(|change| matches!(change, Change::Sysctl(key) if key.key.contains("ipv6")))
        );
    }
}
