//! Daemons are asked and changed while they carry traffic, through `shunt ctl` and their sockets.

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::ctl::{Said, ctl};
use common::service::{self, Service};
use common::{Family, Net, OTHER_SERVICE, Options, TestFile, Transfer, WEB, WEB_SERVICE, Way, shunt};
use serde_json::Value;
use shunt_host::Role;
use shunt_lab::{Host, Signal};

/// How long anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(40);

/// Tells the balancer; it has to agree.
fn tell(net: &Net, arguments: &[&str]) -> Said {
    let said = ctl(&net.balancer, arguments);
    assert_eq!(said.code, 0, "{arguments:?}: {said:?}\n{}", net.logs());
    said
}

fn show(net: &Net) -> Value {
    tell(net, &["show", "--json"]).json()
}

/// A server as the balancer shows it.
fn server(net: &Net, name: &str) -> Value {
    let all = show(net);
    let list = all["servers"].as_array().expect("a list");
    list.iter().find(|server| server["name"] == name).cloned().unwrap_or_else(|| panic!("no {name}: {all}"))
}

fn wait_for(what: &str, net: &Net, mut there: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < end, "{what} does not come\n{}", net.logs());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Starts the balancer with another file than the usual.
fn start_balancer_with(net: &mut Net, text: &str) {
    let path = net.file("balancer.toml");
    std::fs::write(&path, text).expect("a file can be written");
    net.balancer_process = Some(net.daemon(&net.balancer, "balancer", &path, &[]));
}

/// A network whose balancer has this file, made of the usual one; agents run.
fn net_with(servers: u16, text: impl FnOnce(&Net) -> String) -> Net {
    let mut net = Net::new(Options { servers, start: false, ..Options::default() });
    let text = text(&net);
    start_balancer_with(&mut net, &text);
    for number in 1..=servers {
        net.start_agent(number);
    }
    net
}

fn all_up(net: &Net) -> String {
    net.balancer_config(|_| Some("up"))
}

/// Transfers of both families and ways, under way and slow enough to last some seconds.
fn start_slow(net: &Net, file: &TestFile) -> Vec<Transfer> {
    let kinds = Family::BOTH.into_iter().flat_map(|family| Way::BOTH.map(|way| (family, way)));
    let start = |(family, way)| net.start_transfer(family, way, file, &["--limit-rate", "4M"]);
    let running: Vec<Transfer> = kinds.map(start).collect();
    let open = || {
        let sockets = net.client.tcp_sockets().expect("sockets can be listed");
        let of_curl = |socket: &shunt_lab::TcpSocket| {
            socket.state == shunt_lab::TcpState::Established && socket.remote.port() == WEB
        };
        sockets.iter().filter(|socket| of_curl(socket)).count()
    };
    wait_for("a connection of each", net, || open() >= running.len());
    running
}

fn finish_all(net: &Net, running: Vec<Transfer>, what: &str) {
    for transfer in running {
        let done = net.finish(transfer);
        assert!(done.redirected, "{what}: {done:?}\n{}", net.logs());
    }
}

/// New connections: all redirected, none broken; by server.
fn spread(net: &Net, count: usize) -> std::collections::BTreeMap<String, usize> {
    let mut sum = std::collections::BTreeMap::new();
    for family in Family::BOTH {
        let tally = net.connections(family, count, 4);
        assert!(tally.broken.is_empty() && tally.redirected == count, "{tally:?}\n{}", net.logs());
        for (server, number) in tally.servers {
            *sum.entry(server).or_default() += number;
        }
    }
    sum
}

fn socket_of(host: &Host, role: Role) -> PathBuf {
    let state = std::path::Path::new(shunt_host::DEFAULT_STATE_DIR);
    let path = host.enter(|| shunt_host::control::default_socket(state, role));
    path.expect("the namespace is there").expect("it can be told")
}

