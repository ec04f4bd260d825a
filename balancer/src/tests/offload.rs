//! What is left to the kernel, and that it is what userspace would do.

use shunt_host::offload::{End, Goal, PortMap};
use shunt_host::{Offload, Source};
use shunt_stack::wire::{Packet, SeqNumber, TcpFlags};

use super::packets::segment;
use super::{balancer, casts, three_servers, with_udp};
use crate::config::Transport;
use crate::host::{Devices, ServerDevice};
use crate::offload::{Obstacle, Offloadable, Plan};
use crate::{Config, Route};

fn config(text: &str) -> Config {
    Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"))
}

/// With the devices of these servers, by their slots; `None`: its link is missing.
fn offload_by(text: &str, slots: &[Option<u32>]) -> Offload {
    let device = |slot: &Option<u32>| ServerDevice {
        name: "t0".to_owned(),
        slot: slot.unwrap_or_default(),
        connected: slot.is_some(),
    };
    let servers = slots.iter().map(device).collect();
    let devices = Devices { main: "shunt-lb0".to_owned(), mtu: 1500, servers };
    Plan::new(&config(text), &balancer(text), &devices).unwrap().offload().clone()
}

fn offload(text: &str) -> Offload {
    offload_by(text, &[])
}

fn refused(text: &str) -> Obstacle {
    Offloadable::new(&config(text)).unwrap_err()
}

fn address(goal: Goal) -> std::net::IpAddr {
    match goal {
        Goal::Address(address) => address,
        Goal::Mark(mark) => panic!("a mark: {mark:#x}"),
    }
}

/// Where the maps send a segment: the server's address, or the client's with the VIP as source.
fn looked_up<'a>(
    maps: impl IntoIterator<Item = &'a PortMap>,
    end: End,
    packet: &Packet,
) -> Option<std::net::IpAddr> {
    let key = if end == End::Source { packet.source_socket() } else { packet.destination_socket() }?;
    maps.into_iter().filter(|map| map.end == end).find_map(|map| map.entries.get(&key).copied()).map(address)
}

#[test]
fn what_maps_cannot_do_stays_in_userspace() {
    assert_eq!(refused(&three_servers("forward = \"gue\"")).to_string().get(..3), Some("not"));
    assert_eq!(refused(&format!("{}\n[host]\noffload = \"off\"\n", three_servers(""))), Obstacle::Off);
    let of = |text: &str| Offloadable::new(&config(text)).unwrap();
    let plain = of(&three_servers(""));
    assert_eq!((plain.services, plain.plain), (vec![None], None));
    let with = |line: &str| {
        let port = "redirect_port = 443\n";
        of(&three_servers("").replace(port, &format!("{port}{line}\n"))).services[0].clone()
    };
    assert_eq!(with("limit = { packets_per_s = 10 }"), Some(Obstacle::Limited));
    assert_eq!(with("limit = { bytes_per_s = 10 }"), Some(Obstacle::Limited));
    assert_eq!(with("limit = { new_per_s = 10 }"), None, "SYNs are limited in userspace");
    assert_eq!(with("mark_dscp = 18"), Some(Obstacle::Marked));
    let class = "[[class]]\nname = \"gold\"\ndscp = [46]\nmark_dscp = 46\n";
    assert_eq!(of(&(three_servers("") + class)).services, [Some(Obstacle::Marked)]);
    assert_eq!(of(&three_servers("legacy = \"drop\"")).plain, Some(Obstacle::Dropped));
    let many = three_servers("").replace("41001 }", "\"20000-40000\" }");
    assert!(matches!(refused(&many), Obstacle::Entries(80_000..)));
}

#[test]
fn a_limited_service_is_in_no_map_towards_servers() {
    let port = "redirect_port = 443\n";
    let text = three_servers("").replace(port, &format!("{port}limit = {{ packets_per_s = 10 }}\n"));
    let offload = offload(&text);
    for map in offload.maps.iter().filter(|map| map.end == End::Destination) {
        assert!(map.entries.is_empty(), "{map:?}");
    }
    assert!(offload.spreads.is_empty());
}

