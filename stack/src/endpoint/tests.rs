//! The sans-IO core, segment by segment.

mod standard;
mod super_packets;

use std::net::SocketAddr;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::*;
use crate::redirect::{ClientConfig, Continuation, OnRedirect, ServerConfig, ServicePorts, VipConfig};
use crate::time::Instant;
use crate::wire::{Offload, Packet, Segment, SeqNumber, TcpFlags, icmp_message};

const VIP: &str = "203.0.113.10";
const CLIENT: &str = "192.0.2.1:5000";
const X: u16 = 443;
const Y: u16 = 41001;

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(VIP.parse().unwrap(), port)
}

fn server() -> Connections {
    let services = vec![ServicePorts { address: VIP.parse().unwrap(), redirect_port: X, service_port: Y }];
    let redirect = ServerConfig { services, replies_per_second: 10, ..Default::default() };
    let mut server = Connections::server(ServerOptions { redirect, ..Default::default() }, 1500, [7; 16]);
    server.listen(at(Y)).unwrap();
    server.listen(at(X)).unwrap();
    server
}

fn client() -> Connections {
    let vips = vec![VipConfig {
        address: VIP.parse().unwrap(),
        continuation: Continuation::Plain,
        on_redirect: OnRedirect::default(),
    }];
    let options = ClientOptions {
        redirect: ClientConfig { vips, ..Default::default() },
        addresses: vec!["192.0.2.1".parse().unwrap()],
        ..Default::default()
    };
    Connections::client(options, 1500, [7; 16])
}

fn segment(port: u16, flags: TcpFlags, seq: u32, ack: u32) -> Packet {
    let bare = Segment::bare(CLIENT.parse().unwrap(), at(port), flags);
    Segment { seq: SeqNumber(seq), ack: SeqNumber(ack), window: 65_535, ..bare }.emit()
}

fn input(connections: &mut Connections, now: Instant, packet: &Packet) -> Vec<Packet> {
    connections.handle_input(now, bytes::BytesMut::from(packet.bytes()), Offload::default());
    output(connections, now)
}

fn output(connections: &mut Connections, now: Instant) -> Vec<Packet> {
    connections.handle_timeout(now);
    std::iter::from_fn(|| connections.poll_transmit()).collect()
}

fn flags(packet: &Packet) -> TcpFlags {
    packet.tcp().unwrap().flags()
}

/// A connection of the client to `port`, established; also its (SND.NXT, RCV.NXT) at the server.
fn establish(server: &mut Connections, now: Instant, port: u16) -> (SeqNumber, SeqNumber) {
    let answer = input(server, now, &segment(port, TcpFlags::SYN, 100, 0));
    assert_eq!(answer.len(), 1);
    let iss = answer[0].tcp().unwrap().seq();
    assert!(input(server, now, &segment(port, TcpFlags::ACK, 101, iss.0.wrapping_add(1))).is_empty());
    assert_eq!(server.counters().established, 1);
    (iss + 1, SeqNumber(101))
}

#[test]
fn s7_a_repeated_syn_is_answered_by_the_same_syn_ack() {
    let mut server = server();
    let syn = segment(Y, TcpFlags::SYN, 100, 0);
    let first = input(&mut server, Instant::ZERO, &syn);
    let again = input(&mut server, Instant::from_millis(10), &syn);
    assert_eq!(first.len(), 1);
    assert!(first[0].tcp().unwrap().is_syn_ack());
    assert_eq!(first, again);
}

#[test]
fn s7_a_syn_on_an_established_connection_is_answered_by_a_challenge_ack() {
    let mut server = server();
    let (snd_nxt, rcv_nxt) = establish(&mut server, Instant::ZERO, Y);
    // The same one as a probe has, and another one.
    for isn in [100, 7000] {
        let answer = input(&mut server, Instant::from_millis(10), &segment(Y, TcpFlags::SYN, isn, 0));
        assert_eq!(answer.len(), 1);
        let tcp = answer[0].tcp().unwrap();
        assert_eq!((tcp.flags(), tcp.seq(), tcp.ack()), (TcpFlags::ACK, snd_nxt, rcv_nxt));
    }
    let many = (0..100)
        .flat_map(|isn| input(&mut server, Instant::from_millis(20), &segment(Y, TcpFlags::SYN, isn, 0)));
    assert!(many.count() <= 10, "challenge ACKs are limited");
}

