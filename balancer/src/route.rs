//! Deciding where a packet goes (`B1`-`B6`, `I1`): a function of the packet and the table, nothing is remembered.
//!
//! (`round-robin` counts its turns; it decides about SYNs only, which `B6` leaves free.)

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;
use shunt_stack::wire::{IcmpView, Packet, ParseError, Protocol, TcpView};
use thiserror::Error;

use crate::Balancer;
use crate::config::{ForwardMode, Legacy};
use crate::maglev::hash_client;
use crate::select::Request;
use crate::table::{ServerId, Set, Vip};

/// Where a packet goes, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// From a client, or about a server's segment, to this server.
    ToServer {
        /// The server.
        server: ServerId,
        /// The rule.
        decision: Decision,
    },
    /// A server's answer, towards the client, with the VIP as its source (`B5`, `network` mode).
    ToClient {
        /// The VIP.
        vip: IpAddr,
        /// The server it comes from.
        server: ServerId,
    },
    /// An ICMP error about a client's segment on its way to a server, towards the client (`I5`, `network` mode).
    ErrorToClient {
        /// The VIP that the client sent to.
        vip: IpAddr,
        /// The server that the segment was for.
        server: ServerId,
    },
    /// Neither for a VIP nor an answer of one: passes as it is (`B5`).
    Unchanged,
}

/// The rule by which a server was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// `B1`: a SYN with R, by policy.
    Selected,
    /// `B2`: the owner of a service port.
    Owner,
    /// `B3`: a plain segment on a redirect port, by hash.
    LegacyHash,
    /// `B3`: a plain segment on a redirect port, to the legacy server.
    LegacyServer,
    /// `I1`: an ICMP error that quotes a segment from a service port.
    ErrorOwner,
    /// `I1`: an ICMP error that quotes a segment from a redirect port, by hash.
    ErrorHash,
    /// `I1`: the same, to the legacy server.
    ErrorLegacyServer,
    /// `B4`: to the default server; without one it would have been dropped for this reason.
    Default(DropReason),
}

impl Decision {
    /// Whether the packet is an ICMP error whose quote names the VIP.
    pub(crate) fn quotes_vip(self) -> bool {
        matches!(self, Decision::ErrorOwner | Decision::ErrorHash | Decision::ErrorLegacyServer)
    }
}

/// Why a packet goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum DropReason {
    /// `B4`: it cannot be parsed.
    #[error("unreadable: {0}")]
    Parse(ParseError),
    /// `B4`: the port is neither a service port nor a redirect port.
    #[error("port {0} stands for nothing")]
    UnknownPort(u16),
    /// `B4`: not TCP.
    #[error("protocol {0}")]
    Protocol(u8),
    /// `B4`: a fragment without ports.
    #[error("fragment {0} without ports")]
    LaterFragment(u32),
    /// `B4`: an ICMP message that is no error.
    #[error("ICMP type {message_type} code {code}")]
    Icmp {
        /// Its type.
        message_type: u8,
        /// Its code.
        code: u8,
    },
    /// `B4`: an ICMP error that quotes no TCP ports, or a packet that did not come from the VIP.
    #[error("ICMP type {message_type} code {code} about no segment of ours")]
    IcmpQuote {
        /// Its type.
        message_type: u8,
        /// Its code.
        code: u8,
    },
    /// `B7`: no server of the redirect port takes new connections.
    #[error("no server is up for redirect port {0}")]
    NoServer(u16),
    /// `B3`: `legacy = "drop"`.
    #[error("plain segment to redirect port {0}")]
    Legacy(u16),
    /// The chosen server has no address of the packet's family.
    #[error("server {0} has no address of this family")]
    Family(ServerId),
}

impl DropReason {
    /// Whether the default server gets it, if there is one (`B4`).
    fn falls_back(self) -> bool {
        !matches!(self, DropReason::Legacy(_) | DropReason::Family(_))
    }
}

/// The kind of a decision, for counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    Selected,
    Owner,
    LegacyHash,
    LegacyServer,
    ErrorOwner,
    ErrorHash,
    ErrorLegacyServer,
    DefaultServer,
    ToClient,
    ErrorToClient,
    Unchanged,
}

impl Route {
    pub(crate) fn way(self) -> Way {
        match self {
            Route::ToServer { decision, .. } => match decision {
                Decision::Selected => Way::Selected,
                Decision::Owner => Way::Owner,
                Decision::LegacyHash => Way::LegacyHash,
                Decision::LegacyServer => Way::LegacyServer,
                Decision::ErrorOwner => Way::ErrorOwner,
                Decision::ErrorHash => Way::ErrorHash,
                Decision::ErrorLegacyServer => Way::ErrorLegacyServer,
                Decision::Default(_) => Way::DefaultServer,
            },
            Route::ToClient { .. } => Way::ToClient,
            Route::ErrorToClient { .. } => Way::ErrorToClient,
            Route::Unchanged => Way::Unchanged,
        }
    }
}

impl Balancer {
    /// Decides where a packet goes; changes nothing and counts nothing.
    ///
    /// # Errors
    /// Why it is dropped.
    pub fn route(&self, packet: &Packet) -> Result<Route, DropReason> {
        let table = &self.table;
        let Some(vip) = table.vip(packet.destination()) else {
            return Ok(self.way_back(packet).unwrap_or(Route::Unchanged));
        };
        let (server, decision) = self.inbound(vip, packet).or_else(|reason| default_server(vip, reason))?;
        Ok(Route::ToServer { server, decision })
    }

