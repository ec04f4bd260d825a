//! Each rule: a described packet, its route, and the bytes that leave.

use std::net::SocketAddr;

use shunt_stack::wire::{Packet, ParseError, SeqNumber, TcpFlags};

use super::packets::{checksums_are_right, datagram, error, later_fragment, quoted_packet, segment};
use super::{EXID, R, balancer, casts, decision, processed, three_servers};
use crate::{Decision, DropReason, Output, Route};

#[test]
fn b1_a_syn_with_r_is_selected_by_policy() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let mut seen = [0; 3];
        for isn in 0..300 {
            let mut packet = segment(cast.client(), cast.vip(443), TcpFlags::SYN, SeqNumber(isn));
            packet.insert_redirect(EXID, &R, 1500).unwrap();
            let (server, why) = decision(&balancer, &packet).unwrap();
            assert_eq!(why, Decision::Selected);
            seen[server] += 1;
            assert_eq!(processed(&balancer, &packet).destination(), cast.servers[server]);
        }
        assert!(seen.iter().all(|count| *count > 60), "{seen:?}");
    }
    assert_eq!(balancer.snapshot().servers.values().map(|server| server.selected).sum::<u64>(), 600);
}

#[test]
fn b1_needs_r_a_valid_option_and_a_syn() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let plain = decision(&balancer, &cast.syn(443, None)).unwrap();
        assert_eq!(plain.1, Decision::LegacyHash);
        // Only C: no request.
        let confirm = super::RedirectOption { redirect: false, confirm: true, ..R };
        assert_eq!(decision(&balancer, &cast.syn(443, Some(confirm))), Ok(plain));
        // Another deployment's option.
        let mut foreign = cast.syn(443, None);
        foreign.insert_redirect(EXID + 1, &R, 1500).unwrap();
        assert_eq!(decision(&balancer, &foreign), Ok(plain));
        // The option on an ACK, and on a SYN with RST.
        for flags in [TcpFlags::ACK, TcpFlags::SYN | TcpFlags::ACK, TcpFlags::SYN | TcpFlags::RST] {
            let mut packet = segment(cast.client(), cast.vip(443), flags, SeqNumber(7));
            packet.insert_redirect(EXID, &R, 1500).unwrap();
            assert_eq!(decision(&balancer, &packet), Ok(plain), "{flags:?}");
        }
        // R with C, and with the port a client comes from, are requests as well.
        for option in
            [super::RedirectOption { confirm: true, ..R }, super::RedirectOption { port: Some(9), ..R }]
        {
            assert_eq!(decision(&balancer, &cast.syn(443, Some(option))).unwrap().1, Decision::Selected);
        }
    }
}

#[test]
fn w1_a_syn_with_a_malformed_option_is_plain_and_counted() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let mut packet = cast.syn(443, Some(R));
        packet.insert_redirect(EXID, &R, 1500).unwrap();
        let plain = decision(&balancer, &cast.syn(443, None));
        assert_eq!(decision(&balancer, &packet), plain);
        processed(&balancer, &packet);
    }
    assert_eq!(balancer.snapshot().malformed_options, 2);
}

#[test]
fn b2_a_service_port_leads_to_its_owner_whatever_the_flags() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        for (index, port) in [(0, 41001), (1, 41002), (2, 41003)] {
            for flags in [
                TcpFlags::SYN,
                TcpFlags::ACK,
                TcpFlags::RST,
                TcpFlags::FIN | TcpFlags::ACK,
                TcpFlags::SYN | TcpFlags::ACK,
                TcpFlags::default(),
            ] {
                let packet = segment(cast.client(), cast.vip(port), flags, SeqNumber(1));
                assert_eq!(decision(&balancer, &packet), Ok((index, Decision::Owner)));
                let out = processed(&balancer, &packet);
                assert_eq!(out.destination(), cast.servers[index]);
                assert_eq!((out.source(), out.ports()), (packet.source(), packet.ports()));
            }
            assert_eq!(decision(&balancer, &cast.syn(port, Some(R))), Ok((index, Decision::Owner)));
        }
    }
}

#[test]
fn o1_a_port_may_be_service_port_and_redirect_port() {
    let text = three_servers("").replace("redirect_port = 443", "redirect_port = 41001");
    let balancer = balancer(&text);
    for cast in casts() {
        assert_eq!(decision(&balancer, &cast.syn(41001, Some(R))).unwrap().1, Decision::Selected);
        assert_eq!(decision(&balancer, &cast.syn(41001, None)), Ok((0, Decision::Owner)));
        assert_eq!(decision(&balancer, &cast.ack(41001)), Ok((0, Decision::Owner)));
    }
}

