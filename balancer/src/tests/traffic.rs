//! Classes, marks, limits, loads and slow start through the whole balancer, and the administrator's ports.

use std::time::Duration;

use shunt_host::Source;
use shunt_stack::time::Instant;
use shunt_stack::wire::{Packet, RedirectOption, Segment, SeqNumber, TcpFlags};

use super::packets::{checksums_are_right, error, segment};
use super::{Cast, EXID, R, balancer, casts, three_servers};
use crate::{Balancer, Config, DropReason, Output, Route};

/// Three servers of one service; web-1 is gold, web-2 gold and silver.
fn classed(service: &str, more: &str) -> String {
    let text = three_servers("")
        .replace("redirect_port = 443\n", &format!("redirect_port = 443\n{service}\n"))
        .replace("name = \"web-1\"\n", "name = \"web-1\"\nclasses = [\"gold\"]\n")
        .replace("name = \"web-2\"\n", "name = \"web-2\"\nclasses = [\"gold\", \"silver\"]\n");
    text + "[[class]]\nname = \"gold\"\ndscp = [46, 34]\n[[class]]\nname = \"silver\"\ndscp = [10]\n" + more
}

fn config(text: &str) -> Config {
    Config::parse(&Source::new("test.toml", text)).unwrap_or_else(|error| panic!("{error}"))
}

/// A SYN with R; each `n` is another connection.
fn syn(cast: Cast, n: u32, dscp: u8, payload: &[u8]) -> Packet {
    let bare = Segment::bare(cast.client(), cast.vip(443), TcpFlags::SYN);
    let mut packet = Segment { seq: SeqNumber(n.wrapping_mul(0x9e37_79b9)), payload, ..bare }.emit();
    packet.insert_redirect(EXID, &R, 1500).unwrap();
    packet.set_dscp(dscp);
    packet
}

/// Which servers 600 new connections meet.
fn met(balancer: &Balancer, cast: Cast, dscp: u8, payload: &[u8]) -> Result<[usize; 3], DropReason> {
    let mut met = [0; 3];
    for n in 0..600 {
        match balancer.route(&syn(cast, n, dscp, payload))? {
            Route::ToServer { server, .. } => met[server.index()] += 1,
            other => panic!("{other:?}"),
        }
    }
    Ok(met)
}

fn about(met: [usize; 3], wanted: [usize; 3]) {
    let near =
        met.iter().zip(wanted).all(|(met, wanted)| met.abs_diff(wanted) <= 60 && (wanted > 0 || *met == 0));
    assert!(near, "{met:?}, wanted about {wanted:?}");
}

#[test]
fn o22_a_dscp_chooses_the_class_of_servers_for_new_connections() {
    for policy in ["random", "round-robin", "elevator", "least-packets", "least-load"] {
        let balancer = balancer(&classed(&format!("policy = \"{policy}\""), ""));
        for cast in casts() {
            about(met(&balancer, cast, 46, b"").unwrap(), [300, 300, 0]);
            about(met(&balancer, cast, 34, b"").unwrap(), [300, 300, 0]);
            about(met(&balancer, cast, 10, b"").unwrap(), [0, 600, 0]);
            about(met(&balancer, cast, 0, b"").unwrap(), [200, 200, 200]);
            // A plain client's packets may change their DSCP at any time: it is not looked at (B6).
            let mut packet = cast.ack(443);
            let before = balancer.route(&packet);
            packet.set_dscp(46);
            assert_eq!(balancer.route(&packet), before);
        }
    }
    // By the client's address, in the class.
    let balancer = balancer(&classed("policy = \"source\"", ""));
    for cast in casts() {
        let all = met(&balancer, cast, 10, b"").unwrap();
        assert_eq!(all, [0, 600, 0]);
        assert_eq!(met(&balancer, cast, 46, b"").unwrap()[2], 0);
    }
}

#[test]
fn o22_a_class_without_a_server_that_is_up_falls_back_on_all_or_is_dropped() {
    let down = |text: String| text.replace("name = \"web-2\"\n", "name = \"web-2\"\nstate = \"drain\"\n");
    let all = balancer(&down(classed("", "")));
    let drop = balancer(&down(classed("", "fallback = \"drop\"\n")));
    for cast in casts() {
        about(met(&all, cast, 10, b"").unwrap(), [300, 0, 300]);
        about(met(&drop, cast, 46, b"").unwrap(), [600, 0, 0]);
        assert_eq!(met(&drop, cast, 10, b""), Err(DropReason::NoServer(443)));
        // Nothing else is affected.
        about(met(&drop, cast, 0, b"").unwrap(), [300, 0, 300]);
    }
}

