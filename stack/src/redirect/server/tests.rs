//! The server's rules, one after the other, over both families.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::wire::{DEFAULT_EXID, Gso, GsoKind, Offload, TcpOption};

const X: u16 = 443;
const Y: u16 = 41001;
const ISN: SeqNumber = SeqNumber(0xffff_ffff);
const NOW: Instant = Instant::from_millis(5_000_000);
/// What a Linux SYN or SYN-ACK carries: MSS, SACK-permitted, timestamps, window scale.
const LINUX: [u8; 20] = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 77, 0, 0, 0, 0, 1, 3, 3, 7];

fn sockets() -> [(SocketAddr, IpAddr); 2] {
    let socket = |text: &str| text.parse().expect("a socket");
    let address = |text: &str| text.parse().expect("an address");
    [
        (socket("198.51.100.7:50001"), address("203.0.113.10")),
        (socket("[2001:db8:1::7]:50001"), address("2001:db8::10")),
    ]
}

fn config(vip: IpAddr) -> ServerConfig {
    let service = ServicePorts { address: vip, redirect_port: X, service_port: Y };
    ServerConfig { services: vec![service], isn_key: *b"a key of 16 byte", ..ServerConfig::default() }
}

fn opening() -> RedirectOption {
    RedirectOption { redirect: true, ..RedirectOption::default() }
}

fn reconnecting() -> RedirectOption {
    RedirectOption { confirm: true, ..opening() }
}

fn at_service() -> RedirectOption {
    RedirectOption { port: Some(X), hops: 1, ..opening() }
}

fn syn(client: SocketAddr, to: SocketAddr, option: Option<RedirectOption>) -> Packet {
    let flags = TcpFlags::SYN;
    let bare = Segment::bare(client, to, flags);
    let mut packet = Segment { seq: ISN, window: 64_240, options: &LINUX, ..bare }.emit();
    if let Some(option) = option {
        packet.insert_redirect(DEFAULT_EXID, &option, 1500).expect("room in a SYN");
    }
    packet
}

fn syn_ack(from: SocketAddr, client: SocketAddr) -> Packet {
    let bare = Segment::bare(from, client, TcpFlags::SYN | TcpFlags::ACK);
    Segment { seq: SeqNumber(9000), ack: ISN + 1, window: 65_160, options: &LINUX, ..bare }.emit()
}

fn remote(server: &mut Server, packet: Packet) -> (Action, Packet) {
    let mut packet = packet;
    (server.handle_remote(NOW, &mut packet), packet)
}

fn local(server: &mut Server, packet: Packet) -> Packet {
    let mut packet = packet;
    assert_eq!(server.handle_local(NOW, &mut packet), Action::Pass);
    packet
}

fn option_of(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp().expect("TCP").redirect(DEFAULT_EXID).expect("a valid option")
}

fn answered(server: &mut Server, packet: Packet) -> Packet {
    let (action, _) = remote(server, packet);
    assert_eq!(action, Action::Drop);
    let transmit = server.poll_transmit(NOW).expect("an answer");
    assert_eq!(transmit.towards, Towards::Network);
    assert_eq!(server.poll_transmit(NOW), None);
    transmit.packet
}

#[test]
fn s2_a_reconnecting_syn_is_answered_from_itself_alone() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let asked = SocketAddr::new(vip, X);
        let answer = answered(&mut server, syn(client, asked, Some(reconnecting())));
        assert_eq!((answer.source_socket(), answer.destination_socket()), (Some(asked), Some(client)));
        assert!(answer.checksum_ok());
        let tcp = answer.tcp().unwrap();
        assert!(tcp.is_syn_ack());
        assert_eq!(tcp.ack(), ISN + 1);
        assert!(tcp.header_len() <= 60);
        let expected = RedirectOption {
            confirm: true,
            port: Some(Y),
            observed: Some(observed_digest(client)),
            ..RedirectOption::default()
        };
        assert_eq!(option_of(&answer), Some(expected));
        assert_eq!(server.half_open_count(), 0);
        assert_eq!(server.counters().answered, 1);
        let event = ServerEvent::Answered { client, asked, port: Y };
        assert_eq!((server.poll_event(), server.poll_event()), (Some(event), None));
    }
}

