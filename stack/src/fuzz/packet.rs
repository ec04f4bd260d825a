//! Target `packet`: any bytes as a packet, every accessor, every rewrite.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::BytesMut;

use super::draw::{Draw, finish};
use super::invariants::{Snapshot, parses};
use crate::wire::{
    DEFAULT_EXID, Gso, GsoKind, Offload, Packet, RedirectOption, VNET_LEN, Version, read_vnet, write_vnet,
};

const MTU: usize = 1500;
/// The most segments that one input is cut into.
const SEGMENTS: usize = 100;

/// One byte of mode (1 partial checksum, 6 super-packet, 8 lengths and checksums made right, 16 opaque, 64 behind a
/// virtio-net header), eight of values, then the packet. Reading it must not panic; no rewrite and no segmentation may
/// make a right checksum wrong or a wrong one right, or leave bytes that do not parse.
///
/// # Panics
/// If one of these breaks.
pub fn packet(data: &[u8]) {
    let mut draw = Draw::new(data);
    let mode = draw.byte();
    let [port, address] = [draw.double(), draw.double()];
    let port = port as u16;
    let rest = data.get(9..).unwrap_or_default();
    if mode & 16 != 0 {
        return opaque(rest, address);
    }
    if mode & 64 != 0 {
        return behind_header(rest, port, address);
    }
    let kind = match mode >> 1 & 3 {
        0 => None,
        1 => Some(GsoKind::TcpV4),
        2 => Some(GsoKind::TcpV6),
        _ => Some(GsoKind::Udp),
    };
    let gso = kind.map(|kind| Gso { kind, size: port, ecn: mode & 32 != 0 });
    let offload = Offload { partial_checksum: mode & 1 != 0, gso };
    let parsed = if mode & 8 == 0 {
        Packet::parse(BytesMut::from(rest), offload).ok()
    } else {
        finish(rest.to_vec(), offload)
    };
    let Some(packet) = parsed else { return };
    whole(&packet, port, address);
}

fn whole(packet: &Packet, port: u16, address: u32) {
    parses(packet);
    read(packet);
    undone(packet);
    rewrite(packet, port, address);
}

/// A packet as a TUN device gives it: the header is as untrusted as the rest.
fn behind_header(data: &[u8], port: u16, address: u32) {
    let Some((header, bytes)) = data.split_at_checked(VNET_LEN) else {
        assert!(read_vnet(data, &mut []).is_err());
        return;
    };
    let mut buffer = BytesMut::from(bytes);
    let Ok(offload) = read_vnet(header, &mut buffer) else {
        assert_eq!(buffer, bytes, "refused and changed");
        return;
    };
    let Ok(packet) = Packet::parse(buffer, offload) else { return };
    whole(&packet, port, address);
}

/// What is left undone is told as it was, and done here as the kernel would.
fn undone(packet: &Packet) {
    let mut bytes = packet.bytes().to_vec();
    assert_eq!(read_vnet(&write_vnet(packet), &mut bytes), Ok(packet.offload()));
    assert_eq!(bytes, packet.bytes());
    let (ok, count, headers) = (packet.checksum_ok(), packet.segment_count(), packet.headers_len());
    let mut completed = packet.clone();
    completed.complete_checksum();
    assert_eq!((completed.checksum_ok(), completed.offload().partial_checksum), (ok, false));
    if count > SEGMENTS {
        return;
    }
    let (mut joined, mut length, mut segments) = (Vec::new(), 0, 0);
    for segment in packet.segments() {
        assert_eq!((segment.offload(), segment.headers_len()), (Offload::default(), headers));
        assert_eq!(segment.checksum_ok(), ok, "{packet:?} -> {segment:?}");
        parses(&segment);
        joined.extend_from_slice(&segment.bytes()[headers..]);
        length += segment.len();
        segments += 1;
    }
    assert_eq!(joined, packet.bytes()[headers..]);
    assert_eq!((length, segments), (packet.segmented_len(), count));
}

fn opaque(bytes: &[u8], address: u32) {
    let Ok(mut packet) = Packet::parse_opaque(BytesMut::from(bytes)) else { return };
    let length = packet.len();
    let address = other_address(&packet, address);
    packet.set_destination(address);
    packet.set_source_port(1);
    read(&packet);
    assert_eq!((packet.destination(), packet.len(), packet.bytes().len()), (address, length, length));
    assert!(Packet::parse_opaque(BytesMut::from(packet.bytes())).is_ok());
}