#[test]
fn every_daemon_shows_what_it_is_and_counts() {
    let mut net = Net::new(Options { servers: 2, ..Options::default() });
    net.start_nginx();
    net.start_shim("auto");
    for family in Family::BOTH {
        for _ in 0..5 {
            let fetched = net.curl(family, "/", &[]);
            assert!(fetched.redirected(), "{fetched:?}\n{}", net.logs());
        }
    }
    let shown = show(&net);
    assert_eq!((&shown["role"], &shown["legacy"]), (&"balancer".into(), &"hash".into()));
    assert_eq!(shown["services"][0]["taking"], 2, "{shown}");
    let selected: u64 = shown["servers"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|server| server["counters"]["selected"].as_u64().expect("a number"))
        .sum();
    assert!(selected >= 10, "{shown}");
    let table = tell(&net, &["show"]).out;
    for word in ["SERVICE", "SERVER", "s1", "10.3.0.12", "iperf=42001", "random"] {
        assert!(table.contains(word), "no {word}:\n{table}");
    }
    let counters = tell(&net, &["counters", "--json"]).json();
    assert!(counters["decisions"]["selected"].as_u64() >= Some(10), "{counters}");
    let prometheus = tell(&net, &["counters", "--prometheus"]).out;
    assert!(prometheus.contains("shunt_balancer_packets_total{decision=\"selected\"} "), "{prometheus}");
    assert!(tell(&net, &["counters"]).out.contains("decisions selected"));
    let config = tell(&net, &["config"]).out;
    assert_eq!(config, all_up(&net), "what is in force is the file");

    let shim = ctl(&net.client, &["show", "--json"]).json();
    assert_eq!((&shim["role"], &shim["mode"]), (&"client".into(), &"transparent".into()));
    assert_eq!(shim["vips"][0]["interface"], "eth0", "{shim}");
    let machine = ctl(&net.client, &["counters", "--json"]).json();
    assert!(machine["machine"]["asked"].as_u64() >= Some(10), "{machine}");
    let prometheus = ctl(&net.client, &["counters", "--prometheus"]).out;
    assert!(prometheus.contains("\nshunt_client_machine_asked_total "), "{prometheus}");
    assert!(ctl(&net.client, &["show"]).out.contains("VIP"));

    // One connection that stays, so that there is something to be counted.
    let path = net.file("held");
    std::fs::write(&path, vec![0; 20 << 20]).expect("a file can be written");
    for server in &net.servers {
        std::fs::hard_link(&path, net.root(server.number).join("held")).expect("a link");
    }
    let mut command = Command::new("curl");
    command.args(["-sS", "--limit-rate", "1M", "-o", "/dev/null"]).arg(Family::V4.url(WEB, "/held"));
    let mut held = net.client.spawn_logged(&mut command, net.file("held.log")).expect("curl starts");
    let count = |net: &Net| -> u64 {
        let counted = net.servers.iter().map(|server| ctl(&server.host, &["connections", "--json"]).json());
        counted.map(|counted| counted["services"][0]["connections"].as_u64().expect("a number")).sum()
    };
    wait_for("the connection", &net, || count(&net) == 1);
    wait_for("its flow", &net, || {
        let shown = ctl(&net.client, &["show", "--json"]).json();
        shown["flows"]
            .as_array()
            .is_some_and(|flows| flows.iter().any(|flow| flow["vip"] == "203.0.113.10:80"))
    });
    held.kill().expect("it can be killed");
    wait_for("its end", &net, || count(&net) == 0);
    // Nobody listens on the ports of the third service.
    wait_for("who listens", &net, || {
        let agent = ctl(&net.servers[0].host, &["show", "--json"]).json();
        assert_eq!(agent["role"], "server");
        let silent = |service: usize| agent["services"][service]["silent"].as_array().map(Vec::len);
        (silent(0), silent(2)) == (Some(0), Some(2))
    });
    assert!(ctl(&net.servers[0].host, &["connections"]).out.contains("41001"));
    net.stop_shim();
    assert!(!socket_of(&net.client, Role::Client).exists(), "a daemon that ended leaves no socket");
}