#[test]
fn s2_the_answer_offers_what_the_syn_offers_and_no_more() {
    let (client, vip) = sockets()[1];
    let mut server = Server::new(ServerConfig { mtu: 1400, ..config(vip) });
    let offers: [&[u8]; 6] = [
        &[],
        &[2, 4, 5, 0xb4],
        &[2, 4, 5, 0xb4, 1, 3, 3, 9],
        &[4, 2, 1, 1],
        &[1, 1, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0],
        &LINUX,
    ];
    for offer in offers {
        let bare = Segment::bare(client, SocketAddr::new(vip, X), TcpFlags::SYN);
        let mut packet = Segment { seq: ISN, options: offer, ..bare }.emit();
        packet.insert_redirect(DEFAULT_EXID, &reconnecting(), 1500).unwrap();
        let kinds = |packet: &Packet| {
            let mut found = [false; 4];
            let mut echo = None;
            for option in packet.tcp().unwrap().options() {
                match option.unwrap() {
                    TcpOption::MaximumSegmentSize(_) => found[0] = true,
                    TcpOption::SackPermitted => found[1] = true,
                    TcpOption::Timestamps { value, echo: to } => {
                        found[2] = true;
                        echo = Some((value, to));
                    }
                    TcpOption::WindowScale(_) => found[3] = true,
                    _ => {}
                }
            }
            (found, echo)
        };
        let (offered, timestamps) = kinds(&packet);
        let answer = answered(&mut server, packet);
        let (given, echoed) = kinds(&answer);
        assert_eq!(given, offered);
        assert_eq!(echoed.map(|(_, echo)| echo), timestamps.map(|(value, _)| value));
        let mss = answer.tcp().unwrap().options().flatten().find_map(|option| match option {
            TcpOption::MaximumSegmentSize(mss) => Some(mss),
            _ => None,
        });
        assert!(mss.is_none_or(|mss| mss == 1340));
    }
}

#[test]
fn s2_repeated_syns_get_the_same_sequence_number_and_others_another() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let asked = SocketAddr::new(vip, X);
    let mut isn = |client: SocketAddr, seq: u32| {
        let mut packet = syn(client, asked, None);
        let bare = Segment { seq: SeqNumber(seq), ..Segment::bare(client, asked, TcpFlags::SYN) };
        packet.clone_from(&bare.emit());
        packet.insert_redirect(DEFAULT_EXID, &reconnecting(), 1500).unwrap();
        answered(&mut server, packet).tcp().unwrap().seq()
    };
    let first = isn(client, 1);
    assert_eq!(isn(client, 1), first);
    assert_ne!(isn(client, 2), first);
    assert_ne!(isn(SocketAddr::new(client.ip(), 50_002), 1), first);
    let mut other_key = Server::new(ServerConfig { isn_key: [7; 16], ..config(vip) });
    let bare = Segment { seq: SeqNumber(1), ..Segment::bare(client, asked, TcpFlags::SYN) };
    let mut packet = bare.emit();
    packet.insert_redirect(DEFAULT_EXID, &reconnecting(), 1500).unwrap();
    assert_ne!(answered(&mut other_key, packet).tcp().unwrap().seq(), first);
}

#[test]
fn s2_timestamps_of_answers_advance_with_the_clock() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let mut value = |now: Instant| {
        let mut packet = syn(client, SocketAddr::new(vip, X), Some(reconnecting()));
        let _ = server.handle_remote(now, &mut packet);
        server.poll_transmit(now).unwrap().packet.tcp().unwrap().timestamps().unwrap().0
    };
    let first = value(NOW);
    assert_eq!(value(NOW + Duration::from_millis(1500)).wrapping_sub(first), 1500);
}

#[test]
fn s2_a_port_that_is_another_servers_is_named_without_o() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        for port in [X, Y] {
            let asked = SocketAddr::new(vip, port);
            server.set_elsewhere(asked, Some(42_000));
            let option = if port == X { opening() } else { at_service() };
            let answer = answered(&mut server, syn(client, asked, Some(option)));
            assert_eq!(answer.source_socket(), Some(asked));
            let answer = option_of(&answer).unwrap();
            assert_eq!((answer.port, answer.observed, answer.confirm), (Some(42_000), None, true));
            assert_eq!(answer.hops, option.hops);
            server.set_elsewhere(asked, None);
        }
        assert_eq!(server.counters().answered_elsewhere, 2);
        let (action, _) = remote(&mut server, syn(client, SocketAddr::new(vip, X), Some(opening())));
        assert_eq!(action, Action::Pass);
    }
}

