//! Balancers below a balancer: the upper one knows which service ports a subtree owns, and no more of it.
//!
//! ```text
//! client - middle - balancer - lower1 - s1, s2
//!                            ` lower2 - s3, s4
//! ```

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::tape::{Tape, packets_of, together};
use common::{
    Family, IPERF, IPERF_SERVICE, Net, OTHER, OTHER_SERVICE, Options, VIP4, VIP6, WEB, WEB_SERVICE, Way,
};
use shunt_lab::{Child, Direction, Impairment, Signal};

/// What both levels have in common.
fn head(level: u8) -> String {
    let mut text = format!(
        "role = \"balancer\"\nvips = [\"{VIP4}\", \"{VIP6}\"]\nforward = \"direct\"\nlevel = {level}\n"
    );
    for (name, port) in [("web", WEB), ("iperf", IPERF), ("other", OTHER)] {
        let _ = writeln!(text, "[[service]]\nname = \"{name}\"\nredirect_port = {port}");
    }
    text
}

/// The upper balancer's file. Servers have the same names on both levels: that is the worst case for plain clients.
fn upper(states: [&str; 2]) -> String {
    let mut text = head(0);
    for (number, state) in (1..=2u16).zip(states) {
        let (name, net) = (if number == 1 { "a" } else { "b" }, 10 + number);
        let (first, last) = (2 * number - 1, 2 * number);
        let _ = writeln!(
            text,
            "[[server]]\nname = \"{name}\"\ndevice = \"down{number}\"\ngateway = [\"10.{net}.0.2\", \"fd00:{net}::2\"]\n\
             state = \"{state}\"\nports = {{ web = [{}, {}], iperf = \"{}-{}\", other = [\"{}-{}\"] }}",
            WEB_SERVICE + first,
            WEB_SERVICE + last,
            IPERF_SERVICE + first,
            IPERF_SERVICE + last,
            OTHER_SERVICE + first,
            OTHER_SERVICE + last
        );
    }
    text
}

/// A lower balancer's file, of servers `first` and the one after.
fn lower(first: u16, states: [&str; 2]) -> String {
    let mut text = head(1);
    for (number, (name, state)) in (first..).zip(["a", "b"].into_iter().zip(states)) {
        let host = 10 + number;
        let _ = writeln!(
            text,
            "[[server]]\nname = \"{name}\"\ndevice = \"br0\"\ngateway = [\"10.3.0.{host}\", \"fd00:3::{host}\"]\n\
             state = \"{state}\"\nports = {{ web = {}, iperf = {}, other = {} }}",
            WEB_SERVICE + number,
            IPERF_SERVICE + number,
            OTHER_SERVICE + number
        );
    }
    text
}

/// The network with all balancers, agents and web servers.
fn tree(access: Option<Impairment>, taps: bool) -> (Net, [Child; 2]) {
    let options = Options {
        forward: "direct",
        servers: 4,
        tree: true,
        start: false,
        access,
        taps,
        ..Options::default()
    };
    let mut net = Net::new(options);
    net.start_balancer_with(&upper(["up", "up"]));
    let lowers = [1, 3].map(|first| {
        let file = net.file(&format!("lower{first}.toml"));
        std::fs::write(&file, lower(first, ["up", "up"])).expect("a file can be written");
        net.daemon(&net.lowers[net.lower_of(first)].0, "balancer", &file, &[])
    });
    for number in 1..=4 {
        net.start_agent(number);
    }
    net.start_nginx();
    (net, lowers)
}

