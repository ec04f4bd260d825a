//! What other balancers got wrong (`tests/PEERS_BUGS.md`): packets in, packets out.

use std::net::SocketAddr;

use shunt_host::Source;
use shunt_stack::wire::{Packet, Segment, SeqNumber, TcpFlags};

use super::packets::segment;
use super::{R, balancer, casts, decision, processed, three_servers};
use crate::{Balancer, Config, Decision, SelectKey};

#[test]
fn checksums_updated_step_by_step_are_those_made_anew_whatever_the_sum() {
    let balancer = balancer(&three_servers(""));
    for cast in casts() {
        let server = SocketAddr::new(cast.servers[1], 41002);
        for n in 0..=u16::MAX {
            // Every sum comes once, among them both forms of zero.
            let with = |to| Segment {
                seq: SeqNumber(u32::from(n)),
                ack: SeqNumber(1),
                window: 1000,
                ..Segment::bare(cast.client(), to, TcpFlags::ACK)
            };
            let out = processed(&balancer, &with(cast.vip(41002)).emit());
            assert_eq!(out, with(server).emit(), "{n}");
        }
    }
}

#[test]
fn options_of_length_zero_end_the_list_and_spoil_the_option_in_front_of_them() {
    let balancer = balancer(&three_servers(""));
    let lists: [&[u8]; 5] = [
        &[253, 0, 0x52, 0x44],
        &[8, 0, 1, 1],
        &[1, 1, 1, 253],
        // R in front: valid but for what follows.
        &[253, 8, 0x52, 0x44, 1, 0, 0, 0, 8, 0, 1, 1],
        &[253, 8, 0x52, 0x44, 1, 0, 0, 0, 8, 255, 1, 1],
    ];
    for cast in casts() {
        for options in lists {
            let bare = Segment::bare(cast.client(), cast.vip(443), TcpFlags::SYN);
            let packet = Segment { options, ..bare }.emit();
            assert_eq!(decision(&balancer, &packet).unwrap().1, Decision::LegacyHash);
            processed(&balancer, &packet);
        }
    }
    assert_eq!(balancer.snapshot().malformed_options, 2 * 2);
}

/// A balancer with this file and secrets of its own.
fn started(text: &str, secret: u8) -> Balancer {
    let config = Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"));
    Balancer::new(&config, SelectKey([secret; 16]))
}

#[test]
fn balancers_in_the_midst_of_different_changes_agree_on_every_redirected_connection() {
    let usual = three_servers("");
    let server = |n: u16| format!("name = \"web-{n}\"\n");
    let fourth =
        "[[server]]\nname = \"web-4\"\naddress = [\"10.0.0.4\", \"fd00::4\"]\nports = { web = 41004 }\n";
    let change = |from: &str, to: String| usual.replace(from, &to);
    let files = [
        usual.clone(),
        usual.clone() + fourth,
        change(&server(3), server(3) + "state = \"drain\"\n"),
        change(&server(1), server(1) + "weight = 9\n"),
        change("redirect_port = 443\n", "redirect_port = 443\npolicy = \"source\"\n".to_owned()) + fourth,
        // Another order, too: nothing counts by its place.
        change(&server(1), server(9)).replace(&server(2), &server(1)).replace(&server(9), &server(2)),
    ];
    let balancers: Vec<Balancer> = (1..).zip(&files).map(|(secret, text)| started(text, secret)).collect();
    for cast in casts() {
        for (at, to) in (1..).zip(cast.servers) {
            for balancer in &balancers {
                for flags in [TcpFlags::ACK, TcpFlags::ACK | TcpFlags::FIN, TcpFlags::RST] {
                    let packet = segment(cast.client(), cast.vip(41000 + at), flags, SeqNumber(5));
                    assert_eq!(processed(balancer, &packet).destination(), to);
                }
                let joining = cast.syn(41000 + at, Some(R));
                assert_eq!(processed(balancer, &joining).destination(), to);
            }
        }
    }
}

#[test]
fn a_restarted_balancer_decides_from_its_first_packet_on_as_the_one_before() {
    let text = three_servers("");
    let (before, after) = (started(&text, 1), started(&text, 2));
    for cast in casts() {
        let mut met = [0; 3];
        for port in 20_000..23_000 {
            let client = SocketAddr::new(cast.client, port);
            let plain: Packet = segment(client, cast.vip(443), TcpFlags::ACK, SeqNumber(1));
            let decided = decision(&before, &plain).unwrap();
            assert_eq!(decision(&after, &plain), Ok(decided), "a plain connection");
            met[decided.0] += 1;
        }
        assert!(met.iter().all(|count| *count > 500), "all servers, not those read first: {met:?}");
        for (at, port) in (0..).zip(41001..=41003) {
            assert_eq!(decision(&after, &cast.ack(port)), Ok((at, Decision::Owner)));
        }
    }
}
