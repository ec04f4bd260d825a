//! Packets for the tests.

use std::net::{IpAddr, SocketAddr};

use shunt_stack::wire::checksum::Sum;
use shunt_stack::wire::{Packet, Segment, SeqNumber, TcpFlags};

/// A segment with timestamps and some payload unless it is a SYN.
pub(super) fn segment(
    source: SocketAddr,
    destination: SocketAddr,
    flags: TcpFlags,
    seq: SeqNumber,
) -> Packet {
    let timestamps = [8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1];
    let payload: &[u8] = if flags.contains(TcpFlags::SYN) { b"" } else { b"hello" };
    Segment { seq, window: 1000, options: &timestamps, payload, ..Segment::bare(source, destination, flags) }
        .emit()
}

/// An ICMP destination-unreachable (too big) error from `source` to `destination` that quotes `quoted`, `length` bytes of its
/// transport part.
pub(super) fn error(source: IpAddr, destination: IpAddr, quoted: &Packet, length: usize) -> Packet {
    let quote = &quoted.bytes()[..(quoted.transport_offset() + length).min(quoted.len())];
    let (kind, code) = if source.is_ipv4() { (3, 4) } else { (2, 0) };
    let mut message = vec![kind, code, 0, 0, 0, 0, 5, 0];
    message.extend_from_slice(quote);
    datagram(source, destination, if source.is_ipv4() { 1 } else { 58 }, &message, 2)
}

/// A packet of any protocol whose checksum is at `field` of its payload.
pub(super) fn datagram(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    payload: &[u8],
    field: usize,
) -> Packet {
    let mut bytes = header(source, destination, protocol, payload.len());
    let start = bytes.len();
    bytes.extend_from_slice(payload);
    if protocol != 1 && protocol != 58 && protocol != 17 {
        return Packet::from_slice(&bytes).unwrap();
    }
    let pseudo = if protocol == 1 {
        Sum::new()
    } else {
        Sum::new().add_pseudo_header(source, destination, protocol, payload.len())
    };
    let checksum = match pseudo.add(&bytes[start..]).checksum() {
        0 if protocol == 17 => 0xffff,
        checksum => checksum,
    };
    bytes[start + field..start + field + 2].copy_from_slice(&checksum.to_be_bytes());
    Packet::from_slice(&bytes).unwrap()
}

fn header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = (20 + length) as u16;
            let mut bytes = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
            bytes[2..4].copy_from_slice(&total.to_be_bytes());
            bytes.extend_from_slice(&source.octets());
            bytes.extend_from_slice(&destination.octets());
            let checksum = Sum::new().add(&bytes).checksum();
            bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
            bytes
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut bytes = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            bytes[4..6].copy_from_slice(&(length as u16).to_be_bytes());
            bytes.extend_from_slice(&source.octets());
            bytes.extend_from_slice(&destination.octets());
            bytes
        }
        _ => panic!("two families"),
    }
}

/// The packet as a later fragment.
pub(super) fn later_fragment(packet: &Packet) -> Packet {
    let mut bytes = packet.bytes().to_vec();
    if packet.source().is_ipv4() {
        bytes[4..8].copy_from_slice(&[0x12, 0x34, 0, 16]);
        bytes[10..12].fill(0);
        let checksum = Sum::new().add(&bytes[..20]).checksum();
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        return Packet::from_slice(&bytes).unwrap();
    }
    let next = bytes[6];
    bytes[6] = 44;
    let length = u16::from_be_bytes([bytes[4], bytes[5]]) + 8;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes.splice(40..40, [next, 0, 0, 128, 0, 0, 0x12, 0x34]);
    Packet::from_slice(&bytes).unwrap()
}

