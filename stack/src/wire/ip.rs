//! IPv4 (RFC 791) and IPv6 (RFC 8200) headers, extension headers included.

use super::error::ParseError;

/// IPv6 extension headers walked before a packet is refused.
pub(super) const MAX_EXTENSION_HEADERS: usize = 8;
/// Length of the IPv6 fixed header.
pub(super) const IPV6_LEN: usize = 40;
/// Length of the shortest IPv4 header.
pub(super) const IPV4_LEN: usize = 20;

/// The IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The protocol above IP, as far as it is told apart here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP, 6.
    Tcp,
    /// UDP, 17.
    Udp,
    /// ICMP, 1 in IPv4.
    Icmp,
    /// `ICMPv6`, 58 in IPv6.
    Icmpv6,
    /// Any other number.
    Other(u8),
}

impl Protocol {
    #[inline]
    fn new(version: Version, number: u8) -> Self {
        match (version, number) {
            (_, 6) => Protocol::Tcp,
            (_, 17) => Protocol::Udp,
            (Version::V4, 1) => Protocol::Icmp,
            (Version::V6, 58) => Protocol::Icmpv6,
            (_, other) => Protocol::Other(other),
        }
    }

    /// The protocol number.
    #[inline]
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Icmp => 1,
            Protocol::Icmpv6 => 58,
            Protocol::Other(number) => number,
        }
    }
}

/// What makes a packet a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// Identification: 16 bits in IPv4, 32 in IPv6.
    pub identification: u32,
    /// Offset of this fragment in bytes.
    pub offset: u16,
    /// More fragments follow.
    pub more: bool,
}

/// Where things are in an IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: Version,
    /// Offset of the transport header, or of the fragment's data.
    pub(super) transport: usize,
    /// Total length of the packet.
    pub(super) total: usize,
    pub(super) protocol: Protocol,
    pub(super) fragment: Option<Fragment>,
    /// Whether it is no later fragment.
    pub(super) headed: bool,
    /// Whether that is so and it is TCP: asked of every packet, more than once.
    pub(super) segment: bool,
}

impl Layout {
    fn new(
        version: Version,
        transport: usize,
        total: usize,
        protocol: Protocol,
        fragment: Option<Fragment>,
    ) -> Layout {
        let headed = fragment.is_none_or(|fragment| fragment.offset == 0);
        let segment = headed && protocol == Protocol::Tcp;
        Layout { version, transport, total, protocol, fragment, headed, segment }
    }

    /// Whether the transport header is in this packet: it is whole or a first fragment.
    #[inline]
    pub(super) fn has_transport_header(&self) -> bool {
        self.headed
    }

    pub(super) fn parse(packet: &[u8]) -> Result<Layout, ParseError> {
        match packet.first() {
            None => Err(ParseError::Truncated { need: 1, have: 0 }),
            Some(first) if first >> 4 == 4 => parse_ipv4(packet, packet.len()),
            Some(first) if first >> 4 == 6 => parse_ipv6(packet, packet.len()),
            Some(first) => Err(ParseError::Version(first >> 4)),
        }
    }

    /// Parses the fixed header alone; all that follows it is of no known protocol.
    pub(super) fn parse_opaque(packet: &[u8]) -> Result<Layout, ParseError> {
        let version = packet.first().ok_or(ParseError::Truncated { need: 1, have: 0 })? >> 4;
        let (version, transport, total, number) = match version {
            4 => {
                need(packet, IPV4_LEN)?;
                let header = usize::from(packet[0] & 0x0f) * 4;
                (Version::V4, header, usize::from(be16(packet, 2)), packet[9])
            }
            6 => {
                need(packet, IPV6_LEN)?;
                (Version::V6, IPV6_LEN, IPV6_LEN + usize::from(be16(packet, 4)), packet[6])
            }
            other => return Err(ParseError::Version(other)),
        };
        if transport < IPV4_LEN || transport > total {
            return Err(ParseError::HeaderLength(transport));
        }
        need(packet, total)?;
        Ok(Layout::new(version, transport, total, Protocol::Other(number), None))
    }

