use std::net::SocketAddr;
use std::time::Duration;

use tun_tap::Iface;

use super::divert::{checksum, fragment_of, ip, received, segment};
use crate::change::{Route, Sysctl};
use crate::config::Role;
use crate::prefix::{Family, Prefix};
use crate::swaps::{PortSwap, PortSwaps, SwapTable};
use crate::testing::{in_namespace, run, snapshot, tun, until};
use crate::{Change, Host, HostOptions};

const ACK: u8 = 0x10;
/// A client, a VIP.
const ENDS: [[&str; 2]; 2] = [["192.0.2.1", "203.0.113.10"], ["2001:db8:7::1", "2001:db8::10"]];
const OWN: u16 = 50_000;
const X: u16 = 443;
const Y: u16 = 41_001;

/// What arrives on `wire0` leaves by `marked0` if it was swapped, else by `out0`.
struct Lab {
    wire: Iface,
    out: Iface,
    marked: Iface,
    host: Host,
    swaps: PortSwaps,
    _folder: tempfile::TempDir,
}

impl Lab {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (wire, out, marked) = (tun("wire0"), tun("out0"), tun("marked0"));
        for device in ["wire0", "all"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{device}/rp_filter"), "0").unwrap();
        }
        run("ip", "address add 10.1.0.2/24 dev wire0");
        run("ip", "address add 2001:db8:2::2/64 dev wire0 nodad");
        run("ip", "route add default dev out0");
        run("ip", "-6 route add default dev out0");
        let options = HostOptions::defaults(Role::Client);
        let mut host = Host::open_in(folder.path(), "client", &options).await.unwrap();
        assert!(host.port_swaps().unwrap().is_none());
        host.apply(changes(&options)).await.unwrap();
        let swaps = host.port_swaps().unwrap().expect("the table stands");
        Self { wire, out, marked, host, swaps, _folder: folder }
    }

    /// What becomes of a packet that arrives, and whether it is marked.
    fn passes(&self, packet: &[u8]) -> (Vec<u8>, bool) {
        while received(&self.out, Duration::from_millis(1)).is_some() {}
        self.wire.send(packet).unwrap();
        for _ in 0..200 {
            for (device, marked) in [(&self.out, false), (&self.marked, true)] {
                if let Some(packet) = received(device, Duration::from_millis(1)) {
                    return (packet, marked);
                }
            }
        }
        panic!("it does not go on");
    }

    fn is_swapped(&self, packet: &[u8]) -> bool {
        let (got, marked) = self.passes(packet);
        assert!(sums_are_right(&got) || !marked);
        let expected = if marked { X } else { source_port(packet) };
        assert_eq!(source_port(&got), expected);
        marked
    }
}

fn changes(options: &HostOptions) -> Vec<Change> {
    let mut changes: Vec<Change> = vec![
        Sysctl::new("net/ipv4/ip_forward", 1).into(),
        Sysctl::interface(Family::V6, "all", "forwarding", 1).into(),
    ];
    for family in Family::BOTH {
        changes.push(Route::device(options.table, Prefix::all(family), "marked0").into());
        let rule = crate::change::Rule::new(family, options.preference, options.table);
        changes.push(rule.mark(options.mark, options.mark_mask).into());
    }
    let (mark, mask) = (options.mark, options.mark_mask);
    changes.push(SwapTable { except_interface: "none0".to_owned(), mark, mask }.into());
    changes
}