const PATTERNS: &str = r#"policy = "payload"
otherwise = "round-robin"
[[service.pattern]]
class = "gold"
text = "GET /gold"
[[service.pattern]]
class = "silver"
at = 2
hex = "de:ad be ef"
"#;

#[test]
fn o13_patterns_in_the_payload_choose_the_class_of_servers() {
    let balancer = balancer(&classed(PATTERNS, ""));
    for cast in casts() {
        about(met(&balancer, cast, 0, b"GET /gold/1 HTTP/1.1").unwrap(), [300, 300, 0]);
        about(met(&balancer, cast, 0, b"xx\xde\xad\xbe\xefyy").unwrap(), [0, 600, 0]);
        for payload in [&b""[..], b"GET /gol", b"x GET /gold", b"\xde\xad\xbe\xef", b"xx\xde\xad\xbe"] {
            about(met(&balancer, cast, 0, payload).unwrap(), [200, 200, 200]);
            // What no pattern matches is classed by its DSCP.
            about(met(&balancer, cast, 10, payload).unwrap(), [0, 600, 0]);
        }
        about(met(&balancer, cast, 10, b"GET /gold").unwrap(), [300, 300, 0]);
    }
}

#[test]
fn o22_marks_keep_ecn_and_checksums() {
    let text = classed("mark_dscp = 26", "mark_dscp = 0\n");
    for cast in casts() {
        for ecn in 0..4u8 {
            for (dscp, port, marked) in
                [(0, 443, 26), (46, 41001, 26), (10, 443, 0), (10, 41002, 0), (63, 41003, 26)]
            {
                let mut packet = cast.ack(port);
                packet.set_dscp(dscp);
                let mut bytes = packet.bytes().to_vec();
                let (at, shift) = if cast.vip.is_ipv4() { (1, 0) } else { (1, 4) };
                bytes[at] |= ecn << shift;
                if cast.vip.is_ipv4() {
                    bytes[10..12].fill(0);
                    let sum = shunt_stack::wire::checksum::Sum::new().add(&bytes[..20]).checksum();
                    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                } else {
                    // A flow label, which stays as well.
                    bytes[1] |= 0x0a;
                    bytes[2] = 0xbc;
                }
                let packet = Packet::from_slice(&bytes).unwrap();
                let balancer = balancer(&text);
                let mut out = packet.clone();
                assert_eq!(balancer.process(&mut out), Ok(Output::Main));
                assert!(checksums_are_right(&out));
                assert_eq!(out.dscp(), marked, "{dscp} to {port}");
                assert_eq!(out.bytes()[at] >> shift & 3, ecn);
                // Else as without marks.
                let mut unmarked = packet.clone();
                super::balancer(&classed("", "")).process(&mut unmarked).unwrap();
                unmarked.set_dscp(marked);
                assert_eq!(out, unmarked);
            }
        }
        // What goes to clients is not marked.
        let back = segment(
            std::net::SocketAddr::new(cast.servers[0], 41001),
            cast.client(),
            TcpFlags::ACK,
            SeqNumber(1),
        );
        let mut out = back.clone();
        balancer(&text).process(&mut out).unwrap();
        assert_eq!(out.dscp(), 0);
    }
}

fn processed(balancer: &Balancer, packet: &Packet, times: usize) -> usize {
    (0..times).filter(|_| balancer.process(&mut packet.clone()).is_ok()).count()
}

