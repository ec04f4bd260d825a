//! `gue` mode: what goes into tunnels, and what has no room there (`I3`).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use shunt_host::Source;
use shunt_stack::time::Instant;
use shunt_stack::wire::gue::{decapsulate, payload};
use shunt_stack::wire::{Packet, Segment, TcpFlags, icmp_message};

use super::{Cast, casts, three_servers};
use crate::tunnel::{Hop, Hops, Tunnels};
use crate::{Balancer, Config, DropReason, Memory, Output, SelectKey};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// This host's own address on the way to a server.
fn own(server: IpAddr) -> IpAddr {
    if server.is_ipv4() { ip("10.0.0.254") } else { ip("fd00::fe") }
}

fn hops() -> Hops {
    let ends = casts().into_iter().flat_map(|cast| cast.servers);
    ends.map(|end| (end, Hop { source: own(end), mtu: 1500 })).collect()
}

fn tunnelling(hops: &Hops, more: &str) -> Balancer {
    let text = three_servers("forward = \"gue\"") + more;
    let config = Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"));
    Balancer::new(&config, SelectKey([1; 16])).through(Tunnels::new(&config, hops))
}

/// A segment of so many bytes in all.
fn sized(cast: &Cast, port: u16, length: usize) -> Packet {
    let headers = if cast.vip.is_ipv4() { 40 } else { 60 };
    let payload = vec![7; length - headers];
    Segment { payload: &payload, ..Segment::bare(cast.client(), cast.vip(port), TcpFlags::ACK) }.emit()
}

/// What a router says of a packet.
fn too_big_for(router: IpAddr, packet: &Packet, mtu: u16) -> Packet {
    let [high, low] = mtu.to_be_bytes();
    let mut message = if router.is_ipv4() { vec![3, 4, 0, 0, 0, 0] } else { vec![2, 0, 0, 0, 0, 0] };
    message.extend([high, low]);
    message.extend_from_slice(&packet.bytes()[..packet.transport_offset() + 8]);
    icmp_message(router, packet.source(), &message)
}

#[test]
fn packets_travel_unchanged_inside_and_the_source_port_is_the_flows() {
    let balancer = tunnelling(&hops(), "");
    for cast in casts() {
        let mut ports = BTreeSet::new();
        for client in 50_000..50_100 {
            let client = SocketAddr::new(cast.client, client);
            let original =
                super::segment(client, cast.vip(41_002), TcpFlags::ACK, shunt_stack::wire::SeqNumber(9));
            let mut outer = [original.clone(), original.clone()];
            for packet in &mut outer {
                assert_eq!(balancer.process(packet), Ok(Output::Main));
                assert_eq!((packet.source(), packet.destination()), (own(cast.servers[1]), cast.servers[1]));
                assert!(packet.checksum_ok());
                let inside = payload(&packet.bytes()[packet.transport_offset() + 8..]);
                assert_eq!(inside, Ok(original.bytes()));
            }
            let [one, other] = outer.map(|packet| packet.ports().unwrap());
            assert_eq!(one, other, "a flow has one source port");
            assert!(one.0 >= 49_152 && one.1 == 6080);
            ports.insert(one.0);
        }
        assert!(ports.len() > 90, "{}", ports.len());
    }
}

#[test]
fn an_inner_packet_goes_over_the_other_family_where_its_own_has_no_way() {
    let mut only_v4 = hops();
    only_v4.retain(|end, _| end.is_ipv4());
    let balancer = tunnelling(&only_v4, "");
    let [v4, v6] = casts();
    let mut packet = v6.ack(41_001);
    assert_eq!(balancer.process(&mut packet), Ok(Output::Main));
    assert_eq!(packet.destination(), v4.servers[0]);
    assert_eq!(payload(&packet.bytes()[28..]), Ok(v6.ack(41_001).bytes()));
    only_v4.remove(&v4.servers[0]);
    let balancer = tunnelling(&only_v4, "");
    let before = v4.ack(41_001);
    let mut packet = before.clone();
    assert!(matches!(balancer.process(&mut packet), Err(DropReason::NoConnector(_))));
    assert_eq!(packet, before);
    assert_eq!(balancer.snapshot().drops["no_connector"], 1);
}

