//! Fragments (§9): later ones follow the first, whole datagrams arrive.

use std::net::SocketAddr;

use bytes::BytesMut;
use proptest::prelude::*;
use shunt_stack::time::Instant;
use shunt_stack::wire::{Offload, Packet, ParseError, SeqNumber, TcpFlags};

use super::packets::{checksums_are_right, datagram, fragment_bytes, fragments, reassembled, segment, udp};
use super::{balancer, casts, decision, with_udp};
use crate::{Balancer, Decision, DropReason, Memory, Output};

fn at(seconds: u64) -> Instant {
    Instant::from_millis(seconds * 1000)
}

/// Handles copies, in order.
fn handled(
    balancer: &Balancer,
    memory: &mut Memory,
    now: Instant,
    packets: &[Packet],
) -> Vec<Result<Packet, DropReason>> {
    let one = |packet: &Packet| {
        let mut out = packet.clone();
        let output = balancer.handle(memory, now, &mut out)?;
        assert_eq!((output, out.len()), (Output::Main, packet.len()));
        Ok(out)
    };
    packets.iter().map(one).collect()
}

fn all(results: Vec<Result<Packet, DropReason>>) -> Vec<Packet> {
    results.into_iter().map(|result| result.unwrap()).collect()
}

#[test]
fn o15_a_fragmented_datagram_arrives_whole_at_one_server_and_so_does_its_answer() {
    for policy in ["hash", "random", "round-robin"] {
        let balancer = balancer(&with_udp("", &format!("udp_policy = \"{policy}\"")));
        let mut memory = Memory::new(&balancer);
        for cast in casts() {
            for port in [443, 41002] {
                for number in 0..20 {
                    let data: Vec<u8> = (0..3000u32).map(|n| (n * 7 + u32::from(number)) as u8).collect();
                    let question = udp(cast.client(), cast.vip(port), &data);
                    let parts = fragments(&question, number, 1224);
                    let out = all(handled(&balancer, &mut memory, at(1), &parts));
                    let arrived = reassembled(&out);
                    assert!(checksums_are_right(&arrived), "{policy} {port}");
                    let server = cast.servers.iter().position(|own| *own == arrived.destination()).unwrap();
                    assert!(port == 443 || server == 1);
                    assert_eq!(arrived.ports(), question.ports());
                    let answer = udp(SocketAddr::new(cast.servers[server], port), cast.client(), &data);
                    let parts = fragments(&answer, number, 1224);
                    let back = reassembled(&all(handled(&balancer, &mut memory, at(1), &parts)));
                    assert!(checksums_are_right(&back));
                    assert_eq!(back.source_socket(), Some(cast.vip(port)));
                }
            }
        }
        let snapshot = balancer.snapshot();
        // Three parts each: the later two follow.
        assert_eq!(snapshot.decisions["fragment"], 2 * 2 * 20 * 2);
        assert_eq!(snapshot.fragments as usize, memory.fragments());
    }
}

#[test]
fn o15_tcp_segments_in_fragments_follow_as_well() {
    let balancer = balancer(&with_udp("", ""));
    let mut memory = Memory::new(&balancer);
    for cast in casts() {
        let whole = segment(cast.client(), cast.vip(41003), TcpFlags::ACK, SeqNumber(1));
        let parts = fragments(&whole, 3, 32);
        assert_eq!(parts.len(), 2);
        let arrived = reassembled(&all(handled(&balancer, &mut memory, at(1), &parts)));
        assert_eq!(arrived.destination(), cast.servers[2]);
        assert!(checksums_are_right(&arrived) && arrived.tcp().is_some());
    }
}

