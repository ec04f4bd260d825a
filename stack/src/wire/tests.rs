//! Packets read, rewritten and refused.

use std::net::{IpAddr, SocketAddr};

use bytes::BytesMut;
use proptest::prelude::*;

use super::*;

const EXID: u16 = DEFAULT_EXID;

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn linux_syn(source: &str, destination: &str) -> Packet {
    let options = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7];
    let bare = Segment::bare(socket(source), socket(destination), TcpFlags::SYN);
    Segment { seq: SeqNumber(7), window: 64_240, options: &options, ..bare }.emit()
}

fn both_families() -> [Packet; 2] {
    [linux_syn("10.0.0.1:50000", "203.0.113.10:443"), linux_syn("[2001:db8::1]:50000", "[2001:db8::10]:443")]
}

fn udp(source: IpAddr, destination: IpAddr, checksum: bool) -> Packet {
    let mut message = vec![0x30, 0x39, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4];
    if checksum {
        let sum = checksum::Sum::new()
            .add_pseudo_header(source, destination, 17, message.len())
            .add(&message)
            .checksum();
        message[6..8].copy_from_slice(&sum.to_be_bytes());
    }
    let mut bytes = icmp_message(source, destination, &message).bytes().to_vec();
    let at = bytes.len() - message.len();
    bytes[at..].copy_from_slice(&message);
    bytes[if source.is_ipv4() { 9 } else { 6 }] = 17;
    Packet::from_slice(&bytes).unwrap()
}

#[test]
fn a_segment_reads_as_it_was_written() {
    for packet in both_families() {
        let tcp = packet.tcp().unwrap();
        assert!(tcp.is_syn() && !tcp.is_syn_ack());
        assert_eq!((tcp.seq(), tcp.window(), tcp.header_len()), (SeqNumber(7), 64_240, 40));
        assert_eq!((tcp.timestamps(), tcp.sequence_len()), (Some((9, 0)), 1));
        assert_eq!(packet.ports(), Some((50_000, 443)));
        assert!(packet.checksum_ok());
    }
}

#[test]
fn w4_the_option_goes_in_front_and_w2_it_fits_beside_linux_options() {
    for original in both_families() {
        let mut packet = original.clone();
        assert_eq!(packet.option_room(), 20);
        let option = RedirectOption {
            confirm: true,
            port: Some(41_001),
            observed: Some(0xbeef),
            token: Some([9; 8]),
            ..Default::default()
        };
        packet.insert_redirect(EXID, &option, 1500).unwrap();
        assert_eq!(packet.len(), original.len() + 20);
        assert_eq!(packet.tcp().unwrap().option_bytes()[..3], [1, 1, 253]);
        assert_eq!(packet.tcp().unwrap().redirect(EXID), Ok(Some(option)));
        assert!(packet.checksum_ok());
        assert_eq!(Packet::from_slice(packet.bytes()).as_ref(), Ok(&packet));
        assert!(packet.strip_redirect(EXID));
        assert_eq!(packet, original);
    }
}

#[test]
fn w2_what_does_not_fit_is_left_out_token_first_unless_it_is_required() {
    let [syn, _] = both_families();
    let option = RedirectOption {
        confirm: true,
        port: Some(1),
        observed: Some(2),
        token: Some([3; 8]),
        address: Some("10.0.0.9".parse().unwrap()),
        ..Default::default()
    };
    let fitted = |required: bool, mtu: usize| {
        let mut packet = syn.clone();
        packet.insert_redirect_fitting(EXID, &option, required, mtu).ok()?;
        packet.tcp().unwrap().redirect(EXID).unwrap()
    };
    assert_eq!(fitted(false, 1500), Some(RedirectOption { token: None, ..option }));
    assert_eq!(fitted(true, 1500), Some(RedirectOption { observed: None, ..option }));
    assert_eq!(fitted(true, syn.len() + 12), Some(RedirectOption { observed: None, token: None, ..option }));
    assert_eq!(fitted(false, syn.len() + 8), None);
}