#[test]
fn b2_b5_maps_say_what_userspace_decides() {
    for text in [
        three_servers(""),
        with_udp("", ""),
        three_servers("legacy = \"default-server\"\ndefault_server = \"web-2\""),
    ] {
        let (balancer, offload) = (balancer(&text), offload(&text));
        for cast in casts() {
            for port in [443, 41_001, 41_002, 41_003, 41_004, 22] {
                let there = segment(cast.client(), cast.vip(port), TcpFlags::ACK, SeqNumber(8));
                let mapped = looked_up(of_tcp(&offload), End::Destination, &there);
                let hashed = offload.spreads.iter().any(|spread| spread.targets.contains(&cast.vip(port)));
                match balancer.route(&there) {
                    Ok(Route::ToServer { server, .. }) if !hashed => {
                        assert!(
                            mapped.is_none_or(|address| address == cast.servers[server.index()]),
                            "{port}"
                        );
                        assert_eq!(mapped.is_some(), port == 443 || port > 41_000 && port < 41_004, "{port}");
                    }
                    _ => assert_eq!(mapped, None, "{port}"),
                }
                for server in cast.servers {
                    let back = segment((server, port).into(), cast.client(), TcpFlags::ACK, SeqNumber(8));
                    let mapped = looked_up(of_tcp(&offload), End::Source, &back);
                    let decided = match balancer.route(&back).unwrap() {
                        Route::ToClient { vip, .. } => Some(vip),
                        _ => None,
                    };
                    assert_eq!(mapped, decided, "{server} {port}");
                }
            }
        }
    }
}

#[test]
fn b3_slots_say_what_userspace_decides() {
    let text = three_servers("");
    let (balancer, offload) = (balancer(&text), offload(&text));
    assert_eq!(offload.spreads.len(), 2);
    for cast in casts() {
        let spread = offload.spreads.iter().find(|spread| spread.targets.contains(&cast.vip(443))).unwrap();
        for port in 1024..2048 {
            let client = (cast.client, port).into();
            let Ok(Route::ToServer { server, .. }) =
                balancer.route(&segment(client, cast.vip(443), TcpFlags::ACK, SeqNumber(8)))
            else {
                panic!("{port}");
            };
            let slot = crate::maglev::hash_client(client, 0) as usize;
            assert_eq!(address(spread.goals[usize::from(spread.slots[slot])]), cast.servers[server.index()]);
        }
    }
}

fn of_tcp(offload: &Offload) -> impl Iterator<Item = &PortMap> {
    offload.maps.iter().filter(|map| map.transport == Transport::Tcp)
}

/// The flags of segments that come here, by what the maps say of a key.
fn flags_left(offload: &Offload, end: End, key: std::net::SocketAddr) -> Option<u8> {
    let mut maps = of_tcp(offload).filter(|map| map.end == end);
    maps.find(|map| map.entries.contains_key(&key)).map(|map| map.except_flags)
}

#[test]
fn what_has_to_be_decided_about_comes_here() {
    const SYN: u8 = 0x02;
    let cast = casts()[0];
    let (there, back) = (cast.vip(41_001), std::net::SocketAddr::new(cast.servers[0], 41_001));
    let flags = |text: &str| {
        let offload = offload(text);
        assert_eq!(offload.spreads[0].except_flags & SYN, SYN, "B1");
        [flags_left(&offload, End::Destination, there), flags_left(&offload, End::Source, back)]
    };
    let plain = three_servers("");
    // B2 has no question about any flag.
    assert_eq!(flags(&plain), [Some(0), Some(0)]);
    let counted = format!("{plain}[statistics]\nconnections = true\n");
    assert_eq!(flags(&counted), [Some(0x07), Some(0x07)]);
    let limited = plain.replace("redirect_port = 443\n", "redirect_port = 443\nlimit = { new_per_s = 5 }\n");
    assert_ne!(limited, plain);
    assert_eq!(flags(&limited), [Some(SYN), Some(0)]);
    // B1: SYN-ACKs get C.
    assert_eq!(flags(&three_servers("answer = \"balancer\"")), [Some(0), Some(SYN)]);
}

#[test]
fn where_packets_stay_as_they_are_servers_have_marks() {
    let text = three_servers("forward = \"direct\"");
    let offload = offload_by(&text, &[Some(0), None, Some(7)]);
    assert_eq!(offload.mark_mask, Some(0x03ff_0000));
    assert_eq!(offload.except_prefix.as_deref(), Some("shunt-lb0-"));
    for cast in casts() {
        let goal = |port| of_tcp(&offload).find_map(|map| map.entries.get(&cast.vip(port)).copied());
        assert_eq!(goal(41_001), Some(Goal::Mark(0x0001_0000)));
        assert_eq!(goal(41_002), None, "its packets are dropped, and counted");
        assert_eq!(goal(41_003), Some(Goal::Mark(0x0008_0000)));
        let spread = offload.spreads.iter().find(|spread| spread.targets.contains(&cast.vip(443))).unwrap();
        assert!(spread.goals.contains(&Goal::Mark(0x0001_0000)));
    }
    let back = offload.maps.iter().filter(|map| map.end == End::Source);
    assert!(back.map(|map| map.entries.len()).sum::<usize>() == 0, "answers go straight to clients");
}
