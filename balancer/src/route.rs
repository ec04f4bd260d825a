//! Deciding where a packet goes (`B1`-`B6`): a function of the packet and the table, nothing is remembered. What TCP has no
//! part in is in `datagram` and `icmp`, fragments in [`fragments`](crate::fragments).
//!
//! (`round-robin` counts its turns; it decides about SYNs only, which `B6` leaves free, and about datagrams, one by one.)

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;
use shunt_stack::redirect::TokenRefusal;
use shunt_stack::wire::gue::GueError;
use shunt_stack::wire::{Packet, ParseError, Protocol, TcpView};
use thiserror::Error;

use crate::Balancer;
use crate::config::{ForwardMode, Legacy, Transport};
use crate::icmp::is_answer;
use crate::limit::Limit;
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
    /// An echo request, answered by the balancer itself (`I4`).
    Answer,
    /// `B1`: a SYN with R, answered by the balancer itself: the client is sent to this server's service port.
    Redirect {
        /// The server, by policy.
        server: ServerId,
        /// Its service port, Y.
        port: u16,
    },
    /// Too big for the tunnel to its server: its sender is told (`I3`, `gue` mode).
    TooBig {
        /// What would fit, in bytes.
        mtu: u16,
    },
    /// Neither for a VIP nor an answer of one: passes as it is (`B5`). So does what is for a port of a VIP that is this
    /// host's own; the host's routes deliver it here.
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
    /// §6: a datagram to a redirect port, by policy.
    Datagram,
    /// §9: a later fragment, after its first.
    Fragment,
    /// `I4`, O12: a packet without ports, by hash.
    Balanced,
    /// `I4`, O12: a packet without ports, to the server that the configuration names.
    Named,
    /// `I1`: an ICMP error that quotes a packet from a service port.
    ErrorOwner,
    /// `I1`: an ICMP error that quotes a packet from a redirect port, by hash.
    ErrorHash,
    /// `I1`: the same, to the legacy server.
    ErrorLegacyServer,
    /// `B4`: to the default server; without one it would have been dropped for this reason.
    Default(DropReason),
}

impl Decision {
    /// Whether the packet is an ICMP error whose quote names the VIP.
    #[inline]
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
    /// `B4`: a protocol that the configuration says nothing of.
    #[error("protocol {0}")]
    Protocol(u8),
    /// O12, `I4`: a packet without ports that the configuration refuses.
    #[error("protocol {0} is refused")]
    Refused(u8),
    /// `B4`: a fragment without ports whose first fragment has not passed.
    #[error("fragment {0} without ports")]
    LaterFragment(u32),
    /// A later fragment that reaches into its first, where the ports are (RFC 5722).
    #[error("fragment {0} overlaps its first")]
    OverlappingFragment(u32),
    /// `B4`: an ICMP message that is no error.
    #[error("ICMP type {message_type} code {code}")]
    Icmp {
        /// Its type.
        message_type: u8,
        /// Its code.
        code: u8,
    },
    /// `B4`: an ICMP error that quotes no ports, or a packet that did not come from the VIP.
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
    /// `B7`: no server takes new packets of this protocol, which has no ports.
    #[error("no server is up for protocol {0}")]
    NoPortlessServer(u8),
    /// `I4`: an echo request that must not be answered: a fragment, broken, or from no host. `B1`: a SYN whose answer
    /// has no room.
    #[error("this must not be answered")]
    Unanswerable,
    /// `I4`: enough was answered in this second.
    #[error("answers are limited")]
    AnswerLimit,
    /// `B3`: `legacy = "drop"`.
    #[error("plain segment to redirect port {0}")]
    Legacy(u16),
    /// More than the service's limit. Decided before and apart from where the packet goes (`B6`).
    #[error("over the service's limit: {0}")]
    Limited(Limit),
    /// `I3`: it does not fit into the tunnel, and its sender cannot be told.
    #[error("more than {0} bytes do not fit into the tunnel")]
    TooBig(u16),
    /// It cannot be put into a tunnel.
    #[error("no packet for a tunnel: {0}")]
    Tunnel(GueError),
    /// The link of the chosen server is not there, or no route leads to it.
    #[error("no way leads to server {0}")]
    NoConnector(ServerId),
    /// `T4`: a SYN to a service port without the token that is demanded.
    #[error("not let in: {0}")]
    Token(TokenRefusal),
    /// The chosen server has no address of the packet's family.
    #[error("server {0} has no address of this family")]
    Family(ServerId),
}

