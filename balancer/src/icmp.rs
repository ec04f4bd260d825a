//! Deciding about ICMP: errors follow what they quote (`I1`, `I5`), the rest goes as configured (`I4`).

use std::net::SocketAddr;

use shunt_host::{Family, Transport};
use shunt_stack::redirect::can_answer;
use shunt_stack::wire::{IcmpView, Packet, Protocol, Quoted, Version, icmp_message};

use crate::Balancer;
use crate::config::Portless;
use crate::route::{Decision, DropReason, Route};
use crate::select::Request;
use crate::table::{ServerId, Vip};

impl Balancer {
    /// `I1`, `I4`.
    pub(crate) fn icmp(&self, vip: &Vip, packet: &Packet, icmp: IcmpView<'_>) -> Result<Route, DropReason> {
        if !icmp.is_error() {
            return self.message(vip, packet, icmp);
        }
        let (server, decision) = self.error(vip, icmp)?;
        Ok(Route::ToServer { server, decision })
    }

    /// `I1`: an error goes where the packets that answer the quoted one go.
    fn error(&self, vip: &Vip, icmp: IcmpView<'_>) -> Result<(ServerId, Decision), DropReason> {
        let reason = DropReason::IcmpQuote { message_type: icmp.message_type(), code: icmp.code() };
        let quoted = icmp.quoted().filter(|quoted| quoted.source == vip.address).ok_or(reason)?;
        let transport = transport(&quoted).ok_or(reason)?;
        let port = quoted.source_port;
        if let Some(owner) = vip.owner(transport, port) {
            return Ok((owner, Decision::ErrorOwner));
        }
        let set = self.table.set(vip, transport, port).ok_or(DropReason::UnknownPort(port))?;
        let client = SocketAddr::new(quoted.destination, quoted.destination_port);
        match transport {
            Transport::Tcp => {
                let (server, hashed) = self.legacy(vip, set, client, port)?;
                Ok((server, if hashed { Decision::ErrorHash } else { Decision::ErrorLegacyServer }))
            }
            // Chosen one by one, nobody knows whose answer it was.
            Transport::Udp => {
                let service = SocketAddr::new(vip.address, port);
                let request = Request { client, service, isn: None, dscp: 0, payload: &[] };
                set.flow(&request).map(|server| (server, Decision::ErrorHash)).ok_or(reason)
            }
        }
    }

    /// `I4`.
    fn message(&self, vip: &Vip, packet: &Packet, icmp: IcmpView<'_>) -> Result<Route, DropReason> {
        let (message_type, code) = (icmp.message_type(), icmp.code());
        let family = Family::of(vip.address);
        let to = self.table.icmp.of(family, message_type);
        if to == Portless::Answer {
            let whole = packet.fragment().is_none() && packet.checksum_ok();
            let from_a_host = can_answer(packet.source()) && self.table.vip(packet.source()).is_none();
            return if whole && from_a_host { Ok(Route::Answer) } else { Err(DropReason::Unanswerable) };
        }
        let unknown = DropReason::Icmp { message_type, code };
        let (server, decision) = self.without_ports(vip, packet, to, icmp.identifier(), unknown)?;
        Ok(Route::ToServer { server, decision })
    }

    /// `I5`: an error about a client's packet that was on its way to a server.
    pub(crate) fn error_back(&self, packet: &Packet, icmp: IcmpView<'_>) -> Option<Route> {
        let quoted = icmp.quoted()?;
        // The client sent it and is told of it.
        if quoted.source != packet.destination() {
            return None;
        }
        let back = self.table.back(quoted.destination, quoted.protocol.number(), quoted.destination_port)?;
        Some(Route::ErrorToClient { vip: back.vip, server: back.server })
    }
}

fn transport(quoted: &Quoted) -> Option<Transport> {
    match quoted.protocol {
        Protocol::Tcp => Some(Transport::Tcp),
        Protocol::Udp => Some(Transport::Udp),
        _ => None,
    }
}

/// Whether a message answers one without ports: an echo reply, or in IPv4 a timestamp reply.
pub(crate) fn is_answer(icmp: IcmpView<'_>) -> bool {
    match icmp.version() {
        Version::V4 => matches!(icmp.message_type(), 0 | 14),
        Version::V6 => icmp.message_type() == 129,
    }
}

/// The reply to an echo request (RFC 792, RFC 4443 §4.2); `None` if it is none.
pub(crate) fn echo_reply(request: &Packet) -> Option<Packet> {
    let message = &request.bytes()[request.transport_offset()..];
    let reply = match message.first()? {
        8 if request.source().is_ipv4() => 0,
        128 if request.source().is_ipv6() => 129,
        _ => return None,
    };
    let mut message = message.to_vec();
    message[0] = reply;
    Some(icmp_message(request.destination(), request.source(), &message))
}
