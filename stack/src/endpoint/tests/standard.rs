//! RFC 9293's requirements on a TCP (its appendix B), as far as an endpoint of ours can miss them.

use std::collections::HashSet;

use super::*;
use crate::wire::{DEFAULT_EXID, RedirectOption, TcpOption};

/// A segment on the established connection of [`establish`].
fn on_connection(
    flags: TcpFlags,
    (snd_nxt, rcv_nxt): (SeqNumber, SeqNumber),
    options: &[u8],
    payload: &[u8],
) -> Packet {
    let bare = Segment::bare(CLIENT.parse().unwrap(), at(Y), flags);
    Segment { seq: rcv_nxt, ack: snd_nxt, window: 65_535, options, payload, ..bare }.emit()
}

fn read(server: &mut Connections, id: ConnectionId) -> Vec<u8> {
    let mut buffer = [0; 64];
    match server.poll_read(id, &mut buffer, Waker::noop()) {
        Poll::Ready(Ok(length)) => buffer[..length].to_vec(),
        Poll::Ready(Err(error)) => panic!("{error}"),
        Poll::Pending => Vec::new(),
    }
}

/// SYN with these options; what the server says to it.
fn answer_to(server: &mut Connections, port: u16, options: &[u8]) -> Packet {
    let bare = Segment::bare(CLIENT.parse().unwrap(), at(port), TcpFlags::SYN);
    let syn = Segment { seq: SeqNumber(100), window: 65_535, options, ..bare }.emit();
    input(server, Instant::ZERO, &syn).remove(0)
}

fn mss(packet: &Packet) -> Option<u16> {
    packet.tcp().unwrap().options().find_map(|option| match option {
        Ok(TcpOption::MaximumSegmentSize(mss)) => Some(mss),
        _ => None,
    })
}

#[test]
fn must_3_a_segment_with_a_wrong_checksum_changes_nothing() {
    let mut server = server();
    let stands = establish(&mut server, Instant::ZERO, Y);
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    let mut damaged = on_connection(TcpFlags::ACK, stands, &[], b"hello").into_buffer();
    *damaged.last_mut().unwrap() ^= 1;
    server.handle_input(Instant::ZERO, damaged, Offload::default());
    assert_eq!(server.counters().bad_checksums, 1);
    assert_eq!(read(&mut server, id), b"");
    input(&mut server, Instant::ZERO, &on_connection(TcpFlags::ACK, stands, &[], b"hello"));
    assert_eq!(read(&mut server, id), b"hello");
}

#[test]
fn must_5_6_64_options_come_anywhere_of_any_kind_and_at_any_byte() {
    // Kind 77 is nobody's; the MSS behind it begins at an odd byte.
    let options = [77, 3, 9, 2, 4, 2, 0, 0];
    let mut server = server();
    let syn_ack = answer_to(&mut server, Y, &options);
    assert!(syn_ack.tcp().unwrap().is_syn_ack());
    let stands = (syn_ack.tcp().unwrap().seq() + 1, SeqNumber(101));
    input(&mut server, Instant::ZERO, &on_connection(TcpFlags::ACK, stands, &[77, 3, 9, 0], b"hello"));
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    assert_eq!(read(&mut server, id), b"hello");
    assert!(server.poll_write(id, &[7; 2000], Waker::noop()).is_ready());
    let sent = output(&mut server, Instant::ZERO);
    assert_eq!(sent[0].tcp().unwrap().payload().len(), 512, "the MSS at an odd byte was read");
}

