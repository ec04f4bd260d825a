//! Tokens (J8): connections to service ports are for who was sent there, demanded by agents, by the balancer or by both;
//! keys are replaced and demands come and go under traffic.

mod common;

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Family, Net, Options, VIP4, VIP6, WEB_SERVICE, shunt};
use shunt_lab::{Host, Signal};

const KEYS: &str = "0 000102030405060708090a0b0c0d0e0f\n";
const NEW_KEYS: &str = "1 ffeeddccbbaa99887766554433221100\n";

fn write_keys(net: &Net, text: &str) {
    let path = net.file("keys");
    // As a whole: somebody may read it now.
    let new = net.file("keys.new");
    std::fs::write(&new, text).expect("a file can be written");
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    std::fs::rename(&new, &path).expect("a file can be renamed");
}

fn table(net: &Net, require: &str, more: &str) -> String {
    format!("[token]\nkeys = \"{}\"\nrequire = \"{require}\"\n{more}\n", net.file("keys").display())
}

/// Balancer and agents with what their files say of tokens, if anything; nginx runs.
fn network(balancer: impl Fn(&Net) -> String, agents: impl Fn(&Net) -> Option<String>) -> Net {
    let mut net = Net::new(Options { start: false, ..Options::default() });
    write_keys(&net, KEYS);
    let text = balancer(&net);
    net.start_balancer_with(&text);
    if let Some(extra) = agents(&net) {
        for number in 1..=net.options.servers {
            net.start_agent_with(number, &extra);
        }
    }
    net.start_nginx();
    net
}

fn all_up(net: &Net) -> String {
    net.balancer_config(|_| Some("up"))
}

/// What agents behind a balancer that rewrites addresses say.
fn agents_say(net: &Net, require: &str, more: &str) -> String {
    format!("vips = [\"{VIP4}\", \"{VIP6}\"]\n{}", table(net, require, more))
}

fn counters(host: &Host) -> serde_json::Value {
    let mut command = shunt();
    command.args(["ctl", "counters", "--json"]);
    let output = host.enter(|| command.output()).expect("the namespace is there").expect("it starts");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// New connections, all of them redirected, at all servers.
fn redirected(net: &Net, count: usize) {
    for family in Family::BOTH {
        let tally = net.connections(family, count, 4);
        assert!(tally.broken.is_empty() && tally.redirected == count, "{tally:?}\n{}", net.logs());
        // Of 60, one of four servers is left out once in ten million runs.
        assert!(count < 60 || tally.servers.len() == net.servers.len(), "{tally:?}");
    }
}

/// Whether a client without a shim gets in at the service port of the first server.
fn gets_in(net: &Net, family: Family) -> bool {
    let url = family.url(WEB_SERVICE + 1, "/");
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "2"]).arg(url);
    let output = net.client.enter(|| command.output()).expect("the namespace is there");
    output.expect("curl is installed").stdout == b"hello from s1\n"
}

/// What has to hold wherever tokens are always demanded; says how many SYNs without any were sent, at least.
fn only_the_redirected_get_in(net: &mut Net) -> u64 {
    for continuation in ["reconnect", "handover", "auto"] {
        net.start_shim(continuation);
        redirected(net, 60);
        net.stop_shim();
    }
    for family in Family::BOTH {
        assert!(!gets_in(net, family), "{family:?}");
        let plain = net.connections(family, 20, 2);
        assert_eq!(
            (plain.plain, plain.broken.len()),
            (20, 0),
            "the redirect port is for everybody: {plain:?}"
        );
    }
    2
}

#[test]
fn j8_agents_let_in_who_they_have_sent_and_health_checks() {
    let mut net = network(
        |net| {
            let port = "redirect_port = 80\n";
            all_up(net).replace(port, &format!("{port}check = {{ kind = \"http\", interval_ms = 200 }}\n"))
        },
        |net| Some(agents_say(net, "always", "trusted = [\"10.3.0.1\", \"fd00:3::1\"]")),
    );
    // Whoever was looked at before nginx was there is healthy again by now.
    thread::sleep(Duration::from_secs(1));
    let looks = |key: &str| {
        let counted = counters(&net.balancer)["servers"].clone();
        let of = |number: u16| counted[format!("s{number}")][key].as_u64().expect("a number");
        (1..=4).map(of).sum::<u64>()
    };
    let (made, failed) = (looks("checks"), looks("failed_checks"));
    thread::sleep(Duration::from_secs(1));
    assert!(looks("checks") >= made + 16, "{made}");
    assert_eq!(looks("failed_checks"), failed, "health checks get in");
    let refused = only_the_redirected_get_in(&mut net);
    let counted = counters(&net.servers[0].host);
    assert!(counted["server"]["tokens_missing"].as_u64() >= Some(refused), "{counted}");
    for server in &net.servers {
        let counted = &counters(&server.host)["server"];
        for reason in ["tokens_unknown_key", "tokens_expired", "tokens_mismatch"] {
            assert_eq!(counted[reason], 0, "{counted}");
        }
    }
}