#[test]
fn i3_what_has_no_room_is_answered_and_routers_on_the_way_are_believed() {
    let balancer = tunnelling(&hops(), "");
    for cast in casts() {
        let overhead = if cast.vip.is_ipv4() { 32 } else { 52 };
        let mut memory = Memory::new(&balancer);
        let second = |n: u64| Instant::from_millis(n * 1000);
        let fits = |memory: &mut Memory, now, length: usize| {
            let mut packet = sized(&cast, 41_001, length);
            assert_eq!(balancer.handle(memory, now, &mut packet), Ok(Output::Main));
            match packet.icmp() {
                None => Ok(packet),
                Some(icmp) => {
                    assert!(packet.checksum_ok() && packet.destination() == cast.client);
                    Err(icmp.mtu().unwrap() as usize)
                }
            }
        };
        assert_eq!(fits(&mut memory, second(1), 1500), Err(1500 - overhead));
        assert_eq!(fits(&mut memory, second(1), 1501 - overhead), Err(1500 - overhead));
        let outer = fits(&mut memory, second(1), 1500 - overhead).unwrap();
        assert_eq!(outer.len(), 1500);

        // A router on the way has room for 1,400 bytes; what others say of packets that are not ours is not heard.
        let tell = |memory: &mut Memory, now, packet: &Packet, mtu| {
            let mut error = too_big_for(cast.router, packet, mtu);
            let before = error.clone();
            assert_eq!(balancer.handle(memory, now, &mut error), Ok(Output::Main));
            assert_eq!(error, before, "the kernel gets to see it");
        };
        let mut forged = outer.clone();
        forged.set_source_port(53);
        tell(&mut memory, second(2), &forged, 1300);
        let mut forged = outer.clone();
        forged.set_destination_port(53);
        tell(&mut memory, second(2), &forged, 1300);
        let mut forged = outer.clone();
        forged.set_source(cast.router);
        tell(&mut memory, second(2), &forged, 1300);
        assert_eq!(fits(&mut memory, second(2), 1500), Err(1500 - overhead));
        tell(&mut memory, second(3), &outer, 1400);
        tell(&mut memory, second(3), &outer, 1450);
        assert_eq!(fits(&mut memory, second(4), 1500), Err(1400 - overhead));
        assert_eq!(fits(&mut memory, second(4), 1400 - overhead).unwrap().len(), 1400);
        // Nobody is told to send less than every host must be able to receive.
        tell(&mut memory, second(5), &outer, 68);
        let least = if cast.vip.is_ipv4() { 576 } else { 1280 };
        assert_eq!(fits(&mut memory, second(6), 1400), Err(least));
        let mut lost = sized(&cast, 41_001, least);
        let reason = DropReason::TooBig(least as u16);
        assert_eq!(balancer.handle(&mut memory, second(6), &mut lost), Err(reason));
        // Paths change: after ten minutes it is tried again.
        assert_eq!(fits(&mut memory, second(606), 1500), Err(1500 - overhead));
    }
    assert_eq!(balancer.snapshot().path_mtu_changes, 4);
    assert_eq!(balancer.snapshot().decisions["too_big"], 12);
}

#[test]
fn i3_answers_are_limited_and_counted() {
    let balancer = tunnelling(&hops(), "[limits]\nanswers_per_second = 5\n");
    let [cast, _] = casts();
    let mut memory = Memory::new(&balancer);
    let now = Instant::from_millis(10_000);
    let answered = (0..20).filter(|_| {
        let mut packet = sized(&cast, 41_001, 1500);
        balancer.handle(&mut memory, now, &mut packet).is_ok()
    });
    assert_eq!(answered.count(), 5);
    assert_eq!(balancer.snapshot().drops["answer_limit"], 15);
}

#[test]
fn what_may_be_fragmented_travels_in_outer_packets_that_may() {
    let balancer = tunnelling(&hops(), "");
    let [cast, _] = casts();
    let mut bytes = sized(&cast, 41_001, 1500).bytes().to_vec();
    // Without DF; a checksum is not looked at by who forwards.
    bytes[6] = 0;
    let mut memory = Memory::new(&balancer);
    let mut identifications = BTreeSet::new();
    for _ in 0..10 {
        let mut packet = Packet::from_slice(&bytes).unwrap();
        assert_eq!(balancer.handle(&mut memory, Instant::ZERO, &mut packet), Ok(Output::Main));
        assert_eq!((packet.len(), packet.bytes()[6]), (1532, 0));
        assert_eq!(decapsulate(&packet.bytes()[28..], 0).map(|inner| inner.len()), Ok(1500));
        identifications.insert([packet.bytes()[4], packet.bytes()[5]]);
    }
    assert_eq!(identifications.len(), 10, "RFC 6864: their fragments must not be mixed up");
}

#[test]
fn a_mark_is_put_on_both_headers() {
    let text = three_servers("forward = \"gue\"")
        .replace("redirect_port = 443", "redirect_port = 443\nmark_dscp = 18");
    let config = Config::parse(&Source::new("test.toml", text)).unwrap();
    let balancer = Balancer::new(&config, SelectKey([1; 16])).through(Tunnels::new(&config, &hops()));
    for cast in casts() {
        let mut packet = cast.ack(41_001);
        balancer.process(&mut packet).unwrap();
        assert_eq!(packet.dscp(), 18);
        let inside = decapsulate(&packet.bytes()[packet.transport_offset() + 8..], packet.traffic_class());
        assert_eq!(inside.map(|inner| inner.dscp()), Ok(18));
    }
}
