//! For any packet: no panic, and nothing but packet and configuration decides.

use std::sync::LazyLock;

use bytes::BytesMut;
use proptest::prelude::*;
use shunt_stack::wire::{Offload, Packet};

use super::packets::checksums_are_right;
use super::{balancer, casts, three_servers};
use crate::Balancer;

static BALANCERS: LazyLock<[Balancer; 5]> = LazyLock::new(|| {
    let service = "redirect_port = 443\n";
    [
        balancer(&three_servers("").replace(service, "redirect_port = 443\npolicy = \"round-robin\"\n")),
        balancer(&three_servers("default_server = \"web-2\"")),
        balancer(&three_servers("legacy = \"drop\"").replace("redirect_port = 443", "redirect_port = 41001")),
        balancer(&three_servers("forward = \"direct\"")),
        balancer(&with_everything()),
    ]
});

/// Classes, patterns, marks, limits and administrator's ports, none of which may matter to the properties.
fn with_everything() -> String {
    let service = r#"redirect_port = 443
policy = "payload"
otherwise = "least-packets"
slow_start_s = 5
mark_dscp = 46
limit = { packets_per_s = 1_000_000, bytes_per_s = 10_000_000, new_per_s = 1000 }
[[service.pattern]]
class = "gold"
at = 3
hex = "00"
"#;
    three_servers("admin_ports = [80]\ndefault_server = \"web-2\"")
        .replace("redirect_port = 443\n", service)
        .replace("name = \"web-1\"\n", "name = \"web-1\"\nclasses = [\"gold\"]\n")
        + "[[class]]\nname = \"gold\"\ndscp = [0, 10]\nmark_dscp = 63\nfallback = \"drop\"\n"
}

/// Bytes that are a header of ours often enough: from and to addresses and ports that mean something.
fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    let noise = proptest::collection::vec(any::<u8>(), 0..120);
    (noise, 0usize..2, 0usize..6, 0usize..6, any::<[u8; 2]>(), 0usize..7).prop_map(
        |(mut bytes, family, from, to, ports, protocol)| {
            let cast = casts()[family];
            let address = |index: usize| match index {
                0 | 1 => cast.vip,
                2..=4 => cast.servers[index - 2],
                _ => cast.client,
            };
            let port = |byte: u8| [41001u16, 41002, 443, 80, 50_000][usize::from(byte % 5)].to_be_bytes();
            let protocol = [6, 6, 6, 17, if family == 0 { 1 } else { 58 }, 44, 0][protocol];
            let total = bytes.len() as u16;
            let transport = if family == 0 { 20 } else { 40 };
            if bytes.len() < transport + 4 {
                return bytes;
            }
            let octets = |index| match address(index) {
                std::net::IpAddr::V4(address) => address.octets().to_vec(),
                std::net::IpAddr::V6(address) => address.octets().to_vec(),
            };
            if family == 0 {
                bytes[0] = 0x45;
                bytes[2..4].copy_from_slice(&total.to_be_bytes());
                bytes[6] &= 0x20;
                bytes[9] = protocol;
                bytes[12..16].copy_from_slice(&octets(from));
                bytes[16..20].copy_from_slice(&octets(to));
            } else {
                bytes[0] = 0x60;
                bytes[4..6].copy_from_slice(&(total - 40).to_be_bytes());
                bytes[6] = protocol;
                bytes[8..24].copy_from_slice(&octets(from));
                bytes[24..40].copy_from_slice(&octets(to));
            }
            bytes[transport..transport + 2].copy_from_slice(&port(ports[0]));
            bytes[transport + 2..transport + 4].copy_from_slice(&port(ports[1]));
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_bytes_are_routed_without_a_panic(bytes in any_packet()) {
        for balancer in BALANCERS.iter() {
            match Packet::parse(BytesMut::from(&bytes[..]), Offload::default()) {
                Ok(mut packet) => {
                    let right = checksums_are_right(&packet);
                    let length = packet.len();
                    if balancer.process(&mut packet).is_ok() {
                        prop_assert_eq!(checksums_are_right(&packet), right);
                        prop_assert_eq!(packet.len(), length);
                        prop_assert!(Packet::from_slice(packet.bytes()).is_ok());
                    }
                }
                Err(rejected) => {
                    if let Ok(mut packet) = Packet::parse_opaque(rejected.buffer) {
                        let route = balancer.route_unreadable(&packet, rejected.error);
                        let _ = balancer.carry_out(route, &mut packet);
                    }
                }
            }
        }
    }

    #[test]
    fn o15_packets_cut_into_fragments_keep_the_fuzzers_rules(
        bytes in any_packet(), kind in 0u8..8, choices in any::<[u8; 8]>(),
    ) {
        crate::fuzz::route(&[&[kind][..], &bytes, &choices].concat());
    }

    #[test]
    fn b6_the_decision_about_a_non_syn_never_depends_on_what_passed_before(
        packets in proptest::collection::vec(any_packet(), 1..8),
    ) {
        for used in [&BALANCERS[0], &BALANCERS[4]] {
        let parsed: Vec<Packet> = packets.iter().filter_map(|bytes| Packet::from_slice(bytes).ok()).collect();
        let not_syn = |packet: &&Packet| packet.tcp().is_none_or(|tcp| !tcp.is_syn());
        let alone: Vec<_> = parsed.iter().filter(not_syn).map(|packet| used.route(packet)).collect();
        for packet in parsed.iter().rev() {
            let _ = used.process(&mut packet.clone());
        }
        let after: Vec<_> = parsed.iter().filter(not_syn).map(|packet| used.route(packet)).collect();
        prop_assert_eq!(alone, after);
        }
    }
}
