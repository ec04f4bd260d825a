use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tun_tap::Iface;

use super::divert::{checksum, fragment_of, ip, received, segment};
use crate::change::Sysctl;
use crate::config::Role;
use crate::offload::{Count, Counted, End, Goal, Offload, PortMap, Spread};
use crate::prefix::{Family, PortRange, Transport};
use crate::testing::{in_namespace, run, snapshot, tun};
use crate::{Change, Host, HostOptions};

pub(super) const SYN_FIN_RST: u8 = 0x07;
pub(super) const ACK: u8 = 0x10;
/// A client, a VIP, a server, another server.
pub(super) const ENDS: [[&str; 4]; 2] = [
    ["192.0.2.1", "203.0.113.10", "10.3.0.11", "10.3.0.12"],
    ["2001:db8:7::1", "2001:db8::10", "fd00:3::11", "fd00:3::12"],
];

pub(super) fn socket(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

fn entries(list: &[(&str, u16, &str)]) -> BTreeMap<SocketAddr, Goal> {
    list.iter().map(|(from, port, to)| (socket(from, *port), Goal::Address(ip(to)))).collect()
}

pub(super) fn map(end: End, list: &[(&str, u16, &str)]) -> PortMap {
    PortMap { end, transport: Transport::Tcp, except_flags: SYN_FIN_RST, entries: entries(list) }
}

pub(super) fn ends(packet: &[u8]) -> (IpAddr, IpAddr) {
    if packet[0] >> 4 == 4 {
        let octets = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).unwrap();
        (octets(12).into(), octets(16).into())
    } else {
        let octets = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).unwrap();
        (octets(8).into(), octets(24).into())
    }
}

/// Whether the checksums of a whole segment are right.
pub(super) fn sums_are_right(packet: &[u8]) -> bool {
    let (header, addresses) = if packet[0] >> 4 == 4 { (20, 12..20) } else { (40, 8..40) };
    let length = ((packet.len() - header) as u16).to_be_bytes();
    let pseudo = [0, 6, length[0], length[1]];
    checksum(&[&packet[addresses], &pseudo, &packet[header..]]) == [0, 0]
        && (header == 40 || checksum(&[&packet[..20]]) == [0, 0])
}

/// What arrives on `wire0` leaves by `out0`, wherever it goes.
struct Lab {
    wire: Iface,
    out: Iface,
    host: Host,
    folder: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (wire, out) = (tun("wire0"), tun("out0"));
        for device in ["wire0", "out0"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"), "0").unwrap();
        }
        std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").unwrap();
        run("ip", "address add 10.1.0.2/24 dev wire0");
        run("ip", "address add 2001:db8:2::2/64 dev wire0 nodad");
        run("ip", "route add default dev out0");
        run("ip", "-6 route add default dev out0");
        let options = HostOptions::defaults(Role::Balancer);
        let host = Host::open_in(folder.path(), "balancer", &options).await.unwrap();
        Self { wire, out, host, folder }
    }

    async fn install(&mut self, offload: &Offload) {
        self.host.replace(changes(offload)).await.unwrap();
    }

    /// What becomes of a packet that arrives.
    fn passes(&self, packet: &[u8]) -> Vec<u8> {
        while received(&self.out, Duration::from_millis(1)).is_some() {}
        self.wire.send(packet).unwrap();
        received(&self.out, Duration::from_millis(200)).expect("it goes on")
    }

    async fn counts(&self) -> BTreeMap<Counted, Count> {
        self.host.offload_counts().await.unwrap()
    }
}

fn changes(offload: &Offload) -> Vec<Change> {
    vec![
        Sysctl::new("net/ipv4/ip_forward", 1).into(),
        Sysctl::interface(Family::V6, "all", "forwarding", 1).into(),
        offload.clone().into(),
    ]
}

pub(super) fn both_ways() -> Offload {
    let there = ENDS.map(|[_, vip, server, _]| (vip, 41_001, server));
    let back = ENDS.map(|[_, vip, server, _]| (server, 41_001, vip));
    Offload {
        except_interface: Some("none0".to_owned()),
        except_destinations: ENDS.into_iter().map(|[_, vip, ..]| ip(vip)).collect(),
        except_local_ports: vec![PortRange::new(20_000, 20_010)],
        maps: vec![map(End::Destination, &there), map(End::Source, &back)],
        ..Offload::default()
    }
}