#[test]
fn bad_requests_get_a_sentence_and_change_nothing() {
    let net = Net::new(Options { servers: 2, ..Options::default() });
    let path = socket_of(&net.balancer, Role::Balancer);
    let mode =
        |path: &std::path::Path| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().expect("a directory"))), (0o600, 0o700));
    let say = |text: &[u8]| {
        let mut stream = UnixStream::connect(&path).expect("it is served");
        stream.set_read_timeout(Some(PATIENCE)).expect("it can be told");
        stream.write_all(text).expect("it is read");
        stream.shutdown(std::net::Shutdown::Write).expect("it can be told");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    for bad in [
        &b"hello\n"[..],
        b"{\"command\":\"shew\"}\n",
        b"{\"command\":\"show\",\"x\":1}\n",
        b"\xff\n",
        b"[[[[",
        b"{\"command\":\"weight\",\"name\":\"s1\",\"weight\":4294967296}\n",
    ] {
        let answer = say(bad);
        assert!(answer.starts_with("{\"error\":\"") && answer.lines().count() == 1, "{bad:?}: {answer}");
    }
    let long = say(&vec![b'['; 64 << 10]);
    assert!(long.contains("at most 65536 bytes"), "{long}");
    let shown: Value = serde_json::from_str(&say(b"{\"command\":\"show\"}\n")).expect("JSON");
    assert_eq!(shown["done"]["role"], "balancer");

    let (config, shown) = (tell(&net, &["config"]).out, show(&net)["servers"].clone());
    for (arguments, told) in [
        (&["weight", "s1", "0"][..], "a weight is between"),
        (&["weight", "s9", "1"], "no server named \"s9\""),
        (&["policy", "web", "best"], "unknown variant `best`"),
        (&["policy", "mail", "random"], "no service named \"mail\""),
        (&["server", "add", "s1", "address=10.3.0.99"], "another server is named"),
        (&["server", "add", "s9", "address=203.0.113.10"], "is a VIP"),
        (&["server", "add", "s9", "address=10.3.0.99", "ports.web=41001"], "\"s1\"'s already"),
        (&["server", "set", "s1", "colour=red"], "unknown field `colour`"),
        (&["server", "remove", "s9"], "no server named"),
        (&["drain", "s9", "--wait"], "no server named"),
        (&["connections"], "no request of this daemon"),
    ] {
        let said = ctl(&net.balancer, arguments);
        assert!(said.code == 1 && said.error.contains(told), "{arguments:?}: {said:?}");
    }
    assert_eq!((tell(&net, &["config"]).out, show(&net)["servers"].clone()), (config, shown));
    for usage in [&["weight", "s1"][..], &["server", "set", "s1"], &["shew"], &["weight", "s1", "-1"]] {
        assert_eq!(ctl(&net.balancer, usage).code, 2, "{usage:?}");
    }
    let nobody = ctl(&net.middle, &["show"]);
    assert!(nobody.code == 1 && nobody.error.contains("no Shunt daemon runs"), "{nobody:?}");
    let nobody = ctl(&net.balancer, &["show", "--role", "server"]);
    assert!(nobody.code == 1 && nobody.error.contains("no server runs"), "{nobody:?}");
    let path = path.to_str().expect("UTF-8");
    assert_eq!(ctl(&net.middle, &["show", "--socket", path]).code, 0, "a path is found from everywhere");

    // Two daemons, one namespace.
    let agent = "role = \"server\"\ninterface = \"br0\"\naddresses = [\"10.3.0.1\"]\n[[service]]\nname = \"web\"\n\
                 redirect_port = 8080\nservice_port = 48080\n";
    let file = net.file("second.toml");
    std::fs::write(&file, agent).expect("a file can be written");
    let _agent = net.daemon(&net.balancer, "server", &file, &[]);
    let which = ctl(&net.balancer, &["show"]);
    assert!(which.code == 2 && which.error.contains("a balancer and a server run here"), "{which:?}");
    for role in ["balancer", "server"] {
        assert_eq!(ctl(&net.balancer, &["--role", role, "show", "--json"]).json()["role"], role);
    }
}

#[test]
fn servers_weights_and_policies_change_under_traffic() {
    let mut net = net_with(4, |net| net.balancer_config(|number| (number != 4).then_some("up")));
    net.start_nginx();
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);

    let [v4, v6] = net.servers[3].addresses();
    let address = format!("address=[\"{v4}\",\"{v6}\"]");
    tell(
        &net,
        &["server", "add", "s4", &address, "ports.web=41004", "ports.iperf=42004", "ports.other=43004"],
    );
    let met = spread(&net, 60);
    assert!(met.get("s4").is_some_and(|count| *count > 5), "the added server is used: {met:?}");

    tell(&net, &["policy", "web", "round-robin"]);
    tell(&net, &["weight", "s4", "7"]);
    let met = spread(&net, 50);
    // 7 turns of 10; a repeated SYN takes one more.
    assert!(met.get("s4").is_some_and(|count| (60..=80).contains(count)), "{met:?}");

    tell(&net, &["drain", "s4"]);
    assert_eq!(server(&net, "s4")["state"], "drain");
    let met = spread(&net, 30);
    assert!(!met.contains_key("s4"), "{met:?}");
    tell(&net, &["enable", "s4"]);
    assert!(spread(&net, 30).contains_key("s4"));
    tell(&net, &["drain", "s4"]);
    tell(&net, &["server", "remove", "s4"]);
    assert!(!spread(&net, 30).contains_key("s4"));
    assert_eq!(show(&net)["servers"].as_array().map(Vec::len), Some(3));
    finish_all(&net, running, "changed by request");

    // What is in force can be saved; the file is as it was, and SIGHUP takes it.
    let saved = net.file("saved.toml");
    std::fs::write(&saved, tell(&net, &["config"]).out).expect("a file can be written");
    let checked = shunt().arg("check").arg(&saved).output().expect("it starts");
    assert!(checked.status.success(), "{checked:?}");
    assert_eq!(show(&net)["services"][0]["policy"], "round-robin");
    let process = net.balancer_process.as_ref().expect("it runs");
    process.signal(Signal::SIGHUP).expect("a signal");
    wait_for("the file", &net, || show(&net)["services"][0]["policy"] == "random");
    // And by request.
    tell(&net, &["policy", "web", "source"]);
    tell(&net, &["reload"]);
    assert_eq!(show(&net)["services"][0]["policy"], "random");
    let broken = format!("{}\nnonsense", all_up(&net));
    std::fs::write(net.file("balancer.toml"), broken).expect("a file can be written");
    let refused = ctl(&net.balancer, &["reload"]);
    assert!(refused.code == 1 && refused.error.contains("balancer.toml:"), "{refused:?}");
    assert_eq!(spread(&net, 20).values().sum::<usize>(), 40);
    net.stop_shim();
}

