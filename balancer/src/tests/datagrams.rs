//! UDP (§6) and protocols without ports (O12): a described packet, its route, and the bytes that leave.

use std::net::SocketAddr;

use shunt_stack::wire::{Packet, SeqNumber, TcpFlags};

use super::packets::{datagram, error, quoted_packet, segment, udp};
use super::{balancer, casts, decision, processed, three_servers, with_udp};
use crate::{Decision, DropReason, Output, Route};

#[test]
fn o12_a_service_port_leads_to_its_owner_and_the_answer_comes_from_the_vip() {
    let balancer = balancer(&with_udp("", ""));
    for cast in casts() {
        for (index, port) in [(0, 41001), (1, 41002), (2, 41003)] {
            let packet = udp(cast.client(), cast.vip(port), b"question");
            assert_eq!(decision(&balancer, &packet), Ok((index, Decision::Owner)));
            let out = processed(&balancer, &packet);
            assert_eq!(out.destination_socket(), Some(SocketAddr::new(cast.servers[index], port)));
            let answer = udp(SocketAddr::new(cast.servers[index], port), cast.client(), b"answer");
            assert_eq!(processed(&balancer, &answer).source_socket(), Some(cast.vip(port)));
        }
        // A port of another server, or of nobody, is not answered from.
        let foreign = udp(SocketAddr::new(cast.servers[0], 41002), cast.client(), b"");
        assert_eq!(balancer.route(&foreign), Ok(Route::Unchanged));
        let unknown = udp(cast.client(), cast.vip(80), b"");
        assert_eq!(balancer.route(&unknown), Err(DropReason::UnknownPort(80)));
    }
}

#[test]
fn o12_a_flow_to_a_redirect_port_stays_together_and_flows_spread() {
    let balancer = balancer(&with_udp("", ""));
    for cast in casts() {
        let mut seen = [0; 3];
        for port in 20_000..20_300 {
            let client = SocketAddr::new(cast.client, port);
            let (server, why) = decision(&balancer, &udp(client, cast.vip(443), b"one")).unwrap();
            assert_eq!(why, Decision::Datagram);
            assert_eq!(decision(&balancer, &udp(client, cast.vip(443), b"another")).unwrap().0, server);
            let answer = udp(SocketAddr::new(cast.servers[server], 443), client, b"answer");
            assert_eq!(processed(&balancer, &answer).source_socket(), Some(cast.vip(443)));
            seen[server] += 1;
        }
        assert!(seen.iter().all(|count| *count > 60), "{seen:?}");
    }
}

#[test]
fn o12_flows_survive_a_change_of_the_set_as_maglev_can() {
    let all = balancer(&with_udp("", ""));
    let fewer =
        balancer(&with_udp("", "").replace("name = \"web-2\"\n", "name = \"web-2\"\nstate = \"drain\"\n"));
    let cast = casts()[0];
    let (mut moved, mut kept) = (0, 0);
    for port in 20_000..21_000 {
        let packet = udp(SocketAddr::new(cast.client, port), cast.vip(443), b"");
        let (before, after) = (decision(&all, &packet).unwrap().0, decision(&fewer, &packet).unwrap().0);
        assert_ne!(after, 1, "B7");
        match before {
            1 => {}
            _ if before == after => kept += 1,
            _ => moved += 1,
        }
    }
    println!("draining 1 of 3 moved {moved} of {} flows that were not its own", moved + kept);
    assert!(moved * 8 < kept, "{moved} of {}", moved + kept);
    // Its service port goes on (B7).
    assert_eq!(decision(&fewer, &udp(cast.client(), cast.vip(41002), b"")), Ok((1, Decision::Owner)));
}

#[test]
fn o12_datagrams_can_be_chosen_for_one_by_one() {
    for (policy, exact) in [("random", false), ("round-robin", true)] {
        let balancer = balancer(&with_udp("", &format!("udp_policy = \"{policy}\"")));
        for cast in casts() {
            let packet = udp(cast.client(), cast.vip(443), b"");
            let mut seen = [0; 3];
            for _ in 0..600 {
                seen[decision(&balancer, &packet).unwrap().0] += 1;
            }
            if exact {
                assert_eq!(seen, [200; 3]);
            }
            assert!(seen.iter().all(|count| *count > 120), "{policy}: {seen:?}");
            // Whose answer an error is about cannot be told.
            let about = error(cast.router, cast.vip, &udp(cast.vip(443), cast.client(), b"x"), 8);
            assert!(matches!(balancer.route(&about), Err(DropReason::IcmpQuote { .. })));
        }
    }
}

#[test]
fn o12_without_a_server_that_is_up_the_default_server_is_left() {
    let text = |more| with_udp(more, "").replace("ports =", "state = \"down\"\nports =");
    for cast in casts() {
        let packet = udp(cast.client(), cast.vip(443), b"");
        assert_eq!(balancer(&text("")).route(&packet), Err(DropReason::NoServer(443)));
        let with = balancer(&text("default_server = \"web-1\""));
        assert_eq!(decision(&with, &packet), Ok((0, Decision::Default(DropReason::NoServer(443)))));
    }
}

