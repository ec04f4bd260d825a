//! Links towards servers that come and go under traffic (`forward = "direct"`).

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::{Family, Net, OTHER_SERVICE, Options, Tally, Way};

/// New connections: all redirected, none broken; who served them.
fn connect(net: &Net, count: usize) -> BTreeSet<String> {
    let mut met = BTreeSet::new();
    for family in Family::BOTH {
        let tally: Tally = net.connections(family, count, 4);
        assert!(tally.broken.is_empty() && tally.redirected == count, "{tally:?}\n{}", net.logs());
        met.extend(tally.servers.into_keys());
    }
    met
}

fn named(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Waits until the balancer has seen links come (`there`) or go so often in all.
fn wait(net: &Net, there: bool, times: usize) {
    net.wait_for_balancer(if there { "its link is there" } else { "its link is gone" }, times);
}

#[test]
fn o20_servers_come_and_go_with_their_links_and_the_others_connections_never_notice() {
    let options =
        Options { forward: "direct", servers: 3, connectors: true, start: false, ..Options::default() };
    let mut net = Net::new(options);
    net.unplug(3);
    net.start_balancer();
    for number in 1..=3 {
        net.start_agent(number);
    }
    net.start_nginx();
    net.start_shim("auto");
    let file = net.make_file("file", 8);
    assert_eq!(connect(&net, 24), named(&["s1", "s2"]), "the third link is missing from the start");

    // Transfers of about five seconds at both, which last longer than what follows.
    let slow = ["--limit-rate", "1600k"];
    let running: Vec<_> = (0..6)
        .flat_map(|_| Family::BOTH.map(|family| net.start_transfer(family, Way::Down, &file, &slow)))
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    net.unplug(2);
    wait(&net, false, 1);
    assert_eq!(connect(&net, 12), named(&["s1"]));
    // A service port of the missing server: nothing comes of it, and that is counted.
    let gone = SocketAddr::new(Family::V4.vip().parse::<IpAddr>().expect("an address"), OTHER_SERVICE + 2);
    let answered = net.client.enter(|| TcpStream::connect_timeout(&gone, Duration::from_millis(300)));
    assert!(answered.expect("a namespace").is_err());
    // One that was never there, and the one that was: used at once, no reload.
    net.plug(3);
    wait(&net, true, 1);
    net.plug(2);
    wait(&net, true, 2);
    assert_eq!(connect(&net, 40), named(&["s1", "s2", "s3"]));
    // Out and in again faster than anybody looks.
    net.unplug(1);
    net.plug(1);
    wait(&net, true, 3);
    let mut servers = BTreeSet::new();
    for transfer in running {
        let done = net.finish(transfer);
        assert!(done.redirected, "{done:?}\n{}", net.logs());
        servers.insert(done.server);
    }
    assert_eq!(servers, named(&["s1", "s2"]), "connections of both outlived their links");
    assert_eq!(connect(&net, 40), named(&["s1", "s2", "s3"]));

    // Down is gone, too; and a balancer whose links are all gone goes on.
    net.balancer.set_up("back1", false).expect("a device");
    net.unplug(2);
    net.unplug(3);
    wait(&net, false, 5);
    let failed = net.curl(Family::V4, "/", &["--connect-timeout", "1"]);
    assert!(!failed.ok, "{failed:?}");
    net.plug(2);
    wait(&net, true, 4);
    // The shim takes a VIP that answered nothing for plain for a while: a new one does not know.
    net.stop_shim();
    net.start_shim("auto");
    assert_eq!(connect(&net, 12), named(&["s2"]));
    net.stop_shim();
    let counts = net.stop_balancer_and_count();
    assert!(counts.dropped("no_connector") > 0 && counts.dropped("no_server") > 0, "{counts:?}");
}

#[test]
fn o20_a_balancer_without_any_server_runs_and_gets_its_first_one_while_it_does() {
    let mut net = Net::new(Options {
        forward: "direct",
        servers: 1,
        connectors: true,
        start: false,
        ..Options::default()
    });
    let none = net.balancer_config(|_| None);
    assert!(!none.contains("[[server]]"));
    net.start_balancer_with(&none);
    net.start_agent(1);
    net.start_nginx();
    let started = Instant::now();
    assert!(!net.curl(Family::V6, "/", &["--connect-timeout", "1"]).ok);
    assert!(started.elapsed() > Duration::from_millis(900), "silence, not a refusal");
    net.reload_balancer(&net.balancer_config(|_| Some("up")));
    net.wait_for_balancer("configuration reloaded", 1);
    for family in Family::BOTH {
        let tally = net.connections(family, 8, 2);
        assert!(tally.broken.is_empty() && tally.plain == 8, "{tally:?}\n{}", net.logs());
    }
    let counts = net.stop_balancer_and_count();
    assert!(counts.dropped("no_server") > 0, "{counts:?}");
}