#[test]
fn b3_legacy_hash_keeps_a_plain_connection_on_one_server_of_all() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let mut seen = [0; 3];
        for port in 20_000..20_300 {
            let client = SocketAddr::new(cast.client, port);
            let of =
                |flags| decision(&balancer, &segment(client, cast.vip(443), flags, SeqNumber(port.into())));
            let (server, why) = of(TcpFlags::SYN).unwrap();
            assert_eq!(why, Decision::LegacyHash);
            assert_eq!(of(TcpFlags::ACK), Ok((server, why)));
            assert_eq!(of(TcpFlags::FIN | TcpFlags::ACK), Ok((server, why)));
            seen[server] += 1;
        }
        assert!(seen.iter().all(|count| *count > 60), "{seen:?}");
        processed(&balancer, &cast.syn(443, None));
    }
    assert_eq!(balancer.snapshot().servers.values().map(|server| server.plain).sum::<u64>(), 2);
}

#[test]
fn b3_the_other_legacy_policies() {
    let cast = casts()[0];
    let default = balancer(&three_servers("legacy = \"default-server\"\ndefault_server = \"web-2\""));
    assert_eq!(decision(&default, &cast.syn(443, None)), Ok((1, Decision::LegacyServer)));
    let apart = "legacy = \"default-server\"\ndefault_server = \"web-2\"\nlegacy_server = \"web-3\"";
    let apart = balancer(&three_servers(apart));
    assert_eq!(decision(&apart, &cast.ack(443)), Ok((2, Decision::LegacyServer)));
    assert_eq!(decision(&apart, &cast.ack(80)), Ok((1, Decision::Default(DropReason::UnknownPort(80)))));
    // What is refused on purpose does not go to the default server.
    let drop = balancer(&three_servers("legacy = \"drop\"\ndefault_server = \"web-2\""));
    assert_eq!(drop.route(&cast.syn(443, None)), Err(DropReason::Legacy(443)));
    assert_eq!(decision(&drop, &cast.syn(443, Some(R))).unwrap().1, Decision::Selected);
}

/// What `B4` is about, with the reason it is dropped for.
fn not_understood(cast: super::Cast) -> Vec<(Packet, DropReason)> {
    let udp = [0xc3, 0x50, 0x01, 0xbb, 0, 12, 0, 0, 1, 2, 3, 4];
    let echo = [if cast.vip.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 1, 0, 1];
    let icmp = if cast.vip.is_ipv4() { 1 } else { 58 };
    let foreign =
        segment(SocketAddr::new(cast.servers[0], 41001), cast.client(), TcpFlags::ACK, SeqNumber(1));
    let unknown = segment(cast.vip(80), cast.client(), TcpFlags::ACK, SeqNumber(1));
    let (message_type, code) = if cast.vip.is_ipv4() { (3, 4) } else { (2, 0) };
    let quote = DropReason::IcmpQuote { message_type, code };
    vec![
        (cast.ack(80), DropReason::UnknownPort(80)),
        (cast.syn(80, Some(R)), DropReason::UnknownPort(80)),
        (cast.ack(0), DropReason::UnknownPort(0)),
        (datagram(cast.client, cast.vip, 17, &udp, 6), DropReason::Protocol(17)),
        (datagram(cast.client, cast.vip, 132, &[0; 20], 0), DropReason::Protocol(132)),
        (
            datagram(cast.client, cast.vip, icmp, &echo, 2),
            DropReason::Icmp { message_type: echo[0], code: 0 },
        ),
        (later_fragment(&cast.ack(41001)), DropReason::LaterFragment(0x1234)),
        (error(cast.router, cast.vip, &foreign, 20), quote),
        (error(cast.router, cast.vip, &cast.ack(41001), 4), quote),
        (error(cast.router, cast.vip, &unknown, 20), DropReason::UnknownPort(80)),
    ]
}

