//! The kernel forwards established traffic by itself, by the same table as userspace.

mod common;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use common::ctl::ctl;
use common::{Family, Net, Options, TestFile, Transfer, Way, kernel_counter};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn off(text: &str) -> String {
    format!("{text}\n[host]\noffload = \"off\"\n")
}

fn usual(net: &Net) -> String {
    net.balancer_config(|_| Some("up"))
}

fn show(net: &Net) -> Value {
    ctl(&net.balancer, &["show", "--json"]).json()
}

fn counters(net: &Net) -> Value {
    ctl(&net.balancer, &["counters", "--json"]).json()
}

/// Packets that went through userspace, and those that the kernel forwarded.
fn packets(net: &Net) -> (u64, u64) {
    let counters = counters(net);
    let decided = counters["decisions"].as_object().expect("decisions").values();
    let all: u64 = decided.filter_map(Value::as_u64).sum();
    let offloaded = counters["offloaded"].as_u64().expect("a number");
    (all - offloaded, offloaded)
}

/// Runs a program on the balancer's host.
fn there(net: &Net, program: &str, arguments: &[&str]) -> String {
    let mut command = std::process::Command::new(program);
    let output = net.balancer.run_within(command.args(arguments), Duration::from_secs(10));
    let output = output.unwrap_or_else(|error| panic!("{program} {arguments:?}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn ruleset(net: &Net) -> String {
    there(net, "nft", &["list", "ruleset"])
}

/// The table that hands packets on where they arrive.
fn hands_on(net: &Net) -> bool {
    ruleset(net).contains("table netdev shunt_balancer_maps")
}

/// Waits until what the kernel forwards is routed for a reason that names this, or is not.
fn wait_routed(net: &Net, because: Option<&str>) {
    let deadline = Instant::now() + Duration::from_secs(8);
    loop {
        let shown = show(net);
        let why = shown["offload"]["routed"].as_str();
        let as_wanted = match (why, because) {
            (None, None) => true,
            (Some(why), Some(because)) => why.contains(because),
            _ => false,
        };
        if as_wanted && hands_on(net) == because.is_none() {
            return;
        }
        assert!(Instant::now() < deadline, "wanted {because:?}: {shown}\n{}", net.logs());
        thread::sleep(Duration::from_millis(50));
    }
}

fn net(servers: u16) -> Net {
    let mut net = Net::new(Options { servers, ..Options::default() });
    net.start_nginx();
    net
}

/// Transfers by redirected and plain clients; `answers`: whether servers' answers pass the balancer.
fn whole_and_past_userspace(net: &mut Net, answers: bool) {
    let file = net.make_file("file", 16);
    for redirecting in [true, false] {
        if redirecting {
            net.start_shim("auto");
        } else {
            net.stop_shim();
        }
        for family in Family::BOTH {
            for way in Way::BOTH {
                let before = packets(net);
                let done = net.transfer(family, way, &file);
                assert_eq!(done.redirected, redirecting, "{done:?}");
                let after = packets(net);
                let (here, kernel) = (after.0 - before.0, after.1 - before.1);
                println!(
                    "{family:?} {way:?} redirecting {redirecting}: {here} in userspace, {kernel} by the kernel"
                );
                assert!(here <= 12, "{here} packets in userspace\n{}", net.logs());
                // Super-packets hold at most 64 KiB (the host's links are virtual).
                let least = if answers || way == Way::Up { 16 * MIB / 65_536 } else { 20 };
                assert!(kernel >= least, "{kernel} packets by the kernel");
            }
        }
    }
    let shown = show(net);
    assert_eq!(shown["offload"]["in_force"], true, "{shown}");
}

#[test]
fn transfers_are_whole_and_userspace_sees_handshakes_only() {
    let mut net = net(3);
    whole_and_past_userspace(&mut net, true);
    let shown = show(&net);
    // The servers' counters hold what the kernel forwarded.
    let bytes = |key: &str| -> u64 {
        let servers = shown["servers"].as_array().expect("servers").iter();
        servers.map(|server| server["counters"][key].as_u64().expect("a number")).sum()
    };
    for key in ["bytes", "bytes_back"] {
        assert!(bytes(key) > 4 * 16 * MIB, "{key}: {}", bytes(key));
    }
    assert!(hands_on(&net), "{shown}");
    net.stop_balancer_and_count();
    assert_eq!(ruleset(&net), "");
}

#[test]
fn packets_that_stay_as_they_are_pass_to_their_servers_links_as_well() {
    for forward in ["direct", "datalink"] {
        let mut net = Net::new(Options { forward, servers: 3, ..Options::default() });
        net.start_nginx();
        println!("{forward}:");
        whole_and_past_userspace(&mut net, false);
        net.start_shim("auto");
        let file = net.make_file("slow", 24);
        let running = start_slow(&net, &file);
        let mut balancer = net.balancer_process.take().expect("it runs");
        balancer.kill().expect("it can be killed");
        thread::sleep(Duration::from_secs(2));
        net.start_balancer();
        for transfer in running {
            let done = net.finish(transfer);
            assert!(done.redirected && done.seconds < 8.5, "{done:?}\n{}", net.logs());
        }
        let counts = net.stop_balancer_and_count();
        assert_eq!(counts.decided("to_client"), 0);
        assert_eq!(ruleset(&net), "");
    }
}

#[test]
fn switched_off_everything_goes_through_userspace() {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    let text = off(&usual(&net));
    net.start_balancer_with(&text);
    for number in 1..=2 {
        net.start_agent(number);
    }
    net.start_nginx();
    let file = net.make_file("file", 4);
    for family in Family::BOTH {
        for way in Way::BOTH {
            net.transfer(family, way, &file);
        }
    }
    let (here, kernel) = packets(&net);
    assert!(here > 200 && kernel == 0, "{here} {kernel}");
    assert!(!ruleset(&net).contains("maps"), "{}", ruleset(&net));
    let shown = show(&net);
    assert_eq!(shown["offload"]["in_force"], false);
    assert!(shown["offload"]["why_not"].as_str().is_some_and(|why| why.contains("off")), "{shown}");
}

/// The server that each of these local ports meets without a shim.
fn met(net: &Net, ports: impl Iterator<Item = u16>) -> BTreeMap<(u16, bool), String> {
    let mut met = BTreeMap::new();
    for port in ports {
        for family in Family::BOTH {
            let local = (port + u16::from(family == Family::V6)).to_string();
            let extra = ["--local-port", &local];
            let fetched = net.curl(family, "/", &extra);
            assert!(fetched.ok && !fetched.redirected(), "{family:?} {port}: {fetched:?}\n{}", net.logs());
            met.insert((port, family == Family::V4), fetched.server);
        }
    }
    met
}

#[test]
fn plain_clients_meet_the_same_server_on_and_off() {
    let mut net = net(4);
    // Ports are free again at once.
    net.client.sysctl("net.ipv4.tcp_max_tw_buckets", "0").expect("a sysctl");
    let ports = || (20_000..20_048).step_by(2);
    let on = met(&net, ports());
    let (_, kernel) = packets(&net);
    assert!(kernel as usize > on.len(), "{kernel} packets by the kernel");
    net.stop_balancer_and_count();
    let text = off(&usual(&net));
    net.start_balancer_with(&text);
    assert_eq!(met(&net, ports()), on);
    let servers: std::collections::BTreeSet<&String> = on.values().collect();
    assert_eq!(servers.len(), 4, "{on:?}");
}

/// Transfers of both families and ways that last some seconds.
fn start_slow(net: &Net, file: &TestFile) -> Vec<Transfer> {
    let kinds = Family::BOTH.into_iter().flat_map(|family| Way::BOTH.map(|way| (family, way)));
    let running = kinds.map(|(family, way)| net.start_transfer(family, way, file, &["--limit-rate", "4M"]));
    let running = running.collect();
    thread::sleep(Duration::from_millis(800));
    running
}

#[test]
fn changes_of_the_table_break_nothing() {
    let mut net = net(4);
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    // The fourth server takes nothing, so it can come and go.
    let config = |net: &Net, first, fourth| {
        net.balancer_config(|number| match number {
            1 => Some(first),
            4 => fourth,
            _ => Some("up"),
        })
    };
    net.reload_balancer(&config(&net, "up", Some("drain")));
    net.wait_for_balancer("configuration reloaded", 1);
    let running = start_slow(&net, &file);
    let begun = Instant::now();
    let mut reloads = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let first = ["up", "drain"][reloads % 2];
        let fourth = [Some("drain"), None, Some("down")][reloads % 3];
        net.reload_balancer(&config(&net, first, fourth));
        reloads += 1;
        thread::sleep(Duration::from_millis(50));
    }
    for transfer in running {
        let done = net.finish(transfer);
        assert!(done.redirected, "{done:?}");
    }
    let (here, kernel) = packets(&net);
    println!("{reloads} reloads asked for: {here} packets in userspace, {kernel} by the kernel");
    assert!(kernel > 500 && here < kernel / 10, "{here} {kernel}");
    net.stop_balancer_and_count();
    assert_eq!(ruleset(&net), "");
}

#[test]
fn transfers_go_on_while_a_killed_balancer_is_away() {
    let mut net = net(3);
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    let mut balancer = net.balancer_process.take().expect("it runs");
    balancer.kill().expect("it can be killed");
    assert!(ruleset(&net).contains("shunt_balancer_maps"));
    let heard = || kernel_counter(&net.client, "TcpInSegs");
    let before = heard();
    thread::sleep(Duration::from_secs(3));
    // Some may have come to their end meanwhile: curl's limit lets the first megabytes through at once.
    let segments = heard() - before;
    assert!(segments > 200, "{segments} segments while nobody was there\n{}", net.logs());
    net.start_balancer();
    for transfer in running {
        let done = net.finish(transfer);
        // 6 s of sending at the limited rate: being held up while nobody was there would show.
        assert!(done.redirected && done.seconds < 8.5, "{done:?}\n{}", net.logs());
    }
    net.stop_balancer_and_count();
    assert_eq!(ruleset(&net), "");
}

#[test]
fn handing_on_follows_firewalls_and_routes() {
    let mut net = net(3);
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    wait_routed(&net, None);
    there(&net, "nft", &["add table inet firewall"]);
    let chain = "add chain inet firewall passing { type filter hook forward priority 0; }";
    there(&net, "nft", &[chain]);
    there(&net, "nft", &["add rule inet firewall passing meta l4proto tcp counter"]);
    wait_routed(&net, Some("firewall"));
    thread::sleep(Duration::from_millis(500));
    let listed = there(&net, "nft", &["list table inet firewall"]);
    assert!(!listed.contains("packets 0 "), "it sees what passes: {listed}");
    there(&net, "nft", &["delete table inet firewall"]);
    wait_routed(&net, None);
    for transfer in running {
        let done = net.finish(transfer);
        assert!(done.redirected, "{done:?}");
    }
    // A route to nowhere, and none any more.
    let fetched = || net.curl(Family::V4, "/", &["--connect-timeout", "2"]).ok;
    let wait_for = |wanted| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while fetched() != wanted {
            assert!(Instant::now() < deadline, "wanted {wanted}\n{}", net.logs());
        }
    };
    wait_for(true);
    let client = "10.1.0.2/32";
    there(&net, "ip", &["route", "add", "blackhole", client]);
    wait_for(false);
    there(&net, "ip", &["route", "del", "blackhole", client]);
    wait_for(true);
    net.stop_balancer_and_count();
    assert_eq!(ruleset(&net), "");
}

#[test]
fn routed_on_request_a_firewall_sees_what_passes() {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    let text = format!("{}\n[host]\noffload = \"routed\"\n", usual(&net));
    net.start_balancer_with(&text);
    for number in 1..=2 {
        net.start_agent(number);
    }
    net.start_nginx();
    wait_routed(&net, Some("routed"));
    whole_and_past_userspace(&mut net, true);
    assert!(!hands_on(&net));
}