#[test]
fn s1_a_handover_turns_the_syn_to_y_and_its_syn_ack_comes_from_x() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let (asked, service) = (SocketAddr::new(vip, X), SocketAddr::new(vip, Y));
        let (action, turned) = remote(&mut server, syn(client, asked, Some(opening())));
        assert_eq!((action, turned.bytes()), (Action::Pass, syn(client, service, None).bytes()));

        let moved = local(&mut server, syn_ack(service, client));
        assert!(moved.checksum_ok());
        assert_eq!(moved.source_socket(), Some(asked));
        let option = option_of(&moved).unwrap();
        assert!(option.confirm && !option.redirect);
        assert_eq!((option.port, option.observed), (Some(Y), Some(observed_digest(client))));
        let mut without = moved;
        without.strip_redirect(DEFAULT_EXID);
        assert_eq!(without.bytes(), syn_ack(asked, client).bytes());
        // A repeated SYN-ACK gets the same.
        assert_eq!(local(&mut server, syn_ack(service, client)).source_socket(), Some(asked));
        assert_eq!((server.counters().syns_turned, server.counters().syn_acks_moved), (1, 2));
        let event = ServerEvent::HandedOver { client, asked, port: Y };
        assert_eq!(server.poll_event(), Some(event));
        assert_eq!(server.poll_transmit(NOW), None);
    }
}

#[test]
fn s4_the_handover_ack_reaches_the_local_tcp_untouched_for_it_alone_to_judge() {
    for (client, vip) in sockets() {
        let service = SocketAddr::new(vip, Y);
        let mut server = Server::new(config(vip));
        let bare = Segment::bare(client, service, TcpFlags::ACK);
        let mut ack = Segment { seq: ISN + 1, ack: SeqNumber(9001), ..bare }.emit();
        let option =
            RedirectOption { redirect: true, confirm: true, port: Some(X), ..RedirectOption::default() };
        // No SYN came before: with SYN cookies nothing but the local TCP could know.
        ack.insert_redirect(DEFAULT_EXID, &option, 1500).expect("room in an ACK");
        assert_eq!(remote(&mut server, ack.clone()), (Action::Pass, ack));
    }
}

#[test]
fn s1_a_syn_at_the_service_port_is_confirmed_without_port_and_digest() {
    for (client, vip) in sockets() {
        let service = SocketAddr::new(vip, Y);
        let straight = RedirectOption { port: Some(40_000), ..reconnecting() };
        for option in [at_service(), opening(), straight] {
            let mut server = Server::new(config(vip));
            let (action, stripped) = remote(&mut server, syn(client, service, Some(option)));
            assert_eq!((action, stripped.bytes()), (Action::Pass, syn(client, service, None).bytes()));
            let confirmed = local(&mut server, syn_ack(service, client));
            assert_eq!(confirmed.source_socket(), Some(service));
            let expected = RedirectOption { confirm: true, hops: option.hops, ..RedirectOption::default() };
            assert_eq!(option_of(&confirmed), Some(expected));
            assert!(confirmed.checksum_ok());
            assert_eq!(
                server.poll_event(),
                Some(ServerEvent::Confirmed {
                    client,
                    service,
                    moved_from: option.port.filter(|_| option.confirm)
                })
            );
        }
    }
}

#[test]
fn s1_a_port_that_is_its_own_service_port_is_only_confirmed() {
    let (client, vip) = sockets()[0];
    let services = vec![ServicePorts { address: vip, redirect_port: X, service_port: X }];
    let mut server = Server::new(ServerConfig { services, ..config(vip) });
    let socket = SocketAddr::new(vip, X);
    assert_eq!(remote(&mut server, syn(client, socket, Some(reconnecting()))).0, Action::Pass);
    let option = option_of(&local(&mut server, syn_ack(socket, client))).unwrap();
    assert_eq!((option.confirm, option.port), (true, None));
}

#[test]
fn s1_plain_clients_pass_untouched() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        for port in [X, Y] {
            let socket = SocketAddr::new(vip, port);
            let packet = syn(client, socket, None);
            let (action, passed) = remote(&mut server, packet.clone());
            assert_eq!((action, passed), (Action::Pass, packet));
            let packet = syn_ack(socket, client);
            assert_eq!(local(&mut server, packet.clone()), packet);
        }
        assert_eq!(server.counters().plain_syns, 2);
    }
}

#[test]
fn s1_a_plain_syn_ends_what_an_earlier_one_asked_for() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let service = SocketAddr::new(vip, Y);
    let _ = remote(&mut server, syn(client, service, Some(at_service())));
    let _ = remote(&mut server, syn(client, service, None));
    assert_eq!(option_of(&local(&mut server, syn_ack(service, client))), None);
}

