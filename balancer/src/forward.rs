//! Carrying out what was decided: addresses in `network` mode, an outer header in `gue` mode, the way out in `direct` and
//! `datalink` mode.
//!
//! Checksums follow incrementally: right ones stay right, wrong ones wrong.

use std::net::{IpAddr, SocketAddr};

use shunt_stack::wire::{Packet, too_big};

use crate::Balancer;
use crate::config::ForwardMode;
use crate::icmp::echo_reply;
use crate::route::{Decision, DropReason, Route};
use crate::table::ServerId;

/// Where a packet leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Back into the device it came from: the host routes it on.
    Main,
    /// Out of a server's own device (`direct` and `datalink` mode).
    Server(ServerId),
}

impl Balancer {
    /// Whether there is a way to where a packet is to go.
    pub(crate) fn reaches(&self, route: Route) -> Result<(), DropReason> {
        match route {
            Route::ToServer { server, .. } if self.table.is_unreachable(server) => {
                Err(DropReason::NoConnector(server))
            }
            _ => Ok(()),
        }
    }

    /// Rewrites a packet as its route asks, and says where it leaves. Nothing is rewritten in
    /// `direct` mode, and in `datalink` mode the kernel puts the MAC of the server's address on it.
    ///
    /// # Errors
    /// [`DropReason::Family`], or that it does not go into a tunnel; the packet is unchanged.
    #[inline]
    pub fn forward(&self, route: Route, packet: &mut Packet) -> Result<Output, DropReason> {
        match route {
            Route::ToServer { server, decision }
                if self.table.forward == ForwardMode::Network && !decision.quotes_vip() =>
            {
                self.to_address(server, packet)
            }
            _ => self.forward_otherwise(&route, packet),
        }
    }

    /// All but packets that get a server's address and nothing else.
    #[inline(never)]
    fn forward_otherwise(&self, route: &Route, packet: &mut Packet) -> Result<Output, DropReason> {
        match *route {
            Route::ToServer { server, decision } => return self.to_server(server, decision, packet),
            Route::ToClient { vip, server } => return self.to_client(vip, server, packet),
            Route::ErrorToClient { vip, server } => error_to_client(vip, server, packet)?,
            Route::Answer => {
                if let Some(reply) = echo_reply(packet) {
                    *packet = reply;
                }
            }
            Route::Redirect { port, .. } => {
                *packet = self.redirecting(packet, port).ok_or(DropReason::Unanswerable)?;
            }
            Route::TooBig { mtu } => *packet = too_big(packet, mtu).ok_or(DropReason::TooBig(mtu))?,
            Route::Unchanged => {}
        }
        Ok(Output::Main)
    }

    fn to_client(&self, vip: IpAddr, server: ServerId, packet: &mut Packet) -> Result<Output, DropReason> {
        if vip.is_ipv4() != packet.source().is_ipv4() {
            return Err(DropReason::Family(server));
        }
        self.confirm(packet);
        packet.set_source(vip);
        Ok(Output::Main)
    }

    fn to_server(
        &self,
        server: ServerId,
        decision: Decision,
        packet: &mut Packet,
    ) -> Result<Output, DropReason> {
        match self.table.forward {
            ForwardMode::Network => {}
            ForwardMode::Direct | ForwardMode::Datalink => return Ok(Output::Server(server)),
            ForwardMode::Gue => return self.tunnel(server, packet),
        }
        // I1: to the server, its own address is in what the error quotes.
        let quoted = packet.icmp().filter(|_| decision.quotes_vip()).and_then(|icmp| icmp.quoted());
        let address = self.table.address(server, packet.destination());
        if let (Some(quoted), Some(address)) = (quoted, address) {
            packet.set_quoted_source(SocketAddr::new(address, quoted.source_port));
        }
        self.to_address(server, packet)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "it is in the way of nearly every packet")]
    fn to_address(&self, server: ServerId, packet: &mut Packet) -> Result<Output, DropReason> {
        match self.table.targets.get(server.index()) {
            Some(target) if packet.set_destination_host(&target.addresses) => Ok(Output::Main),
            _ => Err(DropReason::Family(server)),
        }
    }
}

/// `I5`: to the client, the VIP is in what the error quotes.
fn error_to_client(vip: IpAddr, server: ServerId, packet: &mut Packet) -> Result<(), DropReason> {
    let Some(quoted) = packet.icmp().and_then(|icmp| icmp.quoted()) else { return Ok(()) };
    if vip.is_ipv4() != packet.source().is_ipv4() {
        return Err(DropReason::Family(server));
    }
    packet.set_quoted_destination(SocketAddr::new(vip, quoted.destination_port));
    // A router's error keeps the router's address, the server's own must not show the server.
    if packet.source() == quoted.destination {
        packet.set_source(vip);
    }
    Ok(())
}
