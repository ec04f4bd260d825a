//! Debian's unmodified programs over shim, balancer and agents: curl, nginx, iperf3.

mod common;

use std::process::Command;
use std::time::Duration;

use common::{Family, IPERF, Net, Options, Tally, Way};
use shunt_lab::{Direction, Impairment};

/// 2 % loss and some reordering, in each direction.
fn lossy() -> Impairment {
    Impairment {
        delay: Duration::from_micros(500),
        loss: 0.02,
        reorder: 0.02,
        reorder_by: Duration::from_millis(2),
        seed: 2,
        ..Impairment::default()
    }
}

fn no_connection_is_broken(net: &Net, what: &str, tally: &Tally) {
    assert!(tally.broken.is_empty(), "{what}: {:#?}\n{}", tally.broken, net.logs());
}

#[test]
fn a_thousand_connections_in_each_family_are_redirected() {
    let mut net = Net::new(Options::default());
    net.start_nginx();
    net.start_shim("auto");
    for family in Family::BOTH {
        let tally = net.connections(family, 1000, 8);
        println!("{family:?}: 1000 connections of curl, 8 at a time: {tally:?}");
        no_connection_is_broken(&net, "clean path", &tally);
        assert_eq!(tally.redirected, 1000, "{tally:?}\n{}", net.logs());
        assert!(tally.servers.len() == 4 && tally.servers.values().all(|count| *count > 150), "{tally:?}");
    }
    net.stop_shim();
}

#[test]
fn a_gibibyte_arrives_whole_in_each_direction_and_family() {
    let mut net = Net::new(Options { servers: 2, ..Options::default() });
    net.start_nginx();
    net.start_shim("auto");
    let file = net.make_file("gibibyte", 1024);
    for family in Family::BOTH {
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            println!(
                "{family:?} {way:?}: 1 GiB in {:.1} s, {:.0} Mbit/s: {}",
                done.seconds,
                done.megabits(),
                done.command
            );
            assert!(done.redirected && done.bytes == 1 << 30, "{done:?}\n{}", net.logs());
        }
    }
    net.stop_shim();
}

/// 64 MiB in the matrix of families and paths, both families at once.
fn transfers_arrive_whole(continuation: &str) {
    let mut net = Net::new(Options { servers: 2, access: Some(Impairment::default()), ..Options::default() });
    net.start_nginx();
    net.start_shim(continuation);
    let file = net.make_file("file", 64);
    for (path, impairment) in [("clean", Impairment::default()), ("lossy", lossy())] {
        let link = net.access.as_ref().expect("the access link is impaired");
        link.set(impairment).expect("the link runs");
        for way in Way::BOTH {
            let running = Family::BOTH.map(|family| net.start_transfer(family, way, &file, &[]));
            for transfer in running {
                let family = transfer.family;
                let done = net.finish(transfer);
                println!(
                    "{continuation} {path} {family:?} {way:?}: {} MiB in {:.1} s, {:.0} Mbit/s: {}",
                    done.bytes >> 20,
                    done.seconds,
                    done.megabits(),
                    done.command
                );
                // A connect may lose its SYN twice and then has to go plain (C6).
                assert!(done.redirected || path == "lossy", "{done:?}\n{}", net.logs());
            }
        }
    }
    for direction in [Direction::Forward, Direction::Backward] {
        let counters = net.access.as_ref().expect("it is impaired").counters(direction);
        assert!(counters.lost > 500 && counters.reordered > 500, "the path was lossy: {counters:?}");
    }
    net.stop_shim();
}

#[test]
fn transfers_arrive_whole_by_auto() {
    transfers_arrive_whole("auto");
}

#[test]
fn transfers_arrive_whole_by_reconnect() {
    transfers_arrive_whole("reconnect");
}

#[test]
fn transfers_arrive_whole_by_handover() {
    transfers_arrive_whole("handover");
}

#[test]
fn under_loss_connections_are_redirected_and_none_breaks() {
    let mut net = Net::new(Options { access: Some(lossy()), ..Options::default() });
    net.start_nginx();
    for continuation in ["auto", "reconnect", "handover"] {
        net.start_shim(continuation);
        for family in Family::BOTH {
            let tally = net.connections(family, 200, 20);
            println!("{continuation} {family:?}: 200 connections under 2 % loss: {tally:?}");
            no_connection_is_broken(&net, continuation, &tally);
            assert!(tally.redirected >= 180, "{continuation} {family:?}: {tally:?}\n{}", net.logs());
        }
        net.stop_shim();
    }
}

/// Runs iperf3 for a second and gives bits per second as received.
fn iperf(net: &Net, family: Family, extra: &[&str]) -> f64 {
    let mut command = Command::new("iperf3");
    command
        .args(["-c", family.vip(), "-p", &IPERF.to_string(), "-t", "1", "-J", "--connect-timeout", "5000"])
        .args(extra);
    let output = net
        .client
        .run_within(&mut command, Duration::from_secs(30))
        .unwrap_or_else(|error| panic!("iperf3 {family:?} {extra:?}: {error}\n{}", net.logs()));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("iperf3 writes JSON");
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.unwrap_or_else(|| panic!("iperf3 {family:?} {extra:?}: {report:#}"))
}

#[test]
fn iperf3_meets_one_server_with_all_its_connections() {
    let mut net = Net::new(Options { policy: "source", ..Options::default() });
    net.start_iperf();
    net.start_shim("auto");
    for family in Family::BOTH {
        for extra in [&[][..], &["-R"], &["-P", "8"], &["-P", "8", "-R"]] {
            let rate = iperf(&net, family, extra);
            println!(
                "{family:?}: {:.0} Mbit/s: iperf3 -c {} -t 1 {}",
                rate / 1e6,
                family.vip(),
                extra.join(" ")
            );
            assert!(rate > 1e6, "{family:?} {extra:?}: {rate} bit/s");
        }
    }
    // A server on the redirect port has met nobody; it is the first of each server's two.
    for server in &net.servers {
        let log = server.programs[0].log().expect("its log");
        assert!(
            !log.contains("Accepted connection"),
            "{} was met on the redirect port:\n{log}",
            server.name()
        );
    }
    net.stop_shim();
}

#[test]
fn servers_that_own_the_shared_address_are_reached_directly() {
    let mut net = Net::new(Options { forward: "direct", ..Options::default() });
    net.start_nginx();
    net.start_shim("auto");
    let file = net.make_file("file", 16);
    for family in Family::BOTH {
        let tally = net.connections(family, 100, 4);
        no_connection_is_broken(&net, "direct", &tally);
        assert_eq!(tally.redirected, 100, "{tally:?}\n{}", net.logs());
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            println!("direct {family:?} {way:?}: {:.0} Mbit/s: {}", done.megabits(), done.command);
            assert!(done.redirected, "{done:?}\n{}", net.logs());
        }
    }
    net.stop_shim();
    for family in Family::BOTH {
        let tally = net.connections(family, 40, 4);
        no_connection_is_broken(&net, "direct, plain", &tally);
        assert_eq!(tally.plain, 40, "{tally:?}\n{}", net.logs());
    }
}