    /// Decides about a packet whose headers above IP cannot be read (`B4`): `packet` was taken as opaque.
    ///
    /// # Errors
    /// `error`, if it is for a VIP without a default server.
    pub fn route_unreadable(&self, packet: &Packet, error: ParseError) -> Result<Route, DropReason> {
        let Some(vip) = self.table.vip(packet.destination()) else { return Ok(Route::Unchanged) };
        let (server, decision) = default_server(vip, DropReason::Parse(error))?;
        Ok(Route::ToServer { server, decision })
    }

    /// `B1` to `B3`, in order; an error falls to `B4`.
    fn inbound(&self, vip: &Vip, packet: &Packet) -> Result<(ServerId, Decision), DropReason> {
        if let Some(icmp) = packet.icmp() {
            return self.icmp(vip, icmp);
        }
        let Some(tcp) = packet.tcp() else {
            return Err(match packet.fragment() {
                Some(fragment) if fragment.offset != 0 => DropReason::LaterFragment(fragment.identification),
                _ => DropReason::Protocol(packet.protocol().number()),
            });
        };
        let port = tcp.destination_port();
        let set = self.table.set(vip, port);
        if let Some(set) = set
            && self.asks_for_redirect(tcp)
        {
            let select = set.select.as_ref().ok_or(DropReason::NoServer(port))?;
            let request = Request {
                client: SocketAddr::new(packet.source(), tcp.source_port()),
                service: SocketAddr::new(vip.address, port),
                isn: tcp.seq(),
            };
            return Ok((select.select(&request), Decision::Selected));
        }
        if let Some(owner) = vip.owner(port) {
            return Ok((owner, Decision::Owner));
        }
        let set = set.ok_or(DropReason::UnknownPort(port))?;
        let client = SocketAddr::new(packet.source(), tcp.source_port());
        let (server, hashed) = self.legacy(vip, set, client, port)?;
        Ok((server, if hashed { Decision::LegacyHash } else { Decision::LegacyServer }))
    }

    /// A SYN with a valid option and R (`B1`); with a malformed one it is plain (`W1`).
    fn asks_for_redirect(&self, tcp: TcpView<'_>) -> bool {
        tcp.is_syn() && tcp.redirect(self.table.exid).is_ok_and(|option| option.is_some_and(|o| o.redirect))
    }

    /// `B3`: the server of a plain client, and whether the hash chose it.
    fn legacy(
        &self,
        vip: &Vip,
        set: &Set,
        client: SocketAddr,
        port: u16,
    ) -> Result<(ServerId, bool), DropReason> {
        match self.table.legacy {
            Legacy::Hash => {
                let maglev = set.maglev.as_ref().ok_or(DropReason::NoServer(port))?;
                Ok((maglev.lookup(hash_client(client)), true))
            }
            Legacy::DefaultServer => {
                vip.legacy_server().map(|server| (server, false)).ok_or(DropReason::NoServer(port))
            }
            Legacy::Drop => Err(DropReason::Legacy(port)),
        }
    }

    /// `I1`: an error goes where the segments that answer the quoted one go.
    fn icmp(&self, vip: &Vip, icmp: IcmpView<'_>) -> Result<(ServerId, Decision), DropReason> {
        let (message_type, code) = (icmp.message_type(), icmp.code());
        if !icmp.is_error() {
            return Err(DropReason::Icmp { message_type, code });
        }
        let quoted = icmp
            .quoted()
            .filter(|quoted| quoted.source == vip.address && quoted.protocol == Protocol::Tcp)
            .ok_or(DropReason::IcmpQuote { message_type, code })?;
        let port = quoted.source_port;
        if let Some(owner) = vip.owner(port) {
            return Ok((owner, Decision::ErrorOwner));
        }
        let set = self.table.set(vip, port).ok_or(DropReason::UnknownPort(port))?;
        let client = SocketAddr::new(quoted.destination, quoted.destination_port);
        let (server, hashed) = self.legacy(vip, set, client, port)?;
        Ok((server, if hashed { Decision::ErrorHash } else { Decision::ErrorLegacyServer }))
    }

    /// `B5` and `I5` where addresses are rewritten: whose answer this is.
    fn way_back(&self, packet: &Packet) -> Option<Route> {
        if self.table.forward != ForwardMode::Network {
            return None;
        }
        if let Some(tcp) = packet.tcp() {
            let back = self.table.back(packet.source(), tcp.source_port())?;
            return Some(Route::ToClient { vip: back.vip, server: back.server });
        }
        let quoted = packet.icmp()?.quoted()?;
        // The client sent it and is told of it.
        if quoted.protocol != Protocol::Tcp || quoted.source != packet.destination() {
            return None;
        }
        let back = self.table.back(quoted.destination, quoted.destination_port)?;
        Some(Route::ErrorToClient { vip: back.vip, server: back.server })
    }
}

/// `B4`.
fn default_server(vip: &Vip, reason: DropReason) -> Result<(ServerId, Decision), DropReason> {
    match vip.default_server() {
        Some(server) if reason.falls_back() => Ok((server, Decision::Default(reason))),
        _ => Err(reason),
    }
}
