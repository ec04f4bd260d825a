//! `answer = "balancer"` (N8): servers on which nothing of this project runs, only programs that listen on their service
//! ports.

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{Family, Net, Options, Way, shunt};
use shunt_lab::Host;

/// How long anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Four servers with nginx alone; `more` goes to the end of the balancer's file.
fn network(more: &str) -> Net {
    let mut net = Net::new(Options { start: false, ..Options::default() });
    let text = net.balancer_config(|_| Some("up")).replacen("legacy", "answer = \"balancer\"\nlegacy", 1);
    net.start_balancer_with(&(text + more));
    net.start_nginx();
    net
}

fn ctl(host: &Host, arguments: &[&str]) -> String {
    let mut command = shunt();
    command.arg("ctl").args(arguments);
    let output = host.enter(|| command.output()).expect("the namespace is there").expect("it starts");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// New connections, all redirected; the servers met.
fn spread(net: &Net, family: Family, count: usize) -> Vec<String> {
    let tally = net.connections(family, count, 4);
    assert!(tally.broken.is_empty() && tally.redirected == count, "{tally:?}\n{}", net.logs());
    tally.servers.into_keys().collect()
}

fn redirected_by(continuation: &str) {
    let mut net = network("");
    net.start_shim(continuation);
    let file = net.make_file("file", 8);
    for family in Family::BOTH {
        assert_eq!(spread(&net, family, 100), ["s1", "s2", "s3", "s4"]);
        for way in Way::BOTH {
            let done = net.transfer(family, way, &file);
            assert!(done.redirected, "{done:?}");
        }
    }
    let counts = net.stop_shim_and_count();
    assert_eq!(counts.of("reconnected"), 204, "nothing is half-open anywhere, so nobody hands over");
    assert_eq!((counts.of("handed_over"), counts.of("plain_unconfirmed")), (0, 0));
    let balancer = net.stop_balancer_and_count();
    // A repeated SYN is answered again.
    assert!(balancer.decided("redirected") >= 204);
    assert_eq!(balancer.decided("selected"), 0, "no SYN with R has gone to a server");
    assert!(balancer.of("shunt_balancer_confirmed_syn_acks_total") >= 204);
}

#[test]
fn n8_four_servers_without_agents_are_balanced_by_auto() {
    redirected_by("auto");
}

#[test]
fn n8_four_servers_without_agents_are_balanced_by_forced_handover() {
    redirected_by("handover");
}

#[test]
fn n8_plain_clients_are_served_beside() {
    let net = network("");
    for family in Family::BOTH {
        let tally = net.connections(family, 60, 4);
        assert_eq!((tally.plain, tally.redirected), (60, 0), "{tally:?}\n{}", net.logs());
        // A plain client that goes to a service port gets a C that it never asked for.
        for server in &net.servers {
            let mut command = Command::new("curl");
            command
                .args(["-sS", "--max-time", "5"])
                .arg(family.url(common::WEB_SERVICE + server.number, "/"));
            let output = net.client.run_within(&mut command, PATIENCE).expect("curl is installed");
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("hello from {}\n", server.name()));
        }
    }
}

#[test]
fn n8_drained_and_unhealthy_servers_get_no_new_connections() {
    let mut net = network("\n[health]\nkind = \"http\"\ninterval_ms = 200\ntimeout_ms = 1000\nfall = 2\n");
    net.start_shim("auto");
    ctl(&net.balancer, &["drain", "s2"]);
    for family in Family::BOTH {
        assert_eq!(spread(&net, family, 60), ["s1", "s3", "s4"]);
    }
    net.servers[2].programs.clear();
    let end = Instant::now() + PATIENCE;
    while !net.logs().contains("unhealthy: no new connections") {
        assert!(Instant::now() < end, "{}", net.logs());
        std::thread::sleep(Duration::from_millis(50));
    }
    // Both families' ports.
    std::thread::sleep(Duration::from_secs(1));
    for family in Family::BOTH {
        assert_eq!(spread(&net, family, 60), ["s1", "s4"]);
    }
}

#[test]
fn n8_connections_go_on_while_the_balancer_is_killed_and_restarted() {
    let mut net = network("");
    net.start_shim("auto");
    let file = net.make_file("file", 16);
    let running: Vec<_> = Family::BOTH
        .into_iter()
        .flat_map(|family| Way::BOTH.map(|way| (family, way)))
        .map(|(family, way)| net.start_transfer(family, way, &file, &["--limit-rate", "4M"]))
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    let mut killed = net.balancer_process.take().expect("it runs");
    killed.kill().expect("it can be killed");
    let text = std::fs::read_to_string(net.file("balancer.toml")).expect("its file");
    net.start_balancer_with(&text);
    for transfer in running {
        assert!(net.finish(transfer).redirected);
    }
    for family in Family::BOTH {
        assert_eq!(spread(&net, family, 60).len(), 4);
    }
}
