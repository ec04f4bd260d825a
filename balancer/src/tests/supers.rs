//! Super-packets: decided about once, counted as what links carry.

use bytes::BytesMut;
use shunt_stack::time::Instant;
use shunt_stack::wire::{Gso, GsoKind, Offload, Packet, Segment, SeqNumber, TcpFlags, checksum::Sum};

use super::{balancer, casts, three_servers};
use crate::{DropReason, Limit, Output};

const SIZE: u16 = 1000;

/// `bytes` of payload whose checksum is left to the device.
fn super_packet(source: std::net::SocketAddr, destination: std::net::SocketAddr, bytes: usize) -> Packet {
    let bare = Segment::bare(source, destination, TcpFlags::ACK);
    let whole = Segment { seq: SeqNumber(7), payload: &vec![7; bytes], ..bare }.emit();
    let at = whole.transport_offset();
    let pseudo =
        Sum::new().add_pseudo_header(source.ip(), destination.ip(), 6, whole.len() - at).fold().to_be_bytes();
    let mut buffer = BytesMut::from(whole.bytes());
    buffer[at + 16..at + 18].copy_from_slice(&pseudo);
    let kind = if source.is_ipv4() { GsoKind::TcpV4 } else { GsoKind::TcpV6 };
    let gso = Some(Gso { kind, size: SIZE, ecn: false });
    Packet::parse(buffer, Offload { partial_checksum: true, gso }).unwrap()
}

#[test]
fn a_super_packet_leaves_as_one_and_counts_as_its_segments() {
    for cast in casts() {
        let balancer = balancer(&three_servers(""));
        let there = super_packet(cast.client(), cast.vip(41002), 40_500);
        let server = std::net::SocketAddr::new(cast.servers[1], 41002);
        let back = super_packet(server, cast.client(), 3001);
        for packet in [&there, &back] {
            let mut out = packet.clone();
            assert_eq!(balancer.process(&mut out), Ok(Output::Main));
            assert_eq!((out.offload(), out.len(), out.checksum_ok()), (packet.offload(), packet.len(), true));
            // What the kernel will make of it is right.
            assert!(out.segments().all(|segment| segment.checksum_ok()
                && (segment.source(), segment.destination()) == (out.source(), out.destination())));
        }
        let snapshot = balancer.snapshot();
        assert_eq!(snapshot.super_packets, 2);
        assert_eq!((snapshot.decisions["owner"], snapshot.decisions["to_client"]), (1, 1));
        let server = snapshot.servers["web-2"];
        assert_eq!((server.packets, server.bytes), (41, there.segmented_len() as u64));
        assert_eq!((server.packets_back, server.bytes_back), (4, back.segmented_len() as u64));
        assert!(there.segmented_len() > there.len() && back.segmented_len() > back.len());
    }
}

#[test]
fn b6_limits_count_a_super_packets_segments() {
    let limited = "redirect_port = 443\nlimit = { packets_per_s = 1000, burst_ms = 100 }\n";
    let balancer = balancer(&three_servers("").replace("redirect_port = 443\n", limited));
    balancer.advance(Instant::from_millis(1000));
    let cast = casts()[0];
    let packet = super_packet(cast.client(), cast.vip(41001), 40_000);
    let passed = (0..10).take_while(|_| balancer.process(&mut packet.clone()).is_ok()).count();
    // Two of 40 segments fit the 100, the third overdraws.
    assert_eq!(passed, 3);
    assert_eq!(balancer.process(&mut packet.clone()), Err(DropReason::Limited(Limit::Packets)));
}