#[test]
fn must_7_an_option_of_illegal_length_harms_nobody() {
    for broken in [[77, 0, 1, 1], [77, 1, 1, 1], [77, 40, 1, 1], [1, 1, 1, 253]] {
        let mut server = server();
        let stands = establish(&mut server, Instant::ZERO, Y);
        let id = server.accept(Instant::ZERO, at(Y)).unwrap();
        input(&mut server, Instant::ZERO, &on_connection(TcpFlags::ACK, stands, &broken, b"hello"));
        let (_, rcv_nxt) = stands;
        let got = read(&mut server, id);
        assert!(got.is_empty() || got == b"hello");
        let stands = (stands.0, rcv_nxt + got.len() as u32);
        input(&mut server, Instant::ZERO, &on_connection(TcpFlags::ACK, stands, &[], b"again"));
        assert_eq!(read(&mut server, id), b"again");
    }
}

#[test]
fn must_14_65_67_the_mss_is_said_in_syns_alone_and_is_what_the_device_carries() {
    let mut server = server();
    assert_eq!(mss(&answer_to(&mut server, Y, &[2, 4, 5, 180])), Some(1460));
    let stands = establish_beside(&mut server);
    let id = server.accept(Instant::ZERO, at(X)).unwrap();
    assert!(server.poll_write(id, &[7; 5000], Waker::noop()).is_ready());
    let sent = output(&mut server, Instant::ZERO);
    assert!(!sent.is_empty() && sent.iter().all(|packet| mss(packet).is_none()), "{stands:?}");

    let mut client = client();
    let (_, syn) = connecting(&mut client);
    assert_eq!(mss(&syn), Some(1460));
}

/// A server of other settings than [`server`]'s, with an established and accepted connection.
fn serving(tcp: TcpOptions) -> (Connections, ConnectionId, (SeqNumber, SeqNumber)) {
    let services = vec![ServicePorts { address: VIP.parse().unwrap(), redirect_port: X, service_port: Y }];
    let redirect = ServerConfig { services, ..Default::default() };
    let options = ServerOptions { redirect, tcp, ..Default::default() };
    let mut server = Connections::server(options, 1500, [7; 16]);
    server.listen(at(Y)).unwrap();
    let stands = establish(&mut server, Instant::ZERO, Y);
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    (server, id, stands)
}

#[test]
fn must_17_a_program_can_switch_the_nagle_algorithm_off() {
    for nodelay in [false, true] {
        let (mut server, id, _) = serving(TcpOptions { nodelay, ..Default::default() });
        let mut sent = 0;
        for _ in 0..3 {
            assert!(server.poll_write(id, b"x", Waker::noop()).is_ready());
            sent += output(&mut server, Instant::ZERO).len();
        }
        assert_eq!(sent, if nodelay { 3 } else { 1 });
    }
}

#[test]
fn must_24_25_26_27_keep_alives_are_off_unless_asked_for_and_sent_to_the_idle() {
    for keep_alive in [None, Some(Duration::from_secs(60))] {
        let (mut server, _, (snd_nxt, _)) = serving(TcpOptions { keep_alive, ..Default::default() });
        output(&mut server, Instant::from_millis(1000));
        assert!(output(&mut server, Instant::from_millis(50_000)).is_empty());
        let sent = output(&mut server, Instant::from_millis(70_000));
        let seqs: Vec<SeqNumber> = sent.iter().map(|packet| packet.tcp().unwrap().seq()).collect();
        let before = SeqNumber(snd_nxt.0.wrapping_sub(1));
        assert_eq!(seqs, keep_alive.map_or(vec![], |_| vec![before]), "{keep_alive:?}");
    }
}

#[test]
fn must_50_options_of_ip_are_ignored() {
    let mut server = server();
    let plain = segment(Y, TcpFlags::SYN, 100, 0);
    let mut bytes = plain.bytes()[..20].to_vec();
    // Four no-operations; a router that adds them corrects length and checksum.
    bytes.extend([1; 4]);
    bytes.extend(&plain.bytes()[20..]);
    bytes[0] = 0x46;
    let length = bytes.len() as u16;
    bytes[2..4].copy_from_slice(&length.to_be_bytes());
    bytes[10..12].fill(0);
    let sum: u32 = bytes[..24].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    server.handle_input(Instant::ZERO, bytes::BytesMut::from(&bytes[..]), Offload::default());
    assert!(output(&mut server, Instant::ZERO)[0].tcp().unwrap().is_syn_ack());
}

