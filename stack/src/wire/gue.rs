//! Generic UDP Encapsulation (draft-ietf-intarea-gue), variant 0 without optional fields: an IP packet in a UDP datagram
//! behind four bytes.
//!
//! ```text
//! IP | UDP, destination port 6080 | 0 0, C = 0, length 0 | 4 or 41 | flags 0 (16 bits) | the inner packet
//! ```
//!
//! The inner packet does not change, but for its ECN bits where it leaves the tunnel (RFC 6040).

use std::net::IpAddr;

use bytes::BytesMut;

use super::checksum::Sum;
use super::error::ParseError;
use super::ip::{IPV4_LEN, IPV6_LEN, Version, be16};
use super::packet::{Offload, Packet};
use super::segment::put_ip_header;

/// The registered UDP port.
pub const PORT: u16 = 6080;
/// Bytes of a UDP header.
pub(super) const UDP_LEN: usize = 8;
const HEADER_LEN: usize = 4;
const UDP: u8 = 17;
/// Protocol numbers of inner packets.
const IPV4: u8 = 4;
const IPV6: u8 = 41;

/// Why something is not put into, or taken out of, a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum GueError {
    /// It ends before its header does.
    #[error("truncated: needs {need} bytes, has {have}")]
    Truncated {
        /// Bytes needed.
        need: usize,
        /// Bytes that are there.
        have: usize,
    },
    /// A variant other than 0.
    #[error("variant {0}")]
    Variant(u8),
    /// A control message of this type.
    #[error("control message {0}")]
    Control(u8),
    /// Optional fields, which nobody here sends or understands.
    #[error("{length} bytes of options, flags {flags:#06x}")]
    Options {
        /// Their length in bytes.
        length: u8,
        /// The flags that announce them.
        flags: u16,
    },
    /// Neither IPv4 nor IPv6 is inside.
    #[error("protocol {0} inside")]
    Protocol(u8),
    /// The inner packet is not of the announced version.
    #[error("IP version {0} inside, another was announced")]
    Version(u8),
    /// The inner packet cannot be read.
    #[error("unreadable inside: {0}")]
    Inner(#[from] ParseError),
    /// The outer header says that congestion was met; the inner packet does not know of such marks (RFC 6040 §4.2).
    #[error("a mark of congestion on a packet that cannot carry it")]
    Congestion,
    /// The device left checksum or segmentation to others: nobody will do it inside a tunnel.
    #[error("checksum or segmentation is left to a device")]
    Offload,
    /// The whole would have so many bytes.
    #[error("{0} bytes do not fit a packet")]
    TooLong(usize),
}

/// The outer header of a packet in a tunnel. Both addresses are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// The tunnel's entrance.
    pub source: IpAddr,
    /// Its end.
    pub destination: IpAddr,
    /// Tells flows apart on the way (ECMP, RSS): the same for all packets of a flow.
    pub source_port: u16,
    /// Usually [`PORT`].
    pub destination_port: u16,
    /// Identification of an outer IPv4 packet that may be fragmented on the way; DF is set without one. IPv6 never is.
    pub identification: Option<u16>,
}

impl Outer {
    /// Bytes in front of the inner packet.
    pub fn overhead(&self) -> usize {
        overhead(self.destination)
    }
}

/// Bytes in front of an inner packet on its way to `end`.
pub fn overhead(end: IpAddr) -> usize {
    UDP_LEN + HEADER_LEN + if end.is_ipv4() { IPV4_LEN } else { IPV6_LEN }
}

/// Whether routers must not fragment a packet: DF, or IPv6.
pub fn must_stay_whole(packet: &Packet) -> bool {
    packet.version() == Version::V6 || packet.buffer[6] & 0x40 != 0
}