#[test]
fn w3_no_option_beyond_the_mtu_or_in_a_super_packet() {
    let [mut syn, _] = both_families();
    let option = RedirectOption { redirect: true, ..Default::default() };
    assert_eq!(syn.insert_redirect(EXID, &option, syn.len() + 7), Err(NoRoom { need: 8, have: 7 }));
    let gso = Gso { kind: GsoKind::TcpV4, size: 1000, ecn: false };
    let offload = Offload { partial_checksum: true, gso: Some(gso) };
    let mut big = Packet::parse(BytesMut::from(syn.bytes()), offload).unwrap();
    assert!(big.insert_redirect(EXID, &option, 65_535).is_err());
}

#[test]
fn w1_a_second_copy_makes_the_option_void_and_both_are_stripped() {
    let bare = Segment::bare(socket("10.0.0.1:1"), socket("10.0.0.2:2"), TcpFlags::SYN);
    let mut packet = bare.emit();
    let original = packet.clone();
    let option = RedirectOption { redirect: true, ..Default::default() };
    packet.insert_redirect(EXID, &option, 1500).unwrap();
    packet.insert_redirect(EXID, &option, 1500).unwrap();
    assert_eq!(packet.tcp().unwrap().redirect(EXID), Err(OptionError::Duplicate));
    assert!(packet.strip_redirect(EXID));
    assert_eq!(packet, original);
}

#[test]
fn options_of_another_experiment_are_none_of_ours() {
    let [mut packet, _] = both_families();
    let option = RedirectOption { redirect: true, ..Default::default() };
    packet.insert_redirect(0x1234, &option, 1500).unwrap();
    assert_eq!(packet.tcp().unwrap().redirect(EXID), Ok(None));
    assert!(!packet.strip_redirect(EXID));
}

#[test]
fn rewriting_keeps_checksums_right_and_wrong_ones_wrong() {
    let v4: (IpAddr, IpAddr) = ("192.0.2.7".parse().unwrap(), "198.51.100.8".parse().unwrap());
    let v6: (IpAddr, IpAddr) = ("2001:db8:5::7".parse().unwrap(), "2001:db8:6::8".parse().unwrap());
    let mut packets = both_families().to_vec();
    packets.push(udp(v4.1, v4.0, true));
    packets.push(udp(v6.1, v6.0, true));
    for packet in packets {
        let (source, destination) = if packet.version() == Version::V4 { v4 } else { v6 };
        let rewrite = |mut packet: Packet| {
            packet.set_source(source);
            packet.set_destination(destination);
            packet.set_source_port(1);
            packet.set_destination_port(65_535);
            packet
        };
        let rewritten = rewrite(packet.clone());
        assert!(rewritten.checksum_ok());
        assert_eq!(rewritten.source_socket(), Some(SocketAddr::new(source, 1)));
        assert_eq!(rewritten.destination_socket(), Some(SocketAddr::new(destination, 65_535)));
        let mut corrupt = packet.bytes().to_vec();
        *corrupt.last_mut().unwrap() ^= 0x10;
        assert!(!rewrite(Packet::from_slice(&corrupt).unwrap()).checksum_ok());
    }
}

#[test]
fn udp_without_a_checksum_stays_without() {
    let (a, b) = ("192.0.2.7".parse().unwrap(), "198.51.100.8".parse().unwrap());
    let mut packet = udp(a, b, false);
    packet.set_destination("10.9.8.7".parse().unwrap());
    packet.set_source_port(9);
    assert_eq!(packet.bytes()[26..28], [0, 0]);
}

