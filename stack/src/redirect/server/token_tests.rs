//! §10 at the server: tokens that go with redirects, and SYNs that need one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::redirect::{Purpose, Require, TokenKeys};
use crate::wire::DEFAULT_EXID;

const X: u16 = 443;
const Y: u16 = 41_001;
const Z: u16 = 41_002;
const NOW: Instant = Instant::from_millis(5_000_000);
const UNIX: u64 = 1_800_000_000;
/// What a Linux SYN or SYN-ACK carries: MSS, SACK-permitted, timestamps, window scale.
const LINUX: [u8; 20] = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 77, 0, 0, 0, 0, 1, 3, 3, 7];

fn keys() -> TokenKeys {
    TokenKeys::parse("2 000102030405060708090a0b0c0d0e0f").unwrap()
}

/// Client, the server's own address, and the VIP that clients know it by.
fn ends() -> [(SocketAddr, IpAddr, IpAddr); 2] {
    let address = |text: &str| text.parse().unwrap();
    [
        ("198.51.100.7:50001".parse().unwrap(), address("10.0.0.11"), address("203.0.113.10")),
        ("[2001:db8:1::7]:50001".parse().unwrap(), address("fd00::11"), address("2001:db8::10")),
    ]
}

fn server(own: IpAddr, vip: IpAddr, require: Require) -> Server {
    let service = ServicePorts { address: own, redirect_port: X, service_port: Y };
    Server::new(ServerConfig {
        services: vec![service],
        tokens: TokenPolicy { keys: Some(Arc::new(keys())), require, under_load: 20, trusted: Vec::new() },
        shared: BTreeMap::from([(service.service_socket(), vip)]),
        clock: WallClock::new(NOW, Duration::from_secs(UNIX)),
        ..ServerConfig::default()
    })
}

fn purpose(client: SocketAddr, vip: IpAddr, port: u16) -> Purpose {
    Purpose { vip, client: client.ip(), redirect_port: X, service_port: port }
}

fn good(client: SocketAddr, vip: IpAddr) -> [u8; 8] {
    keys().make(UNIX, &purpose(client, vip, Y))
}

fn syn(client: SocketAddr, to: SocketAddr, option: Option<RedirectOption>) -> Packet {
    let bare = Segment::bare(client, to, TcpFlags::SYN);
    let mut packet = Segment { seq: SeqNumber(7), options: &LINUX, ..bare }.emit();
    if let Some(option) = option {
        packet.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
    }
    packet
}

fn at_service(token: Option<[u8; 8]>) -> RedirectOption {
    RedirectOption { redirect: true, port: Some(X), hops: 1, token, ..RedirectOption::default() }
}

fn option_of(packet: &Packet) -> RedirectOption {
    packet.tcp().unwrap().redirect(DEFAULT_EXID).unwrap().expect("an option")
}

fn remote(server: &mut Server, now: Instant, mut packet: Packet) -> Action {
    server.handle_remote(now, &mut packet)
}

#[test]
fn s2_an_answer_carries_a_token_that_the_service_port_takes() {
    for (client, own, vip) in ends() {
        for confirm in [true, false] {
            let mut server = server(own, vip, Require::Always);
            let option = RedirectOption { redirect: true, confirm, ..RedirectOption::default() };
            let mut asking = syn(client, SocketAddr::new(own, X), Some(option));
            let action = server.handle_remote(NOW, &mut asking);
            let answer = if confirm {
                assert_eq!(action, Action::Drop);
                server.poll_transmit(NOW).expect("an answer").packet
            } else {
                // S1: the half-open connection itself needs no token.
                assert_eq!((action, asking.ports()), (Action::Pass, Some((client.port(), Y))));
                let bare = Segment::bare(SocketAddr::new(own, Y), client, TcpFlags::SYN | TcpFlags::ACK);
                let mut packet = Segment { ack: SeqNumber(8), options: &LINUX, ..bare }.emit();
                assert_eq!(server.handle_local(NOW, &mut packet), Action::Pass);
                packet
            };
            let option = option_of(&answer);
            assert_eq!((option.token, option.port), (Some(good(client, vip)), Some(Y)));
            assert_eq!(option.observed, Some(observed_digest(client)), "O and T both fit");
            let next = syn(client, SocketAddr::new(own, Y), Some(at_service(option.token)));
            assert_eq!(remote(&mut server, NOW + Duration::from_secs(30), next), Action::Pass);
        }
    }
}

