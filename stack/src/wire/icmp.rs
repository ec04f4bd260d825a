//! ICMP (RFC 792) and `ICMPv6` (RFC 4443), and the packet an error quotes.

use std::net::IpAddr;

use super::ip::{Layout, Protocol, Version, be16};
use super::packet::address_at;
use super::seq::SeqNumber;

/// Bytes before the quoted packet.
pub(super) const HEADER_LEN: usize = 8;

/// An ICMP message within a packet that was checked; at least 8 bytes long.
#[derive(Debug, Clone, Copy)]
pub struct IcmpView<'a> {
    pub(super) message: &'a [u8],
    pub(super) version: Version,
}

impl IcmpView<'_> {
    /// The type.
    pub fn message_type(&self) -> u8 {
        self.message[0]
    }

    /// The code.
    pub fn code(&self) -> u8 {
        self.message[1]
    }

    /// The IP version it came in.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The identifier of an echo or its reply; of other messages the same two bytes.
    pub fn identifier(&self) -> u16 {
        be16(self.message, 4)
    }

    /// Whether it is an error message, one that quotes a packet.
    pub fn is_error(&self) -> bool {
        match self.version {
            Version::V4 => matches!(self.message_type(), 3 | 4 | 5 | 11 | 12),
            Version::V6 => self.message_type() < 128,
        }
    }

    /// The next-hop MTU of fragmentation-needed (RFC 1191) or packet-too-big.
    pub fn mtu(&self) -> Option<u32> {
        match (self.version, self.message_type(), self.code()) {
            (Version::V4, 3, 4) => Some(u32::from(be16(self.message, 6))),
            (Version::V6, 2, _) => {
                Some(u32::from(be16(self.message, 4)) << 16 | u32::from(be16(self.message, 6)))
            }
            _ => None,
        }
    }

    /// The quoted packet, if this is an error and the quote reaches the ports.
    pub fn quoted(&self) -> Option<Quoted> {
        Quoted::parse(*self)
    }
}

/// What an ICMP error says of the packet it is about; ports need 8 bytes of the transport header (`I1`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quoted {
    /// Its source.
    pub source: IpAddr,
    /// Its destination.
    pub destination: IpAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Its source port.
    pub source_port: u16,
    /// Its destination port.
    pub destination_port: u16,
    /// SEG.SEQ, of a TCP segment.
    pub seq: Option<SeqNumber>,
    /// Offset of the quoted IP header in the message.
    pub(super) network: usize,
    /// Offset of the quoted transport header in the message.
    pub(super) transport: usize,
    pub(super) version: Version,
}

impl Quoted {
    fn parse(icmp: IcmpView<'_>) -> Option<Quoted> {
        if !icmp.is_error() {
            return None;
        }
        let quote = icmp.message.get(HEADER_LEN..)?;
        let layout = Layout::parse_quoted(quote).ok()?;
        if layout.version != icmp.version || !layout.has_transport_header() {
            return None;
        }
        let ports = quote.get(layout.transport..layout.transport + 8)?;
        let seq = match layout.protocol {
            Protocol::Tcp => Some(SeqNumber(u32::from_be_bytes([ports[4], ports[5], ports[6], ports[7]]))),
            Protocol::Udp => None,
            _ => return None,
        };
        let (source, destination) = address_at(quote, layout.version);
        Some(Quoted {
            source,
            destination,
            protocol: layout.protocol,
            source_port: be16(ports, 0),
            destination_port: be16(ports, 2),
            seq,
            network: HEADER_LEN,
            transport: HEADER_LEN + layout.transport,
            version: layout.version,
        })
    }
}