#[test]
fn o15_what_overtook_its_first_or_came_too_late_goes_to_the_default_server_or_is_dropped() {
    let without = balancer(&with_udp("", ""));
    let with = balancer(&with_udp("default_server = \"web-3\"", ""));
    for cast in casts() {
        let parts = fragments(&udp(cast.client(), cast.vip(41001), &[1; 100]), 9, 56);
        let (first, later) = (&parts[..1], &parts[1..]);
        for (balancer, expected) in [(&without, None), (&with, Some(cast.servers[2]))] {
            let mut memory = Memory::new(balancer);
            let unknown = |result: Result<Packet, DropReason>| match expected {
                None => assert_eq!(result, Err(DropReason::LaterFragment(9))),
                Some(server) => assert_eq!(result.unwrap().destination(), server),
            };
            unknown(handled(balancer, &mut memory, at(0), later).remove(0));
            handled(balancer, &mut memory, at(1), first).remove(0).unwrap();
            let followed = handled(balancer, &mut memory, at(30), later).remove(0).unwrap();
            assert_eq!(followed.destination(), cast.servers[0]);
            unknown(handled(balancer, &mut memory, at(31), later).remove(0));
        }
    }
    assert_eq!(without.snapshot().drops["later_fragment"], 4);
    assert_eq!(with.snapshot().defaulted["later_fragment"], 4);
}

#[test]
fn o15_what_follows_a_first_that_was_refused_is_refused() {
    let balancer = balancer(&with_udp("legacy = \"drop\"\ndefault_server = \"web-3\"", ""));
    let mut memory = Memory::new(&balancer);
    for cast in casts() {
        let parts = fragments(&segment(cast.client(), cast.vip(443), TcpFlags::ACK, SeqNumber(1)), 4, 32);
        let results = handled(&balancer, &mut memory, at(0), &parts);
        assert!(results.iter().all(|result| *result == Err(DropReason::Legacy(443))), "{results:?}");
    }
}

#[test]
fn o15_a_later_fragment_over_the_ports_is_dropped_and_counted() {
    let balancer = balancer(&with_udp("", ""));
    let mut memory = Memory::new(&balancer);
    for cast in casts() {
        let whole = udp(cast.client(), cast.vip(41001), &[1; 100]);
        let parts = fragments(&whole, 5, 56);
        handled(&balancer, &mut memory, at(0), &parts[..1]).remove(0).unwrap();
        let over = Packet::from_slice(&fragment_bytes(&whole, 5, 8, &[0; 64], true)).unwrap();
        let result = handled(&balancer, &mut memory, at(0), &[over]).remove(0);
        assert_eq!(result, Err(DropReason::OverlappingFragment(5)));
        handled(&balancer, &mut memory, at(0), &parts[1..]).remove(0).unwrap();
    }
    assert_eq!(balancer.snapshot().drops["overlapping_fragment"], 2);
}

#[test]
fn o15_first_fragments_without_ports_and_ends_beyond_a_datagram_are_counted_apart() {
    let balancer = balancer(&with_udp("default_server = \"web-2\"", ""));
    for cast in casts() {
        let whole = udp(cast.client(), cast.vip(41001), &[1; 100]);
        let tiny = fragment_bytes(&whole, 6, 0, &[0xc3, 0x50, 0xa0, 0x29], true);
        let beyond = fragment_bytes(&whole, 6, 65_528, &[0; 16], false);
        for (bytes, name, error) in [
            (tiny, "tiny_fragment", ParseError::TinyFragment(4)),
            (beyond, "fragment_range", ParseError::FragmentRange(65_544)),
        ] {
            let rejected = Packet::parse(BytesMut::from(&bytes[..]), Offload::default()).unwrap_err();
            assert_eq!(rejected.error, error);
            let mut packet = Packet::parse_opaque(rejected.buffer).unwrap();
            let before = balancer.snapshot().defaulted[name];
            let route = balancer.route_unreadable(&packet, error);
            assert_eq!(balancer.carry_out(route, &mut packet), Ok(Output::Main));
            assert_eq!(balancer.snapshot().defaulted[name], before + 1);
        }
    }
}

#[test]
fn o15_an_atomic_fragment_is_a_whole_and_takes_no_memory() {
    let balancer = balancer(&with_udp("", ""));
    let mut memory = Memory::new(&balancer);
    let [_, v6] = casts();
    let whole = udp(v6.client(), v6.vip(41001), &[1; 20]);
    let data = &whole.bytes()[40..];
    let atomic = Packet::from_slice(&fragment_bytes(&whole, 5, 0, data, false)).unwrap();
    let out = handled(&balancer, &mut memory, at(0), &[atomic]).remove(0).unwrap();
    assert_eq!(out.destination(), v6.servers[0]);
    assert_eq!(memory.fragments(), 0);
}

