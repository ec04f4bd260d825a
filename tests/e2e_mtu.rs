//! Path MTU discovery through everything (`I1`, `I2`, `I5`): a link of 1,280 bytes between two routers, on either side of
//! the balancer, that neither end sees but by ICMP errors; both ends offer segments of 1,500 bytes.

mod common;

use common::datagrams::{Answerer, ask};
use common::{Family, Narrow, Net, OTHER, OTHER_SERVICE, Options, Way, kernel_counter};

/// Bulk data in both directions and families; the sender's kernel has to learn the path's MTU.
fn bulk(net: &Net, what: &str, redirected: bool) {
    let file = net.make_file(&what.replace(' ', "-"), 8);
    for family in Family::BOTH {
        let name = match family {
            Family::V4 => "IcmpInDestUnreachs",
            Family::V6 => "Icmp6InPktTooBigs",
        };
        let counters = || {
            let servers = net.servers.iter().map(|server| kernel_counter(&server.host, name)).sum::<u64>();
            (kernel_counter(&net.client, name), servers)
        };
        for way in Way::BOTH {
            // What was learnt about the path before would hide that it is learnt.
            net.forget_paths();
            let before = counters();
            let done = net.transfer(family, way, &file);
            let after = counters();
            let (client, servers) = (after.0 - before.0, after.1 - before.1);
            println!(
                "{what}, {family:?} {way:?}: {:.0} Mbit/s, {name}: client +{client}, servers +{servers}",
                done.megabits()
            );
            let told = if way == Way::Up { client } else { servers };
            assert!(told > 0, "the sender's kernel learnt no path MTU\n{}", net.logs());
            assert_eq!(done.redirected, redirected, "{done:?}\n{}", net.logs());
        }
    }
}

fn plain_and_redirected(narrow: Narrow, forward: &'static str) {
    let options = Options { servers: 2, narrow: Some(narrow), forward, ..Options::default() };
    let mut net = Net::new(options);
    net.start_nginx();
    bulk(&net, &format!("{forward} {narrow:?} plain"), false);
    for continuation in ["auto", "reconnect", "handover"] {
        net.start_shim(continuation);
        bulk(&net, &format!("{forward} {narrow:?} {continuation}"), true);
        net.stop_shim();
    }
}

#[test]
fn i1_i5_a_narrow_link_between_client_and_balancer_stops_nothing() {
    plain_and_redirected(Narrow::Client, "network");
}

#[test]
fn i1_i5_a_narrow_link_between_balancer_and_servers_stops_nothing() {
    plain_and_redirected(Narrow::Servers, "network");
}

#[test]
fn i1_a_narrow_link_before_a_balancer_that_rewrites_nothing_stops_nothing() {
    plain_and_redirected(Narrow::Client, "direct");
}

/// Datagrams of 1,400 bytes do not pass the link: their sender has to be told, and then sends fragments.
#[test]
fn i1_i5_senders_of_datagrams_learn_of_a_narrow_link_and_send_fragments() {
    for narrow in [Narrow::Client, Narrow::Servers] {
        let options = Options { servers: 3, narrow: Some(narrow), start: false, ..Options::default() };
        let mut net = Net::new(options);
        let text = net.balancer_config(|_| Some("up"));
        net.start_balancer_with(&common::datagrams::with_udp(&text));
        let answerer = Answerer::start(&net);
        for family in Family::BOTH {
            for port in [OTHER, OTHER_SERVICE + 1, OTHER_SERVICE + 3] {
                net.forget_paths();
                // A small question with a big answer; then the other way round.
                for (question, answer) in [(10, 1400), (1400, 10), (1400, 1400), (3000, 5000)] {
                    let answered = ask(&net, family, port, question, answer);
                    println!(
                        "{narrow:?} {family:?} {port}: {question} bytes there, {answer} back: server {} at attempt {}",
                        answered.server, answered.attempts
                    );
                    assert!(port == OTHER || port == OTHER_SERVICE + answered.server);
                }
            }
        }
        drop(answerer);
        let counts = net.stop_balancer_and_count();
        let errors =
            ["error_owner", "error_hash", "error_to_client"].map(|name| (name, counts.decided(name)));
        println!("{narrow:?}: {errors:?}, fragments {}", counts.decided("fragment"));
        let told = match narrow {
            Narrow::Client => errors[0].1.min(errors[1].1),
            Narrow::Servers => errors[2].1,
        };
        assert!(told > 0 && counts.decided("fragment") > 0, "{errors:?}");
    }
}
