use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tun_tap::Iface;

use super::divert::{fragment_of, ip, segment};
use super::offload::{ACK, ENDS, both_ways, ends, socket, sums_are_right};
use crate::change::Sysctl;
use crate::config::Role;
use crate::offload::{Counted, Goal, Offload, Spread};
use crate::shortcuts::{Detour, RouteWatch, Shortcuts};
use crate::testing::{in_namespace, run, tap};
use crate::{Family, Host, HostOptions};

const SYN: u8 = 0x02;
/// Neighbours: a router towards clients, the servers.
const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const SERVER: [u8; 6] = [2, 0, 0, 0, 0, 11];
/// Where a segment's time to live is, by family.
const TTL: [usize; 2] = [8, 7];

/// Clients behind a router on `near0`, servers on `far0`. Nothing is routed here.
struct Lab {
    near: Iface,
    far: Iface,
    host: Host,
    _folder: tempfile::TempDir,
}

fn vips() -> BTreeSet<IpAddr> {
    ENDS.into_iter().map(|[_, vip, ..]| ip(vip)).collect()
}

fn forward(value: &str) {
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
    }
}

fn own_address(device: &str) -> [u8; 6] {
    let text = std::fs::read_to_string(format!("/sys/class/net/{device}/address"));
    // A namespace's own devices are in a sysfs mounted in it alone.
    let text = text.unwrap_or_else(|_| {
        let shown = run("ip", &format!("-brief link show {device}"));
        shown.split_whitespace().nth(2).unwrap().to_owned()
    });
    let mut octets = text.trim().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap());
    std::array::from_fn(|_| octets.next().unwrap())
}

impl Lab {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (near, far) = (tap("near0"), tap("far0"));
        for command in [
            "address add 10.1.0.2/24 dev near0",
            "address add 2001:db8:2::2/64 dev near0 nodad",
            "address add 10.3.0.1/24 dev far0",
            "address add fd00:3::1/64 dev far0 nodad",
            "route add default via 10.1.0.9",
            "-6 route add default via 2001:db8:2::9",
            "neigh add 10.1.0.9 lladdr 02:00:00:00:00:09 dev near0",
            "neigh add 2001:db8:2::9 lladdr 02:00:00:00:00:09 dev near0",
            "neigh add 10.3.0.11 lladdr 02:00:00:00:00:0b dev far0",
            "neigh add fd00:3::11 lladdr 02:00:00:00:00:0b dev far0",
        ] {
            run("ip", command);
        }
        let options = HostOptions::defaults(Role::Balancer);
        let host = Host::open_in(folder.path(), "balancer", &options).await.unwrap();
        Self { near, far, host, _folder: folder }
    }

    async fn install(&mut self, offload: &Offload) {
        let still = Sysctl::new("net/ipv4/ip_forward", 0).into();
        let quiet = Sysctl::interface(Family::V6, "all", "forwarding", 0).into();
        self.host.replace(vec![still, quiet, offload.clone().into()]).await.unwrap();
    }

    /// As they are while this host forwards, which it does not otherwise.
    async fn shortcuts(&self) -> Result<Shortcuts, Detour> {
        forward("1");
        let found = self.host.shortcuts(&vips()).await.unwrap();
        forward("0");
        found
    }
}

/// In a frame from somebody to one of our links.
fn frame(to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&to[..], &[2, 0, 0, 0, 0, 1], &kind, packet].concat()
}

