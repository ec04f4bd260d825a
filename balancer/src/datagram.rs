//! Deciding about UDP (§6) and about protocols without ports (O12).

use std::net::SocketAddr;

use shunt_stack::wire::Packet;

use crate::Balancer;
use crate::config::{Portless, Transport};
use crate::maglev::{at_level, hash_portless};
use crate::route::{Decision, DropReason};
use crate::select::Request;
use crate::table::{ServerId, Vip};

/// Bytes of a UDP header.
const UDP_HEADER: usize = 8;

impl Balancer {
    /// §6: a service port's owner, or selection.
    pub(crate) fn datagram(&self, vip: &Vip, packet: &Packet) -> Result<(ServerId, Decision), DropReason> {
        let protocol = DropReason::Protocol(packet.protocol().number());
        let (source, port) = packet.ports().filter(|_| vip.has_udp()).ok_or(protocol)?;
        if let Some(owner) = vip.owner(Transport::Udp, port) {
            return Ok((owner, Decision::Owner));
        }
        let set = self.table.set(vip, Transport::Udp, port).ok_or(DropReason::UnknownPort(port))?;
        let request = Request {
            client: SocketAddr::new(packet.source(), source),
            service: SocketAddr::new(vip.address, port),
            isn: None,
            dscp: packet.dscp(),
            payload: packet.bytes().get(packet.transport_offset() + UDP_HEADER..).unwrap_or_default(),
        };
        let server = set.datagram(&request).ok_or(DropReason::NoServer(port))?;
        Ok((server, Decision::Datagram))
    }

    /// O12: by the protocol's number; later fragments need no memory here.
    pub(crate) fn portless(
        &self,
        vip: &Vip,
        packet: &Packet,
        number: u8,
    ) -> Result<(ServerId, Decision), DropReason> {
        let unknown = match packet.fragment() {
            Some(fragment) if fragment.offset != 0 => DropReason::LaterFragment(fragment.identification),
            _ => DropReason::Protocol(number),
        };
        let to = self.table.protocols.get(&number).copied().unwrap_or_default();
        self.without_ports(vip, packet, to, 0, unknown)
    }

    /// Carries out what the configuration says of packets without ports; `unknown` is the reason for the default server.
    pub(crate) fn without_ports(
        &self,
        vip: &Vip,
        packet: &Packet,
        to: Portless,
        identifier: u16,
        unknown: DropReason,
    ) -> Result<(ServerId, Decision), DropReason> {
        let protocol = packet.protocol().number();
        let level = self.table.level;
        match to {
            Portless::Drop => Err(DropReason::Refused(protocol)),
            Portless::Server(index) => Ok((ServerId::new(index), Decision::Named)),
            Portless::Balance => {
                let maglev = vip.portless.as_ref().ok_or(DropReason::NoPortlessServer(protocol))?;
                let hash = hash_portless(packet.source(), vip.address, protocol, identifier);
                Ok((maglev.lookup(at_level(hash, level)), Decision::Balanced))
            }
            Portless::DefaultServer | Portless::Answer => Err(unknown),
        }
    }
}