fn socket(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

fn swap(ends: [&str; 2], own: u16) -> PortSwap {
    PortSwap { local: socket(ends[0], own), remote: socket(ends[1], X), port: Y }
}

fn both(own: u16) -> [PortSwap; 2] {
    ENDS.map(|ends| swap(ends, own))
}

fn header_len(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 4 { 20 } else { 40 }
}

fn source_port(packet: &[u8]) -> u16 {
    let at = header_len(packet);
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

fn sums_are_right(packet: &[u8]) -> bool {
    let header = header_len(packet);
    let addresses = if header == 20 { 12..20 } else { 8..40 };
    let length = ((packet.len() - header) as u16).to_be_bytes();
    checksum(&[&packet[addresses], &[0, 6, length[0], length[1]], &packet[header..]]) == [0, 0]
}

#[test]
fn data_of_known_connections_is_swapped_and_marked_and_the_rest_left_alone() {
    in_namespace(async || {
        let before = snapshot();
        let mut lab = Lab::new().await;
        lab.swaps.change(&[], &both(OWN)).await.unwrap();
        assert_eq!(lab.swaps.len(), 2);
        let times = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
        let asking = [253, 8, 0x52, 0x44, 1, 0, 0xa0, 0x2a];
        for [client, vip] in ENDS {
            let from = |ports, flags, options: &[u8]| segment(vip, client, ports, flags, options);
            assert!(lab.is_swapped(&from((Y, OWN), ACK, &[])));
            assert!(lab.is_swapped(&from((Y, OWN), ACK | 0x08, &times)));
            for ends in [ACK | 0x01, 0x04, ACK | 0x04] {
                assert!(lab.is_swapped(&from((Y, OWN), ends, &[])), "{ends:#x}");
            }
            for (ports, flags, options) in [
                ((Y, OWN), 0x02, &[][..]),
                ((Y, OWN), 0x12, &[]),
                ((Y, OWN), ACK | 0x01, &asking),
                ((Y, OWN), 0x04, &asking),
                ((Y, OWN), ACK, &asking),
                ((Y, OWN), ACK, &[&times[..], &asking].concat()),
                ((X, OWN), ACK, &[]),
                ((Y, OWN + 1), ACK, &[]),
            ] {
                assert!(!lab.is_swapped(&from(ports, flags, options)), "{ports:?} {flags:#x}");
            }
            assert!(!lab.is_swapped(&segment(client, vip, (Y, OWN), ACK, &[])));
            let whole = from((Y, OWN), ACK, &[0; 20]);
            for first in [true, false] {
                assert!(!lab.passes(&fragment_of(&whole, first)).1);
            }
        }
        let counts = lab.swaps.counts().await.unwrap();
        assert_eq!((counts.back.packets, counts.out.packets), (10, 0));
        assert_eq!(counts.back.bytes, 4 * 40 + 52 + 4 * 60 + 72);
        lab.host.close().await.unwrap();
        drop((lab.wire, lab.out, lab.marked));
        until(async || snapshot() == before).await;
    });
}

#[test]
fn swaps_come_and_go_in_any_order_and_number() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        let many: Vec<PortSwap> = (10_000..11_000).flat_map(both).collect();
        lab.swaps.change(&[], &many).await.unwrap();
        // What stands already, or does not, is no error.
        lab.swaps.change(&both(7), &both(10_005)).await.unwrap();
        assert_eq!(lab.swaps.len(), 2000);
        let [client, vip] = ENDS[0];
        let arrives = |lab: &Lab, own| lab.is_swapped(&segment(vip, client, (Y, own), ACK, &[]));
        assert!(arrives(&lab, 10_999));
        // The same ports for another server, in one step.
        let moved = PortSwap { port: Y + 1, ..swap(ENDS[0], 10_000) };
        lab.swaps.change(&[swap(ENDS[0], 10_000)], &[moved]).await.unwrap();
        assert!(!arrives(&lab, 10_000));
        assert!(lab.is_swapped(&segment(vip, client, (Y + 1, 10_000), ACK, &[])));
        lab.swaps.change(&[&many[..], &[moved]].concat(), &[]).await.unwrap();
        assert!(lab.swaps.is_empty() && !arrives(&lab, 10_999));
        assert!(!run("nft", "list ruleset").contains("elements"), "{}", run("nft", "list ruleset"));
        lab.host.close().await.unwrap();
    });
}

#[test]
fn a_table_that_somebody_removed_is_made_anew_with_all_swaps() {
    in_namespace(async || {
        let mut lab = Lab::new().await;
        lab.swaps.change(&[], &both(OWN)).await.unwrap();
        run("nft", "flush ruleset");
        assert_eq!(lab.swaps.counts().await.unwrap(), crate::swaps::SwapCounts::default());
        lab.swaps.change(&[], &both(OWN + 1)).await.unwrap();
        for [client, vip] in ENDS {
            for own in [OWN, OWN + 1] {
                assert!(lab.is_swapped(&segment(vip, client, (Y, own), ACK, &[])));
            }
        }
        lab.host.close().await.unwrap();
    });
}

#[test]
fn what_a_killed_session_left_is_swept() {
    in_namespace(async || {
        let before = snapshot();
        let lab = Lab::new().await;
        let Lab { wire, out, marked, host, mut swaps, _folder: folder } = lab;
        swaps.change(&[], &both(OWN)).await.unwrap();
        drop(host);
        assert!(run("nft", "list tables").contains("shunt_client_swaps"));
        let options = HostOptions::defaults(Role::Client);
        let host = Host::open_in(folder.path(), "client", &options).await.unwrap();
        assert_eq!(run("nft", "list tables"), "");
        host.close().await.unwrap();
        drop((wire, out, marked));
        until(async || snapshot() == before).await;
    });
}
