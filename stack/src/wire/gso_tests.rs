//! What is left to a device: told, read and done.

use bytes::BytesMut;
use proptest::prelude::*;

use super::checksum::Sum;
use super::vnet::{VNET_LEN, VnetError, read_vnet, write_vnet};
use super::*;

const SIZE: u16 = 1000;

/// As the kernel hands it over: the checksum field holds the pseudo-header's sum.
fn unfinished(mut bytes: BytesMut, gso: Option<Gso>) -> Packet {
    let whole = Packet::parse(bytes.clone(), Offload::default()).unwrap();
    let at = whole.transport_offset();
    let field = at + if whole.tcp().is_some() { 16 } else { 6 };
    let number = whole.protocol().number();
    let pseudo =
        Sum::new().add_pseudo_header(whole.source(), whole.destination(), number, whole.len() - at).fold();
    bytes[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
    let packet = Packet::parse(bytes, Offload { partial_checksum: true, gso }).unwrap();
    assert!(packet.checksum_ok());
    packet
}

fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

fn ends(v4: bool) -> (std::net::SocketAddr, std::net::SocketAddr) {
    let (source, destination) = if v4 {
        ("10.0.0.1:50000", "203.0.113.10:443")
    } else {
        ("[2001:db8::1]:50000", "[2001:db8::10]:443")
    };
    (source.parse().unwrap(), destination.parse().unwrap())
}

/// FIN, PSH, CWR and ECE set, with timestamps, near the end of the sequence space.
fn tcp(v4: bool, length: usize) -> BytesMut {
    let (source, destination) = ends(v4);
    let flags = TcpFlags::ACK | TcpFlags::FIN | TcpFlags::PSH;
    let bare = Segment::bare(source, destination, flags);
    let options = [1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 8];
    let seq = SeqNumber(u32::MAX - 1500);
    let packet = Segment { seq, options: &options, payload: &payload(length), ..bare }.emit();
    let flags = packet.transport_offset() + 13;
    let mut bytes = BytesMut::from(packet.bytes());
    bytes[flags] |= 0xc0;
    bytes
}

fn udp(v4: bool, length: usize) -> BytesMut {
    let (source, destination) = ends(v4);
    let mut message = Vec::new();
    for word in [source.port(), destination.port(), (8 + length) as u16, 0] {
        message.extend_from_slice(&word.to_be_bytes());
    }
    message.extend_from_slice(&payload(length));
    let mut bytes = BytesMut::from(icmp_message(source.ip(), destination.ip(), &message).bytes());
    let at = bytes.len() - message.len();
    bytes[at..].copy_from_slice(&message);
    bytes[if v4 { 9 } else { 6 }] = 17;
    if v4 {
        bytes[10..12].fill(0);
        let checksum = Sum::new().add(&bytes[..20]).checksum();
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    bytes
}

fn super_packet(v4: bool, is_tcp: bool, length: usize) -> Packet {
    let kind = match (is_tcp, v4) {
        (true, true) => GsoKind::TcpV4,
        (true, false) => GsoKind::TcpV6,
        (false, _) => GsoKind::Udp,
    };
    let bytes = if is_tcp { tcp(v4, length) } else { udp(v4, length) };
    unfinished(bytes, Some(Gso { kind, size: SIZE, ecn: is_tcp }))
}

fn all_kinds(length: usize) -> impl Iterator<Item = Packet> {
    [(true, true), (true, false), (false, true), (false, false)]
        .into_iter()
        .map(move |(v4, is_tcp)| super_packet(v4, is_tcp, length))
}

fn header_sum(packet: &Packet) -> u16 {
    Sum::new().add(&packet.bytes()[..20]).fold()
}

#[test]
fn segments_are_what_a_link_would_carry() {
    for big in all_kinds(63_500) {
        let segments: Vec<Packet> = big.segments().collect();
        assert_eq!((segments.len(), big.segment_count()), (64, 64));
        assert_eq!(segments.iter().map(Packet::len).sum::<usize>(), big.segmented_len());
        let mut joined = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            let (first, last) = (index == 0, index == 63);
            assert_eq!(Packet::from_slice(segment.bytes()).as_ref(), Ok(segment));
            assert!(segment.checksum_ok());
            assert_eq!(segment.len(), segment.headers_len() + if last { 500 } else { 1000 });
            if segment.version() == Version::V4 {
                assert_eq!(header_sum(segment), 0xffff);
                let identification = |packet: &Packet| super::ip::be16(packet.bytes(), 4);
                assert_eq!(identification(segment), identification(&big).wrapping_add(index as u16));
            }
            if let Some(tcp) = segment.tcp() {
                assert_eq!(tcp.seq(), SeqNumber((u32::MAX - 1500).wrapping_add(index as u32 * 1000)));
                assert_eq!(tcp.timestamps(), Some((9, 8)));
                let flags = segment.bytes()[segment.transport_offset() + 13];
                assert_eq!((flags & 0x09 == 0x09, flags & 0x80 != 0), (last, first), "{flags:#x}");
                // ACK and ECE are everybody's.
                assert_eq!(flags & 0x50, 0x50);
            } else {
                let length = super::ip::be16(segment.bytes(), segment.transport_offset() + 4);
                assert_eq!(usize::from(length), segment.len() - segment.transport_offset());
            }
            joined.extend_from_slice(&segment.bytes()[segment.headers_len()..]);
        }
        assert_eq!(joined, payload(63_500));
    }
}

#[test]
fn a_packet_that_is_no_super_packet_is_its_only_segment() {
    for v4 in [true, false] {
        let whole = Packet::from_slice(udp(v4, 100).as_ref()).unwrap();
        assert!(whole.segments().eq([whole.clone()]));
        let partial = unfinished(tcp(v4, 700), None);
        let mut completed = partial.clone();
        completed.complete_checksum();
        assert_eq!((completed.offload(), completed.checksum_ok()), (Offload::default(), true));
        assert_eq!(partial.segments().collect::<Vec<_>>(), [completed]);
        assert_eq!((partial.segment_count(), partial.segmented_len()), (1, partial.len()));
    }
}

#[test]
fn a_sum_that_is_wrong_stays_wrong() {
    for mut big in all_kinds(2500) {
        let field = big.transport_offset() + if big.tcp().is_some() { 16 } else { 6 };
        big.buffer[field] ^= 0x10;
        assert!(!big.checksum_ok() && big.segments().all(|segment| !segment.checksum_ok()));
        big.complete_checksum();
        assert!(!big.checksum_ok());
    }
}

#[test]
fn a_header_says_what_is_left_undone_and_where() {
    let word = |value: u16| value.to_ne_bytes();
    let [v4, _] = [true, false].map(|v4| super_packet(v4, true, 2000));
    let mut expected = [1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0];
    for (at, value) in [(2, 52), (4, SIZE), (6, 20), (8, 16)] {
        expected[at..at + 2].copy_from_slice(&word(value));
    }
    assert_eq!(write_vnet(&v4), expected);
    for packet in all_kinds(2000).chain([unfinished(tcp(true, 9), None), unfinished(udp(false, 9), None)]) {
        let mut bytes = packet.bytes().to_vec();
        assert_eq!(read_vnet(&write_vnet(&packet), &mut bytes), Ok(packet.offload()));
        assert_eq!(bytes, packet.bytes());
    }
    assert_eq!(write_vnet(&Packet::from_slice(&tcp(true, 9)).unwrap()), [0; VNET_LEN]);
}

#[test]
fn a_header_that_cannot_be_is_refused_and_its_packet_left_alone() {
    let packet = super_packet(true, true, 2000);
    let good = write_vnet(&packet);
    let with = |at: usize, bytes: &[u8]| {
        let (mut header, mut copy) = (good, packet.bytes().to_vec());
        header[at..at + bytes.len()].copy_from_slice(bytes);
        let result = read_vnet(&header, &mut copy);
        assert_eq!(copy, packet.bytes());
        result
    };
    // UDP fragmentation, which nobody asks for, and what does not exist.
    assert_eq!(with(1, &[3]), Err(VnetError::Kind(3)));
    assert_eq!(with(1, &[0x7f]), Err(VnetError::Kind(0x7f)));
    let wrong = |start: u16, offset: u16| Err(VnetError::Checksum { start, offset });
    assert_eq!(with(6, &21u16.to_ne_bytes()), wrong(21, 16));
    assert_eq!(with(8, &6u16.to_ne_bytes()), wrong(20, 6));
    assert_eq!(with(6, &u16::MAX.to_ne_bytes()), wrong(u16::MAX, 16));
    let (mut header, mut copy) = (good, packet.bytes().to_vec());
    header[1] = 0;
    header[8..10].copy_from_slice(&u16::MAX.to_ne_bytes());
    assert_eq!(read_vnet(&header, &mut copy), wrong(20, u16::MAX));
    assert_eq!(read_vnet(&good[..9], &mut copy), Err(VnetError::Truncated(9)));
    // Of the longer form the first ten bytes count.
    let longer = [&good[..], &[1, 0]].concat();
    assert_eq!(read_vnet(&longer, &mut copy), Ok(packet.offload()));
    // What does not fit the packet is for `Packet::parse` to refuse.
    let other = Packet::parse(udp(true, 2000), packet.offload()).unwrap_err();
    assert_eq!(other.error, ParseError::Offload);
}

#[test]
fn a_checksum_of_what_is_not_known_is_completed_at_once() {
    // A tunnel's inner TCP: the checksum is of bytes behind the outer headers.
    let (source, destination) = ends(true);
    let inner = unfinished(tcp(true, 300), None);
    let mut bytes = icmp_message(source.ip(), destination.ip(), inner.bytes()).bytes().to_vec();
    let at = bytes.len() - inner.len();
    bytes[at..].copy_from_slice(inner.bytes());
    bytes[9] = 4;
    let mut header = write_vnet(&inner);
    header[6..8].copy_from_slice(&(at as u16 + 20).to_ne_bytes());
    assert_eq!(read_vnet(&header, &mut bytes), Ok(Offload::default()));
    assert!(Packet::from_slice(&bytes[at..]).unwrap().checksum_ok());
}

proptest! {
    #[test]
    fn any_header_is_refused_or_makes_a_request_that_can_be_checked(
        header in any::<[u8; VNET_LEN]>(), v4 in any::<bool>(), is_tcp in any::<bool>(), length in 0usize..3000,
    ) {
        let original = if is_tcp { tcp(v4, length) } else { udp(v4, length) };
        let mut bytes = original.clone();
        match read_vnet(&header, &mut bytes) {
            Err(_) => prop_assert_eq!(&bytes, &original),
            Ok(offload) => {
                if offload.partial_checksum {
                    prop_assert_eq!(&bytes, &original);
                }
                if let Ok(packet) = Packet::parse(bytes, offload) {
                    prop_assert_eq!(read_vnet(&write_vnet(&packet), &mut packet.bytes().to_vec()), Ok(offload));
                }
            }
        }
    }

    #[test]
    fn segments_of_any_size_join_to_the_whole(size in 1u16..3000, length in 0usize..5000, v4 in any::<bool>()) {
        let mut offload = super_packet(v4, true, length).offload();
        offload.gso = offload.gso.map(|gso| Gso { size, ..gso });
        let big = unfinished(tcp(v4, length), offload.gso);
        prop_assume!(big.segment_count() < 200);
        let segments: Vec<Packet> = big.segments().collect();
        let joined: Vec<u8> =
            segments.iter().flat_map(|segment| segment.tcp().unwrap().payload().to_vec()).collect();
        prop_assert_eq!(joined, payload(length));
        prop_assert!(segments.iter().all(|segment| segment.checksum_ok() && segment.tcp().unwrap().payload().len() <= usize::from(size)));
        prop_assert_eq!(segments.iter().map(Packet::len).sum::<usize>(), big.segmented_len());
    }
}
