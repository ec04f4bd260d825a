//! What is left to devices, and work that does not grow with what is open.

use super::*;
use crate::wire::GsoKind;

/// The ends of a connection and its next numbers at the peer.
struct Peer {
    own: SocketAddr,
    peer: SocketAddr,
    seq: SeqNumber,
}

impl Peer {
    fn segment(&self, flags: TcpFlags, ack: SeqNumber, options: &[u8]) -> Packet {
        let bare = Segment::bare(self.peer, self.own, flags);
        Segment { seq: self.seq, ack, window: 65_535, options, ..bare }.emit()
    }
}

/// A client over a device of 1,500 bytes that takes super-packets, connected to a plain peer that wants segments of
/// `mss` bytes at the most.
fn connected(peer: &str, mss: u16) -> (Connections, ConnectionId, Peer) {
    let options = ClientOptions {
        addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8:1::1".parse().unwrap()],
        ..Default::default()
    };
    let mut client = Connections::client(options, 1500, [7; 16]);
    client.set_super_packets(true);
    let peer: SocketAddr = peer.parse().unwrap();
    let id = client.connect(Instant::ZERO, peer).unwrap();
    let syn = output(&mut client, Instant::ZERO).remove(0);
    let headers = if peer.is_ipv4() { 40 } else { 60 };
    assert_eq!(syn.tcp().unwrap().max_segment_size(), Some(1500 - headers));
    assert!(syn.checksum_ok() && syn.offload() == Offload::default());
    let mut peer = Peer { own: syn.source_socket().unwrap(), peer, seq: SeqNumber(1000) };
    let [high, low] = mss.to_be_bytes();
    let answer =
        peer.segment(TcpFlags::SYN | TcpFlags::ACK, syn.tcp().unwrap().seq() + 1, &[2, 4, high, low]);
    peer.seq = SeqNumber(1001);
    input(&mut client, Instant::ZERO, &answer);
    (client, id, peer)
}

/// Writes `data`, acknowledges all that comes, and gives it back.
fn transfer(client: &mut Connections, id: ConnectionId, peer: &Peer, data: &[u8]) -> Vec<Packet> {
    let (mut sent, mut written) = (Vec::new(), 0);
    for round in 1..10_000 {
        let now = Instant::from_millis(round);
        if let Poll::Ready(Ok(more)) = client.poll_write(id, &data[written..], Waker::noop()) {
            written += more;
        }
        let packets = output(client, now);
        let Some(last) = packets.last() else { return sent };
        let tcp = last.tcp().unwrap();
        let ack = peer.segment(TcpFlags::ACK, tcp.seq() + tcp.sequence_len(), &[]);
        sent.extend(packets);
        client.handle_input(now, bytes::BytesMut::from(ack.bytes()), Offload::default());
    }
    panic!("it does not end");
}

fn check(peer: &str, mss: u16, segment: usize, kind: GsoKind) {
    let (mut client, id, peer) = connected(peer, mss);
    let data: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
    let sent = transfer(&mut client, id, &peer, &data);
    let carried: Vec<u8> = sent.iter().flat_map(|packet| packet.tcp().unwrap().payload().to_vec()).collect();
    assert!(carried == data);
    for packet in &sent {
        let payload = packet.tcp().unwrap().payload().len();
        let offload = packet.offload();
        assert!(packet.checksum_ok());
        assert_eq!(offload.partial_checksum, payload > 0);
        assert_eq!(offload.gso.is_some(), payload > segment);
        if let Some(gso) = offload.gso {
            assert_eq!((gso.kind, usize::from(gso.size)), (kind, segment));
        }
        let of_segments = packet.segments().map(|segment| segment.len()).max();
        assert!(of_segments <= Some(segment + packet.headers_len()));
    }
    // C10, W3: not before it is known that nobody waits for an option.
    let first_ack = sent.iter().position(|packet| packet.offload().gso.is_some()).unwrap();
    assert!(first_ack > 1, "the first flight goes as segments");
    let longest = sent.iter().map(Packet::len).max().unwrap();
    assert!(longest > 20_000, "{longest}");
}

#[test]
fn super_packets_have_segments_that_the_peer_and_the_link_take() {
    check("198.51.100.1:80", 1460, 1460, GsoKind::TcpV4);
    check("198.51.100.1:80", 65_495, 1460, GsoKind::TcpV4);
    check("198.51.100.1:80", 300, 300, GsoKind::TcpV4);
    check("[2001:db8::1]:80", 1440, 1440, GsoKind::TcpV6);
    check("[2001:db8::1]:80", 536, 536, GsoKind::TcpV6);
}

