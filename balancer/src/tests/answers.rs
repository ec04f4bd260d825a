//! `B1` with `answer = "balancer"`: servers without agents.

use std::collections::BTreeSet;

use shunt_host::{Family, Source};
use shunt_stack::wire::{Packet, RedirectOption, Segment, SeqNumber, TcpFlags, observed_digest};

use super::packets::{checksums_are_right, segment};
use super::{Cast, EXID, R, balancer, casts, decision, processed, three_servers};
use crate::{Balancer, Config, Decision, DropReason, Output, Route, SelectKey, Unfit};

const RC: RedirectOption = RedirectOption { confirm: true, ..R };
const C: RedirectOption = RedirectOption { redirect: false, ..RC };

fn answering() -> Balancer {
    balancer(&three_servers("answer = \"balancer\""))
}

fn option_of(packet: &Packet) -> Option<RedirectOption> {
    packet.tcp().unwrap().redirect(EXID).unwrap()
}

/// The SYN-ACK to a SYN.
fn answered(balancer: &Balancer, syn: &Packet) -> Packet {
    let mut packet = syn.clone();
    assert_eq!(balancer.process(&mut packet), Ok(Output::Main));
    assert!(packet.checksum_ok() && packet.tcp().unwrap().is_syn_ack(), "{packet:?}");
    assert_eq!(packet.source_socket(), syn.destination_socket());
    assert_eq!(packet.destination_socket(), syn.source_socket());
    assert_eq!(packet.tcp().unwrap().ack(), syn.tcp().unwrap().seq() + 1);
    packet
}

fn syn_ack(cast: &Cast, from: u16, option: Option<RedirectOption>) -> Packet {
    let source = std::net::SocketAddr::new(cast.servers[usize::from(from.saturating_sub(41_001)) % 3], from);
    let mut packet = segment(source, cast.client(), TcpFlags::SYN | TcpFlags::ACK, SeqNumber(9));
    if let Some(option) = option {
        packet.insert_redirect(EXID, &option, 1500).unwrap();
    }
    packet
}

#[test]
fn b1_a_syn_with_r_is_answered_with_a_servers_port_and_repeated_the_same() {
    let balancer = answering();
    for cast in casts() {
        let mut ports = BTreeSet::new();
        for n in 0..100 {
            let mut syn = segment(cast.client(), cast.vip(443), TcpFlags::SYN, SeqNumber(n));
            syn.insert_redirect(EXID, &RedirectOption { hops: 1, ..RC }, 1500).unwrap();
            let answer = answered(&balancer, &syn);
            let option = option_of(&answer).unwrap();
            let digest = Some(observed_digest(cast.client()));
            assert_eq!(option, RedirectOption { observed: digest, port: option.port, hops: 1, ..C });
            assert_eq!(answered(&balancer, &syn), answer, "S2: from the SYN alone");
            ports.insert(option.port.unwrap());
        }
        assert_eq!(ports, BTreeSet::from([41_001, 41_002, 41_003]));
    }
    let snapshot = balancer.snapshot();
    assert_eq!(snapshot.decisions["redirected"], 400);
    assert_eq!(
        snapshot
            .servers
            .values()
            .map(|server| (server.selected, server.packets))
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
        (400, 0)
    );
}

#[test]
fn c5_who_would_hand_over_is_told_no_digest_and_reconnects() {
    for cast in casts() {
        let answer = answered(&answering(), &cast.syn(443, Some(R)));
        let option = option_of(&answer).unwrap();
        assert_eq!(option, RedirectOption { port: option.port, ..C });
        assert!(option.port.is_some());
    }
}

#[test]
fn b3_what_must_not_be_answered_is_plain() {
    let balancer = answering();
    for cast in casts() {
        let mut md5 = [1u8; 20];
        md5[..2].copy_from_slice(&[19, 18]);
        let bare = Segment::bare(cast.client(), cast.vip(443), TcpFlags::SYN);
        let mut signed = Segment { options: &md5, ..bare }.emit();
        signed.insert_redirect(EXID, &RC, 1500).unwrap();
        let mut damaged = cast.syn(443, Some(RC)).bytes().to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        let mut from_vip = cast.syn(443, Some(RC));
        from_vip.set_source(cast.vip);
        for packet in [
            cast.syn(443, None),
            cast.syn(443, Some(RedirectOption { hops: 3, ..RC })),
            signed,
            Packet::from_slice(&damaged).unwrap(),
            from_vip,
        ] {
            assert_eq!(decision(&balancer, &packet).unwrap().1, Decision::LegacyHash, "{packet:?}");
        }
    }
}