#[test]
fn s3_syn_acks_follow_the_latest_syn_and_stay_at_y_once_it_was_asked() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let (asked, service) = (SocketAddr::new(vip, X), SocketAddr::new(vip, Y));
        let _ = remote(&mut server, syn(client, asked, Some(opening())));
        assert_eq!(local(&mut server, syn_ack(service, client)).source_socket(), Some(asked));
        let _ = remote(&mut server, syn(client, service, Some(at_service())));
        assert_eq!(local(&mut server, syn_ack(service, client)).source_socket(), Some(service));
        // A late copy of the first SYN.
        let _ = remote(&mut server, syn(client, asked, Some(opening())));
        let late = local(&mut server, syn_ack(service, client));
        assert_eq!((late.source_socket(), option_of(&late).unwrap().port), (Some(service), None));
        // A new connection from the same port.
        let bare = Segment::bare(client, asked, TcpFlags::SYN);
        let mut fresh = Segment { seq: ISN + 70_000, options: &LINUX, ..bare }.emit();
        fresh.insert_redirect(DEFAULT_EXID, &opening(), 1500).unwrap();
        let _ = remote(&mut server, fresh);
        let bare = Segment::bare(service, client, TcpFlags::SYN | TcpFlags::ACK);
        let reply = Segment { ack: ISN + 70_001, options: &LINUX, ..bare }.emit();
        assert_eq!(local(&mut server, reply).source_socket(), Some(asked));
        assert_eq!(server.half_open_count(), 1);
    }
}

#[test]
fn s5_a_syn_ack_without_an_entry_passes_unmarked() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let packet = syn_ack(SocketAddr::new(vip, Y), client);
    assert_eq!(local(&mut server, packet.clone()), packet);
    // Nor does an answer to another SYN than the latest.
    let _ = remote(&mut server, syn(client, SocketAddr::new(vip, X), Some(opening())));
    let bare = Segment::bare(SocketAddr::new(vip, Y), client, TcpFlags::SYN | TcpFlags::ACK);
    let stale = Segment { ack: ISN, ..bare }.emit();
    assert_eq!(local(&mut server, stale.clone()), stale);
    assert_eq!(server.counters().syn_acks_unknown, 2);
}

#[test]
fn s5_entries_end_after_their_lifetime() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let (asked, service) = (SocketAddr::new(vip, X), SocketAddr::new(vip, Y));
    assert_eq!(server.poll_timeout(), None);
    let _ = remote(&mut server, syn(client, asked, Some(opening())));
    let end = NOW + Duration::from_secs(64);
    assert_eq!(server.poll_timeout(), Some(end));
    // A repeated SYN lives on.
    let later = NOW + Duration::from_secs(1);
    let _ = server.handle_remote(later, &mut syn(client, asked, Some(opening())));
    assert_eq!(server.poll_timeout(), Some(later + Duration::from_secs(64)));
    assert_eq!(server.poll_transmit(end), None);
    let mut moved = syn_ack(service, client);
    let _ = server.handle_local(end, &mut moved);
    assert_eq!(moved.source_socket(), Some(asked));
    let mut unmarked = syn_ack(service, client);
    let _ = server.handle_local(end + Duration::from_secs(1), &mut unmarked);
    assert_eq!(unmarked, syn_ack(service, client));
    assert_eq!(server.poll_transmit(end + Duration::from_secs(1)), None);
    assert_eq!((server.half_open_count(), server.counters().half_open_expired), (0, 1));
    assert_eq!(server.poll_timeout(), None);
}

#[test]
fn s5_a_full_table_drops_its_oldest_entry() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(ServerConfig { half_open_limit: 3, ..config(vip) });
    let from = |n: u16| SocketAddr::new(client.ip(), 50_000 + n);
    for n in 0..3 {
        let _ = remote(&mut server, syn(from(n), SocketAddr::new(vip, X), Some(opening())));
    }
    // The first is renewed: the second is the oldest now.
    let _ = remote(&mut server, syn(from(0), SocketAddr::new(vip, X), Some(opening())));
    let _ = remote(&mut server, syn(from(3), SocketAddr::new(vip, X), Some(opening())));
    assert_eq!((server.half_open_count(), server.counters().half_open_evicted), (3, 1));
    for (n, known) in [(0, true), (1, false), (2, true), (3, true)] {
        let reply = local(&mut server, syn_ack(SocketAddr::new(vip, Y), from(n)));
        assert_eq!(option_of(&reply).is_some(), known, "client {n}");
    }
}