/// A connection of [`service::echo`] to a server, by whatever way new ones go.
fn connection_to(net: &Net, number: u16, family: Family) -> TcpStream {
    for _ in 0..200 {
        let stream = net.client.enter(|| -> std::io::Result<_> {
            let mut stream = service::connect(family)?;
            stream.write_all(b"?")?;
            let (server, port) = service::read_card(&mut stream)?;
            Ok((stream, server, port))
        });
        let (stream, server, port) = stream.expect("the namespace is there").expect("it answers");
        assert_eq!(port, OTHER_SERVICE + server, "it is redirected\n{}", net.logs());
        if server == number {
            return stream;
        }
    }
    panic!("no connection reaches server {number}\n{}", net.logs());
}

fn echoed(stream: &mut TcpStream) {
    stream.write_all(b"x").expect("it takes");
    stream.read_exact(&mut [0]).expect("it answers");
}

#[test]
fn drain_waits_for_what_the_agent_counts() {
    let with_agents = |net: &Net| {
        let mut text = all_up(net);
        for server in &net.servers {
            let name = format!("name = \"{}\"\n", server.name());
            let agent = format!("{name}agent = \"{}:9000\"\n", server.addresses()[0]);
            text = text.replace(&name, &agent);
        }
        text
    };
    let mut net = Net::new(Options { servers: 2, start: false, ..Options::default() });
    let text = with_agents(&net);
    start_balancer_with(&mut net, &text);
    for number in 1..=2u16 {
        let listen = net.servers[usize::from(number) - 1].addresses()[0].clone();
        let text = net.agent_config(number, "") + &format!("\n[status]\nlisten = \"{listen}:9000\"\n");
        let path = net.file(&format!("agent{number}.toml"));
        std::fs::write(&path, text).expect("a file can be written");
        let agent = net.daemon(&net.servers[usize::from(number) - 1].host, "server", &path, &[]);
        net.servers[usize::from(number) - 1].agent = Some(agent);
    }
    let _service = Service::start(&net, service::echo);
    net.start_shim("auto");
    let mut held = connection_to(&net, 1, Family::V4);
    let mut other = connection_to(&net, 2, Family::V6);

    let said = ctl(&net.balancer, &["drain", "s1", "--wait", "--timeout", "2", "--json"]);
    assert_eq!(said.code, 1, "{said:?}");
    let last: Value = serde_json::from_str(said.out.lines().last().unwrap_or_default()).expect("JSON");
    assert!(last["error"].as_str().is_some_and(|why| why.contains("it still has 1 connections")), "{said:?}");
    let first: Value = serde_json::from_str(said.out.lines().next().unwrap_or_default()).expect("JSON");
    assert_eq!(first["progress"]["connections"], 1, "{said:?}");
    assert_eq!(server(&net, "s1")["state"], "drain", "it stays drained");
    echoed(&mut held);

    thread::scope(|scope| {
        let waiting = scope.spawn(|| ctl(&net.balancer, &["drain", "s1", "--wait", "--timeout", "60"]));
        // Others are answered meanwhile, also what ends the wait of another.
        let mut command = shunt();
        command.args(["ctl", "drain", "s2", "--wait"]);
        let mut enabled = net.balancer.spawn_logged(&mut command, net.file("drain.log")).expect("it starts");
        enabled.wait_for_log("s2: 1 connections", PATIENCE).expect("it waits");
        tell(&net, &["enable", "s2"]);
        let status = enabled.wait_timeout(PATIENCE).expect("it can be waited for");
        let log = enabled.log().expect("a log");
        assert!(
            status.is_some_and(|status| status.code() == Some(1)) && log.contains("no longer drained"),
            "{log}"
        );
        assert!(!waiting.is_finished(), "a connection is left");
        drop(held);
        let said = waiting.join().expect("no panic");
        assert!(said.code == 0 && said.out.contains("s1 is safe to remove"), "{said:?}\n{}", net.logs());
    });
    tell(&net, &["server", "remove", "s1"]);
    echoed(&mut other);

    // The status address tells the count and nothing else.
    let asked = net.balancer.enter(|| {
        let mut stream = TcpStream::connect("10.3.0.12:9000").expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("it can be told");
        let requests = b"{\"command\":\"show\"}\n{\"command\":\"connections\"}\n";
        stream.write_all(requests).expect("it reads");
        stream.shutdown(std::net::Shutdown::Write).expect("it can be told");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer
    });
    let asked = asked.expect("the namespace is there");
    let lines: Vec<&str> = asked.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains("unknown variant `show`"), "{asked}");
    let counted: Value = serde_json::from_str(lines[1]).expect("JSON");
    let third = &counted["done"]["services"][2];
    assert_eq!((&third["service_port"], &third["connections"]), (&43002.into(), &1.into()), "{asked}");
    net.stop_shim();
}