#[test]
fn b4_what_is_not_understood_goes_to_the_default_server_or_is_dropped_and_counted() {
    let without = balancer(&three_servers(""));
    let with = balancer(&three_servers("default_server = \"web-3\""));
    for cast in casts() {
        for (packet, reason) in not_understood(cast) {
            assert_eq!(without.route(&packet), Err(reason));
            assert_eq!(without.process(&mut packet.clone()), Err(reason));
            assert_eq!(decision(&with, &packet), Ok((2, Decision::Default(reason))));
            assert_eq!(processed(&with, &packet).destination(), cast.servers[2]);
        }
    }
    let (dropped, defaulted) = (without.snapshot().drops, with.snapshot().defaulted);
    assert_eq!(dropped, defaulted);
    assert_eq!(dropped.values().sum::<u64>(), 20);
    assert_eq!((dropped["unknown_port"], dropped["icmp_quote"], dropped["later_fragment"]), (8, 4, 2));
}

#[test]
fn b4_a_segment_with_a_broken_header_goes_to_the_default_server() {
    let without = balancer(&three_servers(""));
    let with = balancer(&three_servers("default_server = \"web-3\""));
    for cast in casts() {
        let mut bytes = bytes::BytesMut::from(cast.ack(443).bytes());
        let offset = cast.ack(443).transport_offset() + 12;
        bytes[offset] = 0x10;
        let error = Packet::from_slice(&bytes).unwrap_err();
        assert_eq!(error, ParseError::HeaderLength(4));
        let mut packet = Packet::parse_opaque(bytes).unwrap();
        assert_eq!(without.route_unreadable(&packet, error), Err(DropReason::Parse(error)));
        let route = with.route_unreadable(&packet, error);
        assert_eq!(with.carry_out(route, &mut packet), Ok(Output::Main));
        assert_eq!(packet.destination(), cast.servers[2]);
    }
}

#[test]
fn b5_answers_get_the_vip_as_source_and_all_else_passes_unchanged() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        for (server, port) in [(0, 41001), (1, 41002), (2, 41003), (0, 443), (2, 443)] {
            let from = SocketAddr::new(cast.servers[server], port);
            let packet = segment(from, cast.client(), TcpFlags::SYN | TcpFlags::ACK, SeqNumber(1));
            let out = processed(&balancer, &packet);
            assert_eq!(out.source_socket(), Some(cast.vip(port)));
            assert_eq!(out.destination_socket(), Some(cast.client()));
        }
        // A port that is another server's, or nobody's, or an address that is none's.
        for (from, port) in [(cast.servers[0], 41002), (cast.servers[0], 22), (cast.router, 443)] {
            let packet = segment(SocketAddr::new(from, port), cast.client(), TcpFlags::ACK, SeqNumber(1));
            assert_eq!(balancer.route(&packet), Ok(Route::Unchanged));
            assert_eq!(processed(&balancer, &packet), packet);
        }
    }
    let servers = balancer.snapshot().servers;
    assert_eq!(servers["web-1"].packets_back, 4);
    assert_eq!(servers["web-1"].bytes_back, 2 * (57 + 77) - 4 * 5);
}

#[test]
fn b7_a_drained_server_gets_no_new_selections_and_keeps_its_service_port() {
    for state in ["drain", "down"] {
        let text = three_servers("")
            .replace("name = \"web-2\"\n", &format!("name = \"web-2\"\nstate = \"{state}\"\n"));
        let balancer = balancer(&text);
        for cast in casts() {
            for n in 0..200 {
                let mut packet = segment(cast.client(), cast.vip(443), TcpFlags::SYN, SeqNumber(n));
                assert_ne!(decision(&balancer, &packet).unwrap().0, 1);
                packet.insert_redirect(EXID, &R, 1500).unwrap();
                assert_ne!(decision(&balancer, &packet).unwrap().0, 1);
            }
            assert_eq!(decision(&balancer, &cast.ack(41002)), Ok((1, Decision::Owner)));
            let answer =
                segment(SocketAddr::new(cast.servers[1], 41002), cast.client(), TcpFlags::ACK, SeqNumber(1));
            assert_eq!(processed(&balancer, &answer).source(), cast.vip);
        }
    }
}

#[test]
fn b7_without_a_server_that_is_up_the_default_server_is_left() {
    let text = |more| three_servers(more).replace("ports =", "state = \"down\"\nports =");
    for cast in casts() {
        for packet in [cast.syn(443, Some(R)), cast.syn(443, None), cast.ack(443)] {
            assert_eq!(balancer(&text("")).route(&packet), Err(DropReason::NoServer(443)));
            let with = balancer(&text("default_server = \"web-1\""));
            assert_eq!(decision(&with, &packet), Ok((0, Decision::Default(DropReason::NoServer(443)))));
        }
    }
}

