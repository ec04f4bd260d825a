//! One IP packet, checked once: what it is, and where its headers are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::BytesMut;

use super::checksum::Sum;
use super::error::{ParseError, Rejected};
use super::icmp::{self, IcmpView};
use super::ip::{Fragment, IPV4_LEN, IPV6_LEN, Layout, Protocol, Version, be16};
use super::tcp::{self, TcpView};
use super::vnet::{TCP_CHECKSUM, UDP_CHECKSUM};

/// The kind of a super-packet's segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GsoKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP segmentation.
    Udp,
}

/// A request to cut a super-packet into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gso {
    /// What is cut.
    pub kind: GsoKind,
    /// Payload bytes a segment.
    pub size: u16,
    /// The ECN bit of virtio: CWR goes on the first segment only.
    pub ecn: bool,
}

/// What a device left undone (virtio-net header): untrusted, checked by [`Packet::parse`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Offload {
    /// The transport checksum field holds the pseudo-header's sum only.
    pub partial_checksum: bool,
    /// The packet is a super-packet.
    pub gso: Option<Gso>,
}

/// A checked IPv4 or IPv6 packet that owns its buffer.
///
/// If it is TCP, UDP or ICMP and carries the beginning of the transport header, that header is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub(super) buffer: BytesMut,
    pub(super) layout: Layout,
    pub(super) offload: Offload,
}

impl Packet {
    /// Checks a packet; bytes behind its announced length are cut off.
    ///
    /// # Errors
    /// [`Rejected`] with the reason and the buffer, for reuse.
    pub fn parse(mut buffer: BytesMut, offload: Offload) -> Result<Packet, Rejected> {
        match check(&buffer, offload) {
            Ok(layout) => {
                buffer.truncate(layout.total);
                Ok(Packet { buffer, layout, offload })
            }
            Err(error) => Err(Rejected { error, buffer }),
        }
    }

    /// Takes a packet whose IP header alone has to be right, for passing on what [`parse`](Self::parse) refuses
    /// (`B4`): its protocol is [`Protocol::Other`], nothing above IP is looked at or follows a rewrite.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), for a header or length that is wrong.
    pub fn parse_opaque(mut buffer: BytesMut) -> Result<Packet, Rejected> {
        match Layout::parse_opaque(&buffer) {
            Ok(layout) => {
                buffer.truncate(layout.total);
                Ok(Packet { buffer, layout, offload: Offload::default() })
            }
            Err(error) => Err(Rejected { error, buffer }),
        }
    }

    /// Checks a copy of `bytes` with complete checksums.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn from_slice(bytes: &[u8]) -> Result<Packet, ParseError> {
        Packet::parse(BytesMut::from(bytes), Offload::default()).map_err(|rejected| rejected.error)
    }

    /// The bytes, IP header first.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// The buffer, to be filled anew.
    #[inline]
    pub fn into_buffer(self) -> BytesMut {
        self.buffer
    }

    /// What the device left undone.
    #[inline]
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)]
    #[inline]
    pub fn len(&self) -> usize {
        self.layout.total
    }

    /// The IP version.
    #[inline]
    pub fn version(&self) -> Version {
        self.layout.version
    }

    /// The protocol above IP.
    #[inline]
    pub fn protocol(&self) -> Protocol {
        self.layout.protocol
    }

    /// Source address.
    #[inline]
    pub fn source(&self) -> IpAddr {
        address_at(&self.buffer, self.layout.version).0
    }

    /// Destination address.
    #[inline]
    pub fn destination(&self) -> IpAddr {
        address_at(&self.buffer, self.layout.version).1
    }

    /// Time to live or hop limit.
    pub fn hop_limit(&self) -> u8 {
        match self.layout.version {
            Version::V4 => self.buffer[8],
            Version::V6 => self.buffer[7],
        }
    }

    /// Differentiated services code point (RFC 2474).
    #[inline]
    pub fn dscp(&self) -> u8 {
        match self.layout.version {
            Version::V4 => self.buffer[1] >> 2,
            Version::V6 => (be16(&self.buffer, 0) >> 6 & 0x3f) as u8,
        }
    }

    /// What makes it a fragment, if it is one.
    #[inline]
    pub fn fragment(&self) -> Option<Fragment> {
        self.layout.fragment
    }

    /// Offset of the transport header.
    #[inline]
    pub fn transport_offset(&self) -> usize {
        self.layout.transport
    }

    #[inline]
    fn transport(&self) -> &[u8] {
        &self.buffer[self.layout.transport..]
    }

    #[inline]
    fn has(&self, protocol: Protocol) -> bool {
        self.layout.protocol == protocol && self.layout.has_transport_header()
    }

    /// (source, destination) port of TCP or UDP, unless this is a later fragment.
    #[inline]
    pub fn ports(&self) -> Option<(u16, u16)> {
        let visible = self.has(Protocol::Tcp) || self.has(Protocol::Udp);
        visible.then(|| (be16(self.transport(), 0), be16(self.transport(), 2)))
    }

    /// Source address and port of TCP or UDP.
    #[inline]
    pub fn source_socket(&self) -> Option<SocketAddr> {
        self.ports().map(|(source, _)| SocketAddr::new(self.source(), source))
    }

    /// Destination address and port of TCP or UDP.
    #[inline]
    pub fn destination_socket(&self) -> Option<SocketAddr> {
        self.ports().map(|(_, destination)| SocketAddr::new(self.destination(), destination))
    }

    /// The TCP segment, if it is one and its header is here.
    #[inline]
    pub fn tcp(&self) -> Option<TcpView<'_>> {
        self.layout.segment.then(|| TcpView::new(self.transport()))
    }

    /// The ICMP or `ICMPv6` message.
    #[inline]
    pub fn icmp(&self) -> Option<IcmpView<'_>> {
        (self.has(Protocol::Icmp) || self.has(Protocol::Icmpv6))
            .then(|| IcmpView { message: self.transport(), version: self.layout.version })
    }

    /// Whether the transport checksum is right (complete ones; partial ones are compared with the pseudo-header).
    /// Fragments and protocols without a checksum count as right, as does UDP without one in IPv4.
    pub fn checksum_ok(&self) -> bool {
        if self.layout.fragment.is_some() {
            return true;
        }
        let Some(field) = self.checksum_offset() else { return true };
        let protocol = self.layout.protocol.number();
        let pseudo = match self.layout.protocol {
            Protocol::Icmp => Sum::new(),
            _ => Sum::new().add_pseudo_header(
                self.source(),
                self.destination(),
                protocol,
                self.transport().len(),
            ),
        };
        let value = be16(&self.buffer, field);
        if self.offload.partial_checksum {
            return value % 0xffff == pseudo.fold() % 0xffff;
        }
        if self.layout.protocol == Protocol::Udp && value == 0 {
            return self.layout.version == Version::V4;
        }
        pseudo.add(self.transport()).fold() == 0xffff
    }

    /// Offset in the buffer of the transport checksum field, if it is in this packet.
    #[inline]
    pub(super) fn checksum_offset(&self) -> Option<usize> {
        if !self.layout.has_transport_header() {
            return None;
        }
        let offset = match self.layout.protocol {
            Protocol::Tcp => TCP_CHECKSUM,
            Protocol::Udp => UDP_CHECKSUM,
            Protocol::Icmp | Protocol::Icmpv6 => 2,
            Protocol::Other(_) => return None,
        };
        Some(self.layout.transport + offset)
    }
}

