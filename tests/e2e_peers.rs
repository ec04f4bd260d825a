//! What other balancers got wrong (`PEERS_BUGS.md`) and only a whole network shows.

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use common::tape::Tape;
use common::{Family, Net, OTHER, Options, kernel_counter};
use shunt_lab::{Direction, ETHERNET_HEADER};
use shunt_stack::wire::{Packet, Protocol as Transport, Segment, TcpFlags, gue};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Hop limits that are tried: more than there are routers.
const MOST_HOPS: u8 = 8;
/// Packets tell by their source ports with which limit they were sent.
const FIRST_PORT: u16 = 50_000;
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends a SYN with each hop limit from the client.
fn send_all(net: &Net, family: Family) {
    let (domain, own) = match family {
        Family::V4 => (Domain::IPV4, "10.1.0.2"),
        Family::V6 => (Domain::IPV6, "fd00:1::2"),
    };
    let vip = SocketAddr::new(family.vip().parse().expect("an address"), OTHER);
    let own: IpAddr = own.parse().expect("an address");
    let open = || Socket::new(domain, Type::RAW, Some(Protocol::from(255))).expect("root may");
    let socket = net.client.enter(open).expect("a namespace");
    for hops in 1..=MOST_HOPS {
        let from = SocketAddr::new(own, FIRST_PORT + u16::from(hops));
        let mut bytes = Segment::bare(from, vip, TcpFlags::SYN).emit().bytes().to_vec();
        // The kernel makes the IPv4 header's checksum.
        bytes[if family == Family::V4 { 8 } else { 7 }] = hops;
        socket.send_to(&bytes, &SockAddr::from(SocketAddr::new(vip.ip(), 0))).expect("a route");
    }
}

/// What arrived: by the limit it was sent with, the one it had. Tunnels are opened.
fn arrived(tape: &Tape, into: &mut BTreeMap<u8, u8>) {
    for frame in tape.take() {
        let Ok(outer) = Packet::from_slice(&frame[ETHERNET_HEADER..]) else { continue };
        let datagram = outer.bytes().get(outer.transport_offset() + 8..).unwrap_or_default();
        let tunnel = outer.protocol() == Transport::Udp;
        let inner = tunnel.then(|| gue::decapsulate(datagram, 0).ok()).flatten();
        let packet = inner.unwrap_or(outer);
        let Some((source, _)) = packet.ports() else { continue };
        if (FIRST_PORT..=FIRST_PORT + u16::from(MOST_HOPS)).contains(&source) {
            into.insert((source - FIRST_PORT) as u8, packet.hop_limit());
        }
    }
}

/// cilium#27299: a forwarder that takes no hops makes loops that never end, and is not seen by traceroute.
#[test]
fn every_way_of_forwarding_takes_hops_and_who_has_none_left_is_told() {
    for forward in ["network", "direct", "datalink", "gue"] {
        let net = Net::new(Options { servers: 1, forward, taps: true, ..Options::default() });
        let tape = Tape::record(net.servers[0].link.as_ref().expect("a tap"), Direction::Forward);
        for (family, counter) in Family::BOTH.into_iter().zip(["IcmpInTimeExcds", "Icmp6InTimeExcds"]) {
            let told = || kernel_counter(&net.client, counter);
            let before = told();
            send_all(&net, family);
            let mut met = BTreeMap::new();
            let end = Instant::now() + PATIENCE;
            while met.len() + ((told() - before) as usize) < usize::from(MOST_HOPS) && Instant::now() < end {
                thread::sleep(Duration::from_millis(20));
                arrived(&tape, &mut met);
            }
            let taken = MOST_HOPS - met.len() as u8;
            println!("{forward} {family:?}: {taken} hops");
            // The router in the middle takes one, the balancer's host at least one.
            assert!((2..MOST_HOPS).contains(&taken), "{forward} {family:?}: {met:?}\n{}", net.logs());
            for (sent, left) in met {
                assert_eq!(left, sent - taken, "{forward} {family:?}: sent with {sent}");
            }
            assert_eq!(told() - before, u64::from(taken), "{forward} {family:?}: each is told once");
        }
    }
}