#[test]
fn o20_a_balancer_without_servers_drops_and_counts() {
    let text =
        "role = \"balancer\"\nvips = [\"203.0.113.10\"]\n[[service]]\nname = \"web\"\nredirect_port = 443\n";
    let balancer = balancer(text);
    assert_eq!(balancer.route(&casts()[0].syn(443, Some(R))), Err(DropReason::NoServer(443)));
    assert_eq!(balancer.route(&casts()[0].ack(41001)), Err(DropReason::UnknownPort(41001)));
}

#[test]
fn a_server_without_an_address_of_the_family_is_not_reached_there() {
    let text = three_servers("").replace("[\"10.0.0.1\", \"fd00::1\"]", "\"10.0.0.1\"");
    let balancer = balancer(&text);
    let [v4, v6] = casts();
    assert_eq!(decision(&balancer, &v4.ack(41001)), Ok((0, Decision::Owner)));
    assert_eq!(balancer.route(&v6.ack(41001)), Err(DropReason::UnknownPort(41001)));
    for n in 0..100 {
        let mut packet = segment(v6.client(), v6.vip(443), TcpFlags::SYN, SeqNumber(n));
        packet.insert_redirect(EXID, &R, 1500).unwrap();
        assert_ne!(decision(&balancer, &packet).unwrap().0, 0);
    }
}

#[test]
fn i1_and_i5_an_error_about_a_servers_segment_reaches_it_with_its_own_address_quoted() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let sent = segment(cast.vip(41002), cast.client(), TcpFlags::ACK, SeqNumber(99));
        for quoted in [8, 20, 100] {
            let packet = error(cast.router, cast.vip, &sent, quoted);
            assert_eq!(decision(&balancer, &packet), Ok((1, Decision::ErrorOwner)));
            let out = processed(&balancer, &packet);
            assert_eq!((out.source(), out.destination()), (cast.router, cast.servers[1]));
            let inner = out.icmp().unwrap().quoted().unwrap();
            assert_eq!((inner.source, inner.source_port), (cast.servers[1], 41002));
            assert_eq!((inner.destination, inner.destination_port), (cast.client, 50_000));
            if quoted == 100 {
                // As the server sent it, checksums included.
                let original = segment(
                    SocketAddr::new(cast.servers[1], 41002),
                    cast.client(),
                    TcpFlags::ACK,
                    SeqNumber(99),
                );
                assert_eq!(quoted_packet(&out), original);
            }
        }
    }
}

#[test]
fn i1_an_error_that_quotes_a_redirect_port_follows_the_plain_client() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        for port in 30_000..30_050 {
            let client = SocketAddr::new(cast.client, port);
            let (server, _) =
                decision(&balancer, &segment(client, cast.vip(443), TcpFlags::ACK, SeqNumber(1))).unwrap();
            let packet =
                error(cast.router, cast.vip, &segment(cast.vip(443), client, TcpFlags::ACK, SeqNumber(1)), 8);
            assert_eq!(decision(&balancer, &packet), Ok((server, Decision::ErrorHash)));
            assert_eq!(processed(&balancer, &packet).destination(), cast.servers[server]);
        }
    }
}

#[test]
fn i5_an_error_about_a_clients_segment_quotes_the_vip_again() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        for (server, port) in [(1, 41002), (0, 443)] {
            let mut sent = cast.ack(port);
            let as_sent = sent.clone();
            sent.set_destination(cast.servers[server]);
            for (from, shown) in [(cast.router, cast.router), (cast.servers[server], cast.vip)] {
                let out = processed(&balancer, &error(from, cast.client, &sent, 100));
                assert_eq!((out.source(), out.destination()), (shown, cast.client));
                assert_eq!(quoted_packet(&out), as_sent);
            }
            // One that somebody else is told of, or about another port, is not ours.
            for packet in [error(cast.router, cast.servers[2], &sent, 20), {
                let mut other = cast.ack(22);
                other.set_destination(cast.servers[server]);
                error(cast.router, cast.client, &other, 20)
            }] {
                assert_eq!(balancer.route(&packet), Ok(Route::Unchanged));
            }
        }
    }
}