impl Packet {
    /// Puts the packet into a tunnel. DSCP and ECN are copied to the outer header (RFC 2983, RFC 6040 normal mode); the UDP
    /// checksum is 0 over IPv4 and right over IPv6.
    ///
    /// # Errors
    /// Something was left to a device, or it gets too long; the packet is unchanged.
    ///
    /// # Panics
    /// If the outer addresses are of two families: a programming error.
    pub fn encapsulate(&mut self, outer: &Outer) -> Result<(), GueError> {
        if self.offload != Offload::default() {
            return Err(GueError::Offload);
        }
        let (overhead, inner) = (outer.overhead(), self.len());
        if overhead + inner > usize::from(u16::MAX) {
            return Err(GueError::TooLong(overhead + inner));
        }
        let protocol = if self.version() == Version::V4 { IPV4 } else { IPV6 };
        let mut header = BytesMut::with_capacity(overhead);
        put_ip_header(&mut header, outer.source, outer.destination, UDP, UDP_LEN + HEADER_LEN + inner);
        mark(&mut header, self.traffic_class(), outer.identification);
        let udp = header.len();
        let length = (UDP_LEN + HEADER_LEN + inner) as u16;
        for word in [outer.source_port, outer.destination_port, length, 0] {
            header.extend_from_slice(&word.to_be_bytes());
        }
        header.extend_from_slice(&[0, protocol, 0, 0]);
        if !outer.destination.is_ipv4() {
            let sum = Sum::new()
                .add_pseudo_header(outer.source, outer.destination, UDP, usize::from(length))
                .add(&header[udp..])
                .add(&self.buffer);
            let checksum = match sum.checksum() {
                0 => 0xffff,
                other => other,
            };
            header[udp + 6..udp + 8].copy_from_slice(&checksum.to_be_bytes());
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(overhead + inner, 0);
        buffer.copy_within(..inner, overhead);
        buffer[..overhead].copy_from_slice(&header);
        *self = Packet::parse(buffer, Offload::default()).expect("an emitted packet parses");
        Ok(())
    }

    /// The byte of DSCP and ECN.
    pub fn traffic_class(&self) -> u8 {
        match self.version() {
            Version::V4 => self.buffer[1],
            Version::V6 => (be16(&self.buffer, 0) >> 4) as u8,
        }
    }
}

/// Traffic class and fragmentation of an outer header.
fn mark(header: &mut [u8], class: u8, identification: Option<u16>) {
    if header[0] >> 4 == 6 {
        let word = be16(header, 0) | u16::from(class) << 4;
        header[..2].copy_from_slice(&word.to_be_bytes());
        return;
    }
    header[1] = class;
    if let Some(identification) = identification {
        header[4..6].copy_from_slice(&identification.to_be_bytes());
        header[6] = 0;
    }
    header[10..12].fill(0);
    let checksum = Sum::new().add(header).checksum();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// The inner packet's bytes in a UDP payload.
///
/// # Errors
/// It is none that [`Packet::encapsulate`] makes.
pub fn payload(payload: &[u8]) -> Result<&[u8], GueError> {
    if payload.len() <= HEADER_LEN {
        return Err(GueError::Truncated { need: HEADER_LEN + 1, have: payload.len() });
    }
    let (header, inner) = payload.split_at(HEADER_LEN);
    if header[0] >> 6 != 0 {
        return Err(GueError::Variant(header[0] >> 6));
    }
    if header[0] & 0x20 != 0 {
        return Err(GueError::Control(header[1]));
    }
    let (length, flags) = ((header[0] & 0x1f) * 4, be16(header, 2));
    if length != 0 || flags != 0 {
        return Err(GueError::Options { length, flags });
    }
    match (header[1], inner[0] >> 4) {
        (IPV4, 4) | (IPV6, 6) => Ok(inner),
        (IPV4 | IPV6, version) => Err(GueError::Version(version)),
        (protocol, _) => Err(GueError::Protocol(protocol)),
    }
}

/// Takes the inner packet out of a UDP payload whose outer header had this traffic class.
///
/// # Errors
/// It is none that [`Packet::encapsulate`] makes, or must be dropped by RFC 6040.
pub fn decapsulate(datagram: &[u8], outer_class: u8) -> Result<Packet, GueError> {
    let mut packet = Packet::from_slice(payload(datagram)?)?;
    let before = packet.traffic_class() & 3;
    let after = ecn(before, outer_class & 3).ok_or(GueError::Congestion)?;
    if after != before {
        packet.set_ecn(after);
    }
    Ok(packet)
}

/// The ECN bits of a packet that leaves a tunnel (RFC 6040 §4.2); `None` if it must be dropped.
fn ecn(inner: u8, outer: u8) -> Option<u8> {
    const NOT_ECT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    match (inner, outer) {
        (NOT_ECT, CE) => None,
        (ECT0 | ECT1, CE) => Some(CE),
        (ECT0, ECT1) => Some(ECT1),
        (inner, _) => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::{Segment, TcpFlags};

    const ENDS: [(&str, &str); 2] = [("192.0.2.1", "10.9.0.11"), ("2001:db8::1", "fd00:9::11")];

    fn inner(v6: bool, payload: &[u8]) -> Packet {
        let (client, vip) = if v6 {
            ("[2001:db8:1::7]:50000", "[2001:db8::10]:443")
        } else {
            ("10.1.0.2:50000", "203.0.113.10:443")
        };
        let sockets: [SocketAddr; 2] = [client, vip].map(|text| text.parse().unwrap());
        Segment { payload, ..Segment::bare(sockets[0], sockets[1], TcpFlags::ACK) }.emit()
    }

    fn outer(v6: bool) -> Outer {
        let (source, destination) = ENDS[usize::from(v6)];
        Outer {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            source_port: 50_001,
            destination_port: PORT,
            identification: None,
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_draft() {
        let packet = inner(false, b"data");
        let mut tunnelled = packet.clone();
        tunnelled.encapsulate(&outer(false)).unwrap();
        let bytes = tunnelled.bytes();
        assert_eq!(bytes.len(), packet.len() + 32);
        assert_eq!(bytes[..10], [0x45, 0, 0, 76, 0, 0, 0x40, 0, 64, 17]);
        assert_eq!(Sum::new().add(&bytes[..20]).fold(), 0xffff);
        assert_eq!(bytes[20..28], [0xc3, 0x51, 0x17, 0xc0, 0, 56, 0, 0]);
        assert_eq!(bytes[28..32], [0, 4, 0, 0]);
        assert_eq!(&bytes[32..], packet.bytes());
        let mut tunnelled = inner(true, b"data");
        tunnelled.encapsulate(&outer(false)).unwrap();
        assert_eq!(tunnelled.bytes()[28..32], [0, 41, 0, 0]);
    }

    #[test]
    fn an_outer_packet_may_be_fragmented_only_if_it_is_said() {
        let mut tunnelled = inner(false, b"");
        tunnelled.encapsulate(&Outer { identification: Some(0x1234), ..outer(false) }).unwrap();
        assert_eq!(tunnelled.bytes()[4..8], [0x12, 0x34, 0, 0]);
        assert_eq!(Sum::new().add(&tunnelled.bytes()[..20]).fold(), 0xffff);
        assert!(!must_stay_whole(&tunnelled) && must_stay_whole(&inner(false, b"")));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let good = {
            let mut packet = inner(false, b"data");
            packet.encapsulate(&outer(false)).unwrap();
            packet.bytes()[28..].to_vec()
        };
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            decapsulate(&bytes, 0).unwrap_err()
        };
        assert_eq!(changed(0, 0x40), GueError::Variant(1));
        assert_eq!(changed(0, 0x20), GueError::Control(4));
        assert_eq!(changed(0, 0x01), GueError::Options { length: 4, flags: 0 });
        assert_eq!(changed(2, 0x80), GueError::Options { length: 0, flags: 0x8000 });
        assert_eq!(changed(1, 17), GueError::Protocol(17));
        assert_eq!(changed(1, 41), GueError::Version(4));
        assert!(matches!(changed(4, 0x44), GueError::Inner(ParseError::HeaderLength(16))));
        assert_eq!(decapsulate(&good[..4], 0), Err(GueError::Truncated { need: 5, have: 4 }));
        assert!(matches!(decapsulate(&good[..30], 0), Err(GueError::Inner(ParseError::Truncated { .. }))));
        let mut long = inner(true, &vec![0; 65_535 - 20 - 30]);
        let before = long.clone();
        assert!(matches!(long.encapsulate(&outer(true)), Err(GueError::TooLong(_))));
        assert_eq!(long, before);
        let partial = Offload { partial_checksum: true, gso: None };
        let mut partial = Packet::parse(before.into_buffer(), partial).unwrap();
        assert_eq!(partial.encapsulate(&outer(false)), Err(GueError::Offload));
    }

    #[test]
    fn rfc6040_congestion_met_in_the_tunnel_reaches_the_inner_packet() {
        // Rows: inner Not-ECT, ECT(1), ECT(0), CE; columns: the same outside.
        let wanted = [
            [Some(0), Some(0), Some(0), None],
            [Some(1), Some(1), Some(1), Some(3)],
            [Some(2), Some(1), Some(2), Some(3)],
            [Some(3), Some(3), Some(3), Some(3)],
        ];
        for v6 in [false, true] {
            for (from, row) in (0u8..).zip(wanted) {
                for (outside, wanted) in (0u8..).zip(row) {
                    let mut packet = inner(v6, b"x");
                    packet.set_dscp(46);
                    packet.set_ecn(from);
                    let class = packet.traffic_class();
                    assert_eq!(class, 46 << 2 | from);
                    packet.encapsulate(&outer(v6)).unwrap();
                    assert_eq!(packet.traffic_class(), class, "copied");
                    let datagram = packet.bytes()[packet.transport_offset() + 8..].to_vec();
                    let out = decapsulate(&datagram, 46 << 2 | outside);
                    assert_eq!(out.as_ref().ok().map(Packet::traffic_class), wanted.map(|ecn| 46 << 2 | ecn));
                    if let Ok(out) = out {
                        assert!(
                            out.checksum_ok() && (v6 || Sum::new().add(&out.bytes()[..20]).fold() == 0xffff)
                        );
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn what_goes_in_comes_out(
            v6 in any::<bool>(), outer_v6 in any::<bool>(), port in any::<u16>(), class in any::<u8>(),
            payload in proptest::collection::vec(any::<u8>(), 0..2000)
        ) {
            let mut packet = inner(v6, &payload);
            packet.set_dscp(class >> 2);
            packet.set_ecn(class & 3);
            let original = packet.clone();
            let outer = Outer { source_port: port, ..outer(outer_v6) };
            packet.encapsulate(&outer).unwrap();
            prop_assert_eq!(packet.len(), original.len() + outer.overhead());
            prop_assert_eq!((packet.source(), packet.destination()), (outer.source, outer.destination));
            prop_assert_eq!(packet.ports(), Some((port, PORT)));
            prop_assert!(packet.checksum_ok());
            let datagram = &packet.bytes()[packet.transport_offset() + 8..];
            prop_assert_eq!(decapsulate(datagram, packet.traffic_class()), Ok(original));
        }

        #[test]
        fn arbitrary_bytes_are_refused_or_are_a_packet(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), shape in any::<bool>()) {
            if shape && bytes.len() > 5 {
                bytes[..6].copy_from_slice(&[0, 4, 0, 0, 0x45, 0]);
            }
            if let Ok(packet) = decapsulate(&bytes, 3) {
                prop_assert!(packet.len() <= bytes.len() - 4);
            }
        }
    }
}
