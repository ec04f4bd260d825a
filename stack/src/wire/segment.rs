//! Segments of our own making: SYN-ACKs, SYNs, resets, challenge ACKs.

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut, BytesMut};

use super::checksum::Sum;
use super::ip::{IPV4_LEN, IPV6_LEN};
use super::packet::{Offload, Packet};
use super::seq::SeqNumber;
use super::tcp::{self, TcpFlags};

/// The values of a TCP segment to be made. Source and destination are of one family.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// SEG.SEQ.
    pub seq: SeqNumber,
    /// SEG.ACK; written only if `flags` has ACK.
    pub ack: SeqNumber,
    /// Control bits.
    pub flags: TcpFlags,
    /// SEG.WND, not scaled.
    pub window: u16,
    /// Option bytes, a multiple of 4, at most 40.
    pub options: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

/// TTL and hop limit of segments of our own making.
pub(super) const HOP_LIMIT: u8 = 64;

impl Segment<'_> {
    /// A bare segment without options or payload.
    pub fn bare(source: SocketAddr, destination: SocketAddr, flags: TcpFlags) -> Segment<'static> {
        Segment {
            source,
            destination,
            seq: SeqNumber(0),
            ack: SeqNumber(0),
            flags,
            window: 0,
            options: &[],
            payload: &[],
        }
    }

    /// Writes the packet, checksums complete.
    ///
    /// # Panics
    /// If the addresses are of two families, or the options no multiple of 4 or more than 40 bytes, or the whole
    /// more than 65,535 bytes: programming errors, none follows from input.
    pub fn emit(&self) -> Packet {
        assert!(self.options.len() <= tcp::MAX_LEN - tcp::FIXED_LEN && self.options.len().is_multiple_of(4));
        let header = tcp::FIXED_LEN + self.options.len();
        let length = header + self.payload.len();
        let mut buffer = BytesMut::with_capacity(IPV6_LEN + length + 40);
        put_ip_header(&mut buffer, self.source.ip(), self.destination.ip(), 6, length);
        let transport = buffer.len();
        buffer.put_u16(self.source.port());
        buffer.put_u16(self.destination.port());
        buffer.put_u32(self.seq.0);
        buffer.put_u32(if self.flags.contains(TcpFlags::ACK) { self.ack.0 } else { 0 });
        buffer.put_slice(&[(header as u8 / 4) << 4, self.flags.0]);
        buffer.put_u16(self.window);
        buffer.put_u32(0);
        buffer.put_slice(self.options);
        buffer.put_slice(self.payload);
        let checksum = Sum::new()
            .add_pseudo_header(self.source.ip(), self.destination.ip(), 6, length)
            .add(&buffer[transport..])
            .checksum();
        buffer[transport + 16..transport + 18].copy_from_slice(&checksum.to_be_bytes());
        Packet::parse(buffer, Offload::default()).expect("an emitted segment parses")
    }
}

/// An IP header without options, for `length` bytes of `protocol`.
pub(super) fn put_ip_header(
    buffer: &mut BytesMut,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    length: usize,
) {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = u16::try_from(IPV4_LEN + length).expect("the payload fits a packet");
            buffer.put_slice(&[0x45, 0]);
            buffer.put_u16(total);
            // Identification 0 with DF: an atomic datagram, RFC 6864.
            buffer.put_slice(&[0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0]);
            buffer.put_slice(&source.octets());
            buffer.put_slice(&destination.octets());
            let checksum = Sum::new().add(buffer).checksum();
            buffer[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            buffer.put_slice(&[0x60, 0, 0, 0]);
            buffer.put_u16(u16::try_from(length).expect("the payload fits a packet"));
            buffer.put_slice(&[protocol, HOP_LIMIT]);
            buffer.put_slice(&source.octets());
            buffer.put_slice(&destination.octets());
        }
        _ => panic!("addresses of two families"),
    }
}

/// An ICMP or `ICMPv6` packet around `message`, which begins with type and code; its checksum field is filled in.
///
/// # Panics
/// If the addresses are of two families or the message is shorter than 8 bytes or does not fit a packet.
pub fn icmp_message(source: IpAddr, destination: IpAddr, message: &[u8]) -> Packet {
    assert!(message.len() >= 8, "an ICMP message has 8 bytes at least");
    let mut buffer = BytesMut::with_capacity(IPV6_LEN + message.len());
    let protocol = if source.is_ipv4() { 1 } else { 58 };
    put_ip_header(&mut buffer, source, destination, protocol, message.len());
    let at = buffer.len();
    buffer.put_slice(message);
    buffer[at + 2..at + 4].fill(0);
    let pseudo = if source.is_ipv4() {
        Sum::new()
    } else {
        Sum::new().add_pseudo_header(source, destination, protocol, message.len())
    };
    let checksum = pseudo.add(&buffer[at..]).checksum();
    buffer[at + 2..at + 4].copy_from_slice(&checksum.to_be_bytes());
    Packet::parse(buffer, Offload::default()).expect("an emitted message parses")
}