#[test]
fn o15_later_fragments_without_ports_by_nature_need_no_first() {
    let text = with_udp("", "") + "[[protocol]]\nnumber = 47\nto = \"balance\"\n";
    let balancer = balancer(&text);
    for cast in casts() {
        let parts = fragments(&datagram(cast.client, cast.vip, 47, &[1; 100], 0), 5, 56);
        let whole = decision(&balancer, &parts[0]).unwrap();
        assert_eq!(whole.1, Decision::Balanced);
        assert_eq!(decision(&balancer, &parts[1]), Ok(whole));
    }
}

#[test]
fn o15_fragments_under_way_survive_a_reload_that_moves_servers_in_the_file() {
    let before = balancer(&with_udp("", ""));
    let mut memory = Memory::new(&before);
    let text = with_udp("", "").replacen("[[server]]\nname = \"web-1\"", "[[server]]\nname = \"new\"", 1);
    let config = crate::Config::parse(&shunt_host::Source::new("test.toml", text)).unwrap();
    let after = before.successor(&config);
    let cast = casts()[0];
    let of = |port, id| fragments(&udp(cast.client(), cast.vip(port), &[1; 100]), id, 56);
    let (stays, leaves) = (of(41003, 1), of(41001, 2));
    for parts in [&stays, &leaves] {
        handled(&before, &mut memory, at(0), &parts[..1]).remove(0).unwrap();
    }
    memory.follow(&before, &after);
    let out = handled(&after, &mut memory, at(0), &stays[1..]).remove(0).unwrap();
    assert_eq!(out.destination(), cast.servers[2]);
    let out = handled(&after, &mut memory, at(0), &leaves[1..]).remove(0);
    assert_eq!(out, Err(DropReason::LaterFragment(2)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is mixed: what is decided about whole packets never depends on it (`B6`), and a datagram whose first
    /// fragment came first arrives whole at the server of its ports.
    #[test]
    fn o15_datagrams_in_any_mixture_arrive_whole(
        sizes in proptest::collection::vec((60usize..2000, 0u16..3, 0u8..2), 1..12), size in 1usize..40,
        seed in any::<u64>(),
    ) {
        let balancer = balancer(&with_udp("", ""));
        let mut memory = Memory::new(&balancer);
        let mut queues: Vec<(Packet, Vec<Packet>, Vec<Packet>)> = Vec::new();
        for (index, (length, port, family)) in sizes.iter().enumerate() {
            let cast = casts()[usize::from(*family)];
            let whole = udp(cast.client(), cast.vip(41001 + port), &vec![index as u8; *length]);
            queues.push((whole.clone(), fragments(&whole, index as u16, size * 8), Vec::new()));
        }
        let mut state = seed;
        while queues.iter().any(|(_, left, _)| !left.is_empty()) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let index = (state >> 33) as usize % queues.len();
            let (_, left, out) = &mut queues[index];
            if left.is_empty() { continue }
            // The first first, then any.
            let part = left.remove(if out.is_empty() { 0 } else { (state >> 40) as usize % left.len() });
            if part.fragment().is_some() {
                out.extend(handled(&balancer, &mut memory, at(1), &[part]).remove(0));
            }
        }
        for (whole, _, out) in queues.iter().filter(|(_, _, out)| !out.is_empty()) {
            let arrived = reassembled(out);
            prop_assert!(checksums_are_right(&arrived));
            let mut expected = whole.clone();
            balancer.process(&mut expected).unwrap();
            prop_assert_eq!(arrived.destination_socket(), expected.destination_socket());
            prop_assert_eq!(arrived.len(), whole.len());
        }
        prop_assert_eq!(balancer.snapshot().drops.values().sum::<u64>(), 0);
    }
}
