//! `forward = "gue"`: servers anywhere in a routed network, reached through tunnels; answers do not pass the balancer.

mod common;

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use common::{Family, Narrow, Net, Options, Way, kernel_counter};

fn transfers(net: &Net, mebibytes: u64) {
    let file = net.make_file("file", mebibytes);
    for family in Family::BOTH {
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            println!(
                "gue {family:?} {way:?}: {mebibytes} MiB, {:.0} Mbit/s: {}",
                done.megabits(),
                done.command
            );
            assert!(done.redirected, "{done:?}\n{}", net.logs());
        }
    }
}

#[test]
fn gue_clients_are_redirected_and_what_does_not_fit_the_tunnel_is_told_to_them() {
    let mut net = Net::new(Options { forward: "gue", servers: 3, ..Options::default() });
    net.start_nginx();
    for family in Family::BOTH {
        let tally = net.connections(family, 40, 4);
        assert!(tally.broken.is_empty() && tally.plain == 40, "{tally:?}\n{}", net.logs());
        assert_eq!(tally.servers.len(), 3, "{tally:?}");
    }
    for continuation in ["reconnect", "handover"] {
        net.start_shim(continuation);
        for family in Family::BOTH {
            let tally = net.connections(family, 40, 4);
            println!("{continuation} {family:?}: {tally:?}");
            assert!(tally.broken.is_empty() && tally.redirected == 40, "{tally:?}\n{}", net.logs());
        }
        net.stop_shim();
    }
    net.start_shim("auto");
    transfers(&net, 64);
    net.stop_shim();
    // Uploads of full segments do not fit into tunnels over links of 1,500 bytes: the client was told and obeyed (I3).
    for counter in ["IcmpInDestUnreachs", "Icmp6InPktTooBigs"] {
        assert!(kernel_counter(&net.client, counter) > 0, "{counter}");
    }
    let balancer = net.balancer.counters("eth0").expect("counters");
    println!("the balancer's link: {balancer:?}");
    let counts = net.stop_balancer_and_count();
    assert!(counts.decided("too_big") > 0 && counts.dropped("too_big") == 0, "{counts:?}");
    assert_eq!((counts.decided("to_client"), counts.dropped("tunnel")), (0, 0));
    // The 128 MiB that servers sent did not come by here.
    assert!(balancer.rx_bytes < 2 * (64 << 20) + (48 << 20), "{balancer:?}");
}

#[test]
fn i3_a_narrow_link_far_behind_the_balancer_stops_no_upload() {
    let mut net =
        Net::new(Options { forward: "gue", servers: 2, narrow: Some(Narrow::Servers), ..Options::default() });
    net.start_nginx();
    net.start_shim("auto");
    transfers(&net, 16);
    net.stop_shim();
    let counts = net.stop_balancer_and_count();
    // One path of each family, at each server that was met.
    let changes = counts.of("shunt_balancer_path_mtu_changes_total");
    println!("{changes} path MTUs were learnt, {} packets answered", counts.decided("too_big"));
    assert!((2..=4).contains(&changes), "{counts:?}");
    assert!(counts.decided("too_big") > 1, "{counts:?}");
}

/// `add` or `del`: no way leads from the balancer to the second server.
fn unreachable(net: &Net, what: &str) {
    for (family, address) in [("-4", "10.3.0.12/32"), ("-6", "fd00:3::12/128")] {
        let mut command = Command::new("ip");
        command.args([family, "route", what, "unreachable", address]);
        let output = net.balancer.run_within(&mut command, Duration::from_secs(10)).expect("ip is installed");
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn gue_servers_are_used_while_a_route_leads_to_them() {
    let mut net = Net::new(Options { forward: "gue", servers: 2, start: false, ..Options::default() });
    unreachable(&net, "add");
    net.start_balancer();
    net.start_agent(1);
    net.start_agent(2);
    net.start_nginx();
    net.start_shim("auto");
    let met = |net: &Net| -> usize {
        let all = Family::BOTH.map(|family| {
            let tally = net.connections(family, 16, 2);
            assert!(tally.broken.is_empty() && tally.redirected == 16, "{tally:?}\n{}", net.logs());
            tally.servers.len()
        });
        assert_eq!(all[0], all[1]);
        all[0]
    };
    assert_eq!(met(&net), 1);
    unreachable(&net, "del");
    net.wait_for_balancer("a route leads to this server", 2);
    assert_eq!(met(&net), 2);
    unreachable(&net, "add");
    net.wait_for_balancer("no route leads to this server any more", 2);
    assert_eq!(met(&net), 1);
    net.stop_shim();
    net.stop_balancer_and_count();
}

#[test]
fn gue_tunnels_of_strangers_and_datagrams_that_are_none_are_dropped_and_counted() {
    let mut net = Net::new(Options { forward: "gue", servers: 1, ..Options::default() });
    net.start_nginx();
    assert!(net.curl(Family::V4, "/", &[]).ok, "{}", net.logs());
    let send = |host: &shunt_lab::Host, bytes: &[u8]| {
        host.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            socket.send_to(bytes, "10.3.0.11:6080").expect("sent");
        })
        .expect("a namespace");
    };
    // An inner packet for the VIP, and one for somebody else.
    let inner = |to: [u8; 4]| {
        let mut packet = vec![0, 4, 0, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1];
        packet.extend(to);
        packet.extend([0x10, 0, 0x1b, 0x58, 0, 8, 0, 0]);
        packet
    };
    send(&net.client, &inner([203, 0, 113, 10]));
    send(&net.balancer, &inner([10, 3, 0, 11]));
    send(&net.balancer, b"no tunnel's");
    std::thread::sleep(Duration::from_millis(300));
    let mut agent = net.servers[0].agent.take().expect("the agent runs");
    agent.terminate(Duration::from_secs(10)).expect("the agent ends");
    let log = agent.log().expect("a log");
    for counted in ["strangers: 1", "malformed: 1", "foreign: 1"] {
        let tunnels = log.rsplit("DecapsulateCounters").next().expect("a last line");
        assert!(tunnels.split('}').next().expect("counters").contains(counted), "{counted}: {log}");
    }
}