/// The next TCP segment that leaves, and to which neighbour.
fn left(device: &Iface, within: Duration) -> Option<([u8; 6], Vec<u8>)> {
    let deadline = Instant::now() + within;
    let mut buffer = vec![0; 2048];
    while Instant::now() < deadline {
        match device.recv(&mut buffer) {
            Ok(length) => {
                let packet = &buffer[14..length];
                let tcp = match buffer[12..14] {
                    [0x08, 0x00] => packet[9] == 6,
                    [0x86, 0xdd] => packet[6] == 6,
                    _ => false,
                };
                if tcp {
                    return Some((*buffer.first_chunk().unwrap(), packet.to_vec()));
                }
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    None
}

const SOON: Duration = Duration::from_millis(300);
const A_WHILE: Duration = Duration::from_millis(40);

#[test]
fn packets_are_handed_on_where_they_arrive_and_nothing_is_routed() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        let shortcuts = lab.shortcuts().await.unwrap();
        let mut offload = Offload { shortcuts: Some(shortcuts), ..both_ways() };
        // SYNs pass in one direction.
        offload.maps[0].except_flags = 0;
        lab.install(&offload).await;
        let (near, far) = (own_address("near0"), own_address("far0"));
        for ([client, vip, server, _], ttl) in ENDS.into_iter().zip(TTL) {
            let there = segment(client, vip, (50_000, 41_001), ACK, &[]);
            lab.near.send(&frame(near, &there)).unwrap();
            let (to, got) = left(&lab.far, SOON).expect("it is handed on");
            assert_eq!((to, ends(&got)), (SERVER, (ip(client), ip(server))));
            assert_eq!(got[ttl], there[ttl] - 1);
            assert!(sums_are_right(&got));
            let back = segment(server, client, (41_001, 50_000), ACK, &[]);
            lab.far.send(&frame(far, &back)).unwrap();
            let (to, got) = left(&lab.near, SOON).expect("it is handed on");
            assert_eq!((to, ends(&got)), (ROUTER, (ip(vip), ip(client))));
            assert!(sums_are_right(&got));
            let syn = segment(client, vip, (50_000, 41_001), SYN, &[]);
            lab.near.send(&frame(near, &syn)).unwrap();
            assert_eq!(left(&lab.far, SOON).expect("whatever its flags").0, SERVER);
            let counts = lab.host.offload_counts().await.unwrap();
            assert_eq!(counts[&Counted::Map(0, socket(vip, 41_001))].packets, 2, "{vip}");
            assert_eq!(counts[&Counted::Map(1, socket(server, 41_001))].packets, 1, "{vip}");
            let mut last_hop = there.clone();
            last_hop[ttl] = 1;
            let mut tagged = frame(near, &there);
            tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
            let to_vip = segment(server, vip, (41_001, 50_000), ACK, &[]);
            let spoofed = if vip.contains(':') { "fe80::1" } else { "127.0.0.1" };
            let mut with_options = there.clone();
            if let Some(first) = with_options.first_mut().filter(|first| **first == 0x45) {
                *first = 0x46;
            } else {
                with_options[6] = 0;
            }
            for alone in [
                frame(near, &segment(spoofed, vip, (50_000, 41_001), ACK, &[])),
                frame(near, &with_options),
                frame(near, &last_hop),
                tagged,
                frame(ROUTER, &there),
                frame(near, &fragment_of(&there, true)),
                frame(near, &segment(client, vip, (50_000, 41_002), ACK, &[])),
                frame(near, &segment(server, client, (41_001, 50_000), SYN, &[])),
                frame(near, &to_vip),
            ] {
                lab.near.send(&alone).unwrap();
                assert_eq!(left(&lab.far, A_WHILE), None, "{alone:x?}");
                assert_eq!(left(&lab.near, Duration::from_millis(1)), None, "{alone:x?}");
            }
        }
        // A way that changes: the same rules lead elsewhere, and the counters begin anew with the tables.
        run("ip", "route replace default via 10.3.0.11");
        let moved = lab.shortcuts().await.unwrap();
        lab.install(&Offload { shortcuts: Some(moved), ..both_ways() }).await;
        let [client, _, server, _] = ENDS[0];
        lab.far.send(&frame(far, &segment(server, client, (41_001, 50_000), ACK, &[]))).unwrap();
        assert_eq!(left(&lab.far, SOON).expect("it turns back").0, SERVER);
        lab.install(&both_ways()).await;
        assert!(!run("nft", "list tables").contains("netdev"));
        lab.host.close().await.unwrap();
        assert_eq!(run("nft", "list ruleset"), "");
    });
}