impl DropReason {
    /// Whether the default server gets it, if there is one (`B4`).
    fn falls_back(self) -> bool {
        !matches!(
            self,
            DropReason::Legacy(_)
                | DropReason::Limited(_)
                | DropReason::Token(_)
                | DropReason::Family(_)
                | DropReason::NoConnector(_)
                | DropReason::TooBig(_)
                | DropReason::Tunnel(_)
                | DropReason::Refused(_)
                | DropReason::Unanswerable
        )
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
    Datagram,
    Fragment,
    Balanced,
    Named,
    ErrorOwner,
    ErrorHash,
    ErrorLegacyServer,
    DefaultServer,
    ToClient,
    ErrorToClient,
    Answer,
    Unchanged,
    Redirect,
    TooBig,
}

impl Route {
    pub(crate) fn way(self) -> Way {
        match self {
            Route::ToServer { decision, .. } => match decision {
                Decision::Selected => Way::Selected,
                Decision::Owner => Way::Owner,
                Decision::LegacyHash => Way::LegacyHash,
                Decision::LegacyServer => Way::LegacyServer,
                Decision::Datagram => Way::Datagram,
                Decision::Fragment => Way::Fragment,
                Decision::Balanced => Way::Balanced,
                Decision::Named => Way::Named,
                Decision::ErrorOwner => Way::ErrorOwner,
                Decision::ErrorHash => Way::ErrorHash,
                Decision::ErrorLegacyServer => Way::ErrorLegacyServer,
                Decision::Default(_) => Way::DefaultServer,
            },
            Route::ToClient { .. } => Way::ToClient,
            Route::ErrorToClient { .. } => Way::ErrorToClient,
            Route::Answer => Way::Answer,
            Route::Redirect { .. } => Way::Redirect,
            Route::Unchanged => Way::Unchanged,
            Route::TooBig { .. } => Way::TooBig,
        }
    }
}

impl Balancer {
    /// Decides where a packet goes; changes nothing and counts nothing.
    ///
    /// # Errors
    /// Why it is dropped.
    #[inline]
    pub fn route(&self, packet: &Packet) -> Result<Route, DropReason> {
        match packet.destination() {
            IpAddr::V4(address) => self.route_to(IpAddr::V4(address), packet),
            IpAddr::V6(_) => self.route_v6(packet),
        }
    }

    /// Apart, because 128 bits take registers that IPv4 needs not save.
    #[inline(never)]
    fn route_v6(&self, packet: &Packet) -> Result<Route, DropReason> {
        self.route_to(packet.destination(), packet)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "it is in the way of every packet")]
    fn route_to(&self, destination: IpAddr, packet: &Packet) -> Result<Route, DropReason> {
        let Some(vip) = self.table.vip(destination) else { return Ok(self.outbound(packet)) };
        // B2, before B1 because it is no SYN: nearly all are, and nothing of what the others need is in their way.
        if !self.table.has_admin_ports()
            && let Some(tcp) = packet.tcp()
            && !tcp.is_syn()
            && let Some(server) = vip.owner(Transport::Tcp, tcp.destination_port())
        {
            return Ok(Route::ToServer { server, decision: Decision::Owner });
        }
        self.inbound(vip, packet)
    }

    /// Decides about a packet whose headers above IP cannot be read (`B4`): `packet` was taken as opaque.
    ///
    /// # Errors
    /// `error`, if it is for a VIP without a default server.
    pub fn route_unreadable(&self, packet: &Packet, error: ParseError) -> Result<Route, DropReason> {
        let Some(vip) = self.table.vip(packet.destination()) else { return Ok(Route::Unchanged) };
        default_server(vip, DropReason::Parse(error))
    }

    /// `B1` to `B4` and their like for other protocols.
    #[inline(never)]
    fn inbound(&self, vip: &Vip, packet: &Packet) -> Result<Route, DropReason> {
        if self.table.is_administrators(vip, packet) {
            return Ok(Route::Unchanged);
        }
        let decided = match (packet.protocol(), packet.fragment()) {
            (Protocol::Other(number), _) => self.portless(vip, packet, number).map(to_server),
            (_, Some(fragment)) if fragment.offset != 0 => {
                Err(DropReason::LaterFragment(fragment.identification))
            }
            _ => match (packet.tcp(), packet.icmp()) {
                (Some(tcp), _) => self.segment(vip, packet, tcp),
                (_, Some(icmp)) => self.icmp(vip, packet, icmp),
                _ => self.datagram(vip, packet).map(to_server),
            },
        };
        decided.or_else(|reason| default_server(vip, reason))
    }

