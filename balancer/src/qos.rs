//! Quality of service beside the choice of a server: limits decide whether a packet passes, marks what DSCP it leaves
//! with. Where it goes does not depend on either (`B6`).
//!
//! Both are by service, so packets without ports (ICMP, later fragments) are neither limited nor marked.

use std::net::IpAddr;
use std::sync::Arc;

use shunt_stack::time::Instant;
use shunt_stack::wire::Packet;

use crate::config::{Config, Transport};
use crate::limit::{Limit, Limiter, Load};
use crate::select::Classes;

/// What a port of a VIP stands for: index of the service + 1, 0 for nothing. A port may be both.
#[derive(Debug, Clone, Copy, Default)]
struct Port {
    owned: u16,
    shared: u16,
}

type Ports = Box<[Port]>;

/// The service of every port.
#[derive(Debug)]
pub(crate) struct ServicePorts {
    /// Sorted by address; UDP's ports only where a service is reached by it.
    vips: Box<[(IpAddr, Ports, Option<Ports>)]>,
    exid: u16,
}

/// A packet's service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ServicePort {
    /// Its index in the configuration.
    pub(crate) service: usize,
    /// Whether the port is its redirect port.
    pub(crate) shared: bool,
}

impl ServicePorts {
    pub(crate) fn new(config: &Config) -> ServicePorts {
        let has =
            |vip: &IpAddr, by: Transport| config.services.iter().any(|service| service.is_reached(*vip, by));
        let mut vips: Vec<(IpAddr, Ports, Option<Ports>)> = config
            .vips
            .iter()
            .map(|vip| {
                let udp = has(vip, Transport::Udp).then(|| ports(config, *vip, Transport::Udp));
                (*vip, ports(config, *vip, Transport::Tcp), udp)
            })
            .collect();
        vips.sort_by_key(|(address, ..)| *address);
        ServicePorts { vips: vips.into(), exid: config.host.exid }
    }

    /// The service that a packet to (`inbound`) or from a VIP belongs to.
    pub(crate) fn of(&self, packet: &Packet, vip: IpAddr, inbound: bool) -> Option<ServicePort> {
        let (source, destination) = packet.ports()?;
        let index = self.vips.binary_search_by_key(&vip, |(address, ..)| *address).ok()?;
        let (_, tcp, udp) = &self.vips[index];
        let ports = if packet.tcp().is_some() { tcp } else { udp.as_ref()? };
        let port = ports[usize::from(if inbound { destination } else { source })];
        let shared = match (port.owned, port.shared) {
            (0, _) => true,
            (_, 0) => false,
            // As the route goes: a SYN with R asks for the redirect port, all else is the owner's.
            _ => inbound && self.has_option(packet),
        };
        let service = usize::from(if shared { port.shared } else { port.owned }).checked_sub(1)?;
        Some(ServicePort { service, shared })
    }

    /// Whether it is a SYN with the redirect option.
    fn has_option(&self, packet: &Packet) -> bool {
        packet.tcp().is_some_and(|tcp| tcp.is_syn() && tcp.redirect(self.exid).is_ok_and(|o| o.is_some()))
    }

    /// Whether a packet from a client opens a connection: a SYN to a redirect port, or to a service port by a client
    /// that has not been redirected there.
    pub(crate) fn opens(&self, packet: &Packet, port: ServicePort) -> bool {
        packet.tcp().is_some_and(|tcp| tcp.is_syn()) && (port.shared || !self.has_option(packet))
    }
}

/// What the ports of a VIP stand for by a protocol.
fn ports(config: &Config, vip: IpAddr, by: Transport) -> Ports {
    let mut ports = vec![Port::default(); 1 << 16];
    let reached = config.services.iter().enumerate().filter(|(_, service)| service.is_reached(vip, by));
    for (index, service) in reached {
        ports[usize::from(service.redirect_port)].shared = index as u16 + 1;
        let owned = config.servers.iter().flat_map(|server| &server.ports);
        for port in owned.filter(|(of, _)| *of == index).flat_map(|(_, range)| range.ports()) {
            ports[usize::from(port)].owned = index as u16 + 1;
        }
    }
    ports.into()
}

/// Limits and marks of all services.
#[derive(Debug)]
pub(crate) struct Qos {
    ports: ServicePorts,
    classes: Classes,
    /// By class.
    class_marks: Box<[Option<u8>]>,
    services: Box<[ServiceQos]>,
}

#[derive(Debug)]
struct ServiceQos {
    name: String,
    mark: Option<u8>,
    limiter: Option<Arc<Limiter>>,
}

impl Qos {
    /// `None` if nothing is limited or marked. Buckets of services that keep name and limits are `before`'s.
    pub(crate) fn new(config: &Config, before: Option<&Qos>) -> Option<Qos> {
        let traffic = || config.services.iter().map(|service| &service.traffic);
        let marked = traffic().any(|traffic| traffic.mark_dscp.is_some())
            || config.classes.iter().any(|class| class.mark_dscp.is_some());
        if !marked && traffic().all(|traffic| traffic.limit.is_none()) {
            return None;
        }
        let kept = |name: &str| {
            before?.services.iter().find(|service| service.name == name)?.limiter.as_ref().map(Arc::clone)
        };
        let service = |service: &crate::config::Service| ServiceQos {
            name: service.name.clone(),
            mark: service.traffic.mark_dscp,
            limiter: service.traffic.limit.map(|limits| {
                let kept = kept(&service.name).filter(|limiter| limiter.limits() == limits);
                kept.unwrap_or_else(|| Arc::new(Limiter::new(limits)))
            }),
        };
        Some(Qos {
            ports: ServicePorts::new(config),
            classes: Classes::new(&config.classes),
            class_marks: config.classes.iter().map(|class| class.mark_dscp).collect(),
            services: config.services.iter().map(service).collect(),
        })
    }

    /// Whether a packet from a client passes.
    pub(crate) fn admit(&self, packet: &Packet, now: Instant) -> Result<(), Limit> {
        let Some(port) = self.ports.of(packet, packet.destination(), true) else { return Ok(()) };
        let Some(limiter) = &self.services[port.service].limiter else { return Ok(()) };
        let load = Load {
            opens: self.ports.opens(packet, port),
            packets: packet.segment_count() as u64,
            bytes: packet.segmented_len() as u64,
        };
        limiter.admit(now, load)
    }

    /// The DSCP that a packet from a client gets on its way to a server: its class's, else its service's.
    pub(crate) fn mark(&self, packet: &Packet) -> Option<u8> {
        let port = self.ports.of(packet, packet.destination(), true)?;
        let class = self.classes.of_dscp(packet.dscp());
        class.and_then(|class| self.class_marks[class]).or(self.services[port.service].mark)
    }
}
