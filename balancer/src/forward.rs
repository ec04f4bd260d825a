//! Carrying out what was decided: addresses in `network` mode, an outer header in `gue` mode, the way out in `direct` and
//! `datalink` mode.
//!
//! Checksums follow incrementally: right ones stay right, wrong ones wrong.

use std::net::SocketAddr;

use shunt_stack::wire::{Packet, too_big};

use crate::Balancer;
use crate::config::ForwardMode;
use crate::icmp::echo_reply;
use crate::route::{DropReason, Route};
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
    pub fn forward(&self, route: Route, packet: &mut Packet) -> Result<Output, DropReason> {
        match route {
            Route::ToServer { server, .. } if self.table.forward.uses_devices() => {
                return Ok(Output::Server(server));
            }
            Route::ToServer { server, .. } if self.table.forward == ForwardMode::Gue => {
                return self.tunnel(server, packet);
            }
            Route::ToServer { server, decision } => {
                let vip = packet.destination();
                let address = self.table.address(server, vip).ok_or(DropReason::Family(server))?;
                if decision.quotes_vip() {
                    let quoted = packet.icmp().and_then(|icmp| icmp.quoted());
                    if let Some(quoted) = quoted {
                        packet.set_quoted_source(SocketAddr::new(address, quoted.source_port));
                    }
                }
                packet.set_destination(address);
            }
            Route::ToClient { vip, server } => {
                if vip.is_ipv4() != packet.source().is_ipv4() {
                    return Err(DropReason::Family(server));
                }
                self.confirm(packet);
                packet.set_source(vip);
            }
            Route::ErrorToClient { vip, server } => {
                let Some(quoted) = packet.icmp().and_then(|icmp| icmp.quoted()) else {
                    return Ok(Output::Main);
                };
                if vip.is_ipv4() != packet.source().is_ipv4() {
                    return Err(DropReason::Family(server));
                }
                packet.set_quoted_destination(SocketAddr::new(vip, quoted.destination_port));
                // A router's error keeps the router's address, the server's own must not show the server.
                if packet.source() == quoted.destination {
                    packet.set_source(vip);
                }
            }
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
}