#[test]
fn j8_the_balancer_lets_in_whom_agents_have_sent() {
    let mut net =
        network(|net| all_up(net) + &table(net, "always", ""), |net| Some(agents_say(net, "never", "")));
    let refused = only_the_redirected_get_in(&mut net);
    let counts = net.stop_balancer_and_count();
    assert!(counts.dropped("token_missing") >= refused);
    for reason in ["token_unknown_key", "token_expired", "token_mismatch"] {
        assert_eq!(counts.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn j8_n8_the_balancer_lets_in_whom_it_has_sent_itself() {
    let mut net = network(
        |net| all_up(net).replacen("legacy", "answer = \"balancer\"\nlegacy", 1) + &table(net, "always", ""),
        |_| None,
    );
    let refused = only_the_redirected_get_in(&mut net);
    let counts = net.stop_balancer_and_count();
    assert!(counts.dropped("token_missing") >= refused);
}

/// Everybody reads the keys again, one after the other.
fn reload_all(net: &Net) {
    let agents = net.servers.iter().filter_map(|server| server.agent.as_ref());
    for process in net.balancer_process.iter().chain(agents) {
        process.signal(Signal::SIGHUP).expect("a signal");
        // Meanwhile some are a step ahead of the others.
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn j8_keys_are_replaced_under_traffic_without_a_failed_connection() {
    let mut net = network(
        |net| all_up(net) + &table(net, "always", ""),
        |net| Some(agents_say(net, "always", "trusted = [\"10.3.0.1\", \"fd00:3::1\"]")),
    );
    net.start_shim("reconnect");
    let stop = AtomicBool::new(false);
    let total = thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut total = 0;
            while !stop.load(Ordering::SeqCst) {
                redirected(&net, 60);
                total += 120;
            }
            total
        });
        for keys in [format!("{KEYS}{NEW_KEYS}"), format!("{NEW_KEYS}{KEYS}"), NEW_KEYS.to_owned()] {
            thread::sleep(Duration::from_secs(1));
            write_keys(&net, &keys);
            reload_all(&net);
        }
        thread::sleep(Duration::from_secs(1));
        stop.store(true, Ordering::SeqCst);
        traffic.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    println!("{total} connections while keys were replaced");
    assert!(total >= 360, "{total}");
    net.stop_shim();
    for server in &net.servers {
        let counted = &counters(&server.host)["server"];
        for reason in ["tokens_missing", "tokens_unknown_key", "tokens_expired", "tokens_mismatch"] {
            assert_eq!(counted[reason], 0, "{counted}");
        }
    }
    let counts = net.stop_balancer_and_count();
    assert_eq!(counts.of("shunt_balancer_reloads_total"), 3);
    for reason in ["token_missing", "token_unknown_key", "token_expired", "token_mismatch"] {
        assert_eq!(counts.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn j8_under_load_the_balancer_demands_tokens_until_it_is_calm() {
    let mut net = network(
        |net| all_up(net) + &table(net, "under-load", "under_load_syns_per_s = 40"),
        |net| Some(agents_say(net, "never", "")),
    );
    for family in Family::BOTH {
        assert!(gets_in(&net, family), "before there is load");
    }
    let target = SocketAddr::new(VIP4.parse().expect("an address"), WEB_SERVICE + 1);
    net.client
        .enter(|| {
            thread::scope(|scope| {
                for _ in 0..100 {
                    scope.spawn(|| TcpStream::connect_timeout(&target, Duration::from_millis(500)).is_ok());
                }
            });
        })
        .expect("the namespace is there");
    for family in Family::BOTH {
        assert!(!gets_in(&net, family), "{family:?} under load\n{}", net.logs());
    }
    assert_eq!(counters(&net.balancer)["token_load"], true);
    net.start_shim("reconnect");
    redirected(&net, 12);
    net.stop_shim();
    let end = Instant::now() + Duration::from_secs(40);
    // Two SYNs a try are no load.
    while !gets_in(&net, Family::V6) {
        assert!(Instant::now() < end, "load does not end: {}", counters(&net.balancer));
    }
    assert!(gets_in(&net, Family::V4));
    assert_eq!(counters(&net.balancer)["token_load"], false);
    let counts = net.stop_balancer_and_count();
    assert_eq!(counts.of("shunt_balancer_token_loads_total"), 1);
}