#[test]
fn o22_limits_drop_and_count_what_is_too_much() {
    let text = three_servers("").replace(
        "redirect_port = 443\n",
        "redirect_port = 443\nlimit = { packets_per_s = 1000, new_per_s = 100 }\n",
    );
    let cast = casts()[0];
    let balancer = balancer(&text);
    balancer.advance(Instant::from_millis(1000));
    assert_eq!(processed(&balancer, &cast.ack(41001), 200), 100);
    balancer.advance(Instant::from_millis(2000));
    assert_eq!(processed(&balancer, &cast.syn(443, Some(R)), 50), 10);
    // A SYN that follows a redirect opens no other connection; one that comes to the service port on its own does.
    let redirected = RedirectOption { port: Some(443), ..R };
    assert_eq!(processed(&balancer, &cast.syn(41001, Some(redirected)), 50), 50);
    assert_eq!(processed(&balancer, &cast.syn(41001, None), 50), 0);
    let drops = balancer.snapshot().drops;
    assert_eq!((drops["limited_packets"], drops["limited_new"], drops["limited_bytes"]), (100, 90, 0));
    // What belongs to no service is not limited, nor what goes to clients.
    let back = segment(
        std::net::SocketAddr::new(cast.servers[0], 41001),
        cast.client(),
        TcpFlags::ACK,
        SeqNumber(1),
    );
    assert_eq!(processed(&balancer, &back, 500), 500);
    // A reload that keeps the limits does not fill the buckets; one that changes them does.
    let same = balancer.successor(&config(&text.replace("name = \"web-3\"", "name = \"new\"")));
    assert_eq!(processed(&same, &cast.syn(443, Some(R)), 50), 0);
    let other = balancer.successor(&config(&text.replace("new_per_s = 100", "new_per_s = 200")));
    assert_eq!(processed(&other, &cast.syn(443, Some(R)), 50), 20);
}

#[test]
fn b6_limits_change_no_destination() {
    let text = three_servers("").replace(
        "redirect_port = 443\n",
        "redirect_port = 443\nlimit = { bytes_per_s = 2000, burst_ms = 10 }\n",
    );
    let (limited, free) = (balancer(&text), balancer(&three_servers("")));
    for cast in casts() {
        for n in 0..200 {
            let client = std::net::SocketAddr::new(cast.client, 30_000 + n);
            for port in [443, 41001, 41003, 80] {
                let packet = segment(client, cast.vip(port), TcpFlags::ACK, SeqNumber(1));
                assert_eq!(limited.route(&packet), free.route(&packet));
                let (mut one, mut other) = (packet.clone(), packet);
                if limited.process(&mut one).is_ok() {
                    free.process(&mut other).unwrap();
                    assert_eq!(one, other);
                }
            }
        }
    }
    assert!(limited.snapshot().drops["limited_bytes"] > 500);
}

#[test]
fn o13_loads_are_told_at_run_time_shown_and_kept_over_reloads() {
    let text = three_servers("load_max_age_s = 60")
        .replace("redirect_port = 443\n", "redirect_port = 443\npolicy = \"least-load\"\n");
    let cast = casts()[1];
    let first = balancer(&text);
    first.advance(Instant::from_millis(1_000_000));
    for (server, load) in [("web-1", 0.8), ("web-2", 0.8), ("web-3", 0.2)] {
        first.set_load(server, load).unwrap();
    }
    assert!(first.set_load("web-4", 0.5).is_err());
    assert!(first.set_load("web-1", 80.0).is_err());
    let next = first.advance(Instant::from_millis(1_000_100));
    assert!(next.is_some_and(|at| at > Instant::from_millis(1_060_000)), "{next:?}");
    about(met(&first, cast, 0, b"").unwrap(), [100, 100, 400]);
    let after = first.successor(&config(&text.replace("name = \"web-2\"", "name = \"new\"")));
    after.advance(Instant::from_millis(1_050_000));
    about(met(&after, cast, 0, b"").unwrap(), [67, 267, 267]);
    let snapshot = after.snapshot();
    assert_eq!(
        (snapshot.servers["web-1"].load, snapshot.servers["web-1"].load_age_s),
        (Some(0.8), Some(50.0))
    );
    assert_eq!(snapshot.servers["new"].load, None);
    assert!(snapshot.to_string().contains("shunt_balancer_server_load{server=\"web-3\"} 0.2\n"));
    let json = serde_json::to_value(&snapshot).unwrap();
    assert!((json["servers"]["web-3"]["load"].as_f64().unwrap() - 0.2).abs() < 1e-6);
    // Too old.
    after.advance(Instant::from_millis(1_061_000));
    about(met(&after, cast, 0, b"").unwrap(), [200, 200, 200]);
}