#[test]
fn must_60_61_what_was_written_goes_out_and_its_last_segment_says_push() {
    let (mut server, id, _) = serving(TcpOptions::default());
    assert!(server.poll_write(id, &[7; 1000], Waker::noop()).is_ready());
    let sent = output(&mut server, Instant::ZERO);
    let payload: usize = sent.iter().map(|packet| packet.tcp().unwrap().payload().len()).sum();
    assert_eq!(payload, 1000);
    assert!(flags(sent.last().unwrap()).contains(TcpFlags::PSH));
}

/// A second connection, to X.
fn establish_beside(server: &mut Connections) -> (SeqNumber, SeqNumber) {
    let iss = answer_to(server, X, &[]).tcp().unwrap().seq();
    input(server, Instant::ZERO, &segment(X, TcpFlags::ACK, 101, iss.0.wrapping_add(1)));
    (iss + 1, SeqNumber(101))
}

#[test]
fn must_15_16_who_says_no_mss_gets_small_segments_and_the_option_takes_its_room() {
    let mut server = server();
    establish(&mut server, Instant::ZERO, Y);
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    assert!(server.poll_write(id, &[7; 5000], Waker::noop()).is_ready());
    let sent = output(&mut server, Instant::ZERO);
    assert!(!sent.is_empty());
    assert!(sent.iter().all(|packet| packet.tcp().unwrap().payload().len() <= 536));
    for packet in sent {
        let tcp = packet.tcp().unwrap();
        assert!(tcp.header_len() - 20 + tcp.payload().len() <= 536, "options count (RFC 9293 §3.7.1)");
    }
}

#[test]
fn must_9_sequence_numbers_follow_a_secret_and_do_not_come_again() {
    let isn = |server: &mut Connections, port| {
        let first = Segment::bare(CLIENT.parse().unwrap(), at(Y), TcpFlags::SYN);
        let source = SocketAddr::new(first.source.ip(), port);
        let syn = Segment { source, seq: SeqNumber(100), window: 65_535, ..first }.emit();
        input(server, Instant::ZERO, &syn)[0].tcp().unwrap().seq()
    };
    let mut servers = [[1; 16], [2; 16]].map(|key| {
        let mut server = Connections::server(ServerOptions::default(), 1500, key);
        server.listen(at(Y)).unwrap();
        server
    });
    let mut numbers = HashSet::new();
    for server in &mut servers {
        for port in 5000..5100 {
            assert!(numbers.insert(isn(server, port)));
        }
    }
}

#[test]
fn must_10_a_simultaneous_open_is_plain_tcp() {
    let mut client = client();
    let (id, syn) = connecting(&mut client);
    let (own, vip) = (syn.source_socket().unwrap(), at(X));
    let bare = Segment::bare(vip, own, TcpFlags::SYN);
    let theirs = Segment { seq: SeqNumber(7000), window: 65_535, ..bare }.emit();
    let answer = input(&mut client, Instant::ZERO, &theirs);
    let tcp = answer[0].tcp().unwrap();
    assert!(tcp.is_syn_ack() && tcp.ack() == SeqNumber(7001) && tcp.seq() == syn.tcp().unwrap().seq());
    assert_eq!(tcp.redirect(DEFAULT_EXID), Ok(None));
    // Their SYN-ACK is no news, their ACK of ours is (RFC 9293 §3.10.7.4, appendix A.2).
    let iss = tcp.seq();
    for (flags, seq) in [(TcpFlags::SYN | TcpFlags::ACK, 7000), (TcpFlags::ACK, 7001)] {
        let bare = Segment::bare(vip, own, flags);
        let theirs = Segment { seq: SeqNumber(seq), ack: iss + 1, window: 65_535, ..bare }.emit();
        input(&mut client, Instant::ZERO, &theirs);
    }
    assert_eq!(client.poll_connected(id, Waker::noop()), Poll::Ready(Ok(())));
}

