//! What to divert by packet marks: a description, which `nft` rules are made of.
//!
//! Marked packets go where the caller's policy rules send the mark.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::prefix::{Family, PortRange, Prefix, Transport};

/// The TCP option kind that carries the redirect option (RFC 6994, shared use).
pub const OPTION_KIND: u8 = 253;

/// TCP flags to compare: `flags & mask == value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlagMatch {
    /// The flags that must be set, of those in `mask`.
    pub value: u8,
    /// The flags that are compared.
    pub mask: u8,
}

impl FlagMatch {
    /// SYN without ACK: a connection's first segment.
    pub const SYN: Self = Self { value: 0x02, mask: 0x12 };
    /// SYN with ACK.
    pub const SYN_ACK: Self = Self { value: 0x12, mask: 0x12 };
}

/// TCP segments, or UDP datagrams, that meet all of these; an empty list or `None` matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentMatch {
    /// Which of the two.
    #[serde(default)]
    pub transport: Transport,
    /// Arriving on this interface (incoming only).
    pub interface: Option<String>,
    /// From one of these. Where source and destination name addresses, only pairs of one family match.
    pub source: Vec<Prefix>,
    /// To one of these.
    pub destination: Vec<Prefix>,
    /// From one of these ports.
    pub source_ports: Vec<PortRange>,
    /// To one of these ports.
    pub destination_ports: Vec<PortRange>,
    /// Carrying a TCP option of this kind (TCP only), such as [`OPTION_KIND`].
    pub option: Option<u8>,
    /// With these flags (TCP only).
    pub flags: Option<FlagMatch>,
}

impl SegmentMatch {
    /// The families it can match; both if it names no address.
    pub(crate) fn families(&self) -> Option<Vec<Family>> {
        if self.source.is_empty() && self.destination.is_empty() {
            return None;
        }
        let has = |list: &[Prefix], family| list.is_empty() || list.iter().any(|p| p.family() == family);
        Some(
            Family::BOTH
                .into_iter()
                .filter(|&family| has(&self.source, family) && has(&self.destination, family))
                .collect(),
        )
    }
}

/// Arriving ICMP and `ICMPv6` errors (destination unreachable, packet too big, time exceeded, parameter problem)
/// that quote a TCP segment (or, by choice, a UDP datagram) from one of `source` to one of `destination`. A router's error does not come from the
/// VIP, so only the quoted segment tells whose it is. An empty list matches everything; both empty matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotedMatch {
    /// Arriving on this interface.
    pub interface: Option<String>,
    /// The quoted source.
    pub source: Vec<IpAddr>,
    /// The quoted destination.
    pub destination: Vec<IpAddr>,
    /// Or that it is in one of these.
    #[serde(default)]
    pub destination_prefixes: Vec<Prefix>,
    /// Whether quotes of UDP match, too, and in IPv6 those of first fragments.
    #[serde(default)]
    pub udp: bool,
}

/// What a [`PacketMatch`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PacketKind {
    /// Fragments, first ones included: policy rules see no ports in any.
    Fragment,
    /// Answers to ICMP messages without ports: echo replies, and in IPv4 timestamp replies.
    IcmpAnswer,
}

/// Packets whose ports do not tell whose they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketMatch {
    /// What they are.
    pub kind: PacketKind,
    /// From one of these; an empty list matches nothing.
    pub source: Vec<IpAddr>,
}

/// A TCP connection of this host; both addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TcpConnection {
    /// This host's socket.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
}

/// Which packets get a mark, in one nftables table of our own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divert {
    /// The mark's bits under `mask`.
    pub mark: u32,
    /// The bits of the packet's mark that are replaced.
    pub mask: u32,
    /// Nothing that arrives on this interface is marked: the daemon's own TUN, or its packets would come back to it.
    pub except_interface: Option<String>,
    /// Marked on arrival, before routing.
    pub incoming: Vec<SegmentMatch>,
    /// Marked when this host sends them; they are routed again.
    pub outgoing: Vec<SegmentMatch>,
    /// Marked on arrival.
    pub icmp: Vec<QuotedMatch>,
    /// The same of errors that this host itself sends, about packets that it could not pass on.
    #[serde(default)]
    pub icmp_outgoing: Vec<QuotedMatch>,
    /// Marked on arrival.
    #[serde(default)]
    pub packets: Vec<PacketMatch>,
    /// Every segment of these is marked: on arrival, and when this host sends it.
    #[serde(default)]
    pub connections: Vec<TcpConnection>,
    /// TCP segments that this host sends to one of these without the mark are dropped unless they leave by
    /// `except_interface`: they were to, but it is gone.
    #[serde(default)]
    pub held: Vec<IpAddr>,
    /// Kept out of connection tracking on arrival, from whatever interface.
    pub untracked_incoming: Vec<SegmentMatch>,
    /// Kept out of connection tracking when this host sends them.
    pub untracked_outgoing: Vec<SegmentMatch>,
}