#[test]
fn maps_rewrite_whole_packets_and_leave_the_rest() {
    in_namespace(async || {
        let before = snapshot();
        let mut lab = Lab::new().await;
        lab.install(&both_ways()).await;
        for [client, vip, server, other] in ENDS {
            let there = lab.passes(&segment(client, vip, (50_000, 41_001), ACK, &[]));
            assert_eq!(ends(&there), (ip(client), ip(server)));
            assert!(sums_are_right(&there));
            let back = lab.passes(&segment(server, client, (41_001, 50_000), ACK, &[]));
            assert_eq!(ends(&back), (ip(vip), ip(client)));
            assert!(sums_are_right(&back));
            let untouched = |packet: &[u8]| {
                let got = lab.passes(packet);
                assert_eq!(ends(&got), ends(packet));
            };
            for flags in [0x02, 0x12, 0x11, 0x04] {
                untouched(&segment(client, vip, (50_000, 41_001), flags, &[]));
                untouched(&segment(server, client, (41_001, 50_000), flags, &[]));
            }
            untouched(&segment(client, vip, (50_000, 41_002), ACK, &[]));
            untouched(&segment(client, other, (50_000, 41_001), ACK, &[]));
            untouched(&segment(other, client, (41_001, 50_000), ACK, &[]));
            untouched(&segment(server, vip, (41_001, 50_000), ACK, &[]));
            let whole = segment(client, vip, (50_000, 41_001), ACK, &[0; 20]);
            untouched(&fragment_of(&whole, true));
            untouched(&fragment_of(&whole, false));
            let counts = lab.counts().await;
            let once = Count { packets: 1, bytes: if vip.contains(':') { 60 } else { 40 } };
            assert_eq!(counts[&Counted::Map(0, socket(vip, 41_001))], once);
            assert_eq!(counts[&Counted::Map(1, socket(server, 41_001))], once);
        }
        lab.host.close().await.unwrap();
        drop((lab.wire, lab.out));
        crate::testing::until(async || snapshot() == before).await;
    });
}

#[test]
fn entries_that_stay_count_on_when_others_change() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        let [client, vip, server, other] = ENDS[0];
        let slots =
            |last: u16| -> Arc<[u16]> { (0..1024).map(|slot| if slot < 1000 { 0 } else { last }).collect() };
        let with = |second: &str, last: u16| Offload {
            maps: vec![map(End::Destination, &[(vip, 41_001, server), (vip, 41_002, second)])],
            spreads: vec![Spread {
                targets: vec![socket(vip, 80)],
                except_flags: SYN_FIN_RST,
                seed: 1,
                slots: slots(last),
                goals: vec![Goal::Address(ip(server)), Goal::Address(ip(other))],
            }],
            ..both_ways()
        };
        let send = |lab: &Lab, port| ends(&lab.passes(&segment(client, vip, (50_000, port), ACK, &[]))).1;
        let counted = async |lab: &Lab, port| lab.counts().await[&Counted::Map(0, socket(vip, port))].packets;
        lab.install(&with(server, 0)).await;
        let generation = lab.host.offload_generation();
        assert_eq!((send(&lab, 41_001), send(&lab, 41_002)), (ip(server), ip(server)));
        lab.install(&with(other, 1)).await;
        assert_eq!(lab.host.offload_generation(), generation, "changed, not made anew");
        assert_eq!((send(&lab, 41_001), send(&lab, 41_002)), (ip(server), ip(other)));
        assert_eq!((counted(&lab, 41_001).await, counted(&lab, 41_002).await), (2, 1));
        let listed = run("nft", "list map inet shunt_balancer_maps slots0");
        assert_eq!(listed.matches(other).count(), 24, "{listed}");
        // One entry less, and one more.
        let mut next = with(other, 1);
        next.maps = vec![map(End::Destination, &[(vip, 41_001, server), (vip, 41_003, other)])];
        lab.install(&next).await;
        let untouched = segment(client, vip, (50_000, 41_002), ACK, &[]);
        assert_eq!(ends(&lab.passes(&untouched)), ends(&untouched));
        assert_eq!(send(&lab, 41_003), ip(other));
        assert_eq!(counted(&lab, 41_001).await, 2);
        // Somebody else's hand in it: made anew.
        run("nft", "flush map inet shunt_balancer_maps ports0_4");
        lab.install(&with(other, 0)).await;
        assert_eq!((send(&lab, 41_001), send(&lab, 41_002)), (ip(server), ip(other)));
        assert!(lab.host.offload_generation() > generation);
    });
}

#[test]
fn clients_are_not_told_of_a_nearer_way_to_servers() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        // Clients and servers are on one link.
        for link in ["192.0.2.0/24", "10.3.0.0/24", "2001:db8:7::/64", "fd00:3::/64"] {
            run("ip", &format!("route add {link} dev wire0"));
        }
        run("ip", "address add fe80::2/64 dev wire0 nodad");
        lab.install(&both_ways()).await;
        for [client, vip, server, _] in ENDS {
            let told = |packet: &[u8], kind| {
                while received(&lab.wire, Duration::from_millis(1)).is_some() {}
                lab.wire.send(packet).unwrap();
                let sent = std::iter::from_fn(|| received(&lab.wire, Duration::from_millis(300)));
                let icmp = |packet: &Vec<u8>| match packet[0] >> 4 {
                    4 => (packet[9], packet[20]) == (1, kind),
                    _ => (packet[6], packet[40]) == (58, kind),
                };
                sent.filter(icmp).count()
            };
            let stranger = if vip.contains(':') { "fd00:3::99" } else { "10.3.0.99" };
            let kind = if vip.contains(':') { 137 } else { 5 };
            let past = segment(client, stranger, (50_000, 80), ACK, &[]);
            assert_eq!(told(&past, kind), 1, "this kernel tells nobody of nearer ways");
            assert_eq!(told(&segment(client, vip, (50_000, 41_001), ACK, &[]), kind), 0);
            let counts = lab.counts().await;
            assert_eq!(counts[&Counted::Map(0, socket(vip, 41_001))].packets, 1, "{server} got it");
        }
    });
}

