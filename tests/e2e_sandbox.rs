//! Daemons work with what their sandbox leaves them, and can do no more.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::ctl::ctl;
use common::{Family, Net, Options, VIP4, WEB, difference, host_state};
use shunt_lab::{Child, Host, Signal};

const NET_ADMIN: u64 = 1 << 12;
const NET_BIND_SERVICE: u64 = 1 << 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// `/proc/PID/task/*/status` of all threads, by field.
fn threads(daemon: &Child) -> Vec<BTreeMap<String, String>> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.id())).expect("it runs");
    // One that has just ended is gone.
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    let fields = |text: String| {
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    texts.map(fields).collect()
}

/// Every thread has these capabilities, at least `least` of them, and is filtered.
fn assert_contained(what: &str, daemon: &Child, capabilities: u64, least: usize) {
    let threads = threads(daemon);
    assert!(threads.len() >= least, "{what}: {} threads", threads.len());
    for thread in threads {
        let name = &thread["Name"];
        for (set, expected) in
            [("CapInh", 0), ("CapPrm", capabilities), ("CapEff", capabilities), ("CapBnd", 0), ("CapAmb", 0)]
        {
            let found = u64::from_str_radix(&thread[set], 16).expect("hexadecimal");
            assert_eq!(found, expected, "{what}, thread {name}: {set}");
        }
        assert_eq!(thread["NoNewPrivs"], "1", "{what}, thread {name}");
        assert_eq!(thread["Seccomp"], "2", "{what}, thread {name}");
    }
}