#[test]
fn only_good_tokens_open_a_connection_at_a_service_port() {
    for (client, own, vip) in ends() {
        let mut server = server(own, vip, Require::Always);
        let to = SocketAddr::new(own, Y);
        let token = good(client, vip);
        let other = SocketAddr::new(SocketAddr::new(client.ip(), 1).ip(), 50_002);
        let elsewhere: IpAddr =
            if own.is_ipv4() { "198.51.100.8".parse().unwrap() } else { "2001:db8:1::8".parse().unwrap() };
        let forged = std::array::from_fn(|at| if at == 7 { token[7] ^ 1 } else { token[at] });
        let foreign = std::array::from_fn(|at| if at == 0 { token[0] ^ 0x40 } else { token[at] });
        for (packet, passes) in [
            (syn(client, to, Some(at_service(Some(token)))), true),
            (syn(other, to, Some(at_service(Some(token)))), true),
            (syn(client, to, Some(at_service(None))), false),
            (syn(client, to, None), false),
            (syn(client, to, Some(at_service(Some(forged)))), false),
            (syn(client, to, Some(at_service(Some(foreign)))), false),
            (syn(SocketAddr::new(elsewhere, 50_001), to, Some(at_service(Some(token)))), false),
            // Plain clients of the redirect port.
            (syn(client, SocketAddr::new(own, X), None), true),
        ] {
            let action = remote(&mut server, NOW, packet.clone());
            assert_eq!(action == Action::Pass, passes, "{packet:?}");
        }
        let late = syn(client, to, Some(at_service(Some(token))));
        assert_eq!(remote(&mut server, NOW + Duration::from_secs(90), late), Action::Drop);
        let counters = server.counters();
        assert_eq!((counters.tokens_missing, counters.tokens_unknown_key), (2, 1));
        assert_eq!((counters.tokens_mismatch, counters.tokens_expired), (2, 1));
        assert_eq!(server.poll_transmit(NOW), None, "nothing is answered");
        // Established connections are nobody's business here.
        let bare = Segment::bare(client, to, TcpFlags::ACK);
        assert_eq!(remote(&mut server, NOW, bare.emit()), Action::Pass);
    }
}

#[test]
fn the_clock_of_the_driver_counts() {
    let [(client, own, vip), _] = ends();
    let mut server = server(own, vip, Require::Always);
    let arrives = |server: &mut Server| {
        remote(server, NOW, syn(client, SocketAddr::new(own, Y), Some(at_service(Some(good(client, vip))))))
    };
    server.set_clock(WallClock::new(NOW, Duration::from_secs(UNIX + 3600)));
    assert_eq!(arrives(&mut server), Action::Drop);
    server.set_clock(WallClock::new(NOW, Duration::from_secs(UNIX)));
    assert_eq!(arrives(&mut server), Action::Pass);
    let others = TokenKeys::parse("2 ffffffffffffffffffffffffffffffff").unwrap();
    let policy =
        TokenPolicy { keys: Some(Arc::new(others)), require: Require::Always, ..TokenPolicy::default() };
    let shared = BTreeMap::from([(SocketAddr::new(own, Y), vip)]);
    server.set_tokens(policy, shared);
    assert_eq!(arrives(&mut server), Action::Drop);
    assert_eq!(server.counters().tokens_mismatch, 1);
}

#[test]
fn under_load_is_told_and_ends() {
    let [(client, own, vip), _] = ends();
    let mut server = server(own, vip, Require::UnderLoad);
    let to = SocketAddr::new(own, Y);
    let passed = (0..50).filter(|_| remote(&mut server, NOW, syn(client, to, None)) == Action::Pass).count();
    assert_eq!(passed, 20);
    let token = at_service(Some(good(client, vip)));
    assert_eq!(remote(&mut server, NOW, syn(client, to, Some(token))), Action::Pass);
    let later = NOW + Duration::from_secs(12);
    assert_eq!(remote(&mut server, later, syn(client, to, None)), Action::Pass);
    let events: Vec<ServerEvent> = std::iter::from_fn(|| server.poll_event())
        .filter(|event| matches!(event, ServerEvent::Load { .. }))
        .collect();
    assert_eq!(events, [ServerEvent::Load { demanded: true }, ServerEvent::Load { demanded: false }]);
}

#[test]
fn w2_where_tokens_are_demanded_the_digest_goes_first_and_else_the_token() {
    let [(client, own, vip), _] = ends();
    // A SYN-ACK of 24 bytes of options leaves 16.
    let options = [&LINUX[..], &[1, 1, 1, 1]].concat();
    for (require, has_token) in [(Require::Always, true), (Require::Never, false)] {
        let mut server = server(own, vip, require);
        let option = RedirectOption { redirect: true, ..RedirectOption::default() };
        assert_eq!(
            remote(&mut server, NOW, syn(client, SocketAddr::new(own, X), Some(option))),
            Action::Pass
        );
        let bare = Segment::bare(SocketAddr::new(own, Y), client, TcpFlags::SYN | TcpFlags::ACK);
        let mut packet = Segment { ack: SeqNumber(8), options: &options, ..bare }.emit();
        assert_eq!(server.handle_local(NOW, &mut packet), Action::Pass);
        let option = option_of(&packet);
        assert_eq!((option.token.is_some(), option.observed.is_some()), (has_token, !has_token));
    }
}

