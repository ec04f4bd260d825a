//! Service ports of a server: one, or for what is itself a balancer (a tree) those of all servers below it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shunt_host::{Family, PortRange, Transport};
use toml::Spanned;

use super::check::{Checker, Result};
use super::file::{File, ServerTable};
use super::{Server, Service};

/// A service's ports at a server, as written: a number, a range as `"41010-41019"`, or a list of these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ports(pub(crate) Vec<PortRange>);

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(PortsVisitor)
    }
}

struct PortsVisitor;

impl<'de> Visitor<'de> for PortsVisitor {
    type Value = Ports;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port, a range of ports as \"41010-41019\", or a list of these")
    }

    fn visit_u64<E: de::Error>(self, port: u64) -> std::result::Result<Ports, E> {
        let unexpected = || E::invalid_value(de::Unexpected::Unsigned(port), &self);
        Ok(Ports(vec![u16::try_from(port).map_err(|_| unexpected())?.into()]))
    }

    fn visit_i64<E: de::Error>(self, port: i64) -> std::result::Result<Ports, E> {
        let unexpected = || E::invalid_value(de::Unexpected::Signed(port), &self);
        Ok(Ports(vec![u16::try_from(port).map_err(|_| unexpected())?.into()]))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Ports, E> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
            (Ok(first), Ok(last)) if first <= last => Ok(Ports(vec![PortRange::new(first, last)])),
            _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Ports, A::Error> {
        let mut all = Vec::new();
        while let Some(Ports(ranges)) = seq.next_element()? {
            all.extend(ranges);
        }
        Ok(Ports(all))
    }
}

/// As it is written: a lone port as a number.
impl Serialize for Ports {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self.0[..] {
            [range] if range.first() == range.last() => serializer.serialize_u16(range.first()),
            [range] => serializer.collect_str(&range),
            _ => serializer.collect_seq(self.0.iter().map(|range| Ports(vec![*range]))),
        }
    }
}

impl Server {
    /// Its ports of a service.
    pub(crate) fn ports_of(&self, service: usize) -> impl Iterator<Item = PortRange> {
        self.ports.iter().filter(move |(of, _)| *of == service).map(|(_, range)| *range)
    }

    /// Its port of a service; `None` if it has several, because others are behind it.
    pub(crate) fn port(&self, service: usize) -> Option<u16> {
        let mut ranges = self.ports_of(service);
        let range = ranges.next().filter(|range| range.first() == range.last())?;
        ranges.next().is_none().then_some(range.first())
    }
}

/// Who owns the ports of a VIP, by the first port: the last one, and the server.
type Owners<'a> = BTreeMap<u16, (u16, &'a str)>;

impl Checker<'_> {
    pub(super) fn ports(&self, table: &ServerTable, services: &[Service]) -> Result<Vec<(usize, PortRange)>> {
        let mut ports = Vec::with_capacity(table.ports.len());
        for (name, written) in &table.ports {
            let Some(service) = services.iter().position(|service| service.name == *name.get_ref()) else {
                return self.fail(name.span(), format!("there is no service named {:?}", name.get_ref()));
            };
            let Ports(ranges) = written.get_ref();
            if ranges.is_empty() {
                return self.fail(written.span(), "a service port is missing");
            }
            if ranges.iter().any(|range| range.first() == 0) {
                return self.fail(written.span(), "port 0 cannot be used");
            }
            let alone = matches!(ranges[..], [range] if range.first() == range.last());
            if services[service].is_answered_here() && !alone {
                let message = "whose ports those are only the balancer below knows: with `answer = \"balancer\"` a server \
                               has one port of a service";
                return self.fail(written.span(), message);
            }
            ports.extend(ranges.iter().map(|range| (service, *range)));
        }
        Ok(ports)
    }

    /// Y belongs to one server and stands for one redirect port, on every VIP.
    pub(super) fn service_ports_are_unique(
        &self,
        file: &File,
        services: &[Service],
        servers: &[Server],
    ) -> Result<()> {
        let mut owners: HashMap<(IpAddr, Transport), Owners<'_>> = HashMap::new();
        for (table, server) in file.server.iter().zip(servers) {
            // One for each range, in the order of the ranges.
            let spans =
                table.ports.values().flat_map(|written| written.get_ref().0.iter().map(|_| written.span()));
            for ((service, range), span) in server.ports.iter().zip(spans) {
                let service = &services[*service];
                let all =
                    service.vips.iter().flat_map(|vip| service.protocols.iter().map(move |of| (*vip, *of)));
                for (vip, protocol) in all.filter(|(vip, _)| server.serves(Family::of(*vip))) {
                    let owners = owners.entry((vip, protocol)).or_default();
                    let before = owners.range(..=range.last()).next_back();
                    if let Some((first, (last, owner))) = before
                        && *last >= range.first()
                    {
                        let port = range.first().max(*first);
                        let message = if *owner == server.name {
                            format!(
                                "service port {port} of {vip} stands for another service of this server already"
                            )
                        } else {
                            format!("service port {port} of {vip} is the server {owner:?}'s already")
                        };
                        return self.fail(span, message);
                    }
                    owners.insert(range.first(), (range.last(), server.name.as_str()));
                }
            }
        }
        Ok(())
    }
}

/// Where a server's port stands in the file.
pub(super) fn span_of(table: &ServerTable, port: u16) -> Option<std::ops::Range<usize>> {
    let owned = |written: &&Spanned<Ports>| written.get_ref().0.iter().any(|range| range.contains(port));
    table.ports.values().find(owned).map(Spanned::span)
}