    /// `B1` to `B3`, in order.
    fn segment(&self, vip: &Vip, packet: &Packet, tcp: TcpView<'_>) -> Result<Route, DropReason> {
        let port = tcp.destination_port();
        let set = self.table.set(vip, Transport::Tcp, port);
        if let Some(set) = set
            && self.asks_for_redirect(tcp)
            && (!set.is_answered_here() || self.can_redirect(packet))
        {
            return selected(vip, set, packet, tcp);
        }
        if let Some(server) = vip.owner(Transport::Tcp, port) {
            return Ok(Route::ToServer { server, decision: Decision::Owner });
        }
        let set = set.ok_or(DropReason::UnknownPort(port))?;
        let client = SocketAddr::new(packet.source(), tcp.source_port());
        let (server, hashed) = self.legacy(vip, set, client, port)?;
        let decision = if hashed { Decision::LegacyHash } else { Decision::LegacyServer };
        Ok(Route::ToServer { server, decision })
    }

    /// A SYN with a valid option and R (`B1`); with a malformed one it is plain (`W1`).
    pub(crate) fn asks_for_redirect(&self, tcp: TcpView<'_>) -> bool {
        tcp.is_syn() && tcp.redirect(self.table.exid).is_ok_and(|option| option.is_some_and(|o| o.redirect))
    }

    /// `B3`: the server of a plain client, and whether the hash chose it.
    pub(crate) fn legacy(
        &self,
        vip: &Vip,
        set: &Set,
        client: SocketAddr,
        port: u16,
    ) -> Result<(ServerId, bool), DropReason> {
        match self.table.legacy {
            Legacy::Hash => {
                let maglev = set.maglev.as_ref().ok_or(DropReason::NoServer(port))?;
                Ok((maglev.lookup(hash_client(client, self.table.level)), true))
            }
            Legacy::DefaultServer => {
                vip.legacy_server().map(|server| (server, false)).ok_or(DropReason::NoServer(port))
            }
            Legacy::Drop => Err(DropReason::Legacy(port)),
        }
    }

    /// `B5`, `I5`: what is not for a VIP.
    #[inline(never)]
    fn outbound(&self, packet: &Packet) -> Route {
        self.way_back(packet).unwrap_or(Route::Unchanged)
    }

    /// `B5` and `I5` where addresses are rewritten: whose answer this is.
    fn way_back(&self, packet: &Packet) -> Option<Route> {
        if self.table.forward != ForwardMode::Network {
            return None;
        }
        let protocol = packet.protocol();
        let port = match (packet.ports(), packet.icmp()) {
            (Some((source, _)), _) => source,
            (None, Some(icmp)) if icmp.is_error() => return self.error_back(packet, icmp),
            (None, Some(icmp)) if is_answer(icmp) => 0,
            (None, None) if matches!(protocol, Protocol::Other(_)) => 0,
            _ => return None,
        };
        let back = self.table.back(packet.source(), protocol.number(), port)?;
        Some(Route::ToClient { vip: back.vip, server: back.server })
    }
}

/// `B1`: the server by policy, and who answers.
fn selected(vip: &Vip, set: &Set, packet: &Packet, tcp: TcpView<'_>) -> Result<Route, DropReason> {
    let port = tcp.destination_port();
    let request = Request {
        client: SocketAddr::new(packet.source(), tcp.source_port()),
        service: SocketAddr::new(vip.address, port),
        isn: Some(tcp.seq()),
        dscp: packet.dscp(),
        payload: tcp.payload(),
    };
    let select = set.select.as_ref().ok_or(DropReason::NoServer(port))?;
    let server = select.select(&request).ok_or(DropReason::NoServer(port))?;
    Ok(match set.answer(server) {
        Some(port) => Route::Redirect { server, port },
        None => Route::ToServer { server, decision: Decision::Selected },
    })
}

fn to_server((server, decision): (ServerId, Decision)) -> Route {
    Route::ToServer { server, decision }
}

/// `B4`.
fn default_server(vip: &Vip, reason: DropReason) -> Result<Route, DropReason> {
    match vip.default_server() {
        Some(server) if reason.falls_back() => {
            Ok(Route::ToServer { server, decision: Decision::Default(reason) })
        }
        _ => Err(reason),
    }
}