#[test]
fn s6_without_a_listener_nothing_is_redirected() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        server.set_listening(SocketAddr::new(vip, Y), false);
        let cases = [(X, opening()), (X, reconnecting()), (Y, at_service())];
        for (port, option) in cases {
            let socket = SocketAddr::new(vip, port);
            let (action, passed) = remote(&mut server, syn(client, socket, Some(option)));
            assert_eq!((action, passed.bytes()), (Action::Pass, syn(client, socket, None).bytes()));
            let reason = DeclineReason::NotListening;
            assert_eq!(server.poll_event(), Some(ServerEvent::Declined { client, asked: socket, reason }));
        }
        assert_eq!((server.counters().not_listening, server.half_open_count()), (3, 0));
        server.set_listening(SocketAddr::new(vip, Y), true);
        let _ = answered(&mut server, syn(client, SocketAddr::new(vip, X), Some(reconnecting())));
    }
}

#[test]
fn s7_a_challenge_ack_says_where_the_connection_stands() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let service = SocketAddr::new(vip, Y);
        let packet = syn(client, service, None);
        let (snd, rcv) = (SeqNumber(11), SeqNumber(22));
        let ack = server.challenge_ack(NOW, &packet, snd, rcv, 500, Some((3, 4))).unwrap();
        let tcp = ack.tcp().unwrap();
        assert_eq!((tcp.seq(), tcp.ack(), tcp.flags(), tcp.window()), (snd, rcv, TcpFlags::ACK, 500));
        assert_eq!(tcp.timestamps(), Some((3, 4)));
        assert_eq!((ack.source_socket(), ack.destination_socket()), (Some(service), Some(client)));
        assert!(ack.checksum_ok());
    }
}

#[test]
fn s8_a_segment_without_a_connection_gets_a_reset_at_its_ack() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let service = SocketAddr::new(vip, Y);
        let bare = Segment::bare(client, service, TcpFlags::ACK);
        let segment = Segment { seq: SeqNumber(5), ack: SeqNumber(99), payload: b"data", ..bare };
        let reset = server.reset(NOW, &segment.emit()).unwrap();
        let tcp = reset.tcp().unwrap();
        assert_eq!((tcp.seq(), tcp.flags()), (SeqNumber(99), TcpFlags::RST));
        assert_eq!((reset.source_socket(), reset.destination_socket()), (Some(service), Some(client)));
        let reset = server.reset(NOW, &syn(client, service, None)).unwrap();
        let tcp = reset.tcp().unwrap();
        assert_eq!(
            (tcp.seq(), tcp.ack(), tcp.flags()),
            (SeqNumber(0), ISN + 1, TcpFlags::RST | TcpFlags::ACK)
        );
        assert_eq!(server.reset(NOW, &Segment::bare(client, service, TcpFlags::RST).emit()), None);
    }
}

#[test]
fn s8_replies_are_limited_in_their_rate() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(ServerConfig { replies_per_second: 10, ..config(vip) });
    let packet = syn(client, SocketAddr::new(vip, Y), None);
    let mut burst = |now: Instant| (0..50).filter(|_| server.reset(now, &packet).is_some()).count();
    assert_eq!(burst(NOW), 10);
    assert_eq!(burst(NOW), 0);
    assert_eq!(burst(NOW + Duration::from_millis(300)), 3);
    assert_eq!(burst(NOW + Duration::from_secs(100)), 10);
    assert_eq!((server.counters().resets, server.counters().replies_limited), (23, 177));
    let mut silent = Server::new(ServerConfig { replies_per_second: 0, ..config(vip) });
    assert_eq!(silent.reset(NOW, &packet), None);
}

#[test]
fn c3_a_client_that_was_redirected_too_often_stays_plain() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let asked = SocketAddr::new(vip, X);
    for option in [opening(), reconnecting()] {
        let (action, passed) =
            remote(&mut server, syn(client, asked, Some(RedirectOption { hops: 3, ..option })));
        assert_eq!((action, passed.bytes()), (Action::Pass, syn(client, asked, None).bytes()));
    }
    assert_eq!(server.counters().too_many_hops, 2);
    let answer =
        answered(&mut server, syn(client, asked, Some(RedirectOption { hops: 2, ..reconnecting() })));
    assert_eq!(option_of(&answer).unwrap().hops, 2);
}

