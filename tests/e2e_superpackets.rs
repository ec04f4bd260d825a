//! Packets of up to 64 KiB pass shim, balancer and agent in one piece, and arrive as what was sent; with
//! `super_packets = false` they pass as links carry them.

mod common;

use std::net::{Ipv6Addr, UdpSocket};
use std::time::Duration;

use common::datagrams::{socket, with_udp};
use common::{BalancerCounts, Family, Net, OTHER_SERVICE, Options, Way};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;

const MEBIBYTES: u64 = 64;

/// The table of all three files.
fn host(super_packets: bool) -> String {
    format!("[host]\nsuper_packets = {super_packets}")
}

/// All of a connection's packets pass the agents, too.
fn network(super_packets: bool) -> Net {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    let text = with_udp(&net.balancer_config(|_| Some("up")));
    // Nor does the kernel take them from the balancer.
    net.start_balancer_with(&format!("{text}\n{}\noffload = \"off\"\n", host(super_packets)));
    for number in 1..=2 {
        net.start_agent_with(number, &format!("divert = \"all\"\n{}", host(super_packets)));
    }
    net
}

fn supers(counts: &BalancerCounts) -> u64 {
    assert_eq!(counts.of("shunt_balancer_device_errors_total"), 0);
    assert_eq!(counts.of("shunt_balancer_segmented_total"), 0);
    counts.of("shunt_balancer_super_packets_total")
}

fn bulk(super_packets: bool) {
    let mut net = network(super_packets);
    net.start_nginx();
    let file = net.make_file("bulk", MEBIBYTES);
    net.start_shim_keys("auto", &host(super_packets));
    for family in Family::BOTH {
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            assert!(done.redirected, "{done:?}\n{}", net.logs());
            println!("super_packets = {super_packets}, {family:?} {way:?}: {:.0} Mbit/s", done.megabits());
        }
    }
    net.stop_shim();
    let passed = supers(&net.stop_balancer_and_count());
    println!("super_packets = {super_packets}: {passed}");
    // 256 MiB in pieces of at most 64 KiB are 4,096; how long they get depends on the machine's load.
    assert!(if super_packets { passed >= 16 * MEBIBYTES } else { passed == 0 }, "{passed} super-packets");
}

#[test]
fn bulk_passes_in_one_piece() {
    bulk(true);
}

#[test]
fn bulk_passes_packet_by_packet_where_super_packets_are_switched_off() {
    bulk(false);
}

/// Datagrams of one write, and their size: 40,000 bytes.
const DATAGRAMS: usize = 40;
const SIZE: u16 = 1000;

fn datagrams(super_packets: bool) {
    let mut net = network(super_packets);
    let port = OTHER_SERVICE + 1;
    let bind = || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).expect("the port is free");
    let server = net.servers[0].host.enter(bind).expect("a namespace");
    server.set_read_timeout(Some(Duration::from_secs(2))).expect("a time-out");
    for family in Family::BOTH {
        let client = socket(&net, family, port);
        setsockopt(&client, UdpGsoSegment, &i32::from(SIZE)).expect("the kernel cuts datagrams");
        let content: Vec<u8> = (0..DATAGRAMS * usize::from(SIZE) - 1).map(|at| (at % 251) as u8).collect();
        // The first packets wait for a neighbour, and are not many that may.
        client.send(&content[..1]).expect("a datagram leaves");
        let mut buffer = vec![0; 65_536];
        let (_, from) = server.recv_from(&mut buffer).expect("a datagram arrives");
        assert_eq!(client.send(&content).expect("a super-packet leaves"), content.len());
        for expected in content.chunks(usize::from(SIZE)) {
            let length = server.recv(&mut buffer).unwrap_or_else(|error| panic!("{error}\n{}", net.logs()));
            assert_eq!(&buffer[..length], expected);
        }
        // What comes back is cut on the way as well, and joined by nobody.
        setsockopt(&server, UdpGsoSegment, &i32::from(SIZE)).expect("the kernel cuts datagrams");
        client.set_read_timeout(Some(Duration::from_secs(2))).expect("a time-out");
        server.send_to(&content, from).expect("a super-packet leaves");
        for expected in content.chunks(usize::from(SIZE)) {
            let length = client.recv(&mut buffer).unwrap_or_else(|error| panic!("{error}\n{}", net.logs()));
            assert_eq!(&buffer[..length], expected);
        }
        setsockopt(&server, UdpGsoSegment, &0).expect("the kernel cuts datagrams");
    }
    let counts = net.stop_balancer_and_count();
    assert_eq!(supers(&counts), if super_packets { 4 } else { 0 });
    // Servers' counters are those of the segments, either way.
    let to_server = "shunt_balancer_server_packets_total{server=\"s1\"}";
    assert_eq!(counts.of(to_server), 2 * (1 + DATAGRAMS as u64));
}

#[test]
fn datagrams_that_one_write_made_pass_in_one_piece_or_packet_by_packet() {
    datagrams(true);
    datagrams(false);
}