#[test]
fn a_spread_is_handed_on_if_its_goals_have_one_way() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        let [client, vip, server, other] = ENDS[0];
        let spread = |second: &str| Spread {
            targets: vec![socket(vip, 80)],
            except_flags: SYN,
            seed: 1,
            slots: vec![0; 64].into(),
            goals: vec![Goal::Address(ip(server)), Goal::Address(ip(second))],
        };
        let near = own_address("near0");
        for (second, handed_on) in [(other, true), ("198.51.100.1", false)] {
            let shortcuts = Some(lab.shortcuts().await.unwrap());
            lab.install(&Offload { spreads: vec![spread(second)], shortcuts, ..Offload::default() }).await;
            lab.near.send(&frame(near, &segment(client, vip, (50_000, 80), ACK, &[]))).unwrap();
            assert_eq!(left(&lab.far, SOON).map(|(to, _)| to), handed_on.then_some(SERVER), "{second}");
            let counts = lab.host.offload_counts().await.unwrap();
            assert_eq!(counts[&Counted::Spread(0, Goal::Address(ip(server)))].packets, 1, "either way");
        }
    });
}

#[test]
fn ways_that_are_not_one_neighbour_on_one_link_are_left_out() {
    in_namespace(async || {
        let lab = Lab::new().await;
        let leads = async |address: &str| {
            let shortcuts = lab.shortcuts().await.unwrap();
            let hop = shortcuts.hops.into_iter().find(|hop| hop.leads_to(ip(address)));
            hop.map(|hop| (hop.interface, hop.gateway.map(|gateway| gateway.to_string())))
        };
        let via = |device: &str, gateway: Option<&str>| Some((device.to_owned(), gateway.map(str::to_owned)));
        assert_eq!(leads("192.0.2.1").await, via("near0", Some("10.1.0.9")));
        assert_eq!(leads("2001:db8:7::1").await, via("near0", Some("2001:db8:2::9")));
        assert_eq!(leads("10.3.0.11").await, via("far0", None));
        assert_eq!(leads("fd00:3::11").await, via("far0", None));
        for (alone, why) in [
            ("203.0.113.10", "a VIP"),
            ("10.3.0.1", "our own"),
            ("10.3.0.255", "all on the link"),
            ("127.0.0.1", "ourselves"),
            ("fe80::1", "of some link"),
        ] {
            assert_eq!(leads(alone).await, None, "{why}");
        }
        run("ip", "route add 198.51.100.0/24 nexthop via 10.1.0.9 nexthop via 10.3.0.11");
        run("ip", "route add blackhole 192.0.2.0/28");
        run("ip", "route add 192.0.2.128/25 via 10.1.0.9 mtu 1400");
        for alone in ["198.51.100.1", "192.0.2.1", "192.0.2.129"] {
            assert_eq!(leads(alone).await, None, "{alone}");
        }
        assert_eq!(leads("192.0.2.16").await, via("near0", Some("10.1.0.9")));
        // What fits into the one link may not fit into the other.
        run("ip", "link set far0 mtu 9000");
        assert_eq!(leads("192.0.2.16").await, via("near0", Some("10.1.0.9")));
        assert_eq!(leads("10.3.0.11").await, via("far0", None));
        assert_eq!(lab.shortcuts().await.unwrap().arrivals.len(), 1);
        run("ip", "link set far0 mtu 1400");
        assert_eq!(leads("10.3.0.11").await, None);
        assert_eq!(lab.shortcuts().await.unwrap().arrivals.len(), 2);
        run("ip", "link set far0 mtu 1500");
        let filter = |value| std::fs::write("/proc/sys/net/ipv4/conf/far0/rp_filter", value).unwrap();
        let arrivals = async || lab.shortcuts().await.unwrap().arrivals.len();
        assert_eq!(arrivals().await, 2);
        filter("1");
        assert_eq!(arrivals().await, 1, "sources are held against routes");
        filter("2");
        assert_eq!(arrivals().await, 2);
        forward("1");
        std::fs::write("/proc/sys/net/ipv4/conf/far0/forwarding", "0").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/far0/forwarding", "0").unwrap();
        let found = lab.host.shortcuts(&vips()).await.unwrap().unwrap();
        assert_eq!(found.arrivals.len(), 1, "nothing that comes from there is forwarded");
        run("ip", "link set far0 down");
        assert_eq!(leads("10.3.0.11").await, via("near0", Some("10.1.0.9")));
        let arrivals = lab.shortcuts().await.unwrap().arrivals;
        assert_eq!(arrivals.values().collect::<Vec<_>>(), vec!["near0"]);
        // Part of a bridge: its packets are the bridge's.
        run("ip", "link add bridge0 type bridge");
        run("ip", "link set near0 master bridge0");
        assert_eq!(lab.shortcuts().await, Err(Detour::Links));
    });
}