#[test]
fn w1_malformed_options_are_ignored_and_counted() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let bare = Segment::bare(client, SocketAddr::new(vip, X), TcpFlags::SYN);
    let bad: [&[u8]; 6] = [
        &[253, 8, 0x52, 0x44, 1, 0, 0, 0, 8, 0, 1, 1],
        &[253, 8, 0x52, 0x44, 0x41, 0, 0, 0],
        &[253, 8, 0x52, 0x44, 0x21, 0, 0, 0],
        &[253, 8, 0x52, 0x44, 0x05, 0, 0, 0],
        &[253, 4, 0x52, 0x44],
        &[253, 8, 0x52, 0x44, 1, 0, 0, 0, 253, 8, 0x52, 0x44, 1, 0, 0, 0],
    ];
    for options in bad {
        let packet = Segment { options, ..bare }.emit();
        assert_eq!(remote(&mut server, packet.clone()), (Action::Pass, packet));
    }
    assert_eq!((server.counters().bad_options, server.counters().plain_syns), (6, 6));
    // A list that ends in front of it has none of ours.
    for options in [[253, 0, 0x52, 0x44], [8, 0, 1, 1]] {
        let packet = Segment { options: &options, ..bare }.emit();
        assert_eq!(remote(&mut server, packet.clone()), (Action::Pass, packet));
    }
    assert_eq!((server.counters().bad_options, server.counters().plain_syns), (6, 8));
    assert_eq!(server.half_open_count(), 0);
}

#[test]
fn w1_options_of_another_experiment_are_not_ours() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let mut packet = syn(client, SocketAddr::new(vip, X), None);
    packet.insert_redirect(DEFAULT_EXID + 1, &reconnecting(), 1500).unwrap();
    assert_eq!(remote(&mut server, packet.clone()), (Action::Pass, packet));
    assert_eq!((server.counters().bad_options, server.counters().plain_syns), (0, 1));
}

#[test]
fn w2_the_digest_gives_way_before_the_option() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let service = SocketAddr::new(vip, Y);
    let _ = remote(&mut server, syn(client, SocketAddr::new(vip, X), Some(opening())));
    let bare = Segment::bare(service, client, TcpFlags::SYN | TcpFlags::ACK);
    let full = Segment { ack: ISN + 1, options: &[1; 32], ..bare }.emit();
    let option = option_of(&local(&mut server, full)).unwrap();
    assert_eq!((option.port, option.observed), (Some(Y), None));
}

#[test]
fn w2_without_any_room_the_client_is_left_to_ask_plainly() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let (asked, service) = (SocketAddr::new(vip, X), SocketAddr::new(vip, Y));
        let _ = remote(&mut server, syn(client, asked, Some(opening())));
        let bare = Segment::bare(service, client, TcpFlags::SYN | TcpFlags::ACK);
        let reply = local(&mut server, Segment { ack: ISN + 1, options: &[1; 36], ..bare }.emit());
        assert_eq!((reply.source_socket(), option_of(&reply)), (Some(asked), None));
        assert!(reply.checksum_ok());
        let Transmit { towards, packet } = server.poll_transmit(NOW).unwrap();
        assert_eq!(towards, Towards::Local);
        let tcp = packet.tcp().unwrap();
        assert_eq!((tcp.flags(), tcp.seq()), (TcpFlags::RST, ISN + 1));
        assert_eq!((packet.source_socket(), packet.destination_socket()), (Some(client), Some(service)));
        assert_eq!((server.counters().syn_acks_no_room, server.half_open_count()), (1, 0));
    }
}

#[test]
fn syns_that_must_not_be_touched_pass_unchanged() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let asked = SocketAddr::new(vip, X);
    let mut packets = Vec::new();
    for kind in [19, 29, 30] {
        let options = [kind, 4, 0, 0];
        let mut packet = Segment { options: &options, ..Segment::bare(client, asked, TcpFlags::SYN) }.emit();
        packet.insert_redirect(DEFAULT_EXID, &reconnecting(), 1500).unwrap();
        packets.push(packet);
    }
    let mut bytes = syn(client, asked, Some(reconnecting())).bytes().to_vec();
    bytes[36] ^= 1;
    packets.push(Packet::from_slice(&bytes).unwrap());
    for from in
        ["203.0.113.10:50001", "224.0.0.1:50001", "255.255.255.255:50001", "0.0.0.0:50001", "198.51.100.7:0"]
    {
        packets.push(syn(from.parse().unwrap(), asked, Some(reconnecting())));
    }
    let gso =
        Offload { partial_checksum: true, gso: Some(Gso { kind: GsoKind::TcpV4, size: 1000, ecn: false }) };
    packets.push(Packet::parse(syn(client, asked, Some(reconnecting())).into_buffer(), gso).unwrap());
    let count = packets.len() as u64;
    for packet in packets {
        assert_eq!(remote(&mut server, packet.clone()), (Action::Pass, packet));
    }
    assert_eq!(server.counters().unfit_syns, count);
}