/// Waits until the log has `text` more than `before` times.
fn wait_for_log(daemon: &Child, text: &str, before: usize) {
    let end = Instant::now() + PATIENCE;
    loop {
        let log = daemon.log().expect("a log");
        if log.matches(text).count() > before {
            return;
        }
        assert!(Instant::now() < end, "no {text:?} in\n{log}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn all_redirected(net: &Net, what: &str) {
    for family in Family::BOTH {
        for _ in 0..5 {
            let fetched = net.curl(family, "/", &[]);
            assert!(fetched.redirected(), "{what}: {fetched:?}\n{}", net.logs());
        }
    }
}

/// A daemon that records what it sees; a thread of its own writes that.
fn recorded(net: &Net, host: &Host, role: &str, config: &Path) -> Child {
    let capture = net.file(&format!("{role}.pcapng"));
    net.daemon(host, role, config, &["--capture", capture.to_str().expect("a path")])
}

fn write(net: &Net, name: &str, text: &str) -> PathBuf {
    let path = net.file(name);
    std::fs::write(&path, text).expect("a file can be written");
    path
}

fn hosts(net: &Net) -> Vec<&Host> {
    [&net.client, &net.balancer].into_iter().chain(net.servers.iter().map(|server| &server.host)).collect()
}

fn states(net: &Net) -> Vec<String> {
    hosts(net).into_iter().map(host_state).collect()
}

#[test]
fn daemons_reload_are_told_serve_and_restore_their_hosts_with_one_capability() {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    net.start_nginx();
    let before = states(&net);
    let text = net.balancer_config(|_| Some("up"));
    let config = write(&net, "balancer.toml", &text);
    net.balancer_process = Some(recorded(&net, &net.balancer, "balancer", &config));
    let config = write(&net, "agent1.toml", &net.agent_config(1, ""));
    net.servers[0].agent = Some(recorded(&net, &net.servers[0].host, "server", &config));
    net.start_agent(2);
    let config = write(&net, "client.toml", &net.client_config("auto"));
    net.shim = Some(recorded(&net, &net.client, "client", &config));
    all_redirected(&net, "first");

    // A reload that changes rules, routes and marks: one server less, one more; the balancer makes new tables beside.
    for number in [1, 2] {
        net.reload_balancer(
            &net.balancer_config(|server| Some(if server == number { "drain" } else { "up" })),
        );
        net.wait_for_balancer("configuration reloaded", usize::from(number));
        let fetched = net.curl(Family::V4, "/", &[]);
        assert!(fetched.redirected() && fetched.server == format!("s{}", 3 - number), "{fetched:?}");
    }
    net.reload_balancer(&net.balancer_config(|_| Some("up")));
    net.wait_for_balancer("configuration reloaded", 3);
    let said = ctl(&net.balancer, &["weight", "s1", "3"]);
    assert_eq!(said.code, 0, "{said:?}");
    let agent = net.servers[0].agent.as_ref().expect("it runs");
    let more = "\n[[service]]\nname = \"more\"\nredirect_port = 7001\nservice_port = 44001\n";
    write(&net, "agent1.toml", &(net.agent_config(1, "") + more));
    agent.signal(Signal::SIGHUP).expect("a signal");
    wait_for_log(agent, "was read again", 0);
    let shim = net.shim.as_ref().expect("it runs");
    let fewer = net.client_config("reconnect");
    write(&net, "client.toml", &fewer);
    shim.signal(Signal::SIGHUP).expect("a signal");
    wait_for_log(shim, "reloaded; redirected connections go on", 0);
    for host in [&net.servers[0].host, &net.client] {
        let said = ctl(host, &["show", "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
    }
    all_redirected(&net, "after reloads");

    // The capture's thread, and those that save flows and make tables.
    assert_contained("balancer", net.balancer_process.as_ref().expect("it runs"), NET_ADMIN, 3);
    assert_contained("agent", net.servers[0].agent.as_ref().expect("it runs"), NET_ADMIN, 2);
    assert_contained("shim", net.shim.as_ref().expect("it runs"), NET_ADMIN, 3);
    let daemons = [net.shim.take(), net.balancer_process.take()];
    let agents = net.servers.iter_mut().map(|server| server.agent.take());
    for mut daemon in daemons.into_iter().chain(agents).flatten() {
        let status = daemon.terminate(PATIENCE).expect("it ends");
        let log = daemon.log().expect("a log");
        assert!(status.success() && log.contains("sandboxed"), "{status}\n{log}");
        assert!(!log.contains("could not be undone"), "{log}");
    }
    for (before, after) in before.iter().zip(&states(&net)) {
        assert_eq!(difference(before, after), "", "something is left on a host");
    }
    let capture = std::fs::metadata(net.file("server.pcapng")).expect("a capture");
    assert!(capture.len() > 1000, "the capture has {} bytes", capture.len());
}

#[test]
fn new_servers_get_devices_and_the_balancer_keeps_its_capability() {
    for forward in ["direct", "network"] {
        new_servers(forward);
    }
}

fn new_servers(forward: &'static str) {
    let mut net = Net::new(Options { servers: 2, forward, ..Options::default() });
    assert_contained("balancer", net.balancer_process.as_ref().expect("it runs"), NET_ADMIN, 1);
    net.start_nginx();
    let one = net.balancer_config(|number| (number == 1).then_some("up"));
    net.reload_balancer(&one);
    net.wait_for_balancer("configuration reloaded", 1);
    let two = net.balancer_config(|_| Some("up"));
    net.reload_balancer(&two);
    net.wait_for_balancer("configuration reloaded", 2);
    net.start_shim("auto");
    all_redirected(&net, "with a new device");
    assert_contained("balancer", net.balancer_process.as_ref().expect("it runs"), NET_ADMIN, 1);
}

#[test]
fn a_proxy_listens_again_on_its_port_when_the_hosts_address_changes() {
    let mut net = Net::new(Options { servers: 1, ..Options::default() });
    net.start_nginx();
    let keys = "\nmode = \"proxy\"\n\n[timers]\npaths_s = 1\n";
    let text = format!("role = \"client\"{keys}\n[[vip]]\naddress = \"{VIP4}\"\n");
    let config = write(&net, "client.toml", &text);
    let forward = format!("127.0.0.1:81={VIP4}:{WEB}");
    net.shim = Some(net.daemon(&net.client, "client", &config, &["--forward", &forward]));
    let served = |what: &str| {
        let fetched = net.curl(Family::V4, "/", &["--connect-to", "::127.0.0.1:81"]);
        assert!(fetched.redirected(), "{what}: {fetched:?}\n{}", net.logs());
    };
    let shim = net.shim.as_ref().expect("it runs");
    served("first");
    assert_contained("proxy", shim, NET_ADMIN | NET_BIND_SERVICE, 1);
    let script = "ip addr del 10.1.0.2/24 dev eth0 && ip addr add 10.1.0.3/24 dev eth0 && \
                  ip route add default via 10.1.0.1";
    let moved = net.client.run_within(Command::new("sh").args(["-c", script]), PATIENCE);
    moved.expect("ip is installed");
    wait_for_log(shim, "connecting from", 1);
    thread::sleep(Duration::from_millis(200));
    served("from another address");
    net.stop_shim();
}

/// A balancer whose state directory has been tampered with: the name under which it will write its journal is a link to
/// somebody's file. Whether the file is whole after a reload.
fn journal_elsewhere(extra: &[&str]) -> (bool, String) {
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    let text = net.balancer_config(|number| (number == 1).then_some("up"));
    let (folder, outside) = (net.file("etc"), net.file("outside"));
    let state = net.file("state");
    for folder in [&folder, &outside, &state] {
        std::fs::create_dir(folder).expect("a folder");
    }
    let config = folder.join("balancer.toml");
    std::fs::write(&config, text).expect("a file");
    let mut arguments = vec!["--state-dir", state.to_str().expect("a path")];
    arguments.extend(extra);
    let balancer = net.daemon(&net.balancer, "balancer", &config, &arguments);
    let journals = std::fs::read_dir(&state).expect("a folder").flatten().map(|entry| entry.path());
    let journal = journals.filter(|path| path.extension().is_some_and(|end| end == "json"));
    let journal = journal.max_by_key(|path| path.metadata().map_or(0, |file| file.len())).expect("a journal");
    let victim = outside.join("victim");
    std::fs::write(&victim, "whole").expect("a file");
    std::os::unix::fs::symlink(&victim, journal.with_extension("new")).expect("a link");
    std::fs::write(&config, net.balancer_config(|_| Some("up"))).expect("a file");
    balancer.signal(Signal::SIGHUP).expect("a signal");
    let end = Instant::now() + PATIENCE;
    let told = |log: &str| log.contains("configuration reloaded") || log.contains("is refused");
    while !told(&balancer.log().expect("a log")) {
        assert!(Instant::now() < end, "{}", balancer.log().unwrap_or_default());
        thread::sleep(Duration::from_millis(20));
    }
    let log = balancer.log().expect("a log");
    net.balancer_process = Some(balancer);
    (std::fs::read_to_string(&victim).expect("it is there") == "whole", log)
}

#[test]
fn a_file_outside_of_its_folders_cannot_be_written_but_without_the_sandbox() {
    let (whole, log) = journal_elsewhere(&[]);
    if log.contains("no Landlock") {
        assert!(!whole, "nothing keeps it from it here\n{log}");
        return;
    }
    assert!(whole && log.contains("the old one stands") && log.contains("Permission denied"), "{log}");
    let (whole, log) = journal_elsewhere(&["--no-sandbox"]);
    assert!(!whole && log.contains("configuration reloaded") && !log.contains("sandboxed"), "{log}");
}

#[test]
fn keys_in_a_folder_it_did_not_know_are_refused_with_what_to_do() {
    use std::os::unix::fs::PermissionsExt as _;
    let net = Net::new(Options { servers: 1, ..Options::default() });
    let elsewhere = tempfile::tempdir().expect("a folder");
    let keys = elsewhere.path().join("keys");
    std::fs::write(&keys, "0 000102030405060708090a0b0c0d0e0f\n").expect("a file");
    std::fs::set_permissions(&keys, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    let text = net.balancer_config(|_| Some("up"));
    let with_keys = |path: &Path| format!("{text}\n[token]\nkeys = \"{}\"\n", path.display());
    let (inside, outside) = (net.file("keys"), with_keys(&keys));
    std::fs::copy(&keys, &inside).expect("a copy");
    net.reload_balancer(&outside);
    let balancer = net.balancer_process.as_ref().expect("it runs");
    let landlock = !balancer.log().expect("a log").contains("no Landlock");
    wait_for_log(balancer, if landlock { "is refused" } else { "configuration reloaded" }, 0);
    let log = balancer.log().expect("a log");
    assert_eq!(log.contains("was started: restart it"), landlock, "{log}");
    net.reload_balancer(&with_keys(&inside));
    net.wait_for_balancer("configuration reloaded", if landlock { 1 } else { 2 });
}
