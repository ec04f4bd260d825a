use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Mark;
use tokio::net::TcpSocket;
use tun_tap::Iface;

use crate::change::{Link, Route, Rule, Sysctl};
use crate::config::Role;
use crate::prefix::Family;
use crate::testing::{close, in_namespace, run, tun};
use crate::{
    Change, Divert, FlagMatch, Host, HostOptions, PacketKind, PacketMatch, PortRange, Prefix, QuotedMatch,
    SegmentMatch, TcpConnection, Transport, nft_available,
};

const REDIRECT: [u8; 8] = [253, 8, 0x52, 0x44, 0x10, 0, 0, 0];

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IP packet with this payload.
fn packet(from: IpAddr, to: IpAddr, protocol: u8, mut payload: Vec<u8>, checksum_at: usize) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let (source, destination): (Vec<u8>, Vec<u8>) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (from.octets().into(), to.octets().into()),
        (IpAddr::V6(from), IpAddr::V6(to)) => (from.octets().into(), to.octets().into()),
        _ => panic!("one family"),
    };
    let pseudo = [0, protocol, length.to_be_bytes()[0], length.to_be_bytes()[1]];
    let sum = if protocol == 1 {
        checksum(&[&payload])
    } else {
        checksum(&[&source, &destination, &pseudo, &payload])
    };
    payload[checksum_at..checksum_at + 2].copy_from_slice(&sum);
    let mut whole = if from.is_ipv4() {
        let total = (length + 20).to_be_bytes();
        let mut header = vec![0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, protocol, 0, 0];
        header.extend([source, destination].concat());
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum);
        header
    } else {
        let length = length.to_be_bytes();
        let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
        header.extend([source, destination].concat());
        header
    };
    whole.extend(payload);
    whole
}