#[test]
fn where_others_have_a_say_there_are_no_shortcuts() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        let shortcuts = lab.shortcuts().await.unwrap();
        let offload = Offload { shortcuts: Some(shortcuts.clone()), ..both_ways() };
        lab.install(&offload).await;
        assert_eq!(lab.shortcuts().await, Ok(shortcuts), "our own tables are in nobody's way");
        assert_eq!(lab.host.detour().await.unwrap(), None);
        let table = "add table ip other; add chain ip other c { type filter hook input priority 0; }";
        run("nft", table);
        assert_eq!(lab.host.detour().await.unwrap(), None, "it sees nothing that is forwarded");
        for chain in ["forward", "prerouting", "postrouting"] {
            run("nft", &format!("add chain ip other {chain} {{ type filter hook {chain} priority 0; }}"));
            let detour = Detour::Chain { table: "other".to_owned(), chain: chain.to_owned() };
            assert_eq!(lab.host.detour().await.unwrap(), Some(detour.clone()));
            assert_eq!(lab.shortcuts().await, Err(detour));
            run("nft", &format!("delete chain ip other {chain}"));
        }
        run(
            "nft",
            "add table inet third; add chain inet third c { type filter hook ingress device far0 priority 9; }",
        );
        assert!(matches!(lab.host.detour().await.unwrap(), Some(Detour::Chain { .. })));
        run("nft", "delete table inet third");
        for rule in ["from 192.0.2.1 lookup main", "lookup 99", "lookup main suppress_prefixlength 0"] {
            run("ip", &format!("rule add pref 4000 {rule}"));
            assert_eq!(lab.shortcuts().await, Err(Detour::Rule(4000)), "{rule}");
            run("ip", "rule del pref 4000");
        }
        assert!(lab.shortcuts().await.is_ok());
    });
}

#[test]
fn changes_of_routes_are_told_once_they_are_complete() {
    in_namespace(async || {
        let _lab = Lab::new().await;
        let mut watch = RouteWatch::start().await.unwrap();
        let soon = Duration::from_secs(5);
        let none = tokio::time::timeout(Duration::from_millis(200), watch.changed()).await;
        assert!(none.is_err(), "nothing has changed");
        for change in [
            "route add 198.51.100.0/24 via 10.1.0.9",
            "rule add pref 4000 lookup main",
            "address add 10.9.0.1/24 dev far0",
            "link set far0 mtu 1400",
        ] {
            run("ip", change);
            // Who asks again in the middle misses nothing.
            drop(tokio::time::timeout(Duration::from_millis(10), watch.changed()).await);
            tokio::time::timeout(soon, watch.changed()).await.expect(change).unwrap();
        }
        std::fs::write("/proc/sys/net/ipv4/conf/far0/rp_filter", "1").unwrap();
        tokio::time::timeout(soon, watch.changed()).await.expect("a setting of a link").unwrap();
    });
}