fn reload_lower(net: &Net, process: &Child, first: u16, states: [&str; 2]) {
    std::fs::write(net.file(&format!("lower{first}.toml")), lower(first, states)).expect("a file");
    process.signal(Signal::SIGHUP).expect("a signal");
    let end = Instant::now() + Duration::from_secs(10);
    while !process.log().expect("its log").contains("configuration reloaded") {
        assert!(Instant::now() < end, "{}", process.log().expect("its log"));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Who served new connections, all of them redirected.
fn met(net: &Net, count: usize) -> BTreeSet<String> {
    let mut met = BTreeSet::new();
    for family in Family::BOTH {
        let tally = net.connections(family, count, 4);
        assert!(tally.broken.is_empty() && tally.redirected == count, "{tally:?}\n{}", net.logs());
        met.extend(tally.servers.into_keys());
    }
    met
}

fn named(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn o21_packets_pass_two_levels_unchanged_down_and_up() {
    let (mut net, _lowers) = tree(Some(Impairment::default()), true);
    net.start_shim("auto");
    let file = net.make_file("file", 1);
    for direction in [Direction::Forward, Direction::Backward] {
        let access = Tape::record(net.access.as_ref().expect("a tap"), direction);
        let between: Vec<Tape> = net.lowers.iter().map(|(_, link)| Tape::record(link, direction)).collect();
        let link = |server: &common::Server| Tape::record(server.link.as_ref().expect("a tap"), direction);
        let servers: Vec<Tape> = net.servers.iter().map(link).collect();
        for family in Family::BOTH {
            let vip: IpAddr = family.vip().parse().expect("an address");
            assert_eq!(met(&net, 24), named(&["s1", "s2", "s3", "s4"]));
            let way = if direction == Direction::Forward { Way::Up } else { Way::Down };
            assert!(net.transfer(family, way, &file).redirected, "{}", net.logs());
            // The last ones are under way.
            std::thread::sleep(Duration::from_millis(300));
            let at_client = access.take();
            let of = |tapes: &[Tape], vip| together(tapes.iter().map(|tape| packets_of(&tape.take(), vip)));
            let outer = packets_of(&at_client, vip);
            let (middle, inner) = (of(&between, vip), of(&servers, vip));
            println!("{family:?} {direction:?}: {} packets, the same on both levels", outer.len());
            assert!(outer.len() > 800, "{}", outer.len());
            assert!(outer == middle, "{family:?} {direction:?}: {} and {}", outer.len(), middle.len());
            assert!(outer == inner, "{family:?} {direction:?}: {} and {}", outer.len(), inner.len());
        }
    }
    net.stop_shim();
    net.stop_balancer_and_count();
}

#[test]
fn o21_a_drain_on_either_level_breaks_no_redirected_connection_and_plain_clients_reach_all() {
    let (mut net, lowers) = tree(None, false);
    // The lower level must not choose by what the upper one has chosen by: half of the servers would get nothing.
    for family in Family::BOTH {
        let tally = net.connections(family, 200, 4);
        println!("plain {family:?}: {:?}", tally.servers);
        assert!(tally.broken.is_empty() && tally.plain == 200, "{tally:?}\n{}", net.logs());
        assert!(tally.servers.len() == 4 && tally.servers.values().all(|count| *count >= 20), "{tally:?}");
    }
    net.start_shim("auto");
    assert_eq!(met(&net, 40), named(&["s1", "s2", "s3", "s4"]));
    let file = net.make_file("file", 8);
    let slow = ["--limit-rate", "1200k"];
    let running: Vec<_> = (0..8)
        .flat_map(|_| Family::BOTH.map(|family| net.start_transfer(family, Way::Down, &file, &slow)))
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    reload_lower(&net, &lowers[0], 1, ["drain", "up"]);
    assert_eq!(met(&net, 24), named(&["s2", "s3", "s4"]), "s1 is drained below");
    net.reload_balancer(&upper(["up", "drain"]));
    net.wait_for_balancer("configuration reloaded", 1);
    assert_eq!(met(&net, 24), named(&["s2"]), "s3 and s4 are drained above");
    let mut servers = BTreeSet::new();
    for transfer in running {
        let done = net.finish(transfer);
        assert!(done.redirected, "{done:?}\n{}", net.logs());
        servers.insert(done.server);
    }
    println!("transfers that outlived both drains were at {servers:?}");
    assert!(servers.contains("s1") && (servers.contains("s3") || servers.contains("s4")), "{servers:?}");
    net.stop_shim();
    net.stop_balancer_and_count();
}