#[test]
fn i2_an_error_about_a_moved_syn_ack_quotes_what_the_local_tcp_sent() {
    for (client, vip) in sockets() {
        let mut server = Server::new(config(vip));
        let (asked, service) = (SocketAddr::new(vip, X), SocketAddr::new(vip, Y));
        let error = || icmp_error(vip, &syn_ack(asked, client));
        let packet = error();
        assert_eq!(remote(&mut server, packet.clone()), (Action::Pass, packet), "no such half-open");
        let _ = remote(&mut server, syn(client, asked, Some(opening())));
        let (action, turned) = remote(&mut server, error());
        assert_eq!(action, Action::Pass);
        let quoted = turned.icmp().unwrap().quoted().unwrap();
        assert_eq!(SocketAddr::new(quoted.source, quoted.source_port), service);
        assert!(turned.checksum_ok());
        // Old routers quote no more than eight bytes of the segment.
        let moved = syn_ack(asked, client);
        let short = icmp_error_quoting(vip, &moved.bytes()[..moved.transport_offset() + 8]);
        let (_, turned) = remote(&mut server, short);
        assert_eq!(turned.icmp().unwrap().quoted().unwrap().source_port, service.port());
        assert!(turned.checksum_ok());
        assert_eq!(server.counters().icmp_turned, 2);
        // Of SYN-ACKs that were not moved nothing is turned.
        let _ = remote(&mut server, syn(client, service, Some(at_service())));
        let packet = error();
        assert_eq!(remote(&mut server, packet.clone()), (Action::Pass, packet));
    }
}

#[test]
fn a_reload_keeps_half_open_connections_and_listening_states() {
    let (client, vip) = sockets()[0];
    let mut server = Server::new(config(vip));
    let (asked, service) = (SocketAddr::new(vip, X), SocketAddr::new(vip, Y));
    let _ = remote(&mut server, syn(client, asked, Some(opening())));
    let first = ServicePorts { address: vip, redirect_port: X, service_port: Y };
    let second = ServicePorts { redirect_port: 80, service_port: 41_002, ..first };
    server.set_services(&[first, second]);
    assert_eq!(local(&mut server, syn_ack(service, client)).source_socket(), Some(asked));
    server.set_listening(service, false);
    server.set_services(&[second]);
    assert_eq!(remote(&mut server, syn(client, asked, Some(reconnecting()))).0, Action::Pass);
    server.set_services(&[first]);
    let _ = answered(&mut server, syn(client, asked, Some(reconnecting())));
}

/// An ICMP error to `vip` that quotes `packet`.
fn icmp_error(vip: IpAddr, packet: &Packet) -> Packet {
    icmp_error_quoting(vip, packet.bytes())
}

fn icmp_error_quoting(vip: IpAddr, quote: &[u8]) -> Packet {
    use crate::wire::checksum::Sum;
    let router: IpAddr =
        if vip.is_ipv4() { [192, 0, 2, 1].into() } else { [0x2001u16, 0xdb8, 9, 0, 0, 0, 0, 1].into() };
    let mut message = if vip.is_ipv4() { vec![3, 1, 0, 0, 0, 0, 0, 0] } else { vec![1, 3, 0, 0, 0, 0, 0, 0] };
    message.extend_from_slice(quote);
    let length = message.len();
    let sum = Sum::new().add(&message);
    let sum = if vip.is_ipv4() { sum } else { sum.add_pseudo_header(router, vip, 58, length) };
    message[2..4].copy_from_slice(&sum.checksum().to_be_bytes());
    let mut bytes = match (router, vip) {
        (IpAddr::V4(router), IpAddr::V4(vip)) => {
            let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 60, 1, 0, 0];
            header[2..4].copy_from_slice(&(20 + length as u16).to_be_bytes());
            header.extend_from_slice(&router.octets());
            header.extend_from_slice(&vip.octets());
            header
        }
        (IpAddr::V6(router), IpAddr::V6(vip)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, 58, 60];
            header[4..6].copy_from_slice(&(length as u16).to_be_bytes());
            header.extend_from_slice(&router.octets());
            header.extend_from_slice(&vip.octets());
            header
        }
        _ => unreachable!("one family"),
    };
    bytes.extend_from_slice(&message);
    Packet::from_slice(&bytes).expect("an ICMP error")
}