#[test]
fn b1_syn_acks_of_service_ports_get_c_and_nothing_else_does() {
    let balancer = answering();
    for cast in casts() {
        let confirmed = |packet: &Packet| {
            let mut out = packet.clone();
            assert_eq!(balancer.process(&mut out), Ok(Output::Main));
            assert!(checksums_are_right(&out));
            assert_eq!(out.source(), cast.vip);
            out
        };
        let out = confirmed(&syn_ack(&cast, 41_002, None));
        assert_eq!(option_of(&out), Some(C));
        assert_eq!(out.source_socket(), Some(cast.vip(41_002)));
        // An agent has spoken already: a second copy would make the client ignore both (W1).
        let redirect = RedirectOption { port: Some(41_003), ..C };
        assert_eq!(option_of(&confirmed(&syn_ack(&cast, 41_002, Some(redirect)))), Some(redirect));
        // Of a plain client, and beyond the handshake.
        assert_eq!(option_of(&confirmed(&syn_ack(&cast, 443, None))), None);
        let source = std::net::SocketAddr::new(cast.servers[1], 41_002);
        let ack = segment(source, cast.client(), TcpFlags::ACK, SeqNumber(9));
        assert_eq!(processed(&balancer, &ack).tcp().unwrap().header_len(), ack.tcp().unwrap().header_len());
        // W2: there is no room.
        let full = Segment {
            options: &[1; 40],
            ack: SeqNumber(8),
            ..Segment::bare(source, cast.client(), TcpFlags::SYN | TcpFlags::ACK)
        };
        assert_eq!(option_of(&confirmed(&full.emit())), None);
    }
    let snapshot = balancer.snapshot();
    assert_eq!((snapshot.confirmed_syn_acks, snapshot.unconfirmed_syn_acks), (2, 2));
    let silent = super::balancer(&three_servers(""));
    for cast in casts() {
        assert_eq!(option_of(&processed(&silent, &syn_ack(&cast, 41_002, None))), None);
    }
}

#[test]
fn b7_nobody_is_sent_to_a_server_that_takes_no_new_connections() {
    let drained = three_servers("answer = \"balancer\"")
        .replace("ports = { web = 41002 }", "ports = { web = 41002 }\nstate = \"drain\"");
    let config = Config::parse(&Source::new("test.toml", drained)).unwrap();
    let balancer = Balancer::new(&config, SelectKey([1; 16]));
    let mut unfit = Unfit::default();
    unfit.insert(2, 0, Family::V6);
    let balancer = balancer.successor_without(&config, &unfit);
    for (cast, expected) in casts().into_iter().zip([vec![41_001, 41_003], vec![41_001]]) {
        let mut ports = BTreeSet::new();
        for n in 0..100 {
            let mut syn = segment(cast.client(), cast.vip(443), TcpFlags::SYN, SeqNumber(n));
            syn.insert_redirect(EXID, &RC, 1500).unwrap();
            ports.extend(option_of(&answered(&balancer, &syn)).unwrap().port);
        }
        assert_eq!(ports.into_iter().collect::<Vec<_>>(), expected);
    }
    unfit.insert(0, 0, Family::V6);
    let none = balancer.successor_without(&config, &unfit);
    assert_eq!(none.route(&casts()[1].syn(443, Some(RC))), Err(DropReason::NoServer(443)));
}

#[test]
fn each_service_may_say_who_answers() {
    let own = |all: &str, own: &str| {
        let text = three_servers(all).replace("redirect_port = 443", &format!("redirect_port = 443\n{own}"));
        let route = balancer(&text).route(&casts()[0].syn(443, Some(RC)));
        matches!(route, Ok(Route::Redirect { .. }))
    };
    assert!(own("", "answer = \"balancer\""));
    assert!(own("answer = \"balancer\"", ""));
    assert!(!own("answer = \"balancer\"", "answer = \"server\""));
    assert!(!own("", ""));
}

#[test]
fn where_no_way_back_leads_here_the_balancer_cannot_answer() {
    let refused = |text: String| Config::parse(&Source::new("test.toml", text)).unwrap_err();
    let error = refused(three_servers("forward = \"direct\"\nanswer = \"balancer\""));
    assert_eq!(error.line(), Some(4), "{error}");
    assert!(error.message().contains("forward = \"network\""), "{error}");
    let error = refused(super::with_udp("", "answer = \"balancer\"").replace("\"tcp\", \"udp\"", "\"udp\""));
    assert!(error.message().contains("only TCP"), "{error}");
    let error = refused(three_servers("answer = \"nobody\""));
    assert!(error.message().contains("unknown variant"), "{error}");
}
