//! The client's kernel exchanges the ports of settled connections by itself; the shim decides as ever.

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::ctl::ctl;
use common::{Family, Net, Options, TestFile, Transfer, Way, difference, host_state, kernel_counter};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const OFF: &str = "[host]\noffload = \"off\"\n";

fn net(servers: u16) -> Net {
    let mut net = Net::new(Options { servers, ..Options::default() });
    // Closed connections are gone at once, and their ports free again.
    net.client.sysctl("net.ipv4.tcp_max_tw_buckets", "0").expect("a sysctl");
    net.start_nginx();
    net
}

/// What the shim has seen, and what the kernel has passed by itself.
#[derive(Debug, Clone, Copy)]
struct Packets {
    here: u64,
    kernel: u64,
    bytes: u64,
}

fn counters(net: &Net) -> Value {
    ctl(&net.client, &["counters", "--json"]).json()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

fn packets(net: &Net) -> Packets {
    let counters = counters(net);
    let kernel = &counters["kernel"];
    Packets {
        here: number(&counters["driver"]["received"]),
        kernel: number(&kernel["packets_out"]) + number(&kernel["packets_back"]),
        bytes: number(&kernel["bytes_out"]) + number(&kernel["bytes_back"]),
    }
}

fn offload(net: &Net) -> Value {
    ctl(&net.client, &["show", "--json"]).json()["offload"].clone()
}

fn ruleset(net: &Net) -> String {
    let mut command = Command::new("nft");
    command.args(["list", "ruleset"]);
    let output = net.client.run_within(&mut command, Duration::from_secs(10)).expect("nft is installed");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Connections whose ports stand in the kernel's maps.
fn standing(net: &Net) -> u64 {
    number(&offload(net)["connections"])
}

fn wait_until(what: &str, net: &Net, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(15);
    while !done() {
        assert!(Instant::now() < end, "{what}\n{}\n{}", offload(net), net.logs());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn c11_transfers_are_whole_and_the_shim_sees_little_of_them() {
    let mut net = net(3);
    let before = host_state(&net.client);
    let file = net.make_file("file", 64);
    net.start_shim("auto");
    for family in Family::BOTH {
        for way in Way::BOTH {
            let before = packets(&net);
            let done = net.transfer(family, way, &file);
            assert!(done.redirected, "{done:?}");
            let after = packets(&net);
            let (here, kernel) = (after.here - before.here, after.kernel - before.kernel);
            println!(
                "{family:?} {way:?}: {here} packets here, {kernel} by the kernel, {:.0} Mbit/s",
                done.megabits()
            );
            // Super-packets hold at most 64 KiB.
            assert!(kernel >= 64 * MIB / 65_536 / 2, "{kernel} packets by the kernel\n{}", net.logs());
            assert!(after.bytes - before.bytes > 32 * MIB, "{before:?} {after:?}");
            // What was in the device's queue when the kernel took over comes here, too.
            assert!(here < 1000 && here < kernel / 2, "{here} packets here, {kernel} by the kernel");
        }
    }
    wait_until("closed connections leave the maps", &net, || standing(&net) == 0);
    let counted = counters(&net);
    let kernel = &counted["kernel"];
    assert_eq!((&kernel["added"], &kernel["removed"]), (&4.into(), &4.into()), "{counted}");
    assert_eq!(offload(&net)["in_force"], true);
    let told = ctl(&net.client, &["show"]);
    assert!(told.out.contains("kernel offload: 0 connections, "), "{told:?}");
    net.stop_shim();
    assert_eq!(difference(&before, &host_state(&net.client)), "");
}

#[test]
fn switched_off_everything_passes_the_device() {
    let mut net = net(2);
    let file = net.make_file("file", 4);
    net.start_shim_keys("auto", OFF);
    for family in Family::BOTH {
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            assert!(done.redirected, "{done:?}");
        }
    }
    let seen = packets(&net);
    assert!(seen.here > 200 && seen.kernel == 0, "{seen:?}");
    assert!(!ruleset(&net).contains("swaps"), "{}", ruleset(&net));
    let offload = offload(&net);
    assert!(offload["why_not"].as_str().is_some_and(|why| why.contains("off")), "{offload}");
}

/// Transfers of both families and ways that last some seconds, all of them in the kernel's maps.
fn start_slow(net: &Net, file: &TestFile) -> Vec<Transfer> {
    let kinds = Family::BOTH.into_iter().flat_map(|family| Way::BOTH.map(|way| (family, way)));
    let running = kinds.map(|(family, way)| net.start_transfer(family, way, file, &["--limit-rate", "4M"]));
    let running = running.collect();
    wait_until("all four are settled", net, || standing(net) == 4);
    running
}

fn all_redirected(net: &Net, running: Vec<Transfer>) {
    for transfer in running {
        let done = net.finish(transfer);
        assert!(done.redirected, "{done:?}");
    }
}

#[test]
fn c12_transfers_go_on_while_a_killed_shim_is_away_and_its_successor_takes_them_over() {
    let mut net = net(3);
    let before = host_state(&net.client);
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    // The flows are saved every 50 ms.
    thread::sleep(Duration::from_millis(300));
    let mut shim = net.shim.take().expect("it runs");
    shim.kill().expect("it can be killed");
    assert!(ruleset(&net).contains("shunt_client_swaps"));
    let heard = kernel_counter(&net.client, "TcpInSegs");
    thread::sleep(Duration::from_secs(2));
    let segments = kernel_counter(&net.client, "TcpInSegs") - heard;
    assert!(segments > 200, "{segments} segments while nobody was there\n{}", net.logs());
    net.start_shim("auto");
    assert_eq!(standing(&net), 4, "{}", net.logs());
    for transfer in running {
        let done = net.finish(transfer);
        // 6 s of sending at the limited rate: being held up while nobody was there would show.
        assert!(done.redirected && done.seconds < 9.0, "{done:?}\n{}", net.logs());
    }
    let seen = packets(&net);
    assert!(seen.kernel > 100 && seen.here < seen.kernel, "{seen:?}");
    wait_until("closed connections leave the maps", &net, || standing(&net) == 0);
    net.stop_shim();
    assert_eq!(difference(&before, &host_state(&net.client)), "");
}

#[test]
fn transfers_survive_an_orderly_restart_and_a_reload_and_are_left_to_the_kernel_again() {
    let mut net = net(3);
    net.start_shim_keys("auto", "hold = \"always\"");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    net.stop_shim();
    assert!(!ruleset(&net).contains("swaps"), "{}", ruleset(&net));
    net.start_shim_keys("auto", "hold = \"always\"");
    assert_eq!(standing(&net), 4);
    let shim = net.shim.as_ref().expect("it runs");
    shim.signal(shunt_lab::Signal::SIGHUP).expect("a signal");
    let reloaded =
        || net.shim.as_ref().is_some_and(|shim| shim.log().is_ok_and(|log| log.contains("reloaded")));
    wait_until("the reload", &net, reloaded);
    let now = packets(&net);
    assert_eq!(standing(&net), 4);
    all_redirected(&net, running);
    let after = packets(&net);
    assert!(after.kernel - now.kernel > 100, "{now:?} {after:?}");
    wait_until("closed connections leave the maps", &net, || standing(&net) == 0);
}

#[test]
fn a_table_that_somebody_else_removes_costs_speed_alone_and_is_made_anew() {
    let mut net = net(2);
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    let mut command = Command::new("nft");
    command.args(["delete", "table", "inet", "shunt_client_swaps"]);
    let removed = net.client.run_within(&mut command, Duration::from_secs(10)).expect("nft is installed");
    assert!(removed.status.success(), "{removed:?}");
    let here = packets(&net).here;
    wait_until("all packets pass the shim", &net, || packets(&net).here > here + 100);
    // The next change finds the table gone.
    let done = net.transfer(Family::V4, Way::Down, &file);
    assert!(done.redirected, "{done:?}");
    assert!(ruleset(&net).contains("shunt_client_swaps"), "{}", net.logs());
    assert!(packets(&net).kernel > 100, "{:?}", packets(&net));
    all_redirected(&net, running);
    wait_until("closed connections leave the maps", &net, || standing(&net) == 0);
}

#[test]
fn connections_that_end_by_a_reset_are_freed() {
    let mut net = net(2);
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    for mut transfer in running {
        transfer.child.kill().expect("curl can be killed");
    }
    wait_until("reset connections leave the maps", &net, || standing(&net) == 0);
    wait_until("and the shim", &net, || {
        number(&ctl(&net.client, &["show", "--json"]).json()["connections"]) == 0
    });
    let counted = counters(&net);
    assert_eq!(counted["kernel"]["removed"], 4, "{counted}");
}

/// The socket of a connection that has ended is looked for every hour only: its flow, and its ports in the kernel, are
/// still there when the same own port connects again, to another server.
#[test]
fn c12_a_port_that_is_used_again_never_meets_the_server_of_before() {
    let mut net = net(4);
    let seldom = net.client_config("auto").replace("sockets_s = 1", "sockets_s = 3600");
    let config = net.file("client.toml");
    std::fs::write(&config, seldom).expect("a file can be written");
    net.shim = Some(net.daemon(&net.client, "client", &config, &[]));
    let file = net.make_file("file", 8);
    let mut servers = BTreeMap::new();
    for number in 0..12 {
        let family = Family::BOTH[number % 2];
        let transfer =
            net.start_transfer(family, Way::BOTH[number / 2 % 2], &file, &["--local-port", "40000"]);
        let done = net.finish(transfer);
        assert!(done.redirected, "{done:?}");
        *servers.entry(done.server).or_insert(0) += 1;
    }
    assert!(servers.len() > 1, "{servers:?}");
    let counted = counters(&net);
    let kernel = &counted["kernel"];
    assert_eq!((number(&kernel["added"]), number(&kernel["removed"])), (12, 10), "{counted}");
}

#[test]
fn c11_of_short_connections_the_shim_sees_the_handshakes() {
    let mut net = net(2);
    for continuation in ["reconnect", "handover"] {
        net.start_shim(continuation);
        for family in Family::BOTH {
            let before = packets(&net);
            let tally = net.connections(family, 200, 4);
            assert_eq!(tally.redirected, 200, "{tally:?}\n{}", net.logs());
            let after = packets(&net);
            let (here, kernel) = (after.here - before.here, after.kernel - before.kernel);
            println!("{continuation}, {family:?}: {here} packets here, {kernel} by the kernel");
            // Ten or eleven make a connection. SYN and SYN-ACK, and those again to the service port or the ACK, the request
            // and the answer, come here, and what was on its way when the kernel was told.
            assert!(here <= 8 * 200 && kernel >= 2 * 200, "{here} here, {kernel} by the kernel");
        }
        let counted = counters(&net);
        assert_eq!(counted["kernel"]["added"], 400, "{counted}");
        wait_until("closed connections leave the maps", &net, || standing(&net) == 0);
        net.stop_shim();
    }
}

/// The side that closes first keeps its socket for a minute, and the shim its flow; the kernel's maps need not.
#[test]
fn c12_connections_in_time_wait_leave_the_maps_and_stay_in_the_shim() {
    let mut net = net(1);
    net.client.sysctl("net.ipv4.tcp_max_tw_buckets", "4096").expect("a sysctl");
    net.start_shim("auto");
    // The server would keep the connection: it is curl that closes.
    let file = net.make_file("file", 1);
    for family in Family::BOTH {
        assert!(net.transfer(family, Way::Down, &file).redirected);
    }
    wait_until("closed connections leave the maps", &net, || standing(&net) == 0);
    let left = number(&ctl(&net.client, &["show", "--json"]).json()["connections"]);
    assert_eq!(left, 2, "{}", net.logs());
    assert_eq!(counters(&net)["kernel"]["removed"], 2);
}

#[test]
fn where_connections_are_tracked_or_recorded_nothing_is_left_to_the_kernel() {
    let mut net = net(1);
    net.start_shim_keys("auto", "notrack = false");
    let why = |net: &Net| offload(net)["why_not"].as_str().unwrap_or_default().to_owned();
    assert!(why(&net).contains("connection tracking"), "{}", why(&net));
    net.stop_shim();
    let config = net.file("client.toml");
    std::fs::write(&config, net.client_config("auto")).expect("a file can be written");
    let capture = net.file("capture.pcapng");
    let capture = ["--capture", capture.to_str().expect("UTF-8")];
    net.shim = Some(net.daemon(&net.client, "client", &config, &capture));
    assert!(why(&net).contains("capture"), "{}", why(&net));
    let done = net.transfer(Family::V4, Way::Down, &net.make_file("file", 1));
    assert!(done.redirected && packets(&net).kernel == 0, "{done:?}");
}