#[test]
fn o13_packets_sent_lately_count() {
    let text = three_servers("packets_half_life_s = 5")
        .replace("redirect_port = 443\n", "redirect_port = 443\npolicy = \"least-packets\"\n");
    let (balancer, cast) = (balancer(&text), casts()[0]);
    balancer.advance(Instant::from_millis(1000));
    assert_eq!(processed(&balancer, &cast.ack(41001), 5000), 5000);
    about(met(&balancer, cast, 0, b"").unwrap(), [67, 267, 267]);
    balancer.advance(Instant::from_millis(101_000));
    assert_eq!(processed(&balancer, &cast.ack(41002), 100), 100);
    about(met(&balancer, cast, 0, b"").unwrap(), [267, 67, 267]);
}

#[test]
fn o13_a_server_that_is_new_or_enabled_again_starts_slowly_and_the_others_do_not() {
    let text =
        three_servers("").replace("redirect_port = 443\n", "redirect_port = 443\nslow_start_s = 100\n");
    let cast = casts()[0];
    let drained = text.replace("name = \"web-1\"\n", "name = \"web-1\"\nstate = \"drain\"\n");
    let without = text[..text.rfind("[[server]]").unwrap()].to_owned();
    for (before, slow) in [(&drained, 0), (&without, 2)] {
        let before = balancer(before);
        before.advance(Instant::from_millis(5_000_000));
        let after = before.successor(&config(&text));
        let part = |after: &Balancer| f64::from(met(after, cast, 0, b"").unwrap()[slow] as u32) / 600.0;
        assert!(part(&after) < 0.1, "{}", part(&after));
        let next = after.advance(Instant::from_millis(5_050_000)).unwrap();
        assert_eq!(next, Instant::from_millis(5_055_000));
        let wanted = 0.55 / 2.55;
        assert!((part(&after) - wanted).abs() < 0.06, "{}", part(&after));
        // Another reload meanwhile does not begin anew.
        let again = after.successor(&config(&text));
        assert!((part(&again) - wanted).abs() < 0.06, "{}", part(&again));
        assert_eq!(again.advance(Instant::from_millis(5_101_000)), None);
        about(met(&again, cast, 0, b"").unwrap(), [200, 200, 200]);
    }
    // A balancer that starts knows nobody: all have their whole weight.
    about(met(&balancer(&text), cast, 0, b"").unwrap(), [200, 200, 200]);
}

#[test]
fn o23_the_administrators_ports_are_the_hosts_own() {
    let balancer = balancer(&three_servers("admin_ports = [22, 2222]\ndefault_server = \"web-1\""));
    for cast in casts() {
        for port in [22, 2222] {
            for packet in [cast.syn(port, None), cast.syn(port, Some(R)), cast.ack(port)] {
                assert_eq!(balancer.route(&packet), Ok(Route::Unchanged));
            }
            let sent = segment(cast.vip(port), cast.client(), TcpFlags::ACK, SeqNumber(1));
            assert_eq!(balancer.route(&error(cast.router, cast.vip, &sent, 20)), Ok(Route::Unchanged));
        }
        assert!(matches!(balancer.route(&cast.ack(23)), Ok(Route::ToServer { .. })));
        let sent = segment(cast.vip(41001), cast.client(), TcpFlags::ACK, SeqNumber(1));
        let about = error(cast.router, cast.vip, &sent, 20);
        assert!(matches!(balancer.route(&about), Ok(Route::ToServer { .. })));
    }
}

#[test]
fn the_time_does_not_run_backwards() {
    let balancer = balancer(&three_servers(""));
    balancer.advance(Instant::from_millis(10));
    balancer.advance(Instant::from_millis(5));
    assert_eq!(balancer.now(), Instant::ZERO + Duration::from_millis(10));
}

#[test]
fn d4_a_policy_decides_about_new_connections_only() {
    let first = balancer(&three_servers(""));
    let services = [
        "policy = \"elevator\"",
        "policy = \"least-packets\"\nslow_start_s = 10",
        "policy = \"least-load\"\nmark_dscp = 1",
        "policy = \"source\"\nlimit = { packets_per_s = 1 }",
        PATTERNS,
    ];
    for service in services {
        let next = first.successor(&config(&classed(service, "fallback = \"drop\"\n")));
        for cast in casts() {
            for n in 0..100 {
                let client = std::net::SocketAddr::new(cast.client, 30_000 + n);
                for port in [443, 41001, 41002, 41003, 80] {
                    let mut packet = segment(client, cast.vip(port), TcpFlags::ACK, SeqNumber(1));
                    packet.set_dscp((n % 64) as u8);
                    assert_eq!(first.route(&packet), next.route(&packet));
                }
            }
        }
    }
}