#[test]
fn o12_tcp_and_udp_services_do_not_mix() {
    let service = "redirect_port = 443\n";
    let udp_only =
        balancer(&three_servers("").replace(service, &format!("{service}protocols = [\"udp\"]\n")));
    let tcp_only = balancer(&three_servers(""));
    for cast in casts() {
        let segment = |port| segment(cast.client(), cast.vip(port), TcpFlags::ACK, SeqNumber(1));
        for port in [443, 41001] {
            assert_eq!(udp_only.route(&segment(port)), Err(DropReason::UnknownPort(port)));
            let datagram = udp(cast.client(), cast.vip(port), b"");
            assert_eq!(tcp_only.route(&datagram), Err(DropReason::Protocol(17)));
            let answer = udp(SocketAddr::new(cast.servers[0], port), cast.client(), b"");
            assert_eq!(tcp_only.route(&answer), Ok(Route::Unchanged));
        }
    }
}

#[test]
fn o12_a_udp_checksum_of_zero_stays_zero_in_ipv4() {
    let balancer = balancer(&with_udp("", ""));
    let cast = casts()[0];
    let mut bytes = udp(cast.client(), cast.vip(41001), b"unchecked").bytes().to_vec();
    bytes[26..28].fill(0);
    let out = processed(&balancer, &Packet::from_slice(&bytes).unwrap());
    assert_eq!(out.bytes()[26..28], [0, 0]);
    // And one that becomes zero is written as its other form.
    for n in 0..=u16::MAX {
        let packet = udp(cast.client(), cast.vip(41001), &n.to_be_bytes());
        let mut out = packet.clone();
        assert_eq!(balancer.process(&mut out), Ok(Output::Main));
        assert!(out.bytes()[26..28] != [0, 0] && out.checksum_ok());
    }
}

#[test]
fn i1_and_i5_errors_about_datagrams_find_their_way_in_both_directions() {
    let balancer = balancer(&with_udp("", ""));
    for cast in casts() {
        // About a server's answer, from a service port and from the redirect port.
        let (owner, _) = decision(&balancer, &udp(cast.client(), cast.vip(443), b"")).unwrap();
        for (port, server, why) in [(41002, 1, Decision::ErrorOwner), (443, owner, Decision::ErrorHash)] {
            let sent = udp(cast.vip(port), cast.client(), &[7; 200]);
            for length in [8, 50, 208] {
                let packet = error(cast.router, cast.vip, &sent, length);
                assert_eq!(decision(&balancer, &packet), Ok((server, why)));
                let out = processed(&balancer, &packet);
                assert_eq!((out.source(), out.destination()), (cast.router, cast.servers[server]));
                let quoted = out.icmp().unwrap().quoted().unwrap();
                assert_eq!((quoted.source, quoted.source_port), (cast.servers[server], port));
                if length == 208 {
                    let original = udp(SocketAddr::new(cast.servers[server], port), cast.client(), &[7; 200]);
                    assert_eq!(quoted_packet(&out), original);
                }
            }
        }
        // About a client's question, by a router behind the balancer and by the server.
        let as_sent = udp(cast.client(), cast.vip(41002), &[7; 200]);
        let mut sent = as_sent.clone();
        sent.set_destination(cast.servers[1]);
        for (from, shown) in [(cast.router, cast.router), (cast.servers[1], cast.vip)] {
            let out = processed(&balancer, &error(from, cast.client, &sent, 208));
            assert_eq!((out.source(), out.destination()), (shown, cast.client));
            assert_eq!(quoted_packet(&out), as_sent);
        }
    }
}

#[test]
fn o12_protocols_without_ports_go_as_configured_and_their_answers_come_from_the_vip() {
    let tables = "[[protocol]]\nnumber = 47\nto = { server = \"web-2\" }\n[[protocol]]\nnumber = 50\nto = \"balance\"\n\
                  [[protocol]]\nnumber = 132\nto = \"drop\"\n[[protocol]]\nnumber = 99\nto = \"default-server\"\n";
    let text = three_servers("default_server = \"web-3\"") + tables;
    let balancer = balancer(&text);
    for cast in casts() {
        let of = |source, number| datagram(source, cast.vip, number, &[1; 40], 0);
        assert_eq!(decision(&balancer, &of(cast.client, 47)), Ok((1, Decision::Named)));
        assert_eq!(processed(&balancer, &of(cast.client, 47)).destination(), cast.servers[1]);
        assert_eq!(balancer.route(&of(cast.client, 132)), Err(DropReason::Refused(132)));
        for number in [99, 200] {
            let to_default = Decision::Default(DropReason::Protocol(number));
            assert_eq!(decision(&balancer, &of(cast.client, number)), Ok((2, to_default)));
        }
        let mut seen = [0; 3];
        for n in 0..200u8 {
            let client = match cast.client {
                std::net::IpAddr::V4(_) => std::net::Ipv4Addr::new(192, 0, 2, n).into(),
                std::net::IpAddr::V6(_) => {
                    std::net::Ipv6Addr::from_bits(0x2001 << 112 | u128::from(n)).into()
                }
            };
            let (server, why) = decision(&balancer, &of(client, 50)).unwrap();
            assert_eq!(why, Decision::Balanced);
            assert_eq!(decision(&balancer, &of(client, 50)).unwrap().0, server);
            seen[server] += 1;
        }
        assert!(seen.iter().all(|count| *count > 30), "{seen:?}");
        for (server, number, shown) in
            [(1, 47, cast.vip), (0, 50, cast.vip), (2, 50, cast.vip), (0, 47, cast.servers[0])]
        {
            let answer = datagram(cast.servers[server], cast.client, number, &[2; 40], 0);
            assert_eq!(processed(&balancer, &answer).source(), shown, "{server} {number}");
        }
    }
}