/// (source, destination) of the IP header at the beginning of `packet`, whose fixed part was checked.
#[inline]
pub(super) fn address_at(packet: &[u8], version: Version) -> (IpAddr, IpAddr) {
    match version {
        Version::V4 => {
            let (addresses, _) = packet[12..20].as_chunks::<4>();
            let at = |i: usize| IpAddr::V4(Ipv4Addr::from(addresses[i]));
            (at(0), at(1))
        }
        Version::V6 => {
            let (addresses, _) = packet[8..40].as_chunks::<16>();
            let at = |i: usize| IpAddr::V6(Ipv6Addr::from(addresses[i]));
            (at(0), at(1))
        }
    }
}

fn check(buffer: &[u8], offload: Offload) -> Result<Layout, ParseError> {
    let layout = Layout::parse(buffer)?;
    debug_assert!(layout.transport >= if layout.version == Version::V4 { IPV4_LEN } else { IPV6_LEN });
    if layout.has_transport_header() {
        check_transport(&layout, &buffer[layout.transport..layout.total])?;
    }
    check_offload(&layout, offload)?;
    Ok(layout)
}

fn check_transport(layout: &Layout, transport: &[u8]) -> Result<(), ParseError> {
    let least = match layout.protocol {
        Protocol::Tcp => tcp::FIXED_LEN,
        Protocol::Udp | Protocol::Icmp | Protocol::Icmpv6 => icmp::HEADER_LEN,
        Protocol::Other(_) => 0,
    };
    let short = |need: usize| {
        if layout.fragment.is_some() {
            ParseError::TinyFragment(transport.len())
        } else {
            ParseError::Truncated { need: layout.transport + need, have: layout.total }
        }
    };
    if transport.len() < least {
        return Err(short(least));
    }
    if layout.protocol == Protocol::Tcp {
        let header = usize::from(transport[12] >> 4) * 4;
        if header < tcp::FIXED_LEN {
            return Err(ParseError::HeaderLength(header));
        }
        if header > transport.len() {
            return Err(short(header));
        }
    }
    Ok(())
}

fn check_offload(layout: &Layout, offload: Offload) -> Result<(), ParseError> {
    let fits = match offload.gso.map(|gso| gso.kind) {
        None => true,
        Some(GsoKind::TcpV4) => (layout.version, layout.protocol) == (Version::V4, Protocol::Tcp),
        Some(GsoKind::TcpV6) => (layout.version, layout.protocol) == (Version::V6, Protocol::Tcp),
        Some(GsoKind::Udp) => layout.protocol == Protocol::Udp,
    };
    let checksummed = matches!(layout.protocol, Protocol::Tcp | Protocol::Udp);
    let whole = layout.fragment.is_none() || !(offload.partial_checksum || offload.gso.is_some());
    let sized = offload.gso.is_none_or(|gso| gso.size > 0 && offload.partial_checksum);
    if fits && whole && sized && (checksummed || !offload.partial_checksum) {
        Ok(())
    } else {
        Err(ParseError::Offload)
    }
}