/// A UDP datagram.
pub(super) fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Packet {
    let mut message = Vec::new();
    message.extend_from_slice(&source.port().to_be_bytes());
    message.extend_from_slice(&destination.port().to_be_bytes());
    message.extend_from_slice(&(data.len() as u16 + 8).to_be_bytes());
    message.extend_from_slice(&[0, 0]);
    message.extend_from_slice(data);
    datagram(source.ip(), destination.ip(), 17, &message, 6)
}

/// An echo request, or its reply.
pub(super) fn echo(source: IpAddr, destination: IpAddr, request: bool, identifier: u16) -> Packet {
    let (protocol, kind) = match (source.is_ipv4(), request) {
        (true, true) => (1, 8),
        (true, false) => (1, 0),
        (false, true) => (58, 128),
        (false, false) => (58, 129),
    };
    let [high, low] = identifier.to_be_bytes();
    datagram(source, destination, protocol, &[kind, 0, 0, 0, high, low, 0, 1, 9, 8, 7], 2)
}

/// The packet's bytes as a fragment: `data` of its transport part, from `offset` on.
pub(super) fn fragment_bytes(
    packet: &Packet,
    identification: u16,
    offset: usize,
    data: &[u8],
    more: bool,
) -> Vec<u8> {
    let field = offset as u16 | u16::from(more);
    let mut bytes = packet.bytes()[..packet.transport_offset()].to_vec();
    if packet.source().is_ipv4() {
        let total = (bytes.len() + data.len()) as u16;
        bytes[2..4].copy_from_slice(&total.to_be_bytes());
        bytes[4..6].copy_from_slice(&identification.to_be_bytes());
        bytes[6..8].copy_from_slice(&((offset as u16 / 8) | (u16::from(more) << 13)).to_be_bytes());
        bytes[10..12].fill(0);
        let checksum = Sum::new().add(&bytes).checksum();
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        let next = std::mem::replace(&mut bytes[6], 44);
        bytes[4..6].copy_from_slice(&(data.len() as u16 + 8).to_be_bytes());
        bytes.extend_from_slice(&[next, 0]);
        bytes.extend_from_slice(&field.to_be_bytes());
        bytes.extend_from_slice(&u32::from(identification).to_be_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

/// The packet in fragments of `size` bytes, a multiple of 8.
pub(super) fn fragments(packet: &Packet, identification: u16, size: usize) -> Vec<Packet> {
    let transport = &packet.bytes()[packet.transport_offset()..];
    let count = transport.len().div_ceil(size);
    let one = |(index, data)| {
        let bytes = fragment_bytes(packet, identification, index * size, data, index + 1 < count);
        Packet::from_slice(&bytes).unwrap()
    };
    transport.chunks(size).enumerate().map(one).collect()
}

/// The datagram that fragments make, whatever their order.
pub(super) fn reassembled(fragments: &[Packet]) -> Packet {
    let mut parts: Vec<(u16, &Packet)> =
        fragments.iter().map(|part| (part.fragment().unwrap().offset, part)).collect();
    parts.sort_by_key(|(offset, _)| *offset);
    let data: Vec<u8> =
        parts.iter().flat_map(|(_, part)| part.bytes()[part.transport_offset()..].to_vec()).collect();
    let first = parts[0].1;
    let mut bytes = header(first.source(), first.destination(), first.protocol().number(), data.len());
    bytes.extend_from_slice(&data);
    Packet::from_slice(&bytes).unwrap()
}

/// The IPv4 header's checksum is right, and so is that of what is above.
pub(super) fn checksums_are_right(packet: &Packet) -> bool {
    let header = usize::from(packet.bytes()[0] & 0x0f) * 4;
    let ip = packet.source().is_ipv6() || Sum::new().add(&packet.bytes()[..header]).fold() == 0xffff;
    ip && packet.checksum_ok()
}

/// The quoted packet of an ICMP error, if it was quoted whole.
pub(super) fn quoted_packet(packet: &Packet) -> Packet {
    Packet::from_slice(&packet.bytes()[packet.transport_offset() + 8..]).unwrap()
}