#[test]
fn must_12_programs_learn_that_their_connection_was_aborted() {
    let mut server = server();
    let stands = establish(&mut server, Instant::ZERO, Y);
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    input(&mut server, Instant::ZERO, &on_connection(TcpFlags::RST, stands, &[], &[]));
    let read = server.poll_read(id, &mut [0; 8], Waker::noop());
    assert_eq!(read, Poll::Ready(Err(ConnectionError::Reset)));
}

#[test]
fn must_66_a_reset_counts_although_the_window_is_closed() {
    let mut server = server();
    let mut stands = establish(&mut server, Instant::ZERO, Y);
    let id = server.accept(Instant::ZERO, at(Y)).unwrap();
    // Nobody reads: the window closes.
    let chunk = [7; 1000];
    for _ in 0..10_000 {
        let answer = input(&mut server, Instant::ZERO, &on_connection(TcpFlags::ACK, stands, &[], &chunk));
        let Some(last) = answer.last().map(|packet| packet.tcp().unwrap()) else { continue };
        let closed = last.window() == 0;
        stands.1 = last.ack();
        if closed {
            input(&mut server, Instant::ZERO, &on_connection(TcpFlags::RST, stands, &[], &[]));
            let mut read = || server.poll_read(id, &mut [0; 4096], Waker::noop());
            let last = std::iter::repeat_with(&mut read).find(|read| !matches!(read, Poll::Ready(Ok(1..))));
            assert_eq!(last, Some(Poll::Ready(Err(ConnectionError::Reset))));
            return;
        }
    }
    panic!("the window has never closed");
}

#[test]
fn must_46_57_63_syns_from_and_to_what_is_no_host_are_discarded() {
    let mut server = server();
    let to_vip = |source: &str| Segment::bare(source.parse().unwrap(), at(Y), TcpFlags::SYN).emit();
    for source in ["224.0.0.1:5000", "255.255.255.255:5000", "0.0.0.0:5000"] {
        let answer = input(&mut server, Instant::ZERO, &to_vip(source));
        assert!(answer.is_empty() && server.is_empty(), "{source}");
    }
    for address in ["224.0.0.1", "255.255.255.255"] {
        assert!(client().connect(Instant::ZERO, SocketAddr::new(address.parse().unwrap(), Y)).is_err());
        let to = SocketAddr::new(address.parse().unwrap(), Y);
        let syn = Segment::bare(CLIENT.parse().unwrap(), to, TcpFlags::SYN).emit();
        let answer = input(&mut server, Instant::ZERO, &syn);
        assert!(answer.is_empty() && server.is_empty(), "{address}");
    }
}

fn length(option: &TcpOption) -> usize {
    match option {
        TcpOption::NoOperation => 1,
        TcpOption::MaximumSegmentSize(_) => 4,
        TcpOption::WindowScale(_) => 3,
        TcpOption::SackPermitted => 2,
        TcpOption::Timestamps { .. } => 10,
        TcpOption::Experiment { bytes, .. } => bytes.len(),
        other => panic!("{other:?} is not ours"),
    }
}

#[test]
fn must_69_options_are_padded_with_zeros_or_no_operations() {
    let mut server = server();
    let option = RedirectOption { redirect: true, confirm: true, ..Default::default() };
    let mut syn = segment(X, TcpFlags::SYN, 100, 0);
    syn.insert_redirect(DEFAULT_EXID, &option, 1500).unwrap();
    for packet in input(&mut server, Instant::ZERO, &syn) {
        let tcp = packet.tcp().unwrap();
        let said: usize = tcp.options().map(|option| length(&option.unwrap())).sum();
        let rest = &tcp.option_bytes()[said..];
        assert!(rest.iter().all(|byte| *byte == 0), "{:?}", tcp.option_bytes());
    }
}