pub(super) fn segment(from: &str, to: &str, ports: (u16, u16), flags: u8, options: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(ports.0.to_be_bytes());
    tcp.extend(ports.1.to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, (5 + options.len() as u8 / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(options);
    packet(ip(from), ip(to), 6, tcp, 16)
}

/// An ICMP error from a router about `quoted`.
fn icmp_error(from: &str, to: &str, kind: u8, quoted: &[u8]) -> Vec<u8> {
    let mut icmp = vec![kind, 0, 0, 0, 0, 0, 0x05, 0];
    icmp.extend(&quoted[..quoted.len().min(60)]);
    packet(ip(from), ip(to), if ip(from).is_ipv4() { 1 } else { 58 }, icmp, 2)
}

/// The next packet that the kernel routes to the device, but for what it sends of its own.
pub(super) fn received(device: &Iface, within: Duration) -> Option<Vec<u8>> {
    let deadline = Instant::now() + within;
    let mut buffer = vec![0; 2048];
    while Instant::now() < deadline {
        match device.recv(&mut buffer) {
            Ok(length) => {
                let icmp6 = buffer[0] >> 4 == 6 && buffer[6] == 58 && matches!(buffer[40], 133..=136 | 143);
                let options = buffer[0] >> 4 == 6 && buffer[6] == 0;
                if !icmp6 && !options {
                    return Some(buffer[..length].to_vec());
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
    None
}

struct Lab {
    wire: Iface,
    shunt: Iface,
    host: Host,
    _folder: tempfile::TempDir,
}

impl Lab {
    /// `wire0` is the network, `shunt0` where marked packets go.
    async fn new(divert: impl FnOnce(&HostOptions) -> Divert) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (wire, shunt) = (tun("wire0"), tun("shunt0"));
        run("ip", "address add 10.1.0.2/24 dev wire0");
        run("ip", "address add 2001:db8:2::2/64 dev wire0 nodad");
        run("ip", "route add default dev wire0");
        run("ip", "-6 route add default dev wire0");
        let options = HostOptions::defaults(Role::Server);
        let mut host = Host::open_in(Path::new(folder.path()), "server", &options).await.unwrap();
        let mut changes: Vec<Change> = vec![
            Link::tun("shunt0", 1500).into(),
            Sysctl::new("net/ipv4/ip_forward", 1).into(),
            Sysctl::interface(Family::V6, "all", "forwarding", 1).into(),
            Sysctl::new("net/ipv4/tcp_early_demux", 0).into(),
            Sysctl::interface(Family::V4, "all", "rp_filter", 0).into(),
            Sysctl::interface(Family::V4, "wire0", "rp_filter", 0).into(),
        ];
        for family in Family::BOTH {
            changes.push(Route::device(options.table, Prefix::all(family), "shunt0").into());
            changes.push(Rule::new(family, 30, options.table).mark(options.mark, options.mark_mask).into());
        }
        changes.push(Change::LocalLast);
        changes.push(divert(&options).into());
        host.apply(changes).await.unwrap();
        Self { wire, shunt, host, _folder: folder }
    }

    /// Whether a packet that arrives on the wire goes to the TUN.
    fn diverts(&self, packet: &[u8]) -> bool {
        while received(&self.shunt, Duration::from_millis(2)).is_some() {}
        self.wire.send(packet).unwrap();
        let got = received(&self.shunt, Duration::from_millis(60));
        // TTL and header checksum aside, it is the packet that came in.
        if let Some(got) = &got {
            assert_eq!(got.len(), packet.len());
        }
        got.is_some()
    }
}

fn agent(options: &HostOptions) -> Divert {
    Divert {
        mark: options.mark,
        mask: options.mark_mask,
        except_interface: Some("shunt0".into()),
        incoming: vec![SegmentMatch {
            destination_ports: vec![443.into(), 41001.into()],
            option: Some(253),
            flags: Some(FlagMatch::SYN),
            ..SegmentMatch::default()
        }],
        outgoing: vec![SegmentMatch {
            source_ports: vec![41001.into()],
            flags: Some(FlagMatch::SYN_ACK),
            ..SegmentMatch::default()
        }],
        untracked_incoming: vec![SegmentMatch {
            destination_ports: vec![443.into(), 41001.into()],
            ..SegmentMatch::default()
        }],
        untracked_outgoing: vec![SegmentMatch {
            source_ports: vec![41001.into()],
            ..SegmentMatch::default()
        }],
        ..Divert::default()
    }
}

#[test]
fn a_syn_with_option_253_is_diverted_and_one_without_is_not() {
    in_namespace(async || {
        assert!(nft_available().await);
        let lab = Lab::new(agent).await;
        for (client, server) in [("192.0.2.1", "10.1.0.2"), ("2001:db8:7::1", "2001:db8:2::2")] {
            let mss = [2, 4, 5, 0xb4];
            let with: Vec<u8> = [&mss[..], &REDIRECT].concat();
            for (port, flags, options, expected) in [
                (443, 0x02, &with[..], true),
                (41001, 0x02, &REDIRECT[..], true),
                // ECN's flags do not matter.
                (443, 0xc2, &with[..], true),
                (443, 0x02, &mss[..], false),
                (443, 0x02, &[][..], false),
                (443, 0x12, &with[..], false),
                (443, 0x10, &with[..], false),
                (80, 0x02, &with[..], false),
            ] {
                let syn = segment(client, server, (50000, port), flags, options);
                assert_eq!(lab.diverts(&syn), expected, "{client} port {port} flags {flags:#x} {options:?}");
            }
        }
        lab.host.close().await.unwrap();
    });
}

#[test]
fn what_the_tun_writes_back_is_not_diverted_again() {
    in_namespace(async || {
        let lab = Lab::new(agent).await;
        run("ip", "route add 198.51.100.0/24 dev wire0");
        let syn = segment("192.0.2.1", "198.51.100.1", (50000, 443), 0x02, &REDIRECT);
        assert!(lab.diverts(&syn));
        while received(&lab.wire, Duration::from_millis(2)).is_some() {}
        lab.shunt.send(&syn).unwrap();
        assert!(received(&lab.shunt, Duration::from_millis(30)).is_none());
        assert_eq!(received(&lab.wire, Duration::from_millis(60)).unwrap().len(), syn.len());
    });
}

#[test]
fn the_kernels_syn_acks_from_the_service_port_are_diverted() {
    in_namespace(async || {
        let lab = Lab::new(agent).await;
        let listener = std::net::TcpListener::bind("[::]:41001").unwrap();
        let plain = std::net::TcpListener::bind("[::]:8080").unwrap();
        for (client, server) in [("192.0.2.1", "10.1.0.2"), ("2001:db8:7::1", "2001:db8:2::2")] {
            let syn = segment(client, server, (50000, 41001), 0x02, &[]);
            while received(&lab.shunt, Duration::from_millis(2)).is_some() {}
            lab.wire.send(&syn).unwrap();
            let answer = received(&lab.shunt, Duration::from_millis(100)).expect("a SYN-ACK");
            let tcp = &answer[if answer[0] >> 4 == 4 { 20 } else { 40 }..];
            assert_eq!(tcp[13], 0x12);
            assert_eq!(tcp[..4], [41001u16.to_be_bytes(), 50000u16.to_be_bytes()].concat());
            let other = segment(client, server, (50000, 8080), 0x02, &[]);
            assert!(!lab.diverts(&other));
        }
        drop((listener, plain));
    });
}

#[test]
fn connections_are_diverted_both_ways_and_others_are_not() {
    in_namespace(async || {
        let ends = [("192.0.2.1", "10.1.0.2"), ("2001:db8:7::1", "2001:db8:2::2")];
        let connection = |(client, server): (&str, &str), port| TcpConnection {
            local: (ip(server), 41001).into(),
            remote: (ip(client), port).into(),
        };
        let lab = Lab::new(|options| Divert {
            connections: ends
                .into_iter()
                .flat_map(|ends| [50000, 50001].map(|port| connection(ends, port)))
                .collect(),
            ..agent(options)
        })
        .await;
        for (client, server) in ends {
            for (port, expected) in [(50000, true), (50001, true), (50002, false)] {
                // Nobody listens: the kernel's reset comes by the same way.
                let segment = segment(client, server, (port, 41001), 0x10, &[]);
                assert_eq!(lab.diverts(&segment), expected, "{client} {port}");
                while received(&lab.shunt, Duration::from_millis(2)).is_some() {}
                while received(&lab.wire, Duration::from_millis(2)).is_some() {}
                lab.shunt.send(&segment).unwrap();
                let (near, far) = (&lab.shunt, &lab.wire);
                let (got, not) = if expected { (near, far) } else { (far, near) };
                let reset = received(got, Duration::from_millis(100)).expect("a reset");
                assert_eq!(reset[if client.contains(':') { 53 } else { 33 }] & 0x04, 0x04);
                assert!(received(not, Duration::from_millis(20)).is_none());
            }
        }
        lab.host.close().await.unwrap();
    });
}

#[test]
fn icmp_errors_are_diverted_by_the_quoted_segment() {
    in_namespace(async || {
        let lab = Lab::new(|options| Divert {
            mark: options.mark,
            mask: options.mark_mask,
            icmp: vec![QuotedMatch {
                destination: ["203.0.113.10", "203.0.113.11"].map(ip).into(),
                destination_prefixes: vec![Prefix::new(ip("2001:db8:1::"), 64)],
                ..QuotedMatch::default()
            }],
            ..Divert::default()
        })
        .await;
        for (router, own, vip, other, kinds) in [
            ("192.0.2.254", "10.1.0.2", "203.0.113.11", "203.0.113.12", &[3, 11, 12][..]),
            ("2001:db8:7::254", "2001:db8:2::2", "2001:db8:1::10", "2001:db8:3::11", &[1, 2, 3, 4][..]),
        ] {
            let to_vip = segment(own, vip, (50000, 443), 0x10, &[0; 20]);
            let to_other = segment(own, other, (50000, 443), 0x10, &[0; 20]);
            let mut udp = to_vip.clone();
            udp[if own.contains(':') { 6 } else { 9 }] = 17;
            for &kind in kinds {
                assert!(lab.diverts(&icmp_error(router, own, kind, &to_vip)), "{router} type {kind}");
                assert!(!lab.diverts(&icmp_error(router, own, kind, &to_other)), "{router} type {kind}");
                assert!(!lab.diverts(&icmp_error(router, own, kind, &udp)), "{router} type {kind}");
            }
            // An echo is no error.
            let echo = if own.contains(':') { 128 } else { 8 };
            assert!(!lab.diverts(&icmp_error(router, own, echo, &to_vip)));
            assert!(!lab.diverts(&icmp_error(router, own, kinds[0], &to_vip[..16])));
        }
    });
}

#[test]
fn what_is_held_leaves_with_the_mark_or_by_its_device_alone() {
    in_namespace(async || {
        for (except, passes_unmarked) in [("gone0", false), ("wire0", true)] {
            let vips = ["203.0.113.10", "2001:db8:1::10"].map(ip);
            let lab = Lab::new(|options| Divert {
                mark: options.mark,
                mask: options.mark_mask,
                except_interface: Some(except.to_owned()),
                held: vips.into(),
                ..Divert::default()
            })
            .await;
            let mark = lab.host.options().mark;
            let leaves = async |to: IpAddr, mark: u32| {
                let device = if mark == 0 { &lab.wire } else { &lab.shunt };
                while received(device, Duration::from_millis(2)).is_some() {}
                let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
                setsockopt(&socket, Mark, &mark).unwrap();
                let connect = socket.connect((to, 443).into());
                let _ = tokio::time::timeout(Duration::from_millis(20), connect).await;
                received(device, Duration::from_millis(20)).is_some()
            };
            for vip in vips {
                assert_eq!(leaves(vip, 0).await, passes_unmarked, "{vip} {except}");
                assert!(leaves(vip, mark).await, "{vip} {except}");
            }
            assert!(leaves(ip("203.0.113.11"), 0).await, "nobody holds that");
            lab.host.close().await.unwrap();
        }
    });
}

/// A packet as a fragment of one: the first, or a later one.
pub(super) fn fragment_of(whole: &[u8], first: bool) -> Vec<u8> {
    let v6 = whole[0] >> 4 == 6;
    let header = if v6 { 40 } else { 20 };
    let mut bytes = whole.to_vec();
    if v6 {
        let next = std::mem::replace(&mut bytes[6], 44);
        let length = (whole.len() - header + 8) as u16;
        bytes[4..6].copy_from_slice(&length.to_be_bytes());
        let field = if first { [0, 1] } else { [0, 64] };
        bytes.splice(40..40, [next, 0, field[0], field[1], 0, 0, 0, 7]);
        return bytes;
    }
    bytes[6..8].copy_from_slice(if first { &[0x20, 0] } else { &[0, 8] });
    bytes[10..12].fill(0);
    let sum: u32 = bytes[..20].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

#[test]
fn fragments_and_answers_without_ports_are_diverted_by_their_source() {
    in_namespace(async || {
        let sources: Vec<IpAddr> = ["192.0.2.1", "192.0.2.2", "2001:db8:7::1"].map(ip).into();
        let packets = [PacketKind::Fragment, PacketKind::IcmpAnswer]
            .map(|kind| PacketMatch { kind, source: sources.clone() });
        let quoted = QuotedMatch { destination: sources.clone(), udp: true, ..QuotedMatch::default() };
        let lab = Lab::new(|options| Divert {
            mark: options.mark,
            mask: options.mark_mask,
            incoming: vec![SegmentMatch {
                transport: Transport::Udp,
                source_ports: vec![53.into()],
                ..SegmentMatch::default()
            }],
            icmp: vec![quoted],
            packets: packets.into(),
            ..Divert::default()
        })
        .await;
        for (server, other, own) in
            [("192.0.2.2", "192.0.2.3", "10.1.0.2"), ("2001:db8:7::1", "2001:db8:7::2", "2001:db8:2::2")]
        {
            let udp = |from: &str, to: &str, port: u16| {
                let datagram = [&port.to_be_bytes()[..], &[0, 99, 0, 40, 0, 0], &[0; 32]].concat();
                packet(ip(from), ip(to), 17, datagram, 6)
            };
            for first in [true, false] {
                assert!(lab.diverts(&fragment_of(&udp(server, own, 9), first)), "{server} {first}");
                assert!(!lab.diverts(&fragment_of(&udp(other, own, 9), first)), "{other} {first}");
            }
            assert!(!lab.diverts(&udp(server, own, 9)));
            assert!(lab.diverts(&udp(server, own, 53)) && lab.diverts(&udp(other, own, 53)));
            assert!(!lab.diverts(&segment(server, own, (53, 9), 0x10, &[])));
            let (reply, request) = if own.contains(':') { (129, 128) } else { (0, 8) };
            let echo = |kind| icmp_error(server, own, kind, &[0; 8]);
            assert!(lab.diverts(&echo(reply)) && !lab.diverts(&echo(request)));
            // Errors about what went to it by TCP, by UDP, and, in IPv6, in fragments.
            let kind = if own.contains(':') { 2 } else { 3 };
            let quotes = [udp(own, server, 9), segment(own, server, (9, 99), 0x10, &[])];
            for quote in &quotes {
                let from = if own.contains(':') { "2001:db8:9::1" } else { "192.0.2.254" };
                assert!(lab.diverts(&icmp_error(from, own, kind, quote)));
                assert!(lab.diverts(&icmp_error(from, own, kind, &fragment_of(quote, true))));
            }
        }
    });
}

#[test]
fn addresses_may_be_prefixes_and_the_other_marks_bits_stay() {
    in_namespace(async || {
        let lab = Lab::new(|options| Divert {
            mark: options.mark,
            mask: options.mark_mask,
            incoming: vec![SegmentMatch {
                interface: Some("wire0".into()),
                source: [
                    "192.0.2.0/24",
                    "192.0.2.128/25",
                    "198.51.100.7",
                    "2001:db8:7::/48",
                    "2001:db8:8::1",
                ]
                .map(|text| text.parse().unwrap())
                .into(),
                destination: vec![Prefix::host(ip("10.1.0.2")), Prefix::host(ip("2001:db8:2::2"))],
                source_ports: vec![PortRange::new(50000, 50010), PortRange::new(50005, 50020), 60000.into()],
                ..SegmentMatch::default()
            }],
            ..Divert::default()
        })
        .await;
        for (from, port, expected) in [
            ("192.0.2.1", 50000, true),
            ("192.0.2.200", 50020, true),
            ("198.51.100.7", 60000, true),
            ("198.51.100.8", 60000, false),
            ("192.0.2.1", 50021, false),
            ("192.0.3.1", 50000, false),
            ("2001:db8:7:1::5", 50015, true),
            ("2001:db8:8::1", 60000, true),
            ("2001:db8:8::2", 60000, false),
        ] {
            let to = if from.contains(':') { "2001:db8:2::2" } else { "10.1.0.2" };
            assert_eq!(lab.diverts(&segment(from, to, (port, 80), 0x10, &[])), expected, "{from} {port}");
        }
        let listed = run("nft", "list table inet shunt_server");
        assert!(listed.contains("meta mark set meta mark & 0xefffffff | 0x20000000"), "{listed}");
    });
}

#[test]
fn the_table_reads_as_it_was_meant() {
    in_namespace(async || {
        let lab = Lab::new(agent).await;
        let listed = run("nft", "list table inet shunt_server");
        for part in [
            "type filter hook prerouting priority mangle",
            "type route hook output priority mangle",
            "priority raw",
            "iifname \"shunt0\" accept",
            "tcp flags",
            "notrack",
            "tcp sport 41001",
        ] {
            assert!(listed.contains(part), "no {part:?} in\n{listed}");
        }
        lab.host.close().await.unwrap();
        assert_eq!(run("nft", "list ruleset"), "");
    });
}

#[test]
fn large_sets_and_odd_descriptions_are_accepted() {
    in_namespace(async || {
        let lab = Lab::new(|options| Divert {
            mark: options.mark,
            mask: options.mark_mask,
            incoming: vec![
                SegmentMatch {
                    destination: (0..5000u32)
                        .map(|n| Prefix::host(IpAddr::V4((0x0a01_0002 + n).into())))
                        .collect(),
                    destination_ports: (0..2000).map(|n| PortRange::from(2 * n)).collect(),
                    ..SegmentMatch::default()
                },
                // Source and destination of different families: nothing.
                SegmentMatch {
                    source: vec![ip("192.0.2.1").into()],
                    destination: vec![ip("::1").into()],
                    ..SegmentMatch::default()
                },
            ],
            icmp: vec![QuotedMatch::default()],
            ..Divert::default()
        })
        .await;
        assert!(lab.diverts(&segment("192.0.2.1", "10.1.0.2", (5, 444), 2, &[])));
        assert!(lab.diverts(&segment("192.0.2.1", "10.1.19.100", (5, 3998), 2, &[])));
        assert!(!lab.diverts(&segment("192.0.2.1", "10.1.0.2", (5, 443), 2, &[])));
    });
}

#[test]
fn packets_for_the_vip_of_a_dead_balancer_vanish() {
    in_namespace(async || {
        let folder = tempfile::tempdir().unwrap();
        let (wire, shunt) = (tun("wire0"), tun("shunt-lb0"));
        run("ip", "address add 10.1.0.2/24 dev wire0");
        run("ip", "address add 2001:db8:2::2/64 dev wire0 nodad");
        run("ip", "route add 192.0.2.0/24 dev wire0");
        run("ip", "-6 route add 2001:db8:7::/48 dev wire0");
        let options = HostOptions::defaults(Role::Balancer);
        let (table, preference) = (options.table, options.preference);
        let mut host = Host::open_in(folder.path(), "balancer", &options).await.unwrap();
        let mut changes: Vec<Change> = vec![
            Link::tun("shunt-lb0", 1500).into(),
            Sysctl::new("net/ipv4/ip_forward", 1).into(),
            Sysctl::interface(Family::V6, "all", "forwarding", 1).into(),
            Sysctl::interface(Family::V4, "all", "rp_filter", 0).into(),
            Sysctl::interface(Family::V4, "wire0", "rp_filter", 0).into(),
        ];
        let flows = [("192.0.2.1", "203.0.113.10"), ("2001:db8:7::1", "2001:db8:1::10")];
        for (_, vip) in flows {
            let family = Family::of(ip(vip));
            changes.extend([
                Change::from(Rule::new(family, preference, crate::change::MAIN).interface("shunt-lb0")),
                Rule::new(family, preference + 1, table).to(ip(vip)).into(),
                Route::device(table, ip(vip), "shunt-lb0").metric(10).into(),
                Route::blackhole(table, ip(vip)).metric(1000).into(),
            ]);
        }
        host.apply(changes).await.unwrap();
        for (client, vip) in flows {
            wire.send(&segment(client, vip, (5, 443), 2, &[])).unwrap();
            assert!(received(&shunt, Duration::from_millis(100)).is_some());
        }
        // As after a kill: the device goes, and its routes with it.
        drop(host);
        close(shunt).await;
        for (client, vip) in flows {
            while received(&wire, Duration::from_millis(2)).is_some() {}
            wire.send(&segment(client, vip, (5, 443), 2, &[])).unwrap();
            assert_eq!(received(&wire, Duration::from_millis(60)), None);
        }
    });
}
