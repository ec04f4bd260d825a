//! Forwarding with nothing rewritten above the link: what leaves the balancer is what came, and answers do not pass it.

mod common;

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use common::tape::{Packets, Tape, packets_of, together};
use common::{Family, Net, Options, Way};
use shunt_lab::{Direction, ETHERNET_HEADER, Host, Impairment};
use shunt_stack::wire::Packet;

/// The MAC of a host's interface.
fn mac(host: &Host, device: &str) -> Vec<u8> {
    let mut command = Command::new("ip");
    command.args(["-o", "link", "show", device]);
    let output = host.run_within(&mut command, Duration::from_secs(10)).expect("ip is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, rest) = text.split_once("link/ether ").unwrap_or_else(|| panic!("no MAC: {text}"));
    let octet = |part: &str| u8::from_str_radix(part, 16).expect("a MAC");
    rest.split(' ').next().expect("a MAC").split(':').map(octet).collect()
}

#[test]
fn o19_a_neighbour_that_nobody_answers_for_is_told_and_counted() {
    let mut net = Net::new(Options { forward: "datalink", servers: 1, ..Options::default() });
    net.start_nginx();
    assert!(net.curl(Family::V4, "/", &[]).ok, "{}", net.logs());
    net.servers[0].host.set_up("eth0", false).expect("a device");
    let mut command = Command::new("ip");
    command.args(["neigh", "flush", "dev", "eth1"]);
    net.balancer.run_within(&mut command, Duration::from_secs(10)).expect("ip is installed");
    let failed = net.curl(Family::V4, "/", &["--connect-timeout", "5"]);
    assert!(!failed.ok, "{failed:?}");
    println!("the client is told: {}", failed.error);
    net.wait_for_balancer("nobody answers for its next hop", 1);
    net.servers[0].host.set_up("eth0", true).expect("a device");
    let counts = net.stop_balancer_and_count();
    assert!(counts.of("shunt_balancer_server_unresolved_total{server=\"s1\"}") >= 1, "{counts:?}");
}

#[test]
fn o19_datalink_forwarding_changes_the_mac_alone_and_answers_go_straight_to_the_client() {
    let access = Some(Impairment::default());
    let mut net =
        Net::new(Options { forward: "datalink", servers: 3, taps: true, access, ..Options::default() });
    net.start_nginx();
    net.start_shim("auto");
    let sent = Tape::record(net.access.as_ref().expect("a tap"), Direction::Forward);
    let tape = |link: &Option<_>| Tape::record(link.as_ref().expect("a tap"), Direction::Forward);
    let received: Vec<Tape> = net.servers.iter().map(|server| tape(&server.link)).collect();
    let file = net.make_file("file", 2);
    for family in Family::BOTH {
        let vip: IpAddr = family.vip().parse().expect("an address");
        let tally = net.connections(family, 30, 3);
        assert!(tally.broken.is_empty() && tally.redirected == 30, "{tally:?}\n{}", net.logs());
        assert_eq!(tally.servers.len(), 3, "{tally:?}");
        for way in Way::BOTH {
            assert!(net.transfer(family, way, &file).redirected, "{}", net.logs());
        }
        // The last ACKs are under way.
        std::thread::sleep(Duration::from_millis(300));
        let left = packets_of(&sent.take(), vip);
        let mut arrived: Vec<Packets> = Vec::new();
        for (server, tape) in net.servers.iter().zip(&received) {
            let (frames, own) = (tape.take(), mac(&server.host, "eth0"));
            for frame in &frames {
                let packet = Packet::from_slice(&frame[ETHERNET_HEADER..]);
                let to_vip = packet.as_ref().is_ok_and(|packet| packet.destination() == vip);
                if !to_vip {
                    continue;
                }
                assert_eq!(frame[..6], own, "{family:?}: the MAC is {}'s", server.name());
                let packet = packet.expect("it was read before");
                assert!(packet.checksum_ok());
                // The shim's device, the router, the balancer's two devices; the kernel by itself takes one of a host.
                assert!((60..=62).contains(&packet.hop_limit()), "{packet:?}");
            }
            arrived.push(packets_of(&frames, vip));
        }
        let arrived = together(arrived);
        println!("{family:?}: {} packets from the client, all of them unchanged at a server", left.len());
        assert!(left.len() > 1000, "{}", left.len());
        assert!(left == arrived, "{family:?}: {} packets left, {} arrived", left.len(), arrived.len());
    }
    net.stop_shim();
    for family in Family::BOTH {
        let tally = net.connections(family, 40, 4);
        assert!(tally.broken.is_empty() && tally.plain == 40, "{tally:?}\n{}", net.logs());
    }
    // Not one answer came by the balancer: all of its devices' packets went to servers.
    let back = net.balancer.counters("eth1").expect("counters");
    let forth = net.balancer.counters("eth0").expect("counters");
    println!("eth1 {back:?}, eth0 {forth:?}");
    assert!(back.rx_packets < 300 && back.tx_packets > 3000, "{back:?}");
    assert!(forth.tx_packets < 300, "{forth:?}");
    let counts = net.stop_balancer_and_count();
    assert_eq!(counts.decided("to_client"), 0);
    assert!(counts.decided("owner") > 1000 && counts.decided("selected") >= 60, "{counts:?}");
}