#[test]
fn drain_without_an_agent_waits_for_silence() {
    let mut net = net_with(2, |net| all_up(net) + "\n[control]\nquiet_s = 2\n");
    let _service = Service::start(&net, service::echo);
    net.start_shim("auto");
    let mut held = connection_to(&net, 1, Family::V6);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| ctl(&net.balancer, &["drain", "s1", "--wait", "--timeout", "5"]));
        while !waiting.is_finished() {
            echoed(&mut held);
            thread::sleep(Duration::from_millis(100));
        }
        let said = waiting.join().expect("no panic");
        assert!(said.code == 1 && said.error.contains("the last packet to it was"), "{said:?}");
    });
    drop(held);
    let said = tell(&net, &["drain", "s1", "--wait", "--timeout", "60"]);
    assert!(said.error.contains("s1: no packet for"), "progress is told: {said:?}");
    net.stop_shim();
}

#[test]
fn b7_a_server_whose_program_stops_gets_no_new_connections_until_it_is_back() {
    let mut net = net_with(2, |net| {
        let check = "check = { kind = \"http\", path = \"/index.html\", interval_ms = 200, timeout_ms = 3000, rise = 2, fall = 2 }";
        all_up(net).replacen("policy = \"random\"\n", &format!("policy = \"random\"\n{check}\n"), 1)
    });
    net.start_nginx();
    net.start_shim("auto");
    let healthy = |net: &Net, name: &str| server(net, name)["health"].clone();
    for name in ["s1", "s2"] {
        wait_for("health", &net, || healthy(&net, name) == "healthy");
    }
    let met = spread(&net, 40);
    assert_eq!(met.len(), 2, "{met:?}");
    let file = net.make_file("file", 16);
    let stop = |net: &mut Net, number: usize| {
        let mut nginx = net.servers[number - 1].programs.remove(0);
        nginx.terminate(Duration::from_secs(10)).expect("nginx ends");
    };
    // Both families are looked at apart.
    let down = |net: &Net, name: &str| {
        let server = server(net, name);
        server["checks"].as_array().is_some_and(|checks| {
            checks.len() == 2 && checks.iter().all(|check| check["state"] == "unhealthy")
        })
    };
    let changes = |server: &Value| server["counters"]["health_changes"].as_u64().expect("a number");
    let before = changes(&server(&net, "s1"));
    stop(&mut net, 1);
    wait_for("the fall", &net, || down(&net, "s1"));
    // On the other nothing is disturbed, and it gets everything: clients with a shim and without.
    let running = start_slow(&net, &file);
    let met = spread(&net, 40);
    assert!(met.len() == 1 && met.contains_key("s2"), "{met:?}");
    let shown = server(&net, "s1");
    let failure = shown["checks"][0]["failure"].as_str().unwrap_or_default();
    assert!(failure.contains("Connection refused"), "{shown}");
    assert!(shown["state"] == "up" && changes(&shown) >= before + 2, "{before} {shown}");
    assert!(shown["counters"]["failed_checks"].as_u64() >= Some(2), "{shown}");
    assert_eq!(show(&net)["services"][0]["taking"], 1);
    assert!(tell(&net, &["show"]).out.contains("Connection refused"));
    // A change by request keeps what is known.
    tell(&net, &["weight", "s1", "9"]);
    assert!(!spread(&net, 20).contains_key("s1"));

    start_nginx_again(&mut net, 1);
    wait_for("the rise", &net, || healthy(&net, "s1") == "healthy");
    finish_all(&net, running, "while the other was unhealthy");
    // Its agent looks every second who listens; until then it does not redirect (S6).
    wait_for("the agent's look", &net, || {
        let agent = ctl(&net.servers[0].host, &["show", "--json"]).json();
        agent["services"][0]["silent"].as_array().is_some_and(Vec::is_empty)
    });
    assert!(spread(&net, 40).contains_key("s1"));
    net.stop_shim();
    let plain = net.connections(Family::V4, 60, 4);
    assert!(plain.broken.is_empty() && plain.servers.len() == 2, "{plain:?}");

    // Nobody left: dropped and counted, as where no server is up.
    stop(&mut net, 1);
    stop(&mut net, 2);
    wait_for("no server", &net, || down(&net, "s1") && down(&net, "s2"));
    assert_eq!(show(&net)["services"][0]["taking"], 0);
    let dropped = |net: &Net| tell(net, &["counters", "--json"]).json()["drops"]["no_server"].as_u64();
    let before = dropped(&net);
    let nobody = net.curl(Family::V4, "/", &["--connect-timeout", "2"]);
    assert!(!nobody.ok, "{nobody:?}");
    assert!(dropped(&net) > before, "{before:?}");
    start_nginx_again(&mut net, 2);
    wait_for("a server", &net, || show(&net)["services"][0]["taking"] == 1);
    let tally = net.connections(Family::V6, 20, 2);
    assert!(tally.broken.is_empty() && tally.servers.len() == 1, "{tally:?}\n{}", net.logs());
}