    /// Parses a packet quoted in an ICMP error: its announced length may exceed what is there.
    pub(super) fn parse_quoted(packet: &[u8]) -> Result<Layout, ParseError> {
        match packet.first() {
            Some(first) if first >> 4 == 4 => parse_ipv4(packet, usize::MAX),
            Some(first) if first >> 4 == 6 => parse_ipv6(packet, usize::MAX),
            Some(first) => Err(ParseError::Version(first >> 4)),
            None => Err(ParseError::Truncated { need: 1, have: 0 }),
        }
    }
}

fn need(packet: &[u8], need: usize) -> Result<(), ParseError> {
    if packet.len() < need { Err(ParseError::Truncated { need, have: packet.len() }) } else { Ok(()) }
}

#[inline]
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    let bytes = &bytes[at..at + 2];
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn check_range(fragment: Fragment, data: usize) -> Result<Option<Fragment>, ParseError> {
    let end = usize::from(fragment.offset) + data;
    if end > 65_535 { Err(ParseError::FragmentRange(end)) } else { Ok(Some(fragment)) }
}

fn parse_ipv4(packet: &[u8], available: usize) -> Result<Layout, ParseError> {
    need(packet, IPV4_LEN)?;
    let header = usize::from(packet[0] & 0x0f) * 4;
    let total = usize::from(be16(packet, 2));
    if header < IPV4_LEN || header > total {
        return Err(ParseError::HeaderLength(header));
    }
    need(packet, header)?;
    if total > available {
        return Err(ParseError::Truncated { need: total, have: packet.len() });
    }
    let field = be16(packet, 6);
    let (offset, more) = ((field & 0x1fff) * 8, field & 0x2000 != 0);
    let fragment = if offset != 0 || more {
        check_range(Fragment { identification: u32::from(be16(packet, 4)), offset, more }, total - header)?
    } else {
        None
    };
    let protocol = Protocol::new(Version::V4, packet[9]);
    Ok(Layout::new(Version::V4, header, total, protocol, fragment))
}

fn parse_ipv6(packet: &[u8], available: usize) -> Result<Layout, ParseError> {
    need(packet, IPV6_LEN)?;
    let total = IPV6_LEN + usize::from(be16(packet, 4));
    if total > available {
        return Err(ParseError::Truncated { need: total, have: packet.len() });
    }
    let packet = &packet[..packet.len().min(total)];
    let mut next = packet[6];
    let mut at = IPV6_LEN;
    let mut fragment = None;
    for _ in 0..=MAX_EXTENSION_HEADERS {
        let length = match next {
            // Hop-by-hop and destination options, routing.
            0 | 60 | 43 => {
                need(packet, at + 8)?;
                if next == 43 && packet[at + 3] != 0 {
                    return Err(ParseError::SourceRoute(packet[at + 3]));
                }
                (usize::from(packet[at + 1]) + 1) * 8
            }
            // Authentication counts in 4-byte units.
            51 => {
                need(packet, at + 8)?;
                (usize::from(packet[at + 1]) + 2) * 4
            }
            44 => {
                need(packet, at + 8)?;
                if fragment.is_some() {
                    return Err(ParseError::HeaderLength(at));
                }
                let field = be16(packet, at + 2);
                let identification = u32::from(be16(packet, at + 4)) << 16 | u32::from(be16(packet, at + 6));
                let found = Fragment { identification, offset: field & 0xfff8, more: field & 1 != 0 };
                fragment = check_range(found, total - at - 8)?;
                8
            }
            number => {
                let protocol = Protocol::new(Version::V6, number);
                return Ok(Layout::new(Version::V6, at, total, protocol, fragment));
            }
        };
        next = packet[at];
        at += length;
        need(packet, at)?;
        if fragment.is_some_and(|fragment| fragment.offset != 0) {
            let protocol = Protocol::new(Version::V6, next);
            return Ok(Layout::new(Version::V6, at, total, protocol, fragment));
        }
    }
    Err(ParseError::ExtensionHeaders(MAX_EXTENSION_HEADERS))
}