#[test]
fn s8_a_segment_without_connection_is_answered_by_a_limited_number_of_resets() {
    let mut server = server();
    let stray = segment(Y, TcpFlags::ACK, 500, 900);
    let answer = input(&mut server, Instant::ZERO, &stray);
    let tcp = answer[0].tcp().unwrap();
    assert_eq!((tcp.flags(), tcp.seq()), (TcpFlags::RST, SeqNumber(900)));
    assert!(input(&mut server, Instant::ZERO, &segment(Y, TcpFlags::RST, 500, 0)).is_empty());
    let many = (0..100).flat_map(|_| input(&mut server, Instant::ZERO, &stray));
    assert!(many.count() < 10, "resets are limited");

    let mut client = client();
    let mut stray = stray;
    let (own, vip) = (stray.source(), stray.destination());
    stray.set_source(vip);
    stray.set_destination(own);
    stray.set_source_port(X);
    stray.set_destination_port(5000);
    let resets: usize = (0..1000).map(|_| input(&mut client, Instant::ZERO, &stray).len()).sum();
    assert_eq!(resets, 100);
}

#[test]
fn s6_only_a_service_that_is_listened_on_is_redirected_to() {
    let mut server = server();
    let option = crate::wire::RedirectOption { redirect: true, confirm: true, ..Default::default() };
    let mut syn = segment(X, TcpFlags::SYN, 100, 0);
    syn.insert_redirect(crate::wire::DEFAULT_EXID, &option, 1500).unwrap();
    let asked = |server: &mut Connections| {
        let answer = input(server, Instant::ZERO, &syn);
        answer[0].tcp().unwrap().redirect(crate::wire::DEFAULT_EXID).unwrap().and_then(|option| option.port)
    };
    assert_eq!(asked(&mut server), Some(Y));
    server.stop_listening(Instant::ZERO, at(Y));
    assert_eq!(asked(&mut server), None);
}

#[test]
fn a_lost_fin_is_repeated_however_often_the_peer_says_what_it_has() {
    let mut server = server();
    let mut now = Instant::ZERO;
    let (snd_nxt, _) = establish(&mut server, now, Y);
    let id = server.accept(now, at(Y)).unwrap();
    server.release(now, id);
    assert!(flags(&output(&mut server, now)[0]).contains(TcpFlags::FIN));
    // Some of them behind data that is lost.
    for seq in [101, 101, 201, 201, 201] {
        now += Duration::from_millis(100);
        assert!(input(&mut server, now, &segment(Y, TcpFlags::ACK, seq, snd_nxt.0)).is_empty());
    }
    for _ in 0..3 {
        now += Duration::from_secs(10);
        let again = output(&mut server, now);
        assert!(again.len() == 1 && flags(&again[0]).contains(TcpFlags::FIN), "{again:?}");
    }
    input(&mut server, now, &segment(Y, TcpFlags::FIN | TcpFlags::ACK, 101, snd_nxt.0 + 1));
    output(&mut server, now + Duration::from_secs(60));
    assert!(server.is_drained());
}

#[test]
fn a_new_incarnation_takes_the_place_of_one_in_time_wait() {
    let mut server = server();
    let now = Instant::ZERO;
    let (snd_nxt, _) = establish(&mut server, now, Y);
    let id = server.accept(now, at(Y)).unwrap();
    server.release(now, id);
    let fin = output(&mut server, now);
    assert!(flags(&fin[0]).contains(TcpFlags::FIN));
    let ack = input(&mut server, now, &segment(Y, TcpFlags::FIN | TcpFlags::ACK, 101, snd_nxt.0 + 1));
    assert_eq!(flags(&ack[0]), TcpFlags::ACK);
    assert_eq!(server.len(), 1);
    let old = input(&mut server, now, &segment(Y, TcpFlags::SYN, 50, 0));
    assert_eq!(flags(&old[0]), TcpFlags::ACK);
    let new = input(&mut server, now, &segment(Y, TcpFlags::SYN, 90_000, 0));
    assert!(new[0].tcp().unwrap().is_syn_ack());
    assert_eq!(server.len(), 1);
}

#[test]
fn a_reset_handshake_leaves_nothing_behind() {
    let mut server = server();
    let now = Instant::ZERO;
    input(&mut server, now, &segment(Y, TcpFlags::SYN, 100, 0));
    assert_eq!(server.len(), 1);
    input(&mut server, now, &segment(Y, TcpFlags::RST, 101, 0));
    assert_eq!(server.len(), 0);
    assert!(server.accept(now, at(Y)).is_none());
}

/// The client's SYN to VIP:X and the connection's name.
fn connecting(client: &mut Connections) -> (ConnectionId, Packet) {
    let id = client.connect(Instant::ZERO, at(X)).unwrap();
    let mut sent = output(client, Instant::ZERO);
    (id, sent.remove(0))
}