#[test]
fn without_keys_no_token_is_made() {
    let [(client, own, vip), _] = ends();
    let mut server = server(own, vip, Require::Never);
    server.set_tokens(TokenPolicy::default(), BTreeMap::new());
    let option = RedirectOption { redirect: true, confirm: true, ..RedirectOption::default() };
    assert_eq!(remote(&mut server, NOW, syn(client, SocketAddr::new(own, X), Some(option))), Action::Drop);
    assert_eq!(option_of(&server.poll_transmit(NOW).unwrap().packet).token, None);
    assert_eq!(remote(&mut server, NOW, syn(client, SocketAddr::new(own, Y), None)), Action::Pass);
}

#[test]
fn o7_a_redirect_in_the_middle_carries_a_token_for_where_it_leads() {
    for (client, own, vip) in ends() {
        let mut server = server(own, vip, Require::Always);
        let (service, to) = (SocketAddr::new(own, Y), SocketAddr::new(own, Z));
        server.redirect_connection(NOW, client, service, to, None).unwrap();
        // Said for long, it is a fresh one each time.
        for seconds in [0, 29] {
            let now = NOW + Duration::from_secs(seconds);
            let bare = Segment::bare(service, client, TcpFlags::ACK);
            let mut packet = Segment { seq: SeqNumber(9), ack: SeqNumber(8), ..bare }.emit();
            assert_eq!(server.handle_local(now, &mut packet), Action::Pass);
            let option = option_of(&packet);
            let expected = keys().make(UNIX + seconds, &purpose(client, vip, Z));
            assert_eq!((option.port, option.token), (Some(Z), Some(expected)));
        }
        // With two SACK blocks there is no room for all of it: it waits.
        let sack = [&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1, 5, 18][..], &[0; 16]].concat();
        let bare = Segment::bare(service, client, TcpFlags::ACK);
        let mut packet = Segment { seq: SeqNumber(9), ack: SeqNumber(8), options: &sack, ..bare }.emit();
        assert_eq!(server.handle_local(NOW, &mut packet), Action::Pass);
        assert_eq!(packet.tcp().unwrap().redirect(DEFAULT_EXID), Ok(None));
    }
}

#[test]
fn o24_a_redirect_to_a_servers_own_address_carries_a_token_that_it_takes() {
    for (client, own, vip) in ends() {
        let mut from = server(own, vip, Require::Always);
        let text = if own.is_ipv4() { "10.0.0.12" } else { "fd00::12" };
        let to = SocketAddr::new(text.parse().unwrap(), Y);
        from.redirect_connection(NOW, client, SocketAddr::new(own, Y), to, None).unwrap();
        let bare = Segment::bare(SocketAddr::new(own, Y), client, TcpFlags::ACK);
        let mut packet = Segment { seq: SeqNumber(9), ack: SeqNumber(8), ..bare }.emit();
        assert_eq!(from.handle_local(NOW, &mut packet), Action::Pass);
        let option = option_of(&packet);
        assert_eq!((option.address, option.port), (Some(to.ip()), Some(Y)));
        let mut there = server(to.ip(), vip, Require::Always);
        let arrives =
            |server: &mut Server, token| remote(server, NOW, syn(client, to, Some(at_service(token))));
        assert_eq!(arrives(&mut there, option.token), Action::Pass);
        // As is one of whoever comes by the balancer, and none for another server's address.
        assert_eq!(arrives(&mut there, Some(good(client, vip))), Action::Pass);
        let elsewhere = keys().make(UNIX, &purpose(client, own, Y));
        assert_eq!(arrives(&mut there, Some(elsewhere)), Action::Drop);
    }
}

#[test]
fn a_fragment_of_a_syn_counts_as_one_without_a_token() {
    let [(client, own, vip), _] = ends();
    let whole = syn(client, SocketAddr::new(own, Y), Some(at_service(Some(good(client, vip)))));
    let mut bytes = whole.bytes().to_vec();
    // More fragments; the header's checksum follows (RFC 1624).
    bytes[6] |= 0x20;
    let sum = u16::from_be_bytes([bytes[10], bytes[11]]);
    let sum = sum.checked_sub(0x2000).unwrap_or_else(|| sum.wrapping_sub(0x2001));
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    let fragment = Packet::from_slice(&bytes).unwrap();
    assert!(fragment.fragment().is_some());
    for (require, action) in [(Require::Always, Action::Drop), (Require::Never, Action::Pass)] {
        let mut server = server(own, vip, require);
        assert_eq!(remote(&mut server, NOW, fragment.clone()), action);
        assert_eq!(server.counters().tokens_missing, u64::from(action == Action::Drop));
    }
}
