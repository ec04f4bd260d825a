//! ICMP messages that are no errors (`I4`).

use shunt_stack::time::Instant;
use shunt_stack::wire::Packet;

use super::packets::{datagram, echo, error, fragments, udp};
use super::{balancer, casts, decision, processed, three_servers, with_udp};
use crate::{Decision, DropReason, Memory, Output, Route};

fn text(icmp: &str) -> String {
    three_servers("default_server = \"web-3\"") + "[icmp]\n" + icmp + "\n"
}

#[test]
fn i4_messages_go_where_their_type_is_configured_to_go() {
    let balancer = balancer(&text(
        "default = \"drop\"\necho = { server = \"web-2\" }\nv4 = { 13 = \"balance\", 17 = \"default-server\" }\nv6 = { 200 = \"balance\" }",
    ));
    for cast in casts() {
        assert_eq!(decision(&balancer, &echo(cast.client, cast.vip, true, 7)), Ok((1, Decision::Named)));
        let reply = echo(cast.client, cast.vip, false, 7);
        let protocol = reply.protocol().number();
        assert_eq!(balancer.route(&reply), Err(DropReason::Refused(protocol)));
        let of = |kind| datagram(cast.client, cast.vip, protocol, &[kind, 0, 0, 0, 0, 9, 0, 0], 2);
        let (balanced, other) = if cast.vip.is_ipv4() { (13, 200) } else { (200, 13) };
        assert_eq!(decision(&balancer, &of(balanced)).unwrap().1, Decision::Balanced);
        if cast.vip.is_ipv4() {
            assert_eq!(balancer.route(&of(other)), Err(DropReason::Refused(protocol)));
            let reason = DropReason::Icmp { message_type: 17, code: 0 };
            assert_eq!(decision(&balancer, &of(17)), Ok((2, Decision::Default(reason))));
        }
    }
}

#[test]
fn i4_balanced_echoes_keep_to_a_server_by_address_and_identifier_and_are_answered_from_the_vip() {
    let balancer = balancer(&text("echo = \"balance\""));
    for cast in casts() {
        let mut seen = [0; 3];
        for identifier in 0..300 {
            let packet = echo(cast.client, cast.vip, true, identifier);
            let (server, why) = decision(&balancer, &packet).unwrap();
            assert_eq!(why, Decision::Balanced);
            assert_eq!(processed(&balancer, &packet).destination(), cast.servers[server]);
            let reply = processed(&balancer, &echo(cast.servers[server], cast.client, false, identifier));
            assert_eq!(reply.source(), cast.vip);
            seen[server] += 1;
        }
        assert!(seen.iter().all(|count| *count > 60), "{seen:?}");
        // What a server asks on its own account passes.
        let own = echo(cast.servers[0], cast.client, true, 1);
        assert_eq!(balancer.route(&own), Ok(Route::Unchanged));
    }
}

#[test]
fn i4_an_echo_is_answered_once_limited_and_never_for_what_must_not_be() {
    let answering = text("echo = \"answer\"").replace("[icmp]", "[limits]\nanswers_per_second = 10\n[icmp]");
    let balancer = balancer(&answering);
    let mut answers = 0;
    for cast in casts() {
        let mut memory = Memory::new(&balancer);
        for n in 0..40u64 {
            let request = echo(cast.client, cast.vip, true, 5);
            let mut packet = request.clone();
            // Four seconds' worth of tens, all at once: the first ten, then one each tenth of a second.
            let now = Instant::from_millis(1000 + n * 50);
            match balancer.handle(&mut memory, now, &mut packet) {
                Ok(output) => {
                    assert_eq!(output, Output::Main);
                    assert_eq!(packet, echo(cast.vip, cast.client, false, 5));
                    answers += 1;
                }
                Err(reason) => {
                    assert_eq!(reason, DropReason::AnswerLimit);
                    assert_eq!(packet, request);
                }
            }
        }
        let reply = echo(cast.client, cast.vip, false, 5);
        assert!(matches!(decision(&balancer, &reply), Ok((2, Decision::Default(DropReason::Icmp { .. })))));
        for packet in must_not_be_answered(cast) {
            assert_eq!(balancer.route(&packet), Err(DropReason::Unanswerable), "{packet:?}");
        }
    }
    // Of 2 seconds at 10 a second, and the 10 that a bucket holds.
    assert!((2 * 25..=2 * 30).contains(&answers), "{answers}");
    let snapshot = balancer.snapshot();
    assert_eq!(snapshot.decisions["answer"] + snapshot.drops["answer_limit"], 80);
    assert_eq!(snapshot.decisions["answer"], answers);
}

fn must_not_be_answered(cast: super::Cast) -> Vec<Packet> {
    let nobody = if cast.vip.is_ipv4() { "0.0.0.0" } else { "::" };
    let many = if cast.vip.is_ipv4() { "224.0.0.1" } else { "ff02::1" };
    let mut broken = echo(cast.client, cast.vip, true, 5).bytes().to_vec();
    *broken.last_mut().unwrap() ^= 1;
    let long = datagram(
        cast.client,
        cast.vip,
        if cast.vip.is_ipv4() { 1 } else { 58 },
        &[[if cast.vip.is_ipv4() { 8 } else { 128 }, 0, 0, 0].as_slice(), &[3; 100]].concat(),
        2,
    );
    vec![
        echo(nobody.parse().unwrap(), cast.vip, true, 5),
        echo(many.parse().unwrap(), cast.vip, true, 5),
        // From the VIP itself: it would answer itself.
        echo(cast.vip, cast.vip, true, 5),
        Packet::from_slice(&broken).unwrap(),
        fragments(&long, 1, 48)[0].clone(),
    ]
}

#[test]
fn i1_a_quote_of_a_first_fragment_tells_as_much_as_one_of_a_whole() {
    let balancer = balancer(&with_udp("", ""));
    for cast in casts() {
        let parts = fragments(&udp(cast.vip(41002), cast.client(), &[5; 600]), 77, 400);
        let packet = error(cast.router, cast.vip, &parts[0], 100);
        assert_eq!(decision(&balancer, &packet), Ok((1, Decision::ErrorOwner)));
        let out = processed(&balancer, &packet);
        assert_eq!(out.icmp().unwrap().quoted().unwrap().source, cast.servers[1]);
        // One of a later fragment has no ports to tell by.
        let packet = error(cast.router, cast.vip, &parts[1], 100);
        assert!(matches!(balancer.route(&packet), Err(DropReason::IcmpQuote { .. })));
        // The way back, too.
        let mut sent = fragments(&udp(cast.client(), cast.vip(41002), &[5; 600]), 78, 400)[0].clone();
        sent.set_destination(cast.servers[1]);
        let out = processed(&balancer, &error(cast.router, cast.client, &sent, 100));
        assert_eq!(out.icmp().unwrap().quoted().unwrap().destination, cast.vip);
    }
}