/// Anything that may come: segments near our ports with any flags and options, errors that quote them, and noise.
fn any_packet() -> impl Strategy<Value = Packet> {
    let port = prop_oneof![4 => Just(X), 4 => Just(Y), 1 => any::<u16>()];
    let flags = prop_oneof![3 => Just(2u8), 3 => Just(0x12), 2 => any::<u8>()];
    let options = prop_oneof![
        2 => Just(LINUX.to_vec()),
        1 => Just(Vec::new()),
        1 => proptest::collection::vec(any::<u8>(), 0..=10).prop_map(|words| words.repeat(4)),
    ];
    let redirect = proptest::option::of((any::<(bool, bool)>(), proptest::option::of(1u16..), 0u8..5));
    let shape =
        (any::<bool>(), any::<bool>(), 0u8..6, prop_oneof![9 => Just(false), 1 => Just(true)], 0u8..4);
    (
        shape,
        50_000u16..50_012,
        port,
        flags,
        any::<u32>(),
        options,
        redirect,
        proptest::collection::vec(any::<u8>(), 0..8),
    )
        .prop_map(|(shape, from, port, flags, number, options, redirect, payload)| {
            let (v4, outgoing, kind, broken, seq) = shape;
            let (client, vip) = sockets()[usize::from(!v4)];
            let (client, own) = (SocketAddr::new(client.ip(), from), SocketAddr::new(vip, port));
            let (source, destination) = if outgoing { (own, client) } else { (client, own) };
            let bare = Segment::bare(source, destination, TcpFlags(flags));
            let (seq, ack) = (SeqNumber(u32::from(seq)), SeqNumber(number % 5));
            let mut packet = Segment { seq, ack, options: &options, payload: &payload, ..bare }.emit();
            if let Some(((redirect, confirm), port, hops)) = redirect {
                let option = RedirectOption { redirect, confirm, port, hops, ..RedirectOption::default() };
                let _ = packet.insert_redirect(DEFAULT_EXID, &option, 1500);
            }
            if kind == 0 {
                packet = icmp_error(vip, &packet);
            }
            let mut bytes = packet.bytes().to_vec();
            let last = bytes.len() - 1;
            bytes[last] ^= u8::from(broken);
            Packet::from_slice(&bytes).expect("still a packet")
        })
}

proptest! {
    #[test]
    fn any_sequence_keeps_the_bounds_the_checksums_and_all_but_handshakes(
        packets in proptest::collection::vec((any_packet(), any::<bool>(), 0u64..40_000), 1..200),
    ) {
        let services = sockets().map(|(_, address)| ServicePorts { address, redirect_port: X, service_port: Y });
        let config = ServerConfig { services: services.to_vec(), half_open_limit: 5, ..ServerConfig::default() };
        let mut server = Server::new(config);
        let mut now = NOW;
        for (packet, from_network, millis) in packets {
            now += Duration::from_millis(millis);
            let before = packet.clone();
            let mut packet = packet;
            let action = if from_network {
                server.handle_remote(now, &mut packet)
            } else {
                server.handle_local(now, &mut packet)
            };
            prop_assert!(server.half_open_count() <= 5);
            prop_assert_eq!(packet.checksum_ok(), before.checksum_ok());
            if before.tcp().is_some_and(|tcp| !tcp.flags().contains(TcpFlags::SYN)) {
                prop_assert_eq!((action, &packet), (Action::Pass, &before));
            }
            while let Some(transmit) = server.poll_transmit(now) {
                prop_assert!(transmit.packet.checksum_ok());
                prop_assert!(transmit.packet.tcp().is_some_and(|tcp| tcp.header_len() <= 60));
            }
            prop_assert!(server.poll_timeout().is_none_or(|deadline| deadline > now));
            while server.poll_event().is_some() {}
        }
        prop_assert_eq!(server.counters().overflowed, 0);
    }

    #[test]
    fn a_driver_that_takes_nothing_costs_no_memory(count in 1usize..3000) {
        let (client, vip) = sockets()[0];
        let mut server = Server::new(config(vip));
        for _ in 0..count {
            let mut packet = syn(client, SocketAddr::new(vip, X), Some(reconnecting()));
            let _ = server.handle_remote(NOW, &mut packet);
        }
        prop_assert!(server.transmits.len() <= TRANSMIT_QUEUE && server.events.len() <= EVENT_QUEUE);
    }
}