fn icmp(kind: u8, code: u8, word: u16, quoted: &Packet) -> Packet {
    let mut message = vec![kind, code, 0, 0, 0, 0];
    message.extend(word.to_be_bytes());
    message.extend(&quoted.bytes()[..28]);
    icmp_message("198.51.100.1".parse().unwrap(), quoted.source(), &message)
}

#[test]
fn an_unreachable_host_ends_a_connect_but_no_connection() {
    let mut client = client();
    let (id, syn) = connecting(&mut client);
    let mut forged = syn.clone();
    forged.set_destination_port(9);
    input(&mut client, Instant::ZERO, &icmp(3, 1, 0, &forged));
    assert_eq!(client.poll_connected(id, Waker::noop()), Poll::Pending);
    input(&mut client, Instant::ZERO, &icmp(3, 1, 0, &syn));
    assert_eq!(client.poll_connected(id, Waker::noop()), Poll::Ready(Err(ConnectionError::Unreachable)));
}

#[test]
fn a_path_mtu_is_lowered_only_for_segments_under_way_and_never_below_the_least() {
    let mut client = client();
    let now = Instant::ZERO;
    let (id, syn) = connecting(&mut client);
    let iss = syn.tcp().unwrap().seq();
    let answer = Segment {
        seq: SeqNumber(1000),
        ack: iss + 1,
        window: 65_535,
        options: &[2, 4, 5, 180],
        ..Segment::bare(at(X), syn.source_socket().unwrap(), TcpFlags::SYN | TcpFlags::ACK)
    };
    input(&mut client, now, &answer.emit());
    assert_eq!(client.poll_connected(id, Waker::noop()), Poll::Ready(Ok(())));
    let write = |client: &mut Connections| {
        assert!(client.poll_write(id, &[7; 10_000], Waker::noop()).is_ready());
    };
    write(&mut client);
    let sent = output(&mut client, now);
    assert_eq!(sent[0].len(), 1500);
    // Not under way: a sequence number that nobody could know.
    let mut old = sent[0].clone().into_buffer();
    old[24..28].copy_from_slice(&(iss.0.wrapping_sub(90_000)).to_be_bytes());
    let old = Packet::parse(old, Offload::default()).unwrap();
    input(&mut client, now, &icmp(3, 4, 1000, &old));
    assert_eq!(client.counters().mtu_lowered, 0);
    input(&mut client, now, &icmp(3, 4, 1280, &sent[0]));
    assert_eq!(client.counters().mtu_lowered, 1);
    let again = output(&mut client, Instant::from_millis(1500));
    assert_eq!(again[0].len(), 1280);
    assert_eq!(again[0].tcp().unwrap().seq(), sent[0].tcp().unwrap().seq());
    input(&mut client, now, &icmp(3, 4, 68, &again[0]));
    let least = output(&mut client, Instant::from_millis(6000));
    assert_eq!(least[0].len(), 576);
}

#[test]
fn what_cannot_be_read_is_counted_and_forgotten() {
    let mut server = server();
    let now = Instant::ZERO;
    for bytes in [&[][..], &[0x45], &[0xff; 60], &[0x60; 40]] {
        server.handle_input(now, bytes::BytesMut::from(bytes), Offload::default());
    }
    let mut damaged = segment(Y, TcpFlags::SYN, 100, 0).into_buffer();
    damaged[36] ^= 1;
    server.handle_input(now, damaged, Offload::default());
    let counters = server.counters();
    assert_eq!((counters.malformed + counters.other_packets, counters.bad_checksums), (4, 1));
    assert!(output(&mut server, now).is_empty());
    assert!(server.is_empty());
}

#[test]
fn a_peer_that_falls_silent_is_given_up_after_the_user_timeout_but_idleness_is_no_reason() {
    let mut server = server();
    establish(&mut server, Instant::ZERO, Y);
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    let mut now = Instant::from_millis(3_600_000);
    assert!(output(&mut server, now).is_empty());
    assert!(server.poll_write(id, b"anybody there?", Waker::noop()).is_ready());
    assert_eq!(output(&mut server, now).len(), 1);
    let until = now + Duration::from_secs(101);
    while let Some(at) = server.poll_timeout().filter(|at| *at <= until) {
        now = now.max(at);
        output(&mut server, now);
    }
    let read = server.poll_read(id, &mut [0; 8], Waker::noop());
    assert_eq!(read, Poll::Ready(Err(ConnectionError::TimedOut)));
    assert!(server.is_empty());
}

#[test]
fn an_idle_core_asks_for_nothing() {
    let mut server = server();
    assert_eq!(server.poll_timeout(), None);
    establish(&mut server, Instant::ZERO, X);
    output(&mut server, Instant::from_millis(200));
    assert_eq!(server.poll_timeout(), None);
}