fn start_nginx_again(net: &mut Net, number: u16) {
    let root = net.root(number);
    let mut command = Command::new("nginx");
    command.arg("-c").arg(root.join("nginx.conf")).arg("-e").arg(root.join("error.log"));
    let server = &mut net.servers[usize::from(number) - 1];
    let nginx = server.host.spawn_logged(&mut command, root.join("nginx.out")).expect("nginx starts");
    server.programs.insert(0, nginx);
    common::wait_listening(&server.host, WEB_SERVICE + number);
}

#[test]
fn b6_reloads_every_10_ms_break_no_redirected_connection() {
    let mut net = net_with(4, all_up);
    net.start_nginx();
    net.start_shim("auto");
    let file = net.make_file("file", 24);
    let running = start_slow(&net, &file);
    let texts = [all_up(&net), net.balancer_config(|number| Some(if number == 4 { "drain" } else { "up" }))];
    let (path, new) = (net.file("balancer.toml"), net.file("balancer.new"));
    let process = net.balancer_process.as_ref().expect("it runs");
    let begun = Instant::now();
    let (mut signals, mut connections) = (0, 0);
    thread::scope(|scope| {
        let signalling = scope.spawn(|| {
            while begun.elapsed() < Duration::from_secs(4) {
                std::fs::write(&new, &texts[signals % 2]).expect("a file can be written");
                std::fs::rename(&new, &path).expect("it can be moved");
                process.signal(Signal::SIGHUP).expect("a signal");
                signals += 1;
                thread::sleep(Duration::from_millis(10));
            }
        });
        while !signalling.is_finished() {
            connections += spread(&net, 20).values().sum::<usize>();
        }
    });
    finish_all(&net, running, "reloaded");
    let counters = tell(&net, &["counters", "--json"]).json();
    let (reloads, refused) = (counters["reloads"].as_u64(), &counters["refused_reloads"]);
    println!("{signals} signals, {reloads:?} reloads, {connections} connections meanwhile, none broken");
    assert!(reloads > Some(5) && *refused == 0, "{counters}");
    assert!(connections >= 40);
    // The last file stands.
    let wanted = &texts[(signals - 1) % 2];
    wait_for("the last file", &net, || tell(&net, &["config"]).out == *wanted);
    net.stop_shim();
}