#[test]
fn a_killed_predecessors_maps_forward_until_they_are_replaced() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        lab.install(&both_ways()).await;
        let options = HostOptions::defaults(Role::Balancer);
        let [client, vip, server, other] = ENDS[0];
        let packet = segment(client, vip, (50_000, 41_001), ACK, &[]);
        let Lab { wire, out, host, folder } = lab;
        drop(host);
        let host = Host::open_keeping(folder.path(), "balancer", &options, |_| true).await.unwrap();
        let mut lab = Lab { wire, out, host, folder };
        assert_eq!(ends(&lab.passes(&packet)).1, ip(server), "kept");
        let next = Offload { maps: vec![map(End::Destination, &[(vip, 41_001, other)])], ..both_ways() };
        lab.install(&next).await;
        assert_eq!(ends(&lab.passes(&packet)).1, ip(other), "replaced");
        assert!(!run("nft", "list ruleset").contains("ports1"));
        let Lab { wire, out, host, folder } = lab;
        drop(host);
        // One that keeps nothing, as `shunt` does when it cleans up.
        Host::sweep(folder.path(), "balancer", &options).await.unwrap();
        assert_eq!(run("nft", "list ruleset"), "");
        drop((wire, out));
    });
}

#[test]
fn a_spread_chooses_as_jhash_says() {
    const SLOTS: u64 = 65_537;
    in_namespace(async || {
        let mut lab = Lab::new().await;
        let slots: Arc<[u16]> = (0..SLOTS).map(|slot| (slot % 7) as u16).collect();
        let spread =
            |[_, vip, ..]: [&str; 4]| Spread {
                targets: vec![socket(vip, 80), socket(vip, 443)],
                except_flags: SYN_FIN_RST,
                seed: 0x5eed_0001,
                slots: Arc::clone(&slots),
                goals: (1..=7)
                    .map(|n| {
                        if vip.contains(':') {
                            ip(&format!("fd00:3::{n}"))
                        } else {
                            ip(&format!("10.3.0.{n}"))
                        }
                    })
                    .map(Goal::Address)
                    .collect(),
            };
        let spreads: Vec<Spread> = ENDS.into_iter().map(spread).collect();
        let offload = Offload { spreads: spreads.clone(), ..Offload::default() };
        let begun = Instant::now();
        lab.install(&offload).await;
        println!("two maps of {SLOTS} slots: {:?}", begun.elapsed());
        for ([client, vip, ..], spread) in ENDS.into_iter().zip(&spreads) {
            let mut sent = 0;
            for port in (1024..u16::MAX).step_by(1009) {
                for target in [80, 443] {
                    let got = lab.passes(&segment(client, vip, (port, target), ACK, &[]));
                    let mut key = match ip(client) {
                        IpAddr::V4(v4) => v4.octets().to_vec(),
                        IpAddr::V6(v6) => v6.octets().to_vec(),
                    };
                    key.extend(port.to_be_bytes());
                    key.extend([0, 0]);
                    let slot = (u64::from(jhash::jhash(&key, spread.seed)) * SLOTS) >> 32;
                    let chosen = spread.goals[usize::from(slots[slot as usize])];
                    let (from, to) = ends(&got);
                    assert_eq!((from, Goal::Address(to)), (ip(client), chosen), "port {port}");
                    assert!(sums_are_right(&got));
                    sent += 1;
                }
            }
            let untouched = segment(client, vip, (50_000, 8080), ACK, &[]);
            assert_eq!(ends(&lab.passes(&untouched)), ends(&untouched));
            let counts = lab.counts().await;
            let of_family = |counted: &Counted| match counted {
                Counted::Spread(_, Goal::Address(address)) => address.is_ipv4() == ip(vip).is_ipv4(),
                Counted::Spread(_, Goal::Mark(_)) | Counted::Map(..) => false,
            };
            let counted: u64 = counts.iter().filter(|(of, _)| of_family(of)).map(|(_, c)| c.packets).sum();
            assert_eq!(counted, sent);
        }
        let begun = Instant::now();
        let spreads = spreads.into_iter().map(|spread| Spread { except_flags: 0, ..spread }).collect();
        lab.install(&Offload { spreads, ..offload }).await;
        println!("replaced in {:?}", begun.elapsed());
        lab.host.close().await.unwrap();
        assert_eq!(run("nft", "list ruleset"), "");
    });
}