#[test]
fn partial_checksums_follow_addresses_and_length_but_not_ports() {
    for packet in both_families() {
        let mut bytes = BytesMut::from(packet.bytes());
        let at = packet.transport_offset();
        let pseudo = checksum::Sum::new()
            .add_pseudo_header(packet.source(), packet.destination(), 6, packet.len() - at)
            .fold();
        bytes[at + 16..at + 18].copy_from_slice(&pseudo.to_be_bytes());
        let offload = Offload { partial_checksum: true, gso: None };
        let mut packet = Packet::parse(bytes, offload).unwrap();
        assert!(packet.checksum_ok());
        packet.set_destination_port(41_001);
        let other = if packet.version() == Version::V4 { "10.7.7.7" } else { "2001:db8:7::7" };
        packet.set_destination(other.parse().unwrap());
        let option = RedirectOption { redirect: true, ..Default::default() };
        packet.insert_redirect(EXID, &option, 1500).unwrap();
        assert!(packet.checksum_ok());
    }
}

#[test]
fn i1_i2_quoted_packets_are_read_and_rewritten_down_to_eight_bytes_of_header() {
    for packet in both_families() {
        let header = packet.transport_offset();
        for quoted_len in [header + 8, header + 18, packet.len()] {
            let v4 = packet.version() == Version::V4;
            let mut message = if v4 { vec![3, 4, 0, 0, 0, 0, 5, 0] } else { vec![2, 0, 0, 0, 0, 0, 5, 0] };
            message.extend_from_slice(&packet.bytes()[..quoted_len]);
            let router: IpAddr = if v4 { "192.0.2.1" } else { "2001:db8::ff" }.parse().unwrap();
            let mut error = icmp_message(router, packet.source(), &message);
            let quoted = error.icmp().unwrap().quoted().unwrap();
            assert_eq!((quoted.source_port, quoted.destination_port), (50_000, 443));
            assert_eq!(quoted.seq, Some(SeqNumber(7)));
            assert_eq!(error.icmp().unwrap().mtu(), Some(1280));

            let new: SocketAddr =
                if v4 { "10.5.5.5:41001" } else { "[2001:db8:5::5]:41001" }.parse().unwrap();
            assert!(error.set_quoted_destination(new));
            assert!(error.checksum_ok());
            let quoted = error.icmp().unwrap().quoted().unwrap();
            assert_eq!((quoted.destination, quoted.destination_port), (new.ip(), new.port()));
            if quoted_len == packet.len() {
                let inner = Packet::from_slice(&error.bytes()[error.transport_offset() + 8..]).unwrap();
                assert!(inner.checksum_ok());
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Packet, ParseError> {
    Packet::from_slice(bytes)
}

#[test]
fn what_is_not_a_packet_is_refused_with_the_offending_value() {
    let [v4, v6] = both_families();
    let with = |packet: &Packet, at: usize, value: u8| {
        let mut bytes = packet.bytes().to_vec();
        bytes[at] = value;
        parse(&bytes).unwrap_err()
    };
    assert_eq!(parse(&[]), Err(ParseError::Truncated { need: 1, have: 0 }));
    assert_eq!(parse(&[0x50; 40]), Err(ParseError::Version(5)));
    assert_eq!(parse(&v4.bytes()[..59]), Err(ParseError::Truncated { need: 60, have: 59 }));
    assert_eq!(with(&v4, 0, 0x44), ParseError::HeaderLength(16));
    assert_eq!(with(&v4, 32, 0x40), ParseError::HeaderLength(16));
    assert_eq!(with(&v4, 32, 0xf0), ParseError::Truncated { need: 80, have: 60 });
    assert_eq!(with(&v6, 5, 200), ParseError::Truncated { need: 240, have: 80 });
    let mut tiny = v4.bytes()[..28].to_vec();
    tiny[3] = 28;
    tiny[6] = 0x20;
    assert_eq!(parse(&tiny), Err(ParseError::TinyFragment(8)));
}

fn with_extension_headers(headers: &[&[u8]], upper: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x60, 0, 0, 0, 0, 0, 0, 64];
    bytes.extend([0x20; 32]);
    let mut next_at = 6;
    for header in headers {
        bytes[next_at] = header[0];
        next_at = bytes.len();
        bytes.extend_from_slice(&header[1..]);
    }
    bytes[next_at] = upper;
    bytes.extend_from_slice(body);
    let payload = u16::try_from(bytes.len() - 40).unwrap();
    bytes[4..6].copy_from_slice(&payload.to_be_bytes());
    bytes
}

#[test]
fn ipv6_extension_headers_are_walked_within_a_bound() {
    let options: &[u8] = &[60, 0, 0, 1, 4, 0, 0, 0, 0];
    let tcp = linux_syn("[2001:db8::1]:5", "[2001:db8::2]:6").bytes()[40..].to_vec();
    let packet = parse(&with_extension_headers(&[options; 8], 6, &tcp)).unwrap();
    assert_eq!(packet.ports(), Some((5, 6)));
    let nine = with_extension_headers(&[options; 9], 6, &tcp);
    assert_eq!(parse(&nine), Err(ParseError::ExtensionHeaders(8)));
    let route: &[u8] = &[43, 0, 0, 0, 1, 0, 0, 0, 0];
    assert_eq!(parse(&with_extension_headers(&[route], 6, &tcp)), Err(ParseError::SourceRoute(1)));
}

#[test]
fn no_ports_are_read_but_those_of_the_header_that_has_them() {
    let tcp = linux_syn("[2001:db8::1]:5", "[2001:db8::2]:6").bytes()[40..].to_vec();
    // Reads as ports 1 and 2 to whoever takes it for TCP.
    let forged: &[u8] = &[0, 1, 0, 2, 0, 0, 0, 0];
    // The length of an authentication header counts in four bytes, and without the first two of them.
    let authentication: Vec<u8> = [&[51, 0, 4, 0, 0][..], forged, forged, &[0; 4]].concat();
    let packet = parse(&with_extension_headers(&[&authentication], 6, &tcp)).unwrap();
    assert_eq!(packet.ports(), Some((5, 6)));
    // What is encrypted, nothing at all, mobility: what follows has no ports for us.
    for upper in [50, 59, 135, 139, 255] {
        let body = [forged, &tcp].concat();
        assert_eq!(parse(&with_extension_headers(&[], upper, &body)).unwrap().ports(), None, "{upper}");
    }
    // Options that are larger than the packet, and a header that says it follows itself.
    let large: &[u8] = &[60, 0, 255, 1, 4, 0, 0, 0, 0];
    assert!(matches!(parse(&with_extension_headers(&[large], 6, &tcp)), Err(ParseError::Truncated { .. })));
    let itself: &[u8] = &[60, 0, 0, 1, 4, 0, 0, 0, 0];
    assert!(parse(&with_extension_headers(&[itself; 200], 60, &[])).is_err());
    // A fragment within a fragment.
    let first: &[u8] = &[44, 0, 0, 0, 1, 0, 0, 0, 9];
    assert!(matches!(
        parse(&with_extension_headers(&[first, first], 6, &tcp)),
        Err(ParseError::HeaderLength(_))
    ));
}

#[test]
fn fragments_show_ports_only_in_the_first() {
    let tcp = linux_syn("[2001:db8::1]:5", "[2001:db8::2]:6").bytes()[40..].to_vec();
    let first: &[u8] = &[44, 0, 0, 0, 1, 0, 0, 0, 9];
    let packet = parse(&with_extension_headers(&[first], 6, &tcp)).unwrap();
    assert_eq!(packet.ports(), Some((5, 6)));
    assert_eq!(packet.fragment(), Some(Fragment { identification: 9, offset: 0, more: true }));
    let later: &[u8] = &[44, 0, 0, 0, 0x40, 0, 0, 0, 9];
    let packet = parse(&with_extension_headers(&[later], 6, &tcp)).unwrap();
    assert_eq!(packet.ports(), None);
    let beyond: &[u8] = &[44, 0, 0, 0xff, 0xf8, 0, 0, 0, 9];
    assert!(matches!(parse(&with_extension_headers(&[beyond], 6, &tcp)), Err(ParseError::FragmentRange(_))));
}

#[test]
fn a_dscp_is_rewritten_beside_the_ecn_bits_and_the_flow_label() {
    for original in both_families() {
        for ecn in 0..4 {
            for dscp in [0, 1, 46, 63] {
                let mut bytes = original.bytes().to_vec();
                let v4 = original.version() == Version::V4;
                if v4 {
                    bytes[1] = 0x28 | ecn;
                    bytes[10..12].fill(0);
                    let sum = checksum::Sum::new().add(&bytes[..20]).checksum();
                    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                } else {
                    bytes[..4].copy_from_slice(&[0x62, 0x8a | ecn << 4, 0xbc, 0xde]);
                }
                let before = bytes;
                let mut packet = Packet::from_slice(&before).unwrap();
                assert_eq!(packet.dscp(), 10);
                packet.set_dscp(dscp | 0xc0);
                assert_eq!(packet.dscp(), dscp);
                let after = packet.bytes();
                if v4 {
                    assert_eq!(after[1] & 3, ecn);
                    assert_eq!(checksum::Sum::new().add(&after[..20]).fold(), 0xffff);
                } else {
                    assert_eq!((after[0] >> 4, after[1] & 0x3f), (6, 0x0a | ecn << 4));
                }
                packet.set_dscp(10);
                assert_eq!(packet.bytes(), before);
            }
        }
    }
}

#[test]
fn offload_requests_that_do_not_fit_the_packet_are_refused() {
    let [v4, _] = both_families();
    let with = |partial_checksum, gso| {
        Packet::parse(BytesMut::from(v4.bytes()), Offload { partial_checksum, gso }).is_ok()
    };
    let gso = |kind, size| Some(Gso { kind, size, ecn: false });
    assert!(with(true, gso(GsoKind::TcpV4, 1448)));
    assert!(!with(true, gso(GsoKind::TcpV6, 1448)));
    assert!(!with(true, gso(GsoKind::Udp, 1448)));
    assert!(!with(true, gso(GsoKind::TcpV4, 0)));
    assert!(!with(false, gso(GsoKind::TcpV4, 1448)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever arrives: reading and every rewrite neither panic nor make a right checksum wrong.
    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), version in 0u8..3) {
        if let Some(first) = bytes.first_mut() {
            *first = match version { 0 => 0x45, 1 => 0x60, _ => *first };
        }
        if version == 0 && bytes.len() >= 20 {
            let total = u16::try_from(bytes.len()).unwrap();
            bytes[2..4].copy_from_slice(&total.to_be_bytes());
            bytes[6..8].fill(0);
            bytes[9] = [6, 17, 1][usize::from(bytes[9]) % 3];
        }
        let Ok(mut packet) = Packet::from_slice(&bytes) else { return Ok(()) };
        let right = packet.checksum_ok();
        let v4 = packet.version() == Version::V4;
        let address: SocketAddr = if v4 { "10.1.2.3:5" } else { "[2001:db8::3]:5" }.parse().unwrap();
        let option = RedirectOption { redirect: true, port: Some(3), ..Default::default() };
        packet.set_source(address.ip());
        packet.set_destination(address.ip());
        packet.set_source_port(5);
        packet.set_destination_port(6);
        packet.set_dscp(42);
        packet.set_quoted_source(address);
        packet.set_quoted_destination(address);
        packet.blank_fast_open();
        let _ = packet.strip_redirect(EXID);
        let _ = packet.insert_redirect_fitting(EXID, &option, false, 1500);
        let _ = packet.tcp().map(|tcp| tcp.options().count());
        prop_assert_eq!(packet.checksum_ok(), right);
        prop_assert!(Packet::from_slice(packet.bytes()).is_ok());
    }
}