fn other_address(packet: &Packet, value: u32) -> IpAddr {
    match packet.version() {
        Version::V4 => Ipv4Addr::from(value).into(),
        Version::V6 => Ipv6Addr::from(u128::from(value) << 64 | u128::from(value)).into(),
    }
}

fn read(packet: &Packet) {
    assert_eq!(packet.bytes().len(), packet.len());
    assert!(packet.transport_offset() <= packet.len());
    let ports = packet.ports();
    assert_eq!(ports.map(|(source, _)| source), packet.source_socket().map(|socket| socket.port()));
    assert_eq!(ports.map(|(_, port)| port), packet.destination_socket().map(|socket| socket.port()));
    let _ = (packet.dscp(), packet.hop_limit(), packet.checksum_ok(), packet.option_room());
    if let Some(tcp) = packet.tcp() {
        assert_eq!(ports, Some((tcp.source_port(), tcp.destination_port())));
        assert_eq!(tcp.header_len() + tcp.payload().len(), packet.len() - packet.transport_offset());
        assert!(tcp.options().count() <= tcp.option_bytes().len());
        assert!(!(tcp.is_syn() && tcp.is_syn_ack()));
        let _ = (tcp.seq(), tcp.ack(), tcp.window(), tcp.sequence_len(), tcp.timestamps());
        let _ = (tcp.redirect(DEFAULT_EXID), tcp.redirect(0), format!("{:?}", tcp.flags()));
    }
    if let Some(icmp) = packet.icmp() {
        let _ = (icmp.message_type(), icmp.code(), icmp.mtu());
        let quoted = icmp.quoted();
        assert!(quoted.is_none() || icmp.is_error());
        assert!(quoted.is_none_or(|quoted| quoted.source.is_ipv4() == (packet.version() == Version::V4)));
    }
}

fn rewrite(original: &Packet, port: u16, address: u32) {
    let address = other_address(original, address);
    let socket = SocketAddr::new(address, port);
    let option = RedirectOption { redirect: true, port: Some(port.max(1)), ..Default::default() };
    let steps: [fn(&mut Packet, SocketAddr, &RedirectOption); 9] = [
        |packet, socket, _| packet.set_source(socket.ip()),
        |packet, socket, _| packet.set_destination(socket.ip()),
        |packet, socket, _| packet.set_source_port(socket.port()),
        |packet, socket, _| packet.set_destination_port(socket.port()),
        |packet, socket, _| {
            let _ = packet.set_quoted_source(socket);
        },
        |packet, socket, _| {
            let _ = packet.set_quoted_destination(socket);
        },
        |packet, _, _| packet.blank_fast_open(),
        |packet, _, _| {
            let _ = packet.strip_redirect(DEFAULT_EXID);
        },
        |packet, _, option| {
            let _ = packet.insert_redirect(DEFAULT_EXID, option, MTU);
        },
    ];
    let mut together = original.clone();
    let whole = Snapshot::of(original);
    for step in steps {
        let mut alone = original.clone();
        step(&mut alone, socket, &option);
        Snapshot::of(original).check(&alone, MTU);
        step(&mut together, socket, &option);
        whole.check(&together, MTU);
        read(&together);
    }
    assert_eq!((together.source(), together.destination()), (address, address));
    if original.ports().is_some() {
        assert_eq!(together.ports(), Some((port, port)));
    }
    quoted_follows(original, socket);
}

/// `I2`: the quote says what it was told to, and all else of it stays.
fn quoted_follows(original: &Packet, socket: SocketAddr) {
    let Some(before) = original.icmp().and_then(|icmp| icmp.quoted()) else { return };
    let mut packet = original.clone();
    assert!(packet.set_quoted_destination(socket));
    let Some(after) = packet.icmp().and_then(|icmp| icmp.quoted()) else { panic!("no quote any more") };
    assert_eq!((after.destination, after.destination_port), (socket.ip(), socket.port()));
    assert_eq!((after.source, after.source_port), (before.source, before.source_port));
    assert_eq!((after.seq, after.protocol), (before.seq, before.protocol));
    assert_eq!(packet.len(), original.len());
}