#[test]
fn o20_direct_mode_rewrites_nothing() {
    let balancer = balancer(&three_servers("forward = \"direct\"\ndefault_server = \"web-3\""));
    for cast in casts() {
        let about = segment(cast.vip(41002), cast.client(), TcpFlags::ACK, SeqNumber(99));
        for (packet, server) in [
            (cast.ack(41002), 1),
            (error(cast.router, cast.vip, &about, 100), 1),
            (cast.ack(80), 2),
            (later_fragment(&cast.ack(41001)), 2),
        ] {
            let mut out = packet.clone();
            match balancer.process(&mut out) {
                Ok(Output::Server(id)) => assert_eq!(id.index(), server),
                other => panic!("{other:?}"),
            }
            assert_eq!(out, packet);
        }
        let answer =
            segment(SocketAddr::new(cast.servers[1], 41002), cast.client(), TcpFlags::ACK, SeqNumber(1));
        assert_eq!(processed(&balancer, &answer), answer);
    }
}

#[test]
fn checksums_that_are_wrong_stay_wrong() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let mut bytes = cast.ack(41001).bytes().to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x55;
        let mut packet = Packet::from_slice(&bytes).unwrap();
        assert!(!checksums_are_right(&packet));
        balancer.process(&mut packet).unwrap();
        assert!(!checksums_are_right(&packet));
    }
}

#[test]
fn services_of_two_vips_do_not_mix() {
    let text = "role = \"balancer\"\nvips = [\"203.0.113.10\", \"203.0.113.20\"]\n\
        [[service]]\nname = \"a\"\nredirect_port = 443\nvips = [\"203.0.113.10\"]\n\
        [[service]]\nname = \"b\"\nredirect_port = 443\nvips = [\"203.0.113.20\"]\n\
        [[server]]\nname = \"a1\"\naddress = \"10.0.0.1\"\nports.a = 41001\n\
        [[server]]\nname = \"b1\"\naddress = \"10.0.0.2\"\nports.b = 41001\n";
    let balancer = balancer(text);
    let mut cast = casts()[0];
    for (index, vip) in ["203.0.113.10", "203.0.113.20"].iter().enumerate() {
        cast.vip = vip.parse().unwrap();
        assert_eq!(decision(&balancer, &cast.ack(41001)), Ok((index, Decision::Owner)));
        assert_eq!(decision(&balancer, &cast.ack(443)), Ok((index, Decision::LegacyHash)));
        let from = SocketAddr::new(cast.servers[index], 41001);
        let answer = segment(from, cast.client(), TcpFlags::ACK, SeqNumber(1));
        assert_eq!(processed(&balancer, &answer).source(), cast.vip);
    }
}

#[test]
fn a_reload_keeps_service_ports_and_counters() {
    let before = balancer(&three_servers(""));
    let cast = casts()[0];
    processed(&before, &cast.ack(41003));
    let text = three_servers("").replace("name = \"web-1\"\n", "name = \"web-1\"\nstate = \"drain\"\n");
    let text = text.replace("[[server]]\nname = \"web-2\"", "[[server]]\nname = \"new\"");
    let config = crate::Config::parse(&shunt_host::Source::new("test.toml", text)).unwrap();
    let after = before.successor(&config);
    assert_eq!(decision(&after, &cast.ack(41001)), Ok((0, Decision::Owner)));
    processed(&after, &cast.ack(41003));
    let servers = after.snapshot().servers;
    assert_eq!((servers["web-3"].packets, servers["new"].packets), (2, 0));
    assert_eq!(after.snapshot().decisions["owner"], 2);
}

#[test]
fn counters_are_shown_by_name() {
    let balancer = balancer(&three_servers(""));
    let cast = casts()[0];
    let _ = balancer.process(&mut cast.ack(41001));
    let _ = balancer.process(&mut cast.ack(80));
    let shown = balancer.snapshot().to_string();
    for line in [
        "shunt_balancer_packets_total{decision=\"owner\"} 1",
        "shunt_balancer_dropped_packets_total{reason=\"unknown_port\"} 1",
        "shunt_balancer_server_packets_total{server=\"web-1\"} 1",
        "shunt_balancer_malformed_options_total 0",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
    }
    let json = serde_json::to_value(balancer.snapshot()).unwrap();
    assert_eq!(json["drops"]["unknown_port"], 1);
    assert_eq!(json["servers"]["web-1"]["packets"], 1);
}

#[test]
fn reasons_and_routes_stay_small() {
    assert!(std::mem::size_of::<DropReason>() <= 32);
    assert!(std::mem::size_of::<Result<Route, DropReason>>() <= 48);
}