#[test]
fn i1_super_packets_follow_the_path_mtu() {
    let (mut client, id, peer) = connected("198.51.100.1:80", 1460);
    transfer(&mut client, id, &peer, &vec![7; 200_000]);
    assert!(client.poll_write(id, &vec![7; 30_000], Waker::noop()).is_ready());
    let lost = output(&mut client, Instant::from_millis(20_000));
    assert!(lost[0].offload().gso.is_some_and(|gso| gso.size == 1460));
    input(&mut client, Instant::from_millis(20_001), &icmp(3, 4, 1300, &lost[0]));
    assert_eq!(client.counters().mtu_lowered, 1);
    let again = output(&mut client, Instant::from_millis(30_000));
    let tcp = again[0].tcp().unwrap();
    assert_eq!(tcp.seq(), lost[0].tcp().unwrap().seq());
    assert!(again.iter().flat_map(Packet::segments).all(|segment| segment.len() <= 1300));
}

#[test]
fn a_super_packet_is_acknowledged_at_once_and_several_together() {
    let mut server = server();
    let now = Instant::ZERO;
    let (snd_nxt, rcv_nxt) = establish(&mut server, now, Y);
    let mut seq = rcv_nxt;
    let mut arrive = |server: &mut Connections, length: usize| {
        let payload = vec![7; length];
        let bare = Segment::bare(CLIENT.parse().unwrap(), at(Y), TcpFlags::ACK);
        let packet = Segment { seq, ack: snd_nxt, window: 65_535, payload: &payload, ..bare }.emit();
        seq = seq + length as u32;
        let packet = Packet::parse_unsummed(packet.into_buffer(), 1000).unwrap();
        let offload = packet.offload();
        server.handle_input(now, packet.into_buffer(), offload);
    };
    arrive(&mut server, 500);
    assert!(output(&mut server, now).is_empty(), "a single segment waits for another");
    arrive(&mut server, 4000);
    assert_eq!(output(&mut server, now).len(), 1);
    for _ in 0..5 {
        arrive(&mut server, 4000);
    }
    let acks = output(&mut server, now);
    assert_eq!(acks.len(), 1);
    assert_eq!(acks[0].tcp().unwrap().ack(), seq);
}

/// How often connections are looked at while one of `open` is sent a thousand segments and answers each, and then while
/// nothing happens.
fn polls(open: u16) -> (u64, u64) {
    let tcp = TcpOptions { receive_buffer: 2000, send_buffer: 2000, ..Default::default() };
    let mut server =
        Connections::server(ServerOptions { tcp, backlog: usize::MAX, ..Default::default() }, 1500, [7; 16]);
    server.listen(at(Y)).unwrap();
    let now = Instant::ZERO;
    let mut last = None;
    for port in 1..=open {
        let client: SocketAddr = ([192, 0, 2, 1], port).into();
        let syn =
            Segment { seq: SeqNumber(100), window: 65_535, ..Segment::bare(client, at(Y), TcpFlags::SYN) };
        let answer = input(&mut server, now, &syn.emit()).remove(0);
        let ack = answer.tcp().unwrap().seq() + 1;
        let bare = Segment::bare(client, at(Y), TcpFlags::ACK);
        input(&mut server, now, &Segment { seq: SeqNumber(101), ack, window: 65_535, ..bare }.emit());
        last = Some((client, ack, server.accept(now, at(Y)).unwrap()));
    }
    assert_eq!(server.len(), usize::from(open));
    let (client, ack, id) = last.unwrap();
    let before = server.counters().polls;
    for number in 0..1000u32 {
        let now = now + Duration::from_millis(u64::from(number));
        let bare = Segment::bare(client, at(Y), TcpFlags::ACK);
        let (seq, ack) = (SeqNumber(101) + number, ack + number);
        input(&mut server, now, &Segment { seq, ack, window: 65_535, payload: b"?", ..bare }.emit());
        assert_eq!(server.poll_read(id, &mut [0; 8], Waker::noop()), Poll::Ready(Ok(1)));
        assert_eq!(server.poll_write(id, b"!", Waker::noop()), Poll::Ready(Ok(1)));
        assert_eq!(output(&mut server, now).len(), 1);
    }
    let busy = server.counters().polls - before;
    let bare = Segment::bare(client, at(Y), TcpFlags::ACK);
    let all = Segment { seq: SeqNumber(1101), ack: ack + 1000, window: 65_535, ..bare };
    input(&mut server, Instant::from_millis(1000), &all.emit());
    let before = server.counters().polls;
    for second in 2..1000 {
        server.handle_timeout(Instant::from_millis(second * 1000));
    }
    (busy, server.counters().polls - before)
}

#[test]
fn work_does_not_grow_with_open_connections() {
    let (one, many) = (polls(1), polls(10_000));
    assert_eq!(one, many);
    assert!(one.0 <= 5000, "{one:?}");
    assert_eq!(many.1, 0, "idle connections are not looked at");
}
